//! The kernel's packet mover, `/dev/vhost-net`: one descriptor for each pair of queues.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use thiserror::Error;
use vhost::VhostBackend;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueState;
use vm_memory::{GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::tap::Tap;
use crate::virtio::vhost::{hand_over, regions, take_back};
use crate::virtio::{Activation, ActiveQueue, Memory};

/// Features that the kernel must have too, for it works on the queues; all others are the tap's.
const OF_QUEUES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_F_VERSION_1;

/// Why the kernel does not move packets.
#[derive(Debug, Error)]
pub enum KernelError {
    /// It is something else.
    #[error("the descriptor is not /dev/vhost-net's")]
    NoVhost(#[source] vhost::Error),
    /// It is too old.
    #[error("the kernel's vhost-net has no virtio 1: leave it out")]
    Legacy,
    /// A request failed.
    #[error("vhost-net cannot {action}")]
    Request {
        /// What was asked for.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    action: &'static str,
) -> impl FnOnce(E) -> KernelError {
    move |e| KernelError::Request { action, source: io::Error::other(e) }
}

/// All descriptors of one device.
pub struct Kernel {
    backends: Vec<Backend>,
    features: u64,
}

/// What moves the packets of one pair of queues.
struct Backend {
    file: File,
    /// This process has introduced itself, which it may do once.
    owned: bool,
    /// What it works on: the receive queue, the transmit queue.
    rings: Option<([ActiveQueue; 2], Memory)>,
    connected: bool,
}

/// A descriptor with the memory that its addresses are in.
struct Handle<'a> {
    file: &'a File,
    memory: &'a Memory,
}

impl AsRawFd for Handle<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Handle<'_> {
    type AS = Memory;

    fn mem(&self) -> &Memory {
        self.memory
    }
}

impl Kernel {
    /// Works with `/dev/vhost-net`, opened for each pair.
    pub fn new(files: Vec<OwnedFd>) -> Result<Kernel, KernelError> {
        let none = Memory::new(GuestMemoryMmap::new());
        let mut features = OF_QUEUES;
        let mut backends = Vec::with_capacity(files.len());
        for file in files {
            let file = File::from(file);
            let handle = Handle { file: &file, memory: &none };
            features &= handle.get_features().map_err(KernelError::NoVhost)?;
            backends.push(Backend { file, owned: false, rings: None, connected: false });
        }
        if features >> VIRTIO_F_VERSION_1 & 1 == 0 {
            return Err(KernelError::Legacy);
        }
        Ok(Kernel { backends, features })
    }

    /// What is left of these features with this kernel.
    pub fn supported(&self, features: u64) -> u64 {
        features & (self.features | !OF_QUEUES)
    }

    /// Takes the queues of packets out of `activation` and hands those over of which the driver set up both of a pair.
    pub fn start(&mut self, activation: &mut Activation) -> Result<(), KernelError> {
        self.stop();
        let features = (activation.features | 1 << VIRTIO_F_VERSION_1) & self.features;
        for (pair, backend) in self.backends.iter_mut().enumerate() {
            let mut take = |index| {
                let at = activation.queues.iter().position(|active| active.index == index)?;
                Some(activation.queues.remove(at))
            };
            if let (Some(receive), Some(transmit)) = (take(2 * pair), take(2 * pair + 1)) {
                backend.start([receive, transmit], activation, features)?;
            }
        }
        Ok(())
    }

    /// Connects a pair's queues with a queue of the tap, or leaves them alone.
    pub fn connect(&mut self, pair: usize, tap: Option<&Tap>) -> Result<(), KernelError> {
        self.backends.get_mut(pair).map_or(Ok(()), |backend| backend.connect(tap.map(Tap::file)))
    }

    /// Takes all queues back.
    pub fn stop(&mut self) -> Vec<(usize, QueueState)> {
        self.backends.iter_mut().flat_map(Backend::stop).collect()
    }
}

impl Backend {
    fn start(
        &mut self,
        queues: [ActiveQueue; 2],
        activation: &Activation,
        features: u64,
    ) -> Result<(), KernelError> {
        let handle = Handle { file: &self.file, memory: &activation.memory };
        if !self.owned {
            handle.set_owner().map_err(failed("be taken"))?;
            self.owned = true;
        }
        handle.set_features(features).map_err(failed("agree on features"))?;
        let guard = activation.memory.memory();
        handle
            .set_mem_table(&regions(&guard).map_err(failed("describe memory"))?)
            .map_err(failed("take the table of memory"))?;
        for (number, active) in queues.iter().enumerate() {
            // The crate finds the addresses in this process.
            hand_over(&handle, number, active, &guard, &*activation.interrupt, Ok)
                .map_err(failed("take a queue"))?;
        }
        drop(guard);
        self.rings = Some((queues, activation.memory.clone()));
        Ok(())
    }

    fn connect(&mut self, tap: Option<&File>) -> Result<(), KernelError> {
        if self.rings.is_none() || (tap.is_none() && !self.connected) {
            return Ok(());
        }
        for index in 0..2 {
            let end = vhost_vring_file { index, fd: tap.map_or(-1, AsRawFd::as_raw_fd) };
            // SAFETY: the kernel reads a `struct vhost_vring_file`.
            let done = unsafe { ioctl_with_ref(&self.file, VHOST_NET_SET_BACKEND(), &end) };
            if done < 0 {
                return Err(failed("connect a queue with the tap")(io::Error::last_os_error()));
            }
        }
        self.connected = tap.is_some();
        Ok(())
    }

    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        if let Err(error) = self.connect(None) {
            tracing::error!(%error, "vhost-net does not let go of a queue");
        }
        self.connected = false;
        let Some((queues, memory)) = self.rings.take() else { return Vec::new() };
        let handle = Handle { file: &self.file, memory: &memory };
        let back = |(number, mut active): (usize, ActiveQueue)| {
            (active.index, take_back(&handle, number, &mut active, &memory.memory()))
        };
        queues.into_iter().enumerate().map(back).collect()
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.stop();
    }
}

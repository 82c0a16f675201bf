//! The file system device (virtio 1.2, section 5.11), served by another process over vhost-user.
//!
//! ```text
//!   guest ── kick ──▶ eventfd ──▶ file server ──▶ irqfd ──▶ guest       requests and answers, in the guest's shared memory
//!   SharedFs ── socket ─────────▶ file server                           features, memory, queues; its end is the machine's
//! ```
//!
//! The socket and the guest's memory are all that both processes share. A share whose server is gone cannot be served by
//! another: that knows nothing of open files. So its loss is told, and the machine ends.

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::epoll::EventFlags;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use thiserror::Error;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ids::VIRTIO_ID_FS;
use virtio_queue::QueueState;
use vm_memory::GuestAddressSpace;

use super::vhost::{hand_over, host_address, regions, take_back};
use super::worker::{Rings, Then, Wake, Work, Worker};
use super::{ActivateError, Activation, ActiveQueue, Device, Memory, read_space};

/// Entries of the queues: of requests that overtake others, and of all others.
const QUEUES: [u16; 2] = [1024, 1024];
/// Bytes of the tag in the configuration space.
const TAG_LEN: usize = 36;
/// How long the server may take for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a share is made of.
pub struct SharedFsConfig {
    /// What the guest mounts.
    pub tag: String,
    /// Connected to a vhost-user file server.
    pub socket: UnixStream,
    /// Is told, once, when the server is gone.
    pub on_lost: Box<dyn Fn(ShareLost) + Send>,
}

/// The share cannot go on.
#[derive(Debug, Error)]
#[error("the server of the share {tag:?} closed its connection: look for its last messages")]
pub struct ShareLost {
    /// What the guest mounted.
    pub tag: String,
}

/// Why there is no device.
#[derive(Debug, Error)]
pub enum SharedFsError {
    /// It does not fit the configuration space.
    #[error("the tag {0:?} has not from 1 to {TAG_LEN} bytes without zeroes")]
    Tag(String),
    /// The server is too old, or none of files.
    #[error("the file server offers features {offered:#x}, and lacks some of {wanted:#x}")]
    Features {
        /// What it offers.
        offered: u64,
        /// What is needed.
        wanted: u64,
    },
    /// It did not answer, or not well.
    #[error("the file server cannot {action}")]
    Server {
        /// What it was asked for.
        action: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The thread.
    #[error("the file system device cannot be served")]
    Thread(#[source] ActivateError),
}

/// The device.
pub struct SharedFs {
    features: u64,
    space: Vec<u8>,
    frontend: Frontend,
    worker: Worker<Watch>,
    /// What the server works on.
    works: Option<(Vec<ActiveQueue>, Memory)>,
    /// It was given memory and queues once.
    worked: bool,
    /// The guest has asked it for something.
    asked: bool,
}

impl SharedFs {
    /// Agrees with the server on what both can.
    pub fn new(config: SharedFsConfig) -> Result<SharedFs, SharedFsError> {
        let SharedFsConfig { tag, socket, on_lost } = config;
        if !(1..=TAG_LEN).contains(&tag.len()) || tag.contains('\0') {
            return Err(SharedFsError::Tag(tag));
        }
        let mut space = vec![0; TAG_LEN];
        space.iter_mut().zip(tag.bytes()).for_each(|(to, from)| *to = from);
        space.extend(1u32.to_le_bytes());

        let server = |action| move |source| SharedFsError::Server { action, source };
        let patient =
            socket.set_read_timeout(Some(PATIENCE)).and_then(|()| socket.set_write_timeout(Some(PATIENCE)));
        patient.map_err(server("be waited for"))?;
        let watched = socket.try_clone().map_err(server("be watched"))?;
        let mut frontend = Frontend::from_stream(socket, 2);
        let offered = greet(&mut frontend).map_err(|e| SharedFsError::Server {
            action: "agree on a protocol",
            source: io::Error::other(e),
        })?;
        let wanted = 1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if offered & wanted != wanted {
            return Err(SharedFsError::Features { offered, wanted });
        }
        let watch = Watch { socket: watched, tag, on_lost, lost: false };
        let worker = Worker::new(watch).map_err(SharedFsError::Thread)?;
        let features = offered & !wanted & !VhostUserVirtioFeatures::LOG_ALL.bits();
        Ok(SharedFs { features, space, frontend, worker, works: None, worked: false, asked: false })
    }

    /// Hands memory and queues over.
    fn hand_over(&mut self, activation: &Activation) -> io::Result<()> {
        let agreed = activation.features & self.features
            | 1 << VIRTIO_F_VERSION_1
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let memory = activation.memory.memory();
        self.worked = true;
        self.frontend.set_features(agreed).map_err(io::Error::other)?;
        self.frontend.set_mem_table(&regions(&memory)?).map_err(io::Error::other)?;
        for active in &activation.queues {
            let translate = |address| host_address(&memory, address);
            hand_over(&self.frontend, active.index, active, &memory, &*activation.interrupt, translate)?;
            self.frontend.set_vring_enable(active.index, true).map_err(io::Error::other)?;
        }
        Ok(())
    }
}

impl Drop for SharedFs {
    /// One that never worked leaves the connection as it was: the machine that it was made for was not made, and the next one may
    /// come with the same.
    fn drop(&mut self) {
        if !self.worked
            && let Err(error) = self.frontend.reset_owner()
        {
            tracing::debug!(%error, "the file server's connection is of no further use");
        }
    }
}

/// Introduces this process; answers the features that the server offers.
fn greet(frontend: &mut Frontend) -> vhost::Result<u64> {
    frontend.set_owner()?;
    let offered = frontend.get_features()?;
    if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
        // With it each request is answered when it is carried out, and a refusal is known.
        let protocol = frontend.get_protocol_features()? & VhostUserProtocolFeatures::REPLY_ACK;
        frontend.set_protocol_features(protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
    }
    Ok(offered)
}

impl Device for SharedFs {
    fn kind(&self) -> u32 {
        VIRTIO_ID_FS
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_configuration(&self, offset: u64, into: &mut [u8]) {
        read_space(&self.space, offset, into);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        if let Err(source) = self.hand_over(&activation) {
            // It can be the driver's fault; then the server is still there.
            if let Some(watch) = self.worker.standing()
                && watch.is_over()
            {
                watch.tell();
            }
            return Err(ActivateError { action: "hand its queues to the file server", source });
        }
        // The server takes the kicks; woken by them too, this process would only get in its way.
        self.works = Some((std::mem::take(&mut activation.queues), activation.memory.clone()));
        self.worker.start(activation)
    }

    fn unsaved(&mut self) -> Option<&'static str> {
        // Another server knows nothing of what the guest knows by number.
        self.asked.then_some("a share that the guest has mounted")
    }

    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        self.worker.stop();
        let Some((queues, memory)) = self.works.take() else { return Vec::new() };
        let memory = memory.memory();
        let mut states = Vec::with_capacity(queues.len());
        for mut active in queues {
            // This stops the queue: what the server took off it is done when it answers.
            let state = take_back(&self.frontend, active.index, &mut active, &memory);
            self.asked |= state.next_avail != 0;
            states.push((active.index, state));
            if let Err(error) = self.frontend.set_vring_enable(active.index, false) {
                tracing::warn!(queue = active.index, %error, "the file server does not let go of a queue");
            }
        }
        states
    }
}

/// Looks whether the server is there.
struct Watch {
    socket: UnixStream,
    tag: String,
    on_lost: Box<dyn Fn(ShareLost) + Send>,
    lost: bool,
}

impl Watch {
    /// Whether the server has closed the connection.
    fn is_over(&self) -> bool {
        let mut socket = [PollFd::new(&self.socket, PollFlags::RDHUP)];
        let polled = poll(&mut socket, Some(&Timespec::default()));
        polled.is_ok() && socket.iter().any(|socket| !socket.revents().is_empty())
    }

    /// The server is gone.
    fn tell(&mut self) {
        if !std::mem::replace(&mut self.lost, true) {
            (self.on_lost)(ShareLost { tag: self.tag.clone() });
        }
    }
}

impl Work for Watch {
    const NAME: &'static str = "virtio-fs";

    fn sources(&self) -> Vec<(BorrowedFd<'_>, EventFlags)> {
        // Not its answers, which another thread waits for; its end comes unasked.
        vec![(self.socket.as_fd(), EventFlags::RDHUP | EventFlags::ET)]
    }

    fn turn(&mut self, wake: Wake, _rings: &mut Rings) -> Then {
        if wake.own(0) {
            self.tell();
        }
        Then::Wait
    }
}

//! The network device (virtio 1.2, section 5.1) on a tap.
//!
//! ```text
//!   transmit queue ──▶ chain ──writev────────────────────────────▶ tap queue      a pair of queues each,
//!   receive queue  ◀── chains ◀── the packet that waits ◀──read── tap queue      all in one thread
//!   control queue  ──▶ how many pairs the driver uses ──▶ attach / detach
//! ```
//!
//! What driver and device may leave undone in a packet (checksums, segmentation) is in the header before it, which the tap has in
//! the same form; so packets go through as they are, and the kernel looks at what a guest says there. A received packet is read
//! into memory of its own first: how many of the driver's buffers it takes is known only then, and a packet for which there are
//! none waits there.
//!
//! With `/dev/vhost-net` the kernel moves the packets (`vhost`), and the thread serves the control queue alone.

mod control;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod packets;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::epoll::EventFlags;
use thiserror::Error;
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_queue::QueueState;

pub use tap::TapError;
pub use vhost::KernelError;

use self::packets::{Counters, Pair};
use self::tap::Tap;
use self::vhost::Kernel;
use super::worker::{Rings, Then, Wake, Work, Worker};
use super::{ActivateError, Activation, Device, positions, read_space};

/// Bytes of the header before each packet (`struct virtio_net_hdr_v1`).
pub const HEADER_LEN: usize = 12;
/// Entries of each queue of packets.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue.
const CONTROL_SIZE: u16 = 64;
/// Most queue pairs.
pub const MAX_PAIRS: usize = 16;
/// Least MTU that an interface may have: IPv4's (RFC 791).
const MIN_MTU: u16 = 68;

/// What a network device is made of.
#[derive(Debug)]
pub struct NetConfig {
    /// Hardware address that the guest sees.
    pub mac: [u8; 6],
    /// Largest packet, in bytes.
    pub mtu: u16,
    /// A descriptor of the tap for each queue pair.
    pub queues: Vec<OwnedFd>,
    /// `/dev/vhost-net`, opened for each queue pair, or nothing.
    pub vhost: Vec<OwnedFd>,
}

/// Why there is no device.
#[derive(Debug, Error)]
pub enum NetError {
    /// None, or more than are served.
    #[error("a network interface has from 1 to {MAX_PAIRS} queue pairs, not {0}")]
    Pairs(usize),
    /// Both lists go together.
    #[error(
        "{queues} queues of a tap, but {vhost} descriptors of /dev/vhost-net: there must be as many, or none"
    )]
    Vhost {
        /// Queues of the tap.
        queues: usize,
        /// Descriptors of vhost.
        vhost: usize,
    },
    /// Nobody may have it.
    #[error("{0:02x?} is no hardware address of one interface")]
    Mac([u8; 6]),
    /// Too small.
    #[error("an MTU of {0} is below the least, {MIN_MTU}")]
    Mtu(u16),
    /// The tap.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The kernel's packet mover.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The thread.
    #[error("the network device cannot be served")]
    Thread(#[source] ActivateError),
}

/// The device.
pub struct Net {
    config: NetFields,
    features: u64,
    sizes: Vec<u16>,
    worker: Worker<Server>,
    kernel: Option<Arc<Mutex<Kernel>>>,
    /// Where the queues were when it last stopped.
    stopped_at: Vec<(usize, u16)>,
}

/// What can be read of it while it works.
struct NetFields {
    mac: [u8; 6],
    mtu: u16,
    pairs: u16,
    link: Arc<AtomicBool>,
    counters: Arc<Counters>,
}

impl Net {
    /// A device without a driver yet.
    pub fn new(config: NetConfig) -> Result<Net, NetError> {
        let NetConfig { mac, mtu, queues, vhost } = config;
        let count = queues.len();
        if !(1..=MAX_PAIRS).contains(&count) {
            return Err(NetError::Pairs(count));
        }
        if !vhost.is_empty() && vhost.len() != count {
            return Err(NetError::Vhost { queues: count, vhost: vhost.len() });
        }
        let taps = queues.into_iter().map(Tap::new).collect::<Result<Vec<_>, _>>()?;
        if let Some(tap) = taps.first()
            && count > 1
            && !tap.has_queues()
        {
            return Err(TapError::OneQueue(tap.name().to_owned(), count).into());
        }
        Net::on_taps(mac, mtu, taps, vhost)
    }

    fn on_taps(mac: [u8; 6], mtu: u16, taps: Vec<Tap>, vhost: Vec<OwnedFd>) -> Result<Net, NetError> {
        let [first, ..] = mac;
        if first & 1 == 1 || mac == [0; 6] {
            return Err(NetError::Mac(mac));
        }
        if mtu < MIN_MTU {
            return Err(NetError::Mtu(mtu));
        }
        let pairs = u16::try_from(taps.len()).map_err(|_| NetError::Pairs(taps.len()))?;
        let mut features = offered(taps.first().map_or(0, Tap::guest_features), pairs > 1);
        let kernel = if vhost.is_empty() { None } else { Some(Kernel::new(vhost)?) };
        if let Some(kernel) = &kernel {
            features = kernel.supported(features);
        }
        let mut sizes = vec![QUEUE_SIZE; taps.len() * 2];
        if pairs > 1 {
            sizes.push(CONTROL_SIZE);
        }
        let kernel = kernel.map(|kernel| Arc::new(Mutex::new(kernel)));
        let link = Arc::new(AtomicBool::new(true));
        let server = Server::new(taps, Arc::clone(&link), kernel.clone());
        let counters = Arc::clone(&server.counters);
        let worker = Worker::new(server).map_err(NetError::Thread)?;
        let config = NetFields { mac, mtu, pairs, link, counters };
        Ok(Net { config, features, sizes, worker, kernel, stopped_at: Vec::new() })
    }
}

/// Features of a device on a tap that makes use of these of the guest.
fn offered(guest: u64, several: bool) -> u64 {
    let has = |bit: u32| guest >> bit & 1 == 1;
    let mut features = guest
        | 1 << VIRTIO_NET_F_MAC
        | 1 << VIRTIO_NET_F_MTU
        | 1 << VIRTIO_NET_F_STATUS
        | 1 << VIRTIO_NET_F_MRG_RXBUF
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_RING_F_INDIRECT_DESC;
    if has(VIRTIO_NET_F_GUEST_CSUM) {
        features |= 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
            | 1 << VIRTIO_NET_F_HOST_ECN;
    }
    // Kernels that hand such packets out also take them.
    if has(VIRTIO_NET_F_GUEST_UFO) {
        features |= 1 << VIRTIO_NET_F_HOST_UFO;
    }
    if has(VIRTIO_NET_F_GUEST_USO4) {
        features |= 1 << VIRTIO_NET_F_HOST_USO;
    }
    if several {
        features |= 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
    }
    features
}

impl Device for Net {
    fn kind(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queues(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_configuration(&self, offset: u64, into: &mut [u8]) {
        let NetFields { mac, mtu, pairs, link, .. } = &self.config;
        let up = if link.load(Ordering::Relaxed) { VIRTIO_NET_S_LINK_UP } else { 0 };
        let status = u16::try_from(up).unwrap_or(0);
        let mut space = Vec::with_capacity(12);
        space.extend(mac);
        for field in [status, *pairs, *mtu] {
            space.extend(field.to_le_bytes());
        }
        read_space(&space, offset, into);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), ActivateError> {
        self.stop();
        let failed = |action| move |source| ActivateError { action, source };
        let goes_on = self.stopped_at == activation.positions();
        let Some(server) = self.worker.standing() else {
            return Err(failed("work again")(io::Error::other("its thread is gone")));
        };
        if let Some(kernel) = &self.kernel {
            lock(kernel)
                .start(&mut activation)
                .map_err(|e| failed("hand its queues to vhost-net")(io::Error::other(e)))?;
        }
        server.begin(activation.features, goes_on).map_err(failed("set its tap up"))?;
        self.worker.start(activation)
    }

    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        let mut states = self.worker.stop();
        if let Some(kernel) = &self.kernel {
            states.extend(lock(kernel).stop());
            states.sort_by_key(|(index, _)| *index);
        }
        if !states.is_empty() {
            self.stopped_at = positions(&states);
        }
        states
    }

    fn unsaved(&mut self) -> Option<&'static str> {
        let used = self.worker.standing().map_or(0, |server| server.used);
        (used > 1).then_some("a network interface of which the guest uses several queues")
    }

    /// Nothing is counted of packets that the kernel moves.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Counters { received, received_bytes, sent, sent_bytes, dropped } = &*self.config.counters;
        if self.kernel.is_some() {
            return Vec::new();
        }
        vec![
            ("received", received.get()),
            ("received-bytes", received_bytes.get()),
            ("sent", sent.get()),
            ("sent-bytes", sent_bytes.get()),
            ("dropped", dropped.get()),
        ]
    }
}

/// Nothing in it is half done when somebody who holds it ends.
fn lock(kernel: &Mutex<Kernel>) -> MutexGuard<'_, Kernel> {
    kernel.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the device's thread has.
struct Server {
    pairs: Vec<Pair>,
    /// How many of the pairs the driver uses, from the first on.
    used: usize,
    /// Where the control queue is.
    control: usize,
    /// Who moves the packets; this thread where there is none.
    kernel: Option<Arc<Mutex<Kernel>>>,
    link: Arc<AtomicBool>,
    counters: Arc<Counters>,
}

impl Server {
    fn new(taps: Vec<Tap>, link: Arc<AtomicBool>, kernel: Option<Arc<Mutex<Kernel>>>) -> Server {
        let control = taps.len() * 2;
        let counters = Arc::<Counters>::default();
        let pairs = taps.into_iter().map(|tap| Pair::new(tap, Arc::clone(&counters))).collect();
        Server { pairs, used: 1, control, kernel, link, counters }
    }

    /// A driver starts, with one pair (virtio 1.2, section 5.1.6.5.5), or goes on with those it had.
    fn begin(&mut self, features: u64, goes_on: bool) -> io::Result<()> {
        let several = features >> VIRTIO_NET_F_MQ & 1 == 1;
        // Without the feature the third queue is the control queue's (section 5.1.2).
        self.control = if several { self.pairs.len() * 2 } else { 2 };
        if let Some(pair) = self.pairs.first() {
            pair.tap.offload(features)?;
        }
        self.pairs.iter_mut().for_each(|pair| pair.begin(features));
        self.use_pairs(if goes_on { self.used } else { 1 })
    }

    /// Has the kernel spread packets over the first `count` queues of the tap.
    fn use_pairs(&mut self, count: usize) -> io::Result<()> {
        let several = self.pairs.len() > 1;
        for (number, pair) in self.pairs.iter().enumerate() {
            let used = number < count;
            // A queue that is left out can be given to nobody.
            if used && several {
                pair.tap.attach(true)?;
            }
            if let Some(kernel) = &self.kernel {
                lock(kernel).connect(number, used.then_some(&pair.tap)).map_err(io::Error::other)?;
            }
            if !used {
                pair.tap.attach(false)?;
            }
        }
        self.used = count;
        Ok(())
    }

    fn taps(&self) -> impl Iterator<Item = &Tap> {
        self.pairs.iter().map(|pair| &pair.tap)
    }
}

impl Work for Server {
    const NAME: &'static str = "virtio-net";

    fn sources(&self) -> Vec<(BorrowedFd<'_>, EventFlags)> {
        let flags = EventFlags::IN | EventFlags::ET;
        self.taps().filter(|_| self.kernel.is_none()).map(|tap| (tap.as_fd(), flags)).collect()
    }

    fn turn(&mut self, wake: Wake, rings: &mut Rings) -> Then {
        let control = self.control;
        let mut then = rings.serve(control, |mem, queue| control::serve(self, mem, queue));
        if self.kernel.is_some() {
            return then;
        }
        let mut lost = false;
        for (number, pair) in self.pairs.iter_mut().enumerate().take(self.used) {
            pair.readable |= wake.own(number);
            then = then
                .or(rings.serve(2 * number, |mem, queue| pair.receive(mem, queue)))
                .or(rings.serve(2 * number + 1, |mem, queue| pair.transmit(mem, queue)));
            lost |= pair.lost;
        }
        if lost && self.link.swap(false, Ordering::Relaxed) {
            rings.interrupt().configuration_changed();
        }
        then
    }
}

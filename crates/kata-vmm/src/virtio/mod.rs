//! Virtio devices, apart from how the guest reaches them.
//!
//! ```text
//!   vCPU ──config, kicks──▶ transport (../pci) ──activate / stop──▶ Device ──▶ one thread a device
//!                                 ▲                                              │ takes chains off its queues
//!                                 └───────────── Interrupt ──────────────────────┘
//! ```
//!
//! A device knows its queues, its configuration space and what it lends to the guest. It knows neither PCI nor KVM, so all of it
//! runs in tests on queues in plain memory.

pub mod balloon;
pub mod block;
pub mod buffers;
mod drain;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod driver;
pub mod limit;
pub mod mem;
pub mod net;
pub mod ring;
pub mod rng;
pub mod shared_fs;
#[cfg(any(test, feature = "fuzzing"))]
mod told;
mod vhost;
pub mod vsock;
pub mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory, as all who work with it hold it: a handle on what there is at the moment. It can grow.
pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Why a device does not start to work.
#[derive(Debug, Error)]
#[error("the virtio device cannot {action}")]
pub struct ActivateError {
    /// What failed.
    pub action: &'static str,
    /// Why.
    #[source]
    pub source: std::io::Error,
}

/// How a device tells its driver of something. Raising is cheap and never blocks.
pub trait Interrupt: Send + Sync {
    /// Buffers of this queue were used.
    fn used(&self, queue: usize);
    /// The configuration space has changed.
    fn configuration_changed(&self);
    /// The device cannot go on until the driver resets it (virtio 1.2, section 2.1.2, `DEVICE_NEEDS_RESET`).
    fn needs_reset(&self);
    /// What raises [`Interrupt::used`] of this queue when it is written to, for back ends in the kernel and in other processes;
    /// `None` where the driver gave the queue no interrupt.
    fn descriptor(&self, queue: usize) -> Option<EventFd>;
}

/// A queue that the driver has set up.
pub struct ActiveQueue {
    /// Which of the device's queues it is.
    pub index: usize,
    /// Its rings.
    pub queue: Queue,
    /// Readable when the driver added buffers.
    pub kick: EventFd,
}

/// What a device works with, from the driver's `DRIVER_OK` on.
pub struct Activation {
    /// The guest's memory.
    pub memory: Memory,
    /// What device and driver agreed on.
    pub features: u64,
    /// Queues that the driver enabled, in order; the driver may leave some out.
    pub queues: Vec<ActiveQueue>,
    /// How the driver is told.
    pub interrupt: Arc<dyn Interrupt>,
}

impl Activation {
    /// Where the driver is with each queue, by the queue's number: with all at 0 when it starts, and where [`Device::stop`] said
    /// when it was only paused.
    pub fn positions(&self) -> Vec<(usize, u16)> {
        self.queues.iter().map(|active| (active.index, active.queue.next_avail())).collect()
    }
}

/// Where queues stand that came to a stop, as [`Activation::positions`] says it.
fn positions(states: &[(usize, QueueState)]) -> Vec<(usize, u16)> {
    states.iter().map(|(index, state)| (*index, state.next_avail)).collect()
}

/// What a device's thread counts and others read.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    fn add(&self, more: usize) {
        self.0.fetch_add(u64::try_from(more).unwrap_or(0), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A virtio device.
///
/// ```text
///   new ──activate──▶ works ──stop──▶ stands still ──activate──▶ works …
/// ```
///
/// All calls come from one thread at a time. Configuration may be read and written at any time, `activate` only while it stands
/// still. What the guest says in its queues never ends the process: a queue whose rules it broke is left alone, and the driver is
/// told by [`Interrupt::needs_reset`].
pub trait Device: Send {
    /// Which kind it is (virtio 1.2, section 5).
    fn kind(&self) -> u32;

    /// Most entries of each of its queues, powers of two.
    fn queues(&self) -> &[u16];

    /// Features that it offers, with those of its queues; `VIRTIO_F_VERSION_1` is the transport's to add.
    fn features(&self) -> u64;

    /// Reads the configuration space; what is beyond its end is zero.
    fn read_configuration(&self, offset: u64, into: &mut [u8]) {
        let _ = offset;
        into.fill(0);
    }

    /// Writes to it, where the device has fields for that.
    fn write_configuration(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Begins to work, in a thread of its own. On an error it stands still.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// What another device has to have in common with this one to take its place in a snapshot, beside kind, queues and features: its
    /// configuration space, as far as a driver relies on that.
    fn shape(&self) -> Vec<u8> {
        let mut space = vec![0; SHAPE];
        self.read_configuration(0, &mut space);
        space
    }

    /// What it has that a snapshot does not keep, while it stands still; `None` where nothing would be lost.
    fn unsaved(&mut self) -> Option<&'static str> {
        None
    }

    /// The driver that comes next knows this device from a snapshot, and what it held for the guest there is gone.
    fn restored(&mut self) {}

    /// Name and value of each of its counters since it was made.
    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Comes to a stand: the thread is gone, and nothing of the guest's memory is touched any more. Answers how far it got with
    /// each queue, by the queue's number. Nothing happens where it stands already.
    fn stop(&mut self) -> Vec<(usize, QueueState)>;
}

/// Bytes of configuration space that are compared; no device here has more.
const SHAPE: usize = 64;

/// Copies the part of a configuration space that a guest reads.
pub fn read_space(space: &[u8], offset: u64, into: &mut [u8]) {
    into.fill(0);
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or_default();
    let length = rest.len().min(into.len());
    if let (Some(to), Some(from)) = (into.get_mut(..length), rest.get(..length)) {
        to.copy_from_slice(from);
    }
}

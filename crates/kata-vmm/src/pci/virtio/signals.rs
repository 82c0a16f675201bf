//! What a device tells its driver: the interrupt status register, the counter of configuration changes, and MSI-X vectors.
//!
//! A device's thread calls this at any time, also while a vCPU waits for that thread to stop. So nothing here takes the lock under
//! which registers are read and written.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::events::{EventError, Events};
use crate::pci::msix::{Msix, VectorState};
use crate::virtio::Interrupt;

/// A queue or the configuration interrupts nobody (virtio 1.2, section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// Interrupt status: buffers were used.
const USED: u8 = 1;
/// Interrupt status: the configuration has changed.
const CHANGED: u8 = 2;

/// Interrupts of a device, and what the driver reads about them.
pub struct Signals {
    /// The vectors.
    pub msix: Msix,
    status: AtomicU8,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    configuration: AtomicU16,
    queues: Vec<AtomicU16>,
}

/// What a driver set up and was told, in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalsState {
    table: Vec<VectorState>,
    status: u8,
    generation: u8,
    needs_reset: bool,
    configuration: u16,
    queues: Vec<u16>,
}

impl Signals {
    /// As after a reset, with a vector for each queue and one for the configuration.
    pub fn new(events: Arc<dyn Events>, queues: usize) -> Result<Signals, EventError> {
        Ok(Signals {
            msix: Msix::new(events, queues + 1)?,
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            configuration: AtomicU16::new(NO_VECTOR),
            queues: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        })
    }

    /// Forgets what the driver set up and was told, but not how often the configuration changed. MSI-X belongs to PCI, and stays.
    pub fn reset(&self) {
        self.msix.take_back();
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
        for vector in self.queues.iter().chain([&self.configuration]) {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
    }

    /// For a snapshot.
    pub fn save(&self) -> SignalsState {
        SignalsState {
            table: self.msix.save(),
            status: self.status.load(Ordering::SeqCst),
            generation: self.generation.load(Ordering::SeqCst),
            needs_reset: self.needs_reset.load(Ordering::SeqCst),
            configuration: self.configuration.load(Ordering::SeqCst),
            queues: self.queues.iter().map(|vector| vector.load(Ordering::SeqCst)).collect(),
        }
    }

    /// From a snapshot; false where the device has another number of queues.
    pub fn restore(&self, saved: &SignalsState) -> bool {
        if self.queues.len() != saved.queues.len() || !self.msix.restore(&saved.table) {
            return false;
        }
        self.status.store(saved.status, Ordering::SeqCst);
        self.generation.store(saved.generation, Ordering::SeqCst);
        self.needs_reset.store(saved.needs_reset, Ordering::SeqCst);
        self.set_vector(None, saved.configuration);
        saved.queues.iter().enumerate().for_each(|(queue, vector)| self.set_vector(Some(queue), *vector));
        true
    }

    /// The interrupt status register, which reading clears.
    pub fn take_status(&self) -> u8 {
        self.status.swap(0, Ordering::SeqCst)
    }

    /// Changes whenever the configuration does.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Whether the device waits for a reset.
    pub fn wants_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The vector of a queue, or of the configuration.
    pub fn vector(&self, queue: Option<usize>) -> u16 {
        self.slot(queue).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// Gives a queue or the configuration this vector, or none where there is no such vector.
    pub fn set_vector(&self, queue: Option<usize>, vector: u16) {
        let vector = if usize::from(vector) < self.msix.count() { vector } else { NO_VECTOR };
        if let Some(slot) = self.slot(queue) {
            slot.store(vector, Ordering::SeqCst);
        }
    }

    fn slot(&self, queue: Option<usize>) -> Option<&AtomicU16> {
        match queue {
            Some(queue) => self.queues.get(queue),
            None => Some(&self.configuration),
        }
    }

    fn raise(&self, queue: Option<usize>) {
        match self.vector(queue) {
            NO_VECTOR => {}
            vector => self.msix.raise(vector.into()),
        }
    }
}

impl Interrupt for Signals {
    fn used(&self, queue: usize) {
        if !self.msix.enabled() {
            self.status.fetch_or(USED, Ordering::SeqCst);
        }
        self.raise(Some(queue));
    }

    fn configuration_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.status.fetch_or(CHANGED, Ordering::SeqCst);
        self.raise(None);
    }

    fn needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::SeqCst) {
            self.configuration_changed();
        }
    }

    fn descriptor(&self, queue: usize) -> Option<EventFd> {
        match self.vector(Some(queue)) {
            NO_VECTOR => None,
            vector => self.msix.lend(vector.into()),
        }
    }
}

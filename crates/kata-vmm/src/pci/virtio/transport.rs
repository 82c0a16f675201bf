//! The common configuration of a virtio device: what its driver reads and writes to find, set up, start and reset it (virtio 1.2,
//! sections 2.1, 3.1 and 4.1.4.3).
//!
//! ```text
//!   reset ─ACKNOWLEDGE, DRIVER─▶ features ─FEATURES_OK─▶ queues ─DRIVER_OK─▶ Device::activate
//!     ▲                             └ refused: the bit stays 0                     │ the driver broke a rule
//!     └────────────────────────── 0: Device::stop ◀───────────────── NEEDS_RESET ◀─┘
//! ```
//!
//! A step is taken only from the one before; writes that do not fit change nothing.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::signals::Signals;
use crate::pci::PciError;
use crate::virtio::{ActivateError, Activation, ActiveQueue, Device, Interrupt, Memory};

/// Bytes of the common configuration, up to the notification data.
pub const LENGTH: u64 = 58;

const ACKNOWLEDGE: u8 = bit(VIRTIO_CONFIG_S_ACKNOWLEDGE);
const DRIVER: u8 = bit(VIRTIO_CONFIG_S_DRIVER);
const DRIVER_OK: u8 = bit(VIRTIO_CONFIG_S_DRIVER_OK);
const FEATURES_OK: u8 = bit(VIRTIO_CONFIG_S_FEATURES_OK);
const NEEDS_RESET: u8 = bit(VIRTIO_CONFIG_S_NEEDS_RESET);
const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;

const fn bit(status: u32) -> u8 {
    status.to_le_bytes()[0]
}

/// A device and the registers of its driver.
pub struct Transport {
    device: Box<dyn Device>,
    memory: Memory,
    signals: Arc<Signals>,
    status: u8,
    offered: u64,
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    state: Work,
    /// It comes from a snapshot and has not gone on yet.
    restored: bool,
}

/// A queue in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct QueueImage {
    most: u16,
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
}

/// The registers in a snapshot, of a device that stands still.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Features that the device offered.
    pub offered: u64,
    status: u8,
    accepted: u64,
    offered_select: u32,
    accepted_select: u32,
    queue_select: u16,
    works: bool,
    queues: Vec<QueueImage>,
}

/// Whether the device works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// The driver has not started it, or it could not start.
    Idle,
    /// It works.
    Active,
    /// It would work if the machine did.
    Paused,
}

struct QueueRegisters {
    /// As the driver set it up, and where it went on when it was last stopped.
    state: QueueState,
    kick: Arc<EventFd>,
}

impl QueueRegisters {
    fn reset(&mut self) {
        let size = self.state.max_size;
        self.state = QueueState { max_size: size, size, ..QueueState::default() };
    }
}

impl Transport {
    /// The registers as after a reset.
    pub fn new(
        device: Box<dyn Device>,
        memory: Memory,
        signals: Arc<Signals>,
    ) -> Result<Transport, PciError> {
        let queue = |max_size: &u16| {
            let kick = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(PciError::Descriptor)?;
            let mut queue = QueueRegisters {
                state: QueueState { max_size: *max_size, ..QueueState::default() },
                kick: Arc::new(kick),
            };
            queue.reset();
            Ok(queue)
        };
        let queues = device.queues().iter().map(queue).collect::<Result<_, PciError>>()?;
        let offered = device.features() | VERSION_1;
        Ok(Transport {
            device,
            memory,
            signals,
            status: 0,
            offered,
            accepted: 0,
            offered_select: 0,
            accepted_select: 0,
            queue_select: 0,
            queues,
            state: Work::Idle,
            restored: false,
        })
    }

    /// The device itself.
    pub fn device(&mut self) -> &mut dyn Device {
        &mut *self.device
    }

    /// The queues that the device works with, and what its driver kicks them by.
    pub fn kicks(&self) -> impl Iterator<Item = (usize, &Arc<EventFd>)> {
        let working = self.state != Work::Idle;
        let queues = self.queues.iter().enumerate();
        queues
            .filter(move |(_, queue)| working && queue.state.ready)
            .map(|(index, queue)| (index, &queue.kick))
    }

    /// A kick that came as a write.
    pub fn kick(&self, queue: u64) {
        if let Some((_, kick)) = self.kicks().find(|(index, _)| *index as u64 == queue) {
            // It fails only where as good as endlessly many kicks wait, and one is enough.
            let _ = kick.write(1);
        }
    }

    /// Reads registers; all widths give what is there.
    pub fn read(&self, offset: u64, into: &mut [u8]) {
        let registers = self.registers();
        for (byte, offset) in into.iter_mut().zip(offset..) {
            let register = usize::try_from(offset).ok().and_then(|offset| registers.get(offset));
            *byte = register.copied().unwrap_or(0);
        }
    }

    /// All registers, in their order.
    fn registers(&self) -> Vec<u8> {
        let none = QueueState::default();
        let selected = usize::from(self.queue_select);
        let queue = self.queues.get(selected).map_or(&none, |queue| &queue.state);
        let count = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        [
            &self.offered_select.to_le_bytes()[..],
            &half(self.offered, self.offered_select).to_le_bytes(),
            &self.accepted_select.to_le_bytes(),
            &half(self.accepted, self.accepted_select).to_le_bytes(),
            &self.signals.vector(None).to_le_bytes(),
            &count.to_le_bytes(),
            &[self.status()],
            &[self.signals.generation()],
            &self.queue_select.to_le_bytes(),
            &queue.size.to_le_bytes(),
            &self.signals.vector(Some(selected)).to_le_bytes(),
            &u16::from(queue.ready).to_le_bytes(),
            // Offset of the queue's doorbell, in units of the multiplier.
            &self.queue_select.to_le_bytes(),
            &queue.desc_table.to_le_bytes(),
            &queue.avail_ring.to_le_bytes(),
            &queue.used_ring.to_le_bytes(),
            &self.queue_select.to_le_bytes(),
        ]
        .concat()
    }

    fn status(&self) -> u8 {
        let needs_reset = self.signals.wants_reset() && self.status != 0;
        self.status | if needs_reset { NEEDS_RESET } else { 0 }
    }

    /// Writes a register of its whole width, and addresses also in halves. Anything else is lost.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (20, [status]) => self.write_status(*status),
            (_, &[a, b]) => self.write_word(offset, u16::from_le_bytes([a, b])),
            (_, &[a, b, c, d]) => self.write_double(offset, u32::from_le_bytes([a, b, c, d])),
            (32 | 40 | 48, &[a, b, c, d, e, f, g, h]) => {
                self.write_double(offset, u32::from_le_bytes([a, b, c, d]));
                self.write_double(offset + 4, u32::from_le_bytes([e, f, g, h]));
            }
            _ => {}
        }
    }

    fn write_word(&mut self, offset: u64, value: u16) {
        let selected = usize::from(self.queue_select);
        match offset {
            16 => self.signals.set_vector(None, value),
            22 => self.queue_select = value,
            24 => {
                if let Some(queue) =
                    self.changeable().filter(|q| value <= q.max_size && value.is_power_of_two())
                {
                    queue.size = value;
                }
            }
            26 => self.signals.set_vector(Some(selected), value),
            28 => {
                let agreed = self.status & FEATURES_OK != 0;
                if let Some(queue) = self.changeable().filter(|_| agreed && value == 1) {
                    queue.ready = true;
                }
            }
            _ => {}
        }
    }

    fn write_double(&mut self, offset: u64, value: u32) {
        match offset {
            0 => self.offered_select = value,
            8 => self.accepted_select = value,
            12 if self.status & FEATURES_OK == 0 => set_half(&mut self.accepted, self.accepted_select, value),
            32 | 36 | 40 | 44 | 48 | 52 => {
                let Some(queue) = self.changeable() else { return };
                let address = match offset {
                    32 | 36 => &mut queue.desc_table,
                    40 | 44 => &mut queue.avail_ring,
                    _ => &mut queue.used_ring,
                };
                set_half(address, u32::from(!offset.is_multiple_of(8)), value);
            }
            _ => {}
        }
    }

    /// The selected queue, as long as the driver may change it.
    fn changeable(&mut self) -> Option<&mut QueueState> {
        let started = self.status & DRIVER_OK != 0;
        let queue = self.queues.get_mut(usize::from(self.queue_select));
        queue.map(|queue| &mut queue.state).filter(|state| !started && !state.ready)
    }

    fn write_status(&mut self, status: u8) {
        if status == 0 {
            return self.reset();
        }
        // Bits are taken back only all together.
        let mut new = status & !NEEDS_RESET | self.status;
        let known = ACKNOWLEDGE | DRIVER;
        let acceptable = self.accepted & !self.offered == 0 && self.accepted & VERSION_1 != 0;
        if self.status & FEATURES_OK == 0 && !(acceptable && new & known == known) {
            new &= !FEATURES_OK;
        }
        if new & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        let starts = new & !self.status & DRIVER_OK != 0;
        self.status = new;
        if starts {
            self.start();
        }
    }

    /// The driver is ready: the device begins to work.
    fn start(&mut self) {
        self.state = Work::Active;
        if let Err(error) = self.activate() {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            tracing::error!(kind = self.device.kind(), cause, "{error}; it waits for its driver to reset it");
            self.state = Work::Idle;
            self.signals.needs_reset();
        }
    }

    fn activate(&mut self) -> Result<(), ActivateError> {
        let refuse = |action| move |source: std::io::Error| ActivateError { action, source };
        let event_idx = self.accepted >> VIRTIO_RING_F_EVENT_IDX & 1 == 1;
        let memory = self.memory.memory();
        let mut queues = Vec::new();
        for (index, registers) in self.queues.iter().enumerate().filter(|(_, queue)| queue.state.ready) {
            let state = QueueState { event_idx_enabled: event_idx, ..registers.state };
            let queue =
                Queue::try_from(state).ok().filter(|queue| queue.is_valid(&*memory)).ok_or_else(|| {
                    let message =
                        format!("queue {index}: its rings are not in the guest's memory, or not aligned");
                    refuse("use the queues that the driver set up")(std::io::Error::other(message))
                })?;
            let kick = registers.kick.try_clone().map_err(refuse("hand over its queues' descriptors"))?;
            queues.push(ActiveQueue { index, queue, kick });
        }
        let interrupt: Arc<dyn Interrupt> = self.signals.clone();
        let memory = self.memory.clone();
        self.device.activate(Activation { memory, features: self.accepted, queues, interrupt })
    }

    /// The device stands still and has forgotten its driver.
    pub fn reset(&mut self) {
        self.device.stop();
        self.state = Work::Idle;
        self.signals.reset();
        self.status = 0;
        self.accepted = 0;
        self.offered_select = 0;
        self.accepted_select = 0;
        self.queue_select = 0;
        self.queues.iter_mut().for_each(QueueRegisters::reset);
    }

    /// Stops the device where it is.
    pub fn pause(&mut self) {
        if self.state != Work::Active {
            return;
        }
        self.state = Work::Paused;
        for (index, stopped) in self.device.stop() {
            if let Some(queue) = self.queues.get_mut(index) {
                queue.state.next_avail = stopped.next_avail;
                queue.state.next_used = stopped.next_used;
            }
        }
        self.signals.msix.take_back();
    }

    /// Goes on from there. A device of which the driver broke a queue rests, with all its queues, until the driver resets it: which
    /// queue that was is not known any more.
    pub fn resume(&mut self) -> Result<(), ActivateError> {
        if self.state != Work::Paused {
            return Ok(());
        }
        if self.signals.wants_reset() {
            self.state = Work::Idle;
            return Ok(());
        }
        self.activate()?;
        self.state = Work::Active;
        if std::mem::take(&mut self.restored) {
            self.repeat();
        }
        Ok(())
    }

    /// What was on its way when the snapshot was taken is not in it: each queue is kicked once more, and its interrupt raised. Both
    /// sides look, and find something or nothing.
    fn repeat(&self) {
        for (queue, kick) in self.kicks() {
            // It is new, so nothing can be in its way.
            let _ = kick.write(1);
            self.signals.used(queue);
        }
    }

    /// For a snapshot; the device stands still.
    pub fn save(&self) -> TransportState {
        let image = |QueueRegisters { state, .. }: &QueueRegisters| QueueImage {
            most: state.max_size,
            size: state.size,
            ready: state.ready,
            descriptors: state.desc_table,
            available: state.avail_ring,
            used: state.used_ring,
            next_available: state.next_avail,
            next_used: state.next_used,
        };
        TransportState {
            offered: self.offered,
            status: self.status,
            accepted: self.accepted,
            offered_select: self.offered_select,
            accepted_select: self.accepted_select,
            queue_select: self.queue_select,
            works: self.state != Work::Idle,
            queues: self.queues.iter().map(image).collect(),
        }
    }

    /// From a snapshot: the device goes on with [`Transport::resume`]. False where it had other features or queues.
    pub fn restore(&mut self, saved: &TransportState) -> bool {
        let same = |(now, saved): (&QueueRegisters, &QueueImage)| {
            let fits = saved.size <= saved.most && saved.size.is_power_of_two();
            now.state.max_size == saved.most && fits
        };
        let fits = self.offered == saved.offered
            && self.queues.len() == saved.queues.len()
            && self.queues.iter().zip(&saved.queues).all(same);
        if !fits {
            return false;
        }
        (self.status, self.accepted) = (saved.status, saved.accepted);
        (self.offered_select, self.accepted_select) = (saved.offered_select, saved.accepted_select);
        self.queue_select = saved.queue_select;
        for (registers, saved) in self.queues.iter_mut().zip(&saved.queues) {
            registers.state = QueueState {
                size: saved.size,
                ready: saved.ready,
                desc_table: saved.descriptors,
                avail_ring: saved.available,
                used_ring: saved.used,
                next_avail: saved.next_available,
                next_used: saved.next_used,
                ..registers.state
            };
        }
        self.state = if saved.works { Work::Paused } else { Work::Idle };
        self.restored = true;
        self.device.restored();
        true
    }
}

/// The lower or upper half; there are no others.
fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_half(value: &mut u64, select: u32, new: u32) {
    match select {
        0 => *value = *value & !u64::from(u32::MAX) | u64::from(new),
        1 => *value = *value & u64::from(u32::MAX) | u64::from(new) << 32,
        // There is nothing to accept.
        _ => {}
    }
}

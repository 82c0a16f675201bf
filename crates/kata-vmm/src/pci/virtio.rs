//! A virtio device as a PCI function (virtio 1.2, section 4.1), modern only.
//!
//! ```text
//!   configuration space: 1af4:1040+kind, one capability for each part of BAR 0, MSI-X
//!   BAR 0, 32 KiB
//!     0x0000 common configuration ──▶ Transport: features, status machine, queues
//!     0x1000 interrupt status
//!     0x2000 the device's own configuration ──▶ Device
//!     0x3000 doorbells, 4 bytes a queue ──▶ eventfds of the hypervisor, straight to the device's thread
//!     0x4000 MSI-X table, 0x5000 pending bits ──▶ Msix
//! ```
//!
//! Where the BAR answers and which doorbells are watched always follows from the registers: after each access that can change
//! either, both are compared with what is registered ([`place`](super::Function::place)).

mod signals;
mod transport;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use self::signals::{Signals, SignalsState};
use self::transport::{Transport, TransportState};
use super::configuration::{Bar, Configuration, Identity};
use super::{PciError, Windows};
use crate::bus::{self, Bus};
use crate::events::Events;
use crate::virtio::{ActivateError, Device, Memory};

/// Bytes of BAR 0.
pub const BAR_SIZE: u32 = 0x8000;
const BAR: Bar = Bar { register: 0, size: BAR_SIZE as u64, wide: false, prefetchable: false };
/// Most queues of a device; a page has room for the vectors of no more.
pub const MAX_QUEUES: usize = 255;

/// Bytes of each part of the BAR.
const PART: u64 = 0x1000;
const COMMON: u64 = 0;
const STATUS: u64 = PART;
const DEVICE: u64 = 2 * PART;
const DOORBELLS: u64 = 3 * PART;
const TABLE: u64 = 4 * PART;
const PENDING: u64 = 5 * PART;
/// Distance of two doorbells.
const DOORBELL: u32 = 4;

const VENDOR: u16 = 0x1af4;
/// Capability identifiers (PCI 3.0, appendix H).
const VENDOR_SPECIFIC: u8 = 0x09;
const MSIX: u8 = 0x11;
/// Message control: enabled, and all masked.
const MSIX_ENABLED: u16 = 1 << 15;
const MSIX_MASKED: u16 = 1 << 14;

/// A virtio device with all that makes a PCI function of it.
pub struct Function {
    events: Arc<dyn Events>,
    signals: Arc<Signals>,
    state: Mutex<State>,
    /// Offset of the MSI-X capability.
    msix: usize,
    /// Offset of the capability that reaches the BAR through the configuration space.
    access: usize,
}

struct State {
    configuration: Configuration,
    transport: Transport,
    /// Where the BAR answers.
    mapped: Option<u64>,
    /// Watched doorbells: address and what is signalled.
    doorbells: Vec<(u64, Arc<EventFd>)>,
}

/// A function in a snapshot: what its device is, and all registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FunctionState {
    kind: u32,
    shape: Vec<u8>,
    configuration: Vec<u8>,
    signals: SignalsState,
    transport: TransportState,
}

impl Function {
    /// Makes a function of a device; its BAR is first at `base`, and does not answer there yet.
    pub fn new(
        events: Arc<dyn Events>,
        memory: Memory,
        device: Box<dyn Device>,
        base: u32,
    ) -> Result<Function, PciError> {
        let queues = device.queues().len();
        if queues > MAX_QUEUES {
            return Err(PciError::Queues { queues });
        }
        let kind = u16::try_from(device.kind()).unwrap_or(0x3f).min(0x3f);
        let identity = Identity {
            vendor: VENDOR,
            device: 0x1040 + kind,
            class: class(kind),
            revision: 1,
            subsystem: (VENDOR, 0x40 + kind),
        };
        let mut configuration = Configuration::new(identity);
        configuration.set_bar(BAR, base.into());
        let msix = configuration.add_capability(MSIX, &msix_body(queues), &[0, 0xc0])?;
        for (kind, offset, length, more) in [
            (1, COMMON, transport::LENGTH, &[][..]),
            (2, DOORBELLS, PART, &DOORBELL.to_le_bytes()),
            (3, STATUS, 1, &[]),
            (4, DEVICE, PART, &[]),
        ] {
            configuration.add_capability(VENDOR_SPECIFIC, &part_body(kind, offset, length, more), &[])?;
        }
        let writable =
            [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let access =
            configuration.add_capability(VENDOR_SPECIFIC, &part_body(5, 0, 0, &[0; 4]), &writable)?;

        let signals = Arc::new(Signals::new(Arc::clone(&events), queues)?);
        let transport = Transport::new(device, memory, Arc::clone(&signals))?;
        let state = State { configuration, transport, mapped: None, doorbells: Vec::new() };
        Ok(Function { events, signals, state: Mutex::new(state), msix, access })
    }

    /// Brings the function's interrupts to what its registers say.
    fn control(&self, state: &State) {
        let control = state.configuration.word(self.msix + 2);
        self.signals.msix.control(control & MSIX_ENABLED != 0, control & MSIX_MASKED != 0);
    }

    fn unmap(&self, state: &mut State, bus: &Bus) {
        if let Some(base) = state.mapped.take() {
            bus.remove(base);
        }
        self.watch(state);
    }

    /// Watches the doorbells of the queues that work, where the BAR is.
    fn watch(&self, state: &mut State) {
        let wanted: Vec<_> = match state.mapped {
            Some(base) => {
                let address = |queue: usize| base + DOORBELLS + u64::from(DOORBELL) * queue as u64;
                state.transport.kicks().map(|(queue, kick)| (address(queue), Arc::clone(kick))).collect()
            }
            None => Vec::new(),
        };
        let same = |a: &(u64, Arc<EventFd>), b: &(u64, Arc<EventFd>)| a.0 == b.0 && Arc::ptr_eq(&a.1, &b.1);
        state.doorbells.retain(|old| {
            let keep = wanted.iter().any(|new| same(old, new));
            if !keep {
                self.events.unwatch(old.0, &old.1);
            }
            keep
        });
        for new in wanted {
            if state.doorbells.iter().any(|old| same(old, &new)) {
                continue;
            }
            match self.events.watch(new.0, &new.1) {
                Ok(()) => state.doorbells.push(new),
                // The guest's writes come to `write` instead.
                Err(e) => tracing::warn!(error = %e, "a queue's doorbell takes the slow way"),
            }
        }
    }

    /// Carries out what the access capability says: `length` bytes of the BAR, to or from its last field.
    fn access_bar(&self, state: &mut State, write: bool) {
        let [bar, offset, length] =
            [4, 8, 12].map(|field| u64::from(state.configuration.double(self.access + field)));
        let (0, Ok(length @ (1 | 2 | 4))) = (bar & 0xff, usize::try_from(length)) else { return };
        let mut data = [0; 4];
        let Some(data) = data.get_mut(..length).filter(|data| offset.is_multiple_of(data.len() as u64))
        else {
            return;
        };
        if write {
            state.configuration.read(self.access + 16, data);
            self.write_bar(state, offset, data);
        } else {
            self.read_bar(state, offset, data);
            state.configuration.place(self.access + 16, data);
        }
    }

    fn read_bar(&self, state: &mut State, offset: u64, into: &mut [u8]) {
        into.fill(0);
        let within = offset % PART;
        match offset - within {
            COMMON => state.transport.read(within, into),
            STATUS => {
                if let (0, [status, ..]) = (within, into) {
                    *status = self.signals.take_status();
                }
            }
            DEVICE => state.transport.device().read_configuration(within, into),
            TABLE => self.signals.msix.read_table(within, into),
            PENDING => self.signals.msix.read_pending(within, into),
            _ => {}
        }
    }

    fn write_bar(&self, state: &mut State, offset: u64, data: &[u8]) {
        let within = offset % PART;
        match offset - within {
            COMMON => {
                state.transport.write(within, data);
                self.watch(state);
            }
            DEVICE => state.transport.device().write_configuration(within, data),
            DOORBELLS => state.transport.kick(within / u64::from(DOORBELL)),
            TABLE => self.signals.msix.write_table(within, data),
            _ => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl super::Function for Function {
    fn read_configuration(&self, offset: usize, into: &mut [u8]) {
        let mut state = self.lock();
        if overlaps(offset, into.len(), self.access + 16) {
            self.access_bar(&mut state, false);
        }
        state.configuration.read(offset, into);
    }

    fn write_configuration(&self, offset: usize, data: &[u8]) {
        let mut state = self.lock();
        state.configuration.write(offset, data);
        self.control(&state);
        if overlaps(offset, data.len(), self.access + 16) {
            self.access_bar(&mut state, true);
        }
    }

    fn place(self: Arc<Self>, bus: &Bus, windows: Windows) -> bool {
        let mut state = self.lock();
        let wanted = state.configuration.decoded(BAR).filter(|base| windows.hold(*base, BAR.size));
        if wanted == state.mapped {
            return false;
        }
        let before = state.mapped;
        self.unmap(&mut state, bus);
        if let Some(base) = wanted {
            let device: Arc<dyn bus::Device> = self.clone();
            match bus.insert(base, BAR.size, device) {
                Ok(()) => state.mapped = Some(base),
                Err(e) => tracing::debug!(error = %e, "a BAR does not answer where the guest put it"),
            }
        }
        self.watch(&mut state);
        state.mapped != before
    }

    fn remove(&self, bus: &Bus) {
        let mut state = self.lock();
        self.unmap(&mut state, bus);
        state.transport.reset();
    }

    fn pause(&self) {
        self.lock().transport.pause();
    }

    fn resume(&self) -> Result<(), ActivateError> {
        self.lock().transport.resume()
    }

    fn save(&self) -> Result<FunctionState, &'static str> {
        let mut state = self.lock();
        let device = state.transport.device();
        if let Some(what) = device.unsaved() {
            return Err(what);
        }
        Ok(FunctionState {
            kind: device.kind(),
            shape: device.shape(),
            configuration: state.configuration.bytes().to_vec(),
            signals: self.signals.save(),
            transport: state.transport.save(),
        })
    }

    fn restore(&self, saved: &FunctionState) -> Result<(), &'static str> {
        let mut state = self.lock();
        let device = state.transport.device();
        let fits = |fits: bool, otherwise| if fits { Ok(()) } else { Err(otherwise) };
        fits(device.kind() == saved.kind, "it was a device of another kind")?;
        fits(device.shape() == saved.shape, "it was configured otherwise, or of another size")?;
        fits(state.transport.restore(&saved.transport), "it had other features or queues")?;
        fits(self.signals.restore(&saved.signals), "it had another number of interrupts")?;
        fits(state.configuration.restore(&saved.configuration), "it was another PCI function")?;
        self.control(&state);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.lock().transport.device().counters()
    }
}

impl bus::Device for Function {
    fn read(&self, offset: u64, into: &mut [u8]) {
        self.read_bar(&mut self.lock(), offset, into);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.write_bar(&mut self.lock(), offset, data);
    }
}

/// Whether an access touches the four bytes at `field`.
fn overlaps(offset: usize, length: usize, field: usize) -> bool {
    offset < field + 4 && field < offset.saturating_add(length)
}

/// Body of the MSI-X capability: a vector for each queue and one for the configuration.
fn msix_body(queues: usize) -> [u8; 10] {
    let [size, _] = u16::try_from(queues).unwrap_or(u16::MAX).to_le_bytes();
    let [_, table, ..] = u32::try_from(TABLE).unwrap_or(0).to_le_bytes();
    let [_, pending, ..] = u32::try_from(PENDING).unwrap_or(0).to_le_bytes();
    [size, 0, 0, table, 0, 0, 0, pending, 0, 0]
}

/// Body of a virtio capability (section 4.1.4): which part, where it is in BAR 0, and what comes after.
fn part_body(kind: u8, offset: u64, length: u64, more: &[u8]) -> Vec<u8> {
    let size = u8::try_from(16 + more.len()).unwrap_or(u8::MAX);
    let field = |value: u64| u32::try_from(value).unwrap_or(0).to_le_bytes();
    [&[size, kind, 0, 0, 0, 0][..], &field(offset), &field(length), more].concat()
}

/// Class code, by the kind of device: what firmware and tools make of it; drivers do not look.
fn class(kind: u16) -> u32 {
    match kind {
        1 => 0x02_00_00,
        2 => 0x01_00_00,
        3 | 19 => 0x07_80_00,
        26 => 0x01_80_00,
        _ => 0x00_ff_00,
    }
}

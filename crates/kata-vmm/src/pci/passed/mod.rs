//! A device of the host as a PCI function of the guest's.
//!
//! ```text
//!   guest ─ configuration space ─▶ Space: made once from the device's own, and kept here
//!         │                          └─▶ the device hears of three things: may it reach memory, its interrupts, a reset
//!         ├ BARs ─ pages that the host's kernel lets be mapped ──▶ the device, without anybody between
//!         │      ├ MSI-X table, pending bits ─▶ Msix, here
//!         │      └ the rest ──▶ read and written here, an access at a time
//!         └◀ interrupts ─ descriptors of the hypervisor, lent to the host's kernel
//! ```
//!
//! The device's own memory decoding stays on as long as it is here, and it is never put to sleep: whatever the guest does, a page
//! that is mapped is there. Where BARs answer is the hypervisor's affair.
//!
//! What is behind [`Lent`] is VFIO, or a test's own device: nothing here needs a hypervisor or a device.

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fake;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod space;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use self::space::{DEVICE_CONTROL, RESET, Space};
use super::configuration::{Bar, Configuration};
use super::msix::Msix;
use super::virtio::FunctionState;
use super::{PciError, Windows};
use crate::bus::{self, Bus};
use crate::events::{EventError, Events, Msi};
use crate::virtio::ActivateError;

/// Bytes of a page, the least that can be mapped.
pub const PAGE: u64 = 4096;
/// Command register: memory decoding, and reaching memory.
const COMMAND: u64 = 0x04;
const MEMORY: u16 = 1 << 1;
const MASTER: u16 = 1 << 2;
/// Message control of MSI-X.
const MSIX_ENABLED: u16 = 1 << 15;
const MSIX_MASKED: u16 = 1 << 14;
/// Message control of MSI.
const MSI_ENABLED: u16 = 1;

/// Where a device is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The BAR of this register.
    Bar(usize),
    /// The configuration space.
    Configuration,
}

/// A BAR of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Bytes; 0 where there is none.
    pub size: u64,
    /// What of it can be mapped: offset and bytes.
    pub direct: Vec<(u64, u64)>,
}

/// Which messages interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Messages {
    /// Those of the MSI capability.
    Msi,
    /// Those of the MSI-X table.
    Msix,
}

/// A PCI device that the host lends. When it is dropped the host has it back, and it reaches no memory of the guest's any more.
pub trait Lent: Send + Sync {
    /// The BAR of this register, 0 to 5. The second register of a wide one has none.
    fn region(&self, register: usize) -> Region;

    /// How many messages MSI has; 0 for none.
    fn messages(&self) -> usize;

    /// How many vectors MSI-X has; 0 for none.
    fn vectors(&self) -> usize;

    /// Reads it. Offsets and lengths come from a guest.
    fn read(&self, place: Place, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// Writes it.
    fn write(&self, place: Place, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Which descriptors it signals when it interrupts, a vector each, from the first on; none ends that.
    fn connect(&self, messages: Messages, events: &[EventFd]) -> io::Result<()>;

    /// Lets the guest reach these pages of a BAR, of [`Region::direct`], at an address of its own.
    fn map(&self, register: usize, offset: u64, bytes: u64, address: u64) -> io::Result<()>;

    /// Ends that. Nothing else is at that address then.
    fn unmap(&self, address: u64);

    /// Brings it back to where it was when the host gave it away. Interrupts are off then.
    fn reset(&self) -> io::Result<()>;
}

/// Why a device of the host cannot be a guest's.
#[derive(Debug, Error)]
pub enum PassedError {
    /// It does not answer.
    #[error("the device's configuration space cannot be read")]
    Read(#[source] io::Error),
    /// It does not begin to work.
    #[error("the device cannot be {action}")]
    Start {
        /// What was tried: `reset`, `switched on`.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A bridge, or the like.
    #[error(
        "the device's header is of type {kind}, which makes it a bridge; give the devices behind it to the guest"
    )]
    Header {
        /// Which type.
        kind: u8,
    },
    /// Not a size of a BAR.
    #[error("BAR {register} of the device has {size:#x} bytes, which no BAR can have")]
    Bar {
        /// Its register.
        register: usize,
        /// Its size.
        size: u64,
    },
    /// It would have nothing to be reached by.
    #[error("the device has no memory BAR, and I/O ports are not passed on")]
    NoMemory,
    /// It could not interrupt.
    #[error("the device has neither MSI nor MSI-X, and an interrupt line (INTx) is not passed on")]
    NoMessages,
    /// It is broken.
    #[error("the capability at {at:#x} of the device makes no sense: {what}")]
    Capability {
        /// Its offset.
        at: usize,
        /// What is wrong.
        what: &'static str,
    },
    /// The hypervisor refused.
    #[error("the device cannot have its interrupts")]
    Interrupts(#[from] EventError),
}

impl PassedError {
    fn capability(at: usize, what: &'static str) -> PassedError {
        PassedError::Capability { at, what }
    }
}

/// A part of a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    /// Register of the BAR.
    register: usize,
    offset: u64,
    length: u64,
}

impl Stretch {
    /// Where in it an access is that is in it as a whole.
    fn within(&self, register: usize, offset: u64, length: usize) -> Option<u64> {
        let within = offset.checked_sub(self.offset).filter(|_| register == self.register)?;
        let end = within.checked_add(u64::try_from(length).ok()?)?;
        (end <= self.length).then_some(within)
    }

    fn overlaps(&self, other: &Stretch) -> bool {
        self.register == other.register
            && self.offset < other.offset + other.length
            && other.offset < self.offset + self.length
    }

    /// The pages that it is in: offset and end.
    fn pages(&self) -> (u64, u64) {
        (self.offset / PAGE * PAGE, (self.offset + self.length).next_multiple_of(PAGE))
    }
}

/// A device of the host with all that makes a function of it.
pub struct Function {
    device: Box<dyn Lent>,
    msi: Option<(space::Msi, Msix)>,
    msix: Option<(space::Msix, Msix)>,
    /// Offset of the PCI Express capability.
    express: Option<usize>,
    state: Mutex<State>,
}

struct State {
    configuration: Configuration,
    bars: Vec<Answering>,
    /// It may reach memory.
    master: bool,
    /// What interrupts, and how many vectors of it were asked for.
    connected: Option<(Messages, usize)>,
}

/// A BAR, and where it answers.
struct Answering {
    bar: Bar,
    /// Pages that are mapped where it answers: offset and bytes.
    direct: Vec<(u64, u64)>,
    base: Option<u64>,
    /// Addresses that are mapped.
    mapped: Vec<u64>,
}

/// A BAR on the bus.
struct Access {
    function: Weak<Function>,
    register: usize,
}

impl Function {
    /// Makes a function of a device, which is reset and switched on. `place` says where there is room for a BAR; none answers there
    /// yet.
    pub fn new(
        events: &Arc<dyn Events>,
        device: Box<dyn Lent>,
        mut place: impl FnMut(&Bar) -> Result<u64, PciError>,
    ) -> Result<Function, PciError> {
        let failed = |action| move |source| PassedError::Start { action, source };
        device.reset().map_err(failed("reset"))?;
        let Space { configuration, bars, msi, msix, express } = Space::of(&*device, &mut place)?;
        let vectors =
            |count| Msix::new(Arc::clone(events), count).map_err(|e| PciError::from(PassedError::from(e)));
        let msi = msi.map(|msi| vectors(msi.messages).map(|own| (msi, own))).transpose()?;
        let msix = msix.map(|msix| vectors(msix.vectors).map(|own| (msix, own))).transpose()?;
        let hidden: Vec<_> = msix.iter().flat_map(|(msix, _)| [msix.table, msix.pending]).collect();
        let answering = |bar: Bar| {
            let direct = direct(&device.region(bar.register).direct, bar, &hidden);
            Answering { bar, direct, base: None, mapped: Vec::new() }
        };
        let bars = bars.into_iter().map(answering).collect();
        device.write(Place::Configuration, COMMAND, &MEMORY.to_le_bytes()).map_err(failed("switched on"))?;
        let state = State { configuration, bars, master: false, connected: None };
        Ok(Function { device, msi, msix, express, state: Mutex::new(state) })
    }

    /// Brings the device to what the registers say, after a guest's write of these bytes.
    fn carry_out(&self, state: &mut State, offset: usize, data: &[u8]) {
        if self.asks_for_reset(offset, data) {
            self.reset(state);
        }
        let master = state.configuration.is_master();
        if master != state.master {
            state.master = master;
            let command = if master { MEMORY | MASTER } else { MEMORY };
            if let Err(error) = self.device.write(Place::Configuration, COMMAND, &command.to_le_bytes()) {
                tracing::warn!(%error, master, "a device of the host is not told whether it may reach memory");
            }
        }
        self.set_up_msi(state);
        if let Some((capability, vectors)) = &self.msix {
            let control = state.configuration.word(capability.at + 2);
            vectors.control(control & MSIX_ENABLED != 0, control & MSIX_MASKED != 0);
        }
        self.connect(state);
    }

    /// Whether these bytes have the bit set that asks for a reset.
    fn asks_for_reset(&self, offset: usize, data: &[u8]) -> bool {
        let [_, bit] = RESET.to_le_bytes();
        let Some(at) = self.express.map(|at| at + DEVICE_CONTROL + 1) else { return false };
        at.checked_sub(offset).and_then(|at| data.get(at)).is_some_and(|byte| byte & bit != 0)
    }

    /// The device is as it came, and so are the registers that matter to it.
    fn reset(&self, state: &mut State) {
        state.configuration.clear_command();
        let controls =
            [self.msi.as_ref().map(|(msi, _)| msi.at), self.msix.as_ref().map(|(msix, _)| msix.at)];
        for at in controls.into_iter().flatten() {
            let off = state.configuration.word(at + 2) & !(MSIX_ENABLED | MSIX_MASKED | MSI_ENABLED);
            state.configuration.place(at + 2, &off.to_le_bytes());
        }
        self.connect(state);
        if let Err(error) = self.device.reset() {
            tracing::warn!(%error, "a device of the host is not reset as its guest asked");
        }
        // Whatever it makes of the command register: it decodes and waits.
        state.master = true;
    }

    /// Messages without a table: the vectors are what the capability says.
    fn set_up_msi(&self, state: &State) {
        let Some((capability, vectors)) = &self.msi else { return };
        let (space, at) = (&state.configuration, capability.at);
        let high = if capability.wide { space.double(at + 8) } else { 0 };
        let address = u64::from(high) << 32 | u64::from(space.double(at + 4));
        let (data, masks) = (
            space.word(at + capability.data()),
            match capability.masks {
                true => space.double(at + capability.mask()),
                false => 0,
            },
        );
        let count = messages(capability, space);
        for (vector, number) in (0..count).zip(0u32..) {
            // The device puts the number into as many low bits as there are messages.
            let low = u32::try_from(count - 1).unwrap_or(0);
            let msi = Msi { address, data: u32::from(data) & !low | number };
            vectors.set_vector(vector, msi, masks >> number & 1 == 1);
        }
        vectors.control(space.word(at + 2) & MSI_ENABLED != 0, false);
    }

    /// Which messages the registers switch on, and how many: MSI-X before MSI, for a guest that switches on both breaks a rule.
    fn wanted(&self, state: &State) -> Option<(Messages, usize)> {
        let word = |at: usize| state.configuration.word(at + 2);
        let msix = self.msix.as_ref().filter(|(msix, _)| word(msix.at) & MSIX_ENABLED != 0);
        let msi = self.msi.as_ref().filter(|(msi, _)| word(msi.at) & MSI_ENABLED != 0);
        let msi = msi.map(|(msi, _)| (Messages::Msi, messages(msi, &state.configuration)));
        msix.map(|(msix, _)| (Messages::Msix, msix.vectors)).or(msi)
    }

    /// Brings what the device signals to what the registers say.
    fn connect(&self, state: &mut State) {
        let wanted = self.wanted(state);
        if state.connected == wanted {
            return;
        }
        if let Some((before, _)) = state.connected {
            if let Err(error) = self.device.connect(before, &[]) {
                tracing::warn!(%error, "interrupts of a device of the host stay on");
            }
            self.lines(before).into_iter().for_each(Msix::take_back);
        }
        state.connected = wanted;
        let Some((messages, count)) = wanted else { return };
        let Some(lines) = self.lines(messages) else { return };
        let events: Vec<EventFd> = (0..count).map_while(|vector| lines.lend(vector)).collect();
        if let Err(error) = self.device.connect(messages, &events) {
            lines.take_back();
            tracing::error!(%error, count, "a device of the host cannot interrupt its guest");
        }
    }

    fn lines(&self, messages: Messages) -> Option<&Msix> {
        match messages {
            Messages::Msi => self.msi.as_ref().map(|(_, lines)| lines),
            Messages::Msix => self.msix.as_ref().map(|(_, lines)| lines),
        }
    }

    /// Lets a BAR answer at `base`, or nowhere.
    fn answer(self: &Arc<Self>, answering: &mut Answering, bus: &Bus, base: Option<u64>) {
        self.silence(answering, bus);
        let (Some(base), Bar { register, size, .. }) = (base, answering.bar) else { return };
        let access = Access { function: Arc::downgrade(self), register };
        if let Err(error) = bus.insert(base, size, Arc::new(access)) {
            tracing::debug!(%error, "a BAR does not answer where the guest put it");
            return;
        }
        answering.base = Some(base);
        // A smaller one shares its page with whoever is beside it.
        if !base.is_multiple_of(PAGE) {
            return;
        }
        for (offset, bytes) in &answering.direct {
            match self.device.map(register, *offset, *bytes, base + offset) {
                Ok(()) => answering.mapped.push(base + offset),
                Err(error) => tracing::warn!(%error, register, "a part of a BAR takes the slow way"),
            }
        }
    }

    fn silence(&self, answering: &mut Answering, bus: &Bus) {
        answering.mapped.drain(..).for_each(|address| self.device.unmap(address));
        if let Some(base) = answering.base.take() {
            bus.remove(base);
        }
    }

    fn read_bar(&self, register: usize, offset: u64, into: &mut [u8]) {
        if let Some((msix, lines)) = &self.msix {
            if let Some(within) = msix.table.within(register, offset, into.len()) {
                return lines.read_table(within, into);
            }
            if let Some(within) = msix.pending.within(register, offset, into.len()) {
                return lines.read_pending(within, into);
            }
            if self.touches_hidden(register, offset, into.len()) {
                return;
            }
        }
        if let Err(error) = self.device.read(Place::Bar(register), offset, into) {
            tracing::debug!(%error, register, offset, "a device of the host is not read");
            into.fill(0xff);
        }
    }

    fn write_bar(&self, register: usize, offset: u64, data: &[u8]) {
        if let Some((msix, lines)) = &self.msix {
            if let Some(within) = msix.table.within(register, offset, data.len()) {
                return lines.write_table(within, data);
            }
            if self.touches_hidden(register, offset, data.len()) {
                return;
            }
        }
        if let Err(error) = self.device.write(Place::Bar(register), offset, data) {
            tracing::debug!(%error, register, offset, "a device of the host is not written");
        }
    }

    /// Whether an access has something of the table or the pending bits in it, which the device must not hear of.
    fn touches_hidden(&self, register: usize, offset: u64, length: usize) -> bool {
        let length = u64::try_from(length).unwrap_or(u64::MAX);
        let Some(end) = offset.checked_add(length) else { return true };
        let access = Stretch { register, offset, length: end - offset };
        self.msix.iter().any(|(msix, _)| msix.table.overlaps(&access) || msix.pending.overlaps(&access))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Function {
    /// Also with a machine that ends in the middle of it all.
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mapped = state.bars.iter_mut().flat_map(|answering| answering.mapped.drain(..));
        mapped.for_each(|address| self.device.unmap(address));
    }
}

impl super::Function for Function {
    fn read_configuration(&self, offset: usize, into: &mut [u8]) {
        self.lock().configuration.read(offset, into);
    }

    fn write_configuration(&self, offset: usize, data: &[u8]) {
        let mut state = self.lock();
        state.configuration.write(offset, data);
        self.carry_out(&mut state, offset, data);
    }

    fn place(self: Arc<Self>, bus: &Bus, windows: Windows) -> bool {
        let mut state = self.lock();
        let State { configuration, bars, .. } = &mut *state;
        let mut changed = false;
        for answering in bars {
            let bar = answering.bar;
            let wanted = configuration.decoded(bar).filter(|base| windows.hold(*base, bar.size));
            let before = answering.base;
            if wanted != before {
                self.answer(answering, bus, wanted);
            }
            changed |= answering.base != before;
        }
        changed
    }

    fn remove(&self, bus: &Bus) {
        let mut state = self.lock();
        state.bars.iter_mut().for_each(|answering| self.silence(answering, bus));
        self.reset(&mut state);
        if let Err(error) = self.device.write(Place::Configuration, COMMAND, &[0; 2]) {
            tracing::warn!(%error, "a device of the host is not switched off");
        }
    }

    /// A device of the host goes on: nobody knows how to hold it.
    fn pause(&self) {}

    fn resume(&self) -> Result<(), ActivateError> {
        Ok(())
    }

    fn save(&self) -> Result<FunctionState, &'static str> {
        Err("a device of the host, whose state nobody can read")
    }

    fn restore(&self, _saved: &FunctionState) -> Result<(), &'static str> {
        Err("it is a device of the host")
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

impl bus::Device for Access {
    fn read(&self, offset: u64, into: &mut [u8]) {
        if let Some(function) = self.function.upgrade() {
            function.read_bar(self.register, offset, into);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(function) = self.function.upgrade() {
            function.write_bar(self.register, offset, data);
        }
    }
}

/// How many messages the guest switched on, of those that it may.
fn messages(capability: &space::Msi, space: &Configuration) -> usize {
    let wanted = 1_usize << (space.word(capability.at + 2) >> 4 & 7);
    wanted.min(capability.messages)
}

/// What of a BAR's mappable parts is mapped: whole pages inside the BAR, without those where something hidden is.
fn direct(parts: &[(u64, u64)], bar: Bar, hidden: &[Stretch]) -> Vec<(u64, u64)> {
    let mut pages: Vec<(u64, u64)> = Vec::new();
    for (offset, bytes) in parts {
        let end = offset.saturating_add(*bytes).min(bar.size) / PAGE * PAGE;
        pages.extend(
            offset.checked_next_multiple_of(PAGE).filter(|first| *first < end).map(|first| (first, end)),
        );
    }
    for cut in hidden.iter().filter(|cut| cut.register == bar.register).map(Stretch::pages) {
        let around = |(first, end): (u64, u64)| {
            let (before, behind) = ((first, end.min(cut.0)), (first.max(cut.1), end));
            [before, behind].into_iter().filter(|(first, end)| first < end)
        };
        pages = pages.into_iter().flat_map(around).collect();
    }
    pages.sort_unstable();
    pages.dedup();
    pages.into_iter().map(|(first, end)| (first, end - first)).collect()
}

#[cfg(test)]
mod tests;

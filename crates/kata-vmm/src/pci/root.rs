//! The bus: which device is in which slot.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::configuration::{Configuration, Identity};
use super::passed::{self, Lent};
use super::ports::{HotPlug, Ports};
use super::virtio::{self, BAR_SIZE, FunctionState};
use super::{Function, PciError, SLOTS, Slot, Windows, aml};
use crate::bus::{self, Bus};
use crate::events::Events;
use crate::virtio::worker::descriptor;
use crate::virtio::{Device, Memory};

/// A host bridge as Linux wants to find one before it believes in the configuration mechanism; no driver is for it.
const BRIDGE: Identity =
    Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_00_00, revision: 0, subsystem: (0x1b36, 0x1100) };

/// The one PCI bus.
pub struct Root {
    events: Arc<dyn Events>,
    bus: Arc<Bus>,
    memory: Memory,
    windows: Windows,
    /// What the configuration mechanism points at.
    pub(super) address: AtomicU32,
    slots: Mutex<Slots>,
}

struct Slots {
    bridge: Configuration,
    /// By the number of the slot; the bridge's stays empty.
    occupants: [Option<Occupant>; SLOTS as usize],
    /// Slots whose device the guest has not been told of.
    came: u32,
    /// Slots whose device it is to let go and has not been told so.
    leave: u32,
}

/// A function, and the addresses that it was given.
type Made = Result<(Arc<dyn Function>, Vec<(u64, u64)>), PciError>;

struct Occupant {
    id: String,
    function: Arc<dyn Function>,
    /// Addresses that its BARs were given, where they are not those of its slot: first and bytes of each.
    given: Vec<(u64, u64)>,
    /// It came while the guest ran.
    came: bool,
    /// It was asked to leave: written to when it has.
    departure: Option<EventFd>,
}

/// The bus in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BusState {
    address: u32,
    bridge: Vec<u8>,
    came: u32,
    /// By the number of the slot.
    slots: BTreeMap<u8, SlotState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SlotState {
    id: String,
    function: FunctionState,
}

/// A device on its way out.
#[derive(Debug)]
pub struct Departure(EventFd);

impl Departure {
    /// Waits until the device has left; false if it has not by then.
    pub fn wait(&self, most: Duration) -> bool {
        let timeout = Timespec::try_from(most).ok();
        let mut gone = [PollFd::from_borrowed_fd(descriptor(&self.0), PollFlags::IN)];
        let started = std::time::Instant::now();
        loop {
            match poll(&mut gone, timeout.as_ref()) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) if started.elapsed() < most => {}
                Err(_) => return false,
            }
        }
    }
}

impl Root {
    /// A bus with nothing but a host bridge. BARs are put on `bus`, in `windows`; devices work with `memory`.
    pub fn new(
        events: Arc<dyn Events>,
        bus: Arc<Bus>,
        memory: Memory,
        windows: impl Into<Windows>,
    ) -> Arc<Root> {
        let windows = windows.into();
        let slots = Slots {
            bridge: Configuration::new(BRIDGE),
            occupants: std::array::from_fn(|_| None),
            came: 0,
            leave: 0,
        };
        Arc::new(Root { events, bus, memory, windows, address: AtomicU32::new(0), slots: Mutex::new(slots) })
    }

    /// The configuration mechanism, for [`CONFIGURATION_PORTS`](super::CONFIGURATION_PORTS) from
    /// [`CONFIGURATION_PORT`](super::CONFIGURATION_PORT).
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn bus::Device> {
        Arc::new(Ports(Arc::clone(self)))
    }

    /// The hot-plug registers, for [`HOTPLUG_PORTS`](super::HOTPLUG_PORTS) from [`HOTPLUG_PORT`](super::HOTPLUG_PORT).
    pub fn hotplug_block(self: &Arc<Self>) -> Arc<dyn bus::Device> {
        Arc::new(HotPlug(Arc::clone(self)))
    }

    /// What the DSDT says of the bus: the device `\_SB.PCI0` with its windows, slots and [`SCAN_METHOD`](super::SCAN_METHOD).
    pub fn aml(&self) -> Vec<u8> {
        aml::root(self.windows)
    }

    /// Puts a device into the first free slot, before the guest runs.
    pub fn attach(&self, id: &str, device: Box<dyn Device>) -> Result<Slot, PciError> {
        self.put(&mut self.lock(), id, false, self.virtio(device))
    }

    /// The same for a device of the host.
    pub fn attach_passed(&self, id: &str, device: Box<dyn Lent>) -> Result<Slot, PciError> {
        self.put(&mut self.lock(), id, false, self.passed(device))
    }

    /// Puts a device into the first free slot while the guest runs. The guest looks for it when the event is raised that leads to
    /// [`SCAN_METHOD`](super::SCAN_METHOD).
    pub fn plug(&self, id: &str, device: Box<dyn Device>) -> Result<Slot, PciError> {
        self.put_running(id, self.virtio(device))
    }

    /// The same for a device of the host.
    pub fn plug_passed(&self, id: &str, device: Box<dyn Lent>) -> Result<Slot, PciError> {
        self.put_running(id, self.passed(device))
    }

    /// Asks the guest to let go of a device; it hears of that when the event is raised that leads to
    /// [`SCAN_METHOD`](super::SCAN_METHOD). Can be asked again, where the guest missed it.
    pub fn unplug(&self, id: &str) -> Result<Departure, PciError> {
        let mut slots = self.lock();
        let (slot, occupant) = slots.find(id).ok_or_else(|| PciError::NotFound { id: id.to_owned() })?;
        let departure = match &occupant.departure {
            Some(departure) => departure.try_clone(),
            None => EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK),
        };
        let departure = departure.map_err(PciError::Descriptor)?;
        occupant.departure = Some(departure.try_clone().map_err(PciError::Descriptor)?);
        slots.leave |= slot.bit();
        Ok(Departure(departure))
    }

    /// In which slot a device is.
    pub fn slot(&self, id: &str) -> Option<Slot> {
        self.lock().find(id).map(|(slot, _)| slot)
    }

    /// Stops all devices; the guest's CPUs stand still already.
    pub fn pause(&self) {
        self.lock().occupants().for_each(|occupant| occupant.function.pause());
    }

    /// Lets all devices go on where they were, before the CPUs do. On an error the others go on, and that one can be tried again.
    pub fn resume(&self) -> Result<(), PciError> {
        let mut result = Ok(());
        for occupant in self.lock().occupants() {
            if let Err(source) = occupant.function.resume() {
                result = Err(PciError::Resume { id: occupant.id.clone(), source });
            }
        }
        result
    }

    /// Counters of all devices, each after its device's name and a full stop.
    pub fn counters(&self) -> BTreeMap<String, u64> {
        let slots = self.lock();
        let named = |occupant: &Occupant| {
            let name = |(counter, value)| (format!("{}.{counter}", occupant.id), value);
            occupant.function.counters().into_iter().map(name).collect::<Vec<_>>()
        };
        slots.occupants().flat_map(named).collect()
    }

    /// For a snapshot; all devices stand still. Not of a bus on which something would be lost.
    pub fn save(&self) -> Result<BusState, PciError> {
        let slots = self.lock();
        let mut saved = BTreeMap::new();
        let mut next = None;
        for (slot, occupant) in slots.numbered() {
            // Another machine's devices are in one slot after the other.
            let gap = next.replace(slot + 1).is_some_and(|next| next != slot);
            let state = match occupant {
                _ if gap => Err("a place before it that another device has left"),
                Occupant { departure: Some(_), .. } => Err("a device that is to leave"),
                Occupant { came: true, .. } => Err("a device that came while it ran"),
                Occupant { function, .. } => function.save(),
            };
            let id = occupant.id.clone();
            match state {
                Ok(function) => saved.insert(slot, SlotState { id, function }),
                Err(what) => return Err(PciError::Unsaved { id, what }),
            };
        }
        let (address, bridge) = (self.address.load(Ordering::SeqCst), slots.bridge.bytes().to_vec());
        Ok(BusState { address, bridge, came: slots.came, slots: saved })
    }

    /// From a snapshot, before the machine runs: the same devices are attached already. What was lent to the guest is told to it anew
    /// with [`Root::resume`].
    pub fn restore(&self, saved: &BusState) -> Result<(), PciError> {
        let mut slots = self.lock();
        let other = |id: &str, what| PciError::Other { id: id.to_owned(), what };
        for (slot, occupant) in slots.numbered() {
            let state = saved.slots.get(&slot).filter(|state| state.id == occupant.id);
            let state = state.ok_or_else(|| other(&occupant.id, "it was not there"))?;
            occupant.function.restore(&state.function).map_err(|what| other(&occupant.id, what))?;
        }
        let missing = saved.slots.values().find(|state| slots.find(&state.id).is_none());
        if let Some(missing) = missing {
            return Err(other(&missing.id, "it is there no more"));
        }
        if !slots.bridge.restore(&saved.bridge) {
            return Err(other("bridge", "it was another PCI function"));
        }
        slots.came = saved.came;
        self.address.store(saved.address, Ordering::SeqCst);
        self.place_others(&slots);
        Ok(())
    }

    fn put_running(&self, id: &str, make: impl FnOnce(u8, &Slots) -> Made) -> Result<Slot, PciError> {
        let mut slots = self.lock();
        let slot = self.put(&mut slots, id, true, make)?;
        slots.came |= slot.bit();
        Ok(slot)
    }

    fn put(
        &self,
        slots: &mut Slots,
        id: &str,
        came: bool,
        make: impl FnOnce(u8, &Slots) -> Made,
    ) -> Result<Slot, PciError> {
        if slots.find(id).is_some() {
            return Err(PciError::Exists { id: id.to_owned() });
        }
        let free = (1..SLOTS).zip(slots.occupants.iter().skip(1)).find(|(_, occupant)| occupant.is_none());
        let (slot, _) = free.ok_or(PciError::Full)?;
        let (function, given) = make(slot, slots)?;
        if let Some(place) = slots.occupants.get_mut(usize::from(slot)) {
            *place = Some(Occupant { id: id.to_owned(), function, given, came, departure: None });
        }
        Ok(Slot(slot))
    }

    /// How a virtio device becomes a function: each slot has its own BAR at first, so none overlaps.
    fn virtio(&self, device: Box<dyn Device>) -> impl FnOnce(u8, &Slots) -> Made {
        move |slot, _| {
            let low = self.windows.low;
            let base = low.base.saturating_add(u32::from(slot) * BAR_SIZE);
            if !low.holds(base, BAR_SIZE) {
                return Err(PciError::Window { size: low.size });
            }
            let function =
                virtio::Function::new(Arc::clone(&self.events), self.memory.clone(), device, base)?;
            Ok((Arc::new(function), Vec::new()))
        }
    }

    /// How a device of the host becomes one: its BARs are behind those of the slots, where nobody else's is.
    fn passed(&self, device: Box<dyn Lent>) -> impl FnOnce(u8, &Slots) -> Made {
        move |_, slots| {
            let mut given: Vec<_> =
                slots.occupants().flat_map(|occupant| occupant.given.iter().copied()).collect();
            let others = given.len();
            let function = passed::Function::new(&self.events, device, |bar| {
                let base = self.room(&given, bar.size, bar.wide)?;
                given.push((base, bar.size));
                Ok(base)
            })?;
            Ok((Arc::new(function), given.split_off(others)))
        }
    }

    /// The first place in the windows for a BAR, among those that were given away.
    fn room(&self, given: &[(u64, u64)], size: u64, wide: bool) -> Result<u64, PciError> {
        let Windows { low, high } = self.windows;
        let behind = u64::from(low.base) + u64::from(SLOTS) * u64::from(BAR_SIZE);
        let low = (behind, u64::from(low.base) + u64::from(low.size));
        let high = high.filter(|_| wide).map(|high| (high.base, high.base.saturating_add(high.size)));
        let places = [Some(low), high].into_iter().flatten();
        let found = places.filter_map(|(first, end)| gap(given, first, end, size)).next();
        found.ok_or(PciError::NoRoom { size })
    }

    pub(super) fn read_configuration(&self, slot: u8, register: usize, into: &mut [u8]) {
        let slots = self.lock();
        match slots.occupants.get(usize::from(slot)) {
            _ if slot == 0 => slots.bridge.read(register, into),
            Some(Some(occupant)) => occupant.function.read_configuration(register, into),
            _ => {}
        }
    }

    pub(super) fn write_configuration(&self, slot: u8, register: usize, data: &[u8]) {
        let mut slots = self.lock();
        match slots.occupants.get(usize::from(slot)) {
            _ if slot == 0 => slots.bridge.write(register, data),
            Some(Some(occupant)) => {
                occupant.function.write_configuration(register, data);
                if Arc::clone(&occupant.function).place(&self.bus, self.windows) {
                    self.place_others(&slots);
                }
            }
            _ => {}
        }
    }

    /// One BAR has moved away: another may have waited for its place.
    fn place_others(&self, slots: &Slots) {
        for occupant in slots.occupants() {
            Arc::clone(&occupant.function).place(&self.bus, self.windows);
        }
    }

    pub(super) fn came(&self) -> u32 {
        self.lock().came
    }

    pub(super) fn leaving(&self) -> u32 {
        self.lock().leave
    }

    /// The guest knows of these.
    pub(super) fn seen(&self, came: u32, leave: u32) {
        let mut slots = self.lock();
        slots.came &= !came;
        slots.leave &= !leave;
    }

    /// The guest has let go of these.
    pub(super) fn eject(&self, ejected: u32) {
        let mut slots = self.lock();
        for slot in (1..SLOTS).map(Slot).filter(|slot| ejected & slot.bit() != 0) {
            let Some(place) = slots.occupants.get_mut(usize::from(slot.0)) else { continue };
            // Only what was asked to leave: else the guest alone could take devices from a machine.
            let Some(Occupant { function, departure: Some(departure), id, .. }) =
                place.take_if(|occupant| occupant.departure.is_some())
            else {
                continue;
            };
            slots.came &= !slot.bit();
            slots.leave &= !slot.bit();
            function.remove(&self.bus);
            // Before its owner hears of it: a device of the host is free for others then.
            drop(function);
            self.place_others(&slots);
            tracing::debug!(id, slot = slot.0, "the guest has let go of a device");
            // It holds only this one, so it cannot overflow.
            let _ = departure.write(1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    fn occupants(&self) -> impl Iterator<Item = &Occupant> {
        self.occupants.iter().flatten()
    }

    fn numbered(&self) -> impl Iterator<Item = (u8, &Occupant)> {
        (0..SLOTS).zip(&self.occupants).filter_map(|(slot, occupant)| Some((slot, occupant.as_ref()?)))
    }

    fn find(&mut self, id: &str) -> Option<(Slot, &mut Occupant)> {
        let slots = (0..SLOTS).zip(&mut self.occupants);
        slots.filter_map(|(slot, o)| Some((Slot(slot), o.as_mut()?))).find(|(_, occupant)| occupant.id == id)
    }
}

/// The first multiple of `size` from `first` on of which `size` bytes are before `end` and none is given away.
fn gap(given: &[(u64, u64)], first: u64, end: u64, size: u64) -> Option<u64> {
    let mut base = first.checked_next_multiple_of(size)?;
    loop {
        let last = base.checked_add(size).filter(|last| *last <= end)?;
        let taken =
            given.iter().find(|(other, length)| *other < last && base < other.saturating_add(*length));
        match taken {
            None => return Some(base),
            Some((other, length)) => base = other.checked_add(*length)?.checked_next_multiple_of(size)?,
        }
    }
}

impl Slot {
    /// Its bit in the hot-plug registers.
    fn bit(self) -> u32 {
        1u32.checked_shl(self.0.into()).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;

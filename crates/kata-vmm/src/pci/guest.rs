//! A guest for tests: it reaches a bus through ports and memory as a driver does, and sees what the hypervisor was asked for.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    dead_code,
    reason = "only tests and fuzz targets have it, each a part of it"
)]

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{HighWindow, Root, Window, Windows};
use crate::bus::{Bus, Device};
use crate::events::{EventError, Events, Line, Msi};
use crate::virtio::Memory;

/// Bytes of the guest's memory.
pub const MEMORY: usize = 0x10_0000;
/// Where BARs may be.
pub const WINDOW: Window = Window { base: 0xc000_0000, size: 0x20_0000 };
/// Where wide ones may be, too.
pub const HIGH: HighWindow = HighWindow { base: 0x10_0000_0000, size: 0x10_0000_0000 };
/// Offsets of the parts of a BAR.
pub const COMMON: u32 = 0;
pub const STATUS: u32 = 0x1000;
pub const DEVICE: u32 = 0x2000;
pub const DOORBELLS: u32 = 0x3000;
pub const TABLE: u32 = 0x4000;
pub const PENDING: u32 = 0x5000;

/// A hypervisor that writes down what it is asked for.
#[derive(Default)]
pub struct Recorder(Mutex<Recorded>);

#[derive(Default)]
pub struct Recorded {
    next: u32,
    /// How many lines it has.
    pub most: Option<usize>,
    /// Lines that are there, with their descriptors.
    pub lines: BTreeMap<u32, EventFd>,
    /// Where they lead.
    pub routes: BTreeMap<u32, Msi>,
    /// How often routes were changed.
    pub changes: usize,
    /// Watched doorbells.
    pub doorbells: BTreeMap<u64, EventFd>,
}

impl Recorder {
    pub fn lock(&self) -> MutexGuard<'_, Recorded> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recorded {
    /// Messages that the guest got since it last looked, with how often.
    pub fn messages(&self) -> Vec<(Msi, u64)> {
        let raised = self.lines.iter().filter_map(|(line, event)| Some((line, event.read().ok()?)));
        raised.filter_map(|(line, count)| Some((*self.routes.get(line)?, count))).collect()
    }
}

impl Events for Recorder {
    fn new_line(&self) -> Result<(Line, EventFd), EventError> {
        let mut recorded = self.lock();
        if let Some(most) = recorded.most.filter(|most| recorded.lines.len() >= *most) {
            return Err(EventError::NoLine { most });
        }
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).expect("an event");
        recorded.next += 1;
        let line = recorded.next;
        recorded.lines.insert(line, event.try_clone().expect("an event"));
        Ok((Line(line), event))
    }

    fn route(&self, routes: &[(Line, Option<Msi>)]) -> Result<(), EventError> {
        let mut recorded = self.lock();
        recorded.changes += 1;
        for (line, route) in routes {
            assert!(recorded.lines.contains_key(&line.0), "a line that is not there is routed");
            match route {
                Some(msi) => recorded.routes.insert(line.0, *msi),
                None => recorded.routes.remove(&line.0),
            };
        }
        Ok(())
    }

    fn drop_line(&self, line: Line, _event: &EventFd) {
        let mut recorded = self.lock();
        recorded.routes.remove(&line.0);
        assert!(recorded.lines.remove(&line.0).is_some(), "a line that is not there is dropped");
    }

    fn watch(&self, address: u64, event: &EventFd) -> Result<(), EventError> {
        let event = event.try_clone().expect("an event");
        assert!(self.lock().doorbells.insert(address, event).is_none(), "{address:#x} is watched twice");
        Ok(())
    }

    fn unwatch(&self, address: u64, _event: &EventFd) {
        assert!(self.lock().doorbells.remove(&address).is_some(), "{address:#x} is not watched");
    }
}

/// A machine's bus and what a guest does to it.
pub struct Guest {
    pub events: Arc<Recorder>,
    pub bus: Arc<Bus>,
    pub memory: Memory,
    pub root: Arc<Root>,
    ports: Arc<dyn Device>,
    hotplug: Arc<dyn Device>,
}

impl Guest {
    pub fn new() -> Guest {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]);
        Guest::with(memory.expect("memory for a guest"))
    }

    pub fn with(memory: GuestMemoryMmap) -> Guest {
        let events = Arc::new(Recorder::default());
        let bus = Arc::new(Bus::default());
        let memory = Memory::from(Arc::new(memory));
        let windows = Windows { low: WINDOW, high: Some(HIGH) };
        let root = Root::new(events.clone(), Arc::clone(&bus), memory.clone(), windows);
        let (ports, hotplug) = (root.config_ports(), root.hotplug_block());
        Guest { events, bus, memory, root, ports, hotplug }
    }

    /// Reads a register of a slot's configuration space.
    pub fn config<const N: usize>(&self, slot: u8, register: u8) -> [u8; N] {
        self.select(slot, register);
        let mut bytes = [0xff; N];
        self.ports.read(4 + u64::from(register & 3), &mut bytes);
        bytes
    }

    pub fn config_double(&self, slot: u8, register: u8) -> u32 {
        u32::from_le_bytes(self.config(slot, register))
    }

    pub fn set_config(&self, slot: u8, register: u8, data: &[u8]) {
        self.select(slot, register);
        self.ports.write(4 + u64::from(register & 3), data);
    }

    fn select(&self, slot: u8, register: u8) {
        let address = 1 << 31 | u32::from(slot) << 11 | u32::from(register & 0xfc);
        self.ports.write(0, &address.to_le_bytes());
    }

    /// Offset of the nth capability with this identifier, counted from 0.
    pub fn capability(&self, slot: u8, id: u8, nth: usize) -> Option<u8> {
        let [mut at] = self.config(slot, 0x34);
        let mut found = Vec::new();
        while at != 0 {
            let [this, next] = self.config(slot, at);
            if this == id {
                found.push(at);
            }
            at = next;
        }
        found.get(nth).copied()
    }

    /// Lets a slot's BAR answer, at `base`.
    pub fn map(&self, slot: u8, base: u32) {
        self.set_config(slot, 0x10, &base.to_le_bytes());
        self.set_config(slot, 4, &6u16.to_le_bytes());
    }

    pub fn unmap(&self, slot: u8) {
        self.set_config(slot, 4, &0u16.to_le_bytes());
    }

    /// Enables and masks MSI-X.
    pub fn set_msix(&self, slot: u8, enabled: bool, masked: bool) {
        let at = self.capability(slot, 0x11, 0).expect("MSI-X");
        let control = u16::from(enabled) << 15 | u16::from(masked) << 14;
        self.set_config(slot, at + 2, &control.to_le_bytes());
    }

    pub fn read<const N: usize>(&self, address: u32) -> [u8; N] {
        let mut bytes = [0; N];
        self.bus.read(address.into(), &mut bytes);
        bytes
    }

    pub fn read_word(&self, address: u32) -> u16 {
        u16::from_le_bytes(self.read(address))
    }

    pub fn read_double(&self, address: u32) -> u32 {
        u32::from_le_bytes(self.read(address))
    }

    pub fn write(&self, address: u32, data: &[u8]) {
        self.bus.write(address.into(), data);
    }

    /// Sets up a vector and lets it interrupt.
    pub fn set_vector(&self, bar: u32, vector: u32, data: u32) {
        let at = bar + TABLE + 16 * vector;
        self.write(at, &0xfee0_0000_u64.to_le_bytes());
        self.write(at + 8, &data.to_le_bytes());
        self.mask(bar, vector, false);
    }

    pub fn mask(&self, bar: u32, vector: u32, masked: bool) {
        self.write(bar + TABLE + 16 * vector + 12, &u32::from(masked).to_le_bytes());
    }

    /// Interrupts of a device with so many queues: vectors 0x20, 0x21 and so on.
    pub fn set_vectors(&self, slot: u8, bar: u32, queues: u32) {
        self.set_msix(slot, true, false);
        (0..=queues).for_each(|vector| self.set_vector(bar, vector, 0x20 + vector));
    }

    /// Agrees on all features that are offered, and answers them.
    pub fn negotiate(&self, bar: u32) -> u64 {
        self.write(bar + 20, &[0]);
        self.write(bar + 20, &[3]);
        let mut features = 0;
        for half in [0u32, 1] {
            self.write(bar, &half.to_le_bytes());
            let offered = self.read_double(bar + 4);
            self.write(bar + 8, &half.to_le_bytes());
            self.write(bar + 12, &offered.to_le_bytes());
            features |= u64::from(offered) << (32 * half);
        }
        self.write(bar + 20, &[0xb]);
        features
    }

    /// Sets up a queue of 16 entries with descriptors at `base`, available ring 0x100 and used ring 0x200 behind, and its vector.
    pub fn set_queue(&self, bar: u32, queue: u16, base: u64, vector: u16) {
        self.write(bar + 22, &queue.to_le_bytes());
        self.write(bar + 24, &16u16.to_le_bytes());
        self.write(bar + 26, &vector.to_le_bytes());
        self.write(bar + 32, &base.to_le_bytes());
        self.write(bar + 40, &(base + 0x100).to_le_bytes());
        self.write(bar + 48, &(base + 0x200).to_le_bytes());
        self.write(bar + 28, &1u16.to_le_bytes());
    }

    pub fn status(&self, bar: u32) -> u8 {
        self.read::<1>(bar + 20)[0]
    }

    pub fn set_status(&self, bar: u32, status: u8) {
        self.write(bar + 20, &[status]);
    }

    /// Reads and writes hot-plug registers.
    pub fn hotplug(&self, offset: u64) -> u32 {
        let mut bytes = [0xff; 4];
        self.hotplug.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub fn set_hotplug(&self, offset: u64, slots: u32) {
        self.hotplug.write(offset, &slots.to_le_bytes());
    }

    pub fn port_write(&self, offset: u64, data: &[u8]) {
        self.ports.write(offset, data);
    }

    pub fn port_read(&self, offset: u64, into: &mut [u8]) {
        self.ports.read(offset, into);
    }
}

/// Descriptors of the queues that [`Guest::set_queue`] sets up.
const ENTRIES: u16 = 16;
/// For the device to write.
pub const WRITE: u16 = 2;

/// A driver's side of such a queue.
pub struct DriverQueue<'g> {
    guest: &'g Guest,
    base: u64,
    bar: u32,
    index: u16,
    offered: u16,
}

impl<'g> DriverQueue<'g> {
    /// Sets the queue up, with its index + 1 as its vector.
    pub fn new(guest: &'g Guest, bar: u32, index: u16, base: u64) -> DriverQueue<'g> {
        guest.set_queue(bar, index, base, index + 1);
        DriverQueue { guest, base, bar, index, offered: 0 }
    }

    /// The same driver in another guest, which has the same memory.
    pub fn on(self, guest: &Guest) -> DriverQueue<'_> {
        let DriverQueue { base, bar, index, offered, .. } = self;
        DriverQueue { guest, base, bar, index, offered }
    }

    /// Offers a chain of at most as many buffers as the queue has descriptors: address, length, flags. No more than one at a time.
    pub fn offer(&mut self, buffers: &[(u64, u32, u16)]) {
        let memory = self.guest.memory.memory();
        for (slot, (address, length, flags)) in (0u16..).zip(buffers) {
            let next = slot + 1;
            let more = u16::from(usize::from(next) < buffers.len());
            let at = self.base + 16 * u64::from(slot);
            let fields = u64::from(*length) | u64::from(flags | more) << 32 | u64::from(next) << 48;
            memory.write_obj([address.to_le(), fields.to_le()], GuestAddress(at)).expect("a descriptor");
        }
        let entry = self.base + 0x104 + 2 * u64::from(self.offered % ENTRIES);
        memory.write_obj(0u16, GuestAddress(entry)).expect("an entry");
        self.offered = self.offered.wrapping_add(1);
        memory
            .store(self.offered.to_le(), GuestAddress(self.base + 0x102), Ordering::Release)
            .expect("the index");
        self.guest.write(self.bar + DOORBELLS + 4 * u32::from(self.index), &self.index.to_le_bytes());
    }

    /// Waits until the last chain is used, and answers how many bytes were written to it.
    pub fn used(&self) -> Option<u32> {
        let memory = self.guest.memory.memory();
        let deadline = Instant::now() + Duration::from_secs(20);
        let index =
            || memory.load::<u16>(GuestAddress(self.base + 0x202), Ordering::Acquire).expect("the index");
        while u16::from_le(index()) != self.offered {
            if Instant::now() > deadline || self.guest.status(self.bar) & 0x40 != 0 {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let entry = self.base + 0x204 + 8 * u64::from((self.offered - 1) % ENTRIES);
        memory.read_obj(GuestAddress(entry + 4)).ok()
    }
}

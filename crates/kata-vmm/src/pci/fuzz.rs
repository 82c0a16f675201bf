//! The fuzz target: bytes become what a guest and its owner do to a bus with an entropy device and a balloon, threads included.
//!
//! After each step, what the hypervisor was asked for is compared with what the guest can read.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a fuzz target ends at the first surprise"
)]

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::guest::{COMMON, DOORBELLS, Guest, MEMORY, WINDOW};
use super::virtio::BAR_SIZE;
use super::{SLOTS, Slot};
use crate::dma::Dma;
use crate::virtio::balloon::Balloon;
use crate::virtio::rng::Rng;

/// Devices by name, with the number of their vectors.
const DEVICES: [(&str, usize); 2] = [("rng", 2), ("balloon", 6)];

/// The step in which a driver starts a device.
const START: u8 = 5;

/// Takes `N` bytes off the front.
fn take<const N: usize>(data: &mut &[u8]) -> Option<[u8; N]> {
    let (front, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(*front)
}

/// Takes a value of 1, 2, 4 or 8 bytes.
fn value(data: &mut &[u8]) -> Option<Vec<u8>> {
    let [width] = take(data)?;
    let bytes: [u8; 8] = take(data)?;
    Some(bytes[..1 << (width % 4)].to_vec())
}

/// Plays `data` to a bus. Each step is one byte that says what, and its arguments.
pub fn run(mut data: &[u8]) {
    let guest = Guest::new();
    plug(&guest, 0);
    plug(&guest, 1);
    while let Some([step]) = take(&mut data) {
        if step_once(&guest, step, &mut data).is_none() {
            break;
        }
        check(&guest);
    }
    finish(&guest);
}

/// Plays several inputs at once, as vCPUs and the owner do, to devices that work.
pub fn run_together(inputs: &[Vec<u8>]) {
    let guest = Guest::new();
    plug(&guest, 0);
    plug(&guest, 1);
    start(&guest, 1, WINDOW.base + BAR_SIZE, 0);
    start(&guest, 2, WINDOW.base + 2 * BAR_SIZE, 2);
    std::thread::scope(|scope| {
        for mut data in inputs.iter().map(Vec::as_slice) {
            let guest = &guest;
            scope.spawn(move || {
                while let Some([step]) = take(&mut data) {
                    // A driver that shares the address register with others finds nothing it can rely on.
                    if step % 10 != START && step_once(guest, step, &mut data).is_none() {
                        break;
                    }
                }
            });
        }
    });
    finish(&guest);
}

fn plug(guest: &Guest, which: usize) {
    let (id, _) = DEVICES[which % DEVICES.len()];
    // It is refused while there is one.
    let _ = match id {
        "rng" => guest.root.plug(id, Box::new(Rng::new().expect("a device"))),
        _ => guest.root.plug(id, Box::new(Balloon::new(Dma::new(guest.memory.clone())).expect("a device"))),
    };
}

fn step_once(guest: &Guest, step: u8, data: &mut &[u8]) -> Option<()> {
    match step % 10 {
        0 => {
            let [slot, register] = take(data)?;
            guest.set_config(slot % 4, register, &value(data)?);
        }
        1 => {
            let [slot, register] = take(data)?;
            let _: [u8; 4] = guest.config(slot % 4, register);
        }
        // A register of a part of a BAR, mostly where one is.
        2 | 3 => {
            let [slot, part, offset] = take(data)?;
            let base = decoded(guest, 1 + slot % 3).unwrap_or(WINDOW.base);
            let address = base.saturating_add(u32::from(part % 7) * 0x1000 + u32::from(offset));
            guest.write(address, &value(data)?);
        }
        4 => {
            let [slot, part, offset] = take(data)?;
            let base = decoded(guest, 1 + slot % 3).unwrap_or(WINDOW.base);
            let _: [u8; 8] =
                guest.read(base.saturating_add(u32::from(part % 7) * 0x1000 + u32::from(offset)));
        }
        // A well-behaved driver starts a device.
        START => {
            let [slot, place, queue] = take(data)?;
            let (slot, bar) = (1 + slot % 3, WINDOW.base + u32::from(place % 70) * BAR_SIZE);
            if guest.config_double(slot, 0) != u32::MAX {
                start(guest, slot, bar, queue);
            }
        }
        // Any bytes anywhere in rings, buffers and beyond.
        6 => {
            let at: [u8; 2] = take(data)?;
            guest
                .memory
                .memory()
                .write_slice(&value(data)?, GuestAddress(u16::from_le_bytes(at).into()))
                .ok()?;
        }
        // A chain of one descriptor for a queue that `start` sets up.
        7 => {
            let [queue, flags, next] = take(data)?;
            let at = u64::from_le_bytes(take(data)?) % (2 * MEMORY as u64);
            let fields = u64::from(u32::from_le_bytes(take(data)?)) | u64::from(flags & 7) << 32;
            offer(guest, queue, [at, fields | u64::from(next % 16) << 48]);
        }
        8 => {
            let [what, which] = take(data)?;
            owner(guest, what, which);
        }
        _ => {
            let [offset] = take(data)?;
            let value = value(data)?;
            guest.port_write(u64::from(offset % 9), &value);
            guest.set_hotplug(u64::from(offset % 13), u32::from(value[0]));
        }
    }
    Some(())
}

fn start(guest: &Guest, slot: u8, bar: u32, queue: u8) {
    guest.map(slot, bar);
    guest.set_vectors(slot, bar, 3);
    guest.negotiate(bar);
    for queue in [0, u16::from(queue % 5)] {
        guest.set_queue(bar, queue, 0x1000 * (1 + u64::from(queue)), queue);
    }
    guest.set_status(bar, 0xf);
}

fn offer(guest: &Guest, queue: u8, descriptor: [u64; 2]) {
    let memory = guest.memory.memory();
    let queue = queue % 5;
    let base = 0x1000 * (1 + u64::from(queue));
    let _ = memory.write_obj(descriptor, GuestAddress(base));
    let index: u16 = memory.read_obj(GuestAddress(base + 0x102)).unwrap_or(0);
    let _ = memory.write_obj(0u16, GuestAddress(base + 0x104 + u64::from(index % 16) * 2));
    let _ = memory.write_obj(index.wrapping_add(1), GuestAddress(base + 0x102));
    for slot in 1..4 {
        if let Some(bar) = decoded(guest, slot) {
            guest.write(bar + DOORBELLS + 4 * u32::from(queue), &[queue, 0]);
        }
    }
}

fn owner(guest: &Guest, what: u8, which: u8) {
    match what % 5 {
        0 => plug(guest, which.into()),
        1 => drop(guest.root.unplug(DEVICES[usize::from(which) % DEVICES.len()].0)),
        2 => guest.root.pause(),
        3 => drop(guest.root.resume()),
        _ => guest.set_hotplug(8, u32::from(which)),
    }
}

/// Where a slot's BAR is to answer, if that is in the window.
fn decoded(guest: &Guest, slot: u8) -> Option<u32> {
    let there = guest.config_double(slot, 0) != u32::MAX;
    let [command] = guest.config(slot, 4);
    let base = guest.config_double(slot, 0x10);
    (there && command & 2 != 0 && WINDOW.holds(base, BAR_SIZE)).then_some(base)
}

/// The hypervisor has what the registers say, and nothing else.
fn check(guest: &Guest) {
    let bases: Vec<_> = (1..SLOTS).filter_map(|slot| decoded(guest, slot)).collect();
    let overlaps = |base: u32| bases.iter().filter(|other| other.abs_diff(base) < BAR_SIZE).count() > 1;
    let watched: Vec<u64> = guest.events.lock().doorbells.keys().copied().collect();
    let mut expected = Vec::new();
    for base in bases.iter().copied().filter(|base| !overlaps(*base)) {
        let within = |address: &&u64| (u64::from(base)..u64::from(base + BAR_SIZE)).contains(*address);
        let here: Vec<u64> = watched.iter().filter(within).copied().collect();
        let starts = guest.status(base + COMMON) & 0x4c == 0xc;
        let working = working_queues(guest, base);
        // A device that wants a reset may not have begun to work.
        if starts {
            assert_eq!(here, working, "doorbells of the BAR at {base:#x}");
        } else if guest.status(base) & 4 == 0 {
            assert!(here.is_empty(), "{here:x?}: doorbells of a device that does not work");
        }
        expected.extend(here);
    }
    let stray = watched.iter().filter(|address| !expected.contains(address));
    for address in stray {
        let of = |base: &u32| (u64::from(*base)..u64::from(*base + BAR_SIZE)).contains(address);
        assert!(bases.iter().any(of), "{address:#x} is watched, but no BAR is there");
    }
    let vectors = DEVICES.iter().filter(|(id, _)| guest.root.slot(id).is_some()).map(|(_, vectors)| vectors);
    assert_eq!(guest.events.lock().lines.len(), vectors.sum::<usize>(), "lines");
}

/// Doorbells of the queues that the driver has enabled.
fn working_queues(guest: &Guest, base: u32) -> Vec<u64> {
    let selected: [u8; 2] = guest.read(base + 22);
    let mut doorbells = Vec::new();
    for queue in 0..guest.read_word(base + 18) {
        guest.write(base + 22, &queue.to_le_bytes());
        if guest.read_word(base + 28) == 1 {
            doorbells.push(u64::from(base + DOORBELLS) + 4 * u64::from(queue));
        }
    }
    guest.write(base + 22, &selected);
    doorbells
}

/// All devices leave, and nothing remains.
fn finish(guest: &Guest) {
    let leaving: Vec<_> = DEVICES.iter().filter_map(|(id, _)| guest.root.unplug(id).ok()).collect();
    guest.set_hotplug(8, u32::MAX);
    for departure in leaving {
        assert!(departure.wait(std::time::Duration::ZERO), "a device did not leave");
    }
    let events = guest.events.lock();
    assert!(events.lines.is_empty() && events.routes.is_empty() && events.doorbells.is_empty());
    drop(events);
    for slot in (0..64).map(|slot| WINDOW.base + slot * BAR_SIZE) {
        assert_eq!(guest.read(slot), [0xff; 4], "something answers at {slot:#x}");
    }
    assert_eq!(guest.root.slot("rng"), None::<Slot>);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// Whatever a guest does, in whatever order.
        #[test]
        fn hypervisor_has_what_the_registers_say(data in prop::collection::vec(any::<u8>(), 0..1500)) {
            super::run(&data);
        }

        /// The same on devices that work.
        #[test]
        fn working_devices_come_to_an_end(data in prop::collection::vec(any::<u8>(), 0..700)) {
            let starts = [[5, 0, 1, 0], [5, 1, 2, 2], [5, 1, 3, 4]].concat();
            super::run(&[&starts[..], &data].concat());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        /// Nothing waits for itself, and all of it is gone at the end.
        #[test]
        fn vcpus_and_owner_at_once_come_to_an_end(
            inputs in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..1000), 3)
        ) {
            super::run_together(&inputs);
        }
    }

    /// Inputs that once mattered or show what the target can do; the fuzzer starts from the same files.
    #[test]
    fn corpus_leaves_the_bus_alive() {
        crate::virtio::driver::corpus("pci", super::run);
    }
}

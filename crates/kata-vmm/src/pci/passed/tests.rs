//! A guest's view of a device of the host.

use std::time::Duration;

use proptest::prelude::*;

use super::fake::{BAR, EXPRESS, Fake, MSI, MSIX, Observer, PENDING, POWER, SMALL, TABLE, look};
use super::*;
use crate::pci::guest::{Guest, HIGH, WINDOW};
use crate::pci::{Slot, virtio};

/// Behind the BARs that slots have by themselves.
const FIRST: u32 = WINDOW.base + 32 * virtio::BAR_SIZE;

fn plugged() -> (Guest, Observer) {
    let (device, seen) = Fake::drive();
    let guest = Guest::new();
    assert_eq!(guest.root.plug_passed("drive", device).unwrap(), Slot(1));
    (guest, seen)
}

/// Decoding and reaching memory, on or off.
fn command(guest: &Guest, bits: u16) {
    guest.set_config(1, 4, &bits.to_le_bytes());
}

fn refused(change: impl FnOnce(&mut Fake)) -> PciError {
    let (mut device, seen) = Fake::drive();
    change(&mut device);
    let guest = Guest::new();
    let error = guest.root.attach_passed("drive", device).unwrap_err();
    assert!(look(&seen).gone, "it is given back");
    assert_eq!((guest.root.slot("drive"), guest.events.lock().lines.len()), (None, 0));
    error
}

#[test]
fn guest_sees_what_it_may_of_the_device_and_nothing_else() {
    let (guest, seen) = plugged();
    assert_eq!(guest.config_double(1, 0), 0x5845_8086);
    assert_eq!(guest.config_double(1, 8), 0x0108_0202);
    assert_eq!(guest.config_double(1, 0x2c), 0x1100_1af4);
    assert_eq!(guest.config::<2>(1, 0x3c), [0, 0], "neither line nor pin");
    let ids = [1, 5, 0x10, 0x11, 9].map(|id| guest.capability(1, id, 0));
    assert_eq!(ids, [POWER, MSI, EXPRESS, MSIX, 0xe0].map(Some));
    assert_eq!(guest.capability(1, 3, 0), None, "VPD is hidden");
    assert_eq!(guest.config_double(1, 0xd4), 0, "and so is what was in it");
    assert_eq!(guest.config::<2>(1, 0xe2), [6, 1]);
    assert_eq!(guest.config::<2>(1, POWER + 2), [3, 0], "no wake-up, no states between");
    assert_eq!(guest.config::<2>(1, EXPRESS + 2), [0x92, 0], "integrated, version 2");
    assert_eq!(guest.config_double(1, EXPRESS + 4), 0x1000_0001);
    assert_eq!(guest.config_double(1, EXPRESS + 12), 0, "no link");
    let seen = look(&seen);
    assert_eq!((seen.resets, seen.command), (1, MEMORY));
}

#[test]
fn bars_tell_their_sizes_and_those_of_io_are_none() {
    let (guest, _seen) = plugged();
    assert_eq!(guest.config_double(1, 0x10), FIRST | 4);
    assert_eq!(guest.config_double(1, 0x18), FIRST + u32::try_from(BAR).unwrap());
    for (register, size) in [(0x10, BAR), (0x18, SMALL)] {
        guest.set_config(1, register, &[0xff; 4]);
        let size = u32::try_from(size).unwrap();
        assert_eq!(!(guest.config_double(1, register) & !0xf) + 1, size, "{register:#x}");
    }
    for nothing in [0x1c, 0x20, 0x24, 0x30] {
        guest.set_config(1, nothing, &[0xff; 4]);
        assert_eq!(guest.config_double(1, nothing), 0, "{nothing:#x}");
    }
}

#[test]
fn pages_are_mapped_where_the_guest_says_but_for_the_table_s() {
    let (guest, seen) = plugged();
    assert!(look(&seen).mapped.is_empty(), "before it decodes");
    let at = |base: u64| [(base, (0, 0, 0x2000)), (base + 0x3000, (0, 0x3000, 0x1000))];
    command(&guest, MEMORY);
    assert!(look(&seen).mapped.clone().into_iter().eq(at(FIRST.into())));
    let moved = HIGH.base + 0x8000;
    guest.set_config(1, 0x10, &moved.to_le_bytes()[..4]);
    assert!(look(&seen).mapped.is_empty(), "half of an address is nowhere");
    guest.set_config(1, 0x14, &moved.to_le_bytes()[4..]);
    assert!(look(&seen).mapped.clone().into_iter().eq(at(moved)));
    for outside in [0, u64::from(WINDOW.base) - BAR, HIGH.base + HIGH.size, u64::MAX] {
        guest.set_config(1, 0x10, &outside.to_le_bytes()[..4]);
        guest.set_config(1, 0x14, &outside.to_le_bytes()[4..]);
        assert!(look(&seen).mapped.is_empty(), "{outside:#x}");
    }
}

#[test]
fn what_is_not_mapped_is_read_and_written_an_access_at_a_time() {
    let (guest, seen) = plugged();
    command(&guest, MEMORY);
    let small = FIRST + u32::try_from(BAR).unwrap();
    guest.write(small + 8, &[1, 2, 3, 4]);
    guest.write(FIRST + 0x2ff8, &[5, 6]);
    assert_eq!(look(&seen).written, [((2, 8), vec![1, 2, 3, 4]), ((0, 0x2ff8), vec![5, 6])].into());
    assert_eq!(guest.read(small + 8), [1, 2, 3, 4]);
    // Half of an access in the table.
    let end = FIRST + 0x2000 + 16 * 5;
    guest.write(end - 4, &[0xee; 8]);
    assert_eq!(guest.read::<8>(end - 4), [0xff; 8]);
    assert_eq!(look(&seen).written.len(), 2);
}

#[test]
fn vectors_of_the_table_interrupt_the_guest_where_it_says() {
    let (guest, seen) = plugged();
    command(&guest, MEMORY | MASTER);
    let table = FIRST + u32::try_from(TABLE).unwrap();
    // As Linux does: switched on with all masked, then each vector.
    guest.set_msix(1, true, true);
    assert_eq!(
        look(&seen).connected.as_ref().map(|(kind, events)| (*kind, events.len())),
        Some((Messages::Msix, 5))
    );
    guest.write(table + 16, &0xfee0_1000_u64.to_le_bytes());
    guest.write(table + 24, &0x41_u32.to_le_bytes());
    guest.write(table + 28, &0_u32.to_le_bytes());
    guest.set_msix(1, true, false);
    guest.events.lock().messages();
    let raise = |vector: usize| look(&seen).connected.as_ref().unwrap().1[vector].write(1).unwrap();
    raise(1);
    raise(2);
    let msi = Msi { address: 0xfee0_1000, data: 0x41 };
    assert_eq!(guest.events.lock().messages(), [(msi, 1)], "the second one has no route");
    assert_eq!(guest.read::<4>(table + 24), [0x41, 0, 0, 0]);
    assert_eq!(guest.read::<8>(FIRST + u32::try_from(PENDING).unwrap()), [0; 8]);
    assert!(look(&seen).written.is_empty(), "the device heard of the table");
    guest.set_msix(1, false, false);
    assert!(look(&seen).connected.is_none());
}

#[test]
fn messages_of_msi_are_numbered_in_their_low_bits_and_masked_one_by_one() {
    let (guest, seen) = plugged();
    guest.set_config(1, MSI + 4, &0xfee0_2000_u32.to_le_bytes());
    guest.set_config(1, MSI + 12, &0x60_u16.to_le_bytes());
    guest.set_config(1, MSI + 16, &0b10_u32.to_le_bytes());
    // Two of four messages.
    guest.set_config(1, MSI + 2, &[1 | 1 << 4, 0]);
    assert_eq!(guest.config::<2>(1, MSI + 2), [0x95, 0x01]);
    let raise = || {
        let seen = look(&seen);
        let (kind, events) = seen.connected.as_ref().unwrap();
        assert_eq!((*kind, events.len()), (Messages::Msi, 2));
        events.iter().for_each(|event| event.write(1).unwrap());
    };
    guest.events.lock().messages();
    raise();
    let msi = |data| (Msi { address: 0xfee0_2000, data }, 1);
    assert_eq!(guest.events.lock().messages(), [msi(0x60)]);
    guest.set_config(1, MSI + 16, &0_u32.to_le_bytes());
    guest.events.lock().messages();
    raise();
    assert_eq!(guest.events.lock().messages(), [msi(0x60), msi(0x61)]);
    guest.set_config(1, MSI + 2, &[1, 0]);
    assert_eq!(look(&seen).connected.as_ref().unwrap().1.len(), 1, "now one");
}

#[test]
fn reset_that_the_guest_asks_for_is_carried_out_with_interrupts_off() {
    let (guest, seen) = plugged();
    command(&guest, MEMORY | MASTER);
    guest.set_msix(1, true, false);
    assert_eq!(look(&seen).command, MEMORY | MASTER);
    guest.set_config(1, EXPRESS + 8, &0x8000_u16.to_le_bytes());
    assert_eq!(guest.config::<2>(1, 4), [0, 0]);
    assert_eq!(guest.config::<2>(1, EXPRESS + 8), [0, 0], "it is over");
    let seen = look(&seen);
    assert_eq!((seen.resets, seen.command), (2, MEMORY));
    assert!(seen.connected.is_none() && seen.mapped.is_empty());
}

#[test]
fn device_sleeps_for_the_guest_alone() {
    let (guest, seen) = plugged();
    guest.set_config(1, POWER + 4, &[3, 0x80]);
    assert_eq!(guest.config::<2>(1, POWER + 4), [3 | 8, 0]);
    assert!(look(&seen).strays.is_empty());
}

#[test]
fn interrupts_that_the_host_refuses_leave_the_guest_running() {
    let (guest, seen) = plugged();
    look(&seen).refuses = true;
    guest.set_msix(1, true, false);
    assert!(look(&seen).connected.is_none());
    guest.set_msix(1, false, false);
    look(&seen).refuses = false;
    guest.set_msix(1, true, false);
    assert!(look(&seen).connected.is_some());
}

#[test]
fn device_is_given_back_whole_when_the_guest_lets_go() {
    let (guest, seen) = plugged();
    assert_eq!(guest.hotplug(0), 2, "it came");
    command(&guest, MEMORY | MASTER);
    guest.set_msix(1, true, false);
    let departure = guest.root.unplug("drive").unwrap();
    guest.set_hotplug(8, 2);
    assert!(departure.wait(Duration::ZERO));
    let seen = look(&seen);
    assert!(seen.gone && seen.mapped.is_empty() && seen.connected.is_none());
    assert_eq!((seen.command, seen.resets), (0, 2));
    assert_eq!(guest.read(FIRST), [0xff; 4]);
}

#[test]
fn machine_with_a_device_of_the_host_is_not_written_to_a_snapshot() {
    let guest = Guest::new();
    guest.root.attach_passed("drive", Fake::drive().0).unwrap();
    let refused = guest.root.save();
    assert!(matches!(refused, Err(PciError::Unsaved { what, .. }) if what.contains("device of the host")));
}

#[test]
fn bars_of_two_devices_do_not_overlap_and_the_last_place_is_refused() {
    let guest = Guest::new();
    let mut places = Vec::new();
    for number in 0..2 {
        let slot = guest.root.attach_passed(&format!("drive{number}"), Fake::drive().0).unwrap();
        for (register, size) in [(0x10, BAR), (0x18, SMALL)] {
            places.push((u64::from(guest.config_double(slot.0, register) & !0xf), size));
        }
    }
    places.sort_unstable();
    assert!(places.is_sorted_by(|(first, size), (next, _)| first + size <= *next), "{places:x?}");
    let large = |size: u64| move |fake: &mut Fake| fake.regions[0].size = size;
    // The low window has no room for that, the high one has.
    let (mut device, _seen) = Fake::drive();
    large(1 << 32)(&mut device);
    let slot = guest.root.attach_passed("large", device).unwrap();
    assert_eq!(guest.config_double(slot.0, 0x14), u32::try_from(HIGH.base >> 32).unwrap());
    assert!(matches!(refused(large(1 << 37)), PciError::NoRoom { size } if size == 1 << 37));
}

#[test]
fn device_that_is_no_use_or_broken_is_refused_by_what_is_wrong() {
    use PassedError as Error;
    let passed = |change: fn(&mut Fake)| match refused(change) {
        PciError::Passed(error) => error,
        other => panic!("{other}"),
    };
    assert!(matches!(passed(|fake| fake.space[0x0e] = 0x81), Error::Header { kind: 1 }));
    assert!(matches!(passed(|fake| fake.space[6] = 0), Error::NoMessages));
    assert!(matches!(passed(|fake| fake.regions = Default::default()), Error::NoMemory));
    assert!(matches!(passed(|fake| fake.regions[2].size = 0x300), Error::Bar { register: 2, size: 0x300 }));
    let capabilities: [fn(&mut Fake); 5] = [
        // More vectors than the host knows, a table behind the BAR, in one of I/O, over the pending bits.
        |fake| fake.space[usize::from(MSIX) + 2] = 5,
        |fake| fake.space[usize::from(MSIX) + 5] = 0x40,
        |fake| fake.space[usize::from(MSIX) + 4] = 3,
        |fake| fake.space[usize::from(MSIX) + 9] = 0x20,
        // A capability in another.
        |fake| {
            fake.space[usize::from(MSI) + 1] = MSI + 4;
            fake.space[usize::from(MSI) + 4..][..3].copy_from_slice(&[9, 0, 8]);
        },
    ];
    for (number, change) in capabilities.into_iter().enumerate() {
        assert!(matches!(passed(change), Error::Capability { .. }), "{number}");
    }
}

#[test]
fn list_of_capabilities_that_goes_round_ends() {
    let (mut device, _seen) = Fake::drive();
    device.space[0xe1] = POWER;
    let guest = Guest::new();
    guest.root.attach_passed("drive", device).unwrap();
    assert_eq!(guest.capability(1, 1, 1), None);
}

proptest! {
    /// Every mapped page is in a part that may be mapped, in the BAR, and has nothing hidden in it.
    #[test]
    fn mapped_pages_are_allowed_and_have_nothing_hidden(
        order in 4u32..40,
        parts in prop::collection::vec((0u64..1 << 40, 0u64..1 << 40), 0..4),
        hidden in prop::collection::vec((0u64..1 << 40, 1u64..1 << 16), 0..3),
    ) {
        let bar = Bar { register: 1, size: 1 << order, wide: true, prefetchable: false };
        let size = bar.size;
        let hidden: Vec<_> = hidden
            .into_iter()
            .map(|(offset, length)| Stretch { register: 1, offset: offset % size, length })
            .collect();
        let parts: Vec<_> = parts.into_iter().map(|(offset, bytes)| (offset % size, bytes)).collect();
        for (offset, bytes) in direct(&parts, bar, &hidden) {
            prop_assert!(bytes > 0 && offset.is_multiple_of(PAGE) && bytes.is_multiple_of(PAGE));
            prop_assert!(offset + bytes <= size);
            prop_assert!(parts.iter().any(|(first, length)| *first <= offset && offset + bytes <= first + length));
            let mapped = Stretch { register: 1, offset, length: bytes };
            prop_assert!(!hidden.iter().any(|hidden| hidden.overlaps(&mapped)));
        }
    }
}

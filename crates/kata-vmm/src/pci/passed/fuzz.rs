//! The fuzz target: bytes become a device of the host, honest or not, and what a guest does to it.
//!
//! After each step, what the device was told is compared with what the guest can read. Rules of the device's own are in `fake`.

#![allow(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a fuzz target ends at the first surprise"
)]

use std::time::Duration;

use super::fake::{self, Fake, Observer, look};
use super::{MASTER, MEMORY, Messages};
use crate::pci::guest::{Guest, HIGH, WINDOW};
use crate::virtio::driver::take;

const SLOT: u8 = 1;

/// Takes a value of 1, 2, 4 or 8 bytes.
fn value(data: &mut &[u8]) -> Option<Vec<u8>> {
    let [width] = take(data)?;
    let bytes: [u8; 8] = take(data)?;
    Some(bytes[..1 << (width % 4)].to_vec())
}

/// Plays `data`. The first byte says how many bytes of the device's space are other ones, the next ones which.
pub fn run(mut data: &[u8]) {
    let (mut device, seen) = Fake::drive();
    let [changes] = take(&mut data).unwrap_or_default();
    // Half of all inputs have an honest device.
    for _ in 0..changes.saturating_sub(128) {
        let Some([at, byte]) = take(&mut data) else { break };
        device.space[usize::from(at)] = byte;
    }
    let guest = Guest::new();
    if guest.root.plug_passed("drive", device).is_err() {
        assert!(
            look(&seen).gone && guest.events.lock().lines.is_empty(),
            "something of a refused device stays"
        );
        return;
    }
    while let Some([step]) = take(&mut data) {
        if step_once(&guest, step, &mut data).is_none() {
            break;
        }
        check(&guest, &seen);
    }
    finish(&guest, &seen);
}

fn step_once(guest: &Guest, step: u8, data: &mut &[u8]) -> Option<()> {
    match step % 8 {
        0 | 1 => {
            let [register] = take(data)?;
            guest.set_config(SLOT, register, &value(data)?);
        }
        // The registers that matter: command, BARs, message controls.
        2 => {
            let [which, low, high] = take(data)?;
            let register =
                [4, 0x10, 0x14, 0x18, fake::MSI + 2, fake::MSIX + 2, fake::EXPRESS + 8, fake::POWER + 4];
            guest.set_config(SLOT, register[usize::from(which % 8)], &[low, high]);
        }
        // A place in one of the windows.
        3 => {
            let [which, page, high] = take(data)?;
            let low = WINDOW.base + u32::from(page) * 0x1000;
            if high & 1 == 0 {
                guest.set_config(SLOT, 0x10 + 8 * (which & 1), &low.to_le_bytes());
                guest.set_config(SLOT, 0x14, &[0; 4]);
            } else {
                let base = HIGH.base + u64::from(page) * 0x4000;
                guest.set_config(SLOT, 0x10, &base.to_le_bytes()[..4]);
                guest.set_config(SLOT, 0x14, &base.to_le_bytes()[4..]);
            }
        }
        4 | 5 => {
            let at: [u8; 2] = take(data)?;
            guest.bus.write(base(guest, at[1])?.wrapping_add(u16::from_le_bytes(at).into()), &value(data)?);
        }
        6 => {
            let at: [u8; 2] = take(data)?;
            let mut bytes = value(data)?;
            guest.bus.read(base(guest, at[1])?.wrapping_add(u16::from_le_bytes(at).into()), &mut bytes);
        }
        _ => {
            let [register] = take(data)?;
            let _: [u8; 4] = guest.config(SLOT, register);
        }
    }
    Some(())
}

/// Where one of the two BARs is.
fn base(guest: &Guest, which: u8) -> Option<u64> {
    let low = guest.config_double(SLOT, 0x10 + 8 * (which >> 7)) & !0xf;
    let high = if which >> 7 == 0 { guest.config_double(SLOT, 0x14) } else { 0 };
    Some(u64::from(low) | u64::from(high) << 32)
}

fn check(guest: &Guest, seen: &Observer) {
    let seen = look(seen);
    let command = u16::from_le_bytes(guest.config(SLOT, 4));
    assert_eq!(seen.command, MEMORY | command & MASTER, "the device may reach memory when the guest says so");
    assert!(seen.strays.is_empty(), "the guest's writes reached {:x?}", seen.strays);
    for (address, (register, offset, bytes)) in &seen.mapped {
        assert!(command & MEMORY != 0, "{address:#x} is mapped with decoding off");
        let low = (u64::from(WINDOW.base), u64::from(WINDOW.base) + u64::from(WINDOW.size));
        let high = (HIGH.base, HIGH.base + HIGH.size);
        let within = |(first, end): (u64, u64)| first <= *address && address + bytes <= end;
        assert!(within(low) || within(high), "{address:#x} is in no window");
        assert_eq!(*register, 0, "the small BAR is not mapped");
        assert_eq!(base(guest, 0), Some(address - offset), "it is not where the register says");
        let hidden = fake::TABLE / 0x1000 * 0x1000;
        // An honest device has both in one page.
        if guest.capability(SLOT, 0x11, 0) == Some(fake::MSIX)
            && guest.config_double(SLOT, fake::MSIX + 4) == 0x2000
        {
            assert!(offset + bytes <= hidden || hidden < *offset, "the table's page is mapped");
        }
    }
    if let Some((messages, events)) = &seen.connected {
        let at = guest.capability(SLOT, if *messages == Messages::Msi { 5 } else { 0x11 }, 0).expect("it");
        let [low, high] = guest.config(SLOT, at + 2);
        let on = if *messages == Messages::Msi { low & 1 != 0 } else { high & 0x80 != 0 };
        assert!(on && !events.is_empty(), "it interrupts, and the guest has it off");
    }
}

/// The device leaves, and nothing remains.
fn finish(guest: &Guest, seen: &Observer) {
    let leaving = guest.root.unplug("drive").expect("it is there");
    guest.set_hotplug(8, u32::MAX);
    assert!(leaving.wait(Duration::ZERO), "the device did not leave");
    let seen = look(seen);
    assert!(seen.gone && seen.mapped.is_empty() && seen.connected.is_none());
    assert_eq!(seen.command, 0);
    let events = guest.events.lock();
    assert!(events.lines.is_empty() && events.routes.is_empty());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        /// Whatever a guest does to an honest device.
        #[test]
        fn device_hears_what_the_registers_say(data in prop::collection::vec(any::<u8>(), 0..1500)) {
            super::run(&[&[0], &data[..]].concat());
        }

        /// Whatever the device says it is.
        #[test]
        fn broken_device_is_refused_or_harmless(
            changes in 129u8.., data in prop::collection::vec(any::<u8>(), 0..800)
        ) {
            super::run(&[&[changes], &data[..]].concat());
        }
    }

    /// Inputs that once mattered or show what the target can do; the fuzzer starts from the same files.
    #[test]
    fn corpus_leaves_the_device_alive() {
        crate::virtio::driver::corpus("passed", super::run);
    }
}

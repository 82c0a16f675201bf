//! A guest's view of the bus and of virtio devices on it, with a device that writes down what is done to it.

mod snapshot;
mod transport;

use std::sync::mpsc;

use virtio_queue::QueueState;

use super::*;
use crate::pci::guest::{DEVICE, Guest, WINDOW};
use crate::virtio::{ActivateError, Activation};

/// What was done to a [`Probe`].
enum Did {
    Activate(Activation),
    Stop,
    Write(u64, Vec<u8>),
}

/// A device of three queues.
struct Probe {
    did: mpsc::Sender<Did>,
    fails: bool,
    stopped_at: u16,
}

fn probe() -> (Box<Probe>, mpsc::Receiver<Did>) {
    let (did, told) = mpsc::channel();
    (Box::new(Probe { did, fails: false, stopped_at: 7 }), told)
}

impl Device for Probe {
    fn kind(&self) -> u32 {
        4
    }
    fn queues(&self) -> &[u16] {
        &[64, 256, 16]
    }
    fn features(&self) -> u64 {
        1 << 29 | 1 << 3
    }
    fn read_configuration(&self, offset: u64, into: &mut [u8]) {
        crate::virtio::read_space(b"probe", offset, into);
    }
    fn write_configuration(&mut self, offset: u64, data: &[u8]) {
        let _ = self.did.send(Did::Write(offset, data.to_vec()));
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        if self.fails {
            return Err(ActivateError { action: "begin", source: std::io::Error::other("it is a test") });
        }
        let _ = self.did.send(Did::Activate(activation));
        Ok(())
    }
    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        let _ = self.did.send(Did::Stop);
        vec![(0, QueueState { next_avail: self.stopped_at, next_used: 3, ..QueueState::default() })]
    }
}

/// A slot's BAR before the guest moves it.
fn first_bar(slot: Slot) -> u32 {
    WINDOW.base + u32::from(slot.0) * BAR_SIZE
}

#[test]
fn guest_finds_bridge_and_devices_and_nothing_else() {
    let guest = Guest::new();
    let (device, _told) = probe();
    let slot = guest.root.attach("a", device).unwrap();
    assert_eq!(slot, Slot(1));
    assert_eq!(guest.config_double(0, 0), 0x0008_1b36);
    assert_eq!(guest.config_double(0, 8) >> 16, 0x0600);
    assert_eq!(guest.config_double(1, 0), 0x1044_1af4);
    assert_eq!(guest.config::<1>(1, 0x0e), [0], "one function");
    for slot in 2..SLOTS {
        assert_eq!(guest.config_double(slot, 0), u32::MAX, "slot {slot}");
    }
    // Another function, another bus, the mechanism off, the address register by bytes.
    for address in [1u32 << 31 | 1 << 11 | 1 << 8, 1 << 31 | 1 << 16 | 1 << 11, 1 << 11] {
        guest.port_write(0, &address.to_le_bytes());
        let mut data = [0xff; 4];
        guest.port_read(4, &mut data);
        assert_eq!(data, [0xff; 4], "{address:#x}");
    }
    guest.port_write(3, &[0x80]);
    let mut address = [0; 4];
    guest.port_read(0, &mut address);
    assert_eq!(u32::from_le_bytes(address), 1 << 11);
}

#[test]
fn names_slots_and_lines_run_out_with_typed_errors() {
    let guest = Guest::new();
    guest.root.attach("a", probe().0).unwrap();
    assert!(matches!(guest.root.attach("a", probe().0), Err(PciError::Exists { .. })));
    assert!(matches!(guest.root.unplug("b"), Err(PciError::NotFound { .. })));
    for slot in 2..SLOTS {
        assert_eq!(guest.root.attach(&format!("d{slot}"), probe().0).unwrap(), Slot(slot));
    }
    assert!(matches!(guest.root.attach("b", probe().0), Err(PciError::Full)));

    let guest = Guest::new();
    guest.events.lock().most = Some(3);
    assert!(matches!(guest.root.attach("a", probe().0), Err(PciError::Interrupts(_))));
    assert!(guest.events.lock().lines.is_empty(), "lines of the failed device stay");
    assert_eq!(guest.root.slot("a"), None);
}

#[test]
fn bar_answers_where_the_registers_say_but_only_in_the_window() {
    let guest = Guest::new();
    let slot = guest.root.attach("a", probe().0).unwrap();
    let first = first_bar(slot);
    let probe_at = |base: u32| guest.read::<4>(base + DEVICE) == *b"prob";
    assert!(!probe_at(first), "it answers before it is enabled");
    guest.set_config(1, 4, &6u16.to_le_bytes());
    assert!(probe_at(first));
    let moved = WINDOW.base + 0x18_0000;
    guest.set_config(1, 0x10, &moved.to_le_bytes());
    assert!(probe_at(moved) && !probe_at(first));
    for outside in [0, WINDOW.base - BAR_SIZE, WINDOW.base + WINDOW.size, u32::MAX] {
        guest.set_config(1, 0x10, &outside.to_le_bytes());
        assert!(!probe_at(outside & !(BAR_SIZE - 1)), "{outside:#x}");
        assert!(!probe_at(moved));
    }
}

#[test]
fn bar_on_top_of_another_answers_when_that_has_moved_away() {
    let guest = Guest::new();
    guest.root.attach("a", probe().0).unwrap();
    guest.root.attach("b", probe().0).unwrap();
    let (here, there) = (WINDOW.base, WINDOW.base + 0x10_0000);
    guest.map(1, here);
    guest.map(2, here);
    guest.write(here + 22, &1u16.to_le_bytes());
    guest.map(1, there);
    assert_eq!(guest.read_word(there + 22), 1, "the first device went along");
    assert_eq!(guest.read_word(here + 22), 0, "the second one answers now");
}

#[test]
fn unplugged_device_is_gone_when_the_guest_ejects_it() {
    let guest = Guest::new();
    let (device, told) = probe();
    let slot = guest.root.plug("a", device).unwrap();
    let bar = first_bar(slot);
    assert_eq!((guest.hotplug(0), guest.hotplug(4)), (1 << 1, 0));
    guest.set_hotplug(0, 1 << 1);
    assert_eq!(guest.hotplug(0), 0);
    guest.map(1, bar);
    guest.negotiate(bar);
    guest.set_queue(bar, 1, 0x1000, 0);
    guest.set_status(bar, 0xf);
    assert_eq!(guest.events.lock().doorbells.len(), 1);

    guest.set_hotplug(8, 1 << 1);
    assert_eq!(guest.root.slot("a"), Some(slot), "nobody asked for it to leave");
    let departure = guest.root.unplug("a").unwrap();
    let again = guest.root.unplug("a").unwrap();
    assert_eq!(guest.hotplug(4), 1 << 1);
    guest.set_hotplug(4, 1 << 1);
    assert!(!departure.wait(Duration::ZERO));
    while told.try_recv().is_ok() {}
    guest.set_hotplug(8, u32::MAX);
    assert!(departure.wait(Duration::ZERO) && again.wait(Duration::ZERO));
    assert!(matches!(told.try_recv(), Ok(Did::Stop)));
    assert!(told.try_iter().all(|did| matches!(did, Did::Stop)));
    assert!(matches!(told.try_recv(), Err(mpsc::TryRecvError::Disconnected)), "the device is still there");
    let events = guest.events.lock();
    assert!(events.lines.is_empty() && events.doorbells.is_empty());
    drop(events);
    assert_eq!(guest.config_double(1, 0), u32::MAX);
    assert_eq!(guest.read_double(bar), u32::MAX);
    assert_eq!(guest.root.plug("b", probe().0).unwrap(), slot);
}

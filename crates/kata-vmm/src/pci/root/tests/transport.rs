//! The virtio transport, from its driver's side.

use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::events::Msi;
use crate::pci::guest::{DOORBELLS, PENDING, STATUS, TABLE};

/// A device behind its BAR.
struct Fixture {
    guest: Guest,
    told: mpsc::Receiver<Did>,
    bar: u32,
}

impl Fixture {
    fn new() -> Fixture {
        Fixture::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Probe)) -> Fixture {
        let guest = Guest::new();
        let (mut device, told) = probe();
        change(&mut device);
        let slot = guest.root.attach("a", device).unwrap();
        let bar = first_bar(slot);
        guest.map(slot.0, bar);
        Fixture { guest, told, bar }
    }

    /// Vectors 0 to 3 interrupt, queues 0 and 1 have vectors 1 and 2, the configuration has 0.
    fn started() -> (Fixture, Activation) {
        let fixture = Fixture::new();
        fixture.start();
        let activation = fixture.activation();
        (fixture, activation)
    }

    fn start(&self) {
        let Fixture { guest, bar, .. } = self;
        guest.set_msix(1, true, true);
        (0..4).for_each(|vector| guest.set_vector(*bar, vector, 0x20 + vector));
        guest.set_msix(1, true, false);
        guest.negotiate(*bar);
        guest.write(bar + 16, &0u16.to_le_bytes());
        guest.set_queue(*bar, 0, 0x1000, 1);
        guest.set_queue(*bar, 1, 0x2000, 2);
        guest.set_status(*bar, 0xf);
    }

    fn activation(&self) -> Activation {
        self.told
            .try_iter()
            .find_map(|did| if let Did::Activate(a) = did { Some(a) } else { None })
            .expect("it works")
    }

    fn stops(&self) -> usize {
        self.told.try_iter().filter(|did| matches!(did, Did::Stop)).count()
    }

    fn messages(&self) -> Vec<(u32, u64)> {
        self.guest.events.lock().messages().into_iter().map(|(msi, count)| (msi.data, count)).collect()
    }
}

fn kicked(event: &EventFd) -> bool {
    event.read().is_ok()
}

#[test]
fn capabilities_lead_to_the_parts_of_the_bar() {
    let Fixture { guest, .. } = Fixture::new();
    let parts: Vec<_> = (0..5)
        .map(|nth| {
            let at = guest.capability(1, 9, nth).unwrap();
            let [length, kind] = guest.config(1, at + 2);
            assert_eq!(guest.config(1, at + 4), [0], "BAR 0");
            (kind, length, guest.config_double(1, at + 8), guest.config_double(1, at + 12))
        })
        .collect();
    assert_eq!(
        parts,
        [
            (1, 16, 0, 58),
            (2, 20, DOORBELLS, 0x1000),
            (3, 16, STATUS, 1),
            (4, 16, DEVICE, 0x1000),
            (5, 20, 0, 0)
        ]
    );
    let doorbells = guest.capability(1, 9, 1).unwrap();
    assert_eq!(guest.config_double(1, doorbells + 16), 4);
    let msix = guest.capability(1, 0x11, 0).unwrap();
    assert_eq!(guest.config::<2>(1, msix + 2), [3, 0], "four vectors");
    assert_eq!((guest.config_double(1, msix + 4), guest.config_double(1, msix + 8)), (TABLE, PENDING));
}

#[test]
fn driver_starts_the_device_with_what_it_set_up() {
    let (Fixture { guest, bar, told }, activation) = Fixture::started();
    assert_eq!(activation.features, 1 << 32 | 1 << 29 | 1 << 3);
    let queues: Vec<_> = activation.queues.iter().map(|q| (q.index, q.queue.state())).collect();
    let state = |max_size, base| QueueState {
        max_size,
        size: 16,
        ready: true,
        event_idx_enabled: true,
        desc_table: base,
        avail_ring: base + 0x100,
        used_ring: base + 0x200,
        ..QueueState::default()
    };
    assert_eq!(queues, [(0, state(64, 0x1000)), (1, state(256, 0x2000))]);
    assert_eq!(guest.status(bar), 0xf);
    // What is set up stays as it is.
    guest.set_queue(bar, 0, 0x5000, 1);
    guest.set_queue(bar, 2, 0x5000, 1);
    guest.write(bar + 12, &0u32.to_le_bytes());
    guest.write(bar + 22, &0u16.to_le_bytes());
    assert_eq!(guest.read_double(bar + 32), 0x1000);
    assert!(told.try_recv().is_err());

    assert_eq!(guest.read(bar + DEVICE), *b"probe\0\0\0");
    guest.write(bar + DEVICE + 2, &[9]);
    assert!(matches!(told.try_recv(), Ok(Did::Write(2, data)) if data == [9]));
}

#[test]
fn features_that_were_not_offered_or_lack_version_1_are_not_agreed_on() {
    let Fixture { guest, bar, told } = Fixture::new();
    for (low, high) in [(1u32 << 3, 0u32), (1 << 4, 1), (0, 3)] {
        guest.set_status(bar, 0);
        guest.set_status(bar, 3);
        for (half, features) in [(0u32, low), (1, high)] {
            guest.write(bar + 8, &half.to_le_bytes());
            guest.write(bar + 12, &features.to_le_bytes());
        }
        guest.set_status(bar, 0xb);
        assert_eq!(guest.status(bar), 3, "{low:#x} {high:#x}");
        // Nor does it start without.
        guest.set_queue(bar, 0, 0x1000, 1);
        guest.set_status(bar, 0xf);
        assert_eq!((guest.status(bar), guest.read_word(bar + 28)), (3, 0));
    }
    assert!(told.try_iter().all(|did| matches!(did, Did::Stop)));
}

#[test]
fn reset_stops_the_device_and_forgets_what_was_set_up() {
    let (fixture, _activation) = Fixture::started();
    let Fixture { guest, bar, .. } = &fixture;
    guest.set_status(*bar, 0);
    assert_eq!(fixture.stops(), 1);
    assert!(guest.events.lock().doorbells.is_empty());
    guest.write(bar + 22, &1u16.to_le_bytes());
    assert_eq!((guest.status(*bar), guest.read_word(bar + 28), guest.read_word(bar + 24)), (0, 0, 256));
    assert_eq!((guest.read_word(bar + 26), guest.read_word(bar + 16)), (0xffff, 0xffff));
    fixture.start();
    assert_eq!(fixture.activation().queues.len(), 2);
}

#[test]
fn queue_outside_the_memory_or_a_failing_device_wants_a_reset() {
    for fails in [false, true] {
        let fixture = Fixture::with(|device| device.fails = fails);
        let Fixture { guest, bar, .. } = &fixture;
        let base = if fails { 0x1000 } else { 0x7fff_0000 };
        guest.set_msix(1, true, false);
        guest.set_vector(*bar, 0, 0x20);
        guest.negotiate(*bar);
        guest.write(bar + 16, &0u16.to_le_bytes());
        guest.set_queue(*bar, 0, base, 1);
        guest.set_status(*bar, 0xf);
        assert_eq!(guest.status(*bar), 0x4f);
        assert_eq!(fixture.messages(), [(0x20, 1)]);
        assert!(guest.events.lock().doorbells.is_empty());
        guest.set_status(*bar, 0);
        assert_eq!(guest.status(*bar), 0);
    }
}

#[test]
fn doorbells_follow_the_bar() {
    let (Fixture { guest, bar, .. }, activation) = Fixture::started();
    let watched = || guest.events.lock().doorbells.keys().copied().collect::<Vec<_>>();
    let at = |base: u32| [0, 4].map(|queue| u64::from(base + DOORBELLS + queue));
    assert_eq!(watched(), at(bar));
    guest.events.lock().doorbells[&at(bar)[1]].write(1).unwrap();
    assert!(kicked(&activation.queues[1].kick) && !kicked(&activation.queues[0].kick));
    // Also without the hypervisor's help.
    guest.write(bar + DOORBELLS, &0u16.to_le_bytes());
    assert!(kicked(&activation.queues[0].kick));

    guest.unmap(1);
    assert!(watched().is_empty());
    let moved = WINDOW.base + 0x10_0000;
    guest.map(1, moved);
    assert_eq!(watched(), at(moved));
    guest.set_config(1, 0x10, &0u32.to_le_bytes());
    assert!(watched().is_empty());
}

#[test]
fn routes_of_all_vectors_are_one_change_and_late_ones_another() {
    let (fixture, activation) = Fixture::started();
    let events = &fixture.guest.events;
    assert_eq!(events.lock().changes, 0, "nothing was raised yet");
    activation.interrupt.used(0);
    let routes = events.lock().routes.len();
    assert_eq!((events.lock().changes, routes), (1, 4));
    activation.interrupt.used(1);
    activation.interrupt.configuration_changed();
    assert_eq!(fixture.messages(), [(0x20, 1), (0x21, 1), (0x22, 1)]);
    assert_eq!(events.lock().changes, 1);
    fixture.guest.set_vector(fixture.bar, 1, 0x55);
    assert_eq!(events.lock().changes, 1, "not lent, so not in a hurry");
    activation.interrupt.used(0);
    assert_eq!(fixture.messages(), [(0x55, 1)]);
    assert_eq!(events.lock().changes, 2);
    assert_eq!(events.lock().routes.values().next().unwrap().address, 0xfee0_0000);
}

#[test]
fn masked_interrupt_is_pending_until_the_mask_goes() {
    let (fixture, activation) = Fixture::started();
    let Fixture { guest, bar, .. } = &fixture;
    let pending = || guest.read::<1>(bar + PENDING)[0];
    guest.mask(*bar, 1, true);
    activation.interrupt.used(0);
    activation.interrupt.used(0);
    assert_eq!((pending(), fixture.messages().len()), (0b10, 0));
    guest.mask(*bar, 1, false);
    assert_eq!((pending(), fixture.messages()), (0, vec![(0x21, 1)]));

    guest.set_msix(1, true, true);
    activation.interrupt.used(1);
    assert_eq!((pending(), fixture.messages().len()), (0b100, 0));
    guest.set_msix(1, true, false);
    assert_eq!((pending(), fixture.messages()), (0, vec![(0x22, 1)]));
    guest.set_msix(1, false, false);
    activation.interrupt.used(1);
    assert_eq!((pending(), fixture.messages().len()), (0, 0));
    // Without messages the status register tells, once.
    assert_eq!((guest.read(bar + STATUS), guest.read(bar + STATUS)), ([1], [0]));
}

#[test]
fn lent_interrupt_loses_nothing_while_it_is_masked() {
    let (fixture, activation) = Fixture::started();
    let Fixture { guest, bar, .. } = &fixture;
    let lent = activation.interrupt.descriptor(0).expect("a vector");
    assert!(activation.interrupt.descriptor(2).is_none(), "that queue has no vector");
    lent.write(1).unwrap();
    assert_eq!(fixture.messages(), [(0x21, 1)]);
    guest.mask(*bar, 1, true);
    assert!(!guest.events.lock().routes.values().any(|msi| msi.data == 0x21), "it would come through");
    // The hypervisor swallows this one.
    lent.write(1).unwrap();
    assert!(fixture.messages().is_empty());
    guest.set_vector(*bar, 1, 0x66);
    assert_eq!(fixture.messages(), [(0x66, 1)]);
    let route = Msi { address: 0xfee0_0000, data: 0x66 };
    assert!(guest.events.lock().routes.values().any(|msi| *msi == route));
}

#[test]
fn configuration_changes_are_counted_and_told() {
    let (fixture, activation) = Fixture::started();
    let Fixture { guest, bar, .. } = &fixture;
    let [before] = guest.read(bar + 21);
    activation.interrupt.configuration_changed();
    assert_ne!(guest.read(bar + 21), [before]);
    assert_eq!(fixture.messages(), [(0x20, 1)]);
    assert_eq!(guest.read(bar + STATUS), [2]);
    activation.interrupt.needs_reset();
    activation.interrupt.needs_reset();
    assert_eq!((fixture.messages(), guest.status(*bar)), (vec![(0x20, 1)], 0x4f));
}

#[test]
fn vector_beyond_the_table_is_not_taken() {
    let Fixture { guest, bar, .. } = Fixture::new();
    guest.write(bar + 16, &3u16.to_le_bytes());
    assert_eq!(guest.read_word(bar + 16), 3);
    guest.write(bar + 16, &4u16.to_le_bytes());
    assert_eq!(guest.read_word(bar + 16), 0xffff);
    guest.write(bar + 22, &3u16.to_le_bytes());
    assert_eq!((guest.read_word(bar + 24), guest.read_word(bar + 18)), (0, 3), "there is no fourth queue");
}

#[test]
fn paused_device_goes_on_where_it_was() {
    let (fixture, _activation) = Fixture::started();
    let Fixture { guest, bar, told } = &fixture;
    guest.root.pause();
    guest.root.pause();
    assert_eq!(fixture.stops(), 1);
    guest.root.resume().unwrap();
    let activation = fixture.activation();
    let at: Vec<_> =
        activation.queues.iter().map(|q| (q.queue.state().next_avail, q.queue.state().next_used)).collect();
    assert_eq!(at, [(7, 3), (0, 0)]);
    assert_eq!((guest.status(*bar), guest.events.lock().doorbells.len()), (0xf, 2));
    guest.root.resume().unwrap();
    assert!(told.try_recv().is_err(), "it works already");
    guest.set_status(*bar, 0);
    guest.root.pause();
    guest.root.resume().unwrap();
    assert!(!told.try_iter().any(|did| matches!(did, Did::Activate(_))), "its driver has reset it");
}

#[test]
fn device_with_a_broken_queue_rests_after_a_pause_until_its_driver_resets_it() {
    let (fixture, activation) = Fixture::started();
    let Fixture { guest, bar, told } = &fixture;
    activation.interrupt.needs_reset();
    guest.root.pause();
    assert_eq!(fixture.stops(), 1);
    guest.root.resume().unwrap();
    assert!(told.try_recv().is_err(), "the broken queue would be served again");
    assert_eq!(guest.status(*bar), 0x4f);
    guest.set_status(*bar, 0);
    assert_eq!(guest.status(*bar), 0);
    guest.negotiate(*bar);
    guest.set_queue(*bar, 0, 0x1000, 0);
    guest.set_status(*bar, 0xf);
    assert!(told.try_iter().any(|did| matches!(did, Did::Activate(_))), "it works anew");
}

#[test]
fn bar_is_reached_through_the_configuration_space_too() {
    let Fixture { guest, bar, .. } = Fixture::new();
    guest.unmap(1);
    let at = guest.capability(1, 9, 4).unwrap();
    let reach = |offset: u32, length: u32| {
        guest.set_config(1, at + 8, &offset.to_le_bytes());
        guest.set_config(1, at + 12, &length.to_le_bytes());
    };
    reach(22, 2);
    guest.set_config(1, at + 16, &1u32.to_le_bytes());
    reach(24, 2);
    assert_eq!(guest.config::<2>(1, at + 16), 256u16.to_le_bytes());
    for (offset, length) in [(u32::MAX, 4), (0x7fff, 2), (2, 4), (0, 3), (0, 0), (0, u32::MAX)] {
        reach(offset, length);
        guest.set_config(1, at + 16, &u32::MAX.to_le_bytes());
        let _: [u8; 4] = guest.config(1, at + 16);
    }
    guest.map(1, bar);
    assert_eq!(guest.read_word(bar + 22), 1);
}

//! A bus is written down, and another goes on.

use std::sync::atomic::Ordering;

use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::pci::guest::{DriverQueue, MEMORY, TABLE, WRITE};
use crate::virtio::block::{Block, BlockConfig};
use crate::virtio::rng::Rng;

const BAR: u32 = WINDOW.base + 3 * BAR_SIZE;

/// The bus as a file has it.
fn saved(guest: &Guest) -> BusState {
    let text = serde_json::to_string(&guest.root.save().unwrap()).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// A guest with the same memory, whose device is ready to be restored.
fn copy(guest: &Guest, device: Box<dyn Device>) -> Guest {
    let copy = Guest::new();
    let mut bytes = vec![0; MEMORY];
    guest.memory.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    copy.memory.memory().write_slice(&bytes, GuestAddress(0)).unwrap();
    copy.root.attach("a", device).unwrap();
    copy
}

#[test]
fn device_goes_on_where_its_queues_were_and_both_sides_look_once_more() {
    let guest = Guest::new();
    let (device, _told) = probe();
    guest.root.attach("a", device).unwrap();
    guest.map(1, BAR);
    guest.set_vectors(1, BAR, 3);
    let features = guest.negotiate(BAR);
    guest.set_queue(BAR, 0, 0x1000, 1);
    guest.set_queue(BAR, 1, 0x2000, 2);
    guest.set_status(BAR, 0xf);
    guest.port_write(0, &0x8000_0910u32.to_le_bytes());
    guest.root.pause();
    let state = saved(&guest);

    let (device, told) = probe();
    let copy = copy(&guest, device);
    copy.root.restore(&state).unwrap();
    assert_eq!(copy.root.address.load(Ordering::SeqCst), 0x8000_0910);
    assert!(told.try_iter().next().is_none(), "it stands still until the machine goes on");
    assert_eq!(copy.status(BAR), 0xf);
    assert_eq!(copy.read_double(BAR + TABLE + 16 + 8), 0x21);
    assert_eq!(copy.events.lock().doorbells.len(), 2);
    assert_eq!(copy.events.lock().messages(), []);
    copy.root.resume().unwrap();
    let Some(Did::Activate(activation)) = told.try_iter().next() else { panic!("it works") };
    assert_eq!(activation.features, features);
    let at = |queue: &virtio_queue::Queue| (queue.desc_table(), queue.next_avail(), queue.next_used());
    let queues: Vec<_> = activation.queues.iter().map(|active| at(&active.queue)).collect();
    assert_eq!(queues, [(0x1000, 7, 3), (0x2000, 0, 0)]);
    assert!(activation.queues.iter().all(|active| active.kick.read().is_ok()), "each is kicked");
    let raised: Vec<_> = copy.events.lock().messages().into_iter().map(|(msi, _)| msi.data).collect();
    assert_eq!(raised, [0x21, 0x22]);
    copy.root.pause();
    copy.root.resume().unwrap();
    assert_eq!(copy.events.lock().messages(), [], "once is enough");
    // What the one was, the other is.
    copy.root.pause();
    guest.root.resume().unwrap();
    guest.root.pause();
    assert_eq!(saved(&guest), saved(&copy));
}

#[test]
fn queue_in_the_middle_of_its_ring_goes_on_at_the_right_place() {
    let guest = Guest::new();
    guest.root.attach("a", Box::new(Rng::new().unwrap())).unwrap();
    guest.map(1, BAR);
    guest.set_vectors(1, BAR, 1);
    guest.negotiate(BAR);
    let mut driver = DriverQueue::new(&guest, BAR, 0, 0x1000);
    guest.set_status(BAR, 0xf);
    for _ in 0..21 {
        driver.offer(&[(0x8000, 100, WRITE)]);
        assert_eq!(driver.used(), Some(100));
    }
    guest.root.pause();
    // What the driver offers meanwhile is not lost either.
    driver.offer(&[(0x8000, 32, WRITE)]);
    let copy = copy(&guest, Box::new(Rng::new().unwrap()));
    copy.root.restore(&saved(&guest)).unwrap();
    copy.root.resume().unwrap();
    let mut driver = driver.on(&copy);
    assert_eq!(driver.used(), Some(32));
    for _ in 0..40 {
        driver.offer(&[(0x8000, 50, WRITE)]);
        assert_eq!(driver.used(), Some(50));
    }
}

fn disk(sectors: u64) -> Box<Block> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(sectors * 512).unwrap();
    let (bytes_per_second, requests_per_second) = (None, None);
    let config = BlockConfig {
        id: "a".into(),
        file: file.into(),
        readonly: false,
        bytes_per_second,
        requests_per_second,
    };
    Box::new(Block::new(config).unwrap())
}

#[test]
fn bus_with_other_devices_is_told_apart() {
    let with = |devices: Vec<(&str, Box<dyn Device>)>| {
        let guest = Guest::new();
        for (id, device) in devices {
            guest.root.attach(id, device).unwrap();
        }
        guest
    };
    let rng = || -> Box<dyn Device> { Box::new(Rng::new().unwrap()) };
    let state = saved(&with(vec![("a", disk(64)), ("b", rng())]));
    with(vec![("a", disk(64)), ("b", rng())]).root.restore(&state).unwrap();
    for (devices, id, how) in [
        (vec![("a", disk(65) as Box<dyn Device>), ("b", rng())], "a", "of another size"),
        (vec![("a", disk(64)), ("c", rng())], "c", "not there"),
        (vec![("b", rng()), ("a", disk(64))], "b", "not there"),
        (vec![("a", rng()), ("b", rng())], "a", "another kind"),
        (vec![("a", disk(64))], "b", "no more"),
        (vec![("a", disk(64)), ("b", rng()), ("c", rng())], "c", "not there"),
        (vec![("a", disk(64)), ("b", probe().0)], "b", "otherwise"),
    ] {
        match with(devices).root.restore(&state) {
            Err(PciError::Other { id: found, what }) => {
                assert_eq!(found, id, "{what}");
                assert!(what.contains(how), "{what}");
            }
            other => panic!("{id} {how}: {other:?}"),
        }
    }
}

#[test]
fn device_that_came_or_is_to_go_keeps_the_bus_from_being_written() {
    let guest = Guest::new();
    guest.root.attach("a", probe().0).unwrap();
    guest.root.plug("b", probe().0).unwrap();
    let refused = guest.root.save().unwrap_err();
    assert!(matches!(&refused, PciError::Unsaved { id, .. } if id == "b"), "{refused}");
    let _departure = guest.root.unplug("b").unwrap();
    guest.set_hotplug(8, u32::MAX);
    guest.root.save().unwrap();
    let _departure = guest.root.unplug("a").unwrap();
    let refused = guest.root.save().unwrap_err();
    assert!(matches!(&refused, PciError::Unsaved { id, .. } if id == "a"), "{refused}");
}

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddressSpace};

use super::*;
use crate::memory::{Backing, allocate, growth};

const BLOCKS: u64 = 64;

/// A device, what it is asked through, and memory with its stretch, of [`BLOCKS`] blocks.
fn device() -> (Plugging, Growth, super::super::Memory, u64) {
    let memory = allocate(64 << 20, BLOCKS * BLOCK, Backing::default()).unwrap();
    let (base, size) = growth(&memory.memory()).unwrap();
    assert_eq!(size, BLOCKS * BLOCK);
    let (mem, growth) = Mem::new(base, size, false, Dma::new(memory.clone())).unwrap();
    let blocks = Blocks::new(base, size);
    (
        Plugging { shared: mem.shared, blocks, populate: false, dma: Dma::new(memory.clone()) },
        growth,
        memory,
        base,
    )
}

fn request(kind: u16, address: u64, count: u16) -> [u8; REQUEST] {
    let mut bytes = [0; REQUEST];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&count.to_le_bytes());
    bytes
}

#[test]
fn guest_gets_no_more_than_is_wanted_and_gives_back_what_it_unplugs() {
    let (mut device, growth, memory, base) = device();
    let memory = memory.memory();
    let mut ask =
        |kind, block: u64, count| device.answer(&memory, &request(kind, base + block * BLOCK, count));
    assert_eq!(ask(PLUG, 0, 1), (Told::Nack, 0));
    assert_eq!(growth.set(3 * BLOCK - 1), 3 * BLOCK);
    assert_eq!(ask(PLUG, 1, 3), (Told::Ack, 0));
    assert_eq!([ask(PLUG, 5, 1), ask(PLUG, 3, 1)], [(Told::Nack, 0), (Told::Error, 0)]);
    assert_eq!(
        [ask(STATE, 1, 3), ask(STATE, 4, 1), ask(STATE, 0, 2)],
        [(Told::Ack, ALL_PLUGGED), (Told::Ack, ALL_UNPLUGGED), (Told::Ack, MIXED)]
    );
    memory.write_obj(7u8, GuestAddress(base + 2 * BLOCK)).unwrap();
    assert_eq!([ask(UNPLUG, 0, 2), ask(UNPLUG, 2, 2)], [(Told::Error, 0), (Told::Ack, 0)]);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(base + 2 * BLOCK)).unwrap(), 0);
    assert_eq!([ask(UNPLUG_ALL, 0, 0), ask(STATE, 0, 64)], [(Told::Ack, 0), (Told::Ack, ALL_UNPLUGGED)]);
}

#[test]
fn configuration_tells_the_stretch_and_what_is_wanted() {
    let (mem, growth) = Mem::new(6 << 30, 9 * BLOCK + 1, false, Dma::new(device().2)).unwrap();
    assert_eq!(growth.set(u64::MAX), 9 * BLOCK);
    let mut space = [0; 64];
    mem.read_configuration(0, &mut space);
    let fields: Vec<u64> =
        space.chunks(8).map(|field| u64::from_le_bytes(field.try_into().unwrap())).collect();
    assert_eq!(fields, [BLOCK, 0, 6 << 30, 9 * BLOCK, 9 * BLOCK, 0, 9 * BLOCK, 0]);
}

proptest! {
    #[test]
    fn whatever_is_asked_the_count_is_that_of_the_blocks_and_within_what_is_wanted(
        wanted in 0..=BLOCKS,
        asked in proptest::collection::vec((0..5u16, -2..70i64, 0..70u16, prop::bool::weighted(0.1)), 0..40),
    ) {
        let (mut device, growth, memory, base) = device();
        let memory = memory.memory();
        growth.set(wanted * BLOCK);
        for (kind, block, count, odd) in asked {
            let address = base.wrapping_add_signed(block * i64::try_from(BLOCK).unwrap()) + u64::from(odd);
            device.answer(&memory, &request(kind, address, count));
            let bits: u32 = device.blocks.bits.iter().map(|word| word.count_ones()).sum();
            prop_assert_eq!(u64::from(bits), device.blocks.plugged);
            prop_assert!(device.blocks.plugged <= wanted);
        }
    }

    #[test]
    fn no_bytes_of_a_request_end_the_process(bytes in any::<[u8; REQUEST]>()) {
        let (mut device, growth, memory, _) = device();
        growth.set(u64::MAX);
        device.answer(&memory.memory(), &bytes);
    }
}

#[test]
fn memory_that_came_keeps_its_machine_from_a_snapshot() {
    let (mut device, growth) =
        Mem::new(0x1_8000_0000, 16 * BLOCK, false, Dma::new(self::device().2)).unwrap();
    assert_eq!(device.unsaved(), None);
    growth.0.plugged.store(BLOCK, Ordering::SeqCst);
    assert!(device.unsaved().is_some());
}

#[test]
fn devices_of_the_host_reach_what_is_plugged_and_a_host_that_pins_no_more_makes_the_driver_wait() {
    let (mut plugging, growth, memory, base) = device();
    growth.set(u64::MAX);
    let table = std::sync::Arc::new(crate::dma::tests::Table { most: Some(4), ..Default::default() });
    let _reach = plugging.dma.enter(table.clone()).unwrap();
    let memory = memory.memory();
    let mut ask = |kind, block: u64, count| {
        let (told, _) = plugging.answer(&memory, &request(kind, base + block * BLOCK, count));
        let blocks: Vec<u64> =
            table.mapped.lock().unwrap().range(base..).map(|(at, _)| (at - base) / BLOCK).collect();
        (told, blocks)
    };
    assert_eq!(ask(PLUG, 0, 2), (Told::Ack, vec![0, 1]));
    assert_eq!(ask(PLUG, 4, 2), (Told::Busy, vec![0, 1]));
    assert_eq!(ask(PLUG, 4, 1), (Told::Ack, vec![0, 1, 4]));
    assert_eq!(ask(UNPLUG, 1, 1), (Told::Ack, vec![0, 4]));
    assert_eq!(ask(UNPLUG_ALL, 0, 0), (Told::Ack, vec![]));
}

#[test]
fn guest_that_comes_no_nearer_or_goes_to_and_fro_is_not_waited_for() {
    let (_device, growth, ..) = device();
    let wanted = growth.set(8 * BLOCK);
    let plug = |blocks: u64| growth.0.plugged.store(blocks * BLOCK, Ordering::SeqCst);
    let took = |step: u64, whole: u64, given_up: &dyn Fn() -> bool| {
        let begin = Instant::now();
        growth.settle(wanted, Duration::from_millis(step), Duration::from_secs(whole), given_up);
        begin.elapsed()
    };
    let goes_on = || false;
    assert!(took(50, 600, &goes_on) < Duration::from_secs(60), "it does nothing");
    assert!(took(600_000, 600, &|| true) < Duration::from_secs(60), "nobody wants it any more");
    // To and fro, which is no nearer after the first time; each look is one move.
    let moves = AtomicU64::new(0);
    let to_and_fro = || {
        plug(moves.fetch_add(1, Ordering::Relaxed) % 2);
        false
    };
    assert!(took(300, 600, &to_and_fro) < Duration::from_secs(60));
    // Nearer by and by, until all is there.
    plug(0);
    let nearer = || {
        plug(growth.plugged() / BLOCK + 1);
        false
    };
    took(600_000, 600, &nearer);
    assert_eq!(growth.plugged(), wanted);
    // Slowly nearer, but not for longer than the whole.
    plug(0);
    let begin = Instant::now();
    let slowly = || {
        plug(begin.elapsed().as_secs() * 2);
        false
    };
    // It would have all after four seconds.
    took(600_000, 2, &slowly);
    assert!(growth.plugged() < wanted, "waited for longer than for the whole");
}

//! The device behind its BAR, with its thread.

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::*;
use crate::pci::guest::{DriverQueue, Guest, MEMORY, WINDOW, WRITE};

const BAR: u32 = WINDOW.base;
const BUFFER: u64 = 0x1_0000;

fn guest() -> Guest {
    let guest = Guest::new();
    guest.root.attach("rng", Box::new(Rng::new().unwrap())).unwrap();
    guest.map(1, BAR);
    guest.set_vectors(1, BAR, 1);
    guest.negotiate(BAR);
    guest
}

#[test]
fn buffers_are_filled_with_entropy_and_the_driver_is_told() {
    let guest = guest();
    let mut queue = DriverQueue::new(&guest, BAR, 0, 0x1000);
    guest.set_status(BAR, 0xf);
    queue.offer(&[(BUFFER, 300, WRITE), (BUFFER + 300, 212, WRITE)]);
    assert_eq!(queue.used(), Some(512));
    let mut bytes = [0u8; 520];
    guest.memory.memory().read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
    let (filled, beyond) = bytes.split_at(512);
    assert!(filled.chunks(32).all(|chunk| chunk.iter().any(|byte| *byte != 0)));
    assert_eq!(beyond, [0; 8]);
    // Stopping waits for the thread, which interrupts after it has given the buffers back.
    guest.root.pause();
    assert_eq!(guest.events.lock().messages().first().map(|(msi, _)| msi.data), Some(0x21));
    guest.root.resume().unwrap();
    queue.offer(&[(BUFFER, 16, WRITE)]);
    assert_eq!(queue.used(), Some(16));
}

#[test]
fn large_and_readable_and_empty_buffers_are_bounded() {
    let guest = guest();
    let mut queue = DriverQueue::new(&guest, BAR, 0, 0x1000);
    guest.set_status(BAR, 0xf);
    queue.offer(&[(BUFFER, 0x8_0000, WRITE)]);
    assert_eq!(queue.used(), Some(0x1_0000));
    queue.offer(&[(BUFFER, 64, 0)]);
    assert_eq!(queue.used(), Some(0), "it may not write there");
}

#[test]
fn buffer_outside_the_memory_wants_a_reset_and_then_it_works_again() {
    let guest = guest();
    let mut queue = DriverQueue::new(&guest, BAR, 0, 0x1000);
    guest.set_status(BAR, 0xf);
    queue.offer(&[(MEMORY as u64 - 16, 32, WRITE)]);
    assert_eq!(queue.used(), None);
    assert_eq!(guest.status(BAR), 0x4f);
    guest.negotiate(BAR);
    guest.memory.memory().write_slice(&[0; 0x300], GuestAddress(0x1000)).unwrap();
    let mut queue = DriverQueue::new(&guest, BAR, 0, 0x1000);
    guest.set_status(BAR, 0xf);
    queue.offer(&[(MEMORY as u64 - 32, 32, WRITE)]);
    assert_eq!(queue.used(), Some(32));
}

//! A driver's side of one virtqueue, for tests of devices on plain memory.

#![allow(
    clippy::expect_used,
    clippy::cast_possible_truncation,
    dead_code,
    reason = "only tests and fuzz targets have it, each a part of it"
)]

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::{AvailRing, DescriptorTable, UsedRing};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Entries of each queue.
pub const SIZE: u16 = 16;
/// Descriptor flag: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor flag: for the device to write.
pub const WRITE: u16 = 2;
/// Descriptor flag: it is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// The driver's side of one queue. Not `MockSplitQueue`, whose used ring begins inside its available ring.
pub struct Ring<'m> {
    base: u64,
    descriptors: DescriptorTable<'m, GuestMemoryMmap>,
    available: AvailRing<'m, GuestMemoryMmap>,
    used: UsedRing<'m, GuestMemoryMmap>,
}

impl<'m> Ring<'m> {
    /// A queue without chains, in 0x3000 bytes from `base` on.
    pub fn new(mem: &'m GuestMemoryMmap, base: u64) -> Ring<'m> {
        let ring = Ring {
            base,
            descriptors: DescriptorTable::new(mem, GuestAddress(base), SIZE),
            available: AvailRing::new(mem, GuestAddress(base + 0x1000), SIZE),
            used: UsedRing::new(mem, GuestAddress(base + 0x2000), SIZE),
        };
        ring.available.idx().store(0);
        ring
    }

    /// Guest addresses of the descriptor table, the available ring and the used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.base, self.base + 0x1000, self.base + 0x2000]
    }

    /// The descriptor table.
    pub fn desc_table(&self) -> &DescriptorTable<'m, GuestMemoryMmap> {
        &self.descriptors
    }

    /// The available ring.
    pub fn avail(&self) -> &AvailRing<'m, GuestMemoryMmap> {
        &self.available
    }

    /// The used ring.
    pub fn used(&self) -> &UsedRing<'m, GuestMemoryMmap> {
        &self.used
    }

    /// The device's side.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(SIZE).expect("a power of two");
        let [descriptors, available, used] = self.addresses().map(GuestAddress);
        queue.try_set_desc_table_address(descriptors).expect("aligned");
        queue.try_set_avail_ring_address(available).expect("aligned");
        queue.try_set_used_ring_address(used).expect("aligned");
        queue.set_ready(true);
        queue
    }

    /// Puts a chain of (address, length, flags) at descriptor `first` and makes it available.
    pub fn offer(&self, first: u16, chain: &[(u64, u32, u16)]) {
        for (i, (at, len, flags)) in (first..).zip(chain) {
            let last = usize::from(i - first) + 1 == chain.len();
            let flags = flags | if last { 0 } else { NEXT };
            let descriptor = RawDescriptor::from(Descriptor::new(*at, *len, flags, i + 1));
            self.descriptors.store(i, descriptor).expect("in the table");
        }
        let index = self.available.idx().load();
        self.available.ring().ref_at((index % SIZE).into()).expect("in the ring").store(first);
        self.available.idx().store(index.wrapping_add(1));
    }

    /// Chains that the device gave back so far, modulo 2¹⁶.
    pub fn given_back(&self) -> u16 {
        self.used.idx().load()
    }

    /// First descriptor and length of the chain that was given back as the `nth`.
    pub fn back(&self, nth: u16) -> (u32, u32) {
        let used = self.used.ring().ref_at((nth % SIZE).into()).expect("in the ring").load();
        (used.id(), used.len())
    }
}

/// Scribbles over memory as a fuzzer says: a byte anywhere in the first 64 KiB.
pub fn scribble(mem: &GuestMemoryMmap, at: u16, value: u8) {
    mem.write_obj(value, GuestAddress(at.into())).expect("in memory");
}

/// Takes `N` bytes off the front of a fuzzer's data.
pub fn take<const N: usize>(data: &mut &[u8]) -> Option<[u8; N]> {
    let (front, rest) = data.split_first_chunk()?;
    *data = rest;
    Some(*front)
}

/// Any descriptor, as a fuzzer says: also one of a table of descriptors, which then lies in 0x1000 bytes from 0x1_0000 on.
pub fn any_descriptor(data: &mut &[u8]) -> Option<(u64, u32, u16)> {
    let [flags] = take(data)?;
    let at = u64::from_le_bytes(take(data)?);
    let len = u32::from_le_bytes(take(data)?);
    let flags = u16::from(flags) & (NEXT | WRITE | INDIRECT);
    let at = if flags & INDIRECT != 0 { 0x1_0000 + at % 0x1000 } else { at };
    Some((at, len, flags))
}

/// Plays the inputs that the fuzzer of this name starts from; there are some.
#[cfg(test)]
pub fn corpus(name: &str, run: impl Fn(&[u8])) {
    let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut inputs = 0;
    for entry in std::fs::read_dir(corpus).expect("the corpus") {
        run(&std::fs::read(entry.expect("an entry").path()).expect("an input"));
        inputs += 1;
    }
    assert!(inputs > 0);
}

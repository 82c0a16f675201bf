//! A guest's driver for tests: it owns both queues of a socket device and the buffers in them.
//!
//! Memory: the receive queue at 0, the transmit queue at 0x4000, receive buffers from 0x1_0000 and transmit buffers
//! from 0x10_0000 on; [`MEMORY`] bytes in all.

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

use super::{HEADER_LEN, Header};

/// Bytes of guest memory that the driver needs.
pub const MEMORY: usize = 0x20_0000;
/// Entries of each queue.
pub const SIZE: u16 = 16;
/// Descriptor flag: the chain goes on.
pub const NEXT: u16 = 1;
/// Descriptor flag: for the device to write.
pub const WRITE: u16 = 2;

const RECEIVE_RING: u64 = 0;
const TRANSMIT_RING: u64 = 0x4000;
const RECEIVE_BUFFERS: u64 = 0x1_0000;
const TRANSMIT_BUFFERS: u64 = 0x10_0000;
/// Room of one receive buffer, as Linux has it: a header and a page.
const RECEIVE_ROOM: u32 = HEADER_LEN as u32 + 4096;
/// Distance of transmit buffers: a header and the largest payload.
const TRANSMIT_ROOM: u64 = 0x1_1000;

/// The driver's side of one queue. Not `MockSplitQueue`, whose used ring begins inside its available ring.
pub struct Ring<'m> {
    base: u64,
    descriptors: DescriptorTable<'m, GuestMemoryMmap>,
    available: AvailRing<'m, GuestMemoryMmap>,
    used: UsedRing<'m, GuestMemoryMmap>,
}

impl<'m> Ring<'m> {
    fn new(mem: &'m GuestMemoryMmap, base: u64) -> Ring<'m> {
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
    fn queue(&self) -> Queue {
        let mut queue = Queue::new(SIZE).expect("a power of two");
        let [descriptors, available, used] = self.addresses().map(GuestAddress);
        queue.try_set_desc_table_address(descriptors).expect("aligned");
        queue.try_set_avail_ring_address(available).expect("aligned");
        queue.try_set_used_ring_address(used).expect("aligned");
        queue.set_ready(true);
        queue
    }
}

/// A driver of both queues in `mem`.
pub struct Driver<'m> {
    mem: &'m GuestMemoryMmap,
    receive: Ring<'m>,
    transmit: Ring<'m>,
    received: u16,
    sent: u16,
}

impl<'m> Driver<'m> {
    /// A driver that has offered no buffers yet.
    pub fn new(mem: &'m GuestMemoryMmap) -> Driver<'m> {
        Driver {
            mem,
            receive: Ring::new(mem, RECEIVE_RING),
            transmit: Ring::new(mem, TRANSMIT_RING),
            received: 0,
            sent: 0,
        }
    }

    /// The receive and the transmit queue.
    pub fn rings(&self) -> [&Ring<'m>; 2] {
        [&self.receive, &self.transmit]
    }

    /// The device's view of both queues.
    pub fn queues(&self) -> [Queue; 2] {
        self.rings().map(|ring| ring.queue())
    }

    /// Offers all receive buffers.
    pub fn offer_all(&mut self) {
        for slot in 0..SIZE {
            self.offer(slot);
        }
    }

    fn offer(&mut self, slot: u16) {
        let at = RECEIVE_BUFFERS + u64::from(slot) * 0x2000;
        store(&self.receive, slot, &[(at, RECEIVE_ROOM, WRITE)]);
    }

    /// Sends a packet in two descriptors; its header's length becomes the payload's.
    pub fn send(&mut self, header: Header, payload: &[u8]) {
        let header = Header { len: payload.len().try_into().expect("a payload's length"), ..header };
        self.send_raw(header, payload);
    }

    /// Sends a header and what follows it, whatever the header says.
    pub fn send_raw(&mut self, header: Header, rest: &[u8]) {
        let at = TRANSMIT_BUFFERS + u64::from(self.sent % (SIZE / 2)) * TRANSMIT_ROOM;
        let len = u32::try_from(rest.len()).expect("a payload's length");
        self.mem.write_slice(&header.to_bytes(), GuestAddress(at)).expect("in memory");
        self.mem.write_slice(rest, GuestAddress(at + 0x100)).expect("in memory");
        self.send_chain(&[(at, HEADER_LEN as u32, 0), (at + 0x100, len, 0)]);
    }

    /// Sends one chain of at most two (address, length, flags).
    pub fn send_chain(&mut self, chain: &[(u64, u32, u16)]) {
        store(&self.transmit, self.sent % (SIZE / 2) * 2, chain);
        self.sent = self.sent.wrapping_add(1);
    }

    /// Packets that the device took so far, modulo 2¹⁶.
    pub fn taken(&self) -> u16 {
        self.transmit.used().idx().load()
    }

    /// Takes what the device has sent, and offers its buffers again.
    pub fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        while self.received != self.receive.used().idx().load() {
            let used =
                self.receive.used().ring().ref_at((self.received % SIZE).into()).expect("in the ring").load();
            let slot = u16::try_from(used.id()).expect("a descriptor's index");
            let at = RECEIVE_BUFFERS + u64::from(slot) * 0x2000;
            let mut header = [0; HEADER_LEN];
            self.mem.read_slice(&mut header, GuestAddress(at)).expect("in memory");
            let header = Header::from_bytes(&header);
            let mut payload = vec![0; usize::try_from(used.len()).expect("a length") - HEADER_LEN];
            self.mem.read_slice(&mut payload, GuestAddress(at + HEADER_LEN as u64)).expect("in memory");
            packets.push((header, payload));
            self.received = self.received.wrapping_add(1);
            self.offer(slot);
        }
        packets
    }
}

/// Puts a chain at descriptor `first` and makes it available.
fn store(ring: &Ring<'_>, first: u16, chain: &[(u64, u32, u16)]) {
    for (i, (at, len, flags)) in (first..).zip(chain) {
        let last = usize::from(i - first) + 1 == chain.len();
        let flags = flags | if last { 0 } else { NEXT };
        let descriptor = RawDescriptor::from(Descriptor::new(*at, *len, flags, i + 1));
        ring.desc_table().store(i, descriptor).expect("in the table");
    }
    let index = ring.avail().idx().load();
    ring.avail().ring().ref_at((index % SIZE).into()).expect("in the ring").store(first);
    ring.avail().idx().store(index.wrapping_add(1));
}

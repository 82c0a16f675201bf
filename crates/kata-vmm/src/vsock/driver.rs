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

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{HEADER_LEN, Header};
use crate::virtio::driver::Ring;
pub use crate::virtio::driver::{SIZE, WRITE};

/// Bytes of guest memory that the driver needs.
pub const MEMORY: usize = 0x20_0000;

const RECEIVE_RING: u64 = 0;
const TRANSMIT_RING: u64 = 0x4000;
const RECEIVE_BUFFERS: u64 = 0x1_0000;
const TRANSMIT_BUFFERS: u64 = 0x10_0000;
/// Room of one receive buffer, as Linux has it: a header and a page.
const RECEIVE_ROOM: u32 = HEADER_LEN as u32 + 4096;
/// Distance of transmit buffers: a header and the largest payload.
const TRANSMIT_ROOM: u64 = 0x1_1000;

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
        self.receive.offer(slot, &[(at, RECEIVE_ROOM, WRITE)]);
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
        self.transmit.offer(self.sent % (SIZE / 2) * 2, chain);
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

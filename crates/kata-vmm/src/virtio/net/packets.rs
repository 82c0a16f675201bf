//! Packets between a pair of queues and a queue of the tap.

use std::io;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryMmap, Permissions};

use super::HEADER_LEN;
use super::tap::Tap;
use crate::virtio::Counter;
use crate::virtio::buffers::{Buffers, ChainError};
use crate::virtio::ring::{QueueFault, give_back, give_back_together, next_or_wait, wants_interrupt};
use crate::virtio::worker::Served;

/// Bytes of the longest packet: a header, an Ethernet header with tags, and what IP's length can say.
pub const MAX_PACKET: usize = 66 * 1024;
/// Bytes of packets in one direction after which a turn ends.
const TURN: usize = 1024 * 1024;
/// Where the number of chains is in the header.
const CHAINS_AT: usize = 10;

/// A queue of the tap, for both queues of a pair.
pub struct Pair {
    /// The queue of the tap.
    pub tap: Tap,
    /// Something may be read from the tap.
    pub readable: bool,
    /// The interface is gone.
    pub lost: bool,
    /// Several chains may hold one packet.
    merge: bool,
    /// A packet on its way to the guest, with `waiting` bytes.
    packet: Vec<u8>,
    waiting: usize,
    counters: Arc<Counters>,
}

/// Packets by what became of them.
#[derive(Debug, Default)]
pub struct Counters {
    pub received: Counter,
    pub received_bytes: Counter,
    pub sent: Counter,
    pub sent_bytes: Counter,
    /// The kernel refused them, or they were too long for the driver's buffers.
    pub dropped: Counter,
}

impl Pair {
    /// Works with a queue of a tap.
    pub fn new(tap: Tap, counters: Arc<Counters>) -> Pair {
        let packet = vec![0; MAX_PACKET];
        Pair { tap, readable: true, lost: false, merge: false, packet, waiting: 0, counters }
    }

    /// A driver starts that agreed on these features.
    pub fn begin(&mut self, features: u64) {
        self.readable = true;
        self.merge = features >> VIRTIO_NET_F_MRG_RXBUF & 1 == 1;
    }

    /// Puts packets from the tap into the driver's buffers.
    pub fn receive(&mut self, mem: &GuestMemoryMmap, queue: &mut Queue) -> Result<Served, QueueFault> {
        let (mut used, mut moved, mut more) = (0, 0, true);
        while moved < TURN && used < queue.size() {
            if self.waiting == 0 && !self.read() {
                more = false;
                break;
            }
            let Some(chains) = self.deliver(mem, queue)? else {
                // The driver says when it adds buffers.
                more = false;
                break;
            };
            moved += std::mem::take(&mut self.waiting);
            used += chains;
        }
        Ok(Served { interrupt: wants_interrupt(mem, queue, used)?, more })
    }

    /// Takes the next packet off the tap, if there is one.
    fn read(&mut self) -> bool {
        if !self.readable {
            return false;
        }
        match self.tap.receive(&mut self.packet) {
            Ok(len) if len > HEADER_LEN => self.waiting = len,
            Ok(_) => self.lose(&io::ErrorKind::UnexpectedEof.into()),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(e) => self.lose(&e),
        }
        self.waiting > 0
    }

    /// The tap gives nothing any more.
    fn lose(&mut self, error: &io::Error) {
        self.readable = false;
        if !std::mem::replace(&mut self.lost, true) {
            tracing::error!(tap = self.tap.name(), %error, "a tap cannot be read; the guest sees its link go down");
        }
    }

    /// Puts the waiting packet into chains and answers how many: none where it is dropped because they are too short. `None` if
    /// there are too few, and the packet waits on.
    fn deliver(&mut self, mem: &GuestMemoryMmap, queue: &mut Queue) -> Result<Option<u16>, QueueFault> {
        let begin = queue.next_avail();
        let (mut chains, mut room) = (Vec::with_capacity(1), 0);
        while room < self.waiting {
            let Some(chain) = next_or_wait(mem, queue)? else {
                queue.set_next_avail(begin);
                return Ok(None);
            };
            let head = chain.head_index();
            let buffers = Buffers::<'_, ()>::from_chain(mem, chain, Permissions::Write)?;
            if buffers.is_empty() || (chains.is_empty() && buffers.len() < HEADER_LEN) {
                return Err(ChainError::TooShort(buffers.len()).into());
            }
            room += buffers.len();
            chains.push((head, buffers));
            if !self.merge && room < self.waiting {
                queue.set_next_avail(begin);
                self.drop_packet("the driver's buffers are too short for it");
                return Ok(Some(0));
            }
        }
        let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        let mut rest = self.packet.get_mut(..self.waiting).unwrap_or_default();
        if let Some(field) = rest.get_mut(CHAINS_AT..CHAINS_AT + 2) {
            field.copy_from_slice(&count.to_le_bytes());
        }
        let mut used = Vec::with_capacity(chains.len());
        for (head, mut buffers) in chains {
            let put = buffers.put(rest);
            rest = rest.get_mut(put..).unwrap_or_default();
            used.push((head, put));
        }
        give_back_together(mem, queue, &used)?;
        self.counters.received.add(1);
        self.counters.received_bytes.add(self.waiting - HEADER_LEN);
        Ok(Some(count))
    }

    /// Takes packets from the driver to the tap.
    pub fn transmit(&mut self, mem: &GuestMemoryMmap, queue: &mut Queue) -> Result<Served, QueueFault> {
        let (mut used, mut moved, mut more) = (0, 0, true);
        while moved < TURN && used < queue.size() {
            let Some(chain) = next_or_wait(mem, queue)? else {
                more = false;
                break;
            };
            let head = chain.head_index();
            let packet = Buffers::<'_, ()>::from_chain(mem, chain, Permissions::Read)?;
            if packet.len() < HEADER_LEN {
                return Err(ChainError::TooShort(packet.len()).into());
            }
            if packet.len() > MAX_PACKET {
                self.drop_packet("it is longer than any");
            } else if let Err(error) = self.tap.send(&packet) {
                // The header says what the kernel does not believe, the interface is down, or its queue is full.
                self.drop_packet(&error.to_string());
            } else {
                self.counters.sent.add(1);
                self.counters.sent_bytes.add(packet.len() - HEADER_LEN);
            }
            // What is dropped costs as much as what is sent, or a guest could keep this thread in one turn.
            moved += packet.len().clamp(1024, MAX_PACKET);
            give_back(mem, queue, head, 0)?;
            used += 1;
        }
        Ok(Served { interrupt: wants_interrupt(mem, queue, used)?, more })
    }

    fn drop_packet(&mut self, reason: &str) {
        self.counters.dropped.add(1);
        tracing::debug!(tap = self.tap.name(), reason, "a packet was dropped");
    }
}

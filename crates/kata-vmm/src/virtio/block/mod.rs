//! The block device (virtio 1.2, section 5.2): a file as the guest's disk.
//!
//! ```text
//!   queue 0 ──▶ Request (header, data, status) ──▶ limits ──▶ Disk: preadv, pwritev, fdatasync, fallocate
//!                                                    │ no tokens: the chain goes back to the queue, a timer wakes
//! ```
//!
//! Requests are carried out one after another in the device's thread, straight between the file and guest memory. What the host
//! cannot do (no space, a broken disk) is the guest's error; what the driver may not do ends its queue.

mod disk;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod request;
#[cfg(test)]
mod tests;

use std::num::NonZeroU64;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::EventFlags;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_ID_BYTES,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::GuestMemoryMmap;

pub use disk::{DiskError, SECTOR};

use self::disk::Disk;
use self::request::{Counters, Engine};
use super::limit::Limits;
use super::ring::{QueueFault, give_back, next_or_wait, wants_interrupt};
use super::worker::{Rings, Served, Then, Wake, Work, Worker};
use super::{ActivateError, Activation, Device, read_space};

/// Entries of the queue.
const QUEUE_SIZE: u16 = 256;
/// Pieces of one request's data: the queue's entries without header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Bytes of one piece.
const SEGMENT_SIZE: u32 = 128 * 1024;
/// Bytes of data in one request.
const MAX_DATA: usize = SEGMENTS as usize * SEGMENT_SIZE as usize;
/// Bytes of the disk after which a turn ends; one request may exceed it.
const TURN: usize = 4 * 1024 * 1024;
/// Ranges in one discard.
const MAX_DISCARDS: u32 = 16;
/// Sectors of one range that is discarded: 2 GiB.
const MAX_DISCARD: u32 = 4 * 1024 * 1024;
/// Sectors of the one range of zeroes in a request, which the host may have to write: 32 MiB, as much as data in one.
const MAX_ZEROES: u32 = 64 * 1024;

/// What a disk is made of.
#[derive(Debug)]
pub struct BlockConfig {
    /// Serial number, of which the guest sees the first 20 bytes.
    pub id: String,
    /// Regular file or block device, raw, opened `O_RDONLY` or `O_RDWR` as `readonly` says, and with or without `O_DIRECT`.
    pub file: OwnedFd,
    /// The guest may not write.
    pub readonly: bool,
    /// Most bytes a second, both directions together.
    pub bytes_per_second: Option<u64>,
    /// Most requests a second.
    pub requests_per_second: Option<u64>,
}

/// The device.
pub struct Block {
    features: u64,
    space: Vec<u8>,
    counters: Arc<Counters>,
    worker: Worker<Server>,
}

impl Block {
    /// A device without a driver yet.
    pub fn new(config: BlockConfig) -> Result<Block, DiskError> {
        let server = Server::new(config)?;
        let (features, space, counters) = (server.features(), server.space(), server.engine.counters());
        let worker = Worker::new(server).map_err(|e| DiskError::Host {
            action: "served by a thread",
            source: std::io::Error::other(e),
        })?;
        Ok(Block { features, space, counters, worker })
    }
}

impl Device for Block {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queues(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_configuration(&self, offset: u64, into: &mut [u8]) {
        read_space(&self.space, offset, into);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.start(activation)
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let Counters { reads, read_bytes, writes, written_bytes, flushes, failures } = &*self.counters;
        vec![
            ("reads", reads.get()),
            ("read-bytes", read_bytes.get()),
            ("writes", writes.get()),
            ("written-bytes", written_bytes.get()),
            ("flushes", flushes.get()),
            ("failures", failures.get()),
        ]
    }

    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        self.worker.stop()
    }
}

/// What the device's thread has.
struct Server {
    engine: Engine,
    limits: Option<Limits>,
}

impl Server {
    fn new(config: BlockConfig) -> Result<Server, DiskError> {
        let rate = |value: Option<u64>, what| {
            value.map(|value| NonZeroU64::new(value).ok_or(DiskError::NoRate(what))).transpose()
        };
        let bytes = rate(config.bytes_per_second, "bytes")?;
        let requests = rate(config.requests_per_second, "requests")?;
        let limits = Limits::new(bytes, requests)
            .map_err(|source| DiskError::Host { action: "limited in its rate", source })?;
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        id.iter_mut().zip(config.id.bytes()).for_each(|(to, from)| *to = from);
        Ok(Server { engine: Engine::new(Disk::new(config.file, config.readonly)?, id), limits })
    }

    fn features(&self) -> u64 {
        let kind = if self.engine.disk().is_readonly() {
            1 << VIRTIO_BLK_F_RO
        } else {
            1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
        };
        kind | 1 << VIRTIO_BLK_F_SIZE_MAX
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    /// The configuration space (virtio 1.2, section 5.2.4, `struct virtio_blk_config`), up to what is offered.
    fn space(&self) -> Vec<u8> {
        let disk = self.engine.disk();
        let mut space = Vec::with_capacity(60);
        let block = disk.block();
        space.extend(disk.sectors().to_le_bytes());
        space.extend(SEGMENT_SIZE.to_le_bytes());
        space.extend(SEGMENTS.to_le_bytes());
        space.extend([0; 4]); // geometry
        space.extend(block.to_le_bytes());
        space.extend([0; 8]); // topology
        space.extend([0; 4]); // write back, queues
        if !disk.is_readonly() {
            let sectors = block / 512;
            for field in [MAX_DISCARD, MAX_DISCARDS, sectors, MAX_ZEROES, 1] {
                space.extend(field.to_le_bytes());
            }
            space.extend([1, 0, 0, 0]); // writes of zeroes may give room back
        }
        space
    }

    /// Carries requests out, for a turn.
    fn serve(
        &mut self,
        mem: &GuestMemoryMmap,
        queue: &mut Queue,
        write_through: bool,
    ) -> Result<Served, QueueFault> {
        let (mut used, mut moved, mut more) = (0, 0, true);
        for _ in 0..queue.size() {
            if moved >= TURN {
                break;
            }
            let Some(chain) = next_or_wait(mem, queue)? else {
                more = false;
                break;
            };
            if self.limits.as_mut().is_some_and(|limits| !limits.admit()) {
                queue.go_to_previous_position();
                more = false;
                break;
            }
            let head = chain.head_index();
            let done = self.engine.carry_out(mem, chain, write_through)?;
            if let Some(limits) = &mut self.limits {
                limits.spend(done.data);
            }
            moved = moved.saturating_add(done.extent);
            give_back(mem, queue, head, done.written)?;
            used += 1;
        }
        Ok(Served { interrupt: wants_interrupt(mem, queue, used)?, more })
    }
}

impl Work for Server {
    const NAME: &'static str = "virtio-block";

    fn sources(&self) -> Vec<(BorrowedFd<'_>, EventFlags)> {
        self.limits.iter().map(|limits| (limits.as_fd(), EventFlags::IN | EventFlags::ET)).collect()
    }

    fn turn(&mut self, _wake: Wake, rings: &mut Rings) -> Then {
        // A driver that cannot flush takes a finished write for a safe one (virtio 1.2, section 5.2.6.2).
        let write_through = rings.features() >> VIRTIO_BLK_F_FLUSH & 1 == 0;
        rings.serve(0, |mem, queue| self.serve(mem, queue, write_through))
    }

    fn quiesce(&mut self, _rings: &mut Rings) {
        self.engine.finish();
    }
}

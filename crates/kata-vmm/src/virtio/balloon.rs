//! The memory balloon (virtio 1.2, section 5.5), for its reports alone: memory that the guest does not use goes back to the host.
//!
//! ```text
//!   driver ─ reporting queue ────────▶ memory that is free ─▶ discarded: no page of the host's
//!          ─ inflate, deflate queues   are there and take nothing: no page is ever wanted
//! ```
//!
//! What was discarded is zero when the guest uses it again, or, in a machine that started from a snapshot, what the snapshot has there.
//! While a device of the host reaches the memory by itself nothing is discarded: see [`crate::dma`].
//!
//! Drivers differ about the number of the reporting queue: with statistics and hinting not offered, some count it as the third and
//! others as the fifth. Here it is whichever of these the driver sets up.

use std::sync::Arc;

use rustix::mm::{Advice, madvise};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueState};
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::buffers::ChainError;
use super::drain::drain;
use super::ring::QueueFault;
use super::worker::{Rings, Then, Wake, Work, Worker};
use super::{ActivateError, Activation, Counter, Device, read_space};
use crate::dma::Dma;

/// Bytes of a page.
const PAGE: u64 = 4096;

const REPORTING: u64 = 1 << 5;

const FIRST_REPORTING: usize = 2;
const QUEUES: [u16; 5] = [128, 128, 64, 64, 64];
/// Pages wanted, and pages in the balloon.
const SPACE: [u8; 8] = [0; 8];

/// Most descriptors of one chain that are looked at; Linux sends 32. What a driver sends beyond stays where it is.
const MOST_DESCRIPTORS: usize = 1024;

/// The device.
pub struct Balloon {
    worker: Worker<Discard>,
    discarded: Arc<Counter>,
    kept: Arc<Counter>,
}

impl Balloon {
    /// Makes one. What devices of the host reach by themselves stays.
    pub fn new(dma: Dma) -> Result<Balloon, ActivateError> {
        let (discarded, kept): (Arc<Counter>, Arc<Counter>) = Default::default();
        let (all, not) = (Arc::clone(&discarded), Arc::clone(&kept));
        let worker = Worker::new(Discard { dma, discarded: all, kept: not, failed: false })?;
        Ok(Balloon { worker, discarded, kept })
    }
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queues(&self) -> &[u16] {
        &QUEUES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC | REPORTING
    }

    fn read_configuration(&self, offset: u64, into: &mut [u8]) {
        read_space(&SPACE, offset, into);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.start(activation)
    }

    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        self.worker.stop()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![("discarded-bytes", self.discarded.get()), ("kept-bytes", self.kept.get())]
    }
}

struct Discard {
    dma: Dma,
    discarded: Arc<Counter>,
    /// Free, and not given back.
    kept: Arc<Counter>,
    /// The host refused before, which was said.
    failed: bool,
}

impl Work for Discard {
    const NAME: &'static str = "virtio-balloon";

    fn turn(&mut self, _wake: Wake, rings: &mut Rings) -> Then {
        (0..QUEUES.len()).fold(Then::Wait, |then, index| {
            let served = rings.serve(index, |memory, queue| {
                drain(memory, queue, |chain| match index {
                    FIRST_REPORTING.. => self.report(memory, chain),
                    _ => Ok(0),
                })
            });
            then.or(served)
        })
    }
}

impl Discard {
    /// A chain whose buffers are the free memory.
    fn report(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<usize, QueueFault> {
        for descriptor in chain.writable().take(MOST_DESCRIPTORS) {
            self.discard(memory, descriptor.addr().0, descriptor.len().into())?;
        }
        Ok(0)
    }

    /// Gives the whole pages of this memory back to the host.
    fn discard(&mut self, memory: &GuestMemoryMmap, address: u64, length: u64) -> Result<(), ChainError> {
        let mut done = 0;
        while done < length {
            let outside = || ChainError::Memory(GuestMemoryError::InvalidGuestAddress(GuestAddress(address)));
            let at = address.checked_add(done).ok_or_else(outside)?;
            let region = memory.find_region(GuestAddress(at)).ok_or_else(outside)?;
            let offset = region.to_region_addr(GuestAddress(at)).ok_or_else(outside)?.0;
            let part = (length - done).min(region.len() - offset);
            let first = offset.next_multiple_of(PAGE);
            let end = (offset + part) / PAGE * PAGE;
            if let Some(bytes) = end.checked_sub(first).filter(|bytes| *bytes > 0) {
                self.discard_pages(region, first, bytes);
            }
            done += part;
        }
        Ok(())
    }

    fn discard_pages(&mut self, region: &GuestRegionMmap, offset: u64, bytes: u64) {
        let shared = region.flags() & libc::MAP_SHARED != 0;
        // Of a file, the memory goes only with the file's blocks.
        let advice = if shared { Advice::LinuxRemove } else { Advice::LinuxDontNeed };
        let (Ok(pointer), Ok(length)) =
            (region.get_host_address(MemoryRegionAddress(offset)), usize::try_from(bytes))
        else {
            return;
        };
        let mut done = Ok(());
        let discarded = self.dma.discard(|| {
            // SAFETY: the range is whole pages inside one mapping, which lives as long as `region`. It is guest memory: nothing
            // holds references into it, and all who read it expect that the guest changes it at any time.
            done = unsafe { madvise(pointer.cast(), length, advice) };
        });
        match done {
            Ok(()) if !discarded => self.kept.add(length),
            Ok(()) => self.discarded.add(length),
            Err(e) if !self.failed => {
                self.failed = true;
                tracing::warn!(error = %e, offset, bytes, "the host does not take guest memory back; it stays in use");
            }
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests;

//! The memory balloon (virtio 1.2, section 5.5): memory that the guest does not use goes back to the host.
//!
//! ```text
//!   Target::set ─▶ configuration: pages wanted ─▶ driver ─ inflate queue ─▶ pages it will not use ─┐
//!                                                        ─ deflate queue ─▶ uses them again        ├─▶ discarded
//!                                                        ─ reporting ─────▶ pages that are free ───┘
//! ```
//!
//! Discarded memory is taken from the host's file (a hole is punched into it), and is zero when the guest uses it again. The driver
//! takes pages out of the balloon by itself before its guest runs out of memory (`DEFLATE_ON_OOM`).
//!
//! Drivers differ about the number of the reporting queue: with statistics and hinting not offered, some count it as the third and
//! others as the fifth. Here it is whichever of these the driver sets up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::mm::{Advice, madvise};
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueState};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MemoryRegionAddress,
};

use super::buffers::ChainError;
use super::drain::drain;
use super::ring::QueueFault;
use super::worker::{Rings, Then, Wake, Work, Worker};
use super::{ActivateError, Activation, Device, Driver, read_space};

/// Bytes of a page, as the balloon counts.
pub const PAGE: u64 = 4096;

const DEFLATE_ON_OOM: u64 = 1 << 2;
const REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const FIRST_REPORTING: usize = 2;
const QUEUES: [u16; 5] = [128, 128, 64, 64, 64];

/// Where the driver writes how many pages the balloon has.
const ACTUAL: u64 = 4;
/// Most pages of one chain that are looked at, and most descriptors; Linux sends 256 and 32. What a driver sends beyond stays where
/// it is.
const MOST_PAGES: usize = 4096;
const MOST_DESCRIPTORS: usize = 1024;

/// The device.
pub struct Balloon {
    worker: Worker<Discard>,
    shared: Arc<Shared>,
    reporting: bool,
}

/// What a balloon is to have and has.
#[derive(Clone)]
pub struct Target(Arc<Shared>);

#[derive(Default)]
struct Shared {
    wanted: AtomicU32,
    actual: AtomicU32,
    discarded: AtomicU64,
    driver: Driver,
}

impl Target {
    /// Asks the guest to keep so many pages of [`PAGE`] bytes in the balloon. It does what it can, in its own time.
    pub fn set(&self, pages: u32) {
        self.0.wanted.store(pages, Ordering::SeqCst);
        self.0.driver.configuration_changed();
    }

    /// How many pages the guest says are in it.
    pub fn actual(&self) -> u32 {
        self.0.actual.load(Ordering::SeqCst)
    }

    /// Bytes that were given back to the host so far; the guest may have taken them again.
    pub fn discarded(&self) -> u64 {
        self.0.discarded.load(Ordering::Relaxed)
    }
}

impl Balloon {
    /// Makes an empty one; with `reporting` the guest also tells which memory is free without being asked.
    pub fn new(reporting: bool) -> Result<(Balloon, Target), ActivateError> {
        let shared = Arc::new(Shared::default());
        let worker = Worker::new(Discard { shared: Arc::clone(&shared), failed: false })?;
        let target = Target(Arc::clone(&shared));
        Ok((Balloon { worker, shared, reporting }, target))
    }
}

impl Device for Balloon {
    fn kind(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queues(&self) -> &[u16] {
        if self.reporting { &QUEUES } else { &QUEUES[..FIRST_REPORTING] }
    }

    fn features(&self) -> u64 {
        let reporting = if self.reporting { REPORTING } else { 0 };
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC | DEFLATE_ON_OOM | reporting
    }

    fn read_configuration(&self, offset: u64, into: &mut [u8]) {
        let [wanted, actual] = [&self.shared.wanted, &self.shared.actual]
            .map(|pages| pages.load(Ordering::SeqCst).to_le_bytes());
        read_space(&[wanted, actual].concat(), offset, into);
    }

    fn write_configuration(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.shared.actual.store(u32::from_le_bytes(actual), Ordering::SeqCst);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let driver = Arc::clone(&activation.interrupt);
        self.worker.start(activation)?;
        self.shared.driver.set(Some(driver));
        Ok(())
    }

    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        self.shared.driver.set(None);
        self.worker.stop()
    }
}

struct Discard {
    shared: Arc<Shared>,
    /// The host refused before, which was said.
    failed: bool,
}

impl Work for Discard {
    const NAME: &'static str = "virtio-balloon";

    fn turn(&mut self, _wake: Wake, rings: &mut Rings) -> Then {
        let inflated =
            rings.serve(INFLATE, |memory, queue| drain(memory, queue, |chain| self.inflate(memory, chain)));
        // Pages that are used again come back by themselves when they are touched.
        let deflated = rings.serve(DEFLATE, |memory, queue| drain(memory, queue, |_| Ok(0)));
        let reported = (FIRST_REPORTING..QUEUES.len()).fold(Then::Wait, |then, index| {
            let then_this =
                rings.serve(index, |memory, queue| drain(memory, queue, |chain| self.report(memory, chain)));
            then.or(then_this)
        });
        inflated.or(deflated).or(reported)
    }
}

impl Discard {
    /// A chain of page numbers, 32 bits each.
    fn inflate(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<usize, QueueFault> {
        let mut pages = Vec::new();
        for descriptor in chain.readable().take(MOST_DESCRIPTORS) {
            let room = MOST_PAGES - pages.len();
            let count = usize::try_from(descriptor.len() / 4).unwrap_or(0).min(room);
            let mut numbers = vec![0; count * 4];
            memory.read_slice(&mut numbers, descriptor.addr()).map_err(ChainError::Memory)?;
            let (numbers, _) = numbers.as_chunks();
            pages.extend(numbers.iter().map(|number| u64::from(u32::from_le_bytes(*number))));
        }
        pages.sort_unstable();
        for run in pages.chunk_by(|page, next| next - page <= 1) {
            if let [first, .., last] | [first @ last] = run {
                self.discard(memory, first * PAGE, (last - first + 1) * PAGE)?;
            }
        }
        Ok(0)
    }

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
        // SAFETY: the range is whole pages inside one mapping, which lives as long as `region`. It is guest memory: nothing holds
        // references into it, and all who read it expect that the guest changes it at any time.
        match unsafe { madvise(pointer.cast(), length, advice) } {
            Ok(()) => drop(self.shared.discarded.fetch_add(bytes, Ordering::Relaxed)),
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

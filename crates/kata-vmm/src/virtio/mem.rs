//! Memory that comes while the guest runs, and goes again (virtio 1.2, section 5.15).
//!
//! ```text
//!   Growth::set ─▶ configuration: bytes wanted ─▶ driver ─ requests ─▶ which blocks it plugs and unplugs ─▶ answered
//!                                                                       └─ unplugged: back to the host
//! ```
//!
//! The device has a stretch of guest addresses, in which the driver uses the blocks that it plugged. The stretch is there for KVM
//! and for back ends in other processes from the start, so nobody has to hear of a change; what was never touched takes nothing of
//! the host. A guest that breaks the rules and touches blocks it did not plug gets no more than the whole stretch.

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;

use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::mm::{Advice, madvise};
use virtio_bindings::virtio_ids::VIRTIO_ID_MEM;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueState};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::buffers::ChainError;
use super::drain::drain;
use super::ring::QueueFault;
use super::worker::{Rings, Then, Wake, Work, Worker};
use super::{ActivateError, Activation, Device, Interrupt, read_space};
use crate::dma::Dma;

/// Bytes of a block: what Linux plugs at once, and a huge page.
pub const BLOCK: u64 = 2 << 20;

/// The driver does not read what it has not plugged, which would take memory of the host.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// How often it is looked how far the guest is.
const LOOK: Duration = Duration::from_millis(2);

const REQUEST: usize = 24;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What the driver is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
enum Told {
    /// Done.
    Ack = 0,
    /// Not wanted at the moment.
    Nack = 1,
    /// The host does not give it now.
    Busy = 2,
    /// No such blocks, or not in the state that the request needs.
    Error = 3,
}

const ALL_PLUGGED: u16 = 0;
const ALL_UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// The device.
pub struct Mem {
    worker: Worker<Plugging>,
    shared: Arc<Shared>,
}

/// How much a machine is to grow and has grown.
#[derive(Clone)]
pub struct Growth(Arc<Shared>);

struct Shared {
    base: u64,
    size: u64,
    wanted: AtomicU64,
    plugged: AtomicU64,
    driver: Driver,
}

/// The driver, while the device works, for whoever wants another size.
#[derive(Default)]
struct Driver(Mutex<Option<Arc<dyn Interrupt>>>);

impl Driver {
    /// Who is told from now on; nobody while the device stands still.
    fn set(&self, driver: Option<Arc<dyn Interrupt>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = driver;
    }

    /// Tells it to look at the configuration again.
    fn configuration_changed(&self) {
        if let Some(driver) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            driver.configuration_changed();
        }
    }
}

impl Growth {
    /// Asks the guest to have so many bytes of it, up to the whole, in whole blocks. Answers how many these are; it gets there in
    /// its own time, as far as it can.
    pub fn set(&self, bytes: u64) -> u64 {
        let wanted = bytes.min(self.0.size).next_multiple_of(BLOCK);
        self.0.wanted.store(wanted, Ordering::SeqCst);
        self.0.driver.configuration_changed();
        wanted
    }

    /// Waits until the guest has what is wanted, or comes no nearer for `step`, or `whole` is over, or `given_up` says so: a guest
    /// that plugs and unplugs for ever holds nobody up for ever.
    pub fn settle(&self, wanted: u64, step: Duration, whole: Duration, given_up: impl Fn() -> bool) {
        let left = || self.plugged().abs_diff(wanted);
        let (begin, mut nearest) = (Instant::now(), left());
        let mut until = begin + step.min(whole);
        while left() != 0 && Instant::now() < until && !given_up() {
            std::thread::sleep(LOOK);
            let now = left();
            if now < nearest {
                (nearest, until) = (now, (Instant::now() + step).min(begin + whole));
            }
        }
    }

    /// How many bytes the guest has plugged.
    pub fn plugged(&self) -> u64 {
        self.0.plugged.load(Ordering::SeqCst)
    }
}

impl Mem {
    /// A device for the guest's addresses from `base` on, a mapping of its own of whole blocks. With `populate` blocks are taken
    /// from the host when they are plugged, not when they are touched. Devices of the host reach what is plugged, and no more.
    pub fn new(base: u64, size: u64, populate: bool, dma: Dma) -> Result<(Mem, Growth), ActivateError> {
        let size = size / BLOCK * BLOCK;
        let (wanted, plugged, driver) = Default::default();
        let shared = Arc::new(Shared { base, size, wanted, plugged, driver });
        let blocks = Blocks::new(base, size);
        let worker = Worker::new(Plugging { shared: Arc::clone(&shared), blocks, populate, dma })?;
        Ok((Mem { worker, shared: Arc::clone(&shared) }, Growth(shared)))
    }
}

impl Device for Mem {
    fn kind(&self) -> u32 {
        VIRTIO_ID_MEM
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC | UNPLUGGED_INACCESSIBLE
    }

    /// Size of a block, a node that is not offered, first address, size, how much of that can be used, plugged, wanted.
    fn read_configuration(&self, offset: u64, into: &mut [u8]) {
        let Shared { base, size, wanted, plugged, .. } = &*self.shared;
        let [wanted, plugged] = [wanted, plugged].map(|bytes| bytes.load(Ordering::SeqCst));
        let fields = [BLOCK, 0, *base, *size, *size, plugged, wanted].map(u64::to_le_bytes);
        read_space(&fields.concat(), offset, into);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let driver = Arc::clone(&activation.interrupt);
        self.worker.start(activation)?;
        self.shared.driver.set(Some(driver));
        Ok(())
    }

    fn unsaved(&mut self) -> Option<&'static str> {
        let grows = |bytes: &AtomicU64| bytes.load(Ordering::SeqCst) > 0;
        (grows(&self.shared.plugged) || grows(&self.shared.wanted)).then_some("memory that came while it ran")
    }

    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        self.shared.driver.set(None);
        self.worker.stop()
    }
}

struct Plugging {
    shared: Arc<Shared>,
    /// They outlive the driver: a new one asks, or unplugs all.
    blocks: Blocks,
    populate: bool,
    dma: Dma,
}

impl Work for Plugging {
    const NAME: &'static str = "virtio-mem";

    fn turn(&mut self, _wake: Wake, rings: &mut Rings) -> Then {
        rings.serve(0, |memory, queue| drain(memory, queue, |chain| self.serve(memory, chain)))
    }
}

impl Plugging {
    fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: DescriptorChain<&GuestMemoryMmap>,
    ) -> Result<usize, QueueFault> {
        let mut request = [0; REQUEST];
        let mut said = chain.clone().reader(memory).map_err(QueueFault::Ring)?;
        let length = said.available_bytes();
        said.read_exact(&mut request).map_err(|_| ChainError::TooShort(length))?;
        let (told, state) = self.answer(memory, &request);
        self.shared.plugged.store(self.blocks.plugged * BLOCK, Ordering::SeqCst);
        let answer = [told as u16, 0, 0, 0, state].map(u16::to_le_bytes);
        let mut room = chain.writer(memory).map_err(QueueFault::Ring)?;
        let length = room.available_bytes();
        std::io::Write::write_all(&mut room, &answer.concat()).map_err(|_| ChainError::TooShort(length))?;
        Ok(answer.concat().len())
    }

    fn answer(&mut self, memory: &GuestMemoryMmap, request: &[u8; REQUEST]) -> (Told, u16) {
        let &[k0, k1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = request;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let count = u64::from(u16::from_le_bytes([n0, n1]));
        let kind = u16::from_le_bytes([k0, k1]);
        let told = if kind == UNPLUG_ALL {
            self.blocks.unplug_all();
            self.dma.unplug(self.shared.base, self.shared.size);
            give_back(memory, self.shared.base, self.shared.size);
            Told::Ack
        } else {
            let Some(first) = self.blocks.find(address, count) else { return (Told::Error, 0) };
            match kind {
                STATE => return (Told::Ack, self.blocks.state(first, count)),
                PLUG => self.plug(memory, address, first, count),
                UNPLUG if self.blocks.state(first, count) == ALL_PLUGGED => {
                    self.blocks.set(first, count, false);
                    self.dma.unplug(address, count * BLOCK);
                    give_back(memory, address, count * BLOCK);
                    Told::Ack
                }
                _ => Told::Error,
            }
        };
        (told, 0)
    }

    fn plug(&mut self, memory: &GuestMemoryMmap, address: u64, first: u64, count: u64) -> Told {
        if self.blocks.state(first, count) != ALL_UNPLUGGED {
            return Told::Error;
        }
        if (self.blocks.plugged + count) * BLOCK > self.shared.wanted.load(Ordering::SeqCst) {
            return Told::Nack;
        }
        if self.populate && !advise(memory, address, count * BLOCK, Advice::LinuxPopulateWrite) {
            give_back(memory, address, count * BLOCK);
            return Told::Busy;
        }
        if let Err(error) = self.dma.plug(address, count) {
            tracing::warn!(error = crate::chain(&error), "the guest does not get more memory");
            give_back(memory, address, count * BLOCK);
            return Told::Busy;
        }
        self.blocks.set(first, count, true);
        Told::Ack
    }
}

/// Of a file, the memory goes only with the file's blocks.
fn give_back(memory: &GuestMemoryMmap, address: u64, bytes: u64) {
    advise(memory, address, bytes, Advice::LinuxRemove);
}

/// Tells the host about whole blocks of the device's mapping; false where it does not follow, which is logged.
fn advise(memory: &GuestMemoryMmap, address: u64, bytes: u64, advice: Advice) -> bool {
    let region = memory.find_region(GuestAddress(address));
    let Some((region, offset)) =
        region.and_then(|region| Some((region, region.to_region_addr(GuestAddress(address))?)))
    else {
        return false;
    };
    let (Ok(pointer), Ok(length)) = (region.get_host_address(offset), usize::try_from(bytes)) else {
        return false;
    };
    if offset.0.checked_add(bytes).is_none_or(|end| end > region.len()) {
        return false;
    }
    // SAFETY: the range is whole pages inside one mapping, which lives as long as `region`. It is guest memory: nothing holds
    // references into it, and all who read it expect that the guest changes it at any time.
    match unsafe { madvise(pointer.cast(), length, advice) } {
        Ok(()) => true,
        Err(e) => {
            tracing::warn!(error = %e, address, bytes, ?advice, "the host does not do with guest memory as it should");
            false
        }
    }
}

/// Which blocks are plugged.
struct Blocks {
    base: u64,
    count: u64,
    /// A bit for each.
    bits: Vec<u64>,
    plugged: u64,
}

impl Blocks {
    fn new(base: u64, size: u64) -> Blocks {
        let count = size / BLOCK;
        let words = usize::try_from(count.div_ceil(64)).unwrap_or(0);
        Blocks { base, count, bits: vec![0; words], plugged: 0 }
    }

    /// The number of the first of `count` blocks from an address on, where they are blocks of this device.
    fn find(&self, address: u64, count: u64) -> Option<u64> {
        let offset = address.checked_sub(self.base).filter(|offset| offset.is_multiple_of(BLOCK))?;
        let first = offset / BLOCK;
        (count > 0 && first.checked_add(count)? <= self.count).then_some(first)
    }

    fn is_plugged(&self, block: u64) -> bool {
        let word = usize::try_from(block / 64).ok().and_then(|word| self.bits.get(word));
        word.is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    fn state(&self, first: u64, count: u64) -> u16 {
        let plugged = (first..first + count).filter(|block| self.is_plugged(*block)).count();
        match u64::try_from(plugged) {
            Ok(0) => ALL_UNPLUGGED,
            Ok(all) if all == count => ALL_PLUGGED,
            _ => MIXED,
        }
    }

    /// Changes blocks that are all in the other state.
    fn set(&mut self, first: u64, count: u64, plugged: bool) {
        for block in first..first + count {
            if let Some(word) = usize::try_from(block / 64).ok().and_then(|word| self.bits.get_mut(word)) {
                let bit = 1 << (block % 64);
                *word = if plugged { *word | bit } else { *word & !bit };
            }
        }
        self.plugged = if plugged { self.plugged + count } else { self.plugged.saturating_sub(count) };
    }

    fn unplug_all(&mut self) {
        self.bits.fill(0);
        self.plugged = 0;
    }
}

#[cfg(test)]
mod tests;

//! The fuzz target: bytes become what a guest and its owner do to memory that comes and goes, with a device of the host beside.

#![allow(clippy::expect_used, reason = "a fuzz target ends at the first surprise")]

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryMmap};

use super::{BLOCK, Blocks, Growth, Mem, PLUG, Plugging, REQUEST, Told, UNPLUG_ALL};
use crate::dma::{Dma, Domain, Reach};
use crate::memory::{Backing, allocate, growth};
use crate::virtio::drain::drain;
use crate::virtio::driver::{Ring, SIZE, WRITE, any_descriptor, scribble, take};

/// Blocks of the device.
const BLOCKS: u64 = 64;
/// Bytes of the guest's RAM.
const RAM: u64 = 64 << 20;
/// Where requests and answers are.
const REQUESTS: u64 = 0x1_0000;

/// What a device of the host reaches, by the guest's address; the host pins no more than so many ranges.
struct Pinned {
    most: usize,
    ranges: Mutex<BTreeMap<u64, u64>>,
}

impl Pinned {
    fn ranges(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, u64>> {
        self.ranges.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Domain for Pinned {
    fn map(&self, guest: u64, _host: u64, bytes: u64) -> io::Result<()> {
        let mut ranges = self.ranges();
        if ranges.len() >= self.most {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert_eq!(ranges.insert(guest, bytes), None, "{guest:#x} is reached twice");
        Ok(())
    }

    fn unmap(&self, guest: u64, bytes: u64) -> io::Result<()> {
        assert_eq!(self.ranges().remove(&guest), Some(bytes), "{guest:#x} is not reached so");
        Ok(())
    }
}

struct Machine {
    plugging: Plugging,
    growth: Growth,
    base: u64,
    pinned: Arc<Pinned>,
    /// A device of the host, while there is one.
    reach: Option<Reach>,
}

/// Plays `data` to a device. Each step is one byte that says what, and its arguments.
pub fn run(mut data: &[u8]) {
    let Some([most, populate]) = take(&mut data) else { return };
    let memory = allocate(RAM, BLOCKS * BLOCK, Backing::default()).expect("memory for a guest");
    let (base, size) = growth(&memory.memory()).expect("blocks");
    let dma = Dma::new(memory.clone());
    let (mem, growth) = Mem::new(base, size, false, dma.clone()).expect("a device");
    let plugging =
        Plugging { shared: mem.shared, blocks: Blocks::new(base, size), populate: populate % 8 == 0, dma };
    let pinned = Arc::new(Pinned { most: most.into(), ranges: Mutex::default() });
    let mut machine = Machine { plugging, growth, base, pinned, reach: None };
    let memory = memory.memory();
    let ring = Ring::new(&memory, 0);
    let mut queue = ring.queue();
    while let Some([step]) = take(&mut data) {
        let before = machine.plugging.blocks.plugged;
        if machine.step_once(step, &mut data, &memory, &ring).is_none()
            || machine.serve(&memory, &mut queue).is_err()
        {
            break;
        }
        machine.check(before);
    }
    machine.finish(&memory);
}

impl Machine {
    fn step_once(
        &mut self,
        step: u8,
        data: &mut &[u8],
        memory: &GuestMemoryMmap,
        ring: &Ring<'_>,
    ) -> Option<()> {
        match step % 8 {
            // A plausible request: of a state, or a change.
            0..4 => {
                let [kind, block, count, odd, slot] = take(data)?;
                let address = self.base + u64::from(block) * BLOCK / 2 + u64::from(odd / 250);
                let request = request(u16::from(kind % 5), address, u16::from(count % 80));
                let at = REQUESTS + u64::from(slot) * 64;
                memory.write_slice(&request, GuestAddress(at)).ok()?;
                ring.offer(u16::from(slot) % (SIZE - 1), &[(at, 24, 0), (at + 32, 10, WRITE)]);
            }
            // The owner wants another size.
            4 => {
                let [blocks] = take(data)?;
                self.growth.set(u64::from(blocks) * BLOCK / 2);
            }
            // A device of the host comes or goes; one that cannot reach everything does not come.
            5 => {
                self.reach = match self.reach.take() {
                    Some(_) => None,
                    None => self.plugging.dma.enter(self.pinned.clone()).ok(),
                };
            }
            // Any bytes in the rings, and in what was plugged.
            6 => {
                let [a, b, value] = take(data)?;
                let at = u16::from_le_bytes([a, b]);
                scribble(memory, at % 0x4000, value);
                let block = u64::from(at) % BLOCKS;
                if self.plugging.blocks.is_plugged(block) {
                    memory.write_obj(value, GuestAddress(self.base + block * BLOCK)).ok()?;
                }
            }
            // Any descriptor.
            _ => {
                let [slot] = take(data)?;
                ring.offer(u16::from(slot) % SIZE, &[any_descriptor(data)?]);
            }
        }
        Some(())
    }

    fn serve(&mut self, memory: &GuestMemoryMmap, queue: &mut Queue) -> Result<(), ()> {
        drain(memory, queue, |chain| self.plugging.serve(memory, chain)).map(drop).map_err(drop)
    }

    /// The counts are those of the blocks, nothing grew beyond what was wanted, and the host's device reaches what is plugged.
    fn check(&self, before: u64) {
        let Plugging { shared, blocks, .. } = &self.plugging;
        let plugged: Vec<u64> = (0..BLOCKS).filter(|block| blocks.is_plugged(*block)).collect();
        assert_eq!(u64::try_from(plugged.len()), Ok(blocks.plugged));
        assert_eq!(self.growth.plugged(), blocks.plugged * BLOCK);
        let wanted = shared.wanted.load(std::sync::atomic::Ordering::SeqCst);
        assert!(blocks.plugged <= before || blocks.plugged * BLOCK <= wanted, "more than was wanted");
        let reached: Vec<u64> =
            self.pinned.ranges().range(self.base..).map(|(guest, _)| (guest - self.base) / BLOCK).collect();
        assert_eq!(reached, if self.reach.is_some() { plugged } else { Vec::new() });
    }

    /// A new driver begins: nothing of the last one's is left.
    fn finish(&mut self, memory: &GuestMemoryMmap) {
        assert_eq!(self.plugging.answer(memory, &request(UNPLUG_ALL, 0, 0)), (Told::Ack, 0));
        for block in 0..BLOCKS {
            let byte: u8 = memory.read_obj(GuestAddress(self.base + block * BLOCK)).expect("in memory");
            assert_eq!(byte, 0, "block {block} kept what was in it");
        }
        assert!(self.pinned.ranges().range(self.base..).next().is_none());
        let (told, _) = self.plugging.answer(memory, &request(PLUG, self.base, 0));
        assert_eq!(told, Told::Error);
    }
}

fn request(kind: u16, address: u64, count: u16) -> [u8; REQUEST] {
    // Type, padding, first address, number of blocks, padding.
    let fields = [u64::from(kind), address, u64::from(count)].map(u64::to_le_bytes);
    fields.concat().try_into().expect("as long as a request")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_guest_gets_more_than_is_wanted_or_ends_the_process(data in prop::collection::vec(any::<u8>(), 0..300)) {
            super::run(&data);
        }
    }

    /// Inputs that show what the target can do; the fuzzer starts from the same files.
    #[test]
    fn corpus_leaves_the_memory_alive() {
        crate::virtio::driver::corpus("mem", super::run);
    }
}

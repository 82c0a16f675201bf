//! The entropy device (virtio 1.2, section 5.4): the guest's buffers are filled from the host's random number generator.

use std::io::Write;

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueState};
use vm_memory::GuestMemoryMmap;

use super::drain::drain;
use super::ring::QueueFault;
use super::worker::{Rings, Then, Wake, Work, Worker};
use super::{ActivateError, Activation, Device};

/// Most bytes of one chain that are filled, so that none takes long. Drivers ask again for more.
const MOST: usize = 64 * 1024;
/// Bytes that are made at a time.
const BLOCK: usize = 256;

/// The device.
pub struct Rng(Worker<Source>);

impl Rng {
    /// Makes one.
    pub fn new() -> Result<Rng, ActivateError> {
        Ok(Rng(Worker::new(Source)?))
    }
}

impl Device for Rng {
    fn kind(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queues(&self) -> &[u16] {
        &[64]
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.0.start(activation)
    }

    fn stop(&mut self) -> Vec<(usize, QueueState)> {
        self.0.stop()
    }
}

struct Source;

impl Work for Source {
    const NAME: &'static str = "virtio-rng";

    fn turn(&mut self, _wake: Wake, rings: &mut Rings) -> Then {
        rings.serve(0, |memory, queue| drain(memory, queue, |chain| fill(memory, chain)))
    }
}

/// Fills what the device may write of a chain.
fn fill(memory: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> Result<usize, QueueFault> {
    let mut room = chain.writer(memory).map_err(QueueFault::Ring)?;
    let mut block = [0; BLOCK];
    let mut written = 0;
    while written < MOST {
        let wanted = room.available_bytes().min(BLOCK);
        let Some(block) = block.get_mut(..wanted).filter(|block| !block.is_empty()) else { break };
        // Only a kernel that has just booted and lacks entropy could make less, or none; the driver then asks again.
        let made = getrandom(&mut *block, GetRandomFlags::NONBLOCK).unwrap_or(0);
        let Ok(wrote) = room.write(block.get(..made).unwrap_or_default()) else { break };
        if wrote == 0 {
            break;
        }
        written += wrote;
    }
    Ok(written)
}

#[cfg(test)]
mod tests;

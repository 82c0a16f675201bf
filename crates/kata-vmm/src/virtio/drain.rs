//! Serving a queue whose chains are each done at once, one after another.

use thiserror::Error;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

use super::worker::Served;

/// Chains after which a worker looks whether it is to stop.
const TURN: usize = 32;

/// How a driver broke a queue.
#[derive(Debug, Error)]
pub enum QueueFault {
    /// The rings.
    #[error("the driver broke a virtqueue's rings")]
    Ring(#[from] virtio_queue::Error),
    /// A buffer.
    #[error("{length:#x} bytes from {address:#x} on are not all in the guest's memory")]
    Buffer {
        /// First address.
        address: u64,
        /// Length in bytes.
        length: u64,
    },
}

/// Takes chains off a queue, has each of them done, and gives it back with the number of bytes that were written to it.
pub fn drain(
    memory: &GuestMemoryMmap,
    queue: &mut Queue,
    mut each: impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> Result<u32, QueueFault>,
) -> Result<Served, QueueFault> {
    let mut done = 0;
    let more = loop {
        if done == TURN {
            break true;
        }
        match queue.iter(memory)?.next() {
            Some(chain) => {
                let head = chain.head_index();
                let written = each(chain)?;
                queue.add_used(memory, head, written)?;
                done += 1;
            }
            // One may have been added before the driver could know that it has to say so.
            None if queue.enable_notification(memory)? => {}
            None => break false,
        }
    };
    Ok(Served { interrupt: done > 0 && queue.needs_notification(memory)?, more })
}

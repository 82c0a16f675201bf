//! Serving a queue whose chains are each done at once, one after another.

use virtio_queue::{DescriptorChain, Queue};
use vm_memory::GuestMemoryMmap;

use super::ring::{QueueFault, give_back, next_or_wait, wants_interrupt};
use super::worker::Served;

/// Chains after which a worker looks whether it is to stop.
const TURN: u16 = 32;

/// Takes chains off a queue, has each of them done, and gives it back with the number of bytes that were written to it.
pub fn drain(
    memory: &GuestMemoryMmap,
    queue: &mut Queue,
    mut each: impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> Result<usize, QueueFault>,
) -> Result<Served, QueueFault> {
    let mut done = 0;
    let more = loop {
        if done == TURN {
            break true;
        }
        let Some(chain) = next_or_wait(memory, queue)? else { break false };
        let head = chain.head_index();
        let written = each(chain)?;
        give_back(memory, queue, head, written)?;
        done += 1;
    };
    Ok(Served { interrupt: wants_interrupt(memory, queue, done)?, more })
}

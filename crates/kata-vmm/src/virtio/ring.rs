//! The device's side of one virtqueue, beyond what [`virtio_queue`] does.

use std::sync::atomic::{Ordering, fence};

use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory};

use super::buffers::ChainError;

/// Why a queue cannot be served any further: the driver broke the rules of virtqueues, so nothing it says is reliable
/// until it sets the queue up again.
#[derive(Debug, Error)]
pub enum QueueFault {
    /// The rings.
    #[error("the driver broke a virtqueue's rings")]
    Ring(#[source] virtio_queue::Error),
    /// One chain.
    #[error("the driver put a chain into a virtqueue that cannot be used")]
    Chain(#[from] ChainError),
}

/// Takes the next chain off; `None` where the driver has added no more.
pub fn next_chain<'m, M: GuestMemory>(
    mem: &'m M,
    queue: &mut Queue,
) -> Result<Option<DescriptorChain<&'m M>>, QueueFault> {
    Ok(queue.iter(mem).map_err(QueueFault::Ring)?.next())
}

/// Takes the next chain off, and has the driver say when it adds one where there is none.
pub fn next_or_wait<'m, M: GuestMemory>(
    mem: &'m M,
    queue: &mut Queue,
) -> Result<Option<DescriptorChain<&'m M>>, QueueFault> {
    match next_chain(mem, queue)? {
        Some(chain) => Ok(Some(chain)),
        // One may have been added before the driver could know that it has to say so.
        None if queue.enable_notification(mem).map_err(QueueFault::Ring)? => next_chain(mem, queue),
        None => Ok(None),
    }
}

/// Gives a chain back of which the device wrote `len` bytes.
pub fn give_back<M: GuestMemory>(
    mem: &M,
    queue: &mut Queue,
    head: u16,
    len: usize,
) -> Result<(), QueueFault> {
    queue.add_used(mem, head, u32::try_from(len).unwrap_or(u32::MAX)).map_err(QueueFault::Ring)
}

/// Gives several chains back, of which the device wrote so many bytes each, so that the driver sees all of them or none.
pub fn give_back_together<M: GuestMemory>(
    mem: &M,
    queue: &mut Queue,
    chains: &[(u16, usize)],
) -> Result<(), QueueFault> {
    let memory = |e| QueueFault::Ring(virtio_queue::Error::GuestMemory(e));
    let (first, size) = (queue.next_used(), queue.size());
    let mut next = first;
    for (head, len) in chains {
        if *head >= size {
            return Err(QueueFault::Ring(virtio_queue::Error::InvalidDescriptorIndex));
        }
        let slot = u64::from(next.checked_rem(size).unwrap_or(0));
        let element = [u32::from(*head).to_le(), u32::try_from(*len).unwrap_or(u32::MAX).to_le()];
        mem.write_obj(element, GuestAddress(queue.used_ring()).unchecked_add(4 + 8 * slot))
            .map_err(memory)?;
        next = next.wrapping_add(1);
    }
    let index = GuestAddress(queue.used_ring()).unchecked_add(2);
    mem.store(next.to_le(), index, Ordering::Release).map_err(memory)?;
    queue.set_next_used(next);
    Ok(())
}

/// Whether the driver wants an interrupt for the `added` chains that were given back since this was last asked.
pub fn wants_interrupt<M: GuestMemory>(mem: &M, queue: &Queue, added: u16) -> Result<bool, QueueFault> {
    if added == 0 {
        return Ok(false);
    }
    let available = GuestAddress(queue.avail_ring());
    let read = |at| {
        mem.load::<u16>(at, Ordering::Relaxed)
            .map(u16::from_le)
            .map_err(|e| QueueFault::Ring(virtio_queue::Error::GuestMemory(e)))
    };
    // What was given back is to be seen before the driver's wish is read: it writes its wish, then looks what there is.
    fence(Ordering::SeqCst);
    if queue.event_idx_enabled() {
        // The driver names the chain after which it wants one (virtio 1.2, section 2.7.10), at the available ring's end.
        let event = read(available.unchecked_add(4 + 2 * u64::from(queue.size())))?;
        return Ok(queue.next_used().wrapping_sub(event).wrapping_sub(1) < added);
    }
    // Without event indexes it has a flag for that (section 2.7.7).
    Ok(u32::from(read(available)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;
    use crate::virtio::driver::{Ring, SIZE};

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
    }

    #[test]
    fn chains_given_back_together_appear_together_across_the_end_of_the_ring_and_of_numbers() {
        let mem = memory();
        let ring = Ring::new(&mem, 0);
        let mut queue = ring.queue();
        queue.set_next_used(u16::MAX - 1);
        give_back_together(&mem, &mut queue, &[(3, 10), (5, 20), (7, 30)]).unwrap();
        assert_eq!((ring.given_back(), queue.next_used()), (1, 1));
        let back: Vec<_> = [u16::MAX - 1, u16::MAX, 0].into_iter().map(|nth| ring.back(nth)).collect();
        assert_eq!(back, [(3, 10), (5, 20), (7, 30)]);
        let far = give_back_together(&mem, &mut queue, &[(0, 1), (SIZE, 1)]);
        assert!(matches!(far, Err(QueueFault::Ring(virtio_queue::Error::InvalidDescriptorIndex))));
        assert_eq!((ring.given_back(), queue.next_used()), (1, 1));
    }

    #[test]
    fn driver_is_interrupted_when_the_chain_it_named_is_among_those_given_back() {
        let mem = memory();
        let ring = Ring::new(&mem, 0);
        let mut queue = ring.queue();
        queue.set_event_idx(true);
        let [_, available, _] = ring.addresses();
        let event = GuestAddress(available + 4 + 2 * u64::from(SIZE));
        for (next, added, named, wanted) in [
            (5, 1, 4, true),
            (5, 1, 5, false),
            (5, 1, 3, false),
            (5, 3, 2, true),
            (5, 3, 1, false),
            (1, 3, u16::MAX - 1, true),
            (1, 3, u16::MAX - 2, false),
            (5, 0, 4, false),
        ] {
            queue.set_next_used(next);
            mem.write_obj::<u16>(named, event).unwrap();
            let wants = wants_interrupt(&mem, &queue, added).unwrap();
            assert_eq!(wants, wanted, "{next} {added} {named}");
        }
    }

    #[test]
    fn driver_without_event_indexes_has_a_flag_against_interrupts() {
        let mem = memory();
        let ring = Ring::new(&mem, 0);
        let [_, available, _] = ring.addresses();
        for (flags, wanted) in [(0u16, true), (1, false)] {
            mem.write_obj(flags, GuestAddress(available)).unwrap();
            assert_eq!(wants_interrupt(&mem, &ring.queue(), 1).unwrap(), wanted);
        }
    }
}

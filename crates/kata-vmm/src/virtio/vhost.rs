//! What vhost back ends have in common, in the kernel and in other processes: queues and the guest's memory are handed over, and
//! the guest's kicks and interrupts go past this process.

use std::io;
use std::os::fd::AsRawFd;

use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueState, QueueT};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ActiveQueue, Interrupt};

/// Guest memory as back ends are told of it; without a descriptor where it is no file.
pub fn regions(memory: &GuestMemoryMmap) -> io::Result<Vec<VhostUserMemoryRegionInfo>> {
    let describe = |region: &vm_memory::GuestRegionMmap| {
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        let file = region.file_offset();
        Ok(VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: u64::try_from(host.addr()).map_err(io::Error::other)?,
            mmap_offset: file.map_or(0, vm_memory::FileOffset::start),
            mmap_handle: file.map_or(-1, |file| file.file().as_raw_fd()),
        })
    };
    memory.iter().map(describe).collect()
}

/// Guest addresses of a queue's rings, each of them in one piece of memory: a back end in the kernel takes them for pieces of this
/// process's memory, in which anything may follow.
fn rings(memory: &GuestMemoryMmap, queue: &Queue) -> io::Result<[u64; 3]> {
    let size = usize::from(queue.size());
    let rings = [
        (queue.desc_table(), 16 * size),
        (queue.avail_ring(), 6 + 2 * size),
        (queue.used_ring(), 6 + 8 * size),
    ];
    for (address, len) in rings {
        memory.get_slice(GuestAddress(address), len).map_err(io::Error::other)?;
    }
    Ok(rings.map(|(address, _)| address))
}

/// Where a guest address is in this process.
pub fn host_address(memory: &GuestMemoryMmap, address: u64) -> io::Result<u64> {
    let host = memory.get_host_address(GuestAddress(address)).map_err(io::Error::other)?;
    u64::try_from(host.addr()).map_err(io::Error::other)
}

/// Hands a queue over, as the back end's `number`. What its rings' addresses are to the back end, `translate` says.
pub fn hand_over<B: VhostBackend>(
    backend: &B,
    number: usize,
    active: &ActiveQueue,
    memory: &GuestMemoryMmap,
    interrupt: &dyn Interrupt,
    translate: impl Fn(u64) -> io::Result<u64>,
) -> io::Result<()> {
    let queue = &active.queue;
    let [descriptors, available, used] = rings(memory, queue)?;
    let data = VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: translate(descriptors)?,
        used_ring_addr: translate(used)?,
        avail_ring_addr: translate(available)?,
        log_addr: None,
    };
    let call = match interrupt.descriptor(active.index) {
        Some(call) => call,
        // The driver polls: whatever is written there, nobody reads.
        None => EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
    };
    backend.set_vring_num(number, queue.size()).map_err(io::Error::other)?;
    backend.set_vring_addr(number, &data).map_err(io::Error::other)?;
    backend.set_vring_base(number, queue.next_avail()).map_err(io::Error::other)?;
    backend.set_vring_call(number, &call).map_err(io::Error::other)?;
    backend.set_vring_kick(number, &active.kick).map_err(io::Error::other)
}

/// Takes a queue back, and says how far the back end got with it.
pub fn take_back<B: VhostBackend>(
    backend: &B,
    number: usize,
    active: &mut ActiveQueue,
    memory: &GuestMemoryMmap,
) -> QueueState {
    let queue = &mut active.queue;
    match backend.get_vring_base(number) {
        // Rings that are not packed have 16 bits there.
        Ok(base) => queue.set_next_avail(u16::try_from(base & 0xffff).unwrap_or(0)),
        Err(error) => tracing::warn!(queue = active.index, %error, "a back end does not say how far it got"),
    }
    if let Ok(used) = queue.used_idx(memory, std::sync::atomic::Ordering::Acquire) {
        queue.set_next_used(used.0);
    }
    queue.state()
}

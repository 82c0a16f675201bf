//! The front end's requests.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::event::epoll;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::ring::Ring;
use super::{Backend, KICKS};
use crate::vsock::Vsock;

/// Memory regions accepted: what the kernel's vhost accepts, so that front ends size their hotplug alike.
const MAX_REGIONS: u64 = 509;

/// Where a region of guest memory lies in the front end's address space; ring addresses are given there.
pub struct Mapping {
    front_end: u64,
    guest: u64,
    len: u64,
}

impl Mapping {
    fn of(region: &VhostUserMemoryRegion) -> Mapping {
        Mapping { front_end: region.user_addr, guest: region.guest_phys_addr, len: region.memory_size }
    }

    fn translate(&self, address: u64) -> Option<GuestAddress> {
        let offset = address.checked_sub(self.front_end).filter(|offset| *offset < self.len)?;
        self.guest.checked_add(offset).map(GuestAddress)
    }
}

fn failed(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn map(region: &VhostUserMemoryRegion, file: File) -> Result<GuestRegionMmap> {
    GuestRegionMmap::new(region.mmap_region(file)?, GuestAddress(region.guest_phys_addr))
        .ok_or(Error::InvalidParam)
}

impl Backend {
    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        usize::try_from(index).ok().and_then(|i| self.rings.get_mut(i)).ok_or(Error::InvalidParam)
    }

    fn guest_address(&self, address: u64) -> Result<GuestAddress> {
        self.mappings.iter().find_map(|m| m.translate(address)).ok_or(Error::InvalidParam)
    }

    /// Ends watching a kick. Closing it would not: the front end has the same eventfd open.
    fn unwatch(&self, kick: Option<File>) {
        if let Some(kick) = kick
            && let Err(e) = epoll::delete(&self.epoll, &kick)
        {
            tracing::warn!(error = %e, "a queue's kick cannot be unwatched");
        }
    }
}

impl VhostUserBackendReqHandlerMut for Backend {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("device reset was not offered"))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(Vsock::FEATURES | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_features()? != 0 {
            return Err(Error::FeatureMismatch);
        }
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let no_enable = features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0;
        for ring in &mut self.rings {
            ring.queue.set_event_idx(event_idx);
            // A front end without protocol features has no message to enable rings with.
            ring.enabled |= no_enable;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let mut mapped = regions.iter().zip(files).map(|(r, f)| map(r, f)).collect::<Result<Vec<_>>>()?;
        mapped.sort_by_key(vm_memory::GuestMemoryRegion::start_addr);
        self.memory = GuestMemoryMmap::from_regions(mapped).map_err(failed)?;
        self.mappings = regions.iter().map(Mapping::of).collect();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.queue.try_set_size(size).map_err(failed)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let (descriptor, used, available) =
            (self.guest_address(descriptor)?, self.guest_address(used)?, self.guest_address(available)?);
        self.ring(index)?;
        let Backend { rings, memory, .. } = self;
        let ring = usize::try_from(index).ok().and_then(|i| rings.get_mut(i)).ok_or(Error::InvalidParam)?;
        let queue = &mut ring.queue;
        queue.try_set_desc_table_address(descriptor).map_err(failed)?;
        queue.try_set_avail_ring_address(available).map_err(failed)?;
        queue.try_set_used_ring_address(used).map_err(failed)?;
        // The protocol transfers the available index only; the used index is in the ring.
        let used = queue.used_idx(memory, std::sync::atomic::Ordering::Acquire).map_err(failed)?;
        queue.set_next_used(used.0);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.ring(index)?.queue.set_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        let base = ring.stop();
        let kick = ring.kick.take();
        self.unwatch(kick);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = fd.ok_or(Error::InvalidOperation("rings without a kick descriptor are not polled"))?;
        let old = self.ring(u32::from(index))?.kick.take();
        self.unwatch(old);
        let token = epoll::EventData::new_u64(KICKS + u64::from(index));
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&self.epoll, &fd, token, edge).map_err(|e| Error::ReqHandlerError(e.into()))?;
        let Backend { rings, memory, device, .. } = self;
        let ring = rings.get_mut(usize::from(index)).ok_or(Error::InvalidParam)?;
        ring.kick = Some(fd);
        let goes_on = ring.start();
        if !ring.queue.is_valid(memory) {
            ring.queue.set_ready(false);
            return Err(Error::InvalidParam);
        }
        if !goes_on {
            device.forget_guest();
        }
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let ring = self.ring(u32::from(index))?;
        ring.call = fd;
        // An interrupt that was due while there was no descriptor is not lost; one too many does no harm.
        if ring.queue.ready() {
            ring.interrupt();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(u32::from(index))?.error = fd;
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_protocol_features()?.bits() != 0 {
            return Err(Error::FeatureMismatch);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        u64::try_from(self.rings.len()).map_err(failed)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.enabled = enable;
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let space = self.device.config_space();
        let from = usize::try_from(offset).map_err(failed)?;
        let len = usize::try_from(size).map_err(failed)?;
        let range = from..from.checked_add(len).ok_or(Error::InvalidParam)?;
        space.get(range).map(<[u8]>::to_vec).ok_or(Error::InvalidParam)
    }

    fn set_config(&mut self, _offset: u32, _buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        Err(Error::InvalidOperation("the configuration space is read-only"))
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("this is not a GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("shared objects were not offered"))
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        Err(Error::InvalidOperation("in-flight tracking was not offered"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("in-flight tracking was not offered"))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        self.memory = self.memory.insert_region(Arc::new(map(region, file)?)).map_err(failed)?;
        self.mappings.push(Mapping::of(region));
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let start = region.guest_phys_addr;
        let (memory, _) =
            self.memory.remove_region(GuestAddress(start), region.memory_size).map_err(failed)?;
        self.memory = memory;
        self.mappings.retain(|m| m.guest != start);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("device state transfer was not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("device state transfer was not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("shared memory regions were not offered"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(Error::InvalidOperation("dirty logging was not offered"))
    }
}

//! What KVM has to know of devices of the host.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::{
    KVM_DEV_VFIO_GROUP, KVM_DEV_VFIO_GROUP_ADD, KVM_DEV_VFIO_GROUP_DEL, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_VFIO, kvm_userspace_memory_region,
};
use kvm_ioctls::{DeviceFd, VmFd};

/// First number of a memory slot that is not the RAM's.
const FIRST_SLOT: u32 = 8;
/// As many as there may be: 31 devices with six BARs, each of them in some parts.
const MOST_SLOTS: u32 = 1024;

/// The part of one machine in the kernel that is for devices of the host.
pub struct Lending {
    machine: Arc<VmFd>,
    /// Slots of memory that is a device's, by their addresses.
    slots: Mutex<BTreeMap<u64, u32>>,
    /// The pseudo-device that is told of groups: with them the guest's cache instructions count
    /// (Linux, Documentation/virt/kvm/devices/vfio.rst).
    groups: Mutex<Option<DeviceFd>>,
}

impl Lending {
    pub(super) fn new(machine: Arc<VmFd>) -> Lending {
        Lending { machine, slots: Mutex::default(), groups: Mutex::default() }
    }

    /// Lets the guest reach `bytes` of this process at an address of its own.
    ///
    /// # Safety
    /// The range from `host` on is a mapping of this process until [`Lending::unmap`], and no reference leads into it.
    pub unsafe fn map(&self, address: u64, host: u64, bytes: u64) -> io::Result<()> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = |number: &u32| slots.values().any(|slot| slot == number);
        let free = (FIRST_SLOT..FIRST_SLOT + MOST_SLOTS).find(|number| !taken(number));
        let slot = free.ok_or_else(|| io::Error::other("all memory slots are taken"))?;
        // SAFETY: the caller's promise.
        unsafe { self.set(slot, address, host, bytes) }?;
        slots.insert(address, slot);
        Ok(())
    }

    /// Ends that.
    pub fn unmap(&self, address: u64) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(slot) = slots.remove(&address) else { return };
        // SAFETY: a slot of no bytes leads nowhere.
        if let Err(error) = unsafe { self.set(slot, address, 0, 0) } {
            tracing::error!(%error, address, "a page of a device stays with the guest");
        }
    }

    /// # Safety
    /// As that of [`Lending::map`].
    unsafe fn set(&self, slot: u32, address: u64, host: u64, bytes: u64) -> io::Result<()> {
        let part = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address,
            memory_size: bytes,
            userspace_addr: host,
        };
        // SAFETY: the caller's promise.
        unsafe { self.machine.set_user_memory_region(part) }
            .map_err(|e| io::Error::from_raw_os_error(e.errno()))
    }

    /// Tells KVM of a group of VFIO's.
    pub fn add_group(&self, group: BorrowedFd<'_>) -> io::Result<()> {
        self.tell(KVM_DEV_VFIO_GROUP_ADD, group)
    }

    /// It goes again.
    pub fn remove_group(&self, group: BorrowedFd<'_>) -> io::Result<()> {
        self.tell(KVM_DEV_VFIO_GROUP_DEL, group)
    }

    fn tell(&self, attribute: u32, group: BorrowedFd<'_>) -> io::Result<()> {
        let failed = |e: kvm_ioctls::Error| io::Error::from_raw_os_error(e.errno());
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        let device = match &mut *groups {
            Some(device) => device,
            none => {
                let mut wanted =
                    kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_VFIO, fd: 0, flags: 0 };
                none.insert(self.machine.create_device(&mut wanted).map_err(failed)?)
            }
        };
        let number = group.as_raw_fd();
        let told = kvm_device_attr {
            group: KVM_DEV_VFIO_GROUP,
            attr: attribute.into(),
            addr: std::ptr::from_ref(&number) as u64,
            flags: 0,
        };
        device.set_device_attr(&told).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use kvm_ioctls::Kvm;
    use vm_memory::MmapRegion;

    use super::*;

    fn lending() -> Option<Lending> {
        match Kvm::new().and_then(|kvm| kvm.create_vm()) {
            Ok(machine) => Some(Lending::new(Arc::new(machine))),
            Err(error) => {
                eprintln!("skipped: no machine of KVM's: {error}");
                None
            }
        }
    }

    #[test]
    fn pages_of_a_device_come_and_go_and_never_lie_on_others() {
        let Some(lending) = lending() else { return };
        let pages = MmapRegion::<()>::new(0x4000).unwrap();
        let host = pages.as_ptr() as u64;
        // SAFETY: the pages outlive the machine, which has no CPU; nothing leads into them.
        let map = |address, bytes| unsafe { lending.map(address, host, bytes) };
        map(0xc000_0000, 0x2000).unwrap();
        assert!(map(0xc000_1000, 0x1000).is_err(), "on top of another");
        map(0xc000_2000, 0x1000).unwrap();
        lending.unmap(0xc000_0000);
        lending.unmap(0xdead_0000);
        map(0xc000_1000, 0x1000).unwrap();
    }

    #[test]
    fn file_that_is_no_group_is_refused() {
        let Some(lending) = lending() else { return };
        let file = File::open("/dev/null").unwrap();
        lending.add_group(file.as_fd()).unwrap_err();
        lending.remove_group(file.as_fd()).unwrap_err();
    }
}

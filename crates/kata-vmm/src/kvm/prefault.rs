//! Memory that has something in it is mapped for the guest before it runs.
//!
//! Otherwise each of its pages is an exit when the guest first touches it, a few thousand for a kernel and its initrd. KVM does it all
//! at once since Linux 6.11 (Documentation/virt/kvm/api.rst, `KVM_PRE_FAULT_MEMORY`).

use std::io;
use std::ops::Range;

use kvm_bindings::{KVMIO, kvm_pre_fault_memory};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Maps ranges of the guest's addresses, in whole pages. An older KVM leaves them to the guest's first touch, as does one that fails in
/// the middle: so nothing depends on it.
pub fn prefault(cpu: &VcpuFd, ranges: &[Range<u64>]) {
    if let Err(error) = ranges.iter().try_for_each(|range| one(cpu, range)) {
        tracing::debug!(%error, "memory is mapped page by page, as the guest touches it");
    }
}

fn one(cpu: &VcpuFd, range: &Range<u64>) -> io::Result<()> {
    let size = range.end.saturating_sub(range.start);
    let mut left = kvm_pre_fault_memory { gpa: range.start, size, ..Default::default() };
    while left.size > 0 {
        let before = left.size;
        // SAFETY: the request reads and writes this structure; that of the guest's memory which it maps, the machine has already.
        let result = unsafe { ioctl_with_mut_ref(cpu, KVM_PRE_FAULT_MEMORY(), &mut left) };
        match io::Error::last_os_error() {
            _ if result == 0 && left.size < before => {}
            _ if result == 0 => return Err(io::Error::other("KVM got no further")),
            e if e.kind() == io::ErrorKind::Interrupted => {}
            e => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{KVM_CAP_PRE_FAULT_MEMORY, kvm_userspace_memory_region};
    use kvm_ioctls::Kvm;
    use vm_memory::MmapRegion;

    use super::*;

    #[test]
    fn memory_that_a_machine_has_is_mapped_and_any_other_is_not() {
        let pages = MmapRegion::<()>::new(0x10_0000).unwrap();
        let machine = match Kvm::new().and_then(|kvm| kvm.create_vm()) {
            Ok(machine) => machine,
            Err(error) => return eprintln!("skipped: no machine of KVM's: {error}"),
        };
        if machine.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) <= 0 {
            return eprintln!("skipped: this KVM maps no memory before a guest runs");
        }
        let region = kvm_userspace_memory_region {
            guest_phys_addr: 0x10_0000,
            memory_size: 0x10_0000,
            userspace_addr: pages.as_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the pages outlive the machine: what was made first is dropped last.
        unsafe { machine.set_user_memory_region(region) }.unwrap();
        let cpu = machine.create_vcpu(0).unwrap();
        one(&cpu, &(0x10_0000..0x20_0000)).unwrap();
        one(&cpu, &(0x30_0000..0x30_1000)).unwrap_err();
    }
}

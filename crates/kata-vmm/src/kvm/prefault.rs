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

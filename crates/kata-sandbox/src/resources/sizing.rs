//! How large a machine is: a pure function of what the pod was promised, the configuration and the host.
//!
//! A container with a memory limit can use all of it, so the machine has more: what the guest's own programs take
//! (`overhead_memory`) and what its kernel takes for itself ([`kernel_share`]). Limits are not added to the defaults, and each
//! of the two resources is sized on its own.
//!
//! | the pod has | virtual CPUs | memory |
//! |---|---|---|
//! | a limit | the limit + `overhead_vcpus`, rounded up | the limit + `overhead_memory` + the kernel's share |
//! | limits for some containers only | those, and at least the default | those and the default together |
//! | no limit, a request for CPU | the request, and at least `default_vcpus` | `default_memory` |
//! | nothing | `default_vcpus` | `default_memory` |
//! | a limit below what a guest boots with | 1 | the kernel's share is never below what boots |
//! | more than the host has | the host's: more could never run at once | refused |
//! | huge pages (`enable_hugepages`) | | rounded up to whole pages |
//! | more than `default_maxvcpus`, `default_maxmemory` | refused | refused |
//!
//! A machine that grows (`static_sandbox_resource_mgmt = false`) boots with the defaults. Containers without a limit live off
//! those; for the ones with limits it grows to the sum of the limits, plus the defaults where some have none.

use kata_config::Qemu;
use kata_hypervisor::{Growth, Host, Size};

/// What the guest's kernel, its image in memory and the agent take of the smallest machine, in MiB: 62 to 69 were measured with a
/// distribution's kernel 6.1, of which the kernel itself is 34, and its slabs are 16.
const KERNEL_BASE_MIB: u64 = 80;
/// One part of so many of all memory is what the kernel takes to manage it, or sets aside: 157 MiB of 2048, 329 of 6144.
const KERNEL_PART: u64 = 24;
/// One part of a CPU.
const MILLI: u64 = 1000;
const MIB: u64 = 1 << 20;
/// A huge page of the host, unless it was told to have others by default.
const HUGE_PAGE_MIB: u64 = 2;
/// No machine has more memory: QEMU's emulated processor addresses 1 TiB.
const MOST_MIB: u64 = 512 << 10;

/// What somebody may use of the host, together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Limit of CPU time, in thousandths of a CPU.
    pub(crate) cpu_limit: Option<u64>,
    /// CPU time that was requested, in thousandths of a CPU.
    pub(crate) cpu_request: Option<u64>,
    /// Limit of memory, in bytes.
    pub(crate) memory_limit: Option<u64>,
    /// Somebody among them has no CPU limit.
    pub(crate) cpu_open: bool,
    /// Somebody among them has no memory limit.
    pub(crate) memory_open: bool,
}

/// The host does not hold what the pod was promised.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizingError {
    /// Too many CPUs.
    #[error(
        "the pod's CPU limits come to {wanted} virtual CPUs (hypervisor.qemu.overhead_vcpus included), and \
         hypervisor.qemu.default_maxvcpus is {most}: lower the limits, or raise that key"
    )]
    Cpus {
        /// How many the machine would need.
        wanted: u64,
        /// How many it may have.
        most: u64,
    },
    /// Too much memory.
    #[error(
        "the pod's memory limits take a machine of {wanted} MiB (hypervisor.qemu.overhead_memory and {kernel} MiB for its kernel \
         included), and {most} MiB is the most: {reason}; lower the limits{raise}"
    )]
    Memory {
        /// How much the machine would need, in MiB.
        wanted: u64,
        /// Of that, the kernel's.
        kernel: u64,
        /// How much it may have, in MiB.
        most: u64,
        /// Who says so.
        reason: &'static str,
        /// What else can be done.
        raise: &'static str,
    },
}

/// What decides about sizes beside the pod.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds<'a> {
    pub(crate) qemu: &'a Qemu,
    pub(crate) host_cpus: u32,
    /// 0 where the host does not tell.
    pub(crate) host_memory_mib: u64,
}

impl<'a> Bounds<'a> {
    pub(crate) fn new(qemu: &'a Qemu, host: &Host) -> Self {
        Self { qemu, host_cpus: host.cpus.max(1), host_memory_mib: host.memory_mib }
    }

    /// The size that a pod with this demand needs.
    pub(crate) fn size(&self, demand: &Demand) -> Result<Size, SizingError> {
        Ok(Size { vcpus: self.vcpus(demand)?, memory_mib: self.memory(demand)? })
    }

    /// The size without any demand.
    pub(crate) fn default(&self) -> Size {
        Size { vcpus: self.default_vcpus(), memory_mib: self.whole(self.qemu.default_memory) }
    }

    /// How far a machine can grow that boots with the defaults.
    pub(crate) fn growth(&self) -> Growth {
        let (most, _, _) = self.most_memory();
        Growth {
            vcpus: self.most_vcpus(),
            memory_mib: most.max(self.default().memory_mib),
            slots: u32::try_from(self.qemu.memory_slots).unwrap_or(u32::MAX),
        }
    }

    fn default_vcpus(&self) -> u32 {
        self.qemu.vcpus(self.most_vcpus())
    }

    fn most_vcpus(&self) -> u32 {
        let configured = u32::try_from(self.qemu.default_maxvcpus).unwrap_or(u32::MAX);
        if configured == 0 { self.host_cpus } else { configured.min(self.host_cpus) }
    }

    fn vcpus(&self, demand: &Demand) -> Result<u32, SizingError> {
        let most = self.most_vcpus();
        let Some(limit) = demand.cpu_limit else {
            let requested = demand.cpu_request.map_or(0, |milli| milli.div_ceil(MILLI));
            return Ok(self.default_vcpus().max(u32::try_from(requested).unwrap_or(most).min(most)));
        };
        let wanted = limit.saturating_add(milli(self.qemu.overhead_vcpus)).div_ceil(MILLI).max(1);
        // The host's number bounds what can run at once, the configured one what may.
        if self.qemu.default_maxvcpus > 0 && limit.div_ceil(MILLI) > self.qemu.default_maxvcpus {
            return Err(SizingError::Cpus { wanted, most: self.qemu.default_maxvcpus });
        }
        let wanted = u32::try_from(wanted).unwrap_or(most).min(most);
        Ok(if demand.cpu_open { wanted.max(self.default_vcpus()) } else { wanted })
    }

    /// Most memory, who says so, and what can be done about it.
    fn most_memory(&self) -> (u64, &'static str, &'static str) {
        let host = if self.host_memory_mib == 0 { MOST_MIB } else { self.host_memory_mib.min(MOST_MIB) };
        match self.qemu.default_maxmemory {
            0 => (host, "the host has no more", ""),
            most if most > host => (host, "the host has no more", ""),
            most => (most, "hypervisor.qemu.default_maxmemory", ", or raise that key"),
        }
    }

    /// Huge pages are not cut.
    fn whole(&self, mib: u64) -> u64 {
        if self.qemu.enable_hugepages { mib.next_multiple_of(HUGE_PAGE_MIB) } else { mib }
    }

    fn memory(&self, demand: &Demand) -> Result<u64, SizingError> {
        let Some(limit) = demand.memory_limit else { return Ok(self.default().memory_mib) };
        let usable = limit.div_ceil(MIB).saturating_add(self.qemu.overhead_memory);
        let kernel = kernel_share(usable);
        let mut wanted = usable.saturating_add(kernel);
        if demand.memory_open {
            wanted = wanted.saturating_add(self.qemu.default_memory);
        }
        wanted = self.whole(wanted);
        let (most, reason, raise) = self.most_memory();
        if wanted > most {
            return Err(SizingError::Memory { wanted, kernel, most, reason, raise });
        }
        Ok(wanted)
    }
}

/// What the guest's kernel takes of a machine in which `usable` MiB are left to programs, in MiB.
fn kernel_share(usable: u64) -> u64 {
    // With all = usable + base + all / part.
    let rest = usable.saturating_add(KERNEL_BASE_MIB);
    KERNEL_BASE_MIB.saturating_add(rest.div_ceil(KERNEL_PART - 1))
}

/// Thousandths of a number of CPUs from the configuration, which is at most 255.
fn milli(cpus: f64) -> u64 {
    // Rounded in decimal digits, as it was written: there are no numbers between that would matter.
    format!("{:.0}", (cpus * 1000.0).clamp(0.0, 255_000.0)).parse().unwrap_or_default()
}

#[cfg(test)]
mod tests;

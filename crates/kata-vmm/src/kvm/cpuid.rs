//! What CPUs tell the guest that they are: the host's, as KVM passes it on, in this machine's topology (one package, one
//! thread a core).

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;

use super::{KvmError, refused};

/// Leaf 1: features.
const FEATURES: u32 = 1;
/// Leaf 4: caches, with the numbers of those who share them (Intel).
const CACHES: u32 = 4;
/// Leaves 0xb and 0x1f: levels of the topology.
const TOPOLOGY: [u32; 2] = [0xb, 0x1f];
/// Sizes of addresses, and how many cores there are (AMD).
const SIZES: u32 = 0x8000_0008;
/// Number of the core (AMD).
const CORE: u32 = 0x8000_001e;

/// Levels of the topology (AMD).
const EXTENDED_TOPOLOGY: u32 = 0x8000_0026;

const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const MULTI_THREADED: u32 = 1 << 28;
/// Level types of leaf 0xb.
const THREAD_LEVEL: u32 = 1 << 8;
const CORE_LEVEL: u32 = 2 << 8;

/// What KVM can pass on.
pub fn supported(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("say what CPUs it can offer"))
}

/// How many bits a guest's physical addresses have; the 36 of the oldest processors where it is not said.
pub fn address_bits(supported: &CpuId) -> u32 {
    let sizes = supported.as_slice().iter().find(|entry| entry.function == SIZES);
    // A host that backs fewer than it has says so in the third byte.
    sizes.map_or(36, |entry| match entry.eax >> 16 & 0xff {
        0 => entry.eax & 0xff,
        guest => guest.min(entry.eax & 0xff),
    })
}

/// Of a leaf, which bits of EBX are the same whichever CPU is asked; `None` where nothing of it is to be relied on, for it tells which
/// CPU that was, or is set for each CPU by [`of`].
pub fn common(leaf: u32) -> Option<u32> {
    match leaf {
        FEATURES => Some(0xffff),
        CORE | EXTENDED_TOPOLOGY => None,
        leaf if TOPOLOGY.contains(&leaf) => None,
        _ => Some(u32::MAX),
    }
}

/// What CPU `index` of `count` says.
pub fn of(supported: &CpuId, index: u32, count: u32) -> CpuId {
    let mut cpuid = supported.clone();
    // Bits of a CPU's number.
    let bits = count.next_power_of_two().trailing_zeros();
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            FEATURES => {
                entry.ecx |= TSC_DEADLINE | HYPERVISOR;
                entry.ebx = (entry.ebx & 0xffff) | (index & 0xff) << 24 | (count.min(255)) << 16;
                entry.edx = if count > 1 { entry.edx | MULTI_THREADED } else { entry.edx & !MULTI_THREADED };
            }
            // Caches up to the second level are a core's own; the third is the package's.
            CACHES if entry.eax & 0x1f != 0 => {
                let shared = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                entry.eax = (entry.eax & 0x3fff) | (shared & 0xfff) << 14 | ((count - 1) & 0x3f) << 26;
            }
            leaf if TOPOLOGY.contains(&leaf) => {
                let (shift, here, kind) = match entry.index {
                    0 => (0, 1, THREAD_LEVEL),
                    1 => (bits, count, CORE_LEVEL),
                    _ => (0, 0, 0),
                };
                entry.eax = shift;
                entry.ebx = here;
                entry.ecx = kind | entry.index;
                entry.edx = index;
            }
            SIZES => entry.ecx = (count - 1) & 0xff | bits << 12,
            CORE => {
                entry.eax = index;
                entry.ebx = index & 0xff;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    cpuid
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: 0, ebx: 0, ecx: 0, edx: 0, ..Default::default() }
    }

    fn find(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        *cpuid.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_cpu_has_its_own_number_in_every_leaf_that_tells_it() {
        let supported = CpuId::from_entries(&[
            entry(1, 0),
            entry(0xb, 0),
            entry(0xb, 1),
            entry(0xb, 2),
            entry(SIZES, 0),
            entry(CORE, 0),
        ])
        .unwrap();
        for index in 0..3 {
            let cpuid = of(&supported, index, 3);
            assert_eq!(find(&cpuid, 1, 0).ebx >> 24, index);
            assert_eq!(find(&cpuid, 1, 0).ebx >> 16 & 0xff, 3);
            assert_eq!(find(&cpuid, 0xb, 0).edx, index);
            assert_eq!((find(&cpuid, 0xb, 1).eax, find(&cpuid, 0xb, 1).ebx), (2, 3));
            assert_eq!(find(&cpuid, 0xb, 2).ecx >> 8, 0, "no third level");
            assert_eq!(find(&cpuid, SIZES, 0).ecx, 2 | 2 << 12);
            assert_eq!(find(&cpuid, CORE, 0).eax, index);
        }
    }

    #[test]
    fn guest_is_told_of_the_hypervisor_and_of_timers_that_need_no_calibration() {
        let cpuid = of(&CpuId::from_entries(&[entry(1, 0)]).unwrap(), 0, 1);
        assert_eq!(find(&cpuid, 1, 0).ecx, TSC_DEADLINE | HYPERVISOR);
    }
}

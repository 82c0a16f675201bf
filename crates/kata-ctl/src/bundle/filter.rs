//! The seccomp profile of containers: everything is allowed but what no container needs and attackers do.
//!
//! Docker's profile lists what is allowed, several hundred calls long. Here the guest's kernel is the pod's own, behind a
//! virtual machine, so the profile is a second line only: it closes calls that change the kernel itself (modules, kexec,
//! BPF, clocks), reach other processes' keys and memory faults, or make namespaces. What the capability set already
//! forbids (mount, reboot, …) is left to it.

use serde_json::{Value, json};

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// Refused with EPERM.
const REFUSED: [&str; 39] = [
    "acct",
    "add_key",
    "bpf",
    "clock_adjtime",
    "clock_settime",
    "create_module",
    "delete_module",
    "finit_module",
    "fsconfig",
    "fsmount",
    "fsopen",
    "fspick",
    "get_kernel_syms",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kexec_file_load",
    "kexec_load",
    "keyctl",
    "lookup_dcookie",
    "mount_setattr",
    "move_mount",
    "nfsservctl",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "query_module",
    "quotactl",
    "request_key",
    "setns",
    "settimeofday",
    "swapoff",
    "swapon",
    "sysfs",
    "unshare",
    "userfaultfd",
];

/// `CLONE_NEWNS`, `_NEWCGROUP`, `_NEWUTS`, `_NEWIPC`, `_NEWUSER`, `_NEWPID`, `_NEWNET`: each alone is enough to refuse.
const NEW_NAMESPACE: [u32; 7] =
    [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];

/// The profile, as `linux.seccomp` of the runtime specification.
pub fn profile() -> Value {
    let architecture = match std::env::consts::ARCH {
        "aarch64" => "SCMP_ARCH_AARCH64",
        "riscv64" => "SCMP_ARCH_RISCV64",
        _ => "SCMP_ARCH_X86_64",
    };
    let refuse =
        |names: &[&str], errno: u32| json!({ "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno });
    // clone3 passes its flags in memory, where a filter cannot look: C libraries fall back to clone on ENOSYS.
    let mut rules = vec![refuse(&REFUSED, EPERM), refuse(&["clone3"], ENOSYS)];
    rules.extend(NEW_NAMESPACE.map(|flag| {
        json!({
            "names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": EPERM,
            "args": [{ "index": 0, "value": flag, "valueTwo": flag, "op": "SCMP_CMP_MASKED_EQ" }],
        })
    }));
    json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": [architecture], "syscalls": rules })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_is_one_of_the_runtime_specification() {
        let parsed: oci_spec::runtime::LinuxSeccomp = serde_json::from_value(profile()).unwrap();
        let rules = parsed.syscalls().as_ref().unwrap();
        assert!(rules.iter().all(|rule| rule.errno_ret().is_some()));
        assert_eq!(rules.len(), 2 + NEW_NAMESPACE.len());
    }

    #[test]
    fn refused_calls_are_sorted_and_unique() {
        assert!(REFUSED.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn ordinary_calls_are_not_refused() {
        for name in ["clone", "execve", "mount", "ptrace", "socket", "openat2", "chroot"] {
            assert!(!REFUSED.contains(&name), "{name}");
        }
    }
}

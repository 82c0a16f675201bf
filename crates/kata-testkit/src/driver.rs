//! Which driver runs the pods under test: `KATA_TEST_HYPERVISOR`, else the one that a host as this takes by itself.

/// A driver that the whole suite runs with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The built-in monitor, where there is KVM.
    Builtin,
    /// QEMU.
    Qemu,
}

impl Driver {
    /// The one of this run.
    pub fn under_test() -> Self {
        match std::env::var("KATA_TEST_HYPERVISOR").as_deref() {
            Ok("builtin") => Self::Builtin,
            Ok("qemu") => Self::Qemu,
            Ok(other) => panic!("KATA_TEST_HYPERVISOR is {other:?}, and neither builtin nor qemu"),
            Err(_) if kvm_works() => Self::Builtin,
            Err(_) => Self::Qemu,
        }
    }

    /// As `hypervisor_name` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Builtin => "builtin",
            Self::Qemu => "qemu",
        }
    }

    /// What errors and records call the machine's process.
    pub fn process(self) -> &'static str {
        match self {
            Self::Builtin => "kata-vmm",
            Self::Qemu => "qemu",
        }
    }

    /// Begin of its program's name, as [`crate::host::Host::pids_of`] wants it.
    pub fn program(self) -> &'static str {
        match self {
            Self::Builtin => "kata-vmm",
            Self::Qemu => "qemu-system",
        }
    }

    /// Whether the vsock device is a process of its own; says (and counts) if a test for that has nothing to look at.
    pub fn has_vsock_process(self) -> bool {
        if self == Self::Builtin {
            crate::skip("the built-in monitor has its vsock device in itself");
        }
        self == Self::Qemu
    }
}

/// The rule of the product: a device that opens, on a processor that shows hardware virtualisation.
fn kvm_works() -> bool {
    let opens = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    opens && cpuinfo.split_whitespace().any(|word| matches!(word, "vmx" | "svm"))
}

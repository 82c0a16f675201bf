//! What the host has of hardware that keeps a machine's memory from it.

use std::path::Path;

use kata_config::Tee;
use serde::{Deserialize, Serialize};

/// Whether KVM makes such machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Support {
    /// It does.
    Present,
    /// It does not.
    Absent {
        /// What is missing, and what to do.
        reason: String,
    },
}

/// Each of the kinds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tees {
    /// AMD's SEV-SNP.
    pub sev_snp: Support,
    /// Intel's TDX.
    pub tdx: Support,
}

impl Tees {
    /// What is there of `tee`.
    pub fn of(&self, tee: Tee) -> &Support {
        match tee {
            Tee::SevSnp => &self.sev_snp,
            Tee::Tdx => &self.tdx,
        }
    }

    /// Reads what KVM's modules say (kernel, arch/x86/kvm: parameters `sev_snp` of kvm_amd, `tdx` of kvm_intel). They say yes only
    /// where the firmware and the processor do.
    pub(super) fn probe(root: &Path) -> Self {
        let says_yes = |parameter: &str| {
            let text = std::fs::read_to_string(root.join("sys/module").join(parameter)).unwrap_or_default();
            matches!(text.trim(), "Y" | "1")
        };
        let sev_snp = match (says_yes("kvm_amd/parameters/sev_snp"), root.join("dev/sev").exists()) {
            (true, true) => Support::Present,
            (true, false) => absent("there is no /dev/sev; load the module ccp"),
            (false, _) => absent(
                "/sys/module/kvm_amd/parameters/sev_snp does not say Y; use a host with an EPYC of the third generation or later, switch \
                 SEV-SNP on in its firmware, and run Linux 6.11 or later",
            ),
        };
        let tdx = match says_yes("kvm_intel/parameters/tdx") {
            true => Support::Present,
            false => absent(
                "/sys/module/kvm_intel/parameters/tdx does not say Y; use a host with a Xeon that has TDX, switch it on in its firmware, \
                 and load kvm_intel with tdx=1 on Linux 6.16 or later",
            ),
        };
        Self { sev_snp, tdx }
    }
}

fn absent(reason: &str) -> Support {
    Support::Absent { reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_is_there_where_the_modules_and_the_device_say_so() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let reason = |support: Support| match support {
            Support::Absent { reason } => reason,
            Support::Present => "present".to_owned(),
        };
        let none = Tees::probe(root.path());
        assert!(reason(none.sev_snp).starts_with("/sys/module/kvm_amd/parameters/sev_snp does not say Y"));
        assert!(reason(none.tdx).starts_with("/sys/module/kvm_intel/parameters/tdx does not say Y"));
        write("sys/module/kvm_amd/parameters/sev_snp", "Y\n");
        write("sys/module/kvm_intel/parameters/tdx", "N\n");
        let half = Tees::probe(root.path());
        assert_eq!(reason(half.sev_snp), "there is no /dev/sev; load the module ccp");
        assert!(reason(half.tdx).contains("does not say Y"));
        write("dev/sev", "");
        write("sys/module/kvm_intel/parameters/tdx", "1\n");
        assert_eq!(Tees::probe(root.path()), Tees { sev_snp: Support::Present, tdx: Support::Present });
    }
}

//! What goes together with a machine whose memory the host cannot read.

use crate::{Config, MachineType, SharedFs};

const GUEST: &str = "hypervisor.qemu.confidential_guest";

/// The key that something else speaks against, and what to do.
pub(super) fn unfit(config: &Config) -> Option<(&'static str, String)> {
    let qemu = &config.hypervisor.qemu;
    if !qemu.confidential_guest {
        let alone = "asks for a confidential guest, which it is not by itself; set hypervisor.qemu.confidential_guest to true";
        return qemu.sev_snp_guest.then(|| ("hypervisor.qemu.sev_snp_guest", alone.to_owned()));
    }
    let against = [
        (
            qemu.shared_fs != SharedFs::None,
            "excludes shared files, which the host would read and write; set hypervisor.qemu.shared_fs to \"none\"",
        ),
        (
            qemu.machine_type != MachineType::Q35,
            "needs the machine q35; set hypervisor.qemu.machine_type to \"q35\"",
        ),
        (
            qemu.firmware.is_none(),
            "needs firmware that is built for such guests (of OVMF: AmdSev for SEV-SNP, IntelTdx for TDX); set hypervisor.qemu.firmware",
        ),
        (
            !config.runtime.static_sandbox_resource_mgmt,
            "excludes memory and processors that are added later; set runtime.static_sandbox_resource_mgmt to true",
        ),
        (
            qemu.reclaim_guest_freed_memory,
            "excludes giving memory back to the host; set hypervisor.qemu.reclaim_guest_freed_memory to false",
        ),
        (
            qemu.enable_hugepages,
            "excludes huge pages set aside by the host, which hold no private memory; set hypervisor.qemu.enable_hugepages to false",
        ),
    ];
    against.iter().find(|(wrong, _)| *wrong).map(|(_, why)| (GUEST, (*why).to_owned()))
}

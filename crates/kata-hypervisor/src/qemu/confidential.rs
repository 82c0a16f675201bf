//! Machines of QEMU's whose memory the host cannot read.
//!
//! | | SEV-SNP | TDX |
//! |---|---|---|
//! | object | `sev-snp-guest`, QEMU 9.1 and later | `tdx-guest`, QEMU 10.1 and later |
//! | measured | firmware, and by `kernel-hashes` kernel, initrd and command line; each processor's first state | firmware; the rest by it |
//! | digest of initdata | `host-data` | `mrconfigid` |
//! | processor | `EPYC-v4`, which is measured and thus the same everywhere | the host's |
//!
//! QEMU itself puts private pages into guest_memfd beside the shared memory of `memory-backend-memfd`, and has virtio devices use
//! what the guest shares with them alone (`iommu_platform`). None of it was tried on such hardware.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::files::with_device;
use crate::host::QemuVersion;
use crate::process::Identity;
use crate::vm::{Accelerator, Confidential, ConfidentialKind, HypervisorError, Machine, VmSpec};

/// Type of SEV-SNP's object.
const SNP: &str = "sev-snp-guest";
/// Name of the object.
const ID: &str = "tee";
/// What the machine has to be told. Such guests have no mode that the firmware hides in, and the hypervisor's interrupt controller
/// must not read their memory.
pub(super) const MACHINE: &str = ",confidential-guest-support=tee,kernel-irqchip=split,smm=off";
/// Bytes of SEV-SNP's ID block and of its authentication (SEV Secure Nested Paging Firmware ABI, 8.18).
const ID_BLOCK: usize = 96;
const ID_AUTH: usize = 4096;
/// Context id of the host on vsock.
const HOST_CID: &str = "2";
/// Where the service that signs TDX's reports listens otherwise.
const QUOTE_SOCKET: &str = "/var/run/tdx-qgs/qgs.socket";
/// The processor of SEV-SNP's guests: its signature is part of what is measured.
pub(crate) const SNP_CPU: &str = "EPYC-v4";

/// Refuses what makes no such machine, and whatever QEMU's own refusal would not explain.
pub(super) fn check(spec: &VmSpec) -> Result<(), HypervisorError> {
    let Some(confidential) = &spec.confidential else { return Ok(()) };
    let reason = match spec {
        VmSpec { accelerator: Accelerator::Tcg, .. } => "memory that the host cannot read cannot be emulated",
        VmSpec { machine: Machine::Microvm, .. } => {
            "a guest whose memory the host cannot read needs the machine q35; set hypervisor.qemu.machine_type"
        }
        VmSpec { firmware: None, .. } => {
            "a guest whose memory the host cannot read needs firmware that is built for it; set hypervisor.qemu.firmware"
        }
        VmSpec { shared_fs: Some(_), .. } => {
            "a guest whose memory the host cannot read shares no files with it; set hypervisor.qemu.shared_fs to \"none\""
        }
        VmSpec { growth: Some(_), .. } => {
            "a guest whose memory the host cannot read does not grow; set runtime.static_sandbox_resource_mgmt to true"
        }
        _ => match fault(confidential) {
            Some(reason) => reason,
            None => return Ok(()),
        },
    };
    Err(HypervisorError::InvalidSpec { id: spec.id.clone(), reason: reason.to_owned() })
}

fn fault(Confidential { kind, host_data }: &Confidential) -> Option<&'static str> {
    let sized =
        |text: &str, size| text.is_empty() || STANDARD.decode(text).is_ok_and(|bytes| bytes.len() == size);
    if host_data.as_ref().is_some_and(|data| data.len() != kind.host_data_size()) {
        return Some("its host data is not of the size that the hardware's report has for it");
    }
    match kind {
        ConfidentialKind::SevSnp { id_block, .. } if !sized(id_block, ID_BLOCK) => {
            Some("hypervisor.qemu.snp_id_block is not base64 of 96 bytes")
        }
        ConfidentialKind::SevSnp { id_auth, .. } if !sized(id_auth, ID_AUTH) => {
            Some("hypervisor.qemu.snp_id_auth is not base64 of 4096 bytes")
        }
        ConfidentialKind::SevSnp { id_block, id_auth, .. } if id_block.is_empty() != id_auth.is_empty() => {
            Some("of hypervisor.qemu.snp_id_block and snp_id_auth there is one without the other")
        }
        _ => None,
    }
}

/// Refuses a QEMU that knows no such machine: it would call the object's name wrong, and nothing else.
pub(super) fn check_version(program: &Path, confidential: &Confidential) -> Result<(), HypervisorError> {
    // One whose version cannot be told tells itself what it lacks.
    let Ok(version) = QemuVersion::probe(program) else { return Ok(()) };
    let (operation, least, next) = match confidential.kind {
        ConfidentialKind::SevSnp { .. } => {
            ("SEV-SNP", QemuVersion { major: 9, minor: 1 }, "install QEMU 9.1 or later")
        }
        ConfidentialKind::Tdx { .. } => {
            ("TDX", QemuVersion { major: 10, minor: 1 }, "install QEMU 10.1 or later")
        }
    };
    if version >= least {
        Ok(())
    } else {
        Err(HypervisorError::unsupported(operation, &format!("QEMU {version}"), next))
    }
}

/// Refuses a kernel that the firmware is not told of: QEMU starts a bare ELF past it, and neither measures it nor boots it then.
pub(super) fn check_kernel(spec: &VmSpec) -> Result<(), HypervisorError> {
    /// Where a bzImage says that it is one (Linux, x86 boot protocol).
    const MAGIC: (u64, [u8; 4]) = (0x202, *b"HdrS");
    let fault = |source| HypervisorError::File { what: "guest kernel", path: spec.kernel.clone(), source };
    let mut found = [0; 4];
    let file = File::open(&spec.kernel).map_err(fault)?;
    match file.read_exact_at(&mut found, MAGIC.0) {
        Ok(()) if found == MAGIC.1 => Ok(()),
        Err(error) if error.kind() != std::io::ErrorKind::UnexpectedEof => Err(fault(error)),
        _ => Err(HypervisorError::InvalidSpec {
            id: spec.id.clone(),
            reason: format!(
                "the guest kernel {} is no bzImage, and firmware boots and measures nothing else; set hypervisor.qemu.kernel to one",
                spec.kernel.display()
            ),
        }),
    }
}

/// `identity` with what lets it open the hardware's device; TDX has none.
pub(super) fn with_hardware(
    identity: Identity,
    confidential: &Confidential,
) -> Result<Identity, HypervisorError> {
    match confidential.kind {
        ConfidentialKind::SevSnp { .. } => with_device(&identity, Path::new("/dev/sev")),
        ConfidentialKind::Tdx { .. } => Ok(identity),
    }
}

/// The object, as `-object` takes it in JSON. `c_bit` is the bit of an address that says "encrypted", see [`c_bit`].
pub(super) fn object(Confidential { kind, host_data }: &Confidential, c_bit: u32) -> Value {
    let host_data = host_data.as_ref().map(|data| STANDARD.encode(data));
    match kind {
        ConfidentialKind::SevSnp { policy, id_block, id_auth } => {
            let mut object = json!({
                "qom-type": SNP,
                "id": ID,
                "cbitpos": c_bit,
                "reduced-phys-bits": 1,
                "policy": policy,
                "kernel-hashes": true,
            });
            add(&mut object, "host-data", host_data);
            add(&mut object, "id-block", Some(id_block.clone()).filter(|text| !text.is_empty()));
            add(&mut object, "id-auth", Some(id_auth.clone()).filter(|text| !text.is_empty()));
            object
        }
        ConfidentialKind::Tdx { quote_port } => {
            let socket = match quote_port {
                0 => json!({ "type": "unix", "path": QUOTE_SOCKET }),
                port => json!({ "type": "vsock", "cid": HOST_CID, "port": port.to_string() }),
            };
            let mut object = json!({ "qom-type": "tdx-guest", "id": ID, "quote-generation-socket": socket });
            add(&mut object, "mrconfigid", host_data);
            object
        }
    }
}

fn add(object: &mut Value, key: &str, value: Option<String>) {
    if let (Some(fields), Some(value)) = (object.as_object_mut(), value) {
        fields.insert(key.to_owned(), value.into());
    }
}

/// The processor that the guest sees.
pub(super) fn cpu(object: Option<&Value>) -> &'static str {
    let kind = object.and_then(|object| object.get("qom-type")).and_then(Value::as_str);
    if kind == Some(SNP) { SNP_CPU } else { "host" }
}

/// Position of the bit of an address that says "encrypted", as the host's processor has it (AMD64 Architecture Programmer's Manual,
/// volume 3, CPUID Fn8000_001F EBX); 51 where it has none.
pub(super) fn c_bit() -> u32 {
    const USUAL: u32 = 51;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::__cpuid;
        const LARGEST: u32 = 0x8000_0000;
        const ENCRYPTION: u32 = 0x8000_001f;
        if __cpuid(LARGEST).eax >= ENCRYPTION {
            let found = __cpuid(ENCRYPTION).ebx & 0x3f;
            return if found == 0 { USUAL } else { found };
        }
    }
    USUAL
}

#[cfg(test)]
mod tests;

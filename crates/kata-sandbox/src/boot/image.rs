//! What a machine boots, as the configuration or the guest image has it. None of it is a pod's own.

use std::num::NonZeroU64;
use std::path::PathBuf;

use kata_config::{Artefacts, Config, MachineType, Tee};
use kata_hypervisor::{Confidential, ConfidentialKind, DiskLimits, Machine, Nic, Size, VmSpec};
use kata_image::manifest::Manifest;
use serde::Serialize;

use super::BootError;
use crate::initdata::PodInitdata;
use crate::lifecycle::Pod;

/// What the machine boots.
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    pub(crate) image: Option<PathBuf>,
    root_type: Option<String>,
    /// Whether its agent announces itself.
    pub(super) announces: bool,
}

impl Guest {
    /// The configuration's own files, else those of the guest image.
    pub(crate) fn find(config: &Config, artefacts: &Artefacts) -> Result<Self, BootError> {
        let qemu = &config.hypervisor.qemu;
        let manifest = artefacts.guest_image.as_deref().map(Manifest::load).transpose()?;
        let manifest = manifest.as_ref();
        let kernel = qemu.kernel.clone().or_else(|| manifest.map(Manifest::kernel_path));
        let own_root = qemu.initrd.is_some() || qemu.image.is_some();
        let of_image = manifest.filter(|_| !own_root);
        let initrd = qemu.initrd.clone().or_else(|| of_image.and_then(Manifest::initrd_path));
        let image = qemu.image.clone().or_else(|| of_image.and_then(Manifest::image_path));
        if initrd.is_none() && image.is_none() {
            return Err(BootError::NoImage("initrd"));
        }
        Ok(Self {
            kernel: kernel.ok_or(BootError::NoImage("kernel"))?,
            initrd,
            image,
            root_type: of_image.and_then(|manifest| Some(manifest.image.as_ref()?.fstype.clone())),
            // An agent that nobody vouches for is dialled, and may still announce itself first.
            announces: of_image.is_some_and(|manifest| manifest.agent.announces),
        })
    }

    pub(super) fn vm_spec(
        &self,
        pod: &Pod,
        size: Size,
        shared_fs: Option<kata_hypervisor::SharedFs>,
        nics: Vec<Nic>,
    ) -> VmSpec {
        let qemu = &pod.config.hypervisor.qemu;
        VmSpec {
            id: pod.id.clone(),
            run_dir: pod.run_dir.clone(),
            program: pod.artefacts.vmm.clone(),
            vsock_program: pod.artefacts.kata_vmm.clone(),
            machine: match qemu.machine_type {
                MachineType::Q35 => Machine::Q35,
                MachineType::Microvm => Machine::Microvm,
            },
            accelerator: pod.choice.accelerator,
            kernel_params: self.kernel_params(&pod.config),
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            firmware: qemu.firmware.clone(),
            confidential: confidential(qemu, pod.initdata.as_ref()),
            image: self.image.clone(),
            disks: pod.initdata.iter().map(PodInitdata::disk).collect(),
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            growth: pod.resources.growth(),
            backing: pod.resources.backing(),
            vsock: pod.hybrid.clone(),
            shared_fs,
            nics,
            host_devices: Vec::new(),
            disk_limits: disk_limits(qemu),
            identity: pod.identity.clone(),
            seccomp_sandbox: qemu.seccomp_sandbox.clone(),
            template: None,
        }
    }

    /// Ours first: of a parameter that is given twice, the kernel takes the later one, which is the user's.
    pub(crate) fn kernel_params(&self, config: &Config) -> Vec<String> {
        let (qemu, agent) = (&config.hypervisor.qemu, &config.agent.kata);
        // Distributions' kernels test all their ciphers at each boot, which mainline does not, and a machine of seconds need not.
        // A kernel that has lost a process in a fault goes on, and whoever waits for that process waits for ever: it shall end.
        let own = ["console=ttyS0", "panic=1", "oops=panic", "reboot=k", "cryptomgr.notests"];
        let mut params: Vec<String> = own.map(str::to_owned).to_vec();
        if !qemu.enable_debug {
            params.push("quiet".to_owned());
        }
        if self.image.is_some() {
            params.extend(["root=/dev/vda", "ro"].map(str::to_owned));
            params.extend(self.root_type.as_ref().map(|fs| format!("rootfstype={fs}")));
        }
        if agent.enable_debug {
            params.push("agent.log=debug".to_owned());
        }
        if agent.debug_console_enabled {
            params.push("agent.debug_console".to_owned());
        }
        params.extend(qemu.kernel_params.iter().cloned());
        params
    }
}

/// What a confidential machine of a configuration is started with, as far as it is measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Measured {
    /// What keeps its memory from the host: `SEV-SNP`, `TDX`; `None` where the host can read it.
    pub tee: Option<String>,
    /// Its firmware.
    pub firmware: Option<PathBuf>,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// Its initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    pub command_line: String,
    /// Processors of a pod without a limit; `None` where it gets all of its host's.
    pub vcpus: Option<u32>,
    /// Their model, where that is measured.
    pub cpu: Option<&'static str>,
}

/// What pods under `config` are started with. Nothing is asked of this host but its files.
///
/// # Errors
/// It cannot be found out what pods boot.
pub fn measured(config: &Config, artefacts: &Artefacts) -> Result<Measured, BootError> {
    let (guest, qemu) = (Guest::find(config, artefacts)?, &config.hypervisor.qemu);
    Ok(Measured {
        tee: qemu.tee().map(|tee| tee.to_string()),
        firmware: qemu.firmware.clone(),
        command_line: kata_hypervisor::measured_command_line(&guest.kernel_params(config)),
        kernel: guest.kernel,
        initrd: guest.initrd,
        vcpus: (qemu.default_vcpus >= 0.0).then(|| qemu.vcpus(u32::MAX)),
        cpu: (qemu.tee() == Some(Tee::SevSnp)).then_some(kata_hypervisor::SNP_CPU),
    })
}

/// What keeps the machine's memory from the host, bound to the pod's initdata.
fn confidential(qemu: &kata_config::Qemu, initdata: Option<&PodInitdata>) -> Option<Confidential> {
    let kind = match qemu.tee()? {
        Tee::SevSnp => ConfidentialKind::SevSnp {
            policy: qemu.snp_guest_policy,
            id_block: qemu.snp_id_block.clone(),
            id_auth: qemu.snp_id_auth.clone(),
        },
        Tee::Tdx => ConfidentialKind::Tdx {
            // The configuration has been held to this range.
            quote_port: u32::try_from(qemu.tdx_quote_generation_service_socket_port).unwrap_or_default(),
        },
    };
    let host_data = initdata.map(|initdata| initdata.host_data(kind.host_data_size()));
    Some(Confidential { kind, host_data })
}

/// What the configuration holds each disk to. It counts bits; so that a bound never becomes none, bytes round up.
fn disk_limits(config: &kata_config::Qemu) -> DiskLimits {
    DiskLimits {
        bytes_per_second: NonZeroU64::new(config.disk_rate_limiter_bw_max_rate.div_ceil(8)),
        requests_per_second: NonZeroU64::new(config.disk_rate_limiter_ops_max_rate),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bound_of_a_disk_is_counted_in_bytes_and_never_becomes_none() {
        let limits = |bits, operations| {
            let config = kata_config::Qemu {
                disk_rate_limiter_bw_max_rate: bits,
                disk_rate_limiter_ops_max_rate: operations,
                ..kata_config::Qemu::default()
            };
            let DiskLimits { bytes_per_second, requests_per_second } = disk_limits(&config);
            (bytes_per_second.map_or(0, NonZeroU64::get), requests_per_second.map_or(0, NonZeroU64::get))
        };
        assert_eq!(limits(0, 0), (0, 0));
        assert_eq!(limits(80_000_000, 100), (10_000_000, 100));
        assert_eq!(limits(1, 1), (1, 1));
    }
}

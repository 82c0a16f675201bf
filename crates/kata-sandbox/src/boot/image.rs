//! What a machine boots, as the configuration or the guest image has it. None of it is a pod's own.
//!
//! ```text
//!   lean        kernel, initrd
//!   services    kernel, initrd, disk `root`, disks `extension-<name>`     each disk with its dm-verity parameters on the command line
//!   plain disk  kernel, image as the first disk, mounted by the kernel    the configuration's own
//! ```

use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use kata_config::{Artefacts, Config, ExtensionImage, MachineType, Tee};
use kata_hypervisor::{Confidential, ConfidentialKind, Disk, DiskLimits, Machine, Nic, Size, VmSpec};
use kata_image::manifest::{DiskImage, Manifest, ManifestError, Need, Verity, capability};
use serde::Serialize;

use super::BootError;
use crate::initdata::PodInitdata;
use crate::lifecycle::Pod;

/// The disk with the guest's root: its serial number, and its name on the command line.
const ROOT: &str = "root";
/// What the serial numbers of extensions' disks begin with.
const EXTENSION: &str = "extension";
const EXTENSIONS_KEY: &str = "hypervisor.qemu.guest_extension_images";

/// What the machine boots.
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: Option<PathBuf>,
    /// A disk that the kernel mounts as the root.
    pub(crate) image: Option<PathBuf>,
    /// Disks that the guest finds by their serial numbers.
    pub(crate) disks: Vec<Disk>,
    /// What they are verified against.
    disk_params: Vec<String>,
    root_type: Option<String>,
    /// The guest image whose root this is.
    manifest: Option<Manifest>,
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
        let of_image = manifest.filter(|_| !is_own_root(config, artefacts));
        let disk = of_image.and_then(|manifest| manifest.image.as_ref());
        let initrd = qemu.initrd.clone().or_else(|| of_image.and_then(Manifest::initrd_path));
        let mut guest = Self {
            kernel: kernel.ok_or(BootError::NoImage("kernel"))?,
            initrd,
            image: own_image(config, artefacts).map(Path::to_owned),
            disks: Vec::new(),
            disk_params: Vec::new(),
            root_type: disk.map(|disk| disk.fstype.clone()),
            // An agent that nobody vouches for is dialled, and may still announce itself first.
            announces: of_image.is_some_and(|manifest| manifest.agent.announces),
            manifest: of_image.cloned(),
        };
        match (disk, of_image.and_then(Manifest::image_path)) {
            (Some(DiskImage { verity: Some(verity), .. }), Some(path)) => {
                guest.verified(ROOT.into(), path, verity)
            }
            (_, path) => guest.image = guest.image.or(path),
        }
        if guest.initrd.is_none() && guest.image.is_none() {
            return Err(BootError::NoImage("initrd"));
        }
        guest.extend(&qemu.guest_extension_images, of_image)?;
        Ok(guest)
    }

    /// Adds extension images. An image that the configuration names file by file is taken to know what to do with them.
    fn extend(&mut self, images: &[ExtensionImage], manifest: Option<&Manifest>) -> Result<(), BootError> {
        if let (Some(manifest), false) = (manifest, images.is_empty()) {
            manifest.require(Need::new(capability::EXTENSIONS, EXTENSIONS_KEY))?;
        }
        for image in images {
            let verity = image
                .verity_params
                .parse::<Verity>()
                .map_err(|source| BootError::Extension { name: image.name.clone(), source })?;
            self.verified(format!("{EXTENSION}-{}", image.name), image.path.clone(), &verity);
        }
        Ok(())
    }

    /// Adds the disk `id`, a name of parts with dashes where the command line has dots.
    fn verified(&mut self, id: String, path: PathBuf, verity: &Verity) {
        let name = id.replacen('-', ".", 1);
        self.disk_params.push(format!("kata.{name}.verity_params={verity}"));
        self.disks.push(Disk { id, path, readonly: true });
    }

    /// Whether the guest image is still what it was when it was built. It is read whole: for those who look for a reason.
    pub(super) fn verify(&self) -> Result<(), ManifestError> {
        self.manifest.as_ref().map_or(Ok(()), Manifest::verify)
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
            disks: self.disks.iter().cloned().chain(pod.initdata.iter().map(PodInitdata::disk)).collect(),
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
        params.extend(self.disk_params.iter().cloned());
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

/// What the guest image can do; `None` where the root is files of the configuration's own.
pub(crate) fn manifest(config: &Config, artefacts: &Artefacts) -> Result<Option<Manifest>, ManifestError> {
    let dir = artefacts.guest_image.as_deref().filter(|_| !is_own_root(config, artefacts));
    dir.map(Manifest::load).transpose()
}

/// Whether the root is files that the configuration names itself, for which no manifest speaks.
fn is_own_root(config: &Config, artefacts: &Artefacts) -> bool {
    config.hypervisor.qemu.initrd.is_some() || own_image(config, artefacts).is_some()
}

/// A root disk of the configuration's own; a directory was found to be a guest image already.
fn own_image<'a>(config: &'a Config, artefacts: &Artefacts) -> Option<&'a Path> {
    let image = config.hypervisor.qemu.image.as_deref();
    image.filter(|image| artefacts.guest_image.as_deref() != Some(image))
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
mod tests;

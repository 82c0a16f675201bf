//! What this host can run virtual machines with, and the choice that follows from it.
//!
//! A `/dev/kvm` that opens proves little: a host without vmx or svm may offer one that is emulated in software and does not
//! get through a stock kernel's boot. The CPU flags decide.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use kata_config::{AcceleratorChoice, Config, HypervisorChoice, MachineType, Tee};
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use tee::{Support, Tees};

use crate::vm::Accelerator;

mod tee;

/// The version of KVM's interface that every kernel since 2.6.22 speaks (kernel documentation, virt/kvm/api, 4.1).
const KVM_API_VERSION: i32 = 12;
/// `KVM_GET_API_VERSION`, `_IO(0xAE, 0x00)`.
const KVM_GET_API_VERSION: libc::Ioctl = 0xAE00;

/// The drivers there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DriverKind {
    /// This project's own, `kata-vmm`.
    Builtin,
    /// `qemu-system-*`.
    Qemu,
    /// `cloud-hypervisor`.
    CloudHypervisor,
    /// `firecracker`.
    Firecracker,
}

impl fmt::Display for DriverKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Builtin => "builtin",
            Self::Qemu => "qemu",
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
        })
    }
}

impl From<DriverKind> for HypervisorChoice {
    fn from(driver: DriverKind) -> Self {
        match driver {
            DriverKind::Builtin => Self::Builtin,
            DriverKind::Qemu => Self::Qemu,
            DriverKind::CloudHypervisor => Self::CloudHypervisor,
            DriverKind::Firecracker => Self::Firecracker,
        }
    }
}

impl DriverKind {
    /// Whether the host's kernel can move the packets of its network interfaces, see [`Nic::vhost`](crate::Nic::vhost).
    pub const fn takes_vhost(self) -> bool {
        match self {
            Self::Builtin | Self::Qemu => true,
            Self::CloudHypervisor | Self::Firecracker => false,
        }
    }
}

/// What `/dev/kvm` is good for. Its `Display` completes the sentence "KVM …".
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Kvm {
    /// There is no `/dev/kvm`.
    Absent,
    /// `/dev/kvm` cannot be opened by this user.
    NoAccess {
        /// The operating system's reason.
        reason: String,
    },
    /// `/dev/kvm` opens, but the CPU shows neither vmx nor svm: an emulation that does not boot stock kernels.
    SoftwareOnly,
    /// `/dev/kvm` opens and does not speak KVM's stable interface.
    WrongVersion {
        /// What `KVM_GET_API_VERSION` answered; negative where it failed.
        version: i32,
    },
    /// Hardware virtualisation can be used.
    Usable,
}

impl Kvm {
    /// What somebody who wants KVM has to do; `None` where it is usable.
    pub fn next_step(&self) -> Option<&'static str> {
        match self {
            Self::Absent => Some(
                "load the module kvm_intel or kvm_amd, switch virtualisation on in the firmware, or, in a virtual machine, have nested \
                 virtualisation switched on",
            ),
            Self::NoAccess { .. } => Some("run as root, or add the user to the group that owns /dev/kvm"),
            Self::SoftwareOnly => Some(
                "use a machine with hardware virtualisation, or nested virtualisation that shows vmx or svm",
            ),
            Self::WrongVersion { .. } => {
                Some("see whether /dev/kvm is really KVM's device (character device 10:232)")
            }
            Self::Usable => None,
        }
    }

    fn probe(device: &Path, cpuinfo: &str) -> Self {
        let file = match OpenOptions::new().read(true).write(true).open(device) {
            Ok(file) => file,
            Err(error) if missing(&error) => return Self::Absent,
            Err(error) => return Self::NoAccess { reason: error.to_string() },
        };
        match api_version(&file) {
            KVM_API_VERSION if cfg!(target_arch = "x86_64") && !has_virtualisation(cpuinfo) => {
                Self::SoftwareOnly
            }
            KVM_API_VERSION => Self::Usable,
            version => Self::WrongVersion { version },
        }
    }
}

impl fmt::Display for Kvm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => f.write_str("is absent: there is no /dev/kvm"),
            Self::NoAccess { reason } => write!(f, "is not accessible: opening /dev/kvm failed with {reason:?}"),
            Self::SoftwareOnly => f.write_str(
                "is emulated in software: /dev/kvm opens, but the CPU shows neither vmx nor svm, and such a device does not boot \
                 stock kernels",
            ),
            Self::WrongVersion { version } => {
                write!(f, "speaks interface version {version} instead of {KVM_API_VERSION}")
            }
            Self::Usable => f.write_str("is usable"),
        }
    }
}

/// ENXIO and ENODEV: a device node whose module is not loaded.
fn missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENXIO | libc::ENODEV))
}

fn api_version(kvm: &File) -> i32 {
    // SAFETY: KVM_GET_API_VERSION takes no argument and writes no memory; on a file that is not KVM's it fails.
    unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) }
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter(|(key, _)| key.trim() == "flags")
        .any(|(_, flags)| flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm")))
}

/// A QEMU on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qemu {
    /// Its executable.
    pub path: PathBuf,
    /// Its version.
    pub version: QemuVersion,
}

/// Version of QEMU; orders by age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct QemuVersion {
    /// `7` of `7.2`.
    pub major: u32,
    /// `2` of `7.2`.
    pub minor: u32,
}

impl fmt::Display for QemuVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl QemuVersion {
    /// Asks `program`, by running it with `--version`.
    ///
    /// # Errors
    /// The program does not run, fails, or answers something else than QEMU's version.
    pub fn probe(program: &Path) -> Result<Self, HostError> {
        let fault = |source| HostError::Qemu { program: program.to_owned(), source };
        let output = Command::new(program).arg("--version").env_clear().output().map_err(fault)?;
        let text = String::from_utf8_lossy(&output.stdout);
        Self::parse(&text).ok_or_else(|| {
            let said = if text.trim().is_empty() { String::from_utf8_lossy(&output.stderr) } else { text };
            HostError::NoVersion { program: program.to_owned(), said: said.chars().take(200).collect() }
        })
    }

    /// Reads `QEMU emulator version 7.2.22 (…)`.
    fn parse(text: &str) -> Option<Self> {
        let (_, version) = text.lines().next()?.split_once("version ")?;
        let mut numbers = version.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Self { major: numbers.next()?.ok()?, minor: numbers.next()?.ok()? })
    }
}

/// What this host offers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// Hardware virtualisation.
    pub kvm: Kvm,
    /// What keeps a machine's memory from it.
    pub tees: Tees,
    /// CPUs this process may run on.
    pub cpus: u32,
    /// Memory in all, in MiB; 0 where the kernel does not tell.
    pub memory_mib: u64,
    /// QEMU, where [`Host::with_qemu`] looked at one.
    pub qemu: Option<Qemu>,
}

impl Host {
    /// Looks at the host. Takes well under a millisecond and starts no process, so QEMU is not asked for its version.
    pub fn probe() -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            kvm: Kvm::probe(Path::new("/dev/kvm"), &read("/proc/cpuinfo")),
            tees: Tees::probe(Path::new("/")),
            cpus: std::thread::available_parallelism()
                .map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX)),
            memory_mib: memory_mib(&read("/proc/meminfo")),
            qemu: None,
        }
    }

    /// The same host, with the version of the QEMU at `program`.
    ///
    /// # Errors
    /// See [`QemuVersion::probe`].
    pub fn with_qemu(mut self, program: &Path) -> Result<Self, HostError> {
        self.qemu = Some(Qemu { path: program.to_owned(), version: QemuVersion::probe(program)? });
        Ok(self)
    }
}

fn memory_mib(meminfo: &str) -> u64 {
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    total.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib / 1024)
}

/// How virtual machines are run here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Choice {
    /// By which driver.
    pub driver: DriverKind,
    /// With which accelerator.
    pub accelerator: Accelerator,
    /// Why: a sentence for users.
    pub reason: String,
}

/// Chooses the driver and the accelerator that `config` asks for on `host`: where it leaves both open, the built-in monitor on KVM
/// that works, else QEMU. What only QEMU has, its path or a machine type, asks for QEMU.
///
/// # Errors
/// [`HostError::KvmUnusable`] where the configuration insists on KVM and the host has none that works. Without that it falls back
/// to TCG and says so in [`Choice::reason`].
pub fn choose(config: &Config, host: &Host) -> Result<Choice, HostError> {
    if let Some(tee) = config.hypervisor.qemu.tee() {
        return confidential(config, host, tee);
    }
    match config.runtime.hypervisor_name {
        HypervisorChoice::Auto if suits_builtin(config, host) => {
            return Ok(Choice {
                driver: DriverKind::Builtin,
                accelerator: Accelerator::Kvm,
                reason: "the built-in virtual machine monitor runs the guest on the host's hardware virtualisation (KVM)"
                    .to_owned(),
            });
        }
        HypervisorChoice::Auto | HypervisorChoice::Qemu => {}
        HypervisorChoice::Builtin => {
            return with_kvm_alone(config, host, DriverKind::Builtin, "the built-in virtual machine monitor");
        }
        HypervisorChoice::Clh | HypervisorChoice::CloudHypervisor => {
            return with_kvm_alone(config, host, DriverKind::CloudHypervisor, "Cloud Hypervisor");
        }
        HypervisorChoice::Fc | HypervisorChoice::Firecracker => {
            return with_kvm_alone(config, host, DriverKind::Firecracker, "Firecracker");
        }
    }
    let (accelerator, reason) = match (config.runtime.accelerator, &host.kvm) {
        (AcceleratorChoice::Tcg, _) => (
            Accelerator::Tcg,
            "QEMU emulates the guest (TCG), because the configuration says runtime.accelerator = \"tcg\""
                .to_owned(),
        ),
        (AcceleratorChoice::Auto | AcceleratorChoice::Kvm, Kvm::Usable) => {
            (Accelerator::Kvm, "QEMU runs the guest on the host's hardware virtualisation (KVM)".to_owned())
        }
        (AcceleratorChoice::Kvm, kvm) => return Err(HostError::KvmUnusable { kvm: kvm.clone() }),
        (AcceleratorChoice::Auto, kvm) => (
            Accelerator::Tcg,
            format!("QEMU emulates the guest (TCG, several times slower than hardware), because KVM {kvm}"),
        ),
    };
    Ok(Choice { driver: DriverKind::Qemu, accelerator, reason })
}

/// The choice where the host may not read the machine's memory: there is one, and nothing to fall back to.
fn confidential(config: &Config, host: &Host, tee: Tee) -> Result<Choice, HostError> {
    match config.runtime.hypervisor_name {
        HypervisorChoice::Auto | HypervisorChoice::Qemu => {}
        other => return Err(HostError::DriverLacksTee { driver: other.as_str(), tee }),
    }
    if config.runtime.accelerator == AcceleratorChoice::Tcg {
        return Err(HostError::TeeEmulated { tee });
    }
    if host.kvm != Kvm::Usable {
        return Err(HostError::TeeNeedsKvm { tee, kvm: host.kvm.clone() });
    }
    match host.tees.of(tee) {
        Support::Present => Ok(Choice {
            driver: DriverKind::Qemu,
            accelerator: Accelerator::Kvm,
            reason: format!(
                "QEMU runs the guest in memory that the host cannot read ({tee}), because the configuration says \
                 hypervisor.qemu.confidential_guest = true"
            ),
        }),
        Support::Absent { reason } => Err(HostError::NoTee { tee, reason: reason.clone() }),
    }
}

/// Whether nothing speaks against the built-in monitor.
fn suits_builtin(config: &Config, host: &Host) -> bool {
    let qemu = &config.hypervisor.qemu;
    cfg!(target_arch = "x86_64")
        && host.kvm == Kvm::Usable
        && config.runtime.accelerator != AcceleratorChoice::Tcg
        && qemu.path.is_none()
        && qemu.firmware.is_none()
        && qemu.machine_type == MachineType::Q35
}

/// The choice of a driver that cannot emulate.
fn with_kvm_alone(
    config: &Config,
    host: &Host,
    driver: DriverKind,
    name: &'static str,
) -> Result<Choice, HostError> {
    match (config.runtime.accelerator, &host.kvm) {
        (AcceleratorChoice::Auto | AcceleratorChoice::Kvm, Kvm::Usable) => Ok(Choice {
            driver,
            accelerator: Accelerator::Kvm,
            reason: format!(
                "{name} runs the guest on the host's hardware virtualisation (KVM), because the configuration says \
                 runtime.hypervisor_name = \"{}\"",
                config.runtime.hypervisor_name
            ),
        }),
        (AcceleratorChoice::Tcg, _) => Err(HostError::NoEmulation { name }),
        (_, kvm) => Err(HostError::DriverNeedsKvm { name, kvm: kvm.clone() }),
    }
}

/// Why the host cannot run what was asked for.
#[derive(Debug, Error)]
pub enum HostError {
    /// KVM was asked for by name and cannot be used.
    #[error("runtime.accelerator is \"kvm\", but KVM {kvm}; {next} (or set runtime.accelerator to \"auto\")",
        next = .kvm.next_step().unwrap_or("try again"))]
    KvmUnusable {
        /// What is wrong with it.
        kvm: Kvm,
    },
    /// The driver has no emulation, which was asked for.
    #[error(
        "runtime.accelerator is \"tcg\", and {name} cannot emulate; set runtime.hypervisor_name to \"qemu\""
    )]
    NoEmulation {
        /// The VMM.
        name: &'static str,
    },
    /// The driver needs KVM, which cannot be used.
    #[error("{name} needs KVM, and KVM {kvm}; {next} (or set runtime.hypervisor_name to \"qemu\", which can emulate)",
        next = .kvm.next_step().unwrap_or("try again"))]
    DriverNeedsKvm {
        /// The VMM.
        name: &'static str,
        /// What is wrong with KVM.
        kvm: Kvm,
    },
    /// The driver makes no machines whose memory the host cannot read.
    #[error(
        "hypervisor.qemu.confidential_guest asks for memory that the host cannot read ({tee}), which {driver} does not give; set \
         runtime.hypervisor_name to \"qemu\""
    )]
    DriverLacksTee {
        /// The driver.
        driver: &'static str,
        /// What was asked for.
        tee: Tee,
    },
    /// Such machines cannot be emulated.
    #[error(
        "runtime.accelerator is \"tcg\", and memory that the host cannot read ({tee}) cannot be emulated; set it to \"auto\", or \
         hypervisor.qemu.confidential_guest to false"
    )]
    TeeEmulated {
        /// What was asked for.
        tee: Tee,
    },
    /// Such machines need KVM.
    #[error("hypervisor.qemu.confidential_guest asks for {tee}, which needs KVM, and KVM {kvm}; {next}",
        next = .kvm.next_step().unwrap_or("try again"))]
    TeeNeedsKvm {
        /// What was asked for.
        tee: Tee,
        /// What is wrong with KVM.
        kvm: Kvm,
    },
    /// The host has no such hardware, or does not use it.
    #[error("hypervisor.qemu.confidential_guest asks for {tee}, which this host does not have: {reason}")]
    NoTee {
        /// What was asked for.
        tee: Tee,
        /// What is missing, and what to do.
        reason: String,
    },
    /// QEMU does not run.
    #[error("{program:?} cannot be run; install QEMU's system emulator or set hypervisor.qemu.path", program = .program.display())]
    Qemu {
        /// The program tried.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The program is not QEMU.
    #[error("{program:?} does not tell QEMU's version, it says {said:?}", program = .program.display())]
    NoVersion {
        /// The program tried.
        program: PathBuf,
        /// The first of what it said.
        said: String,
    },
}

#[cfg(test)]
mod tests;

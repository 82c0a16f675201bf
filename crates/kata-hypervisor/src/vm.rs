//! What every driver takes, offers and reports.

mod error;

use std::fmt;
use std::fs::File;
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

pub use error::HypervisorError;

use crate::host_devices::HostDevice;
use crate::process::{Exit, Identity, Record};

/// How the guest's instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// The host's hardware, through `/dev/kvm`.
    Kvm,
    /// Emulation in software. Needs nothing of the host; an order of magnitude slower.
    Tcg,
}

impl fmt::Display for Accelerator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// The emulated machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Machine {
    /// A PC with PCI Express.
    Q35,
    /// virtio-mmio only: faster to boot, and nothing can be plugged in later.
    Microvm,
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Q35 => "q35",
            Self::Microvm => "microvm",
        })
    }
}

/// A virtio-fs share whose daemon runs already.
#[derive(Debug)]
pub struct SharedFs {
    /// The tag that the guest mounts.
    pub tag: String,
    /// The daemon's vhost-user socket, opened with `O_PATH`: who has it can connect, whether or not a path leads there.
    /// Whoever the VMM runs as may write to it.
    pub socket: OwnedFd,
}

impl SharedFs {
    /// Connects to the daemon, which takes one connection, for a machine whose directory is `run_dir`.
    pub(crate) fn connect(&self, run_dir: &Path) -> Result<OwnedFd, HypervisorError> {
        let connected = UnixStream::connect(format!("/proc/self/fd/{}", self.socket.as_raw_fd()));
        connected.map(OwnedFd::from).map_err(|source| HypervisorError::File {
            what: "virtio-fs socket of",
            path: run_dir.to_owned(),
            source,
        })
    }
}

/// A network interface: a virtio device whose other end is an open tap.
#[derive(Debug)]
pub struct Nic {
    /// Its name among the machine's devices, `[A-Za-z0-9_-]+`, e.g. `eth0`.
    pub id: String,
    /// Hardware address that the guest sees.
    pub mac: [u8; 6],
    /// Largest packet, in bytes.
    pub mtu: u16,
    /// The tap, one descriptor a queue pair.
    pub queues: Vec<OwnedFd>,
    /// `/dev/vhost-net`, one descriptor a queue pair: the host's kernel moves the packets. Without any the VMM does. For drivers of
    /// which [`DriverKind::takes_vhost`](crate::DriverKind::takes_vhost) says that they can.
    pub vhost: Vec<OwnedFd>,
}

/// A raw disk: a block device, or a file that holds a file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its name among the machine's devices, `[A-Za-z0-9_-]+`. The guest sees its first 20 characters as the disk's serial number.
    pub id: String,
    /// Block device or regular file on the host. It is opened here, so the VMM's user needs no access to it.
    pub path: PathBuf,
    /// Whether the guest may not write to it. Enforced by the VMM, which gets a descriptor that cannot be written to either.
    pub readonly: bool,
}

/// Longest serial number of a virtio disk (virtio 1.3, 5.2.6.1), in bytes.
const SERIAL_LIMIT: usize = 20;

/// What the guest sees of a disk's name.
pub(crate) fn serial(id: &str) -> String {
    id.chars().take(SERIAL_LIMIT).collect()
}

/// What can be added to a machine while it runs.
#[derive(Debug)]
pub enum Device {
    /// A disk.
    Disk(Disk),
    /// A network interface.
    Nic(Nic),
    /// A PCI device of the host. All memory that the guest can have is taken from the host then, and stays taken.
    Host(HostDevice),
}

impl From<Disk> for Device {
    fn from(disk: Disk) -> Self {
        Self::Disk(disk)
    }
}

impl From<Nic> for Device {
    fn from(nic: Nic) -> Self {
        Self::Nic(nic)
    }
}

impl From<HostDevice> for Device {
    fn from(device: HostDevice) -> Self {
        Self::Host(device)
    }
}

/// What each disk of a machine may move, the disk that it boots from included: both directions together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DiskLimits {
    /// Most bytes a second.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Most requests a second.
    pub requests_per_second: Option<NonZeroU64>,
}

/// Where the guest finds a device: the slot on each bus from the root on, two hexadecimal digits each, as `10/01` for slot 1
/// behind the bridge in slot 16 of the root bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciPath(pub String);

/// The files of a machine that stands still: empty ones for [`Vm::snapshot`] to fill, or filled ones to start from.
#[derive(Debug)]
pub struct Template {
    /// What its processors and devices hold.
    pub state: File,
    /// Its memory. A machine that starts from it never writes to it.
    pub memory: File,
}

/// How a machine came to run its guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It booted the kernel.
    Kernel,
    /// It goes on where the template stood.
    Template,
    /// It booted the kernel, for the template is of no use to it: why.
    Instead(String),
}

/// One virtual machine, as it is to be started.
#[derive(Debug)]
pub struct VmSpec {
    /// Name of the machine: the pod's id.
    pub id: String,
    /// The pod's directory. The driver puts its sockets here.
    pub run_dir: PathBuf,
    /// The VMM's executable: `qemu-system-x86_64`, `kata-vmm`, `cloud-hypervisor`, `firecracker`.
    pub program: PathBuf,
    /// The vsock back end's executable: `kata-vmm`, or any program that takes the arguments of `kata-vmm vsock`.
    pub vsock_program: PathBuf,
    /// Which machine QEMU emulates; other VMMs have one of their own.
    pub machine: Machine,
    /// How its instructions are run. See [`crate::host::choose`].
    pub accelerator: Accelerator,
    /// Guest kernel: an uncompressed ELF with a PVH note starts fastest, a bzImage works.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Firmware, which QEMU alone takes; otherwise the VMM's own.
    pub firmware: Option<PathBuf>,
    /// Memory that the host cannot read, which QEMU alone gives.
    pub confidential: Option<Confidential>,
    /// Root disk image, raw, attached read-only as the first virtio block device.
    pub image: Option<PathBuf>,
    /// Disks that the guest has from the start, read-only all of them, after the image.
    pub disks: Vec<Disk>,
    /// The guest kernel's command line, one parameter each. The driver adds nothing of its own but what the machine type needs.
    pub kernel_params: Vec<String>,
    /// Virtual CPUs, at least 1.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// How far the machine can grow; `None` for one that never does, which boots a little faster.
    pub growth: Option<Growth>,
    /// What the guest's memory is made of.
    pub backing: Backing,
    /// Where the host's side of the vsock device listens: a unix socket with the `CONNECT <port>` handshake. The driver binds
    /// it before any process starts; what the guest dials on port P arrives at `<vsock>_<P>`.
    pub vsock: PathBuf,
    /// Files shared with the guest.
    pub shared_fs: Option<SharedFs>,
    /// Network interfaces that the machine starts with.
    pub nics: Vec<Nic>,
    /// PCI devices of the host that it starts with. Needs [`Capabilities::host_devices`].
    pub host_devices: Vec<HostDevice>,
    /// Bounds on each disk, those that are added later included.
    pub disk_limits: DiskLimits,
    /// Who the VMM and the vsock back end run as. Anyone but root runs without capabilities.
    pub identity: Identity,
    /// Argument of QEMU's `-sandbox`; empty switches its system call filter off.
    pub seccomp_sandbox: String,
    /// What to start from instead of the kernel, if it is of use: made by [`Vm::snapshot`] of a machine of the same specification,
    /// but for names and sockets. Needs [`Capabilities::snapshot`].
    pub template: Option<Template>,
}

impl VmSpec {
    /// Refuses what makes no machine, whatever the driver and the host can do.
    pub(crate) fn check(&self) -> Result<(), HypervisorError> {
        let reason = match self {
            Self { vcpus: 0, .. } => "it has no virtual CPU",
            Self { memory_mib: ..64, .. } => "it has less than 64 MiB of memory, which boots no guest",
            Self { initrd: None, image: None, .. } => "it has neither an initrd nor an image to boot from",
            _ => return self.check_devices(),
        };
        Err(HypervisorError::InvalidSpec { id: self.id.clone(), reason: reason.to_owned() })
    }

    fn check_devices(&self) -> Result<(), HypervisorError> {
        let nics = self.nics.iter().filter_map(|nic| Some((&nic.id, nic.fault()?)));
        let written = self.disks.iter().filter(|disk| !disk.readonly);
        let written = written.map(|disk| (&disk.id, "a disk that the machine starts with is read-only"));
        match nics.chain(written).next() {
            Some((id, reason)) => Err(HypervisorError::InvalidDevice { id: id.clone(), reason }),
            None => Ok(()),
        }
    }

    /// What a `driver` that holds no disk to limits does not start.
    pub(crate) fn check_unlimited(&self, driver: &str) -> Result<(), HypervisorError> {
        if self.disk_limits == DiskLimits::default() {
            return Ok(());
        }
        let next = "unset hypervisor.qemu.disk_rate_limiter_*, or set runtime.hypervisor_name to \"qemu\" or \"builtin\"";
        Err(HypervisorError::unsupported("holding disks to limits", driver, next))
    }

    /// What a `driver` that has no templates does not start.
    pub(crate) fn check_boots(&self, driver: &str) -> Result<(), HypervisorError> {
        match &self.template {
            None => Ok(()),
            Some(_) => Err(HypervisorError::unsupported("starting from a template", driver, BUILTIN_HAS)),
        }
    }

    /// What a `driver` that boots kernels alone, in memory that the host can read, does not start.
    pub(crate) fn check_plain(&self, driver: &str) -> Result<(), HypervisorError> {
        let operation = match self {
            Self { confidential: Some(_), .. } => "memory that the host cannot read",
            Self { firmware: Some(_), .. } => "firmware of one's own",
            _ => return Ok(()),
        };
        Err(HypervisorError::unsupported(operation, driver, "set runtime.hypervisor_name to \"qemu\""))
    }

    /// What a `driver` that gives no device of the host away does not start.
    pub(crate) fn check_own_devices(&self, driver: &str) -> Result<(), HypervisorError> {
        match self.host_devices.is_empty() {
            true => Ok(()),
            false => Err(no_host_devices(driver)),
        }
    }

    /// Like [`VmSpec::check`], for a `driver` that cannot emulate.
    pub(crate) fn check_on_kvm(&self, driver: &str) -> Result<(), HypervisorError> {
        self.check()?;
        match self.accelerator {
            Accelerator::Kvm => Ok(()),
            Accelerator::Tcg => {
                let next = "set runtime.hypervisor_name to \"qemu\"";
                Err(HypervisorError::unsupported("emulation (TCG)", driver, next))
            }
        }
    }
}

/// A machine whose memory the host cannot read, and what its hardware says of it to whoever asks the guest for a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confidential {
    /// By which hardware.
    pub kind: ConfidentialKind,
    /// What the report names beside the measurement: the digest of initdata, cut or filled with zeroes to the field's size
    /// ([`ConfidentialKind::host_data_size`]). `None` is all zeroes.
    pub host_data: Option<Vec<u8>>,
}

/// The hardware, and what is its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConfidentialKind {
    /// AMD's SEV-SNP (SEV Secure Nested Paging Firmware ABI, 8.15 SNP_LAUNCH_FINISH for the ID block).
    SevSnp {
        /// Policy of the guest.
        policy: u64,
        /// ID block, base64 of 96 bytes; empty is none.
        id_block: String,
        /// ID authentication, base64 of 4096 bytes; empty is none.
        id_auth: String,
    },
    /// Intel's TDX.
    Tdx {
        /// vsock port of the host's service that signs reports; 0 is its Unix socket.
        quote_port: u32,
    },
}

impl ConfidentialKind {
    /// Bytes of `HOST_DATA` (SEV-SNP), `MRCONFIGID` (TDX).
    pub const fn host_data_size(&self) -> usize {
        match self {
            Self::SevSnp { .. } => 32,
            Self::Tdx { .. } => 48,
        }
    }
}

/// How far a machine can grow after its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    /// Most virtual CPUs.
    pub vcpus: u32,
    /// Most guest memory in MiB.
    pub memory_mib: u64,
    /// How often memory can be added.
    pub slots: u32,
}

/// What the guest's memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// All of it is taken from the host before the guest starts.
    pub prealloc: bool,
    /// It is on huge pages that the host has set aside.
    pub hugepages: bool,
    /// What the guest frees is given back to the host.
    pub reporting: bool,
}

/// A size to bring a running machine to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size {
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Guest memory in MiB.
    pub memory_mib: u64,
}

impl Size {
    /// Refuses what a machine that can have `most` has no room for.
    pub(crate) fn check_within(self, most: Self) -> Result<(), HypervisorError> {
        if self.vcpus > most.vcpus {
            return Err(HypervisorError::TooLarge {
                wanted: format!("{} virtual CPUs", self.vcpus),
                most: format!("it can have {}", most.vcpus),
                next: "see hypervisor.qemu.default_maxvcpus and runtime.static_sandbox_resource_mgmt",
            });
        }
        if self.memory_mib > most.memory_mib {
            return Err(HypervisorError::TooLarge {
                wanted: format!("{} MiB of memory", self.memory_mib),
                most: format!("it can have {} MiB", most.memory_mib),
                next: "see hypervisor.qemu.default_maxmemory and runtime.static_sandbox_resource_mgmt",
            });
        }
        Ok(())
    }
}

/// What a running machine has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Its size.
    pub size: Size,
    /// The threads of the host that its CPUs run on, in the order of the CPUs; empty where the driver cannot tell.
    pub vcpu_threads: Vec<u32>,
}

/// That a `driver` does not do what only one does.
pub(crate) fn no_host_devices(driver: &str) -> HypervisorError {
    HypervisorError::unsupported("giving a guest a device of the host", driver, BUILTIN_HAS)
}

/// What to do where a driver cannot do what that one can.
const BUILTIN_HAS: &str = "set runtime.hypervisor_name to \"builtin\"";

/// What a driver can do on the machine it was asked for. Everything not listed as `true` answers
/// [`HypervisorError::Unsupported`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    /// Files of the host can be shared through virtio-fs.
    pub shared_fs: bool,
    /// [`Vm::pause`] and [`Vm::resume`].
    pub pause: bool,
    /// CPUs can be added to a running machine.
    pub hotplug_cpu: bool,
    /// Memory can be added to a running machine.
    pub hotplug_memory: bool,
    /// Disks can be added to a running machine.
    pub hotplug_block: bool,
    /// Network interfaces can be added to a running machine.
    pub hotplug_network: bool,
    /// PCI devices of the host can be given to a machine, before its start and while it runs.
    pub host_devices: bool,
    /// A running machine's state can be written to files and started from there.
    pub snapshot: bool,
}

/// One process of a virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProcessInfo {
    /// What it is for: `qemu`, `vsock`.
    pub name: String,
    /// Its process id on the host.
    pub pid: u32,
}

/// Why a virtual machine has ended. Its `Display` is a sentence for users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VmExit {
    /// The guest ended itself in order: PID 1 powered off or rebooted.
    Clean,
    /// [`Vm::stop`] was called.
    Stopped,
    /// The VMM was killed by this signal, and not by us.
    Signal(i32),
    /// The VMM gave up with this exit code; the text is the tail of what it said.
    Code(i32, String),
    /// The guest's kernel panicked; the text is the console's last lines.
    GuestPanic(String),
    /// A process that the machine needs died first, so the VMM was stopped.
    BackEndLost {
        /// Which one: `vsock`.
        name: String,
        /// How it ended.
        exit: Exit,
        /// The tail of what it said.
        output: String,
    },
}

impl Nic {
    /// Why this makes no network interface, if so.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        if self.queues.is_empty() {
            return Some("it is a network interface without a tap");
        }
        let fits = self.vhost.is_empty() || self.vhost.len() == self.queues.len();
        (!fits).then_some("it has not as many descriptors of /dev/vhost-net as queue pairs, nor none")
    }
}

impl VmExit {
    /// Whether the machine ended because the guest or its owner wanted it to.
    pub fn is_expected(&self) -> bool {
        matches!(self, Self::Clean | Self::Stopped)
    }
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Clean => f.write_str("the guest shut down"),
            Self::Stopped => f.write_str("the virtual machine was stopped"),
            Self::Signal(9) => f.write_str("the VMM was killed by signal 9 (by hand, or by the host's out-of-memory killer: see its kernel log)"),
            Self::Signal(signal) => write!(f, "the VMM was killed by signal {signal}"),
            Self::Code(code, output) => write!(f, "the VMM exited with code {code}{}", Quoted(output)),
            Self::GuestPanic(console) => write!(f, "the guest's kernel panicked{}", Quoted(console)),
            Self::BackEndLost { name, exit, output } => {
                write!(f, "the virtual machine was stopped because its {name} process {exit}{}", Quoted(output))
            }
        }
    }
}

/// Output of a process as the end of a sentence; nothing where it said nothing.
pub(crate) struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.trim() {
            "" => Ok(()),
            text => write!(f, ": {text}"),
        }
    }
}

/// One virtual machine, from before its start until after its end.
///
/// ```text
///   new ──boot──▶ runs ◀──pause/resume──▶ paused
///                  │ guest ends, VMM dies, back end dies, stop
///                  ▼
///                ended   exited() resolves, for all callers and for good
/// ```
///
/// All methods may be called at any time and from many tasks; what does not fit the state is [`HypervisorError::WrongState`].
#[async_trait]
pub trait Vm: Send + Sync {
    /// What this driver can do. Depends on the machine type, so it is complete only after [`Vm::boot`] was called.
    fn capabilities(&self) -> Capabilities;

    /// Starts the machine and comes back once the VMM runs the guest, with how it came to. A template that cannot be used is no
    /// error. On an error nothing is left running. A future dropped half way leaves what `record` names; [`Vm::stop`] ends it.
    async fn boot(&self, spec: VmSpec, record: &Record) -> Result<Origin, HypervisorError>;

    /// Resolves when the VMM has ended and says why. Never resolves for a machine that was not started.
    async fn exited(&self) -> VmExit;

    /// Stops the guest's CPUs.
    async fn pause(&self) -> Result<(), HypervisorError>;

    /// Lets a paused guest go on.
    async fn resume(&self) -> Result<(), HypervisorError>;

    /// Writes a paused machine into two empty files. It stays paused.
    async fn snapshot(&self, into: Template) -> Result<(), HypervisorError> {
        drop(into);
        Err(HypervisorError::unsupported(
            "writing a machine to files",
            "this virtual machine monitor",
            BUILTIN_HAS,
        ))
    }

    /// Adds a device to the running machine, and answers where the guest finds it. The guest may take a moment to notice.
    /// On an error the machine is as it was; a future dropped half way leaves a device that [`Vm::remove_device`] takes away.
    async fn add_device(&self, device: Device) -> Result<PciPath, HypervisorError>;

    /// Takes a device away that was added, once the guest has let go of it. After an error it can be tried again.
    async fn remove_device(&self, id: &str) -> Result<(), HypervisorError>;

    /// Brings the running machine to this size as far as it can, and answers what it then has: asking for what is there changes
    /// nothing. Memory is only ever added, and the guest has to bring to use what was; a CPU that the guest does not let go of
    /// stays. Growing beyond [`VmSpec::growth`] is [`HypervisorError::Unsupported`].
    async fn resize(&self, size: Size) -> Result<Layout, HypervisorError>;

    /// Ends the machine without asking the guest. Idempotent; comes back when all its processes are gone.
    async fn stop(&self) -> Result<(), HypervisorError>;

    /// The last of what the guest wrote to its console, at most 64 KiB, with control characters removed.
    fn console_tail(&self) -> String;

    /// The processes that make up the machine and are alive.
    fn processes(&self) -> Vec<ProcessInfo>;
}

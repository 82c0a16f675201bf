//! The driver of this project's own VMM, `kata-vmm run`.
//!
//! ```text
//!   boot: bind the guest's socket, open files and /dev/kvm ─▶ kata-vmm run, jailed ─▶ create ─▶ boot ─▶ guest runs
//!                                                                    └ from the template; refused: from the kernel
//!                                                                   │
//!                                                supervisor: its end ─▶ VmExit
//! ```
//!
//! One process is the whole machine, the vsock device included. It is started as root in a PID namespace of its own, gives up
//! everything else by itself before it reads its first command, and gets every file and socket as an open descriptor. It ends when
//! this side closes the connection, so it never outlives its owner.

mod client;
mod spec;

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use kata_vmm_api::{Answer, Command, FailureKind, Info, MachineSpec};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

pub use client::BuiltinError;
use client::{Client, Descriptors};

use crate::files::socket_pair;
use crate::host_devices::{Groups, HostDevice, HostDeviceError};
use crate::life::{SETTLE, Vmm};
use crate::process::{Child, Namespaces, Record, Spawn, capture};
use crate::vm::{
    Capabilities, Device, Disk, DiskLimits, Growth, HypervisorError, Layout, Nic, Origin, PciPath,
    ProcessInfo, Size, Template, Vm, VmExit, VmSpec,
};
use crate::vsock;

/// Name of the process in logs, errors and the record.
const NAME: &str = "kata-vmm";
/// What is done with a device of the host, in errors.
const HOST_DEVICE: &str = "adding a device of the host";
/// Why a machine boots a kernel that has a template.
const NOT_IN_A_TEMPLATE: &str = "devices of the host are in no template";
/// What this driver calls itself in errors.
const DRIVER: &str = "the built-in virtual machine monitor";
/// Hardware virtualisation.
const KVM: &str = "/dev/kvm";
/// For the machine to be made: the kernel is read then.
const CREATE_BOUND: Duration = Duration::from_secs(60);
/// For each GiB of its memory, where all of that is taken from the host or pinned in advance.
const CREATE_GIB_BOUND: Duration = Duration::from_secs(2);
/// For all of the memory that the guest has used to be written to a disk.
const SNAPSHOT_BOUND: Duration = Duration::from_secs(300);
/// For one command.
const COMMAND_BOUND: Duration = Duration::from_secs(10);
/// For all of the guest's memory to be pinned.
const PIN_BOUND: Duration = Duration::from_secs(120);
/// For the guest to let go of a device: the VMM's own bound, and some more.
const REMOVAL_BOUND: Duration = Duration::from_secs(15);
/// For the guest to take memory: the VMM waits on as long as it gets further.
const RESIZE_BOUND: Duration = Duration::from_secs(60);
/// Locked memory of the VMM beside the guest's: rings of kernel and devices.
const LOCKED_BESIDE: u64 = 64 << 20;
/// Open files of the VMM: a connection of the guest's takes one.
const OPEN_FILES: u64 = 16 * 1024;

/// A virtual machine run by `kata-vmm`.
pub(crate) struct BuiltinVm {
    vmm: Vmm<Handle>,
    /// How large the machine can become, where it can grow.
    most: OnceLock<Size>,
    /// What disks that are added are held to.
    disk_limits: OnceLock<DiskLimits>,
    /// Most memory that it can have, in MiB.
    most_memory: OnceLock<u64>,
    /// Groups of the host's devices that it has.
    groups: Groups,
    /// Devices that the guest was asked to let go of and had not in time: it may do so whenever it likes.
    leaving: Mutex<BTreeSet<String>>,
}

/// A VMM that runs the guest.
#[derive(Clone, Debug)]
struct Handle {
    client: Client,
    child: Child,
}

impl Handle {
    /// Makes the machine: from the template if there is one that it takes. What it refused has changed nothing.
    async fn create(
        &self,
        machine: MachineSpec,
        descriptors: Descriptors,
        template: Option<Template>,
    ) -> Result<Origin, BuiltinError> {
        let bound = create_bound(&machine);
        let create = async |machine, descriptors| {
            self.client.execute(Command::Create(Box::new(machine)), descriptors, bound).await
        };
        let Some(template) = template else {
            return create(machine, descriptors).await.map(|_| Origin::Kernel);
        };
        let copied = spec::copied(&machine, &descriptors, template);
        let (copied, files) = copied.map_err(|source| BuiltinError::Socket { command: "create", source })?;
        match create(copied, files).await {
            Ok(_) => Ok(Origin::Template),
            Err(BuiltinError::Refused(failure)) => {
                create(machine, descriptors).await.map(|_| Origin::Instead(failure.message))
            }
            Err(error) => Err(error),
        }
    }
}

/// How long a machine may take to be made.
fn create_bound(machine: &MachineSpec) -> Duration {
    let MachineSpec { memory, host_devices, .. } = machine;
    let whole = memory.prealloc || !host_devices.is_empty();
    let gib = u32::try_from(memory.size_mib >> 10).unwrap_or(u32::MAX);
    if whole { CREATE_BOUND.saturating_add(CREATE_GIB_BOUND.saturating_mul(gib)) } else { CREATE_BOUND }
}

impl BuiltinVm {
    pub(crate) fn new() -> Self {
        Self {
            vmm: Vmm::default(),
            most: OnceLock::new(),
            disk_limits: OnceLock::new(),
            most_memory: OnceLock::new(),
            groups: Groups::default(),
            leaving: Mutex::default(),
        }
    }

    /// What it says of itself once it runs a machine that may grow.
    #[cfg(test)]
    pub(crate) fn as_if_running() -> Capabilities {
        let vm = Self::new();
        let _ = vm.most.set(Size::default());
        vm.capabilities()
    }

    /// Starts the process and has it run the guest. What runs when it fails is in `life`.
    async fn start(&self, mut spec: VmSpec, record: &Record) -> Result<Origin, HypervisorError> {
        let kvm = open_kvm(Path::new(KVM))?;
        let listener = vsock::bind(&spec.vsock, record)?;
        let (api, api_end) = socket_pair(&spec)?;
        let (console, console_end) = socket_pair(&spec)?;
        let program = spec.program.clone();
        let child = spawn(&spec, api_end, kvm, record)?;
        self.vmm.life.adopt(&child);
        let console = tokio::spawn(capture(console, self.vmm.life.console.clone(), "console".to_owned()));
        let (life, subject) = (Arc::clone(&self.vmm.life), child.clone());
        tokio::spawn(async move { life.supervise(subject, vec![console]).await });

        let handle = Handle { client: Client::new(api), child };
        let devices = std::mem::take(&mut spec.host_devices);
        let mut template = spec.template.take();
        let (mut machine, mut descriptors) = spec::machine(spec, console_end, listener.into())?;
        if !devices.is_empty() {
            self.allow_pinning(&handle.child)?;
            for device in &devices {
                let ready = self.groups.open(device)?;
                machine.host_devices.push(spec::host_device(device, ready, &mut descriptors));
            }
        }
        let instead = template.take_if(|_| !devices.is_empty()).map(|_| NOT_IN_A_TEMPLATE);
        let booted = match handle.create(machine, descriptors, template).await {
            Ok(origin) => {
                let boot = Command::Boot;
                handle.client.execute(boot, Descriptors::default(), COMMAND_BOUND).await.map(|_| origin)
            }
            Err(error) => Err(error),
        };
        match booted {
            Ok(origin) => {
                self.vmm.runs(handle);
                Ok(instead.map_or(origin, |why| Origin::Instead(why.to_owned())))
            }
            Err(error) => Err(self.explain(error, &program, &handle.child).await),
        }
    }

    /// Why the guest does not run: a VMM that is gone has said why.
    async fn explain(&self, error: BuiltinError, program: &Path, child: &Child) -> HypervisorError {
        match error {
            BuiltinError::Closed { .. } | BuiltinError::Socket { .. } => {
                self.vmm.explain(error.into(), program, child).await
            }
            _ if self.vmm.life.stopping() => HypervisorError::Ended(VmExit::Stopped),
            BuiltinError::NoAnswer { bound, .. } => HypervisorError::Unresponsive {
                program: program.to_owned(),
                bound,
                waits_for: "the virtio-fs process to speak vhost-user, or the host for memory, or it is overloaded",
                output: child.output_tail(),
            },
            error => error.into(),
        }
    }

    async fn command(
        &self,
        operation: &'static str,
        command: Command,
        descriptors: Descriptors,
        bound: Duration,
    ) -> Result<Answer, HypervisorError> {
        let vmm = self.vmm.control(operation)?;
        let answer = vmm.client.execute(command, descriptors, bound).await;
        match answer {
            Err(BuiltinError::Refused(failure)) if failure.kind == FailureKind::Unsupported => {
                Err(HypervisorError::Unsupported { operation, driver: DRIVER.to_owned() })
            }
            // Its end says more than a closed socket, if it has one.
            Err(error @ (BuiltinError::Closed { .. } | BuiltinError::Socket { .. })) => {
                match tokio::time::timeout(SETTLE, self.vmm.life.exited()).await {
                    Ok(exit) => Err(HypervisorError::Ended(exit)),
                    Err(_) => Err(error.into()),
                }
            }
            answer => Ok(answer?),
        }
    }

    async fn plug(
        &self,
        operation: &'static str,
        id: String,
        command: Command,
        descriptors: Descriptors,
        bound: Duration,
    ) -> Result<PciPath, HypervisorError> {
        match self.command(operation, command, descriptors, bound).await.map_err(of_device(id))? {
            Answer::Slot(slot) => Ok(PciPath(format!("{slot:02x}"))),
            other => Err(garbled("a new device", &other)),
        }
    }

    /// Refuses what the machine was not made for, before anything is done.
    fn check_growth(&self, size: Size) -> Result<(), HypervisorError> {
        match self.most.get() {
            Some(most) => size.check_within(*most),
            None => Err(HypervisorError::unsupported(
                "growing while it runs",
                &format!("{DRIVER} of fixed size"),
                "set runtime.static_sandbox_resource_mgmt to false",
            )),
        }
    }

    /// Lets the VMM pin all memory that its guest can have: it has no right to by itself, and only with a device of the host a reason.
    fn allow_pinning(&self, child: &Child) -> Result<(), HostDeviceError> {
        let most = self.most_memory.get().copied().unwrap_or(0);
        let bytes = most.saturating_mul(1 << 20).saturating_add(LOCKED_BESIDE);
        let enough = |limit: Option<u64>| limit.is_none_or(|limit| limit >= bytes);
        // What it was started with is this process's own.
        let own = getrlimit(Resource::Memlock);
        if enough(own.current) {
            return Ok(());
        }
        let maximum = if enough(own.maximum) { own.maximum } else { Some(bytes) };
        let limit = Rlimit { current: Some(bytes), maximum };
        let pid = i32::try_from(child.pid()).ok().and_then(Pid::from_raw);
        let set =
            pid.ok_or(rustix::io::Errno::SRCH).and_then(|pid| prlimit(Some(pid), Resource::Memlock, limit));
        set.map(drop).map_err(|errno| HostDeviceError::Limit { bytes, source: errno.into() })
    }

    async fn add_disk(&self, disk: Disk) -> Result<PciPath, HypervisorError> {
        const OPERATION: &str = "adding a disk";
        self.vmm.control(OPERATION)?;
        let limits = self.disk_limits.get().copied().unwrap_or_default();
        let (spec, descriptors) = spec::disk(&disk, limits)?;
        self.plug(OPERATION, disk.id, Command::AddDisk(spec), descriptors, COMMAND_BOUND).await
    }

    async fn add_nic(&self, nic: Nic) -> Result<PciPath, HypervisorError> {
        const OPERATION: &str = "adding a network interface";
        self.vmm.control(OPERATION)?;
        if let Some(reason) = nic.fault() {
            return Err(HypervisorError::InvalidDevice { id: nic.id, reason });
        }
        let id = nic.id.clone();
        let (spec, descriptors) = spec::nic(nic)?;
        self.plug(OPERATION, id, Command::AddNic(spec), descriptors, COMMAND_BOUND).await
    }

    async fn add_host_device(&self, device: HostDevice) -> Result<PciPath, HypervisorError> {
        let vmm = self.vmm.control(HOST_DEVICE)?;
        self.allow_pinning(&vmm.child)?;
        self.hand_over(device).await
    }

    /// Opens what belongs to a device of the host, and gives it to the machine.
    async fn hand_over(&self, device: HostDevice) -> Result<PciPath, HypervisorError> {
        let ready = self.groups.open(&device)?;
        let mut descriptors = Descriptors::default();
        let command = Command::AddHostDevice(spec::host_device(&device, ready, &mut descriptors));
        let id = device.id.clone();
        let added = self.plug(HOST_DEVICE, id, command, descriptors, PIN_BOUND).await;
        // One of that name is there, and keeps its group.
        if added.as_ref().is_err_and(|error| !matches!(error, HypervisorError::DeviceExists { .. })) {
            self.groups.release(&device.id);
        }
        added
    }

    async fn info(&self, operation: &'static str) -> Result<Info, HypervisorError> {
        match self.command(operation, Command::Info, Descriptors::default(), COMMAND_BOUND).await? {
            Answer::Info(info) => Ok(info),
            other => Err(garbled("info", &other)),
        }
    }
}

#[async_trait]
impl Vm for BuiltinVm {
    fn capabilities(&self) -> Capabilities {
        let grows = self.most.get().is_some();
        Capabilities {
            hotplug_cpu: grows,
            hotplug_memory: grows,
            shared_fs: true,
            pause: true,
            hotplug_block: true,
            hotplug_network: true,
            host_devices: true,
            snapshot: true,
        }
    }

    async fn boot(&self, spec: VmSpec, record: &Record) -> Result<Origin, HypervisorError> {
        spec.check_on_kvm(DRIVER)?;
        spec.check_plain(DRIVER)?;
        self.vmm.begin()?;
        let _ = self.disk_limits.set(spec.disk_limits);
        let _ = self.most_memory.set(spec::most(&spec).memory_mib);
        if spec.growth.is_some() {
            let Growth { vcpus, memory_mib, .. } = spec::most(&spec);
            let _ = self.most.set(Size { vcpus, memory_mib });
        }
        let outcome = self.start(spec, record).await;
        if outcome.is_err() {
            self.vmm.life.abandon().await;
            self.groups.release_all();
        }
        outcome
    }

    async fn exited(&self) -> VmExit {
        self.vmm.life.exited().await
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.command("pause", Command::Pause, Descriptors::default(), COMMAND_BOUND).await.map(drop)
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        self.command("resume", Command::Resume, Descriptors::default(), COMMAND_BOUND).await.map(drop)
    }

    async fn snapshot(&self, into: Template) -> Result<(), HypervisorError> {
        let mut descriptors = Descriptors::default();
        let command = Command::Snapshot(spec::snapshot(into, &mut descriptors));
        self.command("a snapshot", command, descriptors, SNAPSHOT_BOUND).await.map(drop)
    }

    async fn add_device(&self, device: Device) -> Result<PciPath, HypervisorError> {
        match device {
            Device::Disk(disk) => self.add_disk(disk).await,
            Device::Nic(nic) => self.add_nic(nic).await,
            Device::Host(device) => self.add_host_device(device).await,
        }
    }

    async fn remove_device(&self, id: &str) -> Result<(), HypervisorError> {
        let command = Command::RemoveDevice { id: id.to_owned() };
        let removed = self.command("removing a device", command, Descriptors::default(), REMOVAL_BOUND).await;
        let removed = removed.map(drop).map_err(of_device(id.to_owned()));
        let mut leaving = self.leaving.lock().unwrap_or_else(PoisonError::into_inner);
        match removed {
            Ok(()) => {}
            // It has gone since it was last asked to.
            Err(HypervisorError::UnknownDevice { .. }) if leaving.contains(id) => {}
            Err(error) => {
                if matches!(
                    error,
                    HypervisorError::DeviceHeld { .. }
                        | HypervisorError::Builtin(BuiltinError::NoAnswer { .. })
                ) {
                    leaving.insert(id.to_owned());
                }
                return Err(error);
            }
        }
        leaving.remove(id);
        self.groups.release(id);
        Ok(())
    }

    async fn resize(&self, size: Size) -> Result<Layout, HypervisorError> {
        const OPERATION: &str = "changing the size";
        let now = self.info(OPERATION).await?.size;
        // Neither CPUs nor memory are taken back.
        let wanted = kata_vmm_api::Size {
            cpus: size.vcpus.max(now.cpus),
            memory_mib: size.memory_mib.max(now.memory_mib),
        };
        if wanted != now {
            self.check_growth(size)?;
            let command = Command::Resize(wanted);
            self.command(OPERATION, command, Descriptors::default(), RESIZE_BOUND).await?;
        }
        let info = self.info(OPERATION).await?;
        let now = Size { vcpus: info.size.cpus, memory_mib: info.size.memory_mib };
        let vmm = self.vmm.control(OPERATION)?;
        Ok(Layout { size: now, vcpu_threads: host_threads(vmm.child.pid(), &info.cpu_threads) })
    }

    async fn stop(&self) -> Result<(), HypervisorError> {
        self.vmm.life.abandon().await;
        self.groups.release_all();
        Ok(())
    }

    fn console_tail(&self) -> String {
        self.vmm.life.console.text()
    }

    fn processes(&self) -> Vec<ProcessInfo> {
        self.vmm.life.processes()
    }
}

/// Opened here, so that nobody else needs to be let at it.
fn open_kvm(path: &Path) -> Result<OwnedFd, HypervisorError> {
    let opened = File::options().read(true).write(true).open(path);
    opened.map(OwnedFd::from).map_err(|source| HypervisorError::File {
        what: "hardware virtualisation",
        path: path.to_owned(),
        source,
    })
}

fn spawn(spec: &VmSpec, api: OwnedFd, kvm: OwnedFd, record: &Record) -> Result<Child, HypervisorError> {
    let mut spawn = Spawn::new(NAME, &spec.program);
    let (api, kvm) = (spawn.hand_over(api), spawn.hand_over(kvm));
    let sockets = spec.vsock.parent().unwrap_or_else(|| Path::new("/"));
    let spawn = spawn
        .args(["run", "--api-fd", &api.to_string(), "--kvm-fd", &kvm.to_string()])
        .args(["--user", &format!("{}:{}", spec.identity.uid, spec.identity.gid)])
        .arg("--sockets")
        .arg(sockets)
        .namespaces(Namespaces { pid: true, ..Namespaces::default() })
        .open_files(OPEN_FILES);
    let next = "see whether kata-vmm is installed and complete";
    spawn.spawn(record).map_err(|source| HypervisorError::Start { name: NAME, next, source })
}

/// A refusal that is about the device `id`.
fn of_device(id: String) -> impl FnOnce(HypervisorError) -> HypervisorError {
    move |error| match &error {
        HypervisorError::Builtin(BuiltinError::Refused(failure)) => match failure.kind {
            FailureKind::Exists => HypervisorError::DeviceExists { id },
            FailureKind::NotFound => HypervisorError::UnknownDevice { id },
            FailureKind::Held => HypervisorError::DeviceHeld { id, bound: COMMAND_BOUND },
            FailureKind::Full => HypervisorError::NoFreeSlot { id, slots: SLOTS },
            FailureKind::Invalid
            | FailureKind::WrongState
            | FailureKind::Unsupported
            | FailureKind::Stale
            | FailureKind::Host => error,
        },
        _ => error,
    }
}

/// Slots of the one PCI bus, but for that of the bus itself.
const SLOTS: usize = 31;

fn garbled(command: &'static str, said: &Answer) -> HypervisorError {
    BuiltinError::Garbled { command, said: format!("{said:?}") }.into()
}

/// The VMM counts its threads in its own PID namespace: what they are called here. Nothing where that cannot be told.
fn host_threads(pid: u32, threads: &[u32]) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let known: Vec<(u32, u32)> = tasks
        .filter_map(|task| {
            let status = std::fs::read_to_string(task.path().join("status")).ok()?;
            names_of(&status)
        })
        .collect();
    let here = |inside: &u32| known.iter().find(|(_, name)| name == inside).map(|(here, _)| *here);
    threads.iter().map(here).collect::<Option<Vec<_>>>().unwrap_or_default()
}

/// A thread's number here and in the innermost namespace: `NSpid: 4711 12` (Linux, proc_pid_status(5)).
fn names_of(status: &str) -> Option<(u32, u32)> {
    let mut numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace();
    let here = numbers.next()?.parse().ok()?;
    let inside = numbers.next_back().map_or(Ok(here), str::parse).ok()?;
    Some((here, inside))
}

#[cfg(test)]
mod tests;

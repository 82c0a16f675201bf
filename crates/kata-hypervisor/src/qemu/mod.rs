//! The QEMU driver.
//!
//! ```text
//!   boot: open files, bind sockets ─▶ vsock back end ─▶ qemu ─▶ QMP greeting ─▶ guest runs
//!                                          │              │
//!                              supervisor: whichever ends first ─▶ ends the other ─▶ VmExit
//! ```
//!
//! QEMU gets every file and socket as an open descriptor, and runs without capabilities in a mount, IPC and network namespace of
//! its own. It starts the guest at once: by the time it answers on QMP it has loaded the kernel and realised every device.

mod clock;
pub(crate) mod command_line;
pub(crate) mod confidential;
mod hotplug;
pub(crate) mod qmp;
mod resize;
mod supervisor;
mod throttle;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

use self::clock::Measurement;
use self::command_line::{DiskPlan, Fds, IMAGE, NicPlan, Plan, command_line};
use self::hotplug::{Plugged, REMOVAL_BOUND};
use self::qmp::{Qmp, QmpError};
use self::resize::Resizer;
use self::supervisor::{LastWords, explain, listen, supervise};
use crate::files::{BootFiles, socket_pair, with_device};
use crate::life::Life;
use crate::process::{Child, Identity, Namespaces, Record, Spawn, SpawnError, capture};
use crate::vm::{
    Accelerator, Capabilities, Device, HypervisorError, Layout, Machine, Nic, Origin, PciPath, ProcessInfo,
    Size, Vm, VmExit, VmSpec, no_host_devices,
};
use crate::vsock::Sockets;

/// What this driver calls itself in errors.
const DRIVER: &str = "QEMU's driver";
/// From QEMU's start to its greeting. It takes some 50 ms, and seconds on a host that swaps.
const GREETING_BOUND: Duration = Duration::from_secs(30);
/// For one command of the control protocol.
const COMMAND_BOUND: Duration = Duration::from_secs(10);

/// A virtual machine run by QEMU.
pub(crate) struct QemuVm(Arc<Shared>);

/// What the driver and its supervisor have in common.
struct Shared {
    state: Mutex<State>,
    /// Devices are added and removed one after the other.
    plugged: tokio::sync::Mutex<Plugged>,
    /// Changes of the size come one after the other, too.
    resizer: tokio::sync::Mutex<Resizer>,
    life: Life,
}

#[derive(Default)]
struct State {
    /// Which machine was asked for; `None` before [`Vm::boot`].
    machine: Option<Machine>,
    /// Whether CPUs and memory can be added.
    grows: (bool, bool),
    qmp: Option<Qmp>,
    listener: Option<JoinHandle<()>>,
    last_words: LastWords,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The two processes of a machine, and our ends of QEMU's channels.
struct Started {
    qemu: Child,
    vsock: Child,
    qmp: UnixStream,
    console: UnixStream,
}

impl QemuVm {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Shared {
            state: Mutex::default(),
            plugged: tokio::sync::Mutex::default(),
            resizer: tokio::sync::Mutex::default(),
            life: Life::default(),
        }))
    }

    /// What it says of itself once it runs a `machine` that may grow.
    #[cfg(test)]
    pub(crate) fn as_if_running(machine: Machine) -> Capabilities {
        let vm = Self::new();
        {
            let mut state = vm.0.state();
            state.machine = Some(machine);
            state.grows = (machine == Machine::Q35, machine == Machine::Q35);
        }
        vm.capabilities()
    }

    /// Starts both processes. Those that run when it fails are in `Shared::life`.
    async fn start(&self, spec: VmSpec, record: &Record) -> Result<Started, HypervisorError> {
        let clock = Measurement::begin().filter(|_| spec.accelerator == Accelerator::Tcg);
        let identity = match spec.accelerator {
            Accelerator::Kvm => with_device(&spec.identity, Path::new("/dev/kvm"))?,
            Accelerator::Tcg => spec.identity.clone(),
        };
        let identity = match &spec.confidential {
            None => identity,
            Some(confidential) => {
                confidential::check_version(&spec.program, confidential)?;
                confidential::check_kernel(&spec)?;
                confidential::with_hardware(identity, confidential)?
            }
        };
        let sockets = Sockets::bind(&spec.run_dir, &spec.vsock, record)?;
        let (qmp, qmp_end) = socket_pair(&spec)?;
        let (console, console_end) = socket_pair(&spec)?;
        let files = BootFiles::open(&spec, &identity)?;
        let shared_fs = spec.shared_fs.as_ref().map(|fs| fs.connect(&spec.run_dir)).transpose()?;
        let (vsock, vsock_end) =
            sockets.start(&spec.vsock_program, &spec.identity, record).map_err(|source| {
                HypervisorError::Start {
                    name: "vsock",
                    next: "see whether kata-vmm is installed and complete",
                    source,
                }
            })?;
        self.0.life.adopt(&vsock);

        let tsc_khz = match clock {
            Some(clock) => clock.end().await,
            None => None,
        };
        let ends = Ends { qmp: qmp_end, console: console_end, vsock: vsock_end, shared_fs };
        let qemu = spawn_qemu(spec, identity, ends, files, tsc_khz, record).map_err(|source| {
            HypervisorError::Start {
                name: "qemu",
                next: "install QEMU's system emulator or set hypervisor.qemu.path",
                source,
            }
        })?;
        self.0.life.adopt(&qemu);
        Ok(Started { qemu, vsock, qmp, console })
    }

    /// Comes back when the guest runs; whoever ends first meanwhile is found out about by [`explain`].
    async fn greet(&self, program: &Path, started: Started) -> Result<(), HypervisorError> {
        let Started { qemu, vsock, qmp, console } = started;
        let console = tokio::spawn(capture(console, self.0.life.console.clone(), "console".to_owned()));
        tokio::spawn(supervise(Arc::clone(&self.0), qemu.clone(), vsock.clone(), console));
        let greeted = tokio::select! {
            greeted = Qmp::connect(qmp, GREETING_BOUND) => greeted,
            _ = vsock.wait() => Err(QmpError::Closed { command: "greeting".to_owned() }),
        };
        match greeted {
            Ok((qmp, events)) => {
                let listener = tokio::spawn(listen(Arc::clone(&self.0), events));
                let mut state = self.0.state();
                state.qmp = Some(qmp);
                state.listener = Some(listener);
                Ok(())
            }
            Err(error) => {
                let stopping = self.0.life.stopping();
                Err(explain(error, stopping, program, &qemu, &vsock).await)
            }
        }
    }

    /// The control channel of a machine that runs.
    fn control(&self, operation: &'static str) -> Result<Qmp, HypervisorError> {
        self.0.life.check()?;
        let qmp = self.0.state().qmp.clone();
        qmp.ok_or(HypervisorError::WrongState { operation, state: "is not started" })
    }

    async fn command(&self, operation: &'static str, command: &str) -> Result<(), HypervisorError> {
        self.control(operation)?.execute(command, Value::Null, COMMAND_BOUND).await?;
        Ok(())
    }

    /// Like [`QemuVm::control`], where the machine has a bus to plug into.
    fn hotplug_control(&self, operation: &'static str) -> Result<Qmp, HypervisorError> {
        let qmp = self.control(operation)?;
        match self.0.state().machine {
            Some(machine) if !takes_devices(machine) => Err(HypervisorError::unsupported(
                operation,
                &format!("QEMU's machine {machine}"),
                "set hypervisor.qemu.machine_type to \"q35\"",
            )),
            _ => Ok(qmp),
        }
    }
}

/// Whether devices can be plugged into this machine while it runs.
fn takes_devices(machine: Machine) -> bool {
    match machine {
        Machine::Q35 => true,
        Machine::Microvm => false,
    }
}

#[async_trait]
impl Vm for QemuVm {
    fn capabilities(&self) -> Capabilities {
        let state = self.0.state();
        let plugs = state.machine.is_some_and(takes_devices);
        Capabilities {
            shared_fs: true,
            pause: true,
            hotplug_cpu: state.grows.0,
            hotplug_memory: state.grows.1,
            hotplug_block: plugs,
            hotplug_network: plugs,
            host_devices: false,
            ..Capabilities::default()
        }
    }

    async fn boot(&self, spec: VmSpec, record: &Record) -> Result<Origin, HypervisorError> {
        check(&spec)?;
        match &mut self.0.state().machine {
            Some(_) => {
                return Err(HypervisorError::WrongState { operation: "boot", state: "was started already" });
            }
            machine => *machine = Some(spec.machine),
        }
        let program = spec.program.clone();
        let resizer = Resizer::new(&spec);
        self.0.state().grows = resizer.grows();
        *self.0.resizer.lock().await = resizer;
        *self.0.plugged.lock().await = Plugged::new(spec.disk_limits);
        let outcome = match self.start(spec, record).await {
            Ok(started) => self.greet(&program, started).await,
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            self.0.life.abandon().await;
        }
        outcome.map(|()| Origin::Kernel)
    }

    async fn exited(&self) -> VmExit {
        self.0.life.exited().await
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.command("pause", "stop").await
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        self.command("resume", "cont").await
    }

    async fn add_device(&self, device: Device) -> Result<PciPath, HypervisorError> {
        match device {
            Device::Disk(disk) => {
                let qmp = self.hotplug_control("adding a disk")?;
                self.0.plugged.lock().await.add_disk(&qmp, &disk).await
            }
            Device::Nic(nic) => {
                let qmp = self.hotplug_control("adding a network interface")?;
                self.0.plugged.lock().await.add_nic(&qmp, nic).await
            }
            Device::Host(_) => Err(no_host_devices(DRIVER)),
        }
    }

    async fn remove_device(&self, id: &str) -> Result<(), HypervisorError> {
        let qmp = self.hotplug_control("removing a device")?;
        self.0.plugged.lock().await.remove(&qmp, id, REMOVAL_BOUND).await
    }

    async fn resize(&self, size: Size) -> Result<Layout, HypervisorError> {
        let qmp = self.control("changing the size")?;
        self.0.resizer.lock().await.resize(&qmp, size).await
    }

    async fn stop(&self) -> Result<(), HypervisorError> {
        self.0.life.abandon().await;
        Ok(())
    }

    fn console_tail(&self) -> String {
        self.0.life.console.text()
    }

    fn processes(&self) -> Vec<ProcessInfo> {
        self.0.life.processes()
    }
}

/// What makes no machine whatever the host can do.
fn check(spec: &VmSpec) -> Result<(), HypervisorError> {
    spec.check()?;
    spec.check_boots(DRIVER)?;
    spec.check_own_devices(DRIVER)?;
    confidential::check(spec)?;
    match spec {
        VmSpec { machine: Machine::Microvm, growth: Some(_), .. } => Err(HypervisorError::unsupported(
            "growing while it runs",
            "QEMU's machine microvm",
            "set hypervisor.qemu.machine_type to \"q35\", or runtime.static_sandbox_resource_mgmt to true",
        )),
        _ => Ok(()),
    }
}

/// QEMU's ends of its sockets.
struct Ends {
    qmp: OwnedFd,
    console: OwnedFd,
    vsock: OwnedFd,
    shared_fs: Option<OwnedFd>,
}

fn spawn_qemu(
    spec: VmSpec,
    identity: Identity,
    ends: Ends,
    files: BootFiles,
    tsc_khz: Option<u64>,
    record: &Record,
) -> Result<Child, SpawnError> {
    let mut spawn = Spawn::new("qemu", &spec.program);
    let mut give = |fd: OwnedFd| spawn.hand_over(fd);
    let shared_fs_tag = spec.shared_fs.map(|fs| fs.tag);
    let fds = Fds {
        qmp: give(ends.qmp),
        console: give(ends.console),
        vsock: give(ends.vsock),
        kernel: give(files.kernel),
        initrd: files.initrd.map(&mut give),
        firmware: files.firmware.map(&mut give),
        shared_fs: ends.shared_fs.map(&mut give),
    };
    let nics: Vec<NicPlan> = spec
        .nics
        .into_iter()
        .map(|Nic { mac, mtu, queues, vhost, .. }| NicPlan {
            mac,
            mtu,
            fds: queues.into_iter().map(&mut give).collect(),
            vhost: vhost.into_iter().map(&mut give).collect(),
        })
        .collect();
    let image = files.image.map(|fd| (IMAGE.to_owned(), fd));
    let disks: Vec<DiskPlan> =
        image.into_iter().chain(files.disks).map(|(id, fd)| DiskPlan { id, fd: give(fd) }).collect();
    let args = command_line(&Plan {
        id: &spec.id,
        machine: spec.machine,
        accelerator: spec.accelerator,
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        growth: spec.growth,
        backing: spec.backing,
        kernel_params: &spec.kernel_params,
        shared_fs_tag: shared_fs_tag.as_deref(),
        nics: &nics,
        disks: &disks,
        disk_limits: spec.disk_limits,
        seccomp_sandbox: &spec.seccomp_sandbox,
        tsc_khz,
        confidential: spec
            .confidential
            .as_ref()
            .map(|wanted| confidential::object(wanted, confidential::c_bit())),
        fds,
    });
    tracing::debug!(program = %spec.program.display(), args = args.join(" "), "starting QEMU");
    let namespaces = Namespaces { mount: true, ipc: true, network: true, pid: false };
    spawn.args(args).identity(identity).namespaces(namespaces).spawn(record)
}

#[cfg(test)]
mod tests;

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
mod command_line;

mod hotplug;
pub(crate) mod qmp;
mod resize;
mod supervisor;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::Value;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::clock::Measurement;
use self::command_line::{Fds, NicPlan, Plan, command_line};
use self::hotplug::{Plugged, REMOVAL_BOUND};
use self::qmp::{Qmp, QmpError};
use self::resize::Resizer;
use self::supervisor::{LastWords, explain, listen, supervise};
use crate::files::{open_for, with_kvm};
use crate::process::{Child, Identity, Namespaces, Record, Spawn, SpawnError, Tail, capture};
use crate::vm::{
    Accelerator, Capabilities, Disk, HypervisorError, Layout, Machine, Nic, Origin, PciPath, ProcessInfo,
    Size, Vm, VmExit, VmSpec,
};
use crate::vsock::Sockets;

/// How much of the guest's console is kept.
const CONSOLE_LIMIT: usize = 64 * 1024;
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
    console: Tail,
    exit: watch::Sender<Option<VmExit>>,
}

#[derive(Default)]
struct State {
    /// Which machine was asked for; `None` before [`Vm::boot`].
    machine: Option<Machine>,
    /// Whether CPUs and memory can be added.
    grows: (bool, bool),
    stopping: bool,
    qmp: Option<Qmp>,
    listener: Option<JoinHandle<()>>,
    last_words: LastWords,
    children: Vec<Child>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes charge of a new process, or ends it where the machine is being stopped.
    fn adopt(&self, child: &Child) {
        let mut state = self.state();
        state.children.push(child.clone());
        if state.stopping {
            kill(child);
        }
    }
}

/// Our own children can always be killed: only one that has changed to root without us could not.
fn kill(child: &Child) {
    if let Err(error) = child.kill() {
        tracing::warn!(process = child.name(), pid = child.pid(), %error, "process cannot be killed");
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
            console: Tail::new(CONSOLE_LIMIT),
            exit: watch::channel(None).0,
        }))
    }

    /// Starts both processes. Those that run when it fails are in `Shared::children`.
    async fn start(&self, spec: VmSpec, record: &Record) -> Result<Started, HypervisorError> {
        let clock = Measurement::begin().filter(|_| spec.accelerator == Accelerator::Tcg);
        let identity = match spec.accelerator {
            Accelerator::Kvm => with_kvm(&spec.identity, Path::new("/dev/kvm"))?,
            Accelerator::Tcg => spec.identity.clone(),
        };
        let sockets = Sockets::bind(&spec.run_dir, &spec.vsock, record)?;
        let (qmp, qmp_end) = socket_pair(&spec)?;
        let (console, console_end) = socket_pair(&spec)?;
        let files = Files::open(&spec, &identity)?;
        let (vsock, vsock_end) =
            sockets.start(&spec.vsock_program, &spec.identity, record).map_err(|source| {
                HypervisorError::Start {
                    name: "vsock",
                    next: "see whether kata-vmm is installed and complete",
                    source,
                }
            })?;
        self.0.adopt(&vsock);

        let tsc_khz = match clock {
            Some(clock) => clock.end().await,
            None => None,
        };
        let ends = Ends { qmp: qmp_end, console: console_end, vsock: vsock_end };
        let qemu = spawn_qemu(spec, identity, ends, files, tsc_khz, record).map_err(|source| {
            HypervisorError::Start {
                name: "qemu",
                next: "install QEMU's system emulator or set hypervisor.qemu.path",
                source,
            }
        })?;
        self.0.adopt(&qemu);
        Ok(Started { qemu, vsock, qmp, console })
    }

    /// Comes back when the guest runs; whoever ends first meanwhile is found out about by [`explain`].
    async fn greet(&self, program: &Path, started: Started) -> Result<(), HypervisorError> {
        let Started { qemu, vsock, qmp, console } = started;
        let console = tokio::spawn(capture(console, self.0.console.clone(), "console".to_owned()));
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
                let stopping = self.0.state().stopping;
                Err(explain(error, stopping, program, &qemu, &vsock).await)
            }
        }
    }

    /// Ends every process and waits until they are gone.
    async fn abandon(&self) {
        let children = {
            let mut state = self.0.state();
            state.stopping = true;
            state.children.clone()
        };
        children.iter().for_each(kill);
        for child in children {
            child.wait().await;
        }
    }

    /// The control channel of a machine that runs.
    fn control(&self, operation: &'static str) -> Result<Qmp, HypervisorError> {
        if let Some(exit) = self.0.exit.borrow().clone() {
            return Err(HypervisorError::Ended(exit));
        }
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
            Some(machine) if !takes_devices(machine) => Err(HypervisorError::Unsupported {
                operation,
                driver: format!("QEMU's machine {machine}; set hypervisor.qemu.machine_type to \"q35\""),
            }),
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
            ..Capabilities::default()
        }
    }

    async fn boot(&self, spec: VmSpec, record: &Record) -> Result<Origin, HypervisorError> {
        check(&spec)?;
        if self.0.state().machine.replace(spec.machine).is_some() {
            return Err(HypervisorError::WrongState { operation: "boot", state: "was started already" });
        }
        let program = spec.program.clone();
        let resizer = Resizer::new(&spec);
        self.0.state().grows = resizer.grows();
        *self.0.resizer.lock().await = resizer;
        let outcome = match self.start(spec, record).await {
            Ok(started) => self.greet(&program, started).await,
            Err(error) => Err(error),
        };
        if outcome.is_err() {
            self.abandon().await;
        }
        outcome.map(|()| Origin::Kernel)
    }

    async fn exited(&self) -> VmExit {
        let mut exit = self.0.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await;
        match ended.ok().and_then(|exit| exit.clone()) {
            Some(exit) => exit,
            None => std::future::pending().await,
        }
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        self.command("pause", "stop").await
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        self.command("resume", "cont").await
    }

    async fn add_disk(&self, disk: Disk) -> Result<PciPath, HypervisorError> {
        let qmp = self.hotplug_control("adding a disk")?;
        self.0.plugged.lock().await.add_disk(&qmp, &disk).await
    }

    async fn add_nic(&self, nic: Nic) -> Result<PciPath, HypervisorError> {
        let qmp = self.hotplug_control("adding a network interface")?;
        self.0.plugged.lock().await.add_nic(&qmp, nic).await
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
        self.abandon().await;
        Ok(())
    }

    fn console_tail(&self) -> String {
        self.0.console.text()
    }

    fn processes(&self) -> Vec<ProcessInfo> {
        let state = self.0.state();
        let alive = state.children.iter().filter(|child| child.exit().is_none());
        alive.map(|child| ProcessInfo { name: child.name().to_owned(), pid: child.pid() }).collect()
    }
}

/// What makes no machine whatever the host can do.
fn check(spec: &VmSpec) -> Result<(), HypervisorError> {
    let reason = match spec {
        VmSpec { vcpus: 0, .. } => "it has no virtual CPU",
        VmSpec { memory_mib: ..64, .. } => "it has less than 64 MiB of memory, which boots no guest",
        VmSpec { machine: Machine::Microvm, growth: Some(_), .. } => {
            return Err(HypervisorError::Unsupported {
                operation: "growing while it runs",
                driver: "QEMU's machine microvm; set hypervisor.qemu.machine_type to \"q35\", or \
                         runtime.static_sandbox_resource_mgmt to true"
                    .to_owned(),
            });
        }
        VmSpec { template: Some(_), .. } => {
            return Err(HypervisorError::Unsupported {
                operation: "starting from a template",
                driver: "QEMU's driver; set runtime.hypervisor_name to \"builtin\"".to_owned(),
            });
        }
        VmSpec { initrd: None, image: None, .. } => "it has neither an initrd nor an image to boot from",
        _ => match spec.nics.iter().find_map(|nic| Some((nic, nic.fault()?))) {
            Some((nic, reason)) => {
                return Err(HypervisorError::InvalidDevice { id: nic.id.clone(), reason });
            }
            None => return Ok(()),
        },
    };
    Err(HypervisorError::InvalidSpec { id: spec.id.clone(), reason: reason.to_owned() })
}

fn socket_pair(spec: &VmSpec) -> Result<(UnixStream, OwnedFd), HypervisorError> {
    let pair = || {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs.into()))
    };
    pair().map_err(|source| HypervisorError::File {
        what: "socket pair of",
        path: spec.run_dir.clone(),
        source,
    })
}

/// The files that the guest boots from.
struct Files {
    kernel: OwnedFd,
    initrd: Option<OwnedFd>,
    image: Option<OwnedFd>,
}

impl Files {
    fn open(spec: &VmSpec, identity: &Identity) -> Result<Self, HypervisorError> {
        let open = |path: &Option<PathBuf>, what| {
            path.as_ref().map(|path| open_for(identity, path, what)).transpose()
        };
        Ok(Self {
            kernel: open_for(identity, &spec.kernel, "guest kernel")?,
            initrd: open(&spec.initrd, "initrd")?,
            image: open(&spec.image, "image")?,
        })
    }
}

/// QEMU's ends of its sockets.
struct Ends {
    qmp: OwnedFd,
    console: OwnedFd,
    vsock: OwnedFd,
}

fn spawn_qemu(
    spec: VmSpec,
    identity: Identity,
    ends: Ends,
    files: Files,
    tsc_khz: Option<u64>,
    record: &Record,
) -> Result<Child, SpawnError> {
    let mut spawn = Spawn::new("qemu", &spec.program);
    let mut give = |fd: OwnedFd| spawn.hand_over(fd);
    let (shared_fs_tag, shared_fs) = spec.shared_fs.map(|fs| (fs.tag, fs.socket)).unzip();
    let fds = Fds {
        qmp: give(ends.qmp),
        console: give(ends.console),
        vsock: give(ends.vsock),
        kernel: give(files.kernel),
        initrd: files.initrd.map(&mut give),
        image: files.image.map(&mut give),
        shared_fs: shared_fs.map(&mut give),
    };
    let nics: Vec<NicPlan> = spec
        .nics
        .into_iter()
        .map(|Nic { mac, mtu, queues, .. }| NicPlan {
            mac,
            mtu,
            fds: queues.into_iter().map(&mut give).collect(),
        })
        .collect();
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
        seccomp_sandbox: &spec.seccomp_sandbox,
        tsc_khz,
        fds,
    });
    tracing::debug!(program = %spec.program.display(), args = args.join(" "), "starting QEMU");
    let namespaces = Namespaces { mount: true, ipc: true, network: true, pid: false };
    spawn.args(args).identity(identity).namespaces(namespaces).spawn(record)
}

#[cfg(test)]
mod tests;

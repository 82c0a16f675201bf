//! The handle to a pod: every operation is one message to the actor and one answer.

use std::fmt;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use kata_api::GuestProcess;
use kata_api::agent::StatsContainerResponse;
use kata_config::SharedFs;
use kata_hypervisor::process::{Identity, Record};
use kata_hypervisor::{ProcessInfo, Vm};
use oci_spec::runtime::{LinuxResources, Process};
use tokio::net::UnixListener;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use crate::boot;
use crate::error::SandboxError;
use crate::guest::Guest;
use crate::identity;
use crate::initdata::PodInitdata;
use crate::lifecycle::{self, Link, Message, Pod, Reply, Request};
use crate::network::{Network, Wiring};
use crate::pod::{
    ContainerSpec, Event, Exit, Inspection, ProcessId, ProcessState, SandboxSpec, Status, Stdio,
};
use crate::process_table::check_id;
use crate::resources::Resources;
use crate::storage::{PodDisks, Share};
use crate::teardown::{self, RECORD};
use crate::timeline::{Layer, Timeline};

/// A handle to one pod. Clones speak to the same pod, which lives until [`shutdown`](Self::shutdown) or its death,
/// handles or not.
#[derive(Clone)]
pub struct Sandbox {
    pod: Arc<Pod>,
    post: mpsc::UnboundedSender<Message>,
    link: watch::Receiver<Link>,
    events: broadcast::Sender<Event>,
}

impl fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sandbox")
            .field("id", &self.pod.id)
            .field("run_dir", &self.pod.run_dir)
            .finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Begins a pod: the actor runs when this returns, the boot goes on behind it and every operation waits for it.
    ///
    /// # Errors
    /// Only where nothing was begun: the pod's directory is unusable, or no identity is free. Nothing is left then.
    pub async fn launch(spec: SandboxSpec, vm: Box<dyn Vm>) -> Result<Self, SandboxError> {
        let (pod, ready) = begin(spec, vm)?;
        let ends = lifecycle::start(pod.clone(), ready);
        Ok(Self { pod, post: ends.post, link: ends.link, events: ends.events })
    }

    /// Waits until the pod can hold containers.
    ///
    /// # Errors
    /// The boot failed, or the pod is over.
    pub async fn ready(&self) -> Result<(), SandboxError> {
        Link::agent(&self.link).await.map(drop)
    }

    /// Makes a container: its files, its streams, its process stopped before the first instruction.
    ///
    /// # Errors
    /// `NotFound` and `PermissionDenied` speak of the command. On any error nothing of the container is left.
    pub async fn create_container(&self, container: ContainerSpec) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Create(Box::new(container), reply)).await
    }

    /// Registers a process to be executed in a container; it runs at [`start`](Self::start).
    ///
    /// # Errors
    /// The container is unknown or over, or the name is taken.
    pub async fn exec(
        &self,
        container: &str,
        exec_id: &str,
        process: Process,
        stdio: Stdio,
    ) -> Result<(), SandboxError> {
        let id = ProcessId::exec(container, exec_id);
        self.ask(|reply| Request::Exec { id, process: Box::new(process), stdio, reply }).await
    }

    /// Starts a process. The answer is the pid shown to clients: the owner's.
    ///
    /// # Errors
    /// `NotFound` and `PermissionDenied` speak of the command, where the process is known.
    pub async fn start(&self, process: &ProcessId) -> Result<u32, SandboxError> {
        self.ask(|reply| Request::Start(process.clone(), reply)).await
    }

    /// Waits for a process to end. A process that has ended is answered at once, until it is deleted.
    ///
    /// # Errors
    /// There is no such process.
    pub async fn wait(&self, process: &ProcessId) -> Result<Exit, SandboxError> {
        let watch = self.ask(|reply| Request::Wait(process.clone(), reply)).await;
        lifecycle::wait(process, watch).await
    }

    /// Waits until the client of a process that has ended has all its output, or reads no more: as long as it takes, for
    /// a pager may stand still for hours. The pod's end cuts it short.
    ///
    /// # Errors
    /// There is no such process.
    pub async fn delivered(&self, process: &ProcessId) -> Result<(), SandboxError> {
        let carried = self.ask(|reply| Request::Delivered(process.clone(), reply)).await?;
        if let Some(mut carried) = carried {
            // Nothing is ever sent: it closes.
            while carried.changed().await.is_ok() {}
        }
        Ok(())
    }

    /// Sends a signal to a process, or with `all` to its container's first process and every exec that runs. A
    /// container that is still being created is given up by a signal that ends programs.
    ///
    /// # Errors
    /// `NotFound` for a process that is unknown or has ended.
    pub async fn kill(&self, process: &ProcessId, signal: u32, all: bool) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Kill { id: process.clone(), signal, all, reply }).await
    }

    /// Sets the size of a process's terminal, in characters.
    ///
    /// # Errors
    /// The process is unknown, or has no terminal.
    pub async fn resize(&self, process: &ProcessId, rows: u32, columns: u32) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Resize { id: process.clone(), rows, columns, reply }).await
    }

    /// Ends a process's input, after all that is in the client's FIFO by now. Before the process is started it holds
    /// for when it is.
    ///
    /// # Errors
    /// The process is unknown.
    pub async fn close_stdin(&self, process: &ProcessId) -> Result<(), SandboxError> {
        self.ask(|reply| Request::CloseStdin(process.clone(), reply)).await
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self, container: &str) -> Result<(), SandboxError> {
        let (container, to) = (container.to_owned(), Status::Paused);
        self.ask(|reply| Request::Freeze { container, to, reply }).await
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// It is not paused.
    pub async fn resume(&self, container: &str) -> Result<(), SandboxError> {
        let (container, to) = (container.to_owned(), Status::Running);
        self.ask(|reply| Request::Freeze { container, to, reply }).await
    }

    /// A container's resource use, as the guest's cgroups count it.
    ///
    /// # Errors
    /// The container is unknown.
    pub async fn stats(&self, container: &str) -> Result<StatsContainerResponse, SandboxError> {
        self.ask(|reply| Request::Stats(container.to_owned(), reply)).await
    }

    /// The processes of a container, or of the whole guest, as the guest tells them.
    ///
    /// # Errors
    /// The container is unknown, or the agent is one that cannot list processes.
    pub async fn processes(&self, container: Option<&str>) -> Result<Vec<GuestProcess>, SandboxError> {
        self.ask(|reply| Request::Processes(container.map(str::to_owned), reply)).await
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// The container is unknown, or a limit cannot be carried to the guest.
    pub async fn update(&self, container: &str, resources: LinuxResources) -> Result<(), SandboxError> {
        self.ask(|reply| Request::Update(container.to_owned(), Box::new(resources), reply)).await
    }

    /// What is known of a process. Works also after the pod ended.
    ///
    /// # Errors
    /// The process is unknown.
    pub async fn state(&self, process: &ProcessId) -> Result<ProcessState, SandboxError> {
        self.ask(|reply| Request::State(process.clone(), reply)).await
    }

    /// The pids of a container that the host knows: the owner's, once for the container, whether it runs or not, and each exec
    /// that runs.
    ///
    /// # Errors
    /// The container is unknown.
    pub async fn pids(&self, container: &str) -> Result<Vec<u32>, SandboxError> {
        self.ask(|reply| Request::Pids(container.to_owned(), reply)).await
    }

    /// Removes a process that does not run, and with a container its files. The answer is how it ended. Waits, within
    /// 5 seconds, until the client has the last output. A container that is being created is given up.
    ///
    /// # Errors
    /// It runs, or an exec of it does.
    pub async fn delete(&self, process: &ProcessId) -> Result<Exit, SandboxError> {
        self.ask(|reply| Request::Delete(process.clone(), reply)).await
    }

    /// Ends the pod and removes everything it has on the host, except its directory, state and logs. Idempotent.
    ///
    /// # Errors
    /// Something could not be removed, and is named. Another call tries again.
    pub async fn shutdown(&self) -> Result<(), SandboxError> {
        self.ask(Request::Shutdown).await
    }

    /// Everything known about the pod, in one answer. Works also after the pod ended.
    pub async fn inspect(&self) -> Inspection {
        let (reply, answer) = oneshot::channel();
        let _ = self.post.send(Message::Request(Request::Inspect(reply)));
        // The actor holds one end of its queue itself, so it answers as long as the runtime does.
        answer.await.unwrap_or_default()
    }

    /// The guest, to be asked about itself. Does not wait.
    ///
    /// # Errors
    /// [`SandboxError::Booting`], or the pod is over.
    pub fn guest(&self) -> Result<Guest, SandboxError> {
        match &*self.link.borrow() {
            Link::Pending => Err(SandboxError::Booting),
            Link::Up(agent) => Ok(Guest::new(agent.clone())),
            Link::Down(error) => Err(error.clone()),
        }
    }

    /// How the agent is reached: `hvsock://<socket>:<port>`, a unix socket with the `CONNECT <port>` handshake.
    pub fn agent_url(&self) -> String {
        format!("hvsock://{}:{}", self.pod.hybrid.display(), kata_api::ports::AGENT)
    }

    /// The processes that the pod consists of beside its owner, as far as they live: those of the machine, `virtiofsd`.
    pub fn host_processes(&self) -> Vec<ProcessInfo> {
        let mut processes = self.pod.vm.processes();
        let daemon = self.pod.virtiofsd.get().filter(|child| child.exit().is_none());
        processes.extend(daemon.map(|child| ProcessInfo { name: child.name().to_owned(), pid: child.pid() }));
        processes
    }

    /// What happens from now on. A listener that falls 256 events behind loses the oldest.
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// What the pod was launched with.
    pub fn config(&self) -> &kata_config::Config {
        &self.pod.config
    }

    /// The pod's directory.
    pub fn run_dir(&self) -> &Path {
        &self.pod.run_dir
    }

    async fn ask<T>(&self, request: impl FnOnce(Reply<T>) -> Request) -> Result<T, SandboxError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.post.send(Message::Request(request(reply)));
        answer
            .await
            .unwrap_or_else(|_| Err(SandboxError::Dead { cause: "its owner is going down".to_owned() }))
    }
}

/// Everything that can be made without waiting. On an error nothing of it is left.
pub(crate) fn begin(spec: SandboxSpec, vm: Box<dyn Vm>) -> Result<(Arc<Pod>, UnixListener), SandboxError> {
    check_id(&spec.id)?;
    make_dir(&spec.run_dir).map_err(|source| run_dir_error(&spec.run_dir, source))?;
    let record = spec.run_dir.join(RECORD);
    if record.exists() {
        return Err(SandboxError::LeftOver(record));
    }
    let run_dir = spec.run_dir.clone();
    let begun = assemble(spec, vm);
    if begun.is_err()
        && let Err(error) = teardown::release(&run_dir)
    {
        tracing::error!(%error, "a pod that could not be begun left something behind");
    }
    begun
}

fn assemble(spec: SandboxSpec, vm: Box<dyn Vm>) -> Result<(Arc<Pod>, UnixListener), SandboxError> {
    let SandboxSpec { id, hostname, config, artefacts, run_dir, started, choice, network, resources } = spec;
    if config.hypervisor.qemu.shared_fs == SharedFs::VirtioFs && !vm.capabilities().shared_fs {
        return Err(SandboxError::Driver {
            driver: choice.driver,
            lacks: "cannot share files of the host with the guest, as shared_fs = \"virtio-fs\" asks for",
            next: "set runtime.hypervisor_name to \"qemu\", \"builtin\" or \"cloud-hypervisor\"",
        });
    }
    let directly = config.runtime.dan_conf.join(format!("{id}.json"));
    if config.runtime.dan_conf.is_absolute() && directly.exists() {
        return Err(SandboxError::DirectNetwork(directly));
    }
    let mut timeline = Timeline::new(started);
    timeline.add(Layer::Host, "owner", started);
    let start = std::time::Instant::now();
    let record = Record::open(run_dir.join(RECORD))
        .map_err(|error| run_dir_error(&run_dir, io::Error::other(error)))?;
    let initdata = PodInitdata::prepare(&config, &artefacts, &run_dir, &record)
        .map_err(|error| SandboxError::Initdata(Arc::new(error)))?;
    // First of all: whatever is started from here on is born in the pod's cgroup.
    let resources = Resources::prepare(&id, &resources, &config, &record)
        .map_err(|error| SandboxError::Resources(Arc::new(error)))?;
    let identity = take_identity(&run_dir, &id, &config, &record)?;
    let share = match config.hypervisor.qemu.shared_fs {
        SharedFs::None => None,
        SharedFs::VirtioFs => Some(
            Share::prepare(&run_dir, &record)
                .map_err(|error| run_dir_error(&run_dir, io::Error::other(error)))?,
        ),
    };
    timeline.add(Layer::Host, "share", start);
    let hybrid = run_dir.join("kata.hvsock");
    let created_at = SystemTime::now();
    let network = network.map(|network| Network::new(network, Wiring::of(&config, choice.driver)));
    let pod = Arc::new(Pod {
        hostname: hostname.unwrap_or_else(|| id.clone()),
        id,
        config,
        artefacts,
        choice,
        network,
        run_dir,
        hybrid,
        identity,
        record,
        share,
        initdata,
        resources,
        disks: PodDisks::default(),
        changes: OnceLock::new(),
        next_disk: AtomicU32::new(0),
        virtiofsd: OnceLock::new(),
        vm,
        timeline,
        created_at,
    });
    let ready = boot::ready_listener(&pod).map_err(|error| SandboxError::Boot(Arc::new(error)))?;
    Ok((pod, ready))
}

fn take_identity(
    run_dir: &Path,
    id: &str,
    config: &kata_config::Config,
    record: &Record,
) -> Result<Identity, SandboxError> {
    identity::take(run_dir.parent().unwrap_or(run_dir), id, config.runtime.uid_range, record)
        .map_err(|error| SandboxError::Identity(Arc::new(error)))
}

/// The pod's processes must be able to pass through to their sockets, and nobody may look around.
fn make_dir(run_dir: &Path) -> io::Result<()> {
    match std::fs::DirBuilder::new().mode(0o711).create(run_dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            std::fs::set_permissions(run_dir, std::os::unix::fs::PermissionsExt::from_mode(0o711))
        }
        other => other,
    }
}

fn run_dir_error(path: &Path, source: io::Error) -> SandboxError {
    SandboxError::RunDir { path: path.to_owned(), source: Arc::new(source) }
}

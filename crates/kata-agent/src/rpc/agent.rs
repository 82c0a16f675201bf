//! What the handlers share: the engine, the storages, and the containers with their processes.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::Pid;
use tokio::sync::{Notify, mpsc};

use super::error::RpcError;
use super::hooks::GuestHooks;
use crate::cmdline::Settings;
use crate::container::{Engine, PodNamespaces};
use crate::device::{Disks, Passing};
use crate::modules::Modules;
use crate::mount::Storages;
use crate::mount::share::Held;
use crate::reaper::{ExitReceiver, ExitStatus, Reaper};
use crate::services::Services;
use crate::services::sealed::Secrets;
use crate::stdio::Attached;
use crate::stream::Streams;

/// Processes of a container that are remembered after somebody waited for their end.
const REMEMBERED: usize = 32;
/// OOM kills that may wait to be asked for.
const OOM_KILLS: usize = 64;

/// A process of a container, running or ended.
#[derive(Debug)]
pub struct Process {
    /// In the agent's pid namespace.
    pub pid: Pid,
    /// Its end.
    pub exit: ExitReceiver,
    /// Its streams.
    pub stdio: Attached,
    /// The signal that it was meant to die of, where SIGKILL had to stand in; zero for none.
    asked: AtomicI32,
    waited: AtomicBool,
}

impl Process {
    /// A process that the engine just made.
    #[must_use]
    pub fn new(pid: Pid, exit: ExitReceiver, stdio: Attached) -> Self {
        Self { pid, exit, stdio, asked: AtomicI32::new(0), waited: AtomicBool::new(false) }
    }

    /// Remembers that a SIGKILL to come stands for `signal`.
    pub fn dies_of(&self, signal: i32) {
        self.asked.store(signal, Ordering::Relaxed);
    }

    /// Its exit code, when it ends.
    pub async fn wait(&self) -> i32 {
        let status = self.exit.wait().await;
        self.waited.store(true, Ordering::Relaxed);
        match (status, self.asked.load(Ordering::Relaxed)) {
            (ExitStatus::Signaled(libc::SIGKILL), asked) if asked != 0 => 128 + asked,
            (status, _) => status.code(),
        }
    }

    fn is_forgettable(&self) -> bool {
        self.waited.load(Ordering::Relaxed)
    }
}

/// A container that the engine has made.
#[derive(Debug)]
pub struct Container {
    /// Its first process.
    pub init: Arc<Process>,
    /// Mount points that go with it.
    pub mounts: Vec<PathBuf>,
    /// Mounts of the pod's share that are held for it, see [`crate::mount::share`].
    pub shared: Vec<PathBuf>,
    /// What is sealed for it.
    pub secrets: Arc<Secrets>,
    /// Whose turn it is to remove it: what two would give back at once, another container may already have.
    pub removal: Arc<tokio::sync::Mutex<()>>,
    /// Further processes by exec id, oldest first. `None` is one in the making.
    execs: Mutex<Vec<(String, Option<Arc<Process>>)>>,
}

/// A place in the table of processes that is given up unless filled.
#[derive(Debug)]
pub struct ExecSlot {
    container: Arc<Container>,
    id: String,
}

impl Container {
    /// A container with its init only.
    #[must_use]
    pub fn new(init: Process, mounts: Vec<PathBuf>, shared: Vec<PathBuf>, secrets: Arc<Secrets>) -> Self {
        Self {
            init: Arc::new(init),
            mounts,
            shared,
            secrets,
            removal: Arc::default(),
            execs: Mutex::default(),
        }
    }

    fn execs(&self) -> MutexGuard<'_, Vec<(String, Option<Arc<Process>>)>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the exec id `id`; one whose process ended and was waited for is free again.
    ///
    /// # Errors
    /// [`RpcError::Exists`].
    pub fn reserve(self: &Arc<Self>, id: &str) -> Result<ExecSlot, RpcError> {
        let mut execs = self.execs();
        if let Some(at) = execs.iter().position(|(taken, _)| taken == id) {
            let ended =
                execs.get(at).and_then(|(_, process)| process.as_ref()).is_some_and(|it| it.is_forgettable());
            if !ended {
                return Err(RpcError::Exists(format!("process {id:?}")));
            }
            execs.remove(at);
        }
        if execs.len() >= REMEMBERED {
            let forgettable = |(_, process): &(String, Option<Arc<Process>>)| {
                process.as_ref().is_some_and(|process| process.is_forgettable())
            };
            if let Some(oldest) = execs.iter().position(forgettable) {
                execs.remove(oldest);
            }
        }
        execs.push((id.to_owned(), None));
        Ok(ExecSlot { container: self.clone(), id: id.to_owned() })
    }

    fn process(&self, id: &str) -> Option<Arc<Process>> {
        self.execs().iter().find(|(known, _)| known == id).and_then(|(_, process)| process.clone())
    }
}

impl ExecSlot {
    /// Puts the process in its place.
    pub fn fill(self, process: Process) {
        let process = Arc::new(process);
        if let Some((_, slot)) = self.container.execs().iter_mut().find(|(id, _)| *id == self.id) {
            *slot = Some(process);
        }
    }
}

impl Drop for ExecSlot {
    fn drop(&mut self) {
        self.container.execs().retain(|(id, process)| *id != self.id || process.is_some());
    }
}

/// The sandbox of the guest.
#[derive(Debug)]
pub struct Sandbox {
    /// Its id; for the log only.
    pub id: String,
    /// What goes with it, once it is made.
    pub made: Option<SandboxParts>,
}

/// What the containers of a sandbox share.
#[derive(Debug)]
pub struct SandboxParts {
    /// Mount points.
    pub mounts: Vec<PathBuf>,
    /// Host name, System V IPC, processes.
    pub namespaces: Arc<PodNamespaces>,
    /// Whether all containers are in one pid namespace, and not only those for which it is said.
    pub shares_pids: bool,
    /// Programs of the image that are run for each.
    pub hooks: Arc<GuestHooks>,
}

/// Containers by id. `None` is one in the making.
type Containers = HashMap<String, Option<Arc<Container>>>;

/// The state behind the services. One per guest.
pub struct Agent {
    /// Runs the containers.
    pub engine: Arc<dyn Engine>,
    /// Tells the end of processes.
    pub reaper: Reaper,
    /// Stream connections of the host.
    pub streams: Streams,
    /// Mounts.
    pub storages: Storages,
    /// Programs of the guest that can do more.
    pub services: Services,
    /// Whose turn it is to change copied files: in the order of the calls, and not two at once, also where a caller no longer waits.
    pub copies: Arc<tokio::sync::Mutex<()>>,
    /// Whose turn it is to have the hardware report.
    pub reports: Arc<tokio::sync::Mutex<()>>,
    /// Mounts of the pod's share.
    pub shared: Arc<Held>,
    /// Devices for containers.
    pub devices: Passing,
    /// Kernel modules for later.
    pub modules: Arc<Modules>,
    /// What the agent was told at boot.
    pub settings: Settings,
    /// Rung when the sandbox was destroyed: the agent's work is done.
    pub done: Notify,
    /// Whether the sandbox was destroyed, or is being: nothing is made any more.
    over: AtomicBool,
    sandbox: Mutex<Option<Sandbox>>,
    containers: Mutex<Containers>,
    oom_kills: (mpsc::Sender<String>, tokio::sync::Mutex<mpsc::Receiver<String>>),
}

impl Agent {
    /// An agent without sandbox and containers.
    #[must_use]
    pub fn new(
        engine: Arc<dyn Engine>,
        reaper: Reaper,
        modules: Arc<Modules>,
        services: Services,
        settings: Settings,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(OOM_KILLS);
        let disks = Disks::new(modules.clone(), settings.hotplug_timeout);
        let devices = Passing::new(modules.clone(), settings.hotplug_timeout);
        Self {
            engine,
            reaper,
            streams: Streams::default(),
            storages: Storages::new(
                modules.clone(),
                disks,
                services.clone(),
                settings.secure_storage_integrity,
            ),
            services,
            copies: Arc::default(),
            reports: Arc::default(),
            shared: Arc::default(),
            devices,
            modules,
            settings,
            done: Notify::new(),
            over: AtomicBool::new(false),
            sandbox: Mutex::default(),
            containers: Mutex::default(),
            oom_kills: (sender, tokio::sync::Mutex::new(receiver)),
        }
    }

    /// From now on nothing is made: the sandbox goes, and the guest with it.
    pub fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    /// That the sandbox was not destroyed.
    ///
    /// # Errors
    /// [`RpcError::State`].
    pub fn check_not_over(&self) -> Result<(), RpcError> {
        if self.over.load(Ordering::SeqCst) {
            return Err(RpcError::State(
                "the sandbox was destroyed, and nothing is made after it".to_owned(),
            ));
        }
        Ok(())
    }

    /// The sandbox, if there is one.
    pub fn sandbox(&self) -> MutexGuard<'_, Option<Sandbox>> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The namespaces that containers share; none without a sandbox.
    ///
    /// # Errors
    /// [`RpcError::State`] while the sandbox is being made.
    pub fn pod_namespaces(&self) -> Result<Option<Arc<PodNamespaces>>, RpcError> {
        let sandbox = self.sandbox();
        let Some(sandbox) = sandbox.as_ref() else { return Ok(None) };
        match &sandbox.made {
            Some(parts) => Ok(Some(parts.namespaces.clone())),
            None => Err(RpcError::State(format!("sandbox {:?} is being created", sandbox.id))),
        }
    }

    /// Whether the sandbox was made for one pid namespace.
    pub fn shares_pids(&self) -> bool {
        self.sandbox()
            .as_ref()
            .and_then(|sandbox| sandbox.made.as_ref())
            .is_some_and(|parts| parts.shares_pids)
    }

    /// The image's hooks for containers; none without a sandbox.
    pub fn guest_hooks(&self) -> Arc<GuestHooks> {
        let sandbox = self.sandbox();
        let parts = sandbox.as_ref().and_then(|sandbox| sandbox.made.as_ref());
        parts.map(|parts| parts.hooks.clone()).unwrap_or_default()
    }

    fn containers(&self) -> MutexGuard<'_, Containers> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the id for a container in the making, until [`insert`](Self::insert) or [`forget`](Self::forget).
    ///
    /// # Errors
    /// [`RpcError::Exists`]; [`RpcError::State`] once the sandbox goes.
    pub fn reserve(&self, id: &str) -> Result<(), RpcError> {
        let mut containers = self.containers();
        self.check_not_over()?;
        if containers.contains_key(id) {
            return Err(RpcError::Exists(format!("container {id:?}")));
        }
        containers.insert(id.to_owned(), None);
        Ok(())
    }

    /// Puts a container in the place reserved for it.
    pub fn insert(&self, id: &str, container: Container) {
        self.containers().insert(id.to_owned(), Some(Arc::new(container)));
    }

    /// Frees the id.
    pub fn forget(&self, id: &str) {
        self.containers().remove(id);
    }

    /// The container of this id.
    ///
    /// # Errors
    /// [`RpcError::NoContainer`]; [`RpcError::State`] while it is being made.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, RpcError> {
        match self.containers().get(id) {
            Some(Some(container)) => Ok(container.clone()),
            Some(None) => Err(RpcError::State(format!("container {id:?} is being created"))),
            None => Err(RpcError::NoContainer(id.to_owned())),
        }
    }

    /// That the container of this id is still the one that was looked up: it may be gone by now, and another have its id.
    ///
    /// # Errors
    /// [`RpcError::NoContainer`].
    pub fn confirm(&self, id: &str, container: &Arc<Container>) -> Result<(), RpcError> {
        match self.containers().get(id) {
            Some(Some(present)) if Arc::ptr_eq(present, container) => Ok(()),
            _ => Err(RpcError::NoContainer(id.to_owned())),
        }
    }

    /// The process of this exec id; the empty id and the container's own are its init.
    ///
    /// # Errors
    /// [`RpcError::NoContainer`], [`RpcError::NoProcess`].
    pub fn process(&self, container: &str, exec: &str) -> Result<Arc<Process>, RpcError> {
        let found = self.container(container)?;
        if exec.is_empty() || exec == container {
            return Ok(found.init.clone());
        }
        let missing = || RpcError::NoProcess { container: container.to_owned(), process: exec.to_owned() };
        found.process(exec).ok_or_else(missing)
    }

    /// Ids of all containers that are there.
    #[must_use]
    pub fn container_ids(&self) -> Vec<String> {
        self.containers().keys().cloned().collect()
    }

    /// Keeps an OOM kill for [`oom_kill`](Self::oom_kill); while too many wait it is only logged.
    pub fn report_oom(&self, container: &str) {
        tracing::warn!(container, "a process was killed for want of memory");
        let _ = self.oom_kills.0.try_send(container.to_owned());
    }

    /// The container of the next OOM kill.
    pub async fn oom_kill(&self) -> Option<String> {
        self.oom_kills.1.lock().await.recv().await
    }
}

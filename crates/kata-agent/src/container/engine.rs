//! The engine proper: which containers there are, and the talk with their helpers.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use kata_api::agent::CgroupStats;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::cgroup::{Cgroup, Cgroups, OomEvents};
use super::plan::{Plan, ProcessPlan};
use super::template::Template;
use super::wire::{self, Answer, Attached, Request, Task};
use super::{Engine, EngineError, ProcessIo, Spawned};
use crate::aside;
use crate::reaper::Reaper;

/// Where the engine finds what it needs.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Mount point of the cgroup v2 hierarchy, `/sys/fs/cgroup` in the guest.
    pub cgroup_root: PathBuf,
    /// The cgroup below which those of containers are made, relative to the root; empty for the root itself.
    pub cgroup: PathBuf,
    /// An executable that calls [`helper_main`](super::helper_main); `None` is this one.
    pub helper: Option<PathBuf>,
}

/// Containers made with the kernel's own means. See the module for how.
pub struct NativeEngine {
    cgroups: Cgroups,
    template: Template,
    containers: Table,
}

type Table = Arc<Mutex<HashMap<String, Slot>>>;

fn lock(table: &Table) -> MutexGuard<'_, HashMap<String, Slot>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an id stands for.
enum Slot {
    /// Taken by a create that is under way.
    Reserved,
    Made(Arc<Container>),
}

struct Container {
    id: String,
    cgroup: Cgroup,
    init: Pid,
    /// Names the init even after its number is used again.
    pidfd: OwnedFd,
    /// `CLONE_NEW*` that an exec has to enter.
    namespaces: u32,
    /// The compiled seccomp filter; empty without a profile.
    filter: Vec<u8>,
    state: Mutex<State>,
}

struct State {
    /// The control socket of an init that waits to be started.
    gate: Option<UnixStream>,
    paused: bool,
}

impl NativeEngine {
    /// An engine without containers. It starts the process that helpers are forked from, whose exit status, like
    /// theirs, goes to `reaper`.
    ///
    /// # Errors
    /// The template process cannot be started.
    pub fn new(layout: Layout, reaper: Reaper) -> io::Result<Self> {
        let Layout { cgroup_root, cgroup, helper } = layout;
        let template = Template::start(helper, reaper)?;
        Ok(Self { cgroups: Cgroups::new(cgroup_root, &cgroup), template, containers: Table::default() })
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, EngineError> {
        match lock(&self.containers).get(id) {
            Some(Slot::Made(container)) => Ok(Arc::clone(container)),
            Some(Slot::Reserved) => {
                Err(EngineError::WrongState { id: id.to_owned(), state: "still being created" })
            }
            None => Err(EngineError::NoContainer(id.to_owned())),
        }
    }

    /// Gets a helper and gives it the request.
    async fn ask(
        &self,
        request: &Request,
        filter: &[u8],
        attached: Attached<BorrowedFd<'_>>,
    ) -> Result<UnixStream, EngineError> {
        let failed = |error: io::Error| EngineError::setup("run the container helper", error);
        let mut socket = self.template.helper().map_err(failed)?;
        wire::send_request(&mut socket, request, filter, attached).await.map_err(failed)?;
        Ok(socket)
    }

    /// Makes the cgroup into `unfinished` and the process in it.
    async fn make(
        &self,
        unfinished: &mut Unfinished,
        spec: &Spec,
        bundle: &Path,
        io: &ProcessIo,
    ) -> Result<(Init, Option<OwnedFd>), EngineError> {
        let id = unfinished.id.clone();
        let plan = Plan::of(&id, spec, bundle)?;
        let linux = spec.linux().as_ref();
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let nodes = linux.and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
        let cgroup = unfinished.cgroup.insert(self.cgroups.create(&plan.cgroup)?);
        if let Some(resources) = resources {
            cgroup.limit(resources)?;
        }
        cgroup.filter_devices(resources, nodes)?;
        let namespaces = plan.container.namespaces();
        let request = Request { process: plan.process, task: Task::Create(Box::new(plan.container)) };
        let mut gate = self.ask(&request, &[], attach(io, cgroup.directory(), None)).await?;
        let mut made = Made::read(&id, &mut gate).await?;
        if !made.ready {
            return Err(EngineError::Ended(id));
        }
        let filter = std::mem::take(&mut made.filter);
        let Spawned { pid: init, terminal } = made.spawned(&id, &request.process)?;
        // A child of this process that nobody has waited for: its number is still its own.
        let pidfd = pidfd_open(init, PidfdFlags::empty())
            .map_err(|error| EngineError::setup("hold the init", error))?;
        Ok((Init { init, pidfd, namespaces, filter, gate }, terminal))
    }
}

/// The init of a container, waiting at its gate.
struct Init {
    init: Pid,
    pidfd: OwnedFd,
    namespaces: u32,
    filter: Vec<u8>,
    gate: UnixStream,
}

impl Init {
    fn container(self, id: &str, cgroup: Cgroup) -> Container {
        let Self { init, pidfd, namespaces, filter, gate } = self;
        let state = Mutex::new(State { gate: Some(gate), paused: false });
        Container { id: id.to_owned(), cgroup, init, pidfd, namespaces, filter, state }
    }
}

/// A container that is not there yet: its id is taken, and dropped it goes away with whatever it has by then.
struct Unfinished {
    containers: Table,
    id: String,
    cgroup: Option<Cgroup>,
    done: bool,
}

impl Unfinished {
    fn take(containers: &Table, id: &str) -> Result<Self, EngineError> {
        match lock(containers).entry(id.to_owned()) {
            Entry::Occupied(_) => Err(EngineError::Exists(id.to_owned())),
            Entry::Vacant(vacant) => {
                vacant.insert(Slot::Reserved);
                Ok(Self { containers: Arc::clone(containers), id: id.to_owned(), cgroup: None, done: false })
            }
        }
    }

    /// The container is made.
    fn finish(mut self, of: impl FnOnce(Cgroup) -> Container) -> Result<Pid, EngineError> {
        let cgroup = self.cgroup.take().ok_or_else(|| EngineError::setup("keep the cgroup", Errno::NOENT))?;
        let container = of(cgroup);
        let init = container.init;
        lock(&self.containers).insert(self.id.clone(), Slot::Made(Arc::new(container)));
        self.done = true;
        Ok(init)
    }

    /// Undoes what there is; goes on by itself when nobody waits for it.
    fn undo(&mut self) -> Option<tokio::task::JoinHandle<()>> {
        if std::mem::replace(&mut self.done, true) {
            return None;
        }
        let (containers, id) = (Arc::clone(&self.containers), std::mem::take(&mut self.id));
        let Some(cgroup) = self.cgroup.take() else {
            lock(&containers).remove(&id);
            return None;
        };
        // Without a runtime the agent is on its way down, and the guest with it.
        let runtime = tokio::runtime::Handle::try_current().ok()?;
        Some(runtime.spawn(async move {
            if let Err(error) = cgroup.destroy().await {
                tracing::warn!(id, %error, "a container that could not be created leaves its cgroup");
            }
            // Only now: the next of this id would have the same cgroup.
            lock(&containers).remove(&id);
        }))
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.undo();
    }
}

fn attach<'fd>(
    io: &'fd ProcessIo,
    cgroup: BorrowedFd<'fd>,
    init: Option<BorrowedFd<'fd>>,
) -> Attached<BorrowedFd<'fd>> {
    let borrow = |fd: &'fd Option<OwnedFd>| fd.as_ref().map(AsFd::as_fd);
    Attached {
        cgroup: Some(cgroup),
        stdin: borrow(&io.stdin),
        stdout: borrow(&io.stdout),
        stderr: borrow(&io.stderr),
        init,
    }
}

/// What a helper and its child said until the process was ready, or gone from the socket.
#[derive(Default)]
struct Made {
    filter: Vec<u8>,
    pid: Option<Pid>,
    terminal: Option<OwnedFd>,
    ready: bool,
}

impl Made {
    async fn read(id: &str, socket: &mut UnixStream) -> Result<Self, EngineError> {
        let mut made = Self::default();
        // Both may come first: the helper's pid and its child's readiness.
        while !(made.ready && made.pid.is_some()) {
            match next(id, socket).await? {
                None => break,
                Some(Answer::Filter(filter)) => made.filter = filter,
                Some(Answer::Pid(pid)) => made.pid = Pid::from_raw(pid),
                Some(Answer::Terminal(master)) => made.terminal = Some(master),
                Some(Answer::Ready) => made.ready = true,
                Some(Answer::Failed(failure)) => return Err(failure.into_error()),
            }
        }
        Ok(made)
    }

    /// The process, if it got as far as `plan` needs it.
    fn spawned(self, id: &str, plan: &ProcessPlan) -> Result<Spawned, EngineError> {
        match (self.pid, self.terminal) {
            (Some(pid), terminal) if terminal.is_some() == plan.terminal.is_some() => {
                Ok(Spawned { pid, terminal })
            }
            _ => Err(EngineError::Ended(id.to_owned())),
        }
    }
}

async fn next(id: &str, socket: &mut UnixStream) -> Result<Option<Answer>, EngineError> {
    let answer = wire::next_answer(socket).await;
    answer.map_err(|error| EngineError::setup(format!("hear from the process of container {id:?}"), error))
}

impl Container {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrong(&self, state: &'static str) -> EngineError {
        EngineError::WrongState { id: self.id.clone(), state }
    }

    /// Enters the container with a new process and gives it once it has run its program.
    async fn enter(
        &self,
        engine: &NativeEngine,
        process: &Process,
        io: &ProcessIo,
    ) -> Result<Spawned, EngineError> {
        let process = ProcessPlan::of(process)?;
        if self.state().paused {
            return Err(self.wrong("paused"));
        }
        let request = Request { process, task: Task::Exec { namespaces: self.namespaces } };
        match self.enter_cgroup(engine, &request, io, self.cgroup.directory()).await {
            // The container has handed its controllers to children, so processes live in those only.
            Err(EngineError::Setup { step, source })
                if step == wire::ENTER_CGROUP && source.raw_os_error() == Some(libc::EBUSY) =>
            {
                let cgroup = self.cgroup.of_process(self.init)?;
                self.enter_cgroup(engine, &request, io, cgroup.as_fd()).await
            }
            Err(EngineError::Setup { step, source })
                if step == wire::ENTER_NAMESPACES && source.raw_os_error() == Some(libc::ESRCH) =>
            {
                Err(self.wrong("stopped"))
            }
            result => result,
        }
    }

    async fn enter_cgroup(
        &self,
        engine: &NativeEngine,
        request: &Request,
        io: &ProcessIo,
        cgroup: BorrowedFd<'_>,
    ) -> Result<Spawned, EngineError> {
        let attached = attach(io, cgroup, Some(self.pidfd.as_fd()));
        let mut socket = engine.ask(request, &self.filter, attached).await?;
        Made::read(&self.id, &mut socket).await?.spawned(&self.id, &request.process)
    }
}

#[async_trait]
impl Engine for NativeEngine {
    async fn create(
        &self,
        id: &str,
        spec: &Spec,
        bundle: &Path,
        io: ProcessIo,
    ) -> Result<Spawned, EngineError> {
        let mut unfinished = Unfinished::take(&self.containers, id)?;
        match self.make(&mut unfinished, spec, bundle, &io).await {
            Ok((init, terminal)) => {
                let pid = unfinished.finish(|cgroup| init.container(id, cgroup))?;
                Ok(Spawned { pid, terminal })
            }
            Err(error) => {
                if let Some(undone) = unfinished.undo() {
                    // It does not panic, and one that is cancelled has no runtime to wait in either.
                    let _ = undone.await;
                }
                Err(error)
            }
        }
    }

    async fn start(&self, id: &str) -> Result<(), EngineError> {
        let container = self.container(id)?;
        let gate = container.state().gate.take();
        let mut gate = gate.ok_or_else(|| container.wrong("started already"))?;
        // One that was killed while it waited is a started container that has ended.
        if gate.write_all(&[1]).await.is_err() {
            return Ok(());
        }
        match next(id, &mut gate).await? {
            Some(Answer::Failed(failure)) => Err(failure.into_error()),
            _ => Ok(()),
        }
    }

    async fn exec(&self, id: &str, process: &Process, io: ProcessIo) -> Result<Spawned, EngineError> {
        self.container(id)?.enter(self, process, &io).await
    }

    async fn signal_all(&self, id: &str, signal: Signal) -> Result<(), EngineError> {
        Ok(self.container(id)?.cgroup.signal(signal)?)
    }

    async fn pause(&self, id: &str) -> Result<(), EngineError> {
        let container = self.container(id)?;
        container.state().paused = true;
        let frozen = container.cgroup.freeze().await;
        if frozen.is_err() {
            container.state().paused = false;
        }
        Ok(frozen?)
    }

    async fn resume(&self, id: &str) -> Result<(), EngineError> {
        let container = self.container(id)?;
        container.cgroup.thaw().await?;
        container.state().paused = false;
        Ok(())
    }

    async fn update(&self, id: &str, resources: &LinuxResources) -> Result<(), EngineError> {
        let (container, resources) = (self.container(id)?, resources.clone());
        let change = move || {
            container.cgroup.limit(&resources)?;
            if resources.devices().as_ref().is_some_and(|rules| !rules.is_empty()) {
                container.cgroup.filter_devices(Some(&resources), &[])?;
            }
            Ok(())
        };
        // Whoever lowers a memory limit waits until the kernel has taken the rest away.
        aside::within(aside::BOUND, format!("changing the limits of container {id:?}"), change).await?
    }

    async fn stats(&self, id: &str) -> Result<CgroupStats, EngineError> {
        Ok(self.container(id)?.cgroup.stats()?)
    }

    async fn pids(&self, id: &str) -> Result<Vec<Pid>, EngineError> {
        Ok(self.container(id)?.cgroup.pids()?)
    }

    async fn delete(&self, id: &str) -> Result<(), EngineError> {
        let container = self.container(id)?;
        // Its init, if it still waits, ends with this; the rest is killed with the cgroup.
        container.state().gate = None;
        container.cgroup.destroy().await?;
        lock(&self.containers).remove(id);
        Ok(())
    }

    fn oom_events(&self, id: &str) -> Result<OomEvents, EngineError> {
        Ok(self.container(id)?.cgroup.oom_events()?)
    }
}

//! The actor: the one task that owns a pod's state.
//!
//! ```text
//!   creating ──agent serves──▶ ready ──shutdown, death──▶ stopping ──nothing left──▶ stopped
//!      └──────boot failed, shutdown, death──────────────────▲
//! ```
//!
//! It only ever handles one message at a time and never waits inside one. Work runs in tasks that find what they need
//! in [`Pod`], wait for the machine through [`Link`] and come back as messages.

mod files;
mod message;
mod pids;
mod requests;
mod work;

use std::path::PathBuf;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use kata_config::{Artefacts, Config};
use kata_hypervisor::host::Choice;
use kata_hypervisor::process::{self, Child, Identity, Record};
use kata_hypervisor::{Vm, VmExit};
use tokio::net::UnixListener;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

pub(crate) use files::ContainerFiles;
use message::Done;
pub(crate) use message::{Message, Reply, Request};
pub(crate) use work::{drain, wait};

use crate::agent_client::Agent;
use crate::agent_log;
use crate::boot::{self, Booted, Excerpt};
use crate::error::{SandboxError, chain};
use crate::health;
use crate::initdata::PodInitdata;
use crate::network::{self, Network};
use crate::pod::{Event, Exit, Inspection};
use crate::process_table::{ProcessTable, millis};
use crate::resources::Resources;
use crate::state::{State, owner};
use crate::storage::{Changes, PodDisks, Share};
use crate::teardown;
use crate::timeline::Timeline;

/// The code of a process whose machine ended under it: no program means anything by it.
const MACHINE_DIED: u32 = 255;
/// The code of a process that ended because its pod was shut down: as if killed by SIGKILL.
const SHUT_DOWN: u32 = 128 + 9;

/// What does not change in a pod's life. Every task holds it.
pub(crate) struct Pod {
    pub(crate) id: String,
    /// The guest's host name.
    pub(crate) hostname: String,
    pub(crate) config: Config,
    pub(crate) artefacts: Artefacts,
    pub(crate) choice: Choice,
    pub(crate) network: Option<Network>,
    pub(crate) run_dir: PathBuf,
    /// The host's side of the vsock device.
    pub(crate) hybrid: PathBuf,
    pub(crate) identity: Identity,
    pub(crate) record: Record,
    /// `None` where no files are shared.
    pub(crate) share: Option<Share>,
    /// `None` where none was given.
    pub(crate) initdata: Option<PodInitdata>,
    pub(crate) resources: Resources,
    /// Disks that several containers use.
    pub(crate) disks: PodDisks,
    /// What tells of changes in volumes, once one needs it; `None` where the host has none to give.
    pub(crate) changes: OnceLock<Option<Arc<Changes>>>,
    /// Number of the next disk, for its name.
    pub(crate) next_disk: AtomicU32,
    /// The virtio-fs daemon, once it was started.
    pub(crate) virtiofsd: OnceLock<Child>,
    pub(crate) vm: Box<dyn Vm>,
    /// The stages before the boot.
    pub(crate) timeline: Timeline,
    pub(crate) created_at: SystemTime,
}

impl Pod {
    /// What tells of changes in volumes: one for the pod, since a host has few of them.
    pub(crate) fn changes(&self) -> Option<Arc<Changes>> {
        let make = || {
            let made = Changes::new().map(Arc::new);
            made.inspect_err(|error| {
                tracing::warn!(pod = %self.id, %error, "the host tells of no changes in volumes (fs.inotify.max_user_instances): they are looked at every 2 s");
            })
            .ok()
        };
        self.changes.get_or_init(make).clone()
    }
}

/// The way to the agent, for those who wait for it.
#[derive(Clone, Debug)]
pub(crate) enum Link {
    /// The machine boots.
    Pending,
    Up(Agent),
    /// For good, and why.
    Down(SandboxError),
}

impl Link {
    /// Waits until the machine has booted.
    pub(crate) async fn agent(link: &watch::Receiver<Self>) -> Result<Agent, SandboxError> {
        let mut link = link.clone();
        match link.wait_for(|link| !matches!(link, Self::Pending)).await.as_deref() {
            Ok(Self::Up(agent)) => Ok(agent.clone()),
            Ok(Self::Down(error)) => Err(error.clone()),
            Ok(Self::Pending) | Err(_) => Err(SandboxError::Dead { cause: "its owner is gone".to_owned() }),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Creating,
    Ready,
    Stopping,
    Stopped {
        /// Whether nothing is left on the host.
        clean: bool,
    },
}

impl Phase {
    fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Stopped { .. } => "stopped",
        }
    }

    /// A step that the picture above does not have is a fault of this crate: refused, and logged loudly.
    fn advance(&mut self, pod: &str, next: Self) -> bool {
        use Phase::{Creating, Ready, Stopped, Stopping};
        let legal = matches!(
            (*self, next),
            (Creating, Ready | Stopping)
                | (Ready, Stopping)
                | (Stopping, Stopped { .. })
                | (Stopped { clean: false }, Stopping)
        );
        debug_assert!(legal, "{self:?} to {next:?}");
        if !legal {
            tracing::error!(pod, from = self.as_str(), to = next.as_str(), "illegal transition refused");
            return false;
        }
        tracing::info!(pod, from = self.as_str(), to = next.as_str(), "transition");
        *self = next;
        true
    }
}

/// The actor's state.
pub(crate) struct Actor {
    pod: Arc<Pod>,
    post: mpsc::UnboundedSender<Message>,
    phase: Phase,
    link: watch::Sender<Link>,
    table: ProcessTable,
    /// Whether the pod's containers see each other's processes: as its first further container has it.
    shares_pids: Option<bool>,
    timeline: Timeline,
    events: broadcast::Sender<Event>,
    agent_version: String,
    guest_kernel: String,
    fault: Option<String>,
    boot: Option<JoinHandle<()>>,
    /// Creations hold resources of the host: a teardown waits for them. Everything else may be cut.
    creations: JoinSet<()>,
    watchers: JoinSet<()>,
    at_shutdown: Vec<Reply<()>>,
    /// Whether `state.json` is behind.
    dirty: bool,
}

/// The actor's outer ends.
pub(crate) struct Ends {
    pub(crate) post: mpsc::UnboundedSender<Message>,
    pub(crate) link: watch::Receiver<Link>,
    pub(crate) events: broadcast::Sender<Event>,
}

/// Starts the actor, and with it the boot.
pub(crate) fn start(pod: Arc<Pod>, ready: UnixListener) -> Ends {
    let (post, queue) = mpsc::unbounded_channel();
    let (link, link_ends) = watch::channel(Link::Pending);
    let events = broadcast::Sender::new(256);
    let ends = Ends { post: post.clone(), link: link_ends, events: events.clone() };
    let timeline = pod.timeline.clone();
    let mut actor = Actor {
        pod,
        post,
        phase: Phase::Creating,
        link,
        table: ProcessTable::default(),
        shares_pids: None,
        timeline,
        events,
        agent_version: String::new(),
        guest_kernel: String::new(),
        fault: None,
        boot: None,
        creations: JoinSet::new(),
        watchers: JoinSet::new(),
        at_shutdown: Vec::new(),
        dirty: true,
    };
    actor.begin_boot(ready);
    tokio::spawn(actor.run(queue));
    ends
}

impl Actor {
    async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Message>) {
        self.store();
        while let Some(message) = queue.recv().await {
            match message {
                Message::Request(request) => self.request(request),
                Message::Done(done) => self.done(done),
            }
            if self.dirty {
                self.store();
            }
            self.answer_shutdown();
        }
    }

    fn done(&mut self, done: Done) {
        match done {
            Done::Booted(result) => self.booted(result),
            Done::Created { id, result, reply } => self.created(id, result, reply),
            Done::Started { id, result, reply } => self.started(id, result, reply),
            Done::Exited(id, result) => self.exited(&id, result),
            Done::Frozen { container, to, result, reply } => self.frozen(&container, to, result, reply),
            Done::Deleted { id, result, files, reply } => self.deleted(&id, result, files, reply),
            // The guest names it, and may name anything.
            Done::Oom(container) if self.table.container(&container).is_ok() => {
                self.emit(Event::Oom { container });
            }
            Done::Oom(_) => tracing::warn!(pod = %self.pod.id, "the agent tells of an unknown container"),
            Done::Died(cause) => self.died(cause),
            Done::TornDown(result) => self.torn_down(&result),
        }
    }

    fn begin_boot(&mut self, ready: UnixListener) {
        let (pod, post) = (self.pod.clone(), self.post.clone());
        self.boot = Some(tokio::spawn(async move {
            let booted = boot::boot(&pod, ready).await.map(Box::new);
            // The actor outlives its tasks.
            let _ = post.send(Message::Done(Done::Booted(booted)));
        }));
    }

    fn booted(&mut self, result: Result<Box<Booted>, boot::BootError>) {
        if self.phase != Phase::Creating {
            return;
        }
        match result {
            Ok(booted) => {
                self.phase.advance(&self.pod.id, Phase::Ready);
                self.timeline.merge(booted.timeline);
                self.agent_version = booted.agent_version;
                self.guest_kernel = booted.guest_kernel;
                self.watch_pod(booted.agent.clone(), booted.virtiofsd);
                self.link.send_replace(Link::Up(booted.agent));
            }
            Err(error) => {
                let error = SandboxError::Boot(Arc::new(error));
                self.fail(error.chain(), error);
            }
        }
        self.dirty = true;
    }

    /// Watches for what may befall the pod from now on.
    fn watch_pod(&mut self, agent: Agent, virtiofsd: Option<Child>) {
        if self.pod.network.is_some() {
            self.watch_network(agent.clone());
        }
        let (pod, post, oom_agent) = (self.pod.clone(), self.post.clone(), agent.clone());
        self.watchers.spawn(async move {
            let cause = cause_of_death(&pod, &agent, virtiofsd).await;
            let _ = post.send(Message::Done(Done::Died(cause)));
        });
        self.watchers.spawn(agent_log::forward(self.pod.hybrid.clone(), self.pod.id.clone()));
        let post = self.post.clone();
        self.watchers.spawn(async move {
            // An agent without such events refuses at once, and there are none.
            while let Ok(container) = oom_agent.oom_event().await {
                let _ = post.send(Message::Done(Done::Oom(container)));
            }
        });
    }

    /// Follows the pod's network namespace, and leads its loopback to the guest's.
    fn watch_network(&mut self, agent: Agent) {
        // Otherwise the loopback at hand may be the host's own.
        if self.pod.network.as_ref().is_some_and(|network| network.spec().runtime_netns.is_some()) {
            self.watchers.spawn(network::lead_loopback(self.pod.hybrid.clone(), self.pod.id.clone()));
        }
        let pod = self.pod.clone();
        self.watchers.spawn(async move {
            if let Some(network) = &pod.network {
                network::follow(network, &*pod.vm, &agent, &pod.id).await;
            }
        });
    }

    fn died(&mut self, cause: String) {
        if self.phase == Phase::Ready {
            self.fail(cause.clone(), SandboxError::Dead { cause });
        }
    }

    /// Ends the pod because of `fault`; who asks from now on is answered with `error`.
    fn fail(&mut self, fault: String, error: SandboxError) {
        tracing::error!(pod = %self.pod.id, %fault, "the pod failed");
        self.fault = Some(fault);
        self.stop(error, MACHINE_DIED);
    }

    /// Ends the pod: every process is over with `code`, and the host's side is taken down.
    fn stop(&mut self, error: SandboxError, code: u32) {
        if !self.phase.advance(&self.pod.id, Phase::Stopping) {
            return;
        }
        self.dirty = true;
        let link = self.link.send_replace(Link::Down(error));
        self.watchers.abort_all();
        let has_disks = self
            .table
            .containers_mut()
            .any(|(_, container)| container.files.as_ref().is_some_and(ContainerFiles::has_disks));
        let dirty = match link {
            Link::Up(agent) if has_disks && self.fault.is_none() => Some(agent),
            Link::Up(_) | Link::Pending | Link::Down(_) => None,
        };
        let (mut ended, mut running) = (Vec::new(), Vec::new());
        for (_, container) in self.table.containers_mut() {
            container.cancel.send_replace(Some(9));
            for process in container.execs.values_mut().chain([&mut container.init]) {
                let streams = if process.exit().is_some() { &mut ended } else { &mut running };
                streams.extend(process.streams.take());
            }
        }
        let exit = Exit { code, at: SystemTime::now() };
        for process in self.table.end_all(exit) {
            self.emit(Event::Exited { process, exit });
        }
        let work = teardown::Teardown {
            pod: self.pod.clone(),
            boot: self.boot.take(),
            creations: std::mem::take(&mut self.creations),
            dirty,
            ended,
            running,
        };
        let post = self.post.clone();
        tokio::spawn(async move {
            let result = work.run().await;
            let _ = post.send(Message::Done(Done::TornDown(result)));
        });
    }

    fn torn_down(&mut self, result: &Result<(), SandboxError>) {
        self.dirty = true;
        self.phase.advance(&self.pod.id, Phase::Stopped { clean: result.is_ok() });
        if let Err(error) = result {
            tracing::error!(pod = %self.pod.id, error = %error.chain(), "teardown is incomplete");
        }
        self.store();
        for reply in self.at_shutdown.drain(..) {
            let _ = reply.send(result.clone());
        }
        self.emit(Event::Stopped { fault: self.fault.clone() });
    }

    fn shutdown(&mut self, reply: Reply<()>) {
        self.at_shutdown.push(reply);
        if !matches!(self.phase, Phase::Stopping | Phase::Stopped { clean: true }) {
            let cause = self.fault.clone().unwrap_or_else(|| "it was shut down".to_owned());
            self.stop(SandboxError::Dead { cause }, SHUT_DOWN);
        }
    }

    fn answer_shutdown(&mut self) {
        if self.phase == (Phase::Stopped { clean: true }) {
            for reply in self.at_shutdown.drain(..) {
                let _ = reply.send(Ok(()));
            }
        }
    }

    fn emit(&mut self, event: Event) {
        self.dirty = true;
        // Nobody need listen.
        let _ = self.events.send(event);
    }

    fn inspect(&self) -> Inspection {
        let processes = self.pod.vm.processes();
        let vmm = processes.iter().find(|process| process.name != "vsock").or_else(|| processes.first());
        Inspection {
            id: self.pod.id.clone(),
            state: self.phase.as_str().to_owned(),
            owner_pid: std::process::id(),
            vmm_pid: vmm.map_or(0, |process| process.pid),
            created_at_ms: millis(self.pod.created_at),
            hypervisor: self.pod.choice.driver.to_string(),
            accelerator: self.pod.choice.accelerator.to_string(),
            choice: self.pod.choice.reason.clone(),
            guest_kernel: self.guest_kernel.clone(),
            agent_version: self.agent_version.clone(),
            timeline: self.timeline.stages().to_vec(),
            containers: self.table.views(),
            fault: self.fault.clone(),
        }
    }

    /// Writes `state.json`. The pod goes on without it: it is for those who look on.
    fn store(&mut self) {
        self.dirty = false;
        let now = self.inspect();
        let (owner_pid, owner_start_time) = owner();
        let state = State {
            version: State::VERSION,
            id: now.id,
            state: now.state,
            owner_pid,
            owner_start_time,
            created_at_ms: now.created_at_ms,
            hypervisor: now.hypervisor,
            accelerator: now.accelerator,
            choice: now.choice,
            guest_kernel: now.guest_kernel,
            agent_version: now.agent_version,
            containers: now.containers,
            timeline: now.timeline,
            fault: now.fault,
        };
        if let Err(error) = state.store(&self.pod.run_dir) {
            tracing::warn!(pod = %self.pod.id, error = %chain(&error), "the pod's state is not kept");
        }
    }
}

/// Waits until the pod cannot go on, and says why.
async fn cause_of_death(pod: &Pod, agent: &Agent, virtiofsd: Option<Child>) -> String {
    let daemon = async {
        match &virtiofsd {
            Some(child) => child.wait().await,
            None => std::future::pending().await,
        }
    };
    let first_sign = tokio::select! {
        biased;
        exit = pod.vm.exited() => return machine_ended(pod, &exit),
        exit = daemon => {
            let output = virtiofsd.as_ref().map(Child::output_tail).unwrap_or_default();
            let oom = oom_of(pod, exit == process::Exit::Signal(9));
            format!("the virtio-fs daemon {exit}{oom}{}", Excerpt::output(&output))
        }
        () = agent.lost() => {
            format!("the guest's agent closed its connection while the machine runs on: it crashed{}", Excerpt::console(&pod.vm.console_tail()))
        }
        // Nobody ends because of that: what is stuck is not waited for.
        cause = health::lapsed(pod, agent, virtiofsd.as_ref()) => return cause,
    };
    // Both usually go because the machine went, which then is the better answer.
    match tokio::time::timeout(boot::GRACE, pod.vm.exited()).await {
        Ok(exit) => machine_ended(pod, &exit),
        Err(_) => first_sign,
    }
}

fn machine_ended(pod: &Pod, exit: &VmExit) -> String {
    format!("{exit}{}{}", oom_of(pod, *exit == VmExit::Signal(9)), boot::last_words(pod, exit))
}

/// Of a process that was `killed`: that it was the host's kernel, and for want of what.
pub(crate) fn oom_of(pod: &Pod, killed: bool) -> String {
    let oom = killed.then(|| pod.resources.oom()).flatten();
    oom.map(|why| format!("; {why}")).unwrap_or_default()
}

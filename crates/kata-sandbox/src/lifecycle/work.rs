//! What takes time: calls to the agent, files, streams. Each function runs in a task of its own.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kata_api::agent::{CreateContainerRequest, ExecProcessRequest};
use oci_spec::runtime::LinuxResources;
use tokio::sync::{Notify, watch};

use super::files::{self, ContainerFiles};
use super::message::{Created, Launched};
use super::pids::{self, Pids};
use super::{Link, Pod};
use crate::agent_client::{Agent, AgentError};
use crate::error::{ErrorKind, SandboxError};
use crate::guest_spec::{self, GuestSpecError};
use crate::hooks::Hooks;
use crate::pod::{ContainerSpec, Exit, ProcessId, RootfsMount, Stdio};
use crate::process_table::Pending;
use crate::resources::{self, ResourceError};
use crate::spec;
use crate::stdio::{Connected, StdioError, Streams};
use crate::storage::{Abort, SharedRoot};
use crate::timeline::{Layer, Timeline};

/// How long the removal of a process waits for its client to take the last output.
pub(crate) const DRAIN: Duration = Duration::from_secs(5);
/// How long an abandoned creation waits for the agent to forget it.
const FORGET: Duration = Duration::from_secs(5);
/// Between two requests to forget it.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// A failed call, as the failure of what it was for. A broken connection is the pod's death, once its cause is known.
pub(super) fn agent_error(
    action: &'static str,
    process: &ProcessId,
    error: AgentError,
    link: &watch::Receiver<Link>,
) -> SandboxError {
    match (&*link.borrow(), &error) {
        (Link::Down(cause), AgentError::Lost { .. }) => cause.clone(),
        _ => SandboxError::Agent { action, process: process.clone(), source: Arc::new(error) },
    }
}

/// Does what can be given up at any point, unless the creation is called off.
async fn unless_cancelled<T>(
    cancel: &mut watch::Receiver<Option<u32>>,
    id: &ProcessId,
    work: impl Future<Output = Result<T, SandboxError>>,
) -> Result<T, SandboxError> {
    tokio::select! {
        biased;
        _ = cancel.wait_for(Option::is_some) => Err(SandboxError::CreateCancelled(id.clone())),
        done = work => done,
    }
}

/// Makes a container. What was made before a failure is undone.
pub(super) async fn create(
    pod: &Arc<Pod>,
    link: &watch::Receiver<Link>,
    (container, pids): (ContainerSpec, Pids),
    close_stdin: Arc<Notify>,
    mut cancel: watch::Receiver<Option<u32>>,
) -> Result<Created, SandboxError> {
    let id = ProcessId::init(&container.id);
    let ContainerSpec { id: name, bundle, spec, rootfs, stdio } = container;
    let netns = pod.network.as_ref().and_then(|network| network.spec().runtime_netns.clone());
    let mut hooks = Hooks::new(&name, &bundle, &spec, netns);
    let first = pod.network.as_ref().is_some_and(|network| network.spec().bundle == bundle);
    if first {
        hooks = hooks.created();
    }
    let hooks = Arc::new(hooks);
    let share = resources::own_share(&spec);
    let prepared = prepare(pod, link, &id, bundle, spec, rootfs, &mut cancel).await;
    let Prepared { files, mut request, timeline } = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            // Those that made the pod's network ran with its boot: what they made has to go.
            if first {
                hooks.poststop().await;
            }
            return Err(cause_of(error, link));
        }
    };
    if let Some(process) = request.oci.as_mut().and_then(|oci| oci.process.as_mut()) {
        process.terminal = stdio.terminal;
    }
    request.sandbox_pidns = pids == Pids::Pod;
    let mut created = Created { files, hooks: hooks.clone(), streams: Streams::default(), timeline };
    let make = async {
        let begin = async {
            let failed = |source| SandboxError::Hook { process: id.clone(), source: Arc::new(source) };
            hooks.create().await.map_err(failed)?;
            Link::agent(link).await
        };
        let agent = unless_cancelled(&mut cancel, &id, begin).await?;
        // To its end: the machine's size is known only then.
        if let Some(limits) = &share {
            let admitted = pod.resources.admit(&name, limits.as_ref(), &*pod.vm, &agent).await;
            admitted.map_err(|error| resource_error("create", &id, error, link))?;
        }
        let make = async {
            if let Pids::Of(other) = &pids {
                let joined = pids::join(&agent, other, &mut request).await;
                joined.map_err(|error| agent_error("find the processes for", &id, error, link))?;
            }
            ask(pod, link, &id, request, &stdio, close_stdin, &mut created).await
        };
        unless_cancelled(&mut cancel, &id, make).await
    };
    match make.await {
        Ok(()) => Ok(created),
        Err(error) => {
            undo(pod, link, &id, created).await;
            Err(cause_of(error, link))
        }
    }
}

/// Why a creation failed: one that was given up because its pod came to its end failed of what the pod did.
fn cause_of(error: SandboxError, link: &watch::Receiver<Link>) -> SandboxError {
    match (error, &*link.borrow()) {
        (SandboxError::CreateCancelled(_), Link::Down(cause)) => cause.clone(),
        (error, _) => error,
    }
}

/// Kubernetes sets it for every container on hosts with control groups of version 2, so without it no pod would start.
const OOM_GROUP: &str = "memory.oom.group";

/// What the agent is to be asked for a container, and what it holds already.
struct Prepared {
    files: ContainerFiles,
    request: CreateContainerRequest,
    timeline: Timeline,
}

/// Translates the specification and brings the files on their way. What was made before a failure is undone.
async fn prepare(
    pod: &Arc<Pod>,
    link: &watch::Receiver<Link>,
    id: &ProcessId,
    bundle: PathBuf,
    spec: oci_spec::runtime::Spec,
    rootfs: Vec<RootfsMount>,
    cancel: &mut watch::Receiver<Option<u32>>,
) -> Result<Prepared, SandboxError> {
    let name = &id.container;
    let refused = |source| SandboxError::GuestSpec { process: id.clone(), source: Arc::new(source) };
    let root = match (&spec.root(), rootfs.is_empty()) {
        (Some(root), true) => bundle.join(root.path()),
        (Some(_), false) => bundle.join("rootfs"),
        (None, _) => return Err(refused(GuestSpecError::Missing("root"))),
    };
    let root = SharedRoot { path: root, mounts: rootfs };
    let mut guest =
        guest_spec::translate(name, spec, pod.config.runtime.disable_guest_seccomp).map_err(refused)?;
    let mut abort = Abort::on(cancel);
    let ways = files::choose(pod, id, &root, &guest, &mut abort).await?;
    if files::need_guest(&ways) {
        unless_cancelled(cancel, id, Link::agent(link)).await?;
    }
    let mut timeline = pod.timeline.fork();
    let start = Instant::now();
    let (files, wanted) = files::add(pod, link, id, (ways, root), &mut guest, &mut abort).await?;
    timeline.add(Layer::Host, format!("files of {name}"), start);

    let request = CreateContainerRequest {
        container_id: name.clone(),
        oci: Some(spec::spec(&guest.spec)).into(),
        storages: wanted.storages,
        devices: wanted.devices,
        ..Default::default()
    };
    Ok(Prepared { files, request, timeline })
}

/// Has the agent make the container, with its streams.
async fn ask(
    pod: &Pod,
    link: &watch::Receiver<Link>,
    id: &ProcessId,
    mut request: CreateContainerRequest,
    stdio: &Stdio,
    close_stdin: Arc<Notify>,
    created: &mut Created,
) -> Result<(), SandboxError> {
    let agent = Link::agent(link).await?;
    if let Some(spec) = request.oci.as_mut() {
        let resources = spec.linux.as_mut().and_then(|linux| linux.resources.as_mut());
        let process = spec.process.as_ref();
        understood(&agent, &spec.domainname, process, resources)
            .map_err(|source| SandboxError::GuestSpec { process: id.clone(), source: Arc::new(source) })?;
    }
    let start = Instant::now();
    let connected = Connected::open(&pod.hybrid, stdio).await.map_err(|source| stdio_error(id, source))?;
    let ports = connected.ports();
    request.stdin_port = ports.stdin;
    request.stdout_port = ports.stdout;
    request.stderr_port = ports.stderr;
    let bound = pod.config.agent.kata.create_container_bound();
    let answer = agent.create_container(&request, bound).await;
    answer.map_err(|error| match error {
        AgentError::NoAnswer { .. } => SandboxError::CreateTimeout { process: id.clone(), bound },
        error => agent_error("create", id, error, link),
    })?;
    created.streams = connected.carry(&agent, id, close_stdin);
    created.timeline.add(Layer::Container, format!("create {}", id.container), start);
    Ok(())
}

/// Refuses what only this project's agent understands where the guest has another.
pub(super) fn understood(
    agent: &Agent,
    domainname: &str,
    process: Option<&kata_api::oci::Process>,
    mut resources: Option<&mut kata_api::oci::LinuxResources>,
) -> Result<(), GuestSpecError> {
    if agent.is_ours() {
        return Ok(());
    }
    if let Some(unified) = resources.as_deref_mut().map(|resources| &mut resources.unified)
        && unified.remove(OOM_GROUP).is_some()
    {
        tracing::info!("{OOM_GROUP} is not told to the guest: its agent is not this project's");
    }
    match spec::extension(domainname, process, resources.as_deref()) {
        Some(field) => Err(GuestSpecError::Unsupported {
            field,
            reason: "the guest's agent is not this project's, and the protocol they share has no field for it",
        }),
        None => Ok(()),
    }
}

/// Takes a container back that was made, or half made. The agent may not know it.
pub(super) async fn undo(pod: &Pod, link: &watch::Receiver<Link>, id: &ProcessId, created: Created) {
    let Created { files, hooks, streams, .. } = created;
    drop(streams);
    pod.resources.dismiss(&id.container, &*pod.vm).await;
    let up = match &*link.borrow() {
        Link::Up(agent) => Some(agent.clone()),
        Link::Pending | Link::Down(_) => None,
    };
    if let Some(agent) = up {
        match tokio::time::timeout(FORGET, forget(&agent, id)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(process = %id, %error, "the agent cannot remove what it was creating")
            }
            Err(_) => {
                tracing::warn!(process = %id, "the agent goes on creating; what it makes stays in the guest")
            }
        }
    }
    files.release(pod, link).await;
    hooks.poststop().await;
}

/// Removes a container that the agent may still be making: it refuses until it is done.
async fn forget(agent: &Agent, id: &ProcessId) -> Result<(), AgentError> {
    loop {
        match agent.remove_container(&id.container).await {
            Err(error) if error.is_not_found() => return Ok(()),
            Err(error) if error.kind() == ErrorKind::FailedPrecondition => {
                tokio::time::sleep(ASK_AGAIN).await
            }
            other => return other,
        }
    }
}

/// What is to be started.
pub(super) enum Start {
    /// A container's own process, which waits in the guest.
    Container(Option<Arc<Hooks>>),
    /// An exec.
    Exec(Launch),
}

/// Starts a container's own process, on a network that is complete.
pub(super) async fn start(
    pod: &Pod,
    link: &watch::Receiver<Link>,
    id: &ProcessId,
    hooks: Option<Arc<Hooks>>,
) -> Result<Launched, SandboxError> {
    let agent = Link::agent(link).await?;
    let mut timeline = pod.timeline.fork();
    let start = Instant::now();
    if let Some(network) = &pod.network {
        let failed = |source| SandboxError::Network { process: id.clone(), source: Arc::new(source) };
        if network.catch_up(&*pod.vm, &agent).await.map_err(failed)? {
            timeline.add(Layer::Host, format!("late network of {}", id.container), start);
        }
    }
    let start = Instant::now();
    let started = agent.start_container(&id.container, pod.config.agent.kata.create_container_bound()).await;
    started.map_err(|error| agent_error("start", id, error, link))?;
    timeline.add(Layer::Container, format!("start {}", id.container), start);
    if let Some(hooks) = hooks {
        hooks.poststart().await;
    }
    Ok(Launched { streams: None, timeline })
}

/// An exec that is to be launched.
pub(super) struct Launch {
    pub(super) command: Box<oci_spec::runtime::Process>,
    pub(super) stdio: Stdio,
    pub(super) close_stdin: Arc<Notify>,
}

/// Starts a process in a container.
pub(super) async fn launch(
    pod: &Pod,
    link: &watch::Receiver<Link>,
    id: &ProcessId,
    launch: Launch,
) -> Result<Launched, SandboxError> {
    let Launch { command, stdio, close_stdin } = launch;
    let refused = |source| SandboxError::GuestSpec { process: id.clone(), source: Arc::new(source) };
    let command = guest_spec::guest_process(*command).map_err(refused)?;
    let agent = Link::agent(link).await?;
    let connected = Connected::open(&pod.hybrid, &stdio).await.map_err(|source| stdio_error(id, source))?;
    let ports = connected.ports();
    let mut process = spec::process(&command);
    understood(&agent, "", Some(&process), None).map_err(refused)?;
    process.terminal = stdio.terminal;
    let request = ExecProcessRequest {
        container_id: id.container.clone(),
        exec_id: id.exec.clone().unwrap_or_default(),
        process: Some(process).into(),
        stdin_port: ports.stdin,
        stdout_port: ports.stdout,
        stderr_port: ports.stderr,
        ..Default::default()
    };
    let bound = pod.config.agent.kata.create_container_bound();
    agent.exec_process(&request, bound).await.map_err(|error| agent_error("start", id, error, link))?;
    // Execs are not part of the pod's start.
    let streams = Some(connected.carry(&agent, id, close_stdin));
    Ok(Launched { streams, timeline: pod.timeline.fork() })
}

/// Freezes or thaws a container.
pub(super) async fn freeze(
    link: &watch::Receiver<Link>,
    container: &str,
    to: Pending,
) -> Result<(), SandboxError> {
    let agent: Agent = Link::agent(link).await?;
    let result =
        if to == Pending::Pause { agent.pause(container).await } else { agent.resume(container).await };
    result.map_err(|error| agent_error(to.as_str(), &ProcessId::init(container), error, link))
}

/// Changes a container's limits: room is made before the guest hears of them, and given back after it has.
pub(super) async fn update(
    pod: &Pod,
    link: &watch::Receiver<Link>,
    id: &ProcessId,
    limits: LinuxResources,
) -> Result<(), SandboxError> {
    let refused = |source| SandboxError::GuestSpec { process: id.clone(), source: Arc::new(source) };
    let mut in_guest = spec::resources(&guest_spec::guest_resources(limits.clone()).map_err(refused)?);
    let agent = Link::agent(link).await?;
    understood(&agent, "", None, Some(&mut in_guest)).map_err(refused)?;
    let changed = pod.resources.change(&id.container, &limits, &*pod.vm, &agent).await;
    let before = changed.map_err(|error| resource_error("update", id, error, link))?;
    if let Err(error) = agent.update(&id.container, in_guest).await {
        pod.resources.restore(before).await;
        return Err(agent_error("update", id, error, link));
    }
    pod.resources.shrink(&*pod.vm).await;
    Ok(())
}

fn resource_error(
    action: &'static str,
    process: &ProcessId,
    error: ResourceError,
    link: &watch::Receiver<Link>,
) -> SandboxError {
    match error {
        ResourceError::Guest(error) => agent_error(action, process, error, link),
        error => SandboxError::Limits { action, process: process.clone(), source: Arc::new(error) },
    }
}

/// What the host has of a process that is to be removed.
pub(super) struct Remains {
    pub(super) streams: Vec<Streams>,
    pub(super) files: Option<ContainerFiles>,
    pub(super) hooks: Option<Arc<Hooks>>,
}

/// Removes a process that does not run. Where the agent refuses, the files come back: the container is still there.
pub(super) async fn delete(
    pod: &Pod,
    link: &watch::Receiver<Link>,
    id: &ProcessId,
    remains: Remains,
) -> (Result<(), SandboxError>, Option<ContainerFiles>) {
    let Remains { streams, files, hooks } = remains;
    drain(streams, &id.to_string()).await;
    if id.exec.is_none() {
        let up = match &*link.borrow() {
            Link::Up(agent) => Some(agent.clone()),
            // The guest is gone, and the container with it.
            Link::Pending | Link::Down(_) => None,
        };
        if let Some(agent) = up {
            match agent.remove_container(&id.container).await {
                Ok(()) | Err(AgentError::Lost { .. }) => {}
                Err(error) if error.is_not_found() => {}
                Err(error) => return (Err(agent_error("delete", id, error, link)), files),
            }
        }
    }
    if let Some(files) = files {
        files.release(pod, link).await;
    }
    if id.exec.is_none() {
        pod.resources.dismiss(&id.container, &*pod.vm).await;
    }
    if let Some(hooks) = hooks {
        hooks.poststop().await;
    }
    (Ok(()), None)
}

/// Waits until the clients have the last output, within a bound.
pub(crate) async fn drain(streams: Vec<Streams>, of: &str) {
    let mut drains: tokio::task::JoinSet<bool> =
        streams.into_iter().map(|streams| streams.drain(DRAIN)).collect();
    while let Some(delivered) = drains.join_next().await {
        if !delivered.unwrap_or(false) {
            tracing::warn!(of, bound = ?DRAIN, "the client did not take all output; the rest is dropped");
        }
    }
}

/// Waits for a process to end.
pub(crate) async fn wait(
    id: &ProcessId,
    watch: Result<watch::Receiver<Option<Exit>>, SandboxError>,
) -> Result<Exit, SandboxError> {
    let mut watch = watch?;
    let exit = watch.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
    exit.ok_or_else(|| SandboxError::UnknownProcess(id.clone()))
}

fn stdio_error(id: &ProcessId, source: StdioError) -> SandboxError {
    SandboxError::Stdio { process: id.clone(), source: Arc::new(source) }
}

//! From nothing to an agent that serves.
//!
//! ```text
//!   ready listener ── hooks, network │ kata-virtiofsd ── VMM ── guest ── announcement on port 1028 ── connect port 1024 ── CreateSandbox
//!                                                         └ from a template: connect port 1024 ── clock, random numbers, network ┘
//! ```
//!
//! Whatever ends this is told with its layer and its cause: the VMM's end, the daemon's end, the agent's refusal, or,
//! where nothing at all comes, what the guest's console says.

mod error;
pub(crate) mod image;

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use kata_api::agent::{CreateSandboxRequest, KernelModule, Storage};
use kata_api::{Announcement, guest, ports};
use kata_hypervisor::process::{Child, Exit, FIRST_FD, Spawn};
use kata_hypervisor::{Growth, HypervisorError, Nic, Origin, Size, VmExit, VmSpec};
use rustix::fs::{Mode, OFlags};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::UnixListener;

pub use error::{BootError, Excerpt};
pub(crate) use image::Guest;
pub use image::{Measured, measured};

use crate::agent_client::{Agent, guest_text};
use crate::hooks;
use crate::hybrid;
use crate::lifecycle::{self, Pod};
use crate::storage::Share;
use crate::template::{self, Chosen};
use crate::timeline::{BOOTED, COPIED, Layer, Timeline};

/// Longest announcement that is read.
const ANNOUNCEMENT_MAX: u64 = 64 * 1024;
/// Between two tries to reach an agent that does not announce itself.
const RETRY: Duration = Duration::from_millis(20);
/// Least bound on one of those tries: below it, the guest could not answer at all.
const TRY_MIN: Duration = Duration::from_millis(100);
/// How long the cause of an end may lag behind its first sign.
pub(crate) const GRACE: Duration = Duration::from_millis(500);

/// What a completed boot leaves behind.
#[derive(Debug)]
pub(crate) struct Booted {
    pub(crate) agent: Agent,
    pub(crate) agent_version: String,
    pub(crate) guest_kernel: String,
    pub(crate) virtiofsd: Option<Child>,
    pub(crate) timeline: Timeline,
}

/// Listens for the agent's announcement. Only the pod's own processes may connect.
pub(crate) fn ready_listener(pod: &Pod) -> Result<UnixListener, BootError> {
    let path = PathBuf::from(format!("{}_{}", pod.hybrid.display(), ports::READY));
    let make = || -> io::Result<UnixListener> {
        pod.record.file(&path).map_err(io::Error::other)?;
        let listener = UnixListener::bind(&path)?;
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(pod.identity.uid), Some(pod.identity.gid))?;
        }
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(listener)
    };
    make().map_err(|source| BootError::Socket { path, source })
}

/// A machine whose agent is there, and nothing of the pod's own in it.
pub(crate) struct Up {
    pub(crate) agent: Agent,
    pub(crate) agent_version: String,
    pub(crate) guest_kernel: String,
    virtiofsd: Option<Child>,
    /// Interfaces that it did not start with.
    nics: Vec<Nic>,
    /// It started from a template.
    copied: bool,
}

/// Boots the pod's machine and prepares its agent.
pub(crate) async fn boot(pod: &Pod, ready: UnixListener) -> Result<Booted, BootError> {
    let mut timeline = pod.timeline.fork();
    let guest = Guest::find(&pod.config, &pod.artefacts)?;
    let template = template::choose(pod, &guest);
    // The daemon gets going while the kernel answers about the network, or a hook runs.
    let (mut daemon_timeline, mut network_timeline) = (timeline.fork(), timeline.fork());
    let (nics, shared) = tokio::try_join!(attach_network(pod, &mut network_timeline), async {
        share_files(pod, &mut daemon_timeline)
    })?;
    timeline.merge(daemon_timeline);
    timeline.merge(network_timeline);
    let up = bring_up(pod, &ready, &guest, shared, nics, template, &mut timeline).await;
    let up = up.map_err(|failure| explained(failure, &guest))?;
    let virtiofsd = up.virtiofsd.clone();
    let (agent_version, guest_kernel) = (up.agent_version.clone(), up.guest_kernel.clone());
    let agent = alive(pod, virtiofsd.as_ref(), make_own(pod, up, &mut timeline)).await?;
    Ok(Booted { agent, agent_version, guest_kernel, virtiofsd, timeline })
}

/// Boots a machine for others to be copies of: it has the pod's devices, but for network and disks.
pub(crate) async fn for_template(
    pod: &Pod,
    ready: &UnixListener,
    guest: Guest,
    size: Size,
    growth: Growth,
) -> Result<Up, BootError> {
    let mut timeline = pod.timeline.fork();
    let shared = share_files(pod, &mut timeline)?;
    pod.resources.started_with(size).await;
    let spec = VmSpec { growth: Some(growth), ..guest.vm_spec(pod, size, shared.1, Vec::new()) };
    start(pod, spec, shared.0.as_ref(), &mut timeline).await?;
    served(pod, ready, guest.announces, shared.0, Vec::new(), &mut timeline).await
}

/// Starts the machine and waits for its agent: from the template if there is one that is of use, else by booting.
async fn bring_up(
    pod: &Pod,
    ready: &UnixListener,
    guest: &Guest,
    (virtiofsd, shared_fs): Shared,
    nics: Vec<Nic>,
    template: Option<Chosen>,
    timeline: &mut Timeline,
) -> Result<Up, BootError> {
    let daemon = virtiofsd.as_ref();
    let Some(Chosen { files, about, size, growth }) = template else {
        let spec = guest.vm_spec(pod, pod.resources.start(), shared_fs, nics);
        start(pod, spec, daemon, timeline).await?;
        return served(pod, ready, guest.announces, virtiofsd, Vec::new(), timeline).await;
    };
    pod.resources.started_with(size).await;
    let spec = guest.vm_spec(pod, size, shared_fs, Vec::new());
    let spec = VmSpec { growth: Some(growth), template: Some(files), ..spec };
    if let Origin::Instead(reason) = start(pod, spec, daemon, timeline).await? {
        template::warn_cold(&pod.id, &reason);
        return served(pod, ready, guest.announces, virtiofsd, nics, timeline).await;
    }
    let begin = Instant::now();
    let agent = alive(pod, daemon, in_time(pod, async { Ok(dial(pod).await) })).await?;
    timeline.add(Layer::Agent, "connect", begin);
    let agent = if about.announced { agent.announced() } else { agent };
    let (agent_version, guest_kernel) = (about.agent_version, about.guest_kernel);
    Ok(Up { agent, agent_version, guest_kernel, virtiofsd, nics, copied: true })
}

/// Waits until the agent of a machine that boots serves.
async fn served(
    pod: &Pod,
    ready: &UnixListener,
    announces: bool,
    virtiofsd: Option<Child>,
    nics: Vec<Nic>,
    timeline: &mut Timeline,
) -> Result<Up, BootError> {
    let reached = async {
        let (agent, announcement) = reach_agent(pod, ready, announces, Instant::now(), timeline).await?;
        let (version, kernel) = match announcement {
            Some(announcement) => (guest_text(&announcement.agent_version), guest_text(&announcement.kernel)),
            None => (agent.version().await.unwrap_or_default(), String::new()),
        };
        Ok((agent, version, kernel))
    };
    let (agent, agent_version, guest_kernel) = alive(pod, virtiofsd.as_ref(), in_time(pod, reached)).await?;
    Ok(Up { agent, agent_version, guest_kernel, virtiofsd, nics, copied: false })
}

/// Looks at the guest image where the guest ended or stayed silent: one that was changed is the reason.
fn explained(failure: BootError, guest: &Guest) -> BootError {
    let silent = matches!(failure, BootError::VmmExited { .. } | BootError::NoAgent { .. });
    match silent.then(|| guest.verify()) {
        Some(Err(source)) => BootError::Changed { failure: Box::new(failure), source },
        _ => failure,
    }
}

/// Has the VMM run the machine, and puts it where it belongs.
async fn start(
    pod: &Pod,
    spec: VmSpec,
    daemon: Option<&Child>,
    timeline: &mut Timeline,
) -> Result<Origin, BootError> {
    let start = Instant::now();
    let origin = match pod.vm.boot(spec, &pod.record).await {
        Ok(origin) => origin,
        Err(error) => {
            // A VMM that cannot reach the daemon says so in its own words; the daemon's are better.
            let killed = matches!(&error, HypervisorError::Refused { exit: Exit::Signal(9), .. });
            let oom = lifecycle::oom_of(pod, killed);
            let failure = daemon_failure(daemon).await.filter(|_| oom.is_empty());
            return Err(failure.unwrap_or_else(|| BootError::Vmm { source: Box::new(error), oom }));
        }
    };
    let stage = if origin == Origin::Template { COPIED } else { BOOTED };
    timeline.add(Layer::Vmm, stage, start);
    pod.resources.settle(&*pod.vm).await?;
    Ok(origin)
}

/// Makes the guest this pod's: all that is not the same in every machine.
async fn make_own(pod: &Pod, up: Up, timeline: &mut Timeline) -> Result<Agent, BootError> {
    let Up { agent, virtiofsd, nics, copied, .. } = up;
    let console = || Excerpt::console(&pod.vm.console_tail());
    if copied {
        let start = Instant::now();
        let failed = |what| move |source| BootError::Copy { what, source, console: console() };
        // Before anything in the guest draws from them.
        agent.reseed(&entropy()?).await.map_err(failed("take new random numbers"))?;
        agent.set_time(SystemTime::now()).await.map_err(failed("set the clock"))?;
        timeline.add(Layer::Agent, "clock and random numbers", start);
    }
    if let Some(network) = pod.network.as_ref().filter(|_| !nics.is_empty()) {
        let start = Instant::now();
        network.insert(&*pod.vm, nics).await?;
        timeline.add(Layer::Vmm, "plug in network", start);
    }
    let start = Instant::now();
    let bound = pod.config.agent.kata.reconnect_bound();
    agent
        .create_sandbox(&sandbox_request(pod, virtiofsd.is_some()), bound)
        .await
        .map_err(|source| BootError::Refused { source, console: console() })?;
    timeline.add(Layer::Agent, "create sandbox", start);
    let start = Instant::now();
    if let Some(network) = &pod.network
        && network.tell(&agent).await?
    {
        timeline.add(Layer::Agent, "network", start);
    }
    let start = Instant::now();
    if pod.resources.grow_to_start(&*pod.vm, &agent).await? {
        timeline.add(Layer::Vmm, "grow", start);
    }
    Ok(agent)
}

/// Bytes that nobody else has.
fn entropy() -> Result<[u8; 64], BootError> {
    let mut bytes = [0; 64];
    match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) {
        Ok(64) => Ok(bytes),
        Ok(_) => Err(BootError::Random(io::ErrorKind::UnexpectedEof.into())),
        Err(error) => Err(BootError::Random(error.into())),
    }
}

/// Bounds the wait for an agent.
async fn in_time<T>(pod: &Pod, reached: impl Future<Output = Result<T, BootError>>) -> Result<T, BootError> {
    let bound = pod.config.agent.kata.reconnect_bound();
    let reached = tokio::time::timeout(bound, reached).await;
    reached.map_err(|_| BootError::NoAgent { bound, console: Excerpt::console(&pod.vm.console_tail()) })?
}

/// Does `work` as long as the machine and the daemon live.
async fn alive<T>(
    pod: &Pod,
    daemon: Option<&Child>,
    work: impl Future<Output = Result<T, BootError>>,
) -> Result<T, BootError> {
    tokio::select! {
        biased;
        done = work => done,
        exit = pod.vm.exited() => Err(vmm_exited(pod, exit)),
        // It also ends when the VMM does, which then is the cause.
        error = watch_daemon(daemon) => match tokio::time::timeout(GRACE, pod.vm.exited()).await {
            Ok(exit) => Err(vmm_exited(pod, exit)),
            Err(_) => Err(error),
        }
    }
}

fn vmm_exited(pod: &Pod, exit: VmExit) -> BootError {
    let console = last_words(pod, &exit);
    let oom = lifecycle::oom_of(pod, exit == VmExit::Signal(9));
    BootError::VmmExited { exit, oom, console }
}

/// What the guest said before the machine ended, unless the end tells that itself.
pub(crate) fn last_words(pod: &Pod, exit: &VmExit) -> Excerpt {
    match exit {
        VmExit::GuestPanic(_) => Excerpt::console(""),
        _ => Excerpt::console(&pod.vm.console_tail()),
    }
}

/// Resolves when the daemon has ended.
async fn watch_daemon(child: Option<&Child>) -> BootError {
    match child {
        Some(child) => {
            BootError::DaemonDied { exit: child.wait().await, output: Excerpt::output(&child.output_tail()) }
        }
        None => std::future::pending().await,
    }
}

/// The daemon's failure, if it failed just now. Where the VMM went first, the daemon ends in order.
async fn daemon_failure(child: Option<&Child>) -> Option<BootError> {
    let ended = tokio::time::timeout(GRACE, watch_daemon(child)).await.ok();
    ended.filter(|error| !matches!(error, BootError::DaemonDied { exit: Exit::Code(0), .. }))
}

/// Runs the hooks that make the pod's network, and connects what is there.
async fn attach_network(pod: &Pod, timeline: &mut Timeline) -> Result<Vec<Nic>, BootError> {
    let Some(network) = &pod.network else { return Ok(Vec::new()) };
    if !network.spec().hooks.is_empty() {
        let start = Instant::now();
        hooks::run_network_hooks(&pod.id, network.spec()).await?;
        timeline.add(Layer::Host, "hooks", start);
    }
    let start = Instant::now();
    let nics = network.attach().await?;
    timeline.add(Layer::Host, "network", start);
    Ok(nics)
}

/// The virtio-fs daemon and the machine's end of it.
type Shared = (Option<Child>, Option<kata_hypervisor::SharedFs>);

/// Starts the daemon where files are shared.
fn share_files(pod: &Pod, timeline: &mut Timeline) -> Result<Shared, BootError> {
    let Some(share) = &pod.share else { return Ok((None, None)) };
    let start = Instant::now();
    let (child, socket) = spawn_virtiofsd(pod, share)?;
    // A pod is booted once.
    let _ = pod.virtiofsd.set(child.clone());
    timeline.add(Layer::Host, "virtio-fs daemon", start);
    Ok((Some(child), Some(kata_hypervisor::SharedFs { tag: guest::SHARE_TAG.to_owned(), socket })))
}

/// Starts the virtio-fs daemon on a listener that exists before it does, and answers the one way to that.
fn spawn_virtiofsd(pod: &Pod, share: &Share) -> Result<(Child, OwnedFd), BootError> {
    let program = pod.artefacts.virtiofsd.as_ref().ok_or(BootError::NoDaemon)?;
    let path = pod.run_dir.join("virtiofsd.vhost");
    let make = || -> io::Result<(OwnedFd, OwnedFd)> {
        pod.record.file(&path).map_err(io::Error::other)?;
        let listener = std::os::unix::net::UnixListener::bind(&path)?;
        // For the VMM's user. Nobody else gets in: the path is gone before there is a daemon.
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o666))?;
        let way = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        std::fs::remove_file(&path)?;
        Ok((listener.into(), way))
    };
    let (listener, way) = make().map_err(|source| BootError::Socket { path: path.clone(), source })?;
    let qemu = &pod.config.hypervisor.qemu;
    let child = Spawn::new("virtiofsd", program)
        .args(["--listen-fd", &FIRST_FD.to_string(), "--shared-dir"])
        .arg(share.dir())
        .args(["--cache", qemu.virtio_fs_cache.as_str()])
        .args(&qemu.virtio_fs_extra_args)
        .inherit(listener)
        // It holds one descriptor for each file that the guest knows.
        .open_files(u64::from(u32::MAX))
        .spawn(&pod.record)?;
    Ok((child, way))
}

/// Waits for the agent's announcement and connects; an agent that does not announce itself is dialled meanwhile.
async fn reach_agent(
    pod: &Pod,
    ready: &UnixListener,
    announces: bool,
    vmm_ran: Instant,
    timeline: &mut Timeline,
) -> Result<(Agent, Option<Announcement>), BootError> {
    let announcement = tokio::select! {
        announcement = announcement(ready, &pod.run_dir) => announcement?,
        agent = dial(pod), if !announces => {
            timeline.add(Layer::Agent, "boot until reachable", vmm_ran);
            return Ok((agent, None));
        }
    };
    timeline.add_guest(&announcement, vmm_ran, Instant::now());
    let start = Instant::now();
    let open = hybrid::connect(&pod.hybrid, ports::AGENT)
        .await
        .map_err(|source| BootError::Connect { source, console: Excerpt::console(&pod.vm.console_tail()) })?;
    timeline.add(Layer::Agent, "connect", start);
    Ok((Agent::new(open.stream).announced(), Some(announcement)))
}

/// The agent's announcement: one line of JSON.
async fn announcement(ready: &UnixListener, run_dir: &std::path::Path) -> Result<Announcement, BootError> {
    let read = async {
        let (stream, _) = ready.accept().await?;
        let mut line = String::new();
        let mut reader = BufReader::new(stream).take(ANNOUNCEMENT_MAX);
        reader.read_line(&mut line).await?;
        // Nothing is sent to the guest on this connection; the agent need not wait for its end.
        if let Ok(stream) = reader.into_inner().into_inner().into_std() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        Ok(line)
    };
    let line: String =
        read.await.map_err(|source| BootError::Socket { path: run_dir.join("kata.hvsock_1028"), source })?;
    serde_json::from_str(&line).map_err(|_| BootError::Announcement(line.chars().take(200).collect()))
}

/// Connects to the agent as soon as it listens. The caller bounds it.
async fn dial(pod: &Pod) -> Agent {
    let bound = pod.config.agent.kata.dial_bound().max(TRY_MIN);
    loop {
        match hybrid::connect_within(&pod.hybrid, ports::AGENT, bound).await {
            Ok(open) => return Agent::new(open.stream),
            Err(error) => tracing::trace!(%error, "the agent does not answer yet"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn sandbox_request(pod: &Pod, shared: bool) -> CreateSandboxRequest {
    let share = Storage {
        driver: "virtio-fs".to_owned(),
        source: guest::SHARE_TAG.to_owned(),
        fstype: "virtiofs".to_owned(),
        options: vec!["nodev".to_owned()],
        mount_point: guest::SHARE_DIR.to_owned(),
        ..Default::default()
    };
    let module = |line: &String| {
        let mut words = line.split_whitespace().map(str::to_owned);
        let name = words.next()?;
        Some(KernelModule { name, parameters: words.collect(), ..Default::default() })
    };
    CreateSandboxRequest {
        hostname: pod.hostname.clone(),
        sandbox_id: pod.id.clone(),
        guest_hook_path: pod
            .config
            .hypervisor
            .qemu
            .guest_hook_path
            .as_ref()
            .map_or_else(String::new, |path| path.display().to_string()),
        storages: if shared { vec![share] } else { Vec::new() },
        kernel_modules: pod.config.agent.kata.kernel_modules.iter().filter_map(module).collect(),
        ..Default::default()
    }
}

//! Requests about containers as a whole.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kata_api::agent::{
    CreateContainerRequest, NetworkStats, RemoveContainerRequest, StatsContainerResponse, Storage,
    UpdateContainerRequest,
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::process::Signal;

use super::agent::{Agent, Container, Process};
use super::error::RpcError;
use super::{image, secrets, spec};
use crate::aside;
use crate::container::Spawned;
use crate::device;
use crate::mount::Image;
use crate::services::sealed::Secrets;
use crate::stdio::{self, Ports, Withheld};

/// Makes a container; its init waits for [`start`]. Whoever asks waits no longer than `patience`, where that is said: services of
/// the guest, which may take minutes, are given up by then.
///
/// # Errors
/// What the specification, the storages, the streams or the engine refuse. Nothing is left then.
pub async fn create(
    agent: &Arc<Agent>,
    request: CreateContainerRequest,
    patience: Option<Duration>,
    withheld: Withheld,
) -> Result<(), RpcError> {
    check_id(&request.container_id)?;
    refuse_foreign_parts(&request)?;
    agent.reserve(&request.container_id)?;
    let (owned, id) = (agent.clone(), request.container_id.clone());
    aside::whole(format!("creating container {id:?}"), async move {
        let made = make(&owned, request, patience, withheld).await;
        match made {
            Ok(container) => {
                owned.insert(&id, container);
                watch_oom(&owned, &id);
                Ok(())
            }
            Err(error) => {
                owned.forget(&id);
                Err(error)
            }
        }
    })
    .await?
}

/// Ids become names of directories and cgroups.
fn check_id(id: &str) -> Result<(), RpcError> {
    let plain = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if plain && !id.is_empty() && id.len() <= 255 && !id.starts_with('.') {
        Ok(())
    } else {
        Err(RpcError::Invalid(format!("container id {id:?} is not of letters, digits, '_', '.' and '-'")))
    }
}

fn refuse_foreign_parts(request: &CreateContainerRequest) -> Result<(), RpcError> {
    device::check(&request.devices)?;
    if !request.shared_mounts.is_empty() {
        return Err(RpcError::Unsupported("sharing mounts between containers"));
    }
    if request.string_user.is_some() {
        return Err(RpcError::Unsupported("a user by name"));
    }
    Ok(())
}

async fn make(
    agent: &Arc<Agent>,
    request: CreateContainerRequest,
    patience: Option<Duration>,
    withheld: Withheld,
) -> Result<Container, RpcError> {
    let wire =
        request.oci.into_option().ok_or_else(|| RpcError::Invalid("the request has no spec".to_owned()))?;
    let mut spec = spec::spec(wire)?;
    // Held until the container is in them.
    let namespaces = agent.pod_namespaces()?;
    if let Some(namespaces) = &namespaces {
        namespaces.share_with(&mut spec);
        if request.sandbox_pidns || agent.shares_pids() {
            namespaces.share_pids_with(&mut spec);
        }
    } else if request.sandbox_pidns {
        return Err(RpcError::State("there is no sandbox whose pid namespace could be joined".to_owned()));
    }
    agent.devices.find(&request.devices).await?.update(&mut spec)?;
    let mut storages = request.storages;
    if let Some(store) = image::trusted_store(&mut spec, &request.devices)? {
        storages.insert(0, store);
    }
    let mut wanted = Wanted {
        secrets: Secrets::of(&spec, agent.settings.unseal_implicitly, agent.services.clone())?,
        image: image_of(&storages)?,
        spec,
    };
    let joins_pids = joins_pids(&wanted.spec);
    let of_guest = patience.map_or_else(|| agent.storages.clone(), |limit| agent.storages.within(limit));
    let mut held = Holdings { mounts: of_guest.add(storages).await?, shared: Vec::new() };
    let ports = Ports { stdin: request.stdin_port, stdout: request.stdout_port, stderr: request.stderr_port };
    let made = match furnish(agent, &request.container_id, &mut wanted, &mut held).await {
        Ok(()) => make_init(agent, &request.container_id, &wanted.spec, (ports, withheld)).await,
        Err(error) => Err(error),
    };
    match made {
        Ok(init) => {
            if let Some(namespaces) = &namespaces {
                namespaces.keep_pids_of(init.pid);
            }
            if joins_pids {
                end_all_with(agent, &request.container_id, &init);
            }
            Ok(Container::new(init, held.mounts, held.shared, wanted.secrets))
        }
        Err(error) => {
            release_shared(agent, held.shared).await;
            if let Err(undo) = agent.storages.remove(held.mounts).await {
                tracing::warn!(error = crate::chain(&undo), "undoing the storages of a container");
            }
            Err(error)
        }
    }
}

/// A container in the making.
struct Wanted {
    spec: Spec,
    image: Option<Image>,
    secrets: Arc<Secrets>,
}

/// What a container has of the guest.
struct Holdings {
    mounts: Vec<PathBuf>,
    shared: Vec<PathBuf>,
}

fn image_of(storages: &[Storage]) -> Result<Option<Image>, RpcError> {
    Ok(storages.iter().map(Image::of).collect::<Result<Vec<_>, _>>()?.into_iter().flatten().next())
}

/// Completes the specification by what the mounts have in them.
async fn furnish(agent: &Agent, id: &str, wanted: &mut Wanted, held: &mut Holdings) -> Result<(), RpcError> {
    if let Some(image) = &wanted.image {
        image::adapt(&mut wanted.spec, image).await?;
    }
    held.shared = hold_shared(agent, wanted.spec.clone()).await?;
    secrets::open(agent, id, &mut wanted.spec, &wanted.secrets, &mut held.mounts).await
}

/// Whether the container sees processes that are not its own.
fn joins_pids(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let pid = namespaces.into_iter().flatten().find(|it| it.typ() == LinuxNamespaceType::Pid);
    pid.is_none_or(|pid| pid.path().is_some())
}

/// The kernel ends a container's processes with its init only where that is the first of a pid namespace.
fn end_all_with(agent: &Arc<Agent>, id: &str, init: &Process) {
    let (agent, id, exit, pid) = (agent.clone(), id.to_owned(), init.exit.clone(), init.pid);
    tokio::spawn(async move {
        exit.wait().await;
        // One that is gone already has nothing left to end, and by now another may have its name.
        if !agent.container(&id).is_ok_and(|container| container.init.pid == pid) {
            return;
        }
        if let Err(error) = agent.engine.signal_all(&id, Signal::KILL).await {
            tracing::debug!(container = id, error = crate::chain(&error), "ending what the init has left");
        }
    });
}

/// Both may wait for the host: not on the thread that serves everybody else.
async fn hold_shared(agent: &Agent, spec: Spec) -> Result<Vec<PathBuf>, RpcError> {
    let shared = agent.shared.clone();
    let hold = move || shared.hold(&spec, Path::new(kata_api::guest::SHARE_DIR));
    Ok(aside::run("mounting what the container uses of the share", hold).await?)
}

async fn release_shared(agent: &Agent, held: Vec<PathBuf>) {
    if !held.is_empty() {
        let shared = agent.shared.clone();
        // It can only fail with the agent itself.
        let _ = aside::run("letting go of the share", move || shared.release(&held)).await;
    }
}

async fn make_init(
    agent: &Agent,
    id: &str,
    spec: &Spec,
    (ports, withheld): (Ports, Withheld),
) -> Result<Process, RpcError> {
    let terminal = spec.process().as_ref().and_then(|process| process.terminal()).unwrap_or(false);
    let (io, stdio) =
        stdio::prepare(&agent.streams, ports, withheld, terminal, agent.settings.pipe_size).await?;
    let bundle = Path::new(kata_api::guest::CONTAINER_DIR).join(id);
    let Spawned { pid, terminal } = agent.engine.create(id, spec, &bundle, io).await?;
    let exit = agent.reaper.register(pid);
    tracing::info!(container = id, pid = pid.as_raw_nonzero().get(), "container created");
    let hooks = agent.guest_hooks();
    let attached = match hooks.created(&agent.reaper, id, pid, spec).await {
        Ok(()) => stdio.attach(&exit, terminal).map_err(RpcError::from),
        Err(error) => Err(error),
    };
    match attached {
        Ok(stdio) => Ok(Process::new(pid, exit, stdio)),
        Err(error) => {
            agent.engine.delete(id).await?;
            hooks.removed(&agent.reaper, id).await;
            Err(error)
        }
    }
}

fn watch_oom(agent: &Arc<Agent>, id: &str) {
    let mut events = match agent.engine.oom_events(id) {
        Ok(events) => events,
        Err(error) => {
            tracing::debug!(container = id, error = crate::chain(&error), "OOM kills are not reported");
            return;
        }
    };
    let (agent, id) = (agent.clone(), id.to_owned());
    tokio::spawn(async move {
        while events.next().await.is_some() {
            agent.report_oom(&id);
        }
    });
}

/// Lets the init run.
///
/// # Errors
/// The engine's.
pub async fn start(agent: &Agent, id: &str) -> Result<(), RpcError> {
    agent.container(id)?;
    agent.engine.start(id).await?;
    agent.guest_hooks().started(&agent.reaper, id).await;
    Ok(())
}

/// Kills what is left of the container and removes all of it, within the request's time (seconds; zero is no limit).
///
/// # Errors
/// Unknown container, the engine's, or [`RpcError::TimedOut`]: it is still there then.
pub async fn remove(agent: &Arc<Agent>, request: &RemoveContainerRequest) -> Result<(), RpcError> {
    let id = &request.container_id;
    let container = agent.container(id)?;
    let delete = async {
        // Whoever asks a second time waits for the first, and finds nothing.
        let turn = container.removal.clone().lock_owned().await;
        agent.confirm(id, &container)?;
        agent.engine.delete(id).await?;
        Ok::<_, RpcError>(turn)
    };
    let turn = if request.timeout == 0 {
        delete.await?
    } else {
        let limit = Duration::from_secs(request.timeout.into());
        let late =
            |_| RpcError::TimedOut(format!("container {id:?} is not gone after {} s", request.timeout));
        tokio::time::timeout(limit, delete).await.map_err(late)??
    };
    let (agent, id) = (agent.clone(), id.clone());
    aside::whole(format!("removing container {id:?}"), async move {
        let _turn = turn;
        release_shared(&agent, container.shared.clone()).await;
        let removed = agent.storages.remove(container.mounts.clone()).await;
        agent.forget(&id);
        agent.guest_hooks().removed(&agent.reaper, &id).await;
        removed?;
        tracing::info!(container = id, "container removed");
        Ok(())
    })
    .await?
}

/// Changes limits.
///
/// # Errors
/// Unknown container, bad or unsupported limits.
pub async fn update(agent: &Agent, request: UpdateContainerRequest) -> Result<(), RpcError> {
    agent.container(&request.container_id)?;
    let wire = request.resources.into_option();
    let wire = wire.ok_or_else(|| RpcError::Invalid("the request has no resources".to_owned()))?;
    let resources = spec::resources(wire)?;
    Ok(agent.engine.update(&request.container_id, &resources).await?)
}

/// Usage of the container, and of the guest's network, which all containers share.
///
/// # Errors
/// Unknown container, the engine's.
pub async fn stats(agent: &Agent, id: &str) -> Result<StatsContainerResponse, RpcError> {
    agent.container(id)?;
    let mut response = StatsContainerResponse::new();
    response.cgroup_stats = Some(agent.engine.stats(id).await?).into();
    let path = "/proc/net/dev";
    let table = std::fs::read_to_string(path).map_err(RpcError::file("reading", path))?;
    response.network_stats = network_stats(&table);
    Ok(response)
}

/// The interfaces of a `/proc/net/dev`, without the loopback.
fn network_stats(table: &str) -> Vec<NetworkStats> {
    let interface = |line: &str| {
        let (name, counters) = line.split_once(':')?;
        let counters: Vec<u64> = counters.split_whitespace().map_while(|word| word.parse().ok()).collect();
        let counter = |at: usize| counters.get(at).copied().unwrap_or_default();
        let mut stats = NetworkStats::new();
        stats.name = name.trim().to_owned();
        (stats.rx_bytes, stats.rx_packets) = (counter(0), counter(1));
        (stats.rx_errors, stats.rx_dropped) = (counter(2), counter(3));
        (stats.tx_bytes, stats.tx_packets) = (counter(8), counter(9));
        (stats.tx_errors, stats.tx_dropped) = (counter(10), counter(11));
        (stats.name != "lo").then_some(stats)
    };
    table.lines().filter_map(interface).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_that_could_leave_their_directory_are_refused() {
        for id in ["", ".", "..", "a/b", "a b", ".hidden", "ä"] {
            assert!(check_id(id).is_err(), "{id:?}");
        }
        for id in ["a", "0123abc", "web-1_2.3"] {
            check_id(id).unwrap();
        }
    }

    #[test]
    fn network_counters_are_read_by_column_and_lo_is_left_out() {
        let table = "Inter-|   Receive\n face |bytes\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n\
                     \x20 eth0: 10 2 3 4 0 0 0 0 50 6 7 8 0 0 0 0\n";
        let stats = network_stats(table);
        assert_eq!(stats.len(), 1);
        let eth0 = &stats[0];
        assert_eq!((eth0.name.as_str(), eth0.rx_bytes, eth0.rx_dropped), ("eth0", 10, 4));
        assert_eq!((eth0.tx_bytes, eth0.tx_errors, eth0.tx_dropped), (50, 7, 8));
    }
}

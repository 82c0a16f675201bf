//! Listening, and the word to the host that the guest is ready.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use kata_api::guest::SERVICES_DIR;
use kata_api::{Announcement, ports};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::io::AsyncWriteExt;
use tokio::sync::Semaphore;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use ttrpc::r#async::Server;
use ttrpc::r#async::transport::Listener;

use crate::boot::{self, Timeline};
use crate::cmdline::Settings;
use crate::console;
use crate::container::{Layout, NativeEngine};
use crate::forward;
use crate::log::LogBuffer;
use crate::modules::Modules;
use crate::reaper::Reaper;
use crate::rpc::guard::Guard;
use crate::rpc::{self, Agent};
use crate::services::Services;

/// The agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The runtime, or signals.
    #[error("{what}")]
    Runtime {
        /// What was tried.
        what: &'static str,
        #[source]
        /// Why it failed.
        source: io::Error,
    },
    /// A port that cannot be listened on.
    #[error("listening on vsock port {port}")]
    Listen {
        /// The port.
        port: u32,
        #[source]
        /// Why it failed.
        source: io::Error,
    },
    /// The RPC server.
    #[error("serving RPCs on {address}")]
    Rpc {
        /// Where.
        address: String,
        #[source]
        /// Why it failed.
        source: ttrpc::Error,
    },
}

/// How long to wait after a connection could not be accepted.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// Serves until the sandbox is destroyed. Containers' cgroups are made below `cgroup`, relative to the root of the hierarchy.
///
/// # Errors
/// What cannot be listened on.
pub fn run(
    settings: Settings,
    logs: LogBuffer,
    modules: Modules,
    cgroup: PathBuf,
    mut timeline: Timeline,
) -> Result<(), ServeError> {
    let failed = |what| move |source| ServeError::Runtime { what, source };
    // One thread: it is enough for copying bytes, and a second would cost memory in every guest.
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    // Work that the kernel keeps waiting holds its thread: a few of those must not be all that there are. One that is idle ends
    // after ten seconds.
    runtime.enable_all().max_blocking_threads(32).thread_stack_size(256 << 10);
    let runtime = runtime.build().map_err(failed("starting the runtime"))?;
    let served = runtime.block_on(async {
        let reaper = Reaper::new();
        let reaping = tokio::spawn(reaper.clone().run());
        for word in &settings.ignored {
            tracing::warn!(word, "ignored a word of the command line");
        }
        let listening = boot::now_us();
        let layout = Layout { cgroup_root: boot::CGROUPS.into(), cgroup, helper: None };
        let engine =
            NativeEngine::new(layout, reaper.clone()).map_err(failed("finding the agent's executable"))?;
        let engine = Arc::new(engine);
        // Only now: what containers are made from has started, and they do not inherit it.
        raise_descriptor_limit();
        let services = Services::new(Path::new(SERVICES_DIR), &settings, reaper.clone());
        let agent = Arc::new(Agent::new(engine, reaper, Arc::new(modules), services, settings));
        let guard = Arc::new(Guard::boot());
        listen(&agent, logs, &guard)?;
        let mut server = serve_rpc(&agent, &guard).await?;
        timeline.note("listen", listening);
        tracing::info!(version = env!("CARGO_PKG_VERSION"), address = agent.settings.server_addr, "serving");
        boot::notify_ready();
        tokio::spawn(announce(timeline));
        tokio::select! {
            () = agent.done.notified() => {}
            ended = reaping => {
                let source = ended.map_err(io::Error::other).and_then(|ended| ended).err();
                let source = source.unwrap_or_else(|| io::Error::other("it ended by itself"));
                return Err(ServeError::Runtime { what: "reaping processes", source });
            }
        }
        // The answer to the request that ended the sandbox is still to be written.
        let _ = server.shutdown().await;
        Ok(())
    });
    // A thread that the kernel holds would keep the guest from its end.
    runtime.shutdown_background();
    served
}

/// Each process of a container takes half a dozen descriptors, and the kernel's default would do for a hundred of them.
fn raise_descriptor_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

async fn serve_rpc(agent: &Arc<Agent>, guard: &Arc<Guard>) -> Result<Server, ServeError> {
    let address = agent.settings.server_addr.clone();
    let failed = |source| ServeError::Rpc { address: address.clone(), source };
    let server = match vsock_port(&address) {
        Some(port) => Server::new().add_listener(connections(bind(port)?)),
        None => Server::new().bind(&address).map_err(failed)?,
    };
    let mut server = server.register_service(guard.before(rpc::services(agent)));
    server.start().await.map_err(failed)?;
    Ok(server)
}

/// The port of an address `vsock://-1:PORT`, as the guest's own are written.
fn vsock_port(address: &str) -> Option<u32> {
    address.strip_prefix("vsock://-1:")?.parse().ok()
}

/// What [`accept`] takes, for the RPC server.
fn connections(listener: VsockListener) -> Listener {
    Listener::new(stream::unfold(listener, |listener| async {
        let (peer, _) = accept(&listener).await;
        Some((Ok(peer), listener))
    }))
}

/// Listens for logs, streams, ways to the loopback and, where enabled, the debug console.
fn listen(agent: &Arc<Agent>, logs: LogBuffer, guard: &Arc<Guard>) -> Result<(), ServeError> {
    let settings = &agent.settings;
    let log_listener = bind(settings.log_port)?;
    tokio::spawn(async move {
        // One reader at a time: a line goes to one of them.
        loop {
            let (peer, _) = accept(&log_listener).await;
            logs.serve(peer).await;
        }
    });
    let stream_listener = bind(settings.stream_port)?;
    let streams = agent.streams.clone();
    tokio::spawn(async move {
        loop {
            let (peer, address) = accept(&stream_listener).await;
            match plain(&peer) {
                Ok(peer) => streams.offer(address.port(), peer),
                Err(error) => tracing::warn!(%error, "taking a stream connection"),
            }
        }
    });
    listen_for_forwards(guard)?;
    match (settings.debug_console, console::shell()) {
        (false, _) => {}
        // The host asks for it, and a shell is asked by nobody what it does.
        (true, _) if guard.is_active() => {
            tracing::warn!("there is no debug console in a guest with a policy")
        }
        (true, None) => tracing::warn!("the debug console is enabled, but the image has no shell"),
        (true, Some(shell)) => listen_for_consoles(agent, shell)?,
    }
    Ok(())
}

/// Ways to the guest's loopback. Who finds all of them taken waits in the kernel's queue.
fn listen_for_forwards(guard: &Arc<Guard>) -> Result<(), ServeError> {
    let listener = bind(ports::FORWARD)?;
    let places = Arc::new(Semaphore::new(forward::MOST));
    let guard = guard.clone();
    tokio::spawn(async move {
        // Nobody closes the semaphore.
        while let Ok(place) = places.clone().acquire_owned().await {
            let (peer, _) = accept(&listener).await;
            if guard.allows("ForwardRequest").is_err() {
                continue;
            }
            tokio::spawn(async move {
                if let Err(error) = forward::serve(peer).await {
                    tracing::debug!(%error, "a way to the loopback ended");
                }
                drop(place);
            });
        }
    });
    Ok(())
}

fn listen_for_consoles(agent: &Arc<Agent>, shell: &'static str) -> Result<(), ServeError> {
    let listener = bind(agent.settings.console_port)?;
    let agent = agent.clone();
    tokio::spawn(async move {
        loop {
            let (peer, _) = accept(&listener).await;
            let agent = agent.clone();
            tokio::spawn(async move {
                let served = match plain(&peer) {
                    Ok(peer) => console::serve(&agent.reaper, shell, peer).await,
                    Err(error) => Err(error),
                };
                if let Err(error) = served {
                    tracing::warn!(%error, "debug console");
                }
            });
        }
    });
    Ok(())
}

fn bind(port: u32) -> Result<VsockListener, ServeError> {
    VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, port))
        .map_err(|source| ServeError::Listen { port, source })
}

/// The next connection from the host.
///
/// Sockets of this family know no namespaces, so containers can dial the guest, too, where its kernel has a loopback for
/// that. They are turned away: who reaches the agent rules the guest.
async fn accept(listener: &VsockListener) -> (VsockStream, VsockAddr) {
    loop {
        match listener.accept().await {
            Ok((peer, address)) if is_host(address) => return (peer, address),
            Ok((_, address)) => tracing::debug!(%address, "refused a connection from within the guest"),
            Err(error) => {
                // Out of descriptors or memory, say: that passes, and a closed port would be the end of the sandbox.
                tracing::error!(%error, "accepting a connection");
                tokio::time::sleep(ACCEPT_AGAIN).await;
            }
        }
    }
}

fn is_host(peer: VsockAddr) -> bool {
    peer.cid() == VMADDR_CID_HOST
}

/// The connection as a descriptor, which the stream no longer watches.
fn plain(stream: &VsockStream) -> io::Result<OwnedFd> {
    stream.as_fd().try_clone_to_owned()
}

/// Tells the host that the guest serves, and what it did until now. A host that does not listen is fine.
async fn announce(timeline: Timeline) {
    let announcement = Announcement {
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        timeline: timeline.stages(),
    };
    tracing::debug!(port = ports::READY, ?announcement, "announcing to the host");
    let told = async {
        let mut line = serde_json::to_vec(&announcement)?;
        line.push(b'\n');
        let mut host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, ports::READY)).await?;
        host.write_all(&line).await?;
        host.shutdown(std::net::Shutdown::Write)
    };
    if let Err(error) = told.await {
        tracing::debug!(%error, "the host does not want an announcement");
    }
}

#[cfg(test)]
mod tests {
    use tokio_vsock::VMADDR_CID_LOCAL;

    use super::*;

    #[test]
    fn only_the_host_is_let_in() {
        assert!(is_host(VsockAddr::new(VMADDR_CID_HOST, 1)));
        for cid in [VMADDR_CID_LOCAL, 3, VMADDR_CID_ANY] {
            assert!(!is_host(VsockAddr::new(cid, 1)), "{cid}");
        }
    }

    #[test]
    fn the_default_address_is_served_with_that_check() {
        assert_eq!(vsock_port(&Settings::default().server_addr), Some(ports::AGENT));
        assert_eq!(vsock_port("unix:///run/agent.sock"), None);
        assert_eq!(vsock_port("vsock://2:1"), None);
    }
}

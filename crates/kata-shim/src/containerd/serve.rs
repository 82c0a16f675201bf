//! `serve`: the owner of a pod under containerd. `start` runs it, with the pod's socket as its standard input.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use rustix::fs::Mode;
use thiserror::Error;
use tokio::sync::mpsc;

use super::bundle::Netns;
use super::launch::{Launcher, Prepare, prepare};
use super::life::{Life, Purpose};
use super::netns::{self, NetnsError};
use super::publisher::Publisher;
use super::sandboxer::SandboxService;
use super::sched_core::{self, SchedCoreError};
use crate::cli::ServeArgs;
use crate::connections::counted;
use crate::fault::chain;
use crate::ground::Ground;
use crate::life::{LifeError, Watch, WatchError};
use crate::reins::Reins;
use crate::slot::Slot;
use crate::{management, services, trace};

#[derive(Debug, Error)]
pub(crate) enum ServeError {
    #[error(transparent)]
    Netns(NetnsError),
    #[error(transparent)]
    SchedCore(SchedCoreError),
    #[error("standard input is not the pod's socket; this verb is for `start` alone")]
    Listener(#[source] io::Error),
    #[error("cannot write the log {path}")]
    Log { path: PathBuf, source: io::Error },
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error(transparent)]
    Watch(WatchError),
    #[error("cannot serve {path}")]
    Serve { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Life(LifeError),
}

/// Owns the pod until containerd needs it no more. `started` is the zero of its timeline.
pub(crate) fn run(args: &ServeArgs, started: Instant) -> Result<(), ServeError> {
    let listener = trace::listener_on_stdin().map_err(ServeError::Listener)?;
    // Each thread's own: before there is a second.
    sched_core::enter().map_err(ServeError::SchedCore)?;
    let left = match args.sandboxer {
        // It is not known yet which.
        true => netns::own(),
        false => netns::enter(&args.netns.clone().map_or(Netns::New, Netns::At)),
    };
    let left = left.map_err(ServeError::Netns)?;
    // What the pod keeps is its owner's alone.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let ground = Ground::of(&args.id);
    let log = ground.run_dir.join("owner.log");
    let level = trace::under_containerd(&log, &args.bundle.join("log"), args.debug)
        .map_err(|source| ServeError::Log { path: log, source })?;
    trace::release_on_panic(ground.run_dir.clone());
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServeError::Runtime)?;
    let served = runtime.block_on(async {
        let owner =
            Owner { args, ground, started, level, runtime_netns: Some(Arc::new(left)), prepare: prepare() };
        let (life, server) = owner.serve(listener).await?;
        if let Err(error) = trace::detach_stdio() {
            tracing::warn!(%error, "cannot leave the standard streams");
        }
        let lived = life.run().await.map_err(ServeError::Life);
        drop(server);
        lived
    });
    if let Err(error) = &served {
        tracing::error!("{}", chain(error));
    }
    // Whatever is still under way serves nobody.
    runtime.shutdown_background();
    served
}

/// What it takes to serve a pod to come.
pub(super) struct Owner<'a> {
    pub(super) args: &'a ServeArgs,
    pub(super) ground: Ground,
    pub(super) started: Instant,
    pub(super) level: trace::Level,
    /// The network namespace that this process came from.
    pub(super) runtime_netns: Option<Arc<OwnedFd>>,
    pub(super) prepare: Prepare,
}

impl Owner<'_> {
    /// Serves the pod's socket. The pod lives as long as the [`Life`] runs and the server is kept.
    pub(super) async fn serve(
        self,
        listener: UnixListener,
    ) -> Result<(Life, ttrpc::asynchronous::Server), ServeError> {
        let path = self.ground.socket();
        let failed = |source| ServeError::Serve { path: path.clone(), source };
        let listener = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
        let watch = Watch::new(None).map_err(ServeError::Watch)?;
        let (listener, connections) = counted(listener);
        let (reins, requests) = Reins::new();
        let (launched, launches) = mpsc::unbounded_channel();
        let launcher = Launcher {
            id: self.args.id.clone(),
            ground: self.ground.clone(),
            started: self.started,
            launched,
            level: self.level,
            runtime_netns: self.runtime_netns,
            prepare: self.prepare,
        };
        let slot = Arc::new(Slot::waiting(launcher, self.args.sandboxer));
        management::serve(&self.ground.run_dir, slot.clone());
        let mut server = services::all(slot.clone(), &reins).add_listener(listener);
        if self.args.sandboxer {
            let (id, config) = (self.args.id.clone(), self.args.config.clone());
            let service = SandboxService::new(id, self.ground.clone(), config, slot, reins);
            server = server.register_service(services::sandbox(service));
        }
        server.start().await.map_err(|error| failed(io::Error::other(error)))?;
        let life = Life {
            ground: self.ground,
            publisher: Publisher::new(&self.args.events, &self.args.namespace),
            watch,
            requests,
            launched: launches,
            connections,
            purpose: if self.args.sandboxer { Purpose::Sandbox } else { Purpose::FirstContainer },
        };
        Ok((life, server))
    }
}

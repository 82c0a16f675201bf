//! `pod`: owns one standalone pod from its launch until nothing of it runs any more.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use kata_hypervisor::Vm;
use kata_sandbox::{ResourceSpec, Sandbox, SandboxError, SandboxSpec};
use thiserror::Error;
use ttrpc::asynchronous::Server;

use crate::cli::{EXISTS, FAILED, PodArgs};
use crate::connections::counted;
use crate::fault::chain;
use crate::ground::{Ground, GroundError};
use crate::life::{Life, LifeError, Watch, WatchError};
use crate::plan::{Plan, PlanError};
use crate::slot::Slot;
use crate::{management, services, spans, starts, trace};

#[derive(Debug, Error)]
pub(crate) enum OwnerError {
    #[error(transparent)]
    Plan(PlanError),
    #[error(transparent)]
    Ground(GroundError),
    #[error("cannot write the log {path}")]
    Log { path: PathBuf, source: io::Error },
    #[error("cannot start the runtime")]
    Runtime(#[source] io::Error),
    #[error("cannot launch the pod")]
    Launch(#[source] SandboxError),
    #[error("cannot serve {path}")]
    Serve { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Watch(WatchError),
    #[error(transparent)]
    Life(LifeError),
}

impl OwnerError {
    pub(crate) fn exit_code(&self) -> u8 {
        if matches!(self, Self::Ground(GroundError::Exists { .. })) { EXISTS } else { FAILED }
    }
}

/// Owns the pod that `args` describe. `started` is the zero of its timeline.
///
/// # Errors
/// Before the pod serves, why there is none: nothing is left of it then. Later, what was left behind.
pub(crate) fn run(args: &PodArgs, started: Instant) -> Result<(), OwnerError> {
    let plan = Plan::make(&args.sources.sources()).map_err(OwnerError::Plan)?;
    let ground = Ground::of(&args.id);
    let listener = ground.claim(&args.id).map_err(OwnerError::Ground)?;
    let served = own(args, plan, &ground, listener, started);
    if let Err(error) = &served {
        tracing::error!("{}", chain(error));
        // A pod that lived keeps its directory, for those who ask what became of it; one that never did leaves no trace.
        if !matches!(error, OwnerError::Life(_)) {
            // It must not hide why there is no pod.
            if let Err(left) = ground.clear() {
                eprintln!("containerd-shim-kata-v2: {}", chain(&left));
            }
        }
    }
    served
}

fn own(
    args: &PodArgs,
    plan: Plan,
    ground: &Ground,
    listener: UnixListener,
    started: Instant,
) -> Result<(), OwnerError> {
    let log = ground.run_dir.join("owner.log");
    let level = plan.config.runtime.effective_log_level();
    trace::to_file(&log, level).map_err(|source| OwnerError::Log { path: log, source })?;
    trace::release_on_panic(ground.run_dir.clone());
    // One thread: the owner waits for others most of its life, and each thread would cost stack and arena.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(OwnerError::Runtime)?;
    let driver = kata_hypervisor::driver(plan.choice.driver);
    let spec = SandboxSpec {
        id: args.id.clone(),
        hostname: None,
        config: plan.config,
        artefacts: plan.artefacts,
        run_dir: ground.run_dir.clone(),
        started,
        choice: plan.choice,
        network: None,
        // The caller sets the size by the configuration, and the processes stay in its cgroup.
        resources: ResourceSpec::default(),
    };
    let pod = Pod { ground: ground.clone(), rm: args.rm, client: args.client_pid };
    let served = runtime.block_on(async {
        let (life, server) = pod.serve(spec, driver, listener).await?;
        let detached = trace::detach_stdio();
        if let Err(error) = detached {
            tracing::warn!(%error, "cannot leave the standard streams");
        }
        let lived = life.run().await.map_err(OwnerError::Life);
        drop(server);
        lived
    });
    // Whatever is still under way serves nobody.
    runtime.shutdown_background();
    served
}

/// What the command line says of a pod's life.
pub(crate) struct Pod {
    pub(crate) ground: Ground,
    pub(crate) rm: bool,
    pub(crate) client: Option<i32>,
}

impl Pod {
    /// Launches the pod and serves its socket. The pod lives as long as its [`Life`] runs and the server is kept.
    pub(crate) async fn serve(
        self,
        spec: SandboxSpec,
        vm: Box<dyn Vm>,
        listener: UnixListener,
    ) -> Result<(Life, Server), OwnerError> {
        let path = self.ground.socket();
        let serve = |source| OwnerError::Serve { path: path.clone(), source };
        let listener = tokio::net::UnixListener::from_std(listener).map_err(serve)?;
        // Last of what can fail before there is something to undo.
        let watch = Watch::new(self.client).map_err(OwnerError::Watch)?;
        if spec.config.runtime.enable_tracing {
            spans::begin(&spec.id, &spec.config.runtime.otlp_endpoint, None);
        }
        let zero = spec.started;
        let sandbox = Sandbox::launch(spec, vm).await.map_err(OwnerError::Launch)?;
        starts::keep(&sandbox, self.ground.starts(), zero);
        let (listener, connections) = counted(listener);
        let slot = Arc::new(Slot::taken(sandbox.clone()));
        management::serve(&self.ground.run_dir, slot.clone());
        let (life, reins) = Life::new(sandbox.clone(), self.ground, self.rm, watch, connections);
        let mut server = services::all(slot, &reins).add_listener(listener);
        if let Err(error) = server.start().await {
            sandbox.shutdown().await.map_err(OwnerError::Launch)?;
            return Err(serve(io::Error::other(error)));
        }
        Ok((life, server))
    }
}

//! containerd's sandbox API: a pod that is there before its first container, and lives without any.
//!
//! ```text
//!   start, in a bundle without config.json ──▶ serve --sandboxer
//!   CreateSandbox ── options, network namespace ──▶ the machine begins to boot
//!   StartSandbox ─────────────────────────────────▶ … and is up; Task.Create puts containers into it
//!   WaitSandbox ◀── the machine ended ── StopSandbox, or a fault
//!   ShutdownSandbox ──▶ the owner leaves
//! ```
//!
//! Source: containerd's api/runtime/sandbox/v1. The CRI plugin drives it for handlers with `sandboxer = "shim"`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox as SandboxApi;
use kata_sandbox::{Event, ResourceSpec, Sandbox};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use ttrpc::r#async::TtrpcContext;

use super::bundle::Netns;
use super::launch::Wanted;
use super::netns;
use super::pod_config::{self, PodParts};
use crate::convert::timestamp;
use crate::fault;
use crate::ground::Ground;
use crate::reins::Reins;
use crate::slot::Slot;

/// What CRI calls a pod that can hold containers, and one that cannot.
const STATES: [&str; 2] = ["SANDBOX_READY", "SANDBOX_NOTREADY"];
/// Exit status of a pod that did not end by request.
const FAILED: u32 = 255;

/// How and when the pod ended.
#[derive(Clone, Copy, Debug)]
struct Ended {
    status: u32,
    at: SystemTime,
}

pub(crate) struct SandboxService {
    id: String,
    ground: Ground,
    /// The configuration file that the runtime's options name: only `start` is told.
    config: Option<PathBuf>,
    slot: Arc<Slot>,
    reins: Reins,
    ended: watch::Sender<Option<Ended>>,
}

impl SandboxService {
    pub(super) fn new(
        id: String,
        ground: Ground,
        config: Option<PathBuf>,
        slot: Arc<Slot>,
        reins: Reins,
    ) -> Self {
        Self { id, ground, config, slot, reins, ended: watch::Sender::new(None) }
    }

    /// The pod, if it is the one that is asked for and there.
    fn sandbox(&self, id: &str) -> ttrpc::Result<&Sandbox> {
        self.is_own(id)?;
        self.slot.get().ok_or_else(|| fault::not_found("the sandbox has not been created yet"))
    }

    fn is_own(&self, id: &str) -> ttrpc::Result<()> {
        match id == self.id {
            true => Ok(()),
            false => Err(fault::not_found(format!("this is sandbox {}, not {id:?}", self.id))),
        }
    }

    /// Remembers how the pod ends, for those who wait and those who come later.
    fn watch(&self, mut events: broadcast::Receiver<Event>) {
        let ended = self.ended.clone();
        tokio::spawn(async move {
            let status = loop {
                match events.recv().await {
                    Ok(Event::Stopped { fault: None }) => break 0,
                    Ok(Event::Stopped { fault: Some(_) }) | Err(RecvError::Closed) => break FAILED,
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                }
            };
            ended.send_replace(Some(Ended { status, at: SystemTime::now() }));
        });
    }
}

/// Takes this process to where the pod's network is, while there is one thread to take.
fn enter(netns: &str) -> ttrpc::Result<()> {
    if netns.is_empty() {
        return Err(fault::invalid(
            "the pod asks for the host's network, which a virtual machine cannot share (Kubernetes: hostNetwork: false)",
        ));
    }
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    if !cfg!(test) && !matches!(threads, Ok(1)) {
        let found = format!("{threads:?}");
        return Err(fault::internal(
            "create sandbox",
            format!(
                "the owner has threads already ({found}), which stay where they are; create the pod anew"
            ),
        ));
    }
    let entered = netns::enter(&Netns::At(netns.into()));
    entered.map(drop).map_err(|error| fault::precondition("create sandbox", fault::chain(&error)))
}

/// What containerd, whose names are Go's, calls this machine.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

#[async_trait]
impl SandboxApi for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: CreateSandboxRequest,
    ) -> ttrpc::Result<CreateSandboxResponse> {
        self.is_own(&req.sandbox_id)?;
        if self.slot.get().is_some() {
            return Err(fault::already_exists(format!("sandbox {} has been created already", self.id)));
        }
        let refused = |error: pod_config::PodConfigError| fault::invalid(fault::chain(&error));
        let config = pod_config::read(req.options.as_ref()).map_err(refused)?;
        enter(&req.netns_path)?;
        let parts = PodParts::write(self.ground.run_dir.join("etc"), &config)
            .map_err(|error| fault::internal("create sandbox", fault::chain(&error)))?;
        let mut annotations = pod_config::annotations(&config);
        annotations.extend(req.annotations);
        let cgroup = pod_config::cgroups_path(&config, &self.id);
        let resources = ResourceSpec::of_pod(&annotations, cgroup)
            .map_err(|error| fault::invalid(fault::chain(&error)))?;
        let wanted = Wanted {
            config: self.config.clone(),
            annotations,
            hostname: Some(config.hostname).filter(|name| !name.is_empty()),
            hooks: Vec::new(),
            bundle: Path::new(&req.bundle_path).to_owned(),
            resources,
            // No container's: nobody says more.
            oom_score_adj: 0,
        };
        let sandbox = self.slot.for_sandbox(wanted, parts).await?;
        self.watch(sandbox.events());
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        req: StartSandboxRequest,
    ) -> ttrpc::Result<StartSandboxResponse> {
        let sandbox = self.sandbox(&req.sandbox_id)?;
        sandbox.ready().await.map_err(|error| fault::from_sandbox("start sandbox", &error))?;
        let created_at = timestamp(UNIX_EPOCH + created(sandbox).await);
        Ok(StartSandboxResponse { pid: std::process::id(), created_at, ..StartSandboxResponse::default() })
    }

    async fn platform(&self, _: &TtrpcContext, req: PlatformRequest) -> ttrpc::Result<PlatformResponse> {
        self.is_own(&req.sandbox_id)?;
        let mut answer = PlatformResponse::new();
        let platform = answer.platform.mut_or_insert_default();
        "linux".clone_into(&mut platform.os);
        architecture().clone_into(&mut platform.architecture);
        Ok(answer)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        req: StopSandboxRequest,
    ) -> ttrpc::Result<StopSandboxResponse> {
        self.is_own(&req.sandbox_id)?;
        if let Some(sandbox) = self.slot.get() {
            sandbox.shutdown().await.map_err(|error| fault::from_sandbox("stop sandbox", &error))?;
        }
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        req: WaitSandboxRequest,
    ) -> ttrpc::Result<WaitSandboxResponse> {
        self.sandbox(&req.sandbox_id)?;
        let mut ended = self.ended.subscribe();
        let ended = ended.wait_for(Option::is_some).await.ok().and_then(|ended| *ended);
        let ended = ended.ok_or_else(fault::leaving)?;
        Ok(WaitSandboxResponse {
            exit_status: ended.status,
            exited_at: timestamp(ended.at),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: SandboxStatusRequest,
    ) -> ttrpc::Result<SandboxStatusResponse> {
        let sandbox = self.sandbox(&req.sandbox_id)?;
        let pod = sandbox.inspect().await;
        let [ready, not_ready] = STATES;
        let mut answer = SandboxStatusResponse {
            sandbox_id: req.sandbox_id,
            pid: std::process::id(),
            state: if pod.state == "ready" { ready } else { not_ready }.to_owned(),
            created_at: timestamp(UNIX_EPOCH + Duration::from_millis(pod.created_at_ms)),
            ..SandboxStatusResponse::default()
        };
        if let Some(ended) = *self.ended.borrow() {
            answer.exited_at = timestamp(ended.at);
        }
        if req.verbose {
            let reason = pod.fault.map(|fault| ("fault", fault));
            let told = [("state", pod.state), ("hypervisor", pod.hypervisor), ("kernel", pod.guest_kernel)];
            answer.info = told.into_iter().chain(reason).map(|(key, text)| (key.to_owned(), text)).collect();
        }
        Ok(answer)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, req: PingRequest) -> ttrpc::Result<PingResponse> {
        let sandbox = self.sandbox(&req.sandbox_id)?;
        sandbox.ready().await.map_err(|error| fault::from_sandbox("ping sandbox", &error))?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        req: ShutdownSandboxRequest,
    ) -> ttrpc::Result<ShutdownSandboxResponse> {
        self.is_own(&req.sandbox_id)?;
        self.reins.shut_down().await;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        _: SandboxMetricsRequest,
    ) -> ttrpc::Result<SandboxMetricsResponse> {
        Err(fault::unimplemented("SandboxMetrics (ask for the statistics of the pod's containers)"))
    }
}

/// When the pod began, since the epoch.
async fn created(sandbox: &Sandbox) -> Duration {
    Duration::from_millis(sandbox.inspect().await.created_at_ms)
}

//! The services of the agent: one thin method per request here, the work in a module per concern.

pub mod agent;
mod container;
mod error;
mod evidence;
mod files;
#[cfg(feature = "policy")]
pub mod guard;
#[cfg(not(feature = "policy"))]
#[path = "unguarded.rs"]
pub mod guard;
mod guest;
pub mod hooks;
mod image;
mod metrics;
mod network;
mod process;
mod processes;
mod sandbox;
mod secrets;
mod signal;
pub mod spec;
mod stdio;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kata_api::agent as wire;
use kata_api::agent_ttrpc::{AgentService, create_agent_service};
use kata_api::evidence::{GetEvidenceRequest, GetEvidenceResponse};
use kata_api::evidence_ttrpc::{Evidence, create_evidence};
use kata_api::files::{RemoveRequest, RemoveResponse};
use kata_api::files_ttrpc::{Files, create_files};
use kata_api::health::{CheckRequest, HealthCheckResponse, VersionCheckResponse, health_check_response};
use kata_api::health_ttrpc::{Health, create_health};
use kata_api::types;
use ttrpc::r#async::{Service, TtrpcContext};

pub use agent::Agent;
pub use error::RpcError;
use error::answer;

use crate::aside;

/// Version of the agent protocol that Health tells.
const PROTOCOL_VERSION: &str = "0.0.1";

/// Methods that are served. The generated code has an answer of its own for the others, which says NOT_FOUND; without
/// an entry the server itself says UNIMPLEMENTED, and that is what a caller can act upon.
const SERVED: [&str; 36] = [
    "CreateContainer",
    "StartContainer",
    "RemoveContainer",
    "ExecProcess",
    "SignalProcess",
    "WaitProcess",
    "UpdateContainer",
    "StatsContainer",
    "PauseContainer",
    "ResumeContainer",
    "WriteStdin",
    "ReadStdout",
    "ReadStderr",
    "CloseStdin",
    "TtyWinResize",
    "UpdateInterface",
    "UpdateRoutes",
    "ListInterfaces",
    "ListRoutes",
    "AddARPNeighbors",
    "GetMetrics",
    "GetDiagnosticData",
    "GetVolumeStats",
    "CreateSandbox",
    "DestroySandbox",
    "OnlineCPUMem",
    "ReseedRandomDev",
    "GetGuestDetails",
    "SetGuestDateTime",
    "CopyFile",
    "Remove",
    "GetEvidence",
    "GetOOMEvent",
    "UpdateEphemeralMounts",
    "Check",
    "Version",
];

/// All services, for a ttrpc server.
#[must_use]
pub fn services(agent: &Arc<Agent>) -> HashMap<String, Service> {
    let mut services = create_agent_service(Arc::new(Handlers(agent.clone())));
    services.extend(create_health(Arc::new(Handlers(agent.clone()))));
    services.extend(create_files(Arc::new(Handlers(agent.clone()))));
    services.extend(create_evidence(Arc::new(Handlers(agent.clone()))));
    for service in services.values_mut() {
        service.methods.retain(|name, _| SERVED.contains(&name.as_str()));
    }
    services
}

/// The generated traits on the shared state.
struct Handlers(Arc<Agent>);

type Answer<T> = ttrpc::Result<T>;

/// How long the caller waits, less what an answer takes to reach it; `None` where it has not said.
fn patience(context: &TtrpcContext) -> Option<Duration> {
    let limit = u64::try_from(context.timeout_nano).ok().filter(|limit| *limit > 0);
    limit.map(|limit| Duration::from_nanos(limit - limit / 20))
}

fn empty<T>(_: T) -> wire::Empty {
    wire::Empty::new()
}

#[async_trait]
impl AgentService for Handlers {
    async fn create_container(
        &self,
        context: &TtrpcContext,
        req: wire::CreateContainerRequest,
    ) -> Answer<wire::Empty> {
        let (patience, withheld) = (patience(context), guard::withheld(context));
        answer("CreateContainer", container::create(&self.0, req, patience, withheld).await.map(empty))
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        req: wire::StartContainerRequest,
    ) -> Answer<wire::Empty> {
        answer("StartContainer", container::start(&self.0, &req.container_id).await.map(empty))
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        req: wire::RemoveContainerRequest,
    ) -> Answer<wire::Empty> {
        answer("RemoveContainer", container::remove(&self.0, &req).await.map(empty))
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        req: wire::UpdateContainerRequest,
    ) -> Answer<wire::Empty> {
        answer("UpdateContainer", container::update(&self.0, req).await.map(empty))
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        req: wire::StatsContainerRequest,
    ) -> Answer<wire::StatsContainerResponse> {
        answer("StatsContainer", container::stats(&self.0, &req.container_id).await)
    }

    async fn pause_container(
        &self,
        _: &TtrpcContext,
        req: wire::PauseContainerRequest,
    ) -> Answer<wire::Empty> {
        let paused = self.0.engine.pause(&req.container_id).await;
        answer("PauseContainer", paused.map(empty).map_err(RpcError::from))
    }

    async fn resume_container(
        &self,
        _: &TtrpcContext,
        req: wire::ResumeContainerRequest,
    ) -> Answer<wire::Empty> {
        let resumed = self.0.engine.resume(&req.container_id).await;
        answer("ResumeContainer", resumed.map(empty).map_err(RpcError::from))
    }

    async fn exec_process(
        &self,
        context: &TtrpcContext,
        req: wire::ExecProcessRequest,
    ) -> Answer<wire::Empty> {
        let withheld = guard::withheld(context);
        answer("ExecProcess", process::exec(&self.0, req, withheld).await.map(empty))
    }

    async fn signal_process(&self, _: &TtrpcContext, req: wire::SignalProcessRequest) -> Answer<wire::Empty> {
        answer("SignalProcess", process::send_signal(&self.0, &req).await.map(empty))
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        req: wire::WaitProcessRequest,
    ) -> Answer<wire::WaitProcessResponse> {
        let status = process::wait(&self.0, &req.container_id, &req.exec_id).await;
        answer("WaitProcess", status.map(|status| wire::WaitProcessResponse { status, ..Default::default() }))
    }

    async fn write_stdin(
        &self,
        _: &TtrpcContext,
        req: wire::WriteStreamRequest,
    ) -> Answer<wire::WriteStreamResponse> {
        let written = stdio::write(&self.0, &req).await;
        answer("WriteStdin", written.map(|len| wire::WriteStreamResponse { len, ..Default::default() }))
    }

    async fn read_stdout(
        &self,
        _: &TtrpcContext,
        req: wire::ReadStreamRequest,
    ) -> Answer<wire::ReadStreamResponse> {
        let data = stdio::read(&self.0, &req, false).await;
        answer("ReadStdout", data.map(|data| wire::ReadStreamResponse { data, ..Default::default() }))
    }

    async fn read_stderr(
        &self,
        _: &TtrpcContext,
        req: wire::ReadStreamRequest,
    ) -> Answer<wire::ReadStreamResponse> {
        let data = stdio::read(&self.0, &req, true).await;
        answer("ReadStderr", data.map(|data| wire::ReadStreamResponse { data, ..Default::default() }))
    }

    async fn close_stdin(&self, _: &TtrpcContext, req: wire::CloseStdinRequest) -> Answer<wire::Empty> {
        let process = answer("CloseStdin", self.0.process(&req.container_id, &req.exec_id))?;
        process.stdio.close_stdin().await;
        Ok(wire::Empty::new())
    }

    async fn tty_win_resize(&self, _: &TtrpcContext, req: wire::TtyWinResizeRequest) -> Answer<wire::Empty> {
        answer("TtyWinResize", stdio::resize(&self.0, &req).map(empty))
    }

    async fn update_interface(
        &self,
        _: &TtrpcContext,
        req: wire::UpdateInterfaceRequest,
    ) -> Answer<types::Interface> {
        answer("UpdateInterface", network::update_interface(&self.0, req).await)
    }

    async fn update_routes(&self, _: &TtrpcContext, req: wire::UpdateRoutesRequest) -> Answer<wire::Routes> {
        answer("UpdateRoutes", network::update_routes(&req))
    }

    async fn list_interfaces(
        &self,
        _: &TtrpcContext,
        _: wire::ListInterfacesRequest,
    ) -> Answer<wire::Interfaces> {
        answer("ListInterfaces", network::list_interfaces())
    }

    async fn list_routes(&self, _: &TtrpcContext, _: wire::ListRoutesRequest) -> Answer<wire::Routes> {
        answer("ListRoutes", network::list_routes())
    }

    async fn add_arp_neighbors(
        &self,
        _: &TtrpcContext,
        req: wire::AddARPNeighborsRequest,
    ) -> Answer<wire::Empty> {
        answer("AddARPNeighbors", network::add_neighbours(&req).map(empty))
    }

    async fn get_metrics(&self, _: &TtrpcContext, _: wire::GetMetricsRequest) -> Answer<wire::Metrics> {
        Ok(wire::Metrics { metrics: metrics::text(), ..Default::default() })
    }

    async fn get_volume_stats(
        &self,
        _: &TtrpcContext,
        req: wire::VolumeStatsRequest,
    ) -> Answer<kata_api::csi::VolumeStatsResponse> {
        answer("GetVolumeStats", guest::volume_stats(req.volume_guest_path).await)
    }

    async fn get_diagnostic_data(
        &self,
        _: &TtrpcContext,
        req: wire::GetDiagnosticDataRequest,
    ) -> Answer<wire::GetDiagnosticDataResponse> {
        let data = processes::diagnostic(&self.0, &req).await;
        answer(
            "GetDiagnosticData",
            data.map(|data| wire::GetDiagnosticDataResponse { data, ..Default::default() }),
        )
    }

    async fn create_sandbox(&self, _: &TtrpcContext, req: wire::CreateSandboxRequest) -> Answer<wire::Empty> {
        answer("CreateSandbox", sandbox::create(&self.0, req).await.map(empty))
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: wire::DestroySandboxRequest) -> Answer<wire::Empty> {
        answer("DestroySandbox", sandbox::destroy(&self.0).await.map(empty))
    }

    async fn update_ephemeral_mounts(
        &self,
        _: &TtrpcContext,
        req: wire::UpdateEphemeralMountsRequest,
    ) -> Answer<wire::Empty> {
        let updated = self.0.storages.resize(&req.storages).await;
        answer("UpdateEphemeralMounts", updated.map(empty).map_err(RpcError::from))
    }

    async fn online_cpu_mem(&self, _: &TtrpcContext, req: wire::OnlineCPUMemRequest) -> Answer<wire::Empty> {
        answer("OnlineCPUMem", guest::online(req).await.map(empty))
    }

    async fn reseed_random_dev(
        &self,
        _: &TtrpcContext,
        req: wire::ReseedRandomDevRequest,
    ) -> Answer<wire::Empty> {
        answer("ReseedRandomDev", guest::reseed(&req.data).map(empty))
    }

    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        req: wire::GuestDetailsRequest,
    ) -> Answer<wire::GuestDetailsResponse> {
        answer("GetGuestDetails", guest::details(&req))
    }

    async fn set_guest_date_time(
        &self,
        _: &TtrpcContext,
        req: wire::SetGuestDateTimeRequest,
    ) -> Answer<wire::Empty> {
        answer("SetGuestDateTime", guest::set_time(&req).map(empty))
    }

    async fn copy_file(&self, _: &TtrpcContext, req: wire::CopyFileRequest) -> Answer<wire::Empty> {
        let turn = self.0.copies.clone().lock_owned().await;
        let copied = aside::run(format!("copying {:?}", req.path), move || {
            let _turn = turn;
            files::copy(Path::new(kata_api::guest::CONTAINER_DIR), &req)
        });
        let copied = copied.await;
        answer("CopyFile", copied.map_err(RpcError::from).flatten().map(empty))
    }

    async fn get_oom_event(&self, _: &TtrpcContext, _: wire::GetOOMEventRequest) -> Answer<wire::OOMEvent> {
        let container =
            self.0.oom_kill().await.ok_or_else(|| RpcError::State("the agent is ending".to_owned()));
        let event = |container_id| wire::OOMEvent { container_id, ..Default::default() };
        answer("GetOOMEvent", container.map(event))
    }
}

#[async_trait]
impl Files for Handlers {
    async fn remove(&self, _: &TtrpcContext, req: RemoveRequest) -> Answer<RemoveResponse> {
        let (base, path) = (Path::new(kata_api::guest::CONTAINER_DIR), PathBuf::from(req.path));
        let turn = self.0.copies.clone().lock_owned().await;
        let removed = aside::run(format!("removing {path:?}"), move || {
            let _turn = turn;
            files::remove(base, &path)
        });
        let removed = removed.await;
        answer("Remove", removed.map_err(RpcError::from).flatten().map(|()| RemoveResponse::new()))
    }
}

#[async_trait]
impl Evidence for Handlers {
    async fn get_evidence(&self, _: &TtrpcContext, req: GetEvidenceRequest) -> Answer<GetEvidenceResponse> {
        answer("GetEvidence", evidence::get("/".into(), self.0.reports.clone(), req).await)
    }
}

#[async_trait]
impl Health for Handlers {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> Answer<HealthCheckResponse> {
        let status = health_check_response::ServingStatus::SERVING.into();
        Ok(HealthCheckResponse { status, ..Default::default() })
    }

    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> Answer<VersionCheckResponse> {
        let agent_version = env!("CARGO_PKG_VERSION").to_owned();
        Ok(VersionCheckResponse {
            grpc_version: PROTOCOL_VERSION.to_owned(),
            agent_version,
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests;

//! `kata.control.v1.Control`: what the operator's tools ask beside the Task service.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kata_api::control::{
    self, DestroyRequest, DestroyResponse, EventsRequest, EventsResponse, EvidenceRequest, EvidenceResponse,
    InspectRequest, ProcessesRequest, ProcessesResponse,
};
use kata_api::control_ttrpc::Control;
use kata_sandbox::{ContainerView, GuestProcess, Inspection, Stage};
use ttrpc::r#async::TtrpcContext;

use crate::fault;
use crate::reins::Reins;
use crate::slot::Slot;

pub(crate) struct ControlService {
    slot: Arc<Slot>,
    reins: Reins,
}

impl ControlService {
    pub(crate) fn new(slot: Arc<Slot>, reins: Reins) -> Self {
        Self { slot, reins }
    }
}

#[async_trait]
impl Control for ControlService {
    async fn inspect(&self, _: &TtrpcContext, _: InspectRequest) -> ttrpc::Result<control::Pod> {
        let sandbox = self.slot.get().ok_or_else(fault::no_container)?;
        let inspection = sandbox.inspect().await;
        if inspection.state == "stopped" {
            self.reins.told();
        }
        let config = sandbox.config();
        Ok(control::Pod {
            debug_console: config.agent.kata.debug_console_enabled,
            // Names and plain values: there is nothing in it that has no JSON.
            config: serde_json::to_string(config).unwrap_or_default(),
            ..pod(inspection)
        })
    }

    async fn destroy(&self, _: &TtrpcContext, _: DestroyRequest) -> ttrpc::Result<DestroyResponse> {
        let destroyed = self.reins.destroy().await;
        destroyed.map(|()| DestroyResponse::new()).map_err(|chain| fault::internal("destroy", chain))
    }

    async fn processes(&self, _: &TtrpcContext, req: ProcessesRequest) -> ttrpc::Result<ProcessesResponse> {
        let sandbox = self.slot.get().ok_or_else(fault::no_container)?;
        let container = Some(req.container).filter(|container| !container.is_empty());
        let found = sandbox.processes(container.as_deref()).await;
        let found = found.map_err(|error| fault::from_sandbox("list processes", &error))?;
        let processes = found.into_iter().map(process).collect();
        Ok(ProcessesResponse { processes, ..ProcessesResponse::default() })
    }

    async fn events(&self, _: &TtrpcContext, req: EventsRequest) -> ttrpc::Result<EventsResponse> {
        Ok(self.slot.chronicle().since(req.from, Duration::from_millis(req.wait_ms.into())).await)
    }

    async fn evidence(&self, _: &TtrpcContext, req: EvidenceRequest) -> ttrpc::Result<EvidenceResponse> {
        let sandbox = self.slot.get().ok_or_else(fault::no_container)?;
        let found = async { sandbox.guest()?.evidence(req.report_data).await };
        let found = found.await.map_err(|error| fault::from_sandbox("evidence", &error))?;
        Ok(EvidenceResponse {
            provider: found.provider,
            report: found.report,
            certificates: found.certificates,
            ..EvidenceResponse::default()
        })
    }
}

fn pod(pod: Inspection) -> control::Pod {
    control::Pod {
        id: pod.id,
        state: pod.state,
        owner_pid: pod.owner_pid,
        vmm_pid: pod.vmm_pid,
        created_at_ms: pod.created_at_ms,
        hypervisor: pod.hypervisor,
        accelerator: pod.accelerator,
        choice: pod.choice,
        guest_kernel: pod.guest_kernel,
        agent_version: pod.agent_version,
        timeline: pod.timeline.into_iter().map(stage).collect(),
        containers: pod.containers.into_iter().map(container).collect(),
        fault: pod.fault.unwrap_or_default(),
        ..control::Pod::default()
    }
}

fn stage(stage: Stage) -> control::Stage {
    control::Stage {
        layer: stage.layer.as_str().to_owned(),
        name: stage.name,
        start_us: stage.start_us,
        duration_us: stage.duration_us,
        ..control::Stage::default()
    }
}

fn container(view: ContainerView) -> control::Container {
    control::Container {
        id: view.id,
        state: view.state.to_string(),
        args: view.args,
        exit_code: view.exit_code.map_or(0, |code| i32::try_from(code).unwrap_or(i32::MAX)),
        exited_at_ms: view.exited_at_ms.unwrap_or_default(),
        ..control::Container::default()
    }
}

fn process(process: GuestProcess) -> control::Process {
    control::Process {
        container: process.container,
        pid: process.pid,
        container_pid: process.container_pid,
        parent_pid: process.parent_pid,
        uid: process.uid,
        state: process.state,
        threads: process.threads,
        cpu_time_us: process.cpu_time_us,
        rss_bytes: process.rss_bytes,
        age_us: process.age_us,
        command: process.command,
        ..control::Process::default()
    }
}

//! containerd's Task service onto the sandbox. One implementation serves v2 and v3.

use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::shim_async::Task;
use kata_sandbox::{ContainerSpec, ProcessId, Sandbox, SandboxError, Stdio};
use oci_spec::runtime::{LinuxResources, Process, Spec};
use ttrpc::r#async::TtrpcContext;

use crate::convert::{create_event, from_json, process_id, rootfs_mount, state_response, stdio, timestamp};
use crate::reins::Reins;
use crate::slot::Slot;
use crate::{fault, metrics};

pub(crate) struct TaskService {
    slot: Arc<Slot>,
    reins: Reins,
}

impl TaskService {
    pub(crate) fn new(slot: Arc<Slot>, reins: Reins) -> Self {
        Self { slot, reins }
    }

    /// The pod, for requests about what is in it.
    fn sandbox(&self) -> ttrpc::Result<&Sandbox> {
        self.slot.get().ok_or_else(fault::no_container)
    }
}

/// Turns a sandbox's answer into ttrpc's.
fn answer<T>(request: &'static str, result: Result<T, SandboxError>) -> ttrpc::Result<T> {
    result.map_err(|error| fault::from_sandbox(request, &error))
}

fn done(request: &'static str, result: Result<(), SandboxError>) -> ttrpc::Result<Empty> {
    answer(request, result).map(|()| Empty::new())
}

/// The bundle's `config.json`, parsed here and nowhere else.
fn bundle_spec(bundle: &Path) -> ttrpc::Result<Spec> {
    if !bundle.is_absolute() {
        return Err(fault::invalid(format!("bundle {} is not an absolute path", bundle.display())));
    }
    let file = bundle.join("config.json");
    Spec::load(&file).map_err(|error| fault::invalid(format!("{}: {}", file.display(), fault::chain(&error))))
}

#[async_trait]
impl Task for TaskService {
    async fn create(&self, _: &TtrpcContext, req: CreateTaskRequest) -> ttrpc::Result<CreateTaskResponse> {
        if !req.checkpoint.is_empty() {
            return Err(fault::unimplemented("creating a container from a checkpoint"));
        }
        let creating = self.reins.creating(create_event(&req));
        let mut spec = bundle_spec(Path::new(&req.bundle))?;
        let sandbox = self.slot.for_create(&req, &spec).await?;
        if let Some(parts) = self.slot.parts() {
            parts.complete(&mut spec);
        }
        let container = ContainerSpec {
            spec,
            stdio: Stdio {
                lasting: self.slot.lasting(),
                ..stdio(&req.stdin, &req.stdout, &req.stderr, req.terminal)
            },
            rootfs: req.rootfs.into_iter().map(rootfs_mount).collect(),
            id: req.id,
            bundle: req.bundle.into(),
        };
        let result = answer("create", sandbox.create_container(container).await);
        if result.is_err() {
            self.reins.told();
        }
        drop(creating);
        result.map(|()| CreateTaskResponse { pid: std::process::id(), ..CreateTaskResponse::default() })
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> ttrpc::Result<StartResponse> {
        let pid = answer("start", self.sandbox()?.start(&process_id(req.id, req.exec_id)).await)?;
        Ok(StartResponse { pid, ..StartResponse::default() })
    }

    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> ttrpc::Result<StateResponse> {
        let state =
            answer("state", self.sandbox()?.state(&process_id(req.id.clone(), req.exec_id.clone())).await)?;
        Ok(state_response(req.id, req.exec_id, state))
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let pids = answer("pids", self.sandbox()?.pids(&req.id).await)?;
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..ProcessInfo::default() }).collect();
        Ok(PidsResponse { processes, ..PidsResponse::default() })
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> ttrpc::Result<Empty> {
        done("pause", self.sandbox()?.pause(&req.id).await)
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> ttrpc::Result<Empty> {
        done("resume", self.sandbox()?.resume(&req.id).await)
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(fault::unimplemented("checkpoint"))
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> ttrpc::Result<Empty> {
        done("kill", self.sandbox()?.kill(&process_id(req.id, req.exec_id), req.signal, req.all).await)
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> ttrpc::Result<Empty> {
        if req.exec_id.is_empty() {
            return Err(fault::invalid("exec without an exec id"));
        }
        let process: Process = from_json("process", req.spec.as_ref())?;
        let stdio = stdio(&req.stdin, &req.stdout, &req.stderr, req.terminal);
        let stdio = Stdio { lasting: self.slot.lasting(), ..stdio };
        done("exec", self.sandbox()?.exec(&req.id, &req.exec_id, process, stdio).await)
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> ttrpc::Result<Empty> {
        done("resize", self.sandbox()?.resize(&process_id(req.id, req.exec_id), req.height, req.width).await)
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> ttrpc::Result<Empty> {
        if !req.stdin {
            return Ok(Empty::new());
        }
        done("close stdin", self.sandbox()?.close_stdin(&process_id(req.id, req.exec_id)).await)
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources: LinuxResources = from_json("resources", req.resources.as_ref())?;
        done("update", self.sandbox()?.update(&req.id, resources).await)
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let sandbox = self.sandbox()?;
        let process = process_id(req.id, req.exec_id);
        let exit = answer("wait", sandbox.wait(&process).await)?;
        if process.exec.is_none() {
            self.reins.told();
        }
        let exited_at = timestamp(exit.at);
        Ok(WaitResponse { exit_status: exit.code, exited_at, ..WaitResponse::default() })
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let stats = answer("stats", self.sandbox()?.stats(&req.id).await)?;
        let stats =
            metrics::packed(&stats).map_err(|error| fault::internal("stats", fault::chain(&error)))?;
        Ok(StatsResponse { stats: Some(stats).into(), ..StatsResponse::default() })
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        let task = match req.id.as_str() {
            "" => 0,
            // containerd asks so whether the shim of a sandbox lives.
            id if self.slot.is_sandbox(id) => std::process::id(),
            id => answer("connect", self.sandbox()?.state(&ProcessId::init(id)).await)?.pid,
        };
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let shim = std::process::id();
        Ok(ConnectResponse { shim_pid: shim, task_pid: task, version, ..ConnectResponse::default() })
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let exit = answer("delete", self.sandbox()?.delete(&process_id(req.id, req.exec_id)).await)?;
        Ok(DeleteResponse {
            pid: std::process::id(),
            exit_status: exit.code,
            exited_at: timestamp(exit.at),
            ..DeleteResponse::default()
        })
    }

    /// Ends the pod if it holds no container, as containerd expects after the last delete; with `now`, in any case. A pod of
    /// the sandbox API is not a container's to end.
    async fn shutdown(&self, _: &TtrpcContext, req: ShutdownRequest) -> ttrpc::Result<Empty> {
        let empty = match self.slot.get() {
            Some(sandbox) => sandbox.inspect().await.containers.is_empty(),
            None => true,
        };
        let may_end = !self.slot.outlives_containers() || self.slot.is_sandbox(&req.id);
        if req.now || empty && may_end {
            self.reins.shut_down().await;
        }
        Ok(Empty::new())
    }
}

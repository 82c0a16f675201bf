//! A guest agent that runs nothing: what the service tests need of one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use kata_api::agent::{
    CreateContainerRequest, CreateSandboxRequest, DestroySandboxRequest, Empty, GetOOMEventRequest, OOMEvent,
    ReadStreamRequest, ReadStreamResponse, RemoveContainerRequest, SignalProcessRequest,
    StartContainerRequest, WaitProcessRequest, WaitProcessResponse,
};
use kata_api::agent_ttrpc::{AgentService, create_agent_service};
use kata_api::health::{CheckRequest, VersionCheckResponse};
use kata_api::health_ttrpc::{Health, create_health};
use tokio::sync::watch;
use ttrpc::r#async::TtrpcContext;
use ttrpc::asynchronous::Server;

/// One container at most, whose process ends when the test or a signal says so.
#[derive(Clone)]
pub(super) struct FakeAgent {
    exit: Arc<watch::Sender<Option<i32>>>,
    /// Bytes of output that are still to be read.
    output: Arc<AtomicUsize>,
}

impl FakeAgent {
    pub(super) fn new() -> Self {
        Self { exit: Arc::new(watch::channel(None).0), output: Arc::default() }
    }

    /// The container's process writes this much.
    pub(super) fn write(&self, bytes: usize) {
        self.output.store(bytes, Ordering::SeqCst);
    }

    /// Serves on a socket in `dir`, whose path is the answer.
    pub(super) async fn serve(&self, dir: &Path) -> (Server, PathBuf) {
        let path = dir.join("agent.sock");
        let agent = Arc::new(self.clone());
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_agent_service(agent.clone()))
            .register_service(create_health(agent));
        server.start().await.unwrap();
        (server, path)
    }

    /// Ends the container's process.
    pub(super) fn exit(&self, code: i32) {
        self.exit.send_replace(Some(code));
    }
}

#[async_trait]
impl Health for FakeAgent {
    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<VersionCheckResponse> {
        Ok(VersionCheckResponse { agent_version: "fake".to_owned(), ..VersionCheckResponse::default() })
    }
}

#[async_trait]
impl AgentService for FakeAgent {
    async fn create_sandbox(&self, _: &TtrpcContext, _: CreateSandboxRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: DestroySandboxRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn create_container(&self, _: &TtrpcContext, _: CreateContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn start_container(&self, _: &TtrpcContext, _: StartContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn remove_container(&self, _: &TtrpcContext, _: RemoveContainerRequest) -> ttrpc::Result<Empty> {
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &TtrpcContext, req: SignalProcessRequest) -> ttrpc::Result<Empty> {
        self.exit(128 + i32::try_from(req.signal).unwrap());
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        _: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let mut exit = self.exit.subscribe();
        let status = exit.wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(WaitProcessResponse { status, ..WaitProcessResponse::default() })
    }

    async fn read_stdout(
        &self,
        _: &TtrpcContext,
        req: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        let left = self.output.load(Ordering::SeqCst);
        let taken = left.min(usize::try_from(req.len).unwrap());
        self.output.store(left - taken, Ordering::SeqCst);
        Ok(ReadStreamResponse { data: vec![b'x'; taken], ..ReadStreamResponse::default() })
    }

    async fn get_oom_event(&self, _: &TtrpcContext, _: GetOOMEventRequest) -> ttrpc::Result<OOMEvent> {
        std::future::pending().await
    }
}

//! The services over a real ttrpc connection, with an engine that runs plain processes of the host.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use kata_api::agent_ttrpc::AgentServiceClient;
use kata_api::evidence_ttrpc::EvidenceClient;
use kata_api::health_ttrpc::HealthClient;
use kata_api::oci;
use oci_spec::runtime::{LinuxResources, Process, Spec};
use rustix::process::{Pid, Signal, kill_process};
use ttrpc::Code;
use ttrpc::r#async::{Client, Server};
use ttrpc::context::Context;

use super::*;
use crate::cmdline::Settings;
use crate::container::{Engine, EngineError, OomEvents, ProcessIo, Spawned};
use crate::modules::Modules;
use crate::reaper::Reaper;
use crate::services::Services;

/// Runs `args` of a spec as a process of the host, at once; `start` only checks the id.
#[derive(Default)]
struct PlainEngine {
    containers: Mutex<HashMap<String, Pid>>,
}

impl PlainEngine {
    fn run(process: &Process, io: ProcessIo) -> Result<Spawned, EngineError> {
        let args = process.args().clone().unwrap_or_default();
        let or_null = |fd: Option<std::os::fd::OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
        let mut command = Command::new(&args[0]);
        command
            .args(&args[1..])
            .stdin(or_null(io.stdin))
            .stdout(or_null(io.stdout))
            .stderr(or_null(io.stderr));
        let missing = |_| EngineError::CommandNotFound {
            command: args[0].clone(),
            tried: vec![args[0].clone().into()],
        };
        let child = command.spawn().map_err(missing)?;
        Ok(Spawned { pid: Pid::from_child(&child), terminal: None })
    }

    fn init(&self, id: &str) -> Result<Pid, EngineError> {
        self.containers.lock().unwrap().get(id).copied().ok_or_else(|| EngineError::NoContainer(id.into()))
    }
}

#[async_trait]
impl Engine for PlainEngine {
    async fn create(&self, id: &str, spec: &Spec, _: &Path, io: ProcessIo) -> Result<Spawned, EngineError> {
        let made = Self::run(spec.process().as_ref().unwrap(), io)?;
        self.containers.lock().unwrap().insert(id.into(), made.pid);
        Ok(made)
    }

    async fn start(&self, id: &str) -> Result<(), EngineError> {
        self.init(id).map(|_| ())
    }

    async fn exec(&self, id: &str, process: &Process, io: ProcessIo) -> Result<Spawned, EngineError> {
        self.init(id)?;
        Self::run(process, io)
    }

    async fn signal_all(&self, id: &str, signal: Signal) -> Result<(), EngineError> {
        let _ = kill_process(self.init(id)?, signal);
        Ok(())
    }

    async fn pause(&self, id: &str) -> Result<(), EngineError> {
        self.init(id).map(|_| ())
    }

    async fn resume(&self, id: &str) -> Result<(), EngineError> {
        self.init(id).map(|_| ())
    }

    async fn update(&self, id: &str, _: &LinuxResources) -> Result<(), EngineError> {
        self.init(id).map(|_| ())
    }

    async fn stats(&self, id: &str) -> Result<wire::CgroupStats, EngineError> {
        self.init(id).map(|_| wire::CgroupStats::new())
    }

    async fn pids(&self, id: &str) -> Result<Vec<Pid>, EngineError> {
        self.init(id).map(|pid| vec![pid])
    }

    async fn delete(&self, id: &str) -> Result<(), EngineError> {
        let _ = kill_process(self.init(id)?, Signal::KILL);
        self.containers.lock().unwrap().remove(id);
        Ok(())
    }

    fn oom_events(&self, _: &str) -> Result<OomEvents, EngineError> {
        Err(EngineError::Unsupported {
            key: "memory".into(),
            reason: "plain processes have no cgroup".into(),
        })
    }
}

pub(super) struct Guest {
    agent: Arc<Agent>,
    pub(super) client: AgentServiceClient,
    pub(super) health: HealthClient,
    pub(super) evidence: EvidenceClient,
    _server: Server,
    _dir: tempfile::TempDir,
}

impl Guest {
    async fn boot() -> Self {
        Self::behind(|services| services).await
    }

    /// With something before the services.
    pub(super) async fn behind(
        guard: impl FnOnce(HashMap<String, Service>) -> HashMap<String, Service>,
    ) -> Self {
        let reaper = Reaper::new();
        tokio::spawn(reaper.clone().run());
        let engine = Arc::new(PlainEngine::default());
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings::default();
        let of_guest = Services::new(dir.path(), &settings, reaper.clone());
        let agent = Arc::new(Agent::new(engine, reaper, Arc::new(Modules::default()), of_guest, settings));
        let address = format!("unix://{}", dir.path().join("agent.sock").display());
        let mut server = Server::new().bind(&address).unwrap().register_service(guard(services(&agent)));
        server.start().await.unwrap();
        let client = Client::connect(&address).await.unwrap();
        let health = HealthClient::new(client.clone());
        let evidence = EvidenceClient::new(client.clone());
        Self { agent, client: AgentServiceClient::new(client), health, evidence, _server: server, _dir: dir }
    }

    /// A stream connection from a port of the host.
    #[cfg(feature = "policy")]
    pub(super) fn connect(&self, port: u32) -> UnixStream {
        let (near, far) = UnixStream::pair().unwrap();
        self.agent.streams.offer(port, near.into());
        far
    }

    pub(super) async fn create(&self, id: &str, script: &str) -> ttrpc::Result<wire::Empty> {
        let mut request = wire::CreateContainerRequest { container_id: id.into(), ..Default::default() };
        let spec = request.oci.mut_or_insert_default();
        spec.root.mut_or_insert_default().path = "/".into();
        spec.process = Some(sh(script)).into();
        self.client.create_container(context(), &request).await
    }

    pub(super) async fn exec(
        &self,
        id: &str,
        exec: &str,
        process: oci::Process,
    ) -> ttrpc::Result<wire::Empty> {
        let request = wire::ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process: Some(process).into(),
            ..Default::default()
        };
        self.client.exec_process(context(), &request).await
    }

    async fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<i32> {
        let request =
            wire::WaitProcessRequest { container_id: id.into(), exec_id: exec.into(), ..Default::default() };
        self.client.wait_process(context(), &request).await.map(|response| response.status)
    }

    async fn signal(&self, id: &str, exec: &str, signal: u32) -> ttrpc::Result<wire::Empty> {
        let request = wire::SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            signal,
            ..Default::default()
        };
        self.client.signal_process(context(), &request).await
    }
}

pub(super) fn context() -> Context {
    ttrpc::context::with_timeout(20_000_000_000)
}

pub(super) fn sh(script: &str) -> oci::Process {
    oci::Process { args: ["/bin/sh", "-c", script].map(str::to_owned).into(), ..Default::default() }
}

pub(super) fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> (Code, String) {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other:?}"),
    }
}

#[tokio::test]
async fn a_container_runs_and_its_exit_code_reaches_every_waiter() {
    let guest = Guest::boot().await;
    guest.create("c1", "exit 42").await.unwrap();
    let start = wire::StartContainerRequest { container_id: "c1".into(), ..Default::default() };
    guest.client.start_container(context(), &start).await.unwrap();
    let (first, second) = tokio::join!(guest.wait("c1", ""), guest.wait("c1", "c1"));
    assert_eq!((first.unwrap(), second.unwrap()), (42, 42));
    assert_eq!(guest.wait("c1", "").await.unwrap(), 42, "and a late one");
}

#[tokio::test]
async fn a_wait_is_answered_whether_it_comes_before_or_after_the_end() {
    let guest = Guest::boot().await;
    for round in 0..120_u32 {
        let (id, meant) = (format!("c{round}"), i32::try_from(round % 100).unwrap());
        // It ends at once, or while the requests are on their way.
        let pause = ["", "sleep 0.001; ", "sleep 0.004; "][usize::try_from(round % 3).unwrap()];
        guest.create(&id, &format!("{pause}exit {meant}")).await.unwrap();
        if round % 4 == 0 {
            tokio::time::sleep(std::time::Duration::from_millis((round % 7).into())).await;
        }
        let start = wire::StartContainerRequest { container_id: id.clone(), ..Default::default() };
        let started = guest.client.start_container(context(), &start);
        let (first, second, started) = tokio::join!(guest.wait(&id, ""), guest.wait(&id, ""), started);
        started.unwrap();
        assert_eq!((first.unwrap(), second.unwrap()), (meant, meant), "round {round}");
        let gone = wire::RemoveContainerRequest { container_id: id, ..Default::default() };
        guest.client.remove_container(context(), &gone).await.unwrap();
    }
}

#[tokio::test]
async fn each_failure_has_the_code_that_the_contract_names() {
    let guest = Guest::boot().await;
    guest.create("c1", "sleep 60").await.unwrap();
    assert_eq!(code(guest.create("c1", "true").await).0, Code::ALREADY_EXISTS);
    assert_eq!(code(guest.create("../c", "true").await).0, Code::INVALID_ARGUMENT);
    assert_eq!(code(guest.wait("c2", "").await).0, Code::NOT_FOUND);
    assert_eq!(code(guest.wait("c1", "e").await).0, Code::NOT_FOUND);
    assert_eq!(code(guest.signal("c1", "", 999).await).0, Code::INVALID_ARGUMENT);
    let missing = oci::Process { args: vec!["/no/such/program".into()], ..Default::default() };
    let (not_found, text) = code(guest.exec("c1", "e", missing).await);
    assert_eq!(not_found, Code::NOT_FOUND);
    assert!(text.contains("/no/such/program"), "{text}");
    let mut request = wire::CreateContainerRequest { container_id: "c3".into(), ..Default::default() };
    assert_eq!(code(guest.client.create_container(context(), &request).await).0, Code::INVALID_ARGUMENT);
    request.devices.push(wire::Device::new());
    assert_eq!(code(guest.client.create_container(context(), &request).await).0, Code::UNIMPLEMENTED);
    guest.signal("c1", "", 9).await.unwrap();
}

#[tokio::test]
async fn what_is_not_served_is_unimplemented() {
    let guest = Guest::boot().await;
    let answer = guest.client.get_ip_tables(context(), &wire::GetIPTablesRequest::new()).await;
    assert_eq!(code(answer).0, Code::UNIMPLEMENTED);
    let answer = guest.client.set_policy(context(), &wire::SetPolicyRequest::new()).await;
    assert_eq!(code(answer).0, Code::UNIMPLEMENTED);
    let answer = guest.client.mem_agent_memcg_set(context(), &wire::MemAgentMemcgConfig::new()).await;
    assert_eq!(code(answer).0, Code::UNIMPLEMENTED);
    let answer = guest.client.mem_agent_compact_set(context(), &wire::MemAgentCompactConfig::new()).await;
    assert_eq!(code(answer).0, Code::UNIMPLEMENTED);
    let answer = guest.client.add_swap(context(), &wire::AddSwapRequest::new()).await;
    assert_eq!(code(answer).0, Code::UNIMPLEMENTED);
}

#[tokio::test]
async fn processes_are_diagnostic_data_and_other_kinds_are_unimplemented() {
    let guest = Guest::boot().await;
    guest.create("c1", "sleep 1000").await.unwrap();
    let ask = async |log_type: &str, container_id: &str| {
        let (log_type, container_id) = (log_type.to_owned(), container_id.to_owned());
        let request = wire::GetDiagnosticDataRequest { log_type, container_id, ..Default::default() };
        guest.client.get_diagnostic_data(context(), &request).await
    };
    let data = ask(kata_api::PROCESSES, "c1").await.unwrap().data;
    let found: Vec<kata_api::GuestProcess> = serde_json::from_str(&data).unwrap();
    assert_eq!((found.len(), found[0].container.as_str()), (1, "c1"), "{data}");
    assert_eq!(code(ask(kata_api::PROCESSES, "c2").await).0, Code::NOT_FOUND);
    assert_eq!(code(ask("weather", "").await).0, Code::UNIMPLEMENTED);
    guest.signal("c1", "", 9).await.unwrap();
}

#[tokio::test]
async fn the_network_is_listed_and_a_request_without_sense_is_refused() {
    let guest = Guest::boot().await;
    let listed = guest.client.list_interfaces(context(), &wire::ListInterfacesRequest::new()).await.unwrap();
    assert!(listed.interfaces.iter().any(|interface| interface.name == "lo"), "{listed:?}");
    let answer = guest.client.update_interface(context(), &wire::UpdateInterfaceRequest::new()).await;
    assert_eq!(code(answer).0, Code::INVALID_ARGUMENT);
    let mut request = wire::UpdateRoutesRequest::new();
    let route = types::Route { device: "no-such-device".into(), ..Default::default() };
    request.routes.mut_or_insert_default().routes.push(route);
    let (not_found, text) = code(guest.client.update_routes(context(), &request).await);
    assert_eq!(not_found, Code::NOT_FOUND);
    assert!(text.contains("no-such-device"), "{text}");
}

#[tokio::test]
async fn every_served_name_is_a_method_of_the_protocol() {
    let guest = Guest::boot().await;
    let services = services(&guest.agent);
    let served: usize = services.values().map(|service| service.methods.len()).sum();
    assert_eq!(served, SERVED.len());
}

#[tokio::test]
async fn an_exec_is_waited_for_signalled_and_its_id_free_again() {
    let guest = Guest::boot().await;
    guest.create("c1", "sleep 60").await.unwrap();
    guest.exec("c1", "e", sh("sleep 60")).await.unwrap();
    assert_eq!(code(guest.exec("c1", "e", sh("true")).await).0, Code::ALREADY_EXISTS);
    guest.signal("c1", "e", 15).await.unwrap();
    assert_eq!(guest.wait("c1", "e").await.unwrap(), 128 + 15);
    assert_eq!(code(guest.signal("c1", "e", 15).await).0, Code::FAILED_PRECONDITION);
    guest.exec("c1", "e", sh("exit 3")).await.unwrap();
    assert_eq!(guest.wait("c1", "e").await.unwrap(), 3);
    guest.signal("c1", "", 9).await.unwrap();
    assert_eq!(guest.wait("c1", "").await.unwrap(), 137);
}

#[tokio::test]
async fn many_ended_execs_are_forgotten() {
    let guest = Guest::boot().await;
    guest.create("c1", "sleep 60").await.unwrap();
    for number in 0..40 {
        let id = format!("e{number}");
        guest.exec("c1", &id, sh("exit 1")).await.unwrap();
        assert_eq!(guest.wait("c1", &id).await.unwrap(), 1);
    }
    assert_eq!(code(guest.wait("c1", "e0").await).0, Code::NOT_FOUND);
    assert_eq!(guest.wait("c1", "e39").await.unwrap(), 1);
    guest.signal("c1", "", 9).await.unwrap();
}

#[tokio::test]
async fn a_peer_without_streams_reads_and_writes_by_request() {
    let guest = Guest::boot().await;
    guest.create("c1", "cat; echo end >&2").await.unwrap();
    let write =
        wire::WriteStreamRequest { container_id: "c1".into(), data: b"ping".to_vec(), ..Default::default() };
    assert_eq!(guest.client.write_stdin(context(), &write).await.unwrap().len, 4);
    let read = wire::ReadStreamRequest { container_id: "c1".into(), len: 32 << 10, ..Default::default() };
    assert_eq!(guest.client.read_stdout(context(), &read).await.unwrap().data, b"ping");
    let close = wire::CloseStdinRequest { container_id: "c1".into(), ..Default::default() };
    guest.client.close_stdin(context(), &close).await.unwrap();
    assert_eq!(guest.client.read_stderr(context(), &read).await.unwrap().data, b"end\n");
    assert_eq!(code(guest.client.read_stdout(context(), &read).await).0, Code::OUT_OF_RANGE);
    let resize = wire::TtyWinResizeRequest { container_id: "c1".into(), ..Default::default() };
    assert_eq!(code(guest.client.tty_win_resize(context(), &resize).await).0, Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn stream_ports_connect_a_process_to_the_host() {
    let guest = Guest::boot().await;
    let (near, far) = UnixStream::pair().unwrap();
    guest.agent.streams.offer(7001, near.into());
    guest.create("c1", "sleep 60").await.unwrap();
    let request = wire::ExecProcessRequest {
        container_id: "c1".into(),
        exec_id: "e".into(),
        process: Some(sh("printf 'all of it'")).into(),
        stdout_port: 7001,
        ..Default::default()
    };
    guest.client.exec_process(context(), &request).await.unwrap();
    let text = tokio::task::spawn_blocking(move || std::io::read_to_string(far).unwrap()).await.unwrap();
    assert_eq!(text, "all of it");
    guest.signal("c1", "", 9).await.unwrap();
}

#[tokio::test]
async fn removing_ends_the_container_and_frees_its_id() {
    let guest = Guest::boot().await;
    guest.create("c1", "sleep 60").await.unwrap();
    let remove = wire::RemoveContainerRequest { container_id: "c1".into(), timeout: 5, ..Default::default() };
    guest.client.remove_container(context(), &remove).await.unwrap();
    assert_eq!(code(guest.client.remove_container(context(), &remove).await).0, Code::NOT_FOUND);
    guest.create("c1", "exit 0").await.unwrap();
    assert_eq!(guest.wait("c1", "").await.unwrap(), 0);
}

#[tokio::test]
async fn an_oom_kill_ends_a_long_poll() {
    let guest = Guest::boot().await;
    let request = wire::GetOOMEventRequest::new();
    let (event, ()) = tokio::join!(guest.client.get_oom_event(context(), &request), async {
        tokio::task::yield_now().await;
        guest.agent.report_oom("c9");
    });
    assert_eq!(event.unwrap().container_id, "c9");
}

#[tokio::test]
async fn the_agent_is_healthy_and_tells_its_version() {
    let guest = Guest::boot().await;
    let request = CheckRequest::new();
    let status = guest.health.check(context(), &request).await.unwrap().status;
    assert_eq!(status, health_check_response::ServingStatus::SERVING.into());
    let version = guest.health.version(context(), &request).await.unwrap();
    assert_eq!(version.agent_version, env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn destroying_the_sandbox_removes_its_containers_and_ends_the_agents_work() {
    let guest = Guest::boot().await;
    guest.create("c1", "sleep 60").await.unwrap();
    guest.client.destroy_sandbox(context(), &wire::DestroySandboxRequest::new()).await.unwrap();
    assert_eq!(code(guest.wait("c1", "").await).0, Code::NOT_FOUND);
    let done = guest.agent.done.notified();
    tokio::time::timeout(std::time::Duration::from_secs(5), done).await.expect("the agent goes on");
}

#[tokio::test]
async fn evidence_has_room_for_64_bytes() {
    let guest = Guest::boot().await;
    let request = GetEvidenceRequest { report_data: vec![0; 65], ..Default::default() };
    let (code, text) = code(guest.evidence.get_evidence(context(), &request).await);
    assert!(code == Code::INVALID_ARGUMENT && text.contains("room for 64"), "{code:?} {text}");
}

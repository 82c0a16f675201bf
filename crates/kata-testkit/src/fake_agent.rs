//! An agent without a guest: the agent and health services, and the stream port, over any unix socket.
//!
//! ```text
//!   host ── CONNECT 1024 ──▶ accept(1024, …) ──▶ ttrpc: AgentService, Health
//!        ── CONNECT 1027 ──▶ accept(1027, …) ──▶ kept until a request names its port
//! ```
//!
//! Its processes are a handful of built-in programs, picked by the first argument of the command line:
//!
//! | command | what it does |
//! |---|---|
//! | `cat` | input to output, exit 0 at the end of the input |
//! | `print TEXT` | TEXT to the output, exit 0 |
//! | `flood N` | N bytes (0, 1, … 250, 0, …) to the output, exit 0 |
//! | `exit N` | exit N at once |
//! | `sleep` | runs until a signal ends it: exit 128 + signal |
//!
//! Anything else is not found, which is told at the creation, as a real agent does.

mod beside;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kata_api::agent::{
    AddARPNeighborsRequest, CloseStdinRequest, CopyFileRequest, CreateContainerRequest, CreateSandboxRequest,
    DestroySandboxRequest, Empty, ExecProcessRequest, GetOOMEventRequest, GuestDetailsRequest,
    GuestDetailsResponse, OOMEvent, OnlineCPUMemRequest, PauseContainerRequest, ReadStreamRequest,
    ReadStreamResponse, RemoveContainerRequest, ReseedRandomDevRequest, ResumeContainerRequest, Routes,
    SetGuestDateTimeRequest, SignalProcessRequest, StartContainerRequest, StatsContainerRequest,
    StatsContainerResponse, TtyWinResizeRequest, UpdateContainerRequest, UpdateInterfaceRequest,
    UpdateRoutesRequest, WaitProcessRequest, WaitProcessResponse, WriteStreamRequest, WriteStreamResponse,
};
use kata_api::agent_ttrpc::{AgentService, create_agent_service};
use kata_api::evidence_ttrpc::create_evidence;
use kata_api::files_ttrpc::create_files;
use kata_api::health_ttrpc::create_health;
use kata_api::types::{ARPNeighbor, Interface, Route};
use kata_api::{Announcement, BootStage, ports};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::UnixStream;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use ttrpc::r#async::{Server, TtrpcContext};
use ttrpc::{Code, Error, get_status};

/// An error of the services.
fn refusal(code: Code, message: impl Into<String>) -> Error {
    Error::RpcStatus(get_status(code, message.into()))
}

/// How long a request waits for the streams that it names.
const STREAM_BOUND: Duration = Duration::from_secs(5);
/// What the streams of a process without ports hold.
const PIPE: usize = 64 * 1024;

type Input = Box<dyn AsyncRead + Send + Unpin>;
type Output = Box<dyn AsyncWrite + Send + Unpin>;

/// A scriptable agent. Clones are handles to the same one.
#[derive(Clone)]
pub struct FakeAgent(Arc<State>);

struct State {
    dir: tempfile::TempDir,
    script: Mutex<Script>,
    calls: Mutex<Vec<String>>,
    created: Mutex<Vec<CreateContainerRequest>>,
    copied: Mutex<Vec<CopyFileRequest>>,
    removed: Mutex<Vec<String>>,
    sandbox: Mutex<Option<CreateSandboxRequest>>,
    network: Mutex<Network>,
    streams: Mutex<HashMap<u32, UnixStream>>,
    arrived: Notify,
    processes: Mutex<HashMap<(String, String), Arc<Process>>>,
    connections: Mutex<JoinSet<()>>,
    oom: (mpsc::UnboundedSender<String>, tokio::sync::Mutex<mpsc::UnboundedReceiver<String>>),
    /// Held: it stops when dropped.
    server: Mutex<Option<Server>>,
}

#[derive(Default)]
struct Script {
    hang_create: bool,
    hang_check: bool,
    refuse: HashMap<&'static str, (Code, String)>,
}

/// What the agent was told of its network.
#[derive(Clone, Debug, Default)]
pub struct Network {
    /// Every interface, in the order of the calls.
    pub interfaces: Vec<Interface>,
    /// The routes of the last call.
    pub routes: Vec<Route>,
    /// Every neighbour.
    pub neighbours: Vec<ARPNeighbor>,
}

struct Process {
    args: Vec<String>,
    exit: watch::Sender<Option<i32>>,
    ends: Mutex<Option<(Input, Output)>>,
    /// The host's ends where the process has no ports: what the calls read from and write to.
    stdin: tokio::sync::Mutex<Option<DuplexStream>>,
    stdout: tokio::sync::Mutex<Option<DuplexStream>>,
}

impl FakeAgent {
    /// An agent that does as it is asked. Must be called inside a tokio runtime.
    pub async fn start() -> Self {
        let (tx, rx) = mpsc::unbounded_channel();
        let agent = Self(Arc::new(State {
            dir: tempfile::tempdir().unwrap(),
            script: Mutex::default(),
            calls: Mutex::default(),
            created: Mutex::default(),
            copied: Mutex::default(),
            removed: Mutex::default(),
            sandbox: Mutex::default(),
            network: Mutex::default(),
            streams: Mutex::default(),
            arrived: Notify::new(),
            processes: Mutex::default(),
            connections: Mutex::new(JoinSet::new()),
            oom: (tx, tokio::sync::Mutex::new(rx)),
            server: Mutex::default(),
        }));
        let mut server = Server::new()
            .bind(&format!("unix://{}", agent.socket().display()))
            .unwrap()
            .register_service(create_agent_service(Arc::new(Service(Arc::downgrade(&agent.0)))))
            .register_service(create_health(Arc::new(Service(Arc::downgrade(&agent.0)))))
            .register_service(create_files(Arc::new(Service(Arc::downgrade(&agent.0)))))
            .register_service(create_evidence(Arc::new(Service(Arc::downgrade(&agent.0)))));
        server.start().await.unwrap();
        *agent.0.server.lock().unwrap() = Some(server);
        agent
    }

    /// CreateContainer never answers.
    pub fn hang_create(&self) {
        self.0.script.lock().unwrap().hang_create = true;
    }

    /// Health is not answered any more, as by a guest that is stuck.
    pub fn hang_check(&self) {
        self.0.script.lock().unwrap().hang_check = true;
    }

    /// Every `call` (its name in the protocol) fails.
    pub fn refuse(&self, call: &'static str, code: Code, message: &str) {
        self.0.script.lock().unwrap().refuse.insert(call, (code, message.to_owned()));
    }

    /// Calls do again as they are asked.
    pub fn relent(&self) {
        *self.0.script.lock().unwrap() = Script::default();
    }

    /// A container runs out of memory.
    pub fn oom(&self, container: &str) {
        self.0.oom.0.send(container.to_owned()).unwrap();
    }

    /// The agent dies: every connection that it has is closed.
    pub fn die(&self) {
        self.0.connections.lock().unwrap().abort_all();
        self.0.streams.lock().unwrap().clear();
        self.0.processes.lock().unwrap().clear();
    }

    /// The calls so far, by name, in order of arrival.
    pub fn calls(&self) -> Vec<String> {
        self.0.calls.lock().unwrap().clone()
    }

    /// The containers asked for so far.
    pub fn created(&self) -> Vec<CreateContainerRequest> {
        self.0.created.lock().unwrap().clone()
    }

    /// The chunks of files copied so far.
    pub fn copied(&self) -> Vec<CopyFileRequest> {
        self.0.copied.lock().unwrap().clone()
    }

    /// The copies removed so far.
    pub fn removed(&self) -> Vec<String> {
        self.0.removed.lock().unwrap().clone()
    }

    /// The sandbox asked for.
    pub fn sandbox(&self) -> Option<CreateSandboxRequest> {
        self.0.sandbox.lock().unwrap().clone()
    }

    /// The network so far.
    pub fn network(&self) -> Network {
        self.0.network.lock().unwrap().clone()
    }

    /// A unix socket on which the services listen, for hosts that reach them without [`accept`](Self::accept).
    pub fn socket(&self) -> PathBuf {
        self.0.dir.path().join("agent.sock")
    }

    /// Takes a connection of the host to `port`, whose own port is `peer_port`. Other ports than those of the agent and
    /// its streams are closed.
    pub fn accept(&self, port: u32, peer_port: u32, mut stream: UnixStream) {
        match port {
            ports::AGENT => {
                let path = self.socket();
                self.0.connections.lock().unwrap().spawn(async move {
                    let mut server = UnixStream::connect(path).await.unwrap();
                    // Either end may go first.
                    let _ = tokio::io::copy_bidirectional(&mut stream, &mut server).await;
                });
            }
            ports::STREAM => {
                self.0.streams.lock().unwrap().insert(peer_port, stream);
                self.0.arrived.notify_waiters();
            }
            _ => {}
        }
    }

    /// Reports on `stream`, a connection to the host's ready port.
    pub async fn announce(mut stream: UnixStream) {
        let stage = |layer: &str, start_us, duration_us| BootStage {
            layer: layer.to_owned(),
            name: format!("{layer} boot"),
            start_us,
            duration_us,
        };
        let announcement = Announcement {
            agent_version: "0.0.0-fake".to_owned(),
            kernel: "0.0.0-none".to_owned(),
            timeline: vec![stage("kernel", 0, 300), stage("agent", 300, 100)],
        };
        let mut line = serde_json::to_vec(&announcement).unwrap();
        line.push(b'\n');
        stream.write_all(&line).await.unwrap();
    }

    /// Where a test may keep files as long as the agent lives.
    pub fn dir(&self) -> &Path {
        self.0.dir.path()
    }
}

impl State {
    fn enter(&self, call: &'static str) -> ttrpc::Result<()> {
        self.calls.lock().unwrap().push(call.to_owned());
        match self.script.lock().unwrap().refuse.get(call) {
            Some((code, message)) => Err(refusal(*code, message)),
            None => Ok(()),
        }
    }

    async fn stream(&self, port: u32) -> ttrpc::Result<UnixStream> {
        let find = async {
            loop {
                let mut arrived = std::pin::pin!(self.arrived.notified());
                arrived.as_mut().enable();
                if let Some(stream) = self.streams.lock().unwrap().remove(&port) {
                    return stream;
                }
                arrived.await;
            }
        };
        tokio::time::timeout(STREAM_BOUND, find)
            .await
            .map_err(|_| refusal(Code::INVALID_ARGUMENT, format!("no stream from port {port}")))
    }

    async fn insert(
        &self,
        id: (String, String),
        args: Vec<String>,
        stdin: u32,
        stdout: u32,
    ) -> ttrpc::Result<()> {
        let program = args.first().cloned().unwrap_or_default();
        if !["cat", "print", "flood", "exit", "sleep"].contains(&program.as_str()) {
            return Err(refusal(Code::NOT_FOUND, format!("command {program:?} not found in PATH (/bin)")));
        }
        if self.processes.lock().unwrap().contains_key(&id) {
            return Err(refusal(Code::ALREADY_EXISTS, format!("{id:?} exists already")));
        }
        let (mut host_stdin, mut host_stdout) = (None, None);
        let input: Input = match stdin {
            0 => {
                let (host, guest) = tokio::io::duplex(PIPE);
                host_stdin = Some(host);
                Box::new(guest)
            }
            port => Box::new(self.stream(port).await?),
        };
        let output: Output = match stdout {
            0 => {
                let (host, guest) = tokio::io::duplex(PIPE);
                host_stdout = Some(host);
                Box::new(guest)
            }
            port => Box::new(self.stream(port).await?),
        };
        let process = Process {
            args,
            exit: watch::Sender::new(None),
            ends: Mutex::new(Some((input, output))),
            stdin: tokio::sync::Mutex::new(host_stdin),
            stdout: tokio::sync::Mutex::new(host_stdout),
        };
        self.processes.lock().unwrap().insert(id, Arc::new(process));
        Ok(())
    }

    fn process(&self, container: &str, exec: &str) -> ttrpc::Result<Arc<Process>> {
        let found = self.processes.lock().unwrap().get(&(container.to_owned(), exec.to_owned())).cloned();
        found.ok_or_else(|| refusal(Code::NOT_FOUND, format!("no process {container}/{exec}")))
    }

    fn run(&self, container: &str, exec: &str) -> ttrpc::Result<()> {
        let process = self.process(container, exec)?;
        let ends = process.ends.lock().unwrap().take();
        let (input, output) =
            ends.ok_or_else(|| refusal(Code::FAILED_PRECONDITION, "it was started already".to_owned()))?;
        let runs = process.clone();
        self.connections.lock().unwrap().spawn(async move {
            let mut ended = runs.exit.subscribe();
            let code = tokio::select! {
                code = program(&runs.args, input, output) => code,
                _ = ended.wait_for(Option::is_some) => return,
            };
            runs.end(code);
        });
        Ok(())
    }
}

impl Process {
    fn end(&self, code: i32) {
        self.ends.lock().unwrap().take();
        self.exit.send_if_modified(|exit| exit.is_none() && exit.replace(code).is_none());
    }
}

async fn program(args: &[String], mut input: Input, mut output: Output) -> i32 {
    let number = || args.get(1).and_then(|text| text.parse::<i32>().ok()).unwrap_or_default();
    match args[0].as_str() {
        "exit" => number(),
        "print" => {
            // The host may be gone.
            let _ = output.write_all(args[1].as_bytes()).await;
            let _ = output.shutdown().await;
            0
        }
        "flood" => {
            let length = usize::try_from(number()).unwrap();
            let data: Vec<u8> = (0..=250).cycle().take(length).collect();
            let _ = output.write_all(&data).await;
            let _ = output.shutdown().await;
            0
        }
        "cat" => {
            let _ = tokio::io::copy(&mut input, &mut output).await;
            let _ = output.shutdown().await;
            0
        }
        _ => std::future::pending().await,
    }
}

/// The server's side. Weak: the server is part of what it serves.
struct Service(std::sync::Weak<State>);

impl Service {
    fn enter(&self, call: &'static str) -> ttrpc::Result<Arc<State>> {
        let state = self.0.upgrade().ok_or(Error::LocalClosed)?;
        state.enter(call)?;
        Ok(state)
    }
}

#[async_trait]
impl AgentService for Service {
    async fn create_sandbox(&self, _: &TtrpcContext, request: CreateSandboxRequest) -> ttrpc::Result<Empty> {
        *self.enter("CreateSandbox")?.sandbox.lock().unwrap() = Some(request);
        Ok(Empty::new())
    }

    async fn update_interface(
        &self,
        _: &TtrpcContext,
        request: UpdateInterfaceRequest,
    ) -> ttrpc::Result<Interface> {
        let interface = request.interface.unwrap();
        self.enter("UpdateInterface")?.network.lock().unwrap().interfaces.push(interface.clone());
        Ok(interface)
    }

    async fn update_routes(&self, _: &TtrpcContext, request: UpdateRoutesRequest) -> ttrpc::Result<Routes> {
        let routes = request.routes.unwrap();
        self.enter("UpdateRoutes")?.network.lock().unwrap().routes.clone_from(&routes.routes);
        Ok(routes)
    }

    async fn add_arp_neighbors(
        &self,
        _: &TtrpcContext,
        request: AddARPNeighborsRequest,
    ) -> ttrpc::Result<Empty> {
        let neighbours = request.neighbors.unwrap().arp_neighbors;
        self.enter("AddARPNeighbors")?.network.lock().unwrap().neighbours.extend(neighbours);
        Ok(Empty::new())
    }

    async fn destroy_sandbox(&self, _: &TtrpcContext, _: DestroySandboxRequest) -> ttrpc::Result<Empty> {
        self.enter("DestroySandbox")?;
        Ok(Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let state = self.enter("CreateContainer")?;
        let hang = state.script.lock().unwrap().hang_create;
        if hang {
            std::future::pending::<()>().await;
        }
        state.created.lock().unwrap().push(request.clone());
        let args = request.oci.process.args.clone();
        let id = (request.container_id, String::new());
        state.insert(id, args, request.stdin_port, request.stdout_port).await?;
        Ok(Empty::new())
    }

    async fn copy_file(&self, _: &TtrpcContext, request: CopyFileRequest) -> ttrpc::Result<Empty> {
        self.enter("CopyFile")?.copied.lock().unwrap().push(request);
        Ok(Empty::new())
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: StartContainerRequest,
    ) -> ttrpc::Result<Empty> {
        self.enter("StartContainer")?.run(&request.container_id, "")?;
        Ok(Empty::new())
    }

    async fn remove_container(
        &self,
        _: &TtrpcContext,
        request: RemoveContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let state = self.enter("RemoveContainer")?;
        state.process(&request.container_id, "")?;
        state.processes.lock().unwrap().retain(|(container, _), _| *container != request.container_id);
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let state = self.enter("ExecProcess")?;
        state.process(&request.container_id, "")?;
        let id = (request.container_id.clone(), request.exec_id.clone());
        state.insert(id, request.process.args.clone(), request.stdin_port, request.stdout_port).await?;
        state.run(&request.container_id, &request.exec_id)?;
        Ok(Empty::new())
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalProcessRequest) -> ttrpc::Result<Empty> {
        let state = self.enter("SignalProcess")?;
        let process = state.process(&request.container_id, &request.exec_id)?;
        process.end(128 + i32::try_from(request.signal).unwrap());
        Ok(Empty::new())
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        request: WaitProcessRequest,
    ) -> ttrpc::Result<WaitProcessResponse> {
        let state = self.enter("WaitProcess")?;
        let mut exit = state.process(&request.container_id, &request.exec_id)?.exit.subscribe();
        drop(state);
        let status = exit.wait_for(Option::is_some).await.map_err(|_| Error::LocalClosed)?.unwrap();
        Ok(WaitProcessResponse { status, ..Default::default() })
    }

    async fn pause_container(&self, _: &TtrpcContext, _: PauseContainerRequest) -> ttrpc::Result<Empty> {
        self.enter("PauseContainer").map(|_| Empty::new())
    }

    async fn resume_container(&self, _: &TtrpcContext, _: ResumeContainerRequest) -> ttrpc::Result<Empty> {
        self.enter("ResumeContainer").map(|_| Empty::new())
    }

    async fn stats_container(
        &self,
        _: &TtrpcContext,
        _: StatsContainerRequest,
    ) -> ttrpc::Result<StatsContainerResponse> {
        self.enter("StatsContainer").map(|_| StatsContainerResponse::new())
    }

    async fn update_container(&self, _: &TtrpcContext, _: UpdateContainerRequest) -> ttrpc::Result<Empty> {
        self.enter("UpdateContainer").map(|_| Empty::new())
    }

    async fn get_guest_details(
        &self,
        _: &TtrpcContext,
        _: GuestDetailsRequest,
    ) -> ttrpc::Result<GuestDetailsResponse> {
        self.enter("GetGuestDetails")?;
        Ok(GuestDetailsResponse { mem_block_size_bytes: 128 << 20, ..Default::default() })
    }

    async fn online_cpu_mem(&self, _: &TtrpcContext, _: OnlineCPUMemRequest) -> ttrpc::Result<Empty> {
        self.enter("OnlineCPUMem").map(|_| Empty::new())
    }

    async fn reseed_random_dev(
        &self,
        _: &TtrpcContext,
        request: ReseedRandomDevRequest,
    ) -> ttrpc::Result<Empty> {
        assert!(request.data.iter().any(|byte| *byte != 0), "no entropy");
        self.enter("ReseedRandomDev").map(|_| Empty::new())
    }

    async fn set_guest_date_time(
        &self,
        _: &TtrpcContext,
        request: SetGuestDateTimeRequest,
    ) -> ttrpc::Result<Empty> {
        assert!(request.sec > 1_700_000_000, "{} is no time of ours", request.sec);
        self.enter("SetGuestDateTime").map(|_| Empty::new())
    }

    async fn tty_win_resize(&self, _: &TtrpcContext, _: TtyWinResizeRequest) -> ttrpc::Result<Empty> {
        self.enter("TtyWinResize").map(|_| Empty::new())
    }

    async fn write_stdin(
        &self,
        _: &TtrpcContext,
        request: WriteStreamRequest,
    ) -> ttrpc::Result<WriteStreamResponse> {
        let state = self.enter("WriteStdin")?;
        let process = state.process(&request.container_id, &request.exec_id)?;
        let mut stdin = process.stdin.lock().await;
        let closed = || refusal(Code::FAILED_PRECONDITION, "stdin is closed");
        let taken = stdin.as_mut().ok_or_else(closed)?.write(&request.data).await;
        let len = u32::try_from(taken.map_err(|_| closed())?).unwrap();
        Ok(WriteStreamResponse { len, ..Default::default() })
    }

    async fn read_stdout(
        &self,
        _: &TtrpcContext,
        request: ReadStreamRequest,
    ) -> ttrpc::Result<ReadStreamResponse> {
        let state = self.enter("ReadStdout")?;
        let process = state.process(&request.container_id, &request.exec_id)?;
        drop(state);
        let mut stdout = process.stdout.lock().await;
        let eof = || refusal(Code::INVALID_ARGUMENT, "eof");
        let mut data = vec![0; usize::try_from(request.len).unwrap().min(PIPE)];
        let count = stdout.as_mut().ok_or_else(eof)?.read(&mut data).await.map_err(|_| eof())?;
        data.truncate(count);
        if data.is_empty() { Err(eof()) } else { Ok(ReadStreamResponse { data, ..Default::default() }) }
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: CloseStdinRequest) -> ttrpc::Result<Empty> {
        let state = self.enter("CloseStdin")?;
        let process = state.process(&request.container_id, &request.exec_id)?;
        process.stdin.lock().await.take();
        Ok(Empty::new())
    }

    async fn get_oom_event(&self, _: &TtrpcContext, _: GetOOMEventRequest) -> ttrpc::Result<OOMEvent> {
        let state = self.enter("GetOOMEvent")?;
        let container_id = state.oom.1.lock().await.recv().await.ok_or(Error::LocalClosed)?;
        Ok(OOMEvent { container_id, ..Default::default() })
    }
}

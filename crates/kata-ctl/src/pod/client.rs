//! A pod's socket: containerd's Task service (v3) and the Control service, over one connection.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::api::{
    CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, Mount,
    ResizePtyRequest, StartRequest, StateRequest, StatsRequest, WaitRequest,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim_async::TaskClient;
use containerd_shim_protos::ttrpc;
use kata_api::control::{
    self, DestroyRequest, EventsRequest, EventsResponse, EvidenceRequest, EvidenceResponse, InspectRequest,
    Pod, ProcessesRequest,
};
use kata_api::control_ttrpc::ControlClient;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{Context, with_duration};
use ttrpc::{Code, Status};

use super::{PodDir, Streams};
use crate::failure::{self, Failure};

/// containerd's name for the kind of message that an exec's process is.
const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// Bound on answers that need nothing but the owner.
const QUICK: Duration = Duration::from_secs(5);
/// Bound on answers that the guest has to give.
const GUEST: Duration = Duration::from_secs(30);
/// How much longer than asked an owner may take to answer that nothing has happened.
const SLACK: Duration = Duration::from_secs(10);
/// Bound on the end of a pod.
const DESTROY: Duration = Duration::from_secs(60);

/// Why a pod did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// It said no. The text is the pod's own.
    #[error("{message}")]
    Refused {
        /// Kind of the error.
        code: Code,
        /// The whole chain of causes.
        message: String,
    },
    /// It did not answer.
    #[error(
        "the pod's owner does not answer any more ({0}): it ended, or hangs; `kata-ctl list -a` tells the pod's state, \
         `kata-ctl logs --source owner` what the owner said"
    )]
    Lost(String),
    /// It answered with something that is no answer.
    #[error("the pod's answer cannot be read")]
    Garbled(#[source] containerd_shim_protos::protobuf::Error),
    /// Nobody listens.
    #[error("cannot reach the pod at {}; see `kata-ctl list -a`", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl CallError {
    fn from_ttrpc(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => Self::from_status(&status),
            ttrpc::Error::Socket(text) | ttrpc::Error::Others(text) => Self::Lost(text),
            other => Self::Lost(other.to_string()),
        }
    }

    fn from_status(status: &Status) -> Self {
        Self::Refused { code: status.code(), message: status.message().to_owned() }
    }

    /// As the failure of a command to start: its exit code tells a missing command from one that is not executable.
    pub fn into_start_failure(self) -> Failure {
        match &self {
            Self::Refused { code: Code::NOT_FOUND, .. } => Failure::with_code(failure::NOT_FOUND, self),
            Self::Refused { code: Code::PERMISSION_DENIED, .. } => {
                Failure::with_code(failure::NOT_EXECUTABLE, self)
            }
            _ => self.into(),
        }
    }
}

/// A container to create.
#[derive(Clone, Debug)]
pub struct CreateContainer {
    /// The OCI bundle.
    pub bundle: PathBuf,
    /// What to mount as its root: type, source and options.
    pub rootfs: (&'static str, String, Vec<String>),
    /// A pseudo terminal.
    pub terminal: bool,
}

/// A connection to a pod. The pod's owner waits for all of them to be dropped before it leaves.
#[derive(Clone)]
pub struct Client {
    /// The pod, and its container.
    name: String,
    owner: Option<i32>,
    task: TaskClient,
    control: ControlClient,
}

impl Client {
    /// Connects to the owner of `pod`.
    ///
    /// # Errors
    /// [`CallError::Connect`].
    pub async fn connect(pod: &PodDir) -> Result<Self, CallError> {
        let path = pod.socket();
        let stream = tokio::net::UnixStream::connect(&path)
            .await
            .map_err(|source| CallError::Connect { path, source })?;
        // Of a listening socket, the kernel remembers the process that made it listen.
        let owner = stream.peer_cred().ok().and_then(|credentials| credentials.pid());
        let client = ttrpc::asynchronous::Client::new(Socket::new(stream));
        Ok(Self {
            name: pod.name.clone(),
            owner,
            task: TaskClient::new(client.clone()),
            control: ControlClient::new(client),
        })
    }

    /// The process at the other end.
    pub fn owner(&self) -> Option<i32> {
        self.owner
    }

    /// Makes the pod's container.
    ///
    /// # Errors
    /// What the pod says; a missing command is told here already.
    pub async fn create(&self, container: CreateContainer, streams: &StreamPaths) -> Result<(), CallError> {
        let (fs_type, source, options) = container.rootfs;
        let request = CreateTaskRequest {
            id: self.name.clone(),
            bundle: text(&container.bundle),
            rootfs: vec![Mount { type_: fs_type.to_owned(), source, options, ..Mount::default() }],
            terminal: container.terminal,
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            ..CreateTaskRequest::default()
        };
        // The VM may still be booting: the owner's own bounds apply.
        self.task.create(Context::default(), &request).await.map_err(CallError::from_ttrpc).map(drop)
    }

    /// Registers a further process in a container, to be started.
    ///
    /// # Errors
    /// What the pod says.
    pub async fn exec(
        &self,
        container: &str,
        exec_id: &str,
        process: &oci_spec::runtime::Process,
        streams: &StreamPaths,
    ) -> Result<Process, CallError> {
        let value = serde_json::to_vec(process).map_err(|error| CallError::Lost(error.to_string()))?;
        let spec = Any { type_url: PROCESS_TYPE.to_owned(), value, ..Any::default() };
        let request = ExecProcessRequest {
            id: container.to_owned(),
            exec_id: exec_id.to_owned(),
            terminal: process.terminal().unwrap_or(false),
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            spec: MessageField::some(spec),
            ..ExecProcessRequest::default()
        };
        self.task.exec(Context::default(), &request).await.map_err(CallError::from_ttrpc)?;
        Ok(Process { client: self.clone(), container: container.to_owned(), exec_id: exec_id.to_owned() })
    }

    /// The own process of the pod's container.
    pub fn init(&self) -> Process {
        self.init_of(&self.name)
    }

    /// The own process of a container.
    pub fn init_of(&self, container: &str) -> Process {
        Process { client: self.clone(), container: container.to_owned(), exec_id: String::new() }
    }

    /// The OCI bundle of a container.
    ///
    /// # Errors
    /// What the pod says.
    pub async fn bundle(&self, container: &str) -> Result<PathBuf, CallError> {
        let request = StateRequest { id: container.to_owned(), ..StateRequest::default() };
        let state = self.task.state(with_duration(QUICK), &request).await;
        state.map(|state| state.bundle.into()).map_err(CallError::from_ttrpc)
    }

    /// What a container uses, as the guest's cgroups count it.
    ///
    /// # Errors
    /// What the pod says.
    pub async fn stats(&self, container: &str) -> Result<Metrics, CallError> {
        let request = StatsRequest { id: container.to_owned(), ..StatsRequest::default() };
        let answer = self.task.stats(with_duration(GUEST), &request).await.map_err(CallError::from_ttrpc)?;
        Metrics::parse_from_bytes(&answer.stats.value).map_err(CallError::Garbled)
    }

    /// The processes of a container, or of the whole guest.
    ///
    /// # Errors
    /// What the pod says; an agent other than ours may not tell.
    pub async fn processes(&self, container: Option<&str>) -> Result<Vec<control::Process>, CallError> {
        let container = container.unwrap_or_default().to_owned();
        let request = ProcessesRequest { container, ..ProcessesRequest::default() };
        let answer = self.control.processes(with_duration(GUEST), &request).await;
        answer.map(|answer| answer.processes).map_err(CallError::from_ttrpc)
    }

    /// What has happened from the event numbered `from` on; waits so long for one where there is none.
    ///
    /// # Errors
    /// The owner does not answer.
    pub async fn events(&self, from: u64, wait: Duration) -> Result<EventsResponse, CallError> {
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        let request = EventsRequest { from, wait_ms, ..EventsRequest::default() };
        self.control.events(with_duration(wait + SLACK), &request).await.map_err(CallError::from_ttrpc)
    }

    /// What the machine's hardware says of it, with this in what it signs.
    ///
    /// # Errors
    /// What the pod says: there may be no such hardware.
    pub async fn evidence(&self, report_data: Vec<u8>) -> Result<EvidenceResponse, CallError> {
        let request = EvidenceRequest { report_data, ..EvidenceRequest::default() };
        self.control.evidence(with_duration(GUEST), &request).await.map_err(CallError::from_ttrpc)
    }

    /// Everything that the owner knows about the pod.
    ///
    /// # Errors
    /// The owner does not answer in time.
    pub async fn inspect(&self) -> Result<Pod, CallError> {
        self.control
            .inspect(with_duration(QUICK), &InspectRequest::new())
            .await
            .map_err(CallError::from_ttrpc)
    }

    /// Ends the pod, and comes back when nothing of it is left.
    ///
    /// # Errors
    /// What is left, and why.
    pub async fn destroy(&self) -> Result<(), CallError> {
        let destroyed = self.control.destroy(with_duration(DESTROY), &DestroyRequest::new()).await;
        destroyed.map_err(CallError::from_ttrpc).map(drop)
    }
}

/// The client's ends of a process's streams, as the Task service wants them: empty is no stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StreamPaths {
    /// Input.
    pub stdin: String,
    /// Output.
    pub stdout: String,
    /// Error output.
    pub stderr: String,
}

impl StreamPaths {
    /// Those of FIFOs that this process has made.
    pub fn of(streams: &Streams) -> Self {
        let path = |path: Option<&Path>| path.map(text).unwrap_or_default();
        Self { stdin: path(streams.stdin()), stdout: path(streams.stdout()), stderr: path(streams.stderr()) }
    }

    /// Files that output is appended to.
    pub fn logs(pod: &PodDir) -> Self {
        Self { stdin: String::new(), stdout: text(&pod.stdout_log()), stderr: text(&pod.stderr_log()) }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// A process in a pod: its container's own, or an exec.
#[derive(Clone)]
pub struct Process {
    client: Client,
    container: String,
    /// Empty for the container's own.
    exec_id: String,
}

impl Process {
    fn id(&self) -> (String, String) {
        (self.container.clone(), self.exec_id.clone())
    }

    /// Starts it.
    ///
    /// # Errors
    /// What the pod says.
    pub async fn start(&self) -> Result<(), CallError> {
        let (id, exec_id) = self.id();
        let request = StartRequest { id, exec_id, ..StartRequest::default() };
        self.client.task.start(Context::default(), &request).await.map_err(CallError::from_ttrpc).map(drop)
    }

    /// Waits for its end; its exit code.
    ///
    /// # Errors
    /// The owner is gone.
    pub async fn wait(&self) -> Result<u32, CallError> {
        let (id, exec_id) = self.id();
        let request = WaitRequest { id, exec_id, ..WaitRequest::default() };
        let ended = self.client.task.wait(Context::default(), &request).await;
        ended.map(|end| end.exit_status).map_err(CallError::from_ttrpc)
    }

    /// Sends a signal; with `all`, to every process of the container.
    ///
    /// # Errors
    /// What the pod says, e.g. that the process has ended.
    pub async fn kill(&self, signal: u32, all: bool) -> Result<(), CallError> {
        let (id, exec_id) = self.id();
        let request = KillRequest { id, exec_id, signal, all, ..KillRequest::default() };
        self.client.task.kill(with_duration(DESTROY), &request).await.map_err(CallError::from_ttrpc).map(drop)
    }

    /// Tells the size of the terminal.
    ///
    /// # Errors
    /// What the pod says.
    pub async fn resize(&self, columns: u16, rows: u16) -> Result<(), CallError> {
        let (id, exec_id) = self.id();
        let (width, height) = (columns.into(), rows.into());
        let request = ResizePtyRequest { id, exec_id, width, height, ..ResizePtyRequest::default() };
        self.client
            .task
            .resize_pty(with_duration(QUICK), &request)
            .await
            .map_err(CallError::from_ttrpc)
            .map(drop)
    }

    /// Ends its input, after what is in the FIFO.
    ///
    /// # Errors
    /// What the pod says.
    pub async fn close_stdin(&self) -> Result<(), CallError> {
        let (id, exec_id) = self.id();
        let request = CloseIORequest { id, exec_id, stdin: true, ..CloseIORequest::default() };
        self.client
            .task
            .close_io(with_duration(QUICK), &request)
            .await
            .map_err(CallError::from_ttrpc)
            .map(drop)
    }

    /// Forgets it, once it has ended.
    ///
    /// # Errors
    /// What the pod says.
    pub async fn delete(&self) -> Result<(), CallError> {
        let (id, exec_id) = self.id();
        let request = DeleteRequest { id, exec_id, ..DeleteRequest::default() };
        self.client.task.delete(with_duration(QUICK), &request).await.map_err(CallError::from_ttrpc).map(drop)
    }
}

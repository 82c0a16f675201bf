//! The agent's calls, typed, with its refusals kept as it worded them.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant, SystemTime};

use kata_api::agent::{
    ARPNeighbors, AddARPNeighborsRequest, CloseStdinRequest, CopyFileRequest, CreateContainerRequest,
    CreateSandboxRequest, DestroySandboxRequest, Empty, ExecProcessRequest, GetDiagnosticDataRequest,
    GetIPTablesRequest, GetMetricsRequest, GetOOMEventRequest, GuestDetailsRequest, OnlineCPUMemRequest,
    PauseContainerRequest, ReadStreamRequest, ReadStreamResponse, RemoveContainerRequest,
    ReseedRandomDevRequest, ResizeVolumeRequest, ResumeContainerRequest, Routes, SetGuestDateTimeRequest,
    SetIPTablesRequest, SetPolicyRequest, SignalProcessRequest, StartContainerRequest, StatsContainerRequest,
    StatsContainerResponse, TtyWinResizeRequest, UpdateContainerRequest, UpdateInterfaceRequest,
    UpdateRoutesRequest, VolumeStatsRequest, WaitProcessRequest, WriteStreamRequest,
};
use kata_api::agent_ttrpc::AgentServiceClient;
use kata_api::csi::VolumeStatsResponse;
use kata_api::evidence::{GetEvidenceRequest, GetEvidenceResponse};
use kata_api::evidence_ttrpc::EvidenceClient;
use kata_api::files::RemoveRequest;
use kata_api::files_ttrpc::FilesClient;
use kata_api::health::CheckRequest;
use kata_api::health_ttrpc::HealthClient;
use kata_api::metrics::Durations;
use kata_api::oci::LinuxResources;
use kata_api::types::{ARPNeighbor, Interface, Route};
use kata_api::{GuestProcess, PROCESSES};
use kata_hypervisor::process::printable;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context as Bound};
use ttrpc::{Code, Error as RpcError};

use crate::error::ErrorKind;
use crate::pod::ProcessId;

/// Bound on calls that only touch the agent's own state or a cgroup. An agent that is slower than this hangs.
const PROMPT: Duration = Duration::from_secs(20);
/// Bound on a removal: the agent first kills what still runs and unmounts.
const REMOVAL: Duration = Duration::from_secs(30);

/// Most bytes of the guest's that become part of a message.
const TEXT_MAX: usize = 16 * 1024;

/// How long the agent took to answer, by call: of those that are bounded, for the others last as long as what they wait for.
pub static AGENT_CALLS: Durations = Durations::new();

/// Why a call to the agent failed.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent answered with an error; the text is the agent's own.
    #[error("{message}")]
    Refused {
        /// Its class.
        code: Code,
        /// Its text.
        message: String,
    },
    /// The connection to the agent is gone.
    #[error(
        "the guest's agent was lost during {call} ({reason}): the agent or its machine ended; the pod's error and the guest's \
         console in the owner's log tell why"
    )]
    Lost {
        /// The call.
        call: &'static str,
        /// What the transport says.
        reason: String,
    },
    /// The agent did not answer.
    #[error(
        "the guest's agent did not answer {call} within {bound:?}: the guest hangs, or has too little CPU or memory for its \
         work; see the guest's console (hypervisor.*.enable_debug shows more), then try again or make the pod anew"
    )]
    NoAnswer {
        /// The call.
        call: &'static str,
        /// The bound.
        bound: Duration,
    },
}

impl AgentError {
    fn new(call: &'static str, error: RpcError) -> Self {
        match error {
            RpcError::RpcStatus(status) => {
                let said = guest_text(&status.message);
                // For what they do not serve at all, servers say nothing but the method's name: `/service/method …` or
                // `method method`; or, of another library, that there is no such service.
                let absent = match status.code() {
                    Code::UNIMPLEMENTED => {
                        status.message.starts_with('/') || status.message.ends_with(" method")
                    }
                    Code::INVALID_ARGUMENT => status.message.ends_with(" service does not exist"),
                    _ => false,
                };
                if absent {
                    let message = format!("this guest's agent does not support {call} ({said})");
                    return Self::Refused { code: Code::UNIMPLEMENTED, message };
                }
                Self::Refused { code: status.code(), message: said }
            }
            other => Self::Lost { call, reason: other.to_string() },
        }
    }

    /// The class that a client sees.
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            Self::Refused { code, .. } => match *code {
                Code::NOT_FOUND => ErrorKind::NotFound,
                Code::PERMISSION_DENIED => ErrorKind::PermissionDenied,
                Code::ALREADY_EXISTS => ErrorKind::AlreadyExists,
                Code::INVALID_ARGUMENT => ErrorKind::InvalidArgument,
                Code::FAILED_PRECONDITION => ErrorKind::FailedPrecondition,
                Code::UNIMPLEMENTED => ErrorKind::Unimplemented,
                _ => ErrorKind::Internal,
            },
            Self::Lost { .. } => ErrorKind::Unavailable,
            Self::NoAnswer { .. } => ErrorKind::Internal,
        }
    }

    /// Whether the agent answered that there is no such thing.
    pub(crate) fn is_not_found(&self) -> bool {
        self.kind() == ErrorKind::NotFound
    }
}

/// One of a process's two output streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Stdout,
    Stderr,
}

/// A connection to the agent. Clones share it, and calls run side by side.
#[derive(Clone)]
pub(crate) struct Agent {
    service: AgentServiceClient,
    health: HealthClient,
    files: FilesClient,
    evidence: EvidenceClient,
    lost: watch::Receiver<bool>,
    ours: bool,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("lost", &*self.lost.borrow()).finish_non_exhaustive()
    }
}

impl Agent {
    /// Speaks to the agent at the other end of `stream`.
    pub(crate) fn new(stream: UnixStream) -> Self {
        let (tx, lost) = watch::channel(false);
        let client = ttrpc::asynchronous::Client::new(Socket::new(Wire { stream, lost: tx }));
        Self {
            service: AgentServiceClient::new(client.clone()),
            health: HealthClient::new(client.clone()),
            files: FilesClient::new(client.clone()),
            evidence: EvidenceClient::new(client),
            lost,
            ours: false,
        }
    }

    /// The same, of an agent that announced itself: only this project's do.
    pub(crate) fn announced(self) -> Self {
        Self { ours: true, ..self }
    }

    /// Whether it is known to be this project's, which understands the protocol's extensions.
    pub(crate) fn is_ours(&self) -> bool {
        self.ours
    }

    /// Resolves when the agent has closed the connection.
    pub(crate) async fn lost(&self) {
        let mut lost = self.lost.clone();
        // An error means that the connection itself was dropped: lost as well.
        let _ = lost.wait_for(|lost| *lost).await;
    }

    /// Whether the agent answers within `bound`, whatever it says.
    pub(crate) async fn answers(&self, bound: Duration) -> bool {
        let answer = bounded("Check", bound, self.health.check(within(bound), &CheckRequest::new())).await;
        !matches!(answer, Err(AgentError::NoAnswer { .. }))
    }

    /// The agent's version, as its health service tells it.
    pub(crate) async fn version(&self) -> Result<String, AgentError> {
        let request = CheckRequest::new();
        let answer = bounded("Version", PROMPT, self.health.version(within(PROMPT), &request)).await;
        answer.map(|version| guest_text(&version.agent_version))
    }

    pub(crate) async fn create_sandbox(
        &self,
        request: &CreateSandboxRequest,
        bound: Duration,
    ) -> Result<(), AgentError> {
        done("CreateSandbox", bound, self.service.create_sandbox(within(bound), request)).await
    }

    /// Sets the guest's clock.
    pub(crate) async fn set_time(&self, now: SystemTime) -> Result<(), AgentError> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let request = SetGuestDateTimeRequest {
            sec: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            usec: i64::from(now.subsec_micros()),
            ..Default::default()
        };
        done("SetGuestDateTime", PROMPT, self.service.set_guest_date_time(within(PROMPT), &request)).await
    }

    /// Mixes `entropy` into the guest's random numbers.
    pub(crate) async fn reseed(&self, entropy: &[u8]) -> Result<(), AgentError> {
        let request = ReseedRandomDevRequest { data: entropy.to_vec(), ..Default::default() };
        done("ReseedRandomDev", PROMPT, self.service.reseed_random_dev(within(PROMPT), &request)).await
    }

    /// Has the guest set up the interface with this hardware address, which may be about to appear.
    pub(crate) async fn update_interface(&self, interface: &Interface) -> Result<(), AgentError> {
        let mut request = UpdateInterfaceRequest::new();
        request.interface = Some(interface.clone()).into();
        let answer = self.service.update_interface(within(PROMPT), &request);
        bounded("UpdateInterface", PROMPT, answer).await.map(drop)
    }

    /// Replaces the guest's routes.
    pub(crate) async fn update_routes(&self, routes: Vec<Route>) -> Result<(), AgentError> {
        let mut request = UpdateRoutesRequest::new();
        request.routes = Some(Routes { routes, ..Default::default() }).into();
        bounded("UpdateRoutes", PROMPT, self.service.update_routes(within(PROMPT), &request)).await.map(drop)
    }

    /// Adds neighbours that the guest need not ask for.
    pub(crate) async fn add_neighbours(&self, neighbours: Vec<ARPNeighbor>) -> Result<(), AgentError> {
        let mut request = AddARPNeighborsRequest::new();
        request.neighbors = Some(ARPNeighbors { arp_neighbors: neighbours, ..Default::default() }).into();
        done("AddARPNeighbors", PROMPT, self.service.add_arp_neighbors(within(PROMPT), &request)).await
    }

    /// Ends what is in the sandbox, and writes back what is dirty.
    pub(crate) async fn destroy_sandbox(&self, bound: Duration) -> Result<(), AgentError> {
        let request = DestroySandboxRequest::new();
        done("DestroySandbox", bound, self.service.destroy_sandbox(within(bound), &request)).await
    }

    pub(crate) async fn create_container(
        &self,
        request: &CreateContainerRequest,
        bound: Duration,
    ) -> Result<(), AgentError> {
        done("CreateContainer", bound, self.service.create_container(within(bound), request)).await
    }

    pub(crate) async fn copy_file(&self, request: &CopyFileRequest) -> Result<(), AgentError> {
        done("CopyFile", PROMPT, self.service.copy_file(within(PROMPT), request)).await
    }

    /// Removes what was copied to `path`. Agents other than ours have no such call.
    pub(crate) async fn remove_file(&self, path: &str) -> Result<(), AgentError> {
        let request = RemoveRequest { path: path.to_owned(), ..Default::default() };
        bounded("Remove", PROMPT, self.files.remove(within(PROMPT), &request)).await.map(drop)
    }

    pub(crate) async fn start_container(&self, container: &str, bound: Duration) -> Result<(), AgentError> {
        let request = StartContainerRequest { container_id: container.to_owned(), ..Default::default() };
        done("StartContainer", bound, self.service.start_container(within(bound), &request)).await
    }

    pub(crate) async fn remove_container(&self, container: &str) -> Result<(), AgentError> {
        let request = RemoveContainerRequest { container_id: container.to_owned(), ..Default::default() };
        done("RemoveContainer", REMOVAL, self.service.remove_container(within(REMOVAL), &request)).await
    }

    pub(crate) async fn exec_process(
        &self,
        request: &ExecProcessRequest,
        bound: Duration,
    ) -> Result<(), AgentError> {
        done("ExecProcess", bound, self.service.exec_process(within(bound), request)).await
    }

    pub(crate) async fn signal(&self, process: &ProcessId, signal: u32) -> Result<(), AgentError> {
        let (container_id, exec_id) = wire(process);
        let request = SignalProcessRequest { container_id, exec_id, signal, ..Default::default() };
        done("SignalProcess", PROMPT, self.service.signal_process(within(PROMPT), &request)).await
    }

    /// Waits as long as it takes for a process to end. The answer is its exit code.
    pub(crate) async fn wait(&self, process: &ProcessId) -> Result<i32, AgentError> {
        let (container_id, exec_id) = wire(process);
        let request = WaitProcessRequest { container_id, exec_id, ..Default::default() };
        let answer = self.service.wait_process(Bound::default(), &request).await;
        answer.map(|response| response.status).map_err(|error| AgentError::new("WaitProcess", error))
    }

    pub(crate) async fn pause(&self, container: &str) -> Result<(), AgentError> {
        let request = PauseContainerRequest { container_id: container.to_owned(), ..Default::default() };
        done("PauseContainer", PROMPT, self.service.pause_container(within(PROMPT), &request)).await
    }

    pub(crate) async fn resume(&self, container: &str) -> Result<(), AgentError> {
        let request = ResumeContainerRequest { container_id: container.to_owned(), ..Default::default() };
        done("ResumeContainer", PROMPT, self.service.resume_container(within(PROMPT), &request)).await
    }

    pub(crate) async fn stats(&self, container: &str) -> Result<StatsContainerResponse, AgentError> {
        let request = StatsContainerRequest { container_id: container.to_owned(), ..Default::default() };
        bounded("StatsContainer", PROMPT, self.service.stats_container(within(PROMPT), &request)).await
    }

    /// The processes of a container, or of the whole guest.
    pub(crate) async fn processes(&self, container: Option<&str>) -> Result<Vec<GuestProcess>, AgentError> {
        let request = GetDiagnosticDataRequest {
            log_type: PROCESSES.to_owned(),
            container_id: container.unwrap_or_default().to_owned(),
            ..Default::default()
        };
        let answer = self.service.get_diagnostic_data(within(PROMPT), &request);
        let answer = bounded("GetDiagnosticData", PROMPT, answer).await?;
        let found: Vec<GuestProcess> =
            serde_json::from_str(&answer.data).map_err(|error| AgentError::Refused {
                code: Code::INTERNAL,
                message: format!("its list of processes cannot be read: {error}"),
            })?;
        Ok(found.into_iter().map(clean).collect())
    }

    pub(crate) async fn update(&self, container: &str, resources: LinuxResources) -> Result<(), AgentError> {
        let mut request = UpdateContainerRequest { container_id: container.to_owned(), ..Default::default() };
        request.resources = Some(resources).into();
        done("UpdateContainer", PROMPT, self.service.update_container(within(PROMPT), &request)).await
    }

    /// Size of the blocks that memory can be added to the guest in, in bytes; 0 where its kernel does not tell.
    pub(crate) async fn memory_block(&self) -> Result<u64, AgentError> {
        let request = GuestDetailsRequest { mem_block_size: true, ..Default::default() };
        let answer = self.service.get_guest_details(within(PROMPT), &request);
        bounded("GetGuestDetails", PROMPT, answer).await.map(|details| details.mem_block_size_bytes)
    }

    /// Has the guest bring to use what was added to its machine: so many CPUs and, unless `cpu_only`, all memory.
    pub(crate) async fn online(&self, cpus: u32, cpu_only: bool) -> Result<(), AgentError> {
        let request = OnlineCPUMemRequest { wait: true, nb_cpus: cpus, cpu_only, ..Default::default() };
        done("OnlineCPUMem", PROMPT, self.service.online_cpu_mem(within(PROMPT), &request)).await
    }

    pub(crate) async fn resize(
        &self,
        process: &ProcessId,
        rows: u32,
        columns: u32,
    ) -> Result<(), AgentError> {
        let (container_id, exec_id) = wire(process);
        let request =
            TtyWinResizeRequest { container_id, exec_id, row: rows, column: columns, ..Default::default() };
        done("TtyWinResize", PROMPT, self.service.tty_win_resize(within(PROMPT), &request)).await
    }

    /// Waits as long as it takes for some of `data` to be taken. The answer is how much was.
    pub(crate) async fn write_stdin(&self, process: &ProcessId, data: &[u8]) -> Result<usize, AgentError> {
        let (container_id, exec_id) = wire(process);
        let request = WriteStreamRequest { container_id, exec_id, data: data.to_vec(), ..Default::default() };
        let answer = self.service.write_stdin(Bound::default(), &request).await;
        let taken = answer.map_err(|error| AgentError::new("WriteStdin", error))?.len;
        Ok(usize::try_from(taken).unwrap_or(usize::MAX).min(data.len()))
    }

    pub(crate) async fn close_stdin(&self, process: &ProcessId) -> Result<(), AgentError> {
        let (container_id, exec_id) = wire(process);
        let request = CloseStdinRequest { container_id, exec_id, ..Default::default() };
        done("CloseStdin", PROMPT, self.service.close_stdin(within(PROMPT), &request)).await
    }

    /// Waits as long as it takes for output, at most `len` bytes.
    pub(crate) async fn read(
        &self,
        process: &ProcessId,
        from: Output,
        len: u32,
    ) -> Result<Vec<u8>, AgentError> {
        let (container_id, exec_id) = wire(process);
        let request = ReadStreamRequest { container_id, exec_id, len, ..Default::default() };
        let (call, answer): (_, Result<ReadStreamResponse, _>) = match from {
            Output::Stdout => ("ReadStdout", self.service.read_stdout(Bound::default(), &request).await),
            Output::Stderr => ("ReadStderr", self.service.read_stderr(Bound::default(), &request).await),
        };
        answer.map(|response| response.data).map_err(|error| AgentError::new(call, error))
    }

    /// The guest's figures in Prometheus' text format, as the guest wrote them.
    pub(crate) async fn metrics(&self, bound: Duration) -> Result<String, AgentError> {
        let request = GetMetricsRequest::new();
        let answer = bounded("GetMetrics", bound, self.service.get_metrics(within(bound), &request)).await;
        answer.map(|metrics| metrics.metrics)
    }

    /// The guest's packet filter, as `iptables-save` writes it.
    pub(crate) async fn iptables(&self, ipv6: bool) -> Result<Vec<u8>, AgentError> {
        let request = GetIPTablesRequest { is_ipv6: ipv6, ..Default::default() };
        let answer = self.service.get_ip_tables(within(PROMPT), &request);
        bounded("GetIPTables", PROMPT, answer).await.map(|tables| tables.data)
    }

    /// Replaces the guest's packet filter. The answer is what the guest says.
    pub(crate) async fn set_iptables(&self, ipv6: bool, data: Vec<u8>) -> Result<Vec<u8>, AgentError> {
        let request = SetIPTablesRequest { is_ipv6: ipv6, data, ..Default::default() };
        let answer = self.service.set_ip_tables(within(PROMPT), &request);
        bounded("SetIPTables", PROMPT, answer).await.map(|tables| tables.data)
    }

    /// Space and files of the volume at this path of the guest.
    pub(crate) async fn volume_stats(&self, path: &str) -> Result<VolumeStatsResponse, AgentError> {
        let request = VolumeStatsRequest { volume_guest_path: path.to_owned(), ..Default::default() };
        bounded("GetVolumeStats", PROMPT, self.service.get_volume_stats(within(PROMPT), &request)).await
    }

    /// Has the guest take note of a volume's new size.
    pub(crate) async fn resize_volume(&self, path: &str, bytes: u64) -> Result<(), AgentError> {
        let request =
            ResizeVolumeRequest { volume_guest_path: path.to_owned(), size: bytes, ..Default::default() };
        done("ResizeVolume", PROMPT, self.service.resize_volume(within(PROMPT), &request)).await
    }

    /// Has the machine's hardware report, with this in the report. Agents other than ours have no such call.
    pub(crate) async fn evidence(&self, report_data: Vec<u8>) -> Result<GetEvidenceResponse, AgentError> {
        let request = GetEvidenceRequest { report_data, ..Default::default() };
        let answer = self.evidence.get_evidence(within(PROMPT), &request);
        let found = bounded("GetEvidence", PROMPT, answer).await?;
        Ok(GetEvidenceResponse { provider: guest_text(&found.provider), ..found })
    }

    /// Gives the agent the policy that it checks requests by.
    pub(crate) async fn set_policy(&self, policy: String) -> Result<(), AgentError> {
        let request = SetPolicyRequest { policy, ..Default::default() };
        done("SetPolicy", PROMPT, self.service.set_policy(within(PROMPT), &request)).await
    }

    /// Waits as long as it takes for a container to run out of memory. The answer is its id.
    pub(crate) async fn oom_event(&self) -> Result<String, AgentError> {
        let answer = self.service.get_oom_event(Bound::default(), &GetOOMEventRequest::new()).await;
        answer.map(|event| event.container_id).map_err(|error| AgentError::new("GetOOMEvent", error))
    }
}

/// What the agent is told of a bound. A little more than what is waited for here, so that its own giving up is not taken for
/// an answer.
fn within(bound: Duration) -> Bound {
    context::with_duration(bound.saturating_add(Duration::from_secs(1)))
}

async fn bounded<T>(
    call: &'static str,
    bound: Duration,
    answer: impl Future<Output = Result<T, RpcError>>,
) -> Result<T, AgentError> {
    let start = Instant::now();
    let answer = tokio::time::timeout(bound, answer).await;
    AGENT_CALLS.record(call, start.elapsed());
    match answer {
        Ok(answer) => answer.map_err(|error| AgentError::new(call, error)),
        Err(_) => Err(AgentError::NoAnswer { call, bound }),
    }
}

async fn done(
    call: &'static str,
    bound: Duration,
    answer: impl Future<Output = Result<Empty, RpcError>>,
) -> Result<(), AgentError> {
    bounded(call, bound, answer).await.map(drop)
}

/// What the guest tells of a process, as it may reach a terminal.
fn clean(mut process: GuestProcess) -> GuestProcess {
    process.container = guest_text(&process.container);
    process.state = guest_text(&process.state);
    process.command.iter_mut().for_each(|word| *word = guest_text(word));
    process
}

/// Text of the guest's as it may reach a log, a file and a terminal: no control characters, and no more than anybody reads.
pub(crate) fn guest_text(text: &str) -> String {
    printable(text.as_bytes().get(..TEXT_MAX).unwrap_or(text.as_bytes()))
}

/// A process's two names on the wire. No exec id means the container's own process.
fn wire(process: &ProcessId) -> (String, String) {
    (process.container.clone(), process.exec.clone().unwrap_or_default())
}

/// The stream beneath the RPC layer, watched for its end: the RPC layer itself only tells at the next call.
struct Wire {
    stream: UnixStream,
    lost: watch::Sender<bool>,
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let room = buf.remaining() > 0;
        let polled = Pin::new(&mut self.stream).poll_read(cx, buf);
        let ended = match &polled {
            Poll::Ready(Ok(())) => room && buf.filled().len() == before,
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if ended {
            self.lost.send_replace(true);
        }
        polled
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_cannot_send_escape_sequences_or_megabytes() {
        let hostile = format!("no\u{1b}]0;owned\u{7} file\n{}", "x".repeat(1 << 20));
        let status = ttrpc::get_status(Code::NOT_FOUND, hostile);
        let text = AgentError::new("CreateContainer", RpcError::RpcStatus(status)).to_string();
        assert!(text.starts_with("no]0;owned file\nxxx"), "{:?}", text.get(..40));
        assert!(text.len() <= TEXT_MAX);
        // Cut in the middle of a character.
        assert!(guest_text(&"ä".repeat(TEXT_MAX)).starts_with('ä'));
    }
}

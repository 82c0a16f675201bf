//! What reaches the actor: requests of callers, and the completions of work that it began.

use std::sync::Arc;

use kata_api::GuestProcess;
use kata_api::agent::StatsContainerResponse;
use oci_spec::runtime::{LinuxResources, Process};
use tokio::sync::{oneshot, watch};

use super::files::ContainerFiles;
use crate::agent_client::AgentError;
use crate::boot::{BootError, Booted};
use crate::error::SandboxError;
use crate::hooks::Hooks;
use crate::pod::{ContainerSpec, Exit, Inspection, ProcessId, ProcessState, Status, Stdio};
use crate::stdio::Streams;
use crate::timeline::Timeline;

/// Where an answer goes. Callers that went away are not missed.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, SandboxError>>;

/// One entry of the queue.
pub(crate) enum Message {
    Request(Request),
    Done(Done),
}

/// What callers ask for.
pub(crate) enum Request {
    Create(Box<ContainerSpec>, Reply<()>),
    Exec { id: ProcessId, process: Box<Process>, stdio: Stdio, reply: Reply<()> },
    Start(ProcessId, Reply<u32>),
    Wait(ProcessId, Reply<watch::Receiver<Option<Exit>>>),
    Delivered(ProcessId, Reply<Option<watch::Receiver<()>>>),
    Kill { id: ProcessId, signal: u32, all: bool, reply: Reply<()> },
    Resize { id: ProcessId, rows: u32, columns: u32, reply: Reply<()> },
    CloseStdin(ProcessId, Reply<()>),
    Freeze { container: String, to: Status, reply: Reply<()> },
    Stats(String, Reply<StatsContainerResponse>),
    Processes(Option<String>, Reply<Vec<GuestProcess>>),
    Update(String, Box<LinuxResources>, Reply<()>),
    State(ProcessId, Reply<ProcessState>),
    Pids(String, Reply<Vec<u32>>),
    Delete(ProcessId, Reply<Exit>),
    Shutdown(Reply<()>),
    Inspect(oneshot::Sender<Inspection>),
}

/// What work comes back with.
pub(crate) enum Done {
    Booted(Result<Box<Booted>, BootError>),
    Created {
        id: ProcessId,
        result: Result<Box<Created>, SandboxError>,
        reply: Reply<()>,
    },
    Started {
        id: ProcessId,
        result: Result<Launched, SandboxError>,
        reply: Reply<u32>,
    },
    Exited(ProcessId, Result<i32, AgentError>),
    Frozen {
        container: String,
        to: Status,
        result: Result<(), SandboxError>,
        reply: Reply<()>,
    },
    Deleted {
        id: ProcessId,
        result: Result<(), SandboxError>,
        files: Option<ContainerFiles>,
        reply: Reply<Exit>,
    },
    Oom(String),
    Died(String),
    TornDown(Result<(), SandboxError>),
}

/// A container that the agent has made.
pub(crate) struct Created {
    pub(crate) files: ContainerFiles,
    pub(crate) hooks: Arc<Hooks>,
    pub(crate) streams: Streams,
    pub(crate) timeline: Timeline,
}

/// A process that the agent has started.
pub(crate) struct Launched {
    /// An exec's; a container's own process has had its streams since it was created.
    pub(crate) streams: Option<Streams>,
    pub(crate) timeline: Timeline,
}

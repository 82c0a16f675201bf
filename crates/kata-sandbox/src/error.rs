//! Why an operation on a pod failed, and in which class a client sees it.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use kata_hypervisor::DriverKind;

use crate::agent_client::AgentError;
use crate::boot::BootError;
use crate::guest_spec::GuestSpecError;
use crate::hooks::HookError;
use crate::identity::IdentityError;
use crate::initdata::InitdataError;
use crate::network::NetworkError;
use crate::pod::{ProcessId, Status};
use crate::resources::ResourceError;
use crate::stdio::StdioError;
use crate::storage::StorageError;

/// The classes that clients tell apart. The shim maps them one to one onto ttrpc codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// Unknown container, process, or command.
    NotFound,
    /// The command may not be executed.
    PermissionDenied,
    /// The name is taken.
    AlreadyExists,
    /// The request makes no sense, whatever the state.
    InvalidArgument,
    /// The request makes no sense in this state.
    FailedPrecondition,
    /// Not supported here.
    Unimplemented,
    /// The pod is gone.
    Unavailable,
    /// Everything else.
    Internal,
}

/// Why an operation on a pod failed. [`kind`](Self::kind) classifies it, [`chain`](Self::chain) prints all of it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SandboxError {
    /// The pod's start failed.
    #[error("cannot start the pod")]
    Boot(#[source] Arc<BootError>),
    /// The pod's virtual machine is gone, or going.
    #[error("the pod is dead: {cause}")]
    Dead {
        /// Why it ended.
        cause: String,
    },
    /// No such container or exec.
    #[error("{0} does not exist")]
    UnknownProcess(ProcessId),
    /// The process is over, so there is nothing to signal.
    #[error("{0} has ended already")]
    AlreadyEnded(ProcessId),
    /// The name is taken.
    #[error("{0} exists already")]
    ProcessExists(ProcessId),
    /// The name cannot be used.
    #[error(
        "invalid id {0:?}: it must be 1 to 128 characters of [A-Za-z0-9_.-] and begin with a letter or digit"
    )]
    InvalidId(String),
    /// The process is in no state for this.
    #[error("cannot {action} {process}: it is {status}")]
    WrongStatus {
        /// What was asked.
        action: &'static str,
        /// Of which process.
        process: ProcessId,
        /// What it is.
        status: Status,
    },
    /// A container with execs that still run cannot be deleted.
    #[error("cannot delete {container}: exec {exec} still runs")]
    ExecRuns {
        /// The container.
        container: ProcessId,
        /// One of its execs.
        exec: String,
    },
    /// Another request for the same process is under way.
    #[error("cannot {action} {process}: {pending} is under way")]
    Busy {
        /// What was asked.
        action: &'static str,
        /// Of which process.
        process: ProcessId,
        /// What goes on.
        pending: &'static str,
    },
    /// The container was killed or deleted while it was being made.
    #[error("{0} was killed while it was being created")]
    CreateCancelled(ProcessId),
    /// The agent did not answer a creation in time.
    #[error(
        "the guest's agent did not create {process} within {bound:?}: its files are large or slow, or the guest hangs; raise \
         agent.kata.create_container_timeout, or see the agent's log (agent.kata.enable_debug shows more)"
    )]
    CreateTimeout {
        /// Of which process.
        process: ProcessId,
        /// The bound.
        bound: Duration,
    },
    /// The guest cannot be asked yet.
    #[error("the pod still boots; try again once it runs")]
    Booting,
    /// The agent refused something about the guest as a whole, or is gone.
    #[error("the agent cannot {action}")]
    Guest {
        /// What was asked.
        action: &'static str,
        /// Its answer.
        #[source]
        source: Arc<AgentError>,
    },
    /// The agent refused, or is gone.
    #[error("the agent cannot {action} {process}")]
    Agent {
        /// What was asked.
        action: &'static str,
        /// Of which process.
        process: ProcessId,
        /// Its answer.
        #[source]
        source: Arc<AgentError>,
    },
    /// The container's files could not be prepared.
    #[error("cannot prepare the files of {process}")]
    Storage {
        /// Of which process.
        process: ProcessId,
        /// Why.
        #[source]
        source: Arc<StorageError>,
    },
    /// A hook of the container failed.
    #[error("cannot create {process}")]
    Hook {
        /// Of which process.
        process: ProcessId,
        /// Which, and why.
        #[source]
        source: Arc<HookError>,
    },
    /// The guest could not be given what has come into the pod's network.
    #[error("cannot start {process}")]
    Network {
        /// Which process.
        process: ProcessId,
        /// Why.
        #[source]
        source: Arc<NetworkError>,
    },
    /// The standard streams could not be connected.
    #[error("cannot connect the standard streams of {process}")]
    Stdio {
        /// Of which process.
        process: ProcessId,
        /// Why.
        #[source]
        source: Arc<StdioError>,
    },
    /// The OCI spec asks for what the guest cannot do.
    #[error("the specification of {process} cannot be carried out in the guest")]
    GuestSpec {
        /// Of which process.
        process: ProcessId,
        /// Why.
        #[source]
        source: Arc<GuestSpecError>,
    },
    /// The machine has no room for a container's limits.
    #[error("cannot {action} {process}")]
    Limits {
        /// What was asked.
        action: &'static str,
        /// Of which process.
        process: ProcessId,
        /// Why.
        #[source]
        source: Arc<ResourceError>,
    },
    /// The pod has a network that is not carried.
    #[error(
        "{path} gives the pod a network that is attached directly, without its network namespace, which is not supported: remove \
         the file, or name another directory (runtime.dan_conf)",
        path = .0.display()
    )]
    DirectNetwork(PathBuf),
    /// The pod does not get what it was promised of the host.
    #[error("the pod cannot have the processors and the memory that it was promised")]
    Resources(#[source] Arc<ResourceError>),
    /// The driver has not what the configuration asks for.
    #[error("the pod cannot be made: {driver} {lacks}; {next}")]
    Driver {
        /// The driver.
        driver: DriverKind,
        /// What it has not, as the end of a sentence.
        lacks: &'static str,
        /// What to do about it.
        next: &'static str,
    },
    /// The pod's initdata does not reach its guest.
    #[error("the pod cannot be given its initdata")]
    Initdata(#[source] Arc<InitdataError>),
    /// No identity for the pod's processes.
    #[error("no identity for the pod's processes")]
    Identity(#[source] Arc<IdentityError>),
    /// The pod's directory is not usable.
    #[error("cannot use the pod's directory {path}", path = .path.display())]
    RunDir {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// A dead owner's pod of the same name was not released yet.
    #[error("{path} is left of a pod of the same name: release that first (delete)", path = .0.display())]
    LeftOver(PathBuf),
    /// Something of the pod could not be removed.
    #[error("teardown left something behind")]
    Teardown(#[source] Arc<dyn std::error::Error + Send + Sync>),
}

impl SandboxError {
    /// The class that a client sees.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::UnknownProcess(_) | Self::AlreadyEnded(_) => ErrorKind::NotFound,
            Self::ProcessExists(_) | Self::LeftOver(_) => ErrorKind::AlreadyExists,
            Self::InvalidId(_) => ErrorKind::InvalidArgument,
            Self::Driver { .. } | Self::DirectNetwork(_) => ErrorKind::Unimplemented,
            Self::WrongStatus { .. } | Self::ExecRuns { .. } | Self::Busy { .. } => {
                ErrorKind::FailedPrecondition
            }
            Self::Dead { .. } | Self::Boot(_) | Self::CreateCancelled(_) => ErrorKind::Unavailable,
            Self::Booting => ErrorKind::Unavailable,
            Self::Agent { source, .. } | Self::Guest { source, .. } => source.kind(),
            Self::Limits { source, .. } | Self::Resources(source) => source.kind(),
            Self::Storage { source, .. } => source.kind(),
            Self::GuestSpec { source, .. } => source.kind(),
            Self::Stdio { source, .. } => source.kind(),
            Self::Network { source, .. } => source.kind(),
            Self::Initdata(source) => source.kind(),
            Self::CreateTimeout { .. }
            | Self::Hook { .. }
            | Self::Identity(_)
            | Self::RunDir { .. }
            | Self::Teardown(_) => ErrorKind::Internal,
        }
    }

    /// The error and its causes, joined with `: `.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// An error and its causes, joined with `: `.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        // Writing to a string cannot fail.
        let _ = fmt::Write::write_fmt(&mut text, format_args!(": {cause}"));
        next = cause.source();
    }
    text
}

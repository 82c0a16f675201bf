//! What a request may fail with, and the status code that each failure is on the wire.

use std::path::PathBuf;

use kata_evidence::EvidenceError;
use ttrpc::Code;

use super::spec::SpecError;
use crate::aside::AsideError;
use crate::container::{EngineError, Fault};
use crate::device::{DeviceError, DiskError};
use crate::modules::ModuleError;
use crate::mount::StorageError;
use crate::network::NetworkError;
use crate::services::ServiceError;
use crate::services::sealed::{SealedError, TreeError};
use crate::stdio::StdioError;
use crate::stream::StreamError;

/// A request that was refused or that failed.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// No container of this id.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// No process of this id in the container.
    #[error("container {container:?} has no process {process:?}")]
    NoProcess {
        /// The container.
        container: String,
        /// The exec id.
        process: String,
    },
    /// Nothing at this path of the guest.
    #[error("volume {0:?} does not exist in the guest")]
    NoVolume(String),
    /// The id is taken.
    #[error("{0} exists already")]
    Exists(String),
    /// A bad argument.
    #[error("{0}")]
    Invalid(String),
    /// Not in the present state.
    #[error("{0}")]
    State(String),
    /// A part of the protocol that this agent does not have.
    #[error("{0} is not supported")]
    Unsupported(&'static str),
    /// Took longer than the request allows.
    #[error("{0}")]
    TimedOut(String),
    /// The specification of the container or process.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The container engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A mount for the sandbox or the container.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// A secret for the container.
    #[error(transparent)]
    Sealed(#[from] SealedError),
    /// A report of the hardware.
    #[error(transparent)]
    Evidence(#[from] EvidenceError),
    /// A device for the container.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A kernel module.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// Work that waits in the kernel.
    #[error(transparent)]
    Aside(#[from] AsideError),
    /// Interfaces, routes, neighbours.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Stream connections.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Reading, writing or resizing by request.
    #[error(transparent)]
    Stdio(#[from] StdioError),
    /// Something of the guest's system.
    #[error("{what}")]
    System {
        /// What was tried.
        what: String,
        #[source]
        /// Why it failed.
        source: std::io::Error,
    },
    /// The same with a file.
    #[error("{what} {path:?}")]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        #[source]
        /// Why it failed.
        source: std::io::Error,
    },
}

impl RpcError {
    /// For `map_err`: a failed system call, by what it was for.
    pub fn system<E: Into<std::io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::System { what: what.into(), source: source.into() }
    }

    /// For `map_err`: a failed use of a file.
    pub fn file<E: Into<std::io::Error>>(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self::File { what, path: path.into(), source: source.into() }
    }

    /// The code of the project's contract for this failure.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::NoVolume(_) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::Invalid(_) | Self::Spec(_) => Code::INVALID_ARGUMENT,
            Self::State(_) => Code::FAILED_PRECONDITION,
            Self::Unsupported(_) => Code::UNIMPLEMENTED,
            Self::TimedOut(_) => Code::DEADLINE_EXCEEDED,
            Self::Engine(error) => of_fault(error.fault()),
            Self::Storage(error) => of_storage(error),
            Self::Sealed(error) => of_sealed(error),
            Self::Evidence(error) => of_evidence(error),
            Self::Device(error) => of_device(error),
            Self::Aside(error) => of_aside(error),
            Self::Module(ModuleError::Unknown { .. }) => Code::NOT_FOUND,
            Self::Module(ModuleError::Parameters { .. }) => Code::INVALID_ARGUMENT,
            Self::Network(NetworkError::NoLink { .. } | NetworkError::NoDevice { .. }) => Code::NOT_FOUND,
            Self::Network(NetworkError::LoopbackName(_)) => Code::INVALID_ARGUMENT,
            Self::Stream(StreamError::NotConnected { .. } | StreamError::Claimed { .. }) => {
                Code::INVALID_ARGUMENT
            }
            Self::Stdio(StdioError::Absent(_) | StdioError::NoTerminal) => Code::FAILED_PRECONDITION,
            Self::Stdio(StdioError::End(_)) => Code::OUT_OF_RANGE,
            Self::Module(_)
            | Self::Network(_)
            | Self::Stream(_)
            | Self::Stdio(_)
            | Self::System { .. }
            | Self::File { .. } => Code::INTERNAL,
        }
    }
}

fn of_fault(fault: Fault) -> Code {
    match fault {
        Fault::CommandNotFound | Fault::NoContainer => Code::NOT_FOUND,
        Fault::NotExecutable => Code::PERMISSION_DENIED,
        Fault::Exists => Code::ALREADY_EXISTS,
        Fault::Invalid => Code::INVALID_ARGUMENT,
        Fault::Unsupported => Code::UNIMPLEMENTED,
        Fault::WrongState => Code::FAILED_PRECONDITION,
        Fault::Failed => Code::INTERNAL,
    }
}

fn of_storage(error: &StorageError) -> Code {
    match error {
        StorageError::Unsupported { .. } | StorageError::NoFileSystem { .. } => Code::UNIMPLEMENTED,
        StorageError::Invalid { .. } | StorageError::Data { .. } => Code::INVALID_ARGUMENT,
        StorageError::Other { .. } => Code::FAILED_PRECONDITION,
        StorageError::Disk { source, .. } => of_disk(source),
        StorageError::Aside(error) => of_aside(error),
        StorageError::Service { source, .. } => of_service(source),
        StorageError::Module { .. }
        | StorageError::Mount { .. }
        | StorageError::NotMounted { .. }
        | StorageError::System { .. } => Code::INTERNAL,
    }
}

/// A host takes NOT_FOUND and PERMISSION_DENIED for the command's, which has nothing to do with these.
fn of_service(error: &ServiceError) -> Code {
    match error {
        error if error.is_absent() => Code::UNIMPLEMENTED,
        ServiceError::Refused {
            code: code @ (Code::INVALID_ARGUMENT | Code::RESOURCE_EXHAUSTED), ..
        } => *code,
        ServiceError::Refused { .. } => Code::FAILED_PRECONDITION,
        ServiceError::Late { .. } => Code::DEADLINE_EXCEEDED,
        ServiceError::Unreachable { .. } => Code::UNAVAILABLE,
        ServiceError::Broken { .. } => Code::INTERNAL,
    }
}

fn of_sealed(error: &SealedError) -> Code {
    match error {
        SealedError::Annotation(_)
        | SealedError::NoMount(_)
        | SealedError::NothingSealed(_)
        | SealedError::Tree(TreeError::TooMuch { .. } | TreeError::Kind { .. }) => Code::INVALID_ARGUMENT,
        SealedError::Service { source, .. } => of_service(source),
        SealedError::NotText(_) => Code::FAILED_PRECONDITION,
        SealedError::Aside(error) => of_aside(error),
        SealedError::Tree(TreeError::System { .. }) => Code::INTERNAL,
    }
}

fn of_evidence(error: &EvidenceError) -> Code {
    match error {
        EvidenceError::TooLong(_) => Code::INVALID_ARGUMENT,
        EvidenceError::NoHardware | EvidenceError::NoReports { .. } => Code::UNIMPLEMENTED,
        EvidenceError::Disturbed => Code::ABORTED,
        EvidenceError::TooLarge(_) | EvidenceError::File { .. } | EvidenceError::Unknown(_) => Code::INTERNAL,
    }
}

fn of_aside(error: &AsideError) -> Code {
    match error {
        AsideError::Overdue { .. } => Code::DEADLINE_EXCEEDED,
        AsideError::Interrupted { .. } => Code::FAILED_PRECONDITION,
    }
}

fn of_disk(error: &DiskError) -> Code {
    match error {
        DiskError::Source(_) | DiskError::Address(_) => Code::INVALID_ARGUMENT,
        DiskError::Absent { .. } => Code::DEADLINE_EXCEEDED,
        DiskError::Aside(error) => of_aside(error),
        DiskError::Driver(_) | DiskError::Listen(_) => Code::INTERNAL,
    }
}

fn of_device(error: &DeviceError) -> Code {
    match error {
        DeviceError::Unsupported(..) => Code::UNIMPLEMENTED,
        DeviceError::Invalid { .. } | DeviceError::Path { .. } => Code::INVALID_ARGUMENT,
        DeviceError::Disk(error) => of_disk(error),
        DeviceError::Absent { .. } => Code::DEADLINE_EXCEEDED,
        DeviceError::Aside(error) => of_aside(error),
        DeviceError::Driver(_)
        | DeviceError::Listen(_)
        | DeviceError::File { .. }
        | DeviceError::NotBound { .. } => Code::INTERNAL,
    }
}

/// The answer on the wire: a failure becomes its code and its chain of causes.
///
/// # Errors
/// `result`'s.
pub fn answer<T>(method: &'static str, result: Result<T, RpcError>) -> ttrpc::Result<T> {
    result.map_err(|error| {
        let text = crate::chain(&error);
        let code = error.code();
        // A reader that reads until the end is told so once a stream.
        if code == Code::OUT_OF_RANGE {
            tracing::debug!(method, error = text, "request ended");
        } else {
            tracing::warn!(method, ?code, error = text, "request failed");
        }
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, text))
    })
}

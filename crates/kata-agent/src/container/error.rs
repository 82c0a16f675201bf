//! What can go wrong with a container, in terms its user can act on.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::cgroup::CgroupError;
use crate::aside::AsideError;

/// Why the engine refused or failed.
#[derive(Debug, Error)]
pub enum EngineError {
    /// `args[0]` names no file, tried at these paths of the container's root.
    // In these words, by which clients know it: Docker answers them with its exit code 127.
    #[error("command {command:?}: executable file not found in the container, tried {}", list(.tried))]
    CommandNotFound {
        /// `args[0]` as asked.
        command: String,
        /// Each path looked at, in order.
        tried: Vec<PathBuf>,
    },
    /// The file is there, the program that is to run it (`#!` line or ELF interpreter) is not.
    #[error("the interpreter of {}: no such file or directory in the container", .path.display())]
    InterpreterNotFound {
        /// The file that was found.
        path: PathBuf,
    },
    /// The file is there and cannot be run: no execute permission, a directory, or no known format.
    #[error("cannot execute {}", .path.display())]
    NotExecutable {
        /// The file that was found.
        path: PathBuf,
        /// `EACCES`, `EISDIR`, `ENOEXEC`, …
        #[source]
        source: io::Error,
    },
    /// No container of this id.
    #[error("container {0:?} does not exist")]
    NoContainer(String),
    /// The id is taken.
    #[error("container {0:?} exists already")]
    Exists(String),
    /// The container is not in a state for this.
    #[error("container {id:?} is {state}")]
    WrongState {
        /// The container.
        id: String,
        /// What it is, in words.
        state: &'static str,
    },
    /// The spec contradicts itself or the OCI runtime specification.
    #[error("spec: {key}: {reason}")]
    Invalid {
        /// Key path in the spec, e.g. `linux.seccomp.syscalls`.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The spec asks for what this engine does not do.
    #[error("spec: {key} is not supported: {reason}")]
    Unsupported {
        /// Key path in the spec.
        key: String,
        /// Why.
        reason: String,
    },
    /// The cgroup or one of its limits.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The kernel did not come back.
    #[error(transparent)]
    Aside(#[from] AsideError),
    /// A step of the setup failed.
    #[error("cannot {step}")]
    Setup {
        /// What was being done, e.g. `mount proc at /proc`.
        step: String,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The process was killed, or ended, before its setup was done.
    #[error(
        "the process of container {0:?} ended during its setup: it was killed, by a request or because its memory limit is \
         too small for the setup"
    )]
    Ended(String),
}

/// The class of an [`EngineError`], for the status code on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The command does not exist in the container (exit code 127).
    CommandNotFound,
    /// The command cannot be run (exit code 126).
    NotExecutable,
    /// No such container.
    NoContainer,
    /// The id is taken.
    Exists,
    /// Wrong argument or spec.
    Invalid,
    /// Not supported by this engine or this kernel.
    Unsupported,
    /// Not now.
    WrongState,
    /// Everything else.
    Failed,
}

impl EngineError {
    /// The class this error belongs to.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::CommandNotFound { .. } | Self::InterpreterNotFound { .. } => Fault::CommandNotFound,
            Self::NotExecutable { .. } => Fault::NotExecutable,
            Self::NoContainer(_) => Fault::NoContainer,
            Self::Exists(_) => Fault::Exists,
            Self::Invalid { .. } => Fault::Invalid,
            Self::Unsupported { .. } => Fault::Unsupported,
            Self::WrongState { .. } => Fault::WrongState,
            Self::Cgroup(error) => error.fault(),
            Self::Aside(_) | Self::Setup { .. } | Self::Ended(_) => Fault::Failed,
        }
    }

    pub(super) fn invalid(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { key: key.into(), reason: reason.into() }
    }

    pub(super) fn unsupported(key: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unsupported { key: key.into(), reason: reason.into() }
    }

    pub(super) fn setup(step: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Setup { step: step.into(), source: source.into() }
    }
}

fn list(paths: &[PathBuf]) -> String {
    let shown: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    if shown.is_empty() { "no path (PATH is empty)".to_owned() } else { shown.join(", ") }
}

//! Why a storage was not made.

use std::ffi::NulError;
use std::path::{Path, PathBuf};

use kata_api::agent::Storage;

use crate::aside::AsideError;
use crate::device::DiskError;
use crate::modules::ModuleError;
use crate::services::ServiceError;

/// A storage that was not made, or not undone.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The driver is one of the protocol's that this agent has not.
    #[error("storage driver {driver:?} is not supported: {reason}")]
    Unsupported {
        /// As asked.
        driver: String,
        /// What it would take.
        reason: &'static str,
    },
    /// The request makes no sense.
    #[error("storage at {mount_point:?}: {reason}")]
    Invalid {
        /// Where it was to be.
        mount_point: String,
        /// What is wrong.
        reason: String,
    },
    /// Another storage is at its mount point.
    #[error("storage at {mount_point:?}: another is there already, with another {what}")]
    Other {
        /// Where it was to be.
        mount_point: String,
        /// What tells them apart.
        what: &'static str,
    },
    /// A kernel module that it needs.
    #[error("storage at {mount_point:?}")]
    Module {
        /// Where it was to be.
        mount_point: PathBuf,
        #[source]
        /// Which module, and why.
        source: ModuleError,
    },
    /// The disk that it is on.
    #[error("storage at {mount_point:?}")]
    Disk {
        /// Where it was to be.
        mount_point: String,
        #[source]
        /// Which disk, and why.
        source: DiskError,
    },
    /// The kernel has no such file system.
    #[error("storage at {mount_point:?}: the guest's kernel has no file system {kind:?}")]
    NoFileSystem {
        /// Where it was to be.
        mount_point: PathBuf,
        /// The type asked for.
        kind: String,
    },
    /// The kernel refused the mount.
    #[error("mounting {kind} from {from} on {mount_point:?}")]
    Mount {
        /// Type of the file system.
        kind: String,
        /// Device, tag or whatever the type calls it.
        from: String,
        /// Where it was to be.
        mount_point: PathBuf,
        /// The system's word.
        #[source]
        source: std::io::Error,
    },
    /// Making a directory, binding or unmounting.
    #[error("{what} {path:?}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With which path.
        path: PathBuf,
        #[source]
        /// The system's word.
        source: std::io::Error,
    },
    /// An option that the kernel cannot be given.
    #[error("options of the storage at {mount_point:?}")]
    Data {
        /// Where it was to be.
        mount_point: PathBuf,
        #[source]
        /// Why.
        source: NulError,
    },
    /// A service of the guest did not make it.
    #[error("storage at {mount_point:?}")]
    Service {
        /// Where it was to be.
        mount_point: String,
        #[source]
        /// Why not.
        source: ServiceError,
    },
    /// A service of the guest says that it has, and has not.
    #[error(
        "storage at {mount_point:?}: the guest's service says that it is mounted, and it is not; its unit has to share the agent's mount namespace"
    )]
    NotMounted {
        /// Where it was to be.
        mount_point: String,
    },
    /// The work was dropped before it was done.
    #[error(transparent)]
    Aside(#[from] AsideError),
}

pub(super) fn system<'a, E: Into<std::io::Error>>(
    what: &'static str,
    path: &'a Path,
) -> impl Fn(E) -> StorageError + use<'a, E> {
    move |source| StorageError::System { what, path: path.to_owned(), source: source.into() }
}

pub(super) fn invalid(storage: &Storage, reason: impl Into<String>) -> StorageError {
    StorageError::Invalid { mount_point: storage.mount_point.clone(), reason: reason.into() }
}

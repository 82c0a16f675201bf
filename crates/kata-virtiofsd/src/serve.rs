//! The vhost-user device: the crate's file system, configured and run until the machine goes away.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::passthrough::{CachePolicy, Config, PassthroughFs};
use virtiofsd::seccomp::{SeccompAction, enable_seccomp};
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::bounded::Bounded;
use crate::sandbox::{self, ProcFiles, SandboxError};
use crate::{Cache, Cli, SandboxMode};

/// Descriptors kept back from the guest's share: memory regions, queues, the crate's own.
const RESERVED_DESCRIPTORS: u64 = 640;

/// Open files wanted, where the host allows as many.
const OPEN_FILES: u64 = 1_000_000;

/// Why the directory could not be served.
#[derive(Debug, Error)]
pub enum ServeError {
    #[error("--listen-fd {fd} is not a listening unix socket")]
    Listener {
        fd: i32,
        #[source]
        source: rustix::io::Errno,
    },
    #[error("cannot enter the sandbox")]
    Sandbox(#[from] SandboxError),
    #[error("cannot restrict system calls: {0}")]
    Seccomp(String),
    #[error("cannot raise the limit of open files")]
    OpenFiles(#[source] rustix::io::Errno),
    #[error("cannot serve the file system")]
    FileSystem(#[source] std::io::Error),
    #[error("the vhost-user device failed: {0}")]
    Device(String),
}

/// Takes over the socket that the parent bound, so that nobody has to wait for this process to begin.
pub fn adopt_listener(fd: i32) -> Result<UnixListener, ServeError> {
    // SAFETY: the number comes from the command line and belongs to nobody else in this young process; it is
    // checked to be an open listening socket before use, and kept open (not closed) if it is not.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    match rustix::net::sockopt::socket_acceptconn(&owned) {
        Ok(true) => Ok(UnixListener::from(owned)),
        Ok(false) => Err(ServeError::Listener { fd, source: rustix::io::Errno::INVAL }),
        Err(source) => {
            std::mem::forget(owned);
            Err(ServeError::Listener { fd, source })
        }
    }
}

/// Raises the limit of open files as far as the host lets it: the guest's open files are descriptors here.
/// Answers the limit that holds now.
pub fn raise_open_files() -> Result<u64, ServeError> {
    let limit = getrlimit(Resource::Nofile);
    let to = |count: Option<u64>| Rlimit { current: count, maximum: count };
    if limit.current.is_none_or(|current| current >= OPEN_FILES) {
        return Ok(limit.current.unwrap_or(u64::MAX));
    }
    if setrlimit(Resource::Nofile, to(Some(OPEN_FILES))).is_ok() {
        return Ok(OPEN_FILES);
    }
    setrlimit(Resource::Nofile, to(limit.maximum)).map_err(ServeError::OpenFiles)?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}

/// Serves one connection to its end.
pub fn serve(
    listener: UnixListener,
    cli: &Cli,
    root: &str,
    proc: Option<ProcFiles>,
    open_files: u64,
) -> Result<ExitCode, ServeError> {
    let (fds, mountinfo) = proc.map_or((None, None), |proc| (Some(proc.fds), Some(proc.mountinfo)));
    let timeout = match cli.cache {
        Cache::Never => Duration::ZERO,
        Cache::Auto => Duration::from_secs(1),
        Cache::Metadata | Cache::Always => Duration::from_secs(24 * 60 * 60),
    };
    let guests_files = open_files.saturating_sub(RESERVED_DESCRIPTORS);
    let config = Config {
        entry_timeout: timeout,
        attr_timeout: timeout,
        cache_policy: policy(cli.cache),
        root_dir: root.to_owned(),
        proc_sfd_rawfd: fds,
        proc_mountinfo_rawfd: mountinfo,
        announce_submounts: true,
        readdirplus: cli.cache != Cache::Never,
        xattr: cli.xattr,
        writeback: cli.writeback,
        guest_fd_limit: guests_files,
        ..Config::default()
    };
    let fs = PassthroughFs::new(config).map_err(ServeError::FileSystem)?;
    if cli.sandbox == SandboxMode::Namespaces {
        sandbox::drop_capabilities()?;
    }
    enable_seccomp(SeccompAction::Kill, false).map_err(|error| ServeError::Seccomp(error.to_string()))?;

    let backend = VhostUserFsBackendBuilder::default()
        .set_thread_pool_size(cli.thread_pool_size)
        .build(Bounded::new(fs, known_files(cli.known_files, guests_files)))
        .map_err(|error| ServeError::Device(error.to_string()))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("virtiofs".to_owned(), Arc::new(backend), memory)
        .map_err(|error| ServeError::Device(error.to_string()))?;
    let fd = listener.as_raw_fd();
    let mut listener = Listener::from(listener);
    tracing::debug!(fd, "waiting for the virtual machine");
    daemon.start(&mut listener).map_err(|error| ServeError::Device(error.to_string()))?;
    match daemon.wait() {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(vhost_user_backend::Error::HandleRequest(vhost::vhost_user::Error::Disconnected)) => {
            tracing::debug!("the virtual machine is gone");
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => Err(ServeError::Device(error.to_string())),
    }
}

/// How many files the guest may keep in mind: as many as wished, and half of all descriptors where these are few. The other
/// half is for what it has open, so that nobody is refused a file because of those that others have looked at.
fn known_files(wished: usize, guests_files: u64) -> usize {
    wished.min(usize::try_from(guests_files / 2).unwrap_or(usize::MAX))
}

/// The crate's own `Auto` has the guest drop a file's pages at each open, so that each exec of a program reads it anew:
/// 200 ms where 10 do. With pages kept and attributes trusted for a second only, the guest's kernel drops them when it
/// sees another size or time of change (`FUSE_AUTO_INVAL_DATA`).
fn policy(cache: Cache) -> CachePolicy {
    match cache {
        Cache::Never => CachePolicy::Never,
        Cache::Metadata => CachePolicy::Metadata,
        Cache::Auto | Cache::Always => CachePolicy::Always,
    }
}

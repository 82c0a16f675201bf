//! The back end of the guest's vsock device: the program `kata-vmm vsock`, which speaks vhost-user to the VMM and one unix
//! socket to the host.
//!
//! ```text
//!   VMM ── vhost-user ──▶ kata-vmm vsock ◀── CONNECT <port> ── <run_dir>/kata.hvsock   host → guest
//!                                │
//!                                └── connects ──▶ <run_dir>/kata.hvsock_<port>         guest → host
//! ```
//!
//! Both listeners are bound here, and the VMM gets the connected end of the vhost-user socket. All of them exist before the first
//! process is started, so nobody waits for anybody's socket to appear.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::process::{Child, Identity, Namespaces, Record, RecordError, Spawn, SpawnError};

/// The longest `CONNECT <port>\n` there is, with room.
pub(crate) const CONNECT_LINE_LIMIT: usize = 32;

/// Why there is no vsock back end.
#[derive(Debug, Error)]
pub enum VsockError {
    /// A socket could not be made.
    #[error("unix socket {path:?} cannot be made", path = .path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// Why: a path over 107 bytes, or one that is taken, for example.
        #[source]
        source: io::Error,
    },
    /// A socket could not be recorded.
    #[error("unix socket {path:?} was not made, because it could not be recorded", path = .path.display())]
    Record {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: RecordError,
    },
}

/// The two ends that a VMM and the back end will speak over, and the host's listener.
#[derive(Debug)]
pub(crate) struct Sockets {
    /// For the VMM: connected, and waiting in `listener`'s queue.
    pub vmm: OwnedFd,
    listener: OwnedFd,
    hybrid: OwnedFd,
    hybrid_path: PathBuf,
}

impl Sockets {
    /// Binds `<run_dir>/vsock.vhost` and `hybrid_path`.
    pub(crate) fn bind(run_dir: &Path, hybrid_path: &Path, record: &Record) -> Result<Self, VsockError> {
        let path = run_dir.join("vsock.vhost");
        let listener = bind(&path, record)?;
        let vmm =
            UnixStream::connect(&path).map_err(|source| VsockError::Socket { path: path.clone(), source })?;
        // Whoever could still reach the path would stand in the queue behind the VMM, for ever.
        std::fs::remove_file(&path).map_err(|source| VsockError::Socket { path, source })?;
        let hybrid = bind(hybrid_path, record)?;
        Ok(Self {
            vmm: vmm.into(),
            listener: listener.into(),
            hybrid: hybrid.into(),
            hybrid_path: hybrid_path.to_owned(),
        })
    }

    /// Starts the back end, and leaves the VMM's end.
    pub(crate) fn start(
        self,
        program: &Path,
        identity: &Identity,
        record: &Record,
    ) -> Result<(Child, OwnedFd), SpawnError> {
        let mut spawn = Spawn::new("vsock", program).arg("vsock");
        let listen_fd = spawn.hand_over(self.listener);
        let hybrid_fd = spawn.hand_over(self.hybrid);
        let args: [OsString; 6] = [
            "--listen-fd".into(),
            listen_fd.to_string().into(),
            "--hybrid-fd".into(),
            hybrid_fd.to_string().into(),
            "--hybrid-path".into(),
            self.hybrid_path.into(),
        ];
        // It connects to sockets of the host by path, so it stays in the host's mount namespace.
        let child = spawn
            .args(args)
            .identity(identity.clone())
            .namespaces(Namespaces { ipc: true, network: true, ..Namespaces::default() })
            .open_files(16 * 1024)
            .spawn(record)?;
        Ok((child, self.vmm))
    }
}

/// A listener at `path`, recorded before it is made. Only root may connect: whoever reaches the guest's agent rules the pod.
pub(crate) fn bind(path: &Path, record: &Record) -> Result<UnixListener, VsockError> {
    record.file(path).map_err(|source| VsockError::Record { path: path.to_owned(), source })?;
    let bound = UnixListener::bind(path).and_then(|listener| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    });
    bound.map_err(|source| VsockError::Socket { path: path.to_owned(), source })
}

/// Where what the guest dials on `port` arrives.
pub(crate) fn host_port_path(hybrid: &Path, port: u32) -> PathBuf {
    let mut path = hybrid.as_os_str().to_owned();
    path.push(format!("_{port}"));
    path.into()
}

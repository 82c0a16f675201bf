//! The ground a pod stands on: its directories, and the socket that it is reached by.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::process::umask;
use serde_json::json;
use thiserror::Error;

/// Longest path that fits into a socket address (unix(7)), and the longest name of a socket in a pod's directory.
const SOCKET_PATH_MAX: usize = 107;
const LONGEST_SOCKET: &str = "kata.hvsock_65535";
/// What monitors and CSI drivers connect to, see [`crate::management`].
pub(crate) const MONITOR_SOCKET: &str = "shim-monitor.sock";
/// File with the namespace of containerd that a pod belongs to.
const NAMESPACE: &str = "namespace";
/// File with what Kubernetes calls the pod.
const KUBERNETES: &str = "kubernetes.json";

/// The directories of one pod.
#[derive(Clone, Debug)]
pub(crate) struct Ground {
    /// `/run/kata/<id>`
    pub(crate) run_dir: PathBuf,
    /// `/var/lib/kata/pods/<id>`: the writable layer, kept by whoever prepares the root file system.
    pub(crate) state_dir: PathBuf,
}

#[derive(Debug, Error)]
pub(crate) enum GroundError {
    #[error(
        "a pod named {id} exists ({run_dir}); end and remove it with: containerd-shim-kata-v2 delete --id {id}"
    )]
    Exists { id: String, run_dir: PathBuf },
    #[error(
        "{run_dir} is too long by {excess} bytes for the sockets in it; use a shorter name or KATA_RUN_DIR"
    )]
    TooLong { run_dir: PathBuf, excess: usize },
    #[error("cannot create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot listen on {path}")]
    Listen { path: PathBuf, source: io::Error },
    #[error("{path} still has something mounted on {mount}: not removed")]
    Mounted { path: PathBuf, mount: PathBuf },
    #[error("cannot remove {path}")]
    Remove { path: PathBuf, source: io::Error },
}

impl Ground {
    /// Of the pod named `id`, which need not exist.
    pub(crate) fn of(id: &str) -> Self {
        Self {
            run_dir: kata_config::paths::run_dir().join(id),
            state_dir: kata_config::paths::state_dir().join("pods").join(id),
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir.join("pod.sock")
    }

    /// Takes the name: makes the pod's directory, which must not exist, and listens in it. Clients can connect from here
    /// on; they are accepted once the pod serves.
    ///
    /// Changes the umask of the process: whatever the pod keeps from then on (state, logs, sockets) is its owner's alone.
    pub(crate) fn claim(&self, id: &str) -> Result<UnixListener, GroundError> {
        let longest = self.run_dir.join(LONGEST_SOCKET).as_os_str().len();
        if longest > SOCKET_PATH_MAX {
            return Err(GroundError::TooLong {
                run_dir: self.run_dir.clone(),
                excess: longest - SOCKET_PATH_MAX,
            });
        }
        // The VMM and its helpers run as users without rights and must get through to their sockets: hence 0711.
        umask(Mode::WGRP | Mode::WOTH);
        let made = self.make(id);
        umask(Mode::RWXG | Mode::RWXO);
        made.and_then(|()| self.listen())
    }

    /// Says whose the pod is: containerd's namespaces have names of their own.
    pub(crate) fn belong_to(&self, namespace: &str) -> Result<(), GroundError> {
        let path = self.run_dir.join(NAMESPACE);
        std::fs::write(&path, namespace).map_err(|source| GroundError::Create { path, source })
    }

    /// Notes what Kubernetes calls the pod, if it is one of its, for those who look on.
    pub(crate) fn note_kubernetes(&self, annotations: &HashMap<String, String>) {
        let first = |keys: [&str; 2]| keys.iter().find_map(|key| annotations.get(*key));
        let names = json!({
            "cri_uid": first(["io.kubernetes.cri.sandbox-uid", "io.kubernetes.pod.uid"]),
            "cri_name": first(["io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"]),
            "cri_namespace": first(["io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"]),
        });
        let told = names.as_object().is_some_and(|names| names.values().all(|name| !name.is_null()));
        let path = self.run_dir.join(KUBERNETES);
        if told && let Err(error) = std::fs::write(&path, names.to_string()) {
            tracing::warn!(path = %path.display(), %error, "the pod's names in Kubernetes are not kept");
        }
    }

    /// Whether the pod was made for this namespace of containerd.
    pub(crate) fn is_of(&self, namespace: &str) -> bool {
        std::fs::read(self.run_dir.join(NAMESPACE)).is_ok_and(|text| text == namespace.as_bytes())
    }

    fn make(&self, id: &str) -> Result<(), GroundError> {
        let create = |path: &Path, recursive| {
            let made = DirBuilder::new().mode(0o711).recursive(recursive).create(path);
            made.map_err(|source| GroundError::Create { path: path.to_owned(), source })
        };
        create(self.run_dir.parent().unwrap_or_else(|| Path::new("/")), true)?;
        create(&self.run_dir, false).map_err(|error| match error {
            GroundError::Create { source, .. } if source.kind() == io::ErrorKind::AlreadyExists => {
                GroundError::Exists { id: id.to_owned(), run_dir: self.run_dir.clone() }
            }
            other => other,
        })
    }

    fn listen(&self) -> Result<UnixListener, GroundError> {
        let path = self.socket();
        let listening = UnixListener::bind(&path).and_then(|listener| {
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        listening.map_err(|source| GroundError::Listen { path, source })
    }

    /// Takes the sockets away: nobody is behind them any more.
    pub(crate) fn close(&self) {
        for socket in [self.socket(), self.run_dir.join(MONITOR_SOCKET)] {
            // It may be gone already, with its directory.
            let _ = std::fs::remove_file(socket);
        }
    }

    /// Where the last starts are kept, of all pods.
    pub(crate) fn starts(&self) -> PathBuf {
        let state_dir = self.state_dir.ancestors().nth(2).unwrap_or(&self.state_dir);
        state_dir.join("starts")
    }

    /// Removes everything that the pod has left. Nothing there is fine.
    pub(crate) fn clear(&self) -> Result<(), GroundError> {
        let mounts = std::fs::read("/proc/self/mountinfo")
            .map_err(|source| GroundError::Remove { path: self.run_dir.clone(), source })?;
        // The writable layer goes first: as long as the pod's directory is there, the pod can be found and deleted again.
        for dir in [&self.state_dir, &self.run_dir] {
            // Removing through a mount would remove what belongs to others.
            if let Some(mount) = mounted_below(&mounts, dir) {
                return Err(GroundError::Mounted { path: dir.clone(), mount });
            }
            match std::fs::remove_dir_all(dir) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(GroundError::Remove { path: dir.clone(), source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The first mount at or below `dir`, from the fifth field of each line of `mountinfo` (proc(5)).
fn mounted_below(mountinfo: &[u8], dir: &Path) -> Option<PathBuf> {
    let dir = std::fs::canonicalize(dir).ok()?;
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
        .find(|mount| mount.starts_with(&dir))
}

/// Undoes the kernel's octal escapes of blanks and backslashes.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        let octal = tail.first_chunk::<3>().filter(|_| first == b'\\').and_then(|digits| {
            let digits = std::str::from_utf8(digits).ok()?;
            u8::from_str_radix(digits, 8).ok()
        });
        bytes.push(octal.unwrap_or(first));
        rest = if octal.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests;

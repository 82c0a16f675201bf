//! What a pod leaves to be read: `<run_dir>/state.json`, written anew at each transition.
//!
//! ```json
//! { "version": 1, "id": "web", "state": "ready",
//!   "owner_pid": 4711, "owner_start_time": 812345, "created_at_ms": 1767225600000,
//!   "hypervisor": "qemu", "accelerator": "tcg", "choice": "KVM is absent …",
//!   "guest_kernel": "6.1.0", "agent_version": "0.1.0",
//!   "containers": [{ "id": "web", "state": "stopped", "args": ["true"], "exit_code": 0, "exited_at_ms": 1767225601000 }],
//!   "timeline": [{ "layer": "host", "name": "share", "start_us": 900, "duration_us": 210 }],
//!   "fault": null }
//! ```
//!
//! `state` is `creating`, `ready`, `stopping` or `stopped`; a container's is `created`, `running`, `paused` or `stopped`.
//! `owner_start_time` is field 22 of `/proc/<owner_pid>/stat`: an owner that is dead, or whose pid belongs to somebody
//! else by now, left the pod behind, and [`release`](crate::release) cleans up. Readers must ignore keys that they do
//! not know; a change that breaks them gets a new `version`. The resources to undo are not here but in the leak record
//! beside it, which is append-only: it must be complete even where a writer died half way.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use kata_hypervisor::process::identity;
use serde::{Deserialize, Serialize};

use crate::pod::ContainerView;
use crate::timeline::Stage;

/// The shape of the file that this release writes and reads.
const VERSION: u32 = 1;

/// Why a state file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read.
    #[error("cannot read {path}", path = .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be written.
    #[error("cannot write {path}", path = .path.display())]
    Write {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no state file.
    #[error("{path} is not a pod's state", path = .path.display())]
    Garbled {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Another release wrote it.
    #[error("{path} has version {version}; this release knows version 1", path = .path.display())]
    Version {
        /// Which.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
}

/// A pod's state as it is kept on disk. The module's text has the shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Shape of the file.
    pub version: u32,
    /// Name of the pod.
    pub id: String,
    /// `creating`, `ready`, `stopping` or `stopped`.
    pub state: String,
    /// The process that owns the pod.
    pub owner_pid: u32,
    /// Clock ticks from the host's boot to that process's start; 0 if it could not be found out.
    pub owner_start_time: u64,
    /// Milliseconds since the epoch.
    pub created_at_ms: u64,
    /// Name of the driver.
    pub hypervisor: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why this VMM and this accelerator.
    pub choice: String,
    /// Release of the guest's kernel; empty until known.
    pub guest_kernel: String,
    /// Version of the agent; empty until known.
    pub agent_version: String,
    /// The pod's containers.
    pub containers: Vec<ContainerView>,
    /// The stages of the start, by start time.
    pub timeline: Vec<Stage>,
    /// Why the pod ended, where it did not end by request.
    pub fault: Option<String>,
}

impl State {
    /// Where a pod's state is.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("state.json")
    }

    /// Reads the state of the pod in `run_dir`.
    ///
    /// # Errors
    /// The file is absent, no state file, or of another version.
    pub fn load(run_dir: &Path) -> Result<Self, StateError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let path = Self::path(run_dir);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(source) => return Err(StateError::Read { path, source }),
        };
        let parsed =
            serde_json::from_slice::<Versioned>(&text).and_then(|versioned| match versioned.version {
                VERSION => serde_json::from_slice(&text).map(Ok),
                other => Ok(Err(other)),
            });
        match parsed {
            Ok(Ok(state)) => Ok(state),
            Ok(Err(version)) => Err(StateError::Version { path, version }),
            Err(source) => Err(StateError::Garbled { path, source }),
        }
    }

    /// Whether the pod has not ended: neither in order, nor by the death of its owner. One whose owner could not find out when it
    /// began (0) is taken to live.
    pub(crate) fn lives(&self) -> bool {
        self.state != "stopped" && (self.owner_start_time == 0 || self.owner().is_some())
    }

    /// The process that wrote this, if it still runs and is known to be the same.
    pub fn owner(&self) -> Option<u32> {
        identity::runs(self.owner_pid, self.owner_start_time).then_some(self.owner_pid)
    }

    /// Replaces the state of the pod in `run_dir`: a reader sees the old one or the new one, whole.
    pub(crate) fn store(&self, run_dir: &Path) -> Result<(), StateError> {
        let path = Self::path(run_dir);
        let draft = path.with_extension("json.new");
        let write = || -> io::Result<()> {
            let mut text = serde_json::to_vec_pretty(self)?;
            text.push(b'\n');
            std::fs::File::create(&draft)?.write_all(&text)?;
            std::fs::rename(&draft, &path)
        };
        write().map_err(|source| StateError::Write { path, source })
    }

    pub(crate) const VERSION: u32 = VERSION;
}

/// This process as `owner_pid` and `owner_start_time`.
pub(crate) fn owner() -> (u32, u64) {
    let pid = std::process::id();
    (pid, identity::start_time(pid).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::Status;
    use crate::timeline::Layer;

    #[test]
    fn state_survives_a_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let (owner_pid, owner_start_time) = owner();
        assert_ne!(owner_start_time, 0);
        let state = State {
            version: VERSION,
            id: "web".to_owned(),
            state: "ready".to_owned(),
            owner_pid,
            owner_start_time,
            created_at_ms: 1,
            hypervisor: "qemu".to_owned(),
            accelerator: "tcg".to_owned(),
            choice: "because".to_owned(),
            guest_kernel: "6.1".to_owned(),
            agent_version: "0.1".to_owned(),
            containers: vec![ContainerView {
                id: "web".to_owned(),
                state: Status::Stopped,
                args: vec!["true".to_owned()],
                exit_code: Some(0),
                exited_at_ms: Some(2),
            }],
            timeline: vec![Stage {
                layer: Layer::Host,
                name: "share".to_owned(),
                start_us: 1,
                duration_us: 2,
            }],
            fault: Some("tripped over".to_owned()),
        };
        state.store(dir.path()).unwrap();
        assert_eq!(State::load(dir.path()).unwrap(), state);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no draft is left");
        assert!(state.lives());
        assert!(!State { state: "stopped".to_owned(), ..state.clone() }.lives());
        assert!(!State { owner_start_time: owner_start_time + 1, ..state }.lives());
    }

    #[test]
    fn other_version_is_told_from_garbage() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(State::path(dir.path()), r#"{"version": 2}"#).unwrap();
        assert!(matches!(State::load(dir.path()), Err(StateError::Version { version: 2, .. })));
        std::fs::write(State::path(dir.path()), "{").unwrap();
        assert!(matches!(State::load(dir.path()), Err(StateError::Garbled { .. })));
    }
}

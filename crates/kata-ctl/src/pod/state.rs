//! What a pod's owner leaves to be read: `<run_dir>/state.json`.
//!
//! The shape is documented where it is written, in kata-sandbox. Keys that are not known here are ignored; another
//! `version` is an error.

use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

const VERSION: u32 = 1;

/// A state file that is of no use.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It has another shape.
    #[error("{} is not a pod's state of version {VERSION}", path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

/// A pod, as its owner last described it.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct PodState {
    /// Shape of the file.
    pub version: u32,
    /// `creating`, `ready`, `stopping` or `stopped`.
    pub state: String,
    /// The owner.
    pub owner_pid: u32,
    /// Field 22 of its `/proc/<pid>/stat`; 0 if unknown.
    pub owner_start_time: u64,
    /// Milliseconds since the epoch.
    pub created_at_ms: u64,
    /// Name of the driver.
    #[serde(default)]
    pub hypervisor: String,
    /// `kvm` or `tcg`.
    #[serde(default)]
    pub accelerator: String,
    /// The pod's containers.
    #[serde(default)]
    pub containers: Vec<ContainerState>,
    /// Why the pod ended, where it did not end by request.
    pub fault: Option<String>,
}

/// A container of a pod.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct ContainerState {
    /// Its name.
    pub id: String,
    /// `created`, `running`, `paused` or `stopped`.
    pub state: String,
    /// Its command line.
    #[serde(default)]
    pub args: Vec<String>,
    /// Once stopped.
    pub exit_code: Option<u32>,
}

impl PodState {
    /// Reads the state of the pod in `run_dir`; `None` where its owner has not written one yet.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn load(run_dir: &Path) -> Result<Option<Self>, StateError> {
        let path = run_dir.join("state.json");
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StateError::Read { path, source }),
        };
        let state = serde_json::from_slice::<Self>(&text).and_then(|state| match state.version {
            VERSION => Ok(state),
            other => Err(serde::de::Error::custom(format!("its version is {other}"))),
        });
        state.map(Some).map_err(|source| StateError::Shape { path, source })
    }

    /// Whether the process that wrote this still runs.
    pub fn owner_lives(&self) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.owner_pid)).unwrap_or_default();
        // The name in parentheses may hold anything: fields are counted from behind it.
        let mut fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace();
        let alive = !matches!(fields.next(), None | Some("Z" | "X"));
        let start: Option<u64> = fields.nth(18).and_then(|field| field.parse().ok());
        alive && (self.owner_start_time == 0 || start == Some(self.owner_start_time))
    }

    /// Whether the pod is over.
    pub fn is_stopped(&self) -> bool {
        self.state == "stopped"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<Option<PodState>, StateError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("state.json"), text).unwrap();
        PodState::load(dir.path())
    }

    const TEXT: &str = r#"{"version": 1, "id": "web", "state": "ready", "owner_pid": 1, "owner_start_time": 3,
        "created_at_ms": 5, "hypervisor": "qemu", "accelerator": "tcg", "later": {"x": 1}, "fault": null,
        "containers": [{"id": "web", "state": "stopped", "args": ["a", "b"], "exit_code": 7, "exited_at_ms": 9}]}"#;

    #[test]
    fn unknown_keys_are_ignored_and_another_version_is_refused() {
        let state = load(TEXT).unwrap().unwrap();
        assert_eq!((state.state.as_str(), state.containers[0].exit_code), ("ready", Some(7)));
        let error = load(&TEXT.replace("\"version\": 1", "\"version\": 2")).unwrap_err();
        assert!(crate::failure::chain(&error).contains("its version is 2"));
    }

    #[test]
    fn a_pod_without_a_state_file_has_no_state_yet() {
        assert!(PodState::load(tempfile::tempdir().unwrap().path()).unwrap().is_none());
    }

    #[test]
    fn an_owner_is_known_by_pid_and_start_time() {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let start = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        let mut state =
            PodState { owner_pid: std::process::id(), owner_start_time: start, ..PodState::default() };
        assert!(state.owner_lives());
        state.owner_start_time += 1;
        assert!(!state.owner_lives(), "the pid belongs to somebody else by now");
    }
}

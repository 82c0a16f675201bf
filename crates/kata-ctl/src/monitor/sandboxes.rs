//! The pods of this host, as their files tell.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use kata_config::paths;
use serde::{Deserialize, Serialize};

use crate::pod::{ContainerState, PodState};
use crate::start::{self, Start};

/// Starts of ended pods that are told of.
const ENDED: usize = 12;

/// One pod.
#[derive(Clone, Debug, Serialize)]
pub struct Sandbox {
    /// Its name.
    pub id: String,
    /// `creating`, `ready`, `running`, `stopping`, `stopped` or `dead`.
    pub state: String,
    /// The process that owns it.
    pub owner_pid: u32,
    /// Its containers.
    pub containers: Vec<Container>,
    /// What Kubernetes calls it; empty where it is none of its.
    #[serde(flatten)]
    pub cri: Cri,
    /// How it started.
    pub start: Start,
    /// Its directory.
    #[serde(skip)]
    pub run_dir: PathBuf,
    /// Whether its owner lives, so that it can be asked.
    #[serde(skip)]
    pub alive: bool,
}

/// A container of a pod.
#[derive(Clone, Debug, Serialize)]
pub struct Container {
    /// Its name.
    pub id: String,
    /// `created`, `running`, `paused` or `stopped`.
    pub state: String,
    /// Its command line.
    pub args: Vec<String>,
    /// Once stopped.
    pub exit_code: Option<u32>,
}

/// A pod's names in Kubernetes, from the file that its owner leaves.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cri {
    /// UID of the Pod.
    pub cri_uid: String,
    /// Its name.
    pub cri_name: String,
    /// Its namespace.
    pub cri_namespace: String,
}

/// All pods that have a directory, by name.
pub fn list() -> Vec<Sandbox> {
    list_in(&paths::run_dir())
}

fn list_in(dir: &Path) -> Vec<Sandbox> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut sandboxes: Vec<Sandbox> =
        entries.filter_map(|entry| sandbox(entry.file_name().into_string().ok()?, entry.path())).collect();
    sandboxes.sort_by(|one, two| one.id.cmp(&two.id));
    sandboxes
}

/// `None` for a directory that is no pod's.
fn sandbox(id: String, run_dir: PathBuf) -> Option<Sandbox> {
    // A file that is being replaced, or is none: the pod is there all the same.
    let state = PodState::load(&run_dir).ok().flatten();
    if state.is_none() && !run_dir.join("pod.sock").exists() {
        return None;
    }
    let alive = state.as_ref().is_none_or(|state| state.owner_lives() && !state.is_stopped());
    let state = state.unwrap_or_else(|| PodState { state: "creating".to_owned(), ..PodState::default() });
    let start = start::read(&run_dir.join("state.json")).unwrap_or_default();
    let cri = std::fs::read(run_dir.join("kubernetes.json")).unwrap_or_default();
    Some(Sandbox {
        state: word(&state, alive).to_owned(),
        owner_pid: state.owner_pid,
        cri: serde_json::from_slice(&cri).unwrap_or_default(),
        start: Start { id: id.clone(), fault: state.fault, ..start },
        containers: state.containers.into_iter().map(container).collect(),
        id,
        run_dir,
        alive,
    })
}

fn container(told: ContainerState) -> Container {
    Container { id: told.id, state: told.state, args: told.args, exit_code: told.exit_code }
}

fn word(state: &PodState, alive: bool) -> &str {
    let runs = state.containers.iter().any(|container| container.state == "running");
    match state.state.as_str() {
        "stopped" => "stopped",
        _ if !alive => "dead",
        "ready" if runs => "running",
        other => other,
    }
}

/// The last starts of pods that have no directory any more, the newest first.
pub fn ended() -> Vec<Start> {
    let there: BTreeSet<(String, u64)> =
        list().into_iter().map(|sandbox| (sandbox.id, sandbox.start.created_at_ms)).collect();
    start::recent()
        .filter(|start| !there.contains(&(start.id.clone(), start.created_at_ms)))
        .take(ENDED)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(dir: &Path, name: &str, state: &str) {
        let own = dir.join(name);
        std::fs::create_dir_all(&own).unwrap();
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let started = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap();
        let text = format!(
            r#"{{"version": 1, "id": "{name}", "state": "{state}", "owner_pid": {}, "owner_start_time": {started},
            "created_at_ms": 5, "hypervisor": "qemu", "accelerator": "tcg", "fault": null,
            "timeline": [{{"layer": "host", "name": "owner", "start_us": 0, "duration_us": 9}}],
            "containers": [{{"id": "{name}", "state": "running", "args": ["a"]}}]}}"#,
            std::process::id()
        );
        std::fs::write(own.join("state.json"), text).unwrap();
    }

    #[test]
    fn pods_are_listed_by_name_with_state_start_and_their_kubernetes_names() {
        let dir = tempfile::tempdir().unwrap();
        pod(dir.path(), "web", "ready");
        pod(dir.path(), "db", "stopped");
        std::fs::create_dir(dir.path().join(".uids")).unwrap();
        std::fs::write(
            dir.path().join("web/kubernetes.json"),
            r#"{"cri_uid": "u", "cri_name": "n", "cri_namespace": "s"}"#,
        )
        .unwrap();
        let found = list_in(dir.path());
        let words: Vec<_> = found.iter().map(|it| (it.id.as_str(), it.state.as_str(), it.alive)).collect();
        assert_eq!(words, [("db", "stopped", false), ("web", "running", true)]);
        assert_eq!(found[1].start.total_us(), 9);
        let json = serde_json::to_value(&found[1]).unwrap();
        assert_eq!(
            (&json["cri_name"], &json["start"]["timeline"][0]["name"]),
            (&"n".into(), &"owner".into())
        );
        assert!(list_in(&dir.path().join("none")).is_empty());
    }

    #[test]
    fn a_pod_without_its_owner_is_dead_and_a_garbled_state_hides_nobody() {
        let dir = tempfile::tempdir().unwrap();
        pod(dir.path(), "web", "ready");
        let file = dir.path().join("web/state.json");
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, text.replace("\"owner_start_time\": ", "\"owner_start_time\": 9")).unwrap();
        assert_eq!(list_in(dir.path())[0].state, "dead");
        std::fs::write(&file, "{").unwrap();
        std::fs::write(dir.path().join("web/pod.sock"), "").unwrap();
        assert_eq!(list_in(dir.path())[0].state, "creating");
    }
}

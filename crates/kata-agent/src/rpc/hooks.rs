//! Hooks of the guest image, run for every container of the pod.
//!
//! ```text
//!  guest_hook_path/prestart/*     the container is there, its command waits    a failure ends the creation
//!  guest_hook_path/poststart/*    its command runs                             logged
//!  guest_hook_path/poststop/*     it was removed                               logged
//! ```
//!
//! Every executable file in such a directory is one, in the order of names. They run beside the agent, as root of the
//! guest, and read the container's state as JSON from their input, with the init's pid as the agent sees it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use oci_spec::runtime::Spec;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::error::RpcError;
use crate::reaper::{ExitReceiver, ExitStatus, Reaper};

/// How long one may run.
const BOUND: Duration = Duration::from_secs(10);
/// Programs of the guest that hooks may call are found here.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The hooks below one directory.
#[derive(Debug, Default)]
pub struct GuestHooks {
    /// None where empty.
    directory: PathBuf,
    /// The state of each container, but for its status.
    states: Mutex<HashMap<String, Value>>,
}

impl GuestHooks {
    /// Those below `directory`, which is absolute, or empty for none.
    ///
    /// # Errors
    /// [`RpcError::Invalid`] for a relative path; [`RpcError::File`] if it cannot be listed: somebody relies on hooks.
    pub fn below(directory: &str) -> Result<Self, RpcError> {
        let directory = PathBuf::from(directory);
        if !directory.as_os_str().is_empty() {
            if !directory.is_absolute() {
                return Err(RpcError::Invalid(format!("guest_hook_path {directory:?} is not absolute")));
            }
            let listed = std::fs::read_dir(&directory);
            listed.map_err(RpcError::file("listing the hooks of the guest image in", &directory))?;
        }
        Ok(Self { directory, states: Mutex::default() })
    }

    /// Runs those for a container that was made, with its init.
    ///
    /// # Errors
    /// [`RpcError::State`]: the first that failed, and how.
    pub async fn created(&self, reaper: &Reaper, id: &str, init: Pid, spec: &Spec) -> Result<(), RpcError> {
        let hooks = self.list("prestart");
        if self.directory.as_os_str().is_empty() {
            return Ok(());
        }
        let state = json!({
            "ociVersion": spec.version(),
            "id": id,
            "pid": init.as_raw_nonzero().get(),
            "bundle": Path::new(kata_api::guest::CONTAINER_DIR).join(id),
            "annotations": spec.annotations().clone().unwrap_or_default(),
        });
        for hook in hooks {
            run(reaper, &hook, state.clone(), "created").await?;
        }
        self.states().insert(id.to_owned(), state);
        Ok(())
    }

    /// Runs those for a container that was started.
    pub async fn started(&self, reaper: &Reaper, id: &str) {
        let Some(state) = self.states().get(id).cloned() else { return };
        self.run_all(reaper, "poststart", &state, "running").await;
    }

    /// Runs those for a container that is gone.
    pub async fn removed(&self, reaper: &Reaper, id: &str) {
        let Some(mut state) = self.states().remove(id) else { return };
        if let Some(fields) = state.as_object_mut() {
            fields.remove("pid");
        }
        self.run_all(reaper, "poststop", &state, "stopped").await;
    }

    async fn run_all(&self, reaper: &Reaper, kind: &str, state: &Value, status: &str) {
        for hook in self.list(kind) {
            if let Err(error) = run(reaper, &hook, state.clone(), status).await {
                tracing::warn!(kind, error = crate::chain(&error), "a hook of the guest image failed");
            }
        }
    }

    fn states(&self) -> MutexGuard<'_, HashMap<String, Value>> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Executable files of this kind, by name.
    fn list(&self, kind: &str) -> Vec<PathBuf> {
        if self.directory.as_os_str().is_empty() {
            return Vec::new();
        }
        let entries = std::fs::read_dir(self.directory.join(kind)).into_iter().flatten().flatten();
        let executable = |path: &PathBuf| {
            path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
        };
        let mut hooks: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(executable).collect();
        hooks.sort_unstable();
        hooks
    }
}

async fn run(reaper: &Reaper, hook: &Path, mut state: Value, status: &str) -> Result<(), RpcError> {
    if let Some(fields) = state.as_object_mut() {
        fields.insert("status".to_owned(), json!(status));
    }
    let failed = RpcError::file::<std::io::Error>("running the hook of the guest image", hook);
    let (pid, exit) = match spawn(reaper, hook, &state) {
        Ok(spawned) => spawned,
        Err(error) => return Err(failed(error)),
    };
    let said =
        |what: String| RpcError::State(format!("the hook {} of the guest image {what}", hook.display()));
    match tokio::time::timeout(BOUND, exit.wait()).await {
        Ok(ExitStatus::Exited(0)) => Ok(()),
        Ok(ExitStatus::Exited(code)) => Err(said(format!("exited with code {code}"))),
        Ok(ExitStatus::Signaled(signal)) => Err(said(format!("was ended by signal {signal}"))),
        Ok(ExitStatus::Lost) => Err(said("ended unseen".to_owned())),
        Err(_) => {
            let _ = kill_process(pid, Signal::KILL);
            Err(said(format!("did not end within {BOUND:?} and was killed")))
        }
    }
}

/// A file in memory is the input: a hook need not read it.
fn spawn(reaper: &Reaper, hook: &Path, state: &Value) -> std::io::Result<(Pid, ExitReceiver)> {
    let mut input = File::from(memfd_create("state", MemfdFlags::CLOEXEC)?);
    input.write_all(state.to_string().as_bytes())?;
    input.rewind()?;
    let mut command = Command::new(hook);
    command.env_clear().env("PATH", PATH).current_dir("/");
    command.stdin(input).stdout(Stdio::null()).stderr(Stdio::inherit());
    reaper.spawn(&mut command)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hook(dir: &Path, name: &str, text: &str) {
        let path = dir.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn reaper() -> Reaper {
        let reaper = Reaper::new();
        tokio::spawn(reaper.clone().run());
        reaper
    }

    #[tokio::test]
    async fn hooks_of_the_image_run_at_their_moments_in_the_order_of_names() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        let log = at.join("log");
        for name in ["prestart/20-b", "prestart/10-a", "poststart/c", "poststop/d"] {
            hook(at, name, &format!("echo {name} $(cat) >> {}", log.display()));
        }
        std::fs::write(at.join("prestart/00-data"), "not executable").unwrap();
        let (reaper, hooks) = (reaper(), GuestHooks::below(at.to_str().unwrap()).unwrap());
        hooks.created(&reaper, "c1", Pid::INIT, &Spec::default()).await.unwrap();
        hooks.started(&reaper, "c1").await;
        hooks.removed(&reaper, "c1").await;
        hooks.removed(&reaper, "c1").await;
        let told = std::fs::read_to_string(log).unwrap();
        let lines: Vec<(&str, Value)> = told
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(name, state)| (name, serde_json::from_str(state).unwrap()))
            .collect();
        let names: Vec<&str> = lines.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["prestart/10-a", "prestart/20-b", "poststart/c", "poststop/d"]);
        let statuses: Vec<&Value> = lines.iter().map(|(_, state)| &state["status"]).collect();
        assert_eq!(statuses, ["created", "created", "running", "stopped"]);
        assert_eq!((&lines[0].1["id"], &lines[0].1["pid"]), (&json!("c1"), &json!(1)));
        assert_eq!(lines[3].1.get("pid"), None);
    }

    #[tokio::test]
    async fn a_failing_hook_of_the_image_ends_the_creation_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        hook(dir.path(), "prestart/check", "exit 4");
        let hooks = GuestHooks::below(dir.path().to_str().unwrap()).unwrap();
        let error =
            hooks.created(&reaper(), "c1", Pid::INIT, &Spec::default()).await.unwrap_err().to_string();
        assert!(error.contains("prestart/check of the guest image exited with code 4"), "{error}");
    }

    #[tokio::test]
    async fn a_directory_of_hooks_that_the_image_does_not_have_is_an_error_and_none_is_fine() {
        assert!(matches!(GuestHooks::below("/no/such"), Err(RpcError::File { .. })));
        assert!(matches!(GuestHooks::below("hooks"), Err(RpcError::Invalid(_))));
        let none = GuestHooks::below("").unwrap();
        none.created(&reaper(), "c1", Pid::INIT, &Spec::default()).await.unwrap();
    }
}

//! The containers of a pod and their processes: where each is in its life, and what may follow.
//!
//! ```text
//!            start            pause
//!   Created ───────▶ Running ◀─────▶ Paused
//!      │               │  resume       │
//!      └───────────────┴───────────────┴─────▶ Stopped     ended, killed, or its machine died
//! ```

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::{Notify, watch};

use crate::error::SandboxError;
use crate::hooks::Hooks;
use crate::lifecycle::ContainerFiles;
use crate::pod::{ContainerView, Exit, ProcessId, ProcessState, Status, Stdio};
use crate::stdio::Streams;

/// A request for a process that is being carried out. There is at most one at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pending {
    Create,
    Start,
    Pause,
    Resume,
    Delete,
}

impl Pending {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Delete => "delete",
        }
    }
}

/// One process: a container's own, or an exec.
#[derive(Debug)]
pub(crate) struct Process {
    id: ProcessId,
    status: Status,
    pub(crate) pending: Option<Pending>,
    pub(crate) stdio: Stdio,
    /// What an exec is to run. Taken at its start.
    pub(crate) command: Option<Box<oci_spec::runtime::Process>>,
    /// Ends the input, whenever it is opened.
    pub(crate) close_stdin: Arc<Notify>,
    pub(crate) streams: Option<Streams>,
    exit: watch::Sender<Option<Exit>>,
    /// An end that was seen before the answer to the start.
    pub(crate) early_exit: Option<Exit>,
}

impl Process {
    pub(crate) fn new(id: ProcessId, stdio: Stdio) -> Self {
        Self {
            id,
            status: Status::Created,
            pending: None,
            stdio,
            command: None,
            close_stdin: Arc::new(Notify::new()),
            streams: None,
            exit: watch::Sender::new(None),
            early_exit: None,
        }
    }

    pub(crate) fn status(&self) -> Status {
        self.status
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Option<Exit>> {
        self.exit.subscribe()
    }

    /// Goes on to `next`. A step that the picture above does not have is an error and changes nothing.
    pub(crate) fn advance(&mut self, next: Status, action: &'static str) -> Result<(), SandboxError> {
        use Status::{Created, Paused, Running, Stopped};
        match (self.status, next) {
            (Created, Running) | (Running, Paused) | (Paused, Running) => {}
            (Created | Running | Paused, Stopped) => {}
            (status, _) => return Err(self.wrong_status(action, status)),
        }
        tracing::debug!(process = %self.id, from = %self.status, to = %next, "transition");
        self.status = next;
        Ok(())
    }

    /// Ends the process, once. Whoever waits for it is told.
    pub(crate) fn end(&mut self, exit: Exit) -> bool {
        if self.advance(Status::Stopped, "end").is_err() {
            return false;
        }
        self.pending = None;
        self.exit.send_replace(Some(exit));
        true
    }

    /// Takes up a request that needs the process to be in one of `statuses`.
    pub(crate) fn begin(&mut self, action: Pending, statuses: &[Status]) -> Result<(), SandboxError> {
        self.check(action.as_str(), statuses)?;
        self.pending = Some(action);
        Ok(())
    }

    /// Whether the process is in one of `statuses` and nothing else is under way.
    pub(crate) fn check(&self, action: &'static str, statuses: &[Status]) -> Result<(), SandboxError> {
        if let Some(pending) = self.pending {
            return Err(SandboxError::Busy { action, process: self.id.clone(), pending: pending.as_str() });
        }
        if statuses.contains(&self.status) { Ok(()) } else { Err(self.wrong_status(action, self.status)) }
    }

    fn wrong_status(&self, action: &'static str, status: Status) -> SandboxError {
        SandboxError::WrongStatus { action, process: self.id.clone(), status }
    }
}

/// A container: its own process, its execs, its files.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) bundle: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) files: Option<ContainerFiles>,
    /// Known once the container was created.
    pub(crate) hooks: Option<Arc<Hooks>>,
    pub(crate) init: Process,
    pub(crate) execs: BTreeMap<String, Process>,
    /// Ends a creation that is under way, with the signal that ended it.
    pub(crate) cancel: watch::Sender<Option<u32>>,
}

/// Everything that runs in a pod, by name.
#[derive(Debug, Default)]
pub(crate) struct ProcessTable {
    containers: BTreeMap<String, Container>,
}

impl ProcessTable {
    pub(crate) fn insert(&mut self, id: &str, container: Container) -> Result<(), SandboxError> {
        if self.containers.contains_key(id) {
            return Err(SandboxError::ProcessExists(ProcessId::init(id)));
        }
        self.containers.insert(id.to_owned(), container);
        Ok(())
    }

    pub(crate) fn container(&mut self, id: &str) -> Result<&mut Container, SandboxError> {
        self.containers.get_mut(id).ok_or_else(|| SandboxError::UnknownProcess(ProcessId::init(id)))
    }

    pub(crate) fn insert_exec(
        &mut self,
        id: &ProcessId,
        exec: &str,
        process: Process,
    ) -> Result<(), SandboxError> {
        let container = self.container(&id.container)?;
        if container.execs.contains_key(exec) {
            return Err(SandboxError::ProcessExists(id.clone()));
        }
        container.execs.insert(exec.to_owned(), process);
        Ok(())
    }

    pub(crate) fn process(&mut self, id: &ProcessId) -> Result<&mut Process, SandboxError> {
        let unknown = || SandboxError::UnknownProcess(id.clone());
        let container = self.containers.get_mut(&id.container).ok_or_else(unknown)?;
        match &id.exec {
            None => Ok(&mut container.init),
            Some(exec) => container.execs.get_mut(exec).ok_or_else(unknown),
        }
    }

    pub(crate) fn remove(&mut self, id: &ProcessId) -> Option<Container> {
        match &id.exec {
            None => self.containers.remove(&id.container),
            Some(exec) => {
                self.containers.get_mut(&id.container)?.execs.remove(exec);
                None
            }
        }
    }

    pub(crate) fn state(&mut self, id: &ProcessId) -> Result<ProcessState, SandboxError> {
        let bundle = self.container(&id.container).map(|container| container.bundle.clone());
        let process = self.process(id)?;
        Ok(ProcessState {
            status: process.status,
            pid: std::process::id(),
            stdio: process.stdio.clone(),
            exit: process.exit(),
            bundle: bundle?,
        })
    }

    pub(crate) fn containers_mut(&mut self) -> impl Iterator<Item = (&String, &mut Container)> {
        self.containers.iter_mut()
    }

    /// Ends everything that has not ended. The answer names what did.
    pub(crate) fn end_all(&mut self, exit: Exit) -> Vec<ProcessId> {
        let mut ended = Vec::new();
        for container in self.containers.values_mut() {
            for process in container.execs.values_mut().chain([&mut container.init]) {
                if process.end(exit) {
                    ended.push(process.id.clone());
                }
            }
        }
        ended
    }

    pub(crate) fn views(&self) -> Vec<ContainerView> {
        let view = |(id, container): (&String, &Container)| {
            let exit = container.init.exit();
            ContainerView {
                id: id.clone(),
                state: container.init.status,
                args: container.args.clone(),
                exit_code: exit.map(|exit| exit.code),
                exited_at_ms: exit.map(|exit| millis(exit.at)),
            }
        };
        self.containers.iter().map(view).collect()
    }
}

/// Milliseconds since the epoch.
pub(crate) fn millis(at: SystemTime) -> u64 {
    let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Whether `id` may name a container or an exec: it becomes a path on both sides.
pub(crate) fn check_id(id: &str) -> Result<(), SandboxError> {
    let first = id.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    if first && rest && id.len() <= 128 { Ok(()) } else { Err(SandboxError::InvalidId(id.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stopped_is_final() {
        let mut process = Process::new(ProcessId::init("a"), Stdio::default());
        let exit = |code| Exit { code, at: SystemTime::UNIX_EPOCH };
        assert!(process.end(exit(3)));
        assert!(!process.end(exit(4)));
        assert_eq!(process.exit(), Some(exit(3)));
        let error = process.advance(Status::Running, "start").unwrap_err();
        assert_eq!(error.to_string(), "cannot start container a: it is stopped");
    }

    #[test]
    fn created_cannot_be_paused() {
        let mut process = Process::new(ProcessId::init("a"), Stdio::default());
        process.advance(Status::Paused, "pause").unwrap_err();
        assert_eq!(process.status(), Status::Created);
    }

    #[test]
    fn ids_are_plain_names() {
        for good in ["a", "0", "a.b_c-d", &"x".repeat(128)] {
            check_id(good).unwrap();
        }
        for bad in ["", ".", "..", "-a", "a/b", "a b", "ä", &"x".repeat(129)] {
            check_id(bad).unwrap_err();
        }
    }
}

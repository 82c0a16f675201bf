//! Hooks: programs of the host that a container's specification names for moments of its life.
//!
//! | hook | when | on failure |
//! |---|---|---|
//! | `prestart`, `createRuntime` | before the agent makes the container | the creation fails |
//! | `poststart` | after its process was started | logged |
//! | `poststop` | after it was removed, or its creation failed | logged |
//!
//! The first two of the pod's first container make what its network namespace holds (Docker's do), so with a network they
//! run before the machine boots: [`NetworkSpec::hooks`](crate::NetworkSpec). Each gets the container's state as JSON on its
//! input, its arguments and environment exactly as given, and the bundle as its working directory. They run in the
//! runtime's namespaces: not in the pod's network namespace, where the owner is, but in the one it came from. `createContainer` and `startContainer` hooks are programs of the
//! container and not run here: see [`crate::guest_spec`].

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use kata_hypervisor::process::{Exit, Tail};
use oci_spec::runtime::{ContainerState, Hook, Spec, StateBuilder};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;

use crate::pod::NetworkSpec;

/// Bound on a hook that names none: a client waits for it.
const BOUND: Duration = Duration::from_secs(60);
/// How much of a hook's error output is kept.
const OUTPUT: usize = 4096;
/// How long the last of it may take to arrive. Whoever the hook left behind may keep the pipe open for good.
const OUTPUT_LAG: Duration = Duration::from_millis(100);

/// Why a hook did not do what it is for.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It cannot be run.
    #[error("the hook {hook} cannot be run", hook = .hook.display())]
    Spawn {
        /// Its path.
        hook: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It says that it failed.
    #[error("the hook {hook} {exit}{said}", hook = .hook.display())]
    Failed {
        /// Its path.
        hook: PathBuf,
        /// How it ended.
        exit: Exit,
        /// `: ` and the last line of its error output, or nothing.
        said: String,
    },
    /// It took too long.
    #[error("the hook {hook} did not end within {bound:?} and was killed{said}", hook = .hook.display())]
    Timeout {
        /// Its path.
        hook: PathBuf,
        /// Its own bound, or 60 s where it has none.
        bound: Duration,
        /// `: ` and the last line of its error output, or nothing.
        said: String,
    },
}

/// A container's hooks, and what they are told of it.
#[derive(Debug)]
pub(crate) struct Hooks {
    container: Described,
    create: Vec<Hook>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

impl Hooks {
    /// The hooks in `spec`, of the container `id` with this bundle. They run in the network namespace `netns`, if given.
    pub(crate) fn new(id: &str, bundle: &Path, spec: &Spec, netns: Option<Arc<OwnedFd>>) -> Self {
        let container = Described {
            netns,
            version: spec.version().clone(),
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            annotations: spec.annotations().clone().unwrap_or_default(),
        };
        let given = spec.hooks().clone().unwrap_or_default();
        #[allow(deprecated, reason = "deprecated for those who write them; Docker does")]
        let prestart = given.prestart().clone();
        let create = [prestart, given.create_runtime().clone()].into_iter().flatten().flatten().collect();
        let [poststart, poststop] =
            [given.poststart(), given.poststop()].map(|hooks| hooks.clone().unwrap_or_default());
        Self { container, create, poststart, poststop }
    }

    /// Those for the creation were run already.
    pub(crate) fn created(mut self) -> Self {
        self.create.clear();
        self
    }

    /// Runs those for the creation. The first that fails ends it.
    pub(crate) async fn create(&self) -> Result<(), HookError> {
        self.container.run(&self.create, ContainerState::Creating).await
    }

    pub(crate) async fn poststart(&self) {
        self.container.run_all(&self.poststart, ContainerState::Running).await;
    }

    pub(crate) async fn poststop(&self) {
        self.container.run_all(&self.poststop, ContainerState::Stopped).await;
    }
}

/// Runs the hooks that make the network of the pod `id`.
pub(crate) async fn run_network_hooks(id: &str, network: &NetworkSpec) -> Result<(), HookError> {
    let container = Described {
        version: Spec::default().version().clone(),
        id: id.to_owned(),
        bundle: network.bundle.clone(),
        annotations: HashMap::new(),
        netns: network.runtime_netns.clone(),
    };
    container.run(&network.hooks, ContainerState::Creating).await
}

/// A container as hooks see it.
#[derive(Debug)]
struct Described {
    version: String,
    id: String,
    bundle: PathBuf,
    annotations: HashMap<String, String>,
    /// Where the hooks run; `None` where the owner is.
    netns: Option<Arc<OwnedFd>>,
}

impl Described {
    async fn run(&self, hooks: &[Hook], status: ContainerState) -> Result<(), HookError> {
        for hook in hooks {
            tracing::debug!(container = self.id, hook = %hook.path().display(), %status, "running a hook");
            self.run_one(hook, status).await?;
        }
        Ok(())
    }

    async fn run_all(&self, hooks: &[Hook], status: ContainerState) {
        for hook in hooks {
            if let Err(error) = self.run_one(hook, status).await {
                let error = crate::error::chain(&error);
                tracing::warn!(container = self.id, %status, error, "a hook failed");
            }
        }
    }

    async fn run_one(&self, hook: &Hook, status: ContainerState) -> Result<(), HookError> {
        let path = hook.path();
        let failed = |source| HookError::Spawn { hook: path.clone(), source };
        let state = self.state(status).map_err(failed)?;
        let mut child = self.command(hook).spawn().map_err(failed)?;
        let (stdin, stderr) = (child.stdin.take(), child.stderr.take());
        let tail = Tail::new(OUTPUT);
        let reader = tokio::spawn(keep(stderr, tail.clone()));
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A hook need not read it.
                let _ = stdin.write_all(&state).await;
            }
            std::future::pending().await
        };
        let bound = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok());
        let bound = bound.map_or(BOUND, Duration::from_secs);
        let ended = tokio::select! {
            biased;
            ended = tokio::time::timeout(bound, child.wait()) => ended,
            never = feed => never,
        };
        if ended.is_err() {
            // It may have ended just now.
            let _ = child.kill().await;
        }
        let said = last_line(reader, &tail).await;
        match ended {
            Err(_) => Err(HookError::Timeout { hook: path.clone(), bound, said }),
            Ok(Err(source)) => Err(failed(source)),
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(HookError::Failed { hook: path.clone(), exit: exit(status), said }),
        }
    }

    fn command(&self, hook: &Hook) -> Command {
        let args = hook.args().clone().unwrap_or_default();
        let mut command = Command::new(hook.path());
        if let Some((name, rest)) = args.split_first() {
            command.arg0(name).args(rest);
        }
        let env = hook.env().iter().flatten();
        command
            .env_clear()
            .envs(env.map(|pair| pair.split_once('=').unwrap_or((pair, ""))))
            .current_dir(&self.bundle)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let as_usual = || {
            rustix::process::umask(rustix::fs::Mode::WGRP | rustix::fs::Mode::WOTH);
            Ok(())
        };
        // SAFETY: umask is a bare system call: async-signal-safe, without memory of this process.
        unsafe { command.pre_exec(as_usual) };
        if let Some(netns) = self.netns.clone() {
            let enter = move || {
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(netns.as_fd(), kind).map_err(io::Error::from)
            };
            // SAFETY: setns is a bare system call: async-signal-safe, without memory of this process.
            unsafe { command.pre_exec(enter) };
        }
        command
    }

    /// The state that the specification has hooks read from their input.
    fn state(&self, status: ContainerState) -> io::Result<Vec<u8>> {
        let state = StateBuilder::default()
            .version(self.version.as_str())
            .id(self.id.as_str())
            .status(status)
            .bundle(self.bundle.as_path())
            .annotations(self.annotations.clone());
        // A container that ended has no process. Until then it is the owner that stands for it on the host.
        let owner = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        let state = if status == ContainerState::Stopped { state } else { state.pid(owner) };
        serde_json::to_vec(&state.build().map_err(io::Error::other)?).map_err(io::Error::other)
    }
}

/// Reads all of a hook's error output, and keeps the end.
async fn keep(from: Option<impl AsyncRead + Unpin>, tail: Tail) {
    let Some(mut from) = from else { return };
    let mut chunk = [0; 1024];
    while let Ok(count @ 1..) = from.read(&mut chunk).await {
        tail.push(chunk.get(..count).unwrap_or_default());
    }
}

/// The last line that a hook said, as the end of a sentence.
async fn last_line(mut reader: tokio::task::JoinHandle<()>, tail: &Tail) -> String {
    if tokio::time::timeout(OUTPUT_LAG, &mut reader).await.is_err() {
        reader.abort();
    }
    match tail.last_lines(1) {
        line if line.is_empty() => line,
        line => format!(": {}", line.trim()),
    }
}

fn exit(status: std::process::ExitStatus) -> Exit {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, Some(signal)) => Exit::Signal(signal),
        (None, None) => Exit::Unknown,
    }
}

#[cfg(test)]
mod tests;

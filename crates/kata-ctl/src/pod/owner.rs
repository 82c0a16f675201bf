//! The owner process of a pod, as the one who spawns it sees it.
//!
//! The owner takes the pod's name, boots its virtual machine at once, and closes its standard error output when it serves
//! the pod's socket. What it wrote there before is the reason why it does not serve.

use std::io;
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use kata_config::{ArtefactError, Artefacts};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, ChildStderr, Command};

use super::{Client, PodDir};

/// The owner's program.
pub const SHIM: &str = "containerd-shim-kata-v2";
/// Its exit code where the pod's name is taken.
const EXISTS: i32 = 3;
/// Most that is kept of what it says.
const WORDS_LIMIT: u64 = 64 << 10;
/// Bound on its way from serving, or not, to an answer.
const SERVE_BOUND: Duration = Duration::from_secs(30);
/// Bound on its exit after the pod was destroyed.
const EXIT_BOUND: Duration = Duration::from_secs(10);

/// What goes wrong with owners.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// The program is nowhere.
    #[error(transparent)]
    Program(#[from] ArtefactError),
    /// The program does not start.
    #[error("cannot start {}", program.display())]
    Spawn {
        /// Which.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The name is taken.
    #[error("a pod named {0} exists: remove it with `kata-ctl rm -f {0}`, or give another --name")]
    Exists(String),
    /// It did not come to serve the pod.
    #[error("the pod cannot be started: {0}")]
    Failed(String),
    /// It ended badly.
    #[error("the pod's owner ended with {status}; {log} may tell more")]
    Ended {
        /// How.
        status: ExitStatus,
        /// Where to look.
        log: String,
    },
    /// It cannot be waited for.
    #[error("cannot wait for the pod's owner")]
    Wait(#[source] io::Error),
    /// What a dead owner left could not be removed.
    #[error("cannot remove what is left of pod {name}: {words}")]
    Delete {
        /// The pod.
        name: String,
        /// What the program said.
        words: String,
    },
}

/// How to start an owner.
#[derive(Clone, Debug, Default)]
pub struct OwnerOptions {
    /// Configuration file.
    pub config: Option<PathBuf>,
    /// Overrides, `key=value`.
    pub overrides: Vec<String>,
    /// Remove everything at the end.
    pub rm: bool,
}

/// An owner that this process has spawned.
pub struct Owner {
    child: Child,
    stderr: Option<ChildStderr>,
    pod: PodDir,
    /// It has served the pod, so the pod's directories are its own.
    served: bool,
}

impl Owner {
    /// Spawns the owner of `pod` in a session of its own: signals of the terminal are for the client to pass on.
    ///
    /// # Errors
    /// There is no such program, or it does not start.
    pub fn spawn(pod: &PodDir, options: &OwnerOptions) -> Result<Self, OwnerError> {
        let program = Artefacts::program(SHIM)?;
        let mut command = Command::new(&program);
        command.args(["pod", "--id", &pod.name, "--client-pid"]).arg(std::process::id().to_string());
        if let Some(config) = &options.config {
            command.arg("--config").arg(config);
        }
        for assignment in &options.overrides {
            command.arg("--set").arg(assignment);
        }
        if options.rm {
            command.arg("--rm");
        }
        // Not to hold on to the user's directory, which may want to be unmounted.
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // SAFETY: setsid is a bare system call: async-signal-safe, without memory of this process.
        unsafe {
            command.pre_exec(|| Ok(rustix::process::setsid().map(drop)?));
        }
        let mut child = command.spawn().map_err(|source| OwnerError::Spawn { program, source })?;
        let stderr = child.stderr.take();
        Ok(Self { child, stderr, pod: pod.clone(), served: false })
    }

    /// Comes back once the owner serves the pod, with a connection to it.
    ///
    /// # Errors
    /// Why it does not, in its own words.
    pub async fn serving(&mut self) -> Result<Client, OwnerError> {
        let words = tokio::time::timeout(SERVE_BOUND, self.words()).await;
        let words = words
            .unwrap_or_else(|_| format!("its owner does not serve it after {} s", SERVE_BOUND.as_secs()));
        let connected = Client::connect(&self.pod).await;
        match connected {
            // Where the name was taken before, somebody else's owner answers.
            Ok(client) if client.owner().is_some() && client.owner() == self.pid() => {
                self.served = true;
                if !words.is_empty() {
                    tracing::warn!("{words}");
                }
                Ok(client)
            }
            Ok(_) => Err(self.failure(words, None).await),
            Err(unreachable) => Err(self.failure(words, Some(&unreachable)).await),
        }
    }

    fn pid(&self) -> Option<i32> {
        self.child.id().and_then(|pid| i32::try_from(pid).ok())
    }

    /// What the owner says until it serves, or ends.
    async fn words(&mut self) -> String {
        let mut bytes = Vec::new();
        if let Some(stderr) = &mut self.stderr {
            // What could be read counts, whatever ended it.
            let _ = stderr.take(WORDS_LIMIT).read_to_end(&mut bytes).await;
        }
        let text = String::from_utf8_lossy(&bytes);
        let text = text.trim();
        text.strip_prefix(SHIM).and_then(|text| text.strip_prefix(": ")).unwrap_or(text).to_owned()
    }

    async fn failure(&mut self, words: String, unreachable: Option<&super::CallError>) -> OwnerError {
        let status = tokio::time::timeout(EXIT_BOUND, self.child.wait()).await;
        match status {
            Ok(Ok(status)) if status.code() == Some(EXISTS) => OwnerError::Exists(self.pod.name.clone()),
            _ if !words.is_empty() => OwnerError::Failed(words),
            Ok(Ok(status)) => OwnerError::Failed(format!("its owner ended with {status} and no words")),
            _ => {
                let why = unreachable.map(|error| crate::failure::chain(error));
                OwnerError::Failed(why.unwrap_or_else(|| "another owner serves it".to_owned()))
            }
        }
    }

    /// Waits for the owner's exit: then nothing of the pod runs any more.
    ///
    /// # Errors
    /// It ended badly, and what it left may have to be removed.
    pub async fn ended(&mut self) -> Result<(), OwnerError> {
        let status = self.child.wait().await.map_err(OwnerError::Wait)?;
        if status.success() {
            return Ok(());
        }
        Err(OwnerError::Ended { status, log: self.pod.owner_log().display().to_string() })
    }

    /// Ends the pod in whatever state it is, and removes all of it.
    ///
    /// # Errors
    /// Something could not be removed.
    pub async fn abandon(mut self) -> Result<(), OwnerError> {
        // An owner that does not serve yet is waited for: it is about to, or to end by itself.
        match self.serving().await {
            Ok(client) => match client.destroy().await {
                Ok(()) => {
                    drop(client);
                    if tokio::time::timeout(EXIT_BOUND, self.child.wait()).await.is_ok() {
                        return Ok(());
                    }
                }
                Err(error) => tracing::warn!("the pod cannot be ended in good order: {error}"),
            },
            Err(error) => tracing::debug!("{error}"),
        }
        if self.child.kill().await.is_err() {
            tracing::debug!("the owner has ended already");
        }
        // One that never served has removed what it made, and the name may be that of another pod.
        if self.served { delete(&self.pod.name).await } else { Ok(()) }
    }
}

/// Ends the pod called `name`, if it lives, and removes all that it has on this host.
///
/// # Errors
/// What the program that does it says.
pub async fn delete(name: &str) -> Result<(), OwnerError> {
    let program = Artefacts::program(SHIM)?;
    let output = Command::new(&program).args(["delete", "--id", name]).stdin(Stdio::null()).output().await;
    let output = output.map_err(|source| OwnerError::Spawn { program, source })?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.trim().trim_start_matches(SHIM).trim_start_matches(": ").to_owned();
    Err(OwnerError::Delete { name: name.to_owned(), words })
}

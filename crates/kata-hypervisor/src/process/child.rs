//! A running child.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::output::{Tail, capture};

/// How long the output of a dead child is waited for: a grandchild may hold the pipe open for ever.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// How a process has ended. Its `Display` completes the sentence "the process …".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// It ended itself with this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
    /// Somebody else took its exit status.
    Unknown,
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(signal) => write!(f, "was killed by signal {signal}"),
            Self::Unknown => f.write_str("ended in an unknown way"),
        }
    }
}

/// A child process; clones are handles to the same one. Dropping all of them does not end it: that is for [`Child::kill`] and
/// [`super::Record::release`].
#[derive(Clone, Debug)]
pub struct Child(Arc<Process>);

#[derive(Debug)]
struct Process {
    name: String,
    pid: u32,
    pidfd: Arc<AsyncFd<OwnedFd>>,
    output: Tail,
    exit: watch::Receiver<Option<Exit>>,
}

impl Child {
    /// Watches over the process behind `pidfd`, whose output comes from `output`. Must be called inside a tokio runtime.
    pub(super) fn watch(
        name: String,
        pid: u32,
        pidfd: OwnedFd,
        output: OwnedFd,
        limit: usize,
    ) -> io::Result<Self> {
        // SAFETY: an OwnedFd stays the same open descriptor until it is dropped, and the AsyncFd owns it.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
        let pidfd = Arc::new(pidfd);
        let tail = Tail::new(limit);
        let reader =
            tokio::spawn(capture(pipe::Receiver::from_owned_fd(output)?, tail.clone(), name.clone()));
        let (sender, exit) = watch::channel(None);
        tokio::spawn(reap(Arc::clone(&pidfd), reader, sender, name.clone()));
        Ok(Self(Arc::new(Process { name, pid, pidfd, output: tail, exit })))
    }

    /// What it is called in logs and errors.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its process id. May belong to somebody else once [`Child::exit`] is known.
    pub fn pid(&self) -> u32 {
        self.0.pid
    }

    /// Its pidfd: readable once it has ended, and never anybody else.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.0.pidfd.as_fd()
    }

    /// How it has ended; `None` while it runs.
    pub fn exit(&self) -> Option<Exit> {
        *self.0.exit.borrow()
    }

    /// Waits for its end. Any number of callers, at any time.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.0.exit.clone();
        // The sender is gone without a value only when the runtime shuts down.
        let ended = exit.wait_for(Option::is_some).await;
        ended.ok().and_then(|exit| *exit).unwrap_or(Exit::Unknown)
    }

    /// Sends SIGKILL. Does nothing to a process that has ended.
    ///
    /// # Errors
    /// The process has changed its user and this one may not signal it.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// Sends a signal. Does nothing to a process that has ended.
    ///
    /// # Errors
    /// The process has changed its user and this one may not signal it.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(self.pidfd(), signal) {
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    /// The tail of what it wrote to its standard output and standard error.
    pub fn output_tail(&self) -> String {
        self.0.output.text()
    }
}

async fn reap(
    pidfd: Arc<AsyncFd<OwnedFd>>,
    mut output: JoinHandle<()>,
    exit: watch::Sender<Option<Exit>>,
    name: String,
) {
    let status = loop {
        match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) {
            Ok(Some(status)) => {
                let code = status.exit_status().map(Exit::Code);
                let signal = || status.terminating_signal().map(Exit::Signal);
                break code.or_else(signal).unwrap_or(Exit::Unknown);
            }
            Ok(None) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => break Exit::Unknown,
        }
        match pidfd.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => break Exit::Unknown,
        }
    };
    if tokio::time::timeout(LAST_WORDS, &mut output).await.is_err() {
        output.abort();
    }
    tracing::debug!(process = name, "{status}");
    exit.send_replace(Some(status));
}

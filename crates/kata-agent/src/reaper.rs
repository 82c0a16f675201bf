//! Exit statuses of processes, for an agent that adopts every orphan of the guest.
//!
//! ```text
//!  SIGCHLD ──▶ waitid(P_ALL, WNOWAIT): who ended?
//!                 ├─ registered ▶ reaped, its receivers get the status
//!                 └─ unknown    ▶ reaped, kept a while for a registration that comes late
//! ```
//!
//! A container's init reaches the agent by re-parenting and may end before the agent knows its pid; that is why
//! statuses of unknown children are kept. Nobody else in the agent waits for a child.

use std::collections::{HashMap, VecDeque};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, test_kill_process, waitid};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// How many statuses of unknown children are kept, and for how long.
const KEPT: usize = 256;
const KEPT_FOR: Duration = Duration::from_secs(60);

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// It called `exit` with this code.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
    /// It ended before the agent could be its parent, so nobody knows.
    Lost,
}

impl ExitStatus {
    /// The code by the shell's convention: the exit code, 128 + signal, or 255 where unknown.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => code,
            Self::Signaled(signal) => 128 + signal,
            Self::Lost => 255,
        }
    }

    fn of(status: &WaitIdStatus) -> Self {
        match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Self::Exited(code),
            (None, Some(signal)) => Self::Signaled(signal),
            (None, None) => Self::Lost,
        }
    }
}

/// The end of one process, for any number of waiters at any time.
#[derive(Clone, Debug)]
pub struct ExitReceiver(watch::Receiver<Option<ExitStatus>>);

impl ExitReceiver {
    /// Waits until the process has ended.
    pub async fn wait(&self) -> ExitStatus {
        let mut receiver = self.0.clone();
        let ended = receiver.wait_for(Option::is_some).await.map(|status| *status);
        ended.ok().flatten().unwrap_or(ExitStatus::Lost)
    }

    /// The status, if the process has ended.
    #[must_use]
    pub fn status(&self) -> Option<ExitStatus> {
        *self.0.borrow()
    }
}

#[derive(Debug, Default)]
struct Table {
    waiting: HashMap<Pid, watch::Sender<Option<ExitStatus>>>,
    kept: VecDeque<(Pid, ExitStatus, Instant)>,
}

/// The one place that waits for children. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Reaper {
    table: Arc<Mutex<Table>>,
}

impl Reaper {
    /// A reaper that does nothing until [`run`](Self::run) is polled.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Reaps on every SIGCHLD, for as long as it is polled.
    ///
    /// # Errors
    /// Only where the signal handler cannot be installed.
    pub async fn run(self) -> std::io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.reap();
            // Signals that come while this is not waiting, or several at once, count as one: it looks at all children.
            children.recv().await;
        }
    }

    /// The end of the process `pid`, a child of the agent or soon to be one; it may have ended already.
    #[must_use]
    pub fn register(&self, pid: Pid) -> ExitReceiver {
        let mut table = self.table();
        Self::register_in(&mut table, pid)
    }

    /// Spawns `command` with its exit status going to the receiver. The handle that std would wait with is dropped.
    ///
    /// # Errors
    /// What [`Command::spawn`] says; also a pid out of range.
    pub fn spawn(&self, command: &mut Command) -> std::io::Result<(Pid, ExitReceiver)> {
        // Held while spawning: the reaper cannot see the child before it is registered.
        let mut table = self.table();
        let child = command.spawn()?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(Errno::SRCH)?;
        Ok((pid, Self::register_in(&mut table, pid)))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register_in(table: &mut Table, pid: Pid) -> ExitReceiver {
        if let Some(sender) = table.waiting.get(&pid) {
            return ExitReceiver(sender.subscribe());
        }
        let peek = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let ours = waitid(WaitId::Pid(pid), peek).is_ok();
        // A pid that exists is not the one whose status was kept, were it the same number.
        let gone = !ours && test_kill_process(pid) == Err(Errno::SRCH);
        let (sender, receiver) = watch::channel(None);
        if gone {
            let position = table.kept.iter().rposition(|(kept, _, _)| *kept == pid);
            let status = position.and_then(|at| table.kept.remove(at)).map(|(_, status, _)| status);
            sender.send_replace(Some(status.unwrap_or(ExitStatus::Lost)));
        } else {
            table.waiting.insert(pid, sender);
        }
        ExitReceiver(receiver)
    }

    /// Takes every status that can be taken now.
    fn reap(&self) {
        while let Some(pid) = ended_child() {
            Self::take(&mut self.table(), pid);
        }
    }

    fn take(table: &mut Table, pid: Pid) {
        let Ok(Some(status)) = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOHANG) else {
            return;
        };
        let status = ExitStatus::of(&status);
        if let Some(sender) = table.waiting.remove(&pid) {
            sender.send_replace(Some(status));
            return;
        }
        tracing::trace!(pid = pid.as_raw_nonzero().get(), ?status, "reaped an orphan");
        table.kept.retain(|(kept, _, at)| *kept != pid && at.elapsed() < KEPT_FOR);
        if table.kept.len() >= KEPT {
            table.kept.pop_front();
        }
        table.kept.push_back((pid, status, Instant::now()));
    }
}

/// A child that has ended and was not reaped. (rustix does not tell whose status it returns.)
fn ended_child() -> Option<Pid> {
    let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
    // SAFETY: siginfo_t is plain data for which all zeroes is a valid value.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: `info` is a valid place for the kernel to write to for the length of the call.
    if unsafe { libc::waitid(libc::P_ALL, 0, &raw mut info, flags) } != 0 {
        return None;
    }
    // SAFETY: waitid filled the fields that SIGCHLD has, or left zeroes where no child has ended.
    Pid::from_raw(unsafe { info.si_pid() })
}

#[cfg(test)]
mod tests;

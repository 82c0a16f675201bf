//! The processes of one machine from their start to their end, and why they ended.
//!
//! ```text
//!   adopt(child) … ─▶ abandon: every child is killed and waited for
//!                     end(VmExit): published once, for all who wait in exited()
//! ```
//!
//! [`Life`] is for any driver; [`Vmm`] is the rest of what drivers share whose machines are a single process.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::process::{Child, Exit, Tail};
use crate::vm::{HypervisorError, ProcessInfo, VmExit};

/// How much of the guest's console is kept.
pub(crate) const CONSOLE_LIMIT: usize = 64 * 1024;
/// How many of the console's last lines explain a panic.
const PANIC_LINES: usize = 30;
/// What every Linux kernel says first when it panics.
const PANIC: &str = "Kernel panic - not syncing";
/// When an answer fails because a process ends, its end is known a moment later; so is the last of what it said, and the end of
/// another that it takes along.
pub(crate) const SETTLE: Duration = Duration::from_millis(300);

/// What a driver and its supervisor have in common.
#[derive(Debug)]
pub(crate) struct Life {
    processes: Mutex<Processes>,
    /// What the guest writes to its console.
    pub console: Tail,
    exit: watch::Sender<Option<VmExit>>,
}

#[derive(Debug, Default)]
struct Processes {
    stopping: bool,
    /// The guest has ended itself, and the VMM would start it again.
    reset: bool,
    children: Vec<Child>,
}

impl Default for Life {
    fn default() -> Self {
        Self { processes: Mutex::default(), console: Tail::new(CONSOLE_LIMIT), exit: watch::channel(None).0 }
    }
}

impl Life {
    fn lock(&self) -> MutexGuard<'_, Processes> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes charge of a new process, or ends it where the machine is being stopped.
    pub(crate) fn adopt(&self, child: &Child) {
        let mut processes = self.lock();
        processes.children.push(child.clone());
        if processes.stopping {
            kill(child);
        }
    }

    /// All processes there ever were.
    #[cfg(test)]
    pub(crate) fn children(&self) -> Vec<Child> {
        self.lock().children.clone()
    }

    /// Whether its owner has had enough of it.
    pub(crate) fn stopping(&self) -> bool {
        self.lock().stopping
    }

    /// Ends every process and waits until they are gone.
    pub(crate) async fn abandon(&self) {
        let children = {
            let mut processes = self.lock();
            processes.stopping = true;
            processes.children.clone()
        };
        children.iter().for_each(kill);
        for child in children {
            child.wait().await;
        }
    }

    /// Publishes how the machine ended.
    pub(crate) fn end(&self, exit: VmExit) {
        self.exit.send_replace(Some(exit));
    }

    /// That it has ended, as an error for whoever wants something of it.
    pub(crate) fn check(&self) -> Result<(), HypervisorError> {
        self.exit.borrow().clone().map_or(Ok(()), |exit| Err(HypervisorError::Ended(exit)))
    }

    /// See [`crate::Vm::exited`].
    pub(crate) async fn exited(&self) -> VmExit {
        let mut exit = self.exit.subscribe();
        let ended = exit.wait_for(Option::is_some).await;
        match ended.ok().and_then(|exit| exit.clone()) {
            Some(exit) => exit,
            None => std::future::pending().await,
        }
    }

    /// See [`crate::Vm::processes`].
    pub(crate) fn processes(&self) -> Vec<ProcessInfo> {
        let processes = self.lock();
        let alive = processes.children.iter().filter(|child| child.exit().is_none());
        alive.map(|child| ProcessInfo { name: child.name().to_owned(), pid: child.pid() }).collect()
    }

    /// Why the VMM ended, from its exit, what it said, and what the guest said; `panicked` where something else told of a panic.
    pub(crate) fn verdict(&self, exit: Exit, output: &str, panicked: bool) -> VmExit {
        match exit {
            Exit::Signal(signal) => VmExit::Signal(signal),
            Exit::Unknown => VmExit::Code(-1, "its exit status was taken by another process".to_owned()),
            // A guest that panics resets itself, as one that wants to end does; the console tells them apart.
            Exit::Code(0) if panicked || self.console.text().contains(PANIC) => {
                VmExit::GuestPanic(self.console.last_lines(PANIC_LINES))
            }
            Exit::Code(0) => VmExit::Clean,
            Exit::Code(code) => VmExit::Code(code, output.to_owned()),
        }
    }

    /// The guest has ended itself by a reset: the VMM is ended before it starts the guest anew.
    pub(crate) fn guest_reset(&self, vmm: &Child) {
        self.lock().reset = true;
        kill(vmm);
    }

    /// Waits until the one VMM of the machine has ended, and publishes the reason. `readers` are the tasks that read what it says.
    pub(crate) async fn supervise(&self, vmm: Child, readers: Vec<JoinHandle<()>>) {
        let exit = vmm.wait().await;
        let stopping = self.stopping();
        for reader in readers {
            // A reader that does not come to an end has nothing more to say.
            let _ = tokio::time::timeout(SETTLE, reader).await;
        }
        let exit = if self.lock().reset { Exit::Code(0) } else { exit };
        let verdict = match stopping {
            true => VmExit::Stopped,
            false => self.verdict(exit, &vmm.output_tail(), false),
        };
        tracing::debug!(%verdict, "virtual machine has ended");
        self.end(verdict);
    }
}

/// One VMM of a single process, which is driven by way of `A`. Whoever watches its life does not hold on to that.
#[derive(Debug)]
pub(crate) struct Vmm<A> {
    pub life: Arc<Life>,
    state: Mutex<State<A>>,
}

#[derive(Debug)]
struct State<A> {
    started: bool,
    api: Option<A>,
}

impl<A> Default for Vmm<A> {
    fn default() -> Self {
        Self { life: Arc::default(), state: Mutex::new(State { started: false, api: None }) }
    }
}

impl<A: Clone> Vmm<A> {
    fn state(&self) -> MutexGuard<'_, State<A>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A machine is started once.
    pub(crate) fn begin(&self) -> Result<(), HypervisorError> {
        match std::mem::replace(&mut self.state().started, true) {
            true => Err(HypervisorError::WrongState { operation: "boot", state: "was started already" }),
            false => Ok(()),
        }
    }

    /// The guest runs.
    pub(crate) fn runs(&self, api: A) {
        self.state().api = Some(api);
    }

    /// The interface of a machine that runs.
    pub(crate) fn control(&self, operation: &'static str) -> Result<A, HypervisorError> {
        self.life.check()?;
        let api = self.state().api.clone();
        api.ok_or(HypervisorError::WrongState { operation, state: "is not started" })
    }

    /// Why the guest does not run: that the VMM has ended says more than that it did not answer.
    pub(crate) async fn explain(
        &self,
        error: HypervisorError,
        program: &Path,
        vmm: &Child,
    ) -> HypervisorError {
        if self.life.stopping() {
            return HypervisorError::Ended(VmExit::Stopped);
        }
        match tokio::time::timeout(SETTLE, vmm.wait()).await {
            Ok(exit) => {
                HypervisorError::Refused { program: program.to_owned(), exit, output: vmm.output_tail() }
            }
            Err(_) => error,
        }
    }
}

/// Our own children can always be killed: only one that has changed to root without us could not.
pub(crate) fn kill(child: &Child) {
    if let Err(error) = child.kill() {
        tracing::warn!(process = child.name(), pid = child.pid(), %error, "process cannot be killed");
    }
}

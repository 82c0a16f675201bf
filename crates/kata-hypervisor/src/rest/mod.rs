//! What the drivers of VMMs with an HTTP interface have in common.
//!
//! ```text
//!   boot: room ─▶ VMM ─▶ requests over HTTP ─▶ guest runs
//!                  │
//!       supervisor: the VMM ends, or the guest resets itself ─▶ VmExit
//! ```

mod client;
#[cfg(test)]
pub(crate) mod fake;
mod room;

use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::task::JoinHandle;

pub use self::client::ApiError;
pub(crate) use self::client::{Address, Call, Client};
pub(crate) use self::room::{Named, Room};
use crate::life::{Life, kill};
use crate::process::Child;
use crate::vm::{HypervisorError, VmExit, VmSpec};

/// When an answer fails because the VMM ends, its end is known a moment later; and so is the last of what it said.
const SETTLE: Duration = Duration::from_millis(300);

/// One VMM that is driven over HTTP by `A`.
#[derive(Debug)]
pub(crate) struct Vmm<A> {
    pub life: Life,
    state: Mutex<State<A>>,
}

#[derive(Debug)]
struct State<A> {
    started: bool,
    /// The guest has ended itself, and the VMM would start it again.
    reset: bool,
    api: Option<A>,
}

impl<A> Default for Vmm<A> {
    fn default() -> Self {
        Self { life: Life::default(), state: Mutex::new(State { started: false, reset: false, api: None }) }
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

    /// The guest has ended itself by a reset: the VMM is ended before it starts the guest anew.
    pub(crate) fn guest_reset(&self, vmm: &Child) {
        self.state().reset = true;
        kill(vmm);
    }

    /// Waits until the VMM has ended, and publishes the reason. `readers` are the tasks that read what it says.
    pub(crate) async fn supervise(&self, vmm: Child, readers: Vec<JoinHandle<()>>) {
        let exit = vmm.wait().await;
        for reader in readers {
            // A reader that does not come to an end has nothing more to say.
            let _ = tokio::time::timeout(SETTLE, reader).await;
        }
        let exit = if self.state().reset { crate::process::Exit::Code(0) } else { exit };
        let verdict = match self.life.stopping() {
            true => VmExit::Stopped,
            false => self.life.verdict(exit, &vmm.output_tail(), false),
        };
        tracing::debug!(%verdict, "virtual machine has ended");
        self.life.end(verdict);
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

/// What makes no machine with any of these VMMs.
pub(crate) fn check(spec: &VmSpec, driver: &'static str) -> Result<(), HypervisorError> {
    let reason = match spec {
        VmSpec { vcpus: 0, .. } => "it has no virtual CPU",
        VmSpec { memory_mib: ..64, .. } => "it has less than 64 MiB of memory, which boots no guest",
        VmSpec { initrd: None, image: None, .. } => "it has neither an initrd nor an image to boot from",
        VmSpec { accelerator: crate::Accelerator::Tcg, .. } => {
            return Err(unsupported("running a guest without KVM", driver, "use hypervisor_name = \"qemu\""));
        }
        _ => match spec.nics.iter().find_map(|nic| Some((nic, nic.fault()?))) {
            Some((nic, reason)) => {
                return Err(HypervisorError::InvalidDevice { id: nic.id.clone(), reason });
            }
            None => return Ok(()),
        },
    };
    Err(HypervisorError::InvalidSpec { id: spec.id.clone(), reason: reason.to_owned() })
}

/// That `driver` cannot do `operation`, and what to do about it.
pub(crate) fn unsupported(operation: &'static str, driver: &str, next: &str) -> HypervisorError {
    HypervisorError::Unsupported { operation, driver: format!("{driver}; {next}") }
}

/// The threads of process `pid` that run the guest's CPUs, in the order of the CPUs: those called `name` and a number.
pub(crate) fn vcpu_threads(pid: u32, name: &str) -> Vec<u32> {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut found: Vec<(u32, u32)> = threads
        .filter_map(|thread| {
            let comm = std::fs::read_to_string(thread.path().join("comm")).ok()?;
            let cpu = comm.trim_end().strip_prefix(name)?.trim_start().parse().ok()?;
            Some((cpu, thread.file_name().to_str()?.parse().ok()?))
        })
        .collect();
    found.sort_unstable();
    found.into_iter().map(|(_, thread)| thread).collect()
}

#[cfg(test)]
mod tests;

//! The last restrictions of a process, which it puts on by itself: seccomp and the final capability sets.
//!
//! A container's command has them, and so have the hooks that run right before it (`startContainer`): they are programs of the
//! container's image, which its profile is there to hold.

use std::io;

use rustix::thread::CapabilitySet;

use super::capabilities::CapabilityPlan;
use super::plan::ProcessPlan;
use super::seccomp::Filter;
use super::wire::Failure;

/// What a process is held to from now on.
#[derive(Clone, Debug)]
pub(super) struct Restrictions {
    capabilities: CapabilityPlan,
    no_new_privileges: bool,
    filter: Option<Filter>,
    /// Kept in reserve to put the filter on.
    permitted: CapabilitySet,
}

impl Restrictions {
    /// Those of `process`, which has `permitted` capabilities now and has set `no_new_privs` where that is asked for.
    pub(super) fn new(process: &ProcessPlan, filter: Option<&Filter>, permitted: CapabilitySet) -> Self {
        let (capabilities, no_new_privileges) = (process.capabilities, process.no_new_privileges);
        Self { capabilities, no_new_privileges, filter: filter.cloned(), permitted }
    }

    /// Puts them on this process, for good. Allocates nothing after the filter is on: it may forbid what an allocator calls.
    pub(super) fn put_on(&self) -> Result<(), Failure> {
        let install = |filter: &Filter| {
            filter.install().map_err(|error| Failure::setup("install the seccomp filter", error))
        };
        let apply = || {
            let applied = self.capabilities.apply();
            applied.map_err(|error| Failure::setup("set the capabilities", error))
        };
        reset_signals();
        match &self.filter {
            Some(filter) if self.no_new_privileges => {
                apply()?;
                install(filter)
            }
            Some(filter) => {
                let regained = CapabilityPlan::regain(self.permitted);
                regained.map_err(|error| Failure::setup("regain the capabilities", error))?;
                install(filter)?;
                apply()
            }
            None => apply(),
        }
    }

    /// The same in a process that was forked to execute something: there only the error's number gets back.
    pub(super) fn put_on_child(&self) -> io::Result<()> {
        self.put_on().map_err(|failure| match failure {
            Failure::Setup { errno, .. } if errno != 0 => io::Error::from_raw_os_error(errno),
            _ => io::ErrorKind::InvalidInput.into(),
        })
    }
}

/// Ignored signals and the mask are inherited over `execve`; a container starts with the defaults.
fn reset_signals() {
    // By system calls: libc keeps two signals to itself, which an ancestor may ignore all the same. All zeroes is the
    // default action without flags and the empty set; the kernel's `struct sigaction` is not larger on any machine.
    let zeroes = [0_u64; 8];
    let none = std::ptr::null_mut::<u64>();
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: `zeroes` is valid for the call, and the default action calls no code. KILL and STOP refuse it.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, zeroes.as_ptr(), none, SIGNAL_SET) };
    }
    // SAFETY: `zeroes` is valid for the length of the call.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, zeroes.as_ptr(), none, SIGNAL_SET) };
}

/// Bytes of the kernel's signal set: 64 signals.
const SIGNAL_SET: usize = 8;

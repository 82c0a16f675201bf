//! Processes that do not outlive xtask, however it ends.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

use crate::Chores;
use crate::shell::ChoreError;

/// In the environment of what the lab starts: the id of its xtask, for whoever looks for the lab's processes.
const MARK: &str = "KATA_LAB";

/// Has the kernel kill the process when this thread ends, and keeps the terminal's Ctrl-C from it: that is xtask's.
///
/// The caller's thread must be the main one, whose end is xtask's.
pub fn tied(command: &mut Command) -> &mut Command {
    let parent = getpid();
    command.process_group(0);
    // SAFETY: the closure makes two system calls, allocates nothing and touches no memory of the parent's.
    unsafe { command.pre_exec(move || tie(parent)) }
}

fn tie(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before the kernel was asked.
    if getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
}

/// Starts a tied process that inherits `fds` beside its standard streams.
pub fn spawn(command: &mut Command, fds: &[&dyn AsFd]) -> Chores<Child> {
    let program = command.get_program().to_string_lossy().into_owned();
    let failed = |source| ChoreError::Start { program, source };
    if let Err(errno) = fds.iter().try_for_each(|fd| fcntl_setfd(fd, FdFlags::empty())) {
        return Err(failed(errno.into()));
    }
    command.env(MARK, std::process::id().to_string());
    let child = tied(command).spawn();
    for fd in fds {
        let _ = fcntl_setfd(fd, FdFlags::CLOEXEC);
    }
    child.map_err(failed)
}

/// The number that a child knows a descriptor by.
pub fn number(fd: &impl AsFd) -> RawFd {
    fd.as_fd().as_raw_fd()
}

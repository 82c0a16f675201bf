//! The one way a child process is started, watched, ended and recorded.
//!
//! ```text
//!   Spawn ──fork──▶ child: fds at 3, 4, … · namespaces · limits · identity · no_new_privs
//!     │               │ waits
//!     ├─ Record ◀── pid and start time, on disk before the program runs
//!     │               │ goes on ▶ exec
//!     └─▶ Child: pidfd, wait() for many, kill(), the tail of its output
//! ```
//!
//! A child gets the file descriptors named and no other, an empty environment but for what is named, `/dev/null` as standard
//! input, no controlling terminal, and no way to gain privileges. The pid is in the [`Record`] before the program's first
//! instruction: whoever dies in between, nothing is left behind that nobody knows of.

mod child;
mod exec;
pub mod identity;
mod output;
mod record;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use child::{Child, Exit};
pub use exec::SpawnError;
pub(crate) use output::capture;
pub use output::{Tail, printable};
pub use record::{Record, RecordError, Released};

/// Who a child runs as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// User id, for real, effective and saved. Anyone but 0 loses every capability, the bounding set included.
    pub uid: u32,
    /// Group id, for real, effective and saved.
    pub gid: u32,
    /// Supplementary groups, exactly.
    pub groups: Vec<u32>,
}

impl Identity {
    /// Who this process runs as, without supplementary groups.
    pub fn current() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            groups: Vec::new(),
        }
    }
}

/// Namespaces of its own that a child gets. Needs `CAP_SYS_ADMIN`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Mounts. What the child mounts stays with it; what the host unmounts goes away in the child too, so that the child
    /// keeps no file system busy.
    pub mount: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Network: an empty one, with a loopback that is down.
    pub network: bool,
    /// Processes: the child is the first of its own and sees no other. It does not die of signals that it sends itself, nor of
    /// any but SIGKILL that others do, unless it has a handler.
    pub pid: bool,
}

/// A child to be started.
#[derive(Debug)]
pub struct Spawn {
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    inherit: Vec<OwnedFd>,
    identity: Option<Identity>,
    namespaces: Namespaces,
    open_files: u64,
    output_limit: usize,
}

/// First number that inherited file descriptors get in a child.
pub const FIRST_FD: i32 = 3;

impl Spawn {
    /// A child called `name` in logs, errors and the record, running the executable at `program` (a path: `PATH` is not searched).
    pub fn new(name: impl Into<String>, program: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            inherit: Vec::new(),
            identity: None,
            namespaces: Namespaces::default(),
            open_files: 1024,
            output_limit: 16 * 1024,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<OsString>) -> Self {
        self.args.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }

    /// Adds a variable to the environment, which is empty otherwise.
    #[must_use]
    pub fn env(mut self, key: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// Hands `fd` to the child, at the next free number from [`FIRST_FD`] up. This process's copy is closed at the latest when
    /// [`Spawn::spawn`] returns. Where the number matters, use [`Spawn::hand_over`].
    #[must_use]
    pub fn inherit(mut self, fd: impl Into<OwnedFd>) -> Self {
        self.hand_over(fd);
        self
    }

    /// Like [`Spawn::inherit`], and tells the number that `fd` has in the child.
    pub fn hand_over(&mut self, fd: impl Into<OwnedFd>) -> i32 {
        let number = self.next_fd();
        self.inherit.push(fd.into());
        number
    }

    /// First number above those of the child's descriptors.
    fn next_fd(&self) -> i32 {
        i32::try_from(self.inherit.len()).map_or(i32::MAX, |count| FIRST_FD.saturating_add(count))
    }

    /// Who the child runs as; unset: who this process runs as, with its capabilities.
    #[must_use]
    pub fn identity(mut self, identity: Identity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// Which namespaces of its own the child gets; unset: none.
    #[must_use]
    pub fn namespaces(mut self, namespaces: Namespaces) -> Self {
        self.namespaces = namespaces;
        self
    }

    /// Limit of open files, soft and hard; unset: 1024. Never above this process's own hard limit.
    #[must_use]
    pub fn open_files(mut self, limit: u64) -> Self {
        self.open_files = limit;
        self
    }

    /// How many bytes of its output [`Child::output_tail`] keeps; unset: 16 KiB.
    #[must_use]
    pub fn output_limit(mut self, bytes: usize) -> Self {
        self.output_limit = bytes;
        self
    }

    /// Starts the child. Comes back once the program was executed; must be called inside a tokio runtime, which watches over it.
    ///
    /// # Errors
    /// [`SpawnError`] names the program and the step that failed. No process is left then.
    pub fn spawn(self, record: &Record) -> Result<Child, SpawnError> {
        exec::spawn(self, record)
    }
}

#[cfg(test)]
mod tests;

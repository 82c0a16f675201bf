//! What a VMM gives up before it reads the first byte from anybody.
//!
//! ```text
//!   started with its own PID namespace, one socket, /dev/kvm as a descriptor
//!     │ mount, network, IPC, UTS and cgroup namespaces        everything the host has is out of sight
//!     │ an empty read-only root, /sockets alone bound in      no file, no device node, no /proc
//!     │ the user it is to be, in a user namespace of its own  no file of the host's is its own
//!     │ limits, not dumpable                                  no core file, no fork bomb, nobody looks into it
//!     │ no capabilities, no new privileges                    for good
//!     │ Landlock                                              no path, no port, no signal beyond it
//!     ▼ a system call filter for each thread                  see `seccomp`
//!   serves
//! ```
//!
//! What needs privileges on the host comes first, so the mount namespace stays the host's: with all capabilities in its own user
//! namespace the process could still not mount or unmount anything. Whoever starts it without privileges gets the same, with the
//! user namespace first, where the host lets ordinary users have one.
//!
//! A step that fails is an error that names it: there is no half a jail. `--no-jail` has none at all.

mod privileges;
mod root;

use std::path::{Path, PathBuf};

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;
use thiserror::Error;

pub use privileges::User;

/// Where a jailed process finds its directory of sockets.
pub const SOCKETS: &str = "/sockets";

/// How a process is to be confined.
#[derive(Clone, Debug, Default)]
pub struct Jail {
    /// Who it becomes; unset: it stays who it is.
    pub user: Option<User>,
    /// The one directory that it can still reach, at [`SOCKETS`], to connect to what listens there.
    pub sockets: Option<PathBuf>,
}

/// Which part of the jail cannot be had.
#[derive(Debug, Error)]
pub enum JailError {
    /// The process that starts this one makes it.
    #[error(
        "it is not the first process of a PID namespace of its own; start it in one, as the runtime does (by hand: unshare --fork \
         --pid kata-vmm run …), or add --no-jail"
    )]
    PidNamespace,
    /// A step that the kernel or its configuration refused.
    #[error("it cannot {step}{hint}; --no-jail goes on without any confinement")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why that may be, with a semicolon before it; empty where there is nothing to add.
        hint: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The directory of sockets.
    #[error("the directory of sockets {path:?} cannot be used", path = .path.display())]
    Sockets {
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Landlock failed.
    #[error("it cannot be confined by Landlock; --no-jail goes on without any confinement")]
    Landlock(#[from] landlock::RulesetError),
    /// The kernel has no Landlock.
    #[error(
        "the kernel has no Landlock (since Linux 5.13, and listed in /sys/kernel/security/lsm); --no-jail goes on without any \
         confinement"
    )]
    NoLandlock,
}

/// Why new namespaces may be refused.
const NO_USERNS: &str = "; as an ordinary user it needs user.max_user_namespaces above 0, and no kernel.unprivileged_userns_clone=0 \
                         or kernel.apparmor_restrict_unprivileged_userns=1";

impl Jail {
    /// Confines this process, for good, but for its system calls, which `seccomp` does. It must have one thread: another would keep
    /// what this one gives up.
    ///
    /// # Errors
    /// [`JailError`] names the step. The process must not go on then: some of it is done.
    pub fn enter(&self) -> Result<(), JailError> {
        if rustix::process::getpid() != rustix::process::Pid::INIT {
            return Err(JailError::PidNamespace);
        }
        self.confine()
    }

    /// All but the PID namespace, which cannot be changed from inside.
    ///
    /// # Errors
    /// As those of [`Jail::enter`].
    pub fn confine(&self) -> Result<(), JailError> {
        // The directory is held as the working directory, which follows into the new mount namespace as no descriptor does.
        if let Some(path) = &self.sockets {
            let fault = |source| JailError::Sockets { path: path.clone(), source };
            std::env::set_current_dir(path).map_err(fault)?;
        }
        let root = rustix::process::geteuid().is_root();
        if !root {
            privileges::own_user_namespace()?;
        }
        let all = UnshareFlags::NEWNS
            | UnshareFlags::NEWNET
            | UnshareFlags::NEWIPC
            | UnshareFlags::NEWUTS
            | UnshareFlags::NEWCGROUP;
        // SAFETY: namespaces are the new ones of this process alone; the descriptor table is not among them.
        unsafe { rustix::thread::unshare_unsafe(all) }
            .map_err(step("make mount, network, IPC, UTS and cgroup namespaces", NO_USERNS))?;
        let proc = root::enter(self.sockets.as_deref().map(|_| Path::new(SOCKETS)))?;
        if root {
            privileges::become_user(self.user)?;
            privileges::user_namespace(&proc)?;
        }
        drop(proc);
        privileges::limit()?;
        privileges::give_up()?;
        landlock()?;
        is_closed()
    }
}

/// Denies every path, every port and every signal to what is outside. What is newer than the running kernel is left out, for the
/// empty root, the empty network namespace and the PID namespace hold the same lines.
fn landlock() -> Result<(), JailError> {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V5))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .restrict_self()?;
    match status.ruleset {
        landlock::RulesetStatus::NotEnforced => Err(JailError::NoLandlock),
        landlock::RulesetStatus::FullyEnforced | landlock::RulesetStatus::PartiallyEnforced => Ok(()),
    }
}

/// Looks whether Landlock holds: the root is there and belongs to everybody, and cannot be listed.
fn is_closed() -> Result<(), JailError> {
    match std::fs::read_dir("/") {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        Ok(_) | Err(_) => Err(JailError::NoLandlock),
    }
}

fn step(step: &'static str, hint: &'static str) -> impl FnOnce(Errno) -> JailError {
    move |errno| JailError::Step { step, hint, source: errno.into() }
}

//! The terminal of a container's process: a pair in the container's own devpts, so that the process finds it there by
//! its name.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, ResolveFlags, fstatfs, openat2};
use rustix::io::Errno;
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use super::plan::TerminalPlan;
use super::tree::Tree;
use super::wire::Failure;

/// A new pseudo terminal. Neither side is anybody's controlling terminal yet.
#[derive(Debug)]
pub(super) struct Terminal {
    /// For the agent.
    pub master: OwnedFd,
    /// For the process.
    pub slave: OwnedFd,
}

const DEVPTS_MAGIC: u64 = 0x1cd1;

impl Terminal {
    /// Opens one in the devpts of `tree`, whose mounts are those of this process.
    pub(super) fn open(tree: &Tree, plan: TerminalPlan) -> Result<Self, Failure> {
        let failed = |error: Errno| Failure::setup("open a terminal in /dev/pts of the container", error);
        let pts = match tree.find(Path::new("/dev/pts")) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Err(no_devpts()),
            result => result.map_err(failed)?,
        };
        if u64::try_from(fstatfs(&pts).map_err(failed)?.f_type) != Ok(DEVPTS_MAGIC) {
            return Err(no_devpts());
        }
        Self::in_devpts(pts.as_fd(), plan).map_err(failed)
    }

    /// Not by `/dev/ptmx`: processes of the container may have put anything there, while nobody makes files in a
    /// devpts, and a mount on top of one is not followed.
    fn in_devpts(pts: BorrowedFd<'_>, plan: TerminalPlan) -> Result<Self, Errno> {
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let plain = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let master = openat2(pts, "ptmx", flags, Mode::empty(), plain)?;
        unlockpt(&master)?;
        let slave =
            ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        let TerminalPlan { rows, columns } = plan;
        tcsetwinsize(&slave, Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 })?;
        Ok(Self { master, slave })
    }
}

fn no_devpts() -> Failure {
    Failure::Invalid {
        key: "process.terminal".to_owned(),
        reason: "the container has no devpts at /dev/pts".to_owned(),
    }
}

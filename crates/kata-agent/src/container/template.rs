//! The agent's end of the template process: the one that all helpers are forked from.
//!
//! It is this executable once more, started when the engine is, and does nothing but fork. Executing the agent anew for
//! each request would cost several times as much as all the rest of an `exec`: a megabyte of pages to map and relocate,
//! and under emulation all its code to translate again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use rustix::fs::CWD;
use rustix::mount::MountAttrFlags;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use tokio::net::UnixStream;

use super::HELPER_NAME;
use super::filesystem::{Change, change, clone_mount};
use super::wire;
use crate::reaper::Reaper;

/// Where helpers come from.
pub(super) struct Template {
    program: PathBuf,
    /// Keeps the read-only view of this executable that `program` names.
    _sealed: Option<OwnedFd>,
    reaper: Reaper,
    /// The process reads from the other end until this one closes.
    requests: Mutex<OwnedFd>,
}

impl Template {
    /// Starts the process: `program`, or else this executable.
    pub(super) fn start(program: Option<PathBuf>, reaper: Reaper) -> io::Result<Self> {
        let (program, sealed) = match program {
            Some(program) => (program, None),
            None => {
                let (program, view) = sealed_executable()?;
                (program, Some(view))
            }
        };
        let requests = Mutex::new(spawn(&program, &reaper)?);
        Ok(Self { program, _sealed: sealed, reaper, requests })
    }

    /// A new helper, by the socket to talk to it. Starts the process again if it has been killed.
    pub(super) fn helper(&self) -> io::Result<UnixStream> {
        let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        // Ours alone: the helper waits.
        rustix::io::ioctl_fionbio(&ours, true)?;
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = wire::send_socket(requests.as_fd(), theirs.as_fd()) {
            tracing::warn!(%error, "the template process is gone and is started again");
            *requests = spawn(&self.program, &self.reaper)?;
            wire::send_socket(requests.as_fd(), theirs.as_fd())?;
        }
        UnixStream::from_std(ours.into())
    }
}

fn spawn(program: &Path, reaper: &Reaper) -> io::Result<OwnedFd> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let mut command = Command::new(program);
    command.arg0(HELPER_NAME).env_clear().stdin(Stdio::from(theirs)).stdout(Stdio::null());
    reaper.spawn(&mut command)?;
    Ok(ours)
}

/// A read-only view of this executable, so that no container can write to it through a process's `/proc/<pid>/exe`.
fn sealed_executable() -> io::Result<(PathBuf, OwnedFd)> {
    let path = std::env::current_exe()?;
    let readonly = Change { set: MountAttrFlags::MOUNT_ATTR_RDONLY, ..Change::default() };
    let view = clone_mount(CWD, &path, false)?;
    change(view.as_fd(), readonly)?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&view);
    Ok((PathBuf::from(format!("/proc/self/fd/{number}")), view))
}

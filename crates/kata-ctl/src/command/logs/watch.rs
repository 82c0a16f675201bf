//! Files that are appended to while a pod's owner lives. The kernel tells of additions, and of the owner's end.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::failure::Failure;
use crate::pod::{PodDir, PodState};

/// A watch over files and the process that writes them.
pub struct Watch {
    changes: OwnedFd,
    owner: OwnedFd,
}

impl Watch {
    /// Over those of `files` that exist; `None` where nothing will be added any more.
    ///
    /// # Errors
    /// They cannot be watched.
    pub fn new(pod: &PodDir, files: &[&Path]) -> Result<Option<Self>, Failure> {
        let Some(owner) = owner(pod)? else { return Ok(None) };
        let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        for file in files {
            match inotify::add_watch(&changes, *file, WatchFlags::MODIFY) {
                // With a terminal there is no error output.
                Err(Errno::NOENT) => {}
                added => drop(added?),
            }
        }
        Ok(Some(Self { changes, owner }))
    }

    /// Calls `look` now and after each addition, until the owner has ended. A last look is the caller's.
    ///
    /// # Errors
    /// Those of `look`, or of the system.
    pub fn each(&self, mut look: impl FnMut() -> Result<(), Failure>) -> Result<(), Failure> {
        loop {
            // After the watch was set: what was added before is seen now, what is added later wakes up.
            look()?;
            let mut events =
                [PollFd::new(&self.changes, PollFlags::IN), PollFd::new(&self.owner, PollFlags::IN)];
            match poll(&mut events, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let [_, ended] = events;
            if !ended.revents().is_empty() {
                return Ok(());
            }
            forget_events(&self.changes)?;
        }
    }
}

/// The owner, if it lives and the pod is not over.
fn owner(pod: &PodDir) -> Result<Option<OwnedFd>, Failure> {
    let state = PodState::load(&pod.run_dir)?.filter(|state| !state.is_stopped() && state.owner_lives());
    let pid = state.as_ref().and_then(|state| Pid::from_raw(i32::try_from(state.owner_pid).ok()?));
    // The number may have got another owner since it was looked at; then the pod is over.
    let fd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    Ok(fd.filter(|_| state.is_some_and(|state| state.owner_lives())))
}

fn forget_events(watch: &OwnedFd) -> Result<(), Errno> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    loop {
        match events.next() {
            Ok(_) => {}
            Err(Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

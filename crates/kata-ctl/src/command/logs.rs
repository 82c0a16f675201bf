//! `logs`

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Outcome;
use crate::cli::LogsArgs;
use crate::failure::Failure;
use crate::pod::{PodDir, PodState, dump};

/// Prints both logs; with `follow`, what is added until the pod's owner ends.
pub fn run(args: &LogsArgs) -> Outcome {
    let pod = PodDir::existing(&args.name)?;
    let logs = Logs { stdout: open(&pod.stdout_log())?, stderr: open(&pod.stderr_log())? };
    if logs.stdout.is_none() && logs.stderr.is_none() {
        let text = format!("pod {} keeps no output: it was not run with -d, so its client got it", args.name);
        return Err(Failure::text(text));
    }
    if args.follow {
        follow(&pod, &logs)?;
    }
    logs.dump()?;
    Ok(0)
}

struct Logs {
    stdout: Option<File>,
    stderr: Option<File>,
}

impl Logs {
    /// Prints what has been added since the last time.
    fn dump(&self) -> io::Result<()> {
        if let Some(file) = &self.stdout {
            dump(file, rustix::stdio::stdout())?;
        }
        if let Some(file) = &self.stderr {
            dump(file, rustix::stdio::stderr())?;
        }
        Ok(())
    }
}

fn open(path: &Path) -> Result<Option<File>, Failure> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::text(format!("cannot read {}: {error}", path.display()))),
    }
}

/// Comes back when nothing will be added any more. The kernel tells of additions, and of the owner's end.
fn follow(pod: &PodDir, logs: &Logs) -> Result<(), Failure> {
    let Some(owner) = owner(pod)? else { return Ok(()) };
    let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    for path in [pod.stdout_log(), pod.stderr_log()] {
        match inotify::add_watch(&watch, &path, WatchFlags::MODIFY) {
            // With a terminal there is no error output.
            Err(Errno::NOENT) => {}
            added => drop(added?),
        }
    }
    loop {
        // After the watch was set: what was added before is printed now, what is added later wakes up.
        logs.dump()?;
        let mut events = [PollFd::new(&watch, PollFlags::IN), PollFd::new(&owner, PollFlags::IN)];
        match poll(&mut events, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let [_, ended] = events;
        if !ended.revents().is_empty() {
            return Ok(());
        }
        forget_events(&watch)?;
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

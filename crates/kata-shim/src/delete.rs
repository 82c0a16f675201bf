//! `delete`: ends a pod and removes what it has, whether its owner lives or not.
//!
//! An owner that can be connected to lives, and is asked. One that cannot may be about to leave: it is given time to.
//! After that the leak record alone decides what is undone.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use kata_api::control::DestroyRequest;
use kata_api::control_ttrpc::ControlClient;
use kata_sandbox::State;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use thiserror::Error;
use ttrpc::asynchronous::{Client, transport::Socket};

use crate::ground::{Ground, GroundError};

/// Bound on the orderly end of a pod.
const DESTROY_BOUND: Duration = Duration::from_secs(60);
/// Bound on the owner's exit after that.
const EXIT_BOUND: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
/// How long a pod to come waits for its predecessor of the same name to leave.
const LEAVING_BOUND: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };

#[derive(Debug, Error)]
pub(crate) enum DeleteError {
    #[error("owner process {pid} did not destroy the pod; end the process, then delete again")]
    Refused { pid: i32, source: Box<ttrpc::Error> },
    #[error("owner process {pid} lives and cannot be reached; end the process, then delete again")]
    Unreachable { pid: i32 },
    #[error("cannot reach the owner")]
    Connect(#[source] io::Error),
    #[error("cannot hold the pod's directory")]
    Hold(#[source] io::Error),
    #[error("cannot release what the dead owner left")]
    Release(#[source] kata_hypervisor::process::RecordError),
    #[error(transparent)]
    Ground(GroundError),
}

/// Deletes the pod named `id`. A pod that does not exist is deleted already.
pub(crate) fn run(id: &str) -> Result<(), DeleteError> {
    delete(&Ground::of(id))
}

/// Whether somebody answers at the pod's socket.
pub(crate) fn owner_lives(ground: &Ground) -> bool {
    UnixStream::connect(ground.socket()).is_ok()
}

/// Deletes the pod on `ground`.
pub(crate) fn delete(ground: &Ground) -> Result<(), DeleteError> {
    match UnixStream::connect(ground.socket()) {
        Ok(stream) => match destroy(stream) {
            // Nothing is left then, and what has the name from now on is another pod.
            Ok(()) => return Ok(()),
            // It was dying when it was asked, and is dead by now or soon: a big process takes its time.
            Err(DeleteError::Refused { pid, source }) if hung_up(&source) => {
                let gone = Pid::from_raw(pid).is_none_or(left);
                gone.then_some(()).ok_or(DeleteError::Refused { pid, source })?;
            }
            Err(error) => return Err(error),
        },
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            if let Some(pid) = recorded_owner(&ground.run_dir) {
                left(pid).then_some(()).ok_or(DeleteError::Unreachable { pid: pid.as_raw_pid() })?;
            }
        }
        Err(error) => return Err(DeleteError::Connect(error)),
    }
    // Called for each container of a dead owner's pod at once: they take turns, and the first does it.
    match hold(&ground.run_dir).map_err(DeleteError::Hold)? {
        Turn::Gone => ground.clear().map_err(DeleteError::Ground),
        Turn::Passed => Ok(()),
        Turn::Held(_dir) => {
            kata_sandbox::release(&ground.run_dir).map_err(DeleteError::Release)?;
            ground.clear().map_err(DeleteError::Ground)
        }
    }
}

/// Whose turn it is to clean up.
enum Turn {
    /// Ours, as long as this is open.
    Held(OwnedFd),
    /// Somebody else did it meanwhile; what has the name now is another pod.
    Passed,
    /// There is nothing.
    Gone,
}

/// Waits for the turn to clean up in `dir`.
fn hold(dir: &Path) -> io::Result<Turn> {
    let held =
        match rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => return Ok(Turn::Gone),
            other => other?,
        };
    rustix::fs::flock(&held, FlockOperation::LockExclusive)?;
    let ours = rustix::fs::fstat(&held)?;
    Ok(match rustix::fs::stat(dir) {
        Ok(there) if (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino) => Turn::Held(held),
        _ => Turn::Passed,
    })
}

/// Makes room for a pod on `ground`: removes what a dead owner left, and waits a moment for one that is leaving.
pub(crate) fn make_room(ground: &Ground) -> Result<(), DeleteError> {
    if owner_lives(ground)
        && recorded_owner(&ground.run_dir).is_none_or(|owner| !left_within(owner, &LEAVING_BOUND))
    {
        // Whoever takes the name is told that it is taken.
        return Ok(());
    }
    if ground.run_dir.exists() { delete(ground) } else { Ok(()) }
}

/// Asks the owner at the other end to end the pod, and waits for it to leave.
fn destroy(stream: UnixStream) -> Result<(), DeleteError> {
    let owner = socket_peercred(&stream).map_err(|error| DeleteError::Connect(error.into()))?.pid;
    stream.set_nonblocking(true).map_err(DeleteError::Connect)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(DeleteError::Connect)?;
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(stream).map_err(DeleteError::Connect)?;
        let bound = ttrpc::context::with_duration(DESTROY_BOUND);
        let client = ControlClient::new(Client::new(Socket::new(stream)));
        let destroyed = client.destroy(bound, &DestroyRequest::new()).await;
        destroyed.map_err(|source| DeleteError::Refused { pid: owner.as_raw_pid(), source: Box::new(source) })
    })?;
    // Hangs up: the owner stays as long as a client does.
    drop(runtime);
    // The pod is gone by now; an owner that takes its time to follow does no harm.
    left(owner);
    Ok(())
}

/// Whether the owner went away instead of answering.
fn hung_up(error: &ttrpc::Error) -> bool {
    !matches!(error, ttrpc::Error::RpcStatus(_))
}

/// The process that wrote the pod's state, if it still runs. A state that cannot be read is nobody's.
fn recorded_owner(run_dir: &Path) -> Option<Pid> {
    let state = State::load(run_dir).ok()?;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", state.owner_pid)).ok()?;
    // Field 22 of proc(5); the name in parentheses may hold anything, so fields are counted from behind it.
    let (_, fields) = stat.rsplit_once(')')?;
    let start_time: u64 = fields.split_whitespace().nth(19)?.parse().ok()?;
    let owner = i32::try_from(state.owner_pid).ok().and_then(Pid::from_raw);
    owner.filter(|_| start_time == state.owner_start_time)
}

/// Waits, within the bound, for a process to end.
fn left(pid: Pid) -> bool {
    left_within(pid, &EXIT_BOUND)
}

fn left_within(pid: Pid, bound: &Timespec) -> bool {
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return true };
    matches!(poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(bound)), Ok(1..))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ground(dir: &Path) -> Ground {
        Ground { run_dir: dir.join("run/p"), state_dir: dir.join("state/p") }
    }

    fn write_state(ground: &Ground, pid: u32, start_time: u64) {
        let state = serde_json::json!({
            "version": 1, "id": "p", "state": "ready", "owner_pid": pid, "owner_start_time": start_time,
            "created_at_ms": 1, "hypervisor": "qemu", "accelerator": "tcg", "choice": "", "guest_kernel": "",
            "agent_version": "", "containers": [], "timeline": [], "fault": null,
        });
        std::fs::write(ground.run_dir.join("state.json"), state.to_string()).unwrap();
        assert!(State::load(&ground.run_dir).is_ok());
    }

    #[test]
    fn a_pod_that_does_not_exist_is_deleted_already() {
        let dir = tempfile::tempdir().unwrap();
        delete(&ground(dir.path())).unwrap();
    }

    #[test]
    fn what_a_dead_owner_left_is_released_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let ground = ground(dir.path());
        drop(ground.claim("p").unwrap());
        let elsewhere = dir.path().join("elsewhere");
        std::fs::write(&elsewhere, "").unwrap();
        let line = serde_json::json!({ "file": { "path": elsewhere } });
        std::fs::write(ground.run_dir.join("resources.jsonl"), format!("{line}\n")).unwrap();
        std::fs::create_dir_all(&ground.state_dir).unwrap();
        write_state(&ground, std::process::id(), 1);
        delete(&ground).unwrap();
        assert!(!ground.run_dir.exists() && !ground.state_dir.exists() && !elsewhere.exists());
    }

    #[test]
    fn several_that_clean_up_at_once_take_turns() {
        let dir = tempfile::tempdir().unwrap();
        let ground = ground(dir.path());
        drop(ground.claim("p").unwrap());
        let clean = || {
            let ground = ground.clone();
            std::thread::spawn(move || delete(&ground))
        };
        for cleaner in [(); 8].map(|()| clean()) {
            cleaner.join().unwrap().unwrap();
        }
        assert!(!ground.run_dir.exists());
    }

    #[test]
    fn a_process_with_the_owners_number_is_not_the_owner() {
        let dir = tempfile::tempdir().unwrap();
        let ground = ground(dir.path());
        drop(ground.claim("p").unwrap());
        write_state(&ground, std::process::id(), 1);
        assert_eq!(recorded_owner(&ground.run_dir), None);
    }
}

//! `delete`: ends a pod and removes what it has, whether its owner lives or not.
//!
//! ```text
//!  connect ── refused ─▶ wait for the process to leave ─────────────┐
//!     │                                                             ▼
//!     └─▶ does it answer? ── no ─▶ kill it ─▶ wait for its end ─▶ undo what the leak record names
//!            └ yes ─▶ Destroy ─▶ wait for its end
//! ```
//!
//! An owner that can be connected to and answers is asked. One that cannot be connected to may be about to leave: it is given
//! time to. One that lives and says nothing, because it was stopped or hangs, is killed: containerd gives this program 5 s. That
//! is for who deletes the pod; who wants one container gone, or the pod's name, is told and nobody is killed.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use kata_api::control::{DestroyRequest, InspectRequest};
use kata_api::control_ttrpc::ControlClient;
use kata_sandbox::State;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use thiserror::Error;
use ttrpc::asynchronous::{Client, transport::Socket};

use crate::ground::{Ground, GroundError};

/// Who does not answer a question by then hangs. Of the 5 s that containerd gives, something is left for the clean-up.
const ANSWER_BOUND: Duration = Duration::from_secs(2);
/// Pause before a full queue is tried again.
const REACH_AGAIN: Duration = Duration::from_millis(50);
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
    #[error(
        "the pod's owner lives and did not answer within {ANSWER_BOUND:?}: try again on a host that is less busy, or delete the \
         pod, which ends the owner"
    )]
    Silent,
    #[error("owner process {pid} answers nothing and cannot be killed")]
    Hangs { pid: i32, source: io::Error },
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

/// How a pod's owner is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Answers,
    /// It is there. Why it says nothing cannot be known from here: the host may be busy.
    Silent,
    /// Nobody serves the pod's socket, or whoever did is leaving.
    Gone,
}

/// How the owner of the pod on `ground` is.
pub(crate) fn presence(ground: &Ground) -> Presence {
    let stream = match reach(ground) {
        Ok(Reached::Owner(stream)) => stream,
        Ok(Reached::Nobody) => return Presence::Gone,
        Ok(Reached::Hangs) | Err(_) => return Presence::Silent,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let Ok(runtime) = runtime else { return Presence::Silent };
    runtime.block_on(async {
        let Ok(stream) = tokio::net::UnixStream::from_std(stream) else { return Presence::Silent };
        let client = ControlClient::new(Client::new(Socket::new(stream)));
        match Spoken::of(client).await {
            Spoken::Answered(_) => Presence::Answers,
            Spoken::HungUp(_) => Presence::Gone,
            Spoken::Nothing => Presence::Silent,
        }
    })
}

/// Deletes the pod on `ground`.
pub(crate) fn delete(ground: &Ground) -> Result<(), DeleteError> {
    match reach(ground).map_err(DeleteError::Connect)? {
        Reached::Owner(stream) => match destroy(stream) {
            // Nothing is left then, and what has the name from now on is another pod.
            Ok(()) => return Ok(()),
            // It was dying when it was asked, and is dead by now or soon: a big process takes its time.
            Err(DeleteError::Refused { pid, source }) if hung_up(&source) => {
                let gone = Pid::from_raw(pid).is_none_or(left);
                gone.then_some(()).ok_or(DeleteError::Refused { pid, source })?;
            }
            Err(DeleteError::Unreachable { pid }) => end(pid)?,
            Err(error) => return Err(error),
        },
        // More have asked than it could take note of.
        Reached::Hangs => {
            if let Some(pid) = recorded_owner(&ground.run_dir) {
                end(pid.as_raw_pid())?;
            }
        }
        Reached::Nobody => {
            if let Some(pid) = recorded_owner(&ground.run_dir) {
                left(pid).then_some(()).ok_or(DeleteError::Unreachable { pid: pid.as_raw_pid() })?;
            }
        }
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

/// What is at the pod's socket.
enum Reached {
    /// Somebody who may answer.
    Owner(UnixStream),
    /// Somebody who does not even take connections.
    Hangs,
    Nobody,
}

/// Connects. The queue of a busy owner may be full for a moment, that of one that hangs for good.
fn reach(ground: &Ground) -> io::Result<Reached> {
    let begin = Instant::now();
    loop {
        match try_reach(ground)? {
            Reached::Hangs if begin.elapsed() < ANSWER_BOUND => std::thread::sleep(REACH_AGAIN),
            other => return Ok(other),
        }
    }
}

fn try_reach(ground: &Ground) -> io::Result<Reached> {
    let address = SocketAddrUnix::new(ground.socket())?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match connect(&socket, &address) {
        Ok(()) => Ok(Reached::Owner(socket.into())),
        Err(Errno::AGAIN) => Ok(Reached::Hangs),
        Err(Errno::NOENT | Errno::CONNREFUSED) => Ok(Reached::Nobody),
        Err(error) => Err(error.into()),
    }
}

/// What an owner did when it was asked something that is answered at once.
enum Spoken {
    Answered(ControlClient),
    HungUp(ttrpc::Error),
    Nothing,
}

impl Spoken {
    async fn of(client: ControlClient) -> Self {
        let bound = ttrpc::context::with_duration(DESTROY_BOUND);
        match tokio::time::timeout(ANSWER_BOUND, client.inspect(bound, &InspectRequest::new())).await {
            // One without a pod says so.
            Ok(Ok(_) | Err(ttrpc::Error::RpcStatus(_))) => Self::Answered(client),
            Ok(Err(error)) => Self::HungUp(error),
            Err(_) => Self::Nothing,
        }
    }
}

/// Ends an owner that answers nothing. Its number is that of the process at the other end of a connection, or of the one that
/// wrote the pod's state and still runs.
fn end(pid: i32) -> Result<(), DeleteError> {
    tracing::warn!(pid, "the owner answers nothing, and is killed");
    let fault = |error: Errno| DeleteError::Hangs { pid, source: error.into() };
    let Some(owner) = Pid::from_raw(pid) else { return Ok(()) };
    match pidfd_open(owner, PidfdFlags::empty()).and_then(|fd| pidfd_send_signal(fd, Signal::KILL)) {
        Ok(()) | Err(Errno::SRCH) => left(owner).then_some(()).ok_or_else(|| fault(Errno::TIMEDOUT)),
        Err(error) => Err(fault(error)),
    }
}

/// Makes room for a pod on `ground`: removes what a dead owner left, and waits a moment for one that is leaving.
pub(crate) fn make_room(ground: &Ground) -> Result<(), DeleteError> {
    let leaves = || recorded_owner(&ground.run_dir).is_some_and(|owner| left_within(owner, &LEAVING_BOUND));
    match presence(ground) {
        // Whoever takes the name is told that it is taken.
        Presence::Answers if !leaves() => return Ok(()),
        Presence::Silent if !leaves() => return Err(DeleteError::Silent),
        _ => {}
    }
    if ground.run_dir.exists() { delete(ground) } else { Ok(()) }
}

/// Asks the owner at the other end to end the pod, and waits for it to leave.
fn destroy(stream: UnixStream) -> Result<(), DeleteError> {
    let owner = socket_peercred(&stream).map_err(|error| DeleteError::Connect(error.into()))?.pid;
    let pid = owner.as_raw_pid();
    let refused = |source| DeleteError::Refused { pid, source: Box::new(source) };
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(DeleteError::Connect)?;
    runtime.block_on(async {
        let stream = tokio::net::UnixStream::from_std(stream).map_err(DeleteError::Connect)?;
        let client = ControlClient::new(Client::new(Socket::new(stream)));
        let client = match Spoken::of(client).await {
            Spoken::Answered(client) => client,
            Spoken::HungUp(error) => return Err(refused(error)),
            Spoken::Nothing => return Err(DeleteError::Unreachable { pid }),
        };
        let bound = ttrpc::context::with_duration(DESTROY_BOUND);
        client.destroy(bound, &DestroyRequest::new()).await.map(drop).map_err(refused)
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
    let owner = State::load(run_dir).ok()?.owner()?;
    i32::try_from(owner).ok().and_then(Pid::from_raw)
}

/// Waits, within the bound, for a process to end.
fn left(pid: Pid) -> bool {
    left_within(pid, &EXIT_BOUND)
}

/// The same for a bound of the caller's.
pub(crate) fn left_within(pid: Pid, bound: &Timespec) -> bool {
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
    fn an_owner_that_hangs_is_killed_and_what_it_had_removed_within_containerds_bound() {
        for asked_before in [0, 3] {
            let dir = tempfile::tempdir().unwrap();
            let ground = ground(dir.path());
            let listener = ground.claim("p").unwrap();
            rustix::net::listen(&listener, 1).unwrap();
            // It holds the socket as an owner does, and says nothing.
            let spawn =
                |stdin: OwnedFd| std::process::Command::new("/bin/sleep").arg("600").stdin(stdin).spawn();
            let mut hangs = spawn(listener.into()).unwrap();
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", hangs.id())).unwrap();
            let start_time = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse();
            write_state(&ground, hangs.id(), start_time.unwrap());
            // A full queue of connections must not hold anybody up.
            let waiting: Vec<_> = (0..asked_before).map(|_| try_reach(&ground).unwrap()).collect();
            // The peer of a listener is who made it, which is this process: the state names the one that hangs.
            let begin = std::time::Instant::now();
            if asked_before == 0 {
                assert_eq!(presence(&ground), Presence::Silent);
                end(i32::try_from(hangs.id()).unwrap()).unwrap();
            }
            let child = std::thread::spawn(move || hangs.wait().unwrap());
            delete(&ground).unwrap();
            assert!(begin.elapsed() < Duration::from_secs(15), "{:?}", begin.elapsed());
            assert!(!child.join().unwrap().success() && !ground.run_dir.exists());
            drop(waiting);
        }
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

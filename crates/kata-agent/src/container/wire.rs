//! What passes between the agent and a helper: one request down, a few answers up, over a socket pair.
//!
//! ```text
//!  template: one byte + SCM_RIGHTS, the socket of the request, on a socket of its own
//!  request:  head (length u32, filter length u32, mask of file descriptors u32) + SCM_RIGHTS │ JSON │ filter
//!  answer:   kind u8, length u32 (+ SCM_RIGHTS, the master of a terminal) │ payload
//!  gate:     one byte down
//! ```
//!
//! JSON carries what is small; a compiled filter is raw bytes. The answers' writers are the helper and its child,
//! each with one write per answer, so answers never mix.

use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};

use super::EngineError;
use super::plan::{ContainerPlan, ProcessPlan};

/// What a helper is asked to do.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub process: ProcessPlan,
    pub task: Task,
}

/// Where the process comes to live.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Task {
    /// In a container that is made for it.
    Create(Box<ContainerPlan>),
    /// In these `CLONE_NEW*` namespaces of a running init.
    Exec { namespaces: u32 },
}

/// File descriptors that come with a request.
#[derive(Debug, Default)]
pub(super) struct Attached<Fd> {
    /// Directory of the cgroup to be born in.
    pub cgroup: Option<Fd>,
    pub stdin: Option<Fd>,
    pub stdout: Option<Fd>,
    pub stderr: Option<Fd>,
    /// pidfd of the container's init.
    pub init: Option<Fd>,
}

const FDS: usize = 5;

impl<Fd> Attached<Fd> {
    fn into_list(self) -> [Option<Fd>; FDS] {
        [self.cgroup, self.stdin, self.stdout, self.stderr, self.init]
    }

    fn from_list([cgroup, stdin, stdout, stderr, init]: [Option<Fd>; FDS]) -> Self {
        Self { cgroup, stdin, stdout, stderr, init }
    }
}

/// A failure on the far side; becomes an [`EngineError`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Failure {
    CommandNotFound {
        command: String,
        tried: Vec<PathBuf>,
    },
    InterpreterNotFound {
        path: PathBuf,
    },
    NotExecutable {
        path: PathBuf,
        errno: i32,
    },
    Invalid {
        key: String,
        reason: String,
    },
    Unsupported {
        key: String,
        reason: String,
    },
    /// The container's cgroup has children with controllers and takes no process itself.
    CgroupBusy,
    Setup {
        step: String,
        errno: i32,
        text: String,
    },
}

/// The step that fails with `EBUSY` where a cgroup takes no processes.
pub(super) const ENTER_CGROUP: &str = "enter the cgroup of the container";
/// The step that fails with `ESRCH` where the init has ended.
pub(super) const ENTER_NAMESPACES: &str = "enter the namespaces of the container";

impl Failure {
    pub(super) fn setup(step: impl Into<String>, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        Self::Setup { step: step.into(), errno: error.raw_os_error().unwrap_or(0), text: error.to_string() }
    }

    pub(super) fn into_error(self) -> EngineError {
        match self {
            Self::CommandNotFound { command, tried } => EngineError::CommandNotFound { command, tried },
            Self::InterpreterNotFound { path } => EngineError::InterpreterNotFound { path },
            Self::NotExecutable { path, errno } => {
                EngineError::NotExecutable { path, source: refusal(errno) }
            }
            Self::Invalid { key, reason } => EngineError::Invalid { key, reason },
            Self::Unsupported { key, reason } => EngineError::Unsupported { key, reason },
            Self::CgroupBusy => EngineError::setup(ENTER_CGROUP, rustix::io::Errno::BUSY),
            Self::Setup { step, errno: 0, text } => EngineError::setup(step, io::Error::other(text)),
            Self::Setup { step, errno, .. } => EngineError::setup(step, io::Error::from_raw_os_error(errno)),
        }
    }
}

/// Why a file is not executed. The usual reasons are in the kind's words, which clients know these failures by: Docker
/// takes "permission denied" and "is a directory" for 126, in small letters as Go has them.
fn refusal(errno: i32) -> io::Error {
    let error = io::Error::from_raw_os_error(errno);
    match error.kind() {
        kind @ (io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory) => kind.into(),
        _ => error,
    }
}

/// An answer from the helper or the process it made.
#[derive(Debug)]
pub(super) enum Answer {
    /// The compiled seccomp filter (see `seccomp::Filter`).
    Filter(Vec<u8>),
    /// The process, by the agent's pid namespace.
    Pid(i32),
    /// The master of the process's terminal.
    Terminal(OwnedFd),
    /// The process waits at the gate.
    Ready,
    /// It is over.
    Failed(Failure),
}

const HEAD: usize = 12;
/// Far above any real spec; a bound against a broken peer.
const LONGEST: usize = 16 << 20;

fn word(bytes: &[u8], index: usize) -> usize {
    let mut word = [0; 4];
    for (to, from) in word.iter_mut().zip(bytes.iter().skip(index * 4)) {
        *to = *from;
    }
    usize::try_from(u32::from_ne_bytes(word)).unwrap_or(usize::MAX)
}

fn length(length: usize) -> io::Result<[u8; 4]> {
    let fits = u32::try_from(length).ok().filter(|_| length <= LONGEST);
    fits.map(u32::to_ne_bytes)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the spec is too big"))
}

/// Agent side: gives the template process a socket, to fork a helper for it.
pub(super) fn send_socket(template: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<()> {
    send_with(template, b"s", socket, SendFlags::DONTWAIT)
}

/// Sends a few bytes along with a file descriptor.
fn send_with(socket: BorrowedFd<'_>, bytes: &[u8], fd: BorrowedFd<'_>, flags: SendFlags) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let list = [fd];
    control.push(SendAncillaryMessage::ScmRights(&list));
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags | SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives bytes, how many it tells, and the file descriptor that came along.
fn receive_with(socket: BorrowedFd<'_>, bytes: &mut [u8]) -> rustix::io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let receive = || recvmsg(socket, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let length = rustix::io::retry_on_intr(receive)?.bytes;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut received) => received.next(),
        _ => None,
    });
    Ok((length, fd))
}

/// Template side: the next socket; `None` when the agent has gone.
pub(super) fn receive_socket(agent: BorrowedFd<'_>) -> io::Result<Option<UnixStream>> {
    match receive_with(agent, &mut [0])? {
        (0, _) => Ok(None),
        (_, Some(socket)) => Ok(Some(socket.into())),
        (_, None) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Agent side: sends a request. The socket takes the head at once: it is new.
pub(super) async fn send_request(
    socket: &mut tokio::net::UnixStream,
    request: &Request,
    filter: &[u8],
    attached: Attached<BorrowedFd<'_>>,
) -> io::Result<()> {
    let json = serde_json::to_vec(request)?;
    let list = attached.into_list();
    let mask = list.iter().enumerate().fold(0_u32, |mask, (at, fd)| mask | (u32::from(fd.is_some()) << at));
    let fds: Vec<BorrowedFd<'_>> = list.into_iter().flatten().collect();
    let head = [length(json.len())?, length(filter.len())?, mask.to_ne_bytes()].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&fds));
    }
    let sent = sendmsg(socket.as_fd(), &[IoSlice::new(&head)], &mut control, SendFlags::NOSIGNAL)?;
    if sent != HEAD {
        return Err(io::ErrorKind::WriteZero.into());
    }
    socket.write_all(&json).await?;
    socket.write_all(filter).await
}

/// Agent side: the next answer, or `None` once nobody can answer any more.
pub(super) async fn next_answer(socket: &mut tokio::net::UnixStream) -> io::Result<Option<Answer>> {
    let mut head = [0; 5];
    // A frame is one write, so its file descriptor comes with its first byte.
    let receive = || Ok(receive_with(socket.as_fd(), &mut head)?);
    let (length, fd) = match socket.async_io(Interest::READABLE, receive).await {
        Ok((0, _)) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        result => result?,
    };
    socket.read_exact(head.get_mut(length..).unwrap_or_default()).await?;
    let [kind, size @ ..] = head;
    let mut payload = vec![0; word(&size, 0).min(LONGEST)];
    socket.read_exact(&mut payload).await?;
    let invalid = || io::Error::from(io::ErrorKind::InvalidData);
    Ok(Some(match kind {
        b'f' => Answer::Filter(payload),
        b'p' => Answer::Pid(i32::from_ne_bytes(payload.try_into().map_err(|_| invalid())?)),
        b't' => Answer::Terminal(fd.ok_or_else(invalid)?),
        b'r' => Answer::Ready,
        b'e' => Answer::Failed(serde_json::from_slice(&payload)?),
        _ => return Err(invalid()),
    }))
}

/// Helper side: the request, its filter and file descriptors.
pub(super) fn receive_request(socket: &mut UnixStream) -> io::Result<(Request, Vec<u8>, Attached<OwnedFd>)> {
    let mut head = [0; HEAD];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    let got = recvmsg(socket.as_fd(), &mut [IoSliceMut::new(&mut head)], &mut control, flags)?;
    if got.bytes != HEAD {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    let mask = word(&head, 2);
    let mut fds = fds.into_iter();
    let attached = std::array::from_fn(|at| if mask & (1 << at) == 0 { None } else { fds.next() });
    let mut json = vec![0; word(&head, 0).min(LONGEST)];
    socket.read_exact(&mut json)?;
    let mut filter = vec![0; word(&head, 1).min(LONGEST)];
    socket.read_exact(&mut filter)?;
    Ok((serde_json::from_slice(&json)?, filter, Attached::from_list(attached)))
}

/// Helper side: sends an answer with one write.
pub(super) fn answer(socket: &UnixStream, answer: &Answer) -> io::Result<()> {
    let (kind, payload) = match answer {
        Answer::Filter(filter) => (b'f', filter.clone()),
        Answer::Pid(pid) => (b'p', pid.to_ne_bytes().to_vec()),
        Answer::Terminal(_) => (b't', Vec::new()),
        Answer::Ready => (b'r', Vec::new()),
        Answer::Failed(failure) => (b'e', serde_json::to_vec(failure)?),
    };
    let mut frame = vec![kind];
    frame.extend(length(payload.len())?);
    frame.extend(payload);
    if let Answer::Terminal(master) = answer {
        return send_with(socket.as_fd(), &frame, master.as_fd(), SendFlags::empty());
    }
    // write(2) itself, which nearly every seccomp profile allows, while std would call sendto(2).
    let mut rest = frame.as_slice();
    while !rest.is_empty() {
        let written = rustix::io::retry_on_intr(|| rustix::io::write(&*socket, rest))?;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(())
}

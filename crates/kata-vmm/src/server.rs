//! The interface of a VMM: one connected socket, a command at a time.
//!
//! ```text
//!   client ── line, descriptors ──▶ serve ── Command, descriptors ──▶ Monitor ──▶ the machine
//!          ◀── answer, a line ─────   │   ◀── Answer or Failure ─────    │
//!          ◀── {"event":…} ────────   └────── readable: it has ended ◀───┘
//! ```
//!
//! The client waits for an answer before it says anything more, so which descriptors belong to which line is never in doubt. What
//! is no request is answered as such; what breaks the framing (a line without end, bytes behind it, too many descriptors) ends the
//! connection. The end of the connection is the end of the VMM: nobody else could ever reach it.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kata_vmm_api::{
    Answer, Command, EndReason, Event, Failure, FailureKind, MAX_DESCRIPTORS, MAX_LINE, Reply, Request,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};
use thiserror::Error;

/// Longest piece of the client's text that an error repeats.
const QUOTE: usize = 200;

/// Carries commands out.
pub trait Monitor {
    /// Does what was asked. A failure has changed nothing. What takes its time looks now and then whether the client is gone:
    /// nobody else could ever reach the machine.
    fn execute(
        &mut self,
        command: Command,
        descriptors: Vec<OwnedFd>,
        client: Client<'_>,
    ) -> Result<Answer, Failure>;

    /// Readable once the machine has ended by itself; `None` while there is none.
    fn ended(&self) -> Option<BorrowedFd<'_>>;

    /// How it has ended, and more about it for people; `None` where it has not.
    fn end(&self) -> Option<(EndReason, String)>;
}

/// Who waits for the answer to a command.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a>(pub &'a UnixStream);

impl Client<'_> {
    /// Whether it has closed its end.
    pub fn is_gone(self) -> bool {
        let mut watched = [PollFd::new(self.0, PollFlags::RDHUP)];
        let polled = poll(&mut watched, Some(&Timespec::default()));
        polled.is_ok() && watched.iter().any(|socket| !socket.revents().is_empty())
    }
}

/// Why a connection ended that neither the client nor the machine ended.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The socket failed.
    #[error("the API socket cannot be {action}")]
    Socket {
        /// `read`, `written to`, `watched`.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A line without an end.
    #[error("the client's line is longer than {MAX_LINE} bytes")]
    LongLine,
    /// It did not wait for the answer.
    #[error(
        "the client sent more than one line, or bytes behind its line; a command waits for the answer to the one before"
    )]
    Ahead,
    /// More than fit.
    #[error("the client sent more than {MAX_DESCRIPTORS} descriptors with one line")]
    Descriptors,
    /// An answer is no JSON, which no answer is.
    #[error("the answer cannot be written as JSON")]
    Answer(#[source] serde_json::Error),
}

/// How serving came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Served {
    /// The client closed its end.
    Closed,
    /// The client asked for it.
    Shutdown,
    /// The machine ended in this way, with more about it for people, and the client knows.
    Ended(EndReason, String),
}

/// Serves the client at the other end of `socket` until one of the three is over: the client, the machine, or what it wanted.
///
/// # Errors
/// See [`ServeError`].
pub fn serve(socket: &UnixStream, monitor: &mut impl Monitor) -> Result<Served, ServeError> {
    let mut line = Line::default();
    loop {
        let (readable, ended) = wait(socket, monitor.ended())?;
        if ended && let Some((reason, detail)) = monitor.end() {
            let told = tell(socket, &Reply::Event { event: Event::Ended { reason, detail: detail.clone() } });
            if told.is_err() {
                tracing::debug!("the client is not there to be told of the end");
            }
            return Ok(Served::Ended(reason, detail));
        }
        if !readable {
            continue;
        }
        match line.receive(socket)? {
            Received::Part => {}
            Received::Closed => return Ok(Served::Closed),
            Received::Whole(text, descriptors) => {
                let (reply, over) = answer(monitor, &text, descriptors, Client(socket));
                match tell(socket, &reply) {
                    Err(_) if Client(socket).is_gone() => return Ok(Served::Closed),
                    told => told?,
                }
                if over {
                    return Ok(Served::Shutdown);
                }
            }
        }
    }
}

/// Waits until the client says something or the machine ends: which of both.
fn wait(socket: &UnixStream, ended: Option<BorrowedFd<'_>>) -> Result<(bool, bool), ServeError> {
    let mut watched = vec![PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)];
    watched.extend(ended.map(|ended| PollFd::from_borrowed_fd(ended, PollFlags::IN)));
    match poll(&mut watched, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return Err(ServeError::Socket { action: "watched", source: e.into() }),
    }
    let ready = |index: usize| watched.get(index).is_some_and(|fd| !fd.revents().is_empty());
    Ok((ready(0), ready(1)))
}

/// Carries one line out: the reply, and whether it was the last.
fn answer(
    monitor: &mut impl Monitor,
    text: &[u8],
    descriptors: Vec<OwnedFd>,
    client: Client<'_>,
) -> (Reply, bool) {
    let Request { id, command } = match serde_json::from_slice(text) {
        Ok(request) => request,
        Err(error) => {
            let quote: String = String::from_utf8_lossy(text).chars().take(QUOTE).collect();
            let message = format!("{quote:?} is no request: {error}");
            return (Reply::Failed { id: 0, error: Failure { kind: FailureKind::Invalid, message } }, false);
        }
    };
    let last = matches!(command, Command::Shutdown);
    match monitor.execute(command, descriptors, client) {
        Ok(done) => (Reply::Done { id, done }, last),
        Err(error) => (Reply::Failed { id, error }, false),
    }
}

fn tell(socket: &UnixStream, reply: &Reply) -> Result<(), ServeError> {
    let mut line = serde_json::to_vec(reply).map_err(ServeError::Answer)?;
    line.push(b'\n');
    let mut rest = line.as_slice();
    while !rest.is_empty() {
        match send(socket, rest, SendFlags::NOSIGNAL) {
            Ok(sent) => rest = rest.get(sent..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(ServeError::Socket { action: "written to", source: e.into() }),
        }
    }
    Ok(())
}

/// The line that is being received.
#[derive(Default)]
struct Line {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

enum Received {
    /// There is more to come.
    Part,
    /// The line without its end, and what came along.
    Whole(Vec<u8>, Vec<OwnedFd>),
    Closed,
}

impl Line {
    /// Takes what is there, which must not be more than the rest of a line.
    fn receive(&mut self, socket: &UnixStream) -> Result<Received, ServeError> {
        let mut chunk = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = match recvmsg(socket, &mut [IoSliceMut::new(&mut chunk)], &mut control, flags) {
            Ok(got) => got,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Ok(Received::Part),
            Err(rustix::io::Errno::CONNRESET) => return Ok(Received::Closed),
            Err(e) => return Err(ServeError::Socket { action: "read", source: e.into() }),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.descriptors.extend(rights);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > MAX_DESCRIPTORS {
            return Err(ServeError::Descriptors);
        }
        let new = chunk.get(..got.bytes).unwrap_or_default();
        if new.is_empty() {
            return Ok(Received::Closed);
        }
        self.bytes.extend_from_slice(new);
        match self.bytes.iter().position(|byte| *byte == b'\n') {
            Some(end) if end + 1 < self.bytes.len() => Err(ServeError::Ahead),
            Some(end) if end < MAX_LINE => {
                let mut text = std::mem::take(&mut self.bytes);
                text.truncate(end);
                Ok(Received::Whole(text, std::mem::take(&mut self.descriptors)))
            }
            None if self.bytes.len() < MAX_LINE => Ok(Received::Part),
            Some(_) | None => Err(ServeError::LongLine),
        }
    }
}

#[cfg(test)]
mod tests;

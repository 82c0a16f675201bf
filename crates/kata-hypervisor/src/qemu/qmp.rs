//! A client of QMP, QEMU's control protocol (QEMU's documentation, interop/qmp-spec): JSON objects, one a line.
//!
//! ```text
//!   execute() ──▶ writer task ──▶ socket ──▶ reader task ─┬─ reply ▶ the caller with its id
//!                                                         └─ event ▶ everybody who subscribed
//! ```
//!
//! A line that makes no sense is logged and skipped, a reply that comes after its caller gave up is dropped, and a line longer
//! than [`LINE_LIMIT`] is skipped without being kept: QEMU speaks for the host, but not everything it repeats does.
//!
//! A file descriptor goes along with its command's first byte. QEMU keeps one of them for the next command that takes one, so
//! a second is sent only after the first command was answered.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Deserialize;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, mpsc, oneshot};

/// Longest line that is understood, in bytes. QEMU's greatest answers are some hundred KiB.
pub(crate) const LINE_LIMIT: usize = 1 << 20;

/// What can go wrong on QEMU's control socket.
#[derive(Debug, Error)]
pub enum QmpError {
    /// QEMU has closed the socket, as it does when it ends.
    #[error(
        "QEMU ended, or closed its control socket, before it answered {command:?}; its last output in the owner's log tells why"
    )]
    Closed {
        /// The command.
        command: String,
    },
    /// QEMU did not answer in time.
    #[error(
        "QEMU did not answer {command:?} on its control socket within {bound:?}: it is stopped, or the host is overloaded or \
         waits for a disk; see the host's load and kernel log, then try again"
    )]
    Timeout {
        /// The command.
        command: String,
        /// The bound that has passed.
        bound: Duration,
    },
    /// QEMU refused the command.
    #[error("QEMU refused {command:?}: {description} ({class})")]
    Refused {
        /// The command.
        command: String,
        /// QEMU's error class.
        class: String,
        /// QEMU's explanation.
        description: String,
    },
    /// Whoever is on the other end does not speak QMP.
    #[error("the peer does not speak QMP: its first line is {said:?}")]
    NotQmp {
        /// The first of what it said.
        said: String,
    },
}

/// What QEMU reports unasked; everything a driver has no use for is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// The machine ends. `reason` is QEMU's: `guest-reset`, `guest-shutdown`, `host-signal`, …
    Shutdown { reason: String },
    /// The guest told of its kernel's panic.
    GuestPanicked,
    /// The guest's CPUs stopped.
    Stop,
    /// The guest's CPUs go on.
    Resume,
    /// A device is gone: the guest has let go of it, or it was never told of it.
    DeviceDeleted { device: String },
    /// The guest has taken a CPU or memory that was added, status 0, or has not.
    Taken { device: String, status: i64 },
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Greeting {
        #[serde(rename = "QMP")]
        _greeting: Value,
    },
    Success {
        #[serde(rename = "return")]
        value: Value,
        id: u64,
    },
    Failure {
        error: Failure,
        id: u64,
    },
    Event {
        event: String,
        #[serde(default)]
        data: Value,
    },
}

#[derive(Debug, Deserialize)]
struct Failure {
    class: String,
    desc: String,
}

type Reply = Result<Value, Failure>;

/// A connection to one QEMU. Closed when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Qmp(Arc<Connection>);

#[derive(Debug)]
struct Connection {
    requests: mpsc::Sender<Request>,
    waiting: Waiting,
    /// Weak: that the reader drops the sender tells subscribers of the socket's end.
    events: broadcast::WeakSender<Event>,
    next_id: AtomicU64,
}

/// One line, and the descriptor that goes with it.
#[derive(Debug)]
struct Request {
    line: Vec<u8>,
    fd: Option<OwnedFd>,
}

/// Callers by the id of their command; `None` once there is nobody left to answer.
#[derive(Clone, Debug)]
struct Waiting(Arc<Mutex<Option<Callers>>>);

type Callers = HashMap<u64, oneshot::Sender<Reply>>;

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, Option<Callers>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, id: u64, reply: Reply) {
        if let Some(caller) = self.lock().as_mut().and_then(|callers| callers.remove(&id)) {
            // A caller that has given up meanwhile is no fault.
            let _ = caller.send(reply);
        }
    }
}

/// Takes the caller off the list, however its wait ends.
struct Ticket<'a>(&'a Waiting, u64);

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        if let Some(callers) = self.0.lock().as_mut() {
            callers.remove(&self.1);
        }
    }
}

impl Qmp {
    /// Takes the greeting and agrees on the protocol. The channel has all events from here on, and ends with the socket.
    ///
    /// # Errors
    /// [`QmpError`] with the command `"greeting"` or `"qmp_capabilities"`.
    pub(crate) async fn connect(
        stream: UnixStream,
        bound: Duration,
    ) -> Result<(Self, broadcast::Receiver<Event>), QmpError> {
        let (read, write) = stream.into_split();
        let mut read = BufReader::new(read);
        tokio::time::timeout(bound, greeting(&mut read))
            .await
            .map_err(|_| QmpError::Timeout { command: "greeting".to_owned(), bound })??;

        let (requests, to_write) = mpsc::channel(16);
        let (sender, subscription) = broadcast::channel(64);
        let events = sender.downgrade();
        let waiting = Waiting(Arc::new(Mutex::new(Some(HashMap::new()))));
        tokio::spawn(write_requests(write, to_write));
        tokio::spawn(read_lines(read, waiting.clone(), sender));
        let qmp = Self(Arc::new(Connection { requests, waiting, events, next_id: AtomicU64::new(1) }));
        qmp.execute("qmp_capabilities", Value::Null, bound).await?;
        Ok((qmp, subscription))
    }

    /// All events from here on. The channel ends with the socket.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Event> {
        let ended = || broadcast::channel(1).1;
        self.0.events.upgrade().map_or_else(ended, |events| events.subscribe())
    }

    /// Runs a command and gives back what it returns. `arguments` is an object, or null for none.
    ///
    /// # Errors
    /// [`QmpError`] with the command's name.
    pub(crate) async fn execute(
        &self,
        command: &str,
        arguments: Value,
        bound: Duration,
    ) -> Result<Value, QmpError> {
        self.execute_with(command, arguments, None, bound).await
    }

    /// Like [`Qmp::execute`], for the commands that take a file descriptor: `add-fd` and `getfd`.
    pub(crate) async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
        bound: Duration,
    ) -> Result<Value, QmpError> {
        let answer = tokio::time::timeout(bound, self.ask(command, arguments, fd)).await;
        let command = command.to_owned();
        match answer {
            Err(_) => Err(QmpError::Timeout { command, bound }),
            Ok(None) => Err(QmpError::Closed { command }),
            Ok(Some(Ok(value))) => Ok(value),
            Ok(Some(Err(Failure { class, desc }))) => {
                Err(QmpError::Refused { command, class, description: desc })
            }
        }
    }

    /// `None`: nobody will answer any more.
    async fn ask(&self, command: &str, arguments: Value, fd: Option<OwnedFd>) -> Option<Reply> {
        let Connection { requests, waiting, next_id, .. } = &*self.0;
        let id = next_id.fetch_add(1, Ordering::Relaxed);
        let mut request = json!({ "execute": command, "id": id });
        if let (Some(request), false) = (request.as_object_mut(), arguments.is_null()) {
            request.insert("arguments".to_owned(), arguments);
        }
        let (caller, reply) = oneshot::channel();
        waiting.lock().as_mut()?.insert(id, caller);
        let _ticket = Ticket(waiting, id);
        requests.send(Request { line: format!("{request}\n").into_bytes(), fd }).await.ok()?;
        reply.await.ok()
    }
}

async fn greeting(read: &mut (impl AsyncBufRead + Unpin)) -> Result<(), QmpError> {
    let mut line = Vec::new();
    match next_line(read, &mut line).await {
        Next::End => Err(QmpError::Closed { command: "greeting".to_owned() }),
        Next::Line if matches!(serde_json::from_slice(&line), Ok(Line::Greeting { .. })) => Ok(()),
        Next::Line | Next::TooLong => Err(QmpError::NotQmp { said: beginning(&line) }),
    }
}

async fn write_requests(mut write: OwnedWriteHalf, mut requests: mpsc::Receiver<Request>) {
    while let Some(request) = requests.recv().await {
        if let Err(error) = write_request(&mut write, request).await {
            tracing::debug!(%error, "QEMU's control socket takes no more commands");
            return;
        }
    }
}

async fn write_request(write: &mut OwnedWriteHalf, Request { line, fd }: Request) -> io::Result<()> {
    let sent = match fd {
        Some(fd) => {
            let stream: &UnixStream = write.as_ref();
            stream.async_io(Interest::WRITABLE, || send_with(stream, &line, &fd)).await?
        }
        None => 0,
    };
    write.write_all(line.get(sent..).unwrap_or_default()).await
}

/// Sends `fd` with the first bytes of `line`, and answers how many those were.
fn send_with(stream: &UnixStream, line: &[u8], fd: &OwnedFd) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("there is no room for a file descriptor"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Ends with the socket; by dropping `events` and every caller's sender it tells all of them.
async fn read_lines(mut read: BufReader<OwnedReadHalf>, waiting: Waiting, events: broadcast::Sender<Event>) {
    let mut line = Vec::new();
    loop {
        match next_line(&mut read, &mut line).await {
            Next::End => break,
            Next::TooLong => tracing::warn!(limit = LINE_LIMIT, "QEMU sent a line over the limit"),
            Next::Line => dispatch(&line, &waiting, &events),
        }
    }
    waiting.lock().take();
}

fn dispatch(line: &[u8], waiting: &Waiting, events: &broadcast::Sender<Event>) {
    match serde_json::from_slice(line) {
        Ok(Line::Success { value, id }) => waiting.answer(id, Ok(value)),
        Ok(Line::Failure { error, id }) => waiting.answer(id, Err(error)),
        Ok(Line::Event { event, data }) => {
            tracing::debug!(event, %data, "QEMU reports");
            if let Some(event) = known(&event, &data) {
                // Without subscribers there is nobody to tell.
                let _ = events.send(event);
            }
        }
        Ok(Line::Greeting { .. }) => {}
        Err(_) if line.trim_ascii().is_empty() => {}
        Err(error) => tracing::warn!(line = beginning(line), %error, "QEMU sent a line that makes no sense"),
    }
}

fn known(event: &str, data: &Value) -> Option<Event> {
    match event {
        "SHUTDOWN" => {
            let reason = data.get("reason").and_then(Value::as_str).unwrap_or("unknown");
            Some(Event::Shutdown { reason: reason.to_owned() })
        }
        "GUEST_PANICKED" => Some(Event::GuestPanicked),
        "STOP" => Some(Event::Stop),
        "RESUME" => Some(Event::Resume),
        // Without a name it is a part of a device, such as its virtio half.
        "DEVICE_DELETED" => {
            let device = data.get("device").and_then(Value::as_str)?;
            Some(Event::DeviceDeleted { device: device.to_owned() })
        }
        "ACPI_DEVICE_OST" => {
            let info = data.get("info")?;
            let device = info.get("device").and_then(Value::as_str)?.to_owned();
            Some(Event::Taken { device, status: info.get("status").and_then(Value::as_i64)? })
        }
        _ => None,
    }
}

fn beginning(line: &[u8]) -> String {
    String::from_utf8_lossy(line).chars().take(120).collect()
}

#[derive(Debug, PartialEq, Eq)]
enum Next {
    Line,
    TooLong,
    End,
}

/// Reads up to the next line feed. `line` never holds more than [`LINE_LIMIT`] bytes; a last line without its end counts as none.
async fn next_line(read: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> Next {
    line.clear();
    let mut length = 0_usize;
    loop {
        let (used, complete) = match read.fill_buf().await {
            Ok([]) | Err(_) => return Next::End,
            Ok(bytes) => {
                let end = bytes.iter().position(|byte| *byte == b'\n');
                let part = bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default();
                length = length.saturating_add(part.len());
                let room = LINE_LIMIT.saturating_sub(line.len()).min(part.len());
                line.extend_from_slice(part.get(..room).unwrap_or_default());
                (part.len() + usize::from(end.is_some()), end.is_some())
            }
        };
        read.consume(used);
        if complete {
            return if length > LINE_LIMIT { Next::TooLong } else { Next::Line };
        }
    }
}

#[cfg(test)]
pub(super) mod tests;

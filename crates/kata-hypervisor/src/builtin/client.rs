//! The client of the VMM's interface (see [`kata_vmm_api`]): one command at a time.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use kata_vmm_api::{Answer, Command, Descriptor, Failure, MAX_DESCRIPTORS, MAX_LINE, Reply, Request};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use thiserror::Error;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Interest};
use tokio::net::UnixStream;
use tokio::sync::Mutex;

/// Why a command was not carried out.
#[derive(Debug, Error)]
pub enum BuiltinError {
    /// The VMM said no.
    #[error("{}", .0.message)]
    Refused(Failure),
    /// It did not answer.
    #[error(
        "there was no answer to {command:?} within {bound:?}; see whether the process runs, and the host's load"
    )]
    NoAnswer {
        /// Name of the command.
        command: &'static str,
        /// The bound that has passed.
        bound: Duration,
    },
    /// It closed the connection.
    #[error("it closed its socket before it answered {command:?}")]
    Closed {
        /// Name of the command.
        command: &'static str,
    },
    /// The socket failed.
    #[error("its socket failed at {command:?}")]
    Socket {
        /// Name of the command.
        command: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It speaks something else; VMM and runtime are not of one version.
    #[error(
        "it answered {command:?} with something else: {said}; see whether kata-vmm is of the same version as the runtime"
    )]
    Garbled {
        /// Name of the command.
        command: &'static str,
        /// The first of what it said.
        said: String,
    },
}

/// Descriptors that go along with a command, and the numbers by which it names them.
#[derive(Debug, Default)]
pub(super) struct Descriptors(Vec<OwnedFd>);

impl Descriptors {
    pub(super) fn add(&mut self, fd: impl Into<OwnedFd>) -> Descriptor {
        self.0.push(fd.into());
        Descriptor(self.0.len() - 1)
    }

    /// Those before this one again, for another command.
    pub(super) fn before(&self, Descriptor(end): Descriptor) -> io::Result<Self> {
        self.0.iter().take(end).map(OwnedFd::try_clone).collect::<io::Result<_>>().map(Self)
    }

    /// Whether the interface takes so many.
    pub(super) fn fit(&self) -> bool {
        self.0.len() <= MAX_DESCRIPTORS
    }
}

/// A connection to a VMM.
#[derive(Clone, Debug)]
pub(super) struct Client(Arc<Mutex<Connection>>);

#[derive(Debug)]
struct Connection {
    stream: BufReader<UnixStream>,
    /// Number of the last request.
    last: u64,
    /// It was not answered yet: the VMM takes nothing more until then.
    outstanding: bool,
    /// What was read of an answer: whoever gives up in the middle of one leaves this to the next.
    line: Vec<u8>,
}

impl Client {
    pub(super) fn new(stream: UnixStream) -> Self {
        let stream = BufReader::new(stream);
        Self(Arc::new(Mutex::new(Connection { stream, last: 0, outstanding: false, line: Vec::new() })))
    }

    /// Has a command carried out. A caller that gives up does not disturb the exchange, which goes on without it.
    pub(super) async fn execute(
        &self,
        command: Command,
        descriptors: Descriptors,
        bound: Duration,
    ) -> Result<Answer, BuiltinError> {
        let name = name(&command);
        let connection = Arc::clone(&self.0);
        let exchange = tokio::spawn(async move {
            let mut connection = connection.lock().await;
            let exchange = connection.exchange(name, command, descriptors);
            let answer = tokio::time::timeout(bound, exchange).await;
            answer.unwrap_or(Err(BuiltinError::NoAnswer { command: name, bound }))
        });
        // It ends early only with the runtime.
        exchange.await.unwrap_or(Err(BuiltinError::Closed { command: name }))
    }
}

impl Connection {
    async fn exchange(
        &mut self,
        name: &'static str,
        command: Command,
        descriptors: Descriptors,
    ) -> Result<Answer, BuiltinError> {
        if self.outstanding {
            self.answer(name).await?;
        }
        self.last += 1;
        let garbled =
            |error: serde_json::Error| BuiltinError::Garbled { command: name, said: error.to_string() };
        let mut line = serde_json::to_vec(&Request { id: self.last, command }).map_err(garbled)?;
        line.push(b'\n');
        self.outstanding = true;
        let failed = |source| BuiltinError::Socket { command: name, source };
        match self.send(&line, &descriptors.0).await {
            Ok(()) => {}
            // What it said before it went is worth more; it has closed its end.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                return Err(BuiltinError::Closed { command: name });
            }
            Err(error) => return Err(failed(error)),
        }
        match self.answer(name).await? {
            Reply::Done { done, .. } => Ok(done),
            Reply::Failed { error, .. } => Err(BuiltinError::Refused(error)),
            Reply::Event { .. } => Err(BuiltinError::Closed { command: name }),
        }
    }

    /// The answer to the last request.
    async fn answer(&mut self, command: &'static str) -> Result<Reply, BuiltinError> {
        let failed = |source| BuiltinError::Socket { command, source };
        loop {
            let room = u64::try_from(MAX_LINE.saturating_sub(self.line.len())).unwrap_or(u64::MAX);
            (&mut self.stream).take(room).read_until(b'\n', &mut self.line).await.map_err(failed)?;
            let line = std::mem::take(&mut self.line);
            // What was cut off by the end is no answer.
            if !line.ends_with(b"\n") && line.len() < MAX_LINE {
                return Err(BuiltinError::Closed { command });
            }
            let said = || String::from_utf8_lossy(&line).chars().take(200).collect();
            match serde_json::from_slice(&line) {
                // The end of the machine is told by the end of its process as well.
                Ok(Reply::Event { event }) => tracing::debug!(?event, "the virtual machine monitor reports"),
                Ok(reply @ (Reply::Done { id, .. } | Reply::Failed { id, .. }))
                    if id == self.last || id == 0 =>
                {
                    self.outstanding = false;
                    return Ok(reply);
                }
                Ok(_) | Err(_) => return Err(BuiltinError::Garbled { command, said: said() }),
            }
        }
    }

    /// The descriptors go with the line's first bytes.
    async fn send(&mut self, line: &[u8], descriptors: &[OwnedFd]) -> io::Result<()> {
        let stream = self.stream.get_ref();
        let mut sent = 0;
        while let Some(rest @ [_, ..]) = line.get(sent..) {
            let now = if sent == 0 { descriptors } else { &[] };
            sent += stream.async_io(Interest::WRITABLE, || send_with(stream, rest, now)).await?;
        }
        Ok(())
    }
}

fn send_with(stream: &UnixStream, line: &[u8], descriptors: &[OwnedFd]) -> io::Result<usize> {
    let fds: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::Error::other("there is no room for that many descriptors"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?)
}

/// As the interface spells it.
fn name(command: &Command) -> &'static str {
    match command {
        Command::Create(_) => "create",
        Command::Boot => "boot",
        Command::Pause => "pause",
        Command::Resume => "resume",
        Command::AddDisk(_) => "add-disk",
        Command::AddNic(_) => "add-nic",
        Command::AddHostDevice(_) => "add-host-device",
        Command::RemoveDevice { .. } => "remove-device",
        Command::Resize(_) => "resize",
        Command::Info => "info",
        Command::Metrics => "metrics",
        Command::Shutdown => "shutdown",
        Command::Snapshot(_) => "snapshot",
    }
}

//! The standard streams of one process: what it gets, and what the agent keeps.
//!
//! With stream ports the host's connections are copied from and to ([`crate::stream`]). With none at all the peer is
//! one that reads and writes by RPC, and the agent keeps the ends of the pipes for it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::termios::{LocalModes, SpecialCodeIndex, Winsize, tcgetattr, tcsetwinsize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::container::ProcessIo;
use crate::reaper::ExitReceiver;
use crate::stream::{self, StreamError, Streams};

/// Host ports of the stream connections; zero is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ports {
    /// Carries what the process reads.
    pub stdin: u32,
    /// Carries what the process writes; with a terminal, all of it.
    pub stdout: u32,
    /// Carries what the process writes to its standard error.
    pub stderr: u32,
}

impl Ports {
    fn by_rpc(self) -> bool {
        self == Self::default()
    }
}

/// Streams of a process that the host does not get, although it asks for them. The process runs all the same: it reads the end at
/// once, and what it writes is thrown away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Withheld {
    /// What it reads.
    pub input: bool,
    /// What it writes.
    pub output: bool,
}

/// The agent's ends of a process that does not run yet.
#[derive(Debug, Default)]
pub struct Stdio {
    input: Option<AsyncFd<OwnedFd>>,
    input_peer: Option<OwnedFd>,
    output: Option<AsyncFd<OwnedFd>>,
    output_peer: Option<OwnedFd>,
    error: Option<AsyncFd<OwnedFd>>,
    error_peer: Option<OwnedFd>,
}

/// A failed use of a process's streams.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// It has no such stream for RPCs, or it is closed.
    #[error("the process has no {0} for this request")]
    Absent(&'static str),
    /// Everything was read.
    #[error("end of {0}")]
    End(&'static str),
    /// It runs without a terminal.
    #[error("the process has no terminal")]
    NoTerminal,
    /// The system's word.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        #[source]
        /// Why it failed.
        source: io::Error,
    },
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> StreamError {
    move |source| StreamError::Io { what, source: source.into() }
}

/// Makes the streams of a process: the ends it gets, and the agent's. A terminal is not among them: the engine makes
/// it with the process, for [`Stdio::attach`].
///
/// # Errors
/// A port without a connection; pipes that cannot be made.
pub async fn prepare(
    streams: &Streams,
    ports: Ports,
    withheld: Withheld,
    terminal: bool,
    pipe_size: usize,
) -> Result<(ProcessIo, Stdio), StreamError> {
    let (mut io, mut stdio) = (ProcessIo::default(), Stdio::default());
    // The host has made the connections, and sees them end where it does not get what it wants.
    stdio.input_peer = claim(streams, ports.stdin).await?.filter(|_| !withheld.input);
    stdio.output_peer = claim(streams, ports.stdout).await?.filter(|_| !withheld.output);
    if terminal {
        if withheld.output {
            stdio.output_peer = Some(nobody()?);
        }
        return Ok((io, stdio));
    }
    stdio.error_peer = claim(streams, ports.stderr).await?.filter(|_| !withheld.output);
    let wanted = |port: u32, withheld: bool| (ports.by_rpc() || port != 0) && !withheld;
    if wanted(ports.stdin, withheld.input) {
        let (theirs, ours) = pipe(pipe_size)?;
        io.stdin = Some(theirs);
        stdio.input = Some(stream::watch(ours, Interest::WRITABLE).map_err(failed("watching a pipe"))?);
    }
    if wanted(ports.stdout, withheld.output) {
        (io.stdout, stdio.output) = output_pipe(pipe_size)?;
    }
    if wanted(ports.stderr, withheld.output) {
        (io.stderr, stdio.error) = output_pipe(pipe_size)?;
    }
    Ok((io, stdio))
}

async fn claim(streams: &Streams, port: u32) -> Result<Option<OwnedFd>, StreamError> {
    if port == 0 { Ok(None) } else { streams.claim(port).await.map(Some) }
}

/// A reader that is gone: what is copied to it is read and dropped.
fn nobody() -> Result<OwnedFd, StreamError> {
    let (near, _) = UnixStream::pair().map_err(failed("making a socket"))?;
    Ok(near.into())
}

fn pipe(size: usize) -> Result<(OwnedFd, OwnedFd), StreamError> {
    let ends = pipe_with(PipeFlags::CLOEXEC).map_err(failed("making a pipe"))?;
    // Beyond the limit for pipes the kernel's default has to do.
    let _ = fcntl_setpipe_size(&ends.1, size);
    Ok(ends)
}

type OutputPipe = (Option<OwnedFd>, Option<AsyncFd<OwnedFd>>);

fn output_pipe(size: usize) -> Result<OutputPipe, StreamError> {
    let (ours, theirs) = pipe(size)?;
    Ok((Some(theirs), Some(stream::watch(ours, Interest::READABLE).map_err(failed("watching a pipe"))?)))
}

/// The streams of a running process, for requests.
#[derive(Debug)]
pub struct Attached {
    stdin: Mutex<Option<Arc<AsyncFd<OwnedFd>>>>,
    stdout: Option<AsyncFd<OwnedFd>>,
    stderr: Option<AsyncFd<OwnedFd>>,
    terminal: Option<OwnedFd>,
    close_stdin: Arc<Notify>,
}

impl Stdio {
    /// Starts copying for the process that ends with `exit` and, if it has a terminal, runs on that of this master; what
    /// is not copied is left to requests.
    ///
    /// # Errors
    /// A terminal that cannot be watched. It is closed then, which hangs up on the process.
    pub fn attach(mut self, exit: &ExitReceiver, terminal: Option<OwnedFd>) -> Result<Attached, StreamError> {
        let close_stdin = Arc::new(Notify::new());
        let is_terminal = terminal.is_some();
        if let Some(master) = &terminal {
            let watch = |interest| master.try_clone().and_then(|master| stream::watch(master, interest));
            self.input = Some(watch(Interest::WRITABLE).map_err(failed("watching a terminal"))?);
            self.output = Some(watch(Interest::READABLE).map_err(failed("watching a terminal"))?);
        }
        if let (Some(peer), Some(_)) = (self.input_peer.take(), &self.input)
            && let Some(sink) = self.input.take()
        {
            let task = InputTask { peer, sink, is_terminal, close: close_stdin.clone(), exit: exit.clone() };
            tokio::spawn(task.run());
        }
        let stdout = copy_output(self.output.take(), self.output_peer.take(), "stdout");
        let stderr = copy_output(self.error.take(), self.error_peer.take(), "stderr");
        let stdin = Mutex::new(self.input.map(Arc::new));
        Ok(Attached { stdin, stdout, stderr, terminal, close_stdin })
    }
}

/// Copies where there is a peer; gives back what is to be read by request.
fn copy_output(
    from: Option<AsyncFd<OwnedFd>>,
    peer: Option<OwnedFd>,
    name: &'static str,
) -> Option<AsyncFd<OwnedFd>> {
    let (from, peer) = match (from, peer) {
        (Some(from), Some(peer)) => (from, peer),
        (from, _) => return from,
    };
    tokio::spawn(async move {
        if let Err(error) = stream::output(from, peer).await {
            tracing::warn!(%error, stream = name, "copying a stream of a process");
        }
    });
    None
}

struct InputTask {
    peer: OwnedFd,
    sink: AsyncFd<OwnedFd>,
    is_terminal: bool,
    close: Arc<Notify>,
    exit: ExitReceiver,
}

impl InputTask {
    async fn run(self) {
        let peer = match stream::watch(self.peer, Interest::READABLE) {
            Ok(peer) => peer,
            Err(error) => {
                tracing::warn!(%error, "watching a stream connection");
                return;
            }
        };
        let copied = tokio::select! {
            copied = stream::input(&peer, &self.sink) => copied,
            () = self.close.notified() => stream::input_present(&peer, &self.sink).await.map(|()| true),
            // Whoever else may hold the read end, the process that the host meant is gone.
            _ = self.exit.wait() => return,
        };
        match copied {
            Ok(true) if self.is_terminal => type_end(&self.sink).await,
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "copying standard input"),
        }
    }
}

/// A terminal has no end of its own: in line mode the end-of-file character stands for it.
async fn type_end(terminal: &AsyncFd<OwnedFd>) {
    let Ok(modes) = tcgetattr(terminal.get_ref()) else { return };
    if modes.local_modes.contains(LocalModes::ICANON) {
        let end = modes.special_codes[SpecialCodeIndex::VEOF];
        let _ = stream::write_all(terminal, &[end]).await;
    }
}

impl Attached {
    fn stdin(&self) -> Option<Arc<AsyncFd<OwnedFd>>> {
        self.stdin.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Writes all of `data` to the process.
    ///
    /// # Errors
    /// No such stream for requests; nobody reads.
    pub async fn write_stdin(&self, data: &[u8]) -> Result<(), StdioError> {
        let stdin = self.stdin().ok_or(StdioError::Absent("stdin"))?;
        let written = stream::write_all(&stdin, data).await;
        written.map_err(|source| StdioError::Io { what: "writing to stdin", source })
    }

    /// The process reads the end after what was written so far.
    pub async fn close_stdin(&self) {
        self.close_stdin.notify_one();
        let taken = self.stdin.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(stdin), true) = (taken, self.terminal.is_some()) {
            type_end(&stdin).await;
        }
    }

    /// Up to `length` bytes of what the process wrote to its standard output, or terminal.
    ///
    /// # Errors
    /// [`StdioError::End`] after the last; no such stream for requests.
    pub async fn read_stdout(&self, length: usize) -> Result<Vec<u8>, StdioError> {
        Self::read(self.stdout.as_ref(), "stdout", length).await
    }

    /// As [`read_stdout`](Self::read_stdout), for standard error.
    ///
    /// # Errors
    /// [`StdioError::End`] after the last; no such stream for requests.
    pub async fn read_stderr(&self, length: usize) -> Result<Vec<u8>, StdioError> {
        Self::read(self.stderr.as_ref(), "stderr", length).await
    }

    async fn read(
        from: Option<&AsyncFd<OwnedFd>>,
        name: &'static str,
        length: usize,
    ) -> Result<Vec<u8>, StdioError> {
        let mut data = vec![0; length];
        let count = stream::read(from.ok_or(StdioError::Absent(name))?, &mut data).await;
        data.truncate(count.map_err(|source| StdioError::Io { what: "reading", source })?);
        if data.is_empty() { Err(StdioError::End(name)) } else { Ok(data) }
    }

    /// Sets the size of the terminal.
    ///
    /// # Errors
    /// There is none.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), StdioError> {
        let terminal = self.terminal.as_ref().ok_or(StdioError::NoTerminal)?;
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(terminal.as_fd(), size)
            .map_err(|source| StdioError::Io { what: "resizing the terminal", source: source.into() })
    }
}

#[cfg(test)]
mod tests;

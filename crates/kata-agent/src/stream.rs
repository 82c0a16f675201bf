//! Bytes between the pipes or the terminal of a process and the host's stream connections.
//!
//! ```text
//!  host ══ vsock 1027 ══▶ Streams (by peer port) ──▶ Copy ══ pipe / pty ══▶ process
//! ```
//!
//! Where one side is a pipe the bytes are spliced and never enter the agent's memory. A stream ends with the last
//! writer, not with the process, and a reader that went away does not block the process: the rest is discarded.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::Shutdown;
use rustix::pipe::{SpliceFlags, fcntl_getpipe_size, splice};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

/// How long a request waits for a connection that it names.
pub const CLAIM_WITHIN: Duration = Duration::from_secs(5);
/// How long a connection waits for a request that names it.
const UNCLAIMED_FOR: Duration = Duration::from_secs(30);
/// Connections that may wait for a request at a time.
const UNCLAIMED: usize = 1024;
const CHUNK: usize = 64 << 10;
const SPLICE: usize = 1 << 20;

/// A stream that a request names and that is not there.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The host did not connect.
    #[error(
        "no stream connection from host port {port} within {} s: the host names it in the request and has not made it \
         (agent.passfd_listener_port)",
        CLAIM_WITHIN.as_secs()
    )]
    NotConnected {
        /// The port that the request named.
        port: u32,
    },
    /// Two requests, or two streams of one request, name the same connection.
    #[error("the stream of host port {port} is already waited for")]
    Claimed {
        /// The port that the request named.
        port: u32,
    },
    /// A pipe or terminal could not be made or used.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        #[source]
        /// Why it failed.
        source: io::Error,
    },
}

#[derive(Debug)]
enum Slot {
    Connected { connection: OwnedFd, serial: u64 },
    Wanted(oneshot::Sender<OwnedFd>),
}

#[derive(Debug, Default)]
struct Slots {
    by_port: HashMap<u32, Slot>,
    serial: u64,
}

/// Stream connections and the requests that name them, whichever comes first. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Streams(Arc<Mutex<Slots>>);

impl Streams {
    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in a connection from host port `port`. Unclaimed, it is closed after a while.
    pub fn offer(&self, port: u32, connection: OwnedFd) {
        let mut slots = self.slots();
        slots.serial += 1;
        let serial = slots.serial;
        let connection = match slots.by_port.remove(&port) {
            Some(Slot::Wanted(waiter)) => match waiter.send(connection) {
                Ok(()) => return,
                Err(connection) => connection,
            },
            _ => connection,
        };
        if slots.by_port.len() >= UNCLAIMED {
            tracing::warn!(port, "too many unclaimed stream connections: closed");
            return;
        }
        slots.by_port.insert(port, Slot::Connected { connection, serial });
        drop(slots);
        let streams = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(UNCLAIMED_FOR).await;
            streams.expire(port, serial);
        });
    }

    fn expire(&self, port: u32, expired: u64) {
        let mut slots = self.slots();
        if matches!(slots.by_port.get(&port), Some(Slot::Connected { serial, .. }) if *serial == expired) {
            slots.by_port.remove(&port);
            tracing::warn!(port, "closed a stream connection that no request named");
        }
    }

    /// The connection from host port `port`, waited for if need be.
    ///
    /// # Errors
    /// [`StreamError::NotConnected`] after [`CLAIM_WITHIN`]; [`StreamError::Claimed`] if another waits for it.
    pub async fn claim(&self, port: u32) -> Result<OwnedFd, StreamError> {
        let arriving = {
            let mut slots = self.slots();
            match slots.by_port.remove(&port) {
                Some(Slot::Connected { connection, .. }) => return Ok(connection),
                Some(Slot::Wanted(waiter)) if !waiter.is_closed() => {
                    slots.by_port.insert(port, Slot::Wanted(waiter));
                    return Err(StreamError::Claimed { port });
                }
                _ => {}
            }
            let (sender, receiver) = oneshot::channel();
            slots.by_port.insert(port, Slot::Wanted(sender));
            receiver
        };
        match tokio::time::timeout(CLAIM_WITHIN, arriving).await {
            Ok(Ok(connection)) => Ok(connection),
            _ => {
                let mut slots = self.slots();
                if matches!(slots.by_port.get(&port), Some(Slot::Wanted(waiter)) if waiter.is_closed()) {
                    slots.by_port.remove(&port);
                }
                Err(StreamError::NotConnected { port })
            }
        }
    }
}

/// A descriptor in the runtime's hands: non-blocking, watched for the one direction it is used in.
///
/// # Errors
/// If it cannot be watched.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    // SAFETY: an OwnedFd keeps the descriptor open and the same for as long as it is registered.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Reads once what is there, at most `buffer`. Zero is the end; a terminal without processes counts as that.
///
/// # Errors
/// Read errors.
pub async fn read(from: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    let read = from.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?)).await;
    match read {
        Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => Ok(0),
        other => other,
    }
}

/// Writes all of `data`.
///
/// # Errors
/// Write errors; `EPIPE` where nobody reads any more.
pub async fn write_all(to: &AsyncFd<OwnedFd>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let written = to.async_io(Interest::WRITABLE, |fd| Ok(rustix::io::write(fd, data)?)).await?;
        data = data.get(written..).unwrap_or_default();
    }
    Ok(())
}

/// Copies what a process writes into `from` to the host at `peer`, until the last writer is gone; then closes `peer`
/// for writing. If the peer goes first, the rest is read and dropped.
///
/// # Errors
/// Read errors, and descriptors that cannot be watched.
pub async fn output(from: AsyncFd<OwnedFd>, peer: OwnedFd) -> io::Result<()> {
    let peer = watch(peer, Interest::WRITABLE)?;
    let mut copy = Copy::new(&from, &peer);
    loop {
        match copy.chunk().await {
            Ok(0) => break,
            Ok(_) => {}
            Err(CopyError::Read(error)) => return Err(error),
            Err(CopyError::Write(error)) => {
                tracing::debug!(%error, "the reader of a stream is gone: discarding the rest");
                drop(peer);
                return discard(&from).await;
            }
        }
    }
    // The peer may be gone by now, and then there is nothing to close.
    let _ = rustix::net::shutdown(&peer, Shutdown::Write);
    Ok(())
}

async fn discard(from: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    while read(from, &mut buffer).await? > 0 {}
    Ok(())
}

/// Copies what the host sends on `peer` to the process, until the host closes its side or nobody reads any more.
/// Gives whether the host said that this is the end, rather than going away.
///
/// # Errors
/// Read errors, and descriptors that cannot be watched.
pub async fn input(peer: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<bool> {
    let mut copy = Copy::new(peer, to);
    loop {
        match copy.chunk().await {
            Ok(0) => return Ok(true),
            Ok(_) => {}
            Err(CopyError::Read(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Ok(false);
            }
            Err(CopyError::Read(error)) => return Err(error),
            Err(CopyError::Write(_)) => return Ok(false),
        }
    }
}

/// Like [`input`] for the bytes that have arrived already; it does not wait for more.
///
/// # Errors
/// As [`input`].
pub async fn input_present(peer: &AsyncFd<OwnedFd>, to: &AsyncFd<OwnedFd>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        match rustix::io::read(peer.get_ref(), &mut *buffer) {
            Ok(0) | Err(Errno::AGAIN | Errno::CONNRESET) => return Ok(()),
            Ok(count) => write_all(to, buffer.get(..count).unwrap_or_default()).await?,
            Err(error) => return Err(error.into()),
        }
    }
}

#[derive(Debug)]
enum CopyError {
    Read(io::Error),
    Write(io::Error),
}

/// One direction of a stream.
struct Copy<'a> {
    from: &'a AsyncFd<OwnedFd>,
    to: &'a AsyncFd<OwnedFd>,
    splices: bool,
    buffer: Vec<u8>,
}

enum Spliced {
    Moved(usize),
    Again,
    Unsupported,
}

impl<'a> Copy<'a> {
    fn new(from: &'a AsyncFd<OwnedFd>, to: &'a AsyncFd<OwnedFd>) -> Self {
        let is_pipe = |fd: &AsyncFd<OwnedFd>| fcntl_getpipe_size(fd.get_ref()).is_ok();
        Self { from, to, splices: is_pipe(from) || is_pipe(to), buffer: Vec::new() }
    }

    /// Moves some bytes; zero is the end.
    async fn chunk(&mut self) -> Result<usize, CopyError> {
        while self.splices {
            match self.splice().await? {
                Spliced::Moved(count) => return Ok(count),
                Spliced::Again => {}
                Spliced::Unsupported => self.splices = false,
            }
        }
        self.buffer.resize(CHUNK, 0);
        let count = read(self.from, &mut self.buffer).await.map_err(CopyError::Read)?;
        write_all(self.to, self.buffer.get(..count).unwrap_or_default()).await.map_err(CopyError::Write)?;
        Ok(count)
    }

    async fn splice(&self) -> Result<Spliced, CopyError> {
        let mut readable = self.from.readable().await.map_err(CopyError::Read)?;
        let mut writable = self.to.writable().await.map_err(CopyError::Write)?;
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match splice(self.from.get_ref(), None, self.to.get_ref(), None, SPLICE, flags) {
            Ok(count) => Ok(Spliced::Moved(count)),
            Err(Errno::INTR) => Ok(Spliced::Again),
            Err(Errno::AGAIN) => {
                let (can_read, can_write) = self.ready().map_err(CopyError::Read)?;
                if !can_read {
                    readable.clear_ready();
                }
                if !can_write {
                    writable.clear_ready();
                }
                // Both are ready and it still would block: let plain reads and writes find out who.
                Ok(if can_read && can_write { Spliced::Unsupported } else { Spliced::Again })
            }
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Ok(Spliced::Unsupported),
            Err(error @ (Errno::PIPE | Errno::NOTCONN)) => Err(CopyError::Write(error.into())),
            // Which side it was is not told. A reset or a broken terminal is the host's or the process's end of it.
            Err(error) => Err(self.blame(error)),
        }
    }

    fn blame(&self, error: Errno) -> CopyError {
        let from_socket = fcntl_getpipe_size(self.from.get_ref()).is_err();
        if from_socket { CopyError::Read(error.into()) } else { CopyError::Write(error.into()) }
    }

    /// Which of the two would not block now.
    fn ready(&self) -> io::Result<(bool, bool)> {
        let mut fds = [
            PollFd::from_borrowed_fd(self.from.get_ref().as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.to.get_ref().as_fd(), PollFlags::OUT),
        ];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
        let [from, to] = fds;
        Ok((!from.revents().is_empty(), !to.revents().is_empty()))
    }
}

#[cfg(test)]
mod tests;

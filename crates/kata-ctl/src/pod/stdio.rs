//! Carries this process's standard streams through FIFOs to and from a pod, byte for byte.
//!
//! ```text
//!   stdin ─▶ thread ─▶ FIFO ─▶ owner          end of input: the FIFO is closed, then CloseIO is called
//!   stdout ◀─ thread ◀─ FIFO ◀─ owner         end of output: the owner closes its end; or nobody reads it any more
//!   stderr ◀─ thread ◀─ FIFO ◀─ owner
//! ```
//!
//! Threads, because the standard streams may be files, pipes or terminals: only blocking calls work with all of them. A
//! thread that waits for input nobody types ends with the process.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use tokio::sync::oneshot;

/// As much as a FIFO holds.
const BUFFER: usize = 64 << 10;

/// FIFOs that cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct StreamsError {
    action: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

/// Which streams a process is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Input from this process.
    pub stdin: bool,
    /// With a terminal, there is no separate error output.
    pub stderr: bool,
}

/// The FIFOs of one process. They go with the value.
pub struct Streams {
    stdin: Option<Fifo>,
    stdout: Fifo,
    stderr: Option<Fifo>,
}

struct Fifo {
    path: PathBuf,
    /// This process's end, until a thread has it.
    end: Option<OwnedFd>,
}

impl Streams {
    /// Makes the FIFOs in `dir`, their names beginning with `prefix`, and opens this process's ends: the owner finds a
    /// reader for its output whenever it looks.
    ///
    /// # Errors
    /// [`StreamsError`].
    pub fn make(dir: &Path, prefix: &str, wanted: Wanted) -> Result<Self, StreamsError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(dir).map_err(|source| StreamsError {
            action: "create",
            path: dir.to_owned(),
            source,
        })?;
        let fifo = |name: &str, flags| Fifo::make(dir.join(format!("{prefix}{name}")), flags);
        // For reading and writing: opening does not wait for the owner, and what is written early is kept.
        let stdin = if wanted.stdin { Some(fifo("stdin", OFlags::RDWR)?) } else { None };
        let stdout = fifo("stdout", OFlags::RDONLY | OFlags::NONBLOCK)?;
        let stderr =
            if wanted.stderr { Some(fifo("stderr", OFlags::RDONLY | OFlags::NONBLOCK)?) } else { None };
        Ok(Self { stdin, stdout, stderr })
    }

    /// Path of the input.
    pub fn stdin(&self) -> Option<&Path> {
        self.stdin.as_ref().map(|fifo| fifo.path.as_path())
    }

    /// Path of the output.
    pub fn stdout(&self) -> Option<&Path> {
        Some(&self.stdout.path)
    }

    /// Path of the error output.
    pub fn stderr(&self) -> Option<&Path> {
        self.stderr.as_ref().map(|fifo| fifo.path.as_path())
    }

    /// Begins to carry.
    pub fn carry(&mut self) -> Carried {
        let stdin = self.stdin.as_mut().and_then(|fifo| fifo.end.take());
        let stdout = self.stdout.end.take();
        let stderr = self.stderr.as_mut().and_then(|fifo| fifo.end.take());
        Carried {
            input: stdin.map(|fifo| spawn(move || copy(rustix::stdio::stdin(), fifo))),
            outputs: [
                stdout.map(|fifo| spawn(move || copy(fifo, rustix::stdio::stdout()))),
                stderr.map(|fifo| spawn(move || copy(fifo, rustix::stdio::stderr()))),
            ],
        }
    }

    /// This process's ends themselves, for who has something else to do with them than to [`carry`](Self::carry) them.
    pub fn ends(&mut self) -> (Option<FifoWriter>, Option<FifoReader>, Option<FifoReader>) {
        let stdin = self.stdin.as_mut().and_then(|fifo| fifo.end.take());
        let stderr = self.stderr.as_mut().and_then(|fifo| fifo.end.take());
        (stdin.map(FifoWriter), self.stdout.end.take().map(FifoReader), stderr.map(FifoReader))
    }

    /// After the process has ended: makes sure that the output ends where nobody ever opened it for writing.
    pub fn end_unopened(&self) {
        for path in [self.stdout(), self.stderr()].into_iter().flatten() {
            // A reader sees the end once the last of the writers that there were is gone; this is one, for a moment.
            let _ =
                rustix::fs::open(path, OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty());
        }
    }
}

/// The end that a process's input is written into. Waits where the FIFO is full.
pub struct FifoWriter(OwnedFd);

impl io::Write for FifoWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        write_all(&self.0, data)?;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The end that a process's output is read from. Waits for output, and for the first who writes.
pub struct FifoReader(OwnedFd);

impl io::Read for FifoReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(read(&self.0, buffer)?)
    }
}

impl Fifo {
    fn make(path: PathBuf, flags: OFlags) -> Result<Self, StreamsError> {
        let made = rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0);
        let opened = made.and_then(|()| rustix::fs::open(&path, flags | OFlags::CLOEXEC, Mode::empty()));
        match opened {
            Ok(end) => Ok(Self { path, end: Some(end) }),
            Err(error) => Err(StreamsError { action: "create", path, source: error.into() }),
        }
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        // The owner may have removed the whole directory.
        let _ = fs::remove_file(&self.path);
    }
}

/// How carrying a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// With the stream.
    Whole,
    /// Nobody reads what is written.
    Unread,
}

/// What happened to the streams of a process that still runs. Each comes once for a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// All input is in the FIFO, and the FIFO is closed.
    InputEnded,
    /// Nobody reads the output any more.
    OutputUnread,
}

/// Streams that are being carried.
pub struct Carried {
    input: Option<oneshot::Receiver<End>>,
    outputs: [Option<oneshot::Receiver<End>>; 2],
}

impl Carried {
    /// The next thing that the process should learn of.
    pub async fn notice(&mut self) -> Notice {
        let [stdout, stderr] = &mut self.outputs;
        loop {
            let end = tokio::select! {
                // A thread that could not be started counts as ended, too.
                _ = ended(&mut self.input) => return Notice::InputEnded,
                end = ended(stdout) => end,
                end = ended(stderr) => end,
            };
            if end == Ok(End::Unread) {
                return Notice::OutputUnread;
            }
        }
    }

    /// Comes back once all output is delivered.
    pub async fn drain(&mut self, streams: &Streams) {
        streams.end_unopened();
        for end in self.outputs.iter_mut().filter_map(Option::take) {
            let _ = end.await;
        }
    }
}

async fn ended(stream: &mut Option<oneshot::Receiver<End>>) -> Result<End, oneshot::error::RecvError> {
    match stream {
        Some(receiver) => {
            let end = receiver.await;
            *stream = None;
            end
        }
        None => std::future::pending().await,
    }
}

fn spawn(work: impl FnOnce() -> End + Send + 'static) -> oneshot::Receiver<End> {
    let (send, ended) = oneshot::channel();
    let named = thread::Builder::new().name("stdio".to_owned());
    // Without a thread the sender is dropped, which ends the stream as well.
    let started = named.spawn(move || {
        let end = work();
        // Nobody may be interested any more.
        let _ = send.send(end);
    });
    if let Err(error) = started {
        tracing::error!(%error, "a standard stream is not carried");
    }
    ended
}

/// Copies until the end, or until nobody reads. Both ends are closed then, which the other side sees; the standard
/// streams themselves are borrowed.
fn copy(from: impl AsFd, to: impl AsFd) -> End {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = match read(&from, &mut buffer) {
            Ok(0) => return End::Whole,
            Ok(count) => count,
            Err(error) => {
                tracing::debug!(%error, "a standard stream broke off");
                return End::Whole;
            }
        };
        if let Err(error) = write_all(&to, buffer.get(..count).unwrap_or_default()) {
            tracing::debug!(%error, "a standard stream is not read any more");
            return End::Unread;
        }
    }
}

/// Waits first: a FIFO without writers yet would read as ended.
fn read(from: &impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    loop {
        wait(from, PollFlags::IN)?;
        match rustix::io::read(from, &mut *buffer) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            // A terminal that hung up.
            Err(Errno::IO) => return Ok(0),
            other => return other,
        }
    }
}

fn write_all(to: &impl AsFd, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match rustix::io::write(to, data) {
            Ok(count) => data = data.get(count..).unwrap_or_default(),
            // Standard streams that somebody made non-blocking.
            Err(Errno::AGAIN) => wait(to, PollFlags::OUT)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait(fd: &impl AsFd, events: PollFlags) -> Result<(), Errno> {
    loop {
        match poll(&mut [PollFd::new(fd, events)], None) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Copies a file to a standard stream, from where it is read to its end.
///
/// # Errors
/// Either cannot be.
pub fn dump(file: &File, to: impl AsFd) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match rustix::io::read(file, &mut buffer)? {
            0 => return Ok(()),
            count => write_all(&to, buffer.get(..count).unwrap_or_default())?,
        }
    }
}

#[cfg(test)]
mod tests;

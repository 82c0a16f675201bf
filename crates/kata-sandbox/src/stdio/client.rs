//! The client's ends of a process's streams: FIFOs, or files.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;

use super::StdioError;

/// Between the first looks for a reader; doubled each time, so the wait is at most twice what it had to be.
const FIRST_LOOK: Duration = Duration::from_millis(1);
/// Between two looks, at most: a container whose output nobody ever reads costs one system call a second.
const LAST_LOOK: Duration = Duration::from_secs(1);

/// What a stream's path names.
enum Place {
    Fifo(PathBuf),
    File(PathBuf),
}

fn place(path: &Path) -> Result<Place, StdioError> {
    let text = path.to_string_lossy();
    if let Some(file) = text.strip_prefix("file://") {
        return Ok(Place::File(PathBuf::from(file)));
    }
    if text.contains("://") {
        return Err(StdioError::Scheme(text.into_owned()));
    }
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_fifo() => Ok(Place::Fifo(path.to_owned())),
        Ok(_) => Ok(Place::File(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Place::File(path.to_owned())),
        Err(source) => Err(StdioError::Client { path: path.to_owned(), source }),
    }
}

/// Where output goes to.
pub(super) enum Sink {
    Fifo(FifoWriter),
    File(tokio::fs::File),
}

impl Sink {
    /// Opens the file, or begins to wait for the FIFO's reader. One that is `lasting` is not waited for, and never gone.
    pub(super) fn open(path: &Path, lasting: bool) -> Result<Self, StdioError> {
        match place(path)? {
            Place::Fifo(path) if lasting => {
                match pipe::OpenOptions::new().read_write(true).open_sender(&path) {
                    Ok(pipe) => Ok(Self::Fifo(FifoWriter { path, pipe: Some(pipe), had_reader: true })),
                    Err(source) => Err(StdioError::Client { path, source }),
                }
            }
            Place::Fifo(path) => Ok(Self::Fifo(FifoWriter { path, pipe: None, had_reader: false })),
            Place::File(path) => match OpenOptions::new().append(true).create(true).mode(0o640).open(&path) {
                Ok(file) => Ok(Self::File(tokio::fs::File::from_std(file))),
                Err(source) => Err(StdioError::Client { path, source }),
            },
        }
    }

    /// Waits until there is somebody to read what would be written, for the first time.
    pub(super) async fn ready(&mut self) {
        if let Self::Fifo(fifo) = self {
            fifo.wait_for_reader().await;
        }
    }

    /// Writes all of `data`, or none to somebody who is gone.
    pub(super) async fn write(&mut self, data: &[u8]) -> io::Result<()> {
        match self {
            Self::Fifo(fifo) => fifo.write(data).await,
            Self::File(file) => {
                file.write_all(data).await?;
                file.flush().await
            }
        }
    }
}

/// The writing end of a FIFO.
///
/// Opening it for reading and writing always succeeds and never tells that the reader is gone. Where one comes back that is
/// as it should be; elsewhere the process would hang on a full pipe for ever. Opening it for writing blocks, or fails while there is no reader, and the kernel
/// has no event for one who comes: so it is looked for.
pub(super) struct FifoWriter {
    path: PathBuf,
    pipe: Option<pipe::Sender>,
    /// There was one, or there will be none any more.
    had_reader: bool,
}

impl FifoWriter {
    async fn wait_for_reader(&mut self) {
        let mut pause = FIRST_LOOK;
        while !self.look_for_reader() && !self.had_reader {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_LOOK);
        }
    }

    fn look_for_reader(&mut self) -> bool {
        if self.pipe.is_none() {
            match pipe::OpenOptions::new().open_sender(&self.path) {
                Ok(pipe) => {
                    self.pipe = Some(pipe);
                    self.had_reader = true;
                }
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
                // Removed by a client that is done with it: nobody can come any more, and the process must not wait.
                Err(error) => {
                    tracing::debug!(fifo = %self.path.display(), %error, "cannot be opened");
                    self.had_reader = true;
                }
            }
        }
        self.pipe.is_some()
    }

    async fn write(&mut self, data: &[u8]) -> io::Result<()> {
        if !self.had_reader {
            self.wait_for_reader().await;
        }
        if !self.look_for_reader() {
            return Ok(());
        }
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
        match pipe.write_all(data).await {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                tracing::info!(fifo = %self.path.display(), "the reader of a process's output is gone; output is dropped until another comes");
                self.pipe = None;
                Ok(())
            }
            other => other,
        }
    }
}

/// Where input comes from.
pub(super) enum Source {
    Fifo {
        pipe: pipe::Receiver,
        /// Our own writing end: while it is open, a client that closes its end does not end the input.
        keep_open: Option<OwnedFd>,
    },
    File(tokio::fs::File),
}

impl Source {
    pub(super) fn open(path: &Path) -> Result<Self, StdioError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| StdioError::Client { path, source }
        };
        match place(path)? {
            Place::Fifo(path) => {
                // In this order: opening for writing needs a reader, and that is us.
                let pipe = pipe::OpenOptions::new().open_receiver(&path).map_err(failed(&path))?;
                let mut writer = OpenOptions::new();
                let writer =
                    writer.write(true).custom_flags(libc::O_NONBLOCK).open(&path).map_err(failed(&path))?;
                Ok(Self::Fifo { pipe, keep_open: Some(writer.into()) })
            }
            Place::File(path) => match File::open(&path) {
                Ok(file) => Ok(Self::File(tokio::fs::File::from_std(file))),
                Err(source) => Err(StdioError::Client { path, source }),
            },
        }
    }

    /// Reads some input; zero bytes are its end.
    pub(super) async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Fifo { pipe, .. } => pipe.read(buffer).await,
            Self::File(file) => file.read(buffer).await,
        }
    }

    /// What is there without waiting, after the client said that no more will come.
    pub(super) async fn read_rest(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Fifo { pipe, keep_open } => {
                // The last writer but the client, who may close its end later or never.
                *keep_open = None;
                // Not through the runtime: it may not have seen yet that there is something.
                match rustix::io::read(&*pipe, buffer) {
                    Err(rustix::io::Errno::AGAIN) => Ok(0),
                    other => Ok(other?),
                }
            }
            Self::File(file) => file.read(buffer).await,
        }
    }
}

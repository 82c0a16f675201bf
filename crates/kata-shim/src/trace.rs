//! The owner's log, and what happens on a panic.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use kata_config::LogLevel;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, reload};

/// Connections that may wait to be accepted, as the standard library has it.
const BACKLOG: i32 = 128;
/// Exit code after a panic, as Rust's own.
const PANICKED: i32 = 101;

/// Sends all further log lines to `path`.
pub(crate) fn to_file(path: &Path, level: LogLevel) -> io::Result<()> {
    let file = File::options().create(true).append(true).mode(0o600).open(path)?;
    let lines = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_max_level(filter(level))
        .with_writer(Mutex::new(file));
    lines.try_init().map_err(io::Error::other)
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    }
}

/// Sends all further log lines to `path`, and warnings and errors to the FIFO that containerd copies to its own log.
pub(crate) fn under_containerd(path: &Path, fifo: &Path, debug: bool) -> io::Result<Level> {
    let file = File::options().create(true).append(true).mode(0o600).open(path)?;
    let (filter, handle) = reload::Layer::new(if debug { LevelFilter::DEBUG } else { LevelFilter::INFO });
    let to_containerd = if debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
    let fifo = Fifo::open(fifo)
        .map(|fifo| fmt::layer().with_ansi(false).with_writer(Mutex::new(fifo)).with_filter(to_containerd));
    let file = fmt::layer().with_ansi(false).with_writer(Mutex::new(file)).with_filter(filter);
    tracing_subscriber::registry().with(file).with(fifo).try_init().map_err(io::Error::other)?;
    Ok(Level(Some(Box::new(move |level| handle.reload(level).map_err(io::Error::other)))))
}

/// The level of the owner's log, which the configuration may change.
pub(crate) struct Level(Option<Reload>);

type Reload = Box<dyn Fn(LevelFilter) -> io::Result<()> + Send + Sync>;

impl Level {
    /// For tests, which do not log.
    #[cfg(test)]
    pub(crate) fn fixed() -> Self {
        Self(None)
    }

    pub(crate) fn set(&self, level: LogLevel) {
        if let Some(Err(error)) = self.0.as_ref().map(|reload| reload(filter(level))) {
            tracing::warn!(%error, "the level of the log stays as it is");
        }
    }
}

/// containerd's end of the log. Lines that it does not take, as while it is restarted, are in the owner's own log.
struct Fifo(File);

impl Fifo {
    /// With a reading end of our own, so that the FIFO outlives containerd's, and without waiting for room in it.
    fn open(path: &Path) -> Option<Self> {
        let flags = libc::O_NONBLOCK;
        File::options().read(true).write(true).custom_flags(flags).open(path).ok().map(Self)
    }
}

impl Write for Fifo {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let _ = self.0.write(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The socket that was handed over as standard input, which is taken away from it.
pub(crate) fn listener_on_stdin() -> io::Result<UnixListener> {
    let listener = UnixListener::from(rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?);
    listener.local_addr()?;
    // Whoever connects asks the kernel for the pid of who listens: from here on that is this process.
    rustix::net::listen(&listener, BACKLOG)?;
    listener.set_nonblocking(true)?;
    rustix::stdio::dup2_stdin(&File::open("/dev/null")?)?;
    Ok(listener)
}

/// Closes whatever the caller left open beside the standard streams: an owner lives long, and must not hold on to a pipe or
/// lock of somebody's shell.
///
/// To be called first of all: no descriptor that is open then may have an owner in this process.
pub(crate) fn close_inherited() {
    // SAFETY: as documented, nothing in this process owns a descriptor from 3 up. Numbers that are not open are skipped.
    unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
}

/// Leaves the terminal and the pipes of whoever started this process: a client that reads its stderr sees the end of it
/// once the pod serves.
pub(crate) fn detach_stdio() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(rustix::stdio::dup2_stderr(&null)?)
}

/// From here on a panic anywhere ends the process, and takes the pod's processes and mounts along: an owner that cannot be
/// trusted any more must not leave a machine behind.
pub(crate) fn release_on_panic(run_dir: PathBuf) {
    static PANICKING: AtomicBool = AtomicBool::new(false);
    std::panic::set_hook(Box::new(move |panic| {
        if PANICKING.swap(true, Ordering::SeqCst) {
            return;
        }
        tracing::error!("{panic}; releasing the pod");
        if let Err(error) = kata_sandbox::release(&run_dir) {
            tracing::error!("{error}");
        }
        std::process::exit(PANICKED);
    }));
}

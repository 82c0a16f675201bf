//! The owner's log, and what happens on a panic.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use kata_config::LogLevel;
use tracing_subscriber::filter::LevelFilter;

/// Exit code after a panic, as Rust's own.
const PANICKED: i32 = 101;

/// Sends all further log lines to `path`.
pub(crate) fn to_file(path: &Path, level: LogLevel) -> io::Result<()> {
    let file = File::options().create(true).append(true).mode(0o600).open(path)?;
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    let lines =
        tracing_subscriber::fmt().with_ansi(false).with_max_level(level).with_writer(Mutex::new(file));
    lines.try_init().map_err(io::Error::other)
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

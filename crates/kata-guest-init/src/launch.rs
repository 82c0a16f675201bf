//! What units start their programs with, for what a unit cannot say. The initramfs's `/init` is kept for that as
//! [`LAUNCHER`](crate::units::LAUNCHER).
//!
//! ```text
//! start SOCKET PROGRAM [COUNT FILE WORD…]…   becomes PROGRAM with COUNT words of each group whose FILE exists;
//!                                            FILE `-`: always; SOCKET `-`: none
//! wait SOCKET                                ends once somebody accepts connections at SOCKET
//! ```
//!
//! `start` removes a socket that a former run has left and makes the directory for it. How long `wait` may take is the unit's
//! matter (`TimeoutStartSec=`). It sleeps until the kernel tells of a new file, so a service is ready when it is.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::io::Errno;

use crate::fault::chain;

const NONE: &str = "-";

/// A start that failed.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// Not called as units call it.
    #[error(
        "start SOCKET PROGRAM [COUNT FILE WORD…]…, or wait SOCKET: units of extensions say that, and nobody else has to"
    )]
    Usage,
    /// The program cannot be executed.
    #[error("executing {program:?}")]
    Execute {
        /// The program.
        program: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// There is no place for a socket, or it cannot be watched.
    #[error("{what} {path:?}")]
    Socket {
        /// What was tried.
        what: &'static str,
        /// The socket, or its directory.
        path: PathBuf,
        #[source]
        /// Why.
        source: io::Error,
    },
}

/// Runs with `arguments`, those behind the program's name.
#[must_use]
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.collect();
    let words: Vec<&OsStr> = arguments.iter().map(OsString::as_os_str).collect();
    let error = match words.as_slice() {
        [verb, socket, program, groups @ ..] if *verb == "start" => {
            start(Path::new(socket), Path::new(program), groups)
        }
        [verb, socket] if *verb == "wait" => match wait(Path::new(socket)) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => error,
        },
        [verb] if *verb == "--version" => {
            let text = format!("kata-guest-init {}\n", env!("CARGO_PKG_VERSION"));
            let _ = rustix::io::write(rustix::stdio::stdout(), text.as_bytes());
            return ExitCode::SUCCESS;
        }
        _ => LaunchError::Usage,
    };
    let _ = rustix::io::write(
        rustix::stdio::stderr(),
        format!("kata-guest-init: {}\n", chain(&error)).as_bytes(),
    );
    ExitCode::FAILURE
}

/// Returns only where the program was not started.
fn start(socket: &Path, program: &Path, groups: &[&OsStr]) -> LaunchError {
    let Some(words) = chosen(groups, Path::exists) else { return LaunchError::Usage };
    if socket != Path::new(NONE) {
        let ready = make_directory(socket).and_then(|()| remove_stale(socket));
        if let Err(error) = ready {
            return error;
        }
    }
    let source = Command::new(program).args(words).exec();
    LaunchError::Execute { program: program.into(), source }
}

/// The words of those groups whose file exists; `None` for what are no groups.
fn chosen<'a>(mut groups: &[&'a OsStr], exists: impl Fn(&Path) -> bool) -> Option<Vec<&'a OsStr>> {
    let mut chosen = Vec::new();
    while let [count, file, rest @ ..] = groups {
        let (words, behind) = rest.split_at_checked(count.to_str()?.parse().ok()?)?;
        if *file == NONE || exists(Path::new(file)) {
            chosen.extend(words);
        }
        groups = behind;
    }
    groups.is_empty().then_some(chosen)
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LaunchError {
    move |source| LaunchError::Socket { what, path: path.into(), source }
}

fn directory_of(socket: &Path) -> &Path {
    socket.parent().unwrap_or_else(|| Path::new("/"))
}

fn make_directory(socket: &Path) -> Result<(), LaunchError> {
    let directory = directory_of(socket);
    if directory.is_dir() {
        return Ok(());
    }
    let made = std::fs::create_dir_all(directory)
        .and_then(|()| std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755)));
    made.map_err(failed("making the directory", directory))
}

fn remove_stale(socket: &Path) -> Result<(), LaunchError> {
    let is_socket = std::fs::symlink_metadata(socket).is_ok_and(|metadata| metadata.file_type().is_socket());
    if is_socket {
        std::fs::remove_file(socket).map_err(failed("removing the old socket", socket))
    } else {
        Ok(())
    }
}

/// Returns once a connection was accepted.
fn wait(socket: &Path) -> Result<(), LaunchError> {
    make_directory(socket)?;
    let directory = directory_of(socket);
    let watching = || -> Result<_, Errno> {
        let events = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&events, directory, inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO)?;
        Ok(events)
    };
    let events = watching().map_err(|error| failed("watching", directory)(error.into()))?;
    loop {
        // A socket is made before it listens, and the kernel tells of the former alone: that little is slept.
        let patience = match UnixStream::connect(socket) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                Some(Timespec { tv_sec: 0, tv_nsec: 10_000_000 })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed("connecting to", socket)(error)),
        };
        match poll(&mut [PollFd::new(&events, PollFlags::IN)], patience.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(failed("watching", directory)(error.into())),
        }
        // Which file it was does not matter.
        while rustix::io::read(&events, &mut [0_u8; 4096]).is_ok_and(|bytes| bytes > 0) {}
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::time::Duration;

    use super::*;

    fn chosen_of(groups: &[&str], existing: &str) -> Option<Vec<String>> {
        let groups: Vec<&OsStr> = groups.iter().map(OsStr::new).collect();
        let words = chosen(&groups, |path| path == Path::new(existing))?;
        Some(words.iter().map(|word| word.to_str().unwrap().to_owned()).collect())
    }

    #[test]
    fn words_of_a_group_are_there_when_its_file_is() {
        let groups = ["2", "-", "a", "-", "1", "/x", "b", "0", "/x", "2", "/y", "c", "3"];
        assert_eq!(chosen_of(&groups, "/x").unwrap(), ["a", "-", "b"]);
        assert_eq!(chosen_of(&groups, "/y").unwrap(), ["a", "-", "c", "3"]);
        assert_eq!(chosen_of(&[], "").unwrap().len(), 0);
    }

    #[test]
    fn groups_that_are_none_are_refused() {
        for groups in [&["1"][..], &["2", "-", "a"], &["-1", "-"], &["x", "-"], &["0", "-", "y"]] {
            assert_eq!(chosen_of(groups, ""), None, "{groups:?}");
        }
    }

    #[test]
    fn only_a_socket_is_removed_and_its_directory_is_made() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("a/b/s.sock");
        make_directory(&socket).unwrap();
        drop(UnixListener::bind(&socket).unwrap());
        remove_stale(&socket).unwrap();
        assert!(!socket.exists());
        std::fs::write(&socket, "precious").unwrap();
        remove_stale(&socket).unwrap();
        assert_eq!(std::fs::read_to_string(&socket).unwrap(), "precious");
    }

    #[test]
    fn waiting_ends_when_somebody_listens_and_not_when_a_file_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("run/s.sock");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(&socket));
            std::thread::sleep(Duration::from_millis(30));
            drop(UnixListener::bind(&socket).unwrap());
            std::thread::sleep(Duration::from_millis(30));
            assert!(!waiting.is_finished());
            std::fs::remove_file(&socket).unwrap();
            let _listener = UnixListener::bind(&socket).unwrap();
            waiting.join().unwrap().unwrap();
        });
    }
}

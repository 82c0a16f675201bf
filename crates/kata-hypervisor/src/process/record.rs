//! The leak record: what has to be undone when a pod ends, however it ends.
//!
//! One JSON object a line, appended before the thing is made (for a process: before its program runs). It outlives its writer,
//! so whoever cleans up after a dead owner works off the same list as an orderly teardown.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::identity;

/// How long cgroups may still be in use by processes that have ended: all those of a record, for whoever cleans up after an owner
/// that hangs has 5 s for everything.
const EMPTY_BOUND: Duration = Duration::from_secs(2);
/// Between two looks whether it is.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How long a killed process may take to be gone. Only one that hangs in the kernel takes long.
const DEATH_BOUND: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Entry {
    Process { name: String, pid: u32, start_time: u64 },
    Mount { path: PathBuf },
    Dir { path: PathBuf },
    File { path: PathBuf },
    Cgroup { path: PathBuf },
}

/// An open leak record; clones append to the same file.
#[derive(Clone, Debug)]
pub struct Record(Arc<OpenRecord>);

#[derive(Debug)]
struct OpenRecord {
    path: PathBuf,
    file: Mutex<File>,
}

/// What [`Record::release`] found still there and undid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Processes killed.
    pub processes: usize,
    /// Mounts taken down.
    pub mounts: usize,
    /// Files, directories and cgroups removed.
    pub paths: usize,
}

/// What can go wrong with a leak record.
#[derive(Debug, Error)]
pub enum RecordError {
    /// The record itself cannot be read or written.
    #[error("leak record {path:?} cannot be {operation}", path = .path.display())]
    Io {
        /// `opened`, `read`, `written`, `removed`.
        operation: &'static str,
        /// The record.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something is still there. The record is kept, so releasing can be tried again.
    #[error("not everything in leak record {path:?} could be released: {}", .left.join("; "), path = .path.display())]
    Left {
        /// The record.
        path: PathBuf,
        /// What is left, and why.
        left: Vec<String>,
    },
}

impl Record {
    /// Opens the record at `path`, making it where it is absent. Earlier entries stay.
    ///
    /// # Errors
    /// [`RecordError::Io`]
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, RecordError> {
        let path = path.into();
        let opened = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(&path);
        let file = opened.and_then(end_last_line);
        let file =
            file.map_err(|source| RecordError::Io { operation: "opened", path: path.clone(), source })?;
        Ok(Self(Arc::new(OpenRecord { path, file: Mutex::new(file) })))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// A process; `start_time` is field 22 of `/proc/<pid>/stat`, and tells it from a later one with the same pid.
    ///
    /// # Errors
    /// [`RecordError::Io`]
    pub fn process(&self, name: &str, pid: u32, start_time: u64) -> Result<(), RecordError> {
        self.append(&Entry::Process { name: name.to_owned(), pid, start_time })
    }

    /// A mount about to be made at `path`.
    ///
    /// # Errors
    /// [`RecordError::Io`]
    pub fn mount(&self, path: impl Into<PathBuf>) -> Result<(), RecordError> {
        self.append(&Entry::Mount { path: path.into() })
    }

    /// A directory about to be made at `path`; released with everything in it.
    ///
    /// # Errors
    /// [`RecordError::Io`]
    pub fn dir(&self, path: impl Into<PathBuf>) -> Result<(), RecordError> {
        self.append(&Entry::Dir { path: path.into() })
    }

    /// A file or socket about to be made at `path`.
    ///
    /// # Errors
    /// [`RecordError::Io`]
    pub fn file(&self, path: impl Into<PathBuf>) -> Result<(), RecordError> {
        self.append(&Entry::File { path: path.into() })
    }

    /// A cgroup of the host about to be made at `path`; left alone where others are in it by the time it is released.
    ///
    /// # Errors
    /// [`RecordError::Io`]
    pub fn cgroup(&self, path: impl Into<PathBuf>) -> Result<(), RecordError> {
        self.append(&Entry::Cgroup { path: path.into() })
    }

    fn append(&self, entry: &Entry) -> Result<(), RecordError> {
        let write = || {
            let mut line = serde_json::to_vec(entry)?;
            line.push(b'\n');
            self.0.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line)
        };
        write().map_err(|source| RecordError::Io { operation: "written", path: self.0.path.clone(), source })
    }

    /// Undoes everything in the record at `path`: kills the processes, takes down the mounts, newest first, removes files and
    /// directories, newest first, and at last the record. What is gone already is fine, and so is an absent record. Blocks, for
    /// as long as killed processes take to die.
    ///
    /// # Errors
    /// [`RecordError::Left`] names all that could not be undone; the rest is.
    pub fn release(path: &Path) -> Result<Released, RecordError> {
        let entries = read(path)?;
        let mut done = Released::default();
        let mut left = Vec::new();
        done.processes = kill_all(&entries, &mut left);
        for entry in entries.iter().rev() {
            if let Entry::Mount { path } = entry {
                done.mounts += tally(take_down(path), "mount", path, &mut left);
            }
        }
        let deadline = Instant::now() + EMPTY_BOUND;
        for entry in entries.iter().rev() {
            match entry {
                Entry::Dir { path } => done.paths += tally(remove_dir(path), "directory", path, &mut left),
                Entry::File { path } => {
                    done.paths += tally(remove(fs::remove_file(path)), "file", path, &mut left)
                }
                Entry::Cgroup { path } => {
                    done.paths += tally(remove_cgroup(path, deadline), "cgroup", path, &mut left)
                }
                Entry::Process { .. } | Entry::Mount { .. } => {}
            }
        }
        if !left.is_empty() {
            return Err(RecordError::Left { path: path.to_owned(), left });
        }
        remove(fs::remove_file(path)).map_err(|source| RecordError::Io {
            operation: "removed",
            path: path.to_owned(),
            source,
        })?;
        Ok(done)
    }
}

/// A killed process keeps its cgroup until it is gone, and what it had started a moment longer. Where others have a cgroup
/// below, or do not go, it is theirs now: the last one removes it.
fn remove_cgroup(path: &Path, deadline: Instant) -> io::Result<bool> {
    loop {
        match remove(fs::remove_dir(path)) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                if has_children(path) {
                    tracing::debug!(cgroup = %path.display(), "left to those below it");
                    return Ok(false);
                }
                if Instant::now() > deadline {
                    let inside = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
                    let own = std::process::id().to_string();
                    if inside.lines().all(|pid| pid == own) {
                        return Err(error);
                    }
                    tracing::warn!(cgroup = %path.display(), processes = ?inside.lines().collect::<Vec<_>>(), "left to those in it");
                    return Ok(false);
                }
                std::thread::sleep(LOOK_AGAIN);
            }
            other => return other,
        }
    }
}

fn has_children(path: &Path) -> bool {
    let mut below = fs::read_dir(path).into_iter().flatten().flatten();
    below.any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
}

/// A writer that died in the middle of a line must not spoil the next one.
fn end_last_line(mut file: File) -> io::Result<File> {
    if file.seek(SeekFrom::End(0))? > 0 {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        if last != *b"\n" {
            file.write_all(b"\n")?;
        }
    }
    Ok(file)
}

fn read(path: &Path) -> Result<Vec<Entry>, RecordError> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(RecordError::Io { operation: "read", path: path.to_owned(), source }),
    };
    let lines = text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    Ok(lines
        .filter_map(|line| match serde_json::from_slice(line) {
            Ok(entry) => Some(entry),
            Err(error) => {
                tracing::warn!(record = %path.display(), %error, "leak record has a line that cannot be read");
                None
            }
        })
        .collect())
}

/// Kills first and waits afterwards, so that the processes die side by side.
fn kill_all(entries: &[Entry], left: &mut Vec<String>) -> usize {
    let mut dying = Vec::new();
    for entry in entries {
        let Entry::Process { name, pid, start_time } = entry else { continue };
        match kill(*pid, *start_time) {
            Ok(Some(pidfd)) => dying.push((name, pid, pidfd)),
            Ok(None) => {}
            Err(error) => left.push(format!("process {name} (pid {pid}): {error}")),
        }
    }
    let deadline = Instant::now() + DEATH_BOUND;
    let mut killed = 0;
    for (name, pid, pidfd) in dying {
        match wait_until(&pidfd, deadline) {
            Ok(true) => killed += 1,
            Ok(false) => left.push(format!("process {name} (pid {pid}) survives SIGKILL")),
            Err(error) => left.push(format!("process {name} (pid {pid}): {error}")),
        }
    }
    killed
}

/// The pidfd comes before the look at the start time: what it stands for cannot change any more.
fn kill(pid: u32, start_time: u64) -> io::Result<Option<impl AsFd>> {
    let Some(id) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    };
    let pidfd = match pidfd_open(id, PidfdFlags::empty()) {
        Err(Errno::SRCH) => return Ok(None),
        other => other?,
    };
    if identity::start_time(pid).ok() != Some(start_time) {
        return Ok(None);
    }
    match pidfd_send_signal(&pidfd, Signal::KILL) {
        Err(Errno::SRCH) => Ok(None),
        other => Ok(other.map(|()| Some(pidfd))?),
    }
}

fn wait_until(pidfd: &impl AsFd, deadline: Instant) -> io::Result<bool> {
    loop {
        let rest = Timespec::try_from(deadline.saturating_duration_since(Instant::now()))
            .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&rest)) {
            Err(Errno::INTR) => {}
            ended => return Ok(ended? > 0),
        }
    }
}

fn take_down(path: &Path) -> io::Result<bool> {
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(true),
        // Not a mount point (any more), or not there.
        Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Removing what is below a mount that is still up would delete what somebody shared with the pod.
fn remove_dir(path: &Path) -> io::Result<bool> {
    if let Some(mount) = mount_below(path)? {
        return Err(io::Error::other(format!("{} is still mounted", mount.display())));
    }
    remove(fs::remove_dir_all(path))
}

fn mount_below(path: &Path) -> io::Result<Option<PathBuf>> {
    // Mounts are listed by their real paths.
    let path = match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mut points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape);
    Ok(points.find(|point| point.starts_with(&path)))
}

/// The kernel writes blanks and the like as `\040` in mountinfo.
fn unescape(text: &str) -> PathBuf {
    let mut plain = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        let code = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match (first, code) {
            (b'\\', Some(code)) => {
                plain.push(code);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(<std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(plain))
}

fn remove(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(false)
        }
        other => other.map(|()| true),
    }
}

fn tally(result: io::Result<bool>, what: &str, path: &Path, left: &mut Vec<String>) -> usize {
    match result {
        Ok(done) => usize::from(done),
        Err(error) => {
            left.push(format!("{what} {}: {error}", path.display()));
            0
        }
    }
}

//! Control groups, version 2 only: one directory for each container, with its limits and its device filter.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use kata_api::agent::CgroupStats;
use oci_spec::runtime::{LinuxDevice, LinuxResources};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use thiserror::Error;

use super::{EngineError, Fault};

mod devices;
mod events;
mod limits;
mod stats;

pub use events::OomEvents;

/// How long the kernel may take to freeze, thaw or empty a cgroup.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a process may arrive in a cgroup that was just empty.
const ARRIVALS: usize = 8;

/// What can go wrong with a cgroup.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// The root is not a cgroup v2 hierarchy.
    #[error("{} is not a cgroup v2 hierarchy", .0.display())]
    NotV2(PathBuf),
    /// The cgroup holds processes of somebody else.
    #[error("the cgroup {} is in use", .0.display())]
    InUse(PathBuf),
    /// A limit was asked for and the kernel has no file for it.
    #[error("{key}: this kernel has no {file} (is the controller built in?)")]
    NoController {
        /// Key path in the spec.
        key: String,
        /// Name of the file.
        file: String,
    },
    /// A file or directory of the cgroup.
    #[error("cannot {action} {}", .path.display())]
    File {
        /// `read`, `write …`, `make`, `remove`.
        action: String,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The device filter was refused by the kernel.
    #[error("cannot enforce linux.resources.devices: {step}")]
    DeviceFilter {
        /// `load the program` or `attach the program`.
        step: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// The limit is below what is used now, and the spec asks to check.
    #[error("linux.resources.memory.limit: {limit} is less than the {used} bytes in use")]
    BelowUsage {
        /// Asked, in bytes.
        limit: i64,
        /// In use, in bytes.
        used: u64,
    },
    /// The kernel did not get there.
    #[error(
        "the cgroup {} did not become {wanted} within {} s; in it: {inhabitants}",
        .path.display(), .after.as_secs()
    )]
    TimedOut {
        /// Its directory.
        path: PathBuf,
        /// `frozen`, `thawed` or `empty`.
        wanted: &'static str,
        /// The bound.
        after: Duration,
        /// Processes, and where in the kernel they wait.
        inhabitants: String,
    },
}

impl CgroupError {
    pub(super) fn fault(&self) -> Fault {
        match self {
            Self::NoController { .. } | Self::DeviceFilter { .. } | Self::NotV2(_) => Fault::Unsupported,
            Self::BelowUsage { .. } => Fault::Invalid,
            Self::InUse(_) => Fault::WrongState,
            Self::File { .. } | Self::TimedOut { .. } => Fault::Failed,
        }
    }

    fn file(action: impl Into<String>, path: impl Into<PathBuf>, source: impl Into<io::Error>) -> Self {
        Self::File { action: action.into(), path: path.into(), source: source.into() }
    }
}

/// Where containers' cgroups are made.
#[derive(Clone, Debug)]
pub(super) struct Cgroups {
    /// Mount point of the hierarchy.
    hierarchy: PathBuf,
    /// The part of it that is the agent's, below which it hands down controllers and removes what is empty.
    root: PathBuf,
}

impl Cgroups {
    /// Below `part` of the hierarchy that is mounted at `hierarchy`.
    pub(super) fn new(hierarchy: PathBuf, part: &Path) -> Self {
        let root = hierarchy.join(part);
        Self { hierarchy, root }
    }

    /// Makes the cgroup `relative`, with every controller that there is.
    pub(super) fn create(&self, relative: &Path) -> Result<Cgroup, CgroupError> {
        if !self.root.join("cgroup.controllers").exists() {
            return Err(CgroupError::NotV2(self.root.clone()));
        }
        let path = self.root.join(relative);
        make(&self.root, &path)?;
        let directory = open_directory(&path)?;
        Ok(Cgroup { place: self.clone(), path, directory, filter: Mutex::new(None) })
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, CgroupError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    openat(CWD, path, flags, Mode::empty()).map_err(|error| CgroupError::file("open", path, error))
}

/// One container's cgroup.
#[derive(Debug)]
pub(super) struct Cgroup {
    place: Cgroups,
    path: PathBuf,
    directory: OwnedFd,
    /// The device filter that is attached; replacing it needs it.
    filter: Mutex<Option<OwnedFd>>,
}

impl Cgroup {
    /// For a process to be born in.
    pub(super) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Another cgroup of the same hierarchy, for a process to be born in: the one that `pid` is in.
    pub(super) fn of_process(&self, pid: Pid) -> Result<OwnedFd, CgroupError> {
        let file = PathBuf::from(format!("/proc/{}/cgroup", pid.as_raw_nonzero()));
        let text = fs::read_to_string(&file).map_err(|error| CgroupError::file("read", &file, error))?;
        let relative = text.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        open_directory(&self.place.hierarchy.join(relative))
    }

    /// Sets the limits that `resources` names.
    pub(super) fn limit(&self, resources: &LinuxResources) -> Result<(), EngineError> {
        let settings = limits::settings(resources)?;
        limits::check_usage(&self.path, resources)?;
        for setting in settings {
            setting.apply(&self.path)?;
        }
        Ok(())
    }

    /// Lets the container use the devices that the rules allow and no other. `nodes` are allowed where there are no
    /// rules at all: a host that leaves device rules to the guest sends none.
    pub(super) fn filter_devices(
        &self,
        resources: Option<&LinuxResources>,
        nodes: &[LinuxDevice],
    ) -> Result<(), EngineError> {
        let rules =
            devices::rules(resources.and_then(|all| all.devices().as_deref()).unwrap_or_default(), nodes)?;
        let program = devices::load(&devices::program(&rules))?;
        let mut attached = self.filter.lock().unwrap_or_else(PoisonError::into_inner);
        devices::attach(self.directory.as_fd(), program.as_fd(), attached.as_ref().map(AsFd::as_fd))?;
        *attached = Some(program);
        Ok(())
    }

    /// Usage now.
    pub(super) fn stats(&self) -> Result<CgroupStats, CgroupError> {
        stats::read(&self.path)
    }

    /// All processes, those of child cgroups included.
    pub(super) fn pids(&self) -> Result<Vec<Pid>, CgroupError> {
        pids(&self.path)
    }

    /// Sends a signal to all processes. KILL reaches those that are forked meanwhile, too.
    pub(super) fn signal(&self, signal: Signal) -> Result<(), CgroupError> {
        if signal == Signal::KILL && self.path.join("cgroup.kill").exists() {
            return self.write("cgroup.kill", "1");
        }
        for pid in self.pids()? {
            match kill_process(pid, signal) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => {
                    return Err(CgroupError::file(
                        format!("signal process {}, of", pid.as_raw_nonzero()),
                        &self.path,
                        error,
                    ));
                }
            }
        }
        Ok(())
    }

    /// Freezes all processes and waits for the last.
    pub(super) async fn freeze(&self) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "1")?;
        events::wait(&self.path, "frozen", "1", PATIENCE, "frozen").await
    }

    /// Lets them run again.
    pub(super) async fn thaw(&self) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", "0")?;
        events::wait(&self.path, "frozen", "0", PATIENCE, "thawed").await
    }

    /// The out-of-memory kills from now on.
    pub(super) fn oom_events(&self) -> Result<OomEvents, CgroupError> {
        OomEvents::watch(&self.path)
    }

    /// Kills everything in the cgroup, waits for its end, and removes it with the parents that are empty then.
    pub(super) async fn destroy(&self) -> Result<(), CgroupError> {
        // A process that a dropped create has sent on its way may arrive when the others have gone; it is killed then.
        let mut arrivals = 0;
        while self.path.exists() {
            self.signal(Signal::KILL)?;
            // A frozen process dies of KILL as it is, but only thawed does it hold no other up.
            self.write("cgroup.freeze", "0")?;
            events::wait(&self.path, "populated", "0", PATIENCE, "empty").await?;
            match self.remove() {
                Err(CgroupError::File { source, .. })
                    if source.kind() == io::ErrorKind::ResourceBusy && arrivals < ARRIVALS =>
                {
                    arrivals += 1;
                }
                result => result?,
            }
        }
        let parents = self.path.ancestors().skip(1).take_while(|parent| *parent != self.place.root);
        for parent in parents {
            if fs::remove_dir(parent).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Removes the directory and those below it; fails while a process is in one.
    fn remove(&self) -> Result<(), CgroupError> {
        let mut directories = tree(&self.path)?;
        directories.reverse();
        for directory in directories {
            match fs::remove_dir(&directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CgroupError::file("remove", directory, error));
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(|error| CgroupError::file(format!("write {value:?} to"), path, error))
    }
}

/// Makes `path` with its parents, which hand all controllers down to it.
fn make(root: &Path, path: &Path) -> Result<(), CgroupError> {
    let mut parents: Vec<&Path> =
        path.ancestors().skip(1).take_while(|parent| parent.starts_with(root)).collect();
    parents.reverse();
    // Another container's end may remove an empty parent at any time.
    let mut tries = 0;
    loop {
        match make_once(&parents, path) {
            Err(CgroupError::File { source, .. })
                if source.kind() == io::ErrorKind::NotFound && tries < 8 =>
            {
                tries += 1
            }
            result => return result,
        }
    }
}

fn make_once(parents: &[&Path], path: &Path) -> Result<(), CgroupError> {
    for parent in parents {
        make_directory(parent)?;
        let controllers = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
        for controller in controllers.split_whitespace() {
            // One that cannot be handed down is missed when a limit of it is asked for, and named then.
            if let Err(error) = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}")) {
                tracing::debug!(controller, parent = %parent.display(), %error, "controller not handed down");
            }
        }
    }
    let made = fs::create_dir(path);
    if !made.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AlreadyExists) {
        return made.map_err(|error| CgroupError::file("make", path, error));
    }
    // Left over, with the limits of its last user: start afresh.
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(CgroupError::InUse(path.to_owned())),
        Err(error) => Err(CgroupError::file("remove", path, error)),
        Ok(()) => fs::create_dir(path).map_err(|error| CgroupError::file("make", path, error)),
    }
}

fn make_directory(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::file("make", path, error))
        }
        _ => Ok(()),
    }
}

/// `path` and all cgroups below it, parents first.
fn tree(path: &Path) -> Result<Vec<PathBuf>, CgroupError> {
    let mut all = vec![path.to_owned()];
    let mut at = 0;
    while let Some(directory) = all.get(at).cloned() {
        at += 1;
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            result => result.map_err(|error| CgroupError::file("list", &directory, error))?,
        };
        let children = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        all.extend(children.map(|entry| entry.path()));
    }
    Ok(all)
}

/// All processes below `path`.
fn pids(path: &Path) -> Result<Vec<Pid>, CgroupError> {
    let mut pids = Vec::new();
    for directory in tree(path)? {
        let file = directory.join("cgroup.procs");
        let text = match fs::read_to_string(&file) {
            // A child that is being removed, or a threaded one, whose processes its parent lists.
            Err(error)
                if matches!(
                    Errno::from_io_error(&error),
                    Some(Errno::NOENT | Errno::OPNOTSUPP | Errno::NODEV)
                ) =>
            {
                continue;
            }
            result => result.map_err(|error| CgroupError::file("read", &file, error))?,
        };
        pids.extend(text.lines().filter_map(|line| line.parse().ok().and_then(Pid::from_raw)));
    }
    Ok(pids)
}

/// A few of the processes in the cgroup, for a message: names, and the kernel's functions that they wait in.
fn inhabitants(path: &Path) -> String {
    const SHOWN: usize = 4;
    let pids = pids(path).unwrap_or_default();
    let tell = |pid: &Pid| {
        let read = |file| {
            let text = fs::read_to_string(format!("/proc/{}/{file}", pid.as_raw_nonzero()));
            text.unwrap_or_default().trim_end().to_owned()
        };
        format!("{} ({:?} in {:?})", pid.as_raw_nonzero(), read("comm"), read("wchan"))
    };
    let mut told: Vec<String> = pids.iter().take(SHOWN).map(tell).collect();
    if pids.len() > SHOWN {
        told.push(format!("{} more", pids.len() - SHOWN));
    }
    if told.is_empty() { "no process".to_owned() } else { told.join(", ") }
}

/// The value of `key` in a file of `key value` lines.
fn flat_key<'text>(text: &'text str, key: &str) -> Option<&'text str> {
    text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '))
}

//! Pods, as a client sees them: directories, an owner process, a socket.
//!
//! ```text
//!   run ─▶ Owner (spawned, boots the VM at once) ─▶ Client (Task + Control) ─▶ Session (streams, signals, terminal)
//!   exec, kill, logs, ps, rm ─▶ PodDir ─────────────▶ Client
//! ```

mod client;
mod container;
mod debug_console;
pub mod management;
mod owner;
mod session;
mod signals;
mod state;
mod stdio;
mod terminal;

use std::io;
use std::path::PathBuf;

use kata_config::paths;

pub use client::{CallError, Client, CreateContainer, Process, StreamPaths};
pub use container::{ContainerError, choose};
pub use debug_console::DebugConsole;
pub use owner::{Owner, OwnerError, OwnerOptions, SHIM, delete};
pub use session::Session;
pub use signals::{Signals, signal_number};
pub use state::{ContainerState, PodState};
pub use stdio::{FifoReader, FifoWriter, Streams, Wanted, dump};
pub use terminal::{RawTerminal, is_terminal, restore, size as terminal_size};

/// Longest name of a pod.
const NAME_MAX: usize = 64;

/// A name that no pod can have, or that none has.
#[derive(Debug, thiserror::Error)]
pub enum NameError {
    /// Not a good name.
    #[error(
        "{0:?} is not a pod's name: expected 1 to {NAME_MAX} characters of [a-zA-Z0-9_.-], the first a letter or digit"
    )]
    Malformed(String),
    /// Nobody has it.
    #[error("there is no pod named {0}; see `kata-ctl list -a`")]
    Unknown(String),
    /// The first digits of several.
    #[error("{text} may be any of {}: give more of it", pods.join(", "))]
    Ambiguous {
        /// What was given.
        text: String,
        /// What begins with it.
        pods: Vec<String>,
    },
    /// The directory of pods cannot be read.
    #[error("cannot read {}", .0.display())]
    RunDir(PathBuf, #[source] io::Error),
    /// Its pod is over.
    #[error("pod {0} has ended; remove it with `kata-ctl rm {0}`")]
    Ended(String),
    /// Its pod lost its owner.
    #[error("pod {0} is dead: its owner process was killed; clean up with `kata-ctl rm {0}`")]
    Dead(String),
    /// No randomness for a generated one.
    #[error("cannot make up a name")]
    Random(#[source] io::Error),
}

/// Whether an error says that there is no such pod, or no such container in it.
pub fn is_unknown(error: &(dyn std::error::Error + Send + Sync + 'static)) -> bool {
    matches!(error.downcast_ref(), Some(NameError::Unknown(_)))
        || matches!(error.downcast_ref(), Some(ContainerError::Unknown { .. } | ContainerError::None(_)))
}

/// Where a pod keeps its things.
#[derive(Clone, Debug)]
pub struct PodDir {
    /// The pod, and its only container.
    pub name: String,
    /// `/run/kata/<name>`, made by the owner.
    pub run_dir: PathBuf,
    /// `/var/lib/kata/pods/<name>`: the writable layer, and the output of a detached pod.
    pub state_dir: PathBuf,
}

impl PodDir {
    /// Of the pod called `name`, which need not exist.
    ///
    /// # Errors
    /// `name` cannot be one.
    pub fn of(name: &str) -> Result<Self, NameError> {
        check_name(name)?;
        Ok(Self {
            name: name.to_owned(),
            run_dir: paths::run_dir().join(name),
            state_dir: paths::state_dir().join("pods").join(name),
        })
    }

    /// Of the pod called `name`, which has to exist. The first digits of a name that containerd's clients have made up
    /// (64 hexadecimal digits) will do.
    ///
    /// # Errors
    /// It does not.
    pub fn existing(name: &str) -> Result<Self, NameError> {
        let pod = Self::of(name)?;
        if pod.run_dir.is_dir() {
            return Ok(pod);
        }
        let mut meant = Self::all()?;
        meant.retain(|pod| is_beginning(name, &pod.name));
        match (meant.pop(), meant.is_empty()) {
            (None, _) => Err(NameError::Unknown(name.to_owned())),
            (Some(pod), true) => Ok(pod),
            (Some(pod), false) => {
                let pods = meant.into_iter().chain([pod]).map(|pod| pod.name).collect();
                Err(NameError::Ambiguous { text: name.to_owned(), pods })
            }
        }
    }

    /// Of all pods that there are, by name.
    ///
    /// # Errors
    /// The directory of pods cannot be read.
    pub fn all() -> Result<Vec<Self>, NameError> {
        let dir = paths::run_dir();
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(NameError::RunDir(dir, error)),
        };
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort();
        // What has no pod's name is no pod.
        let pods = names.iter().filter_map(|name| Self::of(name).ok());
        Ok(pods.filter(|pod| pod.run_dir.is_dir()).collect())
    }

    /// containerd's namespace that the pod belongs to; `None` for a pod of this program's.
    pub fn namespace(&self) -> Option<String> {
        std::fs::read_to_string(self.run_dir.join("namespace")).ok()
    }

    /// Of the pod called `name`, which has to be alive as far as its directory tells.
    ///
    /// # Errors
    /// There is none, or it is over.
    pub fn alive(name: &str) -> Result<Self, NameError> {
        let pod = Self::existing(name)?;
        // What cannot be read is found out by connecting.
        match PodState::load(&pod.run_dir) {
            Ok(Some(state)) if state.is_stopped() => Err(NameError::Ended(name.to_owned())),
            Ok(Some(state)) if !state.owner_lives() => Err(NameError::Dead(name.to_owned())),
            _ => Ok(pod),
        }
    }

    /// What the owner listens on.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("pod.sock")
    }

    /// The OCI bundle.
    pub fn bundle(&self) -> PathBuf {
        self.run_dir.join("bundle")
    }

    /// FIFOs of attached clients.
    pub fn io(&self) -> PathBuf {
        self.run_dir.join("io")
    }

    /// Output of a detached pod. Not in the run directory, which is memory on most hosts.
    pub fn stdout_log(&self) -> PathBuf {
        self.state_dir.join("stdout.log")
    }

    /// Error output of a detached pod.
    pub fn stderr_log(&self) -> PathBuf {
        self.state_dir.join("stderr.log")
    }

    /// The host's side of the pod's vsock.
    pub fn hybrid(&self) -> PathBuf {
        self.run_dir.join("kata.hvsock")
    }

    /// What the owner has made on this host, see kata-hypervisor.
    pub fn leak_record(&self) -> PathBuf {
        self.run_dir.join("resources.jsonl")
    }

    /// The owner's log.
    pub fn owner_log(&self) -> PathBuf {
        self.run_dir.join("owner.log")
    }
}

/// Fewest digits of a made-up name that stand for it.
const PREFIX_MIN: usize = 4;

/// Whether `text` is the beginning of `name`, one of 64 hexadecimal digits. Names that people chose are not guessed at.
fn is_beginning(text: &str, name: &str) -> bool {
    let made_up = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    made_up && text.len() >= PREFIX_MIN && name.starts_with(text)
}

fn check_name(name: &str) -> Result<(), NameError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let good = name.len() <= NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(allowed);
    if good { Ok(()) } else { Err(NameError::Malformed(name.to_owned())) }
}

/// Twelve random hexadecimal digits: the name of a pod that was given none, or of an exec.
///
/// # Errors
/// The kernel has no randomness.
pub fn random_name() -> Result<String, NameError> {
    let mut bytes = [0_u8; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| NameError::Random(error.into()))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_file_names_and_host_names_only() {
        for good in ["a", "0", "web-1.test_x", &"a".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", ".a", "a/b", "a b", "ä", "a\n", &"a".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn only_made_up_names_may_be_shortened() {
        let id = "0123456789abcdef".repeat(4);
        assert!(is_beginning("0123", &id) && is_beginning(&id, &id));
        assert!(!is_beginning("012", &id) && !is_beginning("1234", &id));
        assert!(!is_beginning("web-", "web-server"));
    }

    #[test]
    fn made_up_names_are_good_and_differ() {
        let (one, two) = (random_name().unwrap(), random_name().unwrap());
        assert_eq!(one.len(), 12);
        assert!(check_name(&one).is_ok());
        assert_ne!(one, two);
    }
}

//! The commands, one module each.

pub mod analyze;
pub mod bundle;
pub mod check;
pub mod config;
pub mod cp;
pub mod deprecations;
pub mod env;
pub mod events;
pub mod evidence;
pub mod exec;
pub mod factory;
pub mod guest;
pub mod image;
pub mod initdata;
pub mod inspect;
pub mod kill;
pub mod list;
pub mod logs;
pub mod manual;
pub mod measure;
pub mod metrics;
pub mod monitor;
pub mod policy;
pub mod ps;
mod refresh;
pub mod rm;
pub mod run;
pub mod stats;
mod timing;
pub mod top;
pub mod version;

use std::path::{Path, PathBuf};

use crate::failure::{self, Failure};
use crate::pod::{NameError, PodDir};

/// Exit code of the command, or why there is none.
pub type Outcome = Result<u8, Failure>;

/// The pod called `name`, which has to be alive as far as its directory tells.
fn named(name: &str) -> Result<PodDir, Failure> {
    PodDir::alive(name).map_err(|error| match error {
        NameError::Unknown(_) => Failure::with_code(failure::NO_SUCH, error),
        other => other.into(),
    })
}

/// The exit code that a process's wait status (0 to 255, 128 + signal) is as this process's own.
fn exit_code(status: u32) -> u8 {
    u8::try_from(status & 0xff).unwrap_or(u8::MAX)
}

/// The same path from any directory: the owner runs in another one.
fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

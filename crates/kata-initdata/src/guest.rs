//! What runs once in the guest, before its agent.
//!
//! ```text
//!   /dev/disk/by-id/virtio-initdata, else the first disk with the magic ── Initdata ── verifiers, all of them
//!                                       ├ all agree ─▶ /run/measured-cfg/<key>, initdata.toml
//!                                       ├ no disk ───▶ nothing
//!                                       └ anything else ─▶ /run/measured-cfg/policy.rego, which denies everything and says why
//! ```
//!
//! The directory appears whole or not at all, and is never replaced.

mod device;
mod measured;
mod verify;

use std::path::{Path, PathBuf};

pub use device::DeviceError;
pub use measured::MeasuredError;
pub use verify::VerifyError;

use crate::ImageError;

/// Where things are in the guest.
#[derive(Clone, Debug)]
pub struct Places {
    /// Root of everything else: `/`, and a test's own.
    pub root: PathBuf,
    /// Where the keys become files, below the root.
    pub measured: PathBuf,
    /// The programs that have to agree, beside the hardware, below the root.
    pub verifiers: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            root: "/".into(),
            measured: "run/measured-cfg".into(),
            verifiers: "usr/lib/kata-initdata/verifiers".into(),
        }
    }
}

impl Places {
    fn at(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }
}

/// Why the guest has no configuration that it can trust.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The disks cannot be looked through.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The disk holds no initdata.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// It is not what the machine was started with.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The files cannot be written.
    #[error(transparent)]
    Measured(#[from] MeasuredError),
}

/// What became of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The machine was given none.
    Absent,
    /// All verifiers agreed, and the keys are files now: how many, and who vouched for them.
    Bound {
        /// How many files there are.
        keys: usize,
        /// The verifiers' names, the hardware's first.
        verifiers: Vec<String>,
    },
}

/// Takes the initdata, verifies it and only then writes it out.
///
/// # Errors
/// Nothing was written then. Whoever calls has to see that nothing starts which would have been configured.
pub fn process(places: &Places) -> Result<Outcome, GuestError> {
    measured::is_first(&places.at(&places.measured))?;
    let Some(initdata) = device::read(places)? else { return Ok(Outcome::Absent) };
    let verifiers = verify::all(places, &initdata)?;
    measured::write(&places.at(&places.measured), &initdata)?;
    Ok(Outcome::Bound { keys: initdata.data().len(), verifiers })
}

/// Leaves a policy in place of the configuration, which denies every request and gives `reason`.
///
/// # Errors
/// The directory is there already, or cannot be made.
pub fn deny(places: &Places, reason: &str) -> Result<(), GuestError> {
    Ok(measured::deny(&places.at(&places.measured), reason)?)
}

#[cfg(test)]
mod tests;

//! What runs once in the guest, before its agent.
//!
//! ```text
//!   the disk with the serial number, else the first with the magic ── Initdata, or none ── verifiers, all of them
//!       ├ all agree ─────────────────────────────────────▶ /run/measured-cfg/<key>, initdata.toml
//!       ├ no disk, and the machine was started without ──▶ nothing
//!       └ anything else ─────────────────────────────────▶ /run/measured-cfg/policy.rego, which denies everything and says why
//! ```
//!
//! The directory appears whole or not at all, and is never replaced.

mod device;
mod measured;
mod verify;

use std::path::{Path, PathBuf};

pub use device::DeviceError;
use kata_evidence::{Hardware, HostDataError};
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
    /// Has the hardware of the guest with this root say what the machine was started with. A test has no such hardware.
    pub host_data: fn(&Path, Hardware) -> Result<Vec<u8>, HostDataError>,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            root: "/".into(),
            measured: "run/measured-cfg".into(),
            verifiers: "usr/lib/kata-initdata/verifiers".into(),
            host_data: kata_evidence::host_data,
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
    /// The machine was started without, as far as its hardware can tell.
    Absent,
    /// All verifiers agreed, and the keys are files now: how many, and who vouched for them.
    Bound {
        /// How many files there are.
        keys: usize,
        /// The verifiers' names, the hardware's first.
        verifiers: Vec<String>,
    },
}

/// Takes the initdata, verifies it and only then writes it out. That there is none is verified, too.
///
/// # Errors
/// Nothing was written then. Whoever calls has to see that nothing starts which would have been configured.
pub fn process(places: &Places) -> Result<Outcome, GuestError> {
    measured::is_first(&places.at(&places.measured))?;
    let Some(initdata) = device::read(places)? else {
        verify::absence(places)?;
        return Ok(Outcome::Absent);
    };
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

//! Has the kernel ask the hardware for a report (`Documentation/ABI/testing/configfs-tsm-report`).
//!
//! Who makes a directory there has a request of its own: what is written to `inblob` is in the report that `outblob` then has.
//! `generation` counts the writes, so that a report for somebody else's data is told from one for ours.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use crate::{Hardware, HardwareError};

/// Where the kernel takes requests, below the guest's root.
pub const REPORTS: &str = "sys/kernel/config/tsm/report";
/// Bytes that a report has room for.
pub const DATA_MAX: usize = 64;
/// Longest report or list of certificates that is taken. They have a few kilobytes.
const BLOB_MAX: u64 = 64 * 1024;
/// Longest number or name.
const LINE_MAX: u64 = 64;
/// How often a report that somebody else wrote into is asked for anew.
const ATTEMPTS: usize = 3;

/// What the hardware says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// Who made it, by the kernel's name: `sev_guest`, `tdx_guest`.
    pub provider: String,
    /// The report, signed by the hardware or by what stands for it.
    pub report: Vec<u8>,
    /// Certificates that came with it, as the host gave them; empty for none.
    pub certificates: Vec<u8>,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum EvidenceError {
    /// More than a report has room for.
    #[error("the data for the report has {0} bytes, and a report has room for {DATA_MAX}")]
    TooLong(usize),
    /// An ordinary machine.
    #[error("the guest has no hardware that reports: it runs under neither SEV-SNP nor TDX")]
    NoHardware,
    /// Nobody knows which hardware there is.
    #[error(transparent)]
    Unknown(#[from] HardwareError),
    /// The hardware is there, and the kernel does not speak to it.
    #[error(
        "the guest runs under {hardware}, and its kernel makes no reports: {missing}; the guest's kernel needs configfs-tsm and the \
         driver {driver}",
        driver = .hardware.provider()
    )]
    NoReports {
        /// What the guest runs under.
        hardware: Hardware,
        /// What was looked for.
        missing: &'static str,
    },
    /// Somebody else writes.
    #[error("somebody else wrote into the request for a report, {ATTEMPTS} times in a row: try again")]
    Disturbed,
    /// More than any hardware says.
    #[error("{path} has more than {BLOB_MAX} bytes, which is no report", path = .0.display())]
    TooLarge(PathBuf),
    /// The kernel, or the hardware, refuses.
    #[error("{what} {path}", path = .path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Asks for a report with `data` in it, filled up with zeroes, in the guest whose root is `root`. This waits for the hardware, and
/// with TDX for a service of the host's.
///
/// # Errors
/// [`EvidenceError`]. Of the request nothing is left in any case.
pub fn ask(root: &Path, data: &[u8]) -> Result<Evidence, EvidenceError> {
    let mut inblob = [0; DATA_MAX];
    inblob.get_mut(..data.len()).ok_or(EvidenceError::TooLong(data.len()))?.copy_from_slice(data);
    let request = Request::make(&root.join(REPORTS)).map_err(|error| explained(root, error))?;
    request.answer(&inblob)
}

/// Why no request can be made, where that is because of what the guest has not.
fn explained(root: &Path, error: EvidenceError) -> EvidenceError {
    let EvidenceError::File { source, .. } = &error else { return error };
    let missing = match Errno::from_io_error(source) {
        Some(Errno::NOENT) => "there is no /sys/kernel/config/tsm/report",
        Some(Errno::NXIO) => "nobody has registered for them",
        _ => return error,
    };
    match Hardware::of(root) {
        Ok(Some(hardware)) => EvidenceError::NoReports { hardware, missing },
        Ok(None) => EvidenceError::NoHardware,
        Err(error) => error.into(),
    }
}

/// A directory of our own among the kernel's requests.
struct Request(PathBuf);

impl Drop for Request {
    fn drop(&mut self) {
        // One that stays is of no harm.
        let _ = std::fs::remove_dir(&self.0);
    }
}

impl Request {
    fn make(reports: &Path) -> Result<Self, EvidenceError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = reports.join(format!("kata-{}-{number}", std::process::id()));
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => Ok(Self(path)),
            Err(source) => Err(EvidenceError::File { what: "making", path, source }),
        }
    }

    fn answer(&self, inblob: &[u8; DATA_MAX]) -> Result<Evidence, EvidenceError> {
        let provider = self.line("provider")?;
        for _ in 0..ATTEMPTS {
            let before = self.generation()?;
            self.write("inblob", inblob)?;
            let report = self.blob("outblob")?;
            let certificates = match self.blob("auxblob") {
                // Not every hardware has any.
                Err(EvidenceError::File { source, .. }) if source.kind() == ErrorKind::NotFound => Vec::new(),
                // The kernel's own word for a report that is not that of the last write.
                Err(EvidenceError::File { source, .. }) if source.kind() == ErrorKind::WouldBlock => continue,
                certificates => certificates?,
            };
            // What went wrong with the write, too, is only told by this: the kernel takes it when the file is closed.
            if self.generation()? == before.wrapping_add(1) {
                return Ok(Evidence { provider, report, certificates });
            }
        }
        Err(EvidenceError::Disturbed)
    }

    fn generation(&self) -> Result<u64, EvidenceError> {
        let text = self.line("generation")?;
        text.parse().map_err(|_| self.failed("understanding", "generation")(ErrorKind::InvalidData.into()))
    }

    fn line(&self, name: &str) -> Result<String, EvidenceError> {
        let bytes = self.read(name, LINE_MAX)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    fn blob(&self, name: &str) -> Result<Vec<u8>, EvidenceError> {
        self.read(name, BLOB_MAX)
    }

    fn read(&self, name: &str, most: u64) -> Result<Vec<u8>, EvidenceError> {
        let mut bytes = Vec::new();
        let read = File::open(self.0.join(name)).and_then(|file| file.take(most + 1).read_to_end(&mut bytes));
        match read.map_err(self.failed("reading", name))? {
            read if read as u64 > most => Err(EvidenceError::TooLarge(self.0.join(name))),
            _ => Ok(bytes),
        }
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), EvidenceError> {
        let file = OpenOptions::new().write(true).open(self.0.join(name));
        file.and_then(|mut file| file.write_all(bytes)).map_err(self.failed("writing", name))
    }

    fn failed(&self, what: &'static str, name: &str) -> impl FnOnce(io::Error) -> EvidenceError {
        let path = self.0.join(name);
        move |source| EvidenceError::File { what, path, source }
    }
}

#[cfg(test)]
mod tests;

//! Who has to agree that the initdata is what the machine was started with.
//!
//! The kernel's word on what protects the guest comes from the hardware, so the host cannot hide it: where it says SEV-SNP or
//! TDX, the digest has to be in the field that the hardware keeps for whoever started the guest. On other machines nothing can
//! vouch for it, and nothing there can prove anything to anybody either. Further programs are the image's own choice.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kata_evidence::{Fields, Hardware, HardwareError, REPORTS};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Places;
use crate::Initdata;

/// How long a program may take.
const BOUND: Duration = Duration::from_secs(30);
/// Bytes of `MRCONFIGID` of TDX.
const MRCONFIGID: usize = 48;

/// Why the initdata is not taken.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The hardware holds another digest.
    #[error(
        "the initdata is not what the machine was started with: its {algorithm} digest is {digest}, and {field} is {found}; start it \
         with the digest of this document, or with the document of that digest"
    )]
    Different {
        /// The hash function.
        algorithm: String,
        /// The document's, as the field would hold it, in hexadecimal.
        digest: String,
        /// `SEV-SNP's host data`, `TDX's mrconfigid`.
        field: &'static str,
        /// What it holds, in hexadecimal.
        found: String,
    },
    /// The hardware does not say.
    #[error("{what} cannot be had from {path}, so the initdata cannot be verified", path = .path.display())]
    Hardware {
        /// `SEV-SNP's host data`, `TDX's mrconfigid`.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program cannot be run.
    #[error("the verifier {path} cannot be run", path = .path.display())]
    Run {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program does not agree.
    #[error("the verifier {path} does not agree: {how}", path = .path.display())]
    Refused {
        /// Which.
        path: PathBuf,
        /// Its exit.
        how: String,
    },
    /// The kernel does not say what protects the guest.
    #[error(transparent)]
    Unknown(#[from] HardwareError),
}

/// Asks the hardware and every program, and gives their names.
pub(super) fn all(places: &Places, initdata: &Initdata) -> Result<Vec<String>, VerifyError> {
    let mut names = vec![hardware(places, initdata)?.to_owned()];
    for path in programs(&places.at(&places.verifiers))? {
        program(&path, initdata)?;
        names.push(path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned());
    }
    Ok(names)
}

fn hardware(places: &Places, initdata: &Initdata) -> Result<&'static str, VerifyError> {
    match Hardware::of(&places.root)? {
        Some(Hardware::Snp) => {
            compare(initdata, "SEV-SNP's host data", &snp_host_data(places)?).map(|()| "snp")
        }
        Some(Hardware::Tdx) => {
            let found =
                tdx_mrconfigid(&places.at("sys/devices/virtual/misc/tdx_guest/measurements/mrconfigid"))?;
            compare(initdata, "TDX's mrconfigid", &found).map(|()| "tdx")
        }
        None => Ok("none"),
    }
}

pub(super) fn compare(initdata: &Initdata, field: &'static str, found: &[u8]) -> Result<(), VerifyError> {
    let digest = initdata.host_data(found.len());
    if digest == found {
        return Ok(());
    }
    let algorithm = initdata.algorithm().to_string();
    Err(VerifyError::Different { algorithm, digest: hex(&digest), field, found: hex(found) })
}

fn snp_host_data(places: &Places) -> Result<Vec<u8>, VerifyError> {
    let failed =
        |source| VerifyError::Hardware { what: "SEV-SNP's host data", path: places.at(REPORTS), source };
    let evidence = kata_evidence::ask(&places.root, &[]).map_err(|error| failed(io::Error::other(error)))?;
    // A report of another kind has something else there.
    let fields = Some(evidence.provider.as_str())
        .filter(|provider| *provider == Hardware::Snp.provider())
        .and_then(|provider| Fields::of(provider, &evidence.report));
    let fields = fields.ok_or_else(|| {
        failed(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{} makes other reports", evidence.provider),
        ))
    })?;
    Ok(fields.host_data.to_vec())
}

/// The kernel's own reading of it, since 6.16 (`Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest`).
fn tdx_mrconfigid(path: &Path) -> Result<Vec<u8>, VerifyError> {
    let failed = |source| VerifyError::Hardware { what: "TDX's mrconfigid", path: path.to_owned(), source };
    let found = std::fs::read(path).map_err(failed)?;
    if found.len() != MRCONFIGID {
        return Err(failed(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("it has {} bytes", found.len()),
        )));
    }
    Ok(found)
}

/// The executable files of the directory, by name.
fn programs(dir: &Path) -> Result<Vec<PathBuf>, VerifyError> {
    let failed = |source| VerifyError::Run { path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>().map_err(failed)?;
    found.sort();
    Ok(found)
}

/// Runs a program with the algorithm and the digest in hexadecimal as arguments and the document on its input; its end with 0
/// says that it agrees. What cannot be run does not agree.
fn program(path: &Path, initdata: &Initdata) -> Result<(), VerifyError> {
    let failed = |source| VerifyError::Run { path: path.to_owned(), source };
    let refused = |how| VerifyError::Refused { path: path.to_owned(), how };
    if path.metadata().map_err(failed)?.permissions().mode() & 0o111 == 0 {
        return Err(failed(io::Error::new(io::ErrorKind::PermissionDenied, "it is no program")));
    }
    let mut child = Command::new(path)
        .arg(initdata.algorithm().to_string())
        .arg(hex(initdata.digest()))
        .stdin(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let input = child.stdin.take();
    let raw = initdata.raw().to_vec();
    // One that does not read must not keep us: the pipe breaks when it ends.
    let writer = std::thread::spawn(move || input.map(|mut input| input.write_all(&raw)));
    let ended = end(&mut child).map_err(failed);
    let _ = child.kill();
    let _ = child.wait();
    let _ = writer.join();
    match ended? {
        None => Err(refused(format!("it did not end within {BOUND:?}"))),
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(refused(status.to_string())),
    }
}

/// Waits for the end; `None` where it does not come in time.
fn end(child: &mut Child) -> io::Result<Option<ExitStatus>> {
    let pidfd: OwnedFd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let deadline = Instant::now() + BOUND;
    loop {
        let rest = deadline.saturating_duration_since(Instant::now());
        let rest = Timespec::try_from(rest).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&rest)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => return Ok(None),
            outcome => {
                outcome?;
                return child.try_wait();
            }
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

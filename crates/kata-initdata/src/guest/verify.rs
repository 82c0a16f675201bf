//! Who has to agree that the initdata is what the machine was started with, or that it was started without.
//!
//! The kernel's word on what protects the guest comes from the hardware, so the host cannot hide it: where it says SEV-SNP or
//! TDX, the digest has to be in the field that the hardware keeps for whoever started the guest. On other machines nothing can
//! vouch for it, and nothing there can prove anything to anybody either. Further programs are the image's own choice.
//!
//! A host can leave the disk out as well as change it. Where there is none, the field has to be as it is when nobody gave one, and no
//! program can be satisfied: there is no document that it could agree with.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use kata_evidence::{Hardware, HardwareError, HostDataError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Places;
use crate::Initdata;

/// How long a program may take.
const BOUND: Duration = Duration::from_secs(30);

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
    /// The hardware holds a digest, and there is no document.
    #[error(
        "the machine was started with initdata and has no disk with it: {field} is {found}; give it the document of that digest, or \
         start it without one"
    )]
    Withheld {
        /// `SEV-SNP's host data`, `TDX's mrconfigid`.
        field: &'static str,
        /// What it holds, in hexadecimal.
        found: String,
    },
    /// There is no document for a program to agree with.
    #[error(
        "the machine has no disk with initdata, and this image demands one, by the verifier {path}; start it with initdata, or from an \
         image without verifiers",
        path = .0.display()
    )]
    Demanded(PathBuf),
    /// The hardware does not say.
    #[error(
        "{field} cannot be had, so it is not known what the machine was started with; the guest's kernel needs the driver {driver}"
    )]
    Hardware {
        /// `SEV-SNP's host data`, `TDX's mrconfigid`.
        field: &'static str,
        /// Of the kernel's.
        driver: &'static str,
        /// Why.
        #[source]
        source: HostDataError,
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
    let mut names = vec![match Field::of(places)? {
        Some(field) => {
            compare(initdata, field.name, &field.holds)?;
            field.verifier.to_owned()
        }
        None => "none".to_owned(),
    }];
    for path in programs(&places.at(&places.verifiers))? {
        program(&path, initdata)?;
        names.push(path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Sees to it that the machine was started without initdata, and that its image lets it.
pub(super) fn absence(places: &Places) -> Result<(), VerifyError> {
    if let Some(field) = Field::of(places)?
        && field.holds.iter().any(|byte| *byte != 0)
    {
        return Err(VerifyError::Withheld { field: field.name, found: hex(&field.holds) });
    }
    match programs(&places.at(&places.verifiers))?.into_iter().next() {
        Some(program) => Err(VerifyError::Demanded(program)),
        None => Ok(()),
    }
}

/// What the hardware keeps for whoever started the machine.
struct Field {
    name: &'static str,
    /// What the hardware is called as a verifier.
    verifier: &'static str,
    holds: Vec<u8>,
}

impl Field {
    /// None on a machine that has none. One that cannot be had is an error.
    fn of(places: &Places) -> Result<Option<Self>, VerifyError> {
        let Some(hardware) = Hardware::of(&places.root)? else { return Ok(None) };
        let (name, verifier) = match hardware {
            Hardware::Snp => ("SEV-SNP's host data", "snp"),
            Hardware::Tdx => ("TDX's mrconfigid", "tdx"),
        };
        match (places.host_data)(&places.root, hardware) {
            Ok(holds) => Ok(Some(Self { name, verifier, holds })),
            Err(source) => Err(VerifyError::Hardware { field: name, driver: hardware.provider(), source }),
        }
    }
}

fn compare(initdata: &Initdata, field: &'static str, found: &[u8]) -> Result<(), VerifyError> {
    let digest = initdata.host_data(found.len());
    if digest == found {
        return Ok(());
    }
    let algorithm = initdata.algorithm().to_string();
    Err(VerifyError::Different { algorithm, digest: hex(&digest), field, found: hex(found) })
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

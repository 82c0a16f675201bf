//! Who has to agree that the initdata is what the machine was started with.
//!
//! The kernel's word on what protects the guest comes from the processor, so the host cannot hide it: where it says SEV-SNP or
//! TDX, the digest has to be in the field that the hardware keeps for whoever started the guest. On other machines nothing can
//! vouch for it, and nothing there can prove anything to anybody either. Further programs are the image's own choice.

use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::Places;
use crate::Initdata;

/// How long a program may take.
const BOUND: Duration = Duration::from_secs(30);
/// `HOST_DATA` in the report of SEV-SNP (AMD 56860, "ATTESTATION_REPORT Structure").
const SNP_HOST_DATA: std::ops::Range<usize> = 0xc0..0xe0;
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
    #[error("cannot read {path}, so what protects the guest is not known", path = .path.display())]
    Unknown {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
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
    let path = places.at("proc/cpuinfo");
    let cpu = std::fs::read_to_string(&path).map_err(|source| VerifyError::Unknown { path, source })?;
    let flags = cpu.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |wanted| flags.split_whitespace().any(|flag| flag == wanted);
    if has("sev_snp") {
        let found = snp_host_data(&places.at("sys/kernel/config/tsm/report"))?;
        return compare(initdata, "SEV-SNP's host data", &found).map(|()| "snp");
    }
    if has("tdx_guest") {
        let found = tdx_mrconfigid(&places.at("sys/devices/virtual/misc/tdx_guest/measurements/mrconfigid"))?;
        return compare(initdata, "TDX's mrconfigid", &found).map(|()| "tdx");
    }
    Ok("none")
}

pub(super) fn compare(initdata: &Initdata, field: &'static str, found: &[u8]) -> Result<(), VerifyError> {
    let digest = initdata.host_data(found.len());
    if digest == found {
        return Ok(());
    }
    let algorithm = initdata.algorithm().to_string();
    Err(VerifyError::Different { algorithm, digest: hex(&digest), field, found: hex(found) })
}

/// Has the kernel ask the processor for a report (`Documentation/ABI/testing/configfs-tsm-report`).
fn snp_host_data(reports: &Path) -> Result<Vec<u8>, VerifyError> {
    const WHAT: &str = "SEV-SNP's host data";
    let dir = reports.join("kata-initdata");
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| VerifyError::Hardware { what: WHAT, path, source }
    };
    std::fs::create_dir(&dir).map_err(failed(&dir))?;
    let report = || {
        let challenge = dir.join("inblob");
        std::fs::write(&challenge, [0; 64]).map_err(failed(&challenge))?;
        let answer = dir.join("outblob");
        let report = std::fs::read(&answer).map_err(failed(&answer))?;
        let field = report.get(SNP_HOST_DATA).map(<[u8]>::to_vec);
        field.ok_or_else(|| failed(&answer)(io::ErrorKind::UnexpectedEof.into()))
    };
    let report = report();
    // A directory of configfs that stays is of no harm.
    let _ = std::fs::remove_dir(&dir);
    report
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

//! What the machine was started with: the field that the hardware keeps for whoever starts a guest, read without the host's help.
//!
//! ```text
//!   SEV-SNP  HOST_DATA   ask ── the firmware, by a channel that the host cannot write into
//!   TDX      MRCONFIGID  /sys/devices/virtual/misc/tdx_guest/measurements ─┐
//!                        /dev/tdx_guest, before Linux 6.16 ────────────────┴─ the TDX module
//! ```
//!
//! A quote of TDX, which is what [`ask`] gets there, has the field too, but comes from a service of the host's: who does not verify
//! its signature would believe the host.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

use crate::{DATA_MAX, EvidenceError, Fields, Hardware, ask};

/// The kernel's own reading, since 6.16 (`Documentation/ABI/testing/sysfs-devices-virtual-misc-tdx_guest`).
const MEASURED: &str = "sys/devices/virtual/misc/tdx_guest/measurements/mrconfigid";
/// Where it has the TDX module report, since 6.2 (`linux/tdx-guest.h`).
const DEVICE: &str = "dev/tdx_guest";
/// Bytes of it.
const MRCONFIGID: usize = 48;

/// `struct tdx_report_req`: data for the report, and room for it. It is a `TDREPORT_STRUCT` of Intel's "TDX Module ABI
/// Specification", of 1024 bytes.
#[repr(C)]
struct Request {
    data: [u8; DATA_MAX],
    before: [u8; 576],
    mrconfigid: [u8; MRCONFIGID],
    behind: [u8; 400],
}

/// `TDX_CMD_GET_REPORT0`.
const GET_REPORT: Opcode = opcode::read_write::<Request>(b'T', 1);

/// Why it is not known what the machine was started with.
#[derive(Debug, thiserror::Error)]
pub enum HostDataError {
    /// There is no report.
    #[error(transparent)]
    Report(#[from] EvidenceError),
    /// A report of another kind has something else there.
    #[error("the kernel's reports come from {0:?}, and not from SEV-SNP's firmware, or are too short")]
    Foreign(String),
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
    /// It is no MRCONFIGID.
    #[error("{path} has {bytes} bytes, and not {MRCONFIGID}", path = .path.display())]
    Size {
        /// Which file.
        path: PathBuf,
        /// How much there is.
        bytes: usize,
    },
}

/// The field of `hardware` in the guest whose root is `root`: 32 bytes of SEV-SNP, 48 of TDX. All are zero where whoever started the
/// machine gave none.
///
/// # Errors
/// [`HostDataError`]: nobody in the guest can tell.
pub fn host_data(root: &Path, hardware: Hardware) -> Result<Vec<u8>, HostDataError> {
    match hardware {
        Hardware::Snp => snp(root),
        Hardware::Tdx => tdx(root, report_of_module),
    }
}

fn snp(root: &Path) -> Result<Vec<u8>, HostDataError> {
    let evidence = ask(root, &[])?;
    let fields = Some(evidence.provider.as_str())
        .filter(|provider| *provider == Hardware::Snp.provider())
        .and_then(|provider| Fields::of(provider, &evidence.report));
    match fields {
        Some(fields) => Ok(fields.host_data.to_vec()),
        None => Err(HostDataError::Foreign(evidence.provider)),
    }
}

fn tdx(
    root: &Path,
    report: impl FnOnce(&Path) -> Result<[u8; MRCONFIGID], HostDataError>,
) -> Result<Vec<u8>, HostDataError> {
    let path = root.join(MEASURED);
    match std::fs::read(&path) {
        Ok(found) if found.len() == MRCONFIGID => Ok(found),
        Ok(found) => Err(HostDataError::Size { path, bytes: found.len() }),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(report(&root.join(DEVICE))?.to_vec()),
        Err(source) => Err(HostDataError::File { what: "reading", path, source }),
    }
}

/// Has the TDX module report, with no data of ours in it.
fn report_of_module(device: &Path) -> Result<[u8; MRCONFIGID], HostDataError> {
    let failed = |what| {
        let path = device.to_owned();
        move |source| HostDataError::File { what, path, source }
    };
    let file = OpenOptions::new().read(true).write(true).open(device).map_err(failed("opening"))?;
    let mut request =
        Request { data: [0; DATA_MAX], before: [0; 576], mrconfigid: [0; MRCONFIGID], behind: [0; 400] };
    // SAFETY: the kernel takes a `struct tdx_report_req` by this request, and `Request` is laid out as one.
    let updater = unsafe { Updater::<GET_REPORT, Request>::new(&mut request) };
    // SAFETY: as above. Another file knows no such request, and the kernel touches nothing then.
    let asked = unsafe { ioctl(&file, updater) };
    asked.map_err(|error| failed("asking")(error.into()))?;
    Ok(request.mrconfigid)
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;
    use crate::tests::guest_of;

    fn put(root: &Path, path: &str, bytes: &[u8]) {
        let path = root.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    fn unasked(device: &Path) -> Result<[u8; MRCONFIGID], HostDataError> {
        panic!("{} was asked", device.display());
    }

    #[test]
    fn request_to_the_tdx_module_is_laid_out_as_the_kernel_has_it() {
        assert_eq!((size_of::<Request>(), GET_REPORT), (1088, 0xc440_5401));
        // Behind the head of 256 bytes, 239 of the module's and 17 that are reserved; attributes, mask of registers and MRTD.
        assert_eq!(offset_of!(Request, mrconfigid) - offset_of!(Request, before), 512 + 8 + 8 + 48);
    }

    #[test]
    fn field_of_tdx_is_the_kernels_reading_or_else_what_the_module_reports() {
        let guest = guest_of(Hardware::Tdx);
        let module = |device: &Path| {
            assert!(device.ends_with("dev/tdx_guest"));
            Ok([7; MRCONFIGID])
        };
        assert_eq!(tdx(guest.path(), module).unwrap(), [7; 48]);
        put(guest.path(), MEASURED, &[8; 48]);
        assert_eq!(tdx(guest.path(), unasked).unwrap(), [8; 48]);
        put(guest.path(), MEASURED, &[8; 47]);
        let error = tdx(guest.path(), unasked).unwrap_err().to_string();
        assert!(error.contains("mrconfigid has 47 bytes, and not 48"), "{error}");
    }

    #[test]
    fn field_that_nobody_tells_is_an_error_and_never_zeroes() {
        let (snp, tdx) = (guest_of(Hardware::Snp), guest_of(Hardware::Tdx));
        let error = host_data(snp.path(), Hardware::Snp).unwrap_err().to_string();
        assert!(error.contains("its kernel makes no reports"), "{error}");
        let error = host_data(tdx.path(), Hardware::Tdx).unwrap_err().to_string();
        assert!(error.contains("opening") && error.contains("/dev/tdx_guest"), "{error}");
        put(tdx.path(), DEVICE, b"another device");
        let error = host_data(tdx.path(), Hardware::Tdx).unwrap_err().to_string();
        assert!(error.contains("asking") && error.contains("/dev/tdx_guest"), "{error}");
    }
}

//! Device-mapper, as far as one read-only device of one target goes: create, load its table, resume.
//!
//! The interface is that of `linux/dm-ioctl.h`, version 4.0: a header of 312 bytes and, for a table, one target behind it.

use std::ffi::c_ulong;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags, open};

/// Where the kernel takes requests.
pub const CONTROL: &str = "/dev/mapper/control";

const HEADER: usize = 312;
const TARGET: usize = 40;
const READONLY: u32 = 1;
const NAME_MAX: usize = 127;

/// A device that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DmError {
    /// The kernel has no device-mapper.
    #[error("opening {CONTROL}: is dm-mod in the kernel, or in the list of modules?")]
    Open(#[source] io::Error),
    /// The kernel refused a step.
    #[error("device-mapper refused to {step} {name}")]
    Refused {
        /// Which step.
        step: &'static str,
        /// The device.
        name: String,
        #[source]
        /// Why.
        source: io::Error,
    },
    /// The table or name does not fit the interface.
    #[error("the table of {0} does not fit a request")]
    Long(String),
}

#[derive(Clone, Copy)]
enum Command {
    Create = 3,
    Remove = 4,
    Resume = 6,
    Load = 9,
}

impl Command {
    fn verb(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Remove => "remove",
            Self::Resume => "activate",
            Self::Load => "take the table of",
        }
    }

    /// `_IOWR(0xfd, command, struct dm_ioctl)`.
    fn number(self) -> c_ulong {
        let size = c_ulong::try_from(HEADER).unwrap_or_default();
        3 << 30 | size << 16 | 0xfd << 8 | self as c_ulong
    }
}

/// The kernel's device-mapper.
#[derive(Debug)]
pub struct DeviceMapper(OwnedFd);

/// A device that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    name: String,
    number: u64,
}

impl Device {
    /// Its node, which devtmpfs has.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        // As the kernel spreads a device number over 64 bits.
        let minor = (self.number & 0xff) | ((self.number >> 12) & 0x000f_ff00);
        format!("/dev/dm-{minor}").into()
    }
}

impl DeviceMapper {
    /// # Errors
    /// [`DmError::Open`].
    pub fn open() -> Result<Self, DmError> {
        match open(CONTROL, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
            Ok(control) => Ok(Self(control)),
            Err(error) => Err(DmError::Open(error.into())),
        }
    }

    /// Makes the read-only device `name` of `sectors` sectors, served by `target` with the parameters `table`.
    ///
    /// # Errors
    /// Which step the kernel refused; what was made till then stays.
    pub fn create(&self, name: &str, sectors: u64, target: &str, table: &str) -> Result<Device, DmError> {
        self.ask(Command::Create, name, &request(name, 0, None)?)?;
        let target = target_spec(sectors, target, table).ok_or_else(|| DmError::Long(name.to_owned()))?;
        self.ask(Command::Load, name, &request(name, READONLY, Some(&target))?)?;
        let answer = self.ask(Command::Resume, name, &request(name, 0, None)?)?;
        let number = answer.get(40..48).and_then(|bytes| bytes.try_into().ok());
        Ok(Device { name: name.to_owned(), number: number.map(u64::from_le_bytes).unwrap_or_default() })
    }

    /// Takes a device away again.
    ///
    /// # Errors
    /// It is in use.
    pub fn remove(&self, device: &Device) -> Result<(), DmError> {
        self.ask(Command::Remove, &device.name, &request(&device.name, 0, None)?).map(drop)
    }

    fn ask(&self, command: Command, name: &str, request: &[u8]) -> Result<Vec<u8>, DmError> {
        let mut bytes = request.to_vec();
        // SAFETY: the header says how long `bytes` is, and the kernel reads and writes within that length.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), command.number(), bytes.as_mut_ptr()) } {
            0 => Ok(bytes),
            _ => {
                let source = io::Error::last_os_error();
                Err(DmError::Refused { step: command.verb(), name: name.to_owned(), source })
            }
        }
    }
}

/// A header, and the target behind it.
fn request(name: &str, flags: u32, target: Option<&[u8]>) -> Result<Vec<u8>, DmError> {
    let long = || DmError::Long(name.to_owned());
    let target = target.unwrap_or_default();
    let size = u32::try_from(HEADER + target.len()).map_err(|_| long())?;
    if name.len() > NAME_MAX || name.contains('\0') {
        return Err(long());
    }
    let mut bytes = Vec::new();
    let header = u32::try_from(HEADER).map_err(|_| long())?;
    let targets = u32::from(!target.is_empty());
    // Version, size, start of the targets, their number, open count, flags, event number, padding.
    for word in [4, 0, 0, size, header, targets, 0, flags, 0, 0] {
        bytes.extend(u32::to_le_bytes(word));
    }
    bytes.extend([0; 8]);
    bytes.extend(name.as_bytes());
    bytes.resize(HEADER, 0);
    bytes.extend(target);
    Ok(bytes)
}

/// One target from sector 0, its parameters ended by NUL and padded to 8 bytes.
fn target_spec(sectors: u64, target: &str, table: &str) -> Option<Vec<u8>> {
    let length = (TARGET + table.len() + 1).next_multiple_of(8);
    let mut bytes = Vec::new();
    bytes.extend([0; 8]);
    bytes.extend(sectors.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(u32::try_from(length).ok()?.to_le_bytes());
    bytes.extend(target.as_bytes());
    bytes.resize(TARGET, 0);
    bytes.extend(table.as_bytes());
    bytes.resize(length, 0);
    (target.len() < 16 && !table.contains('\0')).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_numbered_as_the_kernels_header_does() {
        assert_eq!(Command::Create.number(), 0xc138_fd03);
        assert_eq!(Command::Load.number(), 0xc138_fd09);
        assert_eq!(Command::Resume.number(), 0xc138_fd06);
    }

    #[test]
    fn a_request_has_its_fields_where_the_kernel_reads_them() {
        let target = target_spec(24, "verity", "1 2:3").unwrap();
        let bytes = request("kata-root", READONLY, Some(&target)).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(12), word(16), word(20)), (4, 312 + 48, 312, 1));
        assert_eq!(word(28), READONLY);
        assert_eq!(&bytes[48..58], b"kata-root\0");
        assert_eq!(&bytes[320..328], &24_u64.to_le_bytes());
        assert_eq!(word(332), 48);
        assert_eq!(&bytes[336..343], b"verity\0");
        assert_eq!(&bytes[352..], b"1 2:3\0\0\0");
    }

    #[test]
    fn what_does_not_fit_is_no_request() {
        assert!(request(&"n".repeat(128), 0, None).is_err());
        assert!(request("a\0b", 0, None).is_err());
        assert!(target_spec(1, "verity", "1\0").is_none());
        assert!(target_spec(1, "a-target-with-a-long-name", "").is_none());
    }

    #[test]
    fn a_devices_node_is_named_by_its_whole_minor_number() {
        let path = |number| Device { name: String::new(), number }.path();
        assert_eq!(path(254 << 8 | 3), PathBuf::from("/dev/dm-3"));
        assert_eq!(path(0x0010_fe05), PathBuf::from("/dev/dm-261"));
    }
}

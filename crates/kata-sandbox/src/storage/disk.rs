//! A look at a disk before the machine gets it.

use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;

use super::StorageError;

/// Checks that a disk is there and may be used, and that nothing on the host uses a device that the guest will write:
/// two kernels that write one file system destroy it.
pub(crate) fn claim(path: &Path, readonly: bool) -> Result<(), StorageError> {
    let failed = |error| match error {
        Errno::NOENT => StorageError::Absent(path.to_owned()),
        Errno::BUSY => StorageError::Busy(path.to_owned()),
        error => StorageError::file("open", path, error),
    };
    let stat = rustix::fs::stat(path).map_err(failed)?;
    let mut flags = OFlags::CLOEXEC | if readonly { OFlags::RDONLY } else { OFlags::RDWR };
    if !readonly && FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
        // On a device, it asks for one that is not mounted and that nobody else has claimed.
        flags |= OFlags::EXCL;
    }
    rustix::fs::open(path, flags, Mode::empty()).map(drop).map_err(failed)
}

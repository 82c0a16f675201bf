//! Whether a storage may be at its mount point: because nothing is there, or because what is there is the very same storage.
//!
//! Upstream's agent asks no more than whether there is a storage at the mount point. A host could have a disk of its own there
//! first, and be told that the image is pulled or the volume encrypted that a policy makes it ask for.

use std::io;
use std::path::{Path, PathBuf};

use kata_api::agent::Storage;
use rustix::fs::{AtFlags, CWD, FileType, StatxAttributes, StatxFlags, statx};

use super::error::{StorageError, invalid, system};
use super::served::PULL;

/// Refuses `wanted` unless it is what `there`, a storage at the same mount point, was made of.
pub(super) fn same(there: &Storage, wanted: &Storage) -> Result<(), StorageError> {
    if let Some(what) = difference(there, wanted) {
        return Err(StorageError::Other { mount_point: wanted.mount_point.clone(), what });
    }
    if wanted.driver == PULL {
        // Another container may have written there by now.
        return Err(invalid(wanted, "a pulled root is one container's, and this one is there already"));
    }
    Ok(())
}

/// What tells one storage from another, as errors call it.
fn difference(there: &Storage, wanted: &Storage) -> Option<&'static str> {
    let differs = [
        ("driver", there.driver != wanted.driver),
        ("source", there.source != wanted.source),
        ("type of file system", there.fstype != wanted.fstype),
        ("driver options", there.driver_options != wanted.driver_options),
        ("options", !compared(there).eq(compared(wanted))),
        ("group", there.fs_group != wanted.fs_group),
        ("lifetime", there.shared != wanted.shared),
    ];
    differs.into_iter().find(|(_, differs)| *differs).map(|(what, _)| what)
}

/// All options, but not the size of a file system in memory: it may have been changed meanwhile, and each container that has a
/// volume of huge pages names its own limit.
fn compared(storage: &Storage) -> impl Iterator<Item = &String> {
    let in_memory = matches!(storage.driver.as_str(), "ephemeral" | "tmpfs");
    storage.options.iter().filter(move |option| !(in_memory && option.starts_with("size=")))
}

/// Refuses `storage` where something is mounted at `point`, or a symbolic link leads there: it would be at another place than the
/// one that it is known by. May wait for whoever serves a file system on the way.
pub(super) fn vacant(storage: &Storage, point: &Path) -> Result<(), StorageError> {
    let mut path = PathBuf::new();
    for part in point.components() {
        path.push(part);
        let found = match statx(CWD, &path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
            Ok(found) => found,
            Err(error) if io::Error::from(error).kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(system("looking at", &path)(error)),
        };
        if FileType::from_raw_mode(found.stx_mode.into()) == FileType::Symlink {
            return Err(invalid(storage, format!("{path:?} is a symbolic link")));
        }
        if path == point && found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Err(invalid(storage, "something is mounted there already"));
        }
    }
    Ok(())
}

//! Who a pod's processes run as: a user id of the configured range that no other pod has.
//!
//! A taken id is a file `<pods' directory>/.uids/<uid>` that says which pod took it. The file is made with `O_EXCL`, so
//! two owners that start at once cannot take the same one, and it is in the leak record, so a dead owner's is given back.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use kata_config::UidRange;
use kata_hypervisor::process::{Identity, Record, RecordError};

/// Why no identity could be taken.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Every id of the range is taken.
    #[error("all of the {count} user ids {first}-{last} (runtime.uid_range) are taken; see {dir}", dir = .dir.display())]
    Exhausted {
        /// How many there are.
        count: u64,
        /// The first.
        first: u32,
        /// The last.
        last: u32,
        /// Where the taken ones are listed.
        dir: PathBuf,
    },
    /// The list cannot be written.
    #[error("cannot take a user id at {path}", path = .path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The leak record cannot be written.
    #[error("cannot record a user id")]
    Record(#[from] RecordError),
}

/// Takes an identity for the pod `id` below `pods`. One who is not root has no other identity to give than its own.
pub(crate) fn take(
    pods: &Path,
    id: &str,
    range: UidRange,
    record: &Record,
) -> Result<Identity, IdentityError> {
    if !rustix::process::geteuid().is_root() {
        return Ok(Identity::current());
    }
    let dir = pods.join(".uids");
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| IdentityError::File { path, source }
    };
    DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed(&dir))?;
    for uid in range.first..=range.last {
        let path = dir.join(uid.to_string());
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
            Ok(mut file) => {
                // Recorded only once it is ours: a record that names another pod's file would give that back.
                if let Err(error) = record.file(&path) {
                    // Nobody else knows of it.
                    let _ = std::fs::remove_file(&path);
                    return Err(error.into());
                }
                file.write_all(id.as_bytes()).map_err(failed(&path))?;
                return Ok(Identity { uid, gid: uid, groups: Vec::new() });
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(&path)(error)),
        }
    }
    Err(IdentityError::Exhausted { count: range.count(), first: range.first, last: range.last, dir })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_distinct_until_given_back() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root has identities to give");
            return;
        }
        let pods = tempfile::tempdir().unwrap();
        let range = UidRange { first: 900_000, last: 900_001 };
        let record = |name: &str| Record::open(pods.path().join(name)).unwrap();
        let a = take(pods.path(), "a", range, &record("a")).unwrap();
        let b = take(pods.path(), "b", range, &record("b")).unwrap();
        assert_ne!(a.uid, b.uid);
        let error = take(pods.path(), "c", range, &record("c")).unwrap_err();
        assert!(matches!(error, IdentityError::Exhausted { count: 2, .. }), "{error}");

        Record::release(&pods.path().join("a")).unwrap();
        assert_eq!(take(pods.path(), "c", range, &record("c")).unwrap(), a);
    }
}

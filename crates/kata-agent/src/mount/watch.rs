//! Directories of the share that are copied into the guest and kept like the original: the driver `watchable-bind`.
//!
//! The share tells the guest of no changes that the host makes, so a program that waits for them (inotify) would wait for
//! ever. A copy changes in the guest. Whoever drives this agent and knows of changes itself has better means (`CopyFile`);
//! here the original is looked at every two seconds.
//!
//! ```text
//!   share, …/config           copy, a tmpfs                      seen by programs
//!     ..2024_02/ key     ─▶     ..2024_02/ key                   created, written
//!     ..data ─▶ ..2024_02 ─▶    ..data ─▶ ..2024_02  (one step)  moved to
//!     key ─▶ ..data/key         key ─▶ ..data/key
//! ```
//!
//! What holds more than [`ENTRIES`] names or [`BYTES`] is bound as it is, and changes unseen.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Gid, Mode, Timespec, Timestamps, Uid, chmod, chownat, futimens};
use tokio::task::AbortHandle;

/// Most names in a copied directory.
pub(super) const ENTRIES: usize = 64;
/// Most bytes in its files.
pub(super) const BYTES: u64 = 1024 * 1024;
/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(2);
/// Of what is about to take its place.
const TEMPORARY: &str = ".partial";

type Tree = BTreeMap<PathBuf, Metadata>;

/// What is in a directory, by the names in it; `None` if it is more than is copied.
pub(super) fn scan(root: &Path) -> io::Result<Option<Tree>> {
    let mut tree = Tree::new();
    let (mut left, mut size) = (vec![PathBuf::new()], 0_u64);
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(root.join(&directory))? {
            let name = directory.join(entry?.file_name());
            let metadata = std::fs::symlink_metadata(root.join(&name))?;
            if metadata.is_dir() {
                left.push(name.clone());
            } else if metadata.is_file() {
                size = size.saturating_add(metadata.len());
            }
            tree.insert(name, metadata);
            if tree.len() > ENTRIES || size > BYTES {
                return Ok(None);
            }
        }
    }
    Ok(Some(tree))
}

/// Makes the directory `copy` what `tree` says of `original`. What is right already is not touched.
///
/// New files come before the links that lead to them, and what is gone goes last: whoever follows a name meanwhile finds
/// the old or the new file.
pub(super) fn sync(original: &Path, tree: &Tree, copy: &Path) -> io::Result<()> {
    let old = scan(copy)?.unwrap_or_default();
    for (name, metadata) in tree {
        let (from, to) = (original.join(name), copy.join(name));
        let there = old.get(name);
        if there.is_some_and(|there| there.file_type() != metadata.file_type()) {
            remove(&to, there)?;
        }
        if metadata.is_dir() {
            if !there.is_some_and(Metadata::is_dir) {
                std::fs::create_dir(&to)?;
            }
            own(&to, metadata)?;
        } else if metadata.is_file() && !there.is_some_and(|there| is_same(there, metadata)) {
            copy_file(&from, &to, metadata)?;
        }
    }
    let mut links: Vec<&PathBuf> =
        tree.iter().filter(|(_, metadata)| metadata.is_symlink()).map(|(name, _)| name).collect();
    // The names that lead to others: `..data` before `key`.
    links.sort_by_key(|name| !name.file_name().unwrap_or_default().as_bytes().starts_with(b".."));
    for name in links {
        link(&original.join(name), &copy.join(name))?;
    }
    for (name, metadata) in old.iter().rev().filter(|(name, _)| !tree.contains_key(*name)) {
        remove(&copy.join(name), Some(metadata))?;
    }
    Ok(())
}

/// A file is there whole, or not at all.
fn copy_file(from: &Path, to: &Path, metadata: &Metadata) -> io::Result<()> {
    let growing = beside(to)?;
    let mut file = File::create_new(&growing)?;
    io::copy(&mut File::open(from)?.take(BYTES), &mut file)?;
    own(&growing, metadata)?;
    let time = Timespec { tv_sec: metadata.mtime(), tv_nsec: metadata.mtime_nsec() };
    futimens(&file, &Timestamps { last_access: time, last_modification: time })?;
    std::fs::rename(&growing, to)
}

fn link(from: &Path, to: &Path) -> io::Result<()> {
    let target = std::fs::read_link(from)?;
    if std::fs::read_link(to).is_ok_and(|there| there == target) {
        return Ok(());
    }
    let growing = beside(to)?;
    std::os::unix::fs::symlink(target, &growing)?;
    std::fs::rename(&growing, to)
}

/// A free name for what is to be put in the place of `to`.
fn beside(to: &Path) -> io::Result<PathBuf> {
    let mut name = to.as_os_str().to_owned();
    name.push(TEMPORARY);
    let path = PathBuf::from(name);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(path),
    }
}

fn is_same(there: &Metadata, wanted: &Metadata) -> bool {
    let stamp = |it: &Metadata| (it.len(), it.mtime(), it.mtime_nsec(), it.mode(), it.uid(), it.gid());
    stamp(there) == stamp(wanted)
}

fn own(path: &Path, metadata: &Metadata) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(metadata.uid()), Gid::from_raw(metadata.gid()));
    chownat(CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(chmod(path, Mode::from_raw_mode(metadata.mode() & 0o7777))?)
}

fn remove(path: &Path, there: Option<&Metadata>) -> io::Result<()> {
    let removed = match there {
        Some(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        _ => std::fs::remove_file(path),
    };
    if removed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        Ok(())
    } else {
        removed
    }
}

/// Keeps `copy` like `original` until aborted.
pub(super) fn follow(original: PathBuf, copy: PathBuf) -> AbortHandle {
    let follow = async move {
        let mut told = false;
        loop {
            tokio::time::sleep(INTERVAL).await;
            let (from, to) = (original.clone(), copy.clone());
            let looked = tokio::task::spawn_blocking(move || match scan(&from)? {
                Some(tree) => sync(&from, &tree, &to).map(|()| true),
                None => Ok(false),
            });
            match looked.await {
                Ok(Ok(true)) => told = false,
                Ok(Ok(false)) if !told => {
                    told = true;
                    tracing::warn!(original = %original.display(), "more than {ENTRIES} names or {BYTES} bytes: the copy stays as it is");
                }
                // It changed meanwhile, or its server is away.
                Ok(Err(error)) => {
                    tracing::debug!(original = %original.display(), %error, "a copy is not up to date")
                }
                Ok(Ok(false)) => {}
                Err(_) => return,
            }
        }
    };
    tokio::spawn(follow).abort_handle()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A volume as Kubernetes writes it: all names lead through one link.
    fn publish(volume: &Path, version: &str, keys: &[(&str, &str)]) {
        let directory = volume.join(version);
        std::fs::create_dir_all(&directory).unwrap();
        for (key, text) in keys {
            std::fs::write(directory.join(key), text).unwrap();
            if std::fs::symlink_metadata(volume.join(key)).is_err() {
                symlink(Path::new("..data").join(key), volume.join(key)).unwrap();
            }
        }
        let old = std::fs::read_link(volume.join("..data"));
        symlink(version, volume.join("..data_tmp")).unwrap();
        std::fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
        if let Ok(old) = old {
            std::fs::remove_dir_all(volume.join(old)).unwrap();
        }
    }

    #[test]
    fn a_copy_follows_what_is_new_changed_and_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (volume, copy) = (dir.path().join("volume"), dir.path().join("copy"));
        std::fs::create_dir_all(&volume).unwrap();
        std::fs::create_dir_all(&copy).unwrap();
        let update = || sync(&volume, &scan(&volume).unwrap().unwrap(), &copy).unwrap();
        publish(&volume, "..1", &[("a", "one"), ("b", "two")]);
        update();
        assert_eq!(std::fs::read_to_string(copy.join("a")).unwrap(), "one");
        publish(&volume, "..2", &[("a", "changed"), ("c", "three")]);
        std::fs::remove_file(volume.join("b")).unwrap();
        update();
        let read = |name: &str| std::fs::read_to_string(copy.join(name));
        assert_eq!((read("a").unwrap().as_str(), read("c").unwrap().as_str()), ("changed", "three"));
        assert!(read("b").is_err() && !copy.join("..1").exists());

        // What did not change keeps its inode: nobody is told of it.
        let inode = |name: &str| std::fs::metadata(copy.join(name)).unwrap().ino();
        let before = (inode("a"), inode("..2"));
        update();
        assert_eq!((inode("a"), inode("..2")), before);

        // A directory in place of a file.
        std::fs::remove_file(volume.join("c")).unwrap();
        std::fs::create_dir(volume.join("c")).unwrap();
        update();
        assert!(copy.join("c").is_dir());
    }

    #[test]
    fn too_many_names_or_bytes_are_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        for name in 0..ENTRIES {
            std::fs::write(dir.path().join(name.to_string()), "").unwrap();
        }
        assert_eq!(scan(dir.path()).unwrap().unwrap().len(), ENTRIES);
        std::fs::create_dir(dir.path().join("more")).unwrap();
        assert!(scan(dir.path()).unwrap().is_none());
        std::fs::remove_dir(dir.path().join("more")).unwrap();
        std::fs::write(dir.path().join("0"), vec![0; usize::try_from(BYTES).unwrap() + 1]).unwrap();
        assert!(scan(dir.path()).unwrap().is_none());
    }
}

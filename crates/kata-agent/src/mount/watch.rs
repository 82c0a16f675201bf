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
//! What holds more than [`ENTRIES`] names or [`BYTES`] is bound as it is, and changes unseen. Directories, regular files and
//! symbolic links are copied, and nothing else is as much as opened.
//!
//! Both sides may change under the agent's hands: the original by the host, the copy by a privileged container. So names are
//! walked by the kernel with links refused, as in `rpc::files`. A look reads all that it needs of the original first, which
//! may wait for the host; only then it writes, and never to a copy that is about to be unmounted.

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, fchmod, fchown,
    fstat, futimens, mkdirat, open, openat, openat2, readlinkat, renameat, statat, symlinkat, unlinkat,
};
use rustix::io::Errno;
use tokio::task::AbortHandle;

use super::error::{StorageError, system};

/// Most names in a copied directory.
const ENTRIES: usize = 64;
/// Most bytes in its files.
const BYTES: u64 = 1024 * 1024;
/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(2);
/// What is about to take its place, one at a time. No volume has such a name: keys do not begin with two dots.
const GROWING: &str = "..partial";

/// What is in a directory, by the names in it. Parents come before what they hold.
type Tree = BTreeMap<PathBuf, Entry>;
/// Files to be written, as they were when they were read.
type Contents = BTreeMap<PathBuf, (Entry, Vec<u8>)>;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    kind: Kind,
    mode: u32,
    uid: u32,
    gid: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    Directory,
    File { size: u64, seconds: i64, nanoseconds: i64 },
    Link { target: CString },
    Other,
}

impl Entry {
    fn new(stat: &Stat, kind: Kind) -> Self {
        Self { kind, mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid }
    }

    fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(&self.kind) == std::mem::discriminant(&other.kind)
    }

    /// Gives it to its owner, who may do what its mode says.
    fn own(&self, file: impl AsFd) -> rustix::io::Result<()> {
        fchown(&file, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        fchmod(&file, Mode::from_raw_mode(self.mode))
    }
}

fn file_kind(stat: &Stat) -> Kind {
    let size = u64::try_from(stat.st_size).unwrap_or(u64::MAX);
    let nanoseconds = i64::try_from(stat.st_mtime_nsec).unwrap_or_default();
    Kind::File { size, seconds: stat.st_mtime, nanoseconds }
}

/// Whether the directory is small enough to be copied.
pub(super) fn fits(directory: &Path) -> Result<bool, StorageError> {
    Ok(Root::open(directory)?.list(ENTRIES, BYTES)?.is_some())
}

/// A directory, and what lies below it and can be reached without following a link.
struct Root {
    directory: OwnedFd,
    path: PathBuf,
}

impl Root {
    fn open(path: &Path) -> Result<Self, StorageError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = open(path, flags, Mode::empty()).map_err(system("opening", path))?;
        Ok(Self { directory, path: path.to_owned() })
    }

    fn at(&self, name: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let name = if name.as_os_str().is_empty() { Path::new(".") } else { name };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        openat2(&self.directory, name, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
    }

    /// The directory that `name` lies in, and its last part.
    fn parent<'a>(&self, name: &'a Path) -> rustix::io::Result<(OwnedFd, &'a OsStr)> {
        let parent =
            self.at(name.parent().unwrap_or_else(|| Path::new("")), OFlags::PATH | OFlags::DIRECTORY)?;
        Ok((parent, name.file_name().unwrap_or_default()))
    }

    fn failed<E: Into<io::Error>>(&self, what: &'static str, name: &Path) -> impl Fn(E) -> StorageError {
        let path = self.path.join(name);
        move |error| system(what, &path)(error)
    }

    /// What is in it; `None` if there are more names or bytes.
    fn list(&self, names: usize, bytes: u64) -> Result<Option<Tree>, StorageError> {
        let mut tree = Tree::new();
        let (mut left, mut size) = (vec![PathBuf::new()], 0_u64);
        while let Some(directory) = left.pop() {
            let failed = self.failed::<Errno>("listing", &directory);
            let opened = self.at(&directory, OFlags::RDONLY | OFlags::DIRECTORY).map_err(&failed)?;
            for found in Dir::read_from(&opened).map_err(&failed)? {
                let found = found.map_err(&failed)?;
                let last = OsStr::from_bytes(found.file_name().to_bytes());
                if last == "." || last == ".." {
                    continue;
                }
                let name = directory.join(last);
                let entry = look(&opened, last).map_err(self.failed("looking at", &name))?;
                match entry.kind {
                    Kind::Directory => left.push(name.clone()),
                    Kind::File { size: more, .. } => size = size.saturating_add(more),
                    Kind::Link { .. } | Kind::Other => {}
                }
                tree.insert(name, entry);
                if tree.len() > names || size > bytes {
                    return Ok(None);
                }
            }
        }
        Ok(Some(tree))
    }

    /// Those files of `tree` that are not in `old` as they are now.
    fn read_changed(&self, tree: &Tree, old: &Tree) -> Result<Contents, StorageError> {
        let mut contents = Contents::new();
        let mut left = BYTES;
        for (name, entry) in tree {
            if matches!(entry.kind, Kind::File { .. }) && old.get(name) != Some(entry) {
                let read = self.read(name, left).map_err(self.failed("reading", name))?;
                left = left.saturating_sub(u64::try_from(read.1.len()).unwrap_or(u64::MAX));
                contents.insert(name.clone(), read);
            }
        }
        Ok(contents)
    }

    fn read(&self, name: &Path, most: u64) -> io::Result<(Entry, Vec<u8>)> {
        // Looked at before it is opened: a pipe that has taken its place would wait for its writer.
        let place = self.at(name, OFlags::PATH | OFlags::NOFOLLOW)?;
        let stat = fstat(&place)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(io::Error::other("it was replaced by something that is no file"));
        }
        let path = Path::new("/proc/self/fd").join(place.as_raw_fd().to_string());
        let mut data = Vec::new();
        File::open(path)?.take(most.saturating_add(1)).read_to_end(&mut data)?;
        if u64::try_from(data.len()).is_ok_and(|length| length <= most) {
            Ok((Entry::new(&stat, file_kind(&stat)), data))
        } else {
            Err(io::Error::other("it grew while it was read"))
        }
    }

    /// Makes this, which is `old`, what `tree` says; what is right already is not touched.
    ///
    /// New files come before the links that lead to them, and what is gone goes last: whoever follows a name meanwhile finds
    /// the old or the new file.
    fn become_like(&self, tree: &Tree, contents: &Contents, old: &Tree) -> Result<(), StorageError> {
        for (name, entry) in tree {
            let there = old.get(name);
            if there.is_some_and(|there| !there.is_like(entry)) {
                self.remove(old, name)?;
            }
            let made = match entry.kind {
                Kind::Directory if there != Some(entry) => self.make_directory(name, entry),
                Kind::File { .. } => {
                    contents.get(name).map_or(Ok(()), |(as_read, data)| self.write(name, as_read, data))
                }
                _ => Ok(()),
            };
            made.map_err(self.failed("making", name))?;
        }
        let mut links: Vec<_> =
            tree.iter().filter(|(_, entry)| matches!(entry.kind, Kind::Link { .. })).collect();
        // The names that lead to others: `..data` before `key`.
        links.sort_by_key(|(name, _)| !name.file_name().unwrap_or_default().as_bytes().starts_with(b".."));
        for (name, entry) in links {
            if old.get(name).is_none_or(|there| there.kind != entry.kind) {
                self.link(name, entry).map_err(self.failed("making", name))?;
            }
        }
        for name in
            old.keys().rev().filter(|name| tree.get(*name).is_none_or(|entry| entry.kind == Kind::Other))
        {
            self.remove(old, name)?;
        }
        Ok(())
    }

    fn make_directory(&self, name: &Path, entry: &Entry) -> io::Result<()> {
        let (parent, last) = self.parent(name)?;
        match mkdirat(&parent, last, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(entry.own(self.at(name, OFlags::RDONLY | OFlags::DIRECTORY)?)?)
    }

    /// A file is there whole, or not at all.
    fn write(&self, name: &Path, entry: &Entry, data: &[u8]) -> io::Result<()> {
        let (parent, last) = self.parent(name)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(clear(&parent)?, GROWING, flags, Mode::RUSR | Mode::WUSR)?);
        file.write_all(data)?;
        entry.own(&file)?;
        if let Kind::File { seconds, nanoseconds, .. } = entry.kind {
            let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
            futimens(&file, &Timestamps { last_access: time, last_modification: time })?;
        }
        Ok(renameat(&parent, GROWING, &parent, last)?)
    }

    fn link(&self, name: &Path, entry: &Entry) -> io::Result<()> {
        let Kind::Link { target } = &entry.kind else { return Ok(()) };
        let (parent, last) = self.parent(name)?;
        symlinkat(target, clear(&parent)?, GROWING)?;
        Ok(renameat(&parent, GROWING, &parent, last)?)
    }

    /// Removes what `tree` has at `name` and below it.
    fn remove(&self, tree: &Tree, name: &Path) -> Result<(), StorageError> {
        let below: Vec<_> =
            tree.range(name.to_owned()..).take_while(|(other, _)| other.starts_with(name)).collect();
        for (name, entry) in below.into_iter().rev() {
            let flags = if entry.kind == Kind::Directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            match self.parent(name).and_then(|(parent, last)| unlinkat(&parent, last, flags)) {
                // Gone, with what it was in or alone.
                Ok(()) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(self.failed("removing", name)(error)),
            }
        }
        Ok(())
    }
}

fn look(directory: &OwnedFd, name: &OsStr) -> rustix::io::Result<Entry> {
    let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => Kind::Directory,
        FileType::RegularFile => file_kind(&stat),
        FileType::Symlink => Kind::Link { target: readlinkat(directory, name, Vec::new())? },
        _ => Kind::Other,
    };
    Ok(Entry::new(&stat, kind))
}

/// The directory, with the name free for what is to be put in place.
fn clear(directory: &OwnedFd) -> rustix::io::Result<&OwnedFd> {
    match unlinkat(directory, GROWING, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(directory),
        Err(error) => Err(error),
    }
}

/// A directory and the one that is to be like it. Clones are the same pair.
#[derive(Clone, Debug)]
pub(super) struct Copy {
    original: PathBuf,
    copy: PathBuf,
    /// Set when the copy is not to be touched any more. Locked while it is.
    over: Arc<Mutex<bool>>,
}

/// Keeps a copy like its original until it is stopped.
#[derive(Debug)]
pub(super) struct Follower {
    copy: Copy,
    task: AbortHandle,
}

impl Copy {
    pub(super) fn new(original: &Path, copy: &Path) -> Self {
        Self { original: original.to_owned(), copy: copy.to_owned(), over: Arc::default() }
    }

    /// Brings the copy up to date. False if there is more in the original than is copied. May wait for the host.
    pub(super) fn update(&self) -> Result<bool, StorageError> {
        let original = Root::open(&self.original)?;
        let Some(mut tree) = original.list(ENTRIES, BYTES)? else { return Ok(false) };
        tree.retain(|_, entry| entry.kind != Kind::Other);
        // The copy is as large as it is: it may hold two versions, or one that was written halfway.
        let list = |copy: &Root| copy.list(usize::MAX, u64::MAX);
        let Some(old) = self.unless_over(list)?.flatten() else { return Ok(true) };
        let contents = original.read_changed(&tree, &old)?;
        self.unless_over(|copy| copy.become_like(&tree, &contents, &old))?;
        Ok(true)
    }

    /// Works on the copy, for as long as it is not unmounted; nobody waits for the host here.
    fn unless_over<T>(
        &self,
        work: impl FnOnce(&Root) -> Result<T, StorageError>,
    ) -> Result<Option<T>, StorageError> {
        let over = self.over.lock().unwrap_or_else(PoisonError::into_inner);
        if *over { Ok(None) } else { work(&Root::open(&self.copy)?).map(Some) }
    }

    /// Looks at regular times from now on.
    pub(super) fn follow(self) -> Follower {
        let copy = self.clone();
        let task = tokio::spawn(async move {
            let mut told = None;
            loop {
                tokio::time::sleep(INTERVAL).await;
                let copy = self.clone();
                let Ok(looked) = tokio::task::spawn_blocking(move || copy.update()).await else { return };
                let reason = match looked {
                    Ok(true) => None,
                    Ok(false) => Some(format!("it has more than {ENTRIES} names or {BYTES} bytes")),
                    // It changed meanwhile, or its server is away.
                    Err(error) => Some(crate::chain(&error)),
                };
                if let Some(reason) = reason.as_ref().filter(|reason| told.as_ref() != Some(*reason)) {
                    let (original, copy) = (self.original.display(), self.copy.display());
                    tracing::warn!(%original, %copy, reason, "a copy keeps its last version; its original is looked at again");
                }
                told = reason;
            }
        });
        Follower { copy, task: task.abort_handle() }
    }
}

impl Follower {
    /// Returns when the copy is not touched any more, without waiting for the host.
    pub(super) fn stop(&self) {
        self.task.abort();
        *self.copy.over.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }
}

#[cfg(test)]
mod tests;

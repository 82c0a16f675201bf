//! Paths of a container, resolved so that no symlink of its image leads out of it.
//!
//! A container's root may hold any symlink, and other containers of the pod may change shared parts of it meanwhile.
//! So a path is never handed to the kernel as text to be resolved against the guest: it is resolved below a directory
//! file descriptor (`openat2` with `RESOLVE_IN_ROOT`, or component by component where parts have to be made), and the
//! result is a file descriptor.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path};

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, fstat, mkdirat, openat, openat2, readlinkat,
};
use rustix::io::{self, Errno};

/// As many symlinks as the kernel follows.
const MAX_LINKS: usize = 40;

/// The root directory of a container.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
}

/// What a path is to be when it has to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Directory,
    File,
}

impl Tree {
    /// Below `root`, a directory opened with `O_PATH` at least.
    pub(super) fn new(root: OwnedFd) -> Self {
        Self { root }
    }

    /// The root itself.
    pub(super) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// An `O_PATH` descriptor of what `path` names, symlinks followed within the container.
    pub(super) fn find(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, ResolveFlags::empty())
    }

    /// As [`find`](Self::find), and refuses (`ELOOP`) a path with any symlink in it.
    pub(super) fn find_plain(&self, path: &Path) -> io::Result<OwnedFd> {
        self.open(path, ResolveFlags::NO_SYMLINKS)
    }

    fn open(&self, path: &Path, resolve: ResolveFlags) -> io::Result<OwnedFd> {
        let resolve = resolve | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        // The kernel gives up with EAGAIN where something on the way was renamed meanwhile.
        let mut tries = 0;
        loop {
            match openat2(&self.root, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve) {
                Err(Errno::AGAIN) if tries < 32 => tries += 1,
                result => return result,
            }
        }
    }

    /// An `O_PATH` descriptor of `path`, which is made with its parents where it does not exist: directories with mode
    /// 0755, files with 0644 and no content.
    ///
    /// A symlink that dangles is followed and its target made, as `/etc/resolv.conf` of many images needs it.
    pub(super) fn find_or_make(&self, path: &Path, node: Node) -> io::Result<OwnedFd> {
        match self.find(path) {
            Err(Errno::NOENT) => self.walk(path, node),
            result => result,
        }
    }

    /// An `O_PATH` descriptor of the directory that holds `path`, made where missing, and the last name of `path`.
    pub(super) fn parent_of<'path>(&self, path: &'path Path) -> io::Result<(OwnedFd, &'path OsStr)> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        let parent = path.parent().unwrap_or_else(|| Path::new("/"));
        Ok((self.find_or_make(parent, Node::Directory)?, name))
    }

    fn walk(&self, path: &Path, node: Node) -> io::Result<OwnedFd> {
        // The directories that led here: going up takes from this list and never asks the kernel for "..".
        let mut above: Vec<OwnedFd> = Vec::new();
        let mut rest: VecDeque<OsString> = parts(path).collect();
        let mut links = 0;
        while let Some(name) = rest.pop_front() {
            if name == ".." {
                above.pop();
                continue;
            }
            let here = above.last().map_or_else(|| self.root.as_fd(), AsFd::as_fd);
            let wanted = if rest.is_empty() { node } else { Node::Directory };
            let found = step(here, &name, wanted)?;
            if FileType::from_raw_mode(fstat(&found)?.st_mode) != FileType::Symlink {
                above.push(found);
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Errno::LOOP);
            }
            let target = OsString::from_vec(readlinkat(&found, "", Vec::new())?.into_bytes());
            if Path::new(&target).has_root() {
                above.clear();
            }
            for part in parts(Path::new(&target)).collect::<Vec<_>>().into_iter().rev() {
                rest.push_front(part);
            }
        }
        above.pop().map_or_else(|| self.find(Path::new("/")), Ok)
    }
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// Opens `name` in `here` without following it; makes it first where it is missing.
fn step(here: BorrowedFd<'_>, name: &OsStr, wanted: Node) -> io::Result<OwnedFd> {
    let look = || openat(here, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
    match look() {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    let made = match wanted {
        Node::Directory => mkdirat(here, name, Mode::from_raw_mode(0o755)),
        Node::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            openat(here, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    };
    match made {
        // Somebody else made it: what it is now decides.
        Ok(()) | Err(Errno::EXIST) => look(),
        Err(error) => Err(error),
    }
}

/// Whether `fd` is a directory.
pub(super) fn is_directory(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let stat = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

#[cfg(test)]
mod tests;

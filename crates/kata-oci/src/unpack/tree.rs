//! The layer's directory, and the only way to change something in it.

use std::collections::VecDeque;
use std::ffi::{CStr, OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use tar::EntryType;

use super::UnpackError;

/// Overlayfs' mark of a directory that hides what is below.
const OPAQUE_XATTR: &str = "trusted.overlay.opaque";
/// As many symbolic links as the kernel follows.
const MAX_LINKS: u32 = 40;
/// Nothing outside, and no link on the way: [`Tree::parent`] has resolved those.
const CONFINED: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// A layer in the making, over the layers below it.
pub struct Tree {
    root: OwnedFd,
    lowers: Vec<OwnedFd>,
    /// The last directory asked for: most entries follow their siblings.
    recent: Option<(PathBuf, OwnedFd)>,
}

/// What is at a path.
enum Found {
    Nothing,
    /// Of this layer.
    Directory,
    /// Of a layer below; this one has nothing there yet.
    LowerDirectory(Box<Stat>),
    Link(PathBuf),
    /// Hidden by this layer.
    Whiteout,
    Other,
}

impl Tree {
    pub fn open(root: &Path, lowers: &[PathBuf]) -> Result<Self, UnpackError> {
        let open = |path: &PathBuf| open_root(path).map_err(UnpackError::system("open", path));
        Ok(Self {
            root: open_root(root).map_err(UnpackError::system("open", root))?,
            lowers: lowers.iter().map(open).collect::<Result<_, _>>()?,
            recent: None,
        })
    }

    pub fn root(&self) -> &OwnedFd {
        &self.root
    }

    /// The directory that `path` goes into, made where this layer does not have it yet.
    pub fn parent(&mut self, path: &Path) -> Result<OwnedFd, UnpackError> {
        let named = path.parent().unwrap_or_else(|| Path::new(""));
        let duplicate = |fd: &OwnedFd| fd.try_clone().map_err(|source| system_error("open", path, source));
        match &self.recent {
            Some((recent, fd)) if recent == named => return duplicate(fd),
            _ => {}
        }
        let real = self.resolve(named, path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match real.as_os_str().is_empty() {
            true => duplicate(&self.root)?,
            false => fs::openat2(&self.root, &real, flags, Mode::empty(), CONFINED)
                .map_err(UnpackError::system("open the directory of", path))?,
        };
        let copy = duplicate(&fd)?;
        self.recent = Some((named.to_owned(), copy));
        Ok(fd)
    }

    /// Follows `dir` through this layer and those below to a path without links, making directories on the way.
    fn resolve(&mut self, dir: &Path, entry: &Path) -> Result<PathBuf, UnpackError> {
        let mut pending: VecDeque<OsString> = dir.iter().map(OsStr::to_owned).collect();
        let (mut at, mut links) = (PathBuf::new(), 0);
        while let Some(name) = pending.pop_front() {
            if name == ".." {
                at.pop();
                continue;
            }
            let next = at.join(&name);
            let fault = |source| system_error("look at", &next, source);
            match self.find(&next).map_err(|error| fault(error.into()))? {
                Found::Directory => at = next,
                Found::Link(target) => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(UnpackError::Links { path: entry.to_owned() });
                    }
                    if target.is_absolute() {
                        at = PathBuf::new();
                    }
                    let steps = target
                        .components()
                        .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir));
                    for step in steps.rev() {
                        pending.push_front(step.as_os_str().to_owned());
                    }
                }
                Found::Other => {
                    return Err(UnpackError::NotADirectory { path: entry.to_owned(), parent: next });
                }
                missing => {
                    self.make_parent(&next, &missing).map_err(|error| fault(error.into()))?;
                    at = next;
                }
            }
        }
        Ok(at)
    }

    /// Makes a directory that the stream did not describe: like the one below that it covers, else root's.
    fn make_parent(&self, path: &Path, found: &Found) -> Result<(), Errno> {
        if matches!(found, Found::Whiteout) {
            fs::unlinkat(&self.root, path, AtFlags::empty())?;
        }
        fs::mkdirat(&self.root, path, Mode::from_raw_mode(0o755))?;
        if matches!(found, Found::Whiteout) {
            let dir =
                fs::openat2(&self.root, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty(), CONFINED)?;
            fs::fsetxattr(&dir, OPAQUE_XATTR, b"y", XattrFlags::empty())?;
        }
        let Found::LowerDirectory(like) = found else {
            return fs::chmodat(&self.root, path, Mode::from_raw_mode(0o755), AtFlags::empty());
        };
        let (uid, gid) = (Uid::from_raw(like.st_uid), Gid::from_raw(like.st_gid));
        fs::chownat(&self.root, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
        fs::chmodat(&self.root, path, Mode::from_raw_mode(like.st_mode & 0o7777), AtFlags::empty())?;
        let time =
            Timespec { tv_sec: like.st_mtime, tv_nsec: i64::try_from(like.st_mtime_nsec).unwrap_or(0) };
        let times = Timestamps { last_access: time, last_modification: time };
        fs::utimensat(&self.root, path, &times, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// What the file system of all layers so far has at `path`, which has no links before its last component.
    fn find(&self, path: &Path) -> Result<Found, Errno> {
        match look(&self.root, path)? {
            Some((_, stat)) if kind(&stat) == FileType::Directory => return Ok(Found::Directory),
            Some((fd, stat)) => return not_directory(&fd, &stat),
            None => {}
        }
        if covers(&self.root, path)? {
            return Ok(Found::Nothing);
        }
        for lower in &self.lowers {
            match look(lower, path) {
                Ok(Some((_, stat))) if kind(&stat) == FileType::Directory => {
                    return Ok(Found::LowerDirectory(Box::new(stat)));
                }
                Ok(Some((fd, stat))) => {
                    // Hidden by a layer in between: this layer has nothing to remove.
                    return Ok(match not_directory(&fd, &stat)? {
                        Found::Whiteout => Found::Nothing,
                        found => found,
                    });
                }
                Ok(None) if !covers(lower, path)? => {}
                // Something else than a directory is in the way there, which hides what is further down.
                Ok(None) | Err(Errno::NOTDIR | Errno::LOOP) => return Ok(Found::Nothing),
                Err(error) => return Err(error),
            }
        }
        Ok(Found::Nothing)
    }

    /// Makes room for something that is no directory.
    pub fn remove(&mut self, dir: &OwnedFd, path: &Path) -> Result<(), UnpackError> {
        let Some(stat) = self.stat(dir, path)? else { return Ok(()) };
        self.recent = None;
        let name = name_of(path);
        if kind(&stat) != FileType::Directory {
            return fs::unlinkat(dir, name, AtFlags::empty()).map_err(UnpackError::system("replace", path));
        }
        // The standard library's removal never follows links either.
        std::fs::remove_dir_all(through_fd(dir, name)).map_err(|source| system_error("replace", path, source))
    }

    /// Makes a directory, or keeps the one that is there.
    pub fn directory(&mut self, dir: &OwnedFd, path: &Path) -> Result<(), UnpackError> {
        let stat = self.stat(dir, path)?;
        if stat.as_ref().is_some_and(|stat| kind(stat) == FileType::Directory) {
            return Ok(());
        }
        self.remove(dir, path)?;
        fs::mkdirat(dir, name_of(path), Mode::from_raw_mode(0o700))
            .map_err(UnpackError::system("create", path))?;
        if stat.as_ref().is_some_and(is_whiteout) {
            // Removed and made anew in the same layer: what is below stays hidden.
            self.mark_opaque(dir, path)?;
        }
        Ok(())
    }

    /// Makes a file, and tells its length.
    pub fn write_file(
        &self,
        dir: &OwnedFd,
        path: &Path,
        content: &mut impl Read,
    ) -> Result<u64, UnpackError> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = fs::openat(dir, name_of(path), flags, Mode::from_raw_mode(0o600))
            .map_err(UnpackError::system("create", path))?;
        io::copy(content, &mut File::from(fd)).map_err(|source| system_error("write", path, source))
    }

    pub fn symlink(&self, dir: &OwnedFd, path: &Path, target: &[u8]) -> Result<(), UnpackError> {
        // Any target will do: links are followed inside of the container, or by `resolve`.
        fs::symlinkat(OsStr::from_bytes(target), dir, name_of(path))
            .map_err(UnpackError::system("create", path))
    }

    pub fn hard_link(
        &self,
        from: &OwnedFd,
        name: &OsStr,
        dir: &OwnedFd,
        path: &Path,
    ) -> Result<(), UnpackError> {
        // Without AT_SYMLINK_FOLLOW a link to a symbolic link is one to the link itself.
        fs::linkat(from, name, dir, name_of(path), AtFlags::empty())
            .map_err(UnpackError::system("hard-link", path))
    }

    pub fn node(
        &self,
        dir: &OwnedFd,
        path: &Path,
        kind: EntryType,
        device: (u32, u32),
    ) -> Result<(), UnpackError> {
        let file_type = match kind {
            EntryType::Char => FileType::CharacterDevice,
            EntryType::Block => FileType::BlockDevice,
            _ => FileType::Fifo,
        };
        let device = if file_type == FileType::Fifo { 0 } else { fs::makedev(device.0, device.1) };
        fs::mknodat(dir, name_of(path), file_type, Mode::from_raw_mode(0o600), device)
            .map_err(UnpackError::system("create", path))
    }

    /// Hides what the layers below have at `path`.
    pub fn hide(&mut self, dir: &OwnedFd, path: &Path) -> Result<(), UnpackError> {
        match self.stat(dir, path)? {
            // A whiteout concerns lower layers only: what this layer has there stays.
            Some(stat) if kind(&stat) == FileType::Directory => self.mark_opaque(dir, path),
            Some(_) => Ok(()),
            None => {
                fs::mknodat(dir, name_of(path), FileType::CharacterDevice, Mode::empty(), fs::makedev(0, 0))
                    .map_err(UnpackError::system("hide", path))
            }
        }
    }

    /// Hides all that the layers below have in `dir`, the directory of `path`.
    pub fn make_opaque(&self, dir: &OwnedFd, path: &Path) -> Result<(), UnpackError> {
        fs::fsetxattr(dir, OPAQUE_XATTR, b"y", XattrFlags::empty())
            .map_err(UnpackError::system("make opaque the directory of", path))
    }

    fn mark_opaque(&self, dir: &OwnedFd, path: &Path) -> Result<(), UnpackError> {
        fs::lsetxattr(through_fd(dir, name_of(path)), OPAQUE_XATTR, b"y", XattrFlags::empty())
            .map_err(UnpackError::system("make opaque", path))
    }

    fn stat(&self, dir: &OwnedFd, path: &Path) -> Result<Option<Stat>, UnpackError> {
        match fs::statat(dir, name_of(path), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(UnpackError::system("look at", path)(error)),
        }
    }
}

/// The last component; `.` for the root.
pub fn name_of(path: &Path) -> &OsStr {
    path.file_name().unwrap_or_else(|| OsStr::new("."))
}

/// A path to `name` in `dir` for calls that take paths only.
pub fn through_fd(dir: &OwnedFd, name: &OsStr) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name)
}

pub fn system_error(action: &'static str, path: &Path, source: io::Error) -> UnpackError {
    UnpackError::System { action, path: path.to_owned(), source }
}

fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn is_whiteout(stat: &Stat) -> bool {
    kind(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

fn look(root: &OwnedFd, path: &Path) -> Result<Option<(OwnedFd, Stat)>, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match fs::openat2(root, path, flags, Mode::empty(), CONFINED) {
        Ok(fd) => {
            let stat = fs::fstat(&fd)?;
            Ok(Some((fd, stat)))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

fn not_directory(fd: &OwnedFd, stat: &Stat) -> Result<Found, Errno> {
    Ok(match kind(stat) {
        FileType::Symlink => {
            let target = fs::readlinkat(fd.as_fd(), c"" as &CStr, Vec::new())?;
            Found::Link(PathBuf::from(OsString::from_vec(target.into_bytes())))
        }
        _ if is_whiteout(stat) => Found::Whiteout,
        _ => Found::Other,
    })
}

/// Whether a directory above `path` in `layer` hides what is below the layer.
fn covers(layer: &OwnedFd, path: &Path) -> Result<bool, Errno> {
    for dir in path.ancestors().skip(1).filter(|dir| !dir.as_os_str().is_empty()) {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = match fs::openat2(layer, dir, flags, Mode::empty(), CONFINED) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => continue,
            Err(Errno::NOTDIR | Errno::LOOP) => return Ok(true),
            Err(error) => return Err(error),
        };
        if is_opaque(&fd)? {
            return Ok(true);
        }
    }
    is_opaque(layer)
}

fn is_opaque(dir: &OwnedFd) -> Result<bool, Errno> {
    let mut value = [0_u8; 4];
    match fs::fgetxattr(dir, OPAQUE_XATTR, &mut value) {
        Ok(length) => Ok(value.get(..length) == Some(b"y")),
        // Too long a value is none of overlayfs' either.
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(false),
        Err(error) => Err(error),
    }
}

//! A layer's tar stream into a directory that overlayfs takes as a lower layer.
//!
//! ```text
//!   tar entry ─▶ path without `..` ─▶ directory it goes into ─▶ old entry away ─▶ made ─▶ owner, mode, xattrs, times
//!                                     resolved over this layer
//!                                     and those below, links
//!                                     followed inside only
//!   .wh.NAME        ─▶ character device 0:0 called NAME
//!   .wh..wh..opq    ─▶ trusted.overlay.opaque=y on the directory
//! ```
//!
//! The stream is not trusted: every system call goes through [`Tree`], which stays inside the layer.

mod entry;
mod tree;

use std::cell::Cell;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use rustix::io::Errno;
use tar::EntryType;

use entry::Attributes;
use tree::Tree;

/// Prefix of whiteouts (OCI image specification, layer, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// The whiteout of everything below in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Other names with this prefix are bookkeeping of AUFS, and not part of the file system.
const AUFS: &[u8] = b".wh..wh.";
/// Most bytes between the content of one entry and that of the next: headers with long names and attributes, which are
/// read into memory.
const HEADERS_LIMIT: u64 = 4 << 20;

/// Why a layer cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The stream is not a tar archive, or ends early.
    #[error("not a readable tar stream")]
    Stream(#[source] io::Error),
    /// An entry would lie outside of the layer.
    #[error("entry {} leads out of the layer", path.display())]
    Escape {
        /// The path or link target as written.
        path: PathBuf,
    },
    /// An entry of a kind that means nothing in a file system.
    #[error("entry {} is of unknown kind {kind:?}", path.display())]
    Kind {
        /// The entry.
        path: PathBuf,
        /// The type byte of its header.
        kind: char,
    },
    /// An entry below something that is no directory.
    #[error("entry {} lies below {}, which is no directory", path.display(), parent.display())]
    NotADirectory {
        /// The entry.
        path: PathBuf,
        /// What it should lie in.
        parent: PathBuf,
    },
    /// Symbolic links in a circle.
    #[error("entry {} lies behind too many symbolic links", path.display())]
    Links {
        /// The entry.
        path: PathBuf,
    },
    /// More than what the image may still have.
    #[error("more files than an image may have")]
    TooMany,
    /// Larger than what the image may still be. Sparse files count with their holes.
    #[error("more bytes than an image may have")]
    TooLarge,
    /// The system said no.
    #[error("cannot {action} {}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// The entry.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl UnpackError {
    fn system(action: &'static str, path: &Path) -> impl FnOnce(Errno) -> Self {
        move |error| Self::System { action, path: path.to_owned(), source: error.into() }
    }
}

/// How much more an image may put on the disk. What a layer takes is gone for those above it.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Content of files.
    pub bytes: u64,
    /// Files, directories and all else that has a name.
    pub entries: u64,
}

/// Unpacks `stream` into the empty directory `into`, within `budget`. `lowers` are the layers below, topmost first: they
/// tell what the directories are like that the stream itself does not describe.
///
/// # Errors
/// [`UnpackError`]; the directory then holds a part of the layer and should be removed.
pub fn unpack(
    stream: impl Read,
    into: &Path,
    lowers: &[PathBuf],
    budget: &mut Budget,
) -> Result<(), UnpackError> {
    let mut layer = Unpacking { tree: Tree::open(into, lowers)?, directories: Vec::new() };
    let ration = Cell::new(HEADERS_LIMIT);
    let mut archive = tar::Archive::new(Rationed { from: stream, ration: &ration });
    let mut entries = archive.entries().map_err(UnpackError::Stream)?;
    loop {
        ration.set(HEADERS_LIMIT);
        let Some(entry) = entries.next() else { break };
        let mut entry = entry.map_err(UnpackError::Stream)?;
        budget.entries = budget.entries.checked_sub(1).ok_or(UnpackError::TooMany)?;
        ration.set(u64::MAX);
        layer.entry(&mut entry, budget)?;
        // What nobody wanted to read would count as headers.
        io::copy(&mut entry, &mut io::sink()).map_err(UnpackError::Stream)?;
    }
    layer.finish()
}

/// A reader that gives no more than what it is allowed to at the time.
struct Rationed<'a, R> {
    from: R,
    ration: &'a Cell<u64>,
}

impl<R: Read> Read for Rationed<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        let left = self.ration.get().checked_sub(read as u64);
        self.ration.set(left.ok_or_else(|| io::Error::other("headers of more than 4 MiB"))?);
        Ok(read)
    }
}

struct Unpacking {
    tree: Tree,
    /// Made directories: their times are set last, as each entry in them changes these.
    directories: Vec<(PathBuf, Attributes)>,
}

impl Unpacking {
    fn entry(
        &mut self,
        entry: &mut tar::Entry<'_, impl Read>,
        budget: &mut Budget,
    ) -> Result<(), UnpackError> {
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() || kind == EntryType::GNULongName || kind == EntryType::GNULongLink
        {
            return Ok(());
        }
        let path = inside(&entry.path_bytes())?;
        let Some(name) = path.file_name() else { return self.root(entry) };
        if name.as_bytes().starts_with(WHITEOUT) {
            return self.whiteout(&path);
        }
        let attributes = Attributes::of(entry, &path)?;
        let dir = self.tree.parent(&path)?;
        if kind == EntryType::Directory {
            return self.directory(&dir, &path, attributes);
        }
        self.tree.remove(&dir, &path)?;
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let mut bounded = entry.take(budget.bytes.saturating_add(1));
                let written = self.tree.write_file(&dir, &path, &mut bounded)?;
                budget.bytes = budget.bytes.checked_sub(written).ok_or(UnpackError::TooLarge)?;
            }
            EntryType::Symlink => self.tree.symlink(&dir, &path, &link_target(entry))?,
            EntryType::Link => return self.hard_link(&dir, &path, &inside(&link_target(entry))?),
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                self.tree.node(&dir, &path, kind, attributes.device)?;
            }
            other => return Err(UnpackError::Kind { path, kind: char::from(other.as_byte()) }),
        }
        attributes.apply(&dir, &path, kind)
    }

    /// `./`: the layer's own root.
    fn root(&mut self, entry: &mut tar::Entry<'_, impl Read>) -> Result<(), UnpackError> {
        if entry.header().entry_type() != EntryType::Directory {
            return Err(UnpackError::Escape { path: PathBuf::from("/") });
        }
        let here = PathBuf::from(".");
        let attributes = Attributes::of(entry, &here)?;
        attributes.apply(self.tree.root(), &here, EntryType::Directory)?;
        self.directories.push((here, attributes));
        Ok(())
    }

    fn directory(&mut self, dir: &OwnedFd, path: &Path, attributes: Attributes) -> Result<(), UnpackError> {
        self.tree.directory(dir, path)?;
        attributes.apply(dir, path, EntryType::Directory)?;
        self.directories.push((path.to_owned(), attributes));
        Ok(())
    }

    fn hard_link(&mut self, dir: &OwnedFd, path: &Path, target: &Path) -> Result<(), UnpackError> {
        let from = self.tree.parent(target)?;
        let name = target.file_name().ok_or_else(|| UnpackError::Escape { path: target.to_owned() })?;
        self.tree.hard_link(&from, name, dir, path)
    }

    fn whiteout(&mut self, path: &Path) -> Result<(), UnpackError> {
        let name = path.file_name().unwrap_or_default().as_bytes();
        if name == OPAQUE {
            let dir = self.tree.parent(path)?;
            return self.tree.make_opaque(&dir, path);
        }
        let hidden = name.strip_prefix(WHITEOUT).unwrap_or_default();
        if name.starts_with(AUFS) || hidden.is_empty() || hidden == b"." || hidden == b".." {
            return Ok(());
        }
        let hidden = path.with_file_name(std::ffi::OsStr::from_bytes(hidden));
        let dir = self.tree.parent(&hidden)?;
        self.tree.hide(&dir, &hidden)
    }

    fn finish(mut self) -> Result<(), UnpackError> {
        for (path, attributes) in std::mem::take(&mut self.directories).into_iter().rev() {
            let dir = self.tree.parent(&path)?;
            attributes.apply_times(&dir, &path)?;
        }
        Ok(())
    }
}

fn link_target(entry: &tar::Entry<'_, impl Read>) -> Vec<u8> {
    entry.link_name_bytes().map(|name| name.into_owned()).unwrap_or_default()
}

/// The path relative to the layer's root; empty for the root itself. Absolute paths mean the same as relative ones, `..`
/// means an attempt to leave.
fn inside(raw: &[u8]) -> Result<PathBuf, UnpackError> {
    let written = PathBuf::from(std::ffi::OsString::from_vec(raw.to_vec()));
    let mut path = PathBuf::new();
    for component in written.components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(UnpackError::Escape { path: written }),
        }
    }
    Ok(path)
}

//! A small tree of files, read whole and written elsewhere.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{Gid, Uid, chown};

use super::super::SECRET_MAX;
use super::PREFIX;

/// Entries of a tree that may hold secrets.
const ENTRIES_MAX: usize = 256;
/// Bytes of all its files.
pub(super) const BYTES_MAX: usize = 4 << 20;
/// Directories within each other.
const DEPTH_MAX: usize = 8;

/// A tree that is not copied.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// It is no volume of secrets.
    #[error(
        "{path:?} holds more than secrets do: {ENTRIES_MAX} files with {} MiB are looked through, in {DEPTH_MAX} directories \
         within each other",
        BYTES_MAX >> 20
    )]
    TooMuch {
        /// The tree.
        path: PathBuf,
        /// Whether something sealed was seen before it was too much.
        sealed: bool,
    },
    /// Neither a file, nor a directory, nor a link.
    #[error("{path:?} is of a kind that volumes of secrets do not have")]
    Kind {
        /// What.
        path: PathBuf,
    },
    /// The system says no.
    #[error("{what} {path:?}")]
    System {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Its word.
        #[source]
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> TreeError {
    move |source| TreeError::System { what, path: path.to_owned(), source: source.into() }
}

/// Paths are relative; the one of the tree itself is empty. Directories are before what is in them.
#[derive(Debug, Default)]
pub(super) struct Tree(Vec<Entry>);

#[derive(Debug)]
struct Entry {
    path: PathBuf,
    content: Content,
    mode: u32,
    uid: u32,
    gid: u32,
}

enum Content {
    Directory,
    Link(PathBuf),
    File(Vec<u8>),
}

impl Content {
    /// Of a file, in bytes.
    fn len(&self) -> usize {
        match self {
            Self::File(bytes) => bytes.len(),
            Self::Directory | Self::Link(_) => 0,
        }
    }
}

/// Without what may be a secret.
impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory => f.write_str("Directory"),
            Self::Link(to) => f.debug_tuple("Link").field(to).finish(),
            Self::File(bytes) => write!(f, "File({} bytes)", bytes.len()),
        }
    }
}

impl Tree {
    /// Reads all of `root`, a directory or a file. May wait for the host.
    pub(super) fn read(root: &Path) -> Result<Self, TreeError> {
        let mut tree = Self::default();
        let mut bytes = 0;
        // The root may be a link itself, as a part of a volume that Kubernetes has updated is.
        let real = fs::canonicalize(root).map_err(system("finding", root))?;
        tree.take(&real, Path::new(""), 0, &mut bytes).map_err(|error| match error {
            TreeError::TooMuch { .. } => {
                TreeError::TooMuch { path: root.to_owned(), sealed: tree.is_sealed() }
            }
            error => error,
        })?;
        Ok(tree)
    }

    fn take(&mut self, root: &Path, path: &Path, depth: usize, bytes: &mut usize) -> Result<(), TreeError> {
        let too_much = || TreeError::TooMuch { path: root.to_owned(), sealed: false };
        if self.0.len() >= ENTRIES_MAX || depth > DEPTH_MAX {
            return Err(too_much());
        }
        let full = if path.as_os_str().is_empty() { root.to_owned() } else { root.join(path) };
        let found = fs::symlink_metadata(&full).map_err(system("looking at", &full))?;
        let (mode, uid, gid) = (found.mode() & 0o7777, found.uid(), found.gid());
        let mut children = Vec::new();
        let content = if found.is_dir() {
            for child in fs::read_dir(&full).map_err(system("listing", &full))?.take(ENTRIES_MAX + 1) {
                children.push(path.join(child.map_err(system("listing", &full))?.file_name()));
            }
            Content::Directory
        } else if found.is_symlink() {
            Content::Link(fs::read_link(&full).map_err(system("reading", &full))?)
        } else if found.is_file() {
            Content::File(read_file(&full)?)
        } else {
            return Err(TreeError::Kind { path: full });
        };
        let length = content.len();
        self.0.push(Entry { path: path.to_owned(), content, mode, uid, gid });
        *bytes += length;
        // Also the last one counts for what was seen.
        if length > SECRET_MAX || *bytes > BYTES_MAX {
            return Err(too_much());
        }
        children.sort_unstable();
        children.iter().try_for_each(|child| self.take(root, child, depth + 1, bytes))
    }

    /// Whether a file of it is sealed.
    pub(super) fn is_sealed(&self) -> bool {
        self.0.iter().any(
            |entry| matches!(&entry.content, Content::File(bytes) if bytes.starts_with(PREFIX.as_bytes())),
        )
    }

    /// The sealed files, each with its path in the tree.
    pub(super) fn sealed(&mut self) -> impl Iterator<Item = (&Path, &mut Vec<u8>)> {
        self.0.iter_mut().filter_map(|entry| match &mut entry.content {
            Content::File(bytes) if bytes.starts_with(PREFIX.as_bytes()) => {
                Some((entry.path.as_path(), bytes))
            }
            _ => None,
        })
    }

    /// Makes the same at `root`, which is not there.
    pub(super) fn write(&self, root: &Path) -> Result<(), TreeError> {
        for entry in &self.0 {
            let path =
                if entry.path.as_os_str().is_empty() { root.to_owned() } else { root.join(&entry.path) };
            let owner = (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)));
            match &entry.content {
                Content::Directory => fs::create_dir(&path).map_err(system("making directory", &path))?,
                Content::Link(to) => {
                    symlink(to, &path).map_err(system("making link", &path))?;
                    continue;
                }
                Content::File(bytes) => write_file(&path, bytes)?,
            }
            chown(&path, owner.0, owner.1).map_err(system("giving", &path))?;
            let mode = fs::Permissions::from_mode(entry.mode);
            fs::set_permissions(&path, mode).map_err(system("setting the mode of", &path))?;
        }
        Ok(())
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, TreeError> {
    let mut options = fs::OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path).map_err(system("opening", path))?;
    let mut content = Vec::new();
    // One byte more tells that there is more.
    let limit = u64::try_from(SECRET_MAX).unwrap_or(u64::MAX).saturating_add(1);
    file.take(limit).read_to_end(&mut content).map_err(system("reading", path))?;
    Ok(content)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), TreeError> {
    use std::io::Write;
    let mut file: File = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(system("making", path))?;
    file.write_all(bytes).map_err(system("writing", path))
}

//! A cpio archive in the `newc` format, the one that the kernel unpacks as its initial RAM file system.
//!
//! The format is told in the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`: per entry a header of
//! the magic and thirteen eight-digit hexadecimal numbers, the name with its NUL, the data, the latter two padded to four
//! bytes. The same entries give the same bytes whenever and wherever they are written: entries are sorted, times are zero,
//! everything belongs to root, and inode numbers count from one.

use std::collections::BTreeMap;
use std::io::{self, Write};

const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";

/// Why an archive cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CpioError {
    /// The path is empty, or has an empty, `.` or `..` part, or a NUL.
    #[error("{path:?} is no path for an archive entry")]
    Path {
        /// The path.
        path: String,
    },
    /// The path is there already.
    #[error("{path} is in the archive twice")]
    Duplicate {
        /// The path.
        path: String,
    },
    /// The format holds sizes of 32 bits.
    #[error("{path} is too large for a cpio archive")]
    TooLarge {
        /// The path.
        path: String,
    },
    /// The output cannot be written.
    #[error("cannot write the archive")]
    Write {
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// What one entry is.
#[derive(Clone, Debug)]
enum Node {
    Directory,
    File(Vec<u8>),
    CharDevice { major: u32, minor: u32 },
}

impl Node {
    /// The type bits of the mode (`S_IFMT`).
    fn type_bits(&self) -> u32 {
        match self {
            Self::Directory => 0o040_000,
            Self::File(_) => 0o100_000,
            Self::CharDevice { .. } => 0o020_000,
        }
    }
}

/// An archive in the making. Directories above an entry are added with mode 0755 where they are missing.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    /// By path without a leading slash; the order of strings puts a directory before what is in it.
    entries: BTreeMap<String, (u32, Node)>,
}

impl Archive {
    /// Adds a directory with the permission bits `mode`.
    pub fn directory(&mut self, path: &str, mode: u32) -> Result<(), CpioError> {
        self.add(path, mode, Node::Directory)
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: &str, mode: u32, data: Vec<u8>) -> Result<(), CpioError> {
        self.add(path, mode, Node::File(data))
    }

    /// Adds a character device node.
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<(), CpioError> {
        self.add(path, mode, Node::CharDevice { major, minor })
    }

    fn add(&mut self, path: &str, mode: u32, node: Node) -> Result<(), CpioError> {
        let name = path.strip_prefix('/').unwrap_or(path);
        if name == TRAILER
            || name.contains('\0')
            || name.split('/').any(|part| matches!(part, "" | "." | ".."))
        {
            return Err(CpioError::Path { path: path.to_owned() });
        }
        for (end, _) in name.match_indices('/') {
            let parent = name.get(..end).unwrap_or_default();
            self.entries.entry(parent.to_owned()).or_insert((0o755, Node::Directory));
        }
        match self.entries.insert(name.to_owned(), (mode & 0o7777, node)) {
            None => Ok(()),
            Some(_) => Err(CpioError::Duplicate { path: path.to_owned() }),
        }
    }

    /// Writes the whole archive, trailer included.
    pub fn write(&self, mut out: impl Write) -> Result<(), CpioError> {
        let mut inode = 0;
        for (name, (mode, node)) in &self.entries {
            inode += 1;
            write_entry(&mut out, inode, name, *mode, node)?;
        }
        write_entry(&mut out, 0, TRAILER, 0, &Node::File(Vec::new()))?;
        out.flush().map_err(|source| CpioError::Write { source })
    }
}

fn write_entry(
    out: &mut impl Write,
    inode: u32,
    name: &str,
    mode: u32,
    node: &Node,
) -> Result<(), CpioError> {
    let too_large = |_| CpioError::TooLarge { path: name.to_owned() };
    let data: &[u8] = if let Node::File(data) = node { data } else { &[] };
    let size = u32::try_from(data.len()).map_err(too_large)?;
    let name_size = u32::try_from(name.len() + 1).map_err(too_large)?;
    let (major, minor) = if let Node::CharDevice { major, minor } = node { (*major, *minor) } else { (0, 0) };
    let links = if matches!(node, Node::Directory) { 2 } else { 1 };
    // The trailer is the one entry without a type.
    let mode = if inode == 0 { 0 } else { mode | node.type_bits() };
    // inode, mode, uid, gid, links, mtime, size, device, device of a node, name size, check sum (unused in newc)
    let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
    let mut head = MAGIC.to_owned();
    for field in fields {
        head.push_str(&format!("{field:08x}"));
    }
    head.push_str(name);
    head.push('\0');
    let mut put = |bytes: &[u8]| -> io::Result<()> {
        out.write_all(bytes)?;
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        out.write_all([0; 3].get(..padding).unwrap_or_default())
    };
    put(head.as_bytes()).and_then(|()| put(data)).map_err(|source| CpioError::Write { source })
}

#[cfg(test)]
mod tests;

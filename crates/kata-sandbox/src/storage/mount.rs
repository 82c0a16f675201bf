//! The two ways to mount: a file system by type and options, and a clone of what is mounted already.

use std::ffi::{CString, OsStr};
use std::fmt::Write as _;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};

use super::loop_device::{self, LoopDevice};
use super::{StorageError, bind_error};
use crate::pod::RootfsMount;

/// What mount(2) copies of its options: one page, with the closing zero.
const OPTIONS_MAX: usize = 4095;

/// Mounts one part of a root file system at `target`.
pub(super) fn mount(part: &RootfsMount, target: &Path) -> Result<(), StorageError> {
    let options = Options::parse(&part.options);
    if part.fs_type == "bind" || options.bind {
        let readonly = options.flags.contains(MountFlags::RDONLY);
        return clone(Path::new(&part.source), target, readonly, false);
    }
    // The descriptors must live until the mount is made: the options name them.
    let (data, _held) = options.data(part, target)?;
    // The loop device goes with the mount, once there is one.
    let device = options.loops.then(|| attach(part, options.flags)).transpose()?;
    let source = device.as_ref().map_or_else(|| Path::new(&part.source), |device| &device.path);
    let failed = |error: rustix::io::Errno| StorageError::Mount {
        fs_type: part.fs_type.clone(),
        source_text: part.source.clone(),
        target: target.to_owned(),
        source: error.into(),
    };
    rustix::mount::mount(source, target, &*part.fs_type, options.flags, &*data).map_err(failed)
}

fn attach(part: &RootfsMount, flags: MountFlags) -> Result<LoopDevice, StorageError> {
    let file = Path::new(&part.source);
    loop_device::attach(file, flags.contains(MountFlags::RDONLY)).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound if !file.exists() => StorageError::Absent(file.to_owned()),
        _ => StorageError::file("attach a loop device to", file, error),
    })
}

/// Makes what is mounted at `source`, and below it, appear at `target`.
///
/// The clone is made, cut off from its origin and made read-only before anybody can see it. With `follows_host` it stays a
/// follower of the origin: mounts made there later appear here too.
pub(super) fn clone(
    source: &Path,
    target: &Path,
    readonly: bool,
    follows_host: bool,
) -> Result<(), StorageError> {
    let attempt = || -> io::Result<()> {
        let flags =
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
        let tree = rustix::mount::open_tree(CWD, source, flags)?;
        let propagation = if follows_host { libc::MS_SLAVE } else { libc::MS_PRIVATE };
        set_attributes(&tree, if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 }, propagation)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(rustix::mount::move_mount(&tree, "", CWD, target, flags)?)
    };
    attempt().map_err(|error| bind_error(source, target, error))
}

/// mount_setattr(2) on a whole tree; Linux 5.12.
fn set_attributes(tree: &OwnedFd, set: u64, propagation: libc::c_ulong) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the path is a constant C string, the attributes are a valid mount_attr of the given size, and both
    // outlive the call, which keeps no pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The path that an open descriptor stands for.
pub(super) fn path_of(fd: &impl AsFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))
}

/// A row of the mount table.
pub(super) struct Row {
    /// Number of the mount.
    pub(super) id: String,
    /// Numbers of the device.
    pub(super) device: String,
    /// What of the file system is mounted.
    pub(super) root: PathBuf,
    /// Where.
    pub(super) point: PathBuf,
}

/// The mount table of this process, in the order of the mounts; nothing where there is none.
pub(super) fn rows() -> impl Iterator<Item = Row> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().filter_map(row).collect::<Vec<_>>().into_iter()
}

/// `36 35 98:0 /root /point rw,noatime …`
pub(super) fn row(line: &str) -> Option<Row> {
    let mut words = line.split(' ');
    let (id, _, device) = (words.next()?, words.next()?, words.next()?);
    let (root, point) = (unescape(words.next()?), unescape(words.next()?));
    Some(Row { id: id.to_owned(), device: device.to_owned(), root, point })
}

/// A path of the mount table, where blanks and the like are octal numbers.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { after.get(3..).unwrap_or_default() } else { after };
    }
    PathBuf::from(OsStr::from_bytes(&bytes))
}

/// fstab's option list, taken apart.
struct Options<'a> {
    flags: MountFlags,
    bind: bool,
    /// Whether the source is a regular file that wants a loop device.
    loops: bool,
    /// For the file system itself.
    rest: Vec<&'a str>,
}

impl<'a> Options<'a> {
    fn parse(options: &'a [String]) -> Self {
        let mut parsed = Self { flags: MountFlags::empty(), bind: false, loops: false, rest: Vec::new() };
        for option in options {
            match (flag(option), option.as_str()) {
                (Some((flag, true)), _) => parsed.flags |= flag,
                (Some((flag, false)), _) => parsed.flags -= flag,
                (None, "bind" | "rbind") => parsed.bind = true,
                (None, "loop") => parsed.loops = true,
                (None, "defaults" | "") => {}
                (None, option) => parsed.rest.push(option),
            }
        }
        parsed
    }

    /// The options of the file system as mount(2) wants them, and what must stay open for them to be valid.
    ///
    /// An overlay of many layers does not fit into mount(2)'s page, and fsconfig(2) takes at most 255 bytes a value on any
    /// kernel. So the layers of an over-long option are opened, and named by their descriptors.
    fn data(&self, part: &RootfsMount, target: &Path) -> Result<(CString, Vec<OwnedFd>), StorageError> {
        let refused = |reason: &str| StorageError::Options {
            fs_type: part.fs_type.clone(),
            target: target.to_owned(),
            reason: reason.to_owned(),
        };
        let mut held = Vec::new();
        let mut data = self.rest.join(",");
        if data.len() > OPTIONS_MAX {
            data.clear();
            for option in &self.rest {
                if !data.is_empty() {
                    data.push(',');
                }
                match option.strip_prefix("lowerdir=") {
                    Some(layers) => data.push_str(&open_layers(layers, &mut held)?),
                    None => data.push_str(option),
                }
            }
        }
        if data.len() > OPTIONS_MAX {
            return Err(refused("its options do not fit into one page"));
        }
        let data = CString::new(data).map_err(|_| refused("its options contain a zero byte"))?;
        Ok((data, held))
    }
}

/// `lowerdir=` with each layer named by an open descriptor.
fn open_layers(layers: &str, held: &mut Vec<OwnedFd>) -> Result<String, StorageError> {
    let mut option = String::from("lowerdir=");
    for (index, layer) in split_layers(layers).iter().enumerate() {
        let path = Path::new(layer);
        let fd = rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| StorageError::file("open layer", path, error))?;
        let separator = if index == 0 { "" } else { ":" };
        // Writing to a string cannot fail.
        let _ = write!(option, "{separator}/proc/self/fd/{}", fd.as_raw_fd());
        held.push(fd);
    }
    Ok(option)
}

/// Layers are separated by colons; a backslash makes the next character part of a name.
pub(super) fn split_layers(layers: &str) -> Vec<String> {
    let mut names = vec![String::new()];
    let mut characters = layers.chars();
    while let Some(character) = characters.next() {
        match (character, names.last_mut()) {
            (':', _) => names.push(String::new()),
            ('\\', Some(name)) => name.extend(characters.next()),
            (character, Some(name)) => name.push(character),
            (_, None) => {}
        }
    }
    names
}

/// An option that is a mount flag, and whether it sets or clears it.
fn flag(option: &str) -> Option<(MountFlags, bool)> {
    Some(match option {
        "ro" => (MountFlags::RDONLY, true),
        "rw" => (MountFlags::RDONLY, false),
        "nosuid" => (MountFlags::NOSUID, true),
        "suid" => (MountFlags::NOSUID, false),
        "nodev" => (MountFlags::NODEV, true),
        "dev" => (MountFlags::NODEV, false),
        "noexec" => (MountFlags::NOEXEC, true),
        "exec" => (MountFlags::NOEXEC, false),
        "noatime" => (MountFlags::NOATIME, true),
        "atime" => (MountFlags::NOATIME, false),
        "nodiratime" => (MountFlags::NODIRATIME, true),
        "diratime" => (MountFlags::NODIRATIME, false),
        "relatime" => (MountFlags::RELATIME, true),
        "norelatime" => (MountFlags::RELATIME, false),
        "strictatime" => (MountFlags::STRICTATIME, true),
        "nostrictatime" => (MountFlags::STRICTATIME, false),
        "sync" => (MountFlags::SYNCHRONOUS, true),
        "async" => (MountFlags::SYNCHRONOUS, false),
        "dirsync" => (MountFlags::DIRSYNC, true),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_told_apart_from_flags() {
        let options = ["ro", "nodev", "dev", "loop", "lowerdir=/a:/b", "index=off"].map(str::to_owned);
        let parsed = Options::parse(&options);
        assert_eq!((parsed.flags, parsed.loops), (MountFlags::RDONLY, true));
        assert_eq!(parsed.rest, ["lowerdir=/a:/b", "index=off"]);
    }

    #[test]
    fn rows_of_the_mount_table_are_read_with_their_blanks() {
        let row = row(r"36 35 98:0 /a\040b /mnt\134x rw,noatime master:1 - ext3 /dev/root rw").unwrap();
        assert_eq!((row.id.as_str(), row.device.as_str()), ("36", "98:0"));
        assert_eq!((row.root.as_path(), row.point.as_path()), (Path::new("/a b"), Path::new(r"/mnt\x")));
        assert!(super::row("36 35 98:0 /").is_none());
    }

    #[test]
    fn escaped_colons_belong_to_the_layer() {
        assert_eq!(split_layers(r"/a\:b:/c\\d"), ["/a:b", r"/c\d"]);
    }
}

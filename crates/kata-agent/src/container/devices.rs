//! Device nodes and links in the container's `/dev`.

use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, chownat, makedev, mknodat, openat, statat, symlinkat,
    unlinkat,
};
use rustix::io::{self, Errno};

use super::filesystem::{attach, clone_mount};
use super::plan::{DeviceKind, DevicePlan};
use super::tree::{Node, Tree};
use super::wire::Failure;

/// Nodes that every container has (OCI runtime specification, config-linux, "Default Devices").
const NODES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Links that every container has (OCI runtime specification, runtime-linux, "Dev symbolic links").
const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Makes the default nodes, then `devices`, then the links. Needs umask 0.
pub(super) fn populate(tree: &Tree, devices: &[DevicePlan]) -> Result<(), Failure> {
    let named = |path: &str| devices.iter().any(|device| device.path == Path::new(path));
    for (path, major, minor) in NODES.into_iter().filter(|(path, _, _)| !named(path)) {
        let kind = DeviceKind::Char;
        make(tree, &DevicePlan { path: path.into(), kind, major, minor, mode: 0o666, uid: 0, gid: 0 })?;
    }
    for device in devices {
        make(tree, device)?;
    }
    for (path, target) in LINKS {
        link(tree, Path::new(path), target)
            .map_err(|error| Failure::setup(format!("make the link {path}"), error))?;
    }
    if Path::new("/proc/kcore").exists() {
        link(tree, Path::new("/dev/core"), "/proc/kcore")
            .map_err(|error| Failure::setup("make the link /dev/core", error))?;
    }
    Ok(())
}

fn make(tree: &Tree, device: &DevicePlan) -> Result<(), Failure> {
    let failed = |error| Failure::setup(format!("make the device {}", device.path.display()), error);
    let (directory, name) = tree.parent_of(&device.path).map_err(failed)?;
    let kind = match device.kind {
        DeviceKind::Char => FileType::CharacterDevice,
        DeviceKind::Block => FileType::BlockDevice,
        DeviceKind::Fifo => FileType::Fifo,
    };
    let number = makedev(device.major, device.minor);
    let mode = Mode::from_raw_mode(device.mode);
    match mknodat(&directory, name, kind, mode, number) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            let there = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?;
            let same = FileType::from_raw_mode(there.st_mode) == kind
                && (kind == FileType::Fifo || there.st_rdev == number);
            return if same { Ok(()) } else { Err(failed(Errno::EXIST)) };
        }
        // A kernel or filesystem that does not let nodes be made: use the guest's.
        Err(Errno::PERM) => return borrow(tree, device).map_err(failed),
        Err(error) => return Err(failed(error)),
    }
    let owner = (Some(Uid::from_raw(device.uid)), Some(Gid::from_raw(device.gid)));
    // The mode is as asked: there is no umask. By its name it could not be changed without following a symlink.
    chownat(&directory, name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)
}

/// Binds the guest's node of the same path and number into the container.
fn borrow(tree: &Tree, device: &DevicePlan) -> io::Result<()> {
    let guest = openat(CWD, &device.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    if rustix::fs::fstat(&guest)?.st_rdev != makedev(device.major, device.minor) {
        return Err(Errno::PERM);
    }
    let node = clone_mount(guest.as_fd(), "", false)?;
    let target = tree.find_or_make(&device.path, Node::File)?;
    attach(node.as_fd(), target.as_fd())
}

/// An image may bring the link, or a file of that name in `/dev/ptmx`'s case; the link it is to be wins.
fn link(tree: &Tree, path: &Path, target: &str) -> io::Result<()> {
    let (directory, name) = tree.parent_of(path)?;
    match symlinkat(target, &directory, name) {
        Err(Errno::EXIST) if name.as_bytes() == b"ptmx" => {
            unlinkat(&directory, name, AtFlags::empty())?;
            symlinkat(target, &directory, name)
        }
        Err(Errno::EXIST) => Ok(()),
        result => result,
    }
}

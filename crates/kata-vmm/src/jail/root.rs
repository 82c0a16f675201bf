//! The empty root.

use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};

use super::{JailError, step};

/// Where the new root is mounted at first: a directory that is there on every host.
const GROUND: &str = "/proc";

/// Makes an empty file system the root, with the working directory bound to `sockets` in it, and drops the old one. Answers
/// `/proc/self` as it was before, for the last step that needs it.
pub(super) fn enter(sockets: Option<&Path>) -> Result<OwnedFd, JailError> {
    let directory = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    let open = |path: &str, what| rustix::fs::open(path, directory, Mode::empty()).map_err(step(what, ""));
    mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)
        .map_err(step("make its mounts its own", ""))?;
    let proc = open("/proc/self", "open /proc/self")?;
    let bound = sockets.map(|_| held_directory()).transpose()?;

    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("empty", GROUND, "tmpfs", flags, Some(c"size=4k,nr_inodes=4,mode=0555"))
        .map_err(step("mount an empty file system", ""))?;
    let new = open(GROUND, "open the empty file system")?;
    rustix::process::fchdir(&new).map_err(step("enter the empty file system", ""))?;
    if let (Some(path), Some(bound)) = (sockets, bound) {
        let name = path.file_name().unwrap_or_default();
        rustix::fs::mkdir(name, Mode::from_raw_mode(0o555)).map_err(step("make a directory in it", ""))?;
        move_mount(bound, "", rustix::fs::CWD, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(step("bind the directory of sockets", ""))?;
        let bind = flags | MountFlags::BIND | MountFlags::RDONLY;
        mount_remount(name, bind, "").map_err(step("make the directory of sockets read-only", ""))?;
    }
    mount_remount(".", flags | MountFlags::RDONLY, "").map_err(step("make its root read-only", ""))?;
    // The old root comes to lie on top of the new one, and is taken off it.
    rustix::process::pivot_root(".", ".").map_err(step("make it the root", ""))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("drop the old root", ""))?;
    rustix::process::chdir("/").map_err(step("enter the new root", ""))?;
    Ok(proc)
}

/// The working directory as a mount of its own that is nowhere yet.
fn held_directory() -> Result<OwnedFd, JailError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(rustix::fs::CWD, ".", flags).map_err(step("take the directory of sockets along", ""))
}

//! The mount calls that work on file descriptors (Linux 5.2 and 5.12): a mount is made and given all its attributes
//! while nobody can see it, and attached as the last step.

use std::fmt;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::AtFlags;
use rustix::io::{self, Errno, retry_on_intr};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// A filesystem that cannot be mounted, with what the kernel says about it.
#[derive(Debug)]
pub(super) struct FilesystemFailure {
    /// The call's error.
    pub errno: Errno,
    /// The kernel's messages, e.g. `tmpfs: Bad value for 'size'`; often empty.
    pub messages: String,
    /// The parameter that was refused, if it was one.
    pub parameter: Option<String>,
}

impl fmt::Display for FilesystemFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(parameter) = &self.parameter {
            write!(f, " with {parameter:?}")?;
        }
        if !self.messages.is_empty() {
            write!(f, " ({})", self.messages)?;
        }
        Ok(())
    }
}

/// A new instance of a filesystem, attached nowhere. `parameters` are `key=value` or `key`.
pub(super) fn new_mount(
    kind: &str,
    source: &str,
    parameters: &[String],
    attributes: MountAttrFlags,
) -> Result<OwnedFd, FilesystemFailure> {
    let plain = |errno| FilesystemFailure { errno, messages: String::new(), parameter: None };
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(plain)?;
    let told = |errno, parameter| FilesystemFailure { errno, messages: messages(&context), parameter };
    fsconfig_set_string(&context, "source", source)
        .map_err(|errno| told(errno, Some(format!("source={source}"))))?;
    for parameter in parameters {
        let set = match parameter.split_once('=') {
            Some((key, value)) => fsconfig_set_string(&context, key, value),
            None => fsconfig_set_flag(&context, parameter.as_str()),
        };
        set.map_err(|errno| told(errno, Some(parameter.clone())))?;
    }
    fsconfig_create(&context).map_err(|errno| told(errno, None))?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|errno| told(errno, None))
}

/// What the kernel has to say about a filesystem context: one message a read, `e` for errors first.
fn messages(context: &OwnedFd) -> String {
    let mut all = Vec::new();
    let mut buffer = [0_u8; 256];
    while let Ok(length) = retry_on_intr(|| io::read(context, &mut buffer)) {
        let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
        all.push(text.trim_start_matches(['e', 'w', 'i']).trim().to_owned());
        if all.len() >= 8 {
            break;
        }
    }
    all.join("; ")
}

/// A copy of the mount that `path` below `at` is in, with `path` as its root, attached nowhere.
pub(super) fn clone_mount(
    at: BorrowedFd<'_>,
    path: impl rustix::path::Arg,
    recursive: bool,
) -> io::Result<OwnedFd> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(at, path, flags)
}

/// Attaches the detached `mount` on top of what `target` names.
pub(super) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, "", target, "", flags)
}

/// What to change about a mount; the default changes nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    pub set: MountAttrFlags,
    pub clear: MountAttrFlags,
    /// `MS_*` propagation type without `MS_REC`.
    pub propagation: u32,
    /// Also for all mounts below.
    pub recursive: bool,
}

impl Default for Change {
    fn default() -> Self {
        let none = MountAttrFlags::empty();
        Self { set: none, clear: none, propagation: 0, recursive: false }
    }
}

/// `struct mount_attr` of `linux/mount.h`.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// Changes the mount whose root `mount` names (`mount_setattr(2)`).
pub(super) fn change(mount: BorrowedFd<'_>, change: Change) -> io::Result<()> {
    let atime = MountAttrFlags::MOUNT_ATTR__ATIME;
    let mut clear = change.clear;
    // The three modes of atime are one field, which has to be cleared to be set. RELATIME is its zero.
    if change.set.intersects(atime) {
        clear |= atime;
    }
    if change.set.is_empty() && clear.is_empty() && change.propagation == 0 {
        return Ok(());
    }
    let attributes = MountAttr {
        set: change.set.bits().into(),
        clear: clear.bits().into(),
        propagation: change.propagation.into(),
        userns: 0,
    };
    let mut flags = AtFlags::EMPTY_PATH.bits();
    if change.recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE.bits();
    }
    // SAFETY: the path is a NUL-terminated literal, `attributes` outlives the call, and its size is what is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

/// The error of the libc call just made.
pub(super) fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

//! The container's root: its mounts, devices, hidden paths, and the move into it.
//!
//! All of this runs in the container's own mount namespace while the guest's tree is still there: sources are looked
//! up in the guest, targets below the container's root only (see [`Tree`]).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, fstat, fstatfs, openat};
use rustix::io::Errno;
use rustix::mount::{
    MountAttrFlags, MountPropagationFlags, UnmountFlags, mount_bind_recursive, mount_change, mount_move,
    unmount,
};
use rustix::process::{chdir, chroot, fchdir, pivot_root};

use super::devices;
use super::filesystem::{Change, attach, change, clone_mount, new_mount};
use super::plan::{ContainerPlan, MountPlan, MountSource, TerminalPlan};
use super::terminal::Terminal;
use super::tree::{Node, Tree, is_directory};
use super::wire::Failure;

/// Mounts that had to be copied in the agent's mount namespace, before the container's own was made.
#[derive(Debug, Default)]
pub(super) struct Prepared {
    /// The container's cgroup directory, once for each mount of it that cannot be a mount of its own.
    pub cgroups: Vec<OwnedFd>,
}

/// Builds the root by `plan` and makes it the root of this process. Needs a mount namespace of its own. Gives the
/// terminal asked for, which is also at `/dev/console`.
pub(super) fn enter(
    plan: &ContainerPlan,
    mut prepared: Prepared,
    terminal: Option<TerminalPlan>,
) -> Result<Option<Terminal>, Failure> {
    let from_guest = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", from_guest)
        .map_err(|error| Failure::setup("cut the mounts off from the guest's", error))?;
    let tree = root_mount(&plan.rootfs)?;
    for mount in &plan.mounts {
        attach_one(&tree, mount, &mut prepared)?;
    }
    let dev_is_bind = |mount: &MountPlan| is_dev(mount) && matches!(mount.source, MountSource::Bind { .. });
    if !plan.mounts.iter().any(dev_is_bind) {
        devices::populate(&tree, &plan.devices)?;
    }
    let terminal = terminal.map(|terminal| console(&tree, terminal)).transpose()?;
    plan.hooks.run_before_root()?;
    protect(&tree, plan)?;
    pivot(&tree, plan)?;
    Ok(terminal)
}

fn console(tree: &Tree, plan: TerminalPlan) -> Result<Terminal, Failure> {
    let terminal = Terminal::open(tree, plan)?;
    let mounted = clone_mount(terminal.slave.as_fd(), "", false).and_then(|console| {
        let target = tree.find_or_make(Path::new("/dev/console"), Node::File)?;
        attach(console.as_fd(), target.as_fd())
    });
    mounted.map_err(|error| Failure::setup("mount the terminal at /dev/console", error))?;
    Ok(terminal)
}

/// The root has to be a mount to be pivoted to: a copy of the mount it is in, put on top of it.
fn root_mount(path: &Path) -> Result<Tree, Failure> {
    let failed = |error| Failure::setup(format!("mount the root {}", path.display()), error);
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let target = openat(CWD, path, directory, Mode::empty()).map_err(failed)?;
    let copy = clone_mount(target.as_fd(), "", true).map_err(failed)?;
    attach(copy.as_fd(), target.as_fd()).map_err(failed)?;
    Ok(Tree::new(copy))
}

fn is_dev(mount: &MountPlan) -> bool {
    mount.destination.components().eq(Path::new("/dev").components())
}

/// `MOUNT_ATTR_RDONLY` on `/dev` has to wait until the devices are made.
fn is_late(mount: &MountPlan) -> bool {
    is_dev(mount) && !matches!(mount.source, MountSource::Bind { .. })
}

fn attach_one(tree: &Tree, mount: &MountPlan, prepared: &mut Prepared) -> Result<(), Failure> {
    let at = mount.destination.display();
    let failed = |what: &str, error: Errno| Failure::setup(format!("mount {what} at {at}"), error);
    let mut attributes = MountAttrFlags::from_bits_retain(mount.set);
    if is_late(mount) {
        attributes -= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    let own = Change { set: attributes, ..Change::default() };
    let (detached, target) = match &mount.source {
        MountSource::Bind { path, recursive } => {
            let what = path.display().to_string();
            let detached =
                clone_mount(CWD, path.as_path(), *recursive).map_err(|error| failed(&what, error))?;
            let node = if is_directory(detached.as_fd()).map_err(|error| failed(&what, error))? {
                Node::Directory
            } else {
                Node::File
            };
            let target = tree.find_or_make(&mount.destination, node).map_err(|error| failed(&what, error))?;
            change(detached.as_fd(), own).map_err(|error| failed(&what, error))?;
            (detached, target)
        }
        MountSource::Filesystem { kind, source, parameters } => {
            let target = filesystem_target(tree, mount, kind)?;
            let parameters = with_mode_of(kind, parameters, target.as_fd());
            let detached = new_mount(kind, source, &parameters, attributes)
                .map_err(|error| Failure::setup(format!("mount {kind} at {at}{error}"), error.errno))?;
            (detached, target)
        }
        MountSource::Cgroup => {
            let target = tree
                .find_or_make(&mount.destination, Node::Directory)
                .map_err(|error| failed("the cgroup", error))?;
            let detached = match prepared.cgroups.pop() {
                Some(view) => view,
                None => new_mount("cgroup2", "cgroup", &[], attributes)
                    .map_err(|error| Failure::setup(format!("mount cgroup2 at {at}{error}"), error.errno))?,
            };
            change(detached.as_fd(), own).map_err(|error| failed("the cgroup", error))?;
            (detached, target)
        }
    };
    guard_proc(mount, target.as_fd())?;
    finish(mount, detached.as_fd(), target.as_fd()).map_err(|error| failed("a filesystem", error))
}

fn finish(mount: &MountPlan, detached: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let tree = Change {
        set: MountAttrFlags::from_bits_retain(mount.tree_set),
        clear: MountAttrFlags::from_bits_retain(mount.tree_clear),
        propagation: 0,
        recursive: true,
    };
    change(detached, tree)?;
    attach(detached, target)?;
    let Some(propagation) = mount.propagation else { return Ok(()) };
    let recursive = MountPropagationFlags::REC.bits();
    let kind = propagation & !recursive;
    change(
        detached,
        Change { propagation: kind, recursive: propagation & recursive != 0, ..Change::default() },
    )
}

/// `proc` and `sysfs` are what later steps rely on, so no symlink may send them elsewhere.
fn filesystem_target(tree: &Tree, mount: &MountPlan, kind: &str) -> Result<OwnedFd, Failure> {
    let path = &mount.destination;
    let failed = |error| Failure::setup(format!("find the mount point {}", path.display()), error);
    let target = tree.find_or_make(path, Node::Directory).map_err(failed)?;
    if !matches!(kind, "proc" | "sysfs") {
        return Ok(target);
    }
    tree.find_plain(path).map_err(|error| match error {
        Errno::LOOP => Failure::Invalid {
            key: format!("mounts[{:?}]", path.display().to_string()),
            reason: format!("the mount point of {kind} leads through a symlink"),
        },
        error => failed(error),
    })
}

/// A tmpfs on top of a directory keeps that directory's mode unless told otherwise: `/tmp` stays 1777.
fn with_mode_of(kind: &str, parameters: &[String], target: BorrowedFd<'_>) -> Vec<String> {
    let mut parameters = parameters.to_vec();
    let told = parameters.iter().any(|parameter| parameter.starts_with("mode="));
    if kind == "tmpfs"
        && !told
        && let Ok(stat) = fstat(target)
    {
        parameters.push(format!("mode={:o}", stat.st_mode & 0o7777));
    }
    parameters
}

const PROC_MAGIC: u64 = 0x9fa0;
/// Files in `/proc` that may be replaced: they show resources, and nothing is decided by writing to them.
const REPLACEABLE: [&str; 10] = [
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/net/dev",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/sys/kernel/ns_last_pid",
];

/// Refuses a mount onto procfs: what a process writes to `/proc/self/attr` and the like must reach the kernel.
fn guard_proc(mount: &MountPlan, target: BorrowedFd<'_>) -> Result<(), Failure> {
    let on_proc = fstatfs(target).is_ok_and(|stat| u64::try_from(stat.f_type) == Ok(PROC_MAGIC));
    let is = |path: &&str| mount.destination.components().eq(Path::new(path).components());
    let proc_again =
        matches!(&mount.source, MountSource::Filesystem { kind, .. } if kind == "proc") && is(&"/proc");
    if !on_proc || proc_again || REPLACEABLE.iter().any(is) {
        return Ok(());
    }
    Err(Failure::Invalid {
        key: format!("mounts[{:?}]", mount.destination.display().to_string()),
        reason: "a mount inside /proc would hide what the kernel has to see".to_owned(),
    })
}

fn protect(tree: &Tree, plan: &ContainerPlan) -> Result<(), Failure> {
    for path in &plan.masked {
        mask(tree, path).map_err(|error| Failure::setup(format!("mask {}", path.display()), error))?;
    }
    for path in &plan.readonly {
        freeze(tree, path)
            .map_err(|error| Failure::setup(format!("make {} read-only", path.display()), error))?;
    }
    let readonly = Change { set: MountAttrFlags::MOUNT_ATTR_RDONLY, ..Change::default() };
    for mount in plan.mounts.iter().filter(|mount| is_late(mount)) {
        if MountAttrFlags::from_bits_retain(mount.set).contains(MountAttrFlags::MOUNT_ATTR_RDONLY) {
            let made = tree.find(&mount.destination).and_then(|dev| change(dev.as_fd(), readonly));
            made.map_err(|error| Failure::setup("make /dev read-only", error))?;
        }
    }
    if plan.readonly_rootfs {
        change(tree.root(), readonly).map_err(|error| Failure::setup("make the root read-only", error))?;
    }
    Ok(())
}

/// Hides `path`: a directory below an empty one, a file below the guest's own null device (never the container's,
/// which may be something else by now).
fn mask(tree: &Tree, path: &Path) -> Result<(), Errno> {
    let target = match tree.find(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result?,
    };
    let cover = if is_directory(target.as_fd())? {
        let parameters = ["nr_blocks=1", "nr_inodes=1", "mode=755"].map(str::to_owned);
        new_mount("tmpfs", "tmpfs", &parameters, MountAttrFlags::MOUNT_ATTR_RDONLY)
            .map_err(|error| error.errno)?
    } else {
        clone_mount(CWD, "/dev/null", false)?
    };
    attach(cover.as_fd(), target.as_fd())
}

fn freeze(tree: &Tree, path: &Path) -> Result<(), Errno> {
    let target = match tree.find(path) {
        Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
        result => result?,
    };
    let copy = clone_mount(target.as_fd(), "", true)?;
    change(
        copy.as_fd(),
        Change { set: MountAttrFlags::MOUNT_ATTR_RDONLY, recursive: true, ..Change::default() },
    )?;
    attach(copy.as_fd(), target.as_fd())
}

/// Changes the root to `tree` and lets go of the guest's.
fn pivot(tree: &Tree, plan: &ContainerPlan) -> Result<(), Failure> {
    let step = |what: &str, error: Errno| Failure::setup(format!("{what} the container's root"), error);
    fchdir(tree.root()).map_err(|error| step("enter", error))?;
    pivot_root(".", ".").map_err(|error| match error {
        Errno::INVAL => step("(from a root that is the initial ramfs or shared) pivot to", error),
        error => step("pivot to", error),
    })?;
    // The old root now lies on top of the new one, at the same place.
    unmount(".", UnmountFlags::DETACH).map_err(|error| step("let go of the guest below", error))?;
    chdir("/").map_err(|error| step("enter", error))?;
    if let Some(propagation) = plan.propagation {
        mount_change("/", MountPropagationFlags::from_bits_retain(propagation))
            .map_err(|error| step("set the propagation of", error))?;
    }
    Ok(())
}

const RAMFS_MAGIC: u64 = 0x8584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Makes it possible to `pivot_root` away from an initial ramfs, which has no parent mount and so refuses that.
///
/// The root is bound to a directory of itself, moved on top of itself, and entered: same files, but now a mount with a
/// parent. Costs four system calls and no memory. Call it as PID 1 before other mounts exist: those would stay below.
/// Does nothing where the root is not a ramfs.
///
/// # Errors
/// A mount call that failed.
pub fn make_root_pivotable() -> std::io::Result<()> {
    let root = openat(CWD, "/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let kind = u64::try_from(fstatfs(&root)?.f_type).unwrap_or_default();
    if kind != RAMFS_MAGIC && kind != TMPFS_MAGIC {
        return Ok(());
    }
    let place = "/.root";
    match rustix::fs::mkdir(place, Mode::from_raw_mode(0o700)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    mount_bind_recursive("/", place)?;
    chdir(place)?;
    mount_move(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    rustix::fs::rmdir(place)?;
    Ok(())
}

//! The filesystems that every guest has, mounted by the agent where it is PID 1.

use std::ffi::CStr;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use super::service::CGROUPS;

/// A mount that failed.
#[derive(Debug, thiserror::Error)]
#[error("mounting {kind} on {point}")]
pub struct MountError {
    kind: &'static str,
    point: &'static str,
    #[source]
    source: io::Error,
}

struct Entry {
    kind: &'static str,
    point: &'static str,
    flags: MountFlags,
    data: &'static CStr,
    /// Whether a kernel may lack the filesystem.
    optional: bool,
}

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
const NODEV: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const NOEXEC: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

const fn entry(kind: &'static str, point: &'static str, flags: MountFlags, data: &'static CStr) -> Entry {
    Entry { kind, point, flags, data, optional: false }
}

const ENTRIES: [Entry; 10] = [
    entry("proc", "/proc", SAFE, c""),
    entry("sysfs", "/sys", SAFE, c""),
    // Reports of the hardware are asked for in it. The kernel makes the place where it has the filesystem.
    Entry { optional: true, ..entry("configfs", "/sys/kernel/config", SAFE, c"") },
    entry("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
    entry("devpts", "/dev/pts", NOEXEC, c"mode=0620,gid=5,ptmxmode=0666"),
    entry("tmpfs", "/dev/shm", NODEV, c"mode=1777"),
    Entry { optional: true, ..entry("mqueue", "/dev/mqueue", SAFE, c"") },
    entry("tmpfs", "/run", NODEV, c"mode=0755"),
    entry("tmpfs", "/tmp", NODEV, c"mode=1777"),
    entry("cgroup2", CGROUPS, SAFE, c"nsdelegate"),
];

/// Mounts all of them; one that the kernel mounted already is fine.
pub(super) fn mount_all() -> Result<(), MountError> {
    for entry in &ENTRIES {
        let Entry { kind, point, flags, data, optional } = entry;
        let failed = |source| MountError { kind, point, source };
        match std::fs::create_dir_all(point) {
            // Where nobody but the kernel makes directories.
            Err(error) if *optional && error.kind() == io::ErrorKind::PermissionDenied => continue,
            made => made.map_err(failed)?,
        }
        match mount(*kind, *point, *kind, *flags, *data) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(Errno::NODEV) if *optional => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
    for (name, target) in [("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")] {
        // devtmpfs may have them already.
        let _ = symlink(Path::new("/proc/self").join(target), Path::new("/dev").join(name));
    }
    delegate_controllers();
    Ok(())
}

/// Gives containers' cgroups every controller that the kernel has. One that cannot be had fails later, by name, where
/// a limit asks for it.
fn delegate_controllers() {
    let root = Path::new(CGROUPS);
    let controllers = std::fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    for controller in controllers.split_whitespace() {
        let _ = std::fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

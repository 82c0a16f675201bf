//! Mounts, and the change to the root that was verified.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, fstat, open, openat, statat, statfs, unlinkat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_bind, mount_move};

/// Where the root is until it is the root.
pub const SYSROOT: &str = "/sysroot";
/// What this program keeps for later.
pub const STATE: &str = "/run/kata-guest-init";

const KERNEL: [&str; 4] = ["/dev", "/proc", "/run", "/sys"];
const RAMFS: i64 = 0x8584_58f6;
const TMPFS: i64 = 0x0102_1994;

/// A step towards the root that failed.
#[derive(Debug, thiserror::Error)]
#[error("{what} {path:?}")]
pub struct RootError {
    what: &'static str,
    path: PathBuf,
    #[source]
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: &'static str, path: impl AsRef<Path>) -> impl FnOnce(E) -> RootError {
    move |error| RootError { what, path: path.as_ref().into(), source: error.into() }
}

/// Mounts what the kernel tells through, and a `/run` that stays.
///
/// # Errors
/// The first that fails; one that is mounted already is fine.
pub fn mount_kernel() -> Result<(), RootError> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let entries: [(&str, &str, MountFlags, &CStr); 4] = [
        ("proc", "/proc", safe, c""),
        ("sysfs", "/sys", safe, c""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
        // Programs of services are started from below.
        ("tmpfs", "/run", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755"),
    ];
    for (kind, point, flags, data) in entries {
        std::fs::create_dir_all(point).map_err(failed("making", point))?;
        match mount(kind, point, kind, flags, data) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(failed("mounting", point)(error)),
        }
    }
    std::fs::create_dir_all(STATE).map_err(failed("making", STATE))
}

/// Mounts where reports of the hardware are asked for; a kernel that has no such place makes none.
///
/// # Errors
/// It is there, and cannot be mounted on.
pub fn mount_configfs() -> Result<(), RootError> {
    let point = "/sys/kernel/config";
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    match mount("configfs", point, "configfs", flags, c"") {
        Ok(()) | Err(Errno::BUSY | Errno::NOENT | Errno::NODEV) => Ok(()),
        Err(error) => Err(failed("mounting", point)(error)),
    }
}

/// Points the standard descriptors at the console that is there now.
pub fn reopen_console() {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let console = open("/dev/console", flags, Mode::empty());
    let Ok(console) = console.or_else(|_| open("/dev/null", flags, Mode::empty())) else { return };
    let _ = rustix::stdio::dup2_stdin(&console);
    let _ = rustix::stdio::dup2_stdout(&console);
    let _ = rustix::stdio::dup2_stderr(&console);
}

/// Mounts the erofs image on `device`, which the kernel verifies as it is read, at `point`.
///
/// # Errors
/// It is no erofs, or the kernel has none.
pub fn mount_image(device: &Path, point: &Path, flags: MountFlags) -> Result<(), RootError> {
    std::fs::create_dir_all(point).map_err(failed("making", point))?;
    let flags = flags | MountFlags::RDONLY | MountFlags::NODEV;
    mount(device, point, "erofs", flags, c"").map_err(failed("mounting the verified image at", point))
}

/// Makes the directory `name` of the root writable: what is written is kept in memory, and gone with the machine.
///
/// # Errors
/// The root has no such directory, or the kernel no overlayfs.
pub fn make_writable(root: &Path, name: &str) -> Result<(), RootError> {
    let lower = root.join(name);
    let layers = Path::new(STATE).join("writable").join(name);
    let (upper, work) = (layers.join("upper"), layers.join("work"));
    for directory in [&upper, &work] {
        std::fs::create_dir_all(directory).map_err(failed("making", directory))?;
    }
    let options =
        format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    let options = std::ffi::CString::new(options).map_err(failed("laying a writable layer over", &lower))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    mount("overlay", &lower, "overlay", flags, options.as_c_str())
        .map_err(failed("laying a writable layer over", &lower))
}

/// Mounts an empty `/tmp` for everybody.
///
/// # Errors
/// The root has no such directory.
pub fn mount_tmp(root: &Path) -> Result<(), RootError> {
    let point = root.join("tmp");
    mount("tmpfs", &point, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=1777")
        .map_err(failed("mounting", &point))
}

/// Keeps this program under `path`, for units to start. The file is the initramfs's own and costs nothing more.
///
/// # Errors
/// It cannot be mounted there.
pub fn keep_program(path: &Path) -> Result<(), RootError> {
    std::fs::write(path, "").map_err(failed("making", path))?;
    mount_bind("/proc/self/exe", path).map_err(failed("keeping this program as", path))
}

/// Makes `root` the root, takes what the kernel tells through along, and gives the initramfs's memory back.
///
/// # Errors
/// The image lacks one of the directories, or this is no initramfs.
pub fn switch(root: &Path) -> Result<(), RootError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old = open("/", flags, Mode::empty()).map_err(failed("opening", "/"))?;
    for point in KERNEL {
        let target = root.join(point.trim_start_matches('/'));
        mount_move(point, &target).map_err(failed("moving a mount to", &target))?;
    }
    std::env::set_current_dir(root).map_err(failed("entering", root))?;
    mount_move(".", "/").map_err(failed("making the root of", root))?;
    rustix::process::chroot(".").map_err(failed("changing the root to", root))?;
    std::env::set_current_dir("/").map_err(failed("entering", "/"))?;
    free(&old);
    Ok(())
}

/// Removes the files of an initramfs, which are memory. What is not one is not touched.
fn free(old: &OwnedFd) {
    let in_memory = rustix::fs::fstatfs(old).is_ok_and(|fs| [RAMFS, TMPFS].contains(&fs.f_type));
    let is_root_now = statfs("/").is_ok_and(|fs| [RAMFS, TMPFS].contains(&fs.f_type));
    if let Ok(stat) = fstat(old)
        && in_memory
        && !is_root_now
    {
        remove_all(old.as_fd(), stat.st_dev);
    }
}

/// Removes what is in `directory` on the filesystem `device`. A failure costs memory, and no boot.
fn remove_all(directory: impl AsFd, device: u64) {
    let Ok(entries) = Dir::read_from(&directory) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let Ok(stat) = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        if stat.st_dev != device {
            continue;
        }
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if is_directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            if let Ok(below) = openat(&directory, name, flags, Mode::empty()) {
                remove_all(below, device);
            }
        }
        let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        let _ = unlinkat(&directory, name, flags);
    }
}

/// Names of the directories in `path`, sorted; none where there is no such directory.
///
/// # Errors
/// It cannot be read.
pub fn directories(path: &Path) -> Result<Vec<String>, RootError> {
    let entries = match std::fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed("reading", path))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("reading", path))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_sorted_and_an_absent_one_is_empty() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["b", "a"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        assert_eq!(directories(directory.path()).unwrap(), ["a", "b"]);
        assert!(directories(&directory.path().join("c")).unwrap().is_empty());
    }

    #[test]
    fn removing_leaves_what_links_lead_to() {
        let keep = tempfile::NamedTempFile::new().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let below = directory.path().join("a/b");
        std::fs::create_dir_all(&below).unwrap();
        std::fs::write(below.join("c"), "").unwrap();
        std::os::unix::fs::symlink(keep.path(), below.join("link")).unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let opened = open(directory.path(), flags, Mode::empty()).unwrap();
        let device = fstat(&opened).unwrap().st_dev;
        remove_all(&opened, device + 1);
        assert!(below.join("c").exists(), "another filesystem's");
        remove_all(&opened, device);
        assert!(directories(directory.path()).unwrap().is_empty());
        assert!(keep.path().exists());
    }
}

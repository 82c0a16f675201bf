//! Files: a root that nothing can be written to for good, the source tree, and what a kernel offers as files.

use std::ffi::{CString, NulError};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use lab_init::{ROOT_TAG, SYSTEMD_PARAMETER, TREE_PARAMETER, TREE_TAG};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::system::finit_module;
use thiserror::Error;

/// What no kernel loads by itself when it is first used.
const MODULES: &[&str] = &["kvm_amd", "vhost_vsock", "vhost_net", "tun", "loop", "dm_mod", "erofs"];
/// The program, where a service can start it.
const SERVICE_PROGRAM: &str = "/run/lab/init";
const SERVICE: &str = "[Unit]\nDescription=The lab's command\nAfter=dbus.service\n\
    [Service]\nExecStart=/run/lab/init serve\nStandardError=journal+console\nDelegate=yes\n";
const SERVICE_FILE: &str = "/run/systemd/system/lab.service";
const SERVICE_LINK: &str = "/run/systemd/system/multi-user.target.wants/lab.service";

/// A step that failed.
#[derive(Debug, Error)]
pub enum WorldError {
    #[error("mounting {kind} on {}", point.display())]
    Mount { kind: &'static str, point: PathBuf, source: io::Error },
    #[error("{action} {}", path.display())]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("mount options {0:?} have a zero byte")]
    Options(String, #[source] NulError),
    #[error("`{program}` failed: {status}")]
    Program { program: &'static str, status: ExitStatus },
}

fn at(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> WorldError {
    let path = path.into();
    move |source| WorldError::File { action, path, source }
}

/// Turns the initramfs into the Debian.
pub fn enter() -> Result<(), WorldError> {
    put("proc", "proc", "/proc", "")?;
    let parameters = parameters();
    put("virtiofs", ROOT_TAG, "/lower", "")?;
    load_overlay()?;
    put("tmpfs", "upper", "/layer", "size=75%")?;
    for dir in ["/layer/upper", "/layer/work"] {
        std::fs::create_dir(dir).map_err(at("create", dir))?;
    }
    put("overlay", "root", "/root", "lowerdir=/lower,upperdir=/layer/upper,workdir=/layer/work")?;
    switch_root()?;
    for (kind, point, options) in [
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("devtmpfs", "/dev", "mode=0755"),
        ("devpts", "/dev/pts", "mode=0620,gid=5,ptmxmode=0666"),
        ("tmpfs", "/dev/shm", "mode=1777"),
        ("mqueue", "/dev/mqueue", ""),
        ("cgroup2", "/sys/fs/cgroup", "nsdelegate"),
        ("tmpfs", "/run", "mode=0755"),
        ("tmpfs", "/tmp", "mode=1777"),
        // An overlay takes no other overlay as its upper layer, and these are put here.
        ("tmpfs", "/var/lib/containerd", "mode=0700"),
        ("tmpfs", "/var/lib/docker", "mode=0710"),
        ("tmpfs", "/var/lib/kata", "mode=0711"),
    ] {
        put(kind, kind, point, options)?;
    }
    for (link, target) in [("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")] {
        let link = Path::new("/dev").join(link);
        symlink(format!("/proc/self/fd{target}"), &link).map_err(at("link", link))?;
    }
    if let Some(tree) = parameters.iter().find_map(|word| word.strip_prefix(TREE_PARAMETER)) {
        put("virtiofs", TREE_TAG, tree, "")?;
    }
    let name = "/proc/sys/kernel/hostname";
    std::fs::write(name, "lab").map_err(at("write", name))?;
    delegate_controllers()
}

/// Every controller for the cgroups below the root, as systemd would have it.
fn delegate_controllers() -> Result<(), WorldError> {
    let root = Path::new("/sys/fs/cgroup");
    let (list, switch) = (root.join("cgroup.controllers"), root.join("cgroup.subtree_control"));
    let controllers = std::fs::read_to_string(&list).map_err(at("read", &list))?;
    let all: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    std::fs::write(&switch, all.join(" ")).map_err(at("write", &switch))
}

/// Mounts, making the directory first.
fn put(kind: &'static str, source: &str, point: &str, options: &str) -> Result<(), WorldError> {
    std::fs::create_dir_all(point).map_err(at("create", point))?;
    let data = CString::new(options).map_err(|error| WorldError::Options(options.to_owned(), error))?;
    mount(source, point, kind, MountFlags::empty(), data.as_c_str()).map_err(|errno| WorldError::Mount {
        kind,
        point: point.into(),
        source: errno.into(),
    })
}

/// An initramfs cannot be pivoted away from: the new root is moved over it.
fn switch_root() -> Result<(), WorldError> {
    let failed = |action, path: &'static str| move |errno: Errno| at(action, path)(errno.into());
    rustix::process::chdir("/root").map_err(failed("enter", "/root"))?;
    mount_move(".", "/").map_err(failed("move to /", "/root"))?;
    rustix::process::chroot(".").map_err(failed("make the root of", "/root"))?;
    rustix::process::chdir("/").map_err(failed("enter", "/"))
}

fn parameters() -> Vec<String> {
    let line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    line.split_whitespace().map(str::to_owned).collect()
}

/// The one module that is needed before its file is where `modprobe` looks. It depends on no other.
fn load_overlay() -> Result<(), WorldError> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let path = Path::new("/lower/lib/modules").join(release).join("kernel/fs/overlayfs/overlay.ko");
    let failed = |action| {
        let path = path.clone();
        move |errno: Errno| at(action, path)(errno.into())
    };
    let file = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("open module"))?;
    finit_module(&file, c"", 0).map_err(failed("load module"))
}

/// Loads the modules of virtualisation, and does to their devices and to `lo` what udev and a network daemon would.
pub fn load_modules() -> Result<(), WorldError> {
    program(Command::new("/sbin/modprobe").arg("-a").args(MODULES), "modprobe")?;
    program(Command::new("/sbin/ip").args(["link", "set", "lo", "up"]), "ip")?;
    let kvm = "/dev/kvm";
    // Absent where the processor shows no svm, which the command then finds out.
    if Path::new(kvm).exists() {
        chown(kvm, None, group("kvm")).map_err(at("chgrp", kvm))?;
        let mode = std::fs::Permissions::from_mode(0o660);
        std::fs::set_permissions(kvm, mode).map_err(at("chmod", kvm))?;
    }
    Ok(())
}

fn program(command: &mut Command, program: &'static str) -> Result<(), WorldError> {
    let status = command.status().map_err(at("run", program))?;
    if status.success() { Ok(()) } else { Err(WorldError::Program { program, status }) }
}

fn group(name: &str) -> Option<u32> {
    let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let mut lines = groups.lines().map(|line| line.split(':'));
    lines.find_map(|mut fields| (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?)
}

/// Whether xtask asked for it.
pub fn wants_systemd() -> bool {
    parameters().iter().any(|word| word == SYSTEMD_PARAMETER)
}

/// Becomes systemd, with a service that is this program again. Comes back only with an error.
pub fn become_systemd() -> Result<(), WorldError> {
    for file in [SERVICE_PROGRAM, SERVICE_FILE, SERVICE_LINK] {
        if let Some(dir) = Path::new(file).parent() {
            std::fs::create_dir_all(dir).map_err(at("create", dir))?;
        }
    }
    // The initramfs is out of reach by path; the program's own file is not.
    std::fs::copy("/proc/self/exe", SERVICE_PROGRAM).map_err(at("copy this program to", SERVICE_PROGRAM))?;
    std::fs::write(SERVICE_FILE, SERVICE).map_err(at("write", SERVICE_FILE))?;
    symlink(SERVICE_FILE, SERVICE_LINK).map_err(at("link", SERVICE_LINK))?;
    Err(at("become", "/sbin/init")(Command::new("/sbin/init").exec()))
}

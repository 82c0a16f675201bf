//! What the operating system has to offer.

use std::fs;
use std::path::Path;

use kata_config::paths;
use rustix::fs::statfs;

use super::Finding;

/// First kernel with everything that the host's side uses (openat2 5.6, pidfd 5.3, close_range 5.9).
const OLDEST_KERNEL: (u32, u32) = (5, 9);
/// Below this there is no room for images and writable layers.
const LITTLE_SPACE_MIB: u64 = 1024;
/// `OVERLAYFS_SUPER_MAGIC` (statfs(2)).
const OVERLAYFS: i64 = 0x794c_7630;

pub fn findings() -> Vec<Finding> {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let namespaces = fs::read_to_string("/proc/sys/user/max_user_namespaces").ok();
    vec![
        user(rustix::process::geteuid().is_root()),
        kernel(&rustix::system::uname().release().to_string_lossy()),
        cgroups(Path::new("/sys/fs/cgroup")),
        overlay(&filesystems),
        state_dir(&paths::state_dir()),
        user_namespaces(namespaces.as_deref()),
    ]
}

fn user(root: bool) -> Finding {
    match root {
        true => Finding::ok("user", "root"),
        false => Finding::failed(
            "user",
            "not root",
            "run kata-ctl as root: pods need mounts, and users of their own",
        ),
    }
}

fn kernel(release: &str) -> Finding {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match version < OLDEST_KERNEL {
        true => Finding::failed("kernel", release, "use Linux 5.9 or newer"),
        false => Finding::ok("kernel", release),
    }
}

fn cgroups(mount: &Path) -> Finding {
    let controllers = |path: &str| {
        let text = fs::read_to_string(mount.join(path).join("cgroup.controllers")).ok()?;
        let named: Vec<&str> = text.split_whitespace().collect();
        Some(if named.is_empty() { "no controllers".to_owned() } else { named.join(" ") })
    };
    let found = if let Some(controllers) = controllers("") {
        format!("version 2: {controllers}")
    } else if let Some(controllers) = controllers("unified") {
        format!("version 1, with version 2 beside it: {controllers}")
    } else if mount.join("memory").exists() || mount.join("cpu").exists() {
        "version 1".to_owned()
    } else {
        let cost = "the host cannot bound what a pod uses beyond its virtual machine's size";
        return Finding::warning("cgroups", "none", cost, "mount cgroup2 at /sys/fs/cgroup");
    };
    // Containers are bounded in the guest, which has version 2 in any case.
    Finding::ok("cgroups", found)
}

fn overlay(filesystems: &str) -> Finding {
    if filesystems.lines().any(|line| line.trim_end().ends_with("\toverlay")) {
        return Finding::ok("overlayfs", "in the kernel");
    }
    Finding::warning(
        "overlayfs",
        "not loaded",
        "images cannot be run unless the kernel loads the module by itself; --rootfs can",
        "modprobe overlay",
    )
}

fn state_dir(dir: &Path) -> Finding {
    let there = dir.ancestors().find(|dir| dir.exists()).unwrap_or_else(|| Path::new("/"));
    let name = dir.display().to_string();
    match statfs(there) {
        Ok(fs) if fs.f_type == OVERLAYFS => Finding::warning(
            "state",
            format!("{name} is on overlayfs"),
            "writable layers cannot lie on overlayfs, so images cannot be run; --rootfs can",
            "set KATA_STATE_DIR to a directory on another file system",
        ),
        Ok(fs) => {
            let block = u64::try_from(fs.f_bsize).unwrap_or(0);
            let free = fs.f_bavail.saturating_mul(block) >> 20;
            let found = format!("{name}, {free} MiB free");
            match free {
                0..LITTLE_SPACE_MIB => Finding::warning(
                    "state",
                    found,
                    "images and writable layers may not fit, and pods fail with \"no space left on device\"",
                    "make room there, or set KATA_STATE_DIR to a directory on another file system",
                ),
                _ => Finding::ok("state", found),
            }
        }
        Err(error) => Finding::failed(
            "state",
            format!("{name}: {error}"),
            "set KATA_STATE_DIR to a directory that can be used",
        ),
    }
}

fn user_namespaces(limit: Option<&str>) -> Finding {
    match limit.and_then(|text| text.trim().parse::<u64>().ok()) {
        Some(limit) if limit > 0 => Finding::ok("user namespaces", "allowed"),
        _ => Finding::warning(
            "user namespaces",
            "not allowed",
            "the pod's helpers are confined by user ids and system call filters only",
            "set the sysctl user.max_user_namespaces",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn old_kernels_are_refused() {
        assert_eq!(kernel("6.18.0-1-cloud-amd64").verdict, Verdict::Ok);
        assert_eq!(kernel("5.9.0").verdict, Verdict::Ok);
        assert_eq!(kernel("5.8.18").verdict, Verdict::Failed);
        assert_eq!(kernel("4.19.0").verdict, Verdict::Failed);
        assert_eq!(kernel("odd").verdict, Verdict::Failed);
    }

    #[test]
    fn overlayfs_is_looked_for_by_its_whole_name() {
        assert_eq!(overlay("nodev\ttmpfs\nnodev\toverlay\n").verdict, Verdict::Ok);
        assert_eq!(overlay("nodev\tfuse.overlayfs\n").verdict, Verdict::Warning);
    }

    #[test]
    fn cgroup_versions_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(cgroups(dir.path()).verdict, Verdict::Warning);
        fs::create_dir(dir.path().join("memory")).unwrap();
        assert_eq!(cgroups(dir.path()).found, "version 1");
        fs::write(dir.path().join("cgroup.controllers"), "").unwrap();
        assert_eq!(cgroups(dir.path()).found, "version 2: no controllers");
        fs::write(dir.path().join("cgroup.controllers"), "cpu memory\n").unwrap();
        assert_eq!(cgroups(dir.path()).found, "version 2: cpu memory");
    }

    #[test]
    fn a_state_directory_that_is_not_there_yet_is_judged_by_where_it_will_be() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(state_dir(&dir.path().join("a/b")).verdict, Verdict::Ok);
    }
}

//! The Debian that the lab boots: packages of one suite, unpacked by mmdebstrap into a directory of the cache.
//!
//! Its name is a digest of everything that went into the recipe, so a changed recipe is another directory, and two source
//! trees may share one. It is made beside its place and renamed; whoever runs from it holds a lock on it.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use sha2::{Digest, Sha256};

use super::child::tied;
use crate::shell::{self, ChoreError, at};
use crate::unpacked::{self, CACHE};
use crate::{Chores, packages, say};

const SUITE: &str = "trixie";
const PACKAGES: &[&str] = &[
    // The machine's own.
    "linux-image-cloud-amd64",
    "kmod",
    "iproute2",
    "procps",
    "bsdutils",
    "systemd-sysv",
    "dbus",
    // Engines and what they need.
    "containerd",
    "runc",
    "docker.io",
    "containernetworking-plugins",
    "iptables",
    // Pods: what we run them with, and what to compare it with.
    "qemu-system-x86",
    "seabios",
    "virtiofsd",
    "busybox-static",
    // What our binaries are linked with.
    "libcap-ng0",
    "libseccomp2",
    // Disks.
    "e2fsprogs",
    "erofs-utils",
    "cryptsetup-bin",
];
/// Nobody reads them here.
const LEFT_OUT: &[&str] =
    &["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];
/// Modules are unpacked once here instead of at each boot, which takes an emulated processor a second.
const FINISH: &str = r#"find "$1/lib/modules" -name '*.ko.xz' -exec xz -d {} +
for kernel in "$1"/lib/modules/*; do chroot "$1" depmod "${kernel##*/}"; done
rm -f "$1"/boot/initrd.img* && ln -s vmlinuz-"${kernel##*/}" "$1/boot/vmlinuz""#;

/// A Debian that is there, and stays while this value lives.
pub struct Debian {
    /// Its root directory.
    pub root: PathBuf,
    _lock: File,
}

impl Debian {
    /// Its kernel.
    pub fn kernel(&self) -> PathBuf {
        self.root.join("boot/vmlinuz")
    }
}

/// Makes it, unless it is there.
pub fn build(again: bool) -> Chores<Debian> {
    let cache = Path::new(CACHE).join("lab");
    std::fs::create_dir_all(&cache).map_err(at("create", &cache))?;
    let root = cache.join(digest());
    let lock = lock_file(&root)?;
    if again || !root.exists() {
        if lock.try_lock().is_err() {
            say("waiting for those who run a lab from it, or make it");
            lock.lock().map_err(at("lock", &root))?;
        }
        // Somebody else may have made it while we waited.
        if again || !root.exists() {
            make(&root)?;
        }
        remove_others(&cache, &root)?;
        lock.unlock().map_err(at("unlock", &root))?;
    }
    lock.lock_shared().map_err(at("lock", &root))?;
    Ok(Debian { root, _lock: lock })
}

/// Of the recipe; the same wherever it is written down.
fn digest() -> String {
    let recipe = [&[SUITE], PACKAGES, LEFT_OUT, &[FINISH]].concat().join("\n");
    Sha256::digest(recipe).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

fn lock_file(root: &Path) -> Chores<File> {
    let path = root.with_extension("lock");
    File::options().create(true).append(true).open(&path).map_err(at("open", &path))
}

fn make(root: &Path) -> Chores {
    packages::for_lab()?;
    say(&format!("making the lab's Debian ({SUITE}, some minutes, once) in {}", root.display()));
    let begin = Instant::now();
    let work = root.with_extension("new");
    remove(&work)?;
    let mirror = unpacked::mirror(Path::new("/etc/apt"))?;
    // Its own mount and pid namespace: whatever ends xtask ends all of it, mounts included.
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "mmdebstrap", "--quiet"]);
    command.args(["--mode=root", "--format=directory", "--variant=apt"]);
    command.arg(format!("--include={}", PACKAGES.join(",")));
    command.args(LEFT_OUT.iter().map(|pattern| format!("--dpkgopt=path-exclude={pattern}")));
    command.arg(format!("--customize-hook={FINISH}"));
    command.arg(SUITE).arg(&work).arg(mirror);
    // The lab boots without an initramfs of Debian's, and making one takes a while.
    command.env("INITRD", "No").stdin(Stdio::null());
    shell::run(tied(&mut command))?;
    remove(root)?;
    std::fs::rename(&work, root).map_err(at("rename", &work))?;
    say(&format!("made in {:.0} s", begin.elapsed().as_secs_f64()));
    Ok(())
}

fn remove(dir: &Path) -> Chores {
    if dir.exists() { std::fs::remove_dir_all(dir).map_err(at("remove", dir)) } else { Ok(()) }
}

/// Removes what other recipes made, unless somebody runs from it.
fn remove_others(cache: &Path, root: &Path) -> Chores {
    for entry in std::fs::read_dir(cache).map_err(at("list", cache))?.flatten() {
        let path = entry.path();
        let other = path.file_stem() != root.file_stem();
        if !other || path.extension().is_none_or(|extension| extension != "lock") {
            continue;
        }
        match lock_file(&path)?.try_lock() {
            Ok(()) => {
                remove(&path.with_extension("new"))?;
                remove(&path.with_extension(""))?;
                std::fs::remove_file(&path).map_err(at("remove", &path))?;
            }
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(source)) => {
                return Err(ChoreError::File { action: "lock", path, source });
            }
        }
    }
    Ok(())
}

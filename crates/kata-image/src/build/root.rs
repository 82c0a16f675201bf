//! The root of the services image: systemd with what it needs, our programs, and the units that start them.
//!
//! ```text
//!   packages, unpacked ──▶ named files ──▶ the libraries that they name ──▶ root ──▶ disk
//!   our programs, units, settings ───────────────────────────────────────▶
//! ```
//!
//! Only what is named here is taken from the packages, and the libraries that it is linked with: no shell, no package
//! manager, no udev, no D-Bus daemon. A name that a package no longer has is an error, not a guest that does not come up.

use std::collections::BTreeSet;
use std::env::consts::ARCH;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use super::elf::Elf;
use super::modules::{LIST_PATH, Plan};

/// What the root is made of.
pub const PACKAGES: &[&str] = &["systemd", "libkmod2", "ca-certificates"];

/// Programs of the packages. `systemctl`, `journalctl` and `systemd-analyze` are for whoever looks for a reason: the agent,
/// which tells the state of a service that does not answer, and people.
const PROGRAMS: &[&str] = &[
    "usr/bin/journalctl",
    "usr/bin/systemctl",
    "usr/bin/systemd-analyze",
    "usr/lib/systemd/systemd",
    "usr/lib/systemd/systemd-executor",
    "usr/lib/systemd/systemd-journald",
    "usr/lib/systemd/systemd-shutdown",
];

/// Libraries that programs look for when they run: without this one systemd complains at each boot.
const LIBRARIES: &[&str] = &["libkmod.so.2"];

/// systemd's own units: what a service's default dependencies name, the log, and the machine's end.
const UNITS: &[&str] = &[
    "basic.target",
    "final.target",
    "local-fs-pre.target",
    "local-fs.target",
    "network-pre.target",
    "network.target",
    "network-online.target",
    "nss-lookup.target",
    "nss-user-lookup.target",
    "paths.target",
    "poweroff.target",
    "reboot.target",
    "shutdown.target",
    "slices.target",
    "sockets.target",
    "sysinit.target",
    "systemd-journald-dev-log.socket",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-poweroff.service",
    "systemd-reboot.service",
    "time-set.target",
    "time-sync.target",
    "timers.target",
    "umount.target",
];
const UNIT_DIR: &str = "usr/lib/systemd/system";
/// Who starts which of them.
const WANTS: &[(&str, &str)] = &[
    ("sockets.target", "systemd-journald-dev-log.socket"),
    ("sockets.target", "systemd-journald.socket"),
    ("sysinit.target", "systemd-journald.service"),
];

const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("etc/systemd/system", 0o755),
    ("home", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr/bin", 0o755),
    ("usr/lib/guest-services", 0o755),
    ("usr/lib64", 0o755),
    ("var/lib", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];
const LINKS: &[(&str, &str)] = &[
    ("bin", "usr/bin"),
    ("lib", "usr/lib"),
    ("lib64", "usr/lib64"),
    ("sbin", "usr/bin"),
    ("usr/sbin", "bin"),
    ("etc/mtab", "../proc/self/mounts"),
    ("etc/os-release", "../usr/lib/os-release"),
    ("var/run", "../run"),
];
const FILES: &[(&str, &str)] = &[
    ("etc/group", "root:x:0:\ntty:x:5:\nsystemd-journal:x:999:\nnogroup:x:65534:\n"),
    ("etc/hostname", "localhost\n"),
    ("etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
    // Empty: each boot makes one up, and none is a first boot.
    ("etc/machine-id", ""),
    ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/usr/bin/nologin\nnobody:x:65534:65534:nobody:/nonexistent:/usr/bin/nologin\n",
    ),
    ("etc/resolv.conf", ""),
    (
        "usr/lib/os-release",
        "ID=kata-guest\nNAME=\"Kata guest\"\nPRETTY_NAME=\"Kata guest, services image\"\n",
    ),
    // In memory, and little of it: whoever wants to keep it reads it from the host. What is grave goes to the console.
    (
        "usr/lib/systemd/journald.conf.d/50-guest.conf",
        "[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\nReadKMsg=no\nForwardToKMsg=yes\nMaxLevelKMsg=warning\nAudit=no\n",
    ),
    // Nothing is to wait for its default of a minute and a half. Nobody measures what no service limits. Its own log is the
    // kernel's: one line to the journal would start that beside the agent.
    (
        "usr/lib/systemd/system.conf.d/50-guest.conf",
        "[Manager]\nDefaultTimeoutStartSec=30s\nDefaultTimeoutStopSec=5s\nShowStatus=no\nLogTarget=kmsg\nLogLevel=notice\n\
         DefaultMemoryAccounting=no\nDefaultTasksAccounting=no\nCrashAction=reboot\n",
    ),
];
/// Where the certificates of authorities are, one a file, and where programs look for all of them.
const AUTHORITIES: &str = "usr/share/ca-certificates/mozilla";
const AUTHORITIES_BUNDLE: &str = "etc/ssl/certs/ca-certificates.crt";

/// Why the root cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The packages do not have something.
    #[error("the packages {} of this suite have no {wanted}", PACKAGES.join(", "))]
    Missing {
        /// What, with who asks for it.
        wanted: String,
    },
    /// A unit's file is not one.
    #[error("{} is neither a file nor a directory", path.display())]
    Unit {
        /// Its path.
        path: PathBuf,
    },
    /// A file cannot be read or written.
    #[error("cannot access {}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// All that is laid down here about the root, for the image's key.
pub fn recipe() -> String {
    format!("{:?}", (PROGRAMS, LIBRARIES, UNITS, WANTS, DIRECTORIES, LINKS, FILES))
}

/// A root in the making.
#[derive(Debug)]
pub struct Root<'a> {
    dir: &'a Path,
    packages: &'a Path,
    taken: BTreeSet<PathBuf>,
}

impl<'a> Root<'a> {
    /// Lays out the root in `dir`, an empty directory, from the unpacked `packages`.
    pub fn lay_out(dir: &'a Path, packages: &'a Path) -> Result<Self, RootError> {
        let mut root = Self { dir, packages, taken: BTreeSet::new() };
        for (path, mode) in DIRECTORIES {
            root.directory(path)?;
            root.mode(path, *mode)?;
        }
        for (path, target) in LINKS {
            root.link(path, Path::new(target))?;
        }
        for (path, text) in FILES {
            root.file(path, 0o644, text.as_bytes())?;
        }
        for path in PROGRAMS {
            root.take(Path::new(path), "an init system")?;
        }
        for name in LIBRARIES {
            root.library(name, Path::new("an init system"))?;
        }
        for unit in UNITS {
            root.take(&Path::new(UNIT_DIR).join(unit), "an init system")?;
        }
        for (target, unit) in WANTS {
            root.link(&format!("{UNIT_DIR}/{target}.wants/{unit}"), &Path::new("..").join(unit))?;
        }
        root.authorities()?;
        Ok(root)
    }

    /// Adds a program of ours.
    pub fn program(&mut self, name: &str, bytes: &[u8]) -> Result<(), RootError> {
        self.file(&format!("usr/bin/{name}"), 0o755, bytes)
    }

    /// Adds our units: the files of a directory, those of its directories (`x.service.d`) included.
    pub fn units(&mut self, dir: &Path) -> Result<(), RootError> {
        self.copy_units(dir, UNIT_DIR)
    }

    /// Adds the modules that the agent loads when they are first needed; those of the boot are in the initramfs.
    pub fn modules(&mut self, plan: &Plan) -> Result<(), RootError> {
        let later = Plan { boot: Vec::new(), on_demand: plan.on_demand.clone() };
        for module in later.modules() {
            self.file(module.path.trim_start_matches('/'), 0o644, &module.data)?;
        }
        self.file(LIST_PATH.trim_start_matches('/'), 0o644, later.list().as_bytes())
    }

    fn copy_units(&mut self, dir: &Path, to: &str) -> Result<(), RootError> {
        for entry in fs::read_dir(dir).map_err(file(dir))? {
            let path = entry.map_err(file(dir))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let place = format!("{to}/{}", name.ok_or_else(|| RootError::Unit { path: path.clone() })?);
            if path.is_dir() {
                self.copy_units(&path, &place)?;
            } else if path.is_file() {
                self.file(&place, 0o644, &fs::read(&path).map_err(file(&path))?)?;
            } else {
                return Err(RootError::Unit { path });
            }
        }
        Ok(())
    }

    /// Takes a file of the packages, and all that it is linked with. `who` asks for it.
    fn take(&mut self, path: &Path, who: &str) -> Result<(), RootError> {
        if !self.taken.insert(path.to_owned()) {
            return Ok(());
        }
        let from = self.packages.join(path);
        let missing = |_| RootError::Missing { wanted: format!("{}, for {who}", path.display()) };
        let metadata = fs::symlink_metadata(&from).map_err(missing)?;
        if metadata.is_symlink() {
            let target = fs::read_link(&from).map_err(file(&from))?;
            self.link(&path.to_string_lossy(), &target)?;
            return self.take(&beside(path, &target), &path.display().to_string());
        }
        let bytes = fs::read(&from).map_err(file(&from))?;
        self.file(&path.to_string_lossy(), metadata.permissions().mode() & 0o755, &bytes)?;
        let Ok(elf) = Elf::parse(&bytes) else { return Ok(()) };
        if let Some(linker) = elf.interpreter() {
            self.take(&Path::new("usr").join(linker.trim_start_matches('/')), &path.display().to_string())?;
        }
        elf.needed().try_for_each(|name| self.library(name, path))
    }

    fn library(&mut self, name: &str, who: &Path) -> Result<(), RootError> {
        let libraries = PathBuf::from(format!("usr/lib/{ARCH}-linux-gnu"));
        let dirs = [libraries.join("systemd"), libraries.clone()];
        let there = dirs.iter().map(|dir| dir.join(name)).find(|path| self.packages.join(path).exists());
        self.take(&there.unwrap_or_else(|| libraries.join(name)), &who.display().to_string())
    }

    fn authorities(&mut self) -> Result<(), RootError> {
        let dir = self.packages.join(AUTHORITIES);
        let missing = |_| RootError::Missing { wanted: format!("{AUTHORITIES}, for those who pull images") };
        let entries = fs::read_dir(&dir).map_err(missing)?;
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
        let mut bundle = Vec::new();
        for path in &files {
            bundle.extend(fs::read(path).map_err(file(path))?);
        }
        self.file(AUTHORITIES_BUNDLE, 0o644, &bundle)
    }

    fn directory(&self, path: &str) -> Result<(), RootError> {
        let mut at = self.dir.to_owned();
        for part in Path::new(path) {
            at.push(part);
            if !at.is_dir() {
                fs::create_dir(&at).map_err(file(&at))?;
                self.mode(at.strip_prefix(self.dir).unwrap_or(&at), 0o755)?;
            }
        }
        Ok(())
    }

    fn above(&self, path: &str) -> Result<(), RootError> {
        self.directory(path.rsplit_once('/').map_or("", |(parent, _)| parent))
    }

    fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) -> Result<(), RootError> {
        self.above(path)?;
        let place = self.dir.join(path);
        fs::write(&place, bytes).map_err(file(&place))?;
        self.mode(path, mode)
    }

    fn link(&mut self, path: &str, target: &Path) -> Result<(), RootError> {
        self.above(path)?;
        let place = self.dir.join(path);
        symlink(target, &place).map_err(file(&place))
    }

    /// Whatever the umask.
    fn mode(&self, path: impl AsRef<Path>, mode: u32) -> Result<(), RootError> {
        let place = self.dir.join(path);
        fs::set_permissions(&place, Permissions::from_mode(mode)).map_err(file(&place))
    }
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> RootError {
    let path = path.to_path_buf();
    move |source| RootError::File { path, source }
}

/// What a link at `path` leads to, within the same root.
fn beside(path: &Path, target: &Path) -> PathBuf {
    let mut at = if target.is_absolute() {
        PathBuf::new()
    } else {
        path.parent().map(Path::to_owned).unwrap_or_default()
    };
    for part in target.components() {
        match part {
            std::path::Component::ParentDir => {
                at.pop();
            }
            std::path::Component::Normal(name) => at.push(name),
            _ => {}
        }
    }
    at
}

#[cfg(test)]
mod tests;

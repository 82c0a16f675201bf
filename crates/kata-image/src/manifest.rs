//! The image manifest: which kernel and which root file system a virtual machine boots, and what the guest can do.
//!
//! A guest image is a directory with a `manifest.json` and the files that it names. Paths are relative to that directory
//! and never leave it, so an image can be moved or packed as a whole. Digests are checked by [`Manifest::verify`] (after
//! an installation, in a check), not at each start: reading 40 MB would cost a noticeable part of a boot.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The name of the manifest in an image directory.
pub const FILE_NAME: &str = "manifest.json";

/// The manifest version that this crate writes and reads.
pub const VERSION: u32 = 1;

/// A guest image as its manifest describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`VERSION`]; any other is refused before the rest is looked at.
    pub version: u32,
    /// The guest kernel.
    pub kernel: Kernel,
    /// The initial RAM file system; absent for an image that boots from a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<Initrd>,
    /// A root disk; absent for an image that lives in its initrd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<DiskImage>,
    /// The agent in the guest.
    pub agent: Agent,
    /// What guests of this image can do, see [`capability`]. Names that this version does not know are kept.
    #[serde(default)]
    pub capabilities: BTreeSet<String>,
    /// Kernel modules that the agent loads at boot, in load order (module names, not files).
    #[serde(default)]
    pub modules: Vec<String>,
    /// The key over everything that went into the build; absent in a manifest written by hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input_key: Option<String>,
    #[serde(skip)]
    dir: PathBuf,
}

/// Capability names that this project asks for.
pub mod capability {
    /// The guest mounts virtio-fs.
    pub const VIRTIO_FS: &str = "virtio-fs";
    /// The guest has a virtio vsock device driver: without it there is no way to the agent.
    pub const VSOCK: &str = "vsock";
    /// The guest kernel filters system calls.
    pub const SECCOMP: &str = "seccomp";
    /// The guest kernel has the unified cgroup hierarchy.
    pub const CGROUP_V2: &str = "cgroup-v2";
    /// The guest mounts overlayfs.
    pub const OVERLAY: &str = "overlay";
    /// The guest mounts erofs.
    pub const EROFS: &str = "erofs";
    /// The guest mounts ext4.
    pub const EXT4: &str = "ext4";
    /// The guest has a virtio block driver.
    pub const VIRTIO_BLK: &str = "virtio-blk";
    /// The guest has a virtio network driver.
    pub const VIRTIO_NET: &str = "virtio-net";
    /// The guest finds virtio devices on a memory-mapped bus, as QEMU's `microvm` has them.
    pub const VIRTIO_MMIO: &str = "virtio-mmio";
    /// The guest finds virtio devices on PCI.
    pub const VIRTIO_PCI: &str = "virtio-pci";
    /// The guest has dm-verity.
    pub const DM_VERITY: &str = "dm-verity";
    /// The guest kernel starts hot-plugged processors.
    pub const CPU_HOTPLUG: &str = "cpu-hotplug";
    /// The guest kernel takes hot-plugged memory.
    pub const MEMORY_HOTPLUG: &str = "memory-hotplug";
    /// The guest reads initdata before its agent starts.
    pub const INITDATA: &str = "initdata";
}

/// The kernel of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Path in the image directory.
    pub path: PathBuf,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// The release as `uname -r` tells it in the guest; empty when unknown (a user's own kernel).
    #[serde(default)]
    pub release: String,
    /// Where it is from: `debian`, `source` or `file`, and then what exactly, as in `debian linux-image-… 6.1.…`.
    #[serde(default)]
    pub provider: String,
}

/// The initial RAM file system of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Initrd {
    /// Path in the image directory.
    pub path: PathBuf,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// How it is packed.
    #[serde(default)]
    pub compression: Compression,
}

/// The root disk of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskImage {
    /// Path in the image directory.
    pub path: PathBuf,
    /// SHA-256 of the file, 64 lower-case hexadecimal digits.
    pub sha256: String,
    /// The file system on it, for `rootfstype=`.
    pub fstype: String,
}

/// A file of an image.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// What it is, the key's prefix in the manifest: `kernel`, `initrd`, `image`.
    pub name: &'static str,
    /// Path in the image directory.
    pub path: &'a Path,
    /// SHA-256 as the manifest has it.
    pub sha256: &'a str,
}

/// How an initrd is packed. The kernel finds out by itself; this is for people and for tools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// A bare cpio archive: the fastest to boot.
    #[default]
    None,
    /// gzip (a user's own initrd).
    Gzip,
    /// LZ4 (a user's own initrd).
    Lz4,
    /// xz (a user's own initrd).
    Xz,
    /// Zstandard (a user's own initrd).
    Zstd,
    /// Not known (a user's own initrd).
    Unknown,
}

/// The agent of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agent {
    /// Its version; empty when unknown.
    #[serde(default)]
    pub version: String,
    /// Whether it dials the host when it serves. False is also the answer for an agent of which that is unknown:
    /// the host then dials the agent, within a bound.
    #[serde(default)]
    pub announces: bool,
}

/// Why an image cannot be used as its manifest says.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// The manifest or a file that it names could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The manifest could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The manifest is not valid JSON or not of the right shape.
    #[error("{} is not an image manifest", path.display())]
    Parse {
        /// The manifest.
        path: PathBuf,
        /// What is wrong and where.
        #[source]
        source: serde_json::Error,
    },
    /// The manifest is of a version that this program does not read.
    #[error("{} has version {found}, this program reads version {VERSION}: build the image anew, or use the release that made it", path.display())]
    Version {
        /// The manifest.
        path: PathBuf,
        /// Its version.
        found: u64,
    },
    /// A value breaks a rule of the format.
    #[error("{}: {key}: {reason}", path.display())]
    Invalid {
        /// The manifest.
        path: PathBuf,
        /// The key, as in `kernel.path`.
        key: &'static str,
        /// The rule.
        reason: String,
    },
    /// A file is not the one that the image was made with.
    #[error("{} has SHA-256 {found}, but its manifest says {wanted}: the file was changed after the image was built", path.display())]
    Digest {
        /// The file.
        path: PathBuf,
        /// What the manifest says.
        wanted: String,
        /// What it is.
        found: String,
    },
}

/// Only the version, read first: a newer manifest may have any shape.
#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

impl Manifest {
    /// A manifest of version [`VERSION`] for `kernel` and `agent`, without a root file system yet.
    pub fn new(kernel: Kernel, agent: Agent) -> Self {
        Self {
            version: VERSION,
            kernel,
            initrd: None,
            image: None,
            agent,
            capabilities: BTreeSet::new(),
            modules: Vec::new(),
            input_key: None,
            dir: PathBuf::new(),
        }
    }

    /// Reads the manifest of the image in `dir` and checks everything except digests: version, shape, and that each
    /// path names an existing file in `dir`, symbolic links followed.
    pub fn load(dir: &Path) -> Result<Self, ManifestError> {
        let path = dir.join(FILE_NAME);
        let text =
            std::fs::read(&path).map_err(|source| ManifestError::Read { path: path.clone(), source })?;
        let parse = |source| ManifestError::Parse { path: path.clone(), source };
        let Versioned { version } = serde_json::from_slice(&text).map_err(parse)?;
        if version != u64::from(VERSION) {
            return Err(ManifestError::Version { path, found: version });
        }
        let mut manifest: Self = serde_json::from_slice(&text).map_err(parse)?;
        manifest.dir = dir.to_path_buf();
        manifest.check()?;
        Ok(manifest)
    }

    /// Writes the manifest into `dir`.
    pub fn store(&self, dir: &Path) -> Result<(), ManifestError> {
        let path = dir.join(FILE_NAME);
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|source| ManifestError::Parse { path: path.clone(), source })?;
        text.push(b'\n');
        std::fs::write(&path, text).map_err(|source| ManifestError::Write { path, source })
    }

    /// The directory that the manifest was loaded from.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the kernel is.
    pub fn kernel_path(&self) -> PathBuf {
        self.dir.join(&self.kernel.path)
    }

    /// Where the initrd is, if the image has one.
    pub fn initrd_path(&self) -> Option<PathBuf> {
        self.initrd.as_ref().map(|initrd| self.dir.join(&initrd.path))
    }

    /// Where the root disk is, if the image has one.
    pub fn image_path(&self) -> Option<PathBuf> {
        self.image.as_ref().map(|image| self.dir.join(&image.path))
    }

    /// Whether guests of this image have the named capability.
    pub fn has(&self, capability: &str) -> bool {
        self.capabilities.contains(capability)
    }

    /// Reads every file of the image and compares its digest with the manifest.
    pub fn verify(&self) -> Result<(), ManifestError> {
        self.parts().try_for_each(|part| self.verify_part(&part))
    }

    /// The same with one file.
    pub fn verify_part(&self, part: &Part<'_>) -> Result<(), ManifestError> {
        let path = self.dir.join(part.path);
        let found = sha256_of(&path).map_err(|source| ManifestError::Read { path: path.clone(), source })?;
        if found == part.sha256 {
            Ok(())
        } else {
            Err(ManifestError::Digest { path, wanted: part.sha256.to_owned(), found })
        }
    }

    /// The files.
    pub fn parts(&self) -> impl Iterator<Item = Part<'_>> {
        let kernel = Some(Part { name: "kernel", path: &self.kernel.path, sha256: &self.kernel.sha256 });
        let initrd = self.initrd.as_ref().map(|f| Part { name: "initrd", path: &f.path, sha256: &f.sha256 });
        let image = self.image.as_ref().map(|f| Part { name: "image", path: &f.path, sha256: &f.sha256 });
        [kernel, initrd, image].into_iter().flatten()
    }

    fn check(&self) -> Result<(), ManifestError> {
        let invalid = |key, reason| ManifestError::Invalid { path: self.dir.join(FILE_NAME), key, reason };
        if self.initrd.is_none() && self.image.is_none() {
            return Err(invalid(
                "initrd",
                "neither an initrd nor an image: the guest would have no root".to_owned(),
            ));
        }
        let canonical = |path: &Path| {
            path.canonicalize().map_err(|source| ManifestError::Read { path: path.to_path_buf(), source })
        };
        let root = canonical(&self.dir)?;
        for Part { name: key, path: file, sha256: digest } in self.parts() {
            if file.as_os_str().is_empty() || !file.components().all(|c| matches!(c, Component::Normal(_))) {
                let reason = format!("path {file:?} is not one of a file below the image directory");
                return Err(invalid(key, reason));
            }
            if digest.len() != 64 || !digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
                return Err(invalid(
                    key,
                    format!("sha256 {digest:?} is not 64 lower-case hexadecimal digits"),
                ));
            }
            let target = canonical(&self.dir.join(file))?;
            if !target.starts_with(&root) || !target.is_file() {
                let reason = format!("path {file:?} leads to {target:?}, not a file in the image directory");
                return Err(invalid(key, reason));
            }
        }
        Ok(())
    }
}

/// SHA-256 of a file as 64 lower-case hexadecimal digits.
pub fn sha256_of(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(buffer.get(..n).unwrap_or_default()),
        }
    }
}

/// Bytes as lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String never fails.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;

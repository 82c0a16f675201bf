//! What decides what a guest is once its agent serves.

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kata_config::{Artefacts, Config, SharedFs};
use kata_hypervisor::{Growth, Size};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::TemplateError;
use crate::boot::Guest;
use crate::resources;

/// The first processor of `/proc/cpuinfo` is in so many bytes.
const FIRST_CPU: u64 = 8 << 10;

/// A file, as it was: it is taken for the same as long as all of this is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileId {
    /// Where, without links.
    pub path: PathBuf,
    /// Number of its file system.
    pub device: u64,
    /// Its number there.
    pub inode: u64,
    /// In bytes.
    pub size: u64,
    /// When its content was changed: nanoseconds since the epoch.
    pub modified_ns: i128,
}

/// All that decides what a guest is when its agent serves. Two machines with the same are the same, but for random numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ingredients {
    /// Version of the runtime.
    pub version: String,
    /// The machine monitor.
    pub monitor: FileId,
    /// The guest's kernel.
    pub kernel: FileId,
    /// Its initial RAM disk.
    pub initrd: Option<FileId>,
    /// Its root disk.
    pub image: Option<FileId>,
    /// Disks that its guest finds by itself.
    #[serde(default)]
    pub disks: Vec<FileId>,
    /// The kernel's command line.
    pub command_line: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Most of them.
    pub most_vcpus: u32,
    /// Memory.
    pub memory_mib: u64,
    /// Most of it.
    pub most_memory_mib: u64,
    /// What the guest frees is given back.
    pub reporting: bool,
    /// Files are shared with it.
    pub shared_fs: bool,
    /// Vendor, family, model, stepping, microcode and features of the host's processor.
    pub processor: String,
    /// Release of the host's kernel.
    pub host_kernel: String,
}

impl Ingredients {
    pub(crate) fn of(
        config: &Config,
        artefacts: &Artefacts,
        guest: &Guest,
        size: Size,
        growth: Growth,
    ) -> Result<Self, TemplateError> {
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            monitor: FileId::of(&artefacts.vmm)?,
            kernel: FileId::of(&guest.kernel)?,
            initrd: guest.initrd.as_deref().map(FileId::of).transpose()?,
            image: guest.image.as_deref().map(FileId::of).transpose()?,
            disks: guest.disks.iter().map(|disk| FileId::of(&disk.path)).collect::<Result<_, _>>()?,
            command_line: guest.kernel_params(config).join(" "),
            vcpus: size.vcpus,
            most_vcpus: growth.vcpus,
            memory_mib: size.memory_mib,
            most_memory_mib: growth.memory_mib,
            reporting: resources::backing(config).reporting,
            shared_fs: config.hypervisor.qemu.shared_fs != SharedFs::None,
            processor: processor(),
            host_kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        })
    }

    /// The name of the template that is made of these: 64 hexadecimal digits.
    pub(crate) fn digest(&self) -> String {
        // Serialising these types to memory never fails; nothing else would have this digest.
        let text = serde_json::to_vec(self).unwrap_or_default();
        kata_image::manifest::hex(&Sha256::digest(text))
    }

    /// What is different between the two, in words.
    pub(crate) fn differences(&self, other: &Self) -> Vec<&'static str> {
        let all = [
            ("version", self.version == other.version),
            ("monitor", self.monitor == other.monitor),
            ("kernel", self.kernel == other.kernel),
            ("initrd", self.initrd == other.initrd),
            ("image", self.image == other.image),
            ("disks", self.disks == other.disks),
            ("command line", self.command_line == other.command_line),
            ("number of processors", (self.vcpus, self.most_vcpus) == (other.vcpus, other.most_vcpus)),
            (
                "size of memory",
                (self.memory_mib, self.most_memory_mib) == (other.memory_mib, other.most_memory_mib),
            ),
            ("reclaim_guest_freed_memory", self.reporting == other.reporting),
            ("shared_fs", self.shared_fs == other.shared_fs),
            ("processor", self.processor == other.processor),
            ("host kernel", self.host_kernel == other.host_kernel),
        ];
        all.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }

    /// Whether no machine can be made of these any more, whatever the configuration says: a file has changed, or the host.
    pub(crate) fn are_gone(&self, now: &Self) -> bool {
        let files = [Some(&self.monitor), Some(&self.kernel), self.initrd.as_ref(), self.image.as_ref()];
        files
            .into_iter()
            .flatten()
            .chain(&self.disks)
            .any(|file| FileId::of(&file.path).ok().as_ref() != Some(file))
            || self.version != now.version
            || self.processor != now.processor
            || self.host_kernel != now.host_kernel
    }
}

impl FileId {
    fn of(path: &Path) -> Result<Self, TemplateError> {
        let look = || {
            let path = std::fs::canonicalize(path)?;
            let found = std::fs::metadata(&path)?;
            Ok(Self {
                path,
                device: found.dev(),
                inode: found.ino(),
                size: found.size(),
                modified_ns: i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec()),
            })
        };
        look().map_err(|source| TemplateError::File { action: "look at", path: path.to_owned(), source })
    }
}

/// What the host's processor is. Its features are what guests see of them as well.
fn processor() -> String {
    let mut text = String::new();
    let read =
        std::fs::File::open("/proc/cpuinfo").and_then(|file| file.take(FIRST_CPU).read_to_string(&mut text));
    if let Err(error) = read {
        tracing::warn!(%error, "/proc/cpuinfo cannot be read: templates are told apart without it");
    }
    const KEYS: [&str; 6] = ["vendor_id", "cpu family", "model", "stepping", "microcode", "flags"];
    let values = text.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.split_once(':'));
    let known = values.filter(|(key, _)| KEYS.contains(&key.trim()));
    known.map(|(_, value)| value.trim()).collect::<Vec<_>>().join("/")
}

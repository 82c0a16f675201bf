//! What a kernel was configured with, and what that lets its guests do.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};

use super::super::modules::Plan;
use super::positions;
use crate::manifest::capability as cap;

/// What a capability needs: an option, and the module that it makes if it is not built in.
const CAPABILITIES: &[(&str, &str, &str)] = &[
    (cap::VIRTIO_FS, "CONFIG_VIRTIO_FS", "virtiofs"),
    (cap::VSOCK, "CONFIG_VIRTIO_VSOCKETS", "vmw_vsock_virtio_transport"),
    (cap::VIRTIO_PCI, "CONFIG_VIRTIO_PCI", "virtio_pci"),
    (cap::VIRTIO_MMIO, "CONFIG_VIRTIO_MMIO", "virtio_mmio"),
    (cap::VIRTIO_BLK, "CONFIG_VIRTIO_BLK", "virtio_blk"),
    (cap::VIRTIO_NET, "CONFIG_VIRTIO_NET", "virtio_net"),
    (cap::OVERLAY, "CONFIG_OVERLAY_FS", "overlay"),
    (cap::EROFS, "CONFIG_EROFS_FS", "erofs"),
    (cap::EXT4, "CONFIG_EXT4_FS", "ext4"),
    (cap::DM_VERITY, "CONFIG_DM_VERITY", "dm_verity"),
    (cap::SECCOMP, "CONFIG_SECCOMP_FILTER", ""),
    (cap::CGROUP_V2, "CONFIG_CGROUP_BPF", ""),
    (cap::CPU_HOTPLUG, "CONFIG_ACPI_HOTPLUG_CPU", ""),
    (cap::MEMORY_HOTPLUG, "CONFIG_ACPI_HOTPLUG_MEMORY", ""),
];

/// What is around the configuration that a kernel with `CONFIG_IKCONFIG` carries, gzip in between.
const EMBEDDED_START: &[u8] = b"IKCFG_ST";

/// Why a kernel's configuration cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The configuration in the kernel does not unpack.
    #[error("the configuration embedded in the kernel does not unpack")]
    Embedded {
        /// What the decompressor says.
        #[source]
        source: io::Error,
    },
}

/// The options of a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelConfig {
    options: BTreeMap<String, String>,
}

impl KernelConfig {
    /// Reads the text of a `.config`, or of a fragment of one.
    pub fn parse(text: &str) -> Self {
        let pair = |line: &str| {
            let (key, value) = line.trim().split_once('=')?;
            key.starts_with("CONFIG_").then(|| (key.to_owned(), value.to_owned()))
        };
        Self { options: text.lines().filter_map(pair).collect() }
    }

    /// Reads the configuration that is embedded in a kernel, if one is.
    pub fn embedded(vmlinux: &[u8]) -> Result<Option<Self>, ConfigError> {
        let mut places =
            positions(vmlinux, EMBEDDED_START).filter_map(|at| vmlinux.get(at + EMBEDDED_START.len()..));
        let Some(packed) = places.find(|bytes| bytes.starts_with(&[0x1f, 0x8b])) else {
            return Ok(None);
        };
        let mut text = String::new();
        let mut reader = flate2::read::GzDecoder::new(packed).take(4 << 20);
        reader.read_to_string(&mut text).map_err(|source| ConfigError::Embedded { source })?;
        Ok(Some(Self::parse(&text)))
    }

    /// The lines of `wanted` that are not so in this configuration, each with what is so instead.
    pub fn lost(&self, wanted: &Self) -> Vec<String> {
        let lost = |(key, value): (&String, &String)| {
            let found = self.options.get(key).map_or("n", String::as_str);
            (found != value).then(|| format!("{key}={value} is {found}"))
        };
        wanted.options.iter().filter_map(lost).collect()
    }

    /// What guests of this kernel can do, given the modules in their image.
    pub fn capabilities(&self, plan: &Plan) -> BTreeSet<String> {
        let has = |option: &str, module: &str| match self.options.get(option).map(String::as_str) {
            Some("y") => true,
            Some("m") => plan.provides(module),
            _ => false,
        };
        let names = CAPABILITIES.iter().filter(|(_, option, module)| has(option, module));
        names.map(|(name, ..)| (*name).to_owned()).collect()
    }
}

#[cfg(test)]
mod tests;

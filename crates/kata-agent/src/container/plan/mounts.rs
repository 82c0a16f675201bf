//! Mounts and device nodes of a spec.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Mount};
use rustix::mount::{MountAttrFlags, MountFlags};
use serde::{Deserialize, Serialize};

use crate::container::EngineError;
use crate::mount::options::{self, MountOptions};

/// One mount. Attribute fields are `MOUNT_ATTR_*` bits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct MountPlan {
    /// Where in the container.
    pub destination: PathBuf,
    /// What.
    pub source: MountSource,
    /// Attributes of this mount.
    pub set: u32,
    /// Attributes of this mount and all below it.
    pub tree_set: u32,
    /// Attributes to take from this mount and all below it.
    pub tree_clear: u32,
    /// `MS_*` propagation, `MS_REC` included.
    pub propagation: Option<u32>,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) enum MountSource {
    /// A file or directory of the guest.
    Bind { path: PathBuf, recursive: bool },
    /// A filesystem with its parameters (`key=value` or `key`).
    Filesystem { kind: String, source: String, parameters: Vec<String> },
    /// The container's view of its cgroup.
    Cgroup,
}

/// A device node to make.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) struct DevicePlan {
    /// Where in the container.
    pub path: PathBuf,
    /// Kind of node.
    pub kind: DeviceKind,
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Kind of a device node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::container) enum DeviceKind {
    Char,
    Block,
    Fifo,
}

pub(super) fn mounts(list: &[Mount]) -> Result<Vec<MountPlan>, EngineError> {
    list.iter().map(mount).collect()
}

fn mount(mount: &Mount) -> Result<MountPlan, EngineError> {
    let key = format!("mounts[{:?}]", mount.destination().display().to_string());
    let invalid = |reason: &str| EngineError::invalid(key.clone(), reason);
    if [mount.uid_mappings(), mount.gid_mappings()]
        .iter()
        .any(|map| map.as_ref().is_some_and(|map| !map.is_empty()))
    {
        return Err(EngineError::unsupported(key, "mounts are not id-mapped"));
    }
    let destination = mount.destination();
    if destination.components().all(|part| !matches!(part, std::path::Component::Normal(_))) {
        return Err(invalid("the destination is the container's root"));
    }
    if has_nul(destination) || mount.source().as_deref().is_some_and(has_nul) {
        return Err(invalid("a path contains a NUL byte"));
    }
    let parsed = options::parse(mount.options().as_deref().unwrap_or_default());
    if parsed.copy_up {
        return Err(EngineError::unsupported(key, "tmpcopyup"));
    }
    if parsed.data.contains('\0') {
        return Err(invalid("an option contains a NUL byte"));
    }
    let kind = mount.typ().as_deref().unwrap_or_default();
    let source = if parsed.bind || kind == "bind" || kind == "rbind" {
        bind_source(mount, kind, &parsed, &key)?
    } else {
        filesystem(mount, kind, &parsed, &key)?
    };
    Ok(MountPlan {
        destination: destination.clone(),
        source,
        set: attributes(parsed.flags).bits(),
        tree_set: parsed.recursive_set.bits(),
        tree_clear: parsed.recursive_clear.bits(),
        propagation: parsed.propagation.map(|flags| flags.bits()),
    })
}

fn has_nul(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().contains(&0)
}

fn bind_source(
    mount: &Mount,
    kind: &str,
    parsed: &MountOptions,
    key: &str,
) -> Result<MountSource, EngineError> {
    let path = mount.source().as_ref().filter(|path| path.is_absolute());
    let path =
        path.ok_or_else(|| EngineError::invalid(key, "the source of a bind mount is not an absolute path"))?;
    if !parsed.data.is_empty() {
        return Err(EngineError::unsupported(key, format!("option {:?} of a bind mount", parsed.data)));
    }
    Ok(MountSource::Bind { path: path.clone(), recursive: parsed.recursive || kind == "rbind" })
}

fn filesystem(
    mount: &Mount,
    kind: &str,
    parsed: &MountOptions,
    key: &str,
) -> Result<MountSource, EngineError> {
    if kind.is_empty() || kind.contains('\0') {
        return Err(EngineError::invalid(key, "neither a filesystem type nor a bind mount"));
    }
    if kind == "cgroup" || kind == "cgroup2" {
        return Ok(MountSource::Cgroup);
    }
    let mut parameters: Vec<String> =
        parsed.data.split(',').filter(|word| !word.is_empty()).map(str::to_owned).collect();
    let superblock = [
        (MountFlags::SYNCHRONOUS, "sync"),
        (MountFlags::DIRSYNC, "dirsync"),
        (MountFlags::LAZYTIME, "lazytime"),
        (MountFlags::PERMIT_MANDATORY_FILE_LOCKING, "mand"),
    ];
    let asked = superblock.into_iter().filter(|(flag, _)| parsed.flags.contains(*flag));
    parameters.extend(asked.map(|(_, word)| word.to_owned()));
    // Kernel filesystems share one superblock among mounts, which one of them must not make read-only for all.
    let shared =
        matches!(kind, "proc" | "sysfs" | "mqueue" | "devpts" | "tmpfs" | "devtmpfs" | "securityfs" | "bpf");
    if parsed.flags.contains(MountFlags::RDONLY) && !shared {
        parameters.push("ro".to_owned());
    }
    let source =
        mount.source().as_ref().map_or_else(|| kind.to_owned(), |source| source.display().to_string());
    Ok(MountSource::Filesystem { kind: kind.to_owned(), source, parameters })
}

fn attributes(flags: MountFlags) -> MountAttrFlags {
    let table = [
        (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
        (MountFlags::STRICTATIME, MountAttrFlags::MOUNT_ATTR_STRICTATIME),
        (MountFlags::NODIRATIME, MountAttrFlags::MOUNT_ATTR_NODIRATIME),
        (MountFlags::NOSYMFOLLOW, MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW),
    ];
    let set = table.into_iter().filter(|(flag, _)| flags.contains(*flag));
    set.fold(MountAttrFlags::empty(), |all, (_, attribute)| all | attribute)
}

pub(super) fn devices(list: &[LinuxDevice]) -> Result<Vec<DevicePlan>, EngineError> {
    list.iter().map(device).collect()
}

fn device(device: &LinuxDevice) -> Result<DevicePlan, EngineError> {
    let path = device.path();
    let key = format!("linux.devices[{:?}]", path.display().to_string());
    if path.file_name().is_none() || has_nul(path) {
        return Err(EngineError::invalid(key, "the path names no file"));
    }
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => DeviceKind::Char,
        LinuxDeviceType::B => DeviceKind::Block,
        LinuxDeviceType::P => DeviceKind::Fifo,
        LinuxDeviceType::A => return Err(EngineError::invalid(key, "type \"a\" is not a kind of node")),
    };
    let number = |value: i64, name: &str| {
        u32::try_from(value)
            .map_err(|_| EngineError::invalid(key.clone(), format!("{name} {value} is out of range")))
    };
    let (major, minor) = match kind {
        DeviceKind::Fifo => (0, 0),
        DeviceKind::Char | DeviceKind::Block => {
            (number(device.major(), "major")?, number(device.minor(), "minor")?)
        }
    };
    Ok(DevicePlan {
        path: path.clone(),
        kind,
        major,
        minor,
        mode: device.file_mode().unwrap_or(0o666) & 0o7777,
        uid: device.uid().unwrap_or(0),
        gid: device.gid().unwrap_or(0),
    })
}

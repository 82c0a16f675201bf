//! What a VMM is given as open descriptors, and its way to `/dev/kvm` and its like.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;
use tokio::net::UnixStream;

use crate::process::Identity;
use crate::vm::{HypervisorError, VmSpec};

/// The files that the guest boots from.
#[derive(Debug)]
pub(crate) struct BootFiles {
    pub kernel: OwnedFd,
    pub initrd: Option<OwnedFd>,
    pub firmware: Option<OwnedFd>,
    pub image: Option<OwnedFd>,
    /// The disks of the start, by their names.
    pub disks: Vec<(String, OwnedFd)>,
}

impl BootFiles {
    /// Opens them for a VMM that runs as `identity`, see [`open_for`].
    pub(crate) fn open(spec: &VmSpec, identity: &Identity) -> Result<Self, HypervisorError> {
        let open = |path: &Option<PathBuf>, what| {
            path.as_ref().map(|path| open_for(identity, path, what)).transpose()
        };
        Ok(Self {
            kernel: open_for(identity, &spec.kernel, "guest kernel")?,
            initrd: open(&spec.initrd, "initrd")?,
            firmware: open(&spec.firmware, "firmware")?,
            image: open(&spec.image, "image")?,
            disks: spec
                .disks
                .iter()
                .map(|disk| Ok((disk.id.clone(), open_for(identity, &disk.path, "disk")?)))
                .collect::<Result<_, HypervisorError>>()?,
        })
    }
}

/// Opens `path` for a process that runs as `identity`. That process opens it anew through `/proc/self/fd`, which asks for the
/// file's own permission bits and for no directory's; a file it may not read is copied into memory.
pub(crate) fn open_for(
    identity: &Identity,
    path: &Path,
    what: &'static str,
) -> Result<OwnedFd, HypervisorError> {
    let fault = |source| HypervisorError::File { what, path: path.to_owned(), source };
    let file = File::open(path).map_err(fault)?;
    let metadata = file.metadata().map_err(fault)?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        return Err(fault(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    if allows(identity, &metadata, 0o4) || kind.is_block_device() {
        return Ok(file.into());
    }
    in_memory(file).map_err(fault)
}

/// A disk of the host, open as it is to be used: the VMM duplicates the descriptor, so nobody's permission is asked for again.
#[derive(Debug)]
pub(crate) struct DiskFile {
    pub fd: OwnedFd,
    /// A block device, as opposed to a regular file.
    pub is_device: bool,
}

impl DiskFile {
    /// Opens the disk for reading alone, or for writing as well.
    pub(crate) fn open(path: &Path, readonly: bool) -> Result<Self, HypervisorError> {
        let fault = |source| HypervisorError::File { what: "disk", path: path.to_owned(), source };
        // Looked at first: opening a pipe would wait for its other end.
        let kind = fs::metadata(path).map_err(fault)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let reason = "it is neither a block device nor a regular file";
            return Err(fault(io::Error::new(io::ErrorKind::InvalidInput, reason)));
        }
        let file = File::options().read(true).write(!readonly).open(path).map_err(fault)?;
        Ok(Self { fd: file.into(), is_device: kind.is_block_device() })
    }
}

/// A connection of ours and the other end of it, for the VMM of `spec`.
pub(crate) fn socket_pair(spec: &VmSpec) -> Result<(UnixStream, OwnedFd), HypervisorError> {
    let pair = || {
        let (ours, theirs) = StdUnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs.into()))
    };
    pair().map_err(|source| HypervisorError::File {
        what: "socket pair of",
        path: spec.run_dir.clone(),
        source,
    })
}

fn in_memory(mut file: File) -> io::Result<OwnedFd> {
    let mut copy = File::from(rustix::fs::memfd_create("copy", MemfdFlags::CLOEXEC)?);
    io::copy(&mut file, &mut copy)?;
    rustix::fs::fchmod(&copy, rustix::fs::Mode::from_raw_mode(0o444))?;
    // For reading alone, as the file was opened: QEMU takes no other descriptor for a disk that is not written.
    Ok(File::open(format!("/proc/self/fd/{}", copy.as_raw_fd()))?.into())
}

/// Whether the permission bits grant `identity` all of `wanted` (`4` read, `2` write).
pub(crate) fn allows(identity: &Identity, metadata: &fs::Metadata, wanted: u32) -> bool {
    let mode = metadata.mode();
    let granted = if identity.uid == metadata.uid() {
        mode >> 6
    } else if identity.gid == metadata.gid() || identity.groups.contains(&metadata.gid()) {
        mode >> 3
    } else {
        mode
    };
    identity.uid == 0 || granted & wanted == wanted
}

/// `identity` with the group that owns `device` (`/dev/kvm`, `/dev/sev`), where that is what lets it use it.
pub(crate) fn with_device(identity: &Identity, device: &Path) -> Result<Identity, HypervisorError> {
    let denied =
        |reason| HypervisorError::DeviceDenied { device: device.to_owned(), uid: identity.uid, reason };
    let metadata = fs::metadata(device).map_err(|error| denied(format!("{}: {error}", device.display())))?;
    let mut member = identity.clone();
    if allows(&member, &metadata, 0o6) {
        return Ok(member);
    }
    // The group root opens far more than this device.
    if metadata.gid() != 0 {
        member.groups.push(metadata.gid());
        if allows(&member, &metadata, 0o6) {
            return Ok(member);
        }
    }
    Err(denied(format!(
        "it belongs to user {} and group {} with mode {:04o}; give it a group of its own (chgrp kvm {device}; chmod 0660 {device})",
        metadata.uid(),
        metadata.gid(),
        metadata.mode() & 0o7777,
        device = device.display()
    )))
}

#[cfg(test)]
mod tests;

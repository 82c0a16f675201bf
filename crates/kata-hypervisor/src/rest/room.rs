//! The one directory that a VMM may write to. It is for what a VMM insists on making or finding by name.
//!
//! ```text
//!   <run_dir>/kata.hvsock ───────▶ vmm/vsock           made by the VMM: the host's side of its vsock device
//!   <run_dir>/kata.hvsock_1028 ◀── vmm/vsock_1028      what the guest dials; there for every listener before the start
//!                                  vmm/<disk>          a node of the host's device, which the VMM's user may open
//! ```
//!
//! It is a small file system of its own: nodes on `/run` mostly cannot be opened, and on this one no symbolic link is followed. A
//! VMM that has been taken over could else put one where the pod's owner, who is root, is about to connect. So listeners are
//! bind mounts there. Without root there are no nodes, and it is a plain directory with links.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, chownat, mknodat, open};
use rustix::mount::MountFlags;

use crate::files::allows;
use crate::process::{Identity, Record};
use crate::vm::{Disk, HypervisorError, VmSpec};
use crate::vsock;

#[derive(Debug)]
pub(crate) struct Room {
    dir: PathBuf,
    identity: Identity,
}

/// A disk as its VMM opens it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Named {
    pub path: PathBuf,
    /// Made for this disk, to be removed with it.
    ours: bool,
}

impl Room {
    /// Makes the directory, recorded before it is there.
    pub(crate) fn make(spec: &VmSpec, record: &Record) -> Result<Self, HypervisorError> {
        let dir = spec.run_dir.join("vmm");
        let fault = |source| HypervisorError::File { what: "the VMM's directory", path: dir.clone(), source };
        record.dir(&dir)?;
        fs::create_dir(&dir).map_err(fault)?;
        let identity = spec.identity.clone();
        if rustix::process::geteuid().is_root() {
            record.mount(&dir)?;
            let options = format!("mode=0700,uid={},gid={},size=1m,nr_inodes=1k", identity.uid, identity.gid);
            let options = std::ffi::CString::new(options).map_err(|error| fault(error.into()))?;
            let flags = MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NOSYMFOLLOW;
            rustix::mount::mount("tmpfs", &dir, "tmpfs", flags, Some(options.as_c_str()))
                .map_err(|errno| fault(errno.into()))?;
        } else {
            fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).map_err(fault)?;
        }
        Ok(Self { dir, identity })
    }

    /// Where something called `name` is or will be.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A listener for the VMM, and the way to it: nobody else has one.
    pub(crate) fn listener(&self, record: &Record) -> Result<(OwnedFd, OwnedFd), HypervisorError> {
        let path = self.path("api");
        let listener = vsock::bind(&path, record)?;
        let open = || -> io::Result<OwnedFd> {
            let way = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            fs::remove_file(&path)?;
            Ok(way)
        };
        let way = open().map_err(|source| HypervisorError::File { what: "control socket", path, source })?;
        Ok((listener.into(), way))
    }

    /// Has `vsock` lead to the socket that the VMM will make, and what the guest dials to the host's listeners. The answer is
    /// where the VMM has to make it.
    pub(crate) fn vsock(&self, vsock: &Path, record: &Record) -> Result<PathBuf, HypervisorError> {
        let own = self.path("vsock");
        record.file(vsock)?;
        let link = || -> io::Result<()> {
            let root = rustix::process::geteuid().is_root();
            std::os::unix::fs::symlink(&own, vsock)?;
            let (Some(dir), Some(name)) = (vsock.parent(), vsock.file_name().and_then(|name| name.to_str()))
            else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            for listener in fs::read_dir(dir)? {
                let listener = listener?;
                let file_name = listener.file_name();
                let port = file_name.to_str().and_then(|found| found.strip_prefix(name)?.strip_prefix('_'));
                let Some(port) = port.and_then(|port| port.parse().ok()) else { continue };
                let place = vsock::host_port_path(&own, port);
                if !root {
                    std::os::unix::fs::symlink(listener.path(), place)?;
                    continue;
                }
                fs::File::create_new(&place)?;
                record.mount(&place).map_err(io::Error::other)?;
                rustix::mount::mount_bind(listener.path(), &place)?;
            }
            Ok(())
        };
        link().map_err(|source| HypervisorError::File {
            what: "vsock socket",
            path: vsock.to_owned(),
            source,
        })?;
        Ok(own)
    }

    /// Gives `disk` a name under which the VMM's user may open it, and no more than it is meant to.
    pub(crate) fn name(&self, disk: &Disk) -> Result<Named, HypervisorError> {
        let fault = |source| HypervisorError::File { what: "disk", path: disk.path.clone(), source };
        let refuse = |kind, why: &str| Err(fault(io::Error::new(kind, why.to_owned())));
        let metadata = fs::metadata(&disk.path).map_err(fault)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return refuse(io::ErrorKind::InvalidInput, "it is neither a block device nor a regular file");
        }
        if self.identity.uid == 0 {
            return Ok(Named { path: disk.path.clone(), ours: false });
        }
        if kind.is_file() {
            if !allows(&self.identity, &metadata, if disk.readonly { 0o4 } else { 0o6 }) {
                let uid = self.identity.uid;
                let why = format!(
                    "this VMM opens files by name, and its user {uid} may not; use a block device, or hypervisor_name = \"qemu\""
                );
                return refuse(io::ErrorKind::PermissionDenied, &why);
            }
            return Ok(Named { path: disk.path.clone(), ours: false });
        }
        let path = self.path(&disk.id);
        let make = || -> io::Result<()> {
            mknodat(CWD, &path, FileType::BlockDevice, Mode::empty(), metadata.rdev())?;
            // The directory is the VMM's, which may have put another node there meanwhile: this one is held from here on.
            let node = fs::File::from(open(&path, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?);
            let made = node.metadata()?;
            if !made.file_type().is_block_device() || made.rdev() != metadata.rdev() {
                return Err(io::Error::other("its name in the VMM's directory was given to something else"));
            }
            // Of its group: its owner could grant itself more.
            chownat(&node, "", None, Some(Gid::from_raw(self.identity.gid)), AtFlags::EMPTY_PATH)?;
            let mode = if disk.readonly { 0o440 } else { 0o660 };
            let held = format!("/proc/self/fd/{}", node.as_raw_fd());
            fs::set_permissions(held, fs::Permissions::from_mode(mode))
        };
        make().map_err(fault)?;
        Ok(Named { path, ours: true })
    }
}

impl Named {
    /// Takes the name away. Whoever has the disk open keeps it.
    pub(crate) fn forget(&self) {
        if self.ours
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the node of a disk is left to the end of its pod");
        }
    }
}

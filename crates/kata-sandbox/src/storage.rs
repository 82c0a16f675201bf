//! The host files that the guest sees: one shared directory for the pod, one directory in it for each container.
//!
//! A root file system on disks does not come this way, see [`rootfs`].
//!
//! ```text
//!   <bundle>/rootfs ◀── overlay, … (the mounts of Task.Create)
//!         │ clone                              <run_dir>/shared          served by kata-virtiofsd
//!         └──────────────────────────────────▶   <container>/rootfs
//!   volume on the host ── clone, read-only ──▶   <container>/mounts/<n>
//!                                                │ read-only mount of
//!                                              <run_dir>/places          where mount points are made
//! ```
//!
//! `shared` is a mount of its own with shared propagation: the daemon's mount namespace follows it, so that what is bound
//! here later shows up there, and what is taken down here does not stay busy there. Each clone is cut off from its origin
//! before it is attached, or taking it down would reach back and unmount the host's own.
//!
//! `shared` itself is read-only, whatever is mounted below it. A guest that could write there would put a symbolic link
//! where the next container's mount point is made, and have root follow it anywhere on the host.

mod copy;
mod disk;
mod loop_device;
mod mount;
pub(crate) mod rootfs;

use std::io;
use std::path::{Component, Path, PathBuf};

use kata_hypervisor::HypervisorError;
use kata_hypervisor::process::{Record, RecordError};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};

use crate::agent_client::AgentError;
use crate::error::ErrorKind;
use crate::guest_spec::{ROOTFS, Volume};
use crate::pod::RootfsMount;

pub(crate) use copy::copy;
pub(crate) use disk::claim;

/// Why a container's files could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A volume, or a part of the rootfs, is not there.
    #[error("{path} does not exist on the host", path = .0.display())]
    Absent(PathBuf),
    /// A device node would mean another device in the guest.
    #[error("{path} is a device: devices of the host cannot be mounted into a container yet", path = .0.display())]
    Device(PathBuf),
    /// A rootfs mount that leads out of the rootfs.
    #[error("rootfs mount target {0:?} is not below the rootfs")]
    Target(String),
    /// A rootfs mount with an option that contradicts its type.
    #[error("mount of {fs_type} at {target}: {reason}", target = .target.display())]
    Options {
        /// Its type.
        fs_type: String,
        /// Where.
        target: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A mount failed.
    #[error("cannot mount {source_text} ({fs_type}) at {target}", target = .target.display())]
    Mount {
        /// Its type.
        fs_type: String,
        /// Its source.
        source_text: String,
        /// Where.
        target: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file operation failed.
    #[error("cannot {action} {path}", path = .path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A disk that somebody else uses.
    #[error("{path} is in use on the host: unmount it, or end what holds it", path = .0.display())]
    Busy(PathBuf),
    /// The machine did not take a disk.
    #[error("cannot attach {path} to the virtual machine", path = .path.display())]
    Attach {
        /// The image or device.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<HypervisorError>,
    },
    /// There is no way for files into the guest.
    #[error(
        "{path} cannot reach the guest: hypervisor.qemu.shared_fs is \"none\", which leaves block devices and copies \
         of files up to {limit} KiB; set it to \"virtio-fs\"",
        path = .0.display(),
        limit = copy::SIZE_MAX / 1024
    )]
    NoShare(PathBuf),
    /// The agent did not take a copy.
    #[error("cannot copy {path} into the guest", path = .path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: AgentError,
    },
    /// The work was interrupted by a fault of this program.
    #[error("interrupted")]
    Interrupted,
    /// The leak record could not be written, so nothing was made.
    #[error("cannot record what is about to be mounted")]
    Record(#[from] RecordError),
}

impl StorageError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            // Not NotFound: that says "no such command" to whoever creates a container.
            Self::Absent(_) | Self::Target(_) | Self::Options { .. } => ErrorKind::InvalidArgument,
            Self::Device(_) | Self::NoShare(_) => ErrorKind::Unimplemented,
            Self::Busy(_) => ErrorKind::FailedPrecondition,
            Self::Attach { source, .. } if matches!(**source, HypervisorError::Unsupported { .. }) => {
                ErrorKind::Unimplemented
            }
            Self::Copy { source, .. } => source.kind(),
            Self::Attach { .. }
            | Self::Mount { .. }
            | Self::File { .. }
            | Self::Interrupted
            | Self::Record(_) => ErrorKind::Internal,
        }
    }

    fn file(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::File { action, path: path.to_owned(), source: source.into() }
    }
}

/// The pod's directory that the guest sees.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    /// What the guest sees.
    dir: PathBuf,
    /// The directory behind it.
    places: PathBuf,
    record: Record,
}

impl Share {
    /// Makes `<run_dir>/shared` a mount that the daemon's namespace can follow.
    pub(crate) fn prepare(run_dir: &Path, record: &Record) -> Result<Self, StorageError> {
        let (dir, places) = (run_dir.join("shared"), run_dir.join("places"));
        for made in [&places, &dir] {
            record.dir(made)?;
            make_dir(made, 0o700)?;
        }
        record.mount(&dir)?;
        mount::clone(&places, &dir, true, false)?;
        // Private first: as a child of a shared mount the clone starts in a peer group with its copies in every
        // namespace of the host that follows the parent.
        for change in [MountPropagationFlags::PRIVATE, MountPropagationFlags::SHARED] {
            rustix::mount::mount_change(&dir, change)
                .map_err(|error| StorageError::file("set the propagation of", &dir, error))?;
        }
        Ok(Self { dir, places, record: record.clone() })
    }

    /// Where it is on the host.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Puts a container's files into the share, without a root where that comes another way. What was made before a
    /// failure is undone.
    pub(crate) fn add(
        &self,
        id: &str,
        root: Option<&SharedRoot>,
        volumes: &[Volume],
    ) -> Result<SharedFiles, StorageError> {
        let mut files = SharedFiles {
            dir: self.dir.join(id),
            places: self.places.join(id),
            mounts: Vec::new(),
            record: self.record.clone(),
        };
        match files.fill(root, volumes) {
            Ok(()) => Ok(files),
            Err(error) => {
                files.release();
                Err(error)
            }
        }
    }
}

/// A root file system that is shared.
#[derive(Debug)]
pub(crate) struct SharedRoot {
    /// Where it is on the host.
    pub(crate) path: PathBuf,
    /// What it is made of; empty where it is there already.
    pub(crate) mounts: Vec<RootfsMount>,
}

/// One container's files in the share.
#[derive(Debug)]
pub(crate) struct SharedFiles {
    dir: PathBuf,
    /// The same directory, where it can be written.
    places: PathBuf,
    /// Newest last.
    mounts: Vec<PathBuf>,
    record: Record,
}

impl SharedFiles {
    fn fill(&mut self, root: Option<&SharedRoot>, volumes: &[Volume]) -> Result<(), StorageError> {
        if let Some(SharedRoot { path, mounts }) = root.filter(|root| !root.mounts.is_empty()) {
            make_dir(path, 0o755)?;
            mounts.iter().try_for_each(|part| self.mount_rootfs(path, part))?;
        }
        self.record.dir(&self.places)?;
        make_dir(&self.places, 0o700)?;
        if let Some(root) = root {
            self.clone_in(&Volume {
                source: root.path.clone(),
                name: PathBuf::from(ROOTFS),
                // The agent makes mount points in it, and then makes it read-only where that is asked.
                readonly: false,
                follows_host: false,
            })?;
        }
        volumes.iter().try_for_each(|volume| self.clone_in(volume))
    }

    fn mount_rootfs(&mut self, rootfs: &Path, part: &RootfsMount) -> Result<(), StorageError> {
        let target = match inside(rootfs, &part.target)? {
            None => rootfs.to_owned(),
            Some(below) => resolve_inside(rootfs, &below)?,
        };
        self.record.mount(&target)?;
        mount::mount(part, &target)?;
        self.mounts.push(target);
        Ok(())
    }

    /// Makes `volume` appear in the share.
    fn clone_in(&mut self, volume: &Volume) -> Result<(), StorageError> {
        let (target, place) = (self.dir.join(&volume.name), self.places.join(&volume.name));
        let stat = rustix::fs::stat(&volume.source).map_err(|error| match error {
            rustix::io::Errno::NOENT => StorageError::Absent(volume.source.clone()),
            error => StorageError::file("look at", &volume.source, error),
        })?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => make_dir(&place, 0o700)?,
            FileType::CharacterDevice | FileType::BlockDevice => {
                return Err(StorageError::Device(volume.source.clone()));
            }
            kind => {
                if kind != FileType::RegularFile {
                    tracing::warn!(volume = %volume.source.display(), "a socket or FIFO of the host is seen in the guest, and cannot be spoken to");
                }
                if let Some(parent) = place.parent() {
                    make_dir(parent, 0o700)?;
                }
                std::fs::File::create(&place).map_err(|error| StorageError::file("create", &place, error))?;
            }
        }
        self.record.mount(&target)?;
        mount::clone(&volume.source, &target, volume.readonly, volume.follows_host)?;
        self.mounts.push(target);
        Ok(())
    }

    /// Takes everything down again, newest first. What fails stays in the leak record for the teardown.
    pub(crate) fn release(&mut self) {
        while let Some(target) = self.mounts.pop() {
            match rustix::mount::unmount(&target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
                Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
                Err(error) => {
                    // Removing below a mount that is still up would delete what somebody shared with the pod.
                    tracing::warn!(mount = %target.display(), %error, "cannot unmount; left to the teardown");
                    return;
                }
            }
        }
        match std::fs::remove_dir_all(&self.places) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(dir = %self.places.display(), %error, "cannot remove a container's directory; left to the teardown");
            }
        }
    }
}

fn bind_error(source: &Path, target: &Path, error: impl Into<io::Error>) -> StorageError {
    StorageError::Mount {
        fs_type: "bind".to_owned(),
        source_text: source.display().to_string(),
        target: target.to_owned(),
        source: error.into(),
    }
}

fn make_dir(path: &Path, mode: u32) -> Result<(), StorageError> {
    use std::os::unix::fs::DirBuilderExt;
    let made = std::fs::DirBuilder::new().recursive(true).mode(mode).create(path);
    made.map_err(|error| StorageError::file("create directory", path, error))
}

/// The part of `target` below the rootfs; `None` for the rootfs itself.
fn inside(rootfs: &Path, target: &str) -> Result<Option<PathBuf>, StorageError> {
    let refused = || StorageError::Target(target.to_owned());
    let path = Path::new(target);
    // containerd names targets both ways: relative to the rootfs, and as a host path below it.
    let below = path.strip_prefix(rootfs).or_else(|_| path.strip_prefix("/")).unwrap_or(path);
    if below.components().any(|part| !matches!(part, Component::Normal(_) | Component::CurDir)) {
        return Err(refused());
    }
    Ok(Some(below.to_owned()).filter(|below| !below.as_os_str().is_empty()))
}

/// Where `below` is on the host, with the image's symbolic links followed as if the rootfs were `/`.
fn resolve_inside(rootfs: &Path, below: &Path) -> Result<PathBuf, StorageError> {
    let look =
        |error: rustix::io::Errno| StorageError::file("find the mount target", &rootfs.join(below), error);
    let root = rustix::fs::open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let target = rustix::fs::openat2(root.map_err(look)?, below, flags, Mode::empty(), ResolveFlags::IN_ROOT);
    mount::path_of(&target.map_err(look)?)
        .map_err(|error| StorageError::file("find the mount target", below, error))
}

#[cfg(test)]
mod tests;

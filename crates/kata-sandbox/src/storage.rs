//! The host files that the guest sees: one shared directory for the pod, with the roots of its containers and its volumes.
//!
//! A root file system on disks does not come this way, see [`rootfs`], nor does one that the guest pulls, see [`guest_pull`], and neither does every volume, see [`volume`].
//!
//! ```text
//!   <bundle>/rootfs ◀── overlay, … (the mounts of Task.Create)
//!         │ clone                              <run_dir>/shared          served by kata-virtiofsd
//!         └──────────────────────────────────▶   <container>/rootfs
//!   volume on the host ── clone, read-only ──▶   .volumes/<n>
//!                                                │ read-only mount of
//!                                              <run_dir>/places          where mount points are made
//! ```
//!
//! To the guest each of these is a file system of its own. So a volume that several containers mount is there once: what
//! lives in its inodes (sockets, locks, mapped pages) is the same for all of them.
//!
//! `shared` is a mount of its own with shared propagation: the daemon's mount namespace follows it, so that what is bound
//! here later shows up there, and what is taken down here does not stay busy there. Each clone is cut off from its origin
//! before it is attached, or taking it down would reach back and unmount the host's own.
//!
//! `shared` itself is read-only, whatever is mounted below it. A guest that could write there would put a symbolic link
//! where the next container's mount point is made, and have root follow it anywhere on the host.

pub(crate) mod block_device;
mod copy;
pub(crate) mod direct;
mod disk;
pub(crate) mod guest_pull;
mod loop_device;
mod mirror;
mod mount;
mod places;
pub(crate) mod rootfs;
pub(crate) mod volume;

use std::io;
use std::path::{Component, Path, PathBuf};

use kata_config::direct_volume::ClaimError;
use kata_hypervisor::process::{Record, RecordError};
use kata_hypervisor::{DriverKind, HypervisorError};
use kata_image::manifest::ManifestError;
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use tokio::sync::watch;

use crate::agent_client::AgentError;
use crate::error::ErrorKind;
use crate::guest_spec::ROOTFS;
use crate::pod::RootfsMount;

pub(crate) use copy::copy;
pub(crate) use disk::{EmptyDisk, PodDisks, plug};
pub(crate) use mirror::{Changes, Mirror};
use places::Places;

/// Why a container's files could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// A volume, or a part of the rootfs, is not there.
    #[error("{path} does not exist on the host", path = .0.display())]
    Absent(PathBuf),
    /// A device node would mean another device in the guest.
    #[error(
        "{path} is a device: bound as a file it would be another device in the guest; ask for it as a device",
        path = .0.display()
    )]
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
    /// A device that is in the machine, and not to be written there.
    #[error(
        "{path} cannot be written: another container of the pod has it read-only, and the machine has it once",
        path = .0.display()
    )]
    ReadOnly(PathBuf),
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
         of files up to {limit} KiB and of config volumes; set it to \"virtio-fs\"",
        path = .0.display(),
        limit = copy::SIZE_MAX / 1024
    )]
    NoShare(PathBuf),
    /// There is no way for a container's root into the guest.
    #[error(
        "{path} cannot reach the guest: {driver} neither shares files of the host nor takes disks while it runs; set \
         runtime.hypervisor_name to \"qemu\", \"builtin\" or \"cloud-hypervisor\"",
        path = .path.display()
    )]
    NoWay {
        /// The root.
        path: PathBuf,
        /// The driver.
        driver: DriverKind,
    },
    /// A root that the guest shall pull, and nobody says of which image.
    #[error(
        "the guest shall pull the image, and the container has no annotation {} or {} with its name: with ctr or nerdctl, give it \
         one with --annotation",
        guest_pull::IMAGE_NAME[0],
        guest_pull::IMAGE_NAME[1]
    )]
    NoImageName,
    /// What a snapshotter has written of a root makes none.
    #[error("the snapshotter's io.katacontainers.volume cannot be used: {0}")]
    VirtualVolume(String),
    /// A kind of root that this version does not have.
    #[error("the snapshotter asks for a root of kind {0:?}, which is not supported; image_guest_pull is")]
    VirtualVolumeKind(String),
    /// A guest image that cannot do what the container needs, or that cannot be read.
    #[error(transparent)]
    Image(#[from] ManifestError),
    /// A volume of huge pages without a bound.
    #[error(
        "{path} has no bound: the guest sets huge pages aside before they are used, so the container needs a limit of \
         them (hugepages-2Mi)",
        path = .0.display()
    )]
    HugePages(PathBuf),
    /// What a storage driver has written of a direct volume makes none.
    #[error("direct volume {path} cannot be used: {reason}", path = .path.display())]
    DirectVolume {
        /// Its path.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A direct volume of another pod.
    #[error("direct volume {path} cannot be attached", path = .path.display())]
    Taken {
        /// Its path.
        path: PathBuf,
        /// Whose it is.
        #[source]
        source: ClaimError,
    },
    /// A file system could not be made.
    #[error("cannot make a file system in {path}: {reason}", path = .path.display())]
    Mkfs {
        /// The image.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// A volume that is never the same.
    #[error("{path} changes all the while, so no copy of it is whole", path = .0.display())]
    Restless(PathBuf),
    /// The agent did not take a copy.
    #[error("cannot copy {path} into the guest", path = .path.display())]
    Copy {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: AgentError,
    },
    /// The container was killed meanwhile.
    #[error("the container was killed before its files were there")]
    Killed,
    /// The work was interrupted by a fault of this program.
    #[error("preparing the files was interrupted by a fault of the owner; its log has the place (owner.log)")]
    Interrupted,
    /// The leak record could not be written, so nothing was made.
    #[error("cannot record what is about to be mounted")]
    Record(#[from] RecordError),
}

impl StorageError {
    pub(crate) fn kind(&self) -> ErrorKind {
        match self {
            // Not NotFound: that says "no such command" to whoever creates a container.
            Self::Absent(_)
            | Self::Target(_)
            | Self::Options { .. }
            | Self::HugePages(_)
            | Self::NoImageName
            | Self::VirtualVolume(_)
            | Self::DirectVolume { .. } => ErrorKind::InvalidArgument,
            Self::Device(_)
            | Self::NoShare(_)
            | Self::NoWay { .. }
            | Self::VirtualVolumeKind(_)
            | Self::Image(ManifestError::Lacks { .. }) => ErrorKind::Unimplemented,
            Self::Busy(_) | Self::ReadOnly(_) | Self::Taken { .. } => ErrorKind::FailedPrecondition,
            Self::Killed => ErrorKind::Unavailable,
            Self::Attach { source, .. } if matches!(**source, HypervisorError::Unsupported { .. }) => {
                ErrorKind::Unimplemented
            }
            Self::Copy { source, .. } => source.kind(),
            Self::Attach { .. }
            | Self::Image(_)
            | Self::Mkfs { .. }
            | Self::Restless(_)
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

/// Ends the preparation of a container's files where the container is killed.
#[derive(Debug)]
pub(crate) struct Abort(watch::Receiver<Option<u32>>);

impl Abort {
    /// The signal that ends the container, once there is one.
    pub(crate) fn on(signal: &watch::Receiver<Option<u32>>) -> Self {
        Self(signal.clone())
    }

    /// Does what can be given up at any point.
    ///
    /// # Errors
    /// [`StorageError::Killed`], and those of the work.
    pub(crate) async fn unless<T>(
        &mut self,
        work: impl Future<Output = Result<T, StorageError>>,
    ) -> Result<T, StorageError> {
        tokio::select! {
            biased;
            _ = self.0.wait_for(Option::is_some) => Err(StorageError::Killed),
            done = work => done,
        }
    }
}

/// The pod's directory that the guest sees.
#[derive(Clone, Debug)]
pub(crate) struct Share {
    /// What the guest sees.
    dir: PathBuf,
    /// The directory behind it.
    places: PathBuf,
    volumes: Places,
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
        let volumes = Places::new(&dir, &places, record);
        Ok(Self { dir, places, volumes, record: record.clone() })
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
        volumes: &[SharedVolume],
    ) -> Result<SharedFiles, StorageError> {
        let mut files = SharedFiles {
            dir: self.dir.join(id),
            place: self.places.join(id),
            mounts: Vec::new(),
            volumes: Vec::new(),
            all: self.volumes.clone(),
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

/// A path of the host as it is to be shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SharedVolume {
    pub(crate) source: PathBuf,
    /// Whether not even the guest's kernel can write it.
    pub(crate) readonly: bool,
    /// Whether mounts made on the host later shall appear.
    pub(crate) follows_host: bool,
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
    place: PathBuf,
    /// Newest last.
    mounts: Vec<PathBuf>,
    /// Numbers of its volumes among the pod's, in the order of the request.
    volumes: Vec<u32>,
    all: Places,
    record: Record,
}

impl SharedFiles {
    /// Its volumes' names in the share, in the order of the request.
    pub(crate) fn volumes(&self) -> impl Iterator<Item = PathBuf> {
        self.volumes.iter().map(|number| places::name(*number))
    }

    fn fill(&mut self, root: Option<&SharedRoot>, volumes: &[SharedVolume]) -> Result<(), StorageError> {
        if let Some(root) = root {
            self.share_root(root)?;
        }
        for volume in volumes {
            self.volumes.push(self.all.add(volume)?);
        }
        Ok(())
    }

    fn share_root(&mut self, SharedRoot { path, mounts }: &SharedRoot) -> Result<(), StorageError> {
        if !mounts.is_empty() {
            make_dir(path, 0o755)?;
            mounts.iter().try_for_each(|part| self.mount_rootfs(path, part))?;
        }
        self.record.dir(&self.place)?;
        make_dir(&self.place.join(ROOTFS), 0o700)?;
        let target = self.dir.join(ROOTFS);
        self.record.mount(&target)?;
        // The agent makes mount points in it, and then makes it read-only where that is asked.
        mount::clone(path, &target, false, false)?;
        self.mounts.push(target);
        Ok(())
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

    /// Takes everything down again, newest first. What fails stays in the leak record for the teardown.
    pub(crate) fn release(&mut self) {
        for number in self.volumes.drain(..).rev() {
            self.all.release(number);
        }
        while let Some(target) = self.mounts.pop() {
            // Removing below a mount that is still up would delete what somebody shared with the pod.
            if !take_down(&target) {
                return;
            }
        }
        remove(&self.place);
    }
}

/// Whether nothing is mounted there any more.
fn take_down(target: &Path) -> bool {
    match rustix::mount::unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => true,
        Err(error) => {
            tracing::warn!(mount = %target.display(), %error, "cannot unmount; left to the teardown");
            false
        }
    }
}

/// Removes a place that nothing is mounted on.
fn remove(place: &Path) {
    let removed = match std::fs::symlink_metadata(place) {
        Ok(found) if found.is_dir() => std::fs::remove_dir_all(place),
        Ok(_) => std::fs::remove_file(place),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(place = %place.display(), %error, "cannot remove what was mounted on; left to the teardown");
        }
        _ => {}
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

//! Storages: what the host asks to be mounted in the guest for a sandbox or a container.
//!
//! A storage that several containers name by the same mount point is made once and goes with the last of them, or, where
//! the request says that it is `shared`, with the sandbox: an emptyDir outlives every container that uses it. All of them
//! have to ask for the very same: see [`super::occupied`].
//!
//! | driver | `source` | is |
//! |---|---|---|
//! | `blk` | PCI path or `/dev/NAME` | the file system on a disk, waited for: see [`crate::device`] |
//! | `mmioblk`, `nvdimm` | `/dev/NAME` | the same behind another bus |
//! | `scsi` | target and unit, `0:1` | the same behind a SCSI controller |
//! | `virtio-fs` | tag | a share of the host |
//! | `overlayfs` | | layers, each a directory by then |
//! | `bind` | path | the same file or directory again |
//! | `watchable-bind` | path | a small directory copied, and kept like the original: see [`super::watch`] |
//! | `ephemeral` | | a tmpfs, or a hugetlbfs with pages set aside for it |
//! | `local` | | a directory |
//! | `image_guest_pull` | image | a root that a service of the guest pulls: see [`super::served`] |
//!
//! Storages are made in the order of the request, so one may stand on those before it, and are undone in reverse. A
//! root of read-only layers is that:
//!
//! ```text
//!  blk        02/00  erofs    /run/kata-containers/sandbox/layers/0      one disk, any number of containers
//!  blk        03/00  erofs    /run/kata-containers/sandbox/layers/1
//!  ephemeral         tmpfs    /run/kata-containers/c1/rw
//!  overlayfs         overlay  /run/kata-containers/c1/rootfs             lowerdir=…/1:…/0, upperdir=…/rw/upper, …
//! ```

use std::ffi::CString;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kata_api::agent::Storage;
use rustix::fs::{Mode, chmod};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change, unmount,
};

use super::error::{StorageError, invalid, system};
use super::group;
use super::hugepages::{self, Reserved};
use super::occupied;
use super::options::{self, MountOptions};
use super::places::Places;
use super::served::{self, Image};
use super::watch::{self, Follower};
use crate::aside;
use crate::device::Disks;
use crate::modules::Modules;
use crate::services::Services;

/// Drivers that are served, as told to the host.
pub const DRIVERS: [&str; 11] = [
    "blk",
    "mmioblk",
    "scsi",
    "nvdimm",
    "virtio-fs",
    "ephemeral",
    "local",
    "overlayfs",
    "bind",
    "watchable-bind",
    served::PULL,
];

/// Those of them that are file systems on disks.
const DISKS: [&str; 4] = ["blk", "mmioblk", "scsi", "nvdimm"];

/// Drivers of the protocol that this agent does not serve, and why.
const UNSUPPORTED: [(&str, &str); 2] = [
    ("blk-ccw", "this machine has no channel subsystem"),
    ("erofs.multi-layer", "layers are asked for one by one, by blk and overlayfs"),
];

/// Driver option that asks for a directory of an overlay (upper, work) to be made first.
const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory";

/// What the kernel takes of a file system's options: a page, with the byte that ends it. It cuts off the rest unsaid.
const OPTIONS_FIT: usize = 4095;

/// A storage that is there.
#[derive(Debug)]
struct Made {
    /// What it was asked for as, with the device node of its disk.
    of: Storage,
    mounted: bool,
    /// Whether its directory was made for it and goes with it.
    own_directory: bool,
    users: usize,
    /// Whether a pulled image's description is beside it, which goes with it.
    pulled: bool,
    /// Whether it stays without users, until the sandbox goes.
    kept: bool,
    pages: Option<Reserved>,
    /// Keeps a copy up to date.
    follower: Option<Follower>,
}

impl Made {
    /// What `storage` will be at `point`, before it is there.
    fn new(storage: &Storage, point: &Path) -> Self {
        Self {
            of: storage.clone(),
            mounted: storage.driver != "local",
            own_directory: !point.exists(),
            users: 1,
            pulled: false,
            kept: storage.shared,
            pages: None,
            follower: None,
        }
    }
}

/// All storages of the guest. Clones share them.
#[derive(Clone, Debug)]
pub struct Storages {
    made: Places<Made>,
    modules: Arc<Modules>,
    disks: Arc<Disks>,
    services: Services,
    /// Whether encrypted disks are protected against changes, too.
    integrity: bool,
}

impl Storages {
    /// None so far; `modules` are loaded as storages need them, `disks` are where block storages are found, `services` mount what
    /// the agent cannot. Encrypted disks are protected against changes, too, if `integrity` says so.
    #[must_use]
    pub fn new(modules: Arc<Modules>, disks: Disks, services: Services, integrity: bool) -> Self {
        Self { made: Places::default(), modules, disks: Arc::new(disks), services, integrity }
    }

    /// The same, for somebody who waits for services no longer than this.
    #[must_use]
    pub fn within(&self, limit: Duration) -> Self {
        Self { services: self.services.within(limit), ..self.clone() }
    }

    /// Makes `storages` in order and gives the mount points, for [`remove`](Self::remove). All or none.
    ///
    /// # Errors
    /// [`StorageError`] of the first that fails.
    pub async fn add(&self, storages: Vec<Storage>) -> Result<Vec<PathBuf>, StorageError> {
        let mut points = Vec::with_capacity(storages.len());
        for storage in storages {
            match self.add_one(storage).await {
                Ok(point) => points.push(point),
                Err(error) => {
                    if let Err(undo) = self.remove(points).await {
                        tracing::warn!(error = crate::chain(&undo), "undoing storages");
                    }
                    return Err(error);
                }
            }
        }
        Ok(points)
    }

    async fn add_one(&self, storage: Storage) -> Result<PathBuf, StorageError> {
        let point = mount_point(&storage)?;
        // Before the lock: others need not wait for this one's disk.
        let storage =
            if DISKS.contains(&storage.driver.as_str()) { self.with_disk(storage).await? } else { storage };
        let mut place = self.made.lock(&point).await;
        if let Some(made) = place.as_mut() {
            occupied::same(&made.of, &storage)?;
            made.users += 1;
            return Ok(point);
        }
        self.vacant(&storage, &point).await?;
        if let Some(made) = self.have_made(&storage, &point).await? {
            *place = Some(made);
            return Ok(point);
        }
        let (modules, name, at) = (self.modules.clone(), storage.mount_point.clone(), point.clone());
        // A mount may wait for the host's answer, and a whole tree may be given to its group: not on the thread that serves
        // everybody else. The place goes along, so that it is free only when the work is done.
        aside::run(format!("the mount at {name:?}"), move || {
            *place = Some(make(&storage, &at, &modules)?);
            Ok(point)
        })
        .await?
    }

    /// Refuses `storage` where it would be over something, be that another storage or not.
    async fn vacant(&self, storage: &Storage, point: &Path) -> Result<(), StorageError> {
        let below = |other: &PathBuf| other != point && other.starts_with(point);
        // A directory covers nothing. Also what is just coming counts: who looks second sees the first.
        if storage.driver != "local"
            && let Some(other) = self.made.paths().into_iter().find(below)
        {
            return Err(invalid(storage, format!("it would cover the storage at {other:?}")));
        }
        let (storage, at) = (storage.clone(), point.to_owned());
        let look = move || occupied::vacant(&storage, &at);
        aside::within(aside::BOUND, format!("looking at {}", point.display()), look).await?
    }

    /// Has a service of the guest make `storage`, if it is one that the agent cannot.
    async fn have_made(&self, storage: &Storage, point: &Path) -> Result<Option<Made>, StorageError> {
        let made = Made::new(storage, point);
        match Image::of(storage)? {
            Some(image) if !image.is_pods_own => {
                served::pull(&self.services, storage, &image, point).await?;
                Ok(Some(Made { pulled: true, ..made }))
            }
            Some(_) => Ok(None),
            None if DISKS.contains(&storage.driver.as_str()) && served::is_secure(storage)? => {
                served::secure(&self.services, storage, point, self.integrity).await?;
                if let Some(group) = storage.fs_group.clone().into_option() {
                    let at = point.to_owned();
                    let give = move || group::give_tree(&at, &group).inspect_err(|_| take_down(&at));
                    aside::run(format!("giving {:?} to its group", storage.mount_point), give).await??;
                }
                Ok(Some(made))
            }
            None => Ok(None),
        }
    }

    /// The storage with the block device of its disk for a source.
    async fn with_disk(&self, storage: Storage) -> Result<Storage, StorageError> {
        if !served::is_secure(&storage)? && storage.fstype.is_empty() {
            return Err(invalid(&storage, "a disk needs the type of its file system"));
        }
        let found = if storage.driver == "scsi" {
            self.disks.find_scsi(&storage.source).await
        } else {
            self.disks.find(&storage.source).await
        };
        match found {
            Ok(node) => Ok(Storage { source: node.to_string_lossy().into_owned(), ..storage }),
            Err(source) => Err(StorageError::Disk { mount_point: storage.mount_point, source }),
        }
    }

    /// Remounts ephemeral storages that are there with new options (the size).
    ///
    /// # Errors
    /// A storage that is not there or not ephemeral; what the system says.
    pub async fn resize(&self, storages: &[Storage]) -> Result<(), StorageError> {
        for storage in storages {
            let point = mount_point(storage)?;
            let place = self.made.lock(&point).await;
            if storage.driver != "ephemeral" || place.is_none() {
                return Err(invalid(storage, "there is no ephemeral storage to update"));
            }
            let (_, words) = take_group(storage)?;
            let options = options::parse(&words);
            let remounted = rustix::mount::mount_remount(&point, options.flags, options.data.as_str());
            remounted.map_err(system("remounting", &point))?;
        }
        Ok(())
    }

    /// Undoes all that is kept until the sandbox goes, what lies deeper first. All are tried.
    ///
    /// # Errors
    /// The first failure.
    pub async fn remove_kept(&self) -> Result<(), StorageError> {
        let mut points = Vec::new();
        for point in self.made.paths() {
            if let Some(made) = self.made.lock(&point).await.as_mut().filter(|made| made.kept) {
                (made.kept, made.users) = (false, 1);
                points.push(point);
            }
        }
        points.sort();
        self.remove(points).await
    }

    /// Gives up `points` in reverse order; what nobody else uses is unmounted. All are tried.
    ///
    /// # Errors
    /// The first failure.
    pub async fn remove(&self, points: Vec<PathBuf>) -> Result<(), StorageError> {
        let mut result = Ok(());
        for point in points.into_iter().rev() {
            result = result.and(self.remove_one(point).await);
        }
        result
    }

    async fn remove_one(&self, point: PathBuf) -> Result<(), StorageError> {
        let mut place = self.made.lock(&point).await;
        let Some(made) = place.as_mut() else { return Ok(()) };
        made.users = made.users.saturating_sub(1);
        if made.users > 0 || made.kept {
            return Ok(());
        }
        let what = format!("taking down {}", point.display());
        // Containers may have left any number of files there: not on the thread that serves everybody else.
        aside::run(what, move || place.take().map_or(Ok(()), |made| undo(&point, &made))).await?
    }
}

fn mount_point(storage: &Storage) -> Result<PathBuf, StorageError> {
    let path = PathBuf::from(&storage.mount_point);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if path.is_absolute() && plain && path != Path::new("/") {
        Ok(path)
    } else {
        Err(invalid(storage, "the mount point must be an absolute path without . and .."))
    }
}

fn make(storage: &Storage, point: &Path, modules: &Modules) -> Result<Made, StorageError> {
    let driver = storage.driver.as_str();
    if let Some((_, reason)) = UNSUPPORTED.iter().find(|(name, _)| *name == driver) {
        return Err(StorageError::Unsupported { driver: driver.to_owned(), reason });
    }
    if !DRIVERS.contains(&driver) && driver != "tmpfs" {
        return Err(invalid(storage, format!("unknown storage driver {driver:?}")));
    }
    let made = Made::new(storage, point);
    let (mut pages, mut follower) = (None, None);
    let done = match driver {
        "local" => make_local(storage, point),
        "bind" => make_bind(storage, point),
        "watchable-bind" => make_copy(storage, point, modules).map(|it| follower = it),
        "virtio-fs" => mount_filesystem(storage, point, modules, "virtiofs"),
        "overlayfs" => make_overlay(storage, point, modules),
        "ephemeral" | "tmpfs" => make_ephemeral(storage, point, modules).map(|it| pages = it),
        // Of a pod's own container: any other is made by a service.
        served::PULL => make_empty_root(point, modules),
        _ => make_disk(storage, point, modules),
    };
    if done.is_err() && made.own_directory {
        // The failure is what matters; an empty directory left behind is not.
        let _ = std::fs::remove_dir(point);
    }
    done.map(|()| Made { pages, follower, ..made })
}

fn make_directory(path: &Path) -> Result<(), StorageError> {
    std::fs::create_dir_all(path).map_err(system("making directory", path))
}

/// Mounts the storage's own type, or `default` where it names none.
fn mount_filesystem(
    storage: &Storage,
    point: &Path,
    modules: &Modules,
    default: &str,
) -> Result<(), StorageError> {
    let kind = if storage.fstype.is_empty() { default } else { storage.fstype.as_str() };
    let options = options::parse(&storage.options);
    if options.data.len() > OPTIONS_FIT {
        let reason = format!("{} bytes of options, the kernel takes {OPTIONS_FIT}", options.data.len());
        return Err(invalid(storage, reason));
    }
    modules.want(kind).map_err(|source| StorageError::Module { mount_point: point.to_owned(), source })?;
    make_directory(point)?;
    let source = if storage.source.is_empty() { kind } else { storage.source.as_str() };
    mount_with(source, point, kind, &options)
}

fn mount_with(source: &str, point: &Path, kind: &str, options: &MountOptions) -> Result<(), StorageError> {
    let data = CString::new(options.data.as_str())
        .map_err(|source| StorageError::Data { mount_point: point.to_owned(), source })?;
    let data = Some(data.as_c_str()).filter(|data| !data.is_empty());
    mount(source, point, kind, options.flags, data).map_err(|error| {
        let (mount_point, kind) = (point.to_owned(), kind.to_owned());
        match error {
            Errno::NODEV => StorageError::NoFileSystem { mount_point, kind },
            error => StorageError::Mount { kind, from: source.to_owned(), mount_point, source: error.into() },
        }
    })?;
    propagate(point, options)
}

fn propagate(point: &Path, options: &MountOptions) -> Result<(), StorageError> {
    let Some(propagation) = options.propagation else { return Ok(()) };
    mount_change(point, propagation).map_err(system("setting the propagation of", point))
}

fn make_overlay(storage: &Storage, point: &Path, modules: &Modules) -> Result<(), StorageError> {
    for option in &storage.driver_options {
        match option.split_once('=') {
            Some((CREATE_DIRECTORY, path)) => make_directory(Path::new(path))?,
            _ => return Err(invalid(storage, format!("unknown driver option {option:?}"))),
        }
    }
    mount_filesystem(storage, point, modules, "overlay")
}

fn make_bind(storage: &Storage, point: &Path) -> Result<(), StorageError> {
    let source = Path::new(&storage.source);
    let options = options::parse(&storage.options);
    let metadata = std::fs::metadata(source).map_err(system("looking at", source))?;
    if metadata.is_dir() {
        make_directory(point)?;
    } else {
        make_directory(point.parent().unwrap_or(point))?;
        let file = std::fs::OpenOptions::new().create(true).append(true).open(point);
        file.map_err(system("making file", point))?;
    }
    let bind =
        if options.recursive { mount_bind_recursive(source, point) } else { mount_bind(source, point) };
    bind.map_err(system("binding to", point))?;
    if !options.flags.is_empty() {
        // The kernel ignores all flags of the first call.
        let flags = options.flags | MountFlags::BIND;
        rustix::mount::mount_remount(point, flags, "").map_err(system("setting the flags of", point))?;
    }
    propagate(point, &options)
}

/// The file system on a disk, whose files may be a group's.
fn make_disk(storage: &Storage, point: &Path, modules: &Modules) -> Result<(), StorageError> {
    mount_filesystem(storage, point, modules, &storage.fstype)?;
    let readonly = options::parse(&storage.options).flags.contains(MountFlags::RDONLY);
    let Some(group) = storage.fs_group.as_ref().filter(|_| !readonly) else { return Ok(()) };
    group::give_tree(point, group).inspect_err(|_| take_down(point))
}

/// A copy of a small directory that the container may not write; anything else is bound.
fn make_copy(storage: &Storage, point: &Path, modules: &Modules) -> Result<Option<Follower>, StorageError> {
    let source = Path::new(&storage.source);
    let readonly = options::parse(&storage.options).flags.contains(MountFlags::RDONLY);
    if !(readonly && source.is_dir() && watch::fits(source)?) {
        return make_bind(storage, point).map(|()| None);
    }
    let mode = format!("mode={:o}", mode_of(source)?.as_raw_mode());
    let options = ["nosuid", "nodev", "size=4m", &mode].map(str::to_owned).to_vec();
    mount_filesystem(&Storage { options, ..Default::default() }, point, modules, "tmpfs")?;
    let copy = watch::Copy::new(source, point);
    match copy.update() {
        Ok(true) => Ok(Some(copy.follow())),
        // It has grown meanwhile.
        Ok(false) => {
            take_down(point);
            make_bind(storage, point).map(|()| None)
        }
        Err(error) => {
            take_down(point);
            Err(error)
        }
    }
}

fn make_ephemeral(
    storage: &Storage,
    point: &Path,
    modules: &Modules,
) -> Result<Option<Reserved>, StorageError> {
    let (group, options) = take_group(storage)?;
    let pages =
        (storage.fstype == hugepages::FILE_SYSTEM).then(|| Reserved::new(point, &options)).transpose()?;
    let plain = Storage { options, ..storage.clone() };
    let made = mount_filesystem(&plain, point, modules, "tmpfs");
    let made = made.and_then(|()| group::give_directory(point, group).inspect_err(|_| take_down(point)));
    match (made, pages) {
        (Ok(()), pages) => Ok(pages),
        (Err(error), pages) => {
            if let Some(Err(undo)) = pages.map(|pages| pages.release()) {
                tracing::warn!(error = crate::chain(&undo), "huge pages stay set aside");
            }
            Err(error)
        }
    }
}

/// Where only mounts will be, and their places.
fn make_empty_root(point: &Path, modules: &Modules) -> Result<(), StorageError> {
    let options = ["nosuid", "nodev", "size=1m", "mode=755"].map(str::to_owned).to_vec();
    mount_filesystem(&Storage { options, ..Default::default() }, point, modules, "tmpfs")
}

/// Unmounts what was mounted just now, after a failure that matters more.
fn take_down(point: &Path) {
    let _ = unmount(point, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
}

/// A directory on the guest's own root, gone with the sandbox.
fn make_local(storage: &Storage, point: &Path) -> Result<(), StorageError> {
    let (group, options) = take_group(storage)?;
    make_directory(point)?;
    for option in &options {
        let Some(mode) = option.strip_prefix("mode=") else {
            return Err(invalid(storage, format!("unknown option {option:?} of a local directory")));
        };
        let mode =
            u32::from_str_radix(mode, 8).map_err(|_| invalid(storage, format!("bad mode {mode:?}")))?;
        chmod(point, Mode::from_raw_mode(mode)).map_err(system("setting the mode of", point))?;
    }
    group::give_directory(point, group)
}

/// Splits `fsgid=`, which is ours, from the filesystem's options; the request's group wins over it.
fn take_group(storage: &Storage) -> Result<(Option<u32>, Vec<String>), StorageError> {
    let mut group = None;
    let mut options = Vec::new();
    for option in &storage.options {
        match option.strip_prefix("fsgid=") {
            Some(id) => {
                let id = id.parse().map_err(|_| invalid(storage, format!("bad group {id:?}")))?;
                group = Some(id);
            }
            None => options.push(option.clone()),
        }
    }
    Ok((storage.fs_group.as_ref().map(|wanted| wanted.group_id).or(group), options))
}

fn mode_of(path: &Path) -> Result<Mode, StorageError> {
    let status = rustix::fs::stat(path).map_err(system("looking at", path))?;
    Ok(Mode::from_raw_mode(status.st_mode & 0o7777))
}

fn undo(point: &Path, made: &Made) -> Result<(), StorageError> {
    if let Some(follower) = &made.follower {
        follower.stop();
    }
    if made.mounted {
        match unmount(point, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::BUSY) => {
                tracing::warn!(mount_point = ?point, "still in use: detached");
                let flags = UnmountFlags::NOFOLLOW | UnmountFlags::DETACH;
                unmount(point, flags).map_err(system("detaching", point))?;
            }
            Err(error) => return Err(system("unmounting", point)(error)),
        }
    }
    if let Some(pages) = &made.pages {
        pages.release()?;
    }
    if made.pulled {
        served::forget(point);
        return Ok(());
    }
    if !made.own_directory {
        return Ok(());
    }
    let removed = match (made.mounted, point.is_dir()) {
        (true, true) => std::fs::remove_dir(point),
        (true, false) => std::fs::remove_file(point),
        (false, _) => std::fs::remove_dir_all(point),
    };
    removed.map_err(system("removing", point))
}

#[cfg(test)]
mod tests;

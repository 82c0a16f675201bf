//! How a root file system reaches the guest: shared, as disks that the guest mounts itself, or not at all where the guest pulls it,
//! see [`super::guest_pull`].
//!
//! ```text
//!   one image, written       disk ─▶ rootfs
//!   images, read only        disk ─▶ layers/0 ┐
//!                            disk ─▶ layers/1 ┴▶ overlay at rootfs, with a small tmpfs on top
//!   anything else            mounted on the host and shared, see the parent module
//! ```
//!
//! The tmpfs on top of what cannot be written takes the mount points that an image lacks; the container gets its root
//! read-only. An overlay that *is* written stays on the host: its upper directory belongs to the snapshot, which
//! containerd measures and commits, so an upper directory in the guest would lose what was written without a word.

use std::path::{Path, PathBuf};

use kata_api::agent::Storage;
use kata_api::guest;
use kata_hypervisor::PciPath;
use rustix::fs::{FileType, FsWord};

use super::StorageError;
use super::guest_pull::Pull;
use crate::pod::RootfsMount;

/// File systems of disks that our guest images mount. Others are left to the host's kernel.
const DISK_TYPES: [&str; 2] = ["erofs", "ext4"];
/// Most layers that are attached one by one: the machine's slots are the whole pod's.
const LAYERS_MAX: usize = 8;
/// The image of a layer, beside the directory where containerd's erofs snapshotter mounts it.
const LAYER_IMAGE: &str = "layer.erofs";
/// Driver option that has the agent make a directory of an overlay first.
const CREATE_DIRECTORY: &str = "io.katacontainers.volume.overlayfs.create_directory";
/// What statfs(2) calls an erofs.
const EROFS_MAGIC: FsWord = 0xe0f5_e1e2;
/// Size of the tmpfs that takes mount points.
const SCRATCH_SIZE: &str = "size=1m";

/// What is at a path of the host, as far as the choice depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// A block device or a regular file.
    Disk,
    /// The root of a mounted erofs.
    Erofs,
    /// A directory without entries.
    EmptyDirectory,
    /// There, and nothing of the above.
    Other,
    /// Nothing.
    Absent,
}

/// Looks at the host. What cannot be looked at is something else.
pub(crate) fn find(path: &Path) -> Found {
    match rustix::fs::stat(path).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::BlockDevice | FileType::RegularFile) => Found::Disk,
        Ok(FileType::Directory) if is_erofs(path) => Found::Erofs,
        Ok(FileType::Directory) => {
            match std::fs::read_dir(path).map(|mut entries| entries.next().is_none()) {
                Ok(true) => Found::EmptyDirectory,
                Ok(false) | Err(_) => Found::Other,
            }
        }
        Err(rustix::io::Errno::NOENT) => Found::Absent,
        Ok(_) | Err(_) => Found::Other,
    }
}

fn is_erofs(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|fs| fs.f_type == EROFS_MAGIC)
}

/// How a root file system reaches the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Rootfs {
    /// Mounted on the host and shared.
    Share,
    /// Attached as disks.
    Block(Block),
    /// Pulled by the guest.
    Pull(Pull),
}

/// A root file system on disks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Topmost first; a single one where the root is written.
    pub(crate) images: Vec<Image>,
    /// Whether the container's root cannot be written.
    pub(crate) readonly: bool,
}

/// A block device, or a file with a file system in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) path: PathBuf,
    pub(crate) fs_type: String,
    /// For the guest.
    pub(crate) options: Vec<String>,
}

impl Rootfs {
    /// Chooses for the mounts of `Task.Create`; `readonly` is what the specification says of the root.
    pub(crate) fn classify(
        mounts: &[RootfsMount],
        readonly: bool,
        find: impl Fn(&Path) -> Found,
    ) -> Result<Self, StorageError> {
        let [mount] = mounts else { return Ok(Self::Share) };
        if !matches!(mount.target.as_str(), "" | "/") {
            return Ok(Self::Share);
        }
        let block = if mount.fs_type == "overlay" {
            layers(mount, readonly, find)
        } else if DISK_TYPES.contains(&mount.fs_type.as_str()) {
            disk(mount, find)?
        } else {
            None
        };
        Ok(block.map_or(Self::Share, Self::Block))
    }
}

/// A mount of one disk: devmapper, blockfile, a view of one erofs layer.
fn disk(mount: &RootfsMount, find: impl Fn(&Path) -> Found) -> Result<Option<Block>, StorageError> {
    let path = PathBuf::from(&mount.source);
    match find(&path) {
        Found::Disk => {}
        Found::Absent => return Err(StorageError::Absent(path)),
        Found::Erofs | Found::EmptyDirectory | Found::Other => return Ok(None),
    }
    // A further device, or a journal beside: a path of the host.
    if mount.options.iter().any(|option| option.contains("=/")) {
        return Ok(None);
    }
    let readonly = mount.fs_type == "erofs" || mount.options.iter().any(|option| option == "ro");
    let loops = |option: &String| option == "loop" || option.starts_with("loop=");
    let mut options: Vec<String> = mount.options.iter().filter(|option| !loops(option)).cloned().collect();
    if readonly && !options.iter().any(|option| option == "ro") {
        options.push("ro".to_owned());
    }
    let image = Image { path, fs_type: mount.fs_type.clone(), options };
    Ok(Some(Block { images: vec![image], readonly }))
}

/// An overlay of erofs layers that nothing is written to.
fn layers(mount: &RootfsMount, readonly: bool, find: impl Fn(&Path) -> Found) -> Option<Block> {
    let value = |key| mount.options.iter().find_map(|option| option.strip_prefix(key));
    let unwritten =
        value("upperdir=").is_none_or(|upper| readonly && find(Path::new(upper)) == Found::EmptyDirectory);
    let names = super::mount::split_layers(value("lowerdir=")?);
    if !unwritten || names.len() > LAYERS_MAX {
        return None;
    }
    let images = names.iter().map(|name| {
        let path = Path::new(name).with_file_name(LAYER_IMAGE);
        let ours = find(Path::new(name)) == Found::Erofs && find(&path) == Found::Disk;
        ours.then(|| Image { path, fs_type: "erofs".to_owned(), options: vec!["ro".to_owned()] })
    });
    Some(Block { images: images.collect::<Option<_>>()?, readonly: true })
}

impl Block {
    /// What the agent is to mount, in order, where it finds the images at `disks`.
    pub(crate) fn storages(&self, container: &str, disks: &[PciPath]) -> Vec<Storage> {
        let points: Vec<String> = if self.readonly {
            (0..self.images.len()).map(|n| format!("{}/layers/{n}", directory(container))).collect()
        } else {
            vec![root(container)]
        };
        let blk = |((image, disk), point): ((&Image, &PciPath), &String)| Storage {
            driver: "blk".to_owned(),
            source: disk.0.clone(),
            fstype: image.fs_type.clone(),
            options: image.options.clone(),
            mount_point: point.clone(),
            ..Default::default()
        };
        let mut storages: Vec<Storage> = self.images.iter().zip(disks).zip(&points).map(blk).collect();
        if self.readonly {
            storages.extend(topped(container, &points.join(":")));
        }
        storages
    }
}

/// An overlay at [`root`] of `lower` and a tmpfs for mount points.
pub(crate) fn topped(container: &str, lower: &str) -> [Storage; 2] {
    let scratch = format!("{}/scratch", directory(container));
    let (upper, work) = (format!("{scratch}/upper"), format!("{scratch}/work"));
    let tmpfs = Storage {
        driver: "ephemeral".to_owned(),
        source: "tmpfs".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: [SCRATCH_SIZE, "mode=755"].map(str::to_owned).to_vec(),
        mount_point: scratch,
        ..Default::default()
    };
    let overlay = Storage {
        driver: "overlayfs".to_owned(),
        driver_options: [&upper, &work].map(|path| format!("{CREATE_DIRECTORY}={path}")).to_vec(),
        source: "overlay".to_owned(),
        fstype: "overlay".to_owned(),
        options: vec![format!("lowerdir={lower}"), format!("upperdir={upper}"), format!("workdir={work}")],
        mount_point: root(container),
        ..Default::default()
    };
    [tmpfs, overlay]
}

/// Where the guest mounts a root file system that is not in the share.
pub(crate) fn root(container: &str) -> String {
    format!("{}/rootfs", directory(container))
}

fn directory(container: &str) -> String {
    format!("{}/{container}", guest::CONTAINER_DIR)
}

#[cfg(test)]
mod tests;

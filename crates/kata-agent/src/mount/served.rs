//! Mounts that services of the guest make: pulled images, and volumes that only the guest can read.
//!
//! ```text
//!  image_guest_pull   PullImage(source, /run/kata-containers/c1)   ▶ …/c1/rootfs, …/c1/config.json
//!                     of a pod's own container                     ▶ …/c1/rootfs, an empty tmpfs: see crate::pause
//!  blk, … with encryption_key=ephemeral
//!                     SecureMount("block-device", deviceId, …)     ▶ the mount point
//! ```
//!
//! A service mounts in the agent's own mount namespace, and nothing tells it when the mount is over: the agent looks whether there
//! is one, and takes it down. What a call has left that failed goes as well.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kata_api::agent::Storage;
use kata_api::guest_services::SecureMountRequest;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, major, minor, statx};
use rustix::mount::{UnmountFlags, unmount};
use serde::Deserialize;

use super::error::{StorageError, invalid, system};
use crate::aside;
use crate::services::{ServiceError, Services};

/// The driver of images that a service pulls.
pub(super) const PULL: &str = "image_guest_pull";
/// Driver option that asks for a key which nobody else ever has.
pub const EPHEMERAL_KEY: &str = "encryption_key=ephemeral";
/// Driver option that comes with it: the disk is empty.
const CREATE: &str = "create_filesystem";
/// The file system on an encrypted disk, and how it is made: without a journal, and with few inodes, since what is on it goes
/// with the pod and initialising the integrity data of unused blocks takes long. Those of upstream's agent.
const FILE_SYSTEM: &str = "ext4";
const MKFS_OPTIONS: &str = "-O ^has_journal -m 0 -i 163840 -I 128";

/// An image that a storage asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name, as containers of Kubernetes write it.
    pub reference: String,
    /// Whether it is that of a pod's own container, which needs none.
    pub is_pods_own: bool,
    bundle: PathBuf,
}

/// The value of the driver option.
#[derive(Deserialize)]
struct Volume {
    #[serde(default)]
    metadata: Option<HashMap<String, String>>,
}

/// What tells a pod's own container from others, and its value then.
const CONTAINER_TYPE: [&str; 2] = ["io.kubernetes.cri.container-type", "io.kubernetes.cri-o.ContainerType"];
const SANDBOX: &str = "sandbox";

impl Image {
    /// What `storage` asks for; `None` where it is of another driver.
    ///
    /// # Errors
    /// [`StorageError::Invalid`].
    pub fn of(storage: &Storage) -> Result<Option<Self>, StorageError> {
        if storage.driver != PULL {
            return Ok(None);
        }
        let mut is_pods_own = false;
        for option in &storage.driver_options {
            let value = option.strip_prefix(PULL).and_then(|rest| rest.strip_prefix('='));
            let value = value.ok_or_else(|| invalid(storage, format!("unknown driver option {option:?}")))?;
            let volume: Volume = serde_json::from_str(value)
                .map_err(|error| invalid(storage, format!("driver option {PULL}: {error}")))?;
            let metadata = volume.metadata.unwrap_or_default();
            is_pods_own |=
                CONTAINER_TYPE.iter().any(|key| metadata.get(*key).is_some_and(|it| it == SANDBOX));
        }
        let point = Path::new(&storage.mount_point);
        let bundle = point.parent().filter(|_| point.ends_with("rootfs"));
        let bundle =
            bundle.ok_or_else(|| invalid(storage, "an image is mounted at a path that ends in rootfs"))?;
        if storage.source.is_empty() && !is_pods_own {
            return Err(invalid(storage, "no image is named"));
        }
        Ok(Some(Self { reference: storage.source.clone(), is_pods_own, bundle: bundle.to_owned() }))
    }

    /// What the image says of its process, as an OCI runtime specification.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.bundle.join("config.json")
    }
}

/// Has the image of `storage` pulled and mounted at `point`.
pub(super) async fn pull(
    services: &Services,
    storage: &Storage,
    image: &Image,
    point: &Path,
) -> Result<(), StorageError> {
    begin(storage, image).await?;
    let pulled = services.pull_image(&image.reference, &image.bundle).await;
    let digest = pulled.map_err(|source| service_error(storage, source));
    let done = match digest {
        Ok(digest) => mounted(storage, point).await.map(|()| {
            tracing::info!(image = image.reference, digest, mount_point = ?point, "image pulled in the guest");
        }),
        Err(error) => Err(error),
    };
    if done.is_err() {
        take_down(point).await;
        forget(point);
    }
    done
}

/// Removes what a pulled image has left beside its root, once that is no longer mounted.
pub(super) fn forget(point: &Path) {
    let _ = fs::remove_dir(point);
    if let Some(bundle) = point.parent() {
        // What is not there needs no removal, and what else is in the bundle is not the image's.
        let _ = fs::remove_file(bundle.join("config.json"));
        let _ = fs::remove_dir(bundle);
    }
}

/// Whether `storage`, which is a disk, asks to be encrypted.
pub(super) fn is_secure(storage: &Storage) -> Result<bool, StorageError> {
    let known = |option: &&String| [EPHEMERAL_KEY, CREATE].contains(&option.as_str());
    if let Some(option) = storage.driver_options.iter().find(|option| !known(option)) {
        return Err(invalid(storage, format!("unknown driver option {option:?} of a disk")));
    }
    match storage.driver_options.iter().any(|option| option == EPHEMERAL_KEY) {
        true if !matches!(storage.fstype.as_str(), "" | FILE_SYSTEM) => {
            Err(invalid(storage, format!("an encrypted disk has {FILE_SYSTEM}, not {:?}", storage.fstype)))
        }
        false if !storage.driver_options.is_empty() => {
            Err(invalid(storage, "file systems are made on encrypted disks only"))
        }
        secure => Ok(secure),
    }
}

/// Has the disk of `storage`, whose source is its device node, encrypted and mounted at `point`.
pub(super) async fn secure(
    services: &Services,
    storage: &Storage,
    point: &Path,
    integrity: bool,
) -> Result<(), StorageError> {
    fs::create_dir_all(point).map_err(system("making directory", point))?;
    let node = PathBuf::from(&storage.source);
    let device = fs::metadata(&node).map_err(system("looking at", &node))?.rdev();
    let options = [
        ("deviceId", format!("{}:{}", major(device), minor(device))),
        ("sourceType", "empty".to_owned()),
        ("targetType", "fileSystem".to_owned()),
        ("filesystemType", FILE_SYSTEM.to_owned()),
        ("mkfsOpts", MKFS_OPTIONS.to_owned()),
        ("encryptionType", "luks2".to_owned()),
        ("dataIntegrity", integrity.to_string()),
    ];
    let request = SecureMountRequest {
        volume_type: "block-device".to_owned(),
        options: options.map(|(name, value)| (name.to_owned(), value)).into(),
        mount_point: storage.mount_point.clone(),
        ..Default::default()
    };
    let made = services.secure_mount(request).await.map_err(|source| service_error(storage, source));
    let done = match made {
        Ok(()) => mounted(storage, point).await,
        Err(error) => Err(error),
    };
    if done.is_err() {
        take_down(point).await;
        let _ = fs::remove_dir(point);
    }
    done
}

fn service_error(storage: &Storage, source: ServiceError) -> StorageError {
    StorageError::Service { mount_point: storage.mount_point.clone(), source }
}

/// Makes the bundle of `image`, without what a service puts there: files that a host has copied would be taken for the image's.
async fn begin(storage: &Storage, image: &Image) -> Result<(), StorageError> {
    let (storage, bundle, config) = (storage.clone(), image.bundle.clone(), image.config());
    let look = move || {
        let root = Path::new(&storage.mount_point);
        let in_root = fs::read_dir(root).ok().and_then(|mut files| files.next()).is_some();
        for (path, found) in [(root, in_root), (&config, fs::symlink_metadata(&config).is_ok())] {
            if found {
                return Err(invalid(
                    &storage,
                    format!("an image is to be pulled, and {path:?} is there already"),
                ));
            }
        }
        fs::create_dir_all(&bundle).map_err(system("making directory", &bundle))
    };
    aside::within(aside::BOUND, format!("making the bundle of {}", image.reference), look).await?
}

/// Whether the service has done what it says.
async fn mounted(storage: &Storage, point: &Path) -> Result<(), StorageError> {
    match is_mount(point).await? {
        true => Ok(()),
        false => Err(StorageError::NotMounted { mount_point: storage.mount_point.clone() }),
    }
}

/// A file system of a broken service may keep whoever looks at it.
async fn is_mount(point: &Path) -> Result<bool, StorageError> {
    let path = point.to_owned();
    let look = move || {
        let found = statx(CWD, &path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::empty());
        match found.map_err(io::Error::from) {
            Ok(found) => Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(system("looking at", &path)(error)),
        }
    };
    aside::within(aside::BOUND, format!("looking at {}", point.display()), look).await?
}

/// Unmounts what a failed call has mounted.
async fn take_down(point: &Path) {
    let path = point.to_owned();
    let undo = move || {
        // Whatever is there is not what was asked for; where nothing is, there is nothing to do.
        let _ = unmount(&path, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH);
    };
    let _ = aside::within(aside::BOUND, format!("unmounting {}", point.display()), undo).await;
}

#[cfg(test)]
mod tests;

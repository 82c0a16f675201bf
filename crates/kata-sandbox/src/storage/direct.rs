//! Direct volumes: paths of the host that stand for a device, see [`kata_config::direct_volume`].

use std::borrow::Cow;
use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};

use kata_api::agent::{FSGroup, Storage};
use kata_api::guest;
use kata_api::types::FSGroupChangePolicy;
use kata_config::direct_volume::{ClaimError, Entry, MountInfo};
use kata_hypervisor::PciPath;

use super::StorageError;
use crate::state::{State, StateError};

/// A volume whose device the machine gets.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct DirectVolume {
    /// Its path on the host, where there need be nothing.
    path: PathBuf,
    /// What the storage driver has written of it.
    entry: Entry,
    /// Device or image file.
    pub(crate) device: PathBuf,
    /// Whether the guest may not write the device.
    pub(crate) readonly: bool,
    fs_type: String,
    options: Vec<String>,
    group: Option<FSGroup>,
}

/// That a pod is to be noted as the user of a direct volume.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Claim {
    entry: Entry,
    /// The volume's path.
    path: PathBuf,
    readonly: bool,
    /// The pod's directory: those of others are beside it.
    run_dir: PathBuf,
}

/// A pod is noted as the user of a direct volume, until this is dropped.
#[derive(Debug)]
pub(crate) struct Mark(Claim);

impl Claim {
    fn pod(&self) -> Cow<'_, str> {
        self.run_dir.file_name().unwrap_or_default().to_string_lossy()
    }

    /// Notes it. One of a pod that lives no more is taken over.
    ///
    /// # Errors
    /// [`StorageError::Taken`], and where nothing can be noted.
    pub(crate) fn mark(self) -> Result<Mark, StorageError> {
        let lives = |other: &OsStr| match State::load(&self.run_dir.with_file_name(other)) {
            Ok(pod) => pod.lives(),
            Err(StateError::Read { source, .. }) => source.kind() != io::ErrorKind::NotFound,
            // What cannot be understood may be another release's.
            Err(_) => true,
        };
        match self.entry.claim(&self.pod(), self.readonly, lives) {
            Ok(()) => Ok(Mark(self)),
            Err(ClaimError::Mark(error)) => {
                Err(StorageError::file("note the pod's use of a direct volume in", self.entry.dir(), error))
            }
            Err(source) => Err(StorageError::Taken { path: self.path, source }),
        }
    }
}

impl Mark {
    pub(crate) fn is_of(&self, claim: &Claim) -> bool {
        self.0 == *claim
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.0.entry.release(&self.0.pod());
    }
}

/// The direct volume that is called `path`, if there is one.
pub(crate) fn find(path: &Path) -> Result<Option<DirectVolume>, StorageError> {
    let entry = match Entry::of(path) {
        Ok(entry) => entry,
        // No driver can have written of it.
        Err(error) if error.kind() == io::ErrorKind::InvalidFilename => return Ok(None),
        Err(error) => return Err(StorageError::file("look for the direct volume", path, error)),
    };
    let info =
        entry.read().map_err(|error| StorageError::file("read what is said of", entry.dir(), error))?;
    info.map(|info| parse(path, entry, info)).transpose()
}

fn parse(path: &Path, entry: Entry, info: MountInfo) -> Result<DirectVolume, StorageError> {
    let refused = |reason: String| StorageError::DirectVolume { path: path.to_owned(), reason };
    if !matches!(info.volume_type.as_str(), "directvol" | "block") {
        let reason = format!("its type {:?} is neither \"directvol\" nor \"block\"", info.volume_type);
        return Err(refused(reason));
    }
    if info.fs_type.is_empty() || !info.device.is_absolute() {
        return Err(refused("it needs the path of a device and the type of its file system".to_owned()));
    }
    let given = info.metadata.get("fsGroup").filter(|group| !group.is_empty());
    let group = given.map(|group| -> Result<FSGroup, StorageError> {
        let policy = match info.metadata.get("fsGroupChangePolicy").map(String::as_str) {
            Some("OnRootMismatch") => FSGroupChangePolicy::OnRootMismatch,
            _ => FSGroupChangePolicy::Always,
        };
        let group_id = group.parse().map_err(|_| refused(format!("its fsGroup {group:?} is no number")))?;
        Ok(FSGroup { group_id, group_change_policy: policy.into(), ..Default::default() })
    });
    Ok(DirectVolume {
        path: path.to_owned(),
        entry,
        device: info.device,
        readonly: info.options.iter().any(|option| option == "ro"),
        fs_type: info.fs_type,
        options: info.options,
        group: group.transpose()?,
    })
}

impl DirectVolume {
    /// What is to be noted for the pod in `run_dir`.
    pub(crate) fn claim(&self, run_dir: &Path) -> Claim {
        let (entry, path) = (self.entry.clone(), self.path.clone());
        Claim { entry, path, readonly: self.readonly, run_dir: run_dir.to_owned() }
    }

    /// Where the guest mounts it.
    pub(crate) fn in_guest(&self) -> PathBuf {
        Path::new(guest::SANDBOX_DIR).join("storage").join(self.entry.dir().file_name().unwrap_or_default())
    }

    /// What the agent is to mount.
    pub(crate) fn storage(&self, disk: PciPath) -> Storage {
        Storage {
            driver: "blk".to_owned(),
            source: disk.0,
            fstype: self.fs_type.clone(),
            options: self.options.clone(),
            mount_point: self.in_guest().display().to_string(),
            fs_group: self.group.clone().into(),
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(info: &str) -> Result<DirectVolume, StorageError> {
        let entry = Entry::of(Path::new("/v")).unwrap();
        parse(Path::new("/v"), entry, serde_json::from_str(info).unwrap())
    }

    #[test]
    fn a_volume_is_mounted_by_its_drivers_word() {
        let volume = parsed(
            r#"{"volume-type": "block", "device": "/dev/sdf", "fstype": "ext4", "options": ["ro", "noatime"],
                "metadata": {"fsGroup": "4711", "fsGroupChangePolicy": "OnRootMismatch"}}"#,
        )
        .unwrap();
        assert!(volume.readonly);
        let storage = volume.storage(PciPath("10/01".to_owned()));
        assert_eq!((storage.driver.as_str(), storage.fstype.as_str()), ("blk", "ext4"));
        assert_eq!(storage.mount_point, "/run/kata-containers/sandbox/storage/L3Y=");
        let group = storage.fs_group.unwrap();
        assert_eq!((group.group_id, group.group_change_policy.value()), (4711, 1));
    }

    #[test]
    fn what_is_no_volume_of_a_device_is_refused_by_name() {
        for (info, why) in [
            (r#"{"volume-type": "spdkvol", "device": "/d", "fstype": "ext4"}"#, "spdkvol"),
            (r#"{"volume-type": "block", "device": "/d"}"#, "file system"),
            (r#"{"volume-type": "block", "device": "d", "fstype": "ext4"}"#, "path of a device"),
            (
                r#"{"volume-type": "block", "device": "/d", "fstype": "ext4", "metadata": {"fsGroup": "x"}}"#,
                "fsGroup",
            ),
        ] {
            let error = parsed(info).unwrap_err().to_string();
            assert!(error.contains("/v") && error.contains(why), "{error}");
        }
    }
}

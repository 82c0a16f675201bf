//! Direct volumes: what a storage driver of the node leaves for the runtime, so that a pod's machine gets the device of a
//! volume instead of a share of what the host has mounted.
//!
//! ```text
//!   CSI driver ── kata-ctl volume add ──▶ /run/kata-containers/shared/direct-volumes/<base64url(volume path)>/
//!                                           mountInfo.json       what to plug in, and how the guest mounts it
//!                                           <sandbox id>         empty: the pod that uses it
//!   kubelet ── bind of the volume path ──▶ the pod's owner looks there before it shares a path
//! ```
//!
//! Directory, names and fields are those of Kata Containers, whose CSI drivers write them.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use serde::{Deserialize, Serialize};
use thiserror::Error;

const ROOT: &str = "/run/kata-containers/shared/direct-volumes";
const MOUNT_INFO: &str = "mountInfo.json";
/// The longest name that file systems take.
const NAME_MAX: usize = 255;

/// `mountInfo.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountInfo {
    /// `directvol` or `block`: a block device, or an image file, with a file system.
    #[serde(rename = "volume-type")]
    pub volume_type: String,
    /// Device or file on the host.
    pub device: PathBuf,
    /// Type of the file system.
    #[serde(rename = "fstype", default)]
    pub fs_type: String,
    /// `fsGroup`, a number, and `fsGroupChangePolicy`, `Always` or `OnRootMismatch`. Others are not looked at.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// Mount options for the guest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// Why a pod cannot note that it uses a volume.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// Another does, and lives.
    #[error("pod {0} uses it: end that pod first, or give each a volume of its own")]
    Taken(String),
    /// The mark cannot be written.
    #[error(transparent)]
    Mark(#[from] io::Error),
}

/// The entry of one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry(PathBuf);

impl Entry {
    /// That of the volume at `path` of the host, whether or not there is one.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidFilename`] where the path is too long to be written as a name.
    pub fn of(path: &Path) -> io::Result<Self> {
        Self::below(Path::new(ROOT), path)
    }

    fn below(root: &Path, path: &Path) -> io::Result<Self> {
        let path = path.as_os_str().as_bytes();
        let padded = root.join(URL_SAFE.encode(path));
        let bare = root.join(URL_SAFE_NO_PAD.encode(path));
        let entry = if !padded.exists() && bare.exists() { bare } else { padded };
        match entry.file_name() {
            Some(name) if name.len() <= NAME_MAX => Ok(Self(entry)),
            _ => Err(io::ErrorKind::InvalidFilename.into()),
        }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.0
    }

    /// What is said of the volume; `None` where nothing is.
    ///
    /// # Errors
    /// The file cannot be read, or is not of the form.
    pub fn read(&self) -> io::Result<Option<MountInfo>> {
        match std::fs::read(self.0.join(MOUNT_INFO)) {
            Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes the entry, whole or not at all.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`]; or it cannot be written.
    pub fn write(&self, info: &MountInfo) -> io::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        let (file, growing) = (self.0.join(MOUNT_INFO), self.0.join("mountInfo.partial"));
        if file.exists() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.0)?;
        std::fs::write(&growing, serde_json::to_vec(info)?)?;
        std::fs::rename(growing, file)
    }

    /// Removes the entry. One that is not there is removed already.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self) -> io::Result<()> {
        match std::fs::remove_dir_all(&self.0) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            done => done,
        }
    }

    /// Notes that a pod uses the volume, in place of those that do not live any more. Where the pod only reads, others may
    /// use the volume as well.
    ///
    /// # Errors
    /// Another pod that lives uses it, or the mark cannot be written.
    pub fn claim(
        &self,
        sandbox: &str,
        readonly: bool,
        lives: impl Fn(&OsStr) -> bool,
    ) -> Result<(), ClaimError> {
        // Of two pods at once, one sees the other's mark. It is released with the descriptor.
        let directory = File::open(&self.0)?;
        directory.lock()?;
        for other in self.sandboxes()?.iter().filter(|other| *other != sandbox) {
            if !lives(other) {
                std::fs::remove_file(self.0.join(other))?;
            } else if !readonly {
                return Err(ClaimError::Taken(other.to_string_lossy().into_owned()));
            }
        }
        Ok(std::fs::write(self.0.join(sandbox), "")?)
    }

    /// Notes that the pod does not use it any more.
    pub fn release(&self, sandbox: &str) {
        // The driver may have removed the entry before.
        let _ = std::fs::remove_file(self.0.join(sandbox));
    }

    /// The pod that uses it.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn sandbox(&self) -> io::Result<Option<OsString>> {
        Ok(self.sandboxes()?.into_iter().next())
    }

    fn sandboxes(&self) -> io::Result<Vec<OsString>> {
        let names = std::fs::read_dir(&self.0)?.map(|entry| Ok(entry?.file_name()));
        let names: io::Result<Vec<OsString>> = names.collect();
        Ok(names?.into_iter().filter(|name| !name.as_bytes().starts_with(b"mountInfo.")).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(root: &Path) -> Entry {
        Entry::below(root, Path::new("/kubelet/kata-test-vol-001/volume001")).unwrap()
    }

    #[test]
    fn an_entry_is_where_upstreams_drivers_write_it() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("L2t1YmVsZXQva2F0YS10ZXN0LXZvbC0wMDEvdm9sdW1lMDAx");
        std::fs::create_dir(&path).unwrap();
        let text =
            r#"{"volume-type":"directvol","device":"/dev/loop0","fstype":"ext4","metadata":{},"options":[]}"#;
        std::fs::write(path.join("mountInfo.json"), text).unwrap();
        let info = entry(root.path()).read().unwrap().unwrap();
        assert_eq!((info.device.as_path(), info.fs_type.as_str()), (Path::new("/dev/loop0"), "ext4"));
        assert_eq!(entry(root.path()).dir(), path);
    }

    #[test]
    fn an_entry_without_padding_is_found_too() {
        let root = tempfile::tempdir().unwrap();
        let bare = root.path().join("L3ZvbA");
        assert!(Entry::below(root.path(), Path::new("/vol")).unwrap().dir().ends_with("L3ZvbA=="));
        std::fs::create_dir(&bare).unwrap();
        assert_eq!(Entry::below(root.path(), Path::new("/vol")).unwrap().dir(), bare);
    }

    #[test]
    fn an_entry_names_its_pod_and_goes_whole() {
        let root = tempfile::tempdir().unwrap();
        let entry = entry(root.path());
        assert_eq!(entry.read().unwrap(), None);
        let info = MountInfo { volume_type: "block".to_owned(), ..Default::default() };
        entry.write(&info).unwrap();
        assert_eq!(entry.write(&info).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(entry.sandbox().unwrap(), None);
        entry.claim("pod", false, |_| true).unwrap();
        assert_eq!(entry.sandbox().unwrap().unwrap(), "pod");
        entry.release("pod");
        assert_eq!(entry.sandbox().unwrap(), None);
        entry.remove().unwrap();
        entry.remove().unwrap();
        assert_eq!(entry.read().unwrap(), None);
    }

    #[test]
    fn a_mark_of_a_pod_that_lives_is_respected_and_a_dead_ones_taken_over() {
        let root = tempfile::tempdir().unwrap();
        let entry = entry(root.path());
        entry.write(&MountInfo::default()).unwrap();
        entry.claim("first", false, |_| true).unwrap();
        let refused = entry.claim("second", false, |other| other == "first").unwrap_err();
        assert!(refused.to_string().contains("pod first uses it"), "{refused}");
        assert_eq!(entry.sandboxes().unwrap(), ["first"]);
        // Its own it may write again.
        entry.claim("first", false, |_| true).unwrap();
        // Who only reads does not mind.
        entry.claim("reader", true, |_| true).unwrap();
        assert_eq!(entry.sandboxes().unwrap().len(), 2);
        entry.claim("second", false, |_| false).unwrap();
        assert_eq!(entry.sandboxes().unwrap(), ["second"]);
    }

    #[test]
    fn a_path_that_makes_no_name_is_refused() {
        let long = PathBuf::from(format!("/{}", "x".repeat(300)));
        assert_eq!(Entry::of(&long).unwrap_err().kind(), io::ErrorKind::InvalidFilename);
    }
}

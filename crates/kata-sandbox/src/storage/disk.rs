//! Disks for the machine: a look before it gets one, those that several containers use, and new ones for emptyDirs.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kata_api::agent::Storage;
use kata_api::guest;
use kata_hypervisor::process::Record;
use kata_hypervisor::{Disk, HypervisorError, PciPath, Vm};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use tokio::process::Command;
use tokio::sync::Mutex;

use super::StorageError;
use crate::blocking::blocking;

/// An emptyDir's file system, in its directory on the host: kubelet counts what it takes, and removes it.
const IMAGE: &str = "disk.img";

/// Checks that a disk is there and may be used, and that nothing on the host uses a device that the guest will write:
/// two kernels that write one file system destroy it.
pub(crate) fn claim(path: &Path, readonly: bool) -> Result<(), StorageError> {
    let failed = |error| match error {
        Errno::NOENT => StorageError::Absent(path.to_owned()),
        Errno::BUSY => StorageError::Busy(path.to_owned()),
        error => StorageError::file("open", path, error),
    };
    let stat = rustix::fs::stat(path).map_err(failed)?;
    let mut flags = OFlags::CLOEXEC | if readonly { OFlags::RDONLY } else { OFlags::RDWR };
    if !readonly && FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
        // On a device, it asks for one that is not mounted and that nobody else has claimed.
        flags |= OFlags::EXCL;
    }
    rustix::fs::open(path, flags, Mode::empty()).map(drop).map_err(failed)
}

/// Has the machine take a disk, and answers where the guest finds it.
pub(crate) async fn plug(vm: &dyn Vm, disk: Disk) -> Result<PciPath, StorageError> {
    let (path, readonly) = (disk.path.clone(), disk.readonly);
    let claimed = blocking(move || claim(&path, readonly)).await;
    claimed.unwrap_or(Err(StorageError::Interrupted))?;
    let path = disk.path.clone();
    let added = vm.add_disk(disk).await;
    added.map_err(|source| StorageError::Attach { path, source: Box::new(source) })
}

/// Disks of the pod's volumes: each is in the machine once, however many containers use it.
#[derive(Debug, Default)]
pub(crate) struct PodDisks(Mutex<HashMap<PathBuf, Attached>>);

#[derive(Debug)]
struct Attached {
    id: String,
    at: PciPath,
    readonly: bool,
    users: usize,
}

impl PodDisks {
    /// Has the machine take `disk` unless it has, and answers where the guest finds it.
    pub(crate) async fn attach(&self, vm: &dyn Vm, disk: Disk) -> Result<PciPath, StorageError> {
        let mut disks = self.0.lock().await;
        if let Some(attached) = disks.get_mut(&disk.path) {
            if attached.readonly && !disk.readonly {
                return Err(StorageError::ReadOnly(disk.path));
            }
            attached.users += 1;
            return Ok(attached.at.clone());
        }
        let (id, path, readonly) = (disk.id.clone(), disk.path.clone(), disk.readonly);
        let at = plug(vm, disk).await?;
        disks.insert(path, Attached { id, at: at.clone(), readonly, users: 1 });
        Ok(at)
    }

    /// Gives up a disk; the last to do so takes it from the machine.
    pub(crate) async fn detach(&self, vm: &dyn Vm, path: &Path) -> Result<(), HypervisorError> {
        let mut disks = self.0.lock().await;
        let Some(attached) = disks.get_mut(path) else { return Ok(()) };
        attached.users = attached.users.saturating_sub(1);
        if attached.users > 0 {
            return Ok(());
        }
        vm.remove_device(&attached.id).await?;
        disks.remove(path);
        Ok(())
    }

    /// The disk of an emptyDir, which stays as long as the pod. It is made with its first user.
    pub(crate) async fn of_empty_dir(
        &self,
        vm: &dyn Vm,
        record: &Record,
        id: String,
        volume: &Path,
    ) -> Result<PciPath, StorageError> {
        let path = volume.join(IMAGE);
        let mut disks = self.0.lock().await;
        if let Some(attached) = disks.get(&path) {
            return Ok(attached.at.clone());
        }
        record.file(&path)?;
        make_file_system(volume, &path).await?;
        let at = plug(vm, Disk { id: id.clone(), path: path.clone(), readonly: false }).await?;
        disks.insert(path, Attached { id, at: at.clone(), readonly: false, users: 1 });
        Ok(at)
    }
}

/// A file as large as all of the file system that it is on, with nothing in it: it takes what is written.
///
/// Without a journal, for nobody reads it after the machine has ended.
async fn make_file_system(volume: &Path, image: &Path) -> Result<(), StorageError> {
    let make = |volume: &Path| -> Result<(), Errno> {
        let size = rustix::fs::statvfs(volume)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(image, flags, Mode::from_raw_mode(0o600))?;
        rustix::fs::ftruncate(&file, size.f_blocks.saturating_mul(size.f_frsize))
    };
    make(volume).map_err(|error| StorageError::file("make", image, error))?;
    let failed = |reason: String| StorageError::Mkfs { path: image.to_owned(), reason };
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=1"]).arg(image);
    let made = mkfs.kill_on_drop(true).output().await;
    let made =
        made.map_err(|error| failed(format!("mkfs.ext4 cannot be run ({error}): install e2fsprogs")))?;
    if made.status.success() {
        return Ok(());
    }
    Err(failed(format!("mkfs.ext4: {}: {}", made.status, String::from_utf8_lossy(&made.stderr).trim())))
}

/// What the agent is to make of an emptyDir's disk at `disk`, and where the container's part of it is then.
pub(crate) fn empty_dir(
    disk: PciPath,
    volume: &Path,
    part: &Path,
) -> Result<(Vec<Storage>, PathBuf), StorageError> {
    let point = Path::new(guest::SANDBOX_DIR).join("disks").join(volume.file_name().unwrap_or_default());
    let whole = Storage {
        driver: "blk".to_owned(),
        source: disk.0,
        fstype: "ext4".to_owned(),
        mount_point: point.display().to_string(),
        shared: true,
        ..Default::default()
    };
    // Beside lost+found, which no emptyDir has.
    let files = point.join("files");
    let mut storages = vec![whole, directory(volume, &files)?];
    let path = below(&files, part);
    if !part.as_os_str().is_empty() {
        storages.push(directory(&volume.join(part), &path)?);
    }
    Ok((storages, path))
}

/// A part of a directory; the empty one is all of it.
pub(super) fn below(directory: &Path, part: &Path) -> PathBuf {
    directory.iter().chain(part.iter()).collect()
}

/// A directory of the guest with the mode and group of one on the host.
pub(super) fn directory(host: &Path, path: &Path) -> Result<Storage, StorageError> {
    let found = std::fs::metadata(host).map_err(|error| StorageError::file("look at", host, error))?;
    let mut options = vec![format!("mode={:o}", found.mode() & 0o7777)];
    options.extend((found.gid() != 0).then(|| format!("fsgid={}", found.gid())));
    Ok(Storage {
        driver: "local".to_owned(),
        options,
        mount_point: path.display().to_string(),
        shared: true,
        ..Default::default()
    })
}

//! Disks for the machine: a look before it gets one, those that several containers use, and new ones for emptyDirs.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kata_api::agent::Storage;
use kata_api::guest;
use kata_hypervisor::process::Record;
use kata_hypervisor::{Disk, HypervisorError, PciPath, Vm};
use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use tokio::process::Command;
use tokio::sync::Mutex;

use super::direct::{Claim, Mark};
use super::{Abort, StorageError};
use crate::blocking::blocking;

/// An emptyDir's file system, in its directory on the host: kubelet counts what it takes, and removes it.
const IMAGE: &str = "disk.img";
/// Driver options that have the agent encrypt a disk, see the agent's `mount::served`.
const ENCRYPT: [&str; 2] = ["encryption_key=ephemeral", "create_filesystem"];
/// For mkfs.ext4, which writes little.
const MKFS_BOUND: Duration = Duration::from_secs(60);

/// Checks that a disk is there and may be used, and that nothing on the host uses a device that the guest will write:
/// two kernels that write one file system destroy it. While the answer is held, no other machine gets it to write.
pub(crate) fn claim(path: &Path, readonly: bool) -> Result<OwnedFd, StorageError> {
    let failed = |error| match error {
        Errno::NOENT => StorageError::Absent(path.to_owned()),
        Errno::BUSY | Errno::WOULDBLOCK => StorageError::Busy(path.to_owned()),
        error => StorageError::file("open", path, error),
    };
    let stat = rustix::fs::stat(path).map_err(failed)?;
    let mut flags = OFlags::CLOEXEC | if readonly { OFlags::RDONLY } else { OFlags::RDWR };
    let kind = FileType::from_raw_mode(stat.st_mode);
    if !readonly && kind == FileType::BlockDevice {
        // On a device, it asks for one that is not mounted and that nobody else has claimed.
        flags |= OFlags::EXCL;
    }
    let held = rustix::fs::open(path, flags, Mode::empty()).map_err(failed)?;
    if !readonly && kind == FileType::RegularFile {
        rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive).map_err(failed)?;
    }
    Ok(held)
}

/// Has the machine take a disk, and answers what keeps it from other machines and where the guest finds it.
pub(crate) async fn plug(vm: &dyn Vm, disk: Disk) -> Result<(OwnedFd, PciPath), StorageError> {
    let (path, readonly) = (disk.path.clone(), disk.readonly);
    let claimed = blocking(move || claim(&path, readonly)).await;
    let held = claimed.unwrap_or(Err(StorageError::Interrupted))?;
    let path = disk.path.clone();
    let added = vm.add_device(disk.into()).await;
    let at = added.map_err(|source| StorageError::Attach { path, source: Box::new(source) })?;
    Ok((held, at))
}

/// Disks of the pod's volumes: each is in the machine once, however many containers use it.
#[derive(Debug, Default)]
pub(crate) struct PodDisks {
    attached: Mutex<HashMap<Identity, Attached>>,
    /// Those of emptyDirs, by the image: each is made once, and nobody else waits for that.
    empty_dirs: Mutex<HashMap<PathBuf, Arc<Mutex<Option<PciPath>>>>>,
}

/// A disk, by whatever path: the numbers of a device, or those of a file system and a file in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Identity {
    Device(u64),
    File(u64, u64),
}

impl Identity {
    fn of(path: &Path) -> Result<Self, StorageError> {
        let stat = rustix::fs::stat(path).map_err(|error| match error {
            Errno::NOENT => StorageError::Absent(path.to_owned()),
            error => StorageError::file("look at", path, error),
        })?;
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::BlockDevice => Self::Device(stat.st_rdev),
            _ => Self::File(stat.st_dev, stat.st_ino),
        })
    }
}

#[derive(Debug)]
struct Attached {
    id: String,
    at: PciPath,
    readonly: bool,
    /// None while the guest has not given it back yet.
    users: usize,
    /// Keeps it from other machines.
    _held: OwnedFd,
    /// The direct volumes that it is.
    marks: Vec<Mark>,
}

/// Notes the pod as the user of a direct volume, if it is one. That looks into files which others may hold up.
async fn marked(claim: Option<Claim>) -> Result<Option<Mark>, StorageError> {
    let Some(claim) = claim else { return Ok(None) };
    blocking(move || claim.mark()).await.unwrap_or(Err(StorageError::Interrupted)).map(Some)
}

impl PodDisks {
    /// Has the machine take `disk` unless it has, and answers where the guest finds it. Of a direct volume, the pod is noted as
    /// its user first, for as long as the machine has the disk.
    pub(crate) async fn attach(
        &self,
        vm: &dyn Vm,
        disk: Disk,
        claim: Option<Claim>,
    ) -> Result<PciPath, StorageError> {
        let path = disk.path.clone();
        let identity = blocking(move || Identity::of(&path)).await;
        let identity = identity.unwrap_or(Err(StorageError::Interrupted))?;
        let mut disks = self.attached.lock().await;
        if let Some(attached) = disks.get(&identity)
            && attached.users == 0
        {
            let removed = vm.remove_device(&attached.id).await;
            removed.map_err(|source| StorageError::Attach {
                path: disk.path.clone(),
                source: Box::new(source),
            })?;
            disks.remove(&identity);
        }
        if let Some(attached) = disks.get_mut(&identity) {
            if attached.readonly && !disk.readonly {
                return Err(StorageError::ReadOnly(disk.path));
            }
            let new = claim.filter(|claim| !attached.marks.iter().any(|mark| mark.is_of(claim)));
            attached.marks.extend(marked(new).await?);
            attached.users += 1;
            return Ok(attached.at.clone());
        }
        let marks = marked(claim).await?.into_iter().collect();
        let (id, readonly) = (disk.id.clone(), disk.readonly);
        let (held, at) = plug(vm, disk).await?;
        disks.insert(identity, Attached { id, at: at.clone(), readonly, users: 1, _held: held, marks });
        Ok(at)
    }

    /// Gives up a disk; the last to do so takes it from the machine.
    pub(crate) async fn detach(&self, vm: &dyn Vm, at: &PciPath) -> Result<(), HypervisorError> {
        let mut disks = self.attached.lock().await;
        let found = disks.iter_mut().find(|(_, attached)| attached.at == *at);
        let Some((&identity, attached)) = found else { return Ok(()) };
        attached.users = attached.users.saturating_sub(1);
        if attached.users > 0 {
            return Ok(());
        }
        vm.remove_device(&attached.id).await?;
        disks.remove(&identity);
        Ok(())
    }

    /// Leaves a disk of a machine that has ended to others.
    pub(crate) async fn forget(&self, at: &PciPath) {
        self.attached.lock().await.retain(|_, attached| attached.at != *at);
    }

    /// Leaves all disks of a machine that has ended to others.
    pub(crate) async fn forget_all(&self) {
        self.attached.lock().await.clear();
    }

    /// The disk of an emptyDir, which stays as long as the pod. It is made with its first user.
    pub(crate) async fn of_empty_dir(
        &self,
        vm: &dyn Vm,
        record: &Record,
        id: String,
        made_of: EmptyDisk<'_>,
        abort: &mut Abort,
    ) -> Result<PciPath, StorageError> {
        let path = made_of.volume.join(IMAGE);
        let place = self.empty_dirs.lock().await.entry(path.clone()).or_default().clone();
        let mut made = abort.unless(async { Ok(place.lock().await) }).await?;
        if let Some(at) = &*made {
            return Ok(at.clone());
        }
        record.file(&path)?;
        let image = abort.unless(made_of.make(&path)).await?;
        let identity = Identity::of(&path)?;
        let disk = Disk { id: id.clone(), path: path.clone(), readonly: false };
        let (held, at) = plug(vm, disk).await?;
        image.keep();
        let attached =
            Attached { id, at: at.clone(), readonly: false, users: 1, _held: held, marks: Vec::new() };
        self.attached.lock().await.insert(identity, attached);
        *made = Some(at.clone());
        Ok(at)
    }
}

/// An image that goes again unless it is kept: the next try makes it anew.
#[derive(Debug)]
struct Unfinished<'a>(Option<&'a Path>);

impl Unfinished<'_> {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0
            && let Err(error) = std::fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "an emptyDir's unfinished image stays");
        }
    }
}

/// An emptyDir that is a disk.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EmptyDisk<'a> {
    /// Its directory on the host.
    pub(crate) volume: &'a Path,
    /// Whether the guest encrypts it, with a key that nobody else has, and makes the file system then.
    pub(crate) encrypted: bool,
}

impl EmptyDisk<'_> {
    /// Makes the image.
    async fn make<'a>(&self, image: &'a Path) -> Result<Unfinished<'a>, StorageError> {
        let unfinished = make_image(self.volume, image)?;
        if !self.encrypted {
            make_file_system(image).await?;
        }
        Ok(unfinished)
    }

    /// What the agent is to make of the disk at `disk`, and where the container's part of it is then.
    pub(crate) fn storages(
        &self,
        disk: PciPath,
        part: &Path,
    ) -> Result<(Vec<Storage>, PathBuf), StorageError> {
        let name = self.volume.file_name().unwrap_or_default();
        let point = Path::new(guest::SANDBOX_DIR).join("disks").join(name);
        let options: &[&str] = if self.encrypted { &ENCRYPT } else { &[] };
        let whole = Storage {
            driver: "blk".to_owned(),
            driver_options: options.iter().map(|option| (*option).to_owned()).collect(),
            source: disk.0,
            fstype: "ext4".to_owned(),
            mount_point: point.display().to_string(),
            shared: true,
            ..Default::default()
        };
        // Beside lost+found, which no emptyDir has.
        let files = point.join("files");
        let mut storages = vec![whole, directory(self.volume, &files)?];
        let path = below(&files, part);
        if !part.as_os_str().is_empty() {
            storages.push(directory(&self.volume.join(part), &path)?);
        }
        Ok((storages, path))
    }
}

/// A file as large as all of the file system that it is on, with nothing in it: it takes what is written.
fn make_image<'a>(volume: &Path, image: &'a Path) -> Result<Unfinished<'a>, StorageError> {
    let make = |volume: &Path| -> Result<Unfinished<'a>, Errno> {
        let size = rustix::fs::statvfs(volume)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(image, flags, Mode::from_raw_mode(0o600))?;
        let unfinished = Unfinished(Some(image));
        rustix::fs::ftruncate(&file, size.f_blocks.saturating_mul(size.f_frsize))?;
        Ok(unfinished)
    };
    make(volume).map_err(|error| StorageError::file("make", image, error))
}

/// Without a journal, for nobody reads it after the machine has ended.
async fn make_file_system(image: &Path) -> Result<(), StorageError> {
    let failed = |reason: String| StorageError::Mkfs { path: image.to_owned(), reason };
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "nodiscard,lazy_itable_init=1"]).arg(image);
    let made = tokio::time::timeout(MKFS_BOUND, mkfs.kill_on_drop(true).output()).await;
    let made = made.map_err(|_| {
        let bound = MKFS_BOUND.as_secs();
        failed(format!("mkfs.ext4 has not ended within {bound} s: see whether the node's disk is stuck"))
    })?;
    let made =
        made.map_err(|error| failed(format!("mkfs.ext4 cannot be run ({error}): install e2fsprogs")))?;
    if made.status.success() {
        return Ok(());
    }
    Err(failed(format!("mkfs.ext4: {}: {}", made.status, String::from_utf8_lossy(&made.stderr).trim())))
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

//! A container's files on their way into the guest, and their release: its root, its volumes, the pod's shared memory.
//!
//! | what | way |
//! |---|---|
//! | a root on disks, see [`rootfs`] | attached to the machine; the agent mounts it |
//! | any other root | through the share |
//! | a volume | through the share; without one, a small file is copied |
//! | `/dev/shm` of the pod | a tmpfs of the guest, made with the first container that takes part and gone with the last |

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kata_api::agent::Storage;
use kata_hypervisor::{Disk, PciPath};
use rustix::fs::FsWord;
use tokio::sync::watch;

use super::{Link, Pod};
use crate::blocking::blocking;
use crate::error::SandboxError;
use crate::guest_spec::{self, GuestSpec, ROOTFS};
use crate::pod::ProcessId;
use crate::storage::rootfs::{self, Block, Rootfs};
use crate::storage::{self, SharedFiles, SharedRoot, StorageError};

/// Size of a pod's shared memory where the host's own tells none, in bytes.
const SHM_DEFAULT: u64 = 64 * 1024 * 1024;
/// What statfs(2) calls a tmpfs.
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// What a container holds of host and machine.
#[derive(Debug, Default)]
pub(crate) struct ContainerFiles {
    shared: Option<SharedFiles>,
    /// Names of its disks among the machine's devices.
    disks: Vec<String>,
}

/// Chooses the way of the root.
pub(super) async fn choose(
    id: &ProcessId,
    root: &SharedRoot,
    guest: &GuestSpec,
) -> Result<Rootfs, SandboxError> {
    let (mounts, readonly) = (root.mounts.clone(), guest.root_readonly());
    // A look at a file of a dead server takes long.
    let chosen = blocking(move || Rootfs::classify(&mounts, readonly, rootfs::find)).await;
    chosen.unwrap_or(Err(StorageError::Interrupted)).map_err(|source| storage_error(id, source))
}

/// Whether the files cannot be prepared before the guest is up.
pub(super) fn need_guest(pod: &Pod, way: &Rootfs, guest: &GuestSpec) -> bool {
    matches!(way, Rootfs::Block(_)) || (pod.share.is_none() && !guest.volumes.is_empty())
}

/// Prepares a container's files, and says what the agent has to mount. What was made before a failure is undone.
pub(super) async fn add(
    pod: &Arc<Pod>,
    link: &watch::Receiver<Link>,
    id: &ProcessId,
    root: (Rootfs, SharedRoot),
    guest: &mut GuestSpec,
) -> Result<(ContainerFiles, Vec<Storage>), SandboxError> {
    let mut files = ContainerFiles::default();
    match files.fill(pod, link, id, root, guest).await {
        Ok(storages) => Ok((files, storages)),
        Err(error) => {
            files.release(pod, link).await;
            Err(match &*link.borrow() {
                Link::Down(cause) => cause.clone(),
                Link::Pending | Link::Up(_) => error,
            })
        }
    }
}

impl ContainerFiles {
    /// Whether some of them are on disks of the machine.
    pub(super) fn has_disks(&self) -> bool {
        !self.disks.is_empty()
    }

    async fn fill(
        &mut self,
        pod: &Arc<Pod>,
        link: &watch::Receiver<Link>,
        id: &ProcessId,
        (way, root): (Rootfs, SharedRoot),
        guest: &mut GuestSpec,
    ) -> Result<Vec<Storage>, SandboxError> {
        let name = &id.container;
        let failed = |source| storage_error(id, source);
        let mut storages: Vec<Storage> = guest.shm.as_deref().map(pod_shm).into_iter().collect();
        let shared = match way {
            Rootfs::Share => Some(root),
            Rootfs::Block(block) if pod.vm.capabilities().hotplug_block => {
                let disks = self.attach(pod, &block).await.map_err(failed)?;
                storages.extend(block.storages(name, &disks));
                guest.set_root(&rootfs::root(name), block.readonly || guest.root_readonly());
                tracing::info!(container = name, disks = ?block.images, "its root is attached to the machine");
                None
            }
            Rootfs::Block(block) => {
                tracing::info!(
                    container = name,
                    machine = %pod.config.hypervisor.qemu.machine_type,
                    "its root is mounted on the host and shared: disks cannot be added to this machine"
                );
                if block.readonly {
                    let lower = guest_spec::in_share(name).join(ROOTFS);
                    storages.extend(rootfs::topped(name, &lower.display().to_string()));
                    guest.set_root(&rootfs::root(name), true);
                }
                Some(root)
            }
        };
        if pod.share.is_some() {
            self.share(pod, name, shared, guest).await.map_err(failed)?;
        } else if let Some(root) = shared {
            return Err(failed(StorageError::NoShare(root.path)));
        } else {
            let agent = Link::agent(link).await?;
            for volume in &guest.volumes {
                let target = guest_spec::in_share(name).join(&volume.name);
                storage::copy(&agent, volume, &target).await.map_err(failed)?;
            }
        }
        Ok(storages)
    }

    async fn attach(&mut self, pod: &Pod, block: &Block) -> Result<Vec<PciPath>, StorageError> {
        let mut disks = Vec::with_capacity(block.images.len());
        for image in &block.images {
            let (path, readonly) = (image.path.clone(), block.readonly);
            let claimed = blocking(move || storage::claim(&path, readonly)).await;
            claimed.unwrap_or(Err(StorageError::Interrupted))?;
            let id = format!("disk{}", pod.next_disk.fetch_add(1, Ordering::Relaxed));
            let disk = Disk { id: id.clone(), path: image.path.clone(), readonly };
            let added = pod.vm.add_disk(disk).await;
            disks.push(added.map_err(|source| StorageError::Attach {
                path: image.path.clone(),
                source: Box::new(source),
            })?);
            self.disks.push(id);
        }
        Ok(disks)
    }

    async fn share(
        &mut self,
        pod: &Arc<Pod>,
        name: &str,
        root: Option<SharedRoot>,
        guest: &GuestSpec,
    ) -> Result<(), StorageError> {
        if root.is_none() && guest.volumes.is_empty() {
            return Ok(());
        }
        let (pod, name, volumes) = (pod.clone(), name.to_owned(), guest.volumes.clone());
        let add =
            move || pod.share.as_ref().map(|share| share.add(&name, root.as_ref(), &volumes)).transpose();
        self.shared = blocking(add).await.unwrap_or(Err(StorageError::Interrupted))?;
        Ok(())
    }

    /// Gives everything back, once the agent has let go of it. A machine that has ended has no disks to give back.
    pub(super) async fn release(self, pod: &Pod, link: &watch::Receiver<Link>) {
        for disk in self.disks.iter().rev() {
            if matches!(&*link.borrow(), Link::Down(_)) {
                break;
            }
            if let Err(error) = pod.vm.remove_device(disk).await {
                tracing::warn!(pod = %pod.id, disk, error = %crate::error::chain(&error), "the guest keeps a disk; the pod's end takes it");
            }
        }
        if let Some(mut shared) = self.shared {
            // It can only fail by a panic, and what is left then is in the leak record.
            let _ = blocking(move || shared.release()).await;
        }
    }
}

/// The pod's shared memory, of the size that it has on the host: the agent makes it once, whoever asks.
fn pod_shm(host: &Path) -> Storage {
    let size = rustix::fs::statfs(host).ok().filter(|fs| fs.f_type == TMPFS_MAGIC).and_then(|fs| {
        let block = u64::try_from(fs.f_bsize).ok()?;
        fs.f_blocks.checked_mul(block).filter(|size| *size > 0)
    });
    let size = format!("size={}", size.unwrap_or(SHM_DEFAULT));
    Storage {
        driver: "ephemeral".to_owned(),
        source: "shm".to_owned(),
        fstype: "tmpfs".to_owned(),
        options: ["noexec", "nosuid", "nodev", "mode=1777", &size].map(str::to_owned).to_vec(),
        mount_point: guest_spec::pod_shm().display().to_string(),
        ..Default::default()
    }
}

fn storage_error(id: &ProcessId, source: StorageError) -> SandboxError {
    SandboxError::Storage { process: id.clone(), source: Arc::new(source) }
}

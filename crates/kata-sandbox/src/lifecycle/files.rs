//! A container's files on their way into the guest, and their release: its root, its volumes, the pod's shared memory.
//!
//! | what | way |
//! |---|---|
//! | a root on disks, see [`rootfs`] | attached to the machine; the agent mounts it |
//! | a root that the guest pulls, see [`guest_pull`](crate::storage::guest_pull) | none: the agent has it pulled |
//! | any other root | through the share |
//! | a volume | as [`volume`] chooses |
//! | `/dev/shm` of the pod | a tmpfs of the guest, made with the first container that takes part |

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use kata_api::agent::{Device, Storage};
use kata_api::guest;
use kata_config::Feature;
use kata_hypervisor::{Disk, PciPath};
use rustix::fs::FsWord;
use tokio::sync::watch;

use super::{Link, Pod};
use crate::agent_client::Agent;
use crate::blocking::blocking;
use crate::error::{SandboxError, chain};
use crate::guest_spec::{self, GuestSpec, ROOTFS, Volume};
use crate::pod::ProcessId;
use crate::storage::block_device::{self, BlockDevice};
use crate::storage::direct::Claim;
use crate::storage::guest_pull::Pull;
use crate::storage::rootfs::{self, Block, Rootfs};
use crate::storage::volume::{self, Ground, Way};
use crate::storage::{self, Abort, EmptyDisk, Mirror, SharedFiles, SharedRoot, SharedVolume, StorageError};

/// Size of a pod's shared memory where the host's own tells none, in bytes.
const SHM_DEFAULT: u64 = 64 * 1024 * 1024;
/// What statfs(2) calls a tmpfs.
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// What a container holds of host and machine.
#[derive(Debug, Default)]
pub(crate) struct ContainerFiles {
    shared: Option<SharedFiles>,
    /// Names of its disks among the machine's devices, and what keeps them from other machines.
    disks: Vec<(String, OwnedFd)>,
    /// Devices of its direct and raw volumes.
    devices: Vec<(PathBuf, PciPath)>,
    mirrors: Vec<Mirror>,
    /// Where the guest has its copies.
    copies: Option<String>,
}

/// The ways of a container's files.
pub(super) struct Ways {
    root: Rootfs,
    volumes: Vec<(Volume, Way)>,
    devices: Vec<BlockDevice>,
}

/// What the agent is asked for, for a container's files.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) storages: Vec<Storage>,
    pub(super) devices: Vec<Device>,
}

/// Chooses the ways of the root and of the volumes.
pub(super) async fn choose(
    pod: &Arc<Pod>,
    id: &ProcessId,
    root: &SharedRoot,
    guest: &GuestSpec,
    abort: &mut Abort,
) -> Result<Ways, SandboxError> {
    let (mounts, readonly) = (root.mounts.clone(), guest.root_readonly());
    let (volumes, ground) = (guest.volumes.clone(), Ground::new(&pod.config, &guest.spec));
    let (pod, spec) = (pod.clone(), guest.spec.clone());
    let forced = pod.config.runtime.experimental.contains(&Feature::ForceGuestPull);
    let choose = move || -> Result<Ways, StorageError> {
        let root = match Pull::asked(&mounts, forced, spec.annotations().as_ref())? {
            Some(pull) => {
                pull.require(&pod.config, &pod.artefacts)?;
                Rootfs::Pull(pull)
            }
            None => Rootfs::classify(&mounts, readonly, rootfs::find)?,
        };
        let ways = volumes.into_iter().map(|volume| {
            let way = volume::choose(&volume, &ground)?;
            Ok((volume, way))
        });
        let volumes = ways.collect::<Result<_, StorageError>>()?;
        Ok(Ways { root, volumes, devices: block_device::asked(&spec)? })
    };
    // A look at a file of a dead server takes long.
    let chosen = abort.unless(async { blocking(choose).await.unwrap_or(Err(StorageError::Interrupted)) });
    chosen.await.map_err(|source| storage_error(id, source))
}

/// Whether the files cannot be prepared before the guest is up.
pub(super) fn need_guest(ways: &Ways) -> bool {
    let waits = |way: &Way| !matches!(way, Way::Share { .. } | Way::Guest { .. });
    matches!(ways.root, Rootfs::Block(_))
        || !ways.devices.is_empty()
        || ways.volumes.iter().any(|(_, way)| waits(way))
}

/// Prepares a container's files, and says what the agent has to mount. What was made before a failure is undone, and so where
/// the container is killed: what takes long is given up, and a step that changes machine or host is ended first.
pub(super) async fn add(
    pod: &Arc<Pod>,
    link: &watch::Receiver<Link>,
    id: &ProcessId,
    files: (Ways, SharedRoot),
    guest: &mut GuestSpec,
    abort: &mut Abort,
) -> Result<(ContainerFiles, Wanted), SandboxError> {
    let mut own = ContainerFiles::default();
    match own.fill(pod, link, id, files, guest, abort).await {
        Ok(wanted) => Ok((own, wanted)),
        Err(error) => {
            own.release(pod, link).await;
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
        !self.disks.is_empty() || !self.devices.is_empty()
    }

    async fn fill(
        &mut self,
        pod: &Arc<Pod>,
        link: &watch::Receiver<Link>,
        id: &ProcessId,
        (ways, root): (Ways, SharedRoot),
        guest: &mut GuestSpec,
        abort: &mut Abort,
    ) -> Result<Wanted, SandboxError> {
        let name = &id.container;
        let failed = |source| storage_error(id, source);
        let mut storages: Vec<Storage> = guest.shm.as_deref().map(pod_shm).into_iter().collect();
        let shared = self.root(pod, name, (ways.root, root), guest, &mut storages).await.map_err(failed)?;
        let mut through_share = Vec::new();
        for (number, (volume, way)) in ways.volumes.into_iter().enumerate() {
            let path = match way {
                Way::Share { own } => {
                    through_share.push((volume, own));
                    continue;
                }
                Way::Guest { storages: wanted, path } => {
                    storages.extend(wanted);
                    path
                }
                Way::Mirror | Way::Copy => {
                    let agent = Link::agent(link).await?;
                    let follows = way == Way::Mirror;
                    let copied = self.copy(pod, &agent, name, number, &volume, follows);
                    abort.unless(copied).await.map_err(failed)?
                }
                Way::Direct(direct) => {
                    let (device, claim) = (direct.device.clone(), direct.claim(&pod.run_dir));
                    let at = self.device(pod, device, direct.readonly, Some(claim)).await.map_err(failed)?;
                    storages.push(direct.storage(at));
                    direct.in_guest()
                }
                Way::EmptyDisk { volume, part, encrypted } => {
                    let maker = EmptyDisk { volume: &volume, encrypted };
                    let disk =
                        pod.disks.of_empty_dir(&*pod.vm, &pod.record, disk_id(pod), maker, abort).await;
                    let (wanted, path) = disk.and_then(|disk| maker.storages(disk, &part)).map_err(failed)?;
                    storages.extend(wanted);
                    path
                }
            };
            guest.place(&volume, path);
        }
        let mut devices = Vec::with_capacity(ways.devices.len());
        for device in ways.devices {
            let at = self.device(pod, device.path.clone(), device.readonly, None).await.map_err(failed)?;
            devices.push(device.device(at));
        }
        self.share(pod, name, shared, through_share, guest).await.map_err(failed)?;
        Ok(Wanted { storages, devices })
    }

    /// Brings the root on its way; what comes back has to be shared.
    async fn root(
        &mut self,
        pod: &Pod,
        name: &str,
        (way, root): (Rootfs, SharedRoot),
        guest: &mut GuestSpec,
        storages: &mut Vec<Storage>,
    ) -> Result<Option<SharedRoot>, StorageError> {
        let root = match way {
            Rootfs::Share => Some(root),
            Rootfs::Pull(pull) => {
                storages.push(pull.storage(name));
                guest.set_root(&rootfs::root(name), guest.root_readonly());
                tracing::info!(container = name, image = pull.image(), "the guest pulls its root");
                None
            }
            Rootfs::Block(block) if pod.vm.capabilities().hotplug_block => {
                let disks = self.attach(pod, &block).await?;
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
        match root {
            Some(root) if pod.share.is_none() => {
                let offers = pod.vm.capabilities();
                Err(match offers.shared_fs || offers.hotplug_block {
                    true => StorageError::NoShare(root.path),
                    false => StorageError::NoWay { path: root.path, driver: pod.choice.driver },
                })
            }
            root => Ok(root),
        }
    }

    async fn attach(&mut self, pod: &Pod, block: &Block) -> Result<Vec<PciPath>, StorageError> {
        let mut disks = Vec::with_capacity(block.images.len());
        for image in &block.images {
            let id = disk_id(pod);
            let disk = Disk { id: id.clone(), path: image.path.clone(), readonly: block.readonly };
            let (held, at) = storage::plug(&*pod.vm, disk).await?;
            disks.push(at);
            self.disks.push((id, held));
        }
        Ok(disks)
    }

    /// Copies a volume; the answer is where the guest has it.
    async fn copy(
        &mut self,
        pod: &Pod,
        agent: &Agent,
        name: &str,
        number: usize,
        volume: &Volume,
        follows: bool,
    ) -> Result<PathBuf, StorageError> {
        let copies = Path::new(guest::CONTAINER_DIR).join(name).join("volumes");
        let target = copies.join(number.to_string());
        self.copies = Some(copies.display().to_string());
        if follows {
            self.mirrors.push(Mirror::start(agent, pod.changes(), &volume.source, &target).await?);
        } else {
            storage::copy(agent, volume, &target).await?;
        }
        Ok(target)
    }

    /// Has the machine take a device that others of the pod may use too.
    async fn device(
        &mut self,
        pod: &Pod,
        path: PathBuf,
        readonly: bool,
        claim: Option<Claim>,
    ) -> Result<PciPath, StorageError> {
        let disk = Disk { id: disk_id(pod), path: path.clone(), readonly };
        let at = pod.disks.attach(&*pod.vm, disk, claim).await?;
        self.devices.push((path, at.clone()));
        Ok(at)
    }

    async fn share(
        &mut self,
        pod: &Arc<Pod>,
        name: &str,
        root: Option<SharedRoot>,
        volumes: Vec<(Volume, bool)>,
        guest: &mut GuestSpec,
    ) -> Result<(), StorageError> {
        if root.is_none() && volumes.is_empty() {
            return Ok(());
        }
        let wanted = |(volume, own): &(Volume, bool)| SharedVolume {
            source: volume.source.clone(),
            readonly: volume.readonly && !own,
            follows_host: volume.follows_host,
        };
        let (pod, name, shared) =
            (pod.clone(), name.to_owned(), volumes.iter().map(wanted).collect::<Vec<_>>());
        let add =
            move || pod.share.as_ref().map(|share| share.add(&name, root.as_ref(), &shared)).transpose();
        self.shared = blocking(add).await.unwrap_or(Err(StorageError::Interrupted))?;
        let names = self.shared.iter().flat_map(SharedFiles::volumes);
        for ((volume, _), name) in volumes.iter().zip(names) {
            guest.place(volume, Path::new(guest::SHARE_DIR).join(name));
        }
        Ok(())
    }

    /// Gives everything back, once the agent has let go of it. A machine that has ended has no disks to give back.
    pub(super) async fn release(self, pod: &Pod, link: &watch::Receiver<Link>) {
        drop(self.mirrors);
        let agent = match &*link.borrow() {
            Link::Up(agent) => Some(agent.clone()),
            Link::Pending | Link::Down(_) => None,
        };
        if let (Some(agent), Some(copies)) = (agent, &self.copies)
            && let Err(error) = agent.remove_file(copies).await
        {
            tracing::debug!(pod = %pod.id, copies, %error, "copies of files stay in the guest");
        }
        let over = || matches!(&*link.borrow(), Link::Down(_));
        let kept = |disk: &dyn std::fmt::Display, error: kata_hypervisor::HypervisorError| {
            tracing::warn!(pod = %pod.id, %disk, error = %chain(&error), "the guest keeps a disk; the pod's end takes it");
        };
        for (disk, _) in self.disks.iter().rev().take_while(|_| !over()) {
            if let Err(error) = pod.vm.remove_device(disk).await {
                kept(disk, error);
            }
        }
        for (device, at) in self.devices.iter().rev() {
            if over() {
                pod.disks.forget(at).await;
            } else if let Err(error) = pod.disks.detach(&*pod.vm, at).await {
                kept(&device.display(), error);
            }
        }
        if let Some(mut shared) = self.shared {
            // It can only fail by a panic, and what is left then is in the leak record.
            let _ = blocking(move || shared.release()).await;
        }
    }
}

fn disk_id(pod: &Pod) -> String {
    format!("disk{}", pod.next_disk.fetch_add(1, Ordering::Relaxed))
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
        shared: true,
        ..Default::default()
    }
}

fn storage_error(id: &ProcessId, source: StorageError) -> SandboxError {
    if matches!(source, StorageError::Killed) {
        return SandboxError::CreateCancelled(id.clone());
    }
    SandboxError::Storage { process: id.clone(), source: Arc::new(source) }
}

//! The driver of Cloud Hypervisor.
//!
//! ```text
//!   boot: cloud-hypervisor ─▶ vmm.ping ─▶ vm.create ─▶ vm.add-net with the taps … ─▶ vm.boot ─▶ guest runs
//! ```
//!
//! It gets its control socket, its console and what it boots as open descriptors, and taps along with the request that adds them.
//! It insists on names for its vsock device and for disks that are added, see [`Room`]. Its vsock device speaks the host's hybrid
//! protocol itself. It runs without capabilities in a mount, IPC and network namespace of its own, under its own seccomp filters.
//!
//! It starts a guest that resets itself anew: its event monitor tells of that, and it is ended.

mod api;
mod events;

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::net::unix::pipe;

use self::api::{
    Api, BalloonConfig, ConsoleConfig, CpusConfig, DiskConfig, FsConfig, MemoryConfig, NetConfig,
    PayloadConfig, PciDeviceInfo, VmConfig, VsockConfig,
};
use crate::files::{BootFiles, with_device};
use crate::life::Vmm;
use crate::process::{Child, Identity, Namespaces, Record, Spawn, capture};
use crate::rest::{Address, ApiError, Named, Room, vcpu_threads};
use crate::vm::{
    Capabilities, Device, Disk, Growth, HypervisorError, Layout, Nic, Origin, PciPath, ProcessInfo, Size, Vm,
    VmExit, VmSpec, no_host_devices, serial,
};

const DRIVER: &str = "Cloud Hypervisor";
/// For the guest to let go of a device.
const REMOVAL_BOUND: Duration = Duration::from_secs(10);
/// Between two looks whether it has: there is no event for it.
const LOOK_AGAIN: Duration = Duration::from_millis(50);
/// Context id of the guest. The host's side is a socket, so machines may have the same one.
const GUEST_CID: u32 = 3;
/// Memory is added in whole blocks of a Linux guest, in MiB.
const BLOCK_MIB: u64 = 128;
const MIB: u64 = 1 << 20;

/// A virtual machine run by Cloud Hypervisor.
pub(crate) struct CloudHypervisorVm {
    vmm: Vmm<Api>,
    /// Devices are added and removed one after the other.
    devices: tokio::sync::Mutex<Devices>,
    /// Changes of the size come one after the other, too.
    growth: tokio::sync::Mutex<Option<(Size, Growth)>>,
    grows: std::sync::OnceLock<(bool, bool)>,
    kvm: PathBuf,
}

/// What was added to the running machine.
#[derive(Debug, Default)]
struct Devices {
    room: Option<Room>,
    /// By name; a disk with the name it has for the VMM.
    added: BTreeMap<String, Option<Named>>,
}

impl CloudHypervisorVm {
    pub(crate) fn new() -> Self {
        Self::with_kvm("/dev/kvm")
    }

    fn with_kvm(kvm: impl Into<PathBuf>) -> Self {
        Self {
            vmm: Vmm::default(),
            devices: tokio::sync::Mutex::default(),
            growth: tokio::sync::Mutex::default(),
            grows: std::sync::OnceLock::new(),
            kvm: kvm.into(),
        }
    }

    /// What it says of itself once it runs a machine that may grow.
    #[cfg(test)]
    pub(crate) fn as_if_running() -> Capabilities {
        let vm = Self::new();
        let _ = vm.grows.set((true, true));
        vm.capabilities()
    }

    /// Starts the VMM and the guest in it. What runs when it fails is in `Life`.
    async fn start(&self, spec: VmSpec, record: &Record) -> Result<(), HypervisorError> {
        let identity = with_device(&spec.identity, &self.kvm)?;
        let room = Room::make(&spec, record)?;
        let files = BootFiles::open(&spec, &identity)?;
        let vsock = room.vsock(&spec.vsock, record)?;
        let (listener, way) = room.listener(record)?;
        let api = Api::new(Address::Inode(Arc::new(way)));
        let (events, events_end) = pipe_of(&spec, &identity)?;
        let (console, console_end) = pipe_of(&spec, &identity)?;

        let program = spec.program.clone();
        let mut spawn = Spawn::new("cloud-hypervisor", &program);
        let socket = spawn.hand_over(listener);
        let monitor = spawn.hand_over(events_end);
        let mut name = |fd: OwnedFd| format!("/proc/self/fd/{}", spawn.hand_over(fd));
        let names = Names {
            console: name(console_end),
            kernel: name(files.kernel),
            initrd: files.initrd.map(&mut name),
            disks: files
                .image
                .map(|fd| ("image".to_owned(), fd))
                .into_iter()
                .chain(files.disks)
                .map(|(id, fd)| (id, name(fd)))
                .collect(),
            shared_fs: spec.shared_fs.map(|fs| (fs.tag, name(fs.socket))),
            vsock,
        };
        let spec = VmSpec { shared_fs: None, ..spec };
        let config = machine(&spec, names);
        let child = spawn
            .args(["--api-socket", &format!("fd={socket}"), "--event-monitor", &format!("fd={monitor}")])
            .identity(identity)
            .namespaces(Namespaces { mount: true, ipc: true, network: true, pid: false })
            .spawn(record)
            .map_err(|source| HypervisorError::Start {
                name: "cloud-hypervisor",
                next: "install Cloud Hypervisor, or set hypervisor_name = \"qemu\"",
                source,
            })?;
        self.vmm.life.adopt(&child);
        self.watch(&child, console, events);
        self.devices.lock().await.room = Some(room);
        match self.bring_up(&api, &config, spec.nics).await {
            Ok(()) => {
                self.vmm.runs(api);
                Ok(())
            }
            Err(error) => Err(self.vmm.explain(error.into(), &program, &child).await),
        }
    }

    fn watch(&self, child: &Child, console: pipe::Receiver, events: pipe::Receiver) {
        let console = tokio::spawn(capture(console, self.vmm.life.console.clone(), "console".to_owned()));
        let (life, subject) = (Arc::clone(&self.vmm.life), child.clone());
        let events = tokio::spawn(async move {
            if events::until_reset(events).await {
                life.guest_reset(&subject);
            }
        });
        let (life, subject) = (Arc::clone(&self.vmm.life), child.clone());
        tokio::spawn(async move { life.supervise(subject, vec![console, events]).await });
    }

    async fn bring_up(&self, api: &Api, config: &VmConfig, nics: Vec<Nic>) -> Result<(), ApiError> {
        let version = api.ping().await?.version;
        tracing::debug!(version, "Cloud Hypervisor answers");
        api.create(config).await?;
        for nic in nics {
            api.add_net(&interface(&nic), nic.queues).await?;
        }
        api.boot().await
    }

    async fn add_disk(&self, disk: Disk) -> Result<PciPath, HypervisorError> {
        let api = self.vmm.control("adding a disk")?;
        let mut devices = self.devices.lock().await;
        devices.is_free(&disk.id)?;
        let Some(room) = &devices.room else {
            return Err(HypervisorError::WrongState { operation: "adding a disk", state: "is not started" });
        };
        let named = room.name(&disk)?;
        let config = raw_disk(disk.id.clone(), named.path.display().to_string(), disk.readonly);
        // Before it is done: a caller that gives up half way must not make it forgotten.
        devices.added.insert(disk.id.clone(), Some(named));
        let added = api.add_disk(&config).await;
        devices.settle(&api, &disk.id, added).await
    }

    async fn add_nic(&self, nic: Nic) -> Result<PciPath, HypervisorError> {
        let api = self.vmm.control("adding a network interface")?;
        if let Some(reason) = nic.fault() {
            return Err(HypervisorError::InvalidDevice { id: nic.id, reason });
        }
        check_vhost(&nic)?;
        let mut devices = self.devices.lock().await;
        devices.is_free(&nic.id)?;
        devices.added.insert(nic.id.clone(), None);
        let added = api.add_net(&interface(&nic), nic.queues).await;
        devices.settle(&api, &nic.id, added).await
    }
}

/// The names that files have for the VMM.
struct Names {
    console: String,
    kernel: String,
    initrd: Option<String>,
    /// What the guest boots from, and the other disks of the start, by their ids.
    disks: Vec<(String, String)>,
    /// Tag and socket.
    shared_fs: Option<(String, String)>,
    vsock: PathBuf,
}

/// The machine that `spec` describes, without its network.
fn machine(spec: &VmSpec, names: Names) -> VmConfig {
    let growth = spec.growth.unwrap_or_default();
    let room = growth.memory_mib.saturating_sub(spec.memory_mib).next_multiple_of(BLOCK_MIB);
    VmConfig {
        cpus: CpusConfig { boot_vcpus: spec.vcpus, max_vcpus: growth.vcpus.max(spec.vcpus) },
        memory: MemoryConfig {
            size: spec.memory_mib.saturating_mul(MIB),
            hotplug_size: (room > 0).then_some(room.saturating_mul(MIB)),
            // The virtio-fs daemon maps it.
            shared: true,
            hugepages: spec.backing.hugepages,
            prefault: spec.backing.prealloc,
        },
        payload: PayloadConfig {
            kernel: names.kernel,
            cmdline: spec.kernel_params.join(" "),
            initramfs: names.initrd,
        },
        disks: names.disks.into_iter().map(|(id, path)| raw_disk(id, path, true)).collect(),
        fs: names
            .shared_fs
            .map(|(tag, socket)| FsConfig { tag, socket, num_queues: 1, queue_size: 1024 })
            .into_iter()
            .collect(),
        vsock: VsockConfig { cid: GUEST_CID, socket: names.vsock.display().to_string() },
        serial: ConsoleConfig { mode: "File", file: Some(names.console) },
        console: ConsoleConfig { mode: "Off", file: None },
        balloon: spec.backing.reporting.then_some(BalloonConfig {
            size: 0,
            deflate_on_oom: true,
            free_page_reporting: true,
        }),
    }
}

fn raw_disk(id: String, path: String, readonly: bool) -> DiskConfig {
    let serial = serial(&id);
    DiskConfig { id, path, readonly, serial, image_type: "Raw" }
}

fn check_vhost(nic: &Nic) -> Result<(), HypervisorError> {
    match nic.vhost.is_empty() {
        true => Ok(()),
        false => Err(HypervisorError::unsupported("vhost-net", DRIVER, "set disable_vhost_net = true")),
    }
}

fn interface(nic: &Nic) -> NetConfig {
    let mac: Vec<String> = nic.mac.iter().map(|byte| format!("{byte:02x}")).collect();
    NetConfig { id: nic.id.clone(), mac: mac.join(":"), mtu: nic.mtu, num_queues: 2 * nic.queues.len() }
}

/// A pipe whose other end the VMM may also open by name.
fn pipe_of(spec: &VmSpec, identity: &Identity) -> Result<(pipe::Receiver, OwnedFd), HypervisorError> {
    let make = || -> std::io::Result<_> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        std::os::unix::fs::fchown(theirs.as_fd(), Some(identity.uid), Some(identity.gid))?;
        Ok((pipe::Receiver::from_owned_fd(ours)?, theirs))
    };
    make().map_err(|source| HypervisorError::File { what: "pipe of", path: spec.run_dir.clone(), source })
}

/// The place in an answer such as `0000:00:06.0`: there are no bridges.
fn pci_path(info: Option<PciDeviceInfo>) -> Result<PciPath, HypervisorError> {
    let bdf = info.map(|info| info.bdf).unwrap_or_default();
    let slot = bdf.rsplit(':').next().and_then(|place| place.split_once('.')).map(|(slot, _)| slot);
    match slot.and_then(|slot| u8::from_str_radix(slot, 16).ok()) {
        Some(slot @ 0..32) => Ok(PciPath(format!("{slot:02x}"))),
        _ => Err(HypervisorError::Place { driver: DRIVER, said: bdf.chars().take(80).collect() }),
    }
}

impl Devices {
    fn is_free(&self, id: &str) -> Result<(), HypervisorError> {
        match self.added.contains_key(id) {
            true => Err(HypervisorError::DeviceExists { id: id.to_owned() }),
            false => Ok(()),
        }
    }

    /// What could not be added is taken away, unless the VMM said that it has nothing of it. Where that fails too, it stays known.
    async fn settle(
        &mut self,
        api: &Api,
        id: &str,
        added: Result<Option<PciDeviceInfo>, ApiError>,
    ) -> Result<PciPath, HypervisorError> {
        let (error, is_there): (HypervisorError, _) = match added {
            Ok(info) => match pci_path(info) {
                Ok(path) => return Ok(path),
                Err(error) => (error, true),
            },
            Err(error) => {
                let is_there = !matches!(error, ApiError::Refused { .. });
                (error.into(), is_there)
            }
        };
        match if is_there { api.remove_device(id).await } else { Ok(()) } {
            Ok(()) => self.forget(id),
            Err(error) => {
                tracing::warn!(id, %error, "a device that could not be added cannot be taken away either");
            }
        }
        Err(error)
    }

    fn forget(&mut self, id: &str) {
        if let Some(Some(named)) = self.added.remove(id) {
            named.forget();
        }
    }
}

#[async_trait]
impl Vm for CloudHypervisorVm {
    fn capabilities(&self) -> Capabilities {
        let (hotplug_cpu, hotplug_memory) = self.grows.get().copied().unwrap_or_default();
        Capabilities {
            shared_fs: true,
            pause: true,
            hotplug_cpu,
            hotplug_memory,
            hotplug_block: true,
            hotplug_network: true,
            host_devices: false,
            snapshot: false,
        }
    }

    async fn boot(&self, spec: VmSpec, record: &Record) -> Result<Origin, HypervisorError> {
        spec.check_on_kvm(DRIVER)?;
        spec.check_boots(DRIVER)?;
        spec.check_own_devices(DRIVER)?;
        spec.check_plain(DRIVER)?;
        spec.check_unlimited(DRIVER)?;
        spec.nics.iter().try_for_each(check_vhost)?;
        self.vmm.begin()?;
        if let Some(growth) = spec.growth {
            let base = Size { vcpus: spec.vcpus, memory_mib: spec.memory_mib };
            let _ = self.grows.set((growth.vcpus > base.vcpus, growth.memory_mib > base.memory_mib));
            *self.growth.lock().await = Some((base, growth));
        }
        let outcome = self.start(spec, record).await;
        if outcome.is_err() {
            self.vmm.life.abandon().await;
        }
        outcome.map(|()| Origin::Kernel)
    }

    async fn exited(&self) -> VmExit {
        self.vmm.life.exited().await
    }

    async fn pause(&self) -> Result<(), HypervisorError> {
        Ok(self.vmm.control("pause")?.pause().await?)
    }

    async fn resume(&self) -> Result<(), HypervisorError> {
        Ok(self.vmm.control("resume")?.resume().await?)
    }

    async fn add_device(&self, device: Device) -> Result<PciPath, HypervisorError> {
        match device {
            Device::Disk(disk) => self.add_disk(disk).await,
            Device::Nic(nic) => self.add_nic(nic).await,
            Device::Host(_) => Err(no_host_devices(DRIVER)),
        }
    }

    async fn remove_device(&self, id: &str) -> Result<(), HypervisorError> {
        let api = self.vmm.control("removing a device")?;
        let mut devices = self.devices.lock().await;
        if !devices.added.contains_key(id) {
            return Err(HypervisorError::UnknownDevice { id: id.to_owned() });
        }
        match api.remove_device(id).await {
            // The guest let go of it after an earlier try had given up, or it never got that far. The status says neither.
            Err(ApiError::Refused { .. }) if !api.info().await?.device_tree.contains_key(id) => {}
            asked => asked?,
        }
        let since = Instant::now();
        while api.info().await?.device_tree.contains_key(id) {
            if since.elapsed() > REMOVAL_BOUND {
                return Err(HypervisorError::DeviceHeld { id: id.to_owned(), bound: REMOVAL_BOUND });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        devices.forget(id);
        Ok(())
    }

    async fn resize(&self, size: Size) -> Result<Layout, HypervisorError> {
        let api = self.vmm.control("changing the size")?;
        let growth = self.growth.lock().await;
        let now = size_of(&api).await?;
        let (base, most) = match *growth {
            Some((base, growth)) => {
                let room = growth.memory_mib.saturating_sub(base.memory_mib).next_multiple_of(BLOCK_MIB);
                (base, Size { vcpus: growth.vcpus, memory_mib: base.memory_mib.saturating_add(room) })
            }
            None => (now, now),
        };
        size.check_within(Size {
            vcpus: most.vcpus.max(now.vcpus),
            memory_mib: most.memory_mib.max(now.memory_mib),
        })?;
        let vcpus = size.vcpus.max(base.vcpus);
        if vcpus != now.vcpus {
            api.resize_vcpus(vcpus).await?;
        }
        if size.memory_mib > now.memory_mib {
            let more = (size.memory_mib - now.memory_mib).next_multiple_of(BLOCK_MIB);
            api.resize_memory(now.memory_mib.saturating_add(more).saturating_mul(MIB)).await?;
        }
        let vcpu_threads =
            self.vmm.life.processes().first().map(|vmm| vcpu_threads(vmm.pid, "vcpu")).unwrap_or_default();
        Ok(Layout { size: size_of(&api).await?, vcpu_threads })
    }

    async fn stop(&self) -> Result<(), HypervisorError> {
        self.vmm.life.abandon().await;
        Ok(())
    }

    fn console_tail(&self) -> String {
        self.vmm.life.console.text()
    }

    fn processes(&self) -> Vec<ProcessInfo> {
        self.vmm.life.processes()
    }
}

async fn size_of(api: &Api) -> Result<Size, HypervisorError> {
    let config = api.info().await?.config;
    let bytes = config.memory.size.saturating_add(config.memory.hotplugged_size.unwrap_or(0));
    Ok(Size { vcpus: config.cpus.boot_vcpus, memory_mib: bytes / MIB })
}

#[cfg(test)]
mod tests;

//! The driver of Firecracker.
//!
//! ```text
//!   boot: firecracker ─▶ its socket appears ─▶ GET / ─▶ PUT what it is made of … ─▶ PUT /actions InstanceStart ─▶ guest runs
//! ```
//!
//! It gets what it boots as open descriptors, and makes its control socket and its vsock device's socket in [`Room`]. It runs
//! without capabilities in a mount, IPC and network namespace of its own, under its own seccomp filters. Its console is its
//! standard output.
//!
//! | wanted | because | what happens |
//! |---|---|---|
//! | files of the host | there is no virtio-fs | refused |
//! | disks, CPUs, memory, interfaces of a running machine | devices are there from the start or never | refused |
//! | interfaces at the start | it opens a tap by its name, in its own network namespace, and ours have no name there: they are open descriptors | refused |
//! | memory taken from the host beforehand | it has no such option | refused |

mod api;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;

use self::api::{Api, Balloon, BootSource, Drive, MachineConfiguration, START_BOUND, Vsock};
use crate::files::{BootFiles, with_device};
use crate::life::{CONSOLE_LIMIT, Vmm};
use crate::process::{Child, Namespaces, Record, Spawn};
use crate::rest::{Address, ApiError, Room, vcpu_threads};
use crate::vm::{
    Capabilities, Device, HypervisorError, Layout, Origin, PciPath, ProcessInfo, Size, Vm, VmExit, VmSpec,
    no_host_devices,
};

const DRIVER: &str = "Firecracker";
/// What to do where Firecracker cannot.
const OTHERS: &str = "set hypervisor_name = \"qemu\", \"builtin\" or \"cloud-hypervisor\"";
/// Between two looks whether its socket is there: it makes it, and tells nobody.
const LOOK_AGAIN: Duration = Duration::from_millis(2);
/// Most CPUs of its machines.
const VCPUS_MAX: u32 = 32;
/// Context id of the guest. The host's side is a socket, so machines may have the same one.
const GUEST_CID: u32 = 3;
/// Longest name of a machine.
const NAME_LIMIT: usize = 64;

/// A virtual machine run by Firecracker.
pub(crate) struct FirecrackerVm {
    vmm: Vmm<Api>,
    size: std::sync::OnceLock<Size>,
    child: std::sync::OnceLock<Child>,
    kvm: PathBuf,
}

impl FirecrackerVm {
    pub(crate) fn new() -> Self {
        Self::with_kvm("/dev/kvm")
    }

    fn with_kvm(kvm: impl Into<PathBuf>) -> Self {
        Self {
            vmm: Vmm::default(),
            size: std::sync::OnceLock::new(),
            child: std::sync::OnceLock::new(),
            kvm: kvm.into(),
        }
    }

    /// Starts the VMM and the guest in it. What runs when it fails is in `Life`.
    async fn start(&self, spec: VmSpec, record: &Record) -> Result<(), HypervisorError> {
        let identity = with_device(&spec.identity, &self.kvm)?;
        let room = Room::make(&spec, record)?;
        let files = BootFiles::open(&spec, &identity)?;
        let vsock = room.vsock(&spec.vsock, record)?;
        let socket = room.path("api");
        let mut spawn = Spawn::new("firecracker", &spec.program);
        let mut name = |fd: OwnedFd| format!("/proc/self/fd/{}", spawn.hand_over(fd));
        let parts = Parts {
            source: BootSource {
                kernel_image_path: name(files.kernel),
                boot_args: spec.kernel_params.join(" "),
                initrd_path: files.initrd.map(&mut name),
            },
            image: files.image.map(&mut name).map(root),
            vsock: Vsock { guest_cid: GUEST_CID, uds_path: vsock.display().to_string() },
        };
        let child = spawn
            .args(["--id", &machine_name(&spec.id), "--api-sock"])
            .arg(&socket)
            .identity(identity)
            .namespaces(Namespaces { mount: true, ipc: true, network: true, pid: false })
            .output_limit(CONSOLE_LIMIT)
            .spawn(record)
            .map_err(|source| HypervisorError::Start {
                name: "firecracker",
                next: "install Firecracker, or set hypervisor_name = \"qemu\"",
                source,
            })?;
        self.vmm.life.adopt(&child);
        let (life, subject) = (Arc::clone(&self.vmm.life), child.clone());
        tokio::spawn(async move {
            subject.wait().await;
            // The console is part of what it says.
            life.console.push(subject.output_tail().as_bytes());
            life.supervise(subject, Vec::new()).await;
        });
        let _ = self.child.set(child.clone());
        let api = Api::new(Address::Path(socket.clone()));
        match self.bring_up(&api, &child, &spec, parts).await {
            Ok(()) => {
                self.vmm.runs(api);
                Ok(())
            }
            Err(error) => Err(self.vmm.explain(error, &spec.program, &child).await),
        }
    }

    async fn bring_up(
        &self,
        api: &Api,
        child: &Child,
        spec: &VmSpec,
        parts: Parts,
    ) -> Result<(), HypervisorError> {
        let version = answers(api, child, spec).await?;
        tracing::debug!(version, "Firecracker answers");
        api.machine(&MachineConfiguration {
            vcpu_count: spec.vcpus,
            mem_size_mib: spec.memory_mib,
            huge_pages: spec.backing.hugepages.then_some("2M"),
        })
        .await?;
        api.boot_source(&parts.source).await?;
        if let Some(image) = &parts.image {
            api.drive(image).await?;
        }
        api.vsock(&parts.vsock).await?;
        if spec.backing.reporting {
            api.balloon(&Balloon { amount_mib: 0, deflate_on_oom: true, free_page_reporting: true }).await?;
        }
        Ok(api.start().await?)
    }

    /// For everything that a machine that runs would have to do and cannot.
    fn refuse<T>(&self, operation: &'static str) -> Result<T, HypervisorError> {
        self.vmm.control(operation)?;
        Err(HypervisorError::unsupported(operation, DRIVER, OTHERS))
    }
}

/// What the machine boots from, by the names that the files have for Firecracker.
struct Parts {
    source: BootSource,
    image: Option<Drive>,
    vsock: Vsock,
}

/// The first drive: `/dev/vda`, which the kernel's parameters name already.
fn root(path: String) -> Drive {
    Drive { drive_id: "image", is_root_device: false, is_read_only: true, path_on_host: path }
}

/// Waits for the first answer, which tells the version.
async fn answers(api: &Api, child: &Child, spec: &VmSpec) -> Result<String, HypervisorError> {
    let since = Instant::now();
    loop {
        match api.describe().await {
            Ok(info) => return Ok(info.vmm_version),
            Err(ApiError::Lost { .. }) if child.exit().is_none() && since.elapsed() < START_BOUND => {}
            Err(ApiError::Lost { .. }) if child.exit().is_none() => {
                return Err(HypervisorError::Unresponsive {
                    program: spec.program.clone(),
                    bound: START_BOUND,
                    waits_for: "the host, which is overloaded",
                    output: child.output_tail(),
                });
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

/// Firecracker takes letters, digits and hyphens.
fn machine_name(id: &str) -> String {
    let fits = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    id.chars().map(fits).take(NAME_LIMIT).collect()
}

/// What the machine wants and Firecracker has not.
fn check(spec: &VmSpec) -> Result<(), HypervisorError> {
    spec.check_on_kvm(DRIVER)?;
    spec.check_unlimited(DRIVER)?;
    let refused = match spec {
        VmSpec { disks, .. } if !disks.is_empty() => ("a disk with a serial number", OTHERS),
        VmSpec { shared_fs: Some(_), .. } => ("sharing files of the host", OTHERS),
        VmSpec { growth: Some(_), .. } => (
            "growing while it runs",
            "set runtime.static_sandbox_resource_mgmt = true, or hypervisor_name = \"qemu\", \"builtin\" or \"cloud-hypervisor\"",
        ),
        VmSpec { nics, .. } if !nics.is_empty() => ("a network interface", OTHERS),
        VmSpec { backing: crate::Backing { prealloc: true, .. }, .. } => {
            ("taking its memory beforehand", "set enable_mem_prealloc = false, or hypervisor_name = \"qemu\"")
        }
        VmSpec { vcpus, .. } if *vcpus > VCPUS_MAX => ("a machine of more than 32 virtual CPUs", OTHERS),
        _ => return Ok(()),
    };
    Err(HypervisorError::unsupported(refused.0, DRIVER, refused.1))
}

#[async_trait]
impl Vm for FirecrackerVm {
    fn capabilities(&self) -> Capabilities {
        Capabilities { pause: true, ..Capabilities::default() }
    }

    async fn boot(&self, spec: VmSpec, record: &Record) -> Result<Origin, HypervisorError> {
        check(&spec)?;
        spec.check_boots(DRIVER)?;
        spec.check_own_devices(DRIVER)?;
        spec.check_plain(DRIVER)?;
        self.vmm.begin()?;
        let _ = self.size.set(Size { vcpus: spec.vcpus, memory_mib: spec.memory_mib });
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
            Device::Disk(_) => self.refuse("adding a disk"),
            Device::Nic(_) => self.refuse("adding a network interface"),
            Device::Host(_) => Err(no_host_devices(DRIVER)),
        }
    }

    async fn remove_device(&self, _id: &str) -> Result<(), HypervisorError> {
        self.refuse("removing a device")
    }

    async fn resize(&self, size: Size) -> Result<Layout, HypervisorError> {
        self.vmm.control("changing the size")?;
        let now = self.size.get().copied().unwrap_or_default();
        if size.vcpus > now.vcpus || size.memory_mib > now.memory_mib {
            return self.refuse("growing while it runs");
        }
        let processes = self.vmm.life.processes();
        let vcpu_threads = processes.first().map(|vmm| vcpu_threads(vmm.pid, "fc_vcpu ")).unwrap_or_default();
        Ok(Layout { size: now, vcpu_threads })
    }

    async fn stop(&self) -> Result<(), HypervisorError> {
        self.vmm.life.abandon().await;
        Ok(())
    }

    fn console_tail(&self) -> String {
        self.child.get().map(Child::output_tail).unwrap_or_default()
    }

    fn processes(&self) -> Vec<ProcessInfo> {
        self.vmm.life.processes()
    }
}

#[cfg(test)]
mod tests;

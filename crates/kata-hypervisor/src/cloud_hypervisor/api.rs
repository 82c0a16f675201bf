//! The part of Cloud Hypervisor's interface that the driver uses: one function a request. Looked up in its OpenAPI file, version
//! 0.3.0, as of Cloud Hypervisor 50. Answers grow from version to version, so what they have besides is passed over.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use hyper::Method;
use serde::{Deserialize, Serialize};

use crate::rest::{Address, ApiError, Call, Client};

/// For one request. Only those of the start take longer than an instant.
const BOUND: Duration = Duration::from_secs(10);
/// To the first answer, and for the machine's start: it takes some 100 ms, and seconds on a host that swaps.
const START_BOUND: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize)]
pub(super) struct VmConfig {
    pub cpus: CpusConfig,
    pub memory: MemoryConfig,
    pub payload: PayloadConfig,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fs: Vec<FsConfig>,
    pub vsock: VsockConfig,
    pub serial: ConsoleConfig,
    pub console: ConsoleConfig,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balloon: Option<BalloonConfig>,
}

#[derive(Debug, Serialize)]
pub(super) struct CpusConfig {
    pub boot_vcpus: u32,
    pub max_vcpus: u32,
}

/// Sizes in bytes.
#[derive(Debug, Serialize)]
pub(super) struct MemoryConfig {
    pub size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hotplug_size: Option<u64>,
    pub shared: bool,
    pub hugepages: bool,
    pub prefault: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct PayloadConfig {
    pub kernel: String,
    pub cmdline: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct DiskConfig {
    pub id: String,
    pub path: String,
    pub readonly: bool,
    pub serial: String,
    /// Always `Raw`: what the guest has written must not be taken for the head of another format.
    pub image_type: &'static str,
}

#[derive(Debug, Serialize)]
pub(super) struct FsConfig {
    pub tag: String,
    pub socket: String,
    pub num_queues: u32,
    pub queue_size: u32,
}

#[derive(Debug, Serialize)]
pub(super) struct VsockConfig {
    pub cid: u32,
    pub socket: String,
}

#[derive(Debug, Serialize)]
pub(super) struct ConsoleConfig {
    pub mode: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct BalloonConfig {
    pub size: u64,
    pub deflate_on_oom: bool,
    pub free_page_reporting: bool,
}

/// Its tap goes along as descriptors.
#[derive(Debug, Serialize)]
pub(super) struct NetConfig {
    pub id: String,
    pub mac: String,
    pub mtu: u16,
    /// Two of them for each queue pair.
    pub num_queues: usize,
}

#[derive(Debug, Serialize)]
struct VmResize {
    #[serde(skip_serializing_if = "Option::is_none")]
    desired_vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    desired_ram: Option<u64>,
}

#[derive(Debug, Serialize)]
struct VmRemoveDevice<'a> {
    id: &'a str,
}

#[derive(Debug, Deserialize)]
pub(super) struct VmmPing {
    pub version: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct PciDeviceInfo {
    /// Segment, bus, device and function: `0000:00:06.0`.
    pub bdf: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct VmInfo {
    pub config: InfoConfig,
    /// Everything plugged in, by its name.
    #[serde(default)]
    pub device_tree: BTreeMap<String, serde::de::IgnoredAny>,
}

#[derive(Debug, Deserialize)]
pub(super) struct InfoConfig {
    pub cpus: InfoCpus,
    pub memory: InfoMemory,
}

#[derive(Debug, Deserialize)]
pub(super) struct InfoCpus {
    pub boot_vcpus: u32,
}

#[derive(Debug, Deserialize)]
pub(super) struct InfoMemory {
    pub size: u64,
    #[serde(default)]
    pub hotplugged_size: Option<u64>,
}

/// Cloud Hypervisor's interface.
#[derive(Clone, Debug)]
pub(super) struct Api(Client);

/// A path below the interface's root.
macro_rules! v1 {
    ($name:literal) => {
        concat!("/api/v1/", $name)
    };
}

fn put(path: &'static str) -> Call<'static> {
    Call { method: Method::PUT, path, bound: BOUND }
}

fn get(path: &'static str) -> Call<'static> {
    Call { method: Method::GET, path, bound: BOUND }
}

impl Api {
    pub(super) fn new(address: Address) -> Self {
        Self(Client::new("Cloud Hypervisor", address, explain))
    }

    pub(super) async fn ping(&self) -> Result<VmmPing, ApiError> {
        self.0.get(Call { bound: START_BOUND, ..get(v1!("vmm.ping")) }).await
    }

    pub(super) async fn create(&self, config: &VmConfig) -> Result<(), ApiError> {
        self.0.tell(put(v1!("vm.create")), config).await
    }

    pub(super) async fn boot(&self) -> Result<(), ApiError> {
        self.0.order(Call { bound: START_BOUND, ..put(v1!("vm.boot")) }).await
    }

    pub(super) async fn info(&self) -> Result<VmInfo, ApiError> {
        self.0.get(get(v1!("vm.info"))).await
    }

    pub(super) async fn pause(&self) -> Result<(), ApiError> {
        self.0.order(put(v1!("vm.pause"))).await
    }

    pub(super) async fn resume(&self) -> Result<(), ApiError> {
        self.0.order(put(v1!("vm.resume"))).await
    }

    /// Answers where the guest finds it; nothing for a machine that does not run yet.
    pub(super) async fn add_disk(&self, disk: &DiskConfig) -> Result<Option<PciDeviceInfo>, ApiError> {
        self.0.ask(put(v1!("vm.add-disk")), disk, Vec::new()).await
    }

    /// The same for an interface, whose tap's queues are `fds`.
    pub(super) async fn add_net(
        &self,
        net: &NetConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<PciDeviceInfo>, ApiError> {
        self.0.ask(put(v1!("vm.add-net")), net, fds).await
    }

    /// Asks the guest to let go of it. That it has is seen in [`VmInfo::device_tree`].
    pub(super) async fn remove_device(&self, id: &str) -> Result<(), ApiError> {
        self.0.tell(put(v1!("vm.remove-device")), &VmRemoveDevice { id }).await
    }

    pub(super) async fn resize_vcpus(&self, count: u32) -> Result<(), ApiError> {
        self.0.tell(put(v1!("vm.resize")), &VmResize { desired_vcpus: Some(count), desired_ram: None }).await
    }

    pub(super) async fn resize_memory(&self, bytes: u64) -> Result<(), ApiError> {
        self.0.tell(put(v1!("vm.resize")), &VmResize { desired_vcpus: None, desired_ram: Some(bytes) }).await
    }
}

/// A refusal is a list of texts, from the outermost cause in, or, before version 40 or so, one text.
fn explain(body: &[u8]) -> Option<String> {
    let causes: Vec<String> = serde_json::from_slice(body).ok()?;
    Some(causes.join(": "))
}

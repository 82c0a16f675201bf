//! The part of Firecracker's interface that the driver uses: one function a request. Looked up in its Swagger file as of 1.17.
//! Answers grow from version to version, so what they have besides is passed over.

use std::time::Duration;

use hyper::Method;
use serde::{Deserialize, Serialize};

use crate::rest::{Address, ApiError, Call, Client};

/// For one request. Only the start takes longer than an instant.
const BOUND: Duration = Duration::from_secs(10);
/// For the start of the guest, and for the first answer, on a host that swaps.
pub(super) const START_BOUND: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize)]
pub(super) struct MachineConfiguration {
    pub vcpu_count: u32,
    pub mem_size_mib: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub huge_pages: Option<&'static str>,
}

#[derive(Debug, Serialize)]
pub(super) struct BootSource {
    pub kernel_image_path: String,
    pub boot_args: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd_path: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct Drive {
    pub drive_id: &'static str,
    /// Whether Firecracker adds `root=` to the kernel's parameters.
    pub is_root_device: bool,
    pub is_read_only: bool,
    pub path_on_host: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Vsock {
    pub guest_cid: u32,
    pub uds_path: String,
}

#[derive(Debug, Serialize)]
pub(super) struct Balloon {
    pub amount_mib: u64,
    pub deflate_on_oom: bool,
    pub free_page_reporting: bool,
}

#[derive(Debug, Serialize)]
struct Action {
    action_type: &'static str,
}

#[derive(Debug, Serialize)]
struct State {
    state: &'static str,
}

#[derive(Debug, Deserialize)]
pub(super) struct InstanceInfo {
    pub vmm_version: String,
}

/// What Firecracker says no with.
#[derive(Debug, Deserialize)]
struct Fault {
    fault_message: String,
}

/// Firecracker's interface.
#[derive(Clone, Debug)]
pub(super) struct Api(Client);

fn put(path: &str) -> Call<'_> {
    Call { method: Method::PUT, path, bound: BOUND }
}

impl Api {
    pub(super) fn new(address: Address) -> Self {
        Self(Client::new("Firecracker", address, explain))
    }

    pub(super) async fn describe(&self) -> Result<InstanceInfo, ApiError> {
        self.0.get(Call { method: Method::GET, path: "/", bound: START_BOUND }).await
    }

    pub(super) async fn machine(&self, machine: &MachineConfiguration) -> Result<(), ApiError> {
        self.0.tell(put("/machine-config"), machine).await
    }

    pub(super) async fn boot_source(&self, source: &BootSource) -> Result<(), ApiError> {
        self.0.tell(put("/boot-source"), source).await
    }

    pub(super) async fn drive(&self, drive: &Drive) -> Result<(), ApiError> {
        self.0.tell(put(&format!("/drives/{}", drive.drive_id)), drive).await
    }

    pub(super) async fn vsock(&self, vsock: &Vsock) -> Result<(), ApiError> {
        self.0.tell(put("/vsock"), vsock).await
    }

    pub(super) async fn balloon(&self, balloon: &Balloon) -> Result<(), ApiError> {
        self.0.tell(put("/balloon"), balloon).await
    }

    pub(super) async fn start(&self) -> Result<(), ApiError> {
        let call = Call { bound: START_BOUND, ..put("/actions") };
        self.0.tell(call, &Action { action_type: "InstanceStart" }).await
    }

    pub(super) async fn pause(&self) -> Result<(), ApiError> {
        self.state("Paused").await
    }

    pub(super) async fn resume(&self) -> Result<(), ApiError> {
        self.state("Resumed").await
    }

    async fn state(&self, state: &'static str) -> Result<(), ApiError> {
        let call = Call { method: Method::PATCH, path: "/vm", bound: BOUND };
        self.0.tell(call, &State { state }).await
    }
}

fn explain(body: &[u8]) -> Option<String> {
    serde_json::from_slice(body).ok().map(|fault: Fault| fault.fault_message)
}

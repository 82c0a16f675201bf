//! A pod's start: its stages, and where its time went.
//!
//! ```text
//!   live pod (Control) ─┐
//!   <run_dir>/state.json ┼─▶ Start ─▶ shares ─▶ table, JSON
//!   <state_dir>/starts/  │        └─▶ waterfall ─▶ SVG: a file's, or the status page's
//!   a saved JSON ───────┘
//! ```

mod shares;
mod source;
pub mod waterfall;

use kata_api::control::Pod;
use serde::{Deserialize, Serialize};

pub use shares::{Share, shares};
pub use source::{SourceError, find, last, read, recent};

/// Layers in the order in which a start goes through them, with what they stand for.
pub const LAYERS: [(&str, &str); 5] = [
    ("host", "the pod's owner and its helpers"),
    ("vmm", "the virtual machine monitor and the firmware"),
    ("kernel", "the guest's kernel"),
    ("agent", "the guest's agent"),
    ("container", "creating and starting containers"),
];

/// The start of one pod. Of `state.json`, the files of kept starts and the output of `analyze --json`, these are the keys
/// that tell of a start; others are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Start {
    /// Name of the pod.
    pub id: String,
    /// Milliseconds since the epoch.
    pub created_at_ms: u64,
    /// Name of the driver.
    pub hypervisor: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// Why this VMM and this accelerator.
    pub choice: String,
    /// Release of the guest's kernel.
    pub guest_kernel: String,
    /// Version of the agent.
    pub agent_version: String,
    /// Why the pod ended, where it did not end by request.
    pub fault: Option<String>,
    /// The stages, by start. They may overlap.
    pub timeline: Vec<Stage>,
}

/// One stage of a start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// `host`, `vmm`, `kernel`, `agent` or `container`.
    pub layer: String,
    /// What was done.
    pub name: String,
    /// Microseconds since the pod's owner began.
    pub start_us: u64,
    /// Microseconds it took.
    pub duration_us: u64,
}

impl Stage {
    /// Microseconds from the owner's begin to the end of this.
    pub fn end_us(&self) -> u64 {
        self.start_us.saturating_add(self.duration_us)
    }
}

impl Start {
    /// Microseconds from the owner's begin to the end of the last stage.
    pub fn total_us(&self) -> u64 {
        self.timeline.iter().map(Stage::end_us).max().unwrap_or_default()
    }

    /// `qemu with tcg`, as far as it is known.
    pub fn machine(&self) -> String {
        match (self.hypervisor.as_str(), self.accelerator.as_str()) {
            ("", _) => "unknown".to_owned(),
            (driver, "") => driver.to_owned(),
            (driver, accelerator) => format!("{driver} with {accelerator}"),
        }
    }
}

impl From<Pod> for Start {
    fn from(pod: Pod) -> Self {
        let stage = |stage: kata_api::control::Stage| Stage {
            layer: stage.layer,
            name: stage.name,
            start_us: stage.start_us,
            duration_us: stage.duration_us,
        };
        Self {
            id: pod.id,
            created_at_ms: pod.created_at_ms,
            hypervisor: pod.hypervisor,
            accelerator: pod.accelerator,
            choice: pod.choice,
            guest_kernel: pod.guest_kernel,
            agent_version: pod.agent_version,
            fault: Some(pod.fault).filter(|fault| !fault.is_empty()),
            timeline: pod.timeline.into_iter().map(stage).collect(),
        }
    }
}

/// Microseconds as milliseconds with one digit, for people.
pub fn ms(us: u64) -> String {
    format!("{}.{}", us.saturating_add(50) / 1000, us.saturating_add(50) % 1000 / 100)
}

#[cfg(test)]
pub mod samples {
    use super::{Stage, Start};

    /// A start of some length.
    pub fn start(id: &str) -> Start {
        let stage = |layer: &str, name: &str, start_us, duration_us| Stage {
            layer: layer.to_owned(),
            name: name.to_owned(),
            start_us,
            duration_us,
        };
        Start {
            id: id.to_owned(),
            created_at_ms: 1_764_000_000_000,
            hypervisor: "qemu".to_owned(),
            accelerator: "tcg".to_owned(),
            guest_kernel: "6.12".to_owned(),
            agent_version: "0.1.0".to_owned(),
            timeline: vec![
                stage("host", "owner", 0, 9_000),
                stage("host", "virtio-fs daemon", 10_000, 3_000),
                stage("vmm", "start", 13_000, 187_000),
                stage("vmm", "firmware", 200_000, 100_000),
                stage("kernel", "boot", 300_000, 500_000),
                stage("agent", "set up the guest", 800_000, 40_000),
                stage("container", &format!("create {id}"), 850_000, 50_000),
                stage("container", &format!("start {id}"), 900_000, 100_000),
            ],
            ..Start::default()
        }
    }
}

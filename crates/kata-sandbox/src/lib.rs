//! One pod is one virtual machine: everything between "make a pod" and "nothing of it is left".
//!
//! ```text
//!   Sandbox (handle, cheap to clone)
//!      │ requests                       ┌─ boot: hooks, network, virtiofsd, VMM, ready listener, agent
//!      ▼                                ├─ create / start / exec / wait / delete: calls to the agent
//!   ┌──────────────┐  spawns work as    ├─ stdio: client's FIFO ↔ vsock stream
//!   │ one actor    │───────────────────▶├─ watchers: VMM exit, virtiofsd exit, OOM events
//!   │ owns state   │◀───────────────────┘
//!   └──────────────┘  completions and events come back through the same queue
//! ```
//!
//! The queue orders *transitions*, not work: whatever takes time runs in a task of its own and posts its completion, so
//! that a kill or a delete never stands behind a create. What the host gained on the way (processes, mounts,
//! directories) is written to the leak record before it exists; [`release`] works from that record alone.

mod agent_client;
mod agent_log;
mod blocking;
mod boot;
mod cgroup;
mod error;
mod guest;
mod guest_spec;
mod health;
mod hooks;
mod hybrid;
mod identity;
mod initdata;
mod lifecycle;
mod network;
mod pod;
mod process_table;
mod resources;
mod sandbox;
mod spec;
mod state;
mod stdio;
mod storage;
mod teardown;
pub mod template;
mod timeline;

pub use agent_client::AGENT_CALLS;
pub use boot::{BootError, Measured, measured};
pub use cgroup::CgroupError;
pub use error::{ErrorKind, SandboxError};
pub use guest::Guest;
pub use initdata::InitdataError;
pub use kata_api::GuestProcess;
pub use kata_api::agent::StatsContainerResponse;
pub use kata_api::csi::VolumeStatsResponse;
pub use pod::{
    ContainerSpec, ContainerView, Event, Exit, Inspection, NetworkSpec, ProcessId, ProcessState, RootfsMount,
    SandboxSpec, Status, Stdio,
};
pub use resources::{PromiseError, ResourceError, ResourceSpec, SizingError};
pub use sandbox::Sandbox;
pub use state::{State, StateError};
pub use teardown::release;
pub use timeline::{Layer, Stage};

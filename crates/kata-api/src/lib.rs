//! The wire contracts between a pod's owner, its guest agent and the operator's tools.
//!
//! ```text
//!  kata-ctl ──control + Task over pod.sock──▶ owner ──agent + health over vsock──▶ kata-agent
//! ```
//!
//! The crate holds shapes, numbers and the text format of metrics, which all of them write. The agent protocol is wire compatible with Kata Containers 4.1.

mod boot;
mod forward;
pub mod guest;
pub mod metrics;
pub mod ports;
mod process;
mod protocol;

pub use boot::{Announcement, BootStage};
pub use forward::{Forward, Forwarded};
pub use process::{GuestProcess, PROCESSES};
pub use protocol::*;

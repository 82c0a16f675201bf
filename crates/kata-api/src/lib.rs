//! The wire contracts between a pod's owner, its guest agent and the operator's tools.
//!
//! ```text
//!  kata-ctl ──control + Task over pod.sock──▶ owner ──agent + health over vsock──▶ kata-agent
//! ```
//!
//! The crate holds shapes and numbers only. The agent protocol is wire compatible with Kata Containers 4.1.

mod boot;
pub mod guest;
pub mod ports;
mod process;
mod protocol;

pub use boot::{Announcement, BootStage};
pub use process::{GuestProcess, PROCESSES};
pub use protocol::*;

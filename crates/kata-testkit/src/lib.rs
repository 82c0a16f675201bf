//! Test support: a fake agent, a private host for live pods, and the check that nothing of a pod is left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a test fails by panicking"
)]

pub mod containerd;
pub mod cri;
pub mod fake_agent;
pub mod host;
pub mod leaks;
pub mod netns;

/// Says that a test was skipped and why; the suite's runner counts these lines.
pub fn skip(reason: &str) {
    eprintln!("skipped: {reason}");
}

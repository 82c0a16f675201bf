//! Test support: a fake agent, a private host for live pods, and the check that nothing of a pod is left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a test fails by panicking"
)]

pub mod fake_agent;
pub mod host;
pub mod leaks;

use std::io::Write;

/// Says that a test was skipped and why, and counts it in the file that `KATA_SKIP_LOG` names.
pub fn skip(reason: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    eprintln!("skipped: {name}: {reason}");
    let log = std::env::var_os("KATA_SKIP_LOG");
    if let Some(mut file) = log.and_then(|path| std::fs::OpenOptions::new().append(true).open(path).ok()) {
        let _ = writeln!(file, "{name}: {reason}");
    }
}

//! Test support: a fake agent, a private host for live pods, and the check that nothing of a pod is left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "a test fails by panicking"
)]

use std::path::Path;

pub mod containerd;
pub mod cosign;
pub mod cri;
pub mod driver;
pub mod fake_agent;
pub mod guest_services;
pub mod host;
pub mod initdata;
pub mod leaks;
pub mod netns;
pub mod registry;

/// The text of all crates, for tests that a table or a page names to be looked for in.
pub fn code() -> String {
    fn add(dir: &Path, text: &mut String) {
        for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                add(&path, text);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut text = String::new();
    add(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), &mut text);
    text
}

/// Says that a test was skipped and why; the suite's runner counts these lines.
pub fn skip(reason: &str) {
    eprintln!("skipped: {reason}");
}

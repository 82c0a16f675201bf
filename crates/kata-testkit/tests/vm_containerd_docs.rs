//! docs/containerd.md says how to configure containerd: each version understands what is written for it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;

use kata_testkit::containerd::{Containerd, Version};
use kata_testkit::host::{stderr, stdout};
use kata_testkit::with_each_containerd;

with_each_containerd!(documented_handler_is_understood);

/// The block of the page with this name.
fn block(name: &str) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/containerd.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, rest) = page.split_once(&format!("```toml {name}\n")).unwrap();
    rest.split_once("```").unwrap().0.to_owned()
}

fn documented_handler_is_understood(rig: &mut Containerd) {
    let name = match rig.version() {
        Version::V1 => "containerd-1",
        Version::V2 => "containerd-2",
    };
    let config = rig.host().scratch("documented.toml");
    std::fs::write(&config, block(name)).unwrap();
    let daemon = rig.client().with_file_name("containerd");
    let dump = Command::new(daemon).arg("--config").arg(&config).args(["config", "dump"]).output().unwrap();
    assert!(dump.status.success(), "{}", stderr(&dump));
    // Quotes are this way or that.
    let dump = stdout(&dump).replace('\'', "\"");
    let handlers = dump.find("runtimes.kata]").unwrap_or_else(|| panic!("no handler in {dump}"));
    let handler = dump.get(handlers..).unwrap();
    for line in [
        "runtime_type = \"io.containerd.kata.v2\"",
        "runtime_path = \"/opt/kata/bin/containerd-shim-kata-v2\"",
        "privileged_without_host_devices = true",
        "pod_annotations = [\"io.katacontainers.*\"]",
        "ConfigPath = \"/etc/kata-containers/configuration.toml\"",
    ] {
        assert!(handler.contains(line), "no `{line}` in {handler}");
    }
}

//! What configures a containerd's CRI for tests, in both dialects.

use std::path::PathBuf;

use serde_json::json;

use super::PAUSE_IMAGE;
use crate::containerd::{Containerd, Version};

/// Where Debian installs the CNI plugins.
pub(super) const PLUGINS: &str = "/usr/lib/cni";
/// Network of the pods; its first address is the bridge's, on the host's side.
pub(super) const SUBNET: &str = "10.89.0.0/24";
/// The same for version 6.
pub(super) const SUBNET6: &str = "fd00:89::/64";

/// The configuration file's part about the CRI. `handlers` is text of further handlers, see [`handler`].
pub(super) fn text(rig: &Containerd, handlers: &str) -> String {
    let networks = networks(rig);
    std::fs::create_dir_all(&networks).unwrap();
    let handlers = handler(rig.version(), "kata", rig.runtime(), "")
        + &handler(rig.version(), "runc", "io.containerd.runc.v2", "")
        + handlers;
    // The last for runc, which otherwise fails where root may not lower what it inherits.
    let common = "netns_mounts_under_state_dir = true\ntolerate_missing_hugetlb_controller = true\n\
                  restrict_oom_score_adj = true\n";
    let streams = "stream_server_address = \"127.0.0.1\"\nstream_server_port = \"0\"\n";
    let section = section(rig.version());
    match rig.version() {
        Version::V1 => format!(
            "[plugins.{section:?}]\nsandbox_image = {PAUSE_IMAGE:?}\n{streams}{common}\
             [plugins.{section:?}.cni]\nbin_dir = {PLUGINS:?}\nconf_dir = {networks:?}\n\
             [plugins.{section:?}.containerd]\ndefault_runtime_name = \"kata\"\n{handlers}"
        ),
        Version::V2 => format!(
            "[plugins.\"io.containerd.grpc.v1.cri\"]\n{streams}\
             [plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = {PAUSE_IMAGE:?}\n\
             [plugins.{section:?}]\n{common}enable_unprivileged_ports = false\nenable_unprivileged_icmp = false\n\
             [plugins.{section:?}.cni]\nbin_dirs = [{PLUGINS:?}]\nconf_dir = {networks:?}\n\
             [plugins.{section:?}.containerd]\ndefault_runtime_name = \"kata\"\n{handlers}"
        ),
    }
}

/// A handler as text: its name, its runtime, and further lines of its own.
pub fn handler(version: Version, name: &str, runtime: &str, lines: &str) -> String {
    let section = section(version);
    format!(
        "[plugins.{section:?}.containerd.runtimes.{name}]\nruntime_type = {runtime:?}\n\
         privileged_without_host_devices = {}\npod_annotations = [\"io.katacontainers.*\"]\n\
         container_annotations = [\"io.katacontainers.*\"]\n{lines}",
        name != "runc"
    )
}

fn section(version: Version) -> &'static str {
    match version {
        Version::V1 => "io.containerd.grpc.v1.cri",
        Version::V2 => "io.containerd.cri.v1.runtime",
    }
}

/// The directory with the networks' configuration.
fn networks(rig: &Containerd) -> PathBuf {
    rig.host().scratch("cni/net.d")
}

/// Has pods started from now on connected to this chain of plugins; answers the configuration as containerd reads it.
pub(super) fn set_network(rig: &Containerd, plugins: &serde_json::Value) -> String {
    let config = json!({ "cniVersion": "0.4.0", "name": "kt", "plugins": plugins }).to_string();
    // containerd looks when a file is written, not when it gets a name.
    std::fs::write(networks(rig).join("10-kt.conflist"), &config).unwrap();
    config
}

/// Addresses of the pods from [`SUBNET`] and [`SUBNET6`], kept in this world.
pub(super) fn addresses(rig: &Containerd) -> serde_json::Value {
    json!({
        "type": "host-local", "dataDir": rig.host().scratch("cni/addresses"),
        "ranges": [[{"subnet": SUBNET}], [{"subnet": SUBNET6}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    })
}

//! Where what is mounted in a container comes from, by the pod's `volumes`.
//!
//! | volume | source |
//! |---|---|
//! | `emptyDir` | `emptyDir:NAME`, the guest's own |
//! | `hostPath` below `/dev`, `/proc`, `/sys` | `guest:PATH`, which is never the host's |
//! | `configMap`, `secret`, `projected`, `downwardAPI`, other `hostPath` | `host`: copied or shared |
//! | claims and all others | `volume`: copied, shared or a disk |

use std::path::Path;

use serde_json::Value;

use super::container::{Container, HOST, VOLUME, is_of_guest};
use super::manifest::{items, text};

/// Volumes that the kubelet writes itself.
const WRITTEN: [&str; 4] = ["configMap", "downwardAPI", "projected", "secret"];

/// What the manifest of a container mounts, and what a kubelet does beside it.
pub fn mount(expected: &mut Container, one: &Value, pod: &Value) {
    for mount in items(one, "volumeMounts") {
        let (Some(place), Some(name)) = (text(mount, "mountPath"), text(mount, "name")) else { continue };
        // Volumes of claim templates are not among the pod's.
        let volume = items(pod, "volumes").find(|volume| text(volume, "name") == Some(name));
        let volume = volume.unwrap_or(&Value::Null);
        expected.may_mount(plain(place), &source(name, volume));
        if is_executable(volume) {
            let note = format!(
                "volume {name} has executable files: copies of them are denied, so the pod cannot start without a share"
            );
            expected.notes.push(note);
        }
    }
    if let Some(place) = text(one, "terminationMessagePath") {
        expected.may_mount(plain(place), HOST);
    }
    let devices = items(one, "volumeDevices").filter_map(|device| text(device, "devicePath"));
    expected.devices = devices.map(str::to_owned).collect();
}

/// A path as container runtimes tell it.
fn plain(path: &str) -> &str {
    match path.trim_end_matches('/') {
        "" => "/",
        path => path,
    }
}

fn source(name: &str, volume: &Value) -> String {
    if volume.get("emptyDir").is_some() {
        return format!("emptyDir:{name}");
    }
    if let Some(path) = volume.get("hostPath").and_then(|of| text(of, "path")) {
        return if is_of_guest(Path::new(path)) { format!("guest:{path}") } else { HOST.to_owned() };
    }
    let written = WRITTEN.iter().any(|kind| volume.get(kind).is_some());
    if written { HOST.to_owned() } else { VOLUME.to_owned() }
}

/// Whether some of its files can be executed.
fn is_executable(volume: &Value) -> bool {
    match volume {
        Value::Object(fields) => fields.iter().any(|(key, value)| {
            let mode = value.as_i64().filter(|_| matches!(key.as_str(), "mode" | "defaultMode"));
            mode.is_some_and(|mode| mode & 0o111 != 0) || is_executable(value)
        }),
        Value::Array(items) => items.iter().any(is_executable),
        _ => false,
    }
}

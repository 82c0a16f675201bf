//! How QEMU holds disks to bounds: a group, here one a disk, in which a node that lies over the disk's counts (QEMU's documentation,
//! throttle). A bucket of a tenth of a second's worth lets what came late catch up.

use serde_json::{Map, Value, json};

use crate::vm::DiskLimits;

/// The group of the name `id`; `None` where nothing is bounded.
pub(super) fn group(id: &str, limits: DiskLimits) -> Option<Value> {
    let bounds = [("bps-total", limits.bytes_per_second), ("iops-total", limits.requests_per_second)];
    let bounds: Map<String, Value> =
        bounds.into_iter().filter_map(|(name, bound)| Some((name.to_owned(), json!(bound?.get())))).collect();
    (!bounds.is_empty()).then(|| json!({ "qom-type": "throttle-group", "id": id, "limits": bounds }))
}

/// A node over `node` that is held to the bounds of a group.
pub(super) fn held(node: &Value, group: &str, readonly: bool) -> Value {
    json!({
        "driver": "throttle",
        "throttle-group": group,
        "file": node,
        "read-only": readonly,
        "discard": "unmap",
    })
}

//! Block devices that a container asks for by node: Kubernetes' raw block volumes.
//!
//! A node in the specification has the host's numbers, which mean another device in the guest or none. So the machine gets
//! the device, and the agent is told where it is plugged in, to make the node with the guest's numbers.
//!
//! Asked for is a device that the specification also allows by its numbers. A privileged container gets a node of every
//! device of the host, all of them allowed at once: their disks are not plugged in.

use std::path::{Path, PathBuf};

use kata_api::agent::Device;
use kata_hypervisor::PciPath;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};

use super::StorageError;

/// One device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockDevice {
    /// Its node on the host.
    pub(crate) path: PathBuf,
    /// Whether the container may not write it.
    pub(crate) readonly: bool,
    /// Its node in the container.
    node: PathBuf,
}

impl BlockDevice {
    /// What the agent is told of it.
    pub(crate) fn device(&self, at: PciPath) -> Device {
        Device {
            id: at.0,
            type_: "blk".to_owned(),
            container_path: self.node.display().to_string(),
            ..Default::default()
        }
    }
}

/// The block devices that a container asks for.
pub(crate) fn asked(spec: &Spec) -> Result<Vec<BlockDevice>, StorageError> {
    find(spec, Path::new("/sys"))
}

fn find(spec: &Spec, sys: &Path) -> Result<Vec<BlockDevice>, StorageError> {
    let Some(linux) = spec.linux() else { return Ok(Vec::new()) };
    let rules =
        linux.resources().as_ref().and_then(|resources| resources.devices().clone()).unwrap_or_default();
    let devices = linux.devices().iter().flatten().filter(|device| device.typ() == LinuxDeviceType::B);
    let asked = devices.filter_map(|device| Some((device, rules.iter().find(|rule| is_of(rule, device))?)));
    asked
        .map(|(device, rule)| {
            let readonly = !rule.access().as_deref().unwrap_or_default().contains('w');
            Ok(BlockDevice { path: on_host(device, sys)?, readonly, node: device.path().clone() })
        })
        .collect()
}

fn is_of(rule: &LinuxDeviceCgroup, device: &LinuxDevice) -> bool {
    rule.allow()
        && rule.typ() == Some(LinuxDeviceType::B)
        && (rule.major(), rule.minor()) == (Some(device.major()), Some(device.minor()))
}

/// The host's node of a device, by its numbers.
fn on_host(device: &LinuxDevice, sys: &Path) -> Result<PathBuf, StorageError> {
    let uevent = sys.join(format!("dev/block/{}:{}/uevent", device.major(), device.minor()));
    let text =
        std::fs::read_to_string(&uevent).map_err(|error| StorageError::file("look at", &uevent, error))?;
    let name = text.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    name.map(|name| Path::new("/dev").join(name)).ok_or(StorageError::Absent(uevent))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn devices_with_a_rule_of_their_own_are_asked_for() {
        let sys = tempfile::tempdir().unwrap();
        for (numbers, name) in [("8:16", "sdb"), ("259:3", "mapper/pv")] {
            let dir = sys.path().join("dev/block").join(numbers);
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(dir.join("uevent"), format!("MAJOR=8\nDEVNAME={name}\n")).unwrap();
        }
        let device = |path: &str, typ: &str, major: i64, minor: i64| json!({"path": path, "type": typ, "major": major, "minor": minor});
        let rule = |typ: &str, major: i64, minor: i64, access: &str| json!({"allow": true, "type": typ, "major": major, "minor": minor, "access": access});
        let spec = |rules: serde_json::Value| -> Spec {
            serde_json::from_value(json!({"ociVersion": "1.1.0", "linux": {
                "devices": [device("/dev/x", "b", 8, 16), device("/dev/y", "b", 259, 3), device("/dev/tty", "c", 5, 0)],
                "resources": {"devices": rules},
            }}))
            .unwrap()
        };
        let rules = json!([{"allow": false, "access": "rwm"}, rule("b", 8, 16, "rwm"), rule("b", 259, 3, "rm"), rule("c", 5, 0, "rwm")]);
        let found = find(&spec(rules), sys.path()).unwrap();
        let expected = [("/dev/sdb", false, "/dev/x"), ("/dev/mapper/pv", true, "/dev/y")]
            .map(|(path, readonly, node)| BlockDevice { path: path.into(), readonly, node: node.into() });
        assert_eq!(found, expected);

        // A privileged container.
        let all = json!([{"allow": true, "access": "rwm"}]);
        assert_eq!(find(&spec(all), sys.path()).unwrap(), []);
        let gone = find(&spec(json!([rule("b", 8, 16, "rwm")])), Path::new("/nonexistent")).unwrap_err();
        assert!(gone.to_string().contains("8:16"), "{gone}");
    }
}

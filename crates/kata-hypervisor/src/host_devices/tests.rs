//! Devices in a `/sys` and a `/dev` of the test's own.

use std::os::unix::fs::symlink;

use super::*;

const DRIVE: &str = "0000:01:00.0";

pub(crate) struct Host {
    dir: tempfile::TempDir,
}

impl Host {
    fn new() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir_all(host.path("dev/vfio")).unwrap();
        fs::write(host.path("dev/vfio/vfio"), "").unwrap();
        host
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    /// A device in a group, with a driver or none.
    fn device(&self, address: &str, group: u32, driver: Option<&str>) {
        let device = self.path(&format!("sys/bus/pci/devices/{address}"));
        let members = self.path(&format!("sys/kernel/iommu_groups/{group}/devices"));
        for directory in [&device, &members] {
            fs::create_dir_all(directory).unwrap();
        }
        symlink(&device, members.join(address)).unwrap();
        symlink(members.parent().unwrap(), device.join("iommu_group")).unwrap();
        if let Some(driver) = driver {
            symlink(format!("../../../bus/pci/drivers/{driver}"), device.join("driver")).unwrap();
        }
        fs::write(self.path(&format!("dev/vfio/{group}")), "").unwrap();
    }

    fn groups(&self) -> Groups {
        Groups { sys: self.path("sys"), dev: self.path("dev"), open: Mutex::default() }
    }
}

/// A host with the device 0000:01:00.0 alone in a group, ready to be given away.
pub(crate) fn drive(group: u32) -> (Groups, Host) {
    let host = Host::new();
    host.device(DRIVE, group, Some("vfio-pci"));
    (host.groups(), host)
}

fn device(id: &str, address: &str) -> HostDevice {
    HostDevice { id: id.to_owned(), address: address.to_owned() }
}

fn refusal(host: &Host, address: &str) -> HostDeviceError {
    host.groups().open(&device("drive", address)).unwrap_err()
}

#[test]
fn device_whose_whole_group_is_free_is_opened_and_its_group_once() {
    let host = Host::new();
    host.device(DRIVE, 7, Some("vfio-pci"));
    host.device("0000:01:00.1", 7, Some("vfio-pci"));
    host.device("0000:00:1c.0", 7, Some("pcieport"));
    host.device("0000:01:00.2", 7, None);
    let groups = host.groups();
    let ready = groups.open(&device("a", DRIVE)).unwrap();
    assert_eq!(ready.group, 7);
    // A second time it would not open, as those of /dev/vfio do not.
    fs::remove_file(host.path("dev/vfio/7")).unwrap();
    groups.open(&device("b", "0000:01:00.1")).unwrap();
    groups.release("a");
    groups.open(&device("c", DRIVE)).unwrap();
    groups.release("nobody");
    groups.release("b");
    groups.release("c");
    let error = groups.open(&device("d", DRIVE)).unwrap_err();
    assert!(matches!(&error, HostDeviceError::File { path, .. } if path.ends_with("vfio/7")), "{error}");
}

#[test]
fn device_that_is_the_hosts_is_refused_with_what_to_do() {
    let host = Host::new();
    host.device("0000:02:00.0", 8, Some("nvme"));
    host.device("0000:03:00.0", 9, None);
    let error = refusal(&host, "0000:02:00.0");
    assert_eq!(
        error.to_string(),
        "PCI device 0000:02:00.0 is bound to nvme, not bound to vfio-pci; bind it: driverctl set-override 0000:02:00.0 vfio-pci"
    );
    let error = refusal(&host, "0000:03:00.0");
    assert!(matches!(error, HostDeviceError::NotBound { driver: None, .. }), "{error}");
    let error = refusal(&host, "0000:04:00.0");
    assert!(matches!(error, HostDeviceError::NotFound(_)), "{error}");
    fs::create_dir_all(host.path("sys/bus/pci/devices/0000:05:00.0")).unwrap();
    let error = refusal(&host, "0000:05:00.0");
    assert!(error.to_string().contains("intel_iommu=on"), "{error}");
}

#[test]
fn device_that_shares_its_group_with_the_host_is_refused_by_the_other_s_name() {
    let host = Host::new();
    host.device(DRIVE, 7, Some("vfio-pci"));
    host.device("0000:01:00.1", 7, Some("snd_hda_intel"));
    let error = refusal(&host, DRIVE);
    assert!(error.to_string().contains("0000:01:00.1, which is bound to snd_hda_intel"), "{error}");
}

#[test]
fn text_that_is_no_address_never_becomes_a_path() {
    let host = Host::new();
    for text in [
        "",
        "..",
        "../../../..",
        "01:00.0",
        "0000:01:00.0/..",
        "0000.01.00:0",
        "0000:01:0g.0",
        "0000:01:00:0",
    ] {
        let error = refusal(&host, text);
        assert!(matches!(error, HostDeviceError::Address(_)), "{text}: {error}");
    }
}

use std::fs::{create_dir_all, read_to_string, write};
use std::os::unix::fs::symlink;

use rustix::fs::{CWD, FileType, Mode, OFlags};

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxResources, Process};

use super::*;

/// A guest whose sysfs is a directory.
struct Guest {
    passing: Passing,
    dir: tempfile::TempDir,
}

const FUNCTION: &str = "sys/devices/pci0000:00/0000:00:02.0/0000:01:00.0";

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let timeout = Duration::from_millis(20);
        let mut passing = Passing::new(Arc::default(), timeout);
        passing.sys = dir.path().join("sys");
        Self { passing, dir }
    }

    fn file(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        create_dir_all(path.parent().unwrap()).unwrap();
        write(path, text).unwrap();
    }

    /// A function behind a bridge, with this driver, in IOMMU group 7.
    fn plug_in(&self, driver: &str) {
        create_dir_all(self.dir.path().join("sys/devices/pci0000:00/0000:00:02.0/pci_bus/0000:01")).unwrap();
        let function = self.dir.path().join(FUNCTION);
        create_dir_all(&function).unwrap();
        self.file("sys/class/vfio/7/dev", "245:3\n");
        self.file("sys/bus/pci/drivers_probe", "");
        self.file(&format!("sys/bus/pci/drivers/{driver}/unbind"), "");
        symlink(self.dir.path().join("sys/bus/pci/drivers").join(driver), function.join("driver")).unwrap();
        symlink("/sys/kernel/iommu_groups/7", function.join("iommu_group")).unwrap();
    }

    fn written(&self, path: &str) -> String {
        read_to_string(self.dir.path().join(path)).unwrap()
    }
}

fn passed(kind: &str, options: &[&str]) -> Device {
    Device {
        type_: kind.to_owned(),
        container_path: "/dev/vfio/12".to_owned(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Default::default()
    }
}

fn spec_with(path: &str, kind: LinuxDeviceType, (major, minor): (i64, i64)) -> Spec {
    let mut device = LinuxDevice::default();
    device.set_path(path.into()).set_typ(kind).set_major(major).set_minor(minor);
    let rule = |major, minor| {
        let mut rule = LinuxDeviceCgroup::default();
        rule.set_allow(true).set_typ(Some(kind)).set_major(Some(major)).set_minor(Some(minor));
        rule
    };
    let mut resources = LinuxResources::default();
    resources.set_devices(Some(vec![rule(major, minor), rule(1, 3)]));
    let mut linux = Linux::default();
    linux.set_devices(Some(vec![device])).set_resources(Some(resources));
    let mut process = Process::default();
    process.set_env(Some(vec![
        "PCIDEVICE_NIC=0000:65:00.1,0000:66:00.0".to_owned(),
        "A=0000:65:00.1".to_owned(),
    ]));
    let mut spec = Spec::default();
    spec.set_linux(Some(linux)).set_process(Some(process));
    spec
}

fn numbers(spec: &Spec) -> Vec<(i64, i64)> {
    let linux = spec.linux().as_ref().unwrap();
    let rules = linux.resources().as_ref().unwrap().devices().iter().flatten();
    let nodes = linux.devices().iter().flatten().map(|device| (device.major(), device.minor()));
    nodes.chain(rules.map(|rule| (rule.major().unwrap(), rule.minor().unwrap()))).collect()
}

#[test]
fn a_passed_disk_has_the_guests_numbers_in_the_node_and_in_the_rule_that_allows_it() {
    let guest = Guest::new();
    guest.file("sys/class/block/vdb/dev", "254:16\n");
    let device = Device { container_path: "/dev/data".to_owned(), ..Default::default() };
    let nodes = vec![guest.passing.block(&device, Path::new("/dev/vdb")).unwrap()];
    let mut spec = spec_with("/dev/data", LinuxDeviceType::B, (8, 32));
    Passed { nodes, functions: HashMap::new() }.update(&mut spec).unwrap();
    assert_eq!(numbers(&spec), [(254, 16), (254, 16), (1, 3)]);
}

#[test]
fn a_passed_device_that_the_specification_does_not_have_is_refused_by_name() {
    let node = Node { container_path: "/dev/a".into(), path: "/dev/a".into(), major: 1, minor: 2 };
    let passed = Passed { nodes: vec![node], functions: HashMap::new() };
    let error = passed.update(&mut spec_with("/dev/b", LinuxDeviceType::B, (8, 0))).unwrap_err();
    assert!(error.to_string().contains("\"/dev/a\""), "{error}");
}

#[tokio::test]
async fn a_function_for_the_guests_driver_keeps_it_and_is_renamed_in_the_environment() {
    let guest = Guest::new();
    guest.plug_in("mlx5_core");
    let found = guest.passing.find(&[passed("vfio-pci-gk", &["0000:65:00.1=02/00"])]).await.unwrap();
    let mut spec = spec_with("/dev/vfio/12", LinuxDeviceType::C, (240, 1));
    found.update(&mut spec).unwrap();
    let env = spec.process().as_ref().unwrap().env().clone().unwrap();
    assert_eq!(env, ["PCIDEVICE_NIC=0000:01:00.0,0000:66:00.0", "A=0000:65:00.1"]);
    assert_eq!(numbers(&spec)[0], (240, 1), "there is no node to exchange");
    assert!(!guest.dir.path().join(FUNCTION).join("driver_override").exists());
}

#[tokio::test]
async fn a_function_of_vfio_becomes_the_guests_group() {
    let guest = Guest::new();
    guest.plug_in("vfio-pci");
    let found = guest.passing.find(&[passed("vfio-pci", &["0000:65:00.1=02/00"])]).await.unwrap();
    let mut spec = spec_with("/dev/vfio/12", LinuxDeviceType::C, (240, 1));
    found.update(&mut spec).unwrap();
    assert_eq!(numbers(&spec), [(245, 3), (245, 3), (1, 3)]);
    let devices = spec.linux().as_ref().unwrap().devices().clone().unwrap();
    assert_eq!(devices[0].path(), Path::new("/dev/vfio/7"));
}

#[tokio::test]
async fn a_function_is_taken_from_its_driver_and_one_that_stays_there_is_an_error() {
    let guest = Guest::new();
    guest.plug_in("mlx5_core");
    let error = guest.passing.find(&[passed("vfio-pci", &["0000:65:00.1=02/00"])]).await.unwrap_err();
    // No kernel is behind these files, so the driver stays.
    assert!(matches!(&error, DeviceError::NotBound { driver, .. } if driver == "mlx5_core"), "{error}");
    assert_eq!(guest.written(&format!("{FUNCTION}/driver_override")), "vfio-pci");
    assert_eq!(guest.written("sys/bus/pci/drivers/mlx5_core/unbind"), "0000:01:00.0");
    assert_eq!(guest.written("sys/bus/pci/drivers_probe"), "0000:01:00.0");
}

#[tokio::test]
async fn a_function_that_does_not_come_is_absent_by_the_hosts_name() {
    let guest = Guest::new();
    let error = guest.passing.find(&[passed("vfio-pci-gk", &["0000:65:00.1=02/00"])]).await.unwrap_err();
    let text = crate::chain(&error);
    assert!(text.contains("0000:65:00.1") && text.contains("agent.hotplug_timeout"), "{text}");
}

#[tokio::test]
async fn devices_of_other_architectures_and_nonsense_are_refused() {
    let guest = Guest::new();
    for kind in ["blk-ccw", "vfio-ap", "vfio-ap-cold"] {
        let error = guest.passing.find(&[passed(kind, &[])]).await.unwrap_err();
        assert!(error.to_string().contains("not on this architecture"), "{error}");
    }
    let error = guest.passing.find(&[passed("floppy", &[])]).await.unwrap_err();
    assert!(matches!(error, DeviceError::Unsupported(..)), "{error}");
    for options in [&["0000:65:00.1"] as &[&str], &[]] {
        let error = guest.passing.find(&[passed("vfio-pci", options)]).await.unwrap_err();
        assert!(matches!(error, DeviceError::Invalid { .. }), "{error}");
    }
    let error = guest.passing.find(&[passed("vfio-pci", &["0000:65:00.1=../etc"])]).await.unwrap_err();
    assert!(matches!(error, DeviceError::Path { .. }), "{error}");
}

#[tokio::test]
async fn a_driver_that_does_not_let_go_of_its_device_is_told_and_keeps_nobody_waiting() {
    let mut guest = Guest::new();
    guest.passing.bound = Duration::from_millis(20);
    guest.plug_in("nvme");
    // Nobody reads it, so who writes waits.
    let unbind = guest.dir.path().join("sys/bus/pci/drivers/nvme/unbind");
    std::fs::remove_file(&unbind).unwrap();
    rustix::fs::mknodat(CWD, &unbind, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let error = guest.passing.find(&[passed("vfio-pci", &["0000:65:00.0=02/00"])]).await.unwrap_err();
    assert!(matches!(&error, DeviceError::Aside(AsideError::Overdue { .. })), "{error}");
    assert!(error.to_string().contains("giving PCI device 0000:01:00.0 to vfio-pci"), "{error}");
    drop(rustix::fs::open(&unbind, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap());
}

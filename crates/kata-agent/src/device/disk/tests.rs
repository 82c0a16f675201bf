use std::fs::{create_dir_all, write};
use std::os::unix::net::UnixDatagram;

use rustix::fs::{CWD, FileType};

use super::*;

/// A machine whose devices are directories, and whose kernel is the test.
struct Machine {
    disks: Disks,
    kernel: UnixDatagram,
    uevents: Uevents,
    dir: tempfile::TempDir,
}

impl Machine {
    fn new(timeout: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (kernel, socket) = UnixDatagram::pair().unwrap();
        let tree = Tree { sys: dir.path().join("sys"), dev: dir.path().join("dev") };
        create_dir_all(&tree.dev).unwrap();
        create_dir_all(tree.sys.join("devices/pci0000:00/0000:00:02.0/pci_bus/0000:01")).unwrap();
        let disks = Disks { modules: Arc::default(), tree, timeout, bound: LONG };
        Self { disks, kernel, uevents: Uevents::of(socket.into()).unwrap(), dir }
    }

    fn device(&self) -> PathBuf {
        self.dir.path().join("sys/devices/pci0000:00/0000:00:02.0/0000:01:00.0")
    }

    fn plug_in(&self) {
        create_dir_all(self.device().join("virtio3/block/vdb")).unwrap();
    }

    fn open_up(&self) {
        write(self.dir.path().join("dev/vdb"), "").unwrap();
    }

    fn tell(&self) {
        self.kernel.send(b"add@/devices").unwrap();
    }

    async fn find(&self, disk: &str) -> Result<PathBuf, DiskError> {
        let place = Place::parse(disk)?;
        self.disks.wait(disk, &place, &self.uevents).await
    }

    fn node(&self) -> PathBuf {
        self.dir.path().join("dev/vdb")
    }
}

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(20);

#[tokio::test]
async fn a_disk_that_is_there_is_found_without_an_event() {
    let machine = Machine::new(LONG);
    machine.plug_in();
    machine.open_up();
    assert_eq!(machine.find("02/00").await.unwrap(), machine.node());
    assert_eq!(machine.find("/dev/vdb").await.unwrap(), machine.node());
}

#[tokio::test]
async fn a_disk_is_waited_for_until_it_can_be_opened() {
    let machine = Machine::new(LONG);
    let (found, ()) = tokio::join!(machine.find("02/00"), async {
        machine.tell();
        tokio::task::yield_now().await;
        machine.plug_in();
        machine.tell();
        tokio::time::sleep(SHORT).await;
        machine.open_up();
        machine.tell();
    });
    assert_eq!(found.unwrap(), machine.node());
}

#[tokio::test]
async fn a_disk_that_does_not_come_is_absent_with_its_path_and_what_is_there() {
    let machine = Machine::new(SHORT);
    let text = |error: DiskError| crate::chain(&error);
    let nothing = text(machine.find("02/00").await.unwrap_err());
    for part in
        ["disk 02/00", "20ms", "agent.hotplug_timeout", "no PCI device 0000:01:00.0", "on its bus: none"]
    {
        assert!(nothing.contains(part), "{part}: {nothing}");
    }
    create_dir_all(machine.device()).unwrap();
    write(machine.device().join("vendor"), "0x8086\n").unwrap();
    write(machine.device().join("device"), "0x100e\n").unwrap();
    let other = text(machine.find("02/00").await.unwrap_err());
    assert!(other.contains("0000:01:00.0 (8086:100e) is not a virtio disk"), "{other}");
    machine.plug_in();
    let closed = text(machine.find("02/00").await.unwrap_err());
    assert!(closed.contains("dev/vdb") && closed.contains("No such file"), "{closed}");
}

#[tokio::test]
async fn what_is_neither_a_pci_path_nor_a_device_is_refused() {
    let machine = Machine::new(LONG);
    for disk in ["", "/dev/", "/dev/../etc/shadow", "/dev/disk/by-id/x", "vda", "0000:00:02.0"] {
        let error = machine.find(disk).await.unwrap_err();
        assert!(matches!(error, DiskError::Source(_)), "{disk}: {error}");
    }
}

#[tokio::test]
async fn a_scsi_disk_is_found_behind_whichever_controller_has_it_and_asked_for_before() {
    let machine = Machine::new(SHORT);
    let sys = machine.dir.path().join("sys");
    create_dir_all(sys.join("class/scsi_host/host2")).unwrap();
    let find = async || machine.disks.wait("1:3", &Place::scsi("1:3").unwrap(), &machine.uevents).await;
    let missing = crate::chain(&find().await.unwrap_err());
    assert!(missing.contains("no SCSI controller has a disk 1:3"), "{missing}");
    assert_eq!(std::fs::read_to_string(sys.join("class/scsi_host/host2/scan")).unwrap(), "0 1 3");
    create_dir_all(sys.join("bus/scsi/devices/2:0:1:3/block/vdb")).unwrap();
    machine.open_up();
    assert_eq!(find().await.unwrap(), machine.node());
    for address in ["", "1", "1:", "a:b", "1:2:3", "-1:0"] {
        assert!(matches!(Place::scsi(address), Err(DiskError::Address(_))), "{address}");
    }
}

#[tokio::test]
async fn a_controller_that_does_not_come_back_from_looking_is_told_and_keeps_nobody_waiting() {
    let mut machine = Machine::new(LONG);
    machine.disks.bound = SHORT;
    // Nobody reads it, so who writes waits.
    let scan = machine.dir.path().join("sys/class/scsi_host/host0/scan");
    create_dir_all(scan.parent().unwrap()).unwrap();
    create_dir_all(machine.dir.path().join("sys/bus/scsi/devices")).unwrap();
    rustix::fs::mknodat(CWD, &scan, FileType::Fifo, Mode::RWXU, 0).unwrap();
    let place = Place::scsi("0:1").unwrap();
    let error = machine.disks.wait("0:1", &place, &machine.uevents).await.unwrap_err();
    assert!(matches!(&error, DiskError::Aside(AsideError::Overdue { .. })), "{error}");
    assert!(error.to_string().contains("looking for disk 0:1"), "{error}");
    drop(open(&scan, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap());
}

//! Network interfaces and disks, from the start and later, in every QEMU that there is.

use std::num::NonZeroU64;

use super::*;
use crate::vm::Disk;

/// The QEMUs there are: the installed one, and the newer one that the suite unpacks.
fn programs() -> Vec<PathBuf> {
    let newer = std::env::var_os("KATA_TEST_NEWER_QEMU");
    if newer.is_none() {
        eprintln!("skipped: KATA_TEST_NEWER_QEMU is not set, so only the installed QEMU is tried");
    }
    ["/usr/bin/qemu-system-x86_64".into()].into_iter().chain(newer).map(PathBuf::from).collect()
}

/// The queues of a tap in a network namespace that lives as long as they do.
fn tap(queues: usize) -> Vec<OwnedFd> {
    let open = move || {
        // SAFETY: only this thread moves, and it ends here; nothing else runs on it.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        // SAFETY: an ifreq is plain numbers, for which zeroes are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_name[..4].copy_from_slice(&b"tap0".map(u8::cast_signed));
        let kind = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let many = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        request.ifr_ifru.ifru_flags = i16::try_from(kind | many).unwrap();
        let queue = || {
            let tun = fs::File::options().read(true).write(true).open("/dev/net/tun").unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&tun);
            // SAFETY: the request outlives the call, which reads and writes no more than an ifreq.
            assert_eq!(unsafe { libc::ioctl(fd, libc::TUNSETIFF, &raw const request) }, 0);
            tun.into()
        };
        std::iter::repeat_with(queue).take(queues).collect()
    };
    std::thread::spawn(open).join().unwrap()
}

fn nic(id: &str, last: u8, queues: usize) -> Nic {
    Nic { id: id.to_owned(), mac: [2, 0, 0, 0, 0, last], mtu: 1400, queues: tap(queues), vhost: Vec::new() }
}

async fn ask(vm: &QemuVm, command: &str) -> Value {
    let qmp = vm.0.state().qmp.clone().unwrap();
    qmp.execute(command, Value::Null, COMMAND_BOUND).await.unwrap()
}

/// Hardware addresses of the network interfaces that QEMU emulates.
async fn macs(vm: &QemuVm) -> Vec<String> {
    let filters = ask(vm, "query-rx-filter").await;
    let filters = filters.as_array().unwrap().iter();
    let mut macs: Vec<String> = filters.map(|nic| nic["main-mac"].as_str().unwrap().to_owned()).collect();
    macs.sort();
    macs
}

#[tokio::test]
async fn network_interfaces_are_there_at_the_start_of_both_machines() {
    for program in programs() {
        for machine in [Machine::Q35, Machine::Microvm] {
            let Some(bench) = Bench::new(None) else { return };
            let kernel = kernel_that_says("", FOR_EVER);
            let nics = vec![nic("eth0", 1, 1), nic("eth1", 2, 2)];
            let spec = VmSpec { nics, program: program.clone(), ..bench.spec(machine, &kernel) };
            let vm = QemuVm::new();
            vm.boot(spec, &bench.record).await.unwrap();
            assert_eq!(macs(&vm).await, ["02:00:00:00:00:01", "02:00:00:00:00:02"], "{machine}");
            vm.stop().await.unwrap();
        }
    }
}

#[tokio::test]
async fn devices_are_added_to_a_q35_and_a_guest_that_does_not_answer_keeps_them() {
    for program in programs() {
        let Some(bench) = Bench::new(None) else { return };
        let spec = bench.spec(Machine::Q35, &kernel_that_says("", FOR_EVER));
        let vm = QemuVm::new();
        vm.boot(VmSpec { program, ..spec }, &bench.record).await.unwrap();
        assert!(vm.capabilities().hotplug_block && vm.capabilities().hotplug_network);

        let path = bench.dir.path().join("disk");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        let disk = |id: &str, readonly| Disk { id: id.to_owned(), path: path.clone(), readonly };
        assert_eq!(vm.add_device(disk("a", true).into()).await.unwrap().0, "10/01");
        assert_eq!(vm.add_device(disk("b", false).into()).await.unwrap().0, "10/02");
        assert_eq!(vm.add_device(nic("eth0", 7, 1).into()).await.unwrap().0, "10/03");
        assert_eq!(vm.add_device(nic("eth1", 8, 2).into()).await.unwrap().0, "10/04");
        assert_eq!(macs(&vm).await, ["02:00:00:00:00:07", "02:00:00:00:00:08"]);
        let disks = ask(&vm, "query-block").await;
        let readonly: Vec<&Value> =
            disks.as_array().unwrap().iter().map(|disk| &disk["inserted"]["ro"]).collect();
        assert_eq!(readonly, [&Value::Bool(true), &Value::Bool(false)]);

        // One queue serves no two interfaces, so QEMU refuses; what it was given is taken back, and the slot with it.
        let broken = Nic { queues: vec![fs::File::open("/dev/null").unwrap().into()], ..nic("eth2", 9, 1) };
        assert!(matches!(vm.add_device(broken.into()).await.unwrap_err(), HypervisorError::Qmp(_)));
        assert_eq!(vm.add_device(disk("c", true).into()).await.unwrap().0, "10/05");

        let qmp = vm.control("test").unwrap();
        let bound = Duration::from_millis(200);
        let error = vm.0.plugged.lock().await.remove(&qmp, "a", bound).await.unwrap_err();
        assert!(matches!(error, HypervisorError::DeviceHeld { .. }), "{error:?}");
        assert!(matches!(
            vm.remove_device("z").await.unwrap_err(),
            HypervisorError::UnknownDevice { id } if id == "z"
        ));
        vm.stop().await.unwrap();
        assert!(matches!(
            vm.add_device(disk("d", true).into()).await.unwrap_err(),
            HypervisorError::Ended(_)
        ));
    }
}

#[tokio::test]
async fn image_and_disks_that_are_added_are_held_to_their_limits() {
    for program in programs() {
        let Some(bench) = Bench::new(None) else { return };
        let path = bench.dir.path().join("disk");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        let limits = DiskLimits {
            bytes_per_second: NonZeroU64::new(1 << 20),
            requests_per_second: NonZeroU64::new(50),
        };
        let spec = bench.spec(Machine::Q35, &kernel_that_says("", FOR_EVER));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let vm = QemuVm::new();
        let spec = VmSpec { program, image: Some(path.clone()), disk_limits: limits, ..spec };
        vm.boot(spec, &bench.record).await.unwrap();
        vm.add_device(Disk { id: "a".to_owned(), path: path.clone(), readonly: false }.into()).await.unwrap();
        let disks = ask(&vm, "query-block").await;
        let held: Vec<(&Value, &Value)> = disks
            .as_array()
            .unwrap()
            .iter()
            .map(|disk| (&disk["inserted"]["node-name"], &disk["inserted"]["drv"]))
            .collect();
        assert_eq!(held, [(&"image".into(), &"throttle".into()), (&"disk1".into(), &"throttle".into())]);
        let qmp = vm.0.state().qmp.clone().unwrap();
        for group in ["image-limits", "disk1-limits"] {
            let limits = serde_json::json!({ "path": format!("/objects/{group}"), "property": "limits" });
            let limits = qmp.execute("qom-get", limits, COMMAND_BOUND).await.unwrap();
            assert_eq!(
                (&limits["bps-total"], &limits["iops-total"]),
                (&(1 << 20).into(), &50.into()),
                "{group}"
            );
        }
        vm.stop().await.unwrap();
    }
}

#[tokio::test]
async fn microvm_takes_no_further_devices_and_says_what_does() {
    let Some(bench) = Bench::new(None) else { return };
    let vm = QemuVm::new();
    vm.boot(bench.spec(Machine::Microvm, &kernel_that_says("", FOR_EVER)), &bench.record).await.unwrap();
    assert!(!vm.capabilities().hotplug_block && !vm.capabilities().hotplug_network);
    let disk = Disk { id: "a".to_owned(), path: "/dev/null".into(), readonly: true };
    assert_eq!(
        vm.add_device(disk.into()).await.unwrap_err().to_string(),
        "adding a disk is not supported by QEMU's machine microvm; set hypervisor.qemu.machine_type to \"q35\""
    );
    vm.stop().await.unwrap();
}

/// An initramfs archive (the kernel's documentation, buffer-format) of one executable file.
fn archive_of(name: &str, contents: &str) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, contents) in [(name, contents), ("TRAILER!!!", "")] {
        let (size, name_size) = (contents.len(), name.len() + 1);
        let fields = [1, 0o100_755, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        archive.extend(b"070701");
        fields.iter().for_each(|field| archive.extend(format!("{field:08x}").bytes()));
        for part in [format!("{name}\0").as_bytes(), contents.as_bytes()] {
            archive.extend(part);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    }
    archive
}

/// Says when the first slot of the bridge has a device, and when it has none any more.
const WATCHING_INIT: &str = "#!/bin/busybox sh
b=/bin/busybox
$b mkdir -p /sys
$b mount -t sysfs sysfs /sys
d=/sys/bus/pci/devices/0000:01:01.0
echo READY
for disk in a b; do
    until [ -e $d ]; do $b usleep 10000; done
    echo $disk is there: $($b cat $d/device $d/class)
    while [ -e $d ]; do $b usleep 10000; done
    echo $disk is gone
done
exec $b sleep 600
";

#[tokio::test]
async fn linux_sees_a_disk_come_and_lets_go_of_it() {
    let (Some(kernel), Some(initrd)) =
        (std::env::var_os("KATA_TEST_KERNEL"), std::env::var_os("KATA_TEST_INITRD"))
    else {
        eprintln!("skipped: KATA_TEST_KERNEL and KATA_TEST_INITRD are not set");
        return;
    };
    for program in programs() {
        let Some(bench) = Bench::new(None) else { return };
        let mut spec = bench.spec(Machine::Q35, b"");
        // Of a file that is in two archives, the later one counts.
        let mut archives = fs::read(&initrd).unwrap();
        archives.extend(archive_of("init", WATCHING_INIT));
        fs::write(bench.dir.path().join("initrd"), archives).unwrap();
        spec.kernel_params = ["console=ttyS0", "quiet", "panic=1"].map(str::to_owned).to_vec();
        let vm = QemuVm::new();
        let spec = VmSpec { kernel: PathBuf::from(&kernel), memory_mib: 256, program, ..spec };
        vm.boot(spec, &bench.record).await.unwrap();
        console_says(&vm, "READY").await;

        let path = bench.dir.path().join("disk");
        fs::write(&path, vec![0; 1 << 20]).unwrap();
        // The second round takes the slot that the first has given back.
        for id in ["a", "b"] {
            let disk = Disk { id: id.to_owned(), path: path.clone(), readonly: false };
            assert_eq!(vm.add_device(disk.into()).await.unwrap().0, "10/01");
            console_says(&vm, &format!("{id} is there: 0x1042 0x010000")).await;
            vm.remove_device(id).await.unwrap();
            console_says(&vm, &format!("{id} is gone")).await;
            assert_eq!(ask(&vm, "query-fdsets").await, serde_json::json!([]));
            assert_eq!(ask(&vm, "query-named-block-nodes").await, serde_json::json!([]));
        }
        vm.stop().await.unwrap();
    }
}

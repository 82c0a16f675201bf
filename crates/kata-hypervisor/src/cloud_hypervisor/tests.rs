//! The driver against a server that takes only what is published, see [`crate::rest::fake`].

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::io::Write;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Mutex;

use rustix::process::Signal;
use serde_json::{Value, json};

use super::*;
use crate::rest::fake::{Bench, Interface, Seen, Server, descriptor, listener, pid_of, signal};
use crate::vm::{Backing, DiskLimits, SharedFs};

/// Numbers of the VMM's descriptors.
const API: i32 = 3;
const MONITOR: i32 = 4;
const CONSOLE: i32 = 5;

/// What the server knows of the machine.
struct Machine {
    vcpus: u64,
    memory: u64,
    devices: BTreeSet<String>,
    /// How often the guest is asked about before it has let go.
    holds: u32,
}

impl Machine {
    fn answer(&mut self, seen: &Seen) -> (u16, Value) {
        let id = seen.body["id"].as_str().unwrap_or_default().to_owned();
        match seen.line.rsplit('.').next().unwrap_or_default() {
            "ping" => (200, json!({"version": "v50.0", "pid": 1, "features": ["kvm"]})),
            "info" => {
                self.holds = self.holds.saturating_sub(1);
                if self.holds == 0 {
                    self.devices.retain(|device| !device.starts_with('-'));
                }
                let tree: Value = self
                    .devices
                    .iter()
                    .map(|id| (id.trim_start_matches('-').to_owned(), json!({"pci_bdf": "x"})))
                    .collect();
                let config = json!({"cpus": {"boot_vcpus": self.vcpus, "max_vcpus": 4}, "memory": {"size": self.memory}});
                (200, json!({"config": config, "state": "Running", "device_tree": tree}))
            }
            "add-disk" | "add-net" if self.vcpus > 0 => {
                self.devices.insert(id.clone());
                (200, json!({"id": id, "bdf": format!("0000:00:{:02x}.0", 5 + self.devices.len())}))
            }
            "remove-device" => {
                self.devices.remove(&id);
                self.devices.insert(format!("-{id}"));
                self.holds = 3;
                (204, Value::Null)
            }
            "boot" => {
                self.vcpus = 1;
                (204, Value::Null)
            }
            "resize" => {
                self.vcpus = seen.body["desired_vcpus"].as_u64().unwrap_or(self.vcpus);
                self.memory = seen.body["desired_ram"].as_u64().unwrap_or(self.memory);
                (204, Value::Null)
            }
            _ => (204, Value::Null),
        }
    }
}

/// A machine that was started, the server that speaks for its VMM, and the VMM's pid.
async fn started(bench: &Bench, spec: VmSpec) -> (CloudHypervisorVm, Server, u32) {
    let memory = spec.memory_mib * MIB;
    let machine = Mutex::new(Machine { vcpus: 0, memory, devices: BTreeSet::new(), holds: 0 });
    let (vm, outcome, server, pid) =
        boot(bench, spec, move |seen| machine.lock().unwrap().answer(seen)).await;
    outcome.unwrap_or_else(|error| panic!("{error}: {:?}", server.seen()));
    (vm, server, pid)
}

async fn boot(
    bench: &Bench,
    spec: VmSpec,
    answer: impl Fn(&Seen) -> (u16, Value) + Send + 'static,
) -> (CloudHypervisorVm, Result<Origin, HypervisorError>, Server, u32) {
    // Any device will do whose file the user may read and write.
    let vm = CloudHypervisorVm::with_kvm("/dev/null");
    let interface = Interface::parse(include_str!("interface.toml"));
    let (outcome, (server, pid)) = tokio::join!(vm.boot(spec, &bench.record), async {
        let pid = pid_of(&vm).await;
        (Server::run(listener(pid, API), interface, answer), pid)
    });
    (vm, outcome, server, pid)
}

fn whole(error: &HypervisorError) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

async fn ended(vm: &CloudHypervisorVm) -> VmExit {
    tokio::time::timeout(Duration::from_secs(20), vm.exited()).await.unwrap()
}

#[tokio::test]
async fn machine_is_asked_for_in_published_terms_and_files_go_as_descriptors() {
    let Some(bench) = Bench::new() else { return };
    let daemon = UnixListener::bind(bench.path("fs")).unwrap();
    fs::set_permissions(bench.path("fs"), fs::Permissions::from_mode(0o666)).unwrap();
    let way =
        rustix::fs::open(bench.path("fs"), rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    fs::remove_file(bench.path("fs")).unwrap();
    let tap = || OwnedFd::from(fs::File::open("/dev/null").unwrap());
    let spec = VmSpec {
        image: Some(bench.path("image")),
        disks: vec![Disk { id: "initdata".to_owned(), path: bench.path("initrd"), readonly: true }],
        growth: Some(Growth { vcpus: 4, memory_mib: 300, slots: 2 }),
        backing: Backing { prealloc: true, hugepages: false, reporting: true },
        shared_fs: Some(SharedFs { tag: "share".to_owned(), socket: way }),
        nics: vec![Nic {
            id: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 10],
            mtu: 1400,
            queues: vec![tap(), tap()],
            vhost: Vec::new(),
        }],
        ..bench.spec()
    };
    let (vm, server, pid) = started(&bench, spec).await;
    let seen = server.seen();
    assert_eq!(
        server.lines()[..4],
        ["GET vmm.ping", "PUT vm.create", "PUT vm.add-net", "PUT vm.boot"]
            .map(|line| line.replace(' ', " /api/v1/"))
    );
    let vsock = bench.path("vmm/vsock");
    let expected = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 4},
        "memory": {"size": 256 << 20, "hotplug_size": 128 << 20, "shared": true, "hugepages": false, "prefault": true},
        "payload": {"kernel": "/proc/self/fd/6", "cmdline": "console=ttyS0 quiet", "initramfs": "/proc/self/fd/7"},
        "disks": [
            {"id": "image", "path": "/proc/self/fd/8", "readonly": true, "serial": "image", "image_type": "Raw"},
            {"id": "initdata", "path": "/proc/self/fd/9", "readonly": true, "serial": "initdata", "image_type": "Raw"},
        ],
        "fs": [{"tag": "share", "socket": "/proc/self/fd/10", "num_queues": 1, "queue_size": 1024}],
        "vsock": {"cid": 3, "socket": vsock},
        "serial": {"mode": "File", "file": "/proc/self/fd/5"},
        "console": {"mode": "Off"},
        "balloon": {"size": 0, "deflate_on_oom": true, "free_page_reporting": true},
    });
    assert_eq!(seen[1].body, expected);
    assert_eq!(seen[2].body, json!({"id": "eth0", "mac": "02:00:00:00:00:0a", "mtu": 1400, "num_queues": 4}));
    assert_eq!(seen[2].fds, 2);
    for (number, file) in [(6, "kernel"), (7, "initrd"), (8, "image"), (9, "initrd")] {
        assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap(), bench.path(file));
    }
    // The daemon's socket has no path any more, and whoever has the descriptor gets through.
    let _stream = UnixStream::connect(format!("/proc/{pid}/fd/10")).unwrap();
    daemon.accept().unwrap();
    assert!(vm.capabilities().hotplug_cpu && vm.capabilities().hotplug_memory);
    vm.stop().await.unwrap();
    assert_eq!(ended(&vm).await, VmExit::Stopped);
}

#[tokio::test]
async fn vsock_leads_both_ways_through_the_directory_of_the_vmm() {
    let Some(bench) = Bench::new() else { return };
    let ready = UnixListener::bind(bench.path("kata.hvsock_1028")).unwrap();
    let (_vm, server, pid) = started(&bench, bench.spec()).await;
    let socket = server.seen()[1].body["vsock"]["socket"].as_str().unwrap().to_owned();
    assert!(
        fs::metadata(bench.path("vmm")).is_ok_and(|dir| dir.uid() == 65_534 && dir.mode() & 0o777 == 0o700)
    );
    assert_eq!(fs::metadata(format!("/proc/{pid}")).unwrap().uid(), 65_534);

    let guest = UnixListener::bind(&socket).unwrap();
    let _host = UnixStream::connect(bench.path("kata.hvsock")).unwrap();
    guest.accept().unwrap();
    let _dialled = UnixStream::connect(format!("{socket}_1028")).unwrap();
    ready.accept().unwrap();

    // A VMM that has been taken over leads nobody astray.
    fs::remove_file(&socket).unwrap();
    let other = UnixListener::bind(bench.path("other")).unwrap();
    std::os::unix::fs::symlink(bench.path("other"), &socket).unwrap();
    let error = UnixStream::connect(bench.path("kata.hvsock")).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    drop(other);
}

#[tokio::test]
async fn devices_are_added_found_and_removed_once_the_guest_has_let_go() {
    let Some(bench) = Bench::new() else { return };
    let (vm, server, _) = started(&bench, bench.spec()).await;
    fs::set_permissions(bench.path("image"), fs::Permissions::from_mode(0o644)).unwrap();
    let disk =
        Disk { id: "disk-with-a-name-of-30-letters".to_owned(), path: bench.path("image"), readonly: true };
    assert_eq!(vm.add_device(disk.clone().into()).await.unwrap(), PciPath("06".to_owned()));
    let added = server.seen().pop().unwrap().body;
    assert_eq!((&added["serial"], &added["image_type"]), (&json!("disk-with-a-name-of-"), &json!("Raw")));
    assert!(matches!(vm.add_device(disk.clone().into()).await, Err(HypervisorError::DeviceExists { .. })));

    let tap = OwnedFd::from(fs::File::open("/dev/null").unwrap());
    let nic = Nic { id: "eth1".to_owned(), mac: [2; 6], mtu: 1500, queues: vec![tap], vhost: Vec::new() };
    assert_eq!(vm.add_device(nic.into()).await.unwrap(), PciPath("07".to_owned()));
    assert_eq!(server.seen().pop().unwrap().fds, 1);

    vm.remove_device(&disk.id).await.unwrap();
    let asked = server.lines().iter().filter(|line| line.ends_with("vm.info")).count();
    assert_eq!(asked, 3, "the guest was waited for");
    assert!(matches!(vm.remove_device(&disk.id).await, Err(HypervisorError::UnknownDevice { .. })));
    assert_eq!(vm.add_device(disk.into()).await.unwrap(), PciPath("07".to_owned()));
}

#[tokio::test]
async fn disk_that_the_vmms_user_may_not_open_is_refused_and_a_block_device_gets_a_node() {
    let Some(bench) = Bench::new() else { return };
    let (vm, server, _) = started(&bench, bench.spec()).await;
    fs::set_permissions(bench.path("image"), fs::Permissions::from_mode(0o644)).unwrap();
    let disk = Disk { id: "disk".to_owned(), path: bench.path("image"), readonly: false };
    let text = whole(&vm.add_device(disk.clone().into()).await.unwrap_err());
    assert!(text.contains("its user 65534 may not"), "{text}");

    let device = fs::read_dir("/dev").unwrap().filter_map(Result::ok).map(|entry| entry.path());
    let is_block =
        |path: &PathBuf| fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
    let Some(device) = device.into_iter().find(is_block) else {
        eprintln!("skipped: the host has no block device in /dev");
        return;
    };
    vm.add_device(Disk { path: device.clone(), readonly: true, ..disk }.into()).await.unwrap();
    let node = PathBuf::from(server.seen().pop().unwrap().body["path"].as_str().unwrap());
    let (made, theirs) = (fs::metadata(&node).unwrap(), fs::metadata(&device).unwrap());
    assert_eq!((made.rdev(), made.uid(), made.gid()), (theirs.rdev(), 0, 65_534));
    assert_eq!(made.mode() & 0o777, 0o440);
    vm.remove_device("disk").await.unwrap();
    assert!(!node.exists());
}

#[tokio::test]
async fn size_grows_in_blocks_as_far_as_there_is_room() {
    let Some(bench) = Bench::new() else { return };
    let growth = Some(Growth { vcpus: 2, memory_mib: 600, slots: 2 });
    let (vm, server, _) = started(&bench, VmSpec { growth, ..bench.spec() }).await;
    let size = vm.resize(Size { vcpus: 2, memory_mib: 300 }).await.unwrap().size;
    assert_eq!(size, Size { vcpus: 2, memory_mib: 384 });
    let asked: Vec<Value> = server
        .seen()
        .into_iter()
        .filter(|seen| seen.line.ends_with("resize"))
        .map(|seen| seen.body)
        .collect();
    assert_eq!(asked, [json!({"desired_vcpus": 2}), json!({"desired_ram": 384 << 20})]);
    let size = vm.resize(Size { vcpus: 1, memory_mib: 256 }).await.unwrap().size;
    assert_eq!(size, Size { vcpus: 1, memory_mib: 384 }, "memory stays");
    let error = vm.resize(Size { vcpus: 3, memory_mib: 256 }).await.unwrap_err();
    assert!(matches!(error, HypervisorError::TooLarge { .. }), "{error}");
}

#[tokio::test]
async fn paused_machine_goes_on_and_a_refusal_is_told_with_its_causes() {
    let Some(bench) = Bench::new() else { return };
    let answer = |seen: &Seen| match seen.line.as_str() {
        "GET /api/v1/vmm.ping" => (200, json!({"version": "v50.0"})),
        "PUT /api/v1/vm.resume" => (405, json!(["The VM could not resume", "it is not paused"])),
        _ => (204, Value::Null),
    };
    let (vm, outcome, server, _) = boot(&bench, bench.spec(), answer).await;
    outcome.unwrap();
    vm.pause().await.unwrap();
    let text = whole(&vm.resume().await.unwrap_err());
    assert_eq!(
        text,
        "the VMM does not do what it was asked: Cloud Hypervisor refused PUT /api/v1/vm.resume with status 405: \
         The VM could not resume: it is not paused"
    );
    let disk = Disk { id: "disk".to_owned(), path: bench.path("image"), readonly: true };
    let error = vm.add_device(disk.into()).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Place { .. }), "{error}");
    assert_eq!(server.lines().iter().filter(|line| line.contains("pause")).count(), 1);
    let error = vm.boot(bench.spec(), &bench.record).await.unwrap_err();
    assert!(matches!(error, HypervisorError::WrongState { state: "was started already", .. }), "{error}");
}

#[tokio::test]
async fn refused_boot_is_told_in_the_vmms_words_and_nothing_is_left() {
    let Some(bench) = Bench::new() else { return };
    let answer = |seen: &Seen| match seen.line.as_str() {
        "GET /api/v1/vmm.ping" => (200, json!({"version": "v50.0"})),
        "PUT /api/v1/vm.boot" => (500, json!("Cannot load the kernel")),
        _ => (204, Value::Null),
    };
    let (vm, outcome, _, _) = boot(&bench, bench.spec(), answer).await;
    let text = whole(&outcome.unwrap_err());
    assert!(
        text.contains("refused PUT /api/v1/vm.boot with status 500: \"Cannot load the kernel\""),
        "{text}"
    );
    assert_eq!(vm.processes(), []);
    assert_eq!(ended(&vm).await, VmExit::Stopped);
}

#[tokio::test]
async fn vmm_that_refuses_its_arguments_is_told_with_its_output() {
    let Some(bench) = Bench::running("#!/bin/sh\necho \"no such option: $1\" >&2\nexit 2\n") else { return };
    let vm = CloudHypervisorVm::with_kvm("/dev/null");
    let error = vm.boot(bench.spec(), &bench.record).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Refused { exit: crate::process::Exit::Code(2), .. }), "{error}");
    assert!(error.to_string().contains("no such option: --api-socket"), "{error}");
}

#[tokio::test]
async fn guest_that_resets_itself_has_ended_and_is_not_started_anew() {
    let Some(bench) = Bench::new() else { return };
    let (vm, _, pid) = started(&bench, bench.spec()).await;
    let mut monitor = fs::File::from(descriptor(pid, MONITOR));
    monitor
        .write_all(b"{\n  \"source\": \"vm\",\n  \"event\": \"rebooting\",\n  \"properties\": null\n}\n")
        .unwrap();
    drop(monitor);
    assert_eq!(ended(&vm).await, VmExit::Clean);
    assert_eq!(vm.processes(), []);
}

#[tokio::test]
async fn guest_that_panicked_before_it_reset_itself_is_told_with_its_console() {
    let Some(bench) = Bench::new() else { return };
    let (vm, _, pid) = started(&bench, bench.spec()).await;
    let mut console = fs::File::from(descriptor(pid, CONSOLE));
    console.write_all(b"Kernel panic - not syncing: no init\n").unwrap();
    let mut monitor = fs::File::from(descriptor(pid, MONITOR));
    monitor.write_all(b"{\"source\": \"vm\", \"event\": \"rebooting\"}").unwrap();
    drop((console, monitor));
    assert_eq!(ended(&vm).await, VmExit::GuestPanic("Kernel panic - not syncing: no init".to_owned()));
}

#[tokio::test]
async fn console_can_be_opened_by_the_vmms_user() {
    let script = "#!/bin/sh\necho said > /proc/self/fd/5\nexec sleep 600\n";
    let Some(bench) = Bench::running(script) else { return };
    let (vm, _, _) = started(&bench, bench.spec()).await;
    let since = Instant::now();
    while vm.console_tail() != "said\n" {
        assert!(since.elapsed() < Duration::from_secs(20), "{:?}", vm.console_tail());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn vmm_that_ends_by_itself_by_a_signal_or_with_complaints_is_told_apart() {
    for (sent, expected) in [
        (Signal::TERM, VmExit::Clean),
        (Signal::KILL, VmExit::Signal(9)),
        (Signal::USR1, VmExit::Code(3, "it is all wrong\n".to_owned())),
    ] {
        let Some(bench) = Bench::new() else { return };
        let (vm, _, pid) = started(&bench, bench.spec()).await;
        signal(pid, sent).await;
        assert_eq!(ended(&vm).await, expected);
        assert!(matches!(vm.pause().await, Err(HypervisorError::Ended(_))));
    }
}

#[tokio::test]
async fn what_it_cannot_do_is_refused_before_anything_is_started() {
    let Some(bench) = Bench::new() else { return };
    let vm = CloudHypervisorVm::with_kvm("/dev/null");
    let spec = VmSpec { accelerator: crate::Accelerator::Tcg, ..bench.spec() };
    let error = vm.boot(spec, &bench.record).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "emulation (TCG) is not supported by Cloud Hypervisor; set runtime.hypervisor_name to \"qemu\""
    );
    let limits = DiskLimits { bytes_per_second: NonZeroU64::new(1), requests_per_second: None };
    let error = vm.boot(VmSpec { disk_limits: limits, ..bench.spec() }, &bench.record).await.unwrap_err();
    assert!(error.to_string().contains("disk_rate_limiter"), "{error}");
    assert!(matches!(vm.pause().await, Err(HypervisorError::WrongState { state: "is not started", .. })));
    let error =
        vm.boot(VmSpec { program: "/no/such/vmm".into(), ..bench.spec() }, &bench.record).await.unwrap_err();
    assert!(error.to_string().contains("install Cloud Hypervisor"), "{error}");
}

#[test]
fn place_is_the_slot_on_the_bus_and_nonsense_is_an_error() {
    let place = |bdf: &str| pci_path(Some(PciDeviceInfo { bdf: bdf.to_owned() }));
    assert_eq!(place("0000:00:1f.0").unwrap(), PciPath("1f".to_owned()));
    for nonsense in ["", "0000:00:20.0", "0000:00:xx.0", "06", "0000:00:6"] {
        assert!(place(nonsense).is_err(), "{nonsense}");
    }
    assert!(pci_path(None).is_err());
}

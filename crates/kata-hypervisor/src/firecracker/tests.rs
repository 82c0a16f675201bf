//! The driver against a server that takes only what is published, see [`crate::rest::fake`].

use std::error::Error;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::process::Signal;
use serde_json::{Value, json};

use super::*;
use crate::rest::fake::{Bench, Interface, Seen, Server, pid_of, signal};
use crate::vm::{Backing, Disk, Growth, Nic, SharedFs};

fn running(seen: &Seen) -> (u16, Value) {
    match seen.line.as_str() {
        "GET /" => (
            200,
            json!({"app_name": "Firecracker", "id": "pod-1", "state": "Not started", "vmm_version": "1.17.0"}),
        ),
        _ => (204, Value::Null),
    }
}

async fn boot(
    bench: &Bench,
    spec: VmSpec,
    answer: impl Fn(&Seen) -> (u16, Value) + Send + 'static,
) -> (FirecrackerVm, Result<Origin, HypervisorError>, Server, u32) {
    // Any device will do whose file the user may read and write.
    let vm = FirecrackerVm::with_kvm("/dev/null");
    let interface = Interface::parse(include_str!("interface.toml"));
    let (outcome, (server, pid)) = tokio::join!(vm.boot(spec, &bench.record), async {
        let pid = pid_of(&vm).await;
        // It makes its socket some time after it has started.
        tokio::time::sleep(Duration::from_millis(20)).await;
        (Server::run(UnixListener::bind(bench.path("vmm/api")).unwrap(), interface, answer), pid)
    });
    (vm, outcome, server, pid)
}

async fn ended(vm: &FirecrackerVm) -> VmExit {
    tokio::time::timeout(Duration::from_secs(20), vm.exited()).await.unwrap()
}

#[tokio::test]
async fn machine_is_asked_for_in_published_terms_pauses_and_goes_on() {
    let Some(bench) = Bench::new() else { return };
    let _ready = UnixListener::bind(bench.path("kata.hvsock_1028")).unwrap();
    let spec = VmSpec {
        image: Some(bench.path("image")),
        disks: Vec::new(),
        vcpus: 2,
        backing: Backing { hugepages: true, reporting: true, prealloc: false },
        ..bench.spec()
    };
    let (vm, outcome, server, pid) = boot(&bench, spec, running).await;
    outcome.unwrap();
    vm.pause().await.unwrap();
    vm.resume().await.unwrap();
    let seen: Vec<(String, Value)> = server.seen().into_iter().map(|seen| (seen.line, seen.body)).collect();
    let vsock = bench.path("vmm/vsock");
    let expected = [
        ("GET /", Value::Null),
        ("PUT /machine-config", json!({"vcpu_count": 2, "mem_size_mib": 256, "huge_pages": "2M"})),
        (
            "PUT /boot-source",
            json!({"kernel_image_path": "/proc/self/fd/3", "boot_args": "console=ttyS0 quiet", "initrd_path": "/proc/self/fd/4"}),
        ),
        (
            "PUT /drives/image",
            json!({"drive_id": "image", "is_root_device": false, "is_read_only": true, "path_on_host": "/proc/self/fd/5"}),
        ),
        ("PUT /vsock", json!({"guest_cid": 3, "uds_path": vsock})),
        ("PUT /balloon", json!({"amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true})),
        ("PUT /actions", json!({"action_type": "InstanceStart"})),
        ("PATCH /vm", json!({"state": "Paused"})),
        ("PATCH /vm", json!({"state": "Resumed"})),
    ];
    assert_eq!(seen, expected.map(|(line, body)| (line.to_owned(), body)));
    for (number, file) in [(3, "kernel"), (4, "initrd"), (5, "image")] {
        assert_eq!(fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap(), bench.path(file));
    }
    let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().replace('\0', " ");
    assert!(arguments.contains("--id pod-1 --api-sock"), "{arguments}");
    let _dialled = UnixStream::connect(bench.path("vmm/vsock_1028")).unwrap();
    vm.stop().await.unwrap();
    assert_eq!(ended(&vm).await, VmExit::Stopped);
}

#[tokio::test]
async fn what_it_has_not_is_refused_by_name_before_anything_is_started() {
    let Some(bench) = Bench::new() else { return };
    let null = || OwnedFd::from(fs::File::open("/dev/null").unwrap());
    let nic = Nic { id: "eth0".to_owned(), mac: [2; 6], mtu: 1500, queues: vec![null()], vhost: Vec::new() };
    let disk = Disk { id: "initdata".to_owned(), path: bench.path("image"), readonly: true };
    let share = SharedFs { tag: "share".to_owned(), socket: null() };
    let growth = Growth { vcpus: 2, memory_mib: 512, slots: 1 };
    let backing = Backing { prealloc: true, ..Backing::default() };
    for (spec, what) in [
        (VmSpec { shared_fs: Some(share), ..bench.spec() }, "sharing files of the host"),
        (VmSpec { nics: vec![nic], ..bench.spec() }, "a network interface"),
        (VmSpec { disks: vec![disk], ..bench.spec() }, "a disk with a serial number"),
        (VmSpec { growth: Some(growth), ..bench.spec() }, "growing while it runs"),
        (VmSpec { backing, ..bench.spec() }, "taking its memory beforehand"),
        (VmSpec { vcpus: 33, ..bench.spec() }, "a machine of more than 32 virtual CPUs"),
        (VmSpec { accelerator: crate::Accelerator::Tcg, ..bench.spec() }, "emulation (TCG)"),
    ] {
        let vm = FirecrackerVm::with_kvm("/dev/null");
        let error = vm.boot(spec, &bench.record).await.unwrap_err();
        assert!(
            matches!(error, HypervisorError::Unsupported { operation, .. } if operation == what),
            "{error}"
        );
        assert!(
            error.to_string().starts_with(&format!("{what} is not supported by Firecracker; ")),
            "{error}"
        );
        assert_eq!(vm.processes(), []);
    }
}

#[tokio::test]
async fn running_machine_takes_no_devices_and_stays_as_large_as_it_is() {
    let Some(bench) = Bench::new() else { return };
    let (vm, outcome, server, _) = boot(&bench, bench.spec(), running).await;
    outcome.unwrap();
    let requests = server.seen().len();
    let disk = Disk { id: "disk".to_owned(), path: bench.path("image"), readonly: true };
    assert!(matches!(vm.add_device(disk.into()).await, Err(HypervisorError::Unsupported { .. })));
    assert!(matches!(vm.remove_device("disk").await, Err(HypervisorError::Unsupported { .. })));
    let size = Size { vcpus: 1, memory_mib: 256 };
    assert_eq!(vm.resize(size).await.unwrap().size, size);
    let larger = vm.resize(Size { vcpus: 2, ..size }).await;
    assert!(matches!(larger, Err(HypervisorError::Unsupported { .. })));
    assert_eq!(server.seen().len(), requests);
}

#[tokio::test]
async fn refused_boot_is_told_with_the_fault_message_and_nothing_is_left() {
    let Some(bench) = Bench::new() else { return };
    let answer = |seen: &Seen| match seen.line.as_str() {
        "PUT /boot-source" => (400, json!({"fault_message": "The kernel file cannot be opened"})),
        _ => running(seen),
    };
    let (vm, outcome, _, _) = boot(&bench, bench.spec(), answer).await;
    let error = outcome.unwrap_err();
    assert_eq!(
        error.source().unwrap().to_string(),
        "Firecracker refused PUT /boot-source with status 400: The kernel file cannot be opened"
    );
    assert_eq!(vm.processes(), []);
}

#[tokio::test]
async fn vmm_that_refuses_its_arguments_is_told_with_its_output() {
    let Some(bench) = Bench::running("#!/bin/sh\necho \"bad argument: $1\"\nexit 153\n") else { return };
    let error = FirecrackerVm::with_kvm("/dev/null").boot(bench.spec(), &bench.record).await.unwrap_err();
    assert!(
        matches!(error, HypervisorError::Refused { exit: crate::process::Exit::Code(153), .. }),
        "{error}"
    );
    assert!(error.to_string().contains("bad argument: --id"), "{error}");
}

#[tokio::test]
async fn end_of_the_guest_is_clean_unless_its_console_tells_of_a_panic() {
    let panics = "#!/bin/sh\ntrap 'exit 0' TERM\necho 'Kernel panic - not syncing: no init'\nwhile :; do sleep 0.02; done\n";
    let Some(bench) = Bench::running(panics) else { return };
    let (vm, outcome, _, pid) = boot(&bench, bench.spec(), running).await;
    outcome.unwrap();
    signal(pid, Signal::TERM).await;
    assert_eq!(ended(&vm).await, VmExit::GuestPanic("Kernel panic - not syncing: no init".to_owned()));
    assert!(vm.console_tail().contains("no init"));

    let Some(bench) = Bench::new() else { return };
    let (vm, outcome, _, pid) = boot(&bench, bench.spec(), running).await;
    outcome.unwrap();
    signal(pid, Signal::TERM).await;
    assert_eq!(ended(&vm).await, VmExit::Clean);
}

#[test]
fn name_of_the_machine_has_what_firecracker_takes() {
    assert_eq!(machine_name("pod_1.a-B"), "pod-1-a-B");
    assert_eq!(machine_name(&"x".repeat(100)).len(), 64);
}

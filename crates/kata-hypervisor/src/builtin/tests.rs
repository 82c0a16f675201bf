//! The driver against a peer at its socket, and against programs that are no VMM.

mod faults;

use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;

use kata_vmm_api::{Command, Failure, MachineSpec, Reply, Request, Start};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::net::UnixStream;

use super::*;
use crate::process::{Exit, Identity};
use crate::vm::{Accelerator, Backing, Growth, Machine, SharedFs};

struct Bench {
    dir: tempfile::TempDir,
    record: Record,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
        for name in ["kernel", "initrd", "image"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let record = Record::open(dir.path().join("resources.jsonl")).unwrap();
        Self { dir, record }
    }

    fn spec(&self) -> VmSpec {
        let at = |name: &str| self.dir.path().join(name);
        VmSpec {
            id: "test".to_owned(),
            run_dir: self.dir.path().to_owned(),
            program: at("kata-vmm"),
            vsock_program: at("kata-vmm"),
            machine: Machine::Q35,
            accelerator: Accelerator::Kvm,
            kernel: at("kernel"),
            initrd: Some(at("initrd")),
            image: None,
            disks: Vec::new(),
            kernel_params: vec!["console=ttyS0".to_owned(), "panic=1".to_owned()],
            vcpus: 2,
            memory_mib: 256,
            growth: None,
            backing: Backing { reporting: true, ..Backing::default() },
            vsock: at("kata.hvsock"),
            shared_fs: None,
            nics: Vec::new(),
            host_devices: Vec::new(),
            firmware: None,
            confidential: None,
            disk_limits: DiskLimits::default(),
            identity: Identity::current(),
            seccomp_sandbox: String::new(),
            template: None,
        }
    }
}

fn null() -> OwnedFd {
    File::open("/dev/null").unwrap().into()
}

fn pair() -> (Client, StdUnixStream) {
    let (ours, theirs) = StdUnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (Client::new(UnixStream::from_std(ours).unwrap()), theirs)
}

/// Takes one command off a socket, and answers it.
fn serve(socket: &StdUnixStream, answer: impl FnOnce(u64) -> Vec<u8>) -> (Command, usize) {
    let mut line = vec![0; 64 * 1024];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [io::IoSliceMut::new(&mut line)];
    let got = recvmsg(socket, &mut buffers, &mut control, RecvFlags::empty()).unwrap().bytes;
    let count = control
        .drain()
        .map(|message| match message {
            RecvAncillaryMessage::ScmRights(rights) => rights.count(),
            _ => 0,
        })
        .sum();
    assert_eq!(line[got - 1], b'\n');
    let request: Request = serde_json::from_slice(&line[..got]).unwrap();
    std::io::Write::write_all(&mut &*socket, &answer(request.id)).unwrap();
    (request.command, count)
}

fn done(id: u64) -> Vec<u8> {
    format!("{{\"id\":{id},\"done\":\"nothing\"}}\n").into_bytes()
}

fn refused(kind: FailureKind) -> impl FnOnce(u64) -> Vec<u8> {
    move |id| {
        let error = Failure { kind, message: "no".to_owned() };
        let mut line = serde_json::to_vec(&Reply::Failed { id, error }).unwrap();
        line.push(b'\n');
        line
    }
}

/// A driver whose machine runs, and the peer's end of its socket.
async fn running() -> (BuiltinVm, StdUnixStream, Bench) {
    let bench = Bench::new();
    let (client, peer) = pair();
    let child = Spawn::new("sleep", "/bin/sleep").arg("600").spawn(&bench.record).unwrap();
    let vm = BuiltinVm::new();
    vm.vmm.life.adopt(&child);
    vm.vmm.runs(Handle { client, child });
    (vm, peer, bench)
}

#[tokio::test]
async fn machine_is_described_by_descriptors_alone() {
    let bench = Bench::new();
    let nic = |id: &str| Nic {
        id: id.to_owned(),
        mac: [2, 0, 0, 0, 0, 1],
        mtu: 1400,
        queues: vec![null(), null()],
        vhost: vec![null(), null()],
    };
    let limits = DiskLimits { bytes_per_second: NonZeroU64::new(1 << 20), requests_per_second: None };
    let path = bench.dir.path().join("image");
    let disks = vec![Disk { id: "initdata".to_owned(), path: path.clone(), readonly: true }];
    let spec =
        VmSpec { image: Some(path), disks, nics: vec![nic("eth0")], disk_limits: limits, ..bench.spec() };
    let (machine, descriptors) = spec::machine(spec, null(), null()).unwrap();
    insta::assert_json_snapshot!(machine);
    let (client, peer) = pair();
    let server = tokio::task::spawn_blocking(move || serve(&peer, done));
    let command = Command::Create(Box::new(machine));
    client.execute(command.clone(), descriptors, COMMAND_BOUND).await.unwrap();
    assert_eq!(server.await.unwrap(), (command, 10));
}

#[test]
fn machine_starts_with_no_disk_that_can_be_written() {
    let bench = Bench::new();
    let disks = vec![Disk { id: "data".to_owned(), path: bench.dir.path().join("image"), readonly: false }];
    let error = VmSpec { disks, ..bench.spec() }.check().unwrap_err().to_string();
    assert_eq!(error, "device \"data\" cannot be added: a disk that the machine starts with is read-only");
}

#[test]
fn shared_files_come_over_a_connection_that_is_made_for_the_monitor() {
    let bench = Bench::new();
    let path = bench.dir.path().join("daemon");
    let daemon = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let socket = rustix::fs::open(&path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    std::fs::remove_file(&path).unwrap();
    daemon.set_nonblocking(true).unwrap();
    let shared_fs = Some(SharedFs { tag: "share".to_owned(), socket });
    let (machine, descriptors) = spec::machine(VmSpec { shared_fs, ..bench.spec() }, null(), null()).unwrap();
    assert_eq!(machine.shared_fs.unwrap().tag, "share");
    daemon.accept().unwrap();
    drop((descriptors, daemon));

    let socket = null();
    let shared_fs = Some(SharedFs { tag: "share".to_owned(), socket });
    let spec = VmSpec { shared_fs, ..bench.spec() };
    let error = spec::machine(spec, null(), null()).unwrap_err().to_string();
    assert!(error.starts_with("virtio-fs socket of"), "{error}");
}

#[test]
fn machine_that_grows_is_made_for_the_most_and_its_kernel_brings_memory_to_use() {
    let bench = Bench::new();
    let growth = Some(Growth { vcpus: 1000, memory_mib: 512, slots: 2 });
    let (machine, _) = spec::machine(VmSpec { growth, ..bench.spec() }, null(), null()).unwrap();
    assert_eq!((machine.cpus, machine.max_cpus), (2, 254));
    assert_eq!((machine.memory.size_mib, machine.memory.max_mib), (256, 512));
    let Start::Kernel(kernel) = machine.start else { panic!("{:?}", machine.start) };
    assert!(kernel.command_line.ends_with(" memhp_default_state=online"), "{}", kernel.command_line);
}

#[tokio::test]
async fn machine_grows_and_tells_what_came_of_it() {
    fn info(cpus: u32, memory_mib: u64) -> impl FnOnce(u64) -> Vec<u8> {
        move |id| {
            let size = kata_vmm_api::Size { cpus, memory_mib };
            let (version, state) = (String::new(), kata_vmm_api::State::Running);
            let info = Info { version, state, size, cpu_threads: Vec::new(), jailed: true };
            let mut line = serde_json::to_vec(&Reply::Done { id, done: Answer::Info(info) }).unwrap();
            line.push(b'\n');
            line
        }
    }
    let (vm, peer, _bench) = running().await;
    let wanted = Size { vcpus: 3, memory_mib: 128 };
    let server = tokio::task::spawn_blocking(move || {
        for _ in 0..2 {
            serve(&peer, info(1, 256));
        }
        let asked = serve(&peer, done).0;
        serve(&peer, info(3, 256));
        for _ in 0..2 {
            serve(&peer, info(3, 256));
        }
        (asked, peer)
    });
    let fixed = vm.resize(wanted).await.unwrap_err();
    assert!(fixed.to_string().contains("growing while it runs"), "{fixed}");
    vm.most.set(Size { vcpus: 4, memory_mib: 512 }).unwrap();
    let layout = vm.resize(wanted).await.unwrap();
    assert_eq!(layout.size, Size { vcpus: 3, memory_mib: 256 });
    for size in [Size { vcpus: 5, ..wanted }, Size { memory_mib: 513, ..wanted }] {
        let refused = vm.resize(size).await.unwrap_err();
        assert!(matches!(refused, HypervisorError::TooLarge { .. }), "{refused}");
    }
    let (asked, _peer) = server.await.unwrap();
    // Memory is not taken back.
    assert_eq!(asked, Command::Resize(kata_vmm_api::Size { cpus: 3, memory_mib: 256 }));
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn device_is_found_by_the_number_of_its_slot() {
    let (vm, peer, bench) = running().await;
    let limits = DiskLimits { bytes_per_second: None, requests_per_second: NonZeroU64::new(50) };
    vm.disk_limits.set(limits).unwrap();
    let slot = |id| format!("{{\"id\":{id},\"done\":{{\"slot\":17}}}}\n").into_bytes();
    let server = tokio::task::spawn_blocking(move || serve(&peer, slot));
    let disk = Disk { id: "data".to_owned(), path: bench.dir.path().join("image"), readonly: true };
    assert_eq!(vm.add_device(disk.into()).await.unwrap(), PciPath("11".to_owned()));
    let (command, descriptors) = server.await.unwrap();
    assert!(matches!(command, Command::AddDisk(disk)
        if disk.readonly && disk.id == "data" && disk.requests_per_second == Some(50)));
    assert_eq!(descriptors, 1);
    vm.stop().await.unwrap();
}

fn drive() -> HostDevice {
    HostDevice { id: "drive".to_owned(), address: "0000:01:00.0".to_owned() }
}

#[tokio::test]
async fn device_of_the_host_is_handed_over_open_and_its_group_is_free_when_it_is_gone() {
    let (mut vm, peer, _bench) = running().await;
    let (groups, host) = crate::host_devices::tests::drive(7);
    vm.groups = groups;
    let slot = |id| format!("{{\"id\":{id},\"done\":{{\"slot\":9}}}}\n").into_bytes();
    let server = tokio::task::spawn_blocking(move || {
        let added = serve(&peer, slot);
        serve(&peer, done);
        serve(&peer, refused(FailureKind::Host));
        (added, peer)
    });
    assert_eq!(vm.hand_over(drive()).await.unwrap(), PciPath("09".to_owned()));
    assert!(!vm.groups.is_empty(), "its group is not kept");
    vm.remove_device("drive").await.unwrap();
    assert!(vm.groups.is_empty(), "its group stays open");
    let error = vm.hand_over(drive()).await.unwrap_err();
    assert!(matches!(error, HypervisorError::Builtin(_)), "{error}");
    assert!(vm.groups.is_empty(), "the group of one that was refused stays open");
    let ((command, descriptors), _peer) = server.await.unwrap();
    assert!(matches!(command, Command::AddHostDevice(device)
        if device.address == drive().address && device.group_number == 7
            && (device.container.0, device.group.0) == (0, 1)));
    assert_eq!(descriptors, 2);
    drop(host);
    let error = vm.hand_over(drive()).await.unwrap_err();
    assert!(matches!(error, HypervisorError::HostDevice(HostDeviceError::NotFound(_))), "{error}");
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn monitor_may_pin_the_most_memory_of_its_guest_or_gets_no_device() {
    let (vm, _peer, _bench) = running().await;
    vm.most_memory.set(512).unwrap();
    let wanted = (512_u64 + 64) << 20;
    let pinned = vm.allow_pinning(&vm.vmm.control(HOST_DEVICE).unwrap().child);
    let own = getrlimit(Resource::Memlock);
    match pinned {
        // This process may not raise limits.
        Err(error) => {
            assert!(matches!(&error, HostDeviceError::Limit { bytes, .. } if *bytes == wanted), "{error}");
            assert!(own.maximum.is_some_and(|most| most < wanted), "{error}");
        }
        Ok(()) if own.current.is_none_or(|limit| limit >= wanted) => {}
        Ok(()) => {
            let pid = vm.processes()[0].pid;
            let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
            let locked = limits.lines().find(|line| line.starts_with("Max locked memory")).unwrap();
            assert!(locked.contains(&wanted.to_string()), "{locked}");
        }
    }
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn refusals_about_devices_are_told_apart() {
    let (vm, peer, _bench) = running().await;
    let kinds = [FailureKind::NotFound, FailureKind::Held, FailureKind::Unsupported, FailureKind::Host];
    let server = tokio::task::spawn_blocking(move || {
        for kind in kinds {
            serve(&peer, refused(kind));
        }
        peer
    });
    let errors = [
        "no device of that name was added",
        "the guest did not let go of it",
        "removing a device is not supported by the built-in",
        "does not do what it was asked",
    ];
    for text in errors {
        let error = vm.remove_device("data").await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
    drop(server.await.unwrap());
    vm.stop().await.unwrap();
    assert_eq!(vm.exited().now_or_pending().await, None, "there is no supervisor here");
}

#[tokio::test]
async fn device_that_leaves_after_its_time_is_gone_when_it_is_removed_again() {
    let (vm, peer, _bench) = running().await;
    let server = tokio::task::spawn_blocking(move || {
        for kind in [FailureKind::Held, FailureKind::Held, FailureKind::NotFound, FailureKind::NotFound] {
            serve(&peer, refused(kind));
        }
        peer
    });
    for _ in 0..2 {
        let error = vm.remove_device("data").await.unwrap_err();
        assert!(matches!(error, HypervisorError::DeviceHeld { .. }), "{error}");
    }
    vm.remove_device("data").await.unwrap();
    let error = vm.remove_device("data").await.unwrap_err();
    assert!(matches!(error, HypervisorError::UnknownDevice { .. }), "{error}");
    drop(server.await.unwrap());
    vm.stop().await.unwrap();
}

/// For a future that is not expected to be ready.
trait NowOrPending: Future + Sized {
    async fn now_or_pending(self) -> Option<Self::Output> {
        tokio::time::timeout(Duration::from_millis(10), self).await.ok()
    }
}
impl<F: Future> NowOrPending for F {}

#[tokio::test]
async fn caller_that_gives_up_leaves_the_exchange_in_order() {
    let (client, peer) = pair();
    let slow = client.execute(Command::Pause, Descriptors::default(), Duration::from_millis(20)).await;
    assert!(matches!(slow, Err(BuiltinError::NoAnswer { command: "pause", .. })), "{slow:?}");
    let late = client.clone();
    let next =
        tokio::spawn(
            async move { late.execute(Command::Resume, Descriptors::default(), COMMAND_BOUND).await },
        );
    let server = tokio::task::spawn_blocking(move || {
        let first = serve(&peer, done).0;
        (first, serve(&peer, done).0)
    });
    next.await.unwrap().unwrap();
    assert_eq!(server.await.unwrap(), (Command::Pause, Command::Resume));
}

#[tokio::test]
async fn answer_that_is_none_and_an_end_are_told_apart() {
    let (client, peer) = pair();
    let server = tokio::task::spawn_blocking(move || serve(&peer, |_| b"QMP\n".to_vec()));
    let error = client.execute(Command::Info, Descriptors::default(), COMMAND_BOUND).await.unwrap_err();
    assert!(matches!(&error, BuiltinError::Garbled { said, .. } if said.contains("QMP")), "{error}");
    server.await.unwrap();
    let (client, peer) = pair();
    drop(peer);
    let error = client.execute(Command::Info, Descriptors::default(), COMMAND_BOUND).await.unwrap_err();
    assert!(matches!(error, BuiltinError::Closed { command: "info" }), "{error}");
}

#[tokio::test]
async fn machine_that_cannot_be_had_is_refused_before_anything_starts() {
    let bench = Bench::new();
    for (spec, text) in [
        (VmSpec { vcpus: 0, ..bench.spec() }, "no virtual CPU"),
        (VmSpec { accelerator: Accelerator::Tcg, ..bench.spec() }, "hypervisor_name"),
        (VmSpec { initrd: None, ..bench.spec() }, "neither an initrd nor an image"),
    ] {
        let vm = BuiltinVm::new();
        let error = vm.boot(spec, &bench.record).await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(vm.processes(), []);
    }
    let error = BuiltinVm::new().pause().await.unwrap_err();
    assert!(matches!(error, HypervisorError::WrongState { .. }), "{error}");
}

#[tokio::test]
async fn monitor_that_ends_at_once_is_quoted_and_nothing_is_left() {
    let bench = Bench::new();
    if !Path::new(KVM).exists() || !rustix::process::geteuid().is_root() {
        eprintln!("skipped: there is no /dev/kvm, or no right to make namespaces");
        return;
    }
    let program = bench.dir.path().join("kata-vmm");
    std::fs::write(&program, "#!/bin/sh\necho \"it cannot be confined: $*\" >&2\nexit 3\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let vm = BuiltinVm::new();
    let error = vm.boot(bench.spec(), &bench.record).await.unwrap_err();
    assert!(matches!(&error, HypervisorError::Refused { exit: Exit::Code(3), .. }), "{error:?}");
    assert!(error.to_string().contains("it cannot be confined: run --api-fd 3 --kvm-fd 4"), "{error}");
    assert_eq!(vm.processes(), []);
}

#[test]
fn threads_are_called_by_their_names_here() {
    assert_eq!(names_of("Name:\tvcpu0\nNSpid:\t4711\t12\n"), Some((4711, 12)));
    assert_eq!(names_of("NSpid:\t4711\n"), Some((4711, 4711)));
    assert_eq!(names_of("NSpid:\t-\n"), None);
    let own = std::process::id();
    assert_eq!(host_threads(own, &[own]), [own]);
    assert_eq!(host_threads(own, &[own, u32::MAX]), Vec::<u32>::new());
}

/// A template's files, and the machine that is to start from them.
fn templated(bench: &Bench) -> (Template, MachineSpec, Descriptors) {
    let (machine, descriptors) = spec::machine(bench.spec(), null(), null()).unwrap();
    let file = || File::open("/dev/null").unwrap();
    (Template { state: file(), memory: file() }, machine, descriptors)
}

#[tokio::test]
async fn machine_starts_from_a_template_with_all_else_as_ever() {
    let (vm, peer, bench) = running().await;
    let handle = vm.vmm.control("create").unwrap();
    let (template, machine, descriptors) = templated(&bench);
    let expected = machine.clone();
    let server = tokio::task::spawn_blocking(move || serve(&peer, done));
    assert_eq!(handle.create(machine, descriptors, Some(template)).await.unwrap(), Origin::Template);
    let (Command::Create(made), descriptors) = server.await.unwrap() else { panic!("no create") };
    let Start::Snapshot(files) = &made.start else { panic!("{:?}", made.start) };
    // Theirs come last, and nothing comes that is not named.
    assert_eq!((files.state.0, files.memory.0, files.verify), (2, 3, false));
    assert_eq!(descriptors, 4);
    assert_eq!(MachineSpec { start: expected.start.clone(), ..*made }, expected);
    vm.stop().await.unwrap();
}

#[tokio::test]
async fn machine_whose_template_is_refused_boots_and_says_why() {
    let (vm, peer, bench) = running().await;
    let handle = vm.vmm.control("create").unwrap();
    let (template, machine, descriptors) = templated(&bench);
    let expected = Command::Create(Box::new(machine.clone()));
    let server = tokio::task::spawn_blocking(move || {
        serve(&peer, refused(FailureKind::Stale));
        serve(&peer, done)
    });
    let origin = handle.create(machine, descriptors, Some(template)).await.unwrap();
    assert_eq!(origin, Origin::Instead("no".to_owned()));
    assert_eq!(server.await.unwrap().0, expected);
    vm.stop().await.unwrap();
}

use tokio::io::{AsyncBufReadExt, BufReader};

use super::*;
use crate::process::Identity;
use crate::vm::{Accelerator, Backing, DiskLimits, Machine as MachineType};

struct Place {
    dir: tempfile::TempDir,
    record: Record,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let record = Record::open(dir.path().join("resources.jsonl")).unwrap();
        Self { dir, record }
    }

    fn spec(&self) -> VmSpec {
        VmSpec {
            id: "fake".to_owned(),
            run_dir: self.dir.path().to_owned(),
            program: "/usr/bin/fake".into(),
            vsock_program: "/usr/bin/fake".into(),
            machine: MachineType::Q35,
            accelerator: Accelerator::Tcg,
            kernel: "/kernel".into(),
            initrd: None,
            image: None,
            disks: Vec::new(),
            kernel_params: Vec::new(),
            vcpus: 1,
            memory_mib: 128,
            growth: None,
            backing: Backing::default(),
            vsock: self.dir.path().join("kata.hvsock"),
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

    async fn connect(&self, port: u32) -> (String, BufReader<UnixStream>) {
        let mut stream = UnixStream::connect(self.dir.path().join("kata.hvsock")).await.unwrap();
        stream.write_all(format!("CONNECT {port}\n").as_bytes()).await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut answer = String::new();
        stream.read_line(&mut answer).await.unwrap();
        (answer, stream)
    }
}

#[tokio::test]
async fn callback_gets_the_port_and_the_peer_port_that_the_dialler_is_told() {
    let place = Place::new();
    let vm = FakeVm::new().on_connect(|mut incoming| {
        tokio::spawn(async move {
            let text = format!("{} {}\n", incoming.port, incoming.peer_port);
            incoming.stream.write_all(text.as_bytes()).await.unwrap();
        });
    });
    vm.boot(place.spec(), &place.record).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let (answer, mut stream) = place.connect(1024).await;
        let peer_port = answer.strip_prefix("OK ").unwrap().trim().to_owned();
        let mut text = String::new();
        stream.read_line(&mut text).await.unwrap();
        assert_eq!(text, format!("1024 {peer_port}\n"));
        seen.push(peer_port.parse::<u32>().unwrap());
    }
    assert!(seen[0] < seen[1]);
}

#[tokio::test]
async fn port_can_be_forwarded_to_a_socket_and_others_are_refused() {
    let place = Place::new();
    let agent = place.dir.path().join("agent.sock");
    let listener = UnixListener::bind(&agent).unwrap();
    let vm = FakeVm::new().forward(1024, &agent);
    vm.boot(place.spec(), &place.record).await.unwrap();
    let (answer, mut stream) = place.connect(1024).await;
    assert!(answer.starts_with("OK "));
    let (mut guest, _) = listener.accept().await.unwrap();
    guest.write_all(b"hello\n").await.unwrap();
    let mut text = String::new();
    stream.read_line(&mut text).await.unwrap();
    assert_eq!(text, "hello\n");
    assert_eq!(place.connect(1027).await.0, "", "closed without an answer");
}

#[tokio::test]
async fn guest_reaches_the_ports_of_the_host() {
    let place = Place::new();
    let vm = FakeVm::new();
    assert_eq!(vm.dial(1028).await.unwrap_err().kind(), io::ErrorKind::NotConnected);
    vm.boot(place.spec(), &place.record).await.unwrap();
    assert!(vm.dial(1028).await.is_err());
    let host = UnixListener::bind(place.dir.path().join("kata.hvsock_1028")).unwrap();
    vm.dial(1028).await.unwrap();
    host.accept().await.unwrap();
}

#[tokio::test]
async fn boot_fails_and_takes_time_as_told() {
    let place = Place::new();
    let vm = FakeVm::new().boot_fails("no room").boot_takes(Duration::from_millis(30));
    let since = std::time::Instant::now();
    let error = vm.boot(place.spec(), &place.record).await.unwrap_err();
    assert!(since.elapsed() >= Duration::from_millis(30));
    assert_eq!(
        error.to_string(),
        r#""/usr/bin/fake" ended before it ran the guest: it exited with code 1: no room"#
    );
    assert_eq!(vm.exited().await, VmExit::Code(1, "no room".to_owned()));
}

#[tokio::test]
async fn first_end_counts_and_closes_the_socket() {
    let place = Place::new();
    let vm = FakeVm::new();
    vm.boot(place.spec(), &place.record).await.unwrap();
    vm.pause().await.unwrap();
    assert!(vm.is_paused());
    vm.end(VmExit::GuestPanic("oops".to_owned()));
    vm.stop().await.unwrap();
    assert_eq!(vm.exited().await, VmExit::GuestPanic("oops".to_owned()));
    assert!(vm.resume().await.is_err());
    let path = place.dir.path().join("kata.hvsock");
    while UnixStream::connect(&path).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

fn disk(id: &str) -> Disk {
    Disk { id: id.to_owned(), path: "/dev/vg/disk".into(), readonly: true }
}

#[tokio::test]
async fn devices_get_the_first_free_slot_and_are_known_until_they_are_removed() {
    let place = Place::new();
    let vm = FakeVm::new();
    assert!(matches!(vm.add_device(disk("a").into()).await.unwrap_err(), HypervisorError::WrongState { .. }));
    vm.boot(place.spec(), &place.record).await.unwrap();
    assert_eq!(vm.add_device(disk("a").into()).await.unwrap().0, "10/01");
    let nic = Nic {
        id: "eth0".to_owned(),
        mac: [2; 6],
        mtu: 1400,
        queues: vec![tempfile::tempfile().unwrap().into()],
        vhost: Vec::new(),
    };
    assert_eq!(vm.add_device(nic.into()).await.unwrap().0, "10/02");
    assert_eq!(vm.with_nic("eth0", |nic| nic.mtu), Some(1400));
    assert_eq!((vm.device_ids(), vm.disks()), (vec!["a".to_owned(), "eth0".to_owned()], vec![disk("a")]));

    vm.remove_device("a").await.unwrap();
    assert_eq!(vm.add_device(disk("b").into()).await.unwrap().0, "10/01");
    let error = vm.remove_device("a").await.unwrap_err();
    assert!(matches!(error, HypervisorError::UnknownDevice { id } if id == "a"));
}

#[tokio::test]
async fn plugging_fails_as_told_and_leaves_everything_as_it_was() {
    let place = Place::new();
    let vm = FakeVm::new();
    vm.boot(place.spec(), &place.record).await.unwrap();
    vm.add_device(disk("a").into()).await.unwrap();
    let vm = vm.plugging_fails("the bus is on fire");
    for error in
        [vm.add_device(disk("b").into()).await.unwrap_err(), vm.remove_device("a").await.unwrap_err()]
    {
        let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        assert!(cause.contains("the bus is on fire"), "{error}: {cause}");
    }
    assert_eq!(vm.device_ids(), ["a"]);
}

//! `kata-vmm vsock` as a process: a front end and a driver of the test's own on one side, clients on the other.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test ends at the first surprise"
)]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kata_vmm::vsock::{HEADER_LEN, Header, Op};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

#[path = "../src/vsock/driver.rs"]
mod driver;
/// Where the driver finds its rings, here as in the crate.
#[path = "../src/virtio"]
mod virtio {
    pub mod driver;
}

use driver::{Driver, MEMORY, SIZE, WRITE};

const PATIENCE: Duration = Duration::from_secs(10);

/// Repeats `attempt` until it gives something.
fn eventually<T>(what: &str, mut attempt: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if let Some(result) = attempt() {
            return result;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    panic!("{what}: not within {PATIENCE:?}");
}

/// Lets children inherit a descriptor, and names it.
fn inheritable(fd: impl AsFd) -> String {
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).unwrap();
    fd.as_fd().as_raw_fd().to_string()
}

/// The process, and its hybrid socket.
struct Device {
    child: Child,
    directory: tempfile::TempDir,
}

impl Device {
    fn start() -> (Device, UnixStream) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kata.hvsock");
        let front_ends = UnixListener::bind(directory.path().join("vhost")).unwrap();
        let front_end = UnixStream::connect(directory.path().join("vhost")).unwrap();
        let hybrid = UnixListener::bind(&path).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_kata-vmm"))
            .arg("vsock")
            .args(["--listen-fd", &inheritable(&front_ends), "--hybrid-fd", &inheritable(&hybrid)])
            .args([Path::new("--hybrid-path"), &path])
            .args(["--guest-cid", "42"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        (Device { child, directory }, front_end)
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("kata.hvsock")
    }

    fn client(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.path()).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(client, "CONNECT {port}").unwrap();
        client
    }

    /// A line of `/proc/<pid>/status`.
    fn status(&self, key: &str) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
        line.trim().to_owned()
    }

    /// Waits for the end; its exit code and what it said.
    fn end(mut self) -> (Option<i32>, String) {
        let status = eventually("the process ends", || self.child.try_wait().unwrap());
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status.code(), said)
    }
}

/// The events of one ring.
struct Events {
    kick: EventFd,
    call: EventFd,
    error: EventFd,
}

/// A VMM as far as the device sees one.
struct Vmm {
    frontend: Frontend,
    events: [Events; 2],
}

impl Vmm {
    fn new(stream: UnixStream, memory: &GuestMemoryMmap, driver: &Driver<'_>) -> Vmm {
        let mut frontend = Frontend::from_stream(stream, 2);
        let features = frontend.get_features().unwrap();
        assert_ne!(features & 1 << 32, 0, "VIRTIO_F_VERSION_1");
        frontend.set_owner().unwrap();
        let protocol = frontend.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG));
        frontend
            .set_protocol_features(VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK)
            .unwrap();
        // Without event indexes, which the driver here does not keep.
        frontend.set_features(1 << 32 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()).unwrap();
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap();
        let table = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: region.len(),
            userspace_addr: 0x7000_0000_0000,
            mmap_offset: 0,
            mmap_handle: file.file().as_raw_fd(),
        };
        frontend.set_mem_table(&[table]).unwrap();
        let events = [(); 2].map(|()| Events {
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            error: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
        });
        let mut vmm = Vmm { frontend, events };
        vmm.start([0, 0], driver);
        vmm
    }

    fn start(&mut self, bases: [u16; 2], driver: &Driver<'_>) {
        for (i, ((events, ring), base)) in self.events.iter().zip(driver.rings()).zip(bases).enumerate() {
            let [descriptors, available, used] = ring.addresses().map(|at| 0x7000_0000_0000 + at);
            let addresses = VringConfigData {
                queue_max_size: SIZE,
                queue_size: SIZE,
                flags: 0,
                desc_table_addr: descriptors,
                used_ring_addr: used,
                avail_ring_addr: available,
                log_addr: None,
            };
            self.frontend.set_vring_num(i, SIZE).unwrap();
            self.frontend.set_vring_base(i, base).unwrap();
            self.frontend.set_vring_addr(i, &addresses).unwrap();
            self.frontend.set_vring_call(i, &events.call).unwrap();
            self.frontend.set_vring_err(i, &events.error).unwrap();
            self.frontend.set_vring_kick(i, &events.kick).unwrap();
            self.frontend.set_vring_enable(i, true).unwrap();
        }
    }

    fn stop(&mut self) -> [u16; 2] {
        [0, 1].map(|i| u16::try_from(self.frontend.get_vring_base(i).unwrap()).unwrap())
    }

    fn kick(&self) {
        for events in &self.events {
            events.kick.write(1).unwrap();
        }
    }

    /// The next packets that the guest gets.
    fn received(&self, driver: &mut Driver<'_>) -> Vec<(Header, Vec<u8>)> {
        // An interrupt may be of packets that the last look has found.
        eventually("the driver is interrupted for a packet", || {
            self.events[0].call.read().ok()?;
            Some(driver.received()).filter(|packets| !packets.is_empty())
        })
    }

    /// Answers a client's request; its host port.
    fn accept(&self, driver: &mut Driver<'_>) -> u32 {
        let (request, _) = self.received(driver).remove(0);
        assert_eq!((request.op, request.dst_cid), (Op::Request as u16, 42));
        driver.send(packet(Op::Response, request.dst_port, request.src_port), &[]);
        self.kick();
        request.src_port
    }
}

fn memory() -> GuestMemoryMmap {
    let file = File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(MEMORY as u64).unwrap();
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)))])
        .unwrap()
}

fn packet(op: Op, guest: u32, host: u32) -> Header {
    Header {
        src_cid: 42,
        dst_cid: 2,
        src_port: guest,
        dst_port: host,
        kind: 1,
        op: op as u16,
        buf_alloc: 1 << 18,
        ..Header::default()
    }
}

fn read_some(socket: &mut UnixStream) -> String {
    let mut buffer = [0; 100];
    let n = socket.read(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..n]).into_owned()
}

#[test]
fn confined_process_serves_streams_both_ways_and_ends_well_when_the_front_end_closes() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    driver.offer_all();
    let (device, stream) = Device::start();
    // Before there is any front end or driver.
    let mut client = device.client(1024);
    let server = UnixListener::bind(format!("{}_1028", device.path().display())).unwrap();

    let mut vmm = Vmm::new(stream, &memory, &driver);
    let (_, config) = vmm.frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
    assert_eq!(config, 42u64.to_le_bytes());
    assert_eq!((device.status("Seccomp"), device.status("NoNewPrivs")), ("2".into(), "1".into()));

    let port = vmm.accept(&mut driver);
    assert_eq!(read_some(&mut client), format!("OK {port}\n"));
    client.write_all(b"ping").unwrap();
    assert_eq!(vmm.received(&mut driver)[0].1, b"ping");
    driver.send(packet(Op::ReadWrite, 1024, port), b"pong");
    driver.send(packet(Op::Request, 5000, 1028), &[]);
    driver.send(packet(Op::Request, 5000, 1029), &[]);
    vmm.kick();
    assert_eq!(read_some(&mut client), "pong");
    let (mut accepted, _) = server.accept().unwrap();
    accepted.write_all(b"hello").unwrap();
    let mut seen = Vec::new();
    while seen.len() < 3 {
        seen.extend(vmm.received(&mut driver).into_iter().map(|p| (p.0.src_port, p.0.op)));
    }
    assert!(
        seen.contains(&(1028, Op::Response as u16)) && seen.contains(&(1029, Op::Reset as u16)),
        "{seen:?}"
    );

    println!("resident: {} (anonymous {})", device.status("VmRSS"), device.status("RssAnon"));
    drop(vmm);
    assert_eq!(device.end(), (Some(0), String::new()));
}

#[test]
fn garbage_in_a_queue_stops_it_with_an_error_event_until_the_driver_starts_anew() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    driver.offer_all();
    let (device, stream) = Device::start();
    let mut vmm = Vmm::new(stream, &memory, &driver);
    driver.send_chain(&[(0x1_0000, HEADER_LEN as u32, WRITE)]);
    vmm.kick();
    eventually("the error event", || vmm.events[1].error.read().ok());
    driver.send(packet(Op::ReadWrite, 1, 2), b"x");
    vmm.kick();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(driver.taken(), 0, "the queue is stopped");

    vmm.stop();
    let mut driver = Driver::new(&memory);
    driver.offer_all();
    vmm.start([0, 0], &driver);
    driver.send(packet(Op::ReadWrite, 1, 2), b"x");
    vmm.kick();
    assert_eq!(vmm.received(&mut driver)[0].0.op, Op::Reset as u16);
    drop(vmm);
    let (code, said) = device.end();
    assert_eq!(code, Some(0));
    assert!(said.contains("the queue stops"), "{said}");
}

#[test]
fn streams_outlive_a_pause_but_not_a_new_driver() {
    let memory = memory();
    let mut driver = Driver::new(&memory);
    driver.offer_all();
    let (device, stream) = Device::start();
    let mut vmm = Vmm::new(stream, &memory, &driver);
    let mut client = device.client(1024);
    let port = vmm.accept(&mut driver);
    assert!(read_some(&mut client).starts_with("OK"));

    let bases = vmm.stop();
    client.write_all(b"during the pause").unwrap();
    vmm.start(bases, &driver);
    assert_eq!(vmm.received(&mut driver)[0].1, b"during the pause");
    driver.send(packet(Op::ReadWrite, 1024, port), b"after it");
    vmm.kick();
    assert_eq!(read_some(&mut client), "after it");

    vmm.stop();
    let driver = Driver::new(&memory);
    vmm.start([0, 0], &driver);
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the client is closed");
    drop(vmm);
    assert_eq!(device.end().0, Some(0));
}

#[test]
fn unusable_arguments_end_in_one_line_that_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("s")).unwrap();
    let fd = inheritable(&listener);
    let second = UnixListener::bind(directory.path().join("t")).unwrap();
    let other = inheritable(&second);
    let long = format!("/{}", "x".repeat(100));
    for (arguments, reason) in [
        (
            ["--listen-fd", "999", "--hybrid-fd", &fd, "--hybrid-path", "/a", "--guest-cid", "3"],
            "--listen-fd 999",
        ),
        (
            ["--listen-fd", "2", "--hybrid-fd", &fd, "--hybrid-path", "/a", "--guest-cid", "3"],
            "standard streams",
        ),
        (
            ["--listen-fd", &fd, "--hybrid-fd", &fd, "--hybrid-path", "/a", "--guest-cid", "3"],
            "the same descriptor",
        ),
        (["--listen-fd", &fd, "--hybrid-fd", &other, "--hybrid-path", &long, "--guest-cid", "3"], "too long"),
        (
            ["--listen-fd", &fd, "--hybrid-fd", &other, "--hybrid-path", "/a", "--guest-cid", "2"],
            "CID 2 is reserved",
        ),
    ] {
        let output =
            Command::new(env!("CARGO_BIN_EXE_kata-vmm")).arg("vsock").args(arguments).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{reason}");
        assert!(said.contains(reason) && said.lines().count() == 1, "{reason}: {said}");
    }
}

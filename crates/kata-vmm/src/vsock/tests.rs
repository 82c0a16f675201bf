//! The device against a test driver and real sockets.

mod credit;
mod garbage;
mod streams;

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::Queue;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::driver::{Driver, MEMORY};
use super::packet::TYPE_STREAM;
use super::{HOST_CID, Header, Op, Vsock, VsockConfig};
use crate::virtio::ring::QueueFault;

const GUEST: u64 = 3;
/// A window as large as Linux's.
const WINDOW: u32 = 256 * 1024;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory for a guest")
}

/// A device, its guest and the directory of its sockets.
struct Fixture<'m> {
    mem: &'m GuestMemoryMmap,
    driver: Driver<'m>,
    receive: Queue,
    transmit: Queue,
    device: Vsock,
    interrupts: usize,
    directory: tempfile::TempDir,
}

impl<'m> Fixture<'m> {
    /// With all receive buffers offered.
    fn new(mem: &'m GuestMemoryMmap) -> Fixture<'m> {
        let mut fixture = Fixture::without_buffers(mem);
        fixture.driver.offer_all();
        fixture
    }

    fn without_buffers(mem: &'m GuestMemoryMmap) -> Fixture<'m> {
        let directory = tempfile::tempdir().expect("a directory for sockets");
        let path = directory.path().join("hybrid");
        let listener = UnixListener::bind(&path).expect("a hybrid socket").into();
        let device = Vsock::new(VsockConfig { guest_cid: GUEST, listener, path }).expect("a device");
        let driver = Driver::new(mem);
        let [receive, transmit] = driver.queues();
        Fixture { mem, driver, receive, transmit, device, interrupts: 0, directory }
    }

    fn path(&self, port: Option<u32>) -> PathBuf {
        let suffix = port.map(|port| format!("_{port}")).unwrap_or_default();
        self.directory.path().join(format!("hybrid{suffix}"))
    }

    /// Lets the device work until it has nothing more to do.
    fn try_run(&mut self) -> Result<(), QueueFault> {
        for _ in 0..10_000 {
            self.device.handle_host();
            let sent = self.device.transmit(self.mem, &mut self.transmit)?;
            let filled = self.device.fill(self.mem, &mut self.receive)?;
            self.interrupts += usize::from(sent.interrupt) + usize::from(filled.interrupt);
            let mut host = [PollFd::new(&self.device, PollFlags::IN)];
            let more_of_host = poll(&mut host, Some(&Timespec::default())).expect("a poll") > 0;
            if !sent.more && !filled.more && !more_of_host {
                return Ok(());
            }
        }
        panic!("the device never comes to rest");
    }

    fn run(&mut self) {
        self.try_run().expect("healthy queues");
    }

    /// Runs, and takes what the guest got.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.run();
        self.driver.received()
    }

    /// Runs, and takes the one packet the guest got.
    fn received_one(&mut self, op: Op) -> (Header, Vec<u8>) {
        let packets = self.received();
        let [packet] = packets.try_into().expect("one packet");
        assert_eq!(packet.0.op, op as u16, "{packet:?}");
        packet
    }

    /// A packet from guest port `guest` to host port `host`.
    fn packet(&self, op: Op, guest: u32, host: u32) -> Header {
        Header {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: WINDOW,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.driver.send(header, payload);
    }

    /// A client that has asked for a guest port.
    fn client(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.path(None)).expect("the hybrid socket");
        client.write_all(format!("CONNECT {port}\n").as_bytes()).expect("a line");
        client.set_nonblocking(true).expect("a nonblocking client");
        client
    }

    /// A client that the guest has accepted, and its host port.
    fn open(&mut self, guest: u32) -> (UnixStream, u32) {
        let client = self.client(guest);
        let (request, _) = self.received_one(Op::Request);
        assert_eq!((request.src_cid, request.dst_cid, request.dst_port), (HOST_CID, GUEST, guest));
        self.send(self.packet(Op::Response, guest, request.src_port), &[]);
        assert!(self.received().is_empty());
        assert_eq!(read(&client), format!("OK {}\n", request.src_port).as_bytes());
        (client, request.src_port)
    }

    /// A guest's connection to `host`, and the server's end of it.
    fn dial(&mut self, guest: u32, host: u32) -> UnixStream {
        let path = self.path(Some(host));
        let listener = UnixListener::bind(&path).expect("a server's socket");
        self.send(self.packet(Op::Request, guest, host), &[]);
        self.received_one(Op::Response);
        std::fs::remove_file(path).expect("the server's socket");
        let (server, _) = listener.accept().expect("the guest's connection");
        server.set_nonblocking(true).expect("a nonblocking server");
        server
    }
}

/// What a socket has now.
fn read(mut socket: &UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    match std::io::Read::read_to_end(&mut socket, &mut all) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock),
    }
    all
}

/// Whether a socket has ended, with nothing before the end.
fn has_ended(mut socket: &UnixStream) -> bool {
    matches!(std::io::Read::read(&mut socket, &mut [0]), Ok(0))
}

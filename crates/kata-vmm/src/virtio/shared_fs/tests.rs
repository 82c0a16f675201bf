use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::sync::mpsc;

use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::virtio::driver::{Ring, WRITE};
use crate::virtio::positions;
use crate::virtio::told::Told;
use crate::vsock::driver::{Driver, MEMORY};
use crate::vsock::{Op, Vsock, VsockConfig};

/// Guest memory that another process can map.
fn memory() -> GuestMemoryMmap {
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(MEMORY.try_into().unwrap()).unwrap();
    GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)))])
        .unwrap()
}

fn share(socket: UnixStream) -> (Result<SharedFs, SharedFsError>, mpsc::Receiver<String>) {
    let (sender, lost) = mpsc::channel();
    let on_lost = Box::new(move |lost: ShareLost| sender.send(lost.to_string()).unwrap());
    (SharedFs::new(SharedFsConfig { tag: "kataShared".to_owned(), socket, on_lost }), lost)
}

/// A back end that is at hand here: the project's vsock. It has the queues, features and messages that matter.
fn backend() -> (UnixStream, std::path::PathBuf, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("h");
    let listener = UnixListener::bind(&path).unwrap().into();
    let device = Vsock::new(VsockConfig { guest_cid: 3, listener, path: path.clone() }).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    std::thread::spawn(move || crate::vhost_user::serve(there, device).unwrap());
    (here, path, directory)
}

#[test]
fn back_end_works_on_the_queues_until_it_is_stopped_and_goes_on_from_there() {
    let (socket, path, _directory) = backend();
    let mut device = share(socket).0.unwrap();
    assert_eq!(device.features() & (1 << VIRTIO_F_VERSION_1), 0, "the transport's to offer");
    let mut space = [0xff; 40];
    device.read_configuration(0, &mut space);
    assert_eq!(space, *[&b"kataShared"[..], &[0; 26], &[1, 0, 0, 0]].concat());

    let (mem, told) = (memory(), Told::new());
    let mut driver = Driver::new(&mem);
    driver.offer_all();
    let [receive, transmit] = driver.queues();
    let (activation, _kicks) = told.activation(&mem, 0, &[(0, receive), (1, transmit)]);
    device.activate(activation).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    told.raised(0);
    let [(request, _)] = &driver.received()[..] else { panic!("one packet") };
    assert_eq!((request.op, request.dst_port), (Op::Request as u16, 7));
    let states = device.stop();
    assert_eq!(positions(&states), [(0, 1), (1, 0)]);
    assert_eq!(states[0].1.next_used, 1);
    assert!(device.stop().is_empty());

    let queues: Vec<_> =
        states.into_iter().map(|(index, state)| (index, state.try_into().unwrap())).collect();
    let (activation, kicks) = told.activation(&mem, 0, &queues);
    // What the driver does while it stands is seen when it goes on.
    driver.send(crate::vsock::Header { op: Op::CreditRequest as u16, ..request.reset() }, &[]);
    device.activate(activation).unwrap();
    kicks[1].write(1).unwrap();
    told.raised(0);
    let [(update, _)] = &driver.received()[..] else { panic!("one packet") };
    assert_eq!(update.src_port, request.src_port);
}

#[test]
fn connection_of_a_share_that_never_worked_serves_the_next_and_one_that_was_used_is_not_saved() {
    let (socket, path, _directory) = backend();
    let again = socket.try_clone().unwrap();
    drop(share(socket).0.unwrap());
    let mut device = share(again).0.unwrap();
    let (mem, told) = (memory(), Told::new());
    let mut driver = Driver::new(&mem);
    driver.offer_all();
    let [receive, transmit] = driver.queues();
    let (activation, _kicks) = told.activation(&mem, 0, &[(0, receive), (1, transmit)]);
    device.activate(activation).unwrap();
    assert_eq!(device.unsaved(), None);
    // A client that is gone by then is not led to the guest.
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 7\n").unwrap();
    told.raised(0);
    device.stop();
    assert!(device.unsaved().unwrap().contains("mounted"));
}

#[test]
fn loss_of_the_back_end_is_told_once_with_its_name() {
    let (socket, there) = UnixStream::pair().unwrap();
    let (_, path, _directory) = backend();
    let device = Vsock::new(VsockConfig {
        guest_cid: 3,
        listener: UnixListener::bind(path.with_extension("other")).unwrap().into(),
        path: path.with_extension("other"),
    })
    .unwrap();
    let kill = there.try_clone().unwrap();
    std::thread::spawn(move || drop(crate::vhost_user::serve(there, device)));
    let (device, lost) = share(socket);
    let mut device = device.unwrap();
    let (mem, told) = (memory(), Told::new());
    let [receive, transmit] = Driver::new(&mem).queues();
    let queues = [(0, receive), (1, transmit)];
    let (activation, _kicks) = told.activation(&mem, 0, &queues);
    device.activate(activation).unwrap();
    assert!(lost.try_recv().is_err());
    kill.shutdown(std::net::Shutdown::Both).unwrap();
    let reason = lost.recv_timeout(Duration::from_secs(20)).unwrap();
    assert!(reason.contains("kataShared"), "{reason}");
    let states = device.stop();
    assert_eq!(states.len(), 2);
    let (activation, _kicks) = told.activation(&mem, 0, &queues);
    assert!(device.activate(activation).is_err());
    assert!(lost.try_recv().is_err(), "told twice");
}

#[test]
fn ring_that_leaves_its_memory_is_not_handed_over() {
    let (socket, _path, _directory) = backend();
    let (device, lost) = share(socket);
    let mut device = device.unwrap();
    let (mem, told) = (memory(), Told::new());
    let [receive, mut transmit] = Driver::new(&mem).queues();
    let past = u64::try_from(MEMORY).unwrap() - 16;
    virtio_queue::QueueT::set_used_ring_address(&mut transmit, Some(u32::try_from(past).unwrap()), None);
    let (activation, _kicks) = told.activation(&mem, 0, &[(0, receive), (1, transmit)]);
    let refused = device.activate(activation).unwrap_err();
    assert_eq!(refused.action, "hand its queues to the file server");
    assert!(lost.try_recv().is_err(), "the server is there");
}

#[test]
fn peer_that_is_no_server_is_refused() {
    let (socket, there) = UnixStream::pair().unwrap();
    drop(there);
    assert!(matches!(share(socket).0, Err(SharedFsError::Server { .. })));
    for tag in [String::new(), "x".repeat(37), "a\0b".to_owned()] {
        let (socket, _there) = UnixStream::pair().unwrap();
        let config = SharedFsConfig { tag, socket, on_lost: Box::new(|_| ()) };
        assert!(matches!(SharedFs::new(config), Err(SharedFsError::Tag(_))));
    }
}

#[test]
fn file_server_answers_a_guest() {
    let Some(program) = std::env::var_os("KATA_TEST_PROGRAMS") else {
        return eprintln!("skipped: KATA_TEST_PROGRAMS names no directory with kata-virtiofsd");
    };
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let mut server = Command::new(std::path::Path::new(&program).join("kata-virtiofsd"))
        .args(["--listen-fd", &listener.as_raw_fd().to_string(), "--shared-dir"])
        .arg(directory.path())
        .spawn()
        .unwrap();
    let (device, lost) = share(UnixStream::connect(&path).unwrap());
    let mut device = device.unwrap();
    let (mem, told) = (memory(), Told::new());
    let (high, requests) = (Ring::new(&mem, 0), Ring::new(&mem, 0x4000));
    let (activation, kicks) = told.activation(&mem, 0, &[(0, high.queue()), (1, requests.queue())]);
    device.activate(activation).unwrap();

    // FUSE_INIT of protocol 7.31: a header of 40 bytes, then version, read-ahead and flags.
    let fields: [u32; 14] = [56, 26, 1, 0, 0, 0, 0, 0, 0, 0, 7, 31, 4096, 0];
    mem.write_slice(&fields.map(u32::to_le_bytes).concat(), GuestAddress(0x1_0000)).unwrap();
    requests.offer(0, &[(0x1_0000, 40, 0), (0x1_0028, 16, 0), (0x1_1000, 16, WRITE), (0x1_2000, 64, WRITE)]);
    kicks[1].write(1).unwrap();
    told.raised(1);
    assert_eq!(requests.given_back(), 1);
    let answer: [u32; 4] = mem.read_obj(GuestAddress(0x1_1000)).unwrap();
    assert_eq!((answer[1], answer[2]), (0, 1), "no error, and our number");
    assert_eq!(mem.read_obj::<u32>(GuestAddress(0x1_2000)).unwrap(), 7);
    assert_eq!(positions(&device.stop()), [(0, 0), (1, 1)]);

    let (activation, _kicks) = told.activation(
        &mem,
        0,
        &[
            (0, high.queue()),
            (1, {
                let mut queue = requests.queue();
                virtio_queue::QueueT::set_next_avail(&mut queue, 1);
                queue
            }),
        ],
    );
    device.activate(activation).unwrap();
    server.kill().unwrap();
    lost.recv_timeout(Duration::from_secs(20)).unwrap();
    server.wait().unwrap();
}

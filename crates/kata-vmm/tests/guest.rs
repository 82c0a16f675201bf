//! `kata-vmm run`, jailed, with all devices, and Linux's own drivers on the other side. What it wants is said in `initrd`, and
//! `KATA_TEST_PROGRAMS` with `kata-virtiofsd`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends at the first surprise"
)]

mod initrd;
mod monitor;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use initrd::{initrd, stock_kernel};
use monitor::{monitor, request};

const SCRIPT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /bin /proc /sys /dev /share
/bin/busybox --install -s /bin
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
/modules
say() { echo "GUEST $*"; }
say disks $(cat /sys/block/vda/size) $(cat /sys/block/vda/serial) $(cat /sys/block/vda/ro) $(cat /sys/block/vdb/ro)
say data $(md5sum < /dev/vdb | cut -c1-32)
dd if=/dev/vdb of=/dev/vda bs=256k conv=fsync 2>/dev/null && say copied $(md5sum < /dev/vda | cut -c1-32)
(dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync 2>/dev/null) && say readonly is written || say readonly holds
ip addr add 10.1.1.2/24 dev eth0; ip link set eth0 up
ping -c 3 -W 5 10.1.1.1 > /dev/null && say pinged
nc 10.1.1.1 5000 < /dev/vdb && say sent
say fetched $(nc 10.1.1.1 5001 < /dev/null | md5sum | cut -c1-32)
mount -t virtiofs kataShared /share && say shared $(cat /share/hello)
md5sum < /share/data | cut -c1-32 > /share/answer
sync; umount /share
say end
reboot -f
"#;

/// A machine with all devices, of the descriptors that the test sends along.
const CREATE: &str = r#"{"id":1,"command":{"create":{"cpus":1,"max-cpus":1,
"memory":{"size-mib":192,"max-mib":192},"console":2,
"start":{"kernel":{"kernel":0,"initrd":1,"command-line":"console=ttyS0 rdinit=/init reboot=t panic=-1"}},
"shared-fs":{"tag":"kataShared","socket":3},
"disks":[{"id":"scratch","file":4,"readonly":false},{"id":"data","file":5,"readonly":true}],
"nics":[{"id":"eth0","mac":[2,0,0,0,0,1],"mtu":1500,"queues":[6]}]}}}"#;

/// Sectors of each disk.
const SECTORS: usize = 16 * 1024;

/// A tap with an address, in a network namespace of this thread's.
fn tap() -> OwnedFd {
    // SAFETY: concerns this thread's network alone.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
    let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: all zeroes are a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..4].copy_from_slice(&[116, 97, 112, 48]);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
    // SAFETY: TUNSETIFF takes a `struct ifreq`.
    let made = unsafe { libc::ioctl(tap.as_raw_fd(), 0x4004_54ca, &raw mut request) };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    for line in ["link set lo up", "addr add 10.1.1.1/24 dev tap0", "link set tap0 up"] {
        assert!(Command::new("ip").args(line.split(' ')).status().unwrap().success(), "{line}");
    }
    tap.into()
}

/// The share's server, and a connection to it.
fn file_server(program: &Path, directory: &Path) -> (Child, UnixStream) {
    let path = directory.join("share.sock");
    let listener = UnixListener::bind(&path).unwrap();
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
    let server = Command::new(program)
        .args(["--listen-fd", &listener.as_raw_fd().to_string(), "--shared-dir"])
        .arg(directory.join("share"))
        .spawn()
        .unwrap();
    (server, UnixStream::connect(&path).unwrap())
}

/// Counts what one connection says, and takes a sum of it.
fn sum(mut stream: impl Read) -> (usize, u64) {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    (bytes.len(), fingerprint(&bytes))
}

/// FNV-1a, enough to see that bytes are the same.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

#[test]
fn drivers_of_a_guest_work_with_all_devices_of_a_jailed_monitor() {
    let Some(kernel) = stock_kernel() else { return };
    let Some(programs) = std::env::var_os("KATA_TEST_PROGRAMS") else {
        return eprintln!("skipped: wants KATA_TEST_PROGRAMS");
    };
    let server = PathBuf::from(programs).join("kata-virtiofsd");
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let data: Vec<u8> = (0..SECTORS * 512).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect();
    std::fs::write(at("data"), &data).unwrap();
    File::create(at("scratch")).unwrap().set_len(data.len().try_into().unwrap()).unwrap();
    std::fs::create_dir(at("share")).unwrap();
    std::fs::write(at("share/hello"), "hello").unwrap();
    std::fs::write(at("share/data"), &data).unwrap();
    let md5 = Command::new("md5sum").arg(at("data")).output().unwrap();
    let md5 = String::from_utf8(md5.stdout).unwrap()[..32].to_owned();

    let tap = tap();
    let (takes, gives) =
        (TcpListener::bind("10.1.1.1:5000").unwrap(), TcpListener::bind("10.1.1.1:5001").unwrap());
    let taken = std::thread::spawn(move || sum(takes.accept().unwrap().0));
    let given = data.clone();
    std::thread::spawn(move || gives.accept().unwrap().0.write_all(&given));
    let (mut share, share_socket) = file_server(&server, directory.path());

    let (mut monitor, api) = monitor(&kvm, &[]);
    let (console, output) = rustix::pipe::pipe().unwrap();
    let kernel = File::open(kernel).unwrap();
    let initrd = initrd(SCRIPT, &["virtio_blk", "virtio_net"], &at("initrd"));
    let scratch = OpenOptions::new().read(true).write(true).open(at("scratch")).unwrap();
    let readonly = File::open(at("data")).unwrap();
    let files = [
        kernel.as_fd(),
        initrd.as_fd(),
        output.as_fd(),
        share_socket.as_fd(),
        scratch.as_fd(),
        readonly.as_fd(),
        tap.as_fd(),
    ];
    request(&api, &CREATE.replace('\n', ""), &files);
    drop((output, share_socket, tap));
    let mut replies = BufReader::new(api.try_clone().unwrap()).lines().map(Result::unwrap);
    let done = |id: u64| format!(r#"{{"id":{id},"done":"nothing"}}"#);
    assert_eq!(replies.next().unwrap(), done(1));
    request(&api, r#"{"id":2,"command":"boot"}"#, &[]);
    assert_eq!(replies.next().unwrap(), done(2));

    let said: Vec<String> = BufReader::new(File::from(console))
        .lines()
        .map_while(Result::ok)
        .inspect(|line| eprintln!("{line}"))
        .filter_map(|line| line.trim().strip_prefix("GUEST ").map(str::to_owned))
        .collect();
    let (ended, status) = (replies.next(), monitor.wait().unwrap());
    eprintln!("{ended:?}, {status}");
    assert_eq!(
        said,
        [
            &format!("disks {SECTORS} scratch 0 1"),
            &format!("data {md5}"),
            &format!("copied {md5}"),
            "readonly holds",
            "pinged",
            "sent",
            &format!("fetched {md5}"),
            "shared hello",
            "end",
        ]
    );
    assert_eq!(ended.unwrap(), r#"{"event":{"ended":{"reason":"reset"}}}"#);
    assert!(status.success());
    assert_eq!(taken.join().unwrap(), (data.len(), fingerprint(&data)));
    let mut copy = vec![0; data.len()];
    File::open(at("scratch")).unwrap().read_exact_at(&mut copy, 0).unwrap();
    assert!(copy == data);
    assert_eq!(std::fs::read_to_string(at("share/answer")).unwrap().trim(), md5);
    let _ = share.kill();
    share.wait().unwrap();
}

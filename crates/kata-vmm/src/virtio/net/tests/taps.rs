//! On real taps, in a network namespace of the test's own.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd};
use std::time::{Duration, Instant};

use super::*;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
/// Where the guest has what it sends.
const OUT: u64 = BUFFERS + 0x4_0000;
/// The local experimental EtherType (IEEE 802): nothing else on the interface has it.
const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
const IPV4: [u8; 2] = [0x08, 0x00];

/// An interface with queues, and a socket that sees and sends all of its packets.
struct Interface {
    queues: Vec<OwnedFd>,
    packets: OwnedFd,
}

fn request(flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all zeroes are a value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..4].copy_from_slice(&[116, 97, 112, 48]);
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).unwrap();
    request
}

fn control(fd: &impl AsRawFd, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: these requests take a `struct ifreq`.
    if unsafe { libc::ioctl(fd.as_raw_fd(), number as _, std::ptr::from_mut(request)) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> OwnedFd {
    // SAFETY: makes a descriptor.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    assert!(fd >= 0, "{}", io::Error::last_os_error());
    // SAFETY: it is new, and nobody else's.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn set(fd: &OwnedFd, level: libc::c_int, option: libc::c_int, value: i32) {
    let value = std::ptr::from_ref(&value).cast();
    // SAFETY: the option takes an int.
    let done = unsafe { libc::setsockopt(fd.as_raw_fd(), level, option, value, 4) };
    assert_eq!(done, 0, "{}", io::Error::last_os_error());
}

impl Interface {
    /// `None` where this process may not have one.
    fn new(queues: usize, flags: libc::c_int) -> Option<Interface> {
        // SAFETY: concerns this thread's network alone.
        let own = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        let open = || OpenOptions::new().read(true).write(true).open("/dev/net/tun");
        if own != 0 || open().is_err() {
            eprintln!("skipped: no network namespace or no taps: {}", io::Error::last_os_error());
            return None;
        }
        let queue = |_| {
            let file = open().unwrap();
            control(&file, TUNSETIFF, &mut request(flags)).unwrap();
            file.into()
        };
        let queues = (0..queues).map(queue).collect();
        let settings = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
        let mut mtu = request(0);
        mtu.ifr_ifru.ifru_mtu = 9000;
        control(&settings, libc::SIOCSIFMTU as _, &mut mtu).unwrap();
        control(&settings, libc::SIOCSIFFLAGS as _, &mut request(libc::IFF_UP)).unwrap();
        Some(Interface { queues, packets: packets() })
    }

    /// Sends a frame, after the header that says what is left undone in it.
    fn send(&self, header: [u8; 10], frame: &[u8]) {
        let sent = rustix::io::write(&self.packets, &[&header[..], frame].concat());
        assert_eq!(sent, Ok(10 + frame.len()));
    }

    /// The next frame of the test's EtherType and this length.
    fn next(&self, frame: usize) -> Vec<u8> {
        let mut got = [0; 4096];
        loop {
            let len = rustix::io::read(&self.packets, &mut got).unwrap();
            if got[22..24] == EXPERIMENT && len == 10 + frame {
                return got[10..len].to_vec();
            }
        }
    }
}

/// A socket for whole frames of the interface.
fn packets() -> OwnedFd {
    let all = u16::try_from(libc::ETH_P_ALL).unwrap().to_be();
    let packets = socket(libc::AF_PACKET, libc::SOCK_RAW, all.into());
    // SAFETY: all zeroes are a value of it.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap();
    address.sll_protocol = all;
    // SAFETY: the name ends with a zero.
    address.sll_ifindex = unsafe { libc::if_nametoindex(c"tap0".as_ptr()) }.cast_signed();
    let len = u32::try_from(size_of_val(&address)).unwrap();
    // SAFETY: the kernel reads the address.
    let bound = unsafe { libc::bind(packets.as_raw_fd(), std::ptr::from_ref(&address).cast(), len) };
    assert_eq!(bound, 0, "{}", io::Error::last_os_error());
    set(&packets, libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1);
    let patience = libc::timeval { tv_sec: 20, tv_usec: 0 };
    // SAFETY: the option takes a `struct timeval`.
    let done = unsafe {
        libc::setsockopt(
            packets.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            std::ptr::from_ref(&patience).cast(),
            16,
        )
    };
    assert_eq!(done, 0);
    packets
}

const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// The kernel's packet mover, where there is one.
fn vhost() -> Option<OwnedFd> {
    match OpenOptions::new().read(true).write(true).open("/dev/vhost-net") {
        Ok(vhost) => Some(vhost.into()),
        Err(e) => {
            eprintln!("skipped: no /dev/vhost-net: {e}");
            None
        }
    }
}

#[test]
fn kernel_moves_packets_of_as_many_pairs_as_the_driver_uses() {
    let (Some(one), Some(other)) = (vhost(), vhost()) else { return };
    let Some(mut interface) = Interface::new(2, FLAGS | libc::IFF_MULTI_QUEUE) else { return };
    let queues = interface.queues.drain(..).collect();
    let config = NetConfig { mac: MAC, mtu: 1500, queues, vhost: vec![one, other] };
    let (mut device, mem, told) = (Net::new(config).unwrap(), memory(), Told::new());
    let rings: Vec<_> = (0..5).map(|index| Ring::new(&mem, 0xa_0000 + index * 0x4000)).collect();
    for slot in 0..16u16 {
        let at = BUFFERS + u64::from(slot) * 0x800;
        rings[0].offer(slot, &[(at, 2048, WRITE)]);
        rings[2].offer(slot, &[(at + 0x1_0000, 2048, WRITE)]);
    }
    let queues: Vec<_> = rings.iter().enumerate().map(|(index, ring)| (index, ring.queue())).collect();
    let (activation, kicks) = told.activation(&mem, MERGE | 1 << VIRTIO_NET_F_MQ, &queues);
    device.activate(activation).unwrap();

    // Sixteen connections: with one pair all of them, or as many as there are buffers, arrive at it.
    let flows = || {
        for port in 0..16 {
            let (_, mut sent) = segments(10);
            sent[35] = port;
            interface.send([0; 10], &sent);
        }
    };
    flows();
    told.raised(0);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(rings[2].given_back(), 0);
    mem.write_slice(&[4, 0, 2, 0], GuestAddress(OUT)).unwrap();
    rings[4].offer(0, &[(OUT, 4, 0), (OUT + 16, 1, WRITE)]);
    kicks[4].write(1).unwrap();
    told.eventually("used 4");
    assert_eq!(mem.read_obj::<u8>(GuestAddress(OUT + 16)).unwrap(), 0);
    flows();
    told.raised(2);
    assert_eq!(device.stop().len(), 5);
}

#[test]
fn kernel_moves_packets_where_it_has_vhost() {
    let Some(vhost) = vhost() else { return };
    let Some(interface) = Interface::new(1, FLAGS) else { return };
    let mem = memory();
    let config = NetConfig {
        mac: MAC,
        mtu: 9000,
        queues: vec![interface.queues[0].try_clone().unwrap()],
        vhost: vec![vhost],
    };
    let device = Net::new(config).unwrap();
    assert_ne!(device.features() & MERGE, 0);
    let mut guest = Guest::new(&mem, device, MERGE);
    for (round, len) in [50, 4000].into_iter().enumerate() {
        let sent = frame(EXPERIMENT, len);
        interface.send([0; 10], &sent);
        assert_eq!(guest.next(EXPERIMENT)[HEADER_LEN..], sent, "{len}");
        guest.told.raised(0);

        let sent = frame(EXPERIMENT, 300 + round);
        guest.send(&sent);
        guest.told.raised(1);
        assert_eq!(interface.next(sent.len()), sent);

        // Paused and resumed, it goes on where it was.
        let states = guest.device.stop();
        assert_eq!(positions(&states)[1], (1, u16::try_from(round).unwrap() + 1));
        let queues: Vec<_> =
            states.into_iter().map(|(index, state)| (index, state.try_into().unwrap())).collect();
        let (activation, kicks) = guest.told.activation(&mem, MERGE, &queues);
        guest.kicks = kicks;
        guest.device.activate(activation).unwrap();
    }
}

fn device(queues: Vec<OwnedFd>) -> Result<Net, NetError> {
    Net::new(NetConfig { mac: MAC, mtu: 9000, queues, vhost: Vec::new() })
}

fn frame(kind: [u8; 2], len: usize) -> Vec<u8> {
    [&[0xff; 6][..], &MAC, &kind, &vec![0xab; len]].concat()
}

/// A frame of IPv4 and TCP with so many bytes, and the header of one that the interface has to cut and to sum.
fn segments(len: usize) -> ([u8; 10], Vec<u8>) {
    let total = u16::try_from(40 + len).unwrap().to_be_bytes();
    let ip = [0x45, 0, total[0], total[1], 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    let mut tcp = [0; 20];
    tcp[12] = 0x50;
    let mut frame = [&[0xff; 6][..], &MAC, &IPV4, &ip, &tcp, &vec![0xcd; len]].concat();
    let sum = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    frame[24..26].copy_from_slice(&sum.to_be_bytes());
    // Checksum needed; TCPv4; 54 bytes of headers, 1000 of each segment; sum from 34 on, at 16 from there.
    ([1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0], frame)
}

/// A guest with a pair of queues, both of which it serves like a driver.
struct Guest<'m> {
    mem: &'m GuestMemoryMmap,
    device: Net,
    told: Arc<Told>,
    receive: Ring<'m>,
    transmit: Ring<'m>,
    kicks: Vec<vmm_sys_util::eventfd::EventFd>,
    received: u16,
}

impl<'m> Guest<'m> {
    fn new(mem: &'m GuestMemoryMmap, mut device: Net, features: u64) -> Guest<'m> {
        let (receive, transmit, told) = (Ring::new(mem, 0), Ring::new(mem, TRANSMIT), Told::new());
        for slot in 0..16u16 {
            receive.offer(slot, &[(BUFFERS + u64::from(slot) * 0x1000, 2048, WRITE)]);
        }
        let queues = [(0, receive.queue()), (1, transmit.queue())];
        let (activation, kicks) = told.activation(mem, features, &queues);
        device.activate(activation).unwrap();
        Guest { mem, device, told, receive, transmit, kicks, received: 0 }
    }

    /// Sends a frame in two pieces.
    fn send(&self, frame: &[u8]) {
        self.mem.write_slice(&[&[0; HEADER_LEN][..], frame].concat(), GuestAddress(OUT)).unwrap();
        let len = u32::try_from(frame.len()).unwrap();
        self.transmit.offer(0, &[(OUT, 12, 0), (OUT + 12, len, 0)]);
        self.kicks[1].write(1).unwrap();
    }

    /// The next packet of this EtherType, with its header.
    fn next(&mut self, kind: [u8; 2]) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let packet = self.any(end);
            if packet[24..26] == kind {
                return packet;
            }
        }
    }

    fn any(&mut self, end: Instant) -> Vec<u8> {
        let (mut packet, mut chains) = (Vec::new(), 1);
        while chains > 0 {
            while self.receive.given_back() == self.received {
                assert!(Instant::now() < end, "no packet; {:?}", self.told.all());
                std::thread::sleep(Duration::from_millis(1));
            }
            let (slot, len) = self.receive.back(self.received);
            self.received += 1;
            let mut bytes = vec![0; usize::try_from(len).unwrap()];
            self.mem.read_slice(&mut bytes, GuestAddress(BUFFERS + u64::from(slot) * 0x1000)).unwrap();
            if packet.is_empty() {
                chains = u16::from_le_bytes([bytes[10], bytes[11]]);
            }
            chains -= 1;
            packet.extend(bytes);
            let slot = u16::try_from(slot).unwrap();
            self.receive.offer(slot, &[(BUFFERS + u64::from(slot) * 0x1000, 2048, WRITE)]);
            self.kicks[0].write(1).unwrap();
        }
        packet
    }
}

#[test]
fn packets_cross_a_tap_both_ways_and_the_link_falls_with_the_interface() {
    let Some(mut interface) = Interface::new(1, FLAGS) else { return };
    let mem = memory();
    let mut guest = Guest::new(&mem, device(interface.queues.drain(..).collect()).unwrap(), MERGE);
    for len in [50, 4000, 8900] {
        let sent = frame(EXPERIMENT, len);
        interface.send([0; 10], &sent);
        let got = guest.next(EXPERIMENT);
        assert_eq!(got[HEADER_LEN..], sent, "{len}");
    }
    let sent = frame(EXPERIMENT, 3000);
    guest.send(&sent);
    assert_eq!(interface.next(sent.len()), sent);

    // A header that no kernel believes costs its packet alone.
    guest.told.eventually("used 1");
    mem.write_slice(&[1, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff], GuestAddress(OUT)).unwrap();
    guest.transmit.offer(0, &[(OUT, 12, 0), (OUT + 12, 3014, 0)]);
    guest.kicks[1].write(1).unwrap();
    guest.told.eventually("used 1");

    let settings = std::process::Command::new("ip").args(["link", "del", "tap0"]).status();
    assert!(settings.is_ok_and(|status| status.success()), "the interface stays");
    guest.told.eventually("configuration changed");
    let mut status = [0xff; 2];
    guest.device.read_configuration(6, &mut status);
    assert_eq!(status, [0, 0]);
}

#[test]
fn segmentation_is_left_to_a_guest_that_does_it_and_done_for_another() {
    let Some(mut interface) = Interface::new(1, FLAGS) else { return };
    let mem = memory();
    let device = device(interface.queues.drain(..).collect()).unwrap();
    let offload = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
    assert_eq!(device.features() & offload, offload);
    let mut guest = Guest::new(&mem, device, MERGE | offload);
    let (header, sent) = segments(4000);
    interface.send(header, &sent);
    let got = guest.next(IPV4);
    assert_eq!((got[0] & 1, got[1], got.len()), (1, 1, HEADER_LEN + sent.len()));

    guest.device.stop();
    let mut guest = Guest::new(&mem, guest.device, MERGE);
    interface.send(header, &sent);
    let mut bytes = 0;
    while bytes < 4000 {
        let got = guest.next(IPV4);
        assert_eq!((got[0] & 1, got[1]), (0, 0));
        assert!(got.len() <= HEADER_LEN + 54 + 1000, "{}", got.len());
        bytes += got.len() - HEADER_LEN - 54;
    }
    assert_eq!(bytes, 4000);
}

#[test]
fn queues_of_a_tap_come_and_go_with_the_pairs_of_the_driver() {
    let Some(mut interface) = Interface::new(2, FLAGS | libc::IFF_MULTI_QUEUE) else { return };
    let taps: Vec<_> = interface.queues.drain(..).map(|queue| Tap::new(queue).unwrap()).collect();
    assert!(taps[0].has_queues());
    let mut server = Server::new(taps, Arc::new(AtomicBool::new(true)), None);
    server.begin(1 << VIRTIO_NET_F_MQ, false).unwrap();
    // Sixty-four connections to the guest, which the kernel spreads over the queues that are used.
    let spread = |server: &Server| {
        for port in 0..64 {
            let (_, mut sent) = segments(10);
            sent[35] = port;
            interface.send([0; 10], &sent);
        }
        let mut packet = vec![0; MAX_PACKET];
        [0, 1].map(|number: usize| {
            let tap = &server.pairs[number].tap;
            std::iter::from_fn(|| tap.receive(&mut packet).ok()).count()
        })
    };
    let [first, second] = spread(&server);
    assert!(first >= 64 && second == 0, "{first} {second}");
    server.use_pairs(2).unwrap();
    server.use_pairs(2).unwrap();
    let [first, second] = spread(&server);
    assert!(first > 0 && second > 0, "{first} {second}");
    server.use_pairs(1).unwrap();
    let [first, second] = spread(&server);
    assert!(first >= 64 && second == 0, "{first} {second}");
}

#[test]
fn interface_of_another_kind_is_refused() {
    let Some(interface) = Interface::new(1, libc::IFF_TUN | libc::IFF_NO_PI) else { return };
    let refused = device(interface.queues).err().unwrap();
    assert!(matches!(refused, NetError::Tap(TapError::Flags(name, _)) if name == "tap0"));
}

#[test]
fn queues_of_an_interface_with_one_are_refused() {
    let Some(mut interface) = Interface::new(1, FLAGS) else { return };
    let again = interface.queues[0].try_clone().unwrap();
    interface.queues.push(again);
    let refused = device(interface.queues).err().unwrap();
    assert!(matches!(refused, NetError::Tap(TapError::OneQueue(_, 2))));
}

#[test]
fn another_descriptor_is_no_vhost() {
    let Some(interface) = Interface::new(1, FLAGS) else { return };
    let vhost = vec![File::open("/dev/null").unwrap().into()];
    let refused = Net::new(NetConfig { mac: MAC, mtu: 1500, queues: interface.queues, vhost });
    assert!(matches!(refused, Err(NetError::Kernel(KernelError::NoVhost(_)))));
}

use std::io::Write as _;
use std::os::unix::net::UnixStream;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_GUEST_TSO4;
use virtio_queue::Queue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::packets::MAX_PACKET;
use super::*;
use crate::virtio::driver::{Ring, WRITE};
use crate::virtio::ring::QueueFault;
use crate::virtio::told::Told;

mod taps;

/// Guest memory: a receive, a transmit and a control queue, then buffers.
const TRANSMIT: u64 = 0x4000;
const CONTROL: u64 = 0x8000;
const BUFFERS: u64 = 0x1_0000;
const MEMORY: usize = 0x10_0000;
const MERGE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

/// A queue of no tap, and what is at its other end.
fn stand_in() -> (Tap, OwnedFd) {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (tap, world) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    (Tap::stand_in(tap), world)
}

struct Fixture<'m> {
    mem: &'m GuestMemoryMmap,
    receive: (Ring<'m>, Queue),
    transmit: (Ring<'m>, Queue),
    pair: Pair,
    world: OwnedFd,
}

impl<'m> Fixture<'m> {
    fn new(mem: &'m GuestMemoryMmap, features: u64) -> Fixture<'m> {
        let (tap, world) = stand_in();
        let ring = |base| {
            let ring = Ring::new(mem, base);
            let queue = ring.queue();
            (ring, queue)
        };
        let mut pair = Pair::new(tap, Arc::default());
        pair.begin(features);
        Fixture { mem, receive: ring(0), transmit: ring(TRANSMIT), pair, world }
    }

    /// A packet comes from outside.
    fn comes(&mut self, packet: &[u8]) {
        rustix::io::write(&self.world, packet).unwrap();
        self.pair.readable = true;
    }

    fn receive(&mut self) -> Result<bool, QueueFault> {
        self.pair.receive(self.mem, &mut self.receive.1).map(|served| served.more)
    }

    fn transmit(&mut self) -> Result<bool, QueueFault> {
        self.pair.transmit(self.mem, &mut self.transmit.1).map(|served| served.more)
    }

    /// What went out.
    fn went(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; MAX_PACKET];
        let len = rustix::io::read(&self.world, &mut packet).ok()?;
        packet.truncate(len);
        Some(packet)
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

fn packet(len: usize) -> Vec<u8> {
    let mut packet = vec![0; HEADER_LEN];
    packet.extend((0..len).map(|i| u8::try_from(i % 251).unwrap()));
    packet
}

#[test]
fn packet_of_the_guest_goes_out_with_its_header_however_it_is_cut() {
    let mem = memory();
    let mut f = Fixture::new(&mem, 0);
    let sent = packet(3000);
    mem.write_slice(&sent, GuestAddress(BUFFERS)).unwrap();
    f.transmit.0.offer(0, &[(BUFFERS, 5, 0), (BUFFERS + 5, 1000, 0), (BUFFERS + 1005, 2007, 0)]);
    assert!(!f.transmit().unwrap());
    assert_eq!(f.went().unwrap(), sent);
    assert_eq!((f.transmit.0.given_back(), f.transmit.0.back(0)), (1, (0, 0)));
}

#[test]
fn packet_that_nobody_takes_is_dropped_and_its_chain_given_back() {
    let mem = memory();
    let mut f = Fixture::new(&mem, 0);
    f.world = stand_in().1;
    f.transmit.0.offer(0, &[(BUFFERS, 100, 0)]);
    f.transmit.0.offer(1, &[(BUFFERS, 0x8000, 0)]);
    f.transmit.0.offer(4, &[(BUFFERS, 0x8000, 0), (BUFFERS, 0x8000, 0), (BUFFERS, 0x8000, 0)]);
    while f.transmit().unwrap() {}
    assert_eq!(f.transmit.0.given_back(), 3);
}

#[test]
fn received_packet_takes_as_many_buffers_as_it_needs_and_all_appear_at_once() {
    let mem = memory();
    let mut f = Fixture::new(&mem, MERGE);
    for slot in 0..4u16 {
        f.receive.0.offer(slot, &[(BUFFERS + u64::from(slot) * 0x1000, 0x400, WRITE)]);
    }
    let sent = packet(2500);
    f.comes(&sent);
    assert!(!f.receive().unwrap());
    assert_eq!(f.receive.0.given_back(), 3);
    let back: Vec<_> = (0..3).map(|nth| f.receive.0.back(nth)).collect();
    assert_eq!(back, [(0, 1024), (1, 1024), (2, 464)]);
    let mut got =
        [f.bytes(BUFFERS, 1024), f.bytes(BUFFERS + 0x1000, 1024), f.bytes(BUFFERS + 0x2000, 464)].concat();
    assert_eq!(got[10..12], 3u16.to_le_bytes());
    got[10] = 0;
    assert_eq!(got, sent);
}

#[test]
fn packet_waits_until_there_are_buffers_for_all_of_it() {
    let mem = memory();
    let mut f = Fixture::new(&mem, MERGE);
    let sent = packet(1000);
    f.comes(&sent);
    assert!(!f.receive().unwrap());
    f.receive.0.offer(0, &[(BUFFERS, 600, WRITE)]);
    assert!(!f.receive().unwrap());
    assert_eq!(f.receive.0.given_back(), 0);
    f.receive.0.offer(1, &[(BUFFERS + 0x1000, 600, WRITE)]);
    assert!(!f.receive().unwrap());
    assert_eq!(f.receive.0.given_back(), 2);
    assert_eq!(f.receive.0.back(1), (1, 412));
}

#[test]
fn packet_too_long_for_buffers_of_one_piece_is_dropped_and_the_next_arrives() {
    let mem = memory();
    let mut f = Fixture::new(&mem, 0);
    f.receive.0.offer(0, &[(BUFFERS, 600, WRITE)]);
    f.comes(&packet(1000));
    f.comes(&packet(500));
    assert!(!f.receive().unwrap());
    assert_eq!((f.receive.0.given_back(), f.receive.0.back(0)), (1, (0, 512)));
    assert_eq!(f.bytes(BUFFERS + 10, 2), 1u16.to_le_bytes());
}

#[test]
fn flood_takes_several_turns() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
    let mut f = Fixture::new(&mem, 0);
    f.world = stand_in().1;
    let (len, mut turns) = (0xf000, 1);
    for slot in 0..16 {
        f.transmit.0.offer(slot, &[(BUFFERS, len, 0)]);
    }
    // Each turn looks at no more than the queue holds; while it lasts the guest has added as many again.
    while f.transmit().unwrap() {
        turns += 1;
        if turns == 2 {
            for slot in 0..16 {
                f.transmit.0.offer(slot, &[(BUFFERS, len, 0)]);
            }
        }
    }
    assert_eq!(f.transmit.0.given_back(), 32);
    assert!(turns > 1, "{turns}");
}

#[test]
fn chain_that_is_no_packet_breaks_its_queue() {
    let past = u64::try_from(MEMORY).unwrap();
    let no_packets: &[&[(u64, u32, u16)]] = &[
        &[(BUFFERS, 11, 0)],
        &[(BUFFERS, 0, 0)],
        &[(BUFFERS, 100, WRITE)],
        &[(BUFFERS, 12, 0), (BUFFERS, 100, WRITE)],
        &[(past - 10, 20, 0)],
        &[(u64::MAX - 5, 20, 0)],
    ];
    for chain in no_packets {
        let mem = memory();
        let mut f = Fixture::new(&mem, MERGE);
        f.transmit.0.offer(0, chain);
        assert!(matches!(f.transmit(), Err(QueueFault::Chain(_))), "{chain:?}");
        assert_eq!(f.went(), None);
    }
    let no_rooms: &[&[(u64, u32, u16)]] =
        &[&[(BUFFERS, 11, WRITE)], &[(BUFFERS, 0, WRITE)], &[(BUFFERS, 100, 0)], &[(past - 10, 20, WRITE)]];
    for chain in no_rooms {
        let mem = memory();
        let mut f = Fixture::new(&mem, MERGE);
        f.receive.0.offer(0, chain);
        f.comes(&packet(100));
        assert!(matches!(f.receive(), Err(QueueFault::Chain(_))), "{chain:?}");
    }
}

/// Two pairs without taps, as a server and as what is outside.
fn two_pairs() -> (Server, [OwnedFd; 2]) {
    let ((first, one), (second, two)) = (stand_in(), stand_in());
    let mut server = Server::new(vec![first, second], Arc::new(AtomicBool::new(true)), None);
    server.begin(1 << VIRTIO_NET_F_MQ, false).unwrap();
    (server, [one, two])
}

#[test]
fn control_queue_sets_the_pairs_and_refuses_what_it_does_not_know() {
    let mem = memory();
    let (mut server, _world) = two_pairs();
    let ring = Ring::new(&mem, CONTROL);
    let mut queue = ring.queue();
    let commands: [(&[u8], u8, usize); 8] = [
        (&[4, 0, 2, 0], 0, 2),
        (&[4, 0, 0, 0], 1, 2),
        (&[4, 0, 3, 0], 1, 2),
        (&[4, 0, 255, 255], 1, 2),
        (&[4, 0, 1], 1, 2),
        (&[4, 1, 1, 0], 1, 2),
        (&[0, 0, 1, 0], 1, 2),
        (&[4, 0, 1, 0], 0, 1),
    ];
    for (command, answer, pairs) in commands {
        mem.write_slice(command, GuestAddress(BUFFERS)).unwrap();
        let len = u32::try_from(command.len()).unwrap();
        ring.offer(0, &[(BUFFERS, len.min(2), 0), (BUFFERS + 2, len - 2, 0), (BUFFERS + 16, 1, WRITE)]);
        control::serve(&mut server, &mem, &mut queue).unwrap();
        assert_eq!(mem.read_obj::<u8>(GuestAddress(BUFFERS + 16)).unwrap(), answer, "{command:?}");
        assert_eq!(server.used, pairs, "{command:?}");
    }
    ring.offer(0, &[(BUFFERS, 4, 0)]);
    assert!(control::serve(&mut server, &mem, &mut queue).is_err());
}

#[test]
fn pause_keeps_the_pairs_and_a_new_driver_begins_with_one() {
    let (mut server, _world) = two_pairs();
    server.use_pairs(2).unwrap();
    server.begin(1 << VIRTIO_NET_F_MQ, true).unwrap();
    assert_eq!((server.used, server.control), (2, 4));
    server.begin(1 << VIRTIO_NET_F_MQ, false).unwrap();
    assert_eq!((server.used, server.control), (1, 4));
    server.begin(0, false).unwrap();
    assert_eq!(server.control, 2);
}

#[test]
fn device_carries_packets_and_its_link_goes_down_with_the_tap() {
    let (mem, told) = (memory(), Told::new());
    let (tap, world) = stand_in();
    let mut device = Net::on_taps(MAC, 1400, vec![tap], Vec::new()).unwrap();
    let mut space = [0xff; 14];
    device.read_configuration(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x78, 5, 0, 0]);
    assert_eq!(device.queues(), [256, 256]);

    let (receive, transmit) = (Ring::new(&mem, 0), Ring::new(&mem, TRANSMIT));
    receive.offer(0, &[(BUFFERS, 2048, WRITE)]);
    let (activation, kicks) = told.activation(&mem, MERGE, &[(0, receive.queue()), (1, transmit.queue())]);
    device.activate(activation).unwrap();
    rustix::io::write(&world, &packet(100)).unwrap();
    told.eventually("used 0");
    transmit.offer(0, &[(BUFFERS, 112, 0)]);
    kicks[1].write(1).unwrap();
    told.eventually("used 1");
    let mut out = [0; 200];
    assert_eq!(rustix::io::read(&world, &mut out).unwrap(), 112);
    assert_eq!(
        device.counters(),
        [("received", 1), ("received-bytes", 100), ("sent", 1), ("sent-bytes", 100), ("dropped", 0)]
    );

    drop(world);
    told.eventually("configuration changed");
    device.read_configuration(6, &mut space[..2]);
    assert_eq!(space[..2], [0, 0]);
    let states = device.stop();
    assert_eq!(positions(&states), [(0, 1), (1, 1)]);
}

#[test]
fn device_that_cannot_be_is_refused_with_its_reason() {
    let taps = |count: usize| (0..count).map(|_| stand_in().0).collect::<Vec<_>>();
    let refused = |mac, mtu| Net::on_taps(mac, mtu, taps(1), Vec::new()).err().unwrap();
    assert!(matches!(refused([1, 0, 0, 0, 0, 1], 1500), NetError::Mac(_)));
    assert!(matches!(refused([0; 6], 1500), NetError::Mac(_)));
    assert!(matches!(refused(MAC, 67), NetError::Mtu(67)));
    let config = |queues: Vec<OwnedFd>, vhost| NetConfig { mac: MAC, mtu: 1500, queues, vhost };
    assert!(matches!(Net::new(config(vec![], vec![])), Err(NetError::Pairs(0))));
    let (one, mut other) = UnixStream::pair().unwrap();
    other.write_all(b"x").unwrap();
    let no_tap = Net::new(config(vec![one.into()], vec![])).err().unwrap();
    assert!(matches!(no_tap, NetError::Tap(TapError::NoTap(_))));
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let uneven = Net::new(config(vec![null()], vec![null(), null()])).err().unwrap();
    assert!(matches!(uneven, NetError::Vhost { queues: 1, vhost: 2 }));
    let no_vhost = Net::on_taps(MAC, 1500, taps(1), vec![null()]).err().unwrap();
    assert!(matches!(no_vhost, NetError::Kernel(KernelError::NoVhost(_))));
}

//! Guests that break the rules.

use proptest::prelude::*;

use super::super::driver::WRITE;
use super::*;
use crate::virtio::buffers::ChainError;

#[test]
fn packet_of_an_unknown_stream_is_reset_and_a_reset_is_not() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    for op in [Op::Response, Op::Shutdown, Op::ReadWrite, Op::CreditUpdate, Op::CreditRequest] {
        f.send(f.packet(op, 1, 2), &[]);
        f.received_one(Op::Reset);
    }
    f.send(f.packet(Op::Reset, 1, 2), &[]);
    assert!(f.received().is_empty());
}

#[test]
fn packets_with_foreign_addresses_or_types_do_not_reach_a_stream() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let server = f.dial(5000, 1028);
    let good = f.packet(Op::ReadWrite, 5000, 1028);
    for bad in [Header { src_cid: 4, ..good }, Header { dst_cid: 5, ..good }, Header { kind: 2, ..good }] {
        f.send(bad, b"x");
        let (reset, _) = f.received_one(Op::Reset);
        assert_eq!((reset.src_cid, reset.dst_cid, reset.kind), (bad.dst_cid, bad.src_cid, bad.kind));
    }
    f.send(good, b"y");
    f.run();
    assert_eq!(read(&server), b"y");
}

#[test]
fn protocol_violations_reset_their_stream_only() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (bystander, other) = f.open(1024);
    for op in [Op::Request as u16, Op::Response as u16, 0, 99] {
        let (victim, port) = f.open(1024);
        f.send(Header { op, ..f.packet(Op::ReadWrite, 1024, port) }, &[]);
        f.received_one(Op::Reset);
        assert!(has_ended(&victim), "{op}");
    }
    f.send(f.packet(Op::ReadWrite, 1024, other), b"fine");
    f.run();
    assert_eq!(read(&bystander), b"fine");
}

#[test]
fn length_beyond_the_chain_or_the_limit_resets_the_stream() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    for len in [5, 65_537, u32::MAX] {
        let (client, port) = f.open(1024);
        f.driver.send_raw(Header { len, ..f.packet(Op::ReadWrite, 1024, port) }, b"four");
        f.received_one(Op::Reset);
        assert!(has_ended(&client), "{len}");
    }
}

#[test]
fn header_and_payload_may_be_cut_anywhere() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let server = f.dial(5000, 1028);
    let header = Header { len: 6, ..f.packet(Op::ReadWrite, 5000, 1028) };
    let mut bytes = header.to_bytes().to_vec();
    bytes.extend_from_slice(b"abcdef");
    for cut in 1..bytes.len() {
        vm_memory::Bytes::write_slice(&mem, &bytes, GuestAddress(0x1_f000)).unwrap();
        let rest = u32::try_from(bytes.len() - cut).unwrap();
        let cut = u32::try_from(cut).unwrap();
        f.driver.send_chain(&[(0x1_f000, cut, 0), (0x1_f000 + u64::from(cut), rest, 0)]);
        f.run();
        assert_eq!(read(&server), b"abcdef", "cut at {cut}");
    }
}

#[test]
fn chains_without_a_packet_fault_the_transmit_queue() {
    let mem = memory();
    for chain in [
        vec![(0x1_0000, 43, 0)],
        vec![(0x1_0000, 44, WRITE)],
        vec![(0x1_0000, 44, 0), (0x2_0000, 1, WRITE)],
        vec![(u64::MAX - 8, 44, 0)],
        vec![(MEMORY as u64 - 4, 44, 0)],
        vec![(0x1_0000, 0, 0)],
    ] {
        let mut f = Fixture::new(&mem);
        f.driver.send_chain(&chain);
        assert!(matches!(f.try_run(), Err(QueueFault::Chain(_))), "{chain:?}");
    }
}

#[test]
fn receive_buffer_without_room_for_data_faults_the_queue() {
    let mem = memory();
    let mut f = Fixture::without_buffers(&mem);
    let _client = f.client(1024);
    let [receive, _] = f.driver.rings();
    let descriptor = virtio_queue::desc::split::Descriptor::new(0x1_0000, 44, WRITE, 0);
    receive.desc_table().store(0, descriptor.into()).unwrap();
    receive.avail().idx().store(1);
    assert!(matches!(f.try_run(), Err(QueueFault::Chain(ChainError::TooShort(44)))));
}

#[test]
fn available_index_beyond_the_queue_faults_it() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    f.driver.rings()[1].avail().idx().store(17);
    assert!(matches!(f.try_run(), Err(QueueFault::Ring(_))));
}

#[test]
fn chain_that_loops_is_finite() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    f.driver.send_chain(&[(0x1_0000, 44, 0)]);
    let descriptor = virtio_queue::desc::split::Descriptor::new(0x1_0000, 44, 1, 0);
    f.driver.rings()[1].desc_table().store(0, descriptor.into()).unwrap();
    // The header is some reset or other; what counts is the end.
    let _ = f.try_run();
}

fn header() -> impl Strategy<Value = Header> {
    // Mostly plausible, so that streams come into being and get further.
    let port = prop_oneof![Just(1024u32), Just(1 << 30), Just((1 << 30) + 1), any::<u32>()];
    let cid = prop_oneof![9 => Just(()), 1 => any::<u64>().prop_map(|_| ())];
    (
        (
            prop_oneof![9 => Just(GUEST), 1 => any::<u64>()],
            prop_oneof![9 => Just(HOST_CID), 1 => any::<u64>()],
        ),
        (port.clone(), port),
        (0u32..100, 0u16..3, 0u16..9, 0u32..5),
        (any::<u32>(), any::<u32>(), cid),
    )
        .prop_map(
            |((src_cid, dst_cid), (src_port, dst_port), (len, kind, op, flags), (buf_alloc, fwd_cnt, ()))| {
                Header { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt }
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_packets_leave_the_device_working(packets in proptest::collection::vec((header(), 0usize..100), 1..60)) {
        let mem = memory();
        let mut f = Fixture::new(&mem);
        let _clients = [f.client(1024), f.client(1024)];
        for (header, room) in packets {
            f.driver.send_raw(header, &vec![0; room]);
            f.run();
            f.driver.received();
        }
        let (_client, _port) = f.open_among_others();
    }

    #[test]
    fn any_descriptors_end_in_service_or_a_fault(
        descriptors in proptest::collection::vec((any::<u64>(), any::<u32>(), 0u16..8, 0u16..20), 1..40),
        near in any::<bool>(),
    ) {
        let mem = memory();
        let mut f = Fixture::new(&mem);
        let _client = f.client(1024);
        for (i, (at, len, flags, next)) in descriptors.into_iter().enumerate() {
            let (at, len) = if near { (at % 0x20_1000, len % 0x2_0000) } else { (at, len) };
            let descriptor = virtio_queue::desc::split::Descriptor::new(at, len, flags, next);
            let ring = f.driver.rings()[i % 2];
            ring.desc_table().store(u16::try_from(i / 2).unwrap() % 16, descriptor.into()).unwrap();
            let index = ring.avail().idx().load();
            ring.avail().idx().store(index.wrapping_add(1));
            if f.try_run().is_err() {
                break;
            }
        }
    }

    #[test]
    fn headers_survive_their_wire_form(header in header()) {
        prop_assert_eq!(Header::from_bytes(&header.to_bytes()), header);
    }
}

impl Fixture<'_> {
    /// Opens a stream while the guest may get packets of others.
    fn open_among_others(&mut self) -> (std::os::unix::net::UnixStream, u32) {
        let client = self.client(77);
        let packets = self.received();
        let (request, _) = packets.iter().find(|p| p.0.op == Op::Request as u16).expect("a request");
        assert_eq!(request.dst_port, 77);
        self.send(self.packet(Op::Response, 77, request.src_port), &[]);
        self.run();
        assert!(read(&client).starts_with(b"OK "));
        (client, request.src_port)
    }
}

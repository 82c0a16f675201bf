//! Life and death of streams.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::super::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use super::*;

#[test]
fn client_reaches_a_guest_port_and_learns_its_own() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (mut client, port) = f.open(1024);
    client.write_all(b"ping").unwrap();
    let (header, payload) = f.received_one(Op::ReadWrite);
    assert_eq!((header.src_port, header.dst_port, payload.as_slice()), (port, 1024, b"ping".as_slice()));
    f.send(f.packet(Op::ReadWrite, 1024, port), b"pong");
    f.run();
    assert_eq!(read(&client), b"pong");
}

#[test]
fn clients_of_one_guest_port_have_different_host_ports() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (first, second) = (f.open(1027), f.open(1027));
    assert_ne!(first.1, second.1);
}

#[test]
fn refusal_by_the_guest_closes_the_client_without_an_answer() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut client = f.client(4242);
    client.write_all(b"sent ahead of the answer").unwrap();
    let (request, _) = f.received_one(Op::Request);
    f.send(f.packet(Op::Reset, 4242, request.src_port), &[]);
    assert!(f.received().is_empty());
    assert!(has_ended(&client));
}

#[test]
fn connect_before_the_driver_is_up_waits_for_it_without_work() {
    let mem = memory();
    let mut f = Fixture::without_buffers(&mem);
    let client = f.client(1024);
    f.run();
    f.device.handle_host();
    let idle = f.device.fill(f.mem, &mut f.receive).unwrap();
    assert!(!idle.more && !idle.interrupt);
    assert!(read(&client).is_empty());
    f.driver.offer_all();
    let (request, _) = f.received_one(Op::Request);
    f.send(f.packet(Op::Response, 1024, request.src_port), &[]);
    f.run();
    assert!(read(&client).starts_with(b"OK "));
}

#[test]
fn client_that_gives_up_before_the_driver_is_up_leaves_nothing() {
    let mem = memory();
    let mut f = Fixture::without_buffers(&mem);
    drop(f.client(1024));
    f.run();
    f.driver.offer_all();
    assert!(f.received().is_empty());
}

#[test]
fn client_that_gives_up_after_its_request_resets_the_guest() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let client = f.client(1024);
    let (request, _) = f.received_one(Op::Request);
    drop(client);
    let (reset, _) = f.received_one(Op::Reset);
    assert_eq!(reset.src_port, request.src_port);
}

#[test]
fn client_that_says_something_else_is_closed() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    for line in ["GET / HTTP/1.0\n", "CONNECT x\n", "CONNECT 4294967296\n", "CONNECT -1\n", &"x".repeat(100)]
    {
        let mut client = UnixStream::connect(f.path(None)).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        assert!(f.received().is_empty(), "{line}");
        assert!(has_ended(&client), "{line}");
    }
}

#[test]
fn request_line_may_come_in_pieces_and_with_data_behind_it() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut client = UnixStream::connect(f.path(None)).unwrap();
    for piece in ["CONN", "ECT 10", "24\nahead"] {
        assert!(f.received().is_empty());
        client.write_all(piece.as_bytes()).unwrap();
    }
    let (request, _) = f.received_one(Op::Request);
    f.send(f.packet(Op::Response, 1024, request.src_port), &[]);
    assert_eq!(f.received_one(Op::ReadWrite).1, b"ahead");
}

#[test]
fn client_may_half_close_together_with_its_request() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let client = f.client(1024);
    client.shutdown(Shutdown::Write).unwrap();
    let (request, _) = f.received_one(Op::Request);
    f.send(f.packet(Op::Response, 1024, request.src_port), &[]);
    assert_eq!(f.received_one(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    f.send(f.packet(Op::ReadWrite, 1024, request.src_port), b"output");
    f.run();
    assert!(read(&client).ends_with(b"\noutput"));
}

#[test]
fn guest_reaches_the_socket_beside_the_path() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut server = f.dial(5000, 1028);
    f.send(f.packet(Op::ReadWrite, 5000, 1028), b"{}");
    f.run();
    assert_eq!(read(&server), b"{}");
    server.write_all(b"ok").unwrap();
    assert_eq!(f.received_one(Op::ReadWrite).1, b"ok");
}

#[test]
fn guest_is_refused_where_nobody_listens() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    f.send(f.packet(Op::Request, 5000, 1028), &[]);
    let (reset, _) = f.received_one(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port, reset.dst_cid), (1028, 5000, GUEST));
}

#[test]
fn half_close_by_the_guest_ends_what_the_host_reads_and_nothing_else() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut server = f.dial(5000, 1028);
    f.send(f.packet(Op::ReadWrite, 5000, 1028), b"last");
    f.send(Header { flags: SHUTDOWN_SEND, ..f.packet(Op::Shutdown, 5000, 1028) }, &[]);
    f.run();
    assert_eq!(read(&server), b"last");
    assert!(has_ended(&server));
    server.write_all(b"answer").unwrap();
    assert_eq!(f.received_one(Op::ReadWrite).1, b"answer");
    drop(server);
    assert_eq!(f.received().last().unwrap().0.op, Op::Reset as u16);
}

#[test]
fn half_close_by_the_host_ends_what_the_guest_reads_and_nothing_else() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (mut client, port) = f.open(1024);
    client.write_all(b"last").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let packets = f.received();
    assert_eq!(
        packets.iter().map(|p| p.0.op).collect::<Vec<_>>(),
        [Op::ReadWrite as u16, Op::Shutdown as u16]
    );
    assert_eq!(packets[1].0.flags, SHUTDOWN_SEND);
    f.send(f.packet(Op::ReadWrite, 1024, port), b"answer");
    f.run();
    assert_eq!(read(&client), b"answer");
}

#[test]
fn close_by_the_guest_is_answered_by_a_reset_and_ends_the_client() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (mut client, port) = f.open(1024);
    client.write_all(b"never read by the guest").unwrap();
    f.send(f.packet(Op::ReadWrite, 1024, port), b"bye");
    f.send(Header { flags: SHUTDOWN_BOTH, ..f.packet(Op::Shutdown, 1024, port) }, &[]);
    let packets = f.received();
    assert_eq!(packets.last().unwrap().0.op, Op::Reset as u16);
    assert_eq!(read(&client), b"bye");
    assert!(has_ended(&client));
}

#[test]
fn close_by_the_host_tells_the_guest_both_directions() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (mut client, port) = f.open(1024);
    client.write_all(b"bye").unwrap();
    drop(client);
    let packets = f.received();
    assert_eq!(packets[0].1, b"bye");
    let said = packets.iter().skip(1).map(|p| p.0.flags).fold(0, |all, flags| all | flags);
    assert_eq!(said, SHUTDOWN_BOTH);
    // Data that the guest sent meanwhile is dropped, not answered.
    f.send(f.packet(Op::ReadWrite, 1024, port), b"late");
    f.send(f.packet(Op::Reset, 1024, port), &[]);
    assert!(f.received().is_empty());
    // Now the stream is gone.
    f.send(f.packet(Op::ReadWrite, 1024, port), b"later");
    f.received_one(Op::Reset);
}

#[test]
fn guest_that_stops_reading_ends_what_the_host_writes() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (mut client, port) = f.open(1024);
    f.send(Header { flags: SHUTDOWN_RECEIVE, ..f.packet(Op::Shutdown, 1024, port) }, &[]);
    f.run();
    assert_eq!(client.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    f.send(f.packet(Op::ReadWrite, 1024, port), b"still");
    f.run();
    assert_eq!(read(&client), b"still");
}

#[test]
fn restarted_driver_finds_no_streams_but_waiting_clients() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (client, port) = f.open(1024);
    f.device.forget_guest();
    assert!(has_ended(&client));
    f.send(f.packet(Op::ReadWrite, 1024, port), b"old");
    f.received_one(Op::Reset);
    f.open(1024);
}

#[test]
fn fifty_streams_are_served_in_turn() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut clients: Vec<_> = (0..50).map(|_| f.open(1024)).collect();
    for (client, port) in &mut clients {
        client.write_all(&vec![u8::try_from(*port & 0xff).unwrap(); 64 * 1024]).unwrap();
    }
    f.device.handle_host();
    f.device.fill(f.mem, &mut f.receive).unwrap();
    let first: std::collections::HashSet<u32> = f.driver.received().iter().map(|p| p.0.src_port).collect();
    assert_eq!(first.len(), usize::from(super::super::driver::SIZE), "one packet each");
    let mut bytes = std::collections::HashMap::<u32, usize>::new();
    for port in first {
        bytes.insert(port, 4096);
    }
    loop {
        let packets = f.received();
        if packets.is_empty() {
            break;
        }
        for (header, payload) in packets {
            assert!(payload.iter().all(|b| u32::from(*b) == header.src_port & 0xff));
            *bytes.entry(header.src_port).or_default() += payload.len();
        }
    }
    assert_eq!(bytes.len(), 50);
    assert!(bytes.values().all(|n| *n == 64 * 1024), "{bytes:?}");
}

#[test]
fn driver_is_interrupted_once_per_batch() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (mut client, _) = f.open(1024);
    client.write_all(&[0; 32 * 1024]).unwrap();
    f.interrupts = 0;
    assert_eq!(f.received().len(), 8);
    assert_eq!(f.interrupts, 1);
}

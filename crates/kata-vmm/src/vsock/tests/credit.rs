//! Flow control, and bounds of what the device holds.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::super::packet::{SHUTDOWN_BOTH, SHUTDOWN_SEND};
use super::*;

/// Sends `total` bytes to the host in packets of 64 KiB, as far as `credit` allows, and returns how many went.
fn send_within_credit(f: &mut Fixture<'_>, guest: u32, host: u32, total: usize) -> usize {
    let mut sent = 0;
    while sent < total {
        let len = (total - sent).min(64 * 1024);
        f.send(f.packet(Op::ReadWrite, guest, host), &vec![7; len]);
        sent += len;
        f.run();
    }
    sent
}

#[test]
fn guest_never_gets_more_than_its_credit() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut client = f.client(1024);
    let (request, _) = f.received_one(Op::Request);
    f.send(Header { buf_alloc: 5000, ..f.packet(Op::Response, 1024, request.src_port) }, &[]);
    f.run();
    client.write_all(&[1; 20_000]).unwrap();
    let packets = f.received();
    let bytes: usize = packets.iter().map(|p| p.1.len()).sum();
    assert_eq!(bytes, 5000);
    // Out of credit, the device asks for more, once.
    assert_eq!(packets.iter().filter(|p| p.0.op == Op::CreditRequest as u16).count(), 1);
    assert!(f.received().is_empty());
    let update =
        Header { buf_alloc: 5000, fwd_cnt: 4000, ..f.packet(Op::CreditUpdate, 1024, request.src_port) };
    f.send(update, &[]);
    let bytes: usize = f.received().iter().map(|p| p.1.len()).sum();
    assert_eq!(bytes, 4000);
}

#[test]
fn credit_that_makes_no_sense_stalls_the_stream_only() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (mut stalled, port) = f.open(1024);
    let (mut other, _) = f.open(1024);
    f.send(Header { fwd_cnt: 1 << 30, ..f.packet(Op::CreditUpdate, 1024, port) }, &[]);
    f.run();
    stalled.write_all(b"x").unwrap();
    f.received_one(Op::CreditRequest);
    other.write_all(b"y").unwrap();
    assert_eq!(f.received_one(Op::ReadWrite).1, b"y");
}

#[test]
fn credit_request_is_answered() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let (client, port) = f.open(1024);
    f.send(f.packet(Op::ReadWrite, 1024, port), b"12345");
    f.send(f.packet(Op::CreditRequest, 1024, port), &[]);
    let (update, _) = f.received_one(Op::CreditUpdate);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (WINDOW, 5));
    assert_eq!(read(&client), b"12345");
}

#[test]
fn guest_hears_of_credit_before_it_runs_out() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut server = f.dial(5000, 1028);
    server.set_nonblocking(true).unwrap();
    let mut forwarded = 0;
    for _ in 0..16 {
        send_within_credit(&mut f, 5000, 1028, 64 * 1024);
        let mut seen = 0;
        while seen < 64 * 1024 {
            f.run();
            seen += read(&server).len();
        }
        forwarded = f.driver.received().last().map_or(forwarded, |p| p.0.fwd_cnt);
    }
    let sent = 16 * 64 * 1024;
    assert!(sent - forwarded <= WINDOW / 2, "{forwarded} of {sent}");
    assert!(server.write(b"").is_ok());
}

#[test]
fn slow_host_gets_every_byte_even_after_the_guest_has_closed() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut server = f.dial(5000, 1028);
    // More than a socket takes at once, so that the device must keep some.
    let total = send_within_credit(&mut f, 5000, 1028, 384 * 1024);
    f.send(Header { flags: SHUTDOWN_BOTH, ..f.packet(Op::Shutdown, 5000, 1028) }, &[]);
    assert_eq!(f.received().last().unwrap().0.op, Op::Reset as u16);
    // The guest may use the same port again while the rest is on its way.
    let second = f.dial(5000, 1028);
    let mut got = 0;
    let mut buffer = vec![0; 4096];
    loop {
        f.run();
        match server.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock),
        }
    }
    assert_eq!(got, total);
    assert!(!has_ended(&second));
}

#[test]
fn reset_after_an_orderly_end_loses_nothing() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut server = f.dial(5000, 1028);
    let total = send_within_credit(&mut f, 5000, 1028, 384 * 1024);
    f.send(Header { flags: SHUTDOWN_SEND, ..f.packet(Op::Shutdown, 5000, 1028) }, &[]);
    f.send(f.packet(Op::Reset, 5000, 1028), &[]);
    f.run();
    server.set_nonblocking(false).unwrap();
    let mut got = 0;
    while got < total {
        got += server.read(&mut vec![0; 65536]).unwrap();
        f.run();
    }
    assert_eq!(got, total);
    assert!(has_ended(&server));
}

#[test]
fn guest_that_ignores_its_credit_is_reset() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let _server = f.dial(5000, 1028);
    let mut packets = Vec::new();
    for _ in 0..32 {
        f.send(f.packet(Op::ReadWrite, 5000, 1028), &vec![7; 64 * 1024]);
        packets.extend(f.received());
    }
    assert!(packets.iter().any(|p| p.0.op == Op::Reset as u16));
}

#[test]
fn streams_and_handshakes_are_bounded() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    // Silent clients beyond the bound stay in the listen queue, and the first to leave lets one in.
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(f.path(None)).unwrap()).collect();
    f.run();
    assert_eq!(f.device.peers(), 64);
    drop(silent);
    f.run();
    assert_eq!(f.device.peers(), 0);
}

#[test]
fn resets_wait_for_buffers_without_piling_up() {
    let mem = memory();
    let mut f = Fixture::without_buffers(&mem);
    for port in 0..1000 {
        f.send(f.packet(Op::ReadWrite, port, 9), b"x");
        f.run();
        if f.driver.taken() != u16::try_from(port + 1).unwrap() {
            break;
        }
    }
    // The device stopped taking packets once it owed 256 resets; buffers let it go on.
    assert_eq!(f.driver.taken(), 256);
    f.driver.offer_all();
    f.run();
    assert!(f.driver.taken() > 256);
}

#[test]
fn windows_shrink_when_there_are_many_streams() {
    let mem = memory();
    let mut f = Fixture::new(&mem);
    let mut clients = Vec::new();
    let mut windows = Vec::new();
    for _ in 0..400 {
        clients.push(f.client(1024));
        windows.push(f.received_one(Op::Request).0.buf_alloc);
    }
    assert_eq!(windows[0], WINDOW);
    assert_eq!(windows[399], 4096);
    assert!(windows.iter().map(|w| u64::from(*w)).sum::<u64>() < 34 * 1024 * 1024);
    drop(clients);
    f.run();
    f.driver.received();
    f.client(1024);
}

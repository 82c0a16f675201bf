use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use rustix::pipe::{PipeFlags, pipe_with};

use super::*;

fn pipe() -> (OwnedFd, OwnedFd) {
    pipe_with(PipeFlags::CLOEXEC).unwrap()
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from(at * 31 % 251).unwrap()).collect()
}

fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> tokio::task::JoinHandle<T> {
    tokio::task::spawn_blocking(work)
}

#[tokio::test]
async fn output_is_exact_to_the_last_byte_and_ends_with_a_half_close() {
    let (read_end, write_end) = pipe();
    let (near, mut far) = UnixStream::pair().unwrap();
    let sent = pattern(3_000_001);
    let expected = sent.clone();
    let writer = std::thread::spawn(move || std::fs::File::from(write_end).write_all(&sent).unwrap());
    let reader = off_thread(move || {
        let mut got = Vec::new();
        far.read_to_end(&mut got).unwrap();
        far.write_all(b"still open this way").unwrap();
        got
    });
    let from = watch(read_end, Interest::READABLE).unwrap();
    // The peer's other direction stays open: only writing is shut down.
    let keep = near.try_clone().unwrap();
    output(from, near.into()).await.unwrap();
    assert!(reader.await.unwrap() == expected, "the bytes differ");
    writer.join().unwrap();
    drop(keep);
}

#[tokio::test]
async fn a_lost_reader_does_not_block_the_writer() {
    let (read_end, write_end) = pipe();
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let writer = off_thread(move || std::fs::File::from(write_end).write_all(&pattern(2_000_000)));
    let copying = tokio::spawn(output(watch(read_end, Interest::READABLE).unwrap(), near.into()));
    writer.await.unwrap().unwrap();
    copying.await.unwrap().unwrap();
}

#[tokio::test]
async fn output_goes_on_after_the_process_until_the_last_writer_is_gone() {
    let (read_end, write_end) = pipe();
    let second = write_end.try_clone().unwrap();
    let (near, mut far) = UnixStream::pair().unwrap();
    let copying = tokio::spawn(output(watch(read_end, Interest::READABLE).unwrap(), near.into()));
    rustix::io::write(&write_end, b"first ").unwrap();
    drop(write_end);
    rustix::io::write(&second, b"second").unwrap();
    drop(second);
    copying.await.unwrap().unwrap();
    let mut got = String::new();
    far.read_to_string(&mut got).unwrap();
    assert_eq!(got, "first second");
}

#[tokio::test]
async fn input_is_exact_and_ends_with_the_hosts_half_close() {
    let (read_end, write_end) = pipe();
    let (near, mut far) = UnixStream::pair().unwrap();
    let sent = pattern(1_500_007);
    let expected = sent.clone();
    let sender = std::thread::spawn(move || {
        far.write_all(&sent).unwrap();
        far.shutdown(std::net::Shutdown::Write).unwrap();
        far
    });
    let reader = off_thread(move || {
        let mut got = Vec::new();
        std::fs::File::from(read_end).read_to_end(&mut got).unwrap();
        got
    });
    let peer = watch(near.into(), Interest::READABLE).unwrap();
    let sink = watch(write_end, Interest::WRITABLE).unwrap();
    assert!(input(&peer, &sink).await.unwrap());
    drop(sink);
    assert!(reader.await.unwrap() == expected, "the bytes differ");
    sender.join().unwrap();
}

#[tokio::test]
async fn input_stops_when_the_process_reads_no_more() {
    let (read_end, write_end) = pipe();
    let (near, mut far) = UnixStream::pair().unwrap();
    drop(read_end);
    far.write_all(b"to nobody").unwrap();
    let peer = watch(near.into(), Interest::READABLE).unwrap();
    let sink = watch(write_end, Interest::WRITABLE).unwrap();
    assert!(!input(&peer, &sink).await.unwrap());
}

#[tokio::test]
async fn a_slow_reader_slows_the_copy_and_loses_nothing() {
    let (read_end, write_end) = pipe();
    let (near, mut far) = UnixStream::pair().unwrap();
    let sent = pattern(400_000);
    let expected = sent.clone();
    let writer = std::thread::spawn(move || std::fs::File::from(write_end).write_all(&sent).unwrap());
    let reader = off_thread(move || {
        let (mut got, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            let count = far.read(&mut buffer).unwrap();
            if count == 0 {
                return got;
            }
            got.extend_from_slice(&buffer[..count]);
            std::thread::yield_now();
        }
    });
    output(watch(read_end, Interest::READABLE).unwrap(), near.into()).await.unwrap();
    assert!(reader.await.unwrap() == expected, "the bytes differ");
    writer.join().unwrap();
}

#[tokio::test]
async fn a_connection_that_came_first_is_claimed_by_its_port() {
    let streams = Streams::default();
    let (near, mut far) = UnixStream::pair().unwrap();
    streams.offer(7, near.into());
    let mut claimed = UnixStream::from(streams.claim(7).await.unwrap());
    claimed.write_all(b"x").unwrap();
    let mut byte = [0];
    far.read_exact(&mut byte).unwrap();
}

#[tokio::test]
async fn a_request_that_came_first_gets_the_connection() {
    let streams = Streams::default();
    let (near, _far) = UnixStream::pair().unwrap();
    let (claimed, ()) = tokio::join!(streams.claim(9), async {
        tokio::task::yield_now().await;
        assert!(matches!(streams.claim(9).await, Err(StreamError::Claimed { port: 9 })));
        streams.offer(9, near.into());
    });
    claimed.unwrap();
}

#[tokio::test(start_paused = true)]
async fn waiting_is_bounded_on_both_sides() {
    let streams = Streams::default();
    assert!(matches!(streams.claim(1).await, Err(StreamError::NotConnected { port: 1 })));
    let (near, mut far) = UnixStream::pair().unwrap();
    streams.offer(2, near.into());
    tokio::task::yield_now().await;
    tokio::time::sleep(UNCLAIMED_FOR + Duration::from_secs(1)).await;
    assert_eq!(far.read(&mut [0]).unwrap(), 0, "the unclaimed connection is closed");
    assert!(streams.slots().by_port.is_empty());
}

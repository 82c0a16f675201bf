use std::io::{Read, Write};
use std::os::unix::fs::FileTypeExt;

use super::*;

fn streams(wanted: Wanted) -> (tempfile::TempDir, Streams) {
    let dir = tempfile::tempdir().unwrap();
    let streams = Streams::make(&dir.path().join("io"), "x-", wanted).unwrap();
    (dir, streams)
}

/// Every byte value, more than a pipe holds.
fn noise() -> Vec<u8> {
    (0..300_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[2]).collect()
}

#[test]
fn fifos_are_made_as_wanted_and_go_with_the_value() {
    let (dir, streams) = streams(Wanted { stdin: true, stderr: false });
    assert!(fs::metadata(streams.stdin().unwrap()).unwrap().file_type().is_fifo());
    assert!(fs::metadata(streams.stdout().unwrap()).unwrap().file_type().is_fifo());
    assert_eq!(streams.stderr(), None);
    drop(streams);
    assert_eq!(fs::read_dir(dir.path().join("io")).unwrap().count(), 0);
}

#[test]
fn output_is_copied_byte_for_byte_from_a_writer_that_comes_late() {
    let (_dir, mut streams) = streams(Wanted { stdin: false, stderr: false });
    let path = streams.stdout().unwrap().to_owned();
    let fifo = streams.stdout.end.take().unwrap();
    let mut result = tempfile::tempfile().unwrap();
    let to = result.try_clone().unwrap();
    let copying = thread::spawn(move || copy(fifo, to));
    thread::sleep(std::time::Duration::from_millis(50));
    assert!(!copying.is_finished(), "a FIFO without writers has not ended");
    File::options().write(true).open(path).unwrap().write_all(&noise()).unwrap();
    copying.join().unwrap();
    let mut read = Vec::new();
    std::io::Seek::rewind(&mut result).unwrap();
    result.read_to_end(&mut read).unwrap();
    assert!(read == noise());
}

#[test]
fn output_that_nobody_ever_opened_ends_when_told() {
    let (_dir, mut streams) = streams(Wanted { stdin: false, stderr: true });
    let (out, err) =
        (streams.stdout.end.take().unwrap(), streams.stderr.as_mut().unwrap().end.take().unwrap());
    let null = || File::options().write(true).open("/dev/null").unwrap();
    let copies = [thread::spawn(move || copy(out, null())), thread::spawn(move || copy(err, null()))];
    streams.end_unopened();
    for copy in copies {
        copy.join().unwrap();
    }
}

#[test]
fn input_is_kept_for_a_reader_that_comes_late() {
    let (_dir, mut streams) = streams(Wanted { stdin: true, stderr: false });
    let path = streams.stdin().unwrap().to_owned();
    let fifo = streams.stdin.as_mut().unwrap().end.take().unwrap();
    let mut source = tempfile::tempfile().unwrap();
    source.write_all(&noise()).unwrap();
    std::io::Seek::rewind(&mut source).unwrap();
    let copying = thread::spawn(move || copy(source, fifo));
    thread::sleep(std::time::Duration::from_millis(50));
    let mut read = Vec::new();
    File::open(path).unwrap().read_to_end(&mut read).unwrap();
    copying.join().unwrap();
    assert!(read == noise());
}

#[test]
fn a_reader_that_is_gone_ends_the_copy() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    assert_eq!(copy(File::open("/dev/zero").unwrap(), writer), End::Unread);
}

use std::os::unix::fs::{FileExt, MetadataExt};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use super::memory::check;
use super::*;
use crate::memory::{Backing, HIGH_BEGIN, LOW_END, allocate};
use crate::virtio::Memory;

fn refusal(bytes: &[u8]) -> SnapshotError {
    open(bytes).map(<[u8]>::to_vec).unwrap_err()
}

#[test]
fn state_is_read_as_it_was_written() {
    let sealed = seal(&"anything").unwrap();
    assert_eq!(open(&sealed).unwrap(), b"\"anything\"");
}

#[test]
fn state_that_lost_a_byte_or_changed_a_bit_is_damaged() {
    let sealed = seal(&"anything").unwrap();
    let body = sealed.iter().position(|byte| *byte == b'\n').unwrap() + 1;
    let changed = |at: usize, bit: u32| {
        let mut bytes = sealed.clone();
        bytes[at] ^= 1 << bit;
        bytes
    };
    let shorter = &sealed[..sealed.len() - 1];
    let longer = [&sealed[..], b" "].concat();
    for bytes in [&b""[..], b"\n", b"{}\n", b"7\n", &[b'x'; 9000], shorter, &longer, &changed(body + 3, 0)] {
        let refused = refusal(bytes);
        assert!(matches!(refused, SnapshotError::Damaged { file: "state", .. }), "{refused}");
        assert!(refused.is_stale());
    }
    assert!((0..sealed.len()).all(|at| (0..8).all(|bit| open(&changed(at, bit)).is_err())));
}

#[test]
fn state_of_another_build_or_format_is_told_before_anything_of_it_is_looked_at() {
    let sealed = String::from_utf8(seal(&"anything").unwrap()).unwrap();
    let other = sealed.replace(BUILD, "0.0.1-0123456789abcdef").replace("anything", "else");
    let refused = refusal(other.as_bytes()).to_string();
    assert!(refused.contains("0.0.1-0123456789abcdef") && refused.contains(BUILD), "{refused}");
    let refused = refusal(b"{\"format\":2,\"magic\":true}\n").to_string();
    assert!(refused.contains("format 2"), "{refused}");
}

#[test]
fn other_machine_is_told_apart_by_each_of_its_sizes() {
    let shape = Shape { cpus: 1, max_cpus: 2, size_mib: 64, max_mib: 128, console: false };
    shape.compare(&shape).unwrap();
    for (other, what) in [
        (Shape { cpus: 2, ..shape.clone() }, "virtual CPUs"),
        (Shape { max_cpus: 3, ..shape.clone() }, "most virtual CPUs"),
        (Shape { size_mib: 65, ..shape.clone() }, "memory"),
        (Shape { max_mib: 129, ..shape.clone() }, "most memory"),
        (Shape { console: true, ..shape.clone() }, "serial ports"),
    ] {
        let refused = shape.compare(&other).unwrap_err();
        assert!(refused.to_string().contains(what) && refused.is_stale(), "{refused}");
    }
}

#[test]
fn file_that_is_not_empty_is_not_written_to() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1).unwrap();
    assert!(matches!(is_empty("state", &file), Err(SnapshotError::NotEmpty { file: "state" })));
    let device = File::open("/dev/null").unwrap();
    assert!(matches!(is_empty("memory", &device), Err(SnapshotError::NotEmpty { .. })));
}

/// Memory above and below the hole, of which a few pages were touched.
fn touched() -> (u64, Memory) {
    let size = LOW_END + (64 << 20);
    let memory = allocate(size, 4 << 20, Backing::default()).unwrap();
    let guest = memory.memory();
    for (at, byte) in [(0x1000, 1u8), (LOW_END - 1, 2), (HIGH_BEGIN, 3), (HIGH_BEGIN + (64 << 20) - 1, 4)] {
        guest.write_obj(byte, GuestAddress(at)).unwrap();
    }
    // Touched, and zero.
    guest.write_obj(0u64, GuestAddress(0x20_0000)).unwrap();
    (size, memory)
}

fn looks_the_same(memory: &Memory) {
    let guest = memory.memory();
    for (at, byte) in [(0x1000, 1u8), (LOW_END - 1, 2), (HIGH_BEGIN, 3), (HIGH_BEGIN + (64 << 20) - 1, 4)] {
        assert_eq!(guest.read_obj::<u8>(GuestAddress(at)).unwrap(), byte, "{at:#x}");
    }
    assert_eq!(guest.read_obj::<u64>(GuestAddress(0x20_0000)).unwrap(), 0);
}

#[test]
fn memory_takes_as_much_room_as_the_guest_touched_and_comes_back() {
    let (size, memory) = touched();
    let file = tempfile::tempfile().unwrap();
    let content = write_memory(&memory.memory(), &file).unwrap();
    assert_eq!((content.size, content.bytes), (size, 4 * 4096));
    let known = file.metadata().unwrap();
    assert_eq!(known.len(), size);
    assert!(known.blocks() * 512 <= 64 * 4096, "{} blocks", known.blocks());
    check(&file, &content).unwrap();
    verify(&file, &content).unwrap();
    looks_the_same(&crate::memory::mapped(&file, size, 4 << 20).unwrap());
    let copied = allocate(size, 4 << 20, Backing::default()).unwrap();
    load(&file, &content, &copied).unwrap();
    looks_the_same(&copied);
    let guest = copied.memory();
    let file = guest.iter().next().unwrap().file_offset().unwrap().file();
    assert!(file.metadata().unwrap().blocks() * 512 <= 64 * 4096, "the copy has holes, too");
}

#[test]
fn copy_of_a_file_that_has_lost_its_holes_has_them_again() {
    let size = 64 << 20;
    let file = tempfile::tempfile().unwrap();
    let guest = allocate(size, 0, Backing::default()).unwrap();
    guest.memory().write_obj(7u8, GuestAddress(0x5000)).unwrap();
    let content = write_memory(&guest.memory(), &file).unwrap();
    let filled = tempfile::tempfile().unwrap();
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    filled.write_all_at(&bytes, 0).unwrap();
    verify(&filled, &content).unwrap();
    let copied = allocate(size, 0, Backing::default()).unwrap();
    load(&filled, &content, &copied).unwrap();
    assert_eq!(copied.memory().read_obj::<u8>(GuestAddress(0x5000)).unwrap(), 7);
    let guest = copied.memory();
    let own = guest.iter().next().unwrap().file_offset().unwrap().file();
    assert!(own.metadata().unwrap().blocks() * 512 <= 64 * 4096, "zeroes are memory");
}

#[test]
fn memory_of_a_private_mapping_is_written_with_what_the_guest_changed() {
    let (size, memory) = touched();
    let first = tempfile::tempfile().unwrap();
    let content = write_memory(&memory.memory(), &first).unwrap();
    // Small enough to be looked at as a whole.
    let small = tempfile::tempfile().unwrap();
    small.set_len(64 << 20).unwrap();
    small.write_all_at(&[9; 16], 0x3000).unwrap();
    let mapped = crate::memory::mapped(&small, 64 << 20, 0).unwrap();
    mapped.memory().write_obj(5u8, GuestAddress(0x9000)).unwrap();
    let second = tempfile::tempfile().unwrap();
    let changed = write_memory(&mapped.memory(), &second).unwrap();
    assert_eq!((changed.size, changed.bytes), (64 << 20, 2 * 4096));
    let mut byte = [0];
    second.read_exact_at(&mut byte, 0x9000).unwrap();
    assert_eq!(byte, [5]);
    assert_eq!(content.size, size);
}

#[test]
fn memory_that_was_cut_or_changed_is_damaged() {
    let (size, memory) = touched();
    let file = tempfile::tempfile().unwrap();
    let content = write_memory(&memory.memory(), &file).unwrap();
    let refused = |result: Result<(), SnapshotError>| {
        let refused = result.unwrap_err();
        assert!(matches!(refused, SnapshotError::Damaged { file: "memory", .. }), "{refused}");
    };
    file.set_len(size - 4096).unwrap();
    refused(check(&file, &content));
    file.set_len(size).unwrap();
    check(&file, &content).unwrap();
    refused(verify(&file, &content));
    file.write_all_at(&[4], LOW_END + (64 << 20) - 1).unwrap();
    verify(&file, &content).unwrap();
    // The same bytes elsewhere are other bytes.
    file.write_all_at(&[0; 2], 0x1000).unwrap();
    file.write_all_at(&[1], 0x2000).unwrap();
    refused(verify(&file, &content));
    refused(check(&File::open("/dev/null").unwrap(), &content));
}

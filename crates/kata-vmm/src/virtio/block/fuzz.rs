//! The fuzz target: bytes become what a guest does to a disk.

#![allow(clippy::expect_used, reason = "a fuzz target ends at the first surprise")]

use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::MemfdFlags;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BlockConfig, Server};
use crate::virtio::driver::{Ring, SIZE, WRITE, any_descriptor, scribble, take};

/// Bytes of the disk.
const DISK: u64 = 64 * 1024;
/// Bytes of the guest's memory.
const MEMORY: usize = 0x2_0000;

/// Plays `data` to a device. Each step is one byte that says what, and its arguments.
pub fn run(mut data: &[u8]) {
    let Some([readonly]) = take(&mut data) else { return };
    let readonly = readonly % 4 == 0;
    let (file, watched) = disk(readonly);
    let config = BlockConfig {
        id: "disk".to_owned(),
        file,
        readonly,
        bytes_per_second: None,
        requests_per_second: None,
    };
    let mut server = Server::new(config).expect("a disk");
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory for a guest");
    let ring = Ring::new(&mem, 0);
    let mut queue = ring.queue();
    while let Some([step]) = take(&mut data) {
        if step_once(step, &mut data, &mem, &ring).is_none() {
            break;
        }
        if server.serve(&mem, &mut queue, step % 2 == 0).is_err() {
            break;
        }
    }
    let metadata = watched.metadata().expect("the disk");
    assert_eq!(metadata.len(), DISK);
    if readonly {
        assert_eq!(std::os::unix::fs::MetadataExt::blocks(&metadata), 0, "something was written");
    }
}

/// A disk in memory, and another look at it.
fn disk(readonly: bool) -> (OwnedFd, File) {
    let file = File::from(rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file"));
    file.set_len(DISK).expect("its length");
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let again = std::fs::OpenOptions::new().read(true).write(!readonly).open(path).expect("the file again");
    (again.into(), file)
}

fn step_once(step: u8, data: &mut &[u8], mem: &GuestMemoryMmap, ring: &Ring<'_>) -> Option<()> {
    match step % 4 {
        // A plausible request.
        0 | 1 => {
            let [kind, sector, sectors, slot, flags] = take(data)?;
            let (header, buffer) = (0x1_0000 + u64::from(slot) * 32, 0x1_8000);
            mem.write_obj(u32::from(kind % 16), GuestAddress(header)).ok()?;
            mem.write_obj(u64::from(sector), GuestAddress(header + 8)).ok()?;
            let (len, write) = (u32::from(sectors) * 512, if kind % 2 == 0 { WRITE } else { 0 });
            let len = if kind % 16 > 8 { u32::from(sectors) * 8 } else { len };
            mem.write_obj(u64::from(flags), GuestAddress(buffer)).ok()?;
            mem.write_obj(u64::from(sectors), GuestAddress(buffer + 8)).ok()?;
            ring.offer(
                u16::from(slot) % (SIZE - 3),
                &[(header, 16, 0), (buffer, len, write), (header + 16, 1, WRITE)],
            );
        }
        // Any bytes anywhere in the rings.
        2 => {
            let [a, b, value] = take(data)?;
            scribble(mem, u16::from_le_bytes([a, b]) % 0x4000, value);
        }
        // Any descriptor, also one of a table of descriptors that are in the buffers.
        _ => {
            let [slot] = take(data)?;
            ring.offer(u16::from(slot) % SIZE, &[any_descriptor(data)?]);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_guest_ends_the_process(data in prop::collection::vec(any::<u8>(), 0..300)) {
            super::run(&data);
        }
    }

    /// Inputs that show what the target can do; the fuzzer starts from the same files.
    #[test]
    fn corpus_leaves_the_disk_alive() {
        crate::virtio::driver::corpus("block", super::run);
    }
}

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::driver::{INDIRECT, NEXT, Ring, WRITE};
use crate::virtio::told::Told;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// Guest memory: the ring at 0, headers and status at 0x8000, data from 0x1_0000 on.
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x8100;
const DATA: u64 = 0x1_0000;
const MEMORY: usize = 0x10_0000;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap()
}

struct Fixture<'m> {
    mem: &'m GuestMemoryMmap,
    ring: Ring<'m>,
    queue: Queue,
    server: Server,
    file: File,
    path: PathBuf,
    _directory: tempfile::TempDir,
}

fn config(file: File, readonly: bool) -> BlockConfig {
    BlockConfig {
        id: "disk-of-a-long-name-indeed".to_owned(),
        file: file.into(),
        readonly,
        bytes_per_second: None,
        requests_per_second: None,
    }
}

/// A file of `sectors`, each filled with its number.
fn numbered(directory: &tempfile::TempDir, sectors: u8) -> PathBuf {
    let path = directory.path().join("disk");
    let mut file = File::create(&path).unwrap();
    for sector in 0..sectors {
        file.write_all(&[sector; 512]).unwrap();
    }
    path
}

impl<'m> Fixture<'m> {
    fn new(mem: &'m GuestMemoryMmap, readonly: bool) -> Fixture<'m> {
        let directory = tempfile::tempdir().unwrap();
        let path = numbered(&directory, 64);
        let file = OpenOptions::new().read(true).write(!readonly).open(&path).unwrap();
        let ring = Ring::new(mem, 0);
        let queue = ring.queue();
        let server = Server::new(config(file, readonly)).unwrap();
        let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        Fixture { mem, ring, queue, server, file, path, _directory: directory }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.mem.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.mem.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.mem.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    }

    /// Status of one request with data in these (address, length), and how many bytes the device says it wrote.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32)], write: bool) -> (u8, u32) {
        self.header(kind, sector);
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend(data.iter().map(|(at, len)| (*at, *len, if write { WRITE } else { 0 })));
        chain.push((STATUS, 1, WRITE));
        self.ring.offer(0, &chain);
        self.serve().unwrap();
        let nth = self.ring.given_back().wrapping_sub(1);
        (self.mem.read_obj(GuestAddress(STATUS)).unwrap(), self.ring.back(nth).1)
    }

    fn serve(&mut self) -> Result<Served, QueueFault> {
        self.server.serve(self.mem, &mut self.queue, false)
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        for (at, (sector, sectors, flags)) in (DATA..).step_by(16).zip(ranges) {
            self.mem.write_obj(*sector, GuestAddress(at)).unwrap();
            self.mem.write_obj(*sectors, GuestAddress(at + 8)).unwrap();
            self.mem.write_obj(*flags, GuestAddress(at + 12)).unwrap();
        }
        self.request(kind, 0, &[(DATA, u32::try_from(ranges.len()).unwrap() * 16)], false).0
    }

    fn sector(&self, sector: u64) -> [u8; 512] {
        let mut bytes = [0; 512];
        self.file.read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }
}

#[test]
fn data_goes_both_ways_however_the_chain_is_cut() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    let pieces = [(DATA, 100), (DATA + 0x1000, 412), (DATA + 0x2000, 512)];
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 7, &pieces, true), (OK, 1025));
    let mut bytes = [0; 412];
    mem.read_slice(&mut bytes, GuestAddress(DATA + 0x1000)).unwrap();
    assert_eq!(bytes, [7; 412]);
    mem.read_slice(&mut bytes, GuestAddress(DATA + 0x2000)).unwrap();
    assert_eq!(bytes, [8; 412]);

    mem.write_slice(&[0xaa; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 63, &[(DATA, 256), (DATA + 256, 256)], false), (OK, 1));
    assert_eq!(f.request(VIRTIO_BLK_T_FLUSH, 0, &[], false), (OK, 1));
    assert_eq!(f.sector(63), [0xaa; 512]);
    assert_eq!(f.sector(62), [62; 512]);

    assert_eq!(f.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20)], true), (OK, 21));
    let mut id = [0; 20];
    mem.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id, b"disk-of-a-long-name-");
}

#[test]
fn indirect_table_is_followed() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    f.header(VIRTIO_BLK_T_IN, 3);
    let table = [(HEADER, 16u32, NEXT, 1u16), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)];
    for (at, (address, len, flags, next)) in (0x9000u64..).step_by(16).zip(table) {
        mem.write_obj(address, GuestAddress(at)).unwrap();
        mem.write_obj(len, GuestAddress(at + 8)).unwrap();
        mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
        mem.write_obj(next, GuestAddress(at + 14)).unwrap();
    }
    f.ring.offer(0, &[(0x9000, 48, INDIRECT)]);
    f.serve().unwrap();
    assert_eq!(mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), OK);
    assert_eq!(mem.read_obj::<u8>(GuestAddress(DATA + 511)).unwrap(), 3);
}

#[test]
fn sectors_past_the_end_and_parts_of_sectors_are_io_errors() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    for kind in [VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT] {
        let write = kind == VIRTIO_BLK_T_IN;
        for (sector, len) in [(64, 512), (63, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 100)] {
            let (status, written) = f.request(kind, sector, &[(DATA, len)], write);
            assert_eq!((status, written), (IO_ERROR, 1), "{kind} {sector} {len}");
        }
    }
    assert_eq!(f.file.metadata().unwrap().len(), 64 * 512);
    assert_eq!(f.sector(63), [63; 512]);
    assert_eq!(f.request(99, 0, &[], false), (UNSUPPORTED, 1));
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 63, &[(DATA, 512)], true).0, OK);
}

#[test]
fn request_of_more_than_was_offered_is_an_io_error() {
    let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MAX_DATA + 0x2_0000)]).unwrap();
    let mut f = Fixture::new(&mem, false);
    f.file.set_len(1 << 30).unwrap();
    f.server =
        Server::new(config(OpenOptions::new().read(true).write(true).open(&f.path).unwrap(), false)).unwrap();
    let most = u32::try_from(MAX_DATA).unwrap();
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, most + 512)], false).0, IO_ERROR);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[(DATA, most)], true).0, OK);
}

#[test]
fn read_only_disk_is_read_and_nothing_else() {
    let mem = memory();
    let mut f = Fixture::new(&mem, true);
    assert_eq!(f.server.features() >> VIRTIO_BLK_F_RO & 1, 1);
    assert_eq!(f.server.features() >> VIRTIO_BLK_F_DISCARD & 1, 0);
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512)], false).0, IO_ERROR);
    assert_eq!(f.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(f.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), IO_ERROR);
    assert_eq!(f.request(VIRTIO_BLK_T_FLUSH, 0, &[], false).0, OK);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 5, &[(DATA, 512)], true).0, OK);
    assert_eq!(f.sector(1), [1; 512]);
}

#[test]
fn discarded_room_goes_back_to_the_host_and_reads_as_zeroes() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    let before = f.file.metadata().unwrap().blocks();
    assert_eq!(f.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0), (16, 16, 0)]), OK);
    assert_eq!(f.sector(7), [7; 512]);
    assert_eq!(f.sector(8), [0; 512]);
    assert_eq!(f.sector(31), [0; 512]);
    assert_eq!(f.sector(32), [32; 512]);
    assert_eq!(f.file.metadata().unwrap().blocks(), before - 24);
    assert_eq!(f.file.metadata().unwrap().len(), 64 * 512);
}

#[test]
fn zeroes_are_written_with_and_without_giving_room_back() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    assert_eq!(f.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 1, 0)]), OK);
    assert_eq!(f.sector(1), [0; 512]);
    assert_eq!(f.sector(2), [2; 512]);
    let before = f.file.metadata().unwrap().blocks();
    assert_eq!(f.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(40, 8, 1)]), OK);
    assert_eq!(f.sector(47), [0; 512]);
    assert_eq!(f.file.metadata().unwrap().blocks(), before - 8);
}

#[test]
fn zeroes_count_as_data_and_a_turn_ends_after_much_of_the_disk_whatever_was_done_with_it() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    f.file.set_len(64 << 20).unwrap();
    let file = OpenOptions::new().read(true).write(true).open(&f.path).unwrap();
    let limited =
        BlockConfig { bytes_per_second: NonZeroU64::new(1 << 20).map(u64::from), ..config(file, false) };
    f.server = Server::new(limited).unwrap();
    assert_eq!(f.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 64 << 11, 0)]), OK);
    assert!(f.server.limits.as_mut().unwrap().admit(), "what is discarded goes nowhere");
    assert_eq!(f.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 16 << 11, 0)]), OK);
    assert!(!f.server.limits.as_mut().unwrap().admit(), "16 MiB were written, and a second has one");

    f.server.limits = None;
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        f.header(kind, 0);
        mem.write_obj(0u64, GuestAddress(DATA)).unwrap();
        mem.write_obj(16u32 << 11, GuestAddress(DATA + 8)).unwrap();
        mem.write_obj(0u32, GuestAddress(DATA + 12)).unwrap();
        let before = f.ring.given_back();
        for request in 0..2 {
            f.ring.offer(request * 3, &[(HEADER, 16, 0), (DATA, 16, 0), (STATUS, 1, WRITE)]);
        }
        assert!(f.serve().unwrap().more, "{kind}");
        assert_eq!(f.ring.given_back(), before + 1, "{kind}");
        f.serve().unwrap();
        assert_eq!(f.ring.given_back(), before + 2, "{kind}");
    }
}

#[test]
fn bad_range_changes_nothing_not_even_the_good_ones_before_it() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    for (kind, range, status) in [
        (VIRTIO_BLK_T_DISCARD, (60, 8, 0), IO_ERROR),
        (VIRTIO_BLK_T_DISCARD, (u64::MAX, 8, 0), IO_ERROR),
        (VIRTIO_BLK_T_DISCARD, (0, u32::MAX, 0), IO_ERROR),
        (VIRTIO_BLK_T_DISCARD, (0, 8, 1), UNSUPPORTED),
        // Of zeroes a request has one range.
        (VIRTIO_BLK_T_WRITE_ZEROES, (8, 8, 0), IO_ERROR),
    ] {
        assert_eq!(f.ranges(kind, &[(0, 8, 0), range]), status, "{kind} {range:?}");
        assert_eq!(f.sector(1), [1; 512]);
    }
    for (range, status) in [((0, 8, 2), UNSUPPORTED), ((63, 2, 0), IO_ERROR), ((0, u32::MAX, 0), IO_ERROR)] {
        assert_eq!(f.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[range]), status, "{range:?}");
        assert_eq!(f.sector(1), [1; 512]);
    }
    assert_eq!(f.ranges(VIRTIO_BLK_T_DISCARD, &[]), IO_ERROR);
    assert_eq!(f.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 0, 0); 17]), IO_ERROR);
    assert_eq!(f.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 15)], false).0, IO_ERROR);
}

#[test]
fn host_that_fails_is_an_io_error_and_the_disk_goes_on() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    f.file.set_len(32 * 512).unwrap();
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 40, &[(DATA, 512)], true).0, IO_ERROR);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 31, &[(DATA, 512)], true).0, OK);
}

#[test]
fn disk_whose_file_is_removed_goes_on_with_the_open_one() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    std::fs::remove_file(&f.path).unwrap();
    mem.write_slice(&[0xa5; 512], GuestAddress(DATA)).unwrap();
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 5, &[(DATA, 512)], false).0, OK);
    assert_eq!(f.request(VIRTIO_BLK_T_FLUSH, 0, &[], false).0, OK);
    assert_eq!(f.sector(5), [0xa5; 512]);
}

#[test]
fn disk_that_may_no_longer_be_written_is_an_io_error_and_is_still_read() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    let file = File::from(memfd_create("disk", MemfdFlags::ALLOW_SEALING).unwrap());
    file.set_len(64 * 512).unwrap();
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    f.server = Server::new(config(file.try_clone().unwrap(), false)).unwrap();
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512)], false).0, OK);
    fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512)], false).0, IO_ERROR);
    assert_eq!(f.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 512)], true).0, OK);
}

/// A file of 1 MiB on a file system of 64 KiB, or why there is none.
fn crowded_file() -> Result<File, rustix::io::Errno> {
    use rustix::fs::{Mode, OFlags};
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    };
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "size", "65536")?;
    fsconfig_create(&context)?;
    let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let file = rustix::fs::openat(&root, "disk", OFlags::CREATE | OFlags::RDWR, Mode::RUSR)?;
    rustix::fs::ftruncate(&file, 1 << 20)?;
    Ok(file.into())
}

#[test]
fn host_without_space_is_an_io_error_and_space_that_is_given_back_helps() {
    let file = match crowded_file() {
        Ok(file) => file,
        Err(e) => return eprintln!("skipped: no file system of its own: {e}"),
    };
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    f.server = Server::new(config(file, false)).unwrap();
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 0xe000)], false).0, OK);
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 1024, &[(DATA, 0x8000)], false).0, IO_ERROR);
    assert_eq!(f.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 0x60, 0)]), OK);
    assert_eq!(f.request(VIRTIO_BLK_T_OUT, 1024, &[(DATA, 0x8000)], false).0, OK);
}

#[test]
fn direct_disk_takes_buffers_at_any_address() {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = numbered(&directory, 64);
    let direct = i32::try_from(rustix::fs::OFlags::DIRECT.bits()).unwrap();
    let file = match OpenOptions::new().read(true).write(true).custom_flags(direct).open(&path) {
        Ok(file) => file,
        Err(e) => return eprintln!("skipped: no direct I/O here: {e}"),
    };
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    f.server = Server::new(config(file, false)).unwrap();
    let block = f.server.engine.disk().block();
    for at in [DATA, DATA + 1] {
        let blocks = [(at, block), (at + 0x8000, block)];
        assert_eq!(f.request(VIRTIO_BLK_T_IN, 8, &blocks, true).0, OK, "{at:#x}");
        assert_eq!(mem.read_obj::<u8>(GuestAddress(at)).unwrap(), 8);
        assert_eq!(f.request(VIRTIO_BLK_T_OUT, 0, &blocks, false).0, OK, "{at:#x}");
    }
    let mut sector = [0; 512];
    File::open(&path).unwrap().read_exact_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [8; 512]);
}

#[test]
fn chain_that_is_no_request_breaks_its_queue_and_touches_nothing() {
    let past = u64::try_from(MEMORY).unwrap();
    let chains: &[&[(u64, u32, u16)]] = &[
        &[(HEADER, 16, 0)],
        &[(HEADER, 15, 0), (STATUS, 1, WRITE)],
        &[(STATUS, 1, WRITE)],
        &[(HEADER, 16, WRITE), (DATA, 512, WRITE), (STATUS, 1, WRITE)],
        &[(HEADER, 16, 0), (STATUS, 1, WRITE), (DATA, 512, 0)],
        &[(HEADER, 16, 0), (past, 512, 0), (STATUS, 1, WRITE)],
        &[(HEADER, 16, 0), (past - 256, 512, WRITE), (STATUS, 1, WRITE)],
        &[(u64::MAX, 16, 0), (STATUS, 1, WRITE)],
        &[(HEADER, 16, 0), (DATA, u32::MAX, 0), (DATA, u32::MAX, 0), (STATUS, 1, WRITE)],
        // Tables of no length, of half an entry, and outside memory.
        &[(0x9000, 0, INDIRECT)],
        &[(0x9000, 8, INDIRECT)],
        &[(past, 16, INDIRECT)],
    ];
    for chain in chains {
        let mem = memory();
        let mut f = Fixture::new(&mem, false);
        f.header(VIRTIO_BLK_T_OUT, 0);
        f.ring.offer(0, chain);
        assert!(matches!(f.serve(), Err(QueueFault::Chain(_))), "{chain:?}");
        assert_eq!(f.sector(0), [0; 512]);
        assert_eq!(f.ring.given_back(), 0);
    }
}

#[test]
fn endless_chain_ends() {
    let mem = memory();
    let mut f = Fixture::new(&mem, false);
    f.header(VIRTIO_BLK_T_OUT, 0);
    f.ring.offer(0, &[(HEADER, 16, 0), (DATA, 0, 0)]);
    // The second descriptor goes on with itself.
    mem.write_obj(NEXT, GuestAddress(16 + 12)).unwrap();
    mem.write_obj(1u16, GuestAddress(16 + 14)).unwrap();
    assert!(matches!(f.serve(), Err(QueueFault::Chain(_))));
}

#[test]
fn descriptor_that_does_not_fit_is_refused_with_its_reason() {
    let directory = tempfile::tempdir().unwrap();
    let path = numbered(&directory, 4);
    let open = |write: bool| OpenOptions::new().read(true).write(write).open(&path).unwrap();
    let refused = |file: File, readonly| Server::new(config(file, readonly)).err().unwrap();
    assert!(matches!(refused(open(true), true), DiskError::Writable));
    assert!(matches!(refused(open(false), false), DiskError::NotWritable));
    let append = OpenOptions::new().read(true).append(true).open(&path).unwrap();
    assert!(matches!(refused(append, false), DiskError::Append));
    assert!(matches!(refused(File::open(directory.path()).unwrap(), true), DiskError::Kind));
    assert!(matches!(refused(File::open("/dev/null").unwrap(), true), DiskError::Kind));
    let unlimited = BlockConfig { bytes_per_second: Some(0), ..config(open(true), false) };
    assert!(matches!(Server::new(unlimited), Err(DiskError::NoRate("bytes"))));
    open(true).set_len(1000).unwrap();
    assert!(matches!(refused(open(true), false), DiskError::Size(1000, 512)));
}

#[test]
fn configuration_says_what_the_disk_is() {
    let mem = memory();
    let f = Fixture::new(&mem, false);
    let device = Block::new(config(OpenOptions::new().read(true).write(true).open(&f.path).unwrap(), false));
    let device = device.unwrap();
    let mut capacity = [0; 8];
    device.read_configuration(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 64);
    let mut space = [0xff; 80];
    device.read_configuration(0, &mut space);
    assert_eq!(&space[20..24], &512u32.to_le_bytes());
    assert_eq!(&space[36..40], &MAX_DISCARD.to_le_bytes());
    assert_eq!(&space[56..], [&[1][..], &[0; 23]].concat());
}

#[test]
fn limited_disk_serves_at_its_rate_and_stops_at_once() {
    let (mem, told) = (memory(), Told::new());
    let directory = tempfile::tempdir().unwrap();
    let file = File::open(numbered(&directory, 64)).unwrap();
    let limited = BlockConfig { requests_per_second: Some(20), ..config(file, true) };
    let mut device = Block::new(limited).unwrap();
    let ring = Ring::new(&mem, 0);
    mem.write_obj(VIRTIO_BLK_T_IN, GuestAddress(HEADER)).unwrap();
    for request in 0..4 {
        ring.offer(request * 3, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    }
    let begun = Instant::now();
    let (activation, _kicks) = told.activation(&mem, 0, &[(0, ring.queue())]);
    device.activate(activation).unwrap();
    while ring.given_back() < 4 {
        assert!(begun.elapsed() < Duration::from_secs(20), "{} of 4", ring.given_back());
        std::thread::sleep(Duration::from_millis(1));
    }
    // Two were in the bucket, and the fourth waits for the debt of none.
    assert!(begun.elapsed() >= Duration::from_millis(50), "{:?}", begun.elapsed());
    let [(0, state)] = device.stop()[..] else { panic!("one queue") };
    assert_eq!(state.next_avail, 4);
    assert!(told.all().contains(&"used 0".to_owned()));
    assert_eq!(device.counters()[..2], [("reads", 4), ("read-bytes", 2048)]);
}

#[test]
fn hostile_queue_ends_neither_thread_nor_process_and_a_reset_helps() {
    let (mem, told) = (memory(), Told::new());
    let directory = tempfile::tempdir().unwrap();
    let file = File::open(numbered(&directory, 64)).unwrap();
    let mut device = Block::new(config(file, true)).unwrap();
    let ring = Ring::new(&mem, 0);
    ring.offer(0, &[(u64::MAX, 16, 0)]);
    let (activation, _kicks) = told.activation(&mem, 0, &[(0, ring.queue())]);
    device.activate(activation).unwrap();
    told.eventually("needs reset");
    device.stop();

    let ring = Ring::new(&mem, 0);
    ring.offer(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    mem.write_obj(VIRTIO_BLK_T_IN, GuestAddress(HEADER)).unwrap();
    ring.used().idx().store(0);
    let (activation, _kicks) = told.activation(&mem, 0, &[(0, ring.queue())]);
    device.activate(activation).unwrap();
    told.eventually("used 0");
    assert_eq!(mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), OK);
}

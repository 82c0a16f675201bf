//! The device behind its BAR, with its thread, and memory whose size on the host can be seen.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddressSpace};

use super::*;
use crate::dma::tests::Table;
use crate::pci::guest::{DEVICE, DriverQueue, Guest, MEMORY, WINDOW, WRITE};

const BAR: u32 = WINDOW.base;
/// A hundred pages that the tests use, and where page numbers go.
const PAGES: u64 = 0x2_0000;
const NUMBERS: u64 = 0x1_0000;

/// A guest with a balloon whose memory is in a file, half of it in each of two regions.
fn guest() -> (Guest, File) {
    let (guest, file, _) = guest_and_dma();
    (guest, file)
}

/// The same, and who reaches its memory beside it.
fn guest_and_dma() -> (Guest, File, Dma) {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(MEMORY as u64).unwrap();
    let half = MEMORY / 2;
    let part = |index: usize| {
        let start = (index * half) as u64;
        (GuestAddress(start), half, Some(FileOffset::new(file.try_clone().unwrap(), start)))
    };
    let memory = GuestMemoryMmap::from_ranges_with_files([part(0), part(1)]).unwrap();
    let guest = Guest::with(memory);
    let dma = Dma::new(guest.memory.clone());
    guest.root.attach("balloon", Box::new(Balloon::new(dma.clone()).unwrap())).unwrap();
    guest.map(1, BAR);
    guest.set_vectors(1, BAR, 5);
    guest.negotiate(BAR);
    (guest, file, dma)
}

/// Pages of the file that there are.
fn resident(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512 / PAGE
}

/// Writes to pages, and to those of the queues and page numbers, which then do not come in between.
fn touch(guest: &Guest, pages: std::ops::Range<u64>) {
    let memory = guest.memory.memory();
    for page in pages {
        memory.write_obj(u64::MAX, GuestAddress(PAGES + page * PAGE)).unwrap();
    }
    for other in [0x1000, 0x2000, NUMBERS] {
        memory.write_obj(0u64, GuestAddress(other)).unwrap();
    }
}

#[test]
fn pages_in_the_balloon_are_not_wanted_and_stay_with_the_guest() {
    let (guest, file) = guest();
    let mut inflate = DriverQueue::new(&guest, BAR, 0, 0x1000);
    guest.set_status(BAR, 0xf);
    assert_eq!(guest.read_double(BAR + DEVICE), 0);
    touch(&guest, 0..100);
    let before = resident(&file);
    let page = u32::try_from(PAGES / PAGE).unwrap();
    guest.memory.memory().write_obj(page, GuestAddress(NUMBERS)).unwrap();
    inflate.offer(&[(NUMBERS, 4, 0)]);
    assert_eq!(inflate.used(), Some(0));
    assert_eq!(resident(&file), before);
}

#[test]
fn reported_memory_goes_back_on_either_number_of_the_queue() {
    for index in [2, 4] {
        let (guest, file) = guest();
        let mut reporting = DriverQueue::new(&guest, BAR, index, 0x1000);
        guest.set_status(BAR, 0xf);
        touch(&guest, 0..100);
        let before = resident(&file);
        // Also over the border of two regions, and parts of pages stay.
        let border = MEMORY as u64 / 2;
        reporting.offer(&[
            (PAGES, 0x8000, WRITE),
            (PAGES + 0x9800, 0x1000, WRITE),
            (border - 0x2000, 0x4000, WRITE),
            (PAGES + 0xa000, 0x1000, 0),
        ]);
        assert_eq!(reporting.used(), Some(0));
        assert_eq!(resident(&file), before - 12);
        assert_eq!(guest.root.counters()["balloon.discarded-bytes"], 0xc000);
    }
}

#[test]
fn reported_memory_stays_while_a_device_of_the_host_reaches_it() {
    let (guest, file, dma) = guest_and_dma();
    let mut reporting = DriverQueue::new(&guest, BAR, 2, 0x1000);
    guest.set_status(BAR, 0xf);
    touch(&guest, 0..100);
    let before = resident(&file);
    let reach = dma.enter(std::sync::Arc::new(Table::default())).unwrap();
    reporting.offer(&[(PAGES, 0x8000, WRITE)]);
    assert_eq!((reporting.used(), resident(&file)), (Some(0), before));
    assert_eq!(guest.root.counters()["balloon.kept-bytes"], 0x8000);
    drop(reach);
    reporting.offer(&[(PAGES, 0x8000, WRITE)]);
    assert_eq!((reporting.used(), resident(&file)), (Some(0), before - 8));
}

#[test]
fn page_outside_the_memory_wants_a_reset() {
    for buffer in [(MEMORY as u64, 0x1000), (MEMORY as u64 - 0x1000, 0x2000), (u64::MAX - 0xfff, 0x2000)] {
        let (guest, _file) = guest();
        let mut reporting = DriverQueue::new(&guest, BAR, 2, 0x1000);
        guest.set_status(BAR, 0xf);
        reporting.offer(&[(buffer.0, buffer.1, WRITE)]);
        assert_eq!(reporting.used(), None);
    }
}

#[test]
fn reported_page_of_a_private_mapping_is_the_file_s_again_and_the_file_stays() {
    let file = File::from(memfd_create("snapshot", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(MEMORY as u64).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], PAGES).unwrap();
    let private = libc::MAP_PRIVATE | libc::MAP_NORESERVE;
    let offset = Some(FileOffset::new(file.try_clone().unwrap(), 0));
    let mapping = vm_memory::MmapRegion::build(offset, MEMORY, libc::PROT_READ | libc::PROT_WRITE, private);
    let region = GuestRegionMmap::new(mapping.unwrap(), GuestAddress(0)).unwrap();
    let guest = Guest::with(GuestMemoryMmap::from_regions(vec![region]).unwrap());
    let balloon = Balloon::new(Dma::new(guest.memory.clone())).unwrap();
    guest.root.attach("balloon", Box::new(balloon)).unwrap();
    guest.map(1, BAR);
    guest.set_vectors(1, BAR, 5);
    guest.negotiate(BAR);
    let mut reporting = DriverQueue::new(&guest, BAR, 2, 0x3000);
    guest.set_status(BAR, 0xf);
    let memory = guest.memory.memory();
    for page in [PAGES, PAGES + PAGE] {
        memory.write_obj(u64::MAX, GuestAddress(page)).unwrap();
    }
    reporting.offer(&[(PAGES, 8192, WRITE)]);
    assert_eq!(reporting.used(), Some(0));
    // Whoever reports a page takes it for one of which anything can come.
    let now = |page: u64| memory.read_obj::<u64>(GuestAddress(page)).unwrap();
    assert_eq!([now(PAGES), now(PAGES + PAGE)], [0x0707_0707_0707_0707, 0]);
    let mut bytes = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, PAGES).unwrap();
    assert_eq!(bytes, [7; 4096]);
}

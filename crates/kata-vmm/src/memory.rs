//! Where things are in the guest's physical address space, and the memory behind it.
//!
//! ```text
//!   0                        RAM; the first MiB has what the kernel is given at boot (see `boot`)
//!   0xc000_0000   3 GiB      window of PCI devices
//!   0xfec0_0000              I/O APIC        ┐ in KVM
//!   0xfee0_0000              local APICs     ┘
//!   0x1_0000_0000 4 GiB      the rest of the RAM
//!   the next 2 GiB boundary behind, from 6 GiB on: what a virtio-mem device may give the guest later
//!   the next 64 GiB boundary behind: window of PCI devices whose BARs have 64 bits, to the end of the processor's addresses
//! ```
//!
//! All RAM is one file in memory, shared: other processes that work on it (vhost-user) map the same file. A machine that starts from
//! a snapshot and has no such processes has the snapshot's file instead, mapped privately: what it only reads, it shares with every
//! other machine that started there; what it writes is its own.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::{MemfdFlags, SeekFrom, ftruncate, memfd_create, seek};
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionCollectionError, GuestRegionMmap, MmapRegion, VolatileSlice,
};

use crate::pci::{HighWindow, Window, Windows};
use crate::virtio::Memory;

/// End of the RAM below 4 GiB, at most.
pub const LOW_END: u64 = 0xc000_0000;
/// Begin of the RAM that does not fit below.
pub const HIGH_BEGIN: u64 = 1 << 32;
/// Addresses of PCI devices.
pub const PCI_WINDOW: Window = Window { base: 0xc000_0000, size: 0x1000_0000 };
/// What the window above all memory is aligned to.
const HIGH_WINDOW_ALIGN: u64 = 64 << 30;
/// Most bits of an address there: what page tables of four levels reach, with one bit to spare.
const HIGH_WINDOW_BITS: u32 = 46;
/// What later memory is aligned to: the largest units by which Linux takes it.
const GROWTH_ALIGN: u64 = 2 << 30;
/// The I/O APIC's registers, which are KVM's.
pub const IO_APIC: u32 = 0xfec0_0000;
/// A local APIC's registers, which are KVM's.
pub const LOCAL_APIC: u32 = 0xfee0_0000;

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Least memory that a guest boots with, in bytes.
const LEAST: u64 = 64 << 20;
/// Most that is given out, in bytes: a sum of addresses never gets near the end of a `u64`.
const MOST: u64 = 1 << 42;

/// What the memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backing {
    /// All of it is taken from the host at once.
    pub prealloc: bool,
    /// It is on huge pages that the host has set aside.
    pub hugepages: bool,
}

/// Why a guest has no memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// Not a size for a guest.
    #[error("{size:#x} bytes are no size for a guest's memory: it has {least:#x} to {most:#x}, in whole MiB", least = LEAST, most = MOST)]
    Size {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// The host refused.
    #[error("the host does not give {size:#x} bytes of memory: {step}")]
    Host {
        /// What was asked for, in bytes.
        size: u64,
        /// What failed.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host has set too few aside.
    #[error(
        "the host has no {size:#x} bytes of huge pages left for a guest: set more aside (vm.nr_hugepages), or leave \
         hypervisor.*.enable_hugepages out"
    )]
    HugePages {
        /// What was asked for, in bytes.
        size: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It cannot be mapped.
    #[error("{size:#x} bytes of guest memory cannot be mapped into the VMM")]
    Map {
        /// What was asked for, in bytes.
        size: u64,
        /// Why.
        #[source]
        source: MmapRegionError,
    },
    /// The parts do not fit together.
    #[error("the guest's memory cannot be put together")]
    Regions(#[source] GuestRegionCollectionError),
}

/// The ranges of addresses that `size` bytes of RAM have: first address and length of each, lowest first.
pub fn ranges(size: u64) -> Vec<(u64, u64)> {
    let low = size.min(LOW_END);
    let high = size - low;
    let all = [(0, low), (HIGH_BEGIN, high)];
    all.into_iter().filter(|(_, length)| *length > 0).collect()
}

/// Where `growth` bytes of later memory are, behind `size` bytes of RAM: never where RAM begins.
fn growth_base(size: u64) -> u64 {
    let end = HIGH_BEGIN + size.saturating_sub(LOW_END);
    (end + 1).next_multiple_of(GROWTH_ALIGN)
}

/// Memory for a guest, all zero: `size` bytes of RAM, and addresses with nothing behind them yet for `growth` bytes more.
pub fn allocate(size: u64, growth: u64, backing: Backing) -> Result<Memory, MemoryError> {
    let whole = check(size, growth)?;
    let file = in_memory(whole, backing.hugepages)?;
    let mut regions = Vec::with_capacity(3);
    let mut offset = 0;
    for (base, length) in ranges(size).into_iter().chain(later(size, growth)) {
        // Huge pages that are not set aside for the guest now would be missing when it touches them, and that kills: so its RAM
        // takes them from the pool here. Of later memory each block is populated when it comes.
        let ram = later(size, growth).is_none_or(|(later, _)| later != base);
        let kind =
            if backing.hugepages && ram { libc::MAP_SHARED } else { libc::MAP_SHARED | libc::MAP_NORESERVE };
        let region = map(&file, offset, base, length, kind).map_err(|error| match error {
            MemoryError::Map { source: MmapRegionError::Mmap(source), .. }
                if backing.hugepages && source.raw_os_error() == Some(libc::ENOMEM) =>
            {
                MemoryError::HugePages { size, source }
            }
            error => error,
        })?;
        if backing.prealloc && is_ram(&region) {
            let step = "all of it at once; is so much free?";
            let fault = |source| MemoryError::Host { size, step, source };
            let all = region.as_volatile_slice().map_err(|e| fault(io::Error::other(e)))?;
            populate(&all).map_err(|e| fault(e.into()))?;
        }
        regions.push(region);
        offset += length;
    }
    whole_of(regions)
}

/// Memory for a guest whose RAM is what `file` holds, in the order of its addresses. The file is only read: a page that the guest
/// writes becomes its own. It must be as long, and stay so, while the memory is there: nothing tells a page behind its end from any
/// other until the guest touches it.
pub fn mapped(file: &File, size: u64, growth: u64) -> Result<Memory, MemoryError> {
    check(size, growth)?;
    let mut regions = Vec::with_capacity(3);
    let mut offset = 0;
    for (base, length) in ranges(size) {
        regions.push(map(file, offset, base, length, libc::MAP_PRIVATE | libc::MAP_NORESERVE)?);
        offset += length;
    }
    if let Some((base, length)) = later(size, growth) {
        let kind = libc::MAP_SHARED | libc::MAP_NORESERVE;
        regions.push(map(&in_memory(length, false)?, 0, base, length, kind)?);
    }
    whole_of(regions)
}

/// Sizes that a guest can have; answers their sum.
fn check(size: u64, growth: u64) -> Result<u64, MemoryError> {
    if !(LEAST..=MOST).contains(&size) || !size.is_multiple_of(1 << 20) {
        return Err(MemoryError::Size { size });
    }
    let whole = size.checked_add(growth).filter(|whole| *whole <= MOST && growth.is_multiple_of(1 << 20));
    whole.ok_or_else(|| MemoryError::Size { size: size.saturating_add(growth) })
}

fn in_memory(size: u64, hugepages: bool) -> Result<File, MemoryError> {
    let host = |step| move |e: Errno| MemoryError::Host { size, step, source: e.into() };
    let flags = if hugepages { MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB } else { MemfdFlags::CLOEXEC };
    let file = memfd_create("guest-ram", flags).map_err(host("a file in memory"))?;
    ftruncate(&file, size).map_err(host("its size"))?;
    Ok(File::from(file))
}

/// Where later memory is, if there is to be any.
fn later(size: u64, growth: u64) -> Option<(u64, u64)> {
    (growth > 0).then_some((growth_base(size), growth))
}

/// Maps a part of a file, as the flags `kind` say, as the guest's memory from `base` on.
fn map(
    file: &File,
    offset: u64,
    base: u64,
    length: u64,
    kind: libc::c_int,
) -> Result<GuestRegionMmap, MemoryError> {
    let size = length;
    let copy = file.try_clone().map_err(|source| MemoryError::Host { size, step: "a descriptor", source })?;
    let bytes = usize::try_from(length).map_err(|_| MemoryError::Size { size })?;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let file = FileOffset::new(copy, offset);
    let mapping = MmapRegion::build(Some(file), bytes, protection, kind)
        .map_err(|source| MemoryError::Map { size, source })?;
    GuestRegionMmap::new(mapping, GuestAddress(base)).ok_or(MemoryError::Size { size })
}

fn whole_of(regions: Vec<GuestRegionMmap>) -> Result<Memory, MemoryError> {
    Ok(Memory::new(GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Regions)?))
}

/// Takes whole pages for the guest from the host, unless it has them already. A host that cannot does so when the guest touches them.
pub fn take(memory: &GuestMemoryMmap, ranges: &[Range<u64>]) {
    for range in ranges {
        let bytes = usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(0);
        let Ok(part) = memory.get_slice(GuestAddress(range.start), bytes) else { continue };
        if let Err(error) = populate(&part) {
            tracing::debug!(%error, "memory comes page by page, as the guest touches it");
        }
    }
}

fn populate(part: &VolatileSlice<'_>) -> rustix::io::Result<()> {
    // SAFETY: the range is mapped as long as `part` is borrowed; populating changes nothing that is in it.
    unsafe { madvise(part.ptr_guard_mut().as_ptr().cast(), part.len(), Advice::LinuxPopulateWrite) }
}

/// Whether it is RAM from the start.
pub fn is_ram(region: &GuestRegionMmap) -> bool {
    matches!(region.start_addr().0, 0 | HIGH_BEGIN)
}

/// All bytes of RAM that are there from the start.
pub fn size(memory: &GuestMemoryMmap) -> u64 {
    memory.iter().filter(|region| is_ram(region)).map(GuestMemoryRegion::len).sum()
}

/// Parts of a file that are no holes, in whole pages; the whole range where the file system does not tell.
pub fn filled(file: &File, range: Range<u64>) -> Vec<Range<u64>> {
    let (mut found, mut at) = (Vec::new(), range.start);
    while at < range.end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) if start < range.end => start.max(at) / PAGE * PAGE,
            // Nothing is there any more.
            Ok(_) | Err(Errno::NXIO) => break,
            Err(_) => at,
        };
        let hole = seek(file, SeekFrom::Hole(start)).unwrap_or(range.end);
        let end = hole.next_multiple_of(PAGE).clamp(start + PAGE, range.end.max(start + PAGE));
        found.push(start..end.min(range.end));
        at = end;
    }
    found
}

/// The file that a region is, and others can map, too; `None` of one that is mapped privately.
pub fn shared_file(region: &GuestRegionMmap) -> Option<&FileOffset> {
    region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0)
}

/// Parts of a region that the host has given memory for, by their distance from its begin; `None` where the region is not shared, so
/// that its file does not tell.
pub fn given(region: &GuestRegionMmap) -> Option<Vec<Range<u64>>> {
    let file = shared_file(region)?;
    let start = file.start();
    let ranges = filled(file.file(), start..start + region.len());
    Some(ranges.into_iter().map(|range| range.start - start..range.end - start).collect())
}

/// Addresses of shared RAM that the host has given memory for.
pub fn resident(memory: &GuestMemoryMmap) -> Vec<Range<u64>> {
    let mut all = Vec::new();
    for region in memory.iter().filter(|region| is_ram(region)) {
        let base = region.start_addr().0;
        let ranges = given(region).unwrap_or_default();
        all.extend(ranges.into_iter().map(|range| base + range.start..base + range.end));
    }
    all
}

/// First address and length of what can come later.
pub fn growth(memory: &GuestMemoryMmap) -> Option<(u64, u64)> {
    memory.iter().find(|region| !is_ram(region)).map(|region| (region.start_addr().0, region.len()))
}

/// Where BARs may be, for a processor whose addresses have so many bits.
pub fn windows(memory: &GuestMemoryMmap, bits: u32) -> Windows {
    let end = memory.last_addr().0.max(HIGH_BEGIN) + 1;
    let base = end.next_multiple_of(HIGH_WINDOW_ALIGN);
    let most = 1_u64 << bits.min(HIGH_WINDOW_BITS);
    let size = most.saturating_sub(base);
    Windows { low: PCI_WINDOW, high: (size > 0).then_some(HighWindow { base, size }) }
}

/// End of the RAM below the window of PCI devices.
pub fn low_end(memory: &GuestMemoryMmap) -> u64 {
    size(memory).min(LOW_END)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddressSpace};

    use super::*;

    proptest! {
        #[test]
        fn ranges_hold_all_of_it_and_leave_the_hole_alone(size in LEAST..=MOST) {
            let ranges = ranges(size);
            prop_assert_eq!(ranges.iter().map(|(_, length)| length).sum::<u64>(), size);
            for (base, length) in ranges {
                prop_assert!(base + length <= LOW_END || base >= HIGH_BEGIN);
            }
        }
    }

    #[test]
    fn huge_pages_that_the_host_has_not_are_refused_and_not_missed_later() {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let figure = |name: &str| -> u64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("0");
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        let page = figure("Hugepagesize:") << 10;
        let surplus = std::fs::read_to_string("/proc/sys/vm/nr_overcommit_hugepages").unwrap_or_default();
        if page == 0 || surplus.trim() != "0" {
            return eprintln!(
                "skipped: this kernel has no huge pages, or makes more when they are asked for"
            );
        }
        let more = (figure("HugePages_Total:") + 1) * page + LEAST;
        let backing = Backing { hugepages: true, ..Backing::default() };
        let error = allocate(more.next_multiple_of(page), 0, backing).unwrap_err();
        assert!(matches!(error, MemoryError::HugePages { .. }), "{error:?}");
        assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
    }

    #[test]
    fn memory_beyond_three_gibibytes_lies_above_four() {
        let memory = allocate(5 << 30, 0, Backing::default()).unwrap();
        let memory = memory.memory();
        assert_eq!(size(&memory), 5 << 30);
        memory.write_obj(7u8, GuestAddress(LOW_END - 1)).unwrap();
        memory.write_obj(8u8, GuestAddress(HIGH_BEGIN)).unwrap();
        assert!(memory.write_obj(9u8, GuestAddress(LOW_END)).is_err());
        assert!(memory.write_obj(9u8, GuestAddress(HIGH_BEGIN - 1)).is_err());
        assert_eq!(memory.read_obj::<u8>(GuestAddress(LOW_END - 1)).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(HIGH_BEGIN)).unwrap(), 8);
    }

    #[test]
    fn later_memory_lies_behind_the_ram_and_takes_nothing() {
        for size in [LEAST, LOW_END, LOW_END + (2 << 30), 5 << 30] {
            let memory =
                allocate(size, 1 << 30, Backing { prealloc: size == LEAST, hugepages: false }).unwrap();
            let memory = memory.memory();
            let (base, length) = growth(&memory).unwrap();
            let end = ranges(size).last().map(|(base, length)| base + length).unwrap();
            assert!(base >= end && base > HIGH_BEGIN && base.is_multiple_of(GROWTH_ALIGN), "{base:#x}");
            assert_eq!((super::size(&memory), length), (size, 1 << 30));
            let file = memory.iter().next().unwrap().file_offset().unwrap().file();
            let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
            assert!(blocks * 512 <= LEAST);
        }
    }

    #[test]
    fn high_window_lies_behind_all_memory_and_ends_with_the_processor_s_addresses() {
        let memory = allocate(LEAST, 70 << 30, Backing::default()).unwrap();
        let memory = memory.memory();
        let (base, length) = growth(&memory).unwrap();
        assert_eq!(base + length, 76 << 30);
        let high = |bits| windows(&memory, bits).high;
        assert_eq!(high(40), Some(HighWindow { base: 128 << 30, size: (1 << 40) - (128 << 30) }));
        assert_eq!(high(52), Some(HighWindow { base: 128 << 30, size: (1 << 46) - (128 << 30) }));
        assert_eq!(high(36), None);
    }

    #[test]
    fn mapped_file_is_the_guest_s_memory_and_is_never_written() {
        let file = tempfile::tempfile().unwrap();
        let size = LOW_END + (64 << 20);
        file.set_len(size).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"low", 0x1000).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"high", LOW_END + 0x1000).unwrap();
        let [first, second] = [(); 2].map(|()| mapped(&file, size, 2 << 20).unwrap().memory().clone());
        let read = |memory: &GuestMemoryMmap, at: u64| memory.read_obj::<[u8; 4]>(GuestAddress(at)).unwrap();
        assert_eq!([read(&first, 0x1000), read(&first, HIGH_BEGIN + 0x1000)], [*b"low\0", *b"high"]);
        first.write_slice(b"mine", GuestAddress(0x1000)).unwrap();
        assert_eq!([read(&first, 0x1000), read(&second, 0x1000)], [*b"mine", *b"low\0"]);
        let (base, length) = growth(&first).unwrap();
        assert_eq!((super::size(&first), length), (size, 2 << 20));
        first.write_slice(b"more", GuestAddress(base)).unwrap();
        assert_eq!(read(&second, base), [0; 4]);
    }

    #[test]
    fn what_was_written_is_resident_and_nothing_else() {
        let memory = allocate(5 << 30, 1 << 30, Backing::default()).unwrap();
        let memory = memory.memory();
        assert_eq!(resident(&memory), []);
        let (later, _) = growth(&memory).unwrap();
        for at in [0x1fff, 0x5000, HIGH_BEGIN + 0x10_0000, later] {
            memory.write_slice(b"four", GuestAddress(at)).unwrap();
        }
        let high = HIGH_BEGIN + 0x10_0000;
        assert_eq!(resident(&memory), [0x1000..0x3000, 0x5000..0x6000, high..high + 0x1000]);
    }

    #[test]
    fn of_a_file_that_is_mapped_privately_nothing_is_resident() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(LEAST).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"low", 0x1000).unwrap();
        assert_eq!(resident(&mapped(&file, LEAST, 0).unwrap().memory()), []);
    }

    #[test]
    fn size_that_is_none_for_a_guest_is_refused() {
        for size in [0, 1, LEAST - 1, LEAST + 1, MOST + (1 << 20), u64::MAX] {
            assert!(
                matches!(allocate(size, 0, Backing::default()), Err(MemoryError::Size { .. })),
                "{size:#x}"
            );
        }
    }

    #[test]
    fn preallocated_memory_is_there_at_once() {
        let memory = allocate(LEAST, 0, Backing { prealloc: true, ..Backing::default() }).unwrap();
        let memory = memory.memory();
        let region = memory.iter().next().unwrap();
        let file = region.file_offset().unwrap().file();
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        assert_eq!(blocks * 512, LEAST);
    }
}

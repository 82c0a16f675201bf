//! What the guest finds in its memory when its first CPU starts. There is no firmware.
//!
//! ```text
//!   0x500      descriptor table                 both
//!   0x6000     start info, modules, memory map  PVH: the kernel is an ELF file with the note for it
//!   0x7000     zero page                        Linux's own 64-bit protocol: a bzImage
//!   0x9000     page tables, the first GiB       the same
//!   0x20000    command line                     both
//!   0xe0000    ACPI tables                      both
//!   0xff000    generation identifier            both
//!   1 MiB      kernel                           where it wants to be
//!   end of the low RAM, downwards: initial RAM disk
//! ```
//!
//! From the PVH boot protocol (xen/include/public/arch-x86/hvm/start_info.h) and Linux's (Documentation/arch/x86/boot.rst).

mod bzimage;
mod pvh;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;

use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{self, KernelLoader};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::memory::{self, PAGE, low_end};

/// Address of the descriptor table.
pub const GDT: u64 = 0x500;
/// Last byte of it, from its begin.
pub const GDT_LIMIT: u16 = 5 * 8 - 1;
/// Address of what a PVH kernel is told.
pub const START_INFO: u64 = 0x6000;
/// Address of what a bzImage is told.
pub const ZERO_PAGE: u64 = 0x7000;
/// Address of the first of the page tables.
pub const PAGE_TABLES: u64 = 0x9000;
/// Address of the command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes of it, with the zero at its end: what Linux takes on this architecture (`COMMAND_LINE_SIZE`).
pub const COMMAND_LINE_SIZE: usize = 2048;
/// Address of the ACPI tables; the first is the one that leads to the others.
pub const ACPI: u64 = 0xe_0000;
/// End of the room for them.
pub const ACPI_END: u64 = GENERATION;
/// Address of the machine's generation identifier, which is new where a machine starts from a snapshot.
pub const GENERATION: u64 = 0xf_f000;
/// End of the RAM that is free below the first MiB.
const BASE_END: u64 = 0x9_fc00;
/// Where memory proper begins.
const HIGH_MEMORY: u64 = 0x10_0000;
/// Bytes of tables that Linux makes beside the descriptors of pages, at least.
const FIRST_TABLES: u64 = 2 << 20;
/// Most that is taken from the host for a guest that would write to it by itself, piece by piece, in bytes.
const MOST_TABLES: u64 = 64 << 20;

/// Null, unused, code, data, task state: flat, for 32 bits.
const DESCRIPTORS: [u64; 5] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

/// How the first CPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// In 32-bit mode, with the start info's address.
    Pvh {
        /// First instruction.
        address: u64,
    },
    /// In 64-bit mode, with the zero page's address.
    Linux64 {
        /// First instruction.
        address: u64,
    },
}

/// Why a guest cannot boot.
#[derive(Debug, Error)]
pub enum BootError {
    /// The file is neither.
    #[error("the kernel is neither an ELF file nor a bzImage")]
    Format,
    /// The file cannot be read.
    #[error("the {what} cannot be read")]
    Read {
        /// `kernel`, `initrd`.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It does not load.
    #[error(
        "the kernel does not load: it is damaged, or the guest's memory of {memory:#x} bytes is too small for it"
    )]
    Load {
        /// Bytes of RAM.
        memory: u64,
        /// Why.
        #[source]
        source: loader::Error,
    },
    /// An ELF kernel that only firmware can start.
    #[error("the kernel is an ELF file without a PVH note: build it with CONFIG_PVH, or give its bzImage")]
    NoPvh,
    /// An old or 32-bit kernel.
    #[error("the bzImage has no 64-bit entry: it is of a 32-bit kernel, or older than Linux 3.8")]
    No64Bit,
    /// They do not fit.
    #[error(
        "the {what} of {size:#x} bytes does not fit into the guest's memory behind the kernel, which ends at {kernel_end:#x}; give the guest more"
    )]
    TooLarge {
        /// `initrd`.
        what: &'static str,
        /// Its bytes.
        size: u64,
        /// Where there is memory from.
        kernel_end: u64,
    },
    /// More than the kernel takes.
    #[error("the kernel's command line has {length} bytes and may have {most}", most = COMMAND_LINE_SIZE - 1)]
    CommandLine {
        /// Its bytes.
        length: usize,
    },
    /// It holds a zero.
    #[error("the kernel's command line holds a zero byte")]
    CommandLineZero,
    /// Structures do not fit, which they do in any memory that is large enough for a kernel.
    #[error("the guest's memory has no room for {what}")]
    Room {
        /// What did not fit.
        what: &'static str,
        /// Why.
        #[source]
        source: GuestMemoryError,
    },
}

/// A stretch of the guest's addresses, and what they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stretch {
    base: u64,
    length: u64,
    /// As both protocols number them (and BIOSes: E820).
    kind: u32,
}

const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// What to boot.
pub struct Guest<'a> {
    /// The kernel.
    pub kernel: &'a mut File,
    /// Its first root file system.
    pub initrd: Option<&'a mut File>,
    /// Its command line.
    pub command_line: &'a str,
}

/// What was put into memory.
#[derive(Debug)]
pub struct Loaded {
    /// How the first CPU begins.
    pub entry: Entry,
    /// First address behind the kernel, with what it clears by itself.
    kernel_end: u64,
    initrd: Initrd,
}

impl Loaded {
    /// Addresses that have nothing yet and that Linux writes to before it does anything for a program, however much memory there is:
    /// what an ELF kernel clears behind its own data, and at the end of all memory, below the initrd, one descriptor of 64 bytes a page and its
    /// first tables.
    pub fn written_first(&self, memory: &GuestMemoryMmap) -> Vec<Range<u64>> {
        let filled = memory::resident(memory);
        let data = filled.iter().rfind(|range| range.start < self.kernel_end);
        let cleared = data.map(|data| data.end..self.kernel_end / PAGE * PAGE);

        let tables = memory::ranges(memory::size(memory)).last().map(|(base, length)| {
            let last = *base..base + length;
            let end =
                self.initrd.map(|(base, _)| base).filter(|base| last.contains(base)).unwrap_or(last.end);
            let size = (memory::size(memory) / 64 + FIRST_TABLES).min(MOST_TABLES) / PAGE * PAGE;
            let kernel_end = self.kernel_end.saturating_add(PAGE - 1) / PAGE * PAGE;
            end.saturating_sub(size).max(last.start).max(kernel_end)..end
        });
        cleared.into_iter().chain(tables).filter(|range| !range.is_empty()).collect()
    }
}

/// Puts everything into memory but the ACPI tables.
pub fn load(memory: &GuestMemoryMmap, guest: Guest<'_>) -> Result<Loaded, BootError> {
    let line = command_line(guest.command_line)?;
    put(memory, &line, COMMAND_LINE, "the command line")?;
    for (address, descriptor) in (GDT..).step_by(8).zip(DESCRIPTORS) {
        put(memory, &descriptor.to_le_bytes(), address, "the descriptor table")?;
    }
    match format(guest.kernel)? {
        Format::Elf => {
            let failed = |source| BootError::Load { memory: memory::size(memory), source };
            let loaded =
                Elf::load(memory, None, guest.kernel, Some(GuestAddress(HIGH_MEMORY))).map_err(failed)?;
            let PvhBootCapability::PvhEntryPresent(address) = loaded.pvh_boot_cap else {
                return Err(BootError::NoPvh);
            };
            let initrd = load_initrd(memory, guest.initrd, loaded.kernel_end)?;
            pvh::tell(memory, initrd)?;
            let entry = Entry::Pvh { address: address.0 };
            Ok(Loaded { entry, kernel_end: loaded.kernel_end, initrd })
        }
        Format::BzImage => bzimage::load(memory, guest.kernel, guest.initrd, line.len()),
    }
}

enum Format {
    Elf,
    BzImage,
}

fn format(kernel: &mut File) -> Result<Format, BootError> {
    let failed = |source| BootError::Read { what: "kernel", source };
    let mut head = Vec::with_capacity(0x206);
    kernel.rewind().map_err(failed)?;
    kernel.by_ref().take(0x206).read_to_end(&mut head).map_err(failed)?;
    match (head.get(..4), head.get(0x202..0x206)) {
        (Some(b"\x7fELF"), _) => Ok(Format::Elf),
        (_, Some(b"HdrS")) => Ok(Format::BzImage),
        _ => Err(BootError::Format),
    }
}

/// The line with a zero at its end.
fn command_line(line: &str) -> Result<Vec<u8>, BootError> {
    if line.len() >= COMMAND_LINE_SIZE {
        return Err(BootError::CommandLine { length: line.len() });
    }
    if line.contains('\0') {
        return Err(BootError::CommandLineZero);
    }
    Ok([line.as_bytes(), &[0]].concat())
}

/// Where the initial RAM disk is, and its length.
type Initrd = Option<(u64, u64)>;

/// Puts it at the end of the low RAM.
fn load_initrd(
    memory: &GuestMemoryMmap,
    initrd: Option<&mut File>,
    kernel_end: u64,
) -> Result<Initrd, BootError> {
    let Some(file) = initrd else { return Ok(None) };
    let failed = |source| BootError::Read { what: "initrd", source };
    let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
    file.rewind().map_err(failed)?;
    let base =
        low_end(memory).checked_sub(size).map(|base| base / PAGE * PAGE).filter(|base| *base >= kernel_end);
    let base = base.ok_or(BootError::TooLarge { what: "initrd", size, kernel_end })?;
    let length =
        usize::try_from(size).map_err(|_| BootError::TooLarge { what: "initrd", size, kernel_end })?;
    memory
        .read_exact_volatile_from(GuestAddress(base), file, length)
        .map_err(|e| failed(io::Error::other(e.to_string())))?;
    Ok(Some((base, size)))
}

/// What the guest's addresses are, lowest first.
fn stretches(memory: &GuestMemoryMmap) -> Vec<Stretch> {
    let low = low_end(memory);
    let mut all = vec![
        Stretch { base: 0, length: BASE_END, kind: RAM },
        Stretch { base: ACPI, length: HIGH_MEMORY - ACPI, kind: RESERVED },
        Stretch { base: HIGH_MEMORY, length: low.saturating_sub(HIGH_MEMORY), kind: RAM },
    ];
    let high =
        memory::ranges(memory::size(memory)).into_iter().filter(|(base, _)| *base >= memory::HIGH_BEGIN);
    all.extend(high.map(|(base, length)| Stretch { base, length, kind: RAM }));
    all
}

fn put(memory: &GuestMemoryMmap, bytes: &[u8], address: u64, what: &'static str) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Room { what, source })
}

#[cfg(test)]
mod tests;

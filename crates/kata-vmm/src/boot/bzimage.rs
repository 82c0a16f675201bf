//! Linux's own boot protocol, its 64-bit entry: for compressed kernels, as distributions have them.

use std::fs::File;

use linux_loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::bzimage::BzImage;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::{
    ACPI, BootError, COMMAND_LINE, Entry, HIGH_MEMORY, Loaded, PAGE_TABLES, ZERO_PAGE, load_initrd, put,
    stretches,
};
use crate::memory;

/// Of the 64-bit entry from where the kernel was loaded to.
const ENTRY: u64 = 0x200;
/// `XLF_KERNEL_64` of `xloadflags`.
const HAS_64_BIT: u16 = 1;
/// First version of the protocol that has `xloadflags`.
const WITH_FLAGS: u16 = 0x20c;
/// A boot loader without a number of its own.
const NO_LOADER: u8 = 0xff;
/// Present and writable; and a large page.
const TABLE: u64 = 3;
const LARGE: u64 = 0x83;

/// Loads kernel and initrd, and writes the zero page and page tables.
pub fn load(
    memory: &GuestMemoryMmap,
    kernel: &mut File,
    initrd: Option<&mut File>,
    line_length: usize,
) -> Result<Loaded, BootError> {
    let failed = |source| BootError::Load { memory: memory::size(memory), source };
    let start = GuestAddress(HIGH_MEMORY);
    let loaded = BzImage::load(memory, Some(start), kernel, Some(start)).map_err(failed)?;
    let header = loaded.setup_header.ok_or(BootError::Format)?;
    if header.version < WITH_FLAGS || header.xloadflags & HAS_64_BIT == 0 {
        return Err(BootError::No64Bit);
    }
    // It unpacks itself to where it prefers to be, and needs that much there.
    let unpacked = header.pref_address.saturating_add(header.init_size.into());
    let initrd = load_initrd(memory, initrd, loaded.kernel_end.max(unpacked))?;
    let mut page = boot_params { hdr: header, ..Default::default() };
    page.hdr.type_of_loader = NO_LOADER;
    page.hdr.cmd_line_ptr = u32::try_from(COMMAND_LINE).unwrap_or(0);
    page.hdr.cmdline_size = u32::try_from(line_length).unwrap_or(0);
    if let Some((base, length)) = initrd {
        // It ends below 3 GiB.
        page.hdr.ramdisk_image = u32::try_from(base).unwrap_or(0);
        page.hdr.ramdisk_size = u32::try_from(length).unwrap_or(0);
    }
    page.acpi_rsdp_addr = ACPI;
    let map = stretches(memory);
    let mut entries = page.e820_table;
    for (entry, stretch) in entries.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: stretch.base, size: stretch.length, r#type: stretch.kind };
    }
    page.e820_table = entries;
    page.e820_entries = u8::try_from(map.len()).unwrap_or(0);
    put(memory, page.as_slice(), ZERO_PAGE, "the zero page")?;
    page_tables(memory)?;
    // What it clears is behind what it unpacks itself to, later.
    Ok(Loaded {
        entry: Entry::Linux64 { address: HIGH_MEMORY + ENTRY },
        kernel_end: loaded.kernel_end,
        initrd,
    })
}

/// One to one for the first GiB, in pages of 2 MiB: the kernel makes its own as soon as it runs.
fn page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let (pointers, directory) = (PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    let what = "page tables";
    put(memory, &(pointers | TABLE).to_le_bytes(), PAGE_TABLES, what)?;
    put(memory, &(directory | TABLE).to_le_bytes(), pointers, what)?;
    for number in 0..512u64 {
        put(memory, &(number << 21 | LARGE).to_le_bytes(), directory + number * 8, what)?;
    }
    Ok(())
}

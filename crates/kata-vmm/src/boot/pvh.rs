//! The PVH boot protocol: a kernel in 32-bit mode that is told of its memory by one structure.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, GuestMemoryMmap};

use super::{ACPI, BootError, COMMAND_LINE, Initrd, START_INFO, put, stretches};

/// What the structure begins with.
const MAGIC: u32 = 0x336e_c578;
/// The version that has a memory map.
const VERSION: u32 = 1;
const MODULES: u64 = START_INFO + 0x80;
const MEMORY_MAP: u64 = START_INFO + 0x100;

/// Writes what the kernel is told.
pub fn tell(memory: &GuestMemoryMmap, initrd: Initrd) -> Result<(), BootError> {
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        put(memory, module.as_slice(), MODULES, "the initrd's description")?;
    }
    let map = stretches(memory);
    for (address, stretch) in (MEMORY_MAP..).step_by(size_of::<hvm_memmap_table_entry>()).zip(&map) {
        let entry = hvm_memmap_table_entry {
            addr: stretch.base,
            size: stretch.length,
            type_: stretch.kind,
            reserved: 0,
        };
        put(memory, entry.as_slice(), address, "the memory map")?;
    }
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..Default::default()
    };
    put(memory, info.as_slice(), START_INFO, "the start info")
}

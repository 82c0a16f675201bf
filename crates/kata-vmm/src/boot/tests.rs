use std::io::Write;

use proptest::prelude::*;
use vm_memory::GuestAddressSpace;

use super::*;
use crate::memory::{Backing, allocate};

const MIB: u64 = 1 << 20;

/// A file with these bytes.
fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// An ELF kernel of one segment at 1 MiB with this code, and a PVH note for its first byte if wanted.
fn elf(code: &[u8], note: bool) -> Vec<u8> {
    elf_that_clears(code, note, 0)
}

/// The same with bytes behind the code that it clears by itself.
fn elf_that_clears(code: &[u8], note: bool, cleared: u64) -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    let half = |value: u16| value.to_le_bytes().to_vec();
    let word = |value: u32| value.to_le_bytes().to_vec();
    let long = |value: u64| value.to_le_bytes().to_vec();
    let header =
        [half(2), half(62), word(1), long(MIB), long(64), long(0), word(0), half(64), half(56), half(2)];
    bytes.extend(header.concat());
    bytes.resize(64, 0);
    let (at, length) = (64 + 2 * 56, u64::try_from(code.len()).unwrap());
    bytes.extend(
        [
            word(1),
            word(5),
            long(at + 20),
            long(MIB),
            long(MIB),
            long(length),
            long(length + cleared),
            long(4096),
        ]
        .concat(),
    );
    let kind = if note { 4 } else { 0 };
    bytes.extend([word(kind), word(4), long(at), long(0), long(0), long(20), long(20), long(4)].concat());
    bytes.extend([word(4), word(4), word(18), b"Xen\0".to_vec(), word(0x10_0000)].concat());
    bytes.extend(code);
    bytes
}

fn boot(kernel: &[u8], initrd: Option<&[u8]>, line: &str) -> (GuestMemoryMmap, Result<Loaded, BootError>) {
    let memory = GuestMemoryMmap::clone(&allocate(64 * MIB, 0, Backing::default()).unwrap().memory());
    let mut kernel = file(kernel);
    let mut initrd = initrd.map(file);
    let loaded = load(&memory, Guest { kernel: &mut kernel, initrd: initrd.as_mut(), command_line: line });
    (memory, loaded)
}

fn long(memory: &GuestMemoryMmap, address: u64) -> u64 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

fn word(memory: &GuestMemoryMmap, address: u64) -> u32 {
    memory.read_obj(GuestAddress(address)).unwrap()
}

#[test]
fn linux_writes_first_to_what_it_clears_and_below_the_initrd() {
    let kernel = elf_that_clears(b"code", true, 5 * PAGE);
    let (memory, loaded) = boot(&kernel, Some(b"initial disk"), "");
    let initrd = 64 * MIB - PAGE;
    let descriptors = MIB;
    let wanted = [MIB + PAGE..MIB + 5 * PAGE, initrd - FIRST_TABLES - descriptors..initrd];
    let ranges = loaded.unwrap().written_first(&memory);
    assert_eq!(ranges, wanted);
    memory::take(&memory, &ranges);
    let taken = memory::resident(&memory);
    assert!(
        wanted
            .iter()
            .all(|range| taken.iter().any(|taken| taken.start <= range.start && taken.end >= range.end)),
        "{taken:x?}"
    );
}

#[test]
fn kernel_that_clears_nothing_writes_first_below_the_initrd_alone() {
    for kernel in [bz_image(0x20f, 1, b"packed"), elf_that_clears(b"code", true, 0)] {
        let (memory, loaded) = boot(&kernel, Some(b"initial disk"), "");
        let initrd = 64 * MIB - PAGE;
        let ranges = loaded.unwrap().written_first(&memory);
        assert_eq!(ranges, std::slice::from_ref(&(initrd - FIRST_TABLES - MIB..initrd)));
    }
}

#[test]
fn kernel_that_says_that_it_clears_more_than_there_is_takes_nothing() {
    let (memory, loaded) = boot(&elf_that_clears(b"code", true, 1 << 60), None, "");
    let before = memory::resident(&memory);
    memory::take(&memory, &loaded.unwrap().written_first(&memory));
    assert_eq!(memory::resident(&memory), before);
}

#[test]
fn elf_kernel_finds_its_initrd_command_line_and_memory() {
    let (memory, entry) = boot(&elf(b"code", true), Some(b"initial disk"), "quiet panic=1");
    assert_eq!(entry.unwrap().entry, Entry::Pvh { address: MIB });
    assert_eq!(&memory.read_obj::<[u8; 4]>(GuestAddress(MIB)).unwrap(), b"code");
    assert_eq!((word(&memory, START_INFO), word(&memory, START_INFO + 4)), (0x336e_c578, 1));
    assert_eq!(
        &memory.read_obj::<[u8; 14]>(GuestAddress(long(&memory, START_INFO + 24))).unwrap(),
        b"quiet panic=1\0"
    );
    assert_eq!(long(&memory, START_INFO + 32), ACPI);
    let module = long(&memory, START_INFO + 16);
    let (base, length) = (long(&memory, module), long(&memory, module + 8));
    assert_eq!(length, 12);
    assert_eq!(&memory.read_obj::<[u8; 12]>(GuestAddress(base)).unwrap(), b"initial disk");
    assert!(base % PAGE == 0 && base + length <= 64 * MIB);
    let map = long(&memory, START_INFO + 40);
    assert_eq!(word(&memory, START_INFO + 48), 3);
    let last = map + 2 * 24;
    assert_eq!(
        (long(&memory, last), long(&memory, last + 8), word(&memory, last + 16)),
        (MIB, 63 * MIB, RAM)
    );
}

#[test]
fn elf_kernel_without_the_note_is_refused_with_what_to_do() {
    let (_, entry) = boot(&elf(b"code", false), None, "");
    assert!(entry.unwrap_err().to_string().contains("CONFIG_PVH"));
}

#[test]
fn file_that_is_no_kernel_is_refused() {
    for bytes in [&b""[..], b"\x7fELF", b"not a kernel at all", &[0; 0x300]] {
        let (_, entry) = boot(bytes, None, "");
        assert!(matches!(entry, Err(BootError::Format | BootError::Load { .. })), "{entry:?}");
    }
}

#[test]
fn kernel_larger_than_the_memory_is_refused() {
    let (_, entry) = boot(&elf(&vec![1; 65 << 20], true), None, "");
    assert!(matches!(entry, Err(BootError::Load { .. })), "{entry:?}");
}

#[test]
fn initrd_that_would_lie_on_the_kernel_is_refused() {
    let (_, entry) = boot(&elf(b"code", true), Some(&vec![1; 63 << 20]), "");
    assert!(matches!(entry, Err(BootError::TooLarge { what: "initrd", .. })), "{entry:?}");
}

#[test]
fn command_line_that_the_kernel_would_cut_is_refused() {
    let longest = "x".repeat(COMMAND_LINE_SIZE - 1);
    assert!(boot(&elf(b"code", true), None, &longest).1.is_ok());
    let refused = boot(&elf(b"code", true), None, &format!("{longest}x")).1;
    assert!(matches!(refused, Err(BootError::CommandLine { length: COMMAND_LINE_SIZE })));
    assert!(matches!(boot(&elf(b"code", true), None, "a\0b").1, Err(BootError::CommandLineZero)));
}

/// A bzImage whose setup code is one sector.
fn bz_image(version: u16, flags: u16, code: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    bytes[0x1f1] = 1;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&version.to_le_bytes());
    bytes[0x211] = 1;
    bytes[0x214..0x218].copy_from_slice(&0x10_0000u32.to_le_bytes());
    bytes[0x236..0x238].copy_from_slice(&flags.to_le_bytes());
    bytes[0x258..0x260].copy_from_slice(&(16 * MIB).to_le_bytes());
    bytes[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
    bytes.extend(code);
    bytes
}

#[test]
fn bz_image_finds_its_initrd_command_line_and_memory() {
    let (memory, entry) = boot(&bz_image(0x20f, 1, b"packed"), Some(b"initial disk"), "quiet");
    assert_eq!(entry.unwrap().entry, Entry::Linux64 { address: MIB + 0x200 });
    assert_eq!(&memory.read_obj::<[u8; 6]>(GuestAddress(MIB)).unwrap(), b"packed");
    assert_eq!(
        &memory.read_obj::<[u8; 6]>(GuestAddress(word(&memory, ZERO_PAGE + 0x228).into())).unwrap(),
        b"quiet\0"
    );
    let base = u64::from(word(&memory, ZERO_PAGE + 0x218));
    assert_eq!(word(&memory, ZERO_PAGE + 0x21c), 12);
    assert_eq!(&memory.read_obj::<[u8; 12]>(GuestAddress(base)).unwrap(), b"initial disk");
    assert_eq!(long(&memory, ZERO_PAGE + 0x70), ACPI);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(ZERO_PAGE + 0x1e8)).unwrap(), 3);
    let last = ZERO_PAGE + 0x2d0 + 2 * 20;
    assert_eq!(
        (long(&memory, last), long(&memory, last + 8), word(&memory, last + 16)),
        (MIB, 63 * MIB, RAM)
    );
    // One to one: the last page of the first GiB.
    assert_eq!(long(&memory, PAGE_TABLES + 0x2000 + 511 * 8), (511 << 21) | 0x83);
}

#[test]
fn bz_image_without_a_64_bit_entry_is_refused() {
    for (version, flags) in [(0x20f, 0), (0x206, 1)] {
        let (_, entry) = boot(&bz_image(version, flags, b"packed"), None, "");
        assert!(matches!(entry, Err(BootError::No64Bit)), "{entry:?}");
    }
}

proptest! {
    #[test]
    fn damaged_kernels_never_end_the_process(seed in any::<Vec<u8>>(), at in 0usize..240, which in any::<bool>()) {
        let mut bytes = if which { elf(b"code", true) } else { bz_image(0x20f, 1, b"packed") };
        for (to, from) in bytes.iter_mut().skip(at).zip(seed) {
            *to = from;
        }
        let _ = boot(&bytes, Some(b"disk"), "quiet").1;
    }
}

use proptest::prelude::*;

use super::*;

/// A section of a synthetic file.
pub(in crate::build) struct Section {
    pub name: &'static str,
    pub data: Vec<u8>,
}

/// An ELF file with the given program header types, each over `segment`, and the given sections.
pub(in crate::build) fn elf_with(types: &[u32], segment: &[u8], sections: &[Section]) -> Vec<u8> {
    let mut names = vec![0u8];
    let mut records = vec![[0u64; 3]];
    let segment_at = 64 + 56 * types.len();
    let mut body = segment.to_vec();
    let mut place = |name: &str, data: &[u8], names: &mut Vec<u8>, body: &mut Vec<u8>| {
        records.push([names.len() as u64, (segment_at + body.len()) as u64, data.len() as u64]);
        names.extend(name.bytes().chain([0]));
        body.extend(data);
    };
    for section in sections {
        place(section.name, &section.data, &mut names, &mut body);
    }
    let mut all = names.clone();
    all.extend(b".shstrtab\0");
    place(".shstrtab", &all, &mut names, &mut body);

    let sections_at = (segment_at + body.len()) as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(64, 0);
    file[18..20].copy_from_slice(&MACHINE_X86_64.to_le_bytes());
    file[32..40].copy_from_slice(&64u64.to_le_bytes());
    file[40..48].copy_from_slice(&sections_at.to_le_bytes());
    let counts = [56, types.len(), 64, records.len(), records.len() - 1];
    for (at, count) in (54..).step_by(2).zip(counts) {
        file[at..at + 2].copy_from_slice(&u16::try_from(count).unwrap().to_le_bytes());
    }
    for kind in types {
        let mut record = [0; 56];
        record[..4].copy_from_slice(&kind.to_le_bytes());
        record[8..16].copy_from_slice(&(segment_at as u64).to_le_bytes());
        record[32..40].copy_from_slice(&(segment.len() as u64).to_le_bytes());
        file.extend(record);
    }
    file.extend(body);
    for [name, offset, size] in records {
        let mut record = [0; 64];
        record[..4].copy_from_slice(&u32::try_from(name).unwrap().to_le_bytes());
        record[24..32].copy_from_slice(&offset.to_le_bytes());
        record[32..40].copy_from_slice(&size.to_le_bytes());
        file.extend(record);
    }
    file
}

/// A note as it stands in a segment.
fn note(name: &[u8], kind: u32, data: &[u8]) -> Vec<u8> {
    let size = |length: usize| u32::try_from(length).unwrap().to_le_bytes();
    let mut note = [size(name.len()), size(data.len()), kind.to_le_bytes()].concat();
    note.extend(name);
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend(data);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

/// A kernel that claims to have a PVH entry and says `banner`.
pub(in crate::build) fn pvh_kernel(banner: &str) -> Vec<u8> {
    let notes = [note(b"GNU\0", 3, &[1; 20]), note(b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY, &[0; 8])].concat();
    elf_with(&[1, PT_NOTE], &notes, &[Section { name: ".rodata", data: banner.into() }])
}

#[test]
fn section_is_found_by_name() {
    let file = elf_with(
        &[],
        b"",
        &[
            Section { name: ".text", data: vec![1, 2] },
            Section { name: ".modinfo", data: b"depends=".to_vec() },
        ],
    );
    let elf = Elf::parse(&file).unwrap();
    assert_eq!(elf.machine(), MACHINE_X86_64);
    assert_eq!(elf.section(".modinfo"), Some(&b"depends="[..]));
    assert_eq!(elf.section(".mod"), None);
}

#[test]
fn pvh_entry_is_found_behind_other_notes() {
    assert!(Elf::parse(&pvh_kernel("")).unwrap().has_pvh_entry());
    let other = elf_with(&[PT_NOTE], &note(b"GNU\0", XEN_ELFNOTE_PHYS32_ENTRY, &[0; 8]), &[]);
    assert!(!Elf::parse(&other).unwrap().has_pvh_entry());
}

#[test]
fn program_with_an_interpreter_is_dynamic() {
    assert!(Elf::parse(&elf_with(&[1, PT_INTERP], b"/lib/ld", &[])).unwrap().is_dynamic());
    assert!(!Elf::parse(&elf_with(&[1], b"", &[])).unwrap().is_dynamic());
}

#[test]
fn other_files_are_told_apart() {
    assert!(matches!(Elf::parse(b"#!/bin/sh"), Err(ElfError::NotElf)));
    assert!(matches!(Elf::parse(b"\x7fELF\x01\x01\x01"), Err(ElfError::NotElf64)));
    assert!(matches!(Elf::parse(b"\x7fELF\x02\x01\x01"), Err(ElfError::Truncated)));
}

/// Everything that reads the file, to see that it ends.
fn exercise(bytes: &[u8]) {
    if let Ok(elf) = Elf::parse(bytes) {
        let _ = (elf.is_dynamic(), elf.has_pvh_entry(), elf.section(".modinfo"));
    }
}

proptest! {
    #[test]
    fn damaged_file_never_panics(changes in prop::collection::vec((0usize..600, any::<u8>()), 0..12), cut in 0usize..600) {
        let mut file = pvh_kernel("Linux version 6.1.0 ");
        for (at, byte) in changes {
            if let Some(place) = file.get_mut(at) {
                *place = byte;
            }
        }
        exercise(&file);
        file.truncate(cut);
        exercise(&file);
    }
}

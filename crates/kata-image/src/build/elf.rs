//! As much of ELF (64 bits, little endian) as an image build asks: sections by name, notes, and whether a program needs an
//! interpreter. The files come from packages and from users; whatever is in them, reading ends in a value or an error.

/// `e_machine` of x86-64.
pub const MACHINE_X86_64: u16 = 62;

const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
const DT_NEEDED: u64 = 1;
/// The note that says at which address the kernel takes a PVH start (Xen's `elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Why a file is not an ELF file that we can read.
#[derive(Debug, thiserror::Error)]
pub enum ElfError {
    /// The magic is missing.
    #[error("not an ELF file")]
    NotElf,
    /// It is of 32 bits or big endian.
    #[error("an ELF file, but not one of 64 bits and little endian")]
    NotElf64,
    /// A table points out of the file.
    #[error("a truncated ELF file")]
    Truncated,
}

/// An ELF file in memory.
#[derive(Clone, Copy, Debug)]
pub struct Elf<'a> {
    bytes: &'a [u8],
    machine: u16,
    segments: Table<'a>,
    sections: Table<'a>,
    names_index: usize,
}

/// A table of equally sized records.
#[derive(Clone, Copy, Debug)]
struct Table<'a> {
    bytes: &'a [u8],
    record: usize,
}

impl<'a> Table<'a> {
    fn records(self) -> impl Iterator<Item = &'a [u8]> {
        self.bytes.chunks_exact(self.record)
    }
}

impl<'a> Elf<'a> {
    /// Reads the header and finds the tables.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, ElfError> {
        if !bytes.starts_with(b"\x7fELF") {
            return Err(ElfError::NotElf);
        }
        if bytes.get(4..6) != Some(&[2, 1]) {
            return Err(ElfError::NotElf64);
        }
        let table = |offset: u64, record: u16, count: u16, least: usize| -> Option<Table<'a>> {
            let record = usize::from(record);
            if count == 0 {
                return Some(Table { bytes: &[], record: least });
            }
            let length = u64::try_from(record.checked_mul(usize::from(count))?).ok()?;
            (record >= least).then_some(())?;
            Some(Table { bytes: slice(bytes, offset, length)?, record })
        };
        let read = || {
            Some(Self {
                bytes,
                machine: u16_at(bytes, 18)?,
                segments: table(u64_at(bytes, 32)?, u16_at(bytes, 54)?, u16_at(bytes, 56)?, 56)?,
                sections: table(u64_at(bytes, 40)?, u16_at(bytes, 58)?, u16_at(bytes, 60)?, 64)?,
                names_index: usize::from(u16_at(bytes, 62)?),
            })
        };
        read().ok_or(ElfError::Truncated)
    }

    /// The processor that it is for (`e_machine`).
    pub fn machine(&self) -> u16 {
        self.machine
    }

    /// Whether it names an interpreter, that is, cannot run without a dynamic linker.
    pub fn is_dynamic(&self) -> bool {
        self.segments.records().any(|segment| u32_at(segment, 0) == Some(PT_INTERP))
    }

    /// The dynamic linker that it names, an absolute path.
    pub fn interpreter(&self) -> Option<&'a str> {
        let segment = self.segments.records().find(|segment| u32_at(segment, 0) == Some(PT_INTERP))?;
        let bytes = slice(self.bytes, u64_at(segment, 8)?, u64_at(segment, 32)?)?;
        std::str::from_utf8(bytes.split(|&byte| byte == 0).next()?).ok()
    }

    /// The libraries that it asks the dynamic linker for, by file name.
    pub fn needed(&self) -> impl Iterator<Item = &'a str> {
        let names = self.section(".dynstr").unwrap_or_default();
        let entries = self.section(".dynamic").unwrap_or_default().chunks_exact(16);
        entries.filter(|entry| u64_at(entry, 0) == Some(DT_NEEDED)).filter_map(move |entry| {
            let start = usize::try_from(u64_at(entry, 8)?).ok()?;
            std::str::from_utf8(names.get(start..)?.split(|&byte| byte == 0).next()?).ok()
        })
    }

    /// The bytes of the section called `name`.
    pub fn section(&self, name: &str) -> Option<&'a [u8]> {
        let names = self.section_bytes(self.sections.records().nth(self.names_index)?)?;
        self.sections.records().find_map(|section| {
            let start = usize::try_from(u32_at(section, 0)?).ok()?;
            let found = names.get(start..)?.split(|&byte| byte == 0).next()?;
            (found == name.as_bytes()).then(|| self.section_bytes(section)).flatten()
        })
    }

    fn section_bytes(&self, section: &[u8]) -> Option<&'a [u8]> {
        slice(self.bytes, u64_at(section, 24)?, u64_at(section, 32)?)
    }

    /// Whether a hypervisor can enter it directly through the PVH protocol.
    pub fn has_pvh_entry(&self) -> bool {
        let segments = self.segments.records().filter(|segment| u32_at(segment, 0) == Some(PT_NOTE));
        segments
            .filter_map(|segment| slice(self.bytes, u64_at(segment, 8)?, u64_at(segment, 32)?))
            .any(|notes| Notes { rest: notes }.any(|note| note == (b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY)))
    }
}

/// Owner and type of the notes in a segment; ends at the first malformed one.
struct Notes<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Notes<'a> {
    type Item = (&'a [u8], u32);

    fn next(&mut self) -> Option<Self::Item> {
        let name_size = usize::try_from(u32_at(self.rest, 0)?).ok()?;
        let data_size = usize::try_from(u32_at(self.rest, 4)?).ok()?;
        let kind = u32_at(self.rest, 8)?;
        let name = self.rest.get(12..12usize.checked_add(name_size)?)?;
        let data_start = 12usize.checked_add(name_size.checked_next_multiple_of(4)?)?;
        let end = data_start.checked_add(data_size.checked_next_multiple_of(4)?)?;
        self.rest = self.rest.get(end..).unwrap_or_default();
        Some((name, kind))
    }
}

fn slice(bytes: &[u8], offset: u64, length: u64) -> Option<&[u8]> {
    let start = usize::try_from(offset).ok()?;
    bytes.get(start..start.checked_add(usize::try_from(length).ok()?)?)
}

/// The little-endian number of 16 bits at `offset`.
pub fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    bytes.get(offset..)?.first_chunk().map(|b| u16::from_le_bytes(*b))
}

/// The little-endian number of 32 bits at `offset`.
pub fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    bytes.get(offset..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    bytes.get(offset..)?.first_chunk().map(|b| u64::from_le_bytes(*b))
}

#[cfg(test)]
pub(super) mod tests;

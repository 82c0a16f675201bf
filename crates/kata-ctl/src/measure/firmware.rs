//! What OVMF says of itself: a table of entries with GUIDs, read from its end backwards (OvmfPkg/ResetVector).
//!
//! ```text
//!   … │ entry │ length, GUID │ entry │ length, GUID │ … │ length of all, GUID of the table │ 32 bytes │ 4 GiB
//!         └ SEV metadata: how far before the end ─▶ "ASEV", size, version, count, then (address, size, kind) each
//! ```

use super::PAGE;

/// Where firmware ends.
const END: u64 = 1 << 32;
/// Largest firmware that is read.
const LARGEST: usize = 64 << 20;
/// Bytes behind the table: the reset vector.
const BEHIND: usize = 32;
/// Bytes of an entry's length and GUID.
const TAIL: usize = 18;
/// Bytes of a section of the metadata, and of what is before the first.
const SECTION: usize = 12;
const HEAD: usize = 16;
/// Most sections that are believed.
pub(super) const SECTIONS: usize = 256;

const TABLE: [u8; 16] = guid(0x96b5_82de_1fb2_45f7_baea_a366_c55a_082d);
/// Where QEMU puts the hashes of what is booted.
const HASHES: [u8; 16] = guid(0x7255_371f_3a3b_4b04_927b_1da6_efa8_d454);
/// Where processors but the first start.
const RESET: [u8; 16] = guid(0x00f7_71de_1a7e_4fcb_890e_68c7_7e2f_b44e);
const METADATA: [u8; 16] = guid(0xdc88_6566_984a_4798_a75e_5585_a7bf_67cc);

/// A GUID as firmware stores it: its first three parts with the lowest byte first.
pub(super) const fn guid(number: u128) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = number.to_be_bytes();
    let [i, j, k, l, m, n, o, p] = rest;
    [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
}

/// Firmware that cannot be measured.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// It is not mapped in whole pages below 4 GiB.
    #[error("{size} bytes are no firmware: it has whole pages, at most {LARGEST} bytes")]
    Size {
        /// What there is.
        size: usize,
    },
    /// It is something else than OVMF.
    #[error("it has no table of OVMF's")]
    NoTable,
    /// It does not know what the machine's memory is kept with.
    #[error("its table has no {what} metadata: it is not built for {tee}")]
    NoMetadata {
        /// `SEV`, `TDX`.
        what: &'static str,
        /// `SEV-SNP`, `TDX`.
        tee: &'static str,
    },
    /// The table does not hold together.
    #[error("its table is damaged: {0}")]
    Damaged(&'static str),
    /// A section that this program does not know: what QEMU would do with it is not known.
    #[error("its metadata has a section of kind {0:#x}, which is not known")]
    Kind(u32),
}

/// What the hardware or QEMU puts into a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Zeroes.
    Memory,
    /// What the hardware's firmware tells the guest.
    Secrets,
    /// What CPUID answers.
    Cpuid,
    /// Hashes of what is booted.
    Hashes,
}

/// Memory that is there before the guest starts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Section {
    pub(super) address: u32,
    pub(super) size: u32,
    pub(super) kind: Kind,
}

/// The table of an image that can be firmware.
pub(super) fn checked(bytes: &[u8]) -> Result<Table<'_>, FirmwareError> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(PAGE) || bytes.len() > LARGEST {
        return Err(FirmwareError::Size { size: bytes.len() });
    }
    Table::of(bytes).ok_or(FirmwareError::NoTable)
}

/// OVMF, taken apart as far as SEV-SNP goes.
#[derive(Debug)]
pub struct Firmware {
    bytes: Vec<u8>,
    hashes: Option<u32>,
    reset: Option<u32>,
    sections: Vec<Section>,
}

impl Firmware {
    /// Takes firmware apart.
    ///
    /// # Errors
    /// [`FirmwareError`].
    pub fn parse(bytes: Vec<u8>) -> Result<Self, FirmwareError> {
        let table = checked(&bytes)?;
        let number = |guid| table.entry(guid).map(|entry| entry.and_then(|entry| u32_at(entry, 0)));
        let (hashes, reset) =
            (number(HASHES)?.filter(|place| *place != 0), number(RESET)?.filter(|start| *start != 0));
        let back = number(METADATA)?.ok_or(FirmwareError::NoMetadata { what: "SEV", tee: "SEV-SNP" })?;
        let sections = sections(&bytes, back)?;
        Ok(Self { hashes, reset, sections, bytes })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where its first byte is.
    pub(super) fn address(&self) -> u64 {
        END - self.bytes.len() as u64
    }

    /// Where hashes of what is booted are.
    pub(super) fn hashes(&self) -> Option<u32> {
        self.hashes
    }

    /// Where processors but the first start.
    pub(super) fn reset(&self) -> Option<u32> {
        self.reset
    }

    pub(super) fn sections(&self) -> &[Section] {
        &self.sections
    }
}

/// The entries, without the table's own.
pub(super) struct Table<'a>(&'a [u8]);

impl<'a> Table<'a> {
    fn of(firmware: &'a [u8]) -> Option<Self> {
        let upto = firmware.get(..firmware.len().checked_sub(BEHIND)?)?;
        let (rest, length, guid) = last(upto)?;
        if guid != TABLE {
            return None;
        }
        let start = rest.len().checked_sub(length.checked_sub(TAIL)?)?;
        rest.get(start..).map(Self)
    }

    /// What the entry with this GUID holds.
    pub(super) fn entry(&self, wanted: [u8; 16]) -> Result<Option<&'a [u8]>, FirmwareError> {
        let damaged =
            FirmwareError::Damaged("an entry is longer than what is left of it, or shorter than its own end");
        let mut left = self.0;
        while !left.is_empty() {
            let found = last(left).and_then(|(rest, length, guid)| {
                let start = rest.len().checked_sub(length.checked_sub(TAIL)?)?;
                Some((rest.get(..start)?, rest.get(start..)?, guid))
            });
            let Some((before, data, guid)) = found else { return Err(damaged) };
            if guid == wanted {
                return Ok(Some(data));
            }
            left = before;
        }
        Ok(None)
    }
}

/// The last entry's length and GUID, and what is before them.
fn last(bytes: &[u8]) -> Option<(&[u8], usize, [u8; 16])> {
    let (rest, guid) = bytes.split_last_chunk::<16>()?;
    let (rest, length) = rest.split_last_chunk::<2>()?;
    Some((rest, usize::from(u16::from_le_bytes(*length)), *guid))
}

/// The metadata that begins so many bytes before the end.
fn sections(firmware: &[u8], back: u32) -> Result<Vec<Section>, FirmwareError> {
    let damaged = FirmwareError::Damaged;
    let metadata = from_end(firmware, back)?;
    let number = |at| u32_at(metadata, at).ok_or_else(|| damaged("its metadata ends too early"));
    if metadata.get(..4) != Some(b"ASEV") || number(8)? != 1 {
        return Err(damaged("its metadata is not of the one version that is known"));
    }
    let count = number(12)? as usize;
    if count > SECTIONS {
        return Err(damaged("its metadata has too many sections"));
    }
    let section = |index: usize| {
        let at = HEAD + index * SECTION;
        let kind = match number(at + 8)? {
            // What a module of the guest's own calls for is zeroes, too.
            1 | 4 => Kind::Memory,
            2 => Kind::Secrets,
            3 => Kind::Cpuid,
            0x10 => Kind::Hashes,
            other => return Err(FirmwareError::Kind(other)),
        };
        Ok(Section { address: number(at)?, size: number(at + 4)?, kind })
    };
    (0..count).map(section).collect()
}

/// What begins so many bytes before the end.
pub(super) fn from_end(firmware: &[u8], back: u32) -> Result<&[u8], FirmwareError> {
    let start = firmware.len().checked_sub(back as usize);
    start
        .and_then(|start| firmware.get(start..))
        .ok_or(FirmwareError::Damaged("its metadata is before its beginning"))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

//! What TDX measures before the guest runs: its firmware, as the metadata in it has it put into memory.
//!
//! ```text
//!   section ─▶ page ─┬─▶ MEM.PAGE.ADD, address                                  ─▶ MRTD, 48 bytes
//!   section ─▶ page ─┤
//!   …                └─▶ MR.EXTEND, address, 256 bytes: 16 times, if the section is one that is measured
//! ```
//!
//! Intel TDX Module Base Architecture Specification, "Build-Time Measurement Register (MRTD)"; TDX Virtual Firmware Design Guide,
//! "TDVF Metadata". Pages are in the order in which QEMU and KVM add them: each is measured as soon as it is there.

use sha2::{Digest as _, Sha384};

use super::firmware::{FirmwareError, SECTIONS, checked, from_end, guid, u32_at};
use super::{PAGE, SIZE};

/// How far before the end the metadata is.
const METADATA: [u8; 16] = guid(0xe47a_6535_984a_4798_865e_4685_a7bf_8ec2);
const HEAD: usize = 16;
const SECTION: usize = 32;
/// Bytes that are measured at once.
const CHUNK: usize = 256;
/// Most memory that a section is believed to have.
const LARGEST: usize = 64 << 20;

/// Kinds of sections: firmware's code, its variables, what memory the machine has, zeroes.
const BFV: u32 = 0;
const CFV: u32 = 1;
const TD_HOB: u32 = 2;
const TEMP_MEM: u32 = 3;

/// Memory that is there before the guest starts.
#[derive(Debug)]
struct Section<'a> {
    address: u64,
    size: usize,
    /// Its contents are measured, not only its place.
    measured: bool,
    /// Of the firmware; none where it is zeroes.
    bytes: &'a [u8],
}

impl Section<'_> {
    fn contents(&self, at: usize) -> [u8; CHUNK] {
        self.bytes.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; CHUNK])
    }
}

/// MRTD of a machine with this firmware.
///
/// # Errors
/// [`FirmwareError`].
pub fn mrtd(firmware: &[u8]) -> Result<[u8; SIZE], FirmwareError> {
    let mut hash = Sha384::new();
    for section in sections(firmware)? {
        for page in (0..section.size).step_by(PAGE) {
            hash.update(head(b"MEM.PAGE.ADD", section.address + page as u64));
            if section.measured {
                for chunk in (page..).step_by(CHUNK).take(PAGE / CHUNK) {
                    hash.update(head(b"MR.EXTEND", section.address + chunk as u64));
                    hash.update(section.contents(chunk));
                }
            }
        }
    }
    Ok(hash.finalize().into())
}

/// What stands before contents: what is done, and where.
fn head(what: &[u8], address: u64) -> [u8; 128] {
    let mut head = [0; 128];
    let (name, rest) = head.split_at_mut(16);
    name.iter_mut().zip(what).for_each(|(to, from)| *to = *from);
    rest.iter_mut().zip(address.to_le_bytes()).for_each(|(to, from)| *to = from);
    head
}

fn sections(firmware: &[u8]) -> Result<Vec<Section<'_>>, FirmwareError> {
    let damaged = FirmwareError::Damaged;
    let entry = checked(firmware)?.entry(METADATA)?;
    let back = entry
        .and_then(|entry| u32_at(entry, 0))
        .ok_or(FirmwareError::NoMetadata { what: "TDX", tee: "TDX" })?;
    let metadata = from_end(firmware, back)?;
    let number = |at| u32_at(metadata, at).ok_or_else(|| damaged("its metadata ends too early"));
    if metadata.get(..4) != Some(b"TDVF") || number(8)? != 1 {
        return Err(damaged("its metadata is not of the one version that is known"));
    }
    let (length, count) = (number(4)? as usize, number(12)? as usize);
    if count > SECTIONS || HEAD + count * SECTION != length {
        return Err(damaged("its metadata has another length than its sections, or too many of them"));
    }
    let table = metadata.get(HEAD..length).ok_or_else(|| damaged("its metadata ends too early"))?;
    table.as_chunks::<SECTION>().0.iter().map(|entry| section(firmware, entry)).collect()
}

/// One section, held to what QEMU holds it to, and to what can be told without the machine.
fn section<'a>(firmware: &'a [u8], entry: &[u8; SECTION]) -> Result<Section<'a>, FirmwareError> {
    let word = |at| u32_at(entry, at).unwrap_or_default();
    let long = |at| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
    let (offset, length, address, measured) =
        (word(0) as usize, word(4) as usize, long(8), word(28) & 1 != 0);
    let size = usize::try_from(long(16)).ok().filter(|size| *size <= LARGEST && size.is_multiple_of(PAGE));
    let size = size
        .filter(|size| address.is_multiple_of(PAGE as u64) && address.checked_add(*size as u64).is_some());
    let damaged = |what| Err(FirmwareError::Damaged(what));
    let Some(size) = size else {
        return damaged("a section of its metadata is not made of whole pages, or of too many");
    };
    match word(24) {
        // Code and variables. With more memory than bytes, QEMU would take what is behind them in the file.
        BFV | CFV if length != size || length == 0 => {
            return damaged("a section of its metadata has not as many bytes as memory");
        }
        TD_HOB | TEMP_MEM if length != 0 => {
            return damaged("a section of its metadata has bytes that it must not have");
        }
        TD_HOB if measured => {
            return damaged("it has the list of the machine's memory measured, which only the machine knows");
        }
        BFV | CFV | TD_HOB | TEMP_MEM => {}
        other => return Err(FirmwareError::Kind(other)),
    }
    match firmware.get(offset..).and_then(|rest| rest.get(..length)) {
        Some(bytes) => Ok(Section { address, size, measured, bytes }),
        None => damaged("a section of its metadata is not within it"),
    }
}

#[cfg(test)]
mod tests;

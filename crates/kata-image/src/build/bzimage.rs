//! The ELF kernel inside a bzImage.
//!
//! A distribution ships a boot sector, a set-up program and a decompressor around the kernel. A hypervisor that enters the
//! kernel directly (PVH) wants the ELF file, and booting it saves the guest the decompression. Where the payload is tells
//! the header of the x86 boot protocol (kernel documentation, `arch/x86/boot.rst`, from version 2.08 on).

use std::io::{self, Read};

use super::elf::{u16_at, u32_at};

/// No kernel is this large; what claims to be is broken or a trap.
const MAX_KERNEL: u64 = 512 << 20;
/// Blocks of the LZ4 legacy format decompress to this at most.
const LZ4_BLOCK: usize = 8 << 20;

/// Why no kernel comes out of a bzImage.
#[derive(Debug, thiserror::Error)]
pub enum BzImageError {
    /// The boot protocol's signature is missing.
    #[error("not a bzImage")]
    NotBzImage,
    /// The header has no payload fields.
    #[error("boot protocol {}.{:02} has no payload fields (2.08 is the first that has)", version >> 8, version & 0xff)]
    TooOld {
        /// The version in the header.
        version: u16,
    },
    /// The payload is not within the file.
    #[error("the payload lies outside of the file: it is truncated")]
    Truncated,
    /// A compression that this project does not unpack.
    #[error("the payload is packed in an unsupported way (it begins with {magic:02x?})")]
    Compression {
        /// Its first bytes.
        magic: Vec<u8>,
    },
    /// The payload does not unpack.
    #[error("the {format} payload does not unpack")]
    Corrupt {
        /// How it is packed.
        format: &'static str,
        /// What the decompressor says.
        #[source]
        source: io::Error,
    },
}

/// A kernel taken out of a bzImage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unpacked {
    /// The release, as `uname -r` prints it; empty if the header does not tell.
    pub release: String,
    /// The ELF file.
    pub vmlinux: Vec<u8>,
}

/// Whether `bytes` have the signature of the x86 boot protocol.
pub fn is_bzimage(bytes: &[u8]) -> bool {
    bytes.get(0x202..).is_some_and(|header| header.starts_with(b"HdrS"))
}

/// Takes the kernel out of a bzImage.
pub fn unpack(image: &[u8]) -> Result<Unpacked, BzImageError> {
    if !is_bzimage(image) {
        return Err(BzImageError::NotBzImage);
    }
    let version = u16_at(image, 0x206).ok_or(BzImageError::Truncated)?;
    if version < 0x208 {
        return Err(BzImageError::TooOld { version });
    }
    let payload = payload(image).ok_or(BzImageError::Truncated)?;
    Ok(Unpacked { release: release(image).unwrap_or_default(), vmlinux: decompress(payload)? })
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let sectors = match *image.get(0x1f1)? {
        0 => 4, // as the protocol has it, for kernels older than the field
        sectors => usize::from(sectors),
    };
    let offset = usize::try_from(u32_at(image, 0x248)?).ok()?;
    let length = usize::try_from(u32_at(image, 0x24c)?).ok()?;
    let start = ((sectors + 1) * 512).checked_add(offset)?;
    image.get(start..start.checked_add(length)?)
}

fn release(image: &[u8]) -> Option<String> {
    let start = usize::from(u16_at(image, 0x20e)?).checked_add(0x200)?;
    let text = image.get(start..)?.split(|&byte| byte == 0 || byte == b' ').next()?;
    (text.len() < 65).then(|| String::from_utf8(text.to_vec()).ok())?
}

fn decompress(payload: &[u8]) -> Result<Vec<u8>, BzImageError> {
    // Formats that do not end with the unpacked size get it appended, in four bytes that are not part of the stream.
    let sized = payload.get(..payload.len().saturating_sub(4)).unwrap_or_default();
    let (format, result) = match payload {
        [0x7f, b'E', b'L', b'F', ..] => return Ok(payload.to_vec()),
        [0x1f, 0x8b, ..] => ("gzip", read_all(flate2::read::GzDecoder::new(payload))),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => ("xz", read_all(xz2::read::XzDecoder::new(sized))),
        [0x02, 0x21, 0x4c, 0x18, blocks @ ..] => {
            ("LZ4", lz4_legacy(blocks.get(..blocks.len().saturating_sub(4)).unwrap_or_default()))
        }
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", unzstd(sized)),
        other => return Err(BzImageError::Compression { magic: other.iter().take(6).copied().collect() }),
    };
    result.map_err(|source| BzImageError::Corrupt { format, source })
}

fn read_all(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    match reader.take(MAX_KERNEL + 1).read_to_end(&mut data) {
        Ok(_) if data.len() as u64 > MAX_KERNEL => Err(io::ErrorKind::FileTooLarge.into()),
        Ok(_) => Ok(data),
        Err(error) => Err(error),
    }
}

/// Unpacks a Zstandard stream.
pub(super) fn unzstd(stream: &[u8]) -> io::Result<Vec<u8>> {
    read_all(ruzstd::decoding::StreamingDecoder::new(stream).map_err(io::Error::other)?)
}

/// Unpacks an xz stream.
pub(super) fn unxz(stream: &[u8]) -> io::Result<Vec<u8>> {
    read_all(xz2::read::XzDecoder::new(stream))
}

/// Blocks, each after its length in four bytes, until the end.
fn lz4_legacy(mut blocks: &[u8]) -> io::Result<Vec<u8>> {
    let mut data = Vec::new();
    while let Some((length, rest)) = blocks.split_first_chunk::<4>() {
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(io::Error::other)?;
        let (block, rest) = rest.split_at_checked(length).ok_or(io::ErrorKind::UnexpectedEof)?;
        data.extend(lz4_flex::block::decompress(block, LZ4_BLOCK).map_err(io::Error::other)?);
        if data.len() as u64 > MAX_KERNEL {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        blocks = rest;
    }
    Ok(data)
}

#[cfg(test)]
pub(super) mod tests;

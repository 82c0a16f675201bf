use std::io::Write;

use proptest::prelude::*;

use super::*;

/// A bzImage around `payload`, with one set-up sector.
pub(in crate::build) fn bzimage(payload: &[u8]) -> Vec<u8> {
    const OFFSET: u32 = 64;
    let mut image = vec![0u8; 1024 + 64];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x20e..0x210].copy_from_slice(&0x100u16.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&OFFSET.to_le_bytes());
    image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
    let version = b"6.1.0-9-test (build@host) #1\0";
    image[0x300..0x300 + version.len()].copy_from_slice(version);
    image.extend(payload);
    image
}

/// Something that is not all the same.
fn kernel() -> Vec<u8> {
    kernel_of(1 << 16)
}

/// The same with so many words of four bytes.
fn kernel_of(words: u32) -> Vec<u8> {
    let words = (0..words).map(|i| i.wrapping_mul(2_654_435_761) >> (i % 29));
    let mut data = b"\x7fELF".to_vec();
    data.extend(words.flat_map(u32::to_le_bytes));
    data
}

/// The size that the kernel's build appends to most formats.
fn sized(mut packed: Vec<u8>, data: &[u8]) -> Vec<u8> {
    packed.extend(u32::try_from(data.len()).unwrap().to_le_bytes());
    packed
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn lz4(data: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    for block in data.chunks(LZ4_BLOCK) {
        let block = lz4_flex::block::compress(block);
        packed.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        packed.extend(block);
    }
    sized(packed, data)
}

#[track_caller]
fn assert_unpacks(payload: &[u8], wanted: &[u8]) {
    let unpacked = unpack(&bzimage(payload)).unwrap();
    assert_eq!(unpacked.release, "6.1.0-9-test");
    assert!(unpacked.vmlinux == wanted, "{} of {} bytes", unpacked.vmlinux.len(), wanted.len());
}

#[test]
fn gzip_payload_unpacks() {
    assert_unpacks(&gzip(&kernel()), &kernel());
}

#[test]
fn xz_payload_unpacks() {
    let mut encoder = xz2::write::XzEncoder::new(Vec::new(), 0);
    encoder.write_all(&kernel()).unwrap();
    assert_unpacks(&sized(encoder.finish().unwrap(), &kernel()), &kernel());
}

#[test]
fn lz4_payload_of_several_blocks_unpacks() {
    let kernel = kernel_of(5 << 19);
    assert!(kernel.len() > LZ4_BLOCK);
    assert_unpacks(&lz4(&kernel), &kernel);
}

#[test]
fn zstd_payload_unpacks() {
    let packed =
        ruzstd::encoding::compress_to_vec(kernel().as_slice(), ruzstd::encoding::CompressionLevel::Fastest);
    assert_unpacks(&sized(packed, &kernel()), &kernel());
}

#[test]
fn bare_payload_is_taken_as_it_is() {
    assert_unpacks(&kernel(), &kernel());
}

#[test]
fn unsupported_compression_is_named() {
    let error = unpack(&bzimage(b"BZh91AY&SY")).unwrap_err();
    assert!(matches!(&error, BzImageError::Compression { magic } if magic.starts_with(b"BZh")), "{error}");
}

#[test]
fn truncated_image_is_told() {
    let image = bzimage(&gzip(b"\x7fELF"));
    let cut = image.get(..image.len() - 4).unwrap();
    assert!(matches!(unpack(cut), Err(BzImageError::Truncated)));
}

#[test]
fn damaged_payload_is_told_with_its_format() {
    let mut payload = gzip(&[9; 4096]);
    payload[12] ^= 0xff;
    assert!(matches!(unpack(&bzimage(&payload)), Err(BzImageError::Corrupt { format: "gzip", .. })));
    assert!(matches!(
        unpack(&bzimage(&[2, 0x21, 0x4c, 0x18, 0xff, 0xff, 0, 0, 1, 0, 0, 0, 0])),
        Err(BzImageError::Corrupt { format: "LZ4", .. })
    ));
}

#[test]
fn header_without_payload_fields_is_too_old() {
    let mut image = bzimage(b"");
    image[0x206..0x208].copy_from_slice(&0x207u16.to_le_bytes());
    assert!(matches!(unpack(&image), Err(BzImageError::TooOld { version: 0x207 })));
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(unpack(&bytes).is_err() || is_bzimage(&bytes));
    }

    #[test]
    fn garbage_payload_never_panics(
        magic in prop::sample::select(vec![
            vec![0x1f, 0x8b], vec![0xfd, b'7', b'z', b'X', b'Z', 0], vec![2, 0x21, 0x4c, 0x18], vec![0x28, 0xb5, 0x2f, 0xfd],
        ]),
        rest in prop::collection::vec(any::<u8>(), 0..300),
        header in prop::collection::vec((0x1f1usize..0x250, any::<u8>()), 0..3),
    ) {
        let mut image = bzimage(&[magic, rest].concat());
        for (at, byte) in header {
            image[at] = byte;
        }
        let _ = unpack(&image);
    }
}

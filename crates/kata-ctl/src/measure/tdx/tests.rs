use super::super::tests::{BACK, image_of};
use super::*;

const OFFSET: u128 = 0xe47a_6535_984a_4798_865e_4685_a7bf_8ec2;

/// A section as the metadata has it: offset and length in the file, address and size in memory, kind, attributes.
type Raw = (u32, u32, u64, u64, u32, u32);

/// Sections in kind as OVMF's IntelTdx build has them, of firmware of four pages.
const SECTIONS: [Raw; 5] = [
    (0x1000, 0x3000, 0xffff_d000, 0x3000, BFV, 1),
    (0, 0x1000, 0xffff_c000, 0x1000, CFV, 0),
    (0, 0, 0x81_0000, 0x1_0000, TEMP_MEM, 0),
    (0, 0, 0x80_9000, 0x2000, TD_HOB, 0),
    (0, 0, 0x80_d000, 0x1000, TEMP_MEM, 1),
];

fn image(sections: &[Raw]) -> Vec<u8> {
    let count = u32::try_from(sections.len()).unwrap();
    let mut metadata = b"TDVF".to_vec();
    metadata.extend([16 + 32 * count, 1, count].into_iter().flat_map(u32::to_le_bytes));
    for (offset, length, address, size, kind, attributes) in sections {
        metadata.extend([offset, length].into_iter().flat_map(|word| word.to_le_bytes()));
        metadata.extend([address, size].into_iter().flat_map(|word| word.to_le_bytes()));
        metadata.extend([kind, attributes].into_iter().flat_map(|word| word.to_le_bytes()));
    }
    image_of(4, &[(BACK, OFFSET)], &metadata)
}

fn digest(sections: &[Raw]) -> String {
    kata_image::manifest::hex(&mrtd(&image(sections)).unwrap())
}

/// Computed once of the same pages by the crate igvm 0.5.0, `measurement::generate_tdx_measurement`.
const KNOWN: &str =
    "d2a1fe581417cfa2cf448e1b4a0b6e4f7477014cbc0b669af80a37239d94097027bca347e9691bcaca37e29871735fc7";

#[test]
fn mrtd_is_the_one_that_others_compute() {
    assert_eq!(digest(&SECTIONS), KNOWN);
}

#[test]
fn firmware_and_where_it_is_put_change_mrtd_and_variables_do_not() {
    let known = digest(&SECTIONS);
    let flipped = |at: usize| {
        let mut image = image(&SECTIONS);
        image[at] ^= 1;
        kata_image::manifest::hex(&mrtd(&image).unwrap())
    };
    assert_eq!(flipped(0x800), known, "variables, which the firmware measures");
    assert_ne!(flipped(0x1000), known);
    assert_ne!(flipped(0x3fff), known);
    for number in 0..SECTIONS.len() {
        let mut sections = SECTIONS;
        sections[number].2 += 0x1000;
        assert_ne!(digest(&sections), known, "address of {number}");
        sections = SECTIONS;
        if sections[number].4 == TEMP_MEM {
            sections[number].5 ^= 1;
            assert_ne!(digest(&sections), known, "measuring {number}");
        }
    }
    let mut sections = SECTIONS;
    sections.swap(2, 3);
    assert_ne!(digest(&sections), known, "the order");
}

#[test]
fn firmware_that_cannot_be_measured_says_what_it_lacks() {
    let fault = |bytes: &[u8]| mrtd(bytes).unwrap_err().to_string();
    assert_eq!(fault(&image_of(1, &[], b"")), "its table has no TDX metadata: it is not built for TDX");
    assert!(
        fault(&image_of(1, &[(u32::MAX, OFFSET)], b"")).ends_with("its metadata is before its beginning")
    );
    assert!(
        fault(&image_of(1, &[(BACK, OFFSET)], b"TDVX")).ends_with("not of the one version that is known")
    );
    let changed = |change: fn(&mut Raw)| {
        let mut sections = SECTIONS;
        change(&mut sections[0]);
        fault(&image(&sections))
    };
    assert!(changed(|section| section.4 = 9).ends_with("kind 0x9, which is not known"));
    assert!(changed(|section| section.0 = 0x2000).ends_with("is not within it"));
    assert!(changed(|section| section.1 = 0x2fff).ends_with("has not as many bytes as memory"));
    assert!(changed(|section| section.2 = 0xffff_d001).ends_with("not made of whole pages, or of too many"));
    assert!(
        changed(|section| section.2 = 0_u64.wrapping_sub(0x1000))
            .ends_with("not made of whole pages, or of too many")
    );
    assert!(changed(|section| section.3 = 1 << 40).ends_with("not made of whole pages, or of too many"));
    assert!(changed(|section| section.4 = TEMP_MEM).ends_with("has bytes that it must not have"));
    assert!(
        changed(|section| *section = (0, 0, 0, 0x1000, TD_HOB, 1)).ends_with("which only the machine knows")
    );
}

#[test]
fn whatever_firmware_holds_is_taken_or_refused() {
    let good = image(&SECTIONS);
    for at in good.len() - BACK as usize..good.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            let _ = sections(&bytes);
        }
    }
}

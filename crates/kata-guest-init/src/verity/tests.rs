use std::io::Write;

use super::*;

const BLOCK: usize = 4096;

/// An image after the format's definition, written apart from the code under test: data, superblock, tree; and its parameters.
pub(crate) fn image(data: &[u8], salt: &[u8]) -> (Vec<u8>, String) {
    let data_blocks = data.len() / BLOCK;
    let mut superblock = Vec::new();
    superblock.extend(b"verity\0\0");
    superblock.extend(1_u32.to_le_bytes());
    superblock.extend(1_u32.to_le_bytes());
    superblock.extend([7; 16]);
    superblock.extend(b"sha256");
    superblock.resize(64, 0);
    superblock.extend(4096_u32.to_le_bytes());
    superblock.extend(4096_u32.to_le_bytes());
    superblock.extend((data_blocks as u64).to_le_bytes());
    superblock.extend(u16::try_from(salt.len()).unwrap().to_le_bytes());
    superblock.extend([0; 6]);
    superblock.extend(salt);
    superblock.resize(BLOCK, 0);

    let mut levels: Vec<Vec<u8>> = Vec::new();
    let mut below = data.to_vec();
    while below.len() > BLOCK {
        let mut level = Vec::new();
        for block in below.chunks(BLOCK) {
            level.extend(Sha256::new().chain_update(salt).chain_update(block).finalize());
        }
        level.resize(level.len().next_multiple_of(BLOCK), 0);
        levels.push(level.clone());
        below = level;
    }
    let root = Sha256::new().chain_update(salt).chain_update(&below).finalize();
    let mut image = data.to_vec();
    image.extend(superblock);
    levels.iter().rev().for_each(|level| image.extend(level));
    let params = format!(
        "root_hash={},salt={},data_blocks={data_blocks},data_block_size=4096,hash_block_size=4096",
        hex(&root),
        hex(salt)
    );
    (image, params)
}

pub(crate) fn on_disk(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn check(image: &[u8], params: &str) -> Result<(), VerityError> {
    params.parse::<Params>().unwrap().check(&on_disk(image), image.len() as u64)
}

fn data(blocks: usize) -> Vec<u8> {
    (0..blocks * BLOCK).map(|at| u8::try_from(at / BLOCK % 251).unwrap()).collect()
}

#[test]
fn an_image_agrees_with_its_parameters_without_a_level_with_one_and_with_two() {
    for blocks in [1, 2, 128, 129, 300] {
        let (image, params) = image(&data(blocks), b"salt");
        check(&image, &params).unwrap();
        let params: Params = params.parse().unwrap();
        assert_eq!(params.needed(), Some(image.len() as u64), "{blocks} blocks");
    }
}

#[test]
fn the_table_names_the_disk_twice_and_ends_the_machine_at_a_changed_block() {
    let (_, text) = image(&data(3), &[0xab, 0x01]);
    let params: Params = text.parse().unwrap();
    let table = params.table("254:16");
    let root = params.root_hash();
    assert_eq!(table, format!("1 254:16 254:16 4096 4096 3 4 sha256 {root} ab01 1 restart_on_corruption"));
    assert_eq!(params.sectors(), 24);
    let (_, text) = image(&data(3), &[]);
    assert!(text.parse::<Params>().unwrap().table("1:1").contains(" - 1 restart"), "{text}");
}

#[test]
fn a_changed_tree_is_told_with_both_hashes() {
    let (mut image, params) = image(&data(3), b"salt");
    image[4 * BLOCK] ^= 1;
    let error = check(&image, &params).unwrap_err();
    assert!(matches!(error, VerityError::RootHash { .. }), "{error}");
    let expected = params.parse::<Params>().unwrap().root_hash();
    assert!(error.to_string().contains(&expected));
    let (mut image, params) = self::image(&data(1), b"salt");
    image[0] ^= 1;
    assert!(matches!(check(&image, &params).unwrap_err(), VerityError::RootHash { .. }));
}

#[test]
fn a_superblock_that_lies_is_told_with_the_field() {
    let lies: [(usize, &str); 7] = [
        (8, "version"),
        (12, "hash type"),
        (32, "algorithm"),
        (64, "data_block_size"),
        (68, "hash_block_size"),
        (72, "data_blocks"),
        (88, "salt"),
    ];
    for (offset, name) in lies {
        let (mut image, params) = image(&data(3), b"salt");
        image[3 * BLOCK + offset] ^= 0x40;
        let error = check(&image, &params).unwrap_err();
        assert!(matches!(error, VerityError::Differs { field, .. } if field == name), "{name}: {error}");
    }
}

#[test]
fn a_superblock_with_a_salt_longer_than_itself_is_none() {
    let (mut image, params) = image(&data(3), b"salt");
    image[3 * BLOCK + 80..3 * BLOCK + 82].copy_from_slice(&u16::MAX.to_le_bytes());
    assert!(matches!(check(&image, &params).unwrap_err(), VerityError::NoSuperblock { .. }));
}

#[test]
fn an_image_without_superblock_or_cut_off_is_refused() {
    let (whole, params) = image(&data(3), b"salt");
    let mut image = whole.clone();
    image[3 * BLOCK] = b'V';
    assert!(matches!(check(&image, &params).unwrap_err(), VerityError::NoSuperblock { offset: 12_288 }));
    let short = &whole[..whole.len() - 1];
    assert!(matches!(check(short, &params).unwrap_err(), VerityError::Short { needed: 20_480, .. }));
    // The host says more than it has.
    let error = params.parse::<Params>().unwrap().check(&on_disk(&whole[..BLOCK]), 1 << 40).unwrap_err();
    assert!(matches!(error, VerityError::Read { .. }), "{error}");
}

#[test]
fn parameters_that_cannot_be_are_told_with_the_field() {
    let (_, good) = image(&data(3), b"salt");
    for (change, to, words) in [
        (",data_blocks=3", "", "data_blocks is missing"),
        (",data_blocks=3", ",data_blocks=3,data_blocks=3", "data_blocks is there twice"),
        ("salt=", "pepper=", "unknown field \"pepper\""),
        ("data_blocks=3", "data_blocks", "name=value"),
        ("data_blocks=3", "data_blocks=0", "at least 1"),
        ("data_blocks=3", "data_blocks=-3", "at least 1"),
        ("data_blocks=3", "data_blocks=99999999999999999999", "at least 1"),
        ("data_blocks=3", "data_blocks=9999999999999999999", "no whole number"),
        (",data_block_size=4096", ",data_block_size=512", "no whole number"),
        ("hash_block_size=4096", "hash_block_size=8192", "power of two"),
        ("hash_block_size=4096", "hash_block_size=4095", "power of two"),
        ("root_hash=", "root_hash=00", "SHA-256"),
        ("root_hash=", "root_hash=zz", "SHA-256"),
        ("salt=", "salt=0", "hexadecimal"),
    ] {
        assert!(good.contains(change));
        let error = good.replace(change, to).parse::<Params>().unwrap_err().to_string();
        assert!(error.contains(words), "{change} → {to}: {error}");
    }
    for nothing in ["", "none", ","] {
        assert!(nothing.parse::<Params>().is_err(), "{nothing:?}");
    }
    let salt = format!("salt={}", "ab".repeat(257));
    assert!(good.replace("salt=73616c74", &salt).parse::<Params>().is_err());
}

proptest::proptest! {
    #[test]
    fn whatever_a_superblock_is_it_can_be_looked_at(bytes in proptest::collection::vec(0_u8.., SUPERBLOCK - 8)) {
        let mut block = b"verity\0\0".to_vec();
        block.extend(bytes);
        let _ = Superblock::parse(&block.try_into().unwrap());
    }
}

use std::path::Path;
use std::process::Command;

use super::*;

const SALT: [u8; HASH] = [0x5a; HASH];
const UUID: [u8; 16] = *b"\x01\x23\x45\x67\x89\xab\x4d\xef\x81\x23\x45\x67\x89\xab\xcd\xef";

/// A file of so many blocks that differ, with its hash area, and how long it is without.
fn made(path: &Path, blocks: u32) -> (Verity, usize) {
    let data: Vec<u8> = (0..blocks).flat_map(|n| n.to_le_bytes().repeat(BLOCK / 4)).collect();
    std::fs::write(path, &data).unwrap();
    let mut file = File::options().read(true).write(true).open(path).unwrap();
    (append(&mut file, &SALT, &UUID).unwrap(), data.len())
}

/// Whether `veritysetup` is there; it needs no device mapper for files.
fn veritysetup() -> Option<Command> {
    let there = Command::new("veritysetup").arg("--version").output().is_ok();
    if !there {
        eprintln!("skipped: no veritysetup (Debian package cryptsetup-bin)");
    }
    there.then(|| Command::new("veritysetup"))
}

#[test]
fn tree_is_the_one_that_veritysetup_makes() {
    if veritysetup().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // One block, one level not full and full, two levels, three.
    for blocks in [1, 2, 128, 129, 1000, 128 * 128 + 1] {
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        let (verity, data) = made(&ours, blocks);
        std::fs::write(&theirs, &std::fs::read(&ours).unwrap()[..data]).unwrap();
        let output = veritysetup()
            .unwrap()
            .arg("format")
            .args([&theirs, &theirs])
            .args(["--salt", &verity.salt, "--uuid", "01234567-89ab-4def-8123-456789abcdef"])
            .arg(format!("--hash-offset={data}"))
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(text.contains(&verity.root_hash), "{blocks} blocks: {text}");
        assert!(std::fs::read(&ours).unwrap() == std::fs::read(&theirs).unwrap(), "{blocks} blocks");
    }
}

#[test]
fn veritysetup_finds_the_file_sound_and_a_flipped_bit_not() {
    if veritysetup().is_none() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let (verity, data) = made(&path, 300);
    let sound = || {
        let mut command = veritysetup().unwrap();
        command.arg("verify").args([&path, &path]).arg(&verity.root_hash);
        command.arg(format!("--hash-offset={data}")).output().unwrap().status.success()
    };
    assert!(sound());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[200 * BLOCK] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert!(!sound());
}

#[test]
fn superblock_is_behind_the_data_and_says_what_the_parameters_say() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let (verity, data) = made(&path, 129);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(verity.data_size(), data as u64);
    // The superblock, the block on top, and two with leaves.
    assert_eq!(bytes.len(), data + 4 * BLOCK);
    let superblock = &bytes[data..];
    assert!(superblock.starts_with(b"verity\0\0\x01\0\0\0\x01\0\0\0"));
    assert_eq!(superblock[72..80], 129u64.to_le_bytes());
    assert_eq!(superblock[88..120], SALT);
    assert_eq!(verity.to_string().parse(), Ok(verity));
}

#[test]
fn file_that_is_no_whole_number_of_blocks_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for size in [0, 1, BLOCK + 1] {
        let path = dir.path().join("image");
        std::fs::write(&path, vec![0; size]).unwrap();
        let mut file = File::options().read(true).write(true).open(&path).unwrap();
        let error = append(&mut file, &SALT, &UUID).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{size}");
        assert_eq!(std::fs::metadata(&path).unwrap().len(), size as u64);
    }
}

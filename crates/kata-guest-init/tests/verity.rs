//! Images that others made, and the kernel's device-mapper where the host has one and lets us.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use kata_guest_init::dm::{CONTROL, DeviceMapper};
use kata_guest_init::verity::{Params, VerityError};

const BLOCKS: usize = 300;

/// An image with a hash tree that `veritysetup` made, and its parameters; `None` where the host has no such program.
fn image() -> Option<(tempfile::NamedTempFile, Params)> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![7; BLOCKS * 4096]).unwrap();
    let format = Command::new("veritysetup")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["format", "--salt=ab01", &format!("--hash-offset={}", BLOCKS * 4096)])
        .args([file.path(), file.path()])
        .output();
    let Ok(format) = format else {
        println!("skipped: no veritysetup on this host");
        return None;
    };
    let text = String::from_utf8(format.stdout).unwrap();
    let root = text.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap().trim();
    let params =
        format!("root_hash={root},salt=ab01,data_blocks={BLOCKS},data_block_size=4096,hash_block_size=4096");
    Some((file, params.parse().unwrap()))
}

#[test]
fn an_image_of_veritysetup_agrees_with_its_parameters_and_a_changed_one_does_not() {
    let Some((file, params)) = image() else { return };
    let size = file.as_file().metadata().unwrap().len();
    params.check(file.as_file(), size).unwrap();
    assert!(params.check(file.as_file(), size - 1).is_err(), "its size is the one that is needed");
    file.as_file().write_all_at(b"x", (BLOCKS as u64 + 1) * 4096).unwrap();
    let error = params.check(file.as_file(), size).unwrap_err();
    assert!(matches!(error, VerityError::RootHash { .. }), "{error}");
}

#[test]
fn a_device_of_the_kernels_reads_as_its_image() {
    if !Path::new(CONTROL).exists() || !rustix::process::geteuid().is_root() {
        println!("skipped: no {CONTROL} on this host, or not root");
        return;
    }
    let Some((file, params)) = image() else { return };
    let looped = Command::new("losetup").args(["--find", "--show"]).arg(file.path()).output().unwrap();
    let device = String::from_utf8(looped.stdout).unwrap().trim().to_owned();
    let number = format!("/sys/block/{}/dev", device.trim_start_matches("/dev/"));
    let number = std::fs::read_to_string(number).unwrap();
    let mapper = DeviceMapper::open().unwrap();
    // Not the machine's end here, if this fails.
    let table = params.table(number.trim()).replace(" 1 restart_on_corruption", "");
    let mapped = mapper.create("kata-guest-init-test", params.sectors(), "verity", &table).unwrap();
    let mut bytes = Vec::new();
    let read = File::open(mapped.path()).and_then(|mut file| file.read_to_end(&mut bytes));
    mapper.remove(&mapped).unwrap();
    Command::new("losetup").arg("--detach").arg(&device).status().unwrap();
    assert_eq!((read.unwrap(), bytes), (BLOCKS * 4096, vec![7; BLOCKS * 4096]));
}

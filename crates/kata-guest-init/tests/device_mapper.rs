//! The kernel's device-mapper, where the host has one and lets us.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;

use kata_guest_init::dm::{CONTROL, DeviceMapper};
use kata_guest_init::verity::Params;

/// A loop device over an image with a hash tree that `veritysetup` made, and its parameters; `None` where the host cannot.
fn image() -> Option<(tempfile::TempDir, String, Params)> {
    if !Path::new(CONTROL).exists() || !rustix::process::geteuid().is_root() {
        println!("skipped: no {CONTROL} on this host, or not root");
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    File::create(&path).unwrap().write_all(&[7; 64 * 4096]).unwrap();
    let format = Command::new("veritysetup")
        .args(["format", "--hash-offset=262144", "--salt=ab01"])
        .args([&path, &path])
        .output();
    let Ok(format) = format else {
        println!("skipped: no veritysetup on this host");
        return None;
    };
    let text = String::from_utf8(format.stdout).unwrap();
    let root = text.lines().find_map(|line| line.strip_prefix("Root hash:")).unwrap().trim();
    let params =
        format!("root_hash={root},salt=ab01,data_blocks=64,data_block_size=4096,hash_block_size=4096");
    let looped = Command::new("losetup").args(["--find", "--show"]).arg(&path).output().unwrap();
    let device = String::from_utf8(looped.stdout).unwrap().trim().to_owned();
    Some((directory, device, params.parse().unwrap()))
}

#[test]
fn a_verified_device_reads_as_its_image() {
    let Some((directory, device, params)) = image() else { return };
    let size = std::fs::metadata(directory.path().join("image")).unwrap().len();
    params.check(&File::open(&device).unwrap(), size).unwrap();
    let number =
        std::fs::read_to_string(format!("/sys/block/{}/dev", device.trim_start_matches("/dev/"))).unwrap();
    let mapper = DeviceMapper::open().unwrap();
    // Not the machine's end here, if this fails.
    let table = params.table(number.trim()).replace(" 1 restart_on_corruption", "");
    let mapped = mapper.create("kata-guest-init-test", params.sectors(), "verity", &table).unwrap();
    let mut bytes = Vec::new();
    let read = File::open(mapped.path()).and_then(|mut file| file.read_to_end(&mut bytes));
    mapper.remove(&mapped).unwrap();
    Command::new("losetup").arg("--detach").arg(&device).status().unwrap();
    assert_eq!((read.unwrap(), bytes), (64 * 4096, vec![7; 64 * 4096]));
}

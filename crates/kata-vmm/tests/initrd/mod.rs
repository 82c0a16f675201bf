//! What a guest of a test boots into: busybox and a script.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test ends at the first surprise")]

use std::fs::File;
use std::path::{Path, PathBuf};

/// Where the lab's kernel has its modules.
const MODULES: &str = "/lib/modules";
/// A busybox without libraries.
const BUSYBOX: &str = "/usr/bin/busybox";

/// What the lab boots itself from, for KVM boots kernels there and hardly anywhere else where tests run. `None` elsewhere, which is
/// said.
pub fn stock_kernel() -> Option<PathBuf> {
    if std::env::var_os("KATA_TEST_LAB").is_none() {
        eprintln!("skipped: wants the lab");
        return None;
    }
    Some(PathBuf::from("/boot/vmlinuz"))
}

/// An initial RAM disk at this path, whose init is the script, with busybox and `/modules`, which loads these drivers of the stock
/// kernel.
pub fn initrd(script: &str, drivers: &[&str], at: &Path) -> File {
    let mut archive = Vec::new();
    for directory in ["bin", "dev", "lib"] {
        entry(&mut archive, directory, 0o040_755, &[]);
    }
    let mut load = String::from("#!/bin/busybox sh\n");
    for module in modules(drivers) {
        let name = format!("lib/{}", module.file_name().unwrap().to_str().unwrap());
        load += &format!("/bin/busybox insmod /{name}\n");
        entry(&mut archive, &name, 0o100_644, &std::fs::read(module).unwrap());
    }
    entry(&mut archive, "modules", 0o100_755, load.as_bytes());
    entry(&mut archive, "bin/busybox", 0o100_755, &std::fs::read(BUSYBOX).unwrap());
    entry(&mut archive, "init", 0o100_755, script.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    std::fs::write(at, archive).unwrap();
    File::open(at).unwrap()
}

/// Files of these drivers and of what each needs, in the order in which they are loaded.
fn modules(drivers: &[&str]) -> Vec<PathBuf> {
    let version = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let directory = Path::new(MODULES).join(version.trim());
    let dependencies = std::fs::read_to_string(directory.join("modules.dep")).unwrap();
    let mut found: Vec<PathBuf> = Vec::new();
    for driver in drivers {
        let file = format!("/{driver}.ko:");
        let line = dependencies.lines().find(|line| line.contains(&file)).expect(driver);
        let all = line.split([':', ' ']).filter(|name| !name.is_empty()).map(|name| directory.join(name));
        // A line names the driver first, and last what has to be loaded first.
        for module in all.collect::<Vec<_>>().into_iter().rev() {
            if !found.contains(&module) {
                found.push(module);
            }
        }
    }
    found
}

/// An entry of a cpio archive (`newc`).
fn entry(archive: &mut Vec<u8>, name: &str, mode: usize, content: &[u8]) {
    archive.extend(b"070701");
    for field in [0, mode, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name.len() + 1, 0] {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(name.bytes().chain([0]));
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

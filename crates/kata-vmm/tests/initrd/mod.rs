//! What a guest of a test boots into: busybox and a script.

#![allow(clippy::unwrap_used, reason = "a test ends at the first surprise")]

use std::fs::File;
use std::path::{Path, PathBuf};

/// Kernel with all drivers built in, and busybox, where KVM boots kernels: in the lab (`KATA_TEST_LAB`), given
/// `KATA_TEST_TUNED_KERNEL`; `KATA_TEST_BUSYBOX` names a busybox without libraries, else `/usr/bin/busybox`. `None` otherwise, which
/// is said.
pub fn kernel_and_busybox() -> Option<(PathBuf, PathBuf)> {
    let file = |variable, otherwise: &str| {
        let path = std::env::var_os(variable).map_or_else(|| PathBuf::from(otherwise), PathBuf::from);
        path.exists().then_some(path)
    };
    let found = file("KATA_TEST_TUNED_KERNEL", "").zip(file("KATA_TEST_BUSYBOX", "/usr/bin/busybox"));
    let found = found.filter(|_| std::env::var_os("KATA_TEST_LAB").is_some());
    if found.is_none() {
        eprintln!("skipped: wants the lab, busybox, and KATA_TEST_TUNED_KERNEL");
    }
    found
}

/// An initial RAM disk at this path, whose init is the script.
pub fn initrd(busybox: &Path, script: &str, at: &Path) -> File {
    let mut archive = Vec::new();
    for directory in ["bin", "dev"] {
        entry(&mut archive, directory, 0o040_755, &[]);
    }
    entry(&mut archive, "bin/busybox", 0o100_755, &std::fs::read(busybox).unwrap());
    entry(&mut archive, "init", 0o100_755, script.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    std::fs::write(at, archive).unwrap();
    File::open(at).unwrap()
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

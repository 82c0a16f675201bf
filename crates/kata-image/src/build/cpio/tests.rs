use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::process::{Command, Stdio};

use super::*;

fn sample() -> Archive {
    let mut archive = Archive::default();
    archive.file("init", 0o755, b"program".to_vec()).unwrap();
    archive.file("/lib/modules/6.1/a.ko", 0o644, vec![7; 4097]).unwrap();
    archive.file("lib/modules/6.1/empty", 0o600, Vec::new()).unwrap();
    archive.directory("tmp", 0o1777).unwrap();
    archive.char_device("dev/null", 0o666, 1, 3).unwrap();
    archive
}

fn bytes(archive: &Archive) -> Vec<u8> {
    let mut out = Vec::new();
    archive.write(&mut out).unwrap();
    out
}

/// Feeds the archive to the `cpio` tool; none where that is not installed.
fn cpio(archive: &[u8], arguments: &[&str], dir: &std::path::Path) -> Option<String> {
    let command = Command::new("cpio")
        .args(arguments)
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match command {
        Err(error) => {
            println!("skipped: cannot run cpio: {error}");
            return None;
        }
        Ok(child) => child,
    };
    child.stdin.take().unwrap().write_all(archive).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn same_entries_in_any_order_give_the_same_bytes() {
    let mut other = Archive::default();
    other.char_device("/dev/null", 0o666, 1, 3).unwrap();
    other.directory("tmp", 0o1777).unwrap();
    other.file("lib/modules/6.1/empty", 0o600, Vec::new()).unwrap();
    other.file("lib/modules/6.1/a.ko", 0o644, vec![7; 4097]).unwrap();
    other.file("init", 0o755, b"program".to_vec()).unwrap();
    assert_eq!(bytes(&sample()), bytes(&other));
}

#[test]
fn cpio_lists_what_was_put_in() {
    let dir = tempfile::tempdir().unwrap();
    let Some(list) = cpio(&bytes(&sample()), &["--list"], dir.path()) else { return };
    let names: Vec<&str> = list.lines().collect();
    let wanted = [
        "dev",
        "dev/null",
        "init",
        "lib",
        "lib/modules",
        "lib/modules/6.1",
        "lib/modules/6.1/a.ko",
        "lib/modules/6.1/empty",
        "tmp",
    ];
    assert_eq!(names, wanted);
}

#[test]
fn cpio_extracts_contents_modes_and_devices() {
    let dir = tempfile::tempdir().unwrap();
    let root = rustix::process::geteuid().is_root();
    let mut archive = sample();
    if !root {
        println!("skipped for device nodes: not root");
        archive.entries.remove("dev/null");
    }
    if cpio(&bytes(&archive), &["--extract", "--quiet"], dir.path()).is_none() {
        return;
    }
    let at = |name: &str| std::fs::metadata(dir.path().join(name)).unwrap();
    assert_eq!(std::fs::read(dir.path().join("init")).unwrap(), b"program");
    assert_eq!(std::fs::read(dir.path().join("lib/modules/6.1/a.ko")).unwrap(), vec![7; 4097]);
    assert_eq!(at("init").mode() & 0o7777, 0o755);
    assert_eq!(at("lib/modules/6.1/empty").mode() & 0o7777, 0o600);
    assert_eq!(at("tmp").mode() & 0o7777, 0o1777);
    if root {
        assert!(at("dev/null").file_type().is_char_device());
        assert_eq!(at("dev/null").rdev(), rustix::fs::makedev(1, 3));
    }
}

#[test]
fn entry_added_twice_is_refused() {
    let mut archive = sample();
    assert!(matches!(archive.file("init", 0o755, Vec::new()), Err(CpioError::Duplicate { .. })));
}

#[test]
fn path_that_could_escape_is_refused() {
    for path in ["", "/", "a//b", "../a", "a/./b", "a/", "a\0b", TRAILER] {
        let result = Archive::default().file(path, 0o644, Vec::new());
        assert!(matches!(result, Err(CpioError::Path { .. })), "{path:?}");
    }
}

use super::super::bzimage::tests::bzimage;
use super::super::elf::tests::{elf_with, pvh_kernel};
use super::*;

#[test]
fn source_is_told_from_its_text() {
    assert_eq!("debian".parse(), Ok(KernelSource::Debian));
    assert_eq!("source".parse(), Ok(KernelSource::Source));
    assert_eq!("/boot/vmlinuz".parse(), Ok(KernelSource::File("/boot/vmlinuz".into())));
}

/// Provides the kernel in a file with the given bytes.
fn provide(bytes: &[u8]) -> (tempfile::TempDir, Result<Kernel, KernelError>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kernel-file");
    fs::write(&file, bytes).unwrap();
    let kernel = KernelSource::File(file).identify().unwrap().provide(&dir.path().join("cache"), &mut |_| {});
    (dir, kernel)
}

#[test]
fn elf_kernel_is_taken_with_the_release_of_its_banner() {
    let bytes = pvh_kernel("Linux version %s\0Linux version 6.12.9-own (me@here) #1");
    let (_dir, kernel) = provide(&bytes);
    let kernel = kernel.unwrap();
    assert_eq!(kernel.release, "6.12.9-own");
    assert_eq!(fs::read(kernel.vmlinux()).unwrap(), bytes);
    assert_eq!(kernel.plan(crate::build::modules::ON_DISK).unwrap(), Plan::default());
    assert_eq!(kernel.config().unwrap(), None);
}

#[test]
fn bzimage_is_unpacked_and_its_header_tells_the_release() {
    let bytes = pvh_kernel("");
    let (_dir, kernel) = provide(&bzimage(&bytes));
    let kernel = kernel.unwrap();
    assert_eq!(kernel.release, "6.1.0-9-test");
    assert_eq!(fs::read(kernel.vmlinux()).unwrap(), bytes);
}

#[test]
fn kernel_without_a_pvh_entry_is_refused_and_leaves_nothing_behind() {
    let (dir, kernel) = provide(&elf_with(&[1], b"", &[]));
    assert!(matches!(kernel, Err(KernelError::NoPvhEntry { .. })));
    let left: Vec<_> =
        fs::read_dir(dir.path().join("cache/kernel")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [".lock"]);
}

#[test]
fn what_a_killed_build_left_is_removed_by_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    let (file, kernels) = (dir.path().join("vmlinux"), dir.path().join("cache/kernel"));
    fs::write(&file, pvh_kernel("")).unwrap();
    fs::create_dir_all(kernels.join(".build-x/source/linux")).unwrap();
    KernelSource::File(file).identify().unwrap().provide(&dir.path().join("cache"), &mut |_| {}).unwrap();
    assert!(!kernels.join(".build-x").exists());
}

#[test]
fn build_waits_for_the_one_that_holds_the_cache() {
    let dir = tempfile::tempdir().unwrap();
    let (file, cache) = (dir.path().join("vmlinux"), dir.path().join("cache"));
    fs::write(&file, pvh_kernel("")).unwrap();
    fs::create_dir_all(cache.join("kernel")).unwrap();
    let held = lock(&cache.join("kernel"), &mut |_| {}).unwrap();
    let (say, hear) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let build = scope.spawn(|| {
            let mut report = |line: &str| say.send(line.to_owned()).unwrap();
            KernelSource::File(file).identify().unwrap().provide(&cache, &mut report)
        });
        assert!(hear.recv().unwrap().starts_with("waiting for another build"));
        drop(held);
        build.join().unwrap().unwrap();
    });
}

#[test]
fn file_that_is_no_kernel_is_named() {
    let (_dir, kernel) = provide(b"#!/bin/sh");
    let error = kernel.unwrap_err();
    assert!(matches!(error, KernelError::Elf { .. }));
    assert!(error.to_string().contains("kernel-file"), "{error}");
}

#[test]
fn missing_kernel_file_is_named() {
    let error = KernelSource::File("/nowhere/vmlinux".into()).identify().unwrap_err();
    assert!(error.to_string().contains("/nowhere/vmlinux"), "{error}");
}

//! `cargo fuzz run block`: a guest against a disk.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_vmm::virtio::block::fuzz::run(data));

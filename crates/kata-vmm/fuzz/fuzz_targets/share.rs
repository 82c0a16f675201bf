//! `cargo fuzz run share`: a guest against queues that another process serves.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_vmm::virtio::shared_fs::fuzz::run(data));

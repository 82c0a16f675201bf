//! `cargo fuzz run mem`: a guest, its owner and a device of the host against memory that comes and goes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_vmm::virtio::mem::fuzz::run(data));

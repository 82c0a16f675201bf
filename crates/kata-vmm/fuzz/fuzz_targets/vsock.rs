//! `cargo fuzz run vsock`: a guest and its clients against the socket device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_vmm::vsock::fuzz::run(data));

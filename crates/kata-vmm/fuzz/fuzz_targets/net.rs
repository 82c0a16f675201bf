//! `cargo fuzz run net`: a guest and its network against the network device.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_vmm::virtio::net::fuzz::run(data));

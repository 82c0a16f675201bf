//! `cargo fuzz run pci`: a guest and its owner against the bus, the entropy device and the balloon.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_vmm::pci::fuzz::run(data));

//! `cargo fuzz run passed`: a guest against a device of the host, honest or not.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_vmm::pci::passed::fuzz::run(data));

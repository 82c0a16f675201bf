//! `cargo fuzz run ports`: a guest against the ports that every machine has.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_vmm::machine::fuzz::run(data));

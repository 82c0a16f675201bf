//! `cargo fuzz run snapshot`: what is read from the file of a snapshot.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_vmm::snapshot::fuzz::run(data));

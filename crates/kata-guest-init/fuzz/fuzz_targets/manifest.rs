//! What a host and an extension's author write: command line, superblock, manifest. See `kata_guest_init::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_guest_init::fuzz::run(data));

//! What administrators and pods write: file, drop-in, overrides, annotations. See `kata_config::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| kata_config::fuzz::run(data));

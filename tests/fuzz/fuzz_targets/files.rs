//! See `models/files.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|steps: &[u8]| mender_connect::internals::models::files::run(steps));

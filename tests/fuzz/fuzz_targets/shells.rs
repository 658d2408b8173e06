//! See `models/shells.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(|steps: &[u8]| mender_connect::internals::models::shells::run(steps));

//! See `models/kept.rs`.

#![no_main]

libfuzzer_sys::fuzz_target!(
    // SAFETY: no other thread runs yet.
    init: unsafe { std::env::set_var("FDSTORE", "16") },
    |data: &[u8]| mender_connect::internals::models::kept::run(data)
);

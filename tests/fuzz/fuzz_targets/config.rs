//! The text of a configuration file; behind a zero byte the text of the fallback file.

#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use mender_connect::internals::{Config, Expiry, User, lookup, of_texts};

static ROOT: LazyLock<User> = LazyLock::new(|| lookup("root").expect("root is known"));

fuzz_target!(|data: &[u8]| {
    let read = |main, fallback| of_texts(main, fallback, &ROOT).map_err(|e| e.to_string());
    let config = match data.iter().position(|byte| *byte == 0) {
        Some(zero) => read(&data[..zero], &data[zero + 1..]),
        None => read(data, b"{}"),
    };
    if let Ok(config) = &config {
        check(config);
    }
    if !data.contains(&0) {
        // Nothing laid over a file changes it, and neither does the file itself.
        let over: &[u8] = if data.len().is_multiple_of(2) { b"{}" } else { data };
        assert_eq!(read(over, data), config);
    }
});

/// What the types don't say.
fn check(config: &Config) {
    assert!(config.shell != PathBuf::new());
    assert!(config.width > 0 && config.height > 0);
    assert!(config.sessions_per_user > 0);
    if let Expiry::Idle(after) | Expiry::Age(after) = config.expiry {
        assert!(after > Duration::ZERO);
    }
    assert!((1..=u64::from(u32::MAX)).contains(&config.reconnect_interval.as_secs()));
    let Some(limits) = &config.limits else { return };
    assert!(limits.umask.is_none_or(|umask| umask <= 0o777));
    let names = [&limits.owner_put, &limits.group_put];
    assert!(names.into_iter().flatten().all(|name| !name.is_empty()));
    assert!(limits.chroot.as_ref().is_none_or(|chroot| *chroot != PathBuf::new()));
}

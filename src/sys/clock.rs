//! The wall clock.

use std::time::Duration;

/// The time since 1970, UTC. To be used instead of `SystemTime::now`, which panics from 2038 on 32-bit musl.
#[cfg(not(all(target_env = "musl", target_pointer_width = "32")))]
#[allow(clippy::disallowed_methods, reason = "the standard library knows the way everywhere else")]
pub(crate) fn now() -> Duration {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}

/// As above: the standard library's `time_t` has 32 bits here, ours has 64 (see `.cargo/config.toml`).
#[cfg(all(target_env = "musl", target_pointer_width = "32"))]
pub(crate) fn now() -> Duration {
    let Ok(now) = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME) else { return Duration::ZERO };
    // A clock may stand before 1970.
    u64::try_from(now.tv_sec()).map_or(Duration::ZERO, |_| now.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::disallowed_methods, reason = "the comparison")]
    fn it_is_the_system_time() {
        let system = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        assert!(now().abs_diff(system) < Duration::from_secs(10));
    }

    #[test]
    #[cfg(all(target_env = "musl", target_pointer_width = "32"))]
    fn seconds_have_64_bits() {
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).unwrap();
        assert_eq!(size_of_val(&now.tv_sec()), 8);
    }
}

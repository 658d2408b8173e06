//! How long to wait before the next attempt to connect. Pure.
//!
//! Full jitter: a fleet that lost its server together comes back spread out.

use std::time::Duration;

/// No wait is longer.
pub(crate) const LONGEST: Duration = Duration::from_secs(300);

/// A link that held this long was a success: the next wait starts from the base again.
pub(crate) const STABLE_AFTER: Duration = Duration::from_secs(60);

/// The wait before attempt number `attempt` (0 is the first after a drop): uniform between nothing and
/// `base` doubled as many times, at most `LONGEST`. `random` is a uniform 64-bit number.
pub fn delay(attempt: u32, base: Duration, random: u64) -> Duration {
    let factor = 1_u32.checked_shl(attempt).unwrap_or(u32::MAX);
    let ceiling = base.saturating_mul(factor).min(LONGEST);
    let nanos = u64::try_from(ceiling.as_nanos()).unwrap_or(u64::MAX);
    // The upper half of the product is uniform in 0..nanos.
    Duration::from_nanos(((u128::from(random) * u128::from(nanos)) >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_secs(5);

    #[test]
    fn doubles_up_to_the_longest() {
        let ceiling = |attempt| delay(attempt, BASE, u64::MAX).as_secs_f64();
        for (attempt, seconds) in [(0, 5.0), (1, 10.0), (2, 20.0), (5, 160.0), (6, 300.0), (31, 300.0)] {
            assert!((ceiling(attempt) - seconds).abs() < 0.001, "attempt {attempt}: {}", ceiling(attempt));
        }
        for attempt in [32, 33, 1000, u32::MAX] {
            assert!((ceiling(attempt) - 300.0).abs() < 0.001);
        }
    }

    #[test]
    fn is_uniform() {
        assert_eq!(delay(3, BASE, 0), Duration::ZERO);
        let middle = delay(3, BASE, 1 << 63);
        assert_eq!(middle, Duration::from_secs(20));
    }
}

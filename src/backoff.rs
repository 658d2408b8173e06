//! How long to wait before the next attempt to connect. Pure.
//!
//! Full jitter: a fleet that lost its server together comes back spread out. The waits grow with the outage, so that a
//! device is back in about the time that it was away for. A server that answers with a refusal is there and has too
//! much to do: each refusal doubles the shortest limit.

use std::time::Duration;

/// No wait is longer.
pub(crate) const LONGEST: Duration = Duration::from_secs(300);

/// A link that held this long was a success: the next wait starts from the base again.
pub(crate) const STABLE_AFTER: Duration = Duration::from_secs(60);

/// The wait before the next attempt, `outage` after the link was lost: uniform between nothing and the longer of
/// `outage` and `base` doubled `doublings` times, at most `LONGEST`. `random` is a uniform 64-bit number.
pub fn delay(doublings: u32, outage: Duration, base: Duration, random: u64) -> Duration {
    let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
    spread(base.saturating_mul(factor).max(outage).min(LONGEST), random)
}

/// The doublings after an attempt that failed. One for all those that nobody answered, since with none at all a fleet
/// would come back from a short outage faster than its server takes it.
pub fn doublings(before: u32, refused: bool) -> u32 {
    if refused { before.saturating_add(1) } else { before.max(1) }
}

/// Uniform between nothing and `ceiling`.
pub(crate) fn spread(ceiling: Duration, random: u64) -> Duration {
    let nanos = u64::try_from(ceiling.as_nanos()).unwrap_or(u64::MAX);
    // The upper half of the product is uniform in 0..nanos.
    Duration::from_nanos(((u128::from(random) * u128::from(nanos)) >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_secs(5);

    fn ceiling(doublings: u32, outage: u64) -> f64 {
        delay(doublings, Duration::from_secs(outage), BASE, u64::MAX).as_secs_f64()
    }

    #[test]
    fn doubles_up_to_the_longest() {
        for (doublings, seconds) in [(0, 5.0), (1, 10.0), (2, 20.0), (5, 160.0), (6, 300.0), (31, 300.0)] {
            let ceiling = ceiling(doublings, 0);
            assert!((ceiling - seconds).abs() < 0.001, "{doublings} doublings: {ceiling}");
        }
        for doublings in [32, 33, 1000, u32::MAX] {
            assert!((ceiling(doublings, 0) - 300.0).abs() < 0.001);
        }
    }

    #[test]
    fn follows_the_outage() {
        for (outage, seconds) in [(1, 10.0), (35, 35.0), (299, 299.0), (86400, 300.0), (u64::MAX, 300.0)] {
            assert!((ceiling(1, outage) - seconds).abs() < 0.001, "after {outage} s");
        }
        assert!((ceiling(4, 35) - 80.0).abs() < 0.001, "the server's refusals count more");
        assert_eq!([doublings(0, false), doublings(1, false), doublings(4, false)], [1, 1, 4]);
        assert_eq!([doublings(0, true), doublings(4, true), doublings(u32::MAX, true)], [1, 5, u32::MAX]);
    }

    #[test]
    fn is_uniform() {
        assert_eq!(delay(3, Duration::ZERO, BASE, 0), Duration::ZERO);
        let middle = delay(3, Duration::ZERO, BASE, 1 << 63);
        assert_eq!(middle, Duration::from_secs(20));
    }
}

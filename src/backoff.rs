//! Waits between attempts to connect.
//!
//! The first wait has full jitter: a fleet that lost its server at once returns spread out. Later waits have equal
//! jitter, which spreads the devices evenly over the time after the outage, and grow with the outage, so that a device
//! is back within about the time that it was away. A refusal means an overloaded server: each one doubles the lower
//! limit. `tests/bench/fleet` found the factors.

use std::time::Duration;

pub(crate) const LONGEST: Duration = Duration::from_secs(290);

/// A link that lasted this long resets the back-off.
pub(crate) const STABLE_AFTER: Duration = Duration::from_secs(60);

/// The wait before the next attempt, `outage` after the link was lost. `failures` counts losses and refusals, and all
/// unanswered attempts together as one. `random` is uniform.
pub fn wait(failures: &mut u32, unanswered: bool, outage: Duration, base: Duration, random: u64) -> Duration {
    let before = *failures;
    *failures = if unanswered { before.max(1) } else { before.saturating_add(1) };
    let Some(doublings) = before.checked_sub(1) else { return spread(base.min(LONGEST), random) };
    let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
    let least = (base.saturating_mul(17) / 10).saturating_mul(factor);
    let followed = if unanswered { outage.saturating_mul(9) / 5 } else { outage };
    let limit = least.max(followed).min(LONGEST);
    limit / 2 + spread(limit / 2, random)
}

/// Uniform in 0..ceiling.
pub(crate) fn spread(ceiling: Duration, random: u64) -> Duration {
    let nanos = u64::try_from(ceiling.as_nanos()).unwrap_or(u64::MAX);
    // The upper half of the product is uniform in 0..nanos.
    Duration::from_nanos(((u128::from(random) * u128::from(nanos)) >> 64) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Duration = Duration::from_secs(5);

    fn longest(mut failures: u32, unanswered: bool, outage: u64) -> f64 {
        wait(&mut failures, unanswered, Duration::from_secs(outage), BASE, u64::MAX).as_secs_f64()
    }

    #[test]
    fn doubles_up_to_the_longest() {
        for (failures, seconds) in [(0, 5.0), (1, 8.5), (2, 17.0), (6, 272.0), (7, 290.0), (32, 290.0)] {
            let longest = longest(failures, false, 0);
            assert!((longest - seconds).abs() < 0.001, "{failures} failures: {longest}");
        }
        for failures in [33, 34, 1000, u32::MAX] {
            assert!((longest(failures, false, 0) - 290.0).abs() < 0.001);
        }
    }

    #[test]
    fn follows_the_outage() {
        for (outage, seconds) in [(1, 8.5), (35, 63.0), (161, 289.8), (86400, 290.0), (u64::MAX, 290.0)] {
            assert!((longest(1, true, outage) - seconds).abs() < 0.001, "after {outage} s");
        }
        assert!((longest(1, false, 35) - 35.0).abs() < 0.001, "a server that refuses is there");
        assert!((longest(4, true, 35) - 68.0).abs() < 0.001, "the server's refusals count more");
        let after = |mut failures, unanswered| {
            wait(&mut failures, unanswered, Duration::ZERO, BASE, 0);
            failures
        };
        assert_eq!([after(0, true), after(1, true), after(4, true)], [1, 1, 4]);
        assert_eq!([after(0, false), after(4, false), after(u32::MAX, false)], [1, 5, u32::MAX]);
    }

    #[test]
    fn is_uniform() {
        let waits = |failures: u32| {
            [0, 1 << 63].map(|random| wait(&mut { failures }, false, Duration::ZERO, BASE, random))
        };
        assert_eq!(waits(0), [Duration::ZERO, Duration::from_millis(2500)]);
        assert_eq!(waits(3), [Duration::from_secs(17), Duration::from_millis(25500)]);
    }
}

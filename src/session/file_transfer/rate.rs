//! Bytes transferred by all sessions: totals and a recent rate.
//!
//! The rate is upstream's, since its limits are configured by it: every 5 s the bytes of those 5 s enter an exponential
//! moving average over a minute. It is computed on demand.

use std::num::NonZeroU64;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::sys::lock;

const TICK: Duration = Duration::from_secs(5);

/// For both directions, as upstream has it.
pub(super) const EXHAUSTED: &str = "transmitted bytes limit exhausted";

/// 1 - exp(-5 / 60): the weight of the newest five seconds.
pub(crate) const WEIGHT: f64 = 0.079_955_585_370_676_71;

#[derive(Default)]
pub(crate) struct Counters(Mutex<[Counter; 2]>);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Sent,
    Received,
}

impl Direction {
    pub(crate) fn name(self) -> &'static str {
        if self == Direction::Sent { "download" } else { "upload" }
    }
}

#[derive(Default, Clone, Copy)]
pub(crate) struct Counter {
    pub(crate) total: u64,
    /// Bytes in five seconds.
    pub(crate) average: f64,
    /// The end of the last tick. The first tick begins when the counter is first used.
    ticked: Option<Instant>,
    /// Bytes since `ticked`.
    fresh: u64,
}

impl Counter {
    fn advance(&mut self, now: Instant) {
        let ticked = *self.ticked.get_or_insert(now);
        let ticks = now.saturating_duration_since(ticked).as_secs() / TICK.as_secs();
        if ticks > 0 {
            let keep = 1.0 - WEIGHT;
            // Later ticks had no bytes.
            let silence = keep.powi(i32::try_from(ticks - 1).unwrap_or(i32::MAX));
            self.average = (WEIGHT * self.fresh as f64 + keep * self.average) * silence;
            self.fresh = 0;
            self.ticked = ticked.checked_add(TICK.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX)));
        }
    }
}

impl Counters {
    pub(crate) fn add(&self, direction: Direction, bytes: u64, now: Instant) {
        self.with(direction, now, |counter| {
            counter.total = counter.total.saturating_add(bytes);
            counter.fresh = counter.fresh.saturating_add(bytes);
        });
    }

    /// Sent and received.
    pub(crate) fn figures(&self, now: Instant) -> [Counter; 2] {
        [Direction::Sent, Direction::Received].map(|direction| self.with(direction, now, |counter| *counter))
    }

    /// `limit` is in bytes in five seconds, as upstream applies it.
    pub(crate) fn exhausted(&self, direction: Direction, limit: Option<NonZeroU64>, now: Instant) -> bool {
        limit.is_some_and(|limit| self.with(direction, now, |counter| counter.average) >= limit.get() as f64)
    }

    fn with<T>(&self, direction: Direction, now: Instant, f: impl FnOnce(&mut Counter) -> T) -> T {
        let mut counters = lock(&self.0);
        let counter = &mut counters[direction as usize];
        counter.advance(now);
        f(counter)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Direction::{Received, Sent};

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn averages_as_upstream_does() {
        let start = Instant::now();
        let counters = Counters::default();
        counters.add(Received, 0, start);
        // The acceptance test of upstream: twice 512 KiB, limit 16 KiB.
        counters.add(Received, 512 << 10, start + seconds(1));
        counters.add(Received, 512 << 10, start + seconds(2));
        let limit = NonZeroU64::new(16 << 10);
        let exhausted = |after| counters.exhausted(Received, limit, start + seconds(after));
        assert!(!exhausted(4), "the first tick isn't over");
        assert!(exhausted(5) && exhausted(62));
        assert!(!exhausted(126));
        assert_eq!(counters.figures(start + seconds(126))[Received as usize].total, 1 << 20);
        assert_eq!(counters.figures(start + seconds(126))[Sent as usize].total, 0);
    }

    #[test]
    fn a_steady_rate_is_seen_as_bytes_in_five_seconds() {
        let mut now = Instant::now();
        let counters = Counters::default();
        for _ in 0..600 {
            counters.add(Sent, 1000, now);
            now += seconds(1);
        }
        let average = counters.figures(now)[Sent as usize].average;
        assert!((average - 5000.0).abs() < 50.0, "{average}");
        // Looking often or rarely makes no difference, and a long silence ends it.
        assert!(counters.figures(now + seconds(7 * 24 * 3600))[Sent as usize].average < 1e-6);
    }
}

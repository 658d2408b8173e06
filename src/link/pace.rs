//! The window: how many bytes may be on the way to the server. Pure.
//!
//! Data that a slow connection hasn't carried yet waits in modems, in the kernel and in mender-auth's forwarder, and an
//! echo waits behind it. So the writer keeps only as many bytes on the way as keep the connection busy. A ping between
//! messages is a probe: its pong proves that everything before it has arrived, and how long that took. A server that
//! answers no pings gets everything as fast as it takes it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::outbox::{Probe, Sendable};

const SMALLEST_WINDOW: u64 = 8 * 1024;
const FIRST_WINDOW: u64 = 32 * 1024;
const LARGEST_WINDOW: u64 = 4 * 1024 * 1024;
/// Bulk messages in a window: an echo can pass those not written yet.
const PIECES: u64 = 8;
/// A message may always be as large as what the link carries in this time, up to [`LARGEST_QUICK_PIECE`]: the server
/// has a fixed cost per message.
const PIECE_TIME: Duration = Duration::from_millis(8);
const LARGEST_QUICK_PIECE: u64 = 64 * 1024;
/// Probes in a window.
const PROBES: u64 = 4;
/// A server that hasn't answered its first probe by then is assumed to answer no pings, if the handshakes were quick: their
/// answers came by the same way.
const FIRST_ANSWER: Duration = Duration::from_millis(300);
const QUICK_HANDSHAKES: Duration = Duration::from_millis(75);
/// An unanswered probe is given up after this time.
const LOST: Duration = Duration::from_secs(10);
/// Measured anew after this time, since routes change.
const QUICKEST_HOLDS: Duration = Duration::from_secs(10);
/// Allowed queueing delay: `SLACK` × minimum RTT within these bounds, so that a link of varying speed stays busy.
const SLACK: u32 = 2;
const LEAST_SLACK: Duration = Duration::from_micros(150);
const MOST_SLACK: Duration = Duration::from_millis(50);
/// The largest factor by which one probe changes the window.
const STEP: u64 = 4;

#[derive(Debug, Default)]
pub(super) struct Pace {
    first_answer: Duration,
    window: u64,
    written: u64,
    arrived: u64,
    probes: VecDeque<Sent>,
    /// Minimum RTT and when it was measured.
    quickest: Option<(Duration, Instant)>,
    /// Size of a message that takes [`PIECE_TIME`].
    quick_piece: u64,
    /// Probes up to this byte were sent before the window changed.
    changed: u64,
}

#[derive(Debug)]
struct Sent {
    /// Bytes written before it, and how many of them were on the way.
    at: u64,
    behind: u64,
    when: Instant,
}

impl Pace {
    /// `took`: the link's handshakes.
    pub(super) fn new(took: Duration) -> Self {
        let first_answer = if took <= QUICK_HANDSHAKES { FIRST_ANSWER } else { LOST };
        Pace { window: FIRST_WINDOW, first_answer, ..Pace::default() }
    }

    pub(super) fn wrote(&mut self, bytes: usize) {
        self.written += bytes as u64;
    }

    /// Size of a bulk message in bytes.
    pub(super) fn piece(&self, now: Instant) -> usize {
        // Without answers the link may be slow: a larger piece could take a minute, for which the server has no patience.
        let piece = if self.is_unanswered(now) { LARGEST_QUICK_PIECE } else { self.window / PIECES };
        piece.max(self.quick_piece) as usize
    }

    pub(super) fn sendable(&self, now: Instant) -> Sendable {
        let (window, unanswered) = (self.current_window(now), self.is_unanswered(now));
        let fits = |window| unanswered || self.on_the_way() < window;
        // Twice the window, so that a transfer that has used it up does not delay an echo.
        Sendable { bulk: fits(window), interactive: fits(2 * window) }
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.probes.is_empty()
    }

    /// When the window opens without an answer.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let patience = if self.quickest.is_some() { LOST } else { self.first_answer };
        self.probes.front().map(|probe| probe.when + patience)
    }

    fn is_unanswered(&self, now: Instant) -> bool {
        self.deadline().is_some_and(|deadline| now >= deadline)
    }

    /// A probe, if one is due now. `bulk`: a bulk message follows.
    pub(super) fn probe(&mut self, bulk: bool, now: Instant) -> Option<Probe> {
        let before = self.probes.back().map_or(self.arrived, |probe| probe.at);
        // A transfer starts with a probe, whose answer nothing delays.
        let due =
            self.written - before >= self.current_window(now) / PROBES || bulk && self.probes.is_empty();
        (due && !self.is_unanswered(now)).then(|| {
            self.probes.push_back(Sent { at: self.written, behind: self.on_the_way(), when: now });
            self.written.to_be_bytes()
        })
    }

    pub(super) fn answered(&mut self, probe: Probe, now: Instant) {
        let at = u64::from_be_bytes(probe);
        // Other pings are no probes.
        let Some(place) = self.probes.iter().position(|probe| probe.at == at) else { return };
        let Some(probe) = self.probes.drain(..=place).next_back() else { return };
        self.arrived = at;
        let took = now.saturating_duration_since(probe.when);
        let stale = self.is_stale(now) && probe.behind <= self.window / STEP + self.window / PROBES;
        let known = self.quickest.map(|(quickest, _)| quickest).filter(|quickest| *quickest < took && !stale);
        let quickest = known.unwrap_or(took);
        if known.is_none() {
            self.quickest = Some((took, now));
        }
        // Only a probe behind a full window measures it.
        if probe.at <= self.changed || probe.behind < self.window / 8 * 7 {
            return;
        }
        let slack = (quickest * SLACK).clamp(LEAST_SLACK, MOST_SLACK);
        // Nothing queues yet: the window may grow.
        let target = if took < quickest * 5 / 4 { quickest * 2 } else { quickest * 3 / 2 } + slack;
        // Bytes carried in `time`.
        let carried = |time: Duration| {
            let bytes = u128::from(probe.behind) * time.as_nanos() / took.as_nanos().max(1);
            u64::try_from(bytes).unwrap_or(u64::MAX)
        };
        self.quick_piece = carried(PIECE_TIME).min(LARGEST_QUICK_PIECE);
        let least = if took > target { self.window / STEP } else { self.window };
        let window = carried(target).clamp(least, self.window * STEP);
        let window = window.clamp(SMALLEST_WINDOW.max(2 * self.quick_piece), LARGEST_WINDOW);
        if window != self.window {
            (self.window, self.changed) = (window, self.written);
        }
    }

    fn on_the_way(&self) -> u64 {
        self.written - self.arrived
    }

    fn is_stale(&self, now: Instant) -> bool {
        self.quickest.is_some_and(|(_, when)| now >= when + QUICKEST_HOLDS)
    }

    /// Smaller while the minimum RTT is measured anew: a full window's queueing would be measured with it.
    fn current_window(&self, now: Instant) -> u64 {
        if self.is_stale(now) { self.window / STEP } else { self.window }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// The pace of a connection that was quick long ago and has become so slow that the window shrank below what was
    /// written behind the last probe.
    pub(crate) fn without_credit_or_probe(now: Instant) -> Pace {
        let start = now - QUICKEST_HOLDS - Duration::from_secs(1);
        let mut pace = Pace::new(Duration::ZERO);
        let first = pace.probe(true, start).unwrap();
        pace.answered(first, start + Duration::from_millis(1));
        let mut last = first;
        while pace.sendable(start).bulk {
            pace.wrote(7300);
            last = pace.probe(false, start).unwrap_or(last);
        }
        pace.answered(last, now);
        let sendable = pace.sendable(now);
        assert!(!sendable.bulk && !sendable.interactive && pace.deadline().is_none(), "{pace:?}");
        pace
    }

    /// A connection that carries `rate` bytes a second and takes `delay` besides, with a sender that always has more.
    struct Simulation {
        pace: Pace,
        start: Instant,
        now: Duration,
        /// When the last byte written will have left the bottleneck.
        busy_until: Duration,
        answers: VecDeque<(Duration, Probe)>,
        delivered: u64,
        rate: f64,
        delay: Duration,
        /// The longest that a byte would have waited at the bottleneck, since it was last asked for.
        waited: Duration,
    }

    impl Simulation {
        fn new(rate: f64, delay: Duration) -> Self {
            Simulation {
                pace: Pace::new(Duration::ZERO),
                start: Instant::now(),
                now: Duration::ZERO,
                busy_until: Duration::ZERO,
                answers: VecDeque::new(),
                delivered: 0,
                rate,
                delay,
                waited: Duration::ZERO,
            }
        }

        fn write(&mut self, bytes: usize) {
            self.busy_until =
                self.busy_until.max(self.now) + Duration::from_secs_f64(bytes as f64 / self.rate);
            self.waited = self.waited.max(self.busy_until - self.now);
            self.pace.wrote(bytes);
            self.delivered += bytes as u64;
        }

        fn probe(&mut self, bulk: bool) {
            if let Some(probe) = self.pace.probe(bulk, self.start + self.now) {
                let arrives = self.busy_until.max(self.now) + self.delay;
                self.answers.push_back((arrives, probe));
            }
        }

        /// Sends for so long; what share of the connection was used.
        fn run(&mut self, span: Duration) -> f64 {
            let (end, before) = (self.now + span, self.delivered);
            let begin = self.now;
            while self.now < end {
                while self.pace.sendable(self.start + self.now).bulk {
                    self.probe(true);
                    self.write(self.pace.piece(self.start + self.now).max(2048));
                    self.probe(false);
                }
                let (arrives, probe) = self.answers.pop_front().expect("something is on the way");
                self.now = self.now.max(arrives);
                self.pace.answered(probe, self.start + self.now);
            }
            (self.delivered - before) as f64 / self.rate / (self.now - begin).as_secs_f64()
        }
    }

    const fn millis(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn connections_are_kept_busy_with_little_on_the_way() {
        for (rate, delay, most_waited) in [
            (125e3, millis(50), millis(150)),
            (125e3, millis(2), millis(120)),
            (1e6, millis(300), millis(400)),
            (10e6, millis(20), millis(100)),
            (40e6, millis(60), millis(150)),
            // A client with one thread for everything.
            (500e6, Duration::from_micros(100), Duration::from_micros(500)),
        ] {
            let mut simulation = Simulation::new(rate, delay);
            simulation.run((delay * 30).max(millis(2000)));
            simulation.waited = Duration::ZERO;
            // Long enough for the quickest answer to be learnt anew a few times.
            let share = simulation.run(Duration::from_secs(45));
            let waited = simulation.waited;
            assert!(share > 0.93, "{rate} bytes/s, {delay:?}: {share}");
            assert!(waited < most_waited, "{rate} bytes/s, {delay:?}: {waited:?}");
        }
    }

    #[test]
    fn a_connection_that_changes_is_learnt_anew() {
        let mut simulation = Simulation::new(10e6, millis(20));
        simulation.run(Duration::from_secs(15));
        (simulation.rate, simulation.delay) = (2e6, millis(200));
        simulation.run(Duration::from_secs(25));
        assert!(simulation.run(Duration::from_secs(20)) > 0.95);
        (simulation.rate, simulation.delay) = (20e6, millis(5));
        simulation.run(Duration::from_secs(5));
        simulation.waited = Duration::ZERO;
        assert!(simulation.run(Duration::from_secs(20)) > 0.9);
        assert!(simulation.waited < millis(100), "{:?}", simulation.waited);
    }

    #[test]
    fn a_window_is_reached_within_few_round_trips() {
        let mut simulation = Simulation::new(200e6, millis(100));
        simulation.run(millis(950));
        assert_eq!(simulation.pace.window, LARGEST_WINDOW);
    }

    #[test]
    fn a_server_without_answers_is_no_obstacle() {
        let (mut pace, now) = (Pace::new(Duration::ZERO), Instant::now());
        assert!(pace.probe(true, now).is_some());
        while pace.sendable(now).bulk {
            pace.wrote(4096);
            pace.probe(false, now);
        }
        assert!(pace.sendable(now).interactive);
        pace.wrote(FIRST_WINDOW as usize);
        assert!(!pace.sendable(now).interactive);
        let later = pace.deadline().unwrap();
        assert_eq!(later, now + FIRST_ANSWER);
        pace.wrote(1 << 30);
        assert!(pace.sendable(later).bulk && pace.sendable(later).interactive);
        assert_eq!(pace.piece(later) as u64, LARGEST_QUICK_PIECE);
        assert_eq!(pace.probe(true, later), None);
    }

    #[test]
    fn other_pings_are_no_probes() {
        let (mut pace, now) = (Pace::new(Duration::ZERO), Instant::now());
        pace.wrote(100);
        let probe = pace.probe(true, now).unwrap();
        pace.answered(*b"12345678", now);
        assert_eq!(pace.on_the_way(), 100);
        pace.answered(probe, now);
        assert_eq!(pace.on_the_way(), 0);
        pace.answered(probe, now);
    }
}

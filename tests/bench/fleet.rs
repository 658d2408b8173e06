//! A fleet loses its server and comes back: the back-off of `src/backoff.rs` beside plain doubling and upstream's, in
//! virtual time.
//!
//! All links, long stable, break at 0 s. Until the outage's end nobody answers a connect; afterwards the server accepts
//! the first 1,000 of each second and refuses the others with an HTTP status. A failure takes no time and costs nobody
//! anything; a link that is accepted stays. An agent's recovery is from the outage's end to its accepted connect,
//! and the peak is of connects, accepted or not, in one second after the outage's end.
//!
//! Upstream's is the formula alone, without what else its agent waits for.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use mender_connect::internals::wait;

const SECOND: u64 = 1_000_000_000;

/// What the server accepts in a second.
const CAPACITY: usize = 1000;

/// An agent's next connect: the time in nanoseconds, and its attempts before as the back-off counts them. Agents have
/// nothing else that tells them apart.
type Connect = (u64, u32);

/// Why the agent has no link.
#[derive(Clone, Copy, PartialEq)]
enum Why {
    Lost,
    Unanswered,
    Refused,
}

/// The wait before the next attempt, at this time. Counts the attempt.
type Backoff = fn(&mut u32, u64, Why, u64) -> u64;

/// The default ReconnectIntervalSeconds.
const BASE: Duration = Duration::from_secs(5);

/// The supervisor's rule.
fn here(count: &mut u32, time: u64, why: Why, random: u64) -> u64 {
    let unanswered = why == Why::Unanswered;
    wait(count, unanswered, Duration::from_nanos(time), BASE, random).as_nanos() as u64
}

/// Full jitter without the outage's length: each attempt doubles the limit.
fn doubling(count: &mut u32, _: u64, _: Why, random: u64) -> u64 {
    let limit = (5 * SECOND).saturating_mul(1 << (*count).min(20)).min(300 * SECOND);
    *count += 1;
    below(limit, random)
}

/// Upstream's exponentialbackoff.go, with the shift that overflows from the 102nd attempt on. Nobody needs so
/// many here.
fn upstream(attempts: &mut u32, _: u64, _: Why, random: u64) -> u64 {
    *attempts += 1;
    if *attempts <= 1 {
        return 0;
    }
    let doubled = (SECOND as i64) << (*attempts / 3).min(63);
    let jitter = below(5 * SECOND, random) as i64;
    (doubled.min(1800 * SECOND as i64) + jitter).max(0) as u64
}

/// Uniform in 0..limit.
fn below(limit: u64, random: u64) -> u64 {
    ((u128::from(random) * u128::from(limit)) >> 64) as u64
}

/// SplitMix64, the same numbers in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }
}

struct Outcome {
    /// Connects in the busiest second.
    peak: usize,
    /// The recoveries in nanoseconds, ascending.
    recoveries: Vec<u64>,
}

fn simulate(agents: usize, outage: u64, backoff: Backoff) -> Outcome {
    let end = outage * SECOND;
    let mut random = Random(1);
    // By second, since one heap for all would be slow.
    let mut due: BTreeMap<u64, Vec<Reverse<Connect>>> = BTreeMap::new();
    for _ in 0..agents {
        let mut attempts = 0;
        let mut time = backoff(&mut attempts, 0, Why::Lost, random.next());
        while time < end {
            time += backoff(&mut attempts, time, Why::Unanswered, random.next());
        }
        due.entry(time / SECOND).or_default().push(Reverse((time, attempts)));
    }
    let mut outcome = Outcome { peak: 0, recoveries: Vec::with_capacity(agents) };
    while let Some((second, connects)) = due.pop_first() {
        let mut connects = BinaryHeap::from(connects);
        let (mut tried, mut accepted) = (0, 0);
        while let Some(Reverse((time, mut attempts))) = connects.pop() {
            tried += 1;
            if accepted < CAPACITY {
                accepted += 1;
                outcome.recoveries.push(time - end);
                continue;
            }
            let next = time + backoff(&mut attempts, time, Why::Refused, random.next());
            if next / SECOND == second {
                connects.push(Reverse((next, attempts)));
            } else {
                due.entry(next / SECOND).or_default().push(Reverse((next, attempts)));
            }
        }
        outcome.peak = outcome.peak.max(tried);
    }
    outcome
}

/// What has to hold whatever the back-off.
fn check(outcome: &Outcome, agents: usize) {
    assert_eq!(outcome.recoveries.len(), agents, "every agent is back, once");
    assert!(outcome.recoveries.is_sorted());
    for second in outcome.recoveries.chunk_by(|one, other| one / SECOND == other / SECOND) {
        assert!(second.len() <= CAPACITY, "the server accepted {} in a second", second.len());
    }
}

/// 10,000.
fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<_> = digits.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy).collect();
    groups.join(",")
}

/// A time as people say it.
fn spoken(nanos: u64) -> String {
    let seconds = nanos as f64 / SECOND as f64;
    match seconds {
        ..100.0 => format!("{seconds:.1} s"),
        ..6000.0 => format!("{:.1} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

fn main() {
    let mut table = vec![
        "| agents | outage | back-off | peak connects per second | p50 | p95 | max |".to_owned(),
        "|---|---|---|---|---|---|---|".to_owned(),
    ];
    for agents in [10_000, 1_000_000] {
        for (name, outage) in [("1 s", 1), ("35 s", 35), ("30 min", 1800), ("2 h", 7200)] {
            for (whose, backoff) in
                [("here", here as Backoff), ("doubling", doubling), ("upstream", upstream)]
            {
                let outcome = simulate(agents, outage, backoff);
                check(&outcome, agents);
                // The smallest time in which so many per cent are back.
                let percentile = |percent| spoken(outcome.recoveries[agents * percent / 100 - 1]);
                let (number, peak) = (thousands(agents), thousands(outcome.peak));
                let [p50, p95, max] = [50, 95, 100].map(percentile);
                table.push(format!("| {number} | {name} | {whose} | {peak} | {p50} | {p95} | {max} |"));
            }
        }
    }
    let table = table.join("\n") + "\n";
    print!("{table}");
    assert!(
        include_str!("../../docs/performance.md").contains(&table),
        "docs/performance.md has another table"
    );
}

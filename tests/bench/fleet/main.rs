//! A fleet loses its server and comes back: the back-off of `src/backoff.rs` beside plain doubling and upstream's, in
//! virtual time.
//!
//! All links, long stable, break at 0 s. Until the outage's end nobody answers a connect; afterwards the server accepts
//! the first 1,000 of each second and refuses the others with an HTTP status. A failure takes no time and costs nobody
//! anything; a link that is accepted stays. An agent's recovery is from the outage's end to its accepted connect,
//! and the peak is of connects, accepted or not, in one second after the outage's end.
//!
//! Upstream's is the formula alone, without what else its agent waits for.
//!
//! With `--real` so many agents are started as well, see [`real`].

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark fails by panicking")]

mod real;
#[allow(dead_code, reason = "the integration tests use all of it")]
#[path = "../../it/harness/wire.rs"]
mod wire;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use real::{Measured, Scene};

use mender_connect::internals::wait;

const SECOND: u64 = 1_000_000_000;

/// The server after the outage.
struct Server {
    /// Connects that it accepts in a second.
    capacity: usize,
    /// It refuses one of so many connects besides, and tells to come back after some seconds; 0: none.
    refuse_every: usize,
    retry_after: u64,
}

const SERVER: Server = Server { capacity: 1000, refuse_every: 0, retry_after: 0 };

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

fn simulate(agents: usize, outage: u64, server: &Server, backoff: Backoff) -> Outcome {
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
    let mut all = 0;
    while let Some((second, connects)) = due.pop_first() {
        let mut connects = BinaryHeap::from(connects);
        let (mut tried, mut accepted) = (0, 0);
        while let Some(Reverse((time, mut attempts))) = connects.pop() {
            (tried, all) = (tried + 1, all + 1);
            let told = server.refuse_every > 0 && all % server.refuse_every == 0;
            if accepted < server.capacity && !told {
                accepted += 1;
                outcome.recoveries.push(time - end);
                continue;
            }
            let mut wait = backoff(&mut attempts, time, Why::Refused, random.next());
            if told {
                // As the supervisor's machine does.
                wait = wait.max(server.retry_after * SECOND + below(BASE.as_nanos() as u64, random.next()));
            }
            let next = time + wait;
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

/// Asserts the properties that any back-off must have.
fn check(outcome: &Outcome, agents: usize, server: &Server) {
    assert_eq!(outcome.recoveries.len(), agents, "every agent is back, once");
    assert!(outcome.recoveries.is_sorted());
    for second in outcome.recoveries.chunk_by(|one, other| one / SECOND == other / SECOND) {
        assert!(second.len() <= server.capacity, "the server accepted {} in a second", second.len());
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

const HEADER: &str = "| agents | outage | back-off | peak connects per second | p50 | p95 | max |
|---|---|---|---|---|---|---|
";

fn row(outage: &str, whose: &str, outcome: &Outcome) -> String {
    let agents = outcome.recoveries.len();
    // The smallest time in which so many per cent are back.
    let percentile = |percent: usize| spoken(outcome.recoveries[(agents * percent / 100).max(1) - 1]);
    let (number, peak) = (thousands(agents), thousands(outcome.peak));
    let [p50, p95, max] = [50, 95, 100].map(percentile);
    format!("| {number} | {outage} | {whose} | {peak} | {p50} | {p95} | {max} |\n")
}

fn simulated() {
    let mut table = HEADER.to_owned();
    for agents in [10_000, 1_000_000] {
        for (name, outage) in [("1 s", 1), ("35 s", 35), ("30 min", 1800), ("2 h", 7200)] {
            for (whose, backoff) in
                [("here", here as Backoff), ("doubling", doubling), ("upstream", upstream)]
            {
                let outcome = simulate(agents, outage, &SERVER, backoff);
                check(&outcome, agents, &SERVER);
                table += &row(name, whose, &outcome);
            }
        }
    }
    print!("{table}");
    assert!(
        include_str!("../../../docs/performance.md").contains(&table),
        "docs/performance.md has another table"
    );
}

/// Real agents beside the simulation of the same scene.
fn real(scene: &Scene) {
    let (retry_after, outage) = (scene.retry_after, scene.outage.as_secs());
    let server = Server { capacity: usize::MAX, refuse_every: scene.refuse_every, retry_after };
    let simulated = simulate(scene.agents, outage, &server, here);
    check(&simulated, scene.agents, &server);
    let measured = real::measure(scene);
    let seconds = measured.connects.chunk_by(|one, other| one.as_secs() == other.as_secs());
    let outcome = Outcome {
        peak: seconds.map(<[_]>::len).max().unwrap_or(0),
        recoveries: measured.returns.iter().map(|time| time.as_nanos() as u64).collect(),
    };
    let name = format!("{outage} s");
    print!("{HEADER}{}{}", row(&name, "simulated", &simulated), row(&name, "real", &outcome));
    let Measured { memory, cpu, waits, .. } = &measured;
    let [before, after] = memory.each_ref().map(|sample| match sample.as_slice() {
        [.., max] => format!("{} / {max} KiB", sample[sample.len() / 2]),
        [] => "unknown".to_owned(),
    });
    let [starting, outage] = cpu.map(|cpu| (cpu / scene.agents as u32).as_secs_f64() * 1e3);
    println!("\n| figure | real agents |\n|---|---|");
    println!("| start until all are connected | {:.0} s |", measured.start.as_secs_f64());
    println!("| memory (PSS), median / max, before the outage | {before} |");
    println!("| memory (PSS), median / max, after it | {after} |");
    println!("| CPU time of each until all are connected | {starting:.1} ms |");
    println!("| CPU time of each from the outage's begin until all are back | {outage:.1} ms |");
    println!("| links that broke without an outage | {} |", measured.broken);
    println!("| agents without inotify for the token file | {} |", thousands(measured.unwatched));
    if let [first, .., last] = waits.as_slice() {
        let (number, [first, last]) = (waits.len(), [first, last].map(Duration::as_secs_f64));
        let number = thousands(number);
        println!(
            "| refused with Retry-After {retry_after}, and back after | {number}, {first:.2} to {last:.1} s |"
        );
    }
}

fn main() {
    let mut scene = Scene {
        executable: env!("CARGO_BIN_EXE_mender-connect").into(),
        agents: 0,
        outage: Duration::from_secs(60),
        base: BASE.as_secs(),
        refuse_every: 0,
        retry_after: 60,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut number = || args.next().and_then(|text| text.parse().ok()).expect("a number");
        match arg.as_str() {
            "--real" => scene.agents = number(),
            "--outage" => scene.outage = Duration::from_secs(number() as u64),
            "--refuse" => scene.refuse_every = number(),
            "--retry-after" => scene.retry_after = number() as u64,
            "--agent" => scene.executable = std::path::absolute(args.next().expect("a path")).unwrap(),
            // cargo's own.
            "--bench" => {}
            _ => panic!("{arg}: tests/bench/README.md has the options"),
        }
    }
    if scene.agents == 0 { simulated() } else { real(&scene) }
}

//! What the agent holds in quiet moments: a table, and whether it is flat.

use std::time::{Duration, Instant};

use crate::harness::daemon;
use crate::harness::proc;
use crate::harness::wait::{eventually, secs};

/// What an idle agent has besides memory; always the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Idle {
    threads: usize,
    descriptors: usize,
    children: usize,
}

impl Idle {
    pub fn of(pid: u32) -> Idle {
        Idle {
            threads: proc::threads(pid),
            descriptors: proc::descriptors(pid),
            children: proc::children(pid).len(),
        }
    }

    /// Waits until the agent has exactly this.
    pub fn wait(self, pid: u32) {
        let report = || {
            let (threads, files) = (proc::thread_names(pid), proc::descriptor_targets(pid));
            format!("{threads:?}, {files:?}, children {:?}", proc::children(pid))
        };
        let busy = report();
        eventually(secs(30), &format!("the agent to be idle with {self:?}; it had {busy}"), || {
            (Idle::of(pid) == self).then_some(())
        });
    }
}

struct Sample {
    at: Duration,
    life: usize,
    resident: u64,
    own: u64,
}

/// All samples; a life is that of one process.
pub struct Record {
    start: Instant,
    life: usize,
    samples: Vec<Sample>,
}

/// Samples of a life in which the allocator still takes what it needs.
const WARM_UP: usize = 2;

impl Record {
    pub fn new() -> Record {
        Record { start: Instant::now(), life: 0, samples: Vec::new() }
    }

    pub fn next_life(&mut self) {
        self.life += 1;
    }

    pub fn take(&mut self, pid: u32, idle: Idle, checked: u64) {
        let sample = Sample {
            at: self.start.elapsed(),
            life: self.life,
            resident: proc::rss_kib(pid),
            own: proc::anonymous_kib(pid),
        };
        if self.samples.is_empty() {
            println!(
                "{:>8} {:>4} {:>12} {:>8} {:>7} {:>11} {:>11}",
                "s", "life", "resident/KiB", "own/KiB", "threads", "descriptors", "checked/MiB"
            );
        }
        println!(
            "{:>8} {:>4} {:>12} {:>8} {:>7} {:>11} {:>11}",
            sample.at.as_secs(),
            sample.life,
            sample.resident,
            sample.own,
            idle.threads,
            idle.descriptors,
            checked >> 20
        );
        self.samples.push(sample);
    }

    /// Compares the last quarter of each life with its first, after the warm-up.
    pub fn assert_flat(&self) {
        // What the allocator happens to keep; glibc keeps more than musl.
        let tolerance = if daemon::is_static() { 256 } else { 4096 };
        for life in 0..=self.life {
            let samples: Vec<&Sample> =
                self.samples.iter().filter(|s| s.life == life).skip(WARM_UP).collect();
            let quarter = samples.len() / 4;
            if quarter < 2 {
                continue;
            }
            let (first, last) = (&samples[..quarter], &samples[samples.len() - quarter..]);
            for (what, of) in [("resident", (|s| s.resident) as fn(&Sample) -> u64), ("own", |s| s.own)] {
                let early = first.iter().map(|s| of(s)).max().unwrap_or(0);
                let mut late: Vec<u64> = last.iter().map(|s| of(s)).collect();
                late.sort_unstable();
                let late = late[late.len() / 2];
                println!(
                    "life {life}, {what}: {early} KiB at most in the first quarter, {late} KiB in the middle of the last"
                );
                assert!(late <= early + tolerance, "{what} memory grew from {early} to {late} KiB");
            }
        }
    }
}

//! What workers and mischief share: the current link, when there is a pause, and what became of each job.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::harness::device::Device;
use crate::harness::wait::{SOON, Watched, eventually, secs, spawn};

/// Random numbers that a seed repeats (splitmix64).
#[derive(Debug, Clone)]
pub struct Chance(pub u64);

impl Chance {
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.number() % end as u64) as usize
    }

    pub fn between(&mut self, least: usize, most: usize) -> usize {
        least + self.below(most - least + 1)
    }

    pub fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend(self.number().to_le_bytes());
        }
        bytes.truncate(count);
        bytes
    }

    /// Mostly small, seldom `most`.
    pub fn size(&mut self, most: usize) -> usize {
        let most = match self.below(100) {
            0..50 => most / 1000,
            50..85 => most / 30,
            85..97 => most / 4,
            _ => most,
        };
        self.between(1, most.max(1))
    }

    pub fn shuffle<T>(&mut self, list: &mut [T]) {
        for at in (1..list.len()).rev() {
            list.swap(at, self.below(at + 1));
        }
    }
}

/// What one kind of job has come to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    pub done: u64,
    /// Ended by the end of its link.
    pub cut: u64,
}

#[derive(Debug, Default)]
struct State {
    link: Option<Device>,
    paused: bool,
    /// The names of those who are at it.
    working: Vec<&'static str>,
    over: bool,
    failure: Option<String>,
    outcomes: BTreeMap<&'static str, Outcome>,
    /// Bytes that were compared.
    checked: u64,
}

/// Where the workers work.
#[derive(Debug, Default)]
pub struct Stage(Watched<State>);

/// What the harness says when a job's link has ended.
const CUT: [&str; 3] = ["the link is over", "write to the device", "writing: "];

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Keeps the panics of workers, most of which only say that the link was cut, out of the output.
pub fn hush_workers() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if std::thread::current().name().is_some_and(|name| name.starts_with("soak-")) {
            PANIC.set(panic.to_string());
        } else {
            usual(panic);
        }
    }));
}

impl Stage {
    /// Starts a worker, which does its job over and over.
    pub fn employ(
        self: &Arc<Self>,
        name: &'static str,
        mut chance: Chance,
        mut job: impl FnMut(&Device, &mut Chance) -> usize + Send + 'static,
    ) -> JoinHandle<()> {
        let stage = Arc::clone(self);
        spawn(&format!("soak-{name}"), move || {
            while let Some(device) = stage.enter(name) {
                let result = catch_unwind(AssertUnwindSafe(|| job(&device, &mut chance)));
                stage.leave(name, &device, result.map_err(|_| PANIC.take()));
            }
        })
    }

    /// Waits for work: the current link, or `None` at the end.
    fn enter(&self, name: &'static str) -> Option<Device> {
        let entered = self.0.wait(secs(600), |s| {
            if s.over {
                return Some(None);
            }
            let link = s.link.as_ref().filter(|link| !s.paused && !link.is_over())?;
            let link = link.clone();
            s.working.push(name);
            Some(Some(link))
        });
        entered.flatten()
    }

    fn leave(&self, name: &'static str, device: &Device, result: Result<usize, String>) {
        // Who writes may learn of the end before who reads.
        let cut = |text: &String| CUT.iter().any(|cut| text.contains(cut)) && device.ended_within(SOON);
        let cut = result.as_ref().err().is_some_and(cut);
        self.0.update(|s| {
            let at = s.working.iter().position(|working| *working == name).expect("it entered");
            s.working.swap_remove(at);
            let outcome = s.outcomes.entry(name).or_default();
            match result {
                Ok(bytes) => {
                    outcome.done += 1;
                    s.checked += bytes as u64;
                }
                Err(_) if cut => outcome.cut += 1,
                Err(text) => {
                    println!("{name} failed: {text}");
                    s.over = true;
                    s.failure.get_or_insert(format!("{name}: {text}"));
                }
            }
        });
    }

    pub fn set_link(&self, link: &Device) {
        self.0.update(|s| s.link = Some(link.clone()));
    }

    pub fn resume(&self) {
        self.0.update(|s| s.paused = false);
    }

    /// Waits until every worker has done its job.
    pub fn pause(&self) {
        self.0.update(|s| s.paused = true);
        let quiet = self.0.wait(secs(120), |s| s.working.is_empty().then_some(()));
        self.assert_well();
        assert!(quiet.is_some(), "these don't come to an end: {:?}", self.0.peek(|s| s.working.clone()));
    }

    /// Waits for so long, or for the first failure.
    pub fn watch(&self, span: std::time::Duration) {
        self.0.wait(span, |s| s.failure.is_some().then_some(()));
        self.assert_well();
    }

    pub fn assert_well(&self) {
        if let Some(failure) = self.0.peek(|s| s.failure.clone()) {
            panic!("{failure}");
        }
    }

    /// Sends everybody home; what was done, and how many bytes were compared.
    pub fn end(&self) -> (BTreeMap<&'static str, Outcome>, u64) {
        self.0.update(|s| {
            s.over = true;
            (s.outcomes.clone(), s.checked)
        })
    }

    pub fn checked(&self) -> u64 {
        self.0.peek(|s| s.checked)
    }
}

/// Like [`eventually`], for what need not come when the link is cut.
pub fn eventually_if_linked(device: &Device, what: &str, mut check: impl FnMut() -> bool) {
    eventually(SOON, what, || {
        assert!(!device.is_over() || check(), "the link is over");
        check().then_some(())
    });
}

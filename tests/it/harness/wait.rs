//! Waiting for events with deadlines, and the one way to start a thread.

use std::sync::{Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a test waits for something that should happen at once. Generous, because the whole
/// suite shares two cores; a passing test never waits this long.
pub const SOON: Duration = Duration::from_secs(15);

/// Shorthand for whole seconds.
pub const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Shorthand for milliseconds.
pub const fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// Starts a named thread.
pub fn spawn<T: Send + 'static>(name: &str, body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body).expect("start a thread")
}

/// A value that threads change and others wait on.
#[derive(Debug, Default)]
pub struct Watched<T> {
    value: Mutex<T>,
    changed: Condvar,
}

impl<T> Watched<T> {
    pub fn new(value: T) -> Self {
        Watched { value: Mutex::new(value), changed: Condvar::new() }
    }

    /// Changes the value and wakes everybody who waits.
    pub fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut value);
        self.changed.notify_all();
        result
    }

    pub fn peek<R>(&self, look: impl FnOnce(&T) -> R) -> R {
        look(&self.value.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until `pick` finds what it looks for; `None` when `limit` has passed.
    pub fn wait<R>(&self, limit: Duration, mut pick: impl FnMut(&mut T) -> Option<R>) -> Option<R> {
        let deadline = Instant::now() + limit;
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(found) = pick(&mut value) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            value = self.changed.wait_timeout(value, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Looks again and again until `check` finds something. Only for what has no event to wait for,
/// such as the contents of /proc.
pub fn eventually<R>(limit: Duration, what: &str, check: impl FnMut() -> Option<R>) -> R {
    within(limit, check).unwrap_or_else(|| panic!("waited {limit:?} in vain for: {what}"))
}

/// The same for what may not come in time.
pub fn within<R>(limit: Duration, mut check: impl FnMut() -> Option<R>) -> Option<R> {
    let deadline = Instant::now() + limit;
    loop {
        let found = check();
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        std::thread::park_timeout(millis(20));
    }
}

/// Says that a test can't be run here. Where `CI` is set it must be.
pub fn skip(why: &str) {
    let ci = std::env::var_os("CI").is_some_and(|ci| !ci.is_empty());
    assert!(!ci, "in CI this test must run: {why}");
    tell(why);
}

/// Says why a test wasn't run, past the test runner's capture and on the list that `tests/run` prints.
pub fn tell(why: &str) {
    use std::io::Write;
    let thread = std::thread::current();
    // cargo-nextest runs each test in a process of its own, on the main thread.
    let test = std::env::var("NEXTEST_TEST_NAME").ok();
    let line = format!("{}: {why}\n", test.as_deref().or(thread.name()).unwrap_or("?"));
    let _ = write!(std::io::stderr(), "SKIPPED: {line}");
    if let Some(list) = std::env::var_os("MENDER_CONNECT_SKIPPED") {
        let list = std::fs::OpenOptions::new().append(true).open(list);
        list.and_then(|mut list| list.write_all(line.as_bytes())).expect("add to the list of skipped tests");
    }
}

/// Asserts that `check` stays true for the whole time.
pub fn throughout(span: Duration, what: &str, mut check: impl FnMut() -> bool) {
    let deadline = Instant::now() + span;
    while Instant::now() < deadline {
        assert!(check(), "did not last: {what}");
        std::thread::park_timeout(millis(50));
    }
}

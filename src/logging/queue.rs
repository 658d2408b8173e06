//! Log lines on their way to standard error: a bounded queue between the threads that log and the one that writes.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Limit of the queue in bytes: about 1,500 lines of usual length.
const MAX_BYTES: usize = 256 * 1024;
/// Part of [`MAX_BYTES`] that is reserved for audit lines.
const AUDIT_RESERVE: usize = 64 * 1024;
/// Bytes that a line takes beside its text: its place in the queue, and the allocator's bookkeeping.
const OVERHEAD: usize = 48;
/// Capacity kept when the queue is empty.
const IDLE_CAPACITY: usize = 16;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Line(String),
    /// Lines that were dropped at this point of the log.
    Lost(Lost),
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lost {
    lines: usize,
    /// How many of `lines` were audit lines.
    audit: usize,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lines lost: standard error was blocked", self.lines)?;
        if self.audit > 0 { write!(f, "; audit lines among them: {}", self.audit) } else { Ok(()) }
    }
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<String>,
    bytes: usize,
    lost: Lost,
    /// An entry has been taken and isn't written yet.
    writing: bool,
}

impl State {
    fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.lost == Lost::default()
    }
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    written: Condvar,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a line, or counts it as lost. Never waits for the writer.
    pub(super) fn push(&self, line: String, audit: bool) {
        let mut state = self.state();
        // After the first loss all but audit lines are dropped until the queue is empty, so that one report stands
        // where the lines are missing.
        let limit = match (audit, state.lost.lines) {
            (true, _) => MAX_BYTES,
            (false, 0) => MAX_BYTES - AUDIT_RESERVE,
            (false, _) => 0,
        };
        let bytes = state.bytes + line.len() + OVERHEAD;
        if bytes <= limit {
            state.bytes = bytes;
            state.lines.push_back(line);
        } else {
            state.lost.lines += 1;
            state.lost.audit += usize::from(audit);
        }
        if state.lines.len() == 1 {
            self.filled.notify_one();
        }
    }

    /// Takes the next entry. The caller has written the previous one.
    pub(super) fn take(&self) -> Option<Entry> {
        let mut state = self.state();
        state.writing = !state.is_empty();
        if let Some(line) = state.lines.pop_front() {
            state.bytes -= line.len() + OVERHEAD;
            return Some(Entry::Line(line));
        }
        if state.writing {
            return Some(Entry::Lost(std::mem::take(&mut state.lost)));
        }
        state.lines.shrink_to(IDLE_CAPACITY);
        self.written.notify_all();
        None
    }

    /// Waits until there is something to take.
    pub(super) fn wait(&self) {
        drop(self.filled.wait_while(self.state(), |state| state.is_empty()));
    }

    /// Waits until all is written, but not longer than `limit`.
    pub(super) fn flush(&self, limit: Duration) {
        let waits = |state: &mut State| state.writing || !state.is_empty();
        drop(self.written.wait_timeout_while(self.state(), limit, waits));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "a line";

    fn full() -> (Queue, usize) {
        let queue = Queue::default();
        let mut lines = 0;
        while queue.state().lost.lines == 0 {
            queue.push(LINE.to_owned(), false);
            lines += 1;
        }
        (queue, lines - 1)
    }

    fn taken(queue: &Queue) -> Vec<Entry> {
        std::iter::from_fn(|| queue.take()).collect()
    }

    #[test]
    fn what_does_not_fit_is_counted_and_told_once_at_its_place() {
        let (queue, fitted) = full();
        assert!(fitted > 1000, "{fitted} lines");
        // There is room again, but these would come before the report.
        assert_eq!(queue.take(), Some(Entry::Line(LINE.to_owned())));
        (0..4).for_each(|_| queue.push("late".to_owned(), false));
        let entries = taken(&queue);
        assert_eq!(entries.len(), fitted);
        assert_eq!(entries.last(), Some(&Entry::Lost(Lost { lines: 5, audit: 0 })));
        queue.push("after".to_owned(), false);
        assert_eq!(taken(&queue), [Entry::Line("after".to_owned())]);
        assert!(queue.state().lines.capacity() <= 2 * IDLE_CAPACITY && queue.state().bytes == 0);
    }

    #[test]
    fn audit_lines_are_lost_last() {
        let (queue, fitted) = full();
        let mut audited = 0;
        while queue.state().lost.audit == 0 {
            queue.push("audit".to_owned(), true);
            audited += 1;
        }
        let entries = taken(&queue);
        assert_eq!(entries.len(), fitted + audited);
        assert!(audited > fitted / 4, "{audited} audit lines beside {fitted}");
        let Some(Entry::Lost(lost)) = entries.last() else { panic!("{:?}", entries.last()) };
        let text = "2 lines lost: standard error was blocked; audit lines among them: 1";
        assert_eq!(lost.to_string(), text);
    }

    #[test]
    fn a_flush_waits_for_the_writer_but_not_for_ever() {
        let queue = Queue::default();
        queue.flush(Duration::MAX);
        queue.push(LINE.to_owned(), false);
        queue.flush(Duration::from_millis(1));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                queue.wait();
                assert_eq!(taken(&queue).len(), 1);
            });
            queue.flush(Duration::MAX);
        });
        assert!(!queue.state().writing);
    }
}

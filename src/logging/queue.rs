//! Log lines on their way to standard error: a bounded queue between the threads that log and the one that writes.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

/// Limit of the queue in bytes: about 1,500 lines of usual length.
const MAX_BYTES: usize = 256 * 1024;
/// Part of [`MAX_BYTES`] that is reserved for audit lines.
const AUDIT_RESERVE: usize = 64 * 1024;
/// Bytes that a line takes beside its text: its place in the queue, and the allocator's bookkeeping.
const OVERHEAD: usize = 48;

#[derive(Debug)]
pub(super) enum Entry {
    Line(String),
    /// Dropped when all earlier lines are written.
    Flush {
        _written: Sender<()>,
    },
}

/// What is queued and not yet written, and what was dropped since there was nothing.
#[derive(Debug, Default)]
struct State {
    bytes: usize,
    lost: usize,
    /// How many of `lost` were audit lines.
    lost_audit: usize,
}

#[derive(Debug)]
pub(super) struct Queue {
    sender: Sender<Entry>,
    pub(super) entries: Receiver<Entry>,
    state: Mutex<State>,
}

impl Queue {
    pub(super) fn new() -> Self {
        let (sender, entries) = unbounded();
        Queue { sender, entries, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a line, or counts it as lost. Never waits for the writer.
    pub(super) fn push(&self, line: String, audit: bool) {
        let mut state = self.state();
        // After the first loss all but audit lines are dropped until the queue is empty, so that one report stands
        // where the lines are missing.
        let limit = match (audit, state.lost) {
            (true, _) => MAX_BYTES,
            (false, 0) => MAX_BYTES - AUDIT_RESERVE,
            (false, _) => 0,
        };
        let bytes = state.bytes + line.len() + OVERHEAD;
        if bytes <= limit {
            state.bytes = bytes;
            let _ = self.sender.send(Entry::Line(line));
        } else {
            state.lost += 1;
            state.lost_audit += usize::from(audit);
        }
    }

    /// To be called when a line is written. Returns a report to write next if lines were lost after this one.
    pub(super) fn written(&self, line: &str) -> Option<String> {
        let mut state = self.state();
        state.bytes -= line.len() + OVERHEAD;
        if state.bytes > 0 || state.lost == 0 {
            return None;
        }
        let State { lost, lost_audit, .. } = std::mem::take(&mut *state);
        let audit = match lost_audit {
            0 => String::new(),
            lines => format!("; audit lines among them: {lines}"),
        };
        Some(format!("{lost} lines lost: standard error was blocked{audit}"))
    }

    /// Waits until all is written, but not longer than `limit`.
    pub(super) fn flush(&self, limit: Duration) {
        let (_written, written) = bounded(0);
        let _ = self.sender.send(Entry::Flush { _written });
        let _ = written.recv_timeout(limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "a line";

    fn full() -> (Queue, usize) {
        let queue = Queue::new();
        let mut lines = 0;
        while queue.state().lost == 0 {
            queue.push(LINE.to_owned(), false);
            lines += 1;
        }
        (queue, lines - 1)
    }

    fn write(queue: &Queue, entries: impl Iterator<Item = Entry>) -> Vec<String> {
        let lines = entries.filter_map(|entry| match entry {
            Entry::Line(line) => Some(line),
            Entry::Flush { .. } => None,
        });
        lines.flat_map(|line| [queue.written(&line), Some(line)].into_iter().flatten().rev()).collect()
    }

    #[test]
    fn what_does_not_fit_is_counted_and_told_once_at_its_place() {
        let (queue, fitted) = full();
        assert!(fitted > 1000, "{fitted} lines");
        // There is room again, but these would come before the report.
        assert_eq!(write(&queue, queue.entries.try_iter().take(1)), [LINE]);
        (0..4).for_each(|_| queue.push("late".to_owned(), false));
        let entries = write(&queue, queue.entries.try_iter());
        assert_eq!(entries.len(), fitted);
        assert_eq!(entries.last().unwrap(), "5 lines lost: standard error was blocked");
        queue.push("after".to_owned(), false);
        assert_eq!(write(&queue, queue.entries.try_iter()), ["after"]);
        assert_eq!(queue.state().bytes, 0);
    }

    #[test]
    fn audit_lines_are_lost_last() {
        let (queue, fitted) = full();
        let mut audited = 0;
        while queue.state().lost_audit == 0 {
            queue.push("audit".to_owned(), true);
            audited += 1;
        }
        let entries = write(&queue, queue.entries.try_iter());
        assert_eq!(entries.len(), fitted + audited);
        assert!(audited > fitted / 4, "{audited} audit lines beside {fitted}");
        let text = "2 lines lost: standard error was blocked; audit lines among them: 1";
        assert_eq!(entries.last().unwrap(), text);
    }

    #[test]
    fn a_flush_waits_for_the_writer_but_not_for_ever() {
        let queue = Queue::new();
        queue.push(LINE.to_owned(), false);
        queue.flush(Duration::from_millis(1));
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(write(&queue, queue.entries.iter().take(3)), [LINE]));
            queue.flush(Duration::MAX);
        });
    }
}

//! Log lines on standard error as the reference agent writes them: `time="…" level=info msg="…"`. The journal has its
//! own time and gets the priority instead.
//!
//! A dedicated thread writes them, since standard error can block for any time: a stalled journal, a stopped `logger`.
//! Other threads only queue.

use std::io::{self, LineWriter, Stderr};
use std::mem;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use log::{Level, LevelFilter, Log, Metadata, Record};
use simplelog::{ConfigBuilder, WriteLogger};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use crate::audit;
use crate::sys::beneath::fstat;
use crate::sys::{clock, lock, thread};

const TIME: &[BorrowedFormatItem<'static>] =
    format_description!("time=\"[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z\"");

/// From [`Level::Error`] on; names are logrus's, numbers syslog(3)'s.
const LEVELS: [(&str, u8); 5] = [("error", 3), ("warning", 4), ("info", 6), ("debug", 7), ("trace", 7)];

/// Only our own lines are logged: tungstenite would log keystrokes at trace level.
const OURS: &str = env!("CARGO_CRATE_NAME");

/// In bytes, without quotes. Keeps a line below 4 KiB.
const MAX_MESSAGE: usize = 4000;

/// In bytes. Small, since lines arrive formatted.
const STACK: usize = 64 * 1024;

/// Sessions may have used 1.7 s of the 2 s in which SIGTERM ends everything.
const LAST_LINES: Duration = Duration::from_millis(250);

/// In bytes: about 1,500 usual lines.
const MAX_BYTES: usize = 256 * 1024;
/// Share of [`MAX_BYTES`] that only audit lines may use.
const AUDIT_RESERVE: usize = 64 * 1024;
/// Bytes of a queued line beside its text: its slot, and the allocator's bookkeeping.
const OVERHEAD: usize = 48;

pub(crate) struct Logger {
    lines: Receiver<String>,
    state: Mutex<State>,
    sink: Box<WriteLogger<LineWriter<Stderr>>>,
    journal: bool,
    /// Disconnected when the log thread ends.
    ended: OnceLock<Receiver<()>>,
}

/// `lost` and `lost_audit` count since the queue was last empty.
struct State {
    /// `None` once the log is finished.
    sender: Option<Sender<String>>,
    bytes: usize,
    lost: usize,
    lost_audit: usize,
}

/// Queues lines until [`Logger::start`].
pub(crate) fn init(level: LevelFilter) -> &'static Logger {
    let logger: &'static Logger = Box::leak(Box::new(Logger::new()));
    let _ = log::set_logger(logger);
    log::set_max_level(level);
    logger
}

/// systemd sets JOURNAL_STREAM to device and inode of the journal's stream.
fn stderr_is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM");
    fstat(io::stderr()).is_ok_and(|stat| stream == Ok(format!("{}:{}", stat.st_dev, stat.st_ino)))
}

fn time() -> String {
    // Saturates in the year 9999.
    let now = OffsetDateTime::UNIX_EPOCH.saturating_add(clock::now().try_into().unwrap_or_default());
    now.format(TIME).unwrap_or_default()
}

impl Logger {
    fn new() -> Self {
        let mut config = ConfigBuilder::new();
        // Lines arrive with time and level.
        config.set_time_level(LevelFilter::Off).set_max_level(LevelFilter::Off);
        let sink = WriteLogger::new(LevelFilter::Trace, config.build(), LineWriter::new(io::stderr()));
        let (sender, lines) = unbounded();
        let state = Mutex::new(State { sender: Some(sender), bytes: 0, lost: 0, lost_audit: 0 });
        Logger { lines, state, sink, journal: stderr_is_journal(), ended: OnceLock::new() }
    }

    /// Call it after dropping privileges: a thread inherits them.
    pub(crate) fn start(&'static self) -> io::Result<()> {
        if self.ended.get().is_none() {
            let (ends, ended) = bounded(0);
            thread::spawn("log", STACK, move || {
                self.lines.iter().for_each(|line| self.write(&line));
                drop::<Sender<()>>(ends);
            })?;
            let _ = self.ended.set(ended);
        }
        Ok(())
    }

    /// Waits up to [`LAST_LINES`] for the queue to drain, and drops later lines. Call it before the process ends.
    pub(crate) fn finish(&'static self) {
        let _ = self.start();
        lock(&self.state).sender = None;
        match self.ended.get() {
            Some(ended) => _ = ended.recv_timeout(LAST_LINES),
            // Without a thread: better to block than to end without a reason.
            None => self.lines.iter().for_each(|line| self.write(&line)),
        }
    }

    fn write(&self, line: &str) {
        self.print(line);
        if let Some(report) = self.written(line) {
            self.print(&self.line(Level::Warn, &format!("\"{report}\"")));
        }
    }

    fn push(&self, line: String, audit: bool) {
        let mut state = lock(&self.state);
        // After the first loss all but audit lines are dropped until the queue is empty, so that one report stands
        // where the lines are missing.
        let limit = match (audit, state.lost) {
            (true, _) => MAX_BYTES,
            (false, 0) => MAX_BYTES - AUDIT_RESERVE,
            (false, _) => 0,
        };
        let bytes = state.bytes + line.len() + OVERHEAD;
        if bytes > limit {
            state.lost += 1;
            state.lost_audit += usize::from(audit);
        } else if let Some(sender) = &state.sender {
            let _ = sender.send(line);
            state.bytes = bytes;
        }
    }

    /// Call it when a line has been written. Returns the report to write next if lines were lost behind this one.
    fn written(&self, line: &str) -> Option<String> {
        let mut state = lock(&self.state);
        state.bytes -= line.len() + OVERHEAD;
        if state.bytes > 0 || state.lost == 0 {
            return None;
        }
        let lost = mem::take(&mut state.lost);
        let audit = match mem::take(&mut state.lost_audit) {
            0 => String::new(),
            lines => format!("; audit lines among them: {lines}"),
        };
        Some(format!("{lost} lines lost: standard error was blocked{audit}"))
    }

    fn print(&self, line: &str) {
        self.sink.log(&Record::builder().args(format_args!("{line}")).build());
    }

    fn line(&self, level: Level, message: &str) -> String {
        let (name, priority) = LEVELS[level as usize - 1];
        if self.journal {
            format!("<{priority}>level={name} msg={message}")
        } else {
            format!("{} level={name} msg={message}", time())
        }
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with(OURS) && metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let audit = record.target() == audit::TARGET;
        let message = if audit {
            format!("audit {}", record.args())
        } else {
            audit::quoted(&record.args().to_string(), MAX_MESSAGE)
        };
        self.push(self.line(record.level(), &message), audit);
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = "a line";

    fn full() -> (Logger, usize) {
        let queue = Logger::new();
        let mut lines = 0;
        while lock(&queue.state).lost == 0 {
            queue.push(LINE.to_owned(), false);
            lines += 1;
        }
        (queue, lines - 1)
    }

    fn write(queue: &Logger, lines: impl Iterator<Item = String>) -> Vec<String> {
        lines.flat_map(|line| [queue.written(&line), Some(line)].into_iter().flatten().rev()).collect()
    }

    #[test]
    fn what_does_not_fit_is_counted_and_told_once_at_its_place() {
        let (queue, fitted) = full();
        assert!(fitted > 1000, "{fitted} lines");
        // There is room again, but these would come before the report.
        assert_eq!(write(&queue, queue.lines.try_iter().take(1)), [LINE]);
        (0..4).for_each(|_| queue.push("late".to_owned(), false));
        let entries = write(&queue, queue.lines.try_iter());
        assert_eq!(entries.len(), fitted);
        assert_eq!(entries.last().unwrap(), "5 lines lost: standard error was blocked");
        queue.push("after".to_owned(), false);
        assert_eq!(write(&queue, queue.lines.try_iter()), ["after"]);
        assert_eq!(lock(&queue.state).bytes, 0);
    }

    #[test]
    fn audit_lines_are_lost_last() {
        let (queue, fitted) = full();
        let mut audited = 0;
        while lock(&queue.state).lost_audit == 0 {
            queue.push("audit".to_owned(), true);
            audited += 1;
        }
        let entries = write(&queue, queue.lines.try_iter());
        assert_eq!(entries.len(), fitted + audited);
        assert!(audited > fitted / 4, "{audited} audit lines beside {fitted}");
        let text = "2 lines lost: standard error was blocked; audit lines among them: 1";
        assert_eq!(entries.last().unwrap(), text);
    }

    #[test]
    fn a_finished_queue_ends_behind_its_last_line() {
        let queue = Logger::new();
        queue.push(LINE.to_owned(), false);
        lock(&queue.state).sender = None;
        queue.push("late".to_owned(), false);
        assert_eq!(write(&queue, queue.lines.iter()), [LINE]);
    }
}

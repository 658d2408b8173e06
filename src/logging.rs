//! Log lines on standard error, in the form of the reference agent:
//! `time="…" level=info msg="…"`. For systemd's journal, which has its own time, with the priority instead.
//!
//! A dedicated thread writes them, since standard error can block for any time: a stalled journal, a stopped `logger`.
//! Other threads only queue.

mod queue;

use std::io::{self, LineWriter, Stderr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::sys::stat::fstat;
use simplelog::{ConfigBuilder, WriteLogger};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use self::queue::{Entry, Queue};
use crate::audit;
use crate::sys::{clock, thread};

const TIME: &[BorrowedFormatItem<'static>] =
    format_description!("time=\"[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z\"");

/// Log lines of other crates are dropped: tungstenite would log keystrokes at trace level.
const OURS: &str = env!("CARGO_CRATE_NAME");

/// Limit of a message in bytes, without its quotes. Keeps a line below 4 KiB.
const MAX_MESSAGE: usize = 4000;

/// Stack of the log thread in bytes. Small, since lines arrive formatted.
const STACK: usize = 64 * 1024;

/// Limit for writing the last lines. Sessions may have used 1.7 s of the 2 s in which SIGTERM ends everything.
const LAST_LINES: Duration = Duration::from_millis(250);

pub(crate) struct Logger {
    queue: Queue,
    sink: Box<WriteLogger<LineWriter<Stderr>>>,
    journal: bool,
    started: AtomicBool,
}

/// Installs the logger. Lines are queued until [`Logger::start`]. Call it once.
pub(crate) fn init(level: LevelFilter) -> &'static Logger {
    let mut config = ConfigBuilder::new();
    // The queue's lines have time and level.
    config.set_time_level(LevelFilter::Off).set_max_level(LevelFilter::Off);
    let sink = WriteLogger::new(LevelFilter::Trace, config.build(), LineWriter::new(io::stderr()));
    let (queue, journal, started) = (Queue::new(), stderr_is_journal(), AtomicBool::new(false));
    let logger: &'static Logger = Box::leak(Box::new(Logger { queue, sink, journal, started }));
    if log::set_logger(logger).is_ok() {
        log::set_max_level(level);
    }
    logger
}

/// systemd sets JOURNAL_STREAM to the device and inode of the stream that goes to the journal.
fn stderr_is_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM");
    fstat(io::stderr()).is_ok_and(|stat| stream == Ok(format!("{}:{}", stat.st_dev, stat.st_ino)))
}

fn time() -> String {
    let now = i128::try_from(clock::now().as_nanos()).unwrap_or_default();
    // Fails after the year 9999.
    let now = OffsetDateTime::from_unix_timestamp_nanos(now).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    now.format(TIME).unwrap_or_default()
}

impl Logger {
    /// Starts the log thread once. To be called with reduced privileges, which a thread inherits.
    pub(crate) fn start(&'static self) -> io::Result<()> {
        if !self.started.load(Ordering::Relaxed) {
            thread::spawn("log", STACK, || self.queue.entries.iter().for_each(|entry| self.write(entry)))?;
            self.started.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Gives the log thread [`LAST_LINES`] to write what is queued. Call it before the process ends.
    pub(crate) fn finish(&'static self) {
        match self.start() {
            Ok(()) => self.queue.flush(LAST_LINES),
            // No thread is to be had: better to block than to end without a reason.
            Err(_) => self.queue.entries.try_iter().for_each(|entry| self.write(entry)),
        }
    }

    fn write(&self, entry: Entry) {
        let Entry::Line(line) = entry else { return };
        self.print(&line);
        if let Some(report) = self.queue.written(&line) {
            self.print(&self.line(Level::Warn, &format!("\"{report}\"")));
        }
    }

    fn print(&self, line: &str) {
        self.sink.log(&Record::builder().args(format_args!("{line}")).build());
    }

    fn line(&self, level: Level, message: &str) -> String {
        let (name, priority) = match level {
            Level::Error => ("error", 3),
            Level::Warn => ("warning", 4),
            Level::Info => ("info", 6),
            Level::Debug => ("debug", 7),
            Level::Trace => ("trace", 7),
        };
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
        self.queue.push(self.line(record.level(), &message), audit);
    }

    fn flush(&self) {}
}

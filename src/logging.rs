//! Log lines on standard error, in the form of the reference agent:
//! `time="…" level=info msg="…"`. For systemd's journal, which has its own time, with the priority instead.

use std::fs::File;
use std::io::{self, Stderr};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use log::{Level, LevelFilter, Log, Metadata, Record, SetLoggerError};
use simplelog::{ConfigBuilder, WriteLogger};
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use crate::audit;
use crate::sys::clock;

const TIME: &[BorrowedFormatItem<'static>] =
    format_description!("time=\"[year]-[month]-[day]T[hour]:[minute]:[second].[subsecond digits:3]Z\"");

/// Log lines of other crates are dropped: tungstenite would log keystrokes at trace level.
const OURS: &str = env!("CARGO_CRATE_NAME");

struct Logger {
    inner: Box<WriteLogger<Stderr>>,
    journal: bool,
}

/// Fails if called twice.
pub(crate) fn init(level: LevelFilter) -> Result<(), SetLoggerError> {
    let journal = stderr_is_journal();
    let mut config = ConfigBuilder::new();
    config
        .set_time_level(LevelFilter::Off)
        .set_level_padding(simplelog::LevelPadding::Off)
        .set_max_level(LevelFilter::Off)
        .set_target_level(LevelFilter::Off)
        .set_location_level(LevelFilter::Off)
        .set_thread_level(LevelFilter::Off);
    let inner = WriteLogger::new(level, config.build(), io::stderr());
    log::set_boxed_logger(Box::new(Logger { inner, journal }))?;
    log::set_max_level(level);
    Ok(())
}

/// systemd sets JOURNAL_STREAM to the device and inode of the stream that goes to the journal.
fn stderr_is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(metadata) = io::stderr().as_fd().try_clone_to_owned().and_then(|fd| File::from(fd).metadata())
    else {
        return false;
    };
    stream == format!("{}:{}", metadata.dev(), metadata.ino())
}

fn time() -> String {
    let now = i128::try_from(clock::now().as_nanos()).unwrap_or_default();
    // Fails after the year 9999.
    let now = OffsetDateTime::from_unix_timestamp_nanos(now).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    now.format(TIME).unwrap_or_default()
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with(OURS) && metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let (name, priority) = match record.level() {
            Level::Error => ("error", 3),
            Level::Warn => ("warning", 4),
            Level::Info => ("info", 6),
            Level::Debug => ("debug", 7),
            Level::Trace => ("trace", 7),
        };
        let message = if record.target() == audit::TARGET {
            format!("audit {}", record.args())
        } else {
            format!("{:?}", record.args().to_string())
        };
        let metadata = record.metadata().clone();
        let write = |args: std::fmt::Arguments<'_>| {
            self.inner.log(&Record::builder().metadata(metadata).args(args).build());
        };
        if self.journal {
            write(format_args!("<{priority}>level={name} msg={message}"));
        } else {
            write(format_args!("{} level={name} msg={message}", time()));
        }
    }

    fn flush(&self) {}
}

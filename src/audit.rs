//! The audit log: a line for each session, shell, transfer, forward and command, of the form `event=… key=value …`.
//!
//! The README describes each event's keys, their order and meaning, which are stable. Texts are quoted
//! and escaped, numbers are bare, times are seconds. It has nothing of what was typed, shown or transferred.

use std::fmt::{Display, Write};
use std::time::Instant;

use log::{Level, log};

use crate::proto::{SessionId, UserId};

/// The log target by which the logger recognises these lines.
pub(crate) const TARGET: &str = module_path!();

#[derive(Debug)]
#[must_use]
pub(crate) struct Record(String);

impl Record {
    pub(crate) fn new(event: &str, session: Option<&SessionId>, user: &UserId) -> Self {
        let session = session.map_or("", SessionId::as_str);
        Record(format!("event={event} session={session:?} user={:?}", user.as_str()))
    }

    /// Adds a number, or a word that needs no quotes.
    pub(crate) fn with(mut self, key: &str, value: impl Display) -> Self {
        // Writing to a String doesn't fail.
        let _ = write!(self.0, " {key}={value}");
        self
    }

    /// Adds quoted and escaped text.
    pub(crate) fn text(mut self, key: &str, value: impl AsRef<str>) -> Self {
        let _ = write!(self.0, " {key}={:?}", value.as_ref());
        self
    }

    /// Adds the duration in seconds.
    pub(crate) fn since(self, start: Instant, now: Instant) -> Self {
        let seconds = now.saturating_duration_since(start).as_secs_f64();
        self.with("duration", format_args!("{seconds:.3}"))
    }

    /// Adds the payload in bytes: to the device and from it.
    pub(crate) fn bytes(self, bytes_in: u64, bytes_out: u64) -> Self {
        self.with("bytes_in", bytes_in).with("bytes_out", bytes_out)
    }

    /// Writes the line, as a warning unless `good`.
    pub(crate) fn log(self, good: bool) {
        log!(target: TARGET, if good { Level::Info } else { Level::Warn }, "{}", self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_peer_cannot_forge_a_line() {
        let start = Instant::now();
        let session = SessionId::new("s\nevent=x");
        let record = Record::new("shell-end", session.as_ref(), &"a\" pid=1".into())
            .with("pid", 7)
            .since(start, start + Duration::from_millis(1500))
            .bytes(1, 2)
            .text("reason", "\u{1b}[2J");
        assert_eq!(
            record.0,
            r#"event=shell-end session="s\nevent=x" user="a\" pid=1" pid=7 duration=1.500 bytes_in=1 bytes_out=2 reason="\u{1b}[2J""#
        );
    }
}

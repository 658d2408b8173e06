//! The audit log: a line `event=… key=value …` for each session, shell, transfer, forward and command.
//! docs/operations.md describes its keys, whose order is stable. It never contains input, output or contents of files.

use std::ffi::OsStr;
use std::fmt::{Display, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use log::{Level, log};

use crate::proto::{SessionId, UserId};

/// Marks audit lines for the logger.
pub(crate) const TARGET: &str = module_path!();

/// In bytes, escaped. Keeps a line below 4 KiB.
const MAX_TEXT: usize = 256;
/// In bytes, escaped.
const MAX_PATH: usize = 1024;

#[must_use]
pub(crate) struct Record(String);

impl Record {
    pub(crate) fn new(event: &str, session: Option<&SessionId>, user: &UserId) -> Self {
        let session = session.map_or("", SessionId::as_str);
        Record(format!("event={event}")).text("session", session).text("user", user.as_str())
    }

    /// `value` needs no quotes.
    pub(crate) fn with(mut self, key: &str, value: impl Display) -> Self {
        // Writing to a String cannot fail.
        let _ = write!(self.0, " {key}={value}");
        self
    }

    pub(crate) fn text(self, key: &str, value: impl AsRef<str>) -> Self {
        self.with(key, quoted(value.as_ref(), MAX_TEXT))
    }

    /// The end of a long one, without what means nothing: `/./././` would push the file's name out of the line.
    pub(crate) fn path(self, key: &str, value: &Path) -> Self {
        let value: PathBuf = value.components().collect();
        let bytes = value.as_os_str().as_bytes();
        // Other bytes appear as `\xFF`; none takes more than five characters.
        let end = OsStr::from_bytes(&bytes[bytes.len().saturating_sub(MAX_PATH / 5)..]);
        match value.to_str() {
            Some(text) => self.with(key, quoted_end(text, MAX_PATH)),
            None => self.with(key, format_args!("{end:?}")),
        }
    }

    pub(crate) fn since(self, start: Instant, now: Instant) -> Self {
        let seconds = now.saturating_duration_since(start).as_secs_f64();
        self.with("duration", format_args!("{seconds:.3}"))
    }

    /// Payload to the device, and from it.
    pub(crate) fn bytes(self, bytes_in: u64, bytes_out: u64) -> Self {
        self.with("bytes_in", bytes_in).with("bytes_out", bytes_out)
    }

    /// Logs a warning unless `good`.
    pub(crate) fn log(self, good: bool) {
        log!(target: TARGET, if good { Level::Info } else { Level::Warn }, "{}", self.0);
    }
}

/// Characters that fit into `limit` bytes when they are escaped.
fn fits(limit: usize) -> impl FnMut(&char) -> bool {
    let mut length = 0;
    move |c| {
        length += c.escape_debug().map(char::len_utf8).sum::<usize>();
        length <= limit
    }
}

fn quoted_end(text: &str, limit: usize) -> String {
    let kept: usize = text.chars().rev().take_while(fits(limit)).map(char::len_utf8).sum();
    let mut quoted = format!("{:?}", &text[text.len() - kept..]);
    if kept < text.len() {
        quoted.insert(1, '…');
    }
    quoted
}

/// Truncates to `limit` bytes between the quotes.
pub(crate) fn quoted(text: &str, limit: usize) -> String {
    let kept: String = text.chars().take_while(fits(limit)).collect();
    let mut quoted = format!("{kept:?}");
    if kept.len() < text.len() {
        quoted.insert(quoted.len() - 1, '…');
    }
    quoted
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

    /// A path of 3,000 bytes led to /etc/shadow, and the line ended before that.
    #[test]
    fn a_long_path_has_its_name_in_the_line() {
        let line = |path: &str| Record::new("stat", None, &"".into()).path("path", Path::new(path)).0;
        let shown = line(&format!("/{}etc//shadow", "./".repeat(1500)));
        assert!(shown.ends_with(r#" path="/etc/shadow""#), "{shown}");
        let shown = line(&format!("/etc{}/shadow", "/../etc".repeat(300)));
        assert!(shown.len() < 1200 && shown.ends_with(r#"/../etc/shadow""#), "{shown}");
    }

    #[test]
    fn long_fields_are_cut_between_their_characters() {
        let strange = Path::new(OsStr::from_bytes(b"caf\xe9\n"));
        let record = Record::new("stat", None, &"".into()).path("path", strange);
        assert!(record.0.ends_with(r#" path="caf\xE9\n""#), "{}", record.0);
        assert_eq!(quoted("it's", 3), r#""it…""#);
        assert_eq!(quoted("\n\n\n", 5), r#""\n\n…""#);
        assert_eq!(quoted("äö", 3), r#""ä…""#);
        assert_eq!(quoted("äö", 4), r#""äö""#);
        assert_eq!([3, 4].map(|limit| quoted_end("äö", limit)), [r#""…ö""#, r#""äö""#]);
        let long = "\u{1}".repeat(4096);
        let id = SessionId::new(&long);
        let record = Record::new("transfer", id.as_ref(), &long.as_str().into())
            .path("path", Path::new(&long))
            .text("reason", &long);
        assert!((1700..2048).contains(&record.0.len()), "{} bytes", record.0.len());
    }
}

//! The command: asks the daemon and prints the answer. Texts from clients are escaped.

use std::fmt;
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::socket::SockFlag;
use serde_json::{Value, json};

use super::document::{Part, Session, State, Status};
use super::{ANSWER_LIMIT, connect, socket_path};
use crate::sys::{PollSet, reason};

/// In bytes; the daemon's own bounds are far lower.
const LARGEST_ANSWER: u64 = 16 << 20;
/// Interval of `--watch`.
const INTERVAL: Duration = Duration::from_secs(1);
/// Forwards shown per session.
const MAX_FORWARDS: usize = 16;
/// Characters shown of a path or a target: its end.
const MAX_NAME: usize = 40;

const ADVICE: &str = "Is the daemon running, and are you root or the daemon's user? \
    If it couldn't make this socket, its log says so.";

/// Asks the daemon.
pub(crate) fn fetch() -> io::Result<Status> {
    let stream = connect(&socket_path(), SockFlag::empty())?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut answer = Vec::new();
    stream.take(LARGEST_ANSWER).read_to_end(&mut answer).map_err(|e| match e.kind() {
        ErrorKind::WouldBlock => io::Error::new(ErrorKind::TimedOut, "no answer in time"),
        _ => e,
    })?;
    match answer.len() as u64 {
        0 => Err(io::Error::other("the daemon hung up without an answer")),
        LARGEST_ANSWER => Err(io::Error::other("the answer has no end")),
        _ => serde_json::from_slice(&answer)
            .map(|json| Status::from_json(&json).unwrap_or_default())
            .map_err(|_| io::Error::other("the answer is no JSON document")),
    }
}

/// Prints the daemon's state, once or every second. False if the daemon can't be asked.
pub(crate) fn show(json: bool, watch: bool) -> bool {
    let mut out = io::stdout();
    loop {
        let next = Instant::now() + INTERVAL;
        let text = match fetch() {
            Ok(status) if json => line(&status.to_json()),
            Ok(status) => status.to_string(),
            Err(e) => {
                let why = format!("{}: {}", socket_path().display(), reason(&e));
                if !watch {
                    let _ = writeln!(io::stderr(), "mender-connect status: {why}\n{ADVICE}");
                    return false;
                }
                if json { line(&json!({ "error": why })) } else { why + "\n" }
            }
        };
        let text = match watch && !json {
            // Overwrites from the top, and clears the rest of each line and of the screen: no flicker.
            true if out.is_terminal() => format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")),
            true => text + "\n",
            false => text,
        };
        // The reader has closed its end of the pipe.
        if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() || !watch {
            return true;
        }
        let mut set = PollSet::new();
        let place = set.add(out.as_fd(), PollFlags::empty());
        if set.wait(Some(next)).is_err() || !set.events(place).is_empty() {
            return true;
        }
    }
}

/// JSON without characters that a terminal obeys; JSON itself escapes only the first 32.
fn line(json: &Value) -> String {
    let shown = |c: char| if c.is_control() { format!("\\u{:04x}", c as u32) } else { c.to_string() };
    json.to_string().chars().map(shown).collect::<String>() + "\n"
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { connection, token, shells, transferred, .. } = self;
        let (version, source) = (self.version.escape_debug(), token.source.escape_debug());
        writeln!(f, "mender-connect {version}, pid {}, up {}", self.pid, time(self.uptime))?;
        write!(f, "{}", connection.state.map_or("in an unknown state", State::name))?;
        if let Some(server) = &connection.server {
            write!(f, " ({})", server.escape_debug())?;
        }
        write!(f, " for {}", time(connection.r#for))?;
        if let Some(wait) = connection.next_attempt_in {
            write!(f, ", next attempt in {}", time(wait))?;
        }
        if connection.failed_attempts > 0 {
            write!(f, ", {} failed", connection.failed_attempts)?;
        }
        match token.length {
            Some(length) => writeln!(f, "\ntoken of {length} bytes from {source}")?,
            None => writeln!(f, "\nno token from {source}")?,
        }
        if let (Some(error), Some(age)) = (&connection.last_error, connection.last_error_age) {
            writeln!(f, "last error {} ago: {}", time(age), error.escape_debug())?;
        }
        let files = bytes(transferred.bytes_in, transferred.bytes_out);
        writeln!(f, "shells {} of {}, files {files}", shells.running, shells.max)?;
        self.sessions.iter().try_for_each(|session| write!(f, "\n{session}"))
    }
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let traffic = |age, idle, bytes_in, bytes_out| {
            format!("{}, idle {}, {}", time(age), time(idle), bytes(bytes_in, bytes_out))
        };
        writeln!(f, "{}  user {}", self.id.escape_debug(), self.user.escape_debug())?;
        write!(f, "  ")?;
        self.kinds.iter().try_for_each(|kind| write!(f, "{}, ", kind.escape_debug()))?;
        writeln!(f, "{}", traffic(self.age, self.idle, self.bytes_in, self.bytes_out))?;
        if let Some(shell) = &self.shell {
            let traffic = traffic(shell.age, shell.idle, shell.bytes_in, shell.bytes_out);
            writeln!(f, "  shell {}, {traffic}", shell.pid)?;
        }
        for transfer in &self.transfers {
            let done = match transfer.size {
                Some(size @ 1..) => {
                    let percent = (transfer.bytes as f64 * 100.0 / size as f64) as u64;
                    format!("{percent} % of {}", amount(size))
                }
                _ => amount(transfer.bytes),
            };
            let (direction, path) = (transfer.direction.escape_debug(), name(&transfer.path));
            writeln!(f, "  {direction} {path}, {done}, {}", time(transfer.age))?;
        }
        for forward in self.forwards.iter().take(MAX_FORWARDS) {
            write!(f, "  {} {}", forward.protocol.escape_debug(), name(&forward.target))?;
            let address = forward.address.as_deref().unwrap_or("connecting");
            if address != forward.target {
                write!(f, " ({})", address.escape_debug())?;
            }
            writeln!(f, ", {}", traffic(forward.age, forward.idle, forward.bytes_in, forward.bytes_out))?;
        }
        match self.forwards_open.saturating_sub(self.forwards.len().min(MAX_FORWARDS) as u64) {
            0 => Ok(()),
            more => writeln!(f, "  and {more} connections more"),
        }
    }
}

fn bytes(bytes_in: u64, bytes_out: u64) -> String {
    format!("{} in, {} out", amount(bytes_in), amount(bytes_out))
}

/// Escaped and shortened.
fn name(text: &str) -> String {
    let text = text.escape_debug().to_string();
    match text.char_indices().rev().nth(MAX_NAME) {
        Some((at, c)) => format!("…{}", &text[at + c.len_utf8()..]),
        None => text,
    }
}

fn amount(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let (mut rest, mut unit) = (bytes, 0);
    while rest >= 1 << 20 {
        (rest, unit) = (rest >> 10, unit + 1);
    }
    let tenths = rest * 10 / 1024;
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// The two largest units.
fn time(seconds: f64) -> String {
    let s = seconds as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_and_times_are_short() {
        let amounts: Vec<_> = [0, 1023, 1024, 1536, 1 << 20, u64::MAX].map(amount).into();
        assert_eq!(amounts, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "15.9 EiB"]);
        let times = [0.9, 59.9, 61.0, 7260.0, 90_000.0].map(time);
        assert_eq!(times, ["0 s", "59 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]);
    }

    #[test]
    fn a_name_is_escaped_and_shortened_to_its_end() {
        assert_eq!(name("/a\u{1b}[2J\u{9b}\u{202e}"), "/a\\u{1b}[2J\\u{9b}\\u{202e}");
        let long = "ä".repeat(60) + "end";
        assert_eq!(name(&long), format!("…{}end", "ä".repeat(37)));
        assert_eq!(name(&"x".repeat(40)), "x".repeat(40));
    }

    #[test]
    fn whatever_comes_is_survived() {
        for odd in [json!(null), json!([1]), json!({ "sessions": [7, { "transfers": [{}] }] })] {
            let status = Status::from_json(&odd).unwrap_or_default();
            assert!(status.to_string().ends_with('\n'));
        }
        let other = json!({ "connection": { "state": "dancing", "for": 61.5, "new": 1 }, "version": "9" });
        let status = Status::from_json(&other).unwrap();
        assert_eq!((status.version.as_str(), status.connection.state), ("9", None));
        assert_eq!(status.to_json()["connection"]["for"], 61.5);
    }
}

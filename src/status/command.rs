//! The command `status`: asks the daemon and prints the answer, with texts from clients escaped.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, Instant};

use miniserde::Serialize;
use nix::poll::PollFlags;

use super::document::{Session, Status};
use super::{connect, socket_path};
use crate::sys::pty::WindowSize;
use crate::sys::{poll_one, reason, visible, visible_lines};

/// In bytes; the daemon's own bounds are far lower.
const LARGEST_ANSWER: u64 = 16 << 20;
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

const ADVICE: &str = "Is the daemon running, and are you root or the daemon's user? \
    If it couldn't make this socket, its log says so.";

pub(crate) fn fetch() -> io::Result<Status> {
    let stream = connect(&socket_path())?;
    stream.set_read_timeout(Some(ANSWER_LIMIT))?;
    let mut answer = String::new();
    stream.take(LARGEST_ANSWER).read_to_string(&mut answer).map_err(|e| match e.kind() {
        ErrorKind::WouldBlock => io::Error::new(ErrorKind::TimedOut, "no answer in time"),
        _ => e,
    })?;
    miniserde::json::from_str(&answer).map_err(|_| io::Error::other("the answer is no status document"))
}

/// Returns false if the daemon does not answer.
pub(crate) fn show(json: bool, watch: bool) -> bool {
    let mut out = io::stdout();
    loop {
        let text = match fetch() {
            Ok(status) if json => line(&status),
            Ok(status) => describe(&status),
            Err(e) => {
                let why = format!("{}: {}", socket_path().display(), reason(&e));
                if !watch {
                    let _ = writeln!(io::stderr(), "mender-connect status: {}\n{ADVICE}", visible(&why));
                    return false;
                }
                if json { line(&BTreeMap::from([("error", why)])) } else { visible(&why) + "\n" }
            }
        };
        let text = visible_lines(&text);
        let text = match WindowSize::of(&out) {
            _ if !watch || json => text,
            Ok(size) => picture(&text, size),
            Err(_) => text + "\n",
        };
        // Fails if the reader has closed the pipe.
        let written = out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_ok();
        if !written || !watch {
            return true;
        }
        let _ = poll_one(&out, PollFlags::empty(), Some(Instant::now() + WATCH_INTERVAL));
    }
}

/// Overwrites from the top, and clears the rest of each line and of the screen: no flicker. More than the terminal has
/// would scroll.
fn picture(text: &str, size: WindowSize) -> String {
    // A serial console doesn't know its size.
    let [width, height] = [size.width, size.height].map(|n| usize::from(n).wrapping_sub(1));
    let mut lines: Vec<String> = text.lines().map(|line| line.chars().take(width).collect()).collect();
    if lines.len() > height {
        let more = lines.split_off(height.saturating_sub(1)).len();
        lines.push(format!("and {more} lines more"));
    }
    format!("\x1b[H{}\x1b[J", lines.into_iter().map(|line| line + "\x1b[K\n").collect::<String>())
}

fn line(document: &impl Serialize) -> String {
    miniserde::json::to_string(document) + "\n"
}

fn describe(status: &Status) -> String {
    let Status { connection, token, shells, transferred, .. } = status;
    let (version, pid) = (status.version.escape_debug(), status.pid);
    let mut out = format!("mender-connect {version}, pid {pid}, up {}\n", time(status.uptime));
    out += &connection.state.name();
    out.extend(connection.server.as_ref().map(|server| format!(" ({})", server.escape_debug())));
    out += &format!(" for {}", time(connection.r#for));
    out.extend(connection.next_attempt_in.map(|next| format!(", next attempt in {}", time(next))));
    let failed = Some(connection.failed_attempts).filter(|failed| *failed > 0);
    out.extend(failed.map(|failed| format!(", {failed} failed")));
    let length = token.length.map(|length| format!("token of {length} bytes"));
    out += &format!("\n{} from {}\n", length.as_deref().unwrap_or("no token"), token.source.escape_debug());
    let (age, error) = (time(connection.last_error_age.unwrap_or(0.0)), &connection.last_error);
    out.extend(error.as_ref().map(|error| format!("last error {age} ago: {}\n", error.escape_debug())));
    let files = bytes(transferred.bytes_in, transferred.bytes_out);
    out += &format!("shells {} of {}, files {files}\n", shells.running, shells.max);
    out + &status.sessions.iter().map(describe_session).collect::<String>()
}

fn describe_session(session: &Session) -> String {
    let traffic = |age, idle, bytes_in, bytes_out| {
        format!("{}, idle {}, {}", time(age), time(idle), bytes(bytes_in, bytes_out))
    };
    let mut out = format!("\n{}  user {}\n  ", session.id.escape_debug(), session.user.escape_debug());
    out.extend(session.kinds.iter().map(|kind| format!("{}, ", kind.escape_debug())));
    out += &format!("{}\n", traffic(session.age, session.idle, session.bytes_in, session.bytes_out));
    if let Some(shell) = &session.shell {
        let traffic = traffic(shell.age, shell.idle, shell.bytes_in, shell.bytes_out);
        let detached = session.detached.map(|since| format!(", detached {}", time(since)));
        out += &format!("  shell {}, {traffic}{}\n", shell.pid, detached.unwrap_or_default());
    }
    for transfer in &session.transfers {
        let done = match transfer.size {
            None | Some(0) => amount(transfer.bytes),
            Some(size) => {
                format!("{} % of {}", (transfer.bytes as f64 * 100.0 / size as f64) as u64, amount(size))
            }
        };
        let direction = transfer.direction.escape_debug();
        out += &format!("  {direction} {}, {done}, {}\n", transfer.path.escape_debug(), time(transfer.age));
    }
    for forward in &session.forwards {
        let (protocol, target) = (forward.protocol.escape_debug(), forward.target.escape_debug());
        let address = match &forward.address {
            Some(address) if *address == forward.target => String::new(),
            Some(address) => format!(" ({})", address.escape_debug()),
            None => " (connecting)".to_owned(),
        };
        let traffic = traffic(forward.age, forward.idle, forward.bytes_in, forward.bytes_out);
        out += &format!("  {protocol} {target}{address}, {traffic}\n");
    }
    match session.forwards_open.saturating_sub(session.forwards.len()) {
        0 => out,
        more => out + &format!("  and {more} connections more\n"),
    }
}

fn bytes(to_device: u64, from_device: u64) -> String {
    format!("{} in, {} out", amount(to_device), amount(from_device))
}

fn amount(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let magnitude = bytes.max(1).ilog2() as usize / 10;
    let Some(unit) = magnitude.checked_sub(1) else { return format!("{bytes} B") };
    let tenths = (bytes >> (10 * unit)) * 10 / 1024;
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

    /// A taller one scrolled with each look.
    #[test]
    fn a_picture_fits_its_terminal() {
        let shows = |width, height, lines: &[&str]| {
            let wanted: String = lines.iter().map(|line| format!("{line}\x1b[K\n")).collect();
            assert_eq!(
                picture("é2345\nb\nc\n", WindowSize { width, height }),
                format!("\x1b[H{wanted}\x1b[J")
            );
        };
        shows(0, 0, &["é2345", "b", "c"]);
        shows(5, 4, &["é234", "b", "c"]);
        shows(20, 3, &["é2345", "and 2 lines more"]);
    }

    #[test]
    fn a_daemon_of_another_version_is_understood() {
        let text = r#"{ "connection": { "failed_attempts": 0, "for": 61.5, "new": 1, "state": "waiting" },
            "pid": 7, "sessions": [], "shells": { "max": 16, "running": 0 }, "token": { "source": "dbus" },
            "transferred": { "average_in": 0.0, "average_out": 0.0, "bytes_in": 0, "bytes_out": 0 },
            "uptime": 0.5, "version": "9" }"#;
        let text = describe(&miniserde::json::from_str(text).unwrap());
        let start = "mender-connect 9, pid 7, up 0 s\nwaiting for 1 min 1 s\nno token from dbus\n";
        assert!(text.starts_with(start), "{text}");
    }
}

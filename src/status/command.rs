//! The command: asks the daemon and prints the answer. Texts from clients are escaped.

use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::socket::SockFlag;
use serde_json::{Value, json};

use super::document::State;
use super::{ANSWER_LIMIT, connect, socket_path};
use crate::sys::{poll_one, reason};

/// In bytes; the daemon's own bounds are far lower.
const LARGEST_ANSWER: u64 = 16 << 20;
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Forwards shown per session.
const MAX_FORWARDS: usize = 16;
/// Characters shown of a path or a target: its end.
const MAX_NAME: usize = 40;

const ADVICE: &str = "Is the daemon running, and are you root or the daemon's user? \
    If it couldn't make this socket, its log says so.";

pub(crate) fn fetch() -> io::Result<Value> {
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
        _ => serde_json::from_slice(&answer).map_err(|_| io::Error::other("the answer is no JSON document")),
    }
}

/// False if the daemon can't be asked.
pub(crate) fn show(json: bool, watch: bool) -> bool {
    let mut out = io::stdout();
    loop {
        let next = Instant::now() + WATCH_INTERVAL;
        let text = match fetch() {
            Ok(status) if json => line(&status),
            Ok(status) => describe(&status),
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
        if !poll_one(&out, PollFlags::empty(), Some(next)).is_ok_and(|events| events.is_empty()) {
            return true;
        }
    }
}

/// JSON without characters that a terminal obeys; JSON itself escapes only the first 32.
fn line(json: &Value) -> String {
    let shown = |c: char| if c.is_control() { format!("\\u{:04x}", c as u32) } else { c.to_string() };
    json.to_string().chars().map(shown).collect::<String>() + "\n"
}

/// The document as text. A daemon of another version may have written it: fields that are missing or of another type
/// read as nothing, or zero.
fn describe(status: &Value) -> String {
    let (connection, token) = (&status["connection"], &status["token"]);
    let (version, pid) = (text(&status["version"]), count(&status["pid"]));
    let mut out = format!("mender-connect {version}, pid {pid}, up {}\n", time(&status["uptime"]));
    out += State::of(status).map_or("in an unknown state", State::name);
    out.extend(connection["server"].as_str().map(|server| format!(" ({})", server.escape_debug())));
    out += &format!(" for {}", time(&connection["for"]));
    let next = &connection["next_attempt_in"];
    out.extend(next.is_number().then(|| format!(", next attempt in {}", time(next))));
    let failed = connection["failed_attempts"].as_u64().filter(|failed| *failed > 0);
    out.extend(failed.map(|failed| format!(", {failed} failed")));
    let length = token["length"].as_u64().map(|length| format!("token of {length} bytes"));
    let length = length.as_deref().unwrap_or("no token");
    out += &format!("\n{length} from {}\n", text(&token["source"]));
    let (age, error) = (time(&connection["last_error_age"]), connection["last_error"].as_str());
    out.extend(error.map(|error| format!("last error {age} ago: {}\n", error.escape_debug())));
    let (running, max) = (count(&status["shells"]["running"]), count(&status["shells"]["max"]));
    out += &format!("shells {running} of {max}, files {}\n", bytes(&status["transferred"]));
    out + &list(&status["sessions"]).iter().map(describe_session).collect::<String>()
}

fn describe_session(session: &Value) -> String {
    let mut out = format!("\n{}  user {}\n  ", text(&session["id"]), text(&session["user"]));
    out.extend(list(&session["kinds"]).iter().map(|kind| text(kind) + ", "));
    out += &format!("{}\n", traffic(session));
    let shell = &session["shell"];
    if shell.is_object() {
        out += &format!("  shell {}, {}\n", shell["pid"].as_i64().unwrap_or(0), traffic(shell));
    }
    for transfer in list(&session["transfers"]) {
        let done = count(&transfer["bytes"]);
        let done = match count(&transfer["size"]) {
            0 => amount(done),
            size => format!("{} % of {}", (done as f64 * 100.0 / size as f64) as u64, amount(size)),
        };
        let (direction, path) = (text(&transfer["direction"]), clipped(text(&transfer["path"])));
        out += &format!("  {direction} {path}, {done}, {}\n", time(&transfer["age"]));
    }
    let forwards = list(&session["forwards"]);
    for forward in forwards.iter().take(MAX_FORWARDS) {
        let (protocol, target) = (text(&forward["protocol"]), clipped(text(&forward["target"])));
        let address = match &forward["address"] {
            address if *address == forward["target"] => String::new(),
            Value::String(address) => format!(" ({})", address.escape_debug()),
            _ => " (connecting)".to_owned(),
        };
        out += &format!("  {protocol} {target}{address}, {}\n", traffic(forward));
    }
    match count(&session["forwards_open"]).saturating_sub(forwards.len().min(MAX_FORWARDS) as u64) {
        0 => out,
        more => out + &format!("  and {more} connections more\n"),
    }
}

fn list(json: &Value) -> &[Value] {
    json.as_array().map_or(&[], Vec::as_slice)
}

fn count(json: &Value) -> u64 {
    json.as_u64().unwrap_or(0)
}

/// Escaped.
fn text(json: &Value) -> String {
    json.as_str().unwrap_or_default().escape_debug().to_string()
}

fn traffic(of: &Value) -> String {
    format!("{}, idle {}, {}", time(&of["age"]), time(&of["idle"]), bytes(of))
}

fn bytes(of: &Value) -> String {
    format!("{} in, {} out", amount(count(&of["bytes_in"])), amount(count(&of["bytes_out"])))
}

/// Its last [`MAX_NAME`] characters.
fn clipped(text: String) -> String {
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
fn time(seconds: &Value) -> String {
    let s = seconds.as_f64().unwrap_or(0.0) as u64;
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
        let times = [0.9, 59.9, 61.0, 7260.0, 90_000.0].map(|seconds| time(&json!(seconds)));
        assert_eq!(times, ["0 s", "59 s", "1 min 1 s", "2 h 1 min", "1 d 1 h"]);
    }

    #[test]
    fn a_name_is_escaped_and_shortened_to_its_end() {
        let name = |name: &str| clipped(text(&json!(name)));
        assert_eq!(name("/a\u{1b}[2J\u{9b}\u{202e}"), "/a\\u{1b}[2J\\u{9b}\\u{202e}");
        let long = "ä".repeat(60) + "end";
        assert_eq!(name(&long), format!("…{}end", "ä".repeat(37)));
        assert_eq!(name(&"x".repeat(40)), "x".repeat(40));
    }

    #[test]
    fn whatever_comes_is_survived() {
        for odd in [json!(null), json!([1]), json!({ "sessions": [7, { "transfers": [{}] }] })] {
            assert!(describe(&odd).ends_with('\n'));
        }
        let other = json!({ "connection": { "state": "dancing", "for": 61.5, "new": 1 }, "version": "9" });
        let text = describe(&other);
        assert!(
            text.starts_with("mender-connect 9, pid 0, up 0 s\nin an unknown state for 1 min 1 s\n"),
            "{text}"
        );
    }
}

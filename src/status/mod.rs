//! The command `status`, and the socket of the daemon that answers it.
//!
//! The daemon listens on `status.sock` in `$RUNTIME_DIRECTORY` (systemd's; else `/run/mender-connect`). A client
//! gets one JSON document and end of file. Only the daemon's user and root may connect.

mod listener;
mod text;

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};
use serde_json::{Value, json};

use crate::sys::{PollSet, reason};

pub(crate) use self::listener::Listener;

const DEFAULT_DIRECTORY: &str = "/run/mender-connect";
const NAME: &str = "status.sock";

/// Limit of the daemon's answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// In bytes; the daemon's own bounds are far lower.
const LARGEST_ANSWER: u64 = 16 << 20;
/// Interval of `--watch`.
const INTERVAL: Duration = Duration::from_secs(1);

/// The directory of the socket.
fn directory() -> PathBuf {
    let directories = std::env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    let first = std::env::split_paths(&directories).next().filter(|path| path.is_absolute());
    first.unwrap_or_else(|| DEFAULT_DIRECTORY.into())
}

/// Connects to `path`; `flags` are those of our own socket.
fn connect(path: &Path, flags: SockFlag) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | flags;
    let ours = UnixStream::from(socket(AddressFamily::Unix, SockType::Stream, flags, None)?);
    // Bounds the wait for a place in the queue of a hung daemon.
    ours.set_write_timeout(Some(ANSWER_LIMIT))?;
    nix::sys::socket::connect(ours.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(ours)
}

/// Asks the daemon for its state.
pub(crate) fn fetch() -> io::Result<Value> {
    let deadline = Instant::now() + ANSWER_LIMIT;
    let mut stream = connect(&directory().join(NAME), SockFlag::empty())?;
    let mut answer = Vec::new();
    let mut place = vec![0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut place) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&place[..n]),
            // Time is up, or a signal has come.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(e),
        }
        if answer.len() as u64 > LARGEST_ANSWER {
            return Err(io::Error::other("the answer has no end"));
        }
    }
    if answer.is_empty() {
        return Err(io::Error::other("the daemon hung up without an answer"));
    }
    serde_json::from_slice(&answer).map_err(|_| io::Error::other("the answer is no JSON document"))
}

/// Prints the daemon's state, as JSON if `json` says so, once or every second. False if the daemon can't be asked.
pub(crate) fn show(json: bool, watch: bool) -> bool {
    let mut out = io::stdout();
    let screen = watch && !json && out.is_terminal();
    loop {
        let next = Instant::now() + INTERVAL;
        let picture = match fetch() {
            Ok(state) if json => line(&state),
            Ok(state) => text::of(&state),
            Err(e) => {
                let why = format!("{}: {}", directory().join(NAME).display(), reason(&e));
                if !watch {
                    complain(&why);
                    return false;
                }
                if json { line(&json!({ "error": why })) } else { format!("{why}\n") }
            }
        };
        let picture = match (screen, watch && !json) {
            // Overwrites from the top, and clears the rest of each line and of the screen: no flicker.
            (true, _) => format!("\x1b[H{}\x1b[J", picture.replace('\n', "\x1b[K\n")),
            (false, true) => format!("{picture}\n"),
            (false, false) => picture,
        };
        // The reader has closed its end of the pipe.
        if out.write_all(picture.as_bytes()).and_then(|()| out.flush()).is_err() || !watch {
            return true;
        }
        let mut set = PollSet::new();
        let place = set.add(out.as_fd(), PollFlags::empty());
        if set.wait(Some(next)).is_err() || !set.events(place).is_empty() {
            return true;
        }
    }
}

fn complain(why: &str) {
    let _ = writeln!(
        io::stderr(),
        "mender-connect status: {why}\n\
         Is the daemon running, and are you root or the daemon's user? If it couldn't make this socket, its log says so."
    );
}

/// The document in one line, without characters that a terminal obeys.
fn line(document: &Value) -> String {
    let mut line = String::new();
    for c in document.to_string().chars() {
        // JSON itself escapes only the first 32.
        if c.is_control() { line.push_str(&format!("\\u{:04x}", c as u32)) } else { line.push(c) }
    }
    line + "\n"
}

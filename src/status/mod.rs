//! The command `status`, and the socket of the daemon that answers it.
//!
//! The daemon listens on `status.sock` in `$RUNTIME_DIRECTORY` (systemd's; else `/run/mender-connect`). Whoever connects
//! gets one JSON document and end of file. Only the daemon's user and root can.

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

/// How long the daemon may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// The largest answer: the daemon bounds its own far below.
const LARGEST_ANSWER: u64 = 16 << 20;
/// Between the pictures of `--watch`.
const INTERVAL: Duration = Duration::from_secs(1);

/// Where the socket's directory is.
fn directory() -> PathBuf {
    let directories = std::env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    let first = std::env::split_paths(&directories).next().filter(|path| path.is_absolute());
    first.unwrap_or_else(|| DEFAULT_DIRECTORY.into())
}

/// Connects to a socket, with `flags` for the own one.
fn connect(path: &Path, flags: SockFlag) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | flags;
    let ours = UnixStream::from(socket(AddressFamily::Unix, SockType::Stream, flags, None)?);
    // For a place in the queue of a daemon that stands still.
    ours.set_write_timeout(Some(ANSWER_LIMIT))?;
    nix::sys::socket::connect(ours.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(ours)
}

/// Asks the daemon for its state.
///
/// # Errors
/// When there is none, when it may not be asked, and when it doesn't answer in time or with a document.
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

/// Prints the daemon's state, as JSON where `json` says so, once or again each second. Whether that could be had.
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
            // From the top, each line and at last the screen cleared behind what is written.
            (true, _) => format!("\x1b[H{}\x1b[J", picture.replace('\n', "\x1b[K\n")),
            (false, true) => format!("{picture}\n"),
            (false, false) => picture,
        };
        // Whoever reads this may have gone away, which ends it.
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

/// A document in one line that no terminal takes for anything else.
fn line(document: &Value) -> String {
    let mut line = String::new();
    for c in document.to_string().chars() {
        // JSON itself escapes only the first 32.
        if c.is_control() { line.push_str(&format!("\\u{:04x}", c as u32)) } else { line.push(c) }
    }
    line + "\n"
}

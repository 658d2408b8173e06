//! The daemon's state, over a socket to the command `status`.
//!
//! The daemon listens on `status.sock` in `$RUNTIME_DIRECTORY` (systemd's; else `/run/mender-connect`). A client
//! gets one JSON document and end of file. Only the daemon's user and root may connect.

mod command;
mod document;
mod server;

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};

pub(crate) use self::command::{fetch, show};
pub(crate) use self::document::{Connection, State, Status};
pub(crate) use self::server::Server;

/// Limit of a whole answer, on either side.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

fn socket_path() -> PathBuf {
    let directories = std::env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    let first = std::env::split_paths(&directories).next().filter(|path| path.is_absolute());
    first.unwrap_or_else(|| "/run/mender-connect".into()).join("status.sock")
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

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

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};

pub(crate) use self::command::{fetch, show};
pub(crate) use self::document::{Connection, State, Status};
pub(crate) use self::server::Server;

fn socket_path() -> PathBuf {
    let directories = std::env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    let first = std::env::split_paths(&directories).next().filter(|path| path.is_absolute());
    first.unwrap_or_else(|| "/run/mender-connect".into()).join("status.sock")
}

/// Fails at once where a hung daemon's queue is full.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let ours = UnixStream::from(socket(AddressFamily::Unix, SockType::Stream, flags, None)?);
    nix::sys::socket::connect(ours.as_raw_fd(), &UnixAddr::new(path)?)?;
    ours.set_nonblocking(false)?;
    Ok(ours)
}

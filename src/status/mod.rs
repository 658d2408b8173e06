//! The daemon's state, over a socket to the command `status`: `status.sock` in `$RUNTIME_DIRECTORY` (systemd's; else
//! `/run/mender-connect`). A client gets one JSON document and end of file. Only root and the daemon's user may
//! connect.
//!
//! The socket is in the supervisor's poll loop, each answer in a thread of its own, so that a client that doesn't read
//! blocks nothing. Failures are warnings: the daemon works without the socket.

mod command;
mod document;

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, socket};

pub(crate) use self::command::{fetch, show};
pub(crate) use self::document::{Connection, State, Status};
use crate::sys::wake::Wake;
use crate::sys::{PollSet, reason, thread};

/// Concurrent answers. Further clients wait in the socket's queue.
const MAX_ANSWERS: usize = 4;
/// Limit of a write without progress.
const WRITE_LIMIT: Duration = Duration::from_secs(1);
/// After accept(2) has failed.
const PAUSE: Duration = Duration::from_secs(5);

pub(crate) struct Server {
    listener: Option<UnixListener>,
    /// Cloned by each answer in progress.
    answers: Arc<()>,
    wake: Arc<Wake>,
    /// End of the latest pause; `None` once an answer has begun since.
    pause: Option<Instant>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.listener.is_some() {
            let _ = fs::remove_file(socket_path());
        }
    }
}

impl Server {
    /// Notifies `wake` when another answer may begin.
    pub(crate) fn open(wake: &Arc<Wake>) -> Self {
        let path = socket_path();
        let listener = listen(&path).inspect_err(|e| warn!("no status: {}: {}", path.display(), reason(e)));
        Server { listener: listener.ok(), answers: Arc::default(), wake: Arc::clone(wake), pause: None }
    }

    /// `None` while no other answer may begin.
    fn ready(&self, now: Instant) -> Option<&UnixListener> {
        let busy = Arc::strong_count(&self.answers) > MAX_ANSWERS;
        self.listener.as_ref().filter(|_| !busy && self.pause.is_none_or(|end| end <= now))
    }

    pub(crate) fn watch<'a>(&'a self, set: &mut PollSet<'a>) {
        let now = Instant::now();
        self.ready(now).into_iter().for_each(|listener| set.add(listener.as_fd(), PollFlags::POLLIN));
        set.until(&[self.pause.filter(|end| now < *end)]);
    }

    pub(crate) fn answer(&mut self, now: Instant, status: impl Fn() -> Status) {
        while let Some(listener) = self.ready(now) {
            let started = match listener.accept() {
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                accepted => accepted.and_then(|(stream, _)| self.start(stream, status())),
            };
            if let (Err(e), None) = (&started, self.pause) {
                warn!("status can't be told: {}", reason(e));
            }
            // Clients not accepted yet keep the socket readable.
            self.pause = started.is_err().then_some(now + PAUSE);
        }
    }

    fn start(&self, mut stream: UnixStream, status: Status) -> io::Result<()> {
        stream.set_write_timeout(Some(WRITE_LIMIT))?;
        let (answer, wake) = (Arc::clone(&self.answers), Arc::clone(&self.wake));
        let body = move || {
            // Fails if the client has gone or does not read.
            let _ = writeln!(stream, "{}", miniserde::json::to_string(&status));
            drop((stream, answer));
            wake.notify();
        };
        thread::spawn("status", thread::SMALL_STACK, body).map(drop)
    }
}

/// The daemon's umask keeps others out of the socket, too.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let directory = path.parent().unwrap_or(path);
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    // Nobody else may write the directory, or they could replace the socket.
    let found = fs::symlink_metadata(directory)?;
    if !found.is_dir() || found.uid() != nix::unistd::geteuid().as_raw() || found.mode() & 0o022 != 0 {
        return Err(io::Error::other("its place is no directory of the daemon's own"));
    }
    if let Ok(found) = fs::symlink_metadata(path) {
        if !found.file_type().is_socket() {
            return Err(io::Error::other("something is in its place"));
        }
        match connect(path) {
            // Left by a daemon that was killed.
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path)?,
            _ => return Err(io::Error::other("another daemon has it")),
        }
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn socket_path() -> PathBuf {
    let directories = std::env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    let first = std::env::split_paths(&directories).next().filter(|path| path.is_absolute());
    first.unwrap_or_else(|| "/run/mender-connect".into()).join("status.sock")
}

/// Fails at once if the queue of a hung daemon is full.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let ours = UnixStream::from(socket(AddressFamily::Unix, SockType::Stream, flags, None)?);
    nix::sys::socket::connect(ours.as_raw_fd(), &UnixAddr::new(path)?)?;
    ours.set_nonblocking(false)?;
    Ok(ours)
}

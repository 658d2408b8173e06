//! The daemon's side: a socket in the supervisor's poll loop, and a thread for each answer, so that a client that
//! doesn't read can't block it. Failures are warnings: the daemon works without the socket.

use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};

use super::document::Status;
use super::{ANSWER_LIMIT, connect, socket_path};
use crate::sys::wake::Wake;
use crate::sys::{reason, thread};

/// Answers in progress at a time. Further clients wait in the socket's queue.
const MAX_ANSWERS: usize = 4;
const QUEUE: i32 = 16;
/// Limit of a write without progress.
const WRITE_LIMIT: Duration = Duration::from_secs(1);
const PIECE: usize = 64 << 10;
/// Pause after accept(2) has failed.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Server {
    socket: Option<Socket>,
    /// Each answer in progress holds a clone.
    answers: Arc<()>,
    wake: Arc<Wake>,
    pause: Option<Instant>,
    warned: bool,
}

/// Removed when dropped, unless another daemon's socket has its name by now.
#[derive(Debug)]
struct Socket {
    listener: UnixListener,
    path: PathBuf,
    id: (u64, u64),
}

impl Drop for Socket {
    fn drop(&mut self) {
        if id(&self.path).is_ok_and(|id| id == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device and inode.
fn id(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()))
}

impl Server {
    /// Calls `wake` when another answer may begin.
    pub(crate) fn open(wake: &Arc<Wake>) -> Self {
        let path = socket_path();
        let socket =
            Socket::make(&path).inspect_err(|e| warn!("no status: {}: {}", path.display(), reason(e)));
        let (answers, wake) = (Arc::default(), Arc::clone(wake));
        Server { socket: socket.ok(), answers, wake, pause: None, warned: false }
    }

    /// The socket, if another answer may begin.
    fn ready(&self) -> Option<&UnixListener> {
        let busy = Arc::strong_count(&self.answers) > MAX_ANSWERS;
        self.socket.as_ref().filter(|_| !busy && self.pause.is_none()).map(|socket| &socket.listener)
    }

    pub(crate) fn watch(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.ready().map(|socket| (socket.as_fd(), PollFlags::POLLIN))
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.pause
    }

    pub(crate) fn answer(&mut self, now: Instant, status: impl Fn() -> Status) {
        self.pause = self.pause.filter(|until| now < *until);
        while let Some(socket) = self.ready() {
            let started = match socket.accept() {
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                accepted => accepted.and_then(|(stream, _)| self.start(stream, status())),
            };
            if let Err(e) = started {
                // Clients not accepted yet keep the socket readable.
                self.pause = Some(now + PAUSE);
                if !std::mem::replace(&mut self.warned, true) {
                    warn!("status can't be told: {}", reason(&e));
                }
            }
        }
    }

    fn start(&self, stream: UnixStream, status: Status) -> io::Result<()> {
        let (answer, wake) = (Arc::clone(&self.answers), Arc::clone(&self.wake));
        let body = move || {
            // Fails if the client has gone or doesn't read.
            let _ = write(stream, &(miniserde::json::to_string(&status) + "\n"));
            drop(answer);
            wake.notify();
        };
        thread::spawn("status", thread::SMALL_STACK, body).map(drop)
    }
}

fn write(mut stream: UnixStream, text: &str) -> io::Result<()> {
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let deadline = Instant::now() + ANSWER_LIMIT;
    let mut pieces = text.as_bytes().chunks(PIECE).take_while(|_| Instant::now() < deadline);
    pieces.try_for_each(|piece| stream.write_all(piece))
}

impl Socket {
    fn make(path: &Path) -> io::Result<Self> {
        let directory = path.parent().unwrap_or(path);
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(e) if e.kind() != ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        // Only we can write the directory: nobody can put another file in the socket's place.
        let found = fs::symlink_metadata(directory)?;
        if !found.is_dir() || found.uid() != nix::unistd::geteuid().as_raw() || found.mode() & 0o022 != 0 {
            return Err(io::Error::other("its place is no directory of the daemon's own"));
        }
        remove_stale(path)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // bind(2) creates the socket with these permissions: no chmod(2) leaves a gap.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        let made = Socket { listener: socket.into(), path: path.to_owned(), id: id(path)? };
        listen(&made.listener, Backlog::new(QUEUE)?)?;
        Ok(made)
    }
}

/// Removes the socket of a daemon that was killed.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(found) if !found.file_type().is_socket() => Err(io::Error::other("something is in its place")),
        Ok(_) => match connect(path, SockFlag::SOCK_NONBLOCK) {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path),
            _ => Err(io::Error::other("another daemon has it")),
        },
    }
}

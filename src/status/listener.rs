//! The daemon's side: a socket in the supervisor's poll loop, and a thread for each answer, so that a client that
//! doesn't read can't block it. Failures are warnings: the daemon works without the socket.

use std::fs::{self, DirBuilder, Metadata};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use log::warn;
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use serde_json::Value;

use super::{NAME, connect, directory};
use crate::session::Device;
use crate::sys::wake::Wake;
use crate::sys::{PollSet, reason, thread};

/// Answers in progress at a time. Further clients wait in the socket's queue.
const MAX_ANSWERS: usize = 4;
const QUEUE: i32 = 16;
/// Limit of an answer in all, and of a write without progress.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
const WRITE_LIMIT: Duration = Duration::from_secs(1);
const PIECE: usize = 64 << 10;
/// Pause after accept(2) has failed.
const PAUSE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Listener {
    socket: Option<Socket>,
    answers: Arc<AtomicUsize>,
    /// Called when another answer may begin.
    wake: Arc<Wake>,
    pause: Option<Instant>,
    warned: bool,
}

#[derive(Debug)]
struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode.
    name: (u64, u64),
}

/// Removes the socket, unless another daemon's has its name by now.
impl Drop for Socket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| name(&found) == self.name) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn name(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// An answer in progress.
struct Answer {
    answers: Arc<AtomicUsize>,
    wake: Arc<Wake>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.answers.fetch_sub(1, Ordering::SeqCst);
        self.wake.notify();
    }
}

impl Listener {
    /// Creates the socket, if possible. Calls `wake` when [`Listener::answer`] should be called.
    pub(crate) fn open(wake: &Arc<Wake>) -> Self {
        let socket = Socket::make(&directory());
        if let Err(e) = &socket {
            warn!("no status: {}: {}", directory().join(NAME).display(), reason(e));
        }
        let (answers, wake) = (Arc::default(), Arc::clone(wake));
        Listener { socket: socket.ok(), answers, wake, pause: None, warned: false }
    }

    pub(crate) fn close(&mut self) {
        self.socket = None;
    }

    /// Adds the socket, unless [`MAX_ANSWERS`] are in progress.
    pub(crate) fn watch<'a>(&'a self, set: &mut PollSet<'a>) {
        if let Some(socket) = &self.socket
            && self.pause.is_none()
            && self.answers.load(Ordering::SeqCst) < MAX_ANSWERS
        {
            set.add(socket.listener.as_fd(), PollFlags::POLLIN);
        }
    }

    /// When to call [`Listener::answer`] without an event.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.pause
    }

    /// Answers waiting clients with `state`'s document and the sessions.
    pub(crate) fn answer(&mut self, context: &Arc<Device>, now: Instant, state: impl Fn() -> Value) {
        if self.pause.is_some_and(|until| now < until) {
            return;
        }
        self.pause = None;
        let Some(socket) = &self.socket else { return };
        while self.answers.load(Ordering::SeqCst) < MAX_ANSWERS {
            let failed = match socket.listener.accept() {
                Ok((stream, _)) => self.start(stream, context, state()).err(),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => Some(e),
            };
            if let Some(e) = failed {
                // Clients not accepted yet keep the socket readable.
                self.pause = Some(now + PAUSE);
                if !std::mem::replace(&mut self.warned, true) {
                    warn!("status can't be told: {}", reason(&e));
                }
                return;
            }
        }
    }

    fn start(&self, stream: UnixStream, context: &Arc<Device>, mut document: Value) -> io::Result<()> {
        self.answers.fetch_add(1, Ordering::SeqCst);
        let answer = Answer { answers: Arc::clone(&self.answers), wake: Arc::clone(&self.wake) };
        let context = Arc::clone(context);
        thread::spawn("status", thread::SMALL_STACK, move || {
            context.report(&mut document);
            // Fails if the client has gone or doesn't read.
            let _ = write(stream, &format!("{document}\n"));
            drop(answer);
        })
        .map(drop)
    }
}

fn write(mut stream: UnixStream, text: &str) -> io::Result<()> {
    stream.set_write_timeout(Some(WRITE_LIMIT))?;
    let deadline = Instant::now() + ANSWER_LIMIT;
    for piece in text.as_bytes().chunks(PIECE) {
        if Instant::now() >= deadline {
            break;
        }
        stream.write_all(piece)?;
    }
    Ok(())
}

impl Socket {
    fn make(directory: &Path) -> io::Result<Self> {
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        // Only we can write the directory: nobody can put another file in the socket's place.
        let found = fs::symlink_metadata(directory)?;
        if !found.is_dir() || found.uid() != nix::unistd::geteuid().as_raw() || found.mode() & 0o022 != 0 {
            return Err(io::Error::other("its place is no directory of the daemon's own"));
        }
        let path = directory.join(NAME);
        remove_stale(&path)?;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        // bind(2) creates the socket with these permissions: no chmod(2) leaves a gap.
        fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(&path)?)?;
        let name = name(&fs::symlink_metadata(&path)?);
        let made = Socket { listener: socket.into(), path, name };
        listen(&made.listener, Backlog::new(QUEUE)?)?;
        Ok(made)
    }
}

/// Removes the socket of a daemon that was killed.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
        Ok(found) if found.file_type().is_socket() => {}
        Ok(_) => return Err(io::Error::other("something is in its place")),
    }
    match connect(path, SockFlag::SOCK_NONBLOCK) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ => Err(io::Error::other("another daemon has it")),
    }
}

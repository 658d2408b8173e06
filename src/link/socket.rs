//! A link's time limits, and its socket: each operation ends in time, or when another thread cancels it.

use std::io::{self, Read, Write};
use std::mem;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::sys::wake::Wake;
use crate::sys::{lock, net};

/// A link without an inbound byte for this long is dead, as for the server and Mender's agent.
pub(super) const SILENCE_LIMIT: Duration = Duration::from_secs(60);
/// The released server closes a link without a ping within 60 s.
pub(super) const PING_INTERVAL: Duration = Duration::from_secs(25);
/// A link on which a write makes no progress for this long is dead.
pub(super) const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// For the close frame and what was queued before it.
pub(super) const FAREWELL_LIMIT: Duration = Duration::from_millis(500);
/// For all steps of a dial together, as in Mender's agent: on a slow link TLS alone may need half of it.
pub(super) const ATTEMPT_LIMIT: Duration = Duration::from_secs(45);

/// TCP_NOTSENT_LOWAT in bytes. Small, so that an echo doesn't queue behind a download.
const UNSENT_LIMIT: u16 = 16 * 1024;

/// A blocking socket. Before the websocket is open, each read and write ends by the deadline of `cancel`.
#[derive(Clone)]
pub(super) struct Socket {
    stream: Arc<TcpStream>,
    cancel: Arc<Cancel>,
    /// A server on this machine, mender-auth's forwarder, writes with Nagle's algorithm on: a delayed acknowledgement
    /// would cost 40 ms a keystroke.
    quick_ack: bool,
}

impl Socket {
    /// Of a socket that is connected to `address`.
    pub(super) fn new(socket: OwnedFd, address: SocketAddr, cancel: &Arc<Cancel>) -> io::Result<Self> {
        let stream = Arc::new(TcpStream::from(socket));
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        net::set_unsent_limit(stream.as_fd(), UNSENT_LIMIT)?;
        cancel.register(&stream)?;
        Ok(Socket { stream, cancel: Arc::clone(cancel), quick_ack: address.ip().is_loopback() })
    }

    #[cfg(test)]
    pub(super) fn of(stream: TcpStream) -> Self {
        let cancel = Cancel { established: AtomicBool::new(true), ..Cancel::new().unwrap() };
        Socket { stream: Arc::new(stream), cancel: Arc::new(cancel), quick_ack: false }
    }

    /// Ends the time of the handshakes.
    pub(super) fn establish(&self) -> io::Result<()> {
        self.stream.set_read_timeout(Some(SILENCE_LIMIT))?;
        self.stream.set_write_timeout(Some(WRITE_LIMIT))?;
        self.cancel.established.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// In bytes.
    pub(super) fn written(&self) -> u64 {
        self.cancel.written.load(Ordering::Relaxed)
    }

    fn set_time_outs(&self) -> io::Result<()> {
        if self.cancel.established.load(Ordering::SeqCst) {
            return Ok(());
        }
        let left = Some(self.cancel.left()).filter(|left| !left.is_zero());
        left.ok_or(io::ErrorKind::TimedOut)?;
        self.stream.set_read_timeout(left)?;
        self.stream.set_write_timeout(left)
    }
}

/// The kernel calls a time-out "again". A process that is stopped and continued finds its waits interrupted.
fn uninterrupted(mut operation: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match operation() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Err(io::ErrorKind::TimedOut.into()),
            other => return other,
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.set_time_outs()?;
        let n = uninterrupted(|| (&*self.stream).read(buffer))?;
        self.cancel.heard.store(true, Ordering::Relaxed);
        if self.quick_ack {
            // Only a hint; a socket that can't do it still works.
            let _ = net::rearm_quick_ack(self.stream.as_fd());
        }
        Ok(n)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.set_time_outs()?;
        let n = uninterrupted(|| (&*self.stream).write(bytes))?;
        self.cancel.written.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends a dial in time, and a dial or a link from another thread, whatever it waits for. Tells whether the reader reads.
#[derive(Debug)]
pub(super) struct Cancel {
    state: Mutex<State>,
    established: AtomicBool,
    /// The reader has read since [`Cancel::reads`] was called last.
    heard: AtomicBool,
    /// To the socket, in bytes.
    written: AtomicU64,
    /// The dial's.
    pub(super) deadline: Instant,
    /// Wakes a dial that has no socket yet; called by [`Cancel::cancel`], too.
    pub(super) wake: Arc<Wake>,
}

#[derive(Debug, Default)]
struct State {
    cancelled: bool,
    socket: Option<Arc<TcpStream>>,
    /// Something waited to be read when [`Cancel::reads`] was called last.
    had_unread: bool,
}

impl Cancel {
    pub(super) fn new() -> io::Result<Self> {
        let (state, established, heard, written) = Default::default();
        let (deadline, wake) = (Instant::now() + ATTEMPT_LIMIT, Arc::new(Wake::new()?));
        Ok(Cancel { state, established, heard, written, deadline, wake })
    }

    /// The dial's time.
    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    pub(super) fn cancel(&self) {
        lock(&self.state).cancelled = true;
        self.wake.notify();
        // An open websocket is shut for reading alone: the reader then ends, and the writer sends a close frame.
        let established = self.established.load(Ordering::SeqCst);
        self.shut_down(if established { Shutdown::Read } else { Shutdown::Both });
    }

    pub(super) fn is_cancelled(&self) -> bool {
        lock(&self.state).cancelled
    }

    /// From here on `socket` is the one to shut down. Fails once cancelled.
    pub(super) fn register(&self, socket: &Arc<TcpStream>) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.socket = Some(Arc::clone(socket));
        if state.cancelled { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    pub(super) fn shut_down(&self, how: Shutdown) {
        // Fails when it has ended already.
        let _ = lock(&self.state).socket.as_ref().map(|socket| socket.shutdown(how));
    }

    /// How many of the written bytes have reached the other side. The rest never will: the connection is reset.
    pub(super) fn abandon(&self) -> u64 {
        let state = lock(&self.state);
        let lost = state.socket.as_ref().map_or(0, |socket| net::discard_undelivered(socket.as_fd()));
        self.written.load(Ordering::Relaxed).saturating_sub(lost)
    }

    /// False if the reader hasn't read since the last call though something waited then and now. `None` while dialling.
    pub(super) fn reads(&self) -> Option<bool> {
        let heard = self.heard.swap(false, Ordering::Relaxed);
        let mut state = lock(&self.state);
        let socket = state.socket.as_ref().filter(|_| self.established.load(Ordering::SeqCst))?;
        let unread = net::is_readable(socket.as_fd());
        let had_unread = mem::replace(&mut state.had_unread, unread);
        Some(heard || !had_unread || !unread)
    }
}

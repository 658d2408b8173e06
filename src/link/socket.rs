//! A link's time limits, and its socket: each operation ends in time, or when another thread cancels it.

use std::io::{self, Read, Write};
use std::mem;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use crate::sys::wake::Wake;
use crate::sys::{lock, net};

/// A link is dead that hasn't answered for this long, or for as many times as long as its slowest answer while it was
/// dialled has taken: on NB-IoT and satellite links a round trip takes seconds.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE: u32 = 4;
/// As long as the server itself waits for an agent.
const MOST_PATIENCE: Duration = Duration::from_secs(60);
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
    /// Takes over a socket that is connected to `address`.
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
        let cancel = Cancel { patience: OnceLock::from(LEAST_PATIENCE), ..Cancel::new().unwrap() };
        Socket { stream: Arc::new(stream), cancel: Arc::new(cancel), quick_ack: false }
    }

    /// Ends the time of the handshakes. From here on the server answers a ping each `heartbeat`, or the link is dead.
    pub(super) fn establish(&self, heartbeat: Duration) -> io::Result<()> {
        let slowest = Duration::from_millis(self.cancel.slowest.load(Ordering::Relaxed));
        let patience = (slowest * PATIENCE).clamp(LEAST_PATIENCE, MOST_PATIENCE);
        self.stream.set_read_timeout(Some(heartbeat + patience))?;
        self.stream.set_write_timeout(Some(patience))?;
        // A kernel that doesn't know it still ends a write in time.
        let _ = net::set_user_timeout(self.stream.as_fd(), patience);
        let _ = self.cancel.patience.set(patience);
        Ok(())
    }

    /// How long the server may take for an answer to a ping after the network has changed.
    pub(super) fn answer_limit(&self) -> Duration {
        self.cancel.patience() / 2
    }

    /// How often something was received.
    pub(super) fn received(&self) -> usize {
        self.cancel.received.load(Ordering::Relaxed)
    }

    /// Ends the link unless something came since there was `received`, or what was sent is still being delivered.
    pub(super) fn expect_answer(&self, received: usize) {
        let limit = self.answer_limit();
        if self.received() == received && !net::is_delivering(self.stream.as_fd(), limit) {
            self.cancel.give_up(format!("no answer to a ping in {} s", limit.as_secs()));
        }
    }

    /// Says why the link ends with this time-out.
    fn explain(&self, error: io::Error, silent: &str) -> io::Error {
        if error.kind() == io::ErrorKind::TimedOut && self.cancel.is_established() {
            // The kernel's own is TCP_USER_TIMEOUT.
            let what = error.raw_os_error().map_or(silent, |_| "unacknowledged for");
            self.cancel.give_up(format!("{what} {} s", self.cancel.patience().as_secs()));
        }
        error
    }

    /// In bytes.
    pub(super) fn written(&self) -> u64 {
        self.cancel.written.load(Ordering::Relaxed)
    }

    fn set_time_outs(&self) -> io::Result<()> {
        if self.cancel.is_established() {
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
        let start = Instant::now();
        let n = loop {
            match uninterrupted(|| (&*self.stream).read(buffer)) {
                // The ping may still wait behind what a slow link carries away.
                Err(e)
                    if e.kind() == io::ErrorKind::TimedOut
                        && self.cancel.is_established()
                        && net::is_delivering(self.stream.as_fd(), self.cancel.patience()) => {}
                result => break result.map_err(|e| self.explain(e, "no answer to a ping in"))?,
            }
        };
        if !self.cancel.is_established() {
            let took = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.cancel.slowest.fetch_max(took, Ordering::Relaxed);
        }
        self.cancel.received.fetch_add(1, Ordering::Relaxed);
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
        let mut before = u64::MAX;
        let n = loop {
            let error = match uninterrupted(|| (&*self.stream).write(bytes)) {
                Ok(n) => break n,
                Err(e) => e,
            };
            // A slow link makes room for more only now and then: as long as less and less waits, it works.
            let waiting = net::undelivered(self.stream.as_fd());
            let silent = error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_none();
            if !silent || !self.cancel.is_established() || waiting >= before {
                return Err(self.explain(error, "the server took nothing for"));
            }
            before = waiting;
        };
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
    /// How long the server may take for an answer. Set once the websocket is open.
    patience: OnceLock<Duration>,
    /// In milliseconds: how long the dial had to wait for something to read.
    slowest: AtomicU64,
    received: AtomicUsize,
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
    /// When [`Cancel::reads`] was called last: whether something waited to be read, and how often the reader had read.
    had_unread: bool,
    had_received: usize,
    /// Why the link ends, if it was found dead.
    dead: Option<String>,
}

impl Cancel {
    pub(super) fn new() -> io::Result<Self> {
        let (state, patience, slowest, received, written) = Default::default();
        let (deadline, wake) = (Instant::now() + ATTEMPT_LIMIT, Arc::new(Wake::new()?));
        Ok(Cancel { state, patience, slowest, received, written, deadline, wake })
    }

    /// The dial's time.
    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    pub(super) fn cancel(&self) {
        lock(&self.state).cancelled = true;
        self.wake.notify();
        self.interrupt();
    }

    /// Ends a dial or a link that is dead.
    pub(super) fn give_up(&self, reason: String) {
        lock(&self.state).dead.get_or_insert(reason);
        self.interrupt();
    }

    fn interrupt(&self) {
        // An open websocket is shut for reading alone: the reader then ends, and the writer sends a close frame.
        self.shut_down(if self.is_established() { Shutdown::Read } else { Shutdown::Both });
    }

    /// Why, if it was given up.
    pub(super) fn death(&self) -> Option<String> {
        lock(&self.state).dead.take()
    }

    fn is_established(&self) -> bool {
        self.patience.get().is_some()
    }

    fn patience(&self) -> Duration {
        self.patience.get().copied().unwrap_or(LEAST_PATIENCE)
    }

    pub(super) fn local_address(&self) -> Option<IpAddr> {
        let address = lock(&self.state).socket.as_ref()?.local_addr();
        address.ok().map(|address| address.ip())
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

    /// How many of the written bytes have reached the other side. The rest never will: the connection is reset. Its end,
    /// if that was written, counts as one of those that don't reach it.
    pub(super) fn abandon(&self, ended: bool) -> u64 {
        let state = lock(&self.state);
        let lost = state.socket.as_ref().map_or(0, |socket| net::discard_undelivered(socket.as_fd()));
        self.written.load(Ordering::Relaxed).saturating_sub(lost.saturating_sub(ended.into()))
    }

    /// False if the reader hasn't read since the last call though something waited then and now. `None` while dialling.
    pub(super) fn reads(&self) -> Option<bool> {
        let received = self.received.load(Ordering::Relaxed);
        let mut state = lock(&self.state);
        let heard = mem::replace(&mut state.had_received, received) != received;
        let socket = state.socket.as_ref().filter(|_| self.is_established())?;
        let unread = net::is_readable(socket.as_fd());
        let had_unread = mem::replace(&mut state.had_unread, unread);
        Some(heard || !had_unread || !unread)
    }
}

//! A link's time limits, and its socket: each operation ends in time, or when another thread cancels it.

use std::io::{self, Read, Write};
use std::mem;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use super::error::LinkError;
use crate::sys::wake::Wake;
use crate::sys::{lock, net};

/// A link is dead that hasn't answered for this long, or for as many times as long as its handshakes have taken: on
/// NB-IoT and satellite links a round trip takes seconds.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE: u32 = 3;
/// For an answer that waits in the kernel.
const READERS_TURN: Duration = Duration::from_secs(1);
/// As long as the server itself waits for an agent.
const MOST_PATIENCE: Duration = Duration::from_secs(60);
/// For the close frame and what was queued before it.
pub(super) const FAREWELL_LIMIT: Duration = Duration::from_millis(500);
/// For all steps of a dial together, as in Mender's agent: on a slow link TLS alone may need half of it.
pub(super) const ATTEMPT_LIMIT: Duration = Duration::from_secs(45);

/// TCP_NOTSENT_LOWAT in bytes. Small, so that an echo doesn't queue behind a download.
const UNSENT_LIMIT: u16 = 16 * 1024;

/// A ping, and by when the server has to answer it or to send something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Question {
    pub(super) limit: Instant,
    asked: Instant,
    patience: Duration,
    silence: Duration,
}

/// A blocking socket. Before the websocket is open, each read and write ends by the deadline of `cancel`.
#[derive(Clone)]
pub(super) struct Socket {
    stream: Arc<TcpStream>,
    cancel: Arc<Cancel>,
    began: Instant,
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
        let (cancel, began, quick_ack) = (Arc::clone(cancel), Instant::now(), address.ip().is_loopback());
        Ok(Socket { stream, cancel, began, quick_ack })
    }

    #[cfg(test)]
    pub(super) fn of(stream: TcpStream) -> Self {
        let cancel = Cancel { patience: OnceLock::from(LEAST_PATIENCE), ..Cancel::new().unwrap() };
        Socket { stream: Arc::new(stream), cancel: Arc::new(cancel), began: Instant::now(), quick_ack: false }
    }

    /// Ends the time of the handshakes.
    pub(super) fn establish(&self) -> io::Result<()> {
        let patience = (self.began.elapsed() * PATIENCE).clamp(LEAST_PATIENCE, MOST_PATIENCE);
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(Some(patience))?;
        // A kernel that doesn't know it still ends a write in time.
        let _ = net::set_user_timeout(self.stream.as_fd(), patience);
        let _ = self.cancel.patience.set(patience);
        Ok(())
    }

    /// How long the server may take for an answer to a ping.
    pub(super) fn patience(&self) -> Duration {
        self.cancel.patience.get().copied().unwrap_or(LEAST_PATIENCE)
    }

    /// In bytes.
    pub(super) fn written(&self) -> u64 {
        self.cancel.written.load(Ordering::Relaxed)
    }

    /// The question of the ping that is written next. The link may be silent for as long as `silence` before the answer's
    /// time.
    pub(super) fn question(&self, patience: Duration, silence: Duration) -> Question {
        let asked = Instant::now();
        Question { limit: asked + patience, asked, patience, silence }
    }

    /// At the limit: ends the link if nothing has come since, unless the ping may still wait behind what a slow link carries
    /// away. Then there is more time, as there is for the reader of a process that was stopped beyond the limit.
    pub(super) fn judge(&self, question: Question) -> Option<Question> {
        let Question { limit, asked, patience, silence } = question;
        let heard = self.began + Duration::from_micros(self.cancel.heard.load(Ordering::Relaxed));
        if heard >= asked {
            return None;
        }
        let now = Instant::now();
        let later = if now > limit + READERS_TURN {
            now + READERS_TURN
        } else if net::is_delivering(self.stream.as_fd(), patience) {
            limit + patience
        } else {
            heard + silence + patience
        };
        if later > limit {
            return Some(Question { limit: later, ..question });
        }
        self.cancel.give_up(format!("no answer to a ping in {} s", patience.as_secs()));
        None
    }

    /// Ends `operation` in time, during the handshakes by the dial's deadline.
    fn limited(&self, mut operation: impl FnMut(&TcpStream) -> io::Result<usize>) -> io::Result<usize> {
        let is_established = self.cancel.is_established();
        if !is_established {
            let left = Some(self.cancel.left()).filter(|left| !left.is_zero());
            left.ok_or(io::ErrorKind::TimedOut)?;
            self.stream.set_read_timeout(left)?;
            self.stream.set_write_timeout(left)?;
        }
        loop {
            let result = operation(&self.stream);
            match result.as_ref().map_err(io::Error::kind) {
                // A process that is stopped and continued finds its waits interrupted.
                Err(io::ErrorKind::Interrupted) => {}
                // The kernel calls a time-out "again". A slow link makes room for more only now and then.
                Err(io::ErrorKind::WouldBlock)
                    if is_established && net::is_delivering(self.stream.as_fd(), self.patience()) => {}
                // The other one is TCP_USER_TIMEOUT's.
                Err(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if is_established {
                        self.cancel.give_up(format!("unacknowledged for {} s", self.patience().as_secs()));
                    }
                    return Err(io::ErrorKind::TimedOut.into());
                }
                _ => return result,
            }
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.limited(|mut stream| stream.read(buffer))?;
        let now = u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.cancel.heard.store(now, Ordering::Relaxed);
        if self.quick_ack {
            // Only a hint; a socket that can't do it still works.
            let _ = net::rearm_quick_ack(self.stream.as_fd());
        }
        Ok(n)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.limited(|mut stream| stream.write(bytes))?;
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
    /// When something was received last, in microseconds since the socket was connected.
    heard: AtomicU64,
    /// To the socket, in bytes.
    written: AtomicU64,
    /// The dial's.
    pub(super) deadline: Instant,
    /// Wakes a dial that has no socket yet; called by [`Cancel::cancel`], too.
    pub(super) wake: Arc<Wake>,
}

#[derive(Debug, Default)]
struct State {
    /// Why the link ends, if it doesn't by itself.
    end: Option<LinkError>,
    socket: Option<Arc<TcpStream>>,
    /// When [`Cancel::reads`] was called last: whether something waited to be read, and when the reader had read.
    had_unread: bool,
    had_heard: u64,
}

impl Cancel {
    pub(super) fn new() -> io::Result<Self> {
        let (state, patience, heard, written) = Default::default();
        let (deadline, wake) = (Instant::now() + ATTEMPT_LIMIT, Arc::new(Wake::new()?));
        Ok(Cancel { state, patience, heard, written, deadline, wake })
    }

    /// The dial's time.
    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    pub(super) fn cancel(&self) {
        lock(&self.state).end = Some(LinkError::Cancelled);
        self.wake.notify();
        self.interrupt();
    }

    /// Ends a dial or a link that is dead.
    pub(super) fn give_up(&self, reason: String) {
        lock(&self.state).end.get_or_insert(LinkError::Dead(reason));
        self.interrupt();
    }

    fn interrupt(&self) {
        // An open websocket is shut for reading alone: the reader then ends, and the writer sends a close frame.
        self.shut_down(if self.is_established() { Shutdown::Read } else { Shutdown::Both });
    }

    /// Why the link has ended, if it was cancelled or given up.
    pub(super) fn take_end(&self) -> Option<LinkError> {
        lock(&self.state).end.take()
    }

    fn is_established(&self) -> bool {
        self.patience.get().is_some()
    }

    pub(super) fn local_address(&self) -> Option<IpAddr> {
        let address = lock(&self.state).socket.as_ref()?.local_addr();
        address.ok().map(|address| address.ip())
    }

    pub(super) fn is_cancelled(&self) -> bool {
        matches!(lock(&self.state).end, Some(LinkError::Cancelled))
    }

    /// From here on `socket` is the one to shut down. Fails once the dial has been ended.
    pub(super) fn register(&self, socket: &Arc<TcpStream>) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.socket = Some(Arc::clone(socket));
        if state.end.is_some() { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
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
        let heard = self.heard.load(Ordering::Relaxed);
        let mut state = lock(&self.state);
        let has_read = mem::replace(&mut state.had_heard, heard) != heard;
        let socket = state.socket.as_ref().filter(|_| self.is_established())?;
        let unread = net::is_readable(socket.as_fd());
        let had_unread = mem::replace(&mut state.had_unread, unread);
        Some(has_read || !had_unread || !unread)
    }
}

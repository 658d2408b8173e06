//! A socket whose operations end in time, or when another thread cancels them.

use std::io::{self, Read, Write};
use std::mem;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::PollFlags;
use nix::sys::socket::{setsockopt, sockopt::TcpUserTimeout};

use super::error::LinkError;
use crate::sys::wake::Wake;
use crate::sys::{is_ready, lock, net, poll_one};

/// Time for an answer: this, or a multiple of what the handshakes took. On NB-IoT and satellite links a round trip
/// takes seconds.
const LEAST_PATIENCE: Duration = Duration::from_secs(10);
const PATIENCE: u32 = 3;
/// For the reader to fetch an answer that waits in the kernel.
const READERS_TURN: Duration = Duration::from_secs(1);
/// The server waits as long for an agent.
const MOST_PATIENCE: Duration = Duration::from_secs(60);
/// For the close frame and what is queued before it.
pub(super) const FAREWELL_LIMIT: Duration = Duration::from_millis(500);
/// For all steps of a dial, as in Mender's agent: on a slow link TLS alone may take half of it.
pub(super) const ATTEMPT_LIMIT: Duration = Duration::from_secs(45);

/// TCP_NOTSENT_LOWAT in bytes. Small, so that an echo doesn't queue behind a download.
const UNSENT_LIMIT: u32 = 16 * 1024;
/// The kernel wakes the writer at an acknowledgement that finds less than half of this unsent. For a last segment by itself
/// there is none for 40 ms, and on loopback that may have just below 64 KiB.
const UNSENT_LIMIT_OF_LOOPBACK: u32 = 2 * 64 * 1024;

/// A ping, and when the server has to answer it or to send something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Question {
    pub(super) limit: Instant,
    /// Before the ping was written.
    pub(super) asked: Instant,
    pub(super) patience: Duration,
    /// The link may be silent for so long before the answer's time begins.
    pub(super) silence: Duration,
}

/// Blocks. Until the websocket is open, each read and write ends at the deadline of `cancel`.
#[derive(Clone)]
pub(super) struct Socket {
    stream: Arc<TcpStream>,
    cancel: Arc<Cancel>,
    began: Instant,
    /// mender-auth's forwarder, on this machine, uses Nagle's algorithm: delayed acknowledgements would cost 40 ms a
    /// keystroke.
    quick_ack: bool,
}

impl Socket {
    pub(super) fn new(socket: OwnedFd, address: SocketAddr, cancel: &Arc<Cancel>) -> io::Result<Self> {
        let stream = Arc::new(TcpStream::from(socket));
        stream.set_nonblocking(false)?;
        stream.set_nodelay(true)?;
        // Unknown to Linux before 3.12 and to gVisor: there keys wait behind what the kernel has.
        let is_local = address.ip().is_loopback();
        let limit = if is_local { UNSENT_LIMIT_OF_LOOPBACK } else { UNSENT_LIMIT };
        let _ = setsockopt(&stream, net::UnsentLimit, &limit);
        let mut state = lock(&cancel.state);
        state.socket = Some(Arc::clone(&stream));
        state.addresses = stream.local_addr().into_iter().collect();
        // The dial has been ended meanwhile.
        if state.end.is_some() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        drop(state);
        Ok(Socket { stream, cancel: Arc::clone(cancel), began: Instant::now(), quick_ack: is_local })
    }

    #[cfg(test)]
    pub(super) fn of(stream: TcpStream) -> Self {
        let cancel = Cancel { took: OnceLock::from(Duration::ZERO), ..Cancel::new().unwrap() };
        Socket { stream: Arc::new(stream), cancel: Arc::new(cancel), began: Instant::now(), quick_ack: false }
    }

    /// Ends the handshakes: their deadline no longer applies.
    pub(super) fn establish(&self) -> io::Result<()> {
        let took = self.began.elapsed();
        let patience = patience(took);
        self.stream.set_read_timeout(None)?;
        self.stream.set_write_timeout(Some(patience))?;
        // Without it a write still times out.
        let _ = setsockopt(&self.stream, TcpUserTimeout, &(patience.as_millis() as u32));
        let _ = self.cancel.took.set(took);
        Ok(())
    }

    pub(super) fn patience(&self) -> Duration {
        patience(self.took())
    }

    /// How long the handshakes took: a round trip or more.
    pub(super) fn took(&self) -> Duration {
        self.cancel.took.get().copied().unwrap_or_default()
    }

    pub(super) fn written(&self) -> u64 {
        self.cancel.written.load(Ordering::Relaxed)
    }

    fn heard(&self) -> Instant {
        self.began + Duration::from_micros(self.cancel.heard.load(Ordering::Relaxed))
    }

    pub(super) fn is_answered(&self, question: &Question) -> bool {
        self.heard() >= question.asked
    }

    /// At the limit: ends the link if nothing has come since. Grants more time if the ping may still be queued on a
    /// slow link, or if the process was stopped and the reader has yet to read.
    pub(super) fn judge(&self, question: Question) -> Option<Question> {
        if self.is_answered(&question) {
            return None;
        }
        let Question { limit, patience, silence, .. } = question;
        let now = Instant::now();
        let later = if now > limit + READERS_TURN {
            now + READERS_TURN
        } else if net::is_delivering(self.stream.as_fd(), patience) {
            limit + patience
        } else {
            self.heard() + silence + patience
        };
        if later > limit {
            return Some(Question { limit: later, ..question });
        }
        self.cancel.end(LinkError::Dead(format!("no answer to a ping in {} s", patience.as_secs())));
        None
    }

    /// Applies the deadline of the dial, later the link's patience.
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
                // SIGSTOP and SIGCONT interrupt a wait.
                Err(io::ErrorKind::Interrupted) => {}
                // A time-out. A slow link makes room only now and then.
                Err(io::ErrorKind::WouldBlock)
                    if is_established && net::is_delivering(self.stream.as_fd(), self.patience()) => {}
                // ETIMEDOUT comes from TCP_USER_TIMEOUT.
                Err(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    if is_established {
                        let why = format!("unacknowledged for {} s", self.patience().as_secs());
                        self.cancel.end(LinkError::Dead(why));
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
            // Only a hint.
            let _ = setsockopt(&self.stream, net::QuickAck, &true);
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

/// Ends a dial or a link from another thread, whatever it waits for. Tells whether the reader reads.
pub(super) struct Cancel {
    state: Mutex<State>,
    /// How long the handshakes took. Set once the websocket is open.
    took: OnceLock<Duration>,
    /// When data last arrived, in µs since the connection.
    heard: AtomicU64,
    written: AtomicU64,
    /// When the dial has to end.
    pub(super) deadline: Instant,
    /// Wakes a dial that has no socket yet.
    pub(super) wake: Arc<Wake>,
    /// The network has changed: a dial begins other attempts beside those under way.
    pub(super) again: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Why the link was ended from outside.
    end: Option<LinkError>,
    socket: Option<Arc<TcpStream>>,
    /// Local addresses of the connection or, until then, of the attempts to connect.
    addresses: Vec<SocketAddr>,
    /// `heard` at the last [`Cancel::reads`], if data was readable then.
    unread: Option<u64>,
}

/// Time for an answer where the handshakes `took` so long.
fn patience(took: Duration) -> Duration {
    (took * PATIENCE).clamp(LEAST_PATIENCE, MOST_PATIENCE)
}

impl Cancel {
    pub(super) fn new() -> io::Result<Self> {
        let (state, took, heard, written, again) = Default::default();
        let (deadline, wake) = (Instant::now() + ATTEMPT_LIMIT, Arc::new(Wake::new()?));
        Ok(Cancel { state, took, heard, written, deadline, wake, again })
    }

    pub(super) fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// The first reason counts.
    pub(super) fn end(&self, why: LinkError) {
        lock(&self.state).end.get_or_insert(why);
        self.wake.notify();
        // Shut an open websocket for reading only: the reader ends, and the writer can still send a close frame.
        self.shut_down(if self.is_established() { Shutdown::Read } else { Shutdown::Both });
    }

    pub(super) fn take_end(&self) -> Option<LinkError> {
        lock(&self.state).end.take()
    }

    fn is_established(&self) -> bool {
        self.took.get().is_some()
    }

    pub(super) fn set_attempts<'a>(&self, sockets: impl Iterator<Item = &'a OwnedFd>) {
        let local = |socket: &OwnedFd| TcpStream::from(socket.try_clone().ok()?).local_addr().ok();
        lock(&self.state).addresses = sockets.filter_map(local).collect();
    }

    /// A local address of the link or dial that no interface has any more: one that another interface, such as a
    /// bridge, has taken over keeps its connections.
    pub(super) fn lost_address(&self) -> Option<IpAddr> {
        // ENODEV: the interface of a link-local one is gone. Other errors say nothing.
        let is_gone = |e: io::Error| matches!(e.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::ENODEV));
        let mut addresses = lock(&self.state).addresses.clone();
        addresses.iter_mut().for_each(|address| address.set_port(0));
        let lost = addresses.into_iter().find(|address| UdpSocket::bind(address).is_err_and(is_gone));
        lost.map(|address| address.ip())
    }

    pub(super) fn is_over(&self) -> bool {
        lock(&self.state).end.is_some()
    }

    pub(super) fn is_cancelled(&self) -> bool {
        matches!(lock(&self.state).end, Some(LinkError::Cancelled))
    }

    pub(super) fn shut_down(&self, how: Shutdown) {
        // Fails if it has ended.
        let _ = lock(&self.state).socket.as_ref().map(|socket| socket.shutdown(how));
    }

    /// Waits until the kernel has sent what was written. False if it hasn't, or if it gets no acknowledgements.
    pub(super) fn sends_all(&self, deadline: Instant) -> bool {
        let Some(socket) = lock(&self.state).socket.clone() else { return true };
        if net::is_silent(socket.as_fd()) {
            return net::unacknowledged(socket.as_fd()) == 0;
        }
        // Writable is what has nothing unsent, then.
        let _ = setsockopt(&socket, net::UnsentLimit, &1);
        let _ = poll_one(&socket, PollFlags::POLLOUT, Some(deadline));
        net::undelivered(socket.as_fd()) == 0
    }

    /// Resets the connection. Returns how many written bytes have reached the other side; the FIN, if it was sent
    /// (`ended`), is among the undelivered.
    pub(super) fn abandon(&self, ended: bool) -> u64 {
        let state = lock(&self.state);
        let lost = state.socket.as_ref().map_or(0, |socket| {
            net::discard(socket.as_fd());
            net::undelivered(socket.as_fd())
        });
        self.written.load(Ordering::Relaxed).saturating_sub(lost.saturating_sub(ended.into()))
    }

    /// False if data was readable at the last call and is now, and the reader hasn't read. `None` while dialling.
    pub(super) fn reads(&self) -> Option<bool> {
        let heard = self.heard.load(Ordering::Relaxed);
        let mut state = lock(&self.state);
        let socket = state.socket.as_ref().filter(|_| self.is_established())?;
        let unread = is_ready(socket, PollFlags::POLLIN).then_some(heard);
        Some(mem::replace(&mut state.unread, unread) != unread || unread.is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::getsockopt;
    use std::net::TcpListener;

    /// On loopback a last segment of a large message was sent without the writer being woken, which then waited for 40 ms,
    /// where the kernel's queue was full now and then: downloads had half of their speed.
    #[test]
    fn a_segment_that_waits_wakes_the_writer() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = TcpStream::connect(address).unwrap();
        let cancel = Arc::new(Cancel::new().unwrap());
        let socket = Socket::new(stream.into(), address, &cancel).unwrap();
        let largest_segment = 65_536 - 20 - 20;
        assert!(getsockopt(&socket.stream, net::UnsentLimit).unwrap() > 2 * largest_segment);
    }
}

//! A relay between agent and server: a link with a delay and limited rates.

use std::collections::VecDeque;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};
use nix::sys::time::TimeSpec;

use super::front::Acceptor;
use super::wait::spawn;

/// Read at once where only the delay counts.
const BLOCK: usize = 128 << 10;
/// Read at once where the rate counts: what a packet carries.
const PACKET: usize = 1448;
/// On the way at most, where the rate isn't limited.
const DEEPEST: usize = 64 << 20;
/// A link's properties.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// One way.
    pub delay: Duration,
    /// Towards the server, in bytes per second.
    pub up: Option<u64>,
    /// Towards the agent, the same.
    pub down: Option<u64>,
    /// Bytes that may wait where the rate is limited. A full queue takes no more.
    pub queue: usize,
}

impl Default for Shape {
    fn default() -> Self {
        Shape { delay: Duration::ZERO, up: None, down: None, queue: 256 << 10 }
    }
}

impl Shape {
    /// A delay alone: half of this round trip each way.
    pub fn round_trip(millis: u64) -> Shape {
        Shape { delay: Duration::from_millis(millis) / 2, ..Shape::default() }
    }
}

/// A relay that is running; its connections end when either side ends them.
pub struct Relay {
    pub acceptor: Acceptor,
    /// Bytes that have left towards the server.
    pub sent_up: Arc<AtomicU64>,
}

impl Relay {
    /// A link of this shape to `target`.
    pub fn link(target: SocketAddr, shape: Shape) -> Result<Relay, String> {
        let listener = TcpListener::bind("127.0.0.1:0").map_err(|e| format!("listen on loopback: {e}"))?;
        if shape.up.is_some() {
            // Little may wait ahead of the queue, and in segments of a real link's size, lest the window opens
            // in leaps. Before accept, since both are said at the start.
            setsockopt(&listener, sockopt::RcvBuf, &(16 << 10)).map_err(|e| e.to_string())?;
            setsockopt(&listener, sockopt::TcpMaxSeg, &(PACKET as u32)).map_err(|e| e.to_string())?;
        }
        let sent_up = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&sent_up);
        let acceptor = Acceptor::start("link", listener, move |agent| {
            let Ok(server) = TcpStream::connect(target) else { return };
            let _ = agent.set_nodelay(true);
            let _ = server.set_nodelay(true);
            let (Ok(agent_again), Ok(server_again)) = (agent.try_clone(), server.try_clone()) else { return };
            let down = spawn("link-down", move || {
                Lane::new(shape, shape.down).carry(&server_again, &agent_again, &AtomicU64::new(0));
            });
            Lane::new(shape, shape.up).carry(&agent, &server, &counter);
            let _ = down.join();
        });
        Ok(Relay { acceptor, sent_up })
    }

    pub fn address(&self) -> SocketAddr {
        self.acceptor.address()
    }
}

/// One direction of a link.
struct Lane {
    shape: Shape,
    rate: Option<u64>,
    on_the_way: VecDeque<Block>,
    bytes: usize,
    /// When what was taken so far has been sent at the limited rate.
    busy: Instant,
    spare: Vec<Vec<u8>>,
    size: usize,
}

/// Bytes that arrived together.
struct Block {
    due: Instant,
    data: Vec<u8>,
    start: usize,
    end: usize,
}

impl Lane {
    fn new(shape: Shape, rate: Option<u64>) -> Lane {
        let size = if rate.is_some() { PACKET } else { BLOCK };
        let (on_the_way, spare) = (VecDeque::new(), Vec::new());
        Lane { shape, rate, on_the_way, bytes: 0, busy: Instant::now(), spare, size }
    }

    /// Carries bytes until an end, of which it tells the other side.
    fn carry(&mut self, from: &TcpStream, to: &TcpStream, sent: &AtomicU64) {
        let mut open = true;
        loop {
            let now = Instant::now();
            let Ok(blocked) = self.release(to, now, sent) else { break };
            if !open && self.on_the_way.is_empty() {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            let room = if open { self.room_at(now) } else { None };
            let reading = room.is_some_and(|at| at <= now);
            let next_room = room.filter(|at| *at > now);
            let next_due = self.on_the_way.front().map(|block| block.due).filter(|_| !blocked);
            let wake = next_room.into_iter().chain(next_due).min();
            let interest = |wanted, flag| if wanted { flag } else { PollFlags::empty() };
            let mut fds = [
                PollFd::new(from.as_fd(), interest(reading, PollFlags::POLLIN)),
                PollFd::new(to.as_fd(), interest(blocked, PollFlags::POLLOUT)),
            ];
            // An end that nobody waits for would be reported all the same, again and again.
            let skipped = usize::from(!reading);
            let timeout =
                wake.map(|at| TimeSpec::from_duration(at.saturating_duration_since(Instant::now())));
            if !matches!(ppoll(&mut fds[skipped..], timeout, None), Ok(_) | Err(nix::Error::EINTR)) {
                break;
            }
            let gone = PollFlags::POLLERR | PollFlags::POLLHUP;
            if fds[1].revents().is_some_and(|events| events.intersects(gone)) {
                break;
            }
            if reading && fds[0].any() == Some(true) {
                match self.take(from) {
                    Ok(more) => open = more,
                    Err(_) => break,
                }
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }

    /// When more may be taken; never before something has left, when there is no telling.
    fn room_at(&self, now: Instant) -> Option<Instant> {
        match self.rate {
            None => (self.bytes < DEEPEST).then_some(now),
            Some(rate) => {
                let fits = self.shape.queue.saturating_sub(PACKET) as f64 / rate as f64;
                Some(self.busy.checked_sub(Duration::from_secs_f64(fits)).unwrap_or(now).max(now))
            }
        }
    }

    /// Takes what is there and says when it is due. `false` at the end.
    fn take(&mut self, from: &TcpStream) -> nix::Result<bool> {
        let mut data = self.spare.pop().unwrap_or_else(|| vec![0; self.size]);
        let count = match recv(from.as_raw_fd(), &mut data, MsgFlags::MSG_DONTWAIT) {
            Ok(0) => return Ok(false),
            Ok(count) => count,
            Err(nix::Error::EAGAIN | nix::Error::EINTR) => {
                self.spare.push(data);
                return Ok(true);
            }
            Err(e) => return Err(e),
        };
        let mut due = Instant::now();
        if let Some(rate) = self.rate {
            self.busy = self.busy.max(due) + Duration::from_secs_f64(count as f64 / rate as f64);
            due = self.busy;
        }
        self.bytes += count;
        self.on_the_way.push_back(Block { due: due + self.shape.delay, data, start: 0, end: count });
        Ok(true)
    }

    /// Sends what is due. `true` when there would be more but the other side doesn't take it.
    fn release(&mut self, to: &TcpStream, now: Instant, sent: &AtomicU64) -> nix::Result<bool> {
        while let Some(block) = self.on_the_way.front_mut().filter(|block| block.due <= now) {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(to.as_raw_fd(), &block.data[block.start..block.end], flags) {
                Ok(count) => {
                    block.start += count;
                    self.bytes -= count;
                    sent.fetch_add(count as u64, Ordering::Relaxed);
                }
                Err(nix::Error::EAGAIN) => return Ok(true),
                Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e),
            }
            if block.start == block.end
                && let Some(block) = self.on_the_way.pop_front()
            {
                self.spare.push(block.data);
            }
        }
        Ok(false)
    }
}

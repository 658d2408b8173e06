//! One connection through mender-cli: what the local application does with it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::forward::{Inner, State};
use super::msg::PORTS;
use super::wait::SOON;

/// The most data the client puts into a message.
pub const PIECE: usize = 4096;

/// What a connection has done so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Messages with data that came.
    pub forwards: usize,
    /// The largest of them.
    pub largest: usize,
    /// The most of them that waited for an ack at a time.
    pub most_unacked: usize,
    /// Acks that came.
    pub acks: usize,
}

/// One connection as the client keeps it.
#[derive(Debug, Default)]
pub(super) struct Half {
    pub(super) udp: bool,
    pub(super) opened: bool,
    pub(super) stopped: bool,
    pub(super) stop_sent: bool,
    /// Forwards sent and not acknowledged.
    pub(super) in_flight: usize,
    /// The local application doesn't read: nothing is acknowledged.
    pub(super) holding: bool,
    pub(super) held: VecDeque<Vec<u8>>,
    pub(super) received: VecDeque<Vec<u8>>,
    pub(super) figures: Figures,
}

impl Half {
    fn available(&self) -> usize {
        self.received.iter().map(Vec::len).sum()
    }
}

/// One connection through it.
#[derive(Debug, Clone)]
pub struct Connection {
    pub(super) inner: Arc<Inner>,
    pub id: String,
}

impl Connection {
    fn wait<R>(&self, limit: Duration, what: &str, mut pick: impl FnMut(&mut Half) -> Option<R>) -> R {
        let what = format!("{what} on connection {}", self.id);
        self.inner.wait(limit, &what, |s| s.connections.get_mut(&self.id).and_then(&mut pick))
    }

    fn update<R>(&self, change: impl FnOnce(&mut Half) -> R) -> R {
        self.inner.state.update(|s| change(s.connections.get_mut(&self.id).expect("registered")))
    }

    pub fn figures(&self) -> Figures {
        self.update(|half| half.figures)
    }

    /// Waits for the answer to `new`.
    pub fn opened(self) -> Self {
        self.wait(SOON, "the answer to new", |half| half.opened.then_some(()));
        self
    }

    pub fn is_open(&self) -> bool {
        self.update(|half| half.opened && !half.stopped)
    }

    /// Sends one message as soon as none is in flight; whether it went, or the device had stopped before.
    pub fn try_send(&self, bytes: &[u8]) -> bool {
        let go = self.wait(SOON, "the ack of the forward before", |half| {
            if half.stopped || half.in_flight == 0 {
                half.in_flight += usize::from(!half.stopped);
                return Some(!half.stopped);
            }
            None
        });
        if go {
            self.inner.post(PORTS, "forward", Some(&self.id), bytes);
        }
        go
    }

    pub fn send(&self, bytes: &[u8]) {
        assert!(self.try_send(bytes), "connection {} was stopped by the device", self.id);
    }

    /// Sends without regard for what is in flight, as no client does.
    pub fn send_anyway(&self, bytes: &[u8]) {
        self.update(|half| half.in_flight += 1);
        self.inner.post(PORTS, "forward", Some(&self.id), bytes);
    }

    /// How many forwards are not acknowledged.
    pub fn in_flight(&self) -> usize {
        self.update(|half| half.in_flight)
    }

    pub fn acked(&self) {
        self.wait(SOON, "the ack", |half| (half.in_flight == 0).then_some(()));
    }

    /// Whether the ack came in time.
    pub fn acked_within(&self, limit: Duration) -> bool {
        let acked = |s: &mut State| (s.connections.get(&self.id)?.in_flight == 0).then_some(());
        self.inner.state.wait(limit, acked).is_some()
    }

    /// Writes all of it in the client's pieces, and waits for the last ack.
    pub fn write(&self, bytes: &[u8]) {
        for piece in bytes.chunks(PIECE) {
            self.send(piece);
        }
        self.acked();
    }

    /// Reads exactly so much.
    pub fn read(&self, count: usize) -> Vec<u8> {
        self.read_within(count, SOON)
    }

    pub fn read_within(&self, count: usize, limit: Duration) -> Vec<u8> {
        let mut bytes = self.wait(limit, &format!("{count} bytes"), |half| {
            let all = half.available();
            assert!(all >= count || !half.stopped, "stopped with {all} bytes of {count}");
            (all >= count).then(|| half.received.drain(..).flatten().collect::<Vec<u8>>())
        });
        let rest = bytes.split_off(count);
        if !rest.is_empty() {
            self.update(|half| half.received.push_front(rest));
        }
        bytes
    }

    /// What the next message brought, or `None` when the device stopped the connection and all was read.
    pub fn next(&self, limit: Duration) -> Option<Vec<u8>> {
        self.wait(limit, "data or stop", |half| {
            let next = half.received.pop_front();
            next.map(Some).or_else(|| half.stopped.then_some(None))
        })
    }

    /// Waits for the device's stop, which must come behind all data; returns what hadn't been read.
    pub fn stopped(&self) -> Vec<u8> {
        self.wait(SOON, "stop", |half| half.stopped.then(|| half.received.drain(..).flatten().collect()))
    }

    /// Sends `stop` and waits for the answer.
    pub fn stop(&self) {
        self.ask_stop();
        self.wait(SOON, "the answer to stop", |half| half.stopped.then_some(()));
    }

    pub fn ask_stop(&self) {
        self.update(|half| half.stop_sent = true);
        self.inner.post(PORTS, "stop", Some(&self.id), b"");
    }

    /// From now on the local application doesn't read: nothing is acknowledged.
    pub fn hold(&self) {
        self.update(|half| half.holding = true);
    }

    /// Waits until so many messages wait for their acks.
    pub fn held(&self, count: usize, limit: Duration) {
        self.wait(limit, &format!("{count} unacknowledged"), |half| (half.held.len() >= count).then_some(()));
    }

    /// Waits until no more come for a while; how many wait then.
    pub fn held_at_rest(&self, rest: Duration) -> usize {
        let mut last = (Instant::now(), usize::MAX);
        let deadline = Instant::now() + SOON;
        loop {
            let now = self.update(|half| half.held.len());
            if now != last.1 {
                last = (Instant::now(), now);
            } else if last.0.elapsed() >= rest {
                return now;
            }
            assert!(Instant::now() < deadline, "never comes to rest: {now} unacknowledged");
            self.inner.state.wait(rest, |s| (s.connections[&self.id].held.len() != now).then_some(()));
        }
    }

    /// The application reads again: acknowledges what waits, and what will come if `all`.
    pub fn release(&self, count: usize, all: bool) {
        let released = self.inner.state.update(|s| {
            let half = s.connections.get_mut(&self.id).expect("registered");
            half.holding &= !all;
            let count = count.min(half.held.len());
            half.received.extend(half.held.drain(..count));
            s.unacked -= count;
            count
        });
        for _ in 0..released {
            self.inner.post(PORTS, "ack", Some(&self.id), b"");
        }
    }
}

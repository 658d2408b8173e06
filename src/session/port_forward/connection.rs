//! One forward: its socket, what waits for its target, and its line in the audit log.

use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use bytes::Bytes;
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{MsgFlags, Shutdown, recv, send, setsockopt, shutdown, sockopt};

use super::opening::{End, FAILED, Opening};
use crate::audit::Record;
use crate::permits::Permit;
use crate::proto::UserId;
use crate::proto::forward::{Target, Transport};
use crate::session::peer::Peer;
use crate::session::stats::{ForwardInfo, Info, Traffic};
use crate::sys::{Events, PollSet, lock, net, reason, trim};

/// Data frames in flight. A forward that isn't read leaves half of the session's credit to the others, and mender-cli
/// stops reading all forwards when twenty wait.
const MAX_UNACKNOWLEDGED: usize = 8;
/// In bytes. Only a client that doesn't wait for acks gets here: its forward ends.
const QUEUE_HARD_LIMIT: usize = 1 << 20;
const MAX_QUEUED: usize = 4096;
/// In bytes, for all of a session's targets.
pub(super) const MAX_WAITING: usize = 4 << 20;
/// Bytes that a piece takes beside its data: its place in a queue that may be half empty, and two blocks of the allocator.
const PIECE: usize = 2 * size_of::<Bytes>() + 64;
/// Pieces that a queue keeps room for.
const SMALL: usize = 32;
/// In seconds.
const KEEPALIVE: u32 = 15;
/// In bytes, besides those that the target has room for.
const UNSENT_LIMIT: u32 = 128 * 1024;
/// Bytes of a read from a target whose client has gone, and reads in a turn.
const DISCARD: usize = 4096;
const MAX_DISCARDS: usize = 16;
/// In bytes. A target that sends more between two looks at its progress makes none.
const MAX_ANSWERS: usize = 32 * 1024;
pub(super) const CLOSED: &str = "closed";

/// Writes its line of the audit log on drop.
pub(super) struct Connection {
    state: State,
    pub(super) to_target: VecDeque<Bytes>,
    queued: usize,
    /// Bytes of the first piece that the target has taken: the piece is held as a whole.
    taken: usize,
    /// Bytes that were dropped when writing failed.
    lost: usize,
    /// Why the target takes no more data. Its own data from before is still read.
    pub(super) failure: Option<String>,
    pub(super) memory: Permit,
    /// Frames in flight, by their numbers among the session's messages.
    pub(super) unacknowledged: VecDeque<u64>,
    ended: bool,
    /// Since the last look at the progress: bytes discarded, and those undelivered then.
    discarded: usize,
    left: u64,
    /// By a datagram. The client knows nothing of it.
    pub(super) reopened: bool,
    descriptors: Permit,
    pub(super) user: UserId,
    info: Arc<Info>,
    pub(super) shown: Arc<ForwardInfo>,
    pub(super) end: End,
}

enum State {
    Opening(Opening),
    Open(OwnedFd),
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.leave_status();
        let (now, left) = (Instant::now(), self.left_over(net::undelivered));
        if left > 0 {
            let text = format!("{}; the target did not take the last {left} bytes", self.end.1);
            self.end = (FAILED, text);
        }
        if let (State::Open(socket), true) = (&self.state, self.lost + self.queued > 0) {
            // After an orderly end the target would take what it has got for all.
            net::discard(socket.as_fd());
        }
        let ForwardInfo { target: Target { host, port, transport }, address, traffic } = &*self.shown;
        let (result, reason) = &self.end;
        let figures = traffic.figures(now);
        Record::new("forward", Some(&self.info.id), &self.user)
            .with("protocol", transport.name())
            .text("target", format!("{host}:{port}"))
            .text("address", address.get().map_or_else(String::new, ToString::to_string))
            .since(traffic.since, now)
            .bytes(figures.bytes_in, figures.bytes_out)
            .with("result", result)
            .text("reason", reason)
            .log(*result == CLOSED);
    }
}

impl Connection {
    pub(super) fn new(target: Target, peer: &Peer, user: UserId, descriptor: Permit, now: Instant) -> Self {
        let traffic = Traffic::new(now, Some(&peer.info.traffic));
        let shown = Arc::new(ForwardInfo { target, address: OnceLock::new(), traffic });
        lock(&peer.info.forwards).push(Arc::clone(&shown));
        Connection {
            state: State::Opening(Opening::new(now)),
            to_target: VecDeque::new(),
            queued: 0,
            taken: 0,
            lost: 0,
            failure: None,
            memory: peer.share.memory.none(),
            unacknowledged: VecDeque::new(),
            ended: false,
            discarded: 0,
            left: 0,
            reopened: false,
            descriptors: descriptor,
            user,
            shown,
            info: Arc::clone(&peer.info),
            end: (CLOSED, "session".to_owned()),
        }
    }

    /// Bytes that the target has not taken, those in the kernel as `count` has them.
    fn left_over(&self, count: fn(BorrowedFd<'_>) -> u64) -> u64 {
        let in_kernel = match &self.state {
            State::Open(socket) if !self.is_udp() => count(socket.as_fd()),
            _ => 0,
        };
        (self.lost + self.queued) as u64 + in_kernel
    }

    pub(super) fn leave_status(&self) {
        lock(&self.info.forwards).retain(|other| !Arc::ptr_eq(other, &self.shown));
    }

    pub(super) fn is_udp(&self) -> bool {
        self.shown.target.transport == Transport::Udp
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.state, State::Open(_))
    }

    /// True once it is open. The error is the text for the client.
    pub(super) fn advance(&mut self, peer: &Peer, now: Instant) -> Result<bool, String> {
        let State::Opening(opening) = &mut self.state else { return Ok(false) };
        let opened = opening.advance(peer, &self.shown.target, &mut self.descriptors, now);
        let opened = opened.inspect_err(|end| self.end.clone_from(end)).map_err(|(_, text)| text)?;
        let Some((socket, address)) = opened else { return Ok(false) };
        // Without it a stream is only slower; a datagram socket has no such option.
        let _ = setsockopt(&socket, sockopt::TcpNoDelay, &true);
        // The kernel takes 4 MiB for a target that doesn't read, uncounted; three forwards can be all that a small
        // device has for TCP. Without it only that is different.
        let _ = setsockopt(&socket, net::UnsentLimit, &UNSENT_LIMIT);
        // As Go does. A target that was switched off says nothing, and firewalls forget what is silent.
        let _ = setsockopt(&socket, sockopt::KeepAlive, &true);
        let _ = setsockopt(&socket, sockopt::TcpKeepIdle, &KEEPALIVE);
        let _ = setsockopt(&socket, sockopt::TcpKeepInterval, &KEEPALIVE);
        self.state = State::Open(socket);
        self.shown.traffic.touch(now);
        let _ = self.shown.address.set(address);
        Ok(true)
    }

    fn sockets(&self) -> impl Iterator<Item = &OwnedFd> {
        let (opening, open) = match &self.state {
            State::Opening(opening) => (Some(opening.sockets()), None),
            State::Open(socket) => (None, Some(socket)),
        };
        opening.into_iter().flatten().chain(open)
    }

    pub(super) fn watch<'a>(&'a self, reading: bool, set: &mut PollSet<'a>) {
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, reading && self.is_open() && !self.ended);
        events.set(PollFlags::POLLOUT, !self.is_open() || !self.to_target.is_empty());
        // poll(2) reports a dead socket all the time, even if asked for nothing.
        if !events.is_empty() {
            self.sockets().for_each(|socket| set.add(socket.as_fd(), events));
        }
        if let State::Opening(opening) = &self.state {
            set.until(&[Some(opening.deadline())]);
        }
    }

    pub(super) fn events(&self, events: &Events) -> PollFlags {
        self.sockets().map(|socket| events.of(socket)).collect()
    }

    /// Passes data on; `waiting` counts all that waits for the session's targets. Fails for a client that doesn't wait for
    /// acks. Data that the target takes at once needs no room: others may have used up the session's or the device's.
    pub(super) fn pass(&mut self, data: Bytes, waiting: usize, now: Instant) -> Result<(), String> {
        let (queued, others) = (self.queued + data.len(), waiting - self.memory.count());
        let overrun = |queued| Err(format!("the target does not read and {queued} bytes wait"));
        if queued > QUEUE_HARD_LIMIT || self.to_target.len() >= MAX_QUEUED {
            self.lost += data.len();
            return overrun(self.queued);
        }
        self.queued = queued;
        self.to_target.push_back(data);
        self.shown.traffic.touch(now);
        self.flush(now);
        let held = self.held();
        if (self.memory.count() < held || others + held > MAX_WAITING)
            && let Some(rest) = self.to_target.pop_back()
        {
            self.queued -= rest.len();
            self.lost += rest.len();
            return overrun(self.queued);
        }
        Ok(())
    }

    /// In bytes.
    fn held(&self) -> usize {
        let taken = if self.to_target.is_empty() { 0 } else { self.taken };
        self.queued + taken + self.to_target.len() * PIECE
    }

    /// Whether its client may send more, with up to `limit` bytes queued.
    pub(super) fn has_room(&self, limit: usize) -> bool {
        self.queued <= limit && self.to_target.len() <= MAX_QUEUED / 2
    }

    pub(super) fn takes_data(&self) -> bool {
        self.unacknowledged.len() < MAX_UNACKNOWLEDGED
    }

    pub(super) fn flush(&mut self, now: Instant) {
        if self.failure.is_some() {
            self.to_target.clear();
            self.lost += mem::take(&mut self.queued);
        }
        let udp = self.is_udp();
        while let (State::Open(socket), Some(data)) = (&self.state, self.to_target.front_mut()) {
            let n = match send(socket.as_raw_fd(), data, MsgFlags::MSG_NOSIGNAL) {
                Ok(n) => {
                    self.shown.traffic.add_in(n, now);
                    n
                }
                // A datagram goes as a whole or, without room or receiver, not at all.
                Err(_) if udp => data.len(),
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                Err(e) => {
                    self.failure = Some(format!("write tcp: {}", reason(&e.into())));
                    // So that reading comes to an end whatever the error was.
                    let _ = shutdown(socket.as_raw_fd(), Shutdown::Read);
                    return self.flush(now);
                }
            };
            self.queued -= n;
            self.taken += n;
            let _ = data.split_to(n);
            if data.is_empty() {
                self.to_target.pop_front();
                self.taken = 0;
            }
        }
        // The queue's own memory isn't counted.
        trim(&mut self.to_target, SMALL);
        self.memory.resize(self.held());
    }

    /// Whether the target has taken or answered anything since the last look. An endless sender isn't answering. A
    /// look-up has a time limit of its own.
    pub(super) fn makes_progress(&mut self) -> bool {
        let left = self.left_over(net::unacknowledged);
        let less = left < mem::replace(&mut self.left, left);
        less || self.sockets().next().is_none() || (1..=MAX_ANSWERS).contains(&mem::take(&mut self.discarded))
    }

    /// `None` if there is no data. The error is the target's end.
    pub(super) fn read(&mut self, place: &mut [u8], now: Instant) -> Result<Option<usize>, End> {
        let State::Open(socket) = &self.state else { return Ok(None) };
        let udp = self.is_udp();
        match recv(socket.as_raw_fd(), place, MsgFlags::empty()) {
            Ok(0) if !udp => Err((CLOSED, "target".to_owned())),
            Ok(n) => {
                self.shown.traffic.touch(now);
                self.shown.traffic.add_out(n);
                Ok(Some(n))
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
            // ICMP reports the fate of one datagram: no receiver, too large, prohibited. The next one may get through.
            Err(_) if udp => Ok(None),
            Err(e) => Err((FAILED, format!("read: {}", reason(&e.into())))),
        }
    }

    /// Delivers the client's remaining data: writes it, shuts down writing, and reads until the target ends, too.
    /// Closing a socket with unread data resets it, and the target loses what it has not read yet. False if nothing is
    /// left to do.
    pub(super) fn finish(&mut self, now: Instant) -> bool {
        self.flush(now);
        if let Some(text) = &self.failure {
            self.end = (FAILED, text.clone());
            return false;
        }
        let done = self.to_target.is_empty();
        let socket = match &self.state {
            State::Open(socket) if !self.is_udp() => socket.as_raw_fd(),
            _ => return !done,
        };
        // A part must not pass for the whole: Drop resets the connection. ENOTCONN: the target is gone already.
        if done && (self.lost > 0 || shutdown(socket, Shutdown::Write).is_err()) {
            return false;
        }
        // Bounded: a target that never stops sending must not keep the session from its other work.
        for _ in 0..MAX_DISCARDS {
            match recv(socket, &mut [0; DISCARD], MsgFlags::empty()) {
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(n) => self.discarded += n,
                Err(Errno::EAGAIN | Errno::EINTR) => break,
                Err(e) => {
                    if !done {
                        self.end = (FAILED, format!("read: {}", reason(&e.into())));
                    }
                    return false;
                }
            }
        }
        // A target that has shut down its side may still take what is left.
        !(done && self.ended)
    }
}

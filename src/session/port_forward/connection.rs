//! One forwarded connection: looked up, connected, open; what waits to be written to it.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use crossbeam_channel::{Receiver, TryRecvError};
use nix::poll::PollFlags;
use nix::sys::socket::SockType;

use crate::audit::Record;
use crate::config::Allowed;
use crate::outbox::Sink;
use crate::permits::Permit;
use crate::proto::forward::{Target, Transport};
use crate::proto::{SessionId, UserId};
use crate::session::peer::Peer;
use crate::session::stats::{ForwardInfo, Info};
use crate::sys::wake::Wake;
use crate::sys::{Events, names, net, poll_one, reason};

/// Limit of look-up and connect together. glibc's resolver alone may take 16 s before it succeeds.
const OPEN_LIMIT: Duration = Duration::from_secs(45);
/// Bytes queued for the target up to which further data is acknowledged at once.
const QUEUE_SOFT_LIMIT: usize = 64 * 1024;
/// Data frames that the client hasn't acknowledged, of one forward. One that isn't read leaves half of the session's
/// credit to the others, and mender-cli stops reading all of them at twenty.
const MAX_UNACKNOWLEDGED: usize = 8;
/// In bytes. Only a client that doesn't wait for acks gets here: the forward ends.
const QUEUE_HARD_LIMIT: usize = 1 << 20;
/// Frames, however small.
const MAX_QUEUED: usize = 4096;
/// Bytes of a read from a stream, and so of a body, if the link allows no more.
const SMALLEST_READ: usize = 2 * 1024;
const LARGEST_READ: usize = 64 * 1024;
/// The largest datagram in bytes.
const DATAGRAM: usize = 65_535;
/// Bytes read and discarded at a time from a target whose client has gone, and reads per turn.
const DISCARD: usize = 4096;
const MAX_DISCARDS: usize = 16;
/// The audit log's `result` of a forward that ended in order.
const CLOSED: &str = "closed";

/// A connection to a target on behalf of a client.
#[derive(Debug)]
pub(crate) struct Connection {
    state: State,
    /// When it must be open.
    deadline: Instant,
    to_target: VecDeque<Bytes>,
    queued: usize,
    /// The numbers, among the session's messages, of the data that the client hasn't acknowledged.
    pub(crate) unacknowledged: VecDeque<u64>,
    /// Data frames of the client that we haven't acknowledged.
    pub(crate) owed: usize,
    /// Time of the last data in either direction.
    pub(crate) last_traffic: Instant,
    /// We have shut down writing to the target; the target has ended its side.
    shut_down: bool,
    ended: bool,
    _descriptor: Permit,
    audit: Audit,
}

/// Writes the audit log's line of a connection when it is dropped.
#[derive(Debug)]
pub(crate) struct Audit {
    session: SessionId,
    user: UserId,
    info: Arc<Info>,
    /// The address, the start and the bytes carried.
    shown: Arc<ForwardInfo>,
    /// The `result` field.
    result: &'static str,
    reason: String,
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.info.remove_forward(&self.shown);
        let ForwardInfo { target: Target { host, port, transport }, address, traffic } = &*self.shown;
        let address = address.get().map_or_else(String::new, ToString::to_string);
        let now = Instant::now();
        let figures = traffic.figures(now);
        Record::new("forward", Some(&self.session), &self.user)
            .with("protocol", transport.name())
            .text("target", format!("{host}:{port}"))
            .text("address", address)
            .since(traffic.since, now)
            .bytes(figures.bytes_in, figures.bytes_out)
            .with("result", self.result)
            .text("reason", &self.reason)
            .log(self.result == CLOSED);
    }
}

#[derive(Debug)]
enum State {
    /// For a permit to look the name up.
    Waiting,
    LookingUp(Receiver<io::Result<Vec<SocketAddr>>>),
    Connecting {
        socket: Socket,
        address: SocketAddr,
        others: VecDeque<SocketAddr>,
        until: Instant,
    },
    Open(Socket),
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpStream),
    Udp(UdpSocket),
}

impl Socket {
    fn new(transport: Transport, fd: OwnedFd) -> Self {
        match transport {
            Transport::Tcp => Socket::Tcp(fd.into()),
            Transport::Udp => Socket::Udp(fd.into()),
        }
    }

    fn take_error(&self) -> io::Result<()> {
        let error = match self {
            Socket::Tcp(socket) => socket.take_error()?,
            Socket::Udp(socket) => socket.take_error()?,
        };
        error.map_or(Ok(()), Err)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Tcp(socket) => socket.as_fd(),
            Socket::Udp(socket) => socket.as_fd(),
        }
    }
}

/// The result of a step towards being open.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Pending,
    Opened,
    /// The text for the client.
    Failed(String),
}

/// The result of a read.
#[derive(Debug)]
pub(crate) enum Input {
    /// Bytes of data, or a datagram of that size.
    Data(usize),
    Nothing,
    /// The end, with the reason unless it is the regular one.
    End(Option<String>),
}

impl Connection {
    /// Doesn't begin to connect yet. `descriptor` is for its socket.
    pub(crate) fn new(target: Target, peer: &Peer, user: UserId, descriptor: Permit, now: Instant) -> Self {
        let audit = Audit {
            session: peer.id.clone(),
            user,
            shown: peer.info.add_forward(target, now),
            info: Arc::clone(&peer.info),
            result: CLOSED,
            reason: "session".to_owned(),
        };
        Connection {
            state: State::Waiting,
            deadline: now + OPEN_LIMIT,
            to_target: VecDeque::new(),
            queued: 0,
            unacknowledged: VecDeque::new(),
            owed: 0,
            last_traffic: now,
            shut_down: false,
            ended: false,
            _descriptor: descriptor,
            audit,
        }
    }

    /// Has the audit log say that it was closed in order, and by whom.
    pub(crate) fn closed_by(&mut self, whom: &str) {
        self.audit.reason = whom.to_owned();
    }

    /// Has the audit log say what went wrong.
    pub(crate) fn broke(&mut self, why: &str) {
        if self.audit.result == CLOSED {
            self.audit.result = "failed";
        }
        self.audit.reason = why.to_owned();
    }

    pub(crate) fn target(&self) -> &Target {
        &self.audit.shown.target
    }

    /// True while a thread looks its name up.
    pub(crate) fn is_looking_up(&self) -> bool {
        matches!(self.state, State::LookingUp(_))
    }

    /// As Go words it: "dial tcp 127.0.0.1:1: connect: …", "dial tcp: lookup name: …".
    fn failed(&self, what: &str) -> Step {
        Step::Failed(format!("dial {}{what}", self.target().transport.name()))
    }

    /// Continues opening. `permit` tries to get the right to look a name up.
    pub(crate) fn advance(
        &mut self,
        permit: impl FnOnce() -> Option<Permit>,
        allowed: Option<&[Allowed]>,
        wake: &Arc<Wake>,
        now: Instant,
    ) -> Step {
        match &self.state {
            State::Open(_) => Step::Pending,
            State::Waiting => match known_addresses(self.target()) {
                Some(addresses) => self.choose(addresses, allowed, now),
                None if now >= self.deadline => {
                    self.failed(&format!(": lookup {}: i/o timeout", self.target().host))
                }
                None => match permit() {
                    Some(permit) => self.look_up(permit, wake),
                    None => Step::Pending,
                },
            },
            State::LookingUp(answer) => match answer.try_recv() {
                Ok(Ok(addresses)) => self.choose(addresses, allowed, now),
                Ok(Err(e)) => self.failed(&format!(": lookup {}: {e}", self.target().host)),
                Err(TryRecvError::Empty) if now < self.deadline => Step::Pending,
                Err(_) => self.failed(&format!(": lookup {}: i/o timeout", self.target().host)),
            },
            State::Connecting { socket, until, .. } => {
                let outcome = match (is_writable(socket), now >= *until) {
                    (true, _) => socket.take_error(),
                    (false, true) => Err(io::ErrorKind::TimedOut.into()),
                    (false, false) => return Step::Pending,
                };
                self.connected(outcome, now)
            }
        }
    }

    fn look_up(&mut self, permit: Permit, wake: &Arc<Wake>) -> Step {
        let wake = Arc::clone(wake);
        match names::look_up(&self.target().host, self.target().port, permit, move || wake.notify()) {
            Ok(answer) => {
                self.state = State::LookingUp(answer);
                Step::Pending
            }
            Err(e) => self.failed(&format!(": lookup {}: {}", self.target().host, reason(&e))),
        }
    }

    /// Keeps the addresses that may be reached, and no others, whatever the name resolves to later.
    fn choose(&mut self, addresses: Vec<SocketAddr>, allowed: Option<&[Allowed]>, now: Instant) -> Step {
        let Target { host, port, transport } = self.target();
        let permitted = |address: &SocketAddr| {
            let permits = |a: &Allowed| a.permits(transport.name(), host, address.ip(), *port);
            allowed.is_none_or(|allowed| allowed.iter().any(permits))
        };
        let total = addresses.len();
        let addresses: VecDeque<SocketAddr> = addresses.into_iter().filter(permitted).collect();
        if total > 0 && addresses.is_empty() {
            let transport = transport.name();
            let text = format!("access denied: {transport}/{host}:{port} is not in PortForward.Allow");
            self.audit.result = "denied";
            return Step::Failed(text);
        }
        let none = format!(": lookup {host}: no such host");
        self.connect_next(addresses, none, now)
    }

    fn connect_next(&mut self, mut addresses: VecDeque<SocketAddr>, mut last: String, now: Instant) -> Step {
        let kind = match self.target().transport {
            Transport::Tcp => SockType::Stream,
            Transport::Udp => SockType::Datagram,
        };
        while let Some(address) = addresses.pop_front() {
            let left = self.deadline.saturating_duration_since(now);
            let until = now + net::connect_limit(left, addresses.len() + 1);
            match net::begin_connect(address, kind) {
                Ok(fd) => {
                    let socket = Socket::new(self.target().transport, fd);
                    self.state = State::Connecting { socket, address, others: addresses, until };
                    return Step::Pending;
                }
                Err(e) => last = format!(" {address}: connect: {}", reason(&e)),
            }
        }
        self.failed(&last)
    }

    fn connected(&mut self, outcome: io::Result<()>, now: Instant) -> Step {
        let State::Connecting { socket, address, others, .. } =
            std::mem::replace(&mut self.state, State::Waiting)
        else {
            return Step::Pending;
        };
        match outcome {
            Ok(()) => {
                if let Socket::Tcp(stream) = &socket {
                    // Only a matter of speed.
                    let _ = stream.set_nodelay(true);
                }
                self.state = State::Open(socket);
                self.last_traffic = now;
                let _ = self.audit.shown.address.set(address);
                Step::Opened
            }
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                self.connect_next(others, format!(" {address}: i/o timeout"), now)
            }
            Err(e) => self.connect_next(others, format!(" {address}: connect: {}", reason(&e)), now),
        }
    }

    /// The events to poll for; with `reading` data from the target is one.
    pub(crate) fn watch(&self, reading: bool) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let (socket, events) = match &self.state {
            State::Waiting | State::LookingUp(_) => return None,
            State::Connecting { socket, .. } => (socket, PollFlags::POLLOUT),
            State::Open(socket) => {
                let mut events = PollFlags::empty();
                events.set(PollFlags::POLLIN, reading && !self.ended);
                events.set(PollFlags::POLLOUT, !self.to_target.is_empty());
                (socket, events)
            }
        };
        // A dead socket is always "ready": one that isn't to be used now isn't watched at all.
        (!events.is_empty()).then(|| (socket.as_fd(), events))
    }

    /// What poll(2) has found.
    pub(crate) fn events(&self, events: &Events) -> PollFlags {
        match &self.state {
            State::Waiting | State::LookingUp(_) => PollFlags::empty(),
            State::Connecting { socket, .. } | State::Open(socket) => events.of(socket),
        }
    }

    /// When [`Connection::advance`] has something to decide.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Waiting | State::LookingUp(_) => Some(self.deadline),
            State::Connecting { until, .. } => Some(*until),
            State::Open(_) => None,
        }
    }

    /// Queues data of the client for the target. Fails if far more is queued than was acknowledged.
    pub(crate) fn queue(&mut self, data: Bytes, now: Instant) -> Result<(), String> {
        self.last_traffic = now;
        if self.queued + data.len() > QUEUE_HARD_LIMIT || self.to_target.len() >= MAX_QUEUED {
            return Err(self.deaf());
        }
        self.queued += data.len();
        self.to_target.push_back(data);
        Ok(())
    }

    /// What is said of a target that doesn't read.
    pub(crate) fn deaf(&self) -> String {
        format!("the target does not read and {} bytes wait", self.queued)
    }

    /// Bytes of memory that wait for the target, roughly.
    pub(crate) fn waiting(&self) -> usize {
        self.queued + self.to_target.len() * size_of::<Bytes>()
    }

    /// What more data adds to [`Connection::waiting`].
    pub(crate) fn cost(data: &Bytes) -> usize {
        data.len() + size_of::<Bytes>()
    }

    /// The client has acknowledged data. The number of the first that was not.
    pub(crate) fn acknowledged(&mut self) -> Option<u64> {
        self.unacknowledged.pop_front()
    }

    /// True if the client may be sent more data.
    pub(crate) fn takes_data(&self) -> bool {
        self.unacknowledged.len() < MAX_UNACKNOWLEDGED
    }

    /// True if the client's data may be acknowledged.
    pub(crate) fn may_acknowledge(&self) -> bool {
        self.queued <= QUEUE_SOFT_LIMIT
    }

    /// True if data is queued for the target.
    pub(crate) fn has_output(&self) -> bool {
        !self.to_target.is_empty()
    }

    /// Writes what the target takes. Fails if it never will again.
    pub(crate) fn flush(&mut self, now: Instant) -> Result<(), String> {
        let State::Open(socket) = &mut self.state else { return Ok(()) };
        while let Some(data) = self.to_target.front_mut() {
            let written = match socket {
                Socket::Tcp(stream) => stream.write(data),
                // A datagram goes as a whole or, when there is no room or no receiver, not at all.
                Socket::Udp(socket) => {
                    let _ = socket.send(data);
                    Ok(data.len())
                }
            };
            match written {
                Ok(n) => {
                    self.last_traffic = now;
                    self.audit.shown.traffic.add_in(n, now);
                    self.queued -= n;
                    let _ = data.split_to(n);
                    if data.is_empty() {
                        self.to_target.pop_front();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    (self.to_target, self.queued) = (VecDeque::new(), 0);
                    return Err(format!("write {}: {}", self.target().transport.name(), reason(&e)));
                }
            }
        }
        Ok(())
    }

    /// The room that [`Connection::read`] needs.
    pub(crate) fn largest_read(&self, sink: &Sink) -> usize {
        match self.target().transport {
            Transport::Tcp => sink.piece(SMALLEST_READ, LARGEST_READ),
            Transport::Udp => DATAGRAM,
        }
    }

    pub(crate) fn read(&mut self, place: &mut [u8], now: Instant) -> Input {
        let result = match &mut self.state {
            State::Open(Socket::Tcp(stream)) => stream.read(place),
            State::Open(Socket::Udp(socket)) => socket.recv(place),
            _ => return Input::Nothing,
        };
        match result {
            Ok(0) if self.target().transport == Transport::Tcp => Input::End(None),
            Ok(n) => {
                self.last_traffic = now;
                self.audit.shown.traffic.touch(now);
                self.audit.shown.traffic.add_out(n);
                Input::Data(n)
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Input::Nothing
            }
            // The network reports the fate of one datagram (ICMP): no receiver now, too large, prohibited. The next
            // one may get through.
            Err(_) if self.target().transport == Transport::Udp => Input::Nothing,
            Err(e) => Input::End(Some(reason(&e))),
        }
    }

    /// Hides the forward from `status`: its client has gone.
    pub(crate) fn leave_status(&self) {
        self.audit.info.remove_forward(&self.audit.shown);
    }

    /// Delivers the client's remaining data: writes it, shuts down writing, and reads until the target ends, too.
    /// Closing a socket with unread data would reset it, and the target would lose what it has not read yet. True if
    /// there is more to do.
    pub(crate) fn finish(&mut self, now: Instant) -> bool {
        if let Err(text) = self.flush(now) {
            self.broke(&text);
            return false;
        }
        let done = self.to_target.is_empty();
        let State::Open(Socket::Tcp(stream)) = &mut self.state else { return !done };
        if done && !self.shut_down {
            self.shut_down = true;
            if stream.shutdown(std::net::Shutdown::Write).is_err() {
                // The target is gone already.
                return false;
            }
        }
        // A target that writes without end must not keep the session from its other work.
        for _ in 0..MAX_DISCARDS {
            match stream.read(&mut [0; DISCARD]) {
                Ok(0) => {
                    self.ended = true;
                    break;
                }
                Ok(_) => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => break,
                Err(e) => {
                    if !done {
                        self.broke(&format!("read: {}", reason(&e)));
                    }
                    return false;
                }
            }
        }
        // A target that has ended its side may still take what is left.
        !(done && self.ended)
    }

    pub(crate) fn is_open(&self) -> bool {
        matches!(self.state, State::Open(_))
    }
}

/// True if a connect(2) in progress has succeeded or failed.
fn is_writable(socket: &Socket) -> bool {
    poll_one(socket, PollFlags::POLLOUT, Some(Instant::now())).is_ok_and(|events| !events.is_empty())
}

/// The addresses of a target that need no look-up.
fn known_addresses(target: &Target) -> Option<Vec<SocketAddr>> {
    let bare = target.host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(&target.host);
    let addresses: Vec<IpAddr> = match bare.parse() {
        Ok(address) => vec![address],
        // By definition (RFC 6761, 6.3).
        Err(_) if bare.eq_ignore_ascii_case("localhost") => {
            vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]
        }
        Err(_) => return None,
    };
    Some(addresses.into_iter().map(|address| SocketAddr::new(address, target.port)).collect())
}

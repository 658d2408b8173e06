//! Forwards to targets on this host, beside a model of what each side has been sent: nothing is lost, comes twice or in
//! another order, each piece of data is acknowledged once, and of one forward no more is on the way than its window.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::{config, next, session};
use crate::outbox::Queue;
use crate::proto::{Frame, Map, PORT_FORWARD, SessionId, forward};
use crate::session::device::Device;
use crate::session::peer::Peer;
use crate::session::port_forward::PortForward;
use crate::sys::{PollSet, lock, poll_one};

/// As in the agent: data of one forward that the client has not acknowledged.
const MAX_UNACKNOWLEDGED: usize = 8;
/// Requests whose answers a client waits for: more could fill the outbox, which has no writer here.
const MAX_REQUESTS: usize = 8;

/// Bytes that wait for a target, or for all, beyond which a forward may fail.
const MAX_QUEUED: usize = 1 << 20;
const MAX_WAITING: usize = 3 << 20;
/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(8);

const IDS: usize = 4;
const LENGTHS: [usize; 6] = [0, 1, 100, 5000, 70_000, 300_000];

static LISTENER: LazyLock<(TcpListener, u16)> = LazyLock::new(|| {
    let listener = TcpListener::bind("0.0.0.0:0").expect("a listener");
    listener.set_nonblocking(true).expect("no waiting");
    let port = listener.local_addr().expect("its address").port();
    (listener, port)
});
/// Nobody listens there, and no connection to it comes from it, as it could among the kernel's own choices.
const NOBODY: u16 = 1;

/// Bytes that are a stream's from this one on.
fn bytes(from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| (at % 251) as u8).collect()
}

/// A target, of a forward that its client still has or has left.
struct Target {
    id: usize,
    /// `None` when it has ended without a word.
    socket: Option<TcpStream>,
    /// Bytes that its client has sent, that it has read, and that it has written.
    sent: usize,
    read: usize,
    written: usize,
    /// It has written its last byte.
    ended: bool,
    /// Data for it may be lost: it ended early, or its client sent far more than it read.
    lossy: bool,
    /// The agent has no such forward any more.
    left: bool,
}

/// A client's view of the forwards of one id.
#[derive(Default)]
struct Client {
    /// Requests that have opened one, but for the answer.
    opening: usize,
    /// The target's bytes so far, and data that it has not acknowledged.
    received: usize,
    unacknowledged: usize,
    /// Data that the agent has to acknowledge, and what it need not, since the client has stopped the forward.
    owed: usize,
    excused: usize,
    /// Ends of which the client has not heard.
    stops: usize,
}

struct Model {
    peer: Peer,
    queue: Queue,
    forwards: PortForward,
    now: Instant,
    clients: [Client; IDS],
    targets: Vec<Target>,
    /// Data for forwards that aren't there.
    unknown: usize,
    /// Openings and ends of which the client has not heard.
    requests: usize,
    /// Pings that the client has not answered.
    pings: usize,
}

/// Each three bytes are a step and what it is about.
pub fn run(steps: &[u8]) {
    let device = Device::new(config("{}"));
    let (peer, queue) = session(&device, &SessionId::new("s").expect("a name"), "u");
    let mut model = Model {
        peer,
        queue,
        forwards: PortForward::default(),
        now: Instant::now(),
        clients: Default::default(),
        targets: Vec::new(),
        unknown: 0,
        requests: 0,
        pings: 0,
    };
    for step in steps.chunks_exact(3) {
        model.step(step[0], usize::from(step[1]) % IDS, step[2].into());
        model.turn(Duration::ZERO);
    }
    model.arrive();
    model.finish();
    drop(model);
    assert_eq!((device.forwards.taken(), device.memory.taken()), (0, 0));
}

fn host(id: usize) -> String {
    format!("127.0.0.{}", id + 1)
}

impl Model {
    fn step(&mut self, step: u8, id: usize, b: usize) {
        match step % 12 {
            0 => self.open(id, b),
            1 | 2 => self.send(id, LENGTHS[b % LENGTHS.len()]),
            3 => self.acknowledge(id),
            4 if self.requests < MAX_REQUESTS => self.stop(id),
            5 => (0..b).for_each(|_| _ = self.receive()),
            6 => self.of(id).for_each(|target| _ = target.read(b * 1000)),
            7 => self.of(id).for_each(|target| target.write(LENGTHS[b % LENGTHS.len()])),
            8 => self.of(id).for_each(|target| target.end(b % 4 == 0)),
            9 => self.pong(),
            10 => {
                self.now += Duration::from_millis(10) * b as u32;
                // A target that takes nothing for ten seconds is given up when its client has gone.
                let late = self.targets.iter_mut().filter(|target| target.left && target.read < target.sent);
                late.for_each(|target| target.lossy = true);
            }
            _ => (0..b % 32).for_each(|_| self.turn(Duration::ZERO)),
        }
    }

    /// Whether the agent has a forward of this id.
    fn has(&self, id: usize) -> bool {
        lock(&self.peer.info.forwards).iter().any(|forward| forward.target.host == host(id))
    }

    fn handle(&mut self, id: usize, typ: &str, body: Vec<u8>) {
        let props = Map::new().with_str("connection_id", id.to_string().as_str());
        let frame = Frame::new(PORT_FORWARD, typ, Some(&self.peer.id)).with_props(props).with_body(body);
        assert!(self.forwards.handle(&mut self.peer, &frame, self.now));
    }

    fn of(&mut self, id: usize) -> impl Iterator<Item = &mut Target> {
        self.targets.iter_mut().filter(move |target| target.id == id)
    }

    fn open(&mut self, id: usize, b: usize) {
        if self.requests >= MAX_REQUESTS {
            return;
        }
        self.requests += 1;
        let (has, good) = (self.has(id), b % 4 > 0);
        let port = if good { LISTENER.1 } else { NOBODY };
        let body = Map::new().with_str("remote_host", host(id).as_str()).with_str("protocol", "tcp");
        self.handle(id, forward::NEW, body.with_i64("remote_port", port.into()).finish());
        if good && !has {
            let limit = Some(Instant::now() + LIMIT);
            assert!(!poll_one(&LISTENER.0, PollFlags::POLLIN, limit).expect("poll").is_empty());
            let socket = LISTENER.0.accept().expect("a connection").0;
            socket.set_nonblocking(true).expect("no waiting");
            let (sent, read, written, ended, lossy, left) = Default::default();
            self.targets.push(Target { id, socket: Some(socket), sent, read, written, ended, lossy, left });
            let client = &mut self.clients[id];
            (client.opening, client.unacknowledged) = (client.opening + 1, 0);
        }
    }

    fn stop(&mut self, id: usize) {
        self.requests += 1;
        if self.has(id) {
            let client = &mut self.clients[id];
            (client.excused, client.stops) = (client.excused + client.owed, client.stops + 1);
            client.owed = 0;
        }
        self.of(id).for_each(|target| target.left = true);
        self.handle(id, forward::STOP, Vec::new());
    }

    /// The client sends data, unless it can't know yet which acks are for that.
    fn send(&mut self, id: usize, length: usize) {
        if self.clients[id].excused > 0 {
            return;
        }
        // A piece counts as a whole until its target has taken all of it.
        let most = |left: usize| if left > 0 { left + LENGTHS[LENGTHS.len() - 1] } else { 0 };
        let waiting: usize = self.targets.iter().map(|target| most(target.sent - target.read)).sum();
        let from = match self.of(id).find(|target| !target.left) {
            Some(target) => {
                target.sent += length;
                target.lossy |= target.sent - target.read > MAX_QUEUED || waiting > MAX_WAITING;
                target.sent - length
            }
            None => 0,
        };
        let has = self.has(id);
        *if has { &mut self.clients[id].owed } else { &mut self.unknown } += 1;
        self.handle(id, forward::FORWARD, bytes(from, length));
    }

    /// The client acknowledges data, or what isn't there any more.
    fn acknowledge(&mut self, id: usize) {
        if self.clients[id].unacknowledged > 0 {
            self.clients[id].unacknowledged -= 1;
        } else if self.has(id) {
            return;
        }
        self.handle(id, forward::ACK, Vec::new());
    }

    fn pong(&mut self) {
        if self.pings > 0 {
            self.pings -= 1;
            self.peer.credit.answered(Instant::now());
        }
    }

    fn turn(&mut self, wait: Duration) {
        self.forwards.answer(&mut self.peer, self.now);
        let mut set = PollSet::default();
        self.forwards.watch(&self.peer, &mut set, self.now);
        set.until(&[Some(Instant::now() + wait)]);
        let events = set.wait().expect("poll");
        self.forwards.proceed(&mut self.peer, &events, self.now);
        self.forwards.answer(&mut self.peer, self.now);
        // It has ended some by itself.
        let has: [bool; IDS] = std::array::from_fn(|id| self.has(id));
        for target in self.targets.iter_mut().filter(|target| !target.left && !has[target.id]) {
            target.left = true;
            self.requests += 1;
            self.clients[target.id].stops += 1;
        }
    }

    /// The client reads the next message. False if there is none.
    fn receive(&mut self) -> bool {
        let Some(frame) = next(&mut self.queue, true) else {
            // All acks from before an end have come by now.
            let ended = self.clients.iter_mut().filter(|client| client.stops == 0);
            ended.for_each(|client| client.excused = 0);
            return false;
        };
        let id = frame.props.str("connection_id").and_then(|id| id.parse::<usize>().ok());
        let says = |text: &[u8]| frame.body.windows(text.len()).any(|part| part == text);
        match (frame.typ.as_str(), id) {
            ("ping", None) => self.pings += 1,
            ("new", Some(id)) => {
                self.requests -= 1;
                let client = &mut self.clients[id];
                (client.opening, client.received) = (client.opening - 1, 0);
            }
            ("ack", Some(id)) => {
                let Client { owed, excused, .. } = &mut self.clients[id];
                *if *excused > 0 { excused } else { owed } -= 1;
            }
            ("forward", Some(id)) => {
                let client = &mut self.clients[id];
                assert_eq!(frame.body, bytes(client.received, frame.body.len()));
                client.received += frame.body.len();
                // The client doesn't acknowledge data of an earlier forward while it opens one.
                client.unacknowledged += usize::from(client.opening == 0);
                assert!(client.unacknowledged <= MAX_UNACKNOWLEDGED);
            }
            ("stop", Some(id)) => {
                self.requests -= 1;
                self.clients[id].stops -= 1;
            }
            ("error", None) if says(b"msgtype\xa7forward") => {
                self.unknown -= usize::from(says(b"unknown connection"))
            }
            ("error", None) if says(b"msgtype\xa3ack") => {}
            ("error", None) => self.requests -= 1,
            other => panic!("{other:?}"),
        }
        true
    }

    /// All that is on the way arrives, where the client and the targets read all.
    fn arrive(&mut self) {
        let limit = Instant::now() + LIMIT;
        loop {
            let mut busy = false;
            self.targets.iter_mut().for_each(|target| busy |= target.read(1 << 20) > 0);
            while self.receive() {
                busy = true;
            }
            for id in 0..IDS {
                (0..self.clients[id].unacknowledged).for_each(|_| self.acknowledge(id));
            }
            (0..self.pings).for_each(|_| self.pong());
            let has_all = |target: &Target| target.lossy || target.sent == target.read;
            let heard_all =
                |target: &Target| target.left || self.clients[target.id].received == target.written;
            let told_all =
                self.requests + self.unknown == 0 && self.clients.iter().all(|client| client.owed == 0);
            if !busy && told_all && self.targets.iter().all(|target| has_all(target) && heard_all(target)) {
                return;
            }
            assert!(Instant::now() < limit, "something is lost");
            if !busy {
                self.now += Duration::from_millis(20);
            }
            self.turn(Duration::from_millis(if busy { 0 } else { 5 }));
        }
    }

    fn finish(&mut self) {
        self.targets.clear();
        self.forwards.close(self.now);
        for _ in 0..200 {
            self.now += Duration::from_secs(1);
            self.turn(Duration::ZERO);
        }
        assert!(self.forwards.is_idle());
    }
}

impl Target {
    /// Reads some: how much.
    fn read(&mut self, most: usize) -> usize {
        let mut place = vec![0; most];
        let read = self.socket.as_mut().and_then(|socket| socket.read(&mut place).ok()).unwrap_or(0);
        assert_eq!(place[..read], bytes(self.read, read));
        self.read += read;
        assert!(self.read <= self.sent);
        read
    }

    fn write(&mut self, length: usize) {
        if let Some(socket) = self.socket.as_mut().filter(|_| !self.ended && !self.left) {
            self.written += socket.write(&bytes(self.written, length)).unwrap_or(0);
        }
    }

    /// Writes no more, or is gone at once.
    fn end(&mut self, at_once: bool) {
        self.ended = true;
        if at_once {
            (self.socket, self.lossy) = (None, true);
        }
        let _ = self.socket.as_ref().map(|socket| socket.shutdown(Shutdown::Write));
    }
}

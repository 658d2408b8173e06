//! Port forwarding: protocol 3 for one session. All its forwards live in the session's one poll loop.
//!
//! Bounds: 64 KiB of each forward wait for a target that doesn't read before the client's data is no longer acknowledged.
//! Towards the client all share the session's credit.

mod connection;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::poll::PollFlags;

use self::connection::{Connection, Input, Step};
use super::peer::Peer;
use crate::outbox::Class;
use crate::permits::Permit;
use crate::proto::Frame;
use crate::proto::forward::{self, ConnectionId, Target};
use crate::sys::{Events, PollSet};

/// Forwards of a session at a time; each takes a descriptor.
const MAX_CONNECTIONS: usize = 512;
/// Look-ups of a session at a time.
const MAX_LOOK_UPS: usize = 4;
/// Bytes that a session's targets have not taken. Only a client that doesn't wait for acks gets here.
const MAX_WAITING: usize = 4 << 20;
/// Answers that wait for credit; only a client that never reads gets there.
const MAX_ANSWERS: usize = 1024;
/// A forward without traffic in either direction is closed after this time.
const IDLE_LIMIT: Duration = Duration::from_secs(600);
/// Limit for delivering a client's remaining data after it has gone.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

const UNKNOWN: &str = "unknown connection";
const UNKNOWN_TYPE: &str = "unknown message type";

/// The forwards of a session.
pub(crate) struct PortForward {
    connections: BTreeMap<ConnectionId, Connection>,
    /// Without a client any more, but with data for the target, until this deadline.
    finishing: Vec<(Connection, Instant)>,
    /// Forwards whose data is to be acknowledged when the target and the credit allow it.
    owing: VecDeque<ConnectionId>,
    /// Answers that wait for credit. No data is sent meanwhile, since it would overtake them.
    answers: VecDeque<Frame>,
    /// For what the targets have not taken.
    memory: Permit,
    /// Start of the next round of reading, so that no forward is always first.
    turn: usize,
}

impl PortForward {
    pub(crate) fn new(peer: &Peer) -> Self {
        PortForward {
            connections: BTreeMap::new(),
            finishing: Vec::new(),
            owing: VecDeque::new(),
            answers: VecDeque::new(),
            memory: peer.device.memory.none(),
            turn: 0,
        }
    }

    /// True if nothing is left to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.connections.is_empty() && self.finishing.is_empty() && self.answers.is_empty()
    }

    /// Handles a frame of the port forwarding protocol. False if the client asks for more than it reads.
    pub(crate) fn handle(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) -> bool {
        self.obey(peer, frame, now);
        self.answers.len() < MAX_ANSWERS
    }

    fn obey(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) {
        let id = match ConnectionId::of(frame) {
            Ok(id) => id,
            Err(text) => {
                let known = [forward::FORWARD, forward::ACK, forward::STOP];
                let text = match frame.typ.as_str() {
                    forward::NEW => text.as_str(),
                    typ if known.contains(&typ) => UNKNOWN,
                    _ => UNKNOWN_TYPE,
                };
                return self.refuse(peer, frame, text);
            }
        };
        match frame.typ.as_str() {
            forward::NEW => self.open(peer, frame, id, now),
            forward::FORWARD => self.take_data(peer, frame, &id, now),
            // Acks of a forward that is gone were in flight: ignored.
            forward::ACK => {
                if let Some(number) = self.connections.get_mut(&id).and_then(Connection::acknowledged) {
                    peer.credit.prove(number);
                }
            }
            forward::STOP => match self.take(&id) {
                Some(mut connection) => {
                    connection.closed_by("client");
                    // Before the answer: whoever has that may ask for the status at once.
                    self.let_go(connection, now);
                    self.answers.push_back(forward::about(&peer.id, forward::STOP, &id));
                }
                None => self.refuse(peer, frame, UNKNOWN),
            },
            forward::ERROR => debug!("session {}: error from the client about {id:?}", peer.id),
            _ => self.refuse(peer, frame, UNKNOWN_TYPE),
        }
    }

    fn refuse(&mut self, peer: &Peer, cause: &Frame, text: &str) {
        debug!("session {}: port forward: {}: {text}", peer.id, cause.typ.escape_debug());
        self.answers.push_back(forward::error(&peer.id, &cause.typ, text));
    }

    fn open(&mut self, peer: &mut Peer, frame: &Frame, id: ConnectionId, now: Instant) {
        let target = match Target::decode(&frame.body) {
            Ok(target) => target,
            Err(text) => return self.refuse(peer, frame, &text),
        };
        if self.connections.contains_key(&id) {
            return self.refuse(peer, frame, "connection_id is in use");
        }
        if self.connections.len() + self.finishing.len() >= MAX_CONNECTIONS && !self.finishing.is_empty() {
            // The oldest end makes room for a client that goes on.
            self.finishing.remove(0);
        }
        let room = self.connections.len() < MAX_CONNECTIONS;
        let Some(descriptor) = peer.device.forwards.acquire().filter(|_| room) else {
            warn!("session {}: too many forwarded connections", peer.id);
            return self.refuse(peer, frame, "too many connections");
        };
        let connection = Connection::new(target, peer, frame.user(), descriptor, now);
        self.connections.insert(id.clone(), connection);
        self.advance(peer, &id, now);
    }

    /// Continues opening a connection.
    fn advance(&mut self, peer: &mut Peer, id: &ConnectionId, now: Instant) {
        let looking_up = self.connections.values().filter(|c| c.is_looking_up()).count();
        let Some(connection) = self.connections.get_mut(id) else { return };
        let was_looking_up = connection.is_looking_up();
        let step = advance(connection, looking_up, peer, now);
        if was_looking_up && !connection.is_looking_up() {
            // Another one may have waited for that.
            peer.wake.notify();
        }
        match step {
            Step::Pending => {}
            Step::Opened => {
                debug!("session {}: forwarding to {:?}", peer.id, connection.target());
                self.answers.push_back(forward::about(&peer.id, forward::NEW, id));
                self.flush(peer, id, now);
            }
            Step::Failed(text) => {
                connection.broke(&text);
                self.answers.push_back(forward::error(&peer.id, forward::NEW, &text));
                // The client's data is acknowledged all the same: it waits for that.
                if let Some(connection) = self.take(id) {
                    self.acknowledge_all(peer, id, &connection);
                }
            }
        }
    }

    fn take_data(&mut self, peer: &mut Peer, frame: &Frame, id: &ConnectionId, now: Instant) {
        let Some(connection) = self.connections.get_mut(id) else {
            return self.refuse(peer, frame, UNKNOWN);
        };
        connection.owed += 1;
        let waiting = self.memory.count() + Connection::cost(&frame.body);
        let room = waiting <= MAX_WAITING && self.memory.resize(waiting);
        let queued = if room { connection.queue(frame.body.clone(), now) } else { Err(connection.deaf()) };
        if let Err(text) = queued {
            return self.fail(peer, id, &text, now);
        }
        self.owing.push_back(id.clone());
        self.flush(peer, id, now);
    }

    /// Writes queued data to the target, and acknowledges it.
    fn flush(&mut self, peer: &mut Peer, id: &ConnectionId, now: Instant) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        let before = connection.waiting();
        let result = connection.flush(now);
        let written = before - connection.waiting();
        self.memory.resize(self.memory.count().saturating_sub(written));
        if let Err(text) = result {
            self.fail(peer, id, &text, now);
        }
    }

    fn fail(&mut self, peer: &Peer, id: &ConnectionId, text: &str, now: Instant) {
        if let Some(connection) = self.connections.get_mut(id) {
            connection.broke(text);
        }
        self.stop(peer, id, Some(text), now);
    }

    /// Ends a forward from this side: acknowledges everything, since clients wait for that, and then stops it.
    fn stop(&mut self, peer: &Peer, id: &ConnectionId, error: Option<&str>, now: Instant) {
        let Some(connection) = self.take(id) else { return };
        self.acknowledge_all(peer, id, &connection);
        if let Some(text) = error {
            self.answers.push_back(forward::error(&peer.id, forward::FORWARD, text));
        }
        self.let_go(connection, now);
        self.answers.push_back(forward::about(&peer.id, forward::STOP, id));
    }

    /// Removes a forward and the acks that it is owed: the client may reuse its id at once.
    fn take(&mut self, id: &ConnectionId) -> Option<Connection> {
        self.owing.retain(|owing| owing != id);
        self.connections.remove(id)
    }

    fn acknowledge_all(&mut self, peer: &Peer, id: &ConnectionId, connection: &Connection) {
        let ack = || forward::about(&peer.id, forward::ACK, id);
        self.answers.extend(std::iter::repeat_with(ack).take(connection.owed));
    }

    /// Sends the answers and acks for which there is credit, and asks for more. To be called before each wait.
    pub(crate) fn answer(&mut self, peer: &mut Peer, now: Instant) {
        if self.is_idle() {
            return;
        }
        while peer.credit.takes_answer(now)
            && let Some(answer) = self.answers.pop_front()
        {
            peer.credit.sent(answer.body.len(), now);
            match answer.typ.as_str() {
                // In order with the data, which is bulk.
                forward::NEW | forward::STOP => peer.sink.reply_behind_bulk(&answer),
                _ => peer.sink.reply(&answer),
            }
        }
        if self.answers.is_empty() {
            self.acknowledge(peer, now);
        }
        if peer.credit.wants_probe(now) {
            peer.ping(now);
        }
    }

    /// Sends acks, in turn.
    fn acknowledge(&mut self, peer: &mut Peer, now: Instant) {
        for _ in 0..self.owing.len() {
            let Some(id) = self.owing.pop_front() else { return };
            match self.connections.get_mut(&id) {
                Some(connection) if connection.may_acknowledge() && peer.credit.takes_answer(now) => {
                    connection.owed -= 1;
                    peer.reply(&forward::about(&peer.id, forward::ACK, &id));
                }
                _ => self.owing.push_back(id),
            }
        }
    }

    /// The client is done with the forward. Its data still reaches the target.
    fn let_go(&mut self, mut connection: Connection, now: Instant) {
        connection.leave_status();
        if connection.finish(now) {
            self.finishing.push((connection, now + FINISH_LIMIT));
        }
    }

    /// Ends the session. The client's data still reaches its targets, everything else ends.
    pub(crate) fn close(&mut self, now: Instant) {
        self.owing.clear();
        self.answers.clear();
        for connection in std::mem::take(&mut self.connections).into_values() {
            self.let_go(connection, now);
        }
    }

    pub(crate) fn hang_up(&mut self) {
        self.owing.clear();
        self.answers.clear();
        self.connections.clear();
        self.finishing.clear();
    }

    /// When to call [`PortForward::proceed`] without an event.
    pub(crate) fn deadline(&self, peer: &Peer, now: Instant) -> Option<Instant> {
        if self.is_idle() {
            return None;
        }
        let connections = self.connections.values();
        let steps = connections.clone().filter_map(Connection::deadline);
        let idle = connections.map(|c| c.last_traffic + IDLE_LIMIT);
        let finishing = self.finishing.iter().map(|(_, until)| *until);
        let finishing = finishing.chain(self.finishing.iter().filter_map(|(c, _)| c.deadline()));
        steps.chain(idle).chain(finishing).chain(peer.credit.deadline(now)).min()
    }

    /// Whether data may go to the client.
    fn takes_data(&self, peer: &Peer, now: Instant) -> bool {
        self.answers.is_empty() && peer.credit.takes(now) && peer.sink.takes_data(Class::Bulk)
    }

    /// Adds what the forwards wait for.
    pub(crate) fn watch<'a>(&'a self, peer: &Peer, set: &mut PollSet<'a>, now: Instant) {
        if self.is_idle() {
            return;
        }
        let reading = self.takes_data(peer, now);
        let connections = self.connections.values().map(|c| (c, reading && c.takes_data()));
        for (connection, reading) in connections.chain(self.finishing.iter().map(|(c, _)| (c, true))) {
            if let Some((fd, events)) = connection.watch(reading) {
                set.add(fd, events);
            }
        }
    }

    /// Does what is possible now.
    pub(crate) fn proceed(&mut self, peer: &mut Peer, events: &Events, now: Instant) {
        if self.is_idle() {
            return;
        }
        self.step_unopened(peer, now);
        let ready: Vec<(ConnectionId, PollFlags)> = self
            .connections
            .iter()
            .map(|(id, c)| (id.clone(), c.events(events)))
            .filter(|(_, e)| !e.is_empty())
            .collect();
        let ended = PollFlags::POLLERR | PollFlags::POLLHUP;
        for (id, _) in ready.iter().filter(|(_, events)| events.intersects(PollFlags::POLLOUT | ended)) {
            self.flush(peer, id, now);
        }
        for n in 0..ready.len() {
            let (id, events) = &ready[(self.turn + n) % ready.len()];
            if events.intersects(PollFlags::POLLIN | ended) && !self.read(peer, id, now) {
                // The others were kept from their turn.
                self.turn = (self.turn + n) % ready.len();
                break;
            }
        }
        self.finish(peer, now);
        self.close_idle(peer, now);
        let all = self.connections.values().chain(self.finishing.iter().map(|(c, _)| c));
        self.memory.resize(all.map(Connection::waiting).sum());
    }

    fn step_unopened(&mut self, peer: &mut Peer, now: Instant) {
        let unopened: Vec<ConnectionId> =
            self.connections.iter().filter(|(_, c)| !c.is_open()).map(|(id, _)| id.clone()).collect();
        for id in unopened {
            self.advance(peer, &id, now);
        }
    }

    /// Continues the forwards that only deliver their client's remaining data.
    fn finish(&mut self, peer: &Peer, now: Instant) {
        let looking_up = self.finishing.iter().filter(|(c, _)| c.is_looking_up()).count();
        self.finishing.retain_mut(|(connection, until)| {
            let more = match advance(connection, looking_up, peer, now) {
                Step::Failed(text) => {
                    connection.broke(&text);
                    false
                }
                _ => connection.finish(now),
            };
            if more && now >= *until && connection.has_output() {
                connection.broke("the target did not take all that the client sent");
            }
            more && now < *until
        });
    }

    /// Sends the target's data to the client. False if no more may be sent.
    fn read(&mut self, peer: &mut Peer, id: &ConnectionId, now: Instant) -> bool {
        if !self.takes_data(peer, now) {
            return false;
        }
        let Some(connection) = self.connections.get_mut(id).filter(|c| c.takes_data()) else { return true };
        let frame = forward::about(&peer.id, forward::FORWARD, id);
        let (message, input) = peer.sink.compose(&frame, connection.largest_read(&peer.sink), |place| {
            let input = connection.read(place, now);
            (if let Input::Data(length) = input { length } else { 0 }, input)
        });
        match input {
            Input::Nothing => {}
            Input::Data(length) => {
                connection.unacknowledged.push_back(peer.credit.sent(length, now));
                peer.sink.send(message, Class::Bulk, None);
            }
            Input::End(why) => {
                match why {
                    None => connection.closed_by("target"),
                    Some(why) => connection.broke(&format!("read: {why}")),
                }
                self.stop(peer, id, None, now);
            }
        }
        true
    }

    fn close_idle(&mut self, peer: &Peer, now: Instant) {
        let idle: Vec<ConnectionId> = self
            .connections
            .iter()
            .filter(|(_, c)| now >= c.last_traffic + IDLE_LIMIT)
            .map(|(id, _)| id.clone())
            .collect();
        for id in idle {
            if let Some(connection) = self.connections.get_mut(&id) {
                connection.closed_by("idle");
            }
            self.stop(peer, &id, None, now);
        }
    }
}

/// Lets a connection continue opening.
fn advance(connection: &mut Connection, looking_up: usize, peer: &Peer, now: Instant) -> Step {
    let (device, wake) = (&peer.device, &peer.wake);
    let permit = || if looking_up < MAX_LOOK_UPS { device.look_ups.acquire_or_wake(wake) } else { None };
    connection.advance(permit, device.config().forward_targets.as_deref(), wake, now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::outbox::{Outbox, Queue, Sendable, Work};
    use crate::proto::{Map, PORT_FORWARD, SessionId};
    use crate::session::{Device, Router};
    use std::net::TcpListener;

    struct Scene {
        forwarder: PortForward,
        peer: Peer,
        queue: Queue,
    }

    fn scene() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let me = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap().name;
        let file = dir.path().join("conf");
        let text = format!(r#"{{ "ShellCommand": "/bin/sh", "User": {me:?} }}"#);
        std::fs::write(&file, text).unwrap();
        let device = Device::new(config::load(&file, &dir.path().join("absent")).unwrap());
        let (outbox, queue) = Outbox::new();
        let mut peer = None;
        let start = |started| {
            peer = Some(started);
            Ok(())
        };
        let first = Frame::new(PORT_FORWARD, forward::STOP, SessionId::new("s").as_ref());
        Router::with(&device, &outbox, start).route(first);
        let peer = peer.unwrap();
        Scene { forwarder: PortForward::new(&peer), peer, queue }
    }

    impl Scene {
        /// From a client that has read everything.
        fn handle(&mut self, frame: &Frame, now: Instant) {
            self.peer.credit.prove_all();
            assert!(self.forwarder.handle(&mut self.peer, frame, now));
            self.forwarder.answer(&mut self.peer, now);
        }

        fn proceed(&mut self, now: Instant) {
            self.forwarder.proceed(&mut self.peer, &Events::default(), now);
            self.forwarder.answer(&mut self.peer, now);
        }

        fn turn(&mut self, now: Instant) {
            let mut set = PollSet::new();
            self.forwarder.watch(&self.peer, &mut set, now);
            let events = set.wait(Some(Instant::now() + Duration::from_secs(10))).unwrap();
            self.forwarder.proceed(&mut self.peer, &events, now);
            self.forwarder.answer(&mut self.peer, now);
        }

        fn deadline(&self, now: Instant) -> Option<Instant> {
            self.forwarder.deadline(&self.peer, now)
        }
    }

    fn next_type(queue: &mut Queue) -> Option<String> {
        match queue.try_next(Sendable { bulk: true, interactive: true })? {
            Work::Message(message, _) => Some(Frame::decode(&message).unwrap().typ),
            other => panic!("{other:?}"),
        }
    }

    fn about(typ: &str) -> Frame {
        Frame::new(PORT_FORWARD, typ, None).with_props(Map::new().with_str("connection_id", "c"))
    }

    fn target(port: u16) -> Vec<u8> {
        target_of(port, "tcp")
    }

    fn target_of(port: u16, protocol: &str) -> Vec<u8> {
        Map::new()
            .with_str("remote_host", "127.0.0.1")
            .with_i64("remote_port", port.into())
            .with_str("protocol", protocol)
            .finish()
    }

    #[test]
    fn a_connection_without_traffic_is_closed_after_ten_minutes() {
        let mut scene = scene();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let start = Instant::now();
        scene.handle(&about(forward::NEW).with_body(target(port)), start);
        scene.turn(start);
        assert_eq!(next_type(&mut scene.queue).as_deref(), Some("new"));
        // Traffic towards the target counts.
        let later = start + IDLE_LIMIT / 2;
        scene.handle(&about(forward::FORWARD).with_body("x"), later);
        assert_eq!(next_type(&mut scene.queue).as_deref(), Some("ack"));
        assert_eq!(scene.deadline(later), Some(later + IDLE_LIMIT));
        scene.proceed(start + IDLE_LIMIT);
        assert_eq!(next_type(&mut scene.queue), None);
        scene.proceed(later + IDLE_LIMIT);
        assert_eq!(next_type(&mut scene.queue).as_deref(), Some("stop"));
        // The target is given time to take what it was sent.
        assert_eq!(scene.deadline(later), Some(later + IDLE_LIMIT + FINISH_LIMIT));
        scene.proceed(later + IDLE_LIMIT + FINISH_LIMIT);
        assert!(scene.forwarder.is_idle());
    }

    /// All frames of a burst were counted until its end, though the target had taken them: 4 MiB of them ended the
    /// forward.
    #[test]
    fn what_the_target_has_taken_is_not_counted() {
        let mut scene = scene();
        let target = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = target.local_addr().unwrap().port();
        let start = Instant::now();
        scene.handle(&about(forward::NEW).with_body(target_of(port, "udp")), start);
        scene.turn(start);
        for _ in 0..200 {
            scene.handle(&about(forward::FORWARD).with_body(vec![0; 60_000]), start);
            while let Some(typ) = next_type(&mut scene.queue) {
                assert!(typ == "new" || typ == "ack", "{typ}");
            }
        }
        assert_eq!((scene.forwarder.connections.len(), scene.forwarder.memory.count()), (1, 0));
    }

    /// `stop` left the connection's id among those that are owed an ack. A new connection of the same id was then owed
    /// less than none: 2^64 acks at its end.
    #[test]
    fn an_id_that_is_used_again_at_once_is_owed_nothing() {
        let mut scene = scene();
        // A target that does not read.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let body = target(listener.local_addr().unwrap().port());
        let start = Instant::now();
        scene.handle(&about(forward::NEW).with_body(body.clone()), start);
        scene.turn(start);
        for _ in 0..1000 {
            if !scene.forwarder.owing.is_empty() {
                break;
            }
            scene.handle(&about(forward::FORWARD).with_body(vec![0; 64 << 10]), start);
            // Acks are sent by a writer that doesn't wait for long.
            while next_type(&mut scene.queue).is_some() {}
        }
        scene.handle(&about(forward::STOP), start);
        scene.handle(&about(forward::NEW).with_body(body), start);
        assert!(scene.forwarder.owing.is_empty());
        scene.turn(start);
        while next_type(&mut scene.queue).is_some() {}
        scene.handle(&about(forward::FORWARD).with_body("x"), start);
        scene.handle(&about(forward::STOP), start);
        let all: Vec<_> = std::iter::from_fn(|| next_type(&mut scene.queue)).collect();
        assert_eq!(all, ["ack", "stop"]);
    }
}

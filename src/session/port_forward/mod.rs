//! Port forwarding: protocol 3 for one session. All its forwards live in the session's one poll loop.
//!
//! Bounds: 64 KiB of each forward wait for a target that doesn't read before the client's data is no longer acknowledged.
//! Towards the client all share the session's credit.

mod connection;
mod opening;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::poll::PollFlags;

use self::connection::{CLOSED, Connection};
use self::opening::{End, FAILED};
use super::peer::Peer;
use crate::outbox::Class;
use crate::proto::Frame;
use crate::proto::forward::{self, ConnectionId, Target};
use crate::sys::{Events, PollSet};

/// Forwards of a session at a time; each takes a descriptor.
const MAX_CONNECTIONS: usize = 512;
/// Answers that wait for credit; only a client that never reads gets there.
const MAX_ANSWERS: usize = 1024;
/// A forward without traffic in either direction is closed after this time.
const IDLE_LIMIT: Duration = Duration::from_secs(600);
/// Limit for delivering a client's remaining data after it has gone.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

/// Bytes queued for a target up to which further data is acknowledged at once.
const QUEUE_SOFT_LIMIT: usize = 64 * 1024;

const UNKNOWN: &str = "unknown connection";
const UNKNOWN_TYPE: &str = "unknown message type";

#[derive(Default)]
pub(crate) struct PortForward {
    connections: BTreeMap<ConnectionId, Connection>,
    /// Without a client any more, but with data for the target, until this deadline.
    finishing: Vec<(Connection, Instant)>,
    /// Forwards whose data is to be acknowledged when the target and the credit allow it, once per frame.
    owing: VecDeque<ConnectionId>,
    /// Answers that wait for credit. No data is sent meanwhile, since it would overtake them.
    answers: VecDeque<Frame>,
    /// Start of the next round of reading, so that no forward is always first.
    turn: usize,
}

impl PortForward {
    pub(crate) fn is_idle(&self) -> bool {
        self.connections.is_empty() && self.finishing.is_empty() && self.answers.is_empty()
    }

    fn all(&self) -> impl Iterator<Item = &Connection> {
        self.connections.values().chain(self.finishing.iter().map(|(c, _)| c))
    }

    fn ids(&self, which: impl Fn(&Connection) -> bool) -> Vec<ConnectionId> {
        self.connections.iter().filter(|(_, c)| which(c)).map(|(id, _)| id.clone()).collect()
    }

    /// False if the client asks for more than it reads.
    pub(crate) fn handle(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) -> bool {
        match (frame.typ.as_str(), ConnectionId::of(frame)) {
            (forward::NEW, Ok(id)) => self.open(peer, frame, id, now),
            (forward::NEW, Err(text)) => self.refuse(peer, frame, &text),
            (forward::FORWARD, Ok(id)) => self.take_data(peer, frame, &id, now),
            // Acks of a forward that is gone were in flight: ignored.
            (forward::ACK, Ok(id)) => {
                let connection = self.connections.get_mut(&id);
                if let Some(number) = connection.and_then(|c| c.unacknowledged.pop_front()) {
                    peer.credit.prove(number);
                }
            }
            (forward::STOP, Ok(id)) if self.connections.contains_key(&id) => {
                // Before the answer: the client may ask for the status as soon as it has that.
                self.let_go(&id, (CLOSED, "client".to_owned()), now);
                self.answers.push_back(forward::about(&peer.id, forward::STOP, &id));
            }
            (forward::FORWARD | forward::ACK | forward::STOP, _) => self.refuse(peer, frame, UNKNOWN),
            (forward::ERROR, Ok(id)) => debug!("session {}: error from the client about {id:?}", peer.id),
            _ => self.refuse(peer, frame, UNKNOWN_TYPE),
        }
        self.answers.len() < MAX_ANSWERS
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

    fn advance(&mut self, peer: &Peer, id: &ConnectionId, now: Instant) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        match connection.advance(peer, now) {
            Ok(false) => {}
            Ok(true) => {
                debug!("session {}: forwarding to {:?}", peer.id, connection.shown.target);
                self.answers.push_back(forward::about(&peer.id, forward::NEW, id));
                self.flush(peer, id, now);
            }
            Err(text) => {
                self.answers.push_back(forward::error(&peer.id, forward::NEW, &text));
                self.connections.remove(id);
                self.acknowledge_all(peer, id);
            }
        }
    }

    fn take_data(&mut self, peer: &Peer, frame: &Frame, id: &ConnectionId, now: Instant) {
        let waiting = self.all().map(|c| c.memory.count()).sum();
        let Some(connection) = self.connections.get_mut(id) else {
            return self.refuse(peer, frame, UNKNOWN);
        };
        self.owing.push_back(id.clone());
        match connection.queue(frame.body.clone(), waiting, now) {
            Ok(()) => self.flush(peer, id, now),
            Err(text) => self.fail(peer, id, text, now),
        }
    }

    fn flush(&mut self, peer: &Peer, id: &ConnectionId, now: Instant) {
        if let Some(Err(text)) = self.connections.get_mut(id).map(|c| c.flush(now)) {
            self.fail(peer, id, text, now);
        }
    }

    fn fail(&mut self, peer: &Peer, id: &ConnectionId, text: String, now: Instant) {
        self.acknowledge_all(peer, id);
        self.answers.push_back(forward::error(&peer.id, forward::FORWARD, &text));
        self.stop(peer, id, (FAILED, text), now);
    }

    fn stop(&mut self, peer: &Peer, id: &ConnectionId, end: End, now: Instant) {
        self.acknowledge_all(peer, id);
        self.let_go(id, end, now);
        self.answers.push_back(forward::about(&peer.id, forward::STOP, id));
    }

    /// Acknowledges what no target has taken, too: clients wait for that, also when a forward ends.
    fn acknowledge_all(&mut self, peer: &Peer, id: &ConnectionId) {
        let before = self.owing.len();
        self.owing.retain(|owing| owing != id);
        let ack = || forward::about(&peer.id, forward::ACK, id);
        self.answers.extend(std::iter::repeat_with(ack).take(before - self.owing.len()));
    }

    /// Ends a forward, whose id the client may reuse at once. The client's data still reaches the target.
    fn let_go(&mut self, id: &ConnectionId, end: End, now: Instant) {
        self.owing.retain(|owing| owing != id);
        let Some(mut connection) = self.connections.remove(id) else { return };
        connection.leave_status();
        connection.end = end;
        if connection.finish(now) {
            self.finishing.push((connection, now + FINISH_LIMIT));
        }
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
            self.owing.retain(|id| {
                let room = self.connections.get(id).is_some_and(|c| c.queued <= QUEUE_SOFT_LIMIT);
                let acknowledged = room && peer.credit.takes_answer(now);
                if acknowledged {
                    peer.reply(&forward::about(&peer.id, forward::ACK, id));
                }
                !acknowledged
            });
        }
        if peer.credit.wants_probe(now) {
            peer.ping(now);
        }
    }

    /// Ends the session. The client's data still reaches its targets, everything else ends.
    pub(crate) fn close(&mut self, now: Instant) {
        self.answers.clear();
        for id in self.ids(|_| true) {
            self.let_go(&id, (CLOSED, "session".to_owned()), now);
        }
    }

    /// When to call [`PortForward::proceed`] without an event.
    pub(crate) fn deadline(&self, peer: &Peer, now: Instant) -> Option<Instant> {
        if self.is_idle() {
            return None;
        }
        let steps = self.all().filter_map(Connection::deadline);
        let idle = self.connections.values().map(|c| c.last_traffic + IDLE_LIMIT);
        let finishing = self.finishing.iter().map(|(_, until)| *until);
        steps.chain(idle).chain(finishing).chain(peer.credit.deadline(now)).min()
    }

    fn takes_data(&self, peer: &Peer, now: Instant) -> bool {
        self.answers.is_empty() && peer.credit.takes(now) && peer.sink.takes_data(Class::Bulk)
    }

    pub(crate) fn watch<'a>(&'a self, peer: &Peer, set: &mut PollSet<'a>, now: Instant) {
        let reading = self.takes_data(peer, now);
        self.connections.values().for_each(|c| c.watch(reading && c.takes_data(), set));
        self.finishing.iter().for_each(|(c, _)| c.watch(true, set));
    }

    pub(crate) fn proceed(&mut self, peer: &mut Peer, events: &Events, now: Instant) {
        for id in self.ids(|c| !c.is_open()) {
            self.advance(peer, &id, now);
        }
        let ready = self.connections.iter().map(|(id, c)| (id, c.events(events)));
        let ready = ready.filter(|(_, events)| !events.is_empty());
        let ready: Vec<_> = ready.map(|(id, events)| (id.clone(), events)).collect();
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
        for id in self.ids(|c| now >= c.last_traffic + IDLE_LIMIT) {
            self.stop(peer, &id, (CLOSED, "idle".to_owned()), now);
        }
    }

    /// Continues the forwards that only deliver their client's remaining data.
    fn finish(&mut self, peer: &Peer, now: Instant) {
        self.finishing.retain_mut(|(connection, until)| {
            let more = connection.advance(peer, now).is_ok() && connection.finish(now);
            if more && now >= *until && !connection.to_target.is_empty() {
                let text = "the target did not take all that the client sent";
                connection.end = (FAILED, text.to_owned());
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
        let (message, read) = peer.sink.compose(&frame, connection.largest_read(&peer.sink), |place| {
            let read = connection.read(place, now);
            (if let Ok(Some(length)) = read { length } else { 0 }, read)
        });
        match read {
            Ok(None) => {}
            Ok(Some(length)) => {
                connection.unacknowledged.push_back(peer.credit.sent(length, now));
                peer.sink.send(message, Class::Bulk, None);
            }
            Err(end) => self.stop(peer, id, end, now),
        }
        true
    }
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
        Scene { forwarder: PortForward::default(), peer, queue }
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
            let mut set = PollSet::default();
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
            Work::Message(message, ..) => Some(Frame::decode(&message).unwrap().typ),
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
        assert_eq!((scene.forwarder.connections.len(), scene.peer.device.memory.taken()), (1, 0));
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

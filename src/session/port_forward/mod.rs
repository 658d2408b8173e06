//! Port forwarding: protocol 3 for one session. All forwards share the session's poll loop and credit.
//!
//! Data for a target that doesn't read is acknowledged up to 64 KiB for each forward; more waits unacknowledged.

mod connection;
mod opening;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::poll::PollFlags;

use self::connection::{CLOSED, Connection, MAX_WAITING};
use self::opening::{End, FAILED};
use super::peer::Peer;
use crate::outbox::Class;
use crate::permits::Permit;
use crate::proto::forward::{self, ConnectionId, Target};
use crate::proto::{Frame, UserId};
use crate::sys::{Events, PollSet, trim};

/// For a session. Each takes a descriptor.
const MAX_CONNECTIONS: usize = 512;
/// Answers and owed acks. Only a client that never reads gets there.
const MAX_ANSWERS: usize = 1024;
const MAX_OWING: usize = 8192;
/// Bytes that each of them counts for, a forward asleep twice, and how many need no permit for the device's memory.
const ANSWER: usize = 512;
const RESERVED_ANSWERS: usize = 16;
/// Time without progress after which a target whose client has gone is given up.
const FINISH_LIMIT: Duration = Duration::from_secs(10);
const FINISH_TOTAL: Duration = Duration::from_secs(120);
/// Time between looks at a target's progress: its kernel takes data without an event here.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Bytes queued for a target up to which data is acknowledged at once.
const QUEUE_SOFT_LIMIT: usize = 64 * 1024;
/// Bytes queued for all of a session's targets up to which more than one piece waits for each: a client that waits for acks
/// never reaches [`MAX_WAITING`].
const WAITING_SOFT_LIMIT: usize = MAX_WAITING / 4;

/// Bytes of a read from a stream, as the link allows.
const SMALLEST_READ: usize = 2 * 1024;
const LARGEST_READ: usize = 64 * 1024;
const DATAGRAM: usize = 65_535;

const UNKNOWN: &str = "unknown connection";
const UNKNOWN_TYPE: &str = "unknown message type";

#[derive(Default)]
pub(crate) struct PortForward {
    connections: BTreeMap<ConnectionId, Connection>,
    /// Idle UDP forwards, closed without a word: mender-cli would never use them again. The next datagram reopens them.
    asleep: Vec<(ConnectionId, Target, UserId)>,
    finishing: Vec<Finishing>,
    /// Forwards that owe an ack, once for each frame.
    owing: VecDeque<ConnectionId>,
    /// Answers that wait for credit. Data would overtake them, so none is sent meanwhile.
    answers: VecDeque<Frame>,
    /// For these, for what is owed, and for the forwards asleep.
    memory: Option<Permit>,
    /// First to be read in the next round, so that no forward is always first.
    turn: usize,
}

/// A forward whose client has gone, with data for the target.
struct Finishing {
    connection: Connection,
    next_look: Instant,
    until: Instant,
    end: Instant,
}

impl PortForward {
    pub(crate) fn is_idle(&self) -> bool {
        self.connections.is_empty() && self.finishing.is_empty() && self.answers.is_empty()
    }

    fn all(&self) -> impl Iterator<Item = &Connection> {
        self.connections.values().chain(self.finishing.iter().map(|f| &f.connection))
    }

    /// Bytes that wait for all targets.
    fn waiting(&self) -> usize {
        self.all().map(|c| c.memory.count()).sum()
    }

    fn ids(&self, which: impl Fn(&Connection) -> bool) -> Vec<ConnectionId> {
        self.connections.iter().filter(|(_, c)| which(c)).map(|(id, _)| id.clone()).collect()
    }

    /// False if too many answers wait.
    pub(crate) fn handle(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) -> bool {
        match (frame.typ.as_str(), ConnectionId::of(frame)) {
            (forward::NEW, id) => id
                .and_then(|id| self.open(peer, frame, id, now))
                .unwrap_or_else(|text| self.refuse(peer, frame, &text)),
            (forward::FORWARD, Ok(id)) => self.take_data(peer, frame, &id, now),
            // An ack may come for a forward that has ended.
            (forward::ACK, Ok(id)) => {
                let connection = self.connections.get_mut(&id);
                if let Some(number) = connection.and_then(|c| c.unacknowledged.pop_front()) {
                    peer.credit.prove(number);
                }
            }
            (forward::STOP, Ok(id)) if self.is_asleep(&id) || self.connections.contains_key(&id) => {
                self.stop(peer, &id, (CLOSED, "client".to_owned()), now);
            }
            (forward::FORWARD | forward::ACK | forward::STOP, _) => self.refuse(peer, frame, UNKNOWN),
            (forward::ERROR, Ok(id)) => debug!("session {}: error from the client about {id:?}", peer.id),
            _ => self.refuse(peer, frame, UNKNOWN_TYPE),
        }
        self.answers.len() < MAX_ANSWERS && self.owing.len() < MAX_OWING && self.count_memory(peer)
    }

    /// False if the device has none left.
    fn count_memory(&mut self, peer: &Peer) -> bool {
        let all = self.answers.len() + self.owing.len() + 2 * self.asleep.len();
        let counted = all.saturating_sub(RESERVED_ANSWERS);
        self.memory.get_or_insert_with(|| peer.share.memory.none()).resize(counted * ANSWER)
    }

    fn refuse(&mut self, peer: &Peer, cause: &Frame, text: &str) {
        debug!("session {}: port forward: {}: {text}", peer.id, cause.typ.escape_debug());
        self.answers.push_back(forward::error(&peer.id, &cause.typ, text));
    }

    /// The error is the text for the client.
    fn open(&mut self, peer: &Peer, frame: &Frame, id: ConnectionId, now: Instant) -> Result<(), String> {
        let target = Target::decode(&frame.body)?;
        if self.connections.contains_key(&id) {
            return Err("connection_id is in use".to_owned());
        }
        self.asleep.retain(|(asleep, ..)| *asleep != id);
        let descriptor = self.acquire(peer).ok_or("too many connections")?;
        self.connections.insert(id.clone(), Connection::new(target, peer, frame.user(), descriptor, now));
        self.advance(peer, &id, now);
        Ok(())
    }

    /// A descriptor for a forward; `None` if there are too many.
    fn acquire(&mut self, peer: &Peer) -> Option<Permit> {
        if self.connections.len() + self.finishing.len() >= MAX_CONNECTIONS && !self.finishing.is_empty() {
            // A client that goes on is worth more than the oldest of these.
            self.finishing.remove(0);
        }
        let room = self.connections.len() < MAX_CONNECTIONS;
        let descriptor = peer.share.forwards.acquire().filter(|_| room);
        if descriptor.is_none() {
            warn!("session {}: too many forwarded connections", peer.id);
        }
        descriptor
    }

    fn is_asleep(&self, id: &ConnectionId) -> bool {
        self.asleep.iter().any(|(asleep, ..)| asleep == id)
    }

    fn wake(&mut self, peer: &Peer, id: &ConnectionId, now: Instant) {
        let Some(at) = self.asleep.iter().position(|(asleep, ..)| asleep == id) else { return };
        let Some(descriptor) = self.acquire(peer) else { return };
        let (_, target, user) = self.asleep.remove(at);
        let mut connection = Connection::new(target, peer, user, descriptor, now);
        connection.reopened = true;
        self.connections.insert(id.clone(), connection);
        self.advance(peer, id, now);
    }

    fn fall_asleep(&mut self, peer: &Peer, id: ConnectionId) {
        self.acknowledge_all(peer, &id);
        if let Some(Connection { shown, user, .. }) = self.connections.remove(&id).as_ref() {
            self.asleep.push((id, shown.target.clone(), user.clone()));
            if self.asleep.len() > MAX_CONNECTIONS || !self.count_memory(peer) {
                self.asleep.remove(0);
            }
        }
    }

    fn advance(&mut self, peer: &Peer, id: &ConnectionId, now: Instant) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        match connection.advance(peer, now) {
            Ok(false) => {}
            Ok(true) => {
                debug!("session {}: forwarding to {:?}", peer.id, connection.shown.target);
                if !connection.reopened {
                    self.answers.push_back(forward::about(&peer.id, forward::NEW, id));
                }
                connection.flush(now);
            }
            // The network may be back for the next datagram.
            Err(_) if connection.reopened => self.fall_asleep(peer, id.clone()),
            Err(text) => {
                self.answers.push_back(forward::error(&peer.id, forward::NEW, &text));
                self.connections.remove(id);
                self.acknowledge_all(peer, id);
            }
        }
    }

    fn take_data(&mut self, peer: &Peer, frame: &Frame, id: &ConnectionId, now: Instant) {
        self.wake(peer, id, now);
        let waiting = self.waiting();
        let Some(connection) = self.connections.get_mut(id) else {
            if self.is_asleep(id) {
                // The datagram is lost.
                return self.answers.push_back(forward::about(&peer.id, forward::ACK, id));
            }
            return self.refuse(peer, frame, UNKNOWN);
        };
        self.owing.push_back(id.clone());
        if let Err(text) = connection.pass(frame.body.clone(), waiting, now) {
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
        // First, since the client may ask for the status as soon as it has the answer.
        self.let_go(id, end, now);
        self.answers.push_back(forward::about(&peer.id, forward::STOP, id));
    }

    /// Clients wait for acks even if a forward ends, so data that no target has taken is acknowledged, too.
    fn acknowledge_all(&mut self, peer: &Peer, id: &ConnectionId) {
        let before = self.owing.len();
        self.owing.retain(|owing| owing != id);
        let ack = || forward::about(&peer.id, forward::ACK, id);
        // A client of more doesn't wait for them, and so many answers would end its session.
        let most = (MAX_ANSWERS - RESERVED_ANSWERS).saturating_sub(self.answers.len());
        self.answers.extend(std::iter::repeat_with(ack).take(most.min(before - self.owing.len())));
    }

    /// The client may reuse the id at once. Its data still reaches the target.
    fn let_go(&mut self, id: &ConnectionId, end: End, now: Instant) {
        self.owing.retain(|owing| owing != id);
        self.asleep.retain(|(asleep, ..)| asleep != id);
        let Some(mut connection) = self.connections.remove(id) else { return };
        connection.leave_status();
        connection.end = end;
        if connection.finish(now) {
            connection.makes_progress();
            let (until, end) = (now + FINISH_LIMIT, now + FINISH_TOTAL);
            self.finishing.push(Finishing { connection, next_look: now + LOOK_INTERVAL, until, end });
        }
    }

    /// Sends answers and acks for which there is credit, and probes for more. Called before each poll.
    pub(crate) fn answer(&mut self, peer: &mut Peer, now: Instant) {
        if self.is_idle() {
            return;
        }
        while peer.credit.takes_answer(now)
            && let Some(answer) = self.answers.pop_front()
        {
            peer.credit.sent(answer.body.len(), now);
            match answer.typ.as_str() {
                // Behind the data, which is bulk.
                forward::NEW | forward::STOP => peer.sink.reply_behind_bulk(&answer),
                _ => peer.sink.reply(&answer),
            }
        }
        if self.answers.is_empty() && !self.owing.is_empty() {
            let limit = if self.waiting() > WAITING_SOFT_LIMIT { 0 } else { QUEUE_SOFT_LIMIT };
            self.owing.retain(|id| {
                let room = self.connections.get(id).is_some_and(|c| c.has_room(limit));
                let acknowledged = room && peer.credit.takes_answer(now);
                if acknowledged {
                    peer.reply(&forward::about(&peer.id, forward::ACK, id));
                }
                !acknowledged
            });
        }
        self.count_memory(peer);
        trim(&mut self.answers, RESERVED_ANSWERS);
        trim(&mut self.owing, RESERVED_ANSWERS);
        if peer.credit.wants_probe(now) {
            peer.ping(now);
        }
    }

    /// Data of the client still reaches its targets.
    pub(crate) fn close(&mut self, now: Instant) {
        self.answers.clear();
        self.asleep.clear();
        self.memory = None;
        for id in self.ids(|_| true) {
            self.let_go(&id, (CLOSED, "session".to_owned()), now);
        }
    }

    /// The link was lost. Data that clients left to their targets before still reaches these.
    pub(crate) fn hang_up(&mut self) {
        *self = PortForward { finishing: std::mem::take(&mut self.finishing), ..PortForward::default() };
    }

    fn takes_data(&self, peer: &Peer, now: Instant) -> bool {
        self.answers.is_empty() && peer.credit.takes(now) && peer.sink.takes_data(Class::Bulk)
    }

    pub(crate) fn watch<'a>(&'a self, peer: &Peer, set: &mut PollSet<'a>, now: Instant) {
        if self.is_idle() {
            return;
        }
        let (reading, limit) = (self.takes_data(peer, now), peer.device.config().forward_idle);
        for connection in self.connections.values() {
            connection.watch(reading && connection.takes_data(), set);
            set.until(&[idle_at(connection, limit)]);
        }
        for Finishing { connection, next_look, until, .. } in &self.finishing {
            connection.watch(true, set);
            set.until(&[Some(*next_look), Some(*until)]);
        }
        set.until(&[peer.credit.deadline(now)]);
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
            self.connections.get_mut(id).into_iter().for_each(|c| c.flush(now));
        }
        for n in 0..ready.len() {
            let (id, events) = &ready[(self.turn + n) % ready.len()];
            if events.intersects(PollFlags::POLLIN | ended) && !self.read(peer, id, now) {
                // The next round starts with the forwards that this one has not reached.
                self.turn = (self.turn + n) % ready.len();
                break;
            }
        }
        self.finish(peer, now);
        let limit = peer.device.config().forward_idle;
        for id in self.ids(|c| idle_at(c, limit).is_some_and(|at| now >= at)) {
            let end = (CLOSED, "idle".to_owned());
            match self.connections.get_mut(&id).filter(|c| c.is_udp()) {
                Some(connection) => {
                    connection.end = end;
                    self.fall_asleep(peer, id);
                }
                None => self.stop(peer, &id, end, now),
            }
        }
    }

    fn finish(&mut self, peer: &Peer, now: Instant) {
        self.finishing.retain_mut(|Finishing { connection, next_look, until, end }| {
            let more = connection.advance(peer, now).is_ok() && connection.finish(now);
            if now >= *next_look {
                *next_look = now + LOOK_INTERVAL;
                if connection.makes_progress() {
                    *until = (now + FINISH_LIMIT).min(*end);
                }
            }
            more && now < *until
        });
    }

    /// False if no more may be sent.
    fn read(&mut self, peer: &mut Peer, id: &ConnectionId, now: Instant) -> bool {
        if !self.takes_data(peer, now) {
            return false;
        }
        let Some(connection) = self.connections.get_mut(id).filter(|c| c.takes_data()) else { return true };
        let frame = forward::about(&peer.id, forward::FORWARD, id);
        let stream = || peer.sink.piece(SMALLEST_READ, LARGEST_READ);
        let most = if connection.is_udp() { DATAGRAM } else { stream() };
        let (message, read) = peer.sink.compose(&frame, most, |place| {
            let read = connection.read(place, now);
            (if let Ok(Some(length)) = read { length } else { 0 }, read)
        });
        match read {
            Ok(None) => {}
            Ok(Some(length)) => {
                connection.unacknowledged.push_back(peer.credit.sent(length, now));
                peer.sink.send(message, Class::Bulk, None, None);
            }
            Err(end) => match connection.failure.clone() {
                Some(text) => self.fail(peer, id, text, now),
                None => self.stop(peer, id, end, now),
            },
        }
        true
    }
}

fn idle_at(connection: &Connection, limit: Duration) -> Option<Instant> {
    (!limit.is_zero()).then(|| connection.shown.traffic.last_activity() + limit)
}

#[cfg(test)]
mod tests;

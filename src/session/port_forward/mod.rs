//! Port forwarding: protocol 3 for one session. All its connections live in the session's one poll loop.
//!
//! Bounds, for each connection: 64 KiB wait for a target that doesn't read before the client's data is no longer
//! acknowledged; towards the client [`acks::DATA_LIMIT`] messages of up to 64 KiB (a datagram's size for UDP) are on
//! the way in the whole session, two of them in our memory.

mod acks;
mod connection;
pub(crate) mod look_ups;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{debug, warn};
use nix::poll::PollFlags;

use self::acks::OnTheWay;
use self::connection::{Connection, Input, Step};
use super::Context;
use super::info::Info;
use crate::outbox::FrameSink;
use crate::proto::forward::{self, ConnectionId, Target};
use crate::proto::{Frame, SessionId};
use crate::sys::PollSet;
use crate::sys::wake::Wake;

/// Forwards of a session at a time; each takes a descriptor.
const MAX_CONNECTIONS: usize = 512;
/// Look-ups of a session at a time.
const MAX_LOOK_UPS: usize = 4;
/// A forward without traffic in either direction is closed after this time.
const IDLE_LIMIT: Duration = Duration::from_secs(600);
/// Limit for delivering a client's remaining data after it has gone.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

const UNKNOWN: &str = "unknown connection";
const UNKNOWN_TYPE: &str = "unknown message type";

/// The forwards of a session.
pub(crate) struct PortForward {
    context: Arc<Context>,
    id: SessionId,
    sink: FrameSink,
    wake: Arc<Wake>,
    info: Arc<Info>,
    connections: BTreeMap<ConnectionId, Connection>,
    /// Without a client any more, but with data for the target, until this deadline.
    finishing: Vec<(Connection, Instant)>,
    on_the_way: OnTheWay,
    /// Forwards whose data is to be acknowledged when the window allows it.
    owing: VecDeque<ConnectionId>,
    /// Start of the next round of reading, so that no forward is always first.
    turn: usize,
}

/// The forwards in a [`PollSet`], with their places.
#[derive(Debug, Default)]
pub(crate) struct Watched {
    connections: Vec<(ConnectionId, usize)>,
}

/// Their events.
#[derive(Debug, Default)]
pub(crate) struct Ready(Vec<(ConnectionId, PollFlags)>);

impl Watched {
    /// Reads the events, after the set's wait.
    pub(crate) fn look(self, set: &PollSet<'_>) -> Ready {
        Ready(self.connections.into_iter().map(|(id, place)| (id, set.events(place))).collect())
    }
}

impl PortForward {
    /// Calls `wake` when a look-up has ended.
    pub(crate) fn new(
        context: Arc<Context>,
        id: SessionId,
        sink: FrameSink,
        wake: Arc<Wake>,
        info: Arc<Info>,
    ) -> Self {
        PortForward {
            context,
            id,
            sink,
            wake,
            info,
            connections: BTreeMap::new(),
            finishing: Vec::new(),
            on_the_way: OnTheWay::default(),
            owing: VecDeque::new(),
            turn: 0,
        }
    }

    /// True if nothing is left to do.
    pub(crate) fn is_idle(&self) -> bool {
        self.connections.is_empty() && self.finishing.is_empty()
    }

    /// Handles a frame of the port forwarding protocol.
    pub(crate) fn handle(&mut self, frame: &Frame, now: Instant) {
        let id = match ConnectionId::of(frame) {
            Ok(id) => id,
            Err(text) => {
                let known = [forward::FORWARD, forward::ACK, forward::STOP];
                let text = match frame.typ.as_str() {
                    forward::NEW => text.as_str(),
                    typ if known.contains(&typ) => UNKNOWN,
                    _ => UNKNOWN_TYPE,
                };
                return self.refuse(frame, text);
            }
        };
        self.on_the_way.heard(&id);
        match frame.typ.as_str() {
            forward::NEW => self.open(frame, id, now),
            forward::FORWARD => self.take_data(frame, &id, now),
            forward::ACK => self.take_ack(&id),
            forward::STOP => match self.take(&id) {
                Some(mut connection) => {
                    connection.closed_by("client");
                    // Before the answer: whoever has that may ask for the status at once.
                    self.let_go(&id, connection, now);
                    self.send_in_order(forward::STOP, &id);
                }
                None => self.refuse(frame, UNKNOWN),
            },
            forward::ERROR => debug!("session {}: error from the peer about {id:?}", self.id),
            _ => self.refuse(frame, UNKNOWN_TYPE),
        }
    }

    fn refuse(&self, cause: &Frame, text: &str) {
        debug!("session {}: port forward: {}: {text}", self.id, cause.typ.escape_debug());
        self.sink.reply(&forward::error(&self.id, &cause.typ, text));
    }

    fn open(&mut self, frame: &Frame, id: ConnectionId, now: Instant) {
        let target = match Target::decode(&frame.body) {
            Ok(target) => target,
            Err(text) => return self.refuse(frame, &text),
        };
        if self.connections.contains_key(&id) {
            return self.refuse(frame, "connection_id is in use");
        }
        if self.connections.len() + self.finishing.len() >= MAX_CONNECTIONS && !self.finishing.is_empty() {
            // The oldest end makes room for a client that goes on.
            self.finishing.remove(0);
        }
        if self.connections.len() >= MAX_CONNECTIONS {
            warn!("session {}: more than {MAX_CONNECTIONS} forwarded connections", self.id);
            return self.refuse(frame, "too many connections");
        }
        self.connections.insert(id.clone(), Connection::new(target, &self.id, frame.user(), &self.info, now));
        self.advance(&id, now);
    }

    /// Continues opening a connection.
    fn advance(&mut self, id: &ConnectionId, now: Instant) {
        let looking_up = self.connections.values().filter(|c| c.is_looking_up()).count();
        let Some(connection) = self.connections.get_mut(id) else { return };
        let was_looking_up = connection.is_looking_up();
        let step = advance(connection, looking_up, &self.context, &self.wake, now);
        if was_looking_up && !connection.is_looking_up() {
            // Another one may have waited for that.
            self.wake.notify();
        }
        match step {
            Step::Pending => {}
            Step::Opened => {
                debug!("session {}: forwarding to {:?}", self.id, connection.target());
                self.send_in_order(forward::NEW, id);
                self.flush(id, now);
            }
            Step::Failed(text) => {
                connection.broke(&text);
                self.sink.reply(&forward::error(&self.id, forward::NEW, &text));
                // The client's data is acknowledged all the same: it waits for that.
                if let Some(connection) = self.take(id) {
                    self.acknowledge_all(id, &connection);
                }
            }
        }
    }

    fn take_data(&mut self, frame: &Frame, id: &ConnectionId, now: Instant) {
        let Some(connection) = self.connections.get_mut(id) else { return self.refuse(frame, UNKNOWN) };
        connection.owed += 1;
        if let Err(text) = connection.queue(frame.body.clone(), now) {
            return self.fail(id, &text, now);
        }
        self.owing.push_back(id.clone());
        self.flush(id, now);
    }

    fn take_ack(&mut self, id: &ConnectionId) {
        // Acks of a connection that is gone were in flight: ignored.
        if let Some(connection) = self.connections.get_mut(id) {
            connection.unacked = connection.unacked.saturating_sub(1);
            self.on_the_way.data_arrived(id);
        }
    }

    /// Writes queued data to the target, and acknowledges it.
    fn flush(&mut self, id: &ConnectionId, now: Instant) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        match connection.flush(now) {
            Ok(()) => self.acknowledge(now),
            Err(text) => self.fail(id, &text, now),
        }
    }

    fn fail(&mut self, id: &ConnectionId, text: &str, now: Instant) {
        if let Some(connection) = self.connections.get_mut(id) {
            connection.broke(text);
        }
        self.stop(id, Some(text), now);
    }

    /// Ends a forward from this side: acknowledges everything, since clients wait for that, and then stops it.
    fn stop(&mut self, id: &ConnectionId, error: Option<&str>, now: Instant) {
        let Some(connection) = self.take(id) else { return };
        self.acknowledge_all(id, &connection);
        if let Some(text) = error {
            self.sink.reply(&forward::error(&self.id, forward::FORWARD, text));
        }
        self.let_go(id, connection, now);
        self.send_in_order(forward::STOP, id);
    }

    /// Removes a forward and the acks that it is owed: the client may reuse its id at once.
    fn take(&mut self, id: &ConnectionId) -> Option<Connection> {
        self.owing.retain(|owing| owing != id);
        self.connections.remove(id)
    }

    fn acknowledge_all(&self, id: &ConnectionId, connection: &Connection) {
        for _ in 0..connection.owed {
            self.sink.reply(&forward::about(&self.id, forward::ACK, id));
        }
    }

    /// Sends the acks that may be sent, in turn.
    fn acknowledge(&mut self, now: Instant) {
        let mut waiting = VecDeque::new();
        while let Some(id) = self.owing.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            if !connection.may_acknowledge() {
                waiting.push_back(id);
            } else if self.on_the_way.takes_ack(now) {
                connection.owed -= 1;
                self.on_the_way.ack_sent(&id, now);
                self.sink.reply(&forward::about(&self.id, forward::ACK, &id));
            } else {
                waiting.push_back(id);
                break;
            }
        }
        waiting.append(&mut self.owing);
        self.owing = waiting;
    }

    /// Sends `new` before, or `stop` behind, all data of the forward.
    fn send_in_order(&self, typ: &str, id: &ConnectionId) {
        self.sink.bulk((&forward::about(&self.id, typ, id)).into());
    }

    /// The client is done with the forward. Its data still reaches the target.
    fn let_go(&mut self, id: &ConnectionId, mut connection: Connection, now: Instant) {
        self.on_the_way.data_gone(id);
        connection.leave_status();
        if connection.finish(now) {
            self.finishing.push((connection, now + FINISH_LIMIT));
        }
    }

    /// Ends the session. The client's data still reaches its targets, everything else ends.
    pub(crate) fn close(&mut self, now: Instant) {
        self.owing.clear();
        for (id, connection) in std::mem::take(&mut self.connections) {
            self.let_go(&id, connection, now);
        }
    }

    pub(crate) fn hang_up(&mut self) {
        self.owing.clear();
        self.connections.clear();
        self.finishing.clear();
    }

    /// When to call [`PortForward::proceed`] without an event.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let connections = self.connections.values();
        let steps = connections.clone().filter_map(Connection::deadline);
        let idle = connections.map(|c| c.last_traffic + IDLE_LIMIT);
        let acks = if self.owing.is_empty() { None } else { self.on_the_way.next_ack() };
        let room = if self.on_the_way.takes_data() { None } else { self.on_the_way.next_data() };
        let finishing = self.finishing.iter().map(|(_, until)| *until);
        let finishing = finishing.chain(self.finishing.iter().filter_map(|(c, _)| c.deadline()));
        steps.chain(idle).chain(finishing).chain(acks).chain(room).min()
    }

    /// Adds what the forwards wait for.
    pub(crate) fn watch<'a>(&'a self, set: &mut PollSet<'a>) -> Watched {
        let mut watched = Watched::default();
        if self.is_idle() {
            return watched;
        }
        let reading = self.on_the_way.takes_data() && self.sink.takes_bulk();
        for (id, connection) in &self.connections {
            let reading = reading && self.on_the_way.takes_data_of(connection.unacked);
            if let Some((fd, events)) = connection.watch(reading) {
                watched.connections.push((id.clone(), set.add(fd, events)));
            }
        }
        for (connection, _) in &self.finishing {
            if let Some((fd, events)) = connection.watch(true) {
                set.add(fd, events);
            }
        }
        watched
    }

    /// Does what is possible now.
    pub(crate) fn proceed(&mut self, ready: Ready, now: Instant) {
        if self.is_idle() {
            return;
        }
        self.on_the_way.forget_old(now);
        self.step_unopened(now);
        let writable = PollFlags::POLLOUT | PollFlags::POLLERR | PollFlags::POLLHUP;
        let readable = PollFlags::POLLIN | PollFlags::POLLERR | PollFlags::POLLHUP;
        for (id, _) in ready.0.iter().filter(|(_, events)| events.intersects(writable)) {
            self.flush(id, now);
        }
        let count = ready.0.len();
        for n in 0..count {
            let (id, events) = &ready.0[(self.turn + n) % count];
            if events.intersects(readable) && !self.read(id, now) {
                // The others were kept from their turn.
                self.turn = (self.turn + n) % count;
                break;
            }
        }
        self.finish(now);
        self.close_idle(now);
        self.acknowledge(now);
    }

    fn step_unopened(&mut self, now: Instant) {
        let unopened: Vec<ConnectionId> =
            self.connections.iter().filter(|(_, c)| !c.is_open()).map(|(id, _)| id.clone()).collect();
        for id in unopened {
            self.advance(&id, now);
        }
    }

    /// Continues the forwards that only deliver their client's remaining data.
    fn finish(&mut self, now: Instant) {
        let looking_up = self.finishing.iter().filter(|(c, _)| c.is_looking_up()).count();
        self.finishing.retain_mut(|(connection, until)| {
            let step = advance(connection, looking_up, &self.context, &self.wake, now);
            let more = match step {
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

    /// Sends the target's data to the client. False if the window is full.
    fn read(&mut self, id: &ConnectionId, now: Instant) -> bool {
        if !self.on_the_way.takes_data() || !self.sink.takes_bulk() {
            return false;
        }
        let Some(connection) = self.connections.get_mut(id) else { return true };
        if !self.on_the_way.takes_data_of(connection.unacked) {
            return true;
        }
        let frame = forward::about(&self.id, forward::FORWARD, id);
        let (message, input) = self.sink.compose(&frame, connection.largest_read(&self.sink), |place| {
            let input = connection.read(place, now);
            (if let Input::Data(length) = input { length } else { 0 }, input)
        });
        match input {
            Input::Nothing => {}
            Input::Data(_) => {
                connection.unacked += 1;
                self.on_the_way.data_sent(id, now);
                self.sink.bulk(message);
            }
            Input::End(why) => {
                match why {
                    None => connection.closed_by("target"),
                    Some(why) => connection.broke(&format!("read: {why}")),
                }
                self.stop(id, None, now);
            }
        }
        true
    }

    fn close_idle(&mut self, now: Instant) {
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
            self.stop(&id, None, now);
        }
    }
}

/// Lets a connection continue opening.
fn advance(
    connection: &mut Connection,
    looking_up: usize,
    context: &Context,
    wake: &Arc<Wake>,
    now: Instant,
) -> Step {
    let permit = || if looking_up < MAX_LOOK_UPS { context.look_ups.acquire(wake) } else { None };
    connection.advance(permit, context.config().forward_targets.as_deref(), wake, now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::outbox::{Outbox, Room, Work};
    use crate::proto::msgpack::MapWriter;
    use crate::proto::{PORT_FORWARD, Props};
    use std::net::TcpListener;

    fn forwarder() -> (PortForward, Arc<Outbox>) {
        let dir = tempfile::tempdir().unwrap();
        let me = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap().name;
        let file = dir.path().join("conf");
        let text = format!(r#"{{ "ShellCommand": "/bin/sh", "User": {me:?} }}"#);
        std::fs::write(&file, text).unwrap();
        let context = Context::new(config::load(&file, &dir.path().join("absent")).unwrap());
        let outbox = Arc::new(Outbox::default());
        let wake = Arc::new(Wake::new().unwrap());
        let id = SessionId::new("s").unwrap();
        let sink = FrameSink::new(&outbox, Arc::clone(&wake));
        let info = Arc::new(Info::of("".into(), Instant::now()));
        (PortForward::new(context, id, sink, wake, info), outbox)
    }

    fn next_type(outbox: &Outbox) -> Option<String> {
        match outbox.try_next(Room { bulk: true, interactive: true })? {
            Work::Message(mut m, _) => Some(Frame::decode(&m.content().to_vec().into()).unwrap().typ),
            other => panic!("{other:?}"),
        }
    }

    fn turn(forwarder: &mut PortForward, now: Instant) {
        let ready = {
            let mut set = PollSet::new();
            let watched = forwarder.watch(&mut set);
            set.wait(Some(Instant::now() + Duration::from_secs(10))).unwrap();
            watched.look(&set)
        };
        forwarder.proceed(ready, now);
    }

    fn about(typ: &str) -> Frame {
        Frame::new(PORT_FORWARD, typ, None).with_props(Props::new().with_str("connection_id", "c"))
    }

    fn target(port: u16) -> Vec<u8> {
        MapWriter::new()
            .str("remote_host", Some("127.0.0.1"))
            .with("remote_port", |out| rmp::encode::write_u16(out, port))
            .str("protocol", Some("tcp"))
            .finish()
    }

    #[test]
    fn a_connection_without_traffic_is_closed_after_ten_minutes() {
        let (mut forwarder, outbox) = forwarder();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let start = Instant::now();
        forwarder.handle(&about(forward::NEW).with_body(target(port)), start);
        turn(&mut forwarder, start);
        assert_eq!(next_type(&outbox).as_deref(), Some("new"));
        // Traffic towards the target counts.
        let later = start + IDLE_LIMIT / 2;
        forwarder.handle(&about(forward::FORWARD).with_body("x"), later);
        assert_eq!(next_type(&outbox).as_deref(), Some("ack"));
        assert_eq!(forwarder.deadline(), Some(later + IDLE_LIMIT));
        forwarder.proceed(Ready::default(), start + IDLE_LIMIT);
        assert_eq!(next_type(&outbox), None);
        forwarder.proceed(Ready::default(), later + IDLE_LIMIT);
        assert_eq!(next_type(&outbox).as_deref(), Some("stop"));
        // The target is given time to take what it was sent.
        assert_eq!(forwarder.deadline(), Some(later + IDLE_LIMIT + FINISH_LIMIT));
        forwarder.proceed(Ready::default(), later + IDLE_LIMIT + FINISH_LIMIT);
        assert!(forwarder.is_idle());
    }

    /// `stop` left the connection's id among those that are owed an ack. A new connection of the same id was then owed
    /// less than none: 2^64 acks at its end.
    #[test]
    fn an_id_that_is_used_again_at_once_is_owed_nothing() {
        let (mut forwarder, outbox) = forwarder();
        // A target that does not read.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let body = target(listener.local_addr().unwrap().port());
        let start = Instant::now();
        forwarder.handle(&about(forward::NEW).with_body(body.clone()), start);
        turn(&mut forwarder, start);
        while forwarder.owing.is_empty() {
            forwarder.handle(&about(forward::FORWARD).with_body(vec![0; 64 << 10]), start);
        }
        forwarder.handle(&about(forward::STOP), start);
        forwarder.handle(&about(forward::NEW).with_body(body), start);
        assert!(forwarder.owing.is_empty());
        turn(&mut forwarder, start);
        while next_type(&outbox).is_some() {}
        forwarder.handle(&about(forward::FORWARD).with_body("x"), start);
        forwarder.handle(&about(forward::STOP), start);
        let all: Vec<_> = std::iter::from_fn(|| next_type(&outbox)).collect();
        assert_eq!(all, ["ack", "stop"]);
    }
}

//! mender-cli's port-forward client: what it sends and when, what it acknowledges, and what it dies of.
//!
//! A thread plays the client's reader. What the real one would not survive, or the released server would
//! lose, is a fault: every later wait fails with it, and so does the end of the test.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rmpv::Value;

use super::client::new_sid;
use super::connection::{Connection, Half};
use super::device::Device;
use super::msg::{self, CONTROL, Ints, Msg, PORTS, encode, map};
use super::wait::{SOON, Watched, spawn};
use super::wire;

/// The client's queue per connection; behind it its reader blocks, and all its connections with it.
const QUEUE: usize = 20;

/// An error the device sent. The real client ignores them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceError {
    pub text: String,
    /// The type of the message it is about.
    pub about: String,
    /// Not everybody names the connection.
    pub connection: Option<String>,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) connections: HashMap<String, Half>,
    errors: VecDeque<DeviceError>,
    control: VecDeque<Msg>,
    faults: Vec<String>,
    ended: Option<String>,
    /// The client's reader is stuck.
    paused: bool,
    quit: bool,
    pub(super) unacked: usize,
    most_unacked: usize,
}

#[derive(Debug)]
pub(super) struct Inner {
    device: Device,
    sid: String,
    pub(super) state: Watched<State>,
}

/// One run of `mender-cli port-forward`.
#[derive(Debug)]
pub struct Client {
    inner: Arc<Inner>,
    reader: Option<JoinHandle<()>>,
}

/// A new connection id of the client's form, a UUID of version 1.
pub fn new_id() -> String {
    static CONNECTIONS: AtomicU64 = AtomicU64::new(1);
    format!("{:08x}-5d2c-11ee-8c99-0242ac120002", CONNECTIONS.fetch_add(1, Ordering::Relaxed))
}

/// The body of `new` as the client writes it: the port always in three bytes.
pub fn target_body(host: &str, port: u16, protocol: &str) -> Vec<u8> {
    let mut body = Vec::new();
    rmp::encode::write_map_len(&mut body, 3).expect("write to memory");
    for (name, value) in [("remote_host", Some(host)), ("remote_port", None), ("protocol", Some(protocol))] {
        rmp::encode::write_str(&mut body, name).expect("write to memory");
        match value {
            Some(value) => rmp::encode::write_str(&mut body, value).expect("write to memory"),
            None => rmp::encode::write_u16(&mut body, port).expect("write to memory"),
        }
    }
    body
}

impl Inner {
    pub(super) fn post(&self, proto: u16, typ: &str, id: Option<&str>, body: &[u8]) {
        let mut props = Vec::new();
        props.extend(id.map(|id| ("connection_id", Value::from(id))));
        props.push(("user_id", "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee".into()));
        let bytes = encode(&msg::message(proto, typ, &self.sid, &props, body), Ints::Compact);
        if let Err(e) = self.device.try_frame(true, wire::BINARY, &bytes) {
            self.state.update(|s| s.ended.get_or_insert_with(|| format!("writing: {e}")).clone());
        }
    }

    fn read(&self) {
        loop {
            let (quit, paused) = self.state.peek(|s| (s.quit, s.paused));
            if quit {
                return;
            }
            if paused {
                self.state.wait(SOON, |s| (s.quit || !s.paused).then_some(()));
                continue;
            }
            // Whoever ends or pauses the client doesn't want to wait for a message.
            let stay = || !self.state.peek(|s| s.quit || s.paused);
            match self.device.try_take_while(stay, |m| m.sid.as_deref() == Some(&self.sid)) {
                None => {}
                Some(Ok(msg)) => self.take(msg),
                Some(Err(why)) => {
                    self.state.update(|s| s.ended = Some(why));
                    return;
                }
            }
        }
    }

    fn take(&self, msg: Msg) {
        if (msg.proto, msg.typ.as_str()) == (CONTROL, "ping") {
            return self.post(CONTROL, "pong", None, b"");
        }
        let acknowledge = self.state.update(|s| match s.take(msg) {
            Ok(acknowledge) => acknowledge,
            Err(fault) => {
                s.faults.push(fault);
                None
            }
        });
        if let Some(id) = acknowledge {
            self.post(PORTS, "ack", Some(&id), b"");
        }
    }

    /// Waits; a fault, or the end of the link, ends the waiting and the test.
    pub(super) fn wait<R>(
        &self,
        limit: Duration,
        what: &str,
        mut pick: impl FnMut(&mut State) -> Option<R>,
    ) -> R {
        let found = self.state.wait(limit, |s| {
            if !s.faults.is_empty() {
                return Some(Err(format!("mender-cli would not stand this: {:?}", s.faults)));
            }
            pick(s).map(Ok).or_else(|| s.ended.clone().map(Err))
        });
        match found {
            Some(Ok(found)) => found,
            Some(Err(why)) => panic!("while waiting for {what}: {why}"),
            None => {
                let state = self.state.peek(|s| {
                    format!("{} unacked in all; errors {:?}; control {:?}", s.unacked, s.errors, s.control)
                });
                panic!("waited {limit:?} in vain for {what}: {state}")
            }
        }
    }
}

impl State {
    /// What the client does with a message; gives the connection to acknowledge it for.
    fn take(&mut self, msg: Msg) -> Result<Option<String>, String> {
        if msg.proto == CONTROL {
            self.control.push_back(msg);
            return Ok(None);
        }
        let fault = |why: &str| Err(format!("{why}: {}", msg.summary()));
        let id = msg.prop("connection_id").and_then(Value::as_str).map(str::to_owned);
        if msg.proto != PORTS || msg.props.len() != usize::from(id.is_some()) {
            return fault("a message of another protocol, or with strange props");
        }
        if msg.typ == "error" {
            let fields = msg.map();
            let text = |name| fields.iter().find(|(key, _)| key == name).and_then(|(_, v)| v.as_str());
            let (Some(text), Some(about), 2) = (text("err"), text("msgtype"), fields.len()) else {
                return fault("an error of another form");
            };
            let (text, about) = (text.to_owned(), about.to_owned());
            if about == "ack" && text == "unknown connection" {
                // An ack that crossed the device's stop. The device may as well say nothing.
                return Ok(None);
            }
            self.errors.push_back(DeviceError { text, about, connection: id });
            return Ok(None);
        }
        let Some(id) = id else { return fault("no connection_id") };
        let Some(half) = self.connections.get_mut(&id) else { return fault("an unknown connection") };
        let bare = msg.body.is_none();
        match msg.typ.as_str() {
            "new" if bare && !half.opened && !half.stopped => half.opened = true,
            // What the real client dies of: it unlocks what isn't locked.
            "ack" if half.in_flight == 0 => return fault("an ack for nothing"),
            "ack" if bare => {
                half.in_flight -= 1;
                half.figures.acks += 1;
            }
            "stop" if bare && (!half.stopped || half.stop_sent) => half.stopped = true,
            "forward" if half.opened && !half.stopped && (half.udp || !bare) => {
                let body = msg.body.unwrap_or_default();
                half.figures.forwards += 1;
                half.figures.largest = half.figures.largest.max(body.len());
                half.held.push_back(body);
                half.figures.most_unacked = half.figures.most_unacked.max(half.held.len());
                self.unacked += 1;
                self.most_unacked = self.most_unacked.max(self.unacked);
                if half.held.len() > QUEUE {
                    return Err(format!("{} messages unacknowledged on {id}", half.held.len()));
                }
                if !half.holding {
                    half.received.extend(half.held.pop_front());
                    self.unacked -= 1;
                    return Ok(Some(id));
                }
            }
            _ => return fault("not in this state, or not in this form"),
        }
        Ok(None)
    }
}

impl Client {
    /// Opens the session. The client insists on version 1 and on the protocol.
    pub fn open(device: &Device) -> Client {
        let client = Client::start(device);
        let accept = client.next_control(SOON);
        assert_eq!(accept.typ, "accept", "{}", accept.summary());
        assert_eq!(accept.field("version").and_then(|v| v.as_i64()), Some(1));
        let protocols = accept.field("protocols").expect("protocols");
        let offered = protocols.as_array().expect("an array").contains(&Value::from(PORTS));
        assert!(offered, "port forward not implemented or enabled on the device: {protocols}");
        client
    }

    /// Sends `open` and leaves the answer to the test.
    pub fn start(device: &Device) -> Client {
        let client = Client::within(device, &new_sid());
        let versions = encode(&map(&[("versions", Value::Array(vec![1.into()]))]), Ints::Wide);
        client.inner.post(CONTROL, "open", None, &versions);
        client
    }

    /// In a session that is open already.
    pub fn within(device: &Device, sid: &str) -> Client {
        let inner = Inner { device: device.clone(), sid: sid.to_owned(), state: Watched::default() };
        let inner = Arc::new(inner);
        let reading = Arc::clone(&inner);
        let reader = spawn("cli-reader", move || reading.read());
        Client { inner, reader: Some(reader) }
    }

    pub fn sid(&self) -> &str {
        &self.inner.sid
    }

    /// The next control message that is no ping.
    pub fn next_control(&self, limit: Duration) -> Msg {
        self.inner.wait(limit, "a control message", |s| s.control.pop_front())
    }

    /// Asks for a connection and doesn't wait, as the client does.
    pub fn connect(&self, protocol: &str, host: &str, port: u16) -> Connection {
        let connection = self.register(&new_id(), protocol == "udp");
        self.send("new", Some(&connection.id), &target_body(host, port, protocol));
        connection
    }

    /// A connection the client believes in, whatever the device does.
    pub fn register(&self, id: &str, udp: bool) -> Connection {
        let half = Half { udp, ..Half::default() };
        self.inner.state.update(|s| s.connections.insert(id.to_owned(), half));
        Connection { inner: Arc::clone(&self.inner), id: id.to_owned() }
    }

    /// Any message of the protocol, as no client would send it.
    pub fn send(&self, typ: &str, id: Option<&str>, body: &[u8]) {
        self.inner.post(PORTS, typ, id, body);
    }

    /// The next error. The real client would not look at it.
    pub fn next_error(&self) -> DeviceError {
        self.next_error_within(SOON)
    }

    pub fn next_error_within(&self, limit: Duration) -> DeviceError {
        self.inner.wait(limit, "an error", |s| s.errors.pop_front())
    }

    pub fn errors(&self) -> usize {
        self.inner.state.peek(|s| s.errors.len())
    }

    /// The most forwards that were unacknowledged at a time, over all connections.
    pub fn most_unacked(&self) -> usize {
        self.inner.state.peek(|s| s.most_unacked)
    }

    /// The reader stops, as when one connection's queue is full: messages stay in the server.
    pub fn pause(&self, paused: bool) {
        self.inner.state.update(|s| s.paused = paused);
        self.inner.device.wake_takers();
    }

    /// Messages in the server for this client, while it is paused.
    pub fn backlog(&self) -> usize {
        let mine = |m: &&Msg| m.sid.as_deref() == Some(&self.inner.sid);
        self.inner.device.0.state.peek(|s| s.inbox.iter().filter(mine).count())
    }

    /// Waits until the device has dealt with everything sent before, and has said everything about it.
    pub fn settle(&self) {
        self.inner.post(CONTROL, "ping", None, b"");
        let pong = self.next_control(SOON);
        assert_eq!(pong.typ, "pong", "{}", pong.summary());
    }

    /// Ends the session as the client does: without a word about open connections.
    pub fn close(&self) {
        self.settle();
        self.inner.post(CONTROL, "close", None, b"");
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.inner.state.update(|s| s.quit = true);
        self.inner.device.wake_takers();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if !std::thread::panicking() {
            self.inner.state.peek(|s| assert!(s.faults.is_empty(), "mender-cli died: {:?}", s.faults));
        }
    }
}

//! The server's end of one device's websocket. A thread reads it; tests take the messages out of
//! its inbox and write through [`Device`].

use std::collections::{HashMap, HashSet, VecDeque};
use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use rmpv::Value;

use super::http::Request;
use super::msg::{self, Ints, Msg};
use super::wait::{Watched, secs, spawn};
use super::wire;

/// Which of Mender's two servers is played. They differ in who keeps the link alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Generation {
    /// Reads with a 60 s deadline that anything extends; pings after 30 s.
    New,
    /// No deadline until the first ping or pong, then 60 s that data doesn't extend; pings 54 s
    /// after the last data it wrote. Between it and each session's client there are 25 places for messages; what
    /// comes when they are taken is dropped without a word.
    Released,
}

/// How eagerly the server reads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Reading {
    Full,
    Paused,
    /// Bytes per second.
    Rate(u32),
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) inbox: VecDeque<Msg>,
    /// Sessions whose messages nobody wants.
    pub(super) discarded: HashSet<String>,
    /// What the device sent that no server could read.
    pub(super) broken: Vec<String>,
    pub(super) pings: Vec<(Instant, Vec<u8>)>,
    pub(super) pongs: Vec<(Instant, Vec<u8>)>,
    pub(super) close: Option<(u16, String)>,
    /// Why the link is over.
    pub(super) ended: Option<String>,
    pub(super) reading: Reading,
    /// Neither pings nor pongs are sent.
    pub(super) mute: bool,
    /// The clients of terminals answer pings at once, as those in the field do.
    pub(super) clients_answer: bool,
    /// With the released server: what each session's client has before it, by the session's id.
    pub(super) clients: HashMap<String, SyncSender<Msg>>,
    /// Bytes per second that such a client takes; 0 for no limit.
    pub(super) client_rate: u32,
    /// Messages that the released server dropped.
    pub(super) dropped: usize,
    pub(super) quit: bool,
    pub(super) bytes: u64,
    pub(super) heard: Instant,
    pub(super) wrote: Instant,
    pub(super) deadline: Option<Instant>,
}

impl State {
    /// The next message that is wanted, or why none can come any more.
    fn take(&mut self, want: &mut impl FnMut(&Msg) -> bool) -> Option<Result<Msg, String>> {
        if let Some(at) = self.inbox.iter().position(want) {
            return self.inbox.remove(at).map(Ok);
        }
        match (&self.ended, self.broken.is_empty()) {
            (_, false) => Some(Err(format!("the device broke the protocol: {:?}", self.broken))),
            (Some(why), _) => Some(Err(format!("the link is over: {why}"))),
            (None, _) => None,
        }
    }
}

#[derive(Debug)]
pub(super) struct Inner {
    pub(super) stream: Mutex<Option<Arc<TcpStream>>>,
    pub(super) wake: EventFd,
    pub(super) state: Watched<State>,
    pub(super) generation: Generation,
    pub(super) request: Request,
}

/// A connected device.
#[derive(Debug, Clone)]
pub struct Device(pub(super) Arc<Inner>);

impl Device {
    /// Takes over a stream whose handshake is done.
    pub fn start(stream: TcpStream, generation: Generation, request: Request) -> Device {
        let now = Instant::now();
        stream.set_nodelay(true).expect("set TCP_NODELAY");
        stream.set_write_timeout(Some(secs(60))).expect("set a write time-out");
        let stream = Arc::new(stream);
        let state = State {
            inbox: VecDeque::new(),
            discarded: HashSet::new(),
            broken: Vec::new(),
            pings: Vec::new(),
            pongs: Vec::new(),
            close: None,
            ended: None,
            reading: Reading::Full,
            mute: false,
            clients_answer: true,
            clients: HashMap::new(),
            client_rate: 0,
            dropped: 0,
            quit: false,
            bytes: 0,
            heard: now,
            wrote: now,
            deadline: (generation == Generation::New).then(|| now + secs(60)),
        };
        let inner = Arc::new(Inner {
            stream: Mutex::new(Some(Arc::clone(&stream))),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).expect("an eventfd"),
            state: Watched::new(state),
            generation,
            request,
        });
        let device = Device(inner);
        let reader = device.clone();
        spawn("device-reader", move || reader.read(stream));
        device
    }

    /// The handshake's request.
    pub fn request(&self) -> &Request {
        &self.0.request
    }

    // ---- writing

    /// A message as the server's encoder writes it, with the user id the server injects.
    pub fn send(&self, proto: u16, typ: &str, sid: &str, props: &[(&str, Value)], body: &[u8]) {
        self.send_value(&msg::message(proto, typ, sid, props, body), Ints::Compact);
    }

    pub fn send_value(&self, value: &Value, ints: Ints) {
        self.send_binary(&msg::encode(value, ints));
    }

    /// A binary message with these bytes.
    pub fn send_binary(&self, bytes: &[u8]) {
        self.send_frame(true, wire::BINARY, bytes);
    }

    /// A binary message cut into frames of at most `size` bytes.
    pub fn send_fragmented(&self, bytes: &[u8], size: usize) {
        let mut chunks = bytes.chunks(size).peekable();
        let mut opcode = wire::BINARY;
        while let Some(chunk) = chunks.next() {
            self.send_frame(chunks.peek().is_none(), opcode, chunk);
            opcode = wire::CONTINUATION;
        }
    }

    pub fn send_frame(&self, fin: bool, opcode: u8, payload: &[u8]) {
        self.try_frame(fin, opcode, payload).expect("write to the device");
    }

    /// Like [`Device::send_frame`], for devices that may have hung up.
    pub fn try_frame(&self, fin: bool, opcode: u8, payload: &[u8]) -> std::io::Result<()> {
        self.write(&wire::encode(fin, opcode, payload))?;
        if opcode < wire::CLOSE {
            self.0.state.update(|s| s.wrote = Instant::now());
            self.nudge();
        }
        Ok(())
    }

    /// Bytes that need not be a frame.
    pub fn write(&self, bytes: &[u8]) -> std::io::Result<()> {
        let stream = self.0.stream.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = stream.as_ref().ok_or(std::io::ErrorKind::NotConnected)?;
        (&**stream).write_all(bytes)
    }

    pub fn ping(&self, payload: &[u8]) {
        self.send_frame(true, wire::PING, payload);
    }

    /// Sends a close frame and leaves the TCP connection open, as a server that waits for the answer.
    pub fn close_frame(&self, code: u16, reason: &str) {
        let mut payload = code.to_be_bytes().to_vec();
        payload.extend_from_slice(reason.as_bytes());
        self.send_frame(true, wire::CLOSE, &payload);
    }

    /// Ends the TCP connection in order, without a close frame.
    pub fn hang_up(&self) {
        if let Some(stream) = self.0.stream.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.quit();
    }

    /// Ends the server's half of the TCP connection; it still reads.
    pub fn half_close(&self) {
        if let Some(stream) = self.0.stream.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            stream.shutdown(Shutdown::Write).expect("shut down");
        }
    }

    /// Ends the TCP connection with a reset.
    pub fn reset(&self) {
        let stream = self.0.stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(stream) = stream {
            let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
            nix::sys::socket::setsockopt(&*stream, nix::sys::socket::sockopt::Linger, &linger)
                .expect("set SO_LINGER");
        }
        // The reader drops the last reference, which resets.
        self.quit();
    }

    // ---- how it behaves

    pub fn set_reading(&self, reading: Reading) {
        self.0.state.update(|s| s.reading = reading);
        self.nudge();
    }

    /// From now on the clients of terminals don't answer pings, and tests get to see these.
    pub fn clients_fall_silent(&self) {
        self.0.state.update(|s| s.clients_answer = false);
    }

    /// How much each client of the released server takes from now on, in bytes per second.
    pub fn set_client_rate(&self, rate: u32) {
        self.0.state.update(|s| s.client_rate = rate);
    }

    /// Messages that the released server has dropped, since a session's client did not take them in time.
    pub fn dropped(&self) -> usize {
        self.0.state.peek(|s| s.dropped)
    }

    /// From now on neither pings nor pongs are sent.
    pub fn go_mute(&self) {
        self.0.state.update(|s| s.mute = true);
    }

    // ---- what came

    /// Takes the next message that `want` accepts, leaving the others in order. `None` when `limit`
    /// has passed, an error when no message can come any more.
    pub fn try_take(
        &self,
        limit: Duration,
        mut want: impl FnMut(&Msg) -> bool,
    ) -> Option<Result<Msg, String>> {
        self.0.state.wait(limit, |s| s.take(&mut want))
    }

    /// Like [`Device::try_take`], until `stay` says no when asked through [`Device::wake_takers`].
    pub(super) fn try_take_while(
        &self,
        stay: impl Fn() -> bool,
        mut want: impl FnMut(&Msg) -> bool,
    ) -> Option<Result<Msg, String>> {
        self.0.state.wait(secs(3600), |s| match stay() {
            true => s.take(&mut want).map(Some),
            false => Some(None),
        })?
    }

    pub(super) fn wake_takers(&self) {
        self.0.state.update(|_| ());
    }

    /// Like [`Device::try_take`], for messages that must come.
    pub fn take(&self, limit: Duration, what: &str, want: impl FnMut(&Msg) -> bool) -> Msg {
        match self.try_take(limit, want) {
            Some(Ok(msg)) => msg,
            Some(Err(why)) => panic!("while waiting for {what}: {why}"),
            None => panic!("waited {limit:?} in vain for: {what}; the inbox holds {}", self.inbox_summary()),
        }
    }

    /// Drops this session's messages from now on instead of keeping them.
    pub fn discard(&self, sid: &str) {
        self.0.state.update(|s| {
            s.discarded.insert(sid.to_owned());
            s.inbox.retain(|m| m.sid.as_deref() != Some(sid));
        });
    }

    /// The next message, whosever it is.
    pub fn next(&self, limit: Duration) -> Msg {
        self.take(limit, "the next message", |_| true)
    }

    /// The next message of a session.
    pub fn next_of(&self, sid: &str, limit: Duration) -> Msg {
        self.take(limit, &format!("the next message of session {sid}"), |m| m.sid.as_deref() == Some(sid))
    }

    /// Takes everything of a session that is there now.
    pub fn drain(&self, sid: &str) -> Vec<Msg> {
        self.0.state.update(|s| {
            let (mine, rest): (Vec<_>, Vec<_>) =
                s.inbox.drain(..).partition(|m| m.sid.as_deref() == Some(sid));
            s.inbox = rest.into();
            mine
        })
    }

    /// Asserts that nothing acceptable to `want` comes for a while.
    pub fn nothing(&self, span: Duration, what: &str, mut want: impl FnMut(&Msg) -> bool) {
        let found = self.0.state.wait(span, |s| s.inbox.iter().find(|m| want(m)).map(Msg::summary));
        assert!(found.is_none(), "{what}: got {found:?}");
    }

    pub fn inbox_summary(&self) -> String {
        self.0.state.peek(|s| {
            let lines: Vec<String> = s.inbox.iter().take(10).map(Msg::summary).collect();
            format!("{} messages: {lines:#?}", s.inbox.len())
        })
    }

    /// Bytes received since the handshake.
    pub fn bytes(&self) -> u64 {
        self.0.state.peek(|s| s.bytes)
    }

    /// What arrived but could not be read.
    pub fn broken(&self) -> Vec<String> {
        self.0.state.peek(|s| s.broken.clone())
    }

    /// How many websocket pings have come.
    pub fn pings(&self) -> usize {
        self.0.state.peek(|s| s.pings.len())
    }

    /// Waits for `count` websocket pings in all; returns when they came and what they carried.
    pub fn wait_pings(&self, count: usize, limit: Duration) -> Vec<(Instant, Vec<u8>)> {
        let found = self.0.state.wait(limit, |s| (s.pings.len() >= count).then(|| s.pings.clone()));
        found.unwrap_or_else(|| panic!("waited {limit:?} in vain for websocket ping {count}"))
    }

    /// Waits for a pong with this payload.
    pub fn wait_pong(&self, payload: &[u8], limit: Duration) {
        let found = self.0.state.wait(limit, |s| s.pongs.iter().any(|(_, p)| p == payload).then_some(()));
        assert!(found.is_some(), "waited {limit:?} in vain for a pong with payload {payload:?}");
    }

    /// Waits until the device's close frame or the end of the connection.
    pub fn wait_close(&self, limit: Duration) -> Option<(u16, String)> {
        let found =
            self.0.state.wait(limit, |s| (s.close.is_some() || s.ended.is_some()).then(|| s.close.clone()));
        found.unwrap_or_else(|| panic!("waited {limit:?} in vain for the device to close the link"))
    }

    /// Waits until the connection is over and returns why.
    pub fn wait_end(&self, limit: Duration) -> String {
        let found = self.0.state.wait(limit, |s| s.ended.clone());
        found.unwrap_or_else(|| panic!("waited {limit:?} in vain for the end of the link"))
    }

    pub fn is_over(&self) -> bool {
        self.0.state.peek(|s| s.ended.is_some())
    }

    /// Whether the connection is over within this time.
    pub fn ended_within(&self, limit: Duration) -> bool {
        self.0.state.wait(limit, |s| s.ended.as_ref().map(drop)).is_some()
    }

    /// Whether the device answers a websocket ping in time. Its payload must be unique on this link.
    pub fn answers(&self, payload: &[u8], limit: Duration) -> bool {
        let answered = |s: &mut State| {
            let answered = s.pongs.iter().any(|(_, p)| p == payload);
            (answered || s.ended.is_some()).then_some(answered)
        };
        self.try_frame(true, wire::PING, payload).is_ok() && self.0.state.wait(limit, answered) == Some(true)
    }

    // ---- its end

    pub(super) fn nudge(&self) {
        let _ = self.0.wake.write(1);
    }

    fn quit(&self) {
        self.0.state.update(|s| {
            s.quit = true;
            s.ended.get_or_insert_with(|| "the test hung up".to_owned());
        });
        self.nudge();
    }

    pub(super) fn end(&self, why: String) {
        self.0.state.update(|s| s.ended.get_or_insert(why).clone());
        if let Some(stream) = self.0.stream.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

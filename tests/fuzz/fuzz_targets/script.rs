//! What a server may do to a link, step by step: frames and the link's end, for a router whose sessions are run
//! by hand, beside a model that knows what has to become of each frame.

#![no_main]

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use mender_connect::internals::{
    Auth, CONTROL, Config, Device, Expiry, FILE_TRANSFER, Frame, MENDER_CLIENT, Map, Outbox, PORT_FORWARD,
    Peer, Queue, Router, SHELL, Sendable, SessionId, Wake, Work, lookup, poll_one,
};
use nix::poll::PollFlags;

/// As in the agent: threads of sessions on the device, and more of them for shells.
const MAX_SESSIONS: usize = 256;
const MAKING_ROOM: usize = 8;
/// Sessions of a user that others' don't keep out.
const FIRST: usize = 2;
const MAX_THREADS: usize = 272;
const MAX_SHELLS: usize = 16;
const MAX_FRAMES: usize = 1024;
const MAX_BYTES: usize = 2 << 20;
/// Bytes that all inboxes may hold beyond each one's reserve.
const MEMORY: usize = 16 << 20;
const MEMORY_OF_USER: usize = MEMORY / 8 * 7;
const RESERVED: usize = 16 << 10;

/// Answers that may wait. Further ones of the router are dropped; a session would wait.
const MAX_ANSWERS: usize = 112;
/// Those of sessions.
const MAX_PONGS: usize = 32;

#[derive(Arbitrary, Debug)]
struct Script {
    terminal: bool,
    mender_client: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// The server sends a message, so many times.
    Send { message: Message, sid: Sid, times: u8 },
    /// The same once for so many sessions.
    SendToMany { message: Message, sessions: u8 },
    /// Every session has to know of what has come.
    Woken,
    /// A session reads so many frames of what it has, all that it can where it is to read many.
    Read { sid: u8, frames: u8 },
    /// A session answers.
    Answer { sid: u8 },
    /// A session has a shell now.
    Shell { sid: u8, user: u8 },
    /// A session ends, if nothing has come, or at once.
    End { sid: u8, at_once: bool },
    /// A session that has ended leaves.
    Leave { sid: u8 },
    /// So many sessions one after another that say all they can and leave.
    Churn(u8),
    /// From now on the system has threads, or none.
    Threads(bool),
    /// The writer sends so many messages.
    Write(u8),
    /// The link is lost and there is another one.
    Relink,
}

#[derive(Arbitrary, Debug)]
enum Sid {
    None,
    /// One of a few.
    Of(u8),
}

/// Mostly a few, and now and then as many as it takes to meet a bound.
fn few_or(many: u16, number: u8) -> u16 {
    if number < 255 { u16::from(number % 5) } else { many }
}

#[derive(Arbitrary, Debug, Clone)]
struct Message {
    kind: Kind,
    user: u8,
    body: Body,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Kind {
    ShellNew,
    ShellData,
    ShellResize,
    ShellStop,
    ShellPong,
    ShellOther,
    ControlOpen,
    ControlClose,
    ControlPong,
    ControlError,
    File,
    Forward,
    Client,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Body {
    None,
    Small,
    Large,
    Huge,
}

/// The name of a frame's number among its properties.
const NUMBER: &str = "number";
const BODY: Bytes = Bytes::from_static(&[0; 1 << 20]);

static CONFIG: LazyLock<Config> = LazyLock::new(|| Config {
    shell: PathBuf::from("/bin/sh"),
    arguments: Vec::new(),
    user: lookup("root").expect("root is known"),
    no_new_privileges: false,
    environment: Vec::new(),
    terminal: true,
    width: 80,
    height: 40,
    expiry: Expiry::Never,
    sessions_per_user: u32::MAX,
    idle_includes_output: false,
    keep_detached: Duration::ZERO,
    keep_when_user_leaves: false,
    file_transfer: true,
    port_forward: true,
    forward_targets: None,
    forward_idle: Duration::from_secs(600),
    mender_client: false,
    limits: None,
    auth: Auth::Dbus,
    reconnect_interval: Duration::from_secs(1),
    heartbeat: Duration::from_secs(25),
});

fuzz_target!(|script: Script| {
    let device = Device::new(Config {
        terminal: script.terminal,
        mender_client: script.mender_client,
        ..CONFIG.clone()
    });
    let mut link = Link::new(&device, 0);
    let mut ended = Vec::new();
    for step in &script.steps {
        if matches!(step, Step::Relink) {
            ended.extend(link.end());
            link = Link::new(&device, ended.len());
        } else {
            link.step(step);
        }
        assert_eq!(device.counts().0, link.sessions.len(), "{step:?}");
        assert!(link.queued.len() <= MAX_ANSWERS);
    }
    ended.extend(link.end());
    let wake = Arc::new(Wake::new().expect("an eventfd"));
    assert_eq!(device.wait_until_quiet(&wake, Instant::now()), ended.is_empty());
    drop(ended);
    assert!(device.wait_until_quiet(&wake, Instant::now()), "a session is counted that isn't there");
});

impl Message {
    fn proto_and_type(&self) -> (u16, &'static str) {
        match self.kind {
            Kind::ShellNew => (SHELL, "new"),
            Kind::ShellData => (SHELL, "shell"),
            Kind::ShellResize => (SHELL, "resize"),
            Kind::ShellStop => (SHELL, "stop"),
            Kind::ShellPong => (SHELL, "pong"),
            Kind::ShellOther => (SHELL, "other"),
            Kind::ControlOpen => (CONTROL, "open"),
            Kind::ControlClose => (CONTROL, "close"),
            Kind::ControlPong => (CONTROL, "pong"),
            Kind::ControlError => (CONTROL, "error"),
            Kind::File => (FILE_TRANSFER, "stat"),
            Kind::Forward => (PORT_FORWARD, "new"),
            // Its real commands would be run.
            Kind::Client => (MENDER_CLIENT, "other"),
        }
    }

    fn size(&self) -> usize {
        match self.body {
            Body::None => 0,
            Body::Small => 9,
            Body::Large => 64 * 1024,
            Body::Huge => BODY.len(),
        }
    }
}

fn name(sid: u16) -> SessionId {
    SessionId::new(&sid.to_string()).expect("a name")
}

fn user(number: u8) -> String {
    if number == 0 { String::new() } else { (number % 4).to_string() }
}

/// A session as the model has it.
struct Session {
    peer: Peer,
    /// Its memory counts for this user.
    owner: String,
    /// What it has to read: number, size, and whether it is a window's size.
    pending: VecDeque<(i64, usize, bool)>,
    /// The sum of those sizes.
    bytes: usize,
    /// Size of the message that it has read last.
    handled: usize,
    /// Something has come since it has last looked.
    unheard: bool,
    hung_up: bool,
    closed: bool,
    user: Option<String>,
}

/// The session that the router has just started; an error when there are no threads.
type Begun = Rc<RefCell<Result<Option<Peer>, ()>>>;
type Start = Box<dyn FnMut(Peer) -> io::Result<()>>;

/// A link with its router, and what has to be true of them.
struct Link {
    device: Arc<Device>,
    router: Router<Start>,
    queue: Queue,
    begun: Begun,
    terminal: bool,
    mender_client: bool,
    sessions: HashMap<SessionId, Session>,
    /// Sessions that have ended, whose names others got before they left.
    replaced: Vec<Session>,
    /// Sessions of earlier links, which have not left yet.
    older: usize,
    /// The answers that wait to be written.
    queued: VecDeque<(u16, String)>,
    sent: i64,
    /// Bytes of memory that the latest message holds.
    size: usize,
}

impl Link {
    fn new(device: &Arc<Device>, older: usize) -> Self {
        let (outbox, queue) = Outbox::new();
        let begun = Begun::new(RefCell::new(Ok(None)));
        let theirs = Rc::clone(&begun);
        let start: Start = Box::new(move |peer| match &mut *theirs.borrow_mut() {
            Ok(begun) => {
                assert!(begun.replace(peer).is_none());
                Ok(())
            }
            Err(()) => Err(io::ErrorKind::WouldBlock.into()),
        });
        Link {
            device: Arc::clone(device),
            router: Router::with(device, device.new_table(), &outbox, start),
            queue,
            begun,
            terminal: device.config().terminal,
            mender_client: device.config().mender_client,
            sessions: HashMap::new(),
            replaced: Vec::new(),
            older,
            queued: VecDeque::new(),
            sent: 0,
            size: 0,
        }
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Send { message, sid, times } => {
                let sid = if let Sid::Of(sid) = sid { Some(u16::from(sid % 4)) } else { None };
                (0..few_or(1100, *times)).for_each(|_| self.send(message, sid));
            }
            Step::SendToMany { message, sessions } => {
                (0..few_or(300, *sessions)).for_each(|sid| self.send(message, Some(sid)));
            }
            Step::Woken => self.check_woken(),
            Step::Read { sid, frames } => {
                if let Some(session) = self.sessions.get_mut(&name((sid % 4).into())) {
                    session.read(if *frames > 100 { usize::MAX } else { (*frames).into() });
                }
            }
            Step::Answer { sid } => {
                self.answer(&name((sid % 4).into()));
            }
            Step::Shell { sid, user: number } => {
                let Some(session) = self.sessions.get_mut(&name((sid % 4).into())) else { return };
                let (now, user) = (Instant::now(), user(*number));
                session.peer.info.set_shell(user.as_str().into(), 1, now);
                session.user = Some(user);
            }
            Step::End { sid, at_once } => {
                if let Some(session) = self.sessions.get_mut(&name((sid % 4).into())) {
                    session.end(*at_once);
                }
            }
            Step::Leave { sid } => {
                let id = name((sid % 4).into());
                if self.sessions.get(&id).is_some_and(|session| session.closed) {
                    self.sessions.remove(&id);
                }
                self.replaced.pop();
            }
            Step::Churn(sessions) => {
                let open = Message { kind: Kind::ControlOpen, user: 0, body: Body::None };
                for sid in (1000..).take(few_or(200, *sessions).into()) {
                    self.send(&open, Some(sid));
                    while self.answer(&name(sid)) {}
                    if let Some(mut session) = self.sessions.remove(&name(sid)) {
                        session.end(true);
                    }
                }
            }
            Step::Threads(any) => *self.begun.borrow_mut() = if *any { Ok(None) } else { Err(()) },
            Step::Write(messages) => (0..*messages).for_each(|_| self.write()),
            Step::Relink => {}
        }
    }

    fn send(&mut self, message: &Message, sid: Option<u16>) {
        self.sent += 1;
        let (proto, typ) = message.proto_and_type();
        let (id, user) = (sid.map(name), user(message.user));
        let props = Map::new().with_str("user_id", user.as_str()).with_i64(NUMBER, self.sent);
        let frame = Frame::new(proto, typ, id.as_ref()).with_props(props);
        let without_body = frame.held();
        // The sessions that get the last of the memory are any: the router's order isn't known.
        if id.is_none() && self.memory(None) + self.sessions.len() * without_body > MEMORY_OF_USER {
            return;
        }
        let frame = frame.with_body(BODY.slice(..message.size()));
        self.size = frame.held();
        let shells = self.device.counts().1;
        self.router.route(frame);

        if proto == MENDER_CLIENT && self.mender_client {
            return self.expect_answer(proto, typ);
        }
        let Some(id) = id else {
            if matches!(message.kind, Kind::ShellStop) && !user.is_empty() {
                // Each session judges whether it is meant.
                self.size = without_body;
                let ids: Vec<_> = self.sessions.keys().cloned().collect();
                for id in ids {
                    self.expect_delivery(&id, message);
                }
            }
            return;
        };
        if self.expect_delivery(&id, message) {
            return;
        }
        match (proto, message.kind) {
            (SHELL, Kind::ShellNew) if self.terminal => self.expect_session(&id, message, shells),
            (SHELL, Kind::ShellResize | Kind::ShellPong) if self.terminal => {}
            (SHELL, _) => self.expect_answer(proto, typ),
            (_, Kind::ControlClose | Kind::ControlPong | Kind::ControlError) => {}
            _ => self.expect_session(&id, message, shells),
        }
    }

    /// A session answers, if there is room. Whether it has.
    fn answer(&mut self, id: &SessionId) -> bool {
        let Some(session) = self.sessions.get(id) else { return false };
        let pongs = self.queued.iter().filter(|(_, typ)| typ == "pong").count();
        let takes = self.queued.len() < MAX_ANSWERS && pongs < MAX_PONGS;
        if takes {
            session.peer.sink.reply(&Frame::new(CONTROL, "pong", Some(&session.peer.id)));
            self.queued.push_back((CONTROL, "pong".to_owned()));
        }
        takes
    }

    /// The router has answered, unless too many of its answers wait.
    fn expect_answer(&mut self, proto: u16, typ: &str) {
        if self.queued.len() < MAX_ANSWERS {
            self.queued.push_back((proto, typ.to_owned()));
        }
    }

    fn expect_refusal(&mut self, message: &Message) {
        match message.proto_and_type() {
            (SHELL, typ) => self.expect_answer(SHELL, typ),
            _ => self.expect_answer(CONTROL, "error"),
        }
    }

    /// The device's memory that its sessions take, or those `of` a user.
    fn memory(&self, of: Option<&str>) -> usize {
        let sessions = self.sessions.values().chain(&self.replaced);
        let sessions = sessions.filter(|session| of.is_none_or(|user| session.owner == user));
        sessions.map(|session| session.memory(0)).sum()
    }

    /// A session of this name has the latest message, or none and there is an answer. False if there is no session.
    fn expect_delivery(&mut self, id: &SessionId, message: &Message) -> bool {
        let all = self.memory(None);
        let user = self.sessions.get(id).map(|session| session.owner.clone());
        let own = user.map_or(0, |user| self.memory(Some(&user)));
        // One that was hung up keeps its name until it leaves.
        let there = |session: &&mut Session| session.hung_up || !session.closed;
        let Some(session) = self.sessions.get_mut(id).filter(there) else { return false };
        let before = session.memory(0);
        let fits = |bytes| all - before + bytes <= MEMORY && own - before + bytes <= MEMORY_OF_USER;
        let is_size = matches!(message.kind, Kind::ShellResize);
        let latest = (self.sent, self.size, is_size);
        if let Some((_, old, true)) = session.pending.back().copied().filter(|_| is_size) {
            let bytes = session.bytes - old + self.size;
            if fits((bytes + session.handled).saturating_sub(RESERVED)) {
                session.pending.pop_back();
                session.pending.push_back(latest);
                session.bytes = bytes;
            }
            return true;
        }
        let (frames, full) = (session.pending.len(), session.bytes + self.size > MAX_BYTES);
        let memory = !session.hung_up && fits(session.memory(self.size));
        if memory && (frames == 0 || (frames < MAX_FRAMES && !full)) {
            session.pending.push_back(latest);
            session.bytes += self.size;
            session.unheard = true;
        } else if !matches!(message.kind, Kind::ShellResize | Kind::ShellPong) {
            // Keystrokes may be refused; in anything else a gap ends the session.
            if message.proto_and_type().0 != SHELL {
                (session.hung_up, session.closed) = (true, true);
                session.drop_pending();
            }
            self.expect_refusal(message);
        }
        true
    }

    fn expect_session(&mut self, id: &SessionId, message: &Message, shells: usize) {
        let shell = message.proto_and_type().0 == SHELL;
        if shell && shells >= MAX_SHELLS {
            return self.expect_refusal(message);
        }
        let threads = self.older + self.sessions.len() + self.replaced.len();
        let room = threads < if shell { MAX_THREADS } else { MAX_SESSIONS };
        let (bytes, user) = (self.size.saturating_sub(RESERVED), user(message.user));
        let room = room
            || !shell
                && threads < MAX_SESSIONS + MAKING_ROOM
                && (self.expect_room()
                    || self.sessions.values().filter(|session| session.owner == user).count() < FIRST);
        let fits = self.memory(None) + bytes <= MEMORY && self.memory(Some(&user)) + bytes <= MEMORY_OF_USER;
        let room = room && fits;
        let begun = if room { self.begun.borrow_mut().as_mut().ok().map(Option::take) } else { None };
        if room {
            // One that has ended and not left yet loses its name.
            self.replaced.extend(self.sessions.remove(id));
        }
        let Some(peer) = begun else { return self.expect_refusal(message) };
        let peer = peer.expect("a session");
        assert_eq!(peer.id, *id);
        let pending = VecDeque::from([(self.sent, self.size, matches!(message.kind, Kind::ShellResize))]);
        let (unheard, hung_up, closed) = Default::default();
        let (owner, bytes, handled) = (user, self.size, 0);
        let session = Session { peer, owner, pending, bytes, handled, unheard, hung_up, closed, user: None };
        self.sessions.insert(id.clone(), session);
    }

    /// A session without a shell has been ended for another's sake. False if each has one.
    fn expect_room(&mut self) -> bool {
        let ended = |session: &Session| session.peer.inbox.hung_up().is_some() && !session.hung_up;
        let ended: Vec<_> =
            self.sessions.iter().filter(|(_, s)| ended(s)).map(|(id, _)| id.clone()).collect();
        for id in &ended {
            let mut session = self.sessions.remove(id).expect("it was there");
            assert!(session.user.is_none());
            (session.hung_up, session.closed, session.unheard) = (true, true, false);
            session.drop_pending();
            self.replaced.push(session);
        }
        assert!(ended.len() <= 1);
        !ended.is_empty()
    }

    fn check_woken(&self) {
        for session in self.sessions.values().filter(|session| session.unheard) {
            let events =
                poll_one(&*session.peer.wake, PollFlags::POLLIN, Some(Instant::now())).expect("poll");
            assert!(events.contains(PollFlags::POLLIN), "{} wasn't woken", session.peer.id);
        }
    }

    /// The writer sends a message.
    fn write(&mut self) {
        let all = Sendable { bulk: true, interactive: true };
        let written = self.queue.try_next(all).map(|work| match work {
            Work::Message(message, ..) => {
                let frame = Frame::decode(&message).expect("a frame");
                (frame.proto, frame.typ)
            }
            other => panic!("{other:?}"),
        });
        assert_eq!(written, self.queued.pop_front());
    }

    /// The link is lost. What its sessions have left.
    fn end(mut self) -> Vec<Peer> {
        assert!(self.begun.borrow().as_ref().is_ok_and(Option::is_none) || self.begun.borrow().is_err());
        (0..=self.queued.len()).for_each(|_| self.write());
        drop(self.router);
        assert!(self.sessions.values().all(|session| session.peer.inbox.hung_up().is_some()));
        // As a session does when it has looked for its shell's.
        self.sessions.values().for_each(|session| session.peer.inbox.close());
        assert!(self.sessions.values().all(|session| session.peer.inbox.pop(|_| true).is_none()));
        self.sessions.into_values().chain(self.replaced).map(|session| session.peer).collect()
    }
}

impl Session {
    fn drop_pending(&mut self) {
        self.pending.clear();
        self.bytes = 0;
    }

    /// The device's memory that the session takes with so many bytes more.
    fn memory(&self, more: usize) -> usize {
        (self.bytes + self.handled + more).saturating_sub(RESERVED)
    }

    fn read(&mut self, most: usize) {
        self.peer.wake.clear();
        self.unheard = false;
        assert_eq!(self.peer.inbox.hung_up().is_some(), self.hung_up);
        for _ in 0..most {
            let read = self.peer.inbox.pop(|_| true).map(|frame| (frame.props.int(NUMBER), frame.held()));
            let expected = self.pending.pop_front().map(|(number, size, _)| (Some(number), size));
            assert_eq!(read, expected);
            self.handled = read.map_or(0, |(_, size)| size);
            self.bytes -= self.handled;
            if read.is_none() {
                return;
            }
        }
    }

    fn end(&mut self, at_once: bool) {
        if at_once {
            self.peer.inbox.close();
            self.closed = true;
            self.drop_pending();
        } else {
            let closed = self.peer.inbox.close_if_empty();
            assert_eq!(closed, self.pending.is_empty());
            self.closed = closed;
        }
    }
}

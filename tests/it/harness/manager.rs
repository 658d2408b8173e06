//! An authentication manager: a peer on the private bus that behaves as mender-auth does, or as a
//! test wants it to misbehave.

use std::collections::VecDeque;
use std::ffi::CString;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dbus::Message;
use dbus::channel::Channel;
use dbus::message::MessageType;

use super::wait::{SOON, Watched, eventually, millis, spawn};

pub const NAME: &str = "io.mender.AuthenticationManager";
pub const PATH: &str = "/io/mender/AuthenticationManager";
pub const INTERFACE: &str = "io.mender.Authentication1";

/// How a method is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Normal,
    Late(Duration),
    /// An integer where strings, or the bool, belong.
    WrongTypes,
    Silent,
    Error(&'static str),
}

/// One call the manager received.
#[derive(Debug, Clone)]
pub struct Call {
    pub interface: String,
    pub member: String,
}

struct State {
    token: String,
    url: String,
    get: Answer,
    /// What a successful FetchJwtToken leads to: these values are stored and signalled.
    fetched: Option<(String, String)>,
    calls: Vec<Call>,
    /// Messages to send from the serving connection.
    outbox: VecDeque<Message>,
    quit: bool,
}

/// The manager. It owns the well-known name from [`Manager::start`] on.
pub struct Manager {
    address: String,
    state: Arc<Watched<State>>,
    serving: Option<Serving>,
}

struct Serving {
    unique: String,
    /// A second connection that wakes the serving one through the bus.
    remote: Channel,
    thread: JoinHandle<()>,
}

impl Manager {
    /// Connects to the bus, takes the name and answers with this token and URL.
    pub fn start(address: &str, token: &str, url: &str) -> Manager {
        let mut manager = Manager::absent(address, token, url);
        manager.appear();
        manager
    }

    /// A manager that isn't on the bus yet.
    pub fn absent(address: &str, token: &str, url: &str) -> Manager {
        let state = State {
            token: token.to_owned(),
            url: url.to_owned(),
            get: Answer::Normal,
            fetched: None,
            calls: Vec::new(),
            outbox: VecDeque::new(),
            quit: false,
        };
        Manager { address: address.to_owned(), state: Arc::new(Watched::new(state)), serving: None }
    }

    /// Comes (back) to the bus as a new owner of the name.
    pub fn appear(&mut self) {
        self.vanish();
        let channel = open(&self.address);
        let request = bus_call("RequestName").append2(NAME, 4u32);
        let reply = channel.send_with_reply_and_block(request, SOON).expect("request the name");
        assert_eq!(reply.get1::<u32>(), Some(1), "the name is free");
        let unique = channel.unique_name().expect("a registered connection").to_owned();
        let state = Arc::clone(&self.state);
        state.update(|s| s.quit = false);
        let thread = spawn("manager", move || serve(&channel, &state));
        self.serving = Some(Serving { unique, remote: open(&self.address), thread });
    }

    /// Leaves the bus, as a crash would, and waits until the bus has noticed. No-op when not there.
    pub fn vanish(&mut self) {
        self.state.update(|s| s.quit = true);
        self.wake();
        if let Some(Serving { unique, remote, thread }) = self.serving.take() {
            let _ = thread.join();
            eventually(SOON, "the bus to have noticed", || {
                let question = bus_call("NameHasOwner").append1(&unique);
                // There may be no bus any more.
                let Ok(answer) = remote.send_with_reply_and_block(question, SOON) else { return Some(()) };
                (answer.get1::<bool>() == Some(false)).then_some(())
            });
        }
        self.state.update(|s| s.outbox.clear());
    }

    /// Gives the name up but stays connected.
    pub fn release_name(&self) {
        self.send(bus_call("ReleaseName").append1(NAME));
    }

    /// Takes the name again on the same connection.
    pub fn own_name(&self) {
        self.send(bus_call("RequestName").append2(NAME, 4u32));
    }

    /// Changes what GetJwtToken answers, without a signal.
    pub fn set(&self, token: &str, url: &str) {
        self.state.update(|s| {
            token.clone_into(&mut s.token);
            url.clone_into(&mut s.url);
        });
    }

    /// Changes what GetJwtToken answers and signals it.
    pub fn change(&self, token: &str, url: &str) {
        self.set(token, url);
        self.signal(token, url);
    }

    /// Signals without changing anything.
    pub fn signal(&self, token: &str, url: &str) {
        self.send(token_signal(token, url));
    }

    /// Signals many times in a row; the last one carries `token` and `url` again.
    pub fn flood(&self, count: usize, token: &str, url: &str) {
        self.state.update(|s| {
            for n in 0..count {
                s.outbox.push_back(token_signal(&format!("flood-{n}"), url));
            }
            s.outbox.push_back(token_signal(token, url));
        });
        self.wake();
    }

    /// A signal of the right name whose arguments are of wrong types.
    pub fn signal_nonsense(&self) {
        self.send(Message::new_signal(PATH, INTERFACE, "JwtTokenStateChange").expect("valid").append1(42u32));
    }

    pub fn answer_get(&self, answer: Answer) {
        self.state.update(|s| s.get = answer);
    }

    /// What the next FetchJwtToken brings about.
    pub fn on_fetch(&self, token: &str, url: &str) {
        self.state.update(|s| s.fetched = Some((token.to_owned(), url.to_owned())));
    }

    pub fn calls(&self, member: &str) -> Vec<Call> {
        self.state.peek(|s| s.calls.iter().filter(|c| c.member == member).cloned().collect())
    }

    /// Every call so far, whatever its name.
    pub fn all_calls(&self) -> Vec<Call> {
        self.state.peek(|s| s.calls.clone())
    }

    /// Waits until `member` has been called `count` times in all.
    pub fn wait_calls(&self, member: &str, count: usize, limit: Duration) -> Vec<Call> {
        let found = self.state.wait(limit, |s| {
            let calls: Vec<Call> = s.calls.iter().filter(|c| c.member == member).cloned().collect();
            (calls.len() >= count).then_some(calls)
        });
        found.unwrap_or_else(|| {
            panic!("waited {limit:?} in vain for call {count} of {member}; calls: {:?}", self.all_calls())
        })
    }

    fn send(&self, message: Message) {
        self.state.update(|s| s.outbox.push_back(message));
        self.wake();
    }

    fn wake(&self) {
        if let Some(serving) = &self.serving {
            let mut nudge = Message::new_method_call(serving.unique.as_str(), PATH, "test.Harness", "Wake")
                .expect("valid");
            nudge.set_no_reply(true);
            let _ = serving.remote.send(nudge);
            serving.remote.flush();
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.vanish();
    }
}

fn open(address: &str) -> Channel {
    let mut channel = Channel::open_private(address).expect("connect to the private bus");
    channel.register().expect("register on the private bus");
    channel
}

fn bus_call(member: &str) -> Message {
    Message::new_method_call("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus", member)
        .expect("valid")
}

fn token_signal(token: &str, url: &str) -> Message {
    Message::new_signal(PATH, INTERFACE, "JwtTokenStateChange").expect("valid").append2(token, url)
}

/// Serves until told to quit or until the bus is gone.
fn serve(channel: &Channel, state: &Watched<State>) {
    let mut late: Vec<(Instant, Message)> = Vec::new();
    loop {
        let now = Instant::now();
        for (_, reply) in late.extract_if(.., |(due, _)| *due <= now) {
            let _ = channel.send(reply);
        }
        while let Some(message) = channel.pop_message() {
            if message.msg_type() == MessageType::MethodCall
                && let Some((reply, delay)) = answer(&message, state)
            {
                match delay {
                    Some(delay) => late.push((now + delay, reply)),
                    None => {
                        let _ = channel.send(reply);
                    }
                }
            }
        }
        let (outbox, quit) = state.update(|s| (std::mem::take(&mut s.outbox), s.quit));
        for message in outbox {
            let _ = channel.send(message);
        }
        channel.flush();
        if quit {
            return;
        }
        let due = late.iter().map(|(due, _)| due.saturating_duration_since(now) + millis(1)).min();
        if channel.read_write(due).is_err() {
            return;
        }
    }
}

fn answer(call: &Message, state: &Watched<State>) -> Option<(Message, Option<Duration>)> {
    let interface = call.interface().map(|i| i.to_string()).unwrap_or_default();
    let member = call.member().map(|m| m.to_string()).unwrap_or_default();
    if interface == "test.Harness" {
        return None;
    }
    state.update(|s| {
        s.calls.push(Call { interface: interface.clone(), member: member.clone() });
        let ours = interface.is_empty() || interface == INTERFACE;
        let (behaviour, good) = match member.as_str() {
            "GetJwtToken" if ours => {
                (s.get.clone(), call.method_return().append2(s.token.as_str(), s.url.as_str()))
            }
            "FetchJwtToken" if ours => (Answer::Normal, call.method_return().append1(true)),
            _ => {
                let text = CString::new(format!("no such method: {interface}.{member}")).expect("no nul");
                let name = "org.freedesktop.DBus.Error.UnknownMethod".into();
                return Some((call.error(&name, &text), None));
            }
        };
        if member == "FetchJwtToken"
            && let Some((token, url)) = s.fetched.take()
        {
            s.outbox.push_back(token_signal(&token, &url));
            (s.token, s.url) = (token, url);
        }
        match behaviour {
            Answer::Normal => Some((good, None)),
            Answer::Late(delay) => Some((good, Some(delay))),
            Answer::WrongTypes => Some((call.method_return().append1(7i32), None)),
            Answer::Silent => None,
            Answer::Error(text) => {
                let text = CString::new(text).expect("no nul");
                Some((call.error(&"org.freedesktop.DBus.Error.Failed".into(), &text), None))
            }
        }
    })
}

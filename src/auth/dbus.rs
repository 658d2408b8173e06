//! The authentication manager on the system bus (`io.mender.AuthenticationManager`).
//!
//! Calls never wait; answers are matched by serial number. Only connecting to the bus blocks, in a thread of its own.
//! The manager and the bus may come, go and be replaced at any time.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use dbus::Message;
use dbus::channel::{BusType, Channel, default_reply};
use dbus::message::MessageType;
use log::{debug, info, trace, warn};
use nix::poll::PollFlags;

use super::{AuthEvent, Credentials, Refusal, Source};
use crate::sys::wake::Wake;
use crate::sys::wipe::wipe_texts;
use crate::sys::{PollSet, duplicate_socket, is_ready, reason, thread};

const MANAGER: &str = "io.mender.AuthenticationManager";
const PATH: &str = "/io/mender/AuthenticationManager";
const INTERFACE: &str = "io.mender.Authentication1";
const BUS: &str = "org.freedesktop.DBus";
const TO_MANAGER: [&str; 3] = [MANAGER, PATH, INTERFACE];
const TO_BUS: [&str; 3] = [BUS, "/org/freedesktop/DBus", BUS];

/// A later answer is still accepted.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Interval between questions that get no answer.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// Minimum between fetches, since each disturbs the other users of the manager.
const FETCH_INTERVAL: Duration = Duration::from_secs(60);
const LOST: &str = "the connection was lost";
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// In reads of libdbus, of 2 KiB each. Any local user may send up to 32 MiB, and the crate cannot set libdbus' own
/// limit.
const LARGEST_MESSAGE: usize = (1 << 20) / 2048;
/// Reads in one turn of the poll loop.
const MAX_READS: usize = 64;

pub(crate) struct Manager {
    wake: Arc<Wake>,
    bus: Bus,
    /// A missing bus ends the daemon. Only until the first connection, if the bus is required.
    fatal: bool,
    retry_delay: Duration,
    /// Unique name of the manager on the bus.
    pub(crate) owner: Option<String>,
    /// Serial numbers of the last calls to GetNameOwner and GetJwtToken.
    owner_query: Option<u32>,
    question: Option<u32>,
    timer: Option<(Instant, Timer)>,
    /// For doctor: the last answer had a token but no server.
    pub(crate) lacks_server: bool,
    last_fetch: Option<Instant>,
    /// Reads since the last complete message.
    reads: usize,
    events: Vec<AuthEvent>,
}

enum Bus {
    /// Retry then.
    Down(Instant),
    Connecting(Receiver<Result<Bus, String>>),
    /// With a duplicate of the channel's descriptor, to poll.
    Up(Channel, OwnedFd),
}

#[derive(Clone, Copy)]
enum Timer {
    /// The current question counts as unanswered.
    Unanswered,
    AskAgain,
}

impl Source for Manager {
    fn watch<'a>(&'a self, set: &mut PollSet<'a>) {
        let retry = if let Bus::Down(until) = self.bus { Some(until) } else { None };
        set.until(&[retry, self.timer.map(|(at, _)| at)]);
        let Bus::Up(channel, socket) = &self.bus else { return };
        let watch = channel.watch();
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, watch.read);
        events.set(PollFlags::POLLOUT, watch.write);
        set.add(socket.as_fd(), events);
    }

    fn process(&mut self, now: Instant) -> io::Result<Vec<AuthEvent>> {
        let changed = match &self.bus {
            Bus::Down(until) if now >= *until => Some(Bus::connect(&self.wake)),
            Bus::Connecting(result) => result.try_recv().ok(),
            Bus::Down(_) | Bus::Up(..) => None,
        };
        match changed {
            None => {}
            Some(Ok(bus @ Bus::Up(..))) => self.came_up(bus, now),
            Some(Ok(bus)) => self.bus = bus,
            Some(Err(why)) if self.fatal => return Err(io::Error::other(why)),
            Some(Err(why)) => self.went_down(now, &why),
        }
        self.receive(now);
        match self.timer {
            Some((at, Timer::Unanswered)) if now >= at => {
                self.unanswered(Refusal::Silent("no answer".to_owned()), now);
            }
            Some((at, Timer::AskAgain)) if now >= at => self.ask(now),
            _ => {}
        }
        Ok(std::mem::take(&mut self.events))
    }

    fn ask(&mut self, now: Instant) {
        self.question = self.call(TO_MANAGER, "GetJwtToken", &[]);
        let patience = if self.question.is_some() { ANSWER_LIMIT } else { Duration::ZERO };
        self.timer = Some((now + patience, Timer::Unanswered));
    }

    fn fetch(&mut self, now: Instant) {
        if let Some(next) = self.last_fetch.map(|at| at + FETCH_INTERVAL).filter(|next| now < *next) {
            // The answer tells whether a token is still missing.
            self.timer.get_or_insert((next, Timer::AskAgain));
            return;
        }
        self.last_fetch = Some(now);
        info!("asking the authentication manager to fetch a token");
        self.call(TO_MANAGER, "FetchJwtToken", &[]);
    }
}

impl Manager {
    /// The first [`Source::process`] connects, and fails if the bus is `required` but missing.
    pub(crate) fn new(wake: Arc<Wake>, required: bool) -> Self {
        Manager {
            wake,
            bus: Bus::Down(Instant::now()),
            fatal: required,
            retry_delay: FIRST_RETRY,
            owner: None,
            owner_query: None,
            question: None,
            timer: None,
            lacks_server: false,
            last_fetch: None,
            reads: 0,
            events: Vec::new(),
        }
    }

    fn channel(&self) -> Option<&Channel> {
        if let Bus::Up(channel, _) = &self.bus { Some(channel) } else { None }
    }

    /// Our unique name; `None` while disconnected.
    pub(crate) fn name(&self) -> Option<&str> {
        self.channel()?.unique_name()
    }

    /// For doctor: waits until [`Source::process`] is due, at most until `limit`, and calls it.
    pub(crate) fn wait(&mut self, limit: Instant) -> io::Result<Vec<AuthEvent>> {
        let mut set = PollSet::default();
        set.add(self.wake.as_fd(), PollFlags::POLLIN);
        self.watch(&mut set);
        set.until(&[Some(limit)]);
        set.wait()?;
        self.wake.clear();
        self.process(Instant::now())
    }

    fn came_up(&mut self, bus: Bus, now: Instant) {
        debug!("connected to the system bus");
        (self.bus, self.reads) = (bus, 0);
        (self.fatal, self.retry_delay) = (false, FIRST_RETRY);
        for rule in [
            format!("type='signal',sender='{MANAGER}',interface='{INTERFACE}',member='JwtTokenStateChange'"),
            format!("type='signal',sender='{BUS}',member='NameOwnerChanged',arg0='{MANAGER}'"),
        ] {
            self.call(TO_BUS, "AddMatch", &[&rule]);
        }
        self.owner_query = self.call(TO_BUS, "GetNameOwner", &[MANAGER]);
        self.ask(now);
    }

    fn went_down(&mut self, now: Instant, why: &str) {
        warn!("no system bus: {why}; trying again in {:.1} s", self.retry_delay.as_secs_f64());
        self.bus = Bus::Down(now + self.retry_delay);
        self.retry_delay = (self.retry_delay * 2).min(LAST_RETRY);
        self.owner = None;
        if let Some((at, Timer::Unanswered)) = &mut self.timer {
            *at = now;
        }
    }

    /// Returns the serial number; `None` without a bus.
    fn call(&self, [to, path, interface]: [&str; 3], method: &str, arguments: &[&str]) -> Option<u32> {
        let mut message = Message::new_method_call(to, path, interface, method).ok()?;
        for argument in arguments {
            message = message.append1(argument);
        }
        self.channel()?.send(message).ok()
    }

    fn receive(&mut self, now: Instant) {
        for _ in 0..MAX_READS {
            let Bus::Up(channel, socket) = &self.bus else { return };
            let readable = is_ready(socket, PollFlags::POLLIN);
            let alive = channel.read_write(Some(Duration::ZERO)).is_ok();
            let messages: Vec<_> = std::iter::from_fn(|| channel.pop_message()).collect();
            self.reads = if messages.is_empty() { self.reads + usize::from(readable) } else { 0 };
            messages.into_iter().for_each(|message| self.handle(message, now));
            match self.reads > LARGEST_MESSAGE {
                true => self.went_down(now, "a message is too large"),
                // Unless a Disconnected signal has already reported it.
                false if !alive && self.channel().is_some() => self.went_down(now, LOST),
                false => {}
            }
            if !readable {
                return;
            }
        }
    }

    fn handle(&mut self, mut message: Message, now: Instant) {
        match (message.msg_type(), message.get_reply_serial()) {
            (MessageType::Signal, _) => self.handle_signal(&message, now),
            (MessageType::MethodCall, _) => {
                if let (Some(channel), Some(reply)) = (self.channel(), default_reply(&message)) {
                    let _ = channel.send(reply);
                }
            }
            (_, Some(serial)) if Some(serial) == self.question => self.handle_answer(&mut message, now),
            (_, Some(serial)) if Some(serial) == self.owner_query => {
                self.owner = message.as_result().ok().and_then(|m| m.get1::<String>());
                debug!("the authentication manager is {:?}", self.owner);
            }
            _ => {
                if let Err(e) = message.as_result() {
                    debug!("a call on the bus failed: {}", describe(&e));
                }
            }
        }
        wipe_texts(&mut message);
    }

    fn handle_answer(&mut self, message: &mut Message, now: Instant) {
        match message.as_result().map(|answer| answer.read2::<&str, &str>()) {
            Ok(Ok((token, url))) => {
                trace!("GetJwtToken: {} bytes of token", token.len());
                self.timer = None;
                self.lacks_server = !token.is_empty() && url.is_empty();
                self.events.push(AuthEvent::Answered(Ok(Credentials::new(token, url))));
            }
            Ok(Err(e)) => self.unanswered(Refusal::Failed(format!("unexpected types: {e}")), now),
            Err(e) => {
                self.unanswered(refusal(&e, self.owner.is_some()), now);
                if self.owner.is_none() {
                    // Don't ask again: NameOwnerChanged will announce the manager.
                    self.timer = None;
                }
            }
        }
    }

    fn unanswered(&mut self, why: Refusal, now: Instant) {
        warn!("call to GetJWTToken on the Mender D-Bus API failed: {why}");
        self.events.push(AuthEvent::Answered(Err(why)));
        self.timer = self.channel().map(|_| (now + ASK_AGAIN, Timer::AskAgain));
    }

    fn handle_signal(&mut self, message: &Message, now: Instant) {
        let sender = message.sender();
        let sender = sender.as_deref().unwrap_or_default();
        let path = message.path();
        match (message.interface().as_deref(), message.member().as_deref()) {
            (Some(INTERFACE), Some("JwtTokenStateChange")) => {
                if self.owner.as_deref() != Some(sender) || path.as_deref() != Some(PATH) {
                    debug!("ignoring a token from {sender}, who isn't the authentication manager");
                    return;
                }
                match message.read2::<&str, &str>() {
                    Ok((token, url)) => announce(&mut self.events, Credentials::new(token, url)),
                    Err(e) => warn!("ignoring a JwtTokenStateChange signal with unexpected types: {e}"),
                }
            }
            (Some(BUS), Some("NameOwnerChanged")) if sender == BUS => {
                if let (Some(MANAGER), _, Some(new)) = message.get3::<&str, &str, &str>() {
                    debug!("the authentication manager is now {new:?}");
                    self.owner = (!new.is_empty()).then(|| new.to_owned());
                    if self.owner.is_some() {
                        self.ask(now);
                    }
                }
            }
            (Some("org.freedesktop.DBus.Local"), Some("Disconnected")) => self.went_down(now, LOST),
            _ => {}
        }
    }
}

impl Bus {
    fn connect(wake: &Arc<Wake>) -> Result<Self, String> {
        let (sender, result) = crossbeam_channel::bounded(1);
        let wake = Arc::clone(wake);
        let body = move || {
            let channel = Channel::get_private(BusType::System).map_err(|e| describe(&e));
            let _ = sender.send(channel.and_then(|mut channel| {
                channel.set_watch_enabled(true);
                let socket = duplicate_socket(&mut channel).map_err(|e| reason(&e))?;
                Ok(Bus::Up(channel, socket))
            }));
            wake.notify();
        };
        thread::spawn("bus-connect", thread::LARGE_STACK, body).map_err(|e| reason(&e))?;
        Ok(Bus::Connecting(result))
    }
}

/// Drops a queued token that this one supersedes. Revocations are kept.
fn announce(events: &mut Vec<AuthEvent>, token: Option<Credentials>) {
    if token.is_some() {
        events.pop_if(|last| matches!(last, AuthEvent::Changed(Some(_))));
    }
    events.push(AuthEvent::Changed(token));
}

fn describe(error: &dbus::Error) -> String {
    let message = error.message().filter(|message| !message.is_empty());
    message.or(error.name()).unwrap_or("unknown error").to_owned()
}

/// Without an owner the bus answers: it can't start the manager.
fn refusal(error: &dbus::Error, has_owner: bool) -> Refusal {
    let why = describe(error);
    match error.name().and_then(|name| name.strip_prefix("org.freedesktop.DBus.Error.")) {
        Some("AccessDenied") => Refusal::Denied(why),
        Some("NoReply" | "Timeout" | "TimedOut") => Refusal::Silent(why),
        _ if has_owner => Refusal::Failed(why),
        _ => Refusal::Absent(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manager that restarts twice in a minute has lost the token that it fetched in between.
    #[test]
    #[cfg_attr(miri, ignore = "Miri has no libdbus")]
    fn a_fetch_too_soon_is_put_off() {
        let now = Instant::now();
        let mut manager = Manager::new(Arc::new(Wake::new().unwrap()), false);
        manager.bus = Bus::Down(now + LAST_RETRY * 10);
        manager.fetch(now);
        assert_eq!(manager.timer.map(|(at, _)| at), None);
        manager.fetch(now + LAST_RETRY);
        assert_eq!(manager.timer.map(|(at, _)| at), Some(now + FETCH_INTERVAL));
    }

    #[test]
    fn only_the_last_of_piled_up_tokens_counts() {
        let token = |name| Credentials::new(name, "http://x");
        let mut events = Vec::new();
        for announced in [token("a"), token("b"), None, token("c"), token("d")] {
            announce(&mut events, announced);
        }
        assert_eq!(events, [token("b"), None, token("d")].map(AuthEvent::Changed));
    }
}

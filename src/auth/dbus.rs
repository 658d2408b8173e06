//! The authentication manager on the system bus (`io.mender.AuthenticationManager`).
//!
//! Runs in the supervisor's thread and never blocks it: it sends calls and recognises their answers later
//! by serial number. Only connecting to the bus blocks, and so has a thread of its own.
//!
//! The manager may come, go and be replaced at any time, and so may the bus. Its signals are taken only
//! from the owner of its name.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use dbus::Message;
use dbus::channel::{BusType, Channel, default_reply};
use dbus::message::{MatchRule, MessageType};
use log::{debug, info, trace, warn};
use nix::poll::PollFlags;

use super::{AuthEvent, Credentials, Refusal, Source, SourceError};
use crate::sys::wake::Wake;
use crate::sys::wipe::wipe_texts;
use crate::sys::{PollSet, duplicate_socket, reason, thread};

const MANAGER: &str = "io.mender.AuthenticationManager";
const PATH: &str = "/io/mender/AuthenticationManager";
const INTERFACE: &str = "io.mender.Authentication1";
const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";
const BUS_LOCAL: &str = "org.freedesktop.DBus.Local";

/// A later answer still counts.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// A manager that didn't answer is asked again after this time.
const ASK_AGAIN: Duration = Duration::from_secs(30);
/// At least this long between fetches, since each disturbs the manager's other users.
const FETCH_INTERVAL: Duration = Duration::from_secs(60);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(30);

pub(crate) struct Manager {
    wake: Arc<Wake>,
    bus: Bus,
    /// The absence of a bus ends the daemon: until the first connection, if the bus is required.
    fatal: bool,
    retry_delay: Duration,
    /// The unique name of the manager's connection.
    pub(crate) owner: Option<String>,
    owner_query: Option<u32>,
    question: Option<Question>,
    /// The last answer had a token but no server. For doctor: to the daemon it is no token.
    pub(crate) lacks_server: bool,
    ask_again: Option<Instant>,
    last_fetch: Option<Instant>,
}

enum Bus {
    Connecting(Receiver<Result<Channel, dbus::Error>>),
    /// `socket` duplicates the channel's, to poll.
    Up {
        channel: Channel,
        socket: OwnedFd,
    },
    Down {
        until: Instant,
    },
}

struct Question {
    serial: u32,
    /// When the question counts as unanswered; `None` afterwards.
    patience: Option<Instant>,
}

impl Manager {
    /// Starts connecting to the system bus (DBUS_SYSTEM_BUS_ADDRESS is honoured) and calls `wake` with the result. If
    /// the bus is `required`, its absence is an error, and so is that of a thread to connect in.
    pub(crate) fn connect(wake: Arc<Wake>, required: bool) -> Result<Self, SourceError> {
        let bus = match Bus::connect(&wake) {
            Err(e) if required => return Err(e.into()),
            result => result.unwrap_or_else(|_| Bus::Down { until: Instant::now() + FIRST_RETRY }),
        };
        Ok(Manager {
            wake,
            bus,
            fatal: required,
            retry_delay: FIRST_RETRY,
            owner: None,
            owner_query: None,
            question: None,
            lacks_server: false,
            ask_again: None,
            last_fetch: None,
        })
    }
}

impl Source for Manager {
    fn watch(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let Bus::Up { channel, socket } = &self.bus else { return None };
        let watch = channel.watch();
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, watch.read);
        events.set(PollFlags::POLLOUT, watch.write);
        Some((socket.as_fd(), events))
    }

    fn deadline(&self) -> Option<Instant> {
        let retry = match &self.bus {
            Bus::Down { until } => Some(*until),
            _ => None,
        };
        let patience = self.question.as_ref().and_then(|q| q.patience);
        [retry, patience, self.ask_again].into_iter().flatten().min()
    }

    fn process(&mut self, now: Instant) -> Result<Vec<AuthEvent>, SourceError> {
        let mut events = Vec::new();
        match &self.bus {
            Bus::Connecting(answer) => match answer.try_recv() {
                Ok(Ok(channel)) => self.came_up(channel, now),
                Ok(Err(e)) if self.fatal => return Err(SourceError::Bus(describe(&e))),
                Ok(Err(e)) => self.went_down(now, &describe(&e)),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => self.went_down(now, "the connecting thread failed"),
            },
            Bus::Down { until } if now >= *until => match Bus::connect(&self.wake) {
                Ok(bus) => self.bus = bus,
                Err(e) => self.went_down(now, &reason(&e)),
            },
            Bus::Down { .. } | Bus::Up { .. } => {}
        }
        self.receive(now, &mut events);
        if self.question.as_ref().and_then(|q| q.patience).is_some_and(|at| now >= at) {
            if let Some(question) = &mut self.question {
                question.patience = None;
            }
            self.unanswered(Refusal::Silent("no answer".to_owned()), now, &mut events);
        }
        if self.ask_again.is_some_and(|at| now >= at) {
            self.ask(now);
        }
        Ok(events)
    }

    fn ask(&mut self, now: Instant) {
        self.ask_again = None;
        let serial = self.call(MANAGER, PATH, INTERFACE, "GetJwtToken", &[]);
        // Without a bus there is no answer to wait for: the question expires at once.
        let patience = Some(if serial.is_some() { now + ANSWER_LIMIT } else { now });
        self.question = Some(Question { serial: serial.unwrap_or(0), patience });
    }

    fn fetch(&mut self, now: Instant) {
        if self.last_fetch.is_some_and(|at| now < at + FETCH_INTERVAL) {
            return;
        }
        self.last_fetch = Some(now);
        info!("asking the authentication manager to fetch a token");
        self.call(MANAGER, PATH, INTERFACE, "FetchJwtToken", &[]);
    }
}

impl Manager {
    /// Our unique name on the bus; `None` while there is no connection.
    pub(crate) fn name(&self) -> Option<&str> {
        let Bus::Up { channel, .. } = &self.bus else { return None };
        channel.unique_name()
    }

    /// Waits until [`Source::process`] is due, at most until `limit`, and calls it. For doctor, which has nothing else
    /// to wait for.
    pub(crate) fn wait(&mut self, limit: Instant) -> Result<Vec<AuthEvent>, SourceError> {
        let mut set = PollSet::new();
        set.add(self.wake.as_fd(), PollFlags::POLLIN);
        if let Some((socket, events)) = self.watch() {
            set.add(socket, events);
        }
        set.wait(self.deadline().into_iter().chain([limit]).min())?;
        self.wake.clear();
        self.process(Instant::now())
    }

    fn came_up(&mut self, mut channel: Channel, now: Instant) {
        channel.set_watch_enabled(true);
        let socket = match duplicate_socket(&mut channel) {
            Ok(socket) => socket,
            Err(e) => return self.went_down(now, &reason(&e)),
        };
        debug!("connected to the system bus");
        self.bus = Bus::Up { channel, socket };
        (self.fatal, self.retry_delay) = (false, FIRST_RETRY);
        let announcements = MatchRule::new_signal(INTERFACE, "JwtTokenStateChange").with_sender(MANAGER);
        let owners =
            format!("{},arg0='{MANAGER}'", MatchRule::new_signal(BUS, "NameOwnerChanged").match_str());
        for rule in [announcements.match_str(), owners] {
            self.call(BUS, BUS_PATH, BUS, "AddMatch", &[&rule]);
        }
        self.owner_query = self.call(BUS, BUS_PATH, BUS, "GetNameOwner", &[MANAGER]);
        self.ask(now);
    }

    fn went_down(&mut self, now: Instant, why: &str) {
        warn!("no system bus: {why}; trying again in {:.1} s", self.retry_delay.as_secs_f32());
        self.bus = Bus::Down { until: now + self.retry_delay };
        self.retry_delay = (self.retry_delay * 2).min(LAST_RETRY);
        (self.owner, self.owner_query) = (None, None);
        if let Some(question) = &mut self.question {
            question.patience = question.patience.map(|_| now);
        }
    }

    /// `None` if there is no bus to send the call on.
    fn call(&self, to: &str, path: &str, interface: &str, method: &str, arguments: &[&str]) -> Option<u32> {
        let Bus::Up { channel, .. } = &self.bus else { return None };
        let mut message = Message::new_method_call(to, path, interface, method).ok()?;
        for argument in arguments {
            message = message.append1(argument);
        }
        channel.send(message).ok()
    }

    fn receive(&mut self, now: Instant, events: &mut Vec<AuthEvent>) {
        loop {
            let Bus::Up { channel, .. } = &self.bus else { return };
            let alive = channel.read_write(Some(Duration::ZERO)).is_ok();
            let mut idle = true;
            while let Bus::Up { channel, .. } = &self.bus {
                let Some(message) = channel.pop_message() else { break };
                idle = false;
                self.handle(message, now, events);
            }
            if let (Bus::Up { .. }, false) = (&self.bus, alive) {
                self.went_down(now, "the connection was lost");
            }
            if idle {
                return;
            }
        }
    }

    fn handle(&mut self, mut message: Message, now: Instant, events: &mut Vec<AuthEvent>) {
        match message.msg_type() {
            MessageType::Signal => self.handle_signal(&message, now, events),
            MessageType::MethodReturn | MessageType::Error => {
                let serial = message.get_reply_serial();
                if serial.is_some() && serial == self.owner_query {
                    self.owner_query = None;
                    self.owner = message.as_result().ok().and_then(|m| m.get1::<String>());
                    debug!("the authentication manager is {:?}", self.owner);
                } else if self.question.as_ref().is_some_and(|q| Some(q.serial) == serial) {
                    self.handle_answer(&mut message, now, events);
                } else if let Err(e) = message.as_result() {
                    debug!("a call on the bus failed: {}", describe(&e));
                }
            }
            MessageType::MethodCall => {
                if let (Bus::Up { channel, .. }, Some(reply)) = (&self.bus, default_reply(&message)) {
                    let _ = channel.send(reply);
                }
            }
        }
        wipe_texts(&mut message);
    }

    fn handle_answer(&mut self, message: &mut Message, now: Instant, events: &mut Vec<AuthEvent>) {
        self.question = None;
        match message.as_result() {
            Ok(answer) => match answer.read2::<&str, &str>() {
                Ok((token, url)) => {
                    trace!("GetJwtToken: {} bytes of token", token.len());
                    self.lacks_server = !token.is_empty() && url.is_empty();
                    events.push(AuthEvent::Answered(Credentials::new(token, url)));
                }
                Err(e) => {
                    self.unanswered(Refusal::Failed(format!("unexpected types: {e}")), now, events);
                }
            },
            Err(e) => {
                self.unanswered(refusal(&e), now, events);
                if self.owner.is_none() {
                    // NameOwnerChanged will announce the manager.
                    self.ask_again = None;
                }
            }
        }
    }

    fn unanswered(&mut self, why: Refusal, now: Instant, events: &mut Vec<AuthEvent>) {
        warn!("call to GetJWTToken on the Mender D-Bus API failed: {why}");
        events.push(AuthEvent::Unanswered(why));
        if matches!(self.bus, Bus::Up { .. }) {
            self.ask_again = Some(now + ASK_AGAIN);
        }
    }

    fn handle_signal(&mut self, message: &Message, now: Instant, events: &mut Vec<AuthEvent>) {
        let sender = message.sender();
        let sender = sender.as_deref().unwrap_or_default();
        let interface = message.interface();
        let interface = interface.as_deref().unwrap_or_default();
        let member = message.member();
        match (interface, member.as_deref().unwrap_or_default()) {
            (INTERFACE, "JwtTokenStateChange") => {
                let path = message.path();
                if self.owner.as_deref() != Some(sender) || path.as_deref() != Some(PATH) {
                    debug!("ignoring a token from {sender}, who isn't the authentication manager");
                    return;
                }
                match message.read2::<&str, &str>() {
                    Ok((token, url)) => {
                        events.push(AuthEvent::Changed(Credentials::new(token, url)));
                    }
                    Err(e) => warn!("ignoring a JwtTokenStateChange signal with unexpected types: {e}"),
                }
            }
            (BUS, "NameOwnerChanged") if sender == BUS => {
                if let (Some(MANAGER), Some(new)) = (message.get1::<&str>(), third(message)) {
                    debug!("the authentication manager is now {new:?}");
                    self.owner_query = None;
                    self.owner = (!new.is_empty()).then(|| new.to_owned());
                    if self.owner.is_some() {
                        self.ask(now);
                    }
                }
            }
            (BUS_LOCAL, "Disconnected") => self.went_down(now, "the connection was lost"),
            _ => {}
        }
    }
}

fn third(message: &Message) -> Option<&str> {
    let (_, _, third) = message.get3::<&str, &str, &str>();
    third
}

impl Bus {
    fn connect(wake: &Arc<Wake>) -> io::Result<Self> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let wake = Arc::clone(wake);
        thread::spawn("bus-connect", thread::LARGE_STACK, move || {
            let _ = sender.send(Channel::get_private(BusType::System));
            wake.notify();
        })?;
        Ok(Bus::Connecting(receiver))
    }
}

fn describe(error: &dbus::Error) -> String {
    match (error.message(), error.name()) {
        (Some(message), _) if !message.is_empty() => message.to_owned(),
        (_, name) => name.unwrap_or("unknown error").to_owned(),
    }
}

fn refusal(error: &dbus::Error) -> Refusal {
    let why = describe(error);
    match error.name().and_then(|name| name.strip_prefix("org.freedesktop.DBus.Error.")) {
        Some("AccessDenied") => Refusal::Denied(why),
        Some("ServiceUnknown" | "NameHasNoOwner") => Refusal::Absent(why),
        Some("NoReply" | "Timeout" | "TimedOut") => Refusal::Silent(why),
        _ => Refusal::Failed(why),
    }
}

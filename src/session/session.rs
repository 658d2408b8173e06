//! A session's thread: one poll loop over its inbox, its terminal, its forwards and its timers.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use log::{error, info};
use nix::poll::PollFlags;

use super::file_transfer::FileTransfer;
use super::inbox::HangUp;
use super::peer::Peer;
use super::port_forward::PortForward;
use super::terminal::Terminal;
use crate::audit::Record;
use crate::proto::{
    CONTROL, FILE_TRANSFER, Frame, MAX_TEXT, MENDER_CLIENT, PORT_FORWARD, SHELL, clipped, control,
};
use crate::sys::{PollSet, reason, thread};

/// Silence after which the client is asked whether it is there, and after which the session is over.
const PING_AFTER: Duration = Duration::from_secs(48);
const CLOSE_AFTER: Duration = Duration::from_secs(60);

/// One session id, while there is something to do for it.
struct Session {
    peer: Peer,
    terminal: Terminal,
    files: FileTransfer,
    forwards: PortForward,
    /// Runs once another protocol than the terminal's was spoken: terminal clients don't answer these pings.
    idle: Option<Idle>,
    end: End,
}

/// Why a session ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Done,
    Closed,
    Disabled,
    Idle,
    HungUp(HangUp),
    Failed,
}

impl End {
    /// As the audit log has it.
    fn name(self) -> &'static str {
        match self {
            End::Done => "done",
            End::Closed => "closed",
            End::Disabled => "disabled",
            End::Idle => "idle",
            End::HungUp(HangUp::LinkLost) => "link lost",
            End::HungUp(HangUp::Overflow) => "inbox full",
            End::HungUp(HangUp::MakesRoom) => "too many sessions",
            End::Failed => "failed",
        }
    }
}

/// The time since something came in.
struct Idle {
    since: Instant,
    pinged: bool,
}

impl Idle {
    fn deadline(&self) -> Instant {
        self.since + if self.pinged { CLOSE_AFTER } else { PING_AFTER }
    }
}

/// Why a body can't be read. The text may hold some of the body.
fn clipped_reason(error: &impl std::fmt::Display) -> String {
    clipped(&error.to_string(), MAX_TEXT)
}

/// Whether a frame starts the idle timer of a session. Those that the router ignores without a session don't: a `pong`
/// may follow a `close`.
fn starts_idling(frame: &Frame) -> bool {
    match frame.proto {
        SHELL => false,
        CONTROL => !matches!(frame.typ.as_str(), control::CLOSE | control::PONG | control::ERROR),
        _ => true,
    }
}

/// Runs a session in a thread of its own.
pub(crate) fn start(peer: Peer) -> io::Result<()> {
    let name = format!("s-{}", peer.id.as_str());
    // File transfers look up owners and groups.
    thread::spawn(&name, thread::LOOKUP_STACK, move || Session::new(peer).run()).map(drop)
}

impl Session {
    fn new(peer: Peer) -> Self {
        let terminal = Terminal::new(&peer);
        let (files, forwards) = (FileTransfer::default(), PortForward::default());
        Session { peer, terminal, files, forwards, idle: None, end: End::Done }
    }

    fn run(mut self) {
        let started = Instant::now();
        self.record("session-start").log(true);
        if let Err(e) = self.serve() {
            self.fail(&reason(&e));
        }
        let record = self.record("session-end").since(started, Instant::now());
        let Session { peer, terminal, files, forwards, end, .. } = self;
        // Forwards log their own lines before.
        drop((terminal, files, forwards));
        record.text("reason", end.name()).log(end != End::Failed);
        // Who waits for the sessions' ends waits for their last lines, too.
        drop(peer);
    }

    fn record(&self, event: &str) -> Record {
        Record::new(event, Some(&self.peer.id), &self.peer.info.user)
    }

    fn fail(&mut self, reason: &str) {
        self.end = End::Failed;
        error!("session {}: {reason}", self.peer.id);
        self.peer.inbox.close();
        self.peer.reply(&control::error(&self.peer.id, reason, true));
        // What has begun ends in the audit log, too.
        self.terminal.abandon(&self.peer);
        self.files.abort(&self.peer, "failed", "the session failed");
    }

    fn hang_up(&mut self) {
        let now = Instant::now();
        self.idle = None;
        self.terminal.hang_up(now);
        self.files.hang_up(&self.peer, now);
        self.forwards = PortForward::default();
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut hung_up = false;
        loop {
            if let Some(why) = self.peer.inbox.hung_up().filter(|_| !hung_up) {
                hung_up = true;
                self.end = End::HungUp(why);
                self.hang_up();
            }
            self.read_inbox();
            let now = Instant::now();
            self.end_disabled(now);
            self.files.acknowledge(&self.peer);
            self.check_idle(now);
            self.files.proceed(&mut self.peer, now);
            self.forwards.answer(&mut self.peer, now);
            if self.is_over() && self.peer.inbox.close_if_empty() {
                return Ok(());
            }
            let mut set = PollSet::new();
            set.add(self.peer.wake.as_fd(), PollFlags::POLLIN);
            self.terminal.watch(&self.peer, &mut set, now);
            self.forwards.watch(&self.peer, &mut set, now);
            let events = set.wait(self.deadline(now))?;
            // Before anything is looked at: not all who wake the session do so through the inbox.
            self.peer.wake.clear();
            self.terminal.proceed(&mut self.peer, &events, Instant::now());
            self.forwards.proceed(&mut self.peer, &events, Instant::now());
        }
    }

    fn deadline(&self, now: Instant) -> Option<Instant> {
        let idle = self.idle.as_ref().map(Idle::deadline);
        let handlers = [
            self.terminal.deadline(&self.peer, now),
            self.files.deadline(),
            self.forwards.deadline(&self.peer, now),
        ];
        handlers.into_iter().flatten().chain(idle).min()
    }

    /// What the configuration doesn't allow any more ends.
    fn end_disabled(&mut self, now: Instant) {
        let config = self.peer.device.config();
        if !config.terminal.enabled {
            self.terminal.disable(&mut self.peer, now);
        }
        let files = !config.file_transfer && !self.files.is_idle();
        let forwards = !config.port_forward && !self.forwards.is_idle();
        if self.idle.is_some() && (files || forwards) {
            self.end = End::Disabled;
            self.peer.reply(&control::error(&self.peer.id, "disabled by the configuration", true));
            self.close();
        }
    }

    fn is_over(&self) -> bool {
        self.idle.is_none() && self.terminal.is_idle() && self.files.is_idle() && self.forwards.is_idle()
    }

    fn read_inbox(&mut self) {
        while self.terminal.takes_frames() {
            let Some(frame) = self.peer.inbox.pop() else { return };
            self.handle(frame, Instant::now());
        }
    }

    fn handle(&mut self, frame: Frame, now: Instant) {
        self.peer.info.heard(frame.proto, now);
        if self.idle.is_some() || starts_idling(&frame) {
            self.idle = Some(Idle { since: now, pinged: false });
        }
        let config = self.peer.device.config();
        match frame.proto {
            SHELL => self.terminal.handle(&mut self.peer, frame, now),
            CONTROL => self.handle_control(&frame),
            FILE_TRANSFER if config.file_transfer => self.files.handle(&mut self.peer, frame, now),
            PORT_FORWARD if config.port_forward => {
                if !self.forwards.handle(&mut self.peer, &frame, now) {
                    let text = "too many answers wait: the session is closed";
                    self.peer.reply(&control::error_about(&self.peer.id, &frame, text, true));
                    self.peer.inbox.hang_up(HangUp::Overflow);
                }
            }
            other => {
                let text = format!("no handler registered for protocol: 0x{other:04X}");
                self.peer.reply(&control::error_about(&self.peer.id, &frame, &text, false));
            }
        }
    }

    fn handle_control(&mut self, frame: &Frame) {
        match self.answer_control(frame) {
            Ok(None) => {}
            Ok(Some(answer)) => self.peer.reply(&answer),
            Err(refusal) => {
                if let Some(text) = refusal {
                    self.peer.reply(&control::error_about(&self.peer.id, frame, &text, true));
                }
                self.close();
            }
        }
    }

    /// The answer, if there is one. An error ends the session; its text is for the client.
    fn answer_control(&mut self, frame: &Frame) -> Result<Option<Frame>, Option<String>> {
        let id = &self.peer.id;
        match frame.typ.as_str() {
            control::OPEN => match control::parse::<control::Open>(&frame.body) {
                Ok(open) if open.versions.iter().flatten().any(|v| *v == control::VERSION) => {
                    Ok(Some(control::accept(id, &self.protocols())))
                }
                Ok(_) => Err(Some(format!("handshake rejected: require version {}", control::VERSION))),
                Err(e) => Err(Some(format!("failed to decode handshake request: {}", clipped_reason(&e)))),
            },
            control::ACCEPT => match control::parse::<control::Accept>(&frame.body) {
                Ok(accept) if accept.version == control::VERSION => Ok(None),
                Ok(accept) => Err(Some(format!(
                    "unsupported protocol version {}: require version {}",
                    accept.version,
                    control::VERSION
                ))),
                Err(e) => Err(Some(format!("malformed handshake response: {}", clipped_reason(&e)))),
            },
            control::PING => Ok(Some(control::pong(id))),
            control::PONG => {
                self.peer.credit.answered();
                Ok(None)
            }
            control::CLOSE => {
                self.end = End::Closed;
                Err(None)
            }
            control::ERROR => {
                let error = control::parse::<control::Error>(&frame.body).unwrap_or_default();
                let text = error.err.unwrap_or_default();
                info!("session {id}: error from the client: {:?}", clipped(&text, MAX_TEXT));
                if error.close.unwrap_or(false) { Err(None) } else { Ok(None) }
            }
            other => {
                let text = format!("session: control type message not understood: '{other}'");
                Ok(Some(control::error_about(id, frame, &text, false)))
            }
        }
    }

    /// Ends everything but a shell, which session control doesn't govern.
    fn close(&mut self) {
        self.idle = None;
        self.files.close(&self.peer);
        self.forwards.close(Instant::now());
    }

    /// The protocols that a session may speak.
    fn protocols(&self) -> Vec<u16> {
        let config = self.peer.device.config();
        let enabled = [
            (SHELL, config.terminal.enabled),
            (FILE_TRANSFER, config.file_transfer),
            (PORT_FORWARD, config.port_forward),
            (MENDER_CLIENT, config.mender_client),
        ];
        enabled.into_iter().filter_map(|(protocol, enabled)| enabled.then_some(protocol)).collect()
    }

    fn check_idle(&mut self, now: Instant) {
        match &mut self.idle {
            Some(idle) if now >= idle.since + CLOSE_AFTER => {
                self.end = End::Idle;
                self.peer.reply(&control::error(&self.peer.id, "session timeout", true));
                self.close();
            }
            Some(idle) if !idle.pinged && now >= idle.since + PING_AFTER => {
                idle.pinged = true;
                self.peer.ping(now);
            }
            _ => {}
        }
    }
}

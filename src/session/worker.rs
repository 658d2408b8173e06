//! A session's thread: one poll loop.

use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{error, info};
use nix::poll::PollFlags;

use super::file_transfer::FileTransfer;
use super::inbox::Inbox;
use super::port_forward::PortForward;
use super::router::Seat;
use super::terminal::Terminal;
use super::{Context, Info, THREAD_PREFIX};
use crate::audit::Record;
use crate::outbox::FrameSink;
use crate::proto::{
    CONTROL, FILE_TRANSFER, Frame, MAX_TEXT, MENDER_CLIENT, PORT_FORWARD, SHELL, SessionId, clipped, control,
};
use crate::sys::wake::Wake;
use crate::sys::{PollSet, thread};

/// Silence after which the peer is asked whether it is there, and after which the session is over.
const PING_AFTER: Duration = Duration::from_secs(48);
const CLOSE_AFTER: Duration = Duration::from_secs(60);

/// In the audit log, of a session that couldn't go on.
const FAILED: &str = "failed";

/// One session id, while there is something to do for it.
struct Session {
    id: SessionId,
    context: Arc<Context>,
    inbox: Arc<Inbox>,
    wake: Arc<Wake>,
    sink: FrameSink,
    info: Arc<Info>,
    terminal: Terminal,
    files: FileTransfer,
    forwards: PortForward,
    /// Runs once another protocol than the terminal's was spoken: terminal clients don't answer pings.
    idle: Option<Idle>,
    /// Why it ends, as the audit log has it.
    end: &'static str,
}

/// Why a body can't be read; its text may hold some of the body.
fn words(error: &impl std::fmt::Display) -> String {
    clipped(&error.to_string(), MAX_TEXT)
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

/// Runs a session in a thread of its own.
///
/// # Errors
/// When no thread can be had.
pub fn start(context: &Arc<Context>, seat: Seat) -> io::Result<()> {
    let session = Session::new(Arc::clone(context), &seat);
    let name = format!("{THREAD_PREFIX}{}", seat.id.as_str());
    let body = move || {
        session.run();
        drop(seat);
    };
    // File transfers look up owners and groups.
    thread::spawn(&name, thread::LOOKUP_STACK, body).map(drop)
}

impl Session {
    fn new(context: Arc<Context>, seat: &Seat) -> Self {
        let (id, inbox, wake) = (seat.id.clone(), Arc::clone(&seat.inbox), Arc::clone(&seat.wake));
        let (sink, info) = (seat.sink.clone(), Arc::clone(&seat.info));
        let terminal = Terminal::new(Arc::clone(&context), id.clone(), sink.clone(), Arc::clone(&info));
        let files = FileTransfer::new(
            Arc::clone(&context),
            id.clone(),
            sink.clone(),
            Arc::clone(&wake),
            Arc::clone(&info),
        );
        let forwards = PortForward::new(
            Arc::clone(&context),
            id.clone(),
            sink.clone(),
            Arc::clone(&wake),
            Arc::clone(&info),
        );
        Session { id, context, inbox, wake, sink, info, terminal, files, forwards, idle: None, end: "done" }
    }

    /// Runs until the session is over. A panic ends only this session, where the build unwinds.
    fn run(mut self) {
        let started = Instant::now();
        self.record("session-start").log(true);
        match catch_unwind(AssertUnwindSafe(|| self.serve())) {
            Ok(Ok(())) => {}
            Ok(Err(e)) => self.fail(&crate::sys::reason(&e)),
            Err(_) => self.fail("internal error"),
        }
        let record = self.record("session-end").since(started, Instant::now());
        let (good, end) = (self.end != FAILED, self.end);
        // What it has leaves its own lines before.
        drop(self);
        record.text("reason", end).log(good);
    }

    fn record(&self, event: &str) -> Record {
        Record::new(event, Some(&self.id), &self.info.user)
    }

    fn fail(&mut self, reason: &str) {
        self.end = FAILED;
        error!("session {}: {reason}", self.id);
        self.inbox.close();
        self.sink.reply(&control::error(&self.id, reason, true));
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut gone = false;
        loop {
            if !gone && self.inbox.is_hung_up() {
                gone = true;
                self.end = "link lost";
                self.idle = None;
                self.terminal.hang_up(Instant::now());
                self.files.hang_up(Instant::now());
                self.forwards.hang_up();
            }
            self.read_inbox();
            self.end_disabled(Instant::now());
            self.files.acknowledge();
            self.check_idle(Instant::now());
            self.files.proceed(Instant::now());
            if self.is_over() && self.inbox.close_if_empty() {
                return Ok(());
            }
            let (terminal, forwards) = {
                let (mut set, now) = (PollSet::new(), Instant::now());
                set.add(self.wake.as_fd(), PollFlags::POLLIN);
                let terminal = self.terminal.watch(&mut set, now);
                let forwards = self.forwards.watch(&mut set);
                let timer = self.idle.as_ref().map(Idle::deadline);
                let deadlines =
                    [timer, self.terminal.deadline(now), self.files.deadline(), self.forwards.deadline()];
                let deadline = deadlines.into_iter().flatten().min();
                set.wait(deadline)?;
                (terminal.look(&set), forwards.look(&set))
            };
            // Before anything is looked at: not all who call do so through the inbox.
            self.wake.clear();
            self.terminal.proceed(terminal, Instant::now());
            self.forwards.proceed(forwards, Instant::now());
        }
    }

    /// What the configuration doesn't allow any more ends.
    fn end_disabled(&mut self, now: Instant) {
        let config = self.context.config();
        if !config.terminal.enabled {
            self.terminal.disable(now);
        }
        let files = !config.file_transfer && !self.files.is_idle();
        let forwards = !config.port_forward && !self.forwards.is_idle();
        if self.idle.is_some() && (files || forwards) {
            self.end = "disabled";
            self.sink.reply(&control::error(&self.id, "disabled by the configuration", true));
            self.close();
        }
    }

    fn is_over(&self) -> bool {
        self.idle.is_none() && self.terminal.is_idle() && self.files.is_idle() && self.forwards.is_idle()
    }

    /// Reads what has come, as long as it can be dealt with and the answers can be taken away.
    fn read_inbox(&mut self) {
        while self.sink.takes_replies() && self.terminal.takes_frames() {
            let Some(frame) = self.inbox.pop() else { return };
            self.handle(frame, Instant::now());
        }
    }

    fn handle(&mut self, frame: Frame, now: Instant) {
        self.info.heard(frame.proto, now);
        if frame.proto != SHELL || self.idle.is_some() {
            self.idle = Some(Idle { since: now, pinged: false });
        }
        match frame.proto {
            SHELL => self.terminal.handle(frame, now),
            CONTROL => self.handle_control(&frame),
            FILE_TRANSFER if self.context.config().file_transfer => self.files.handle(frame, now),
            PORT_FORWARD if self.context.config().port_forward => self.forwards.handle(&frame, now),
            other => {
                let text = format!("no handler registered for protocol: 0x{other:04X}");
                self.sink.reply(&control::error_about(&self.id, &frame, &text, false));
            }
        }
    }

    fn handle_control(&mut self, frame: &Frame) {
        let mut over = false;
        let mut refuse = |text: String| {
            over = true;
            control::error_about(&self.id, frame, &text, true)
        };
        let answer = match frame.typ.as_str() {
            control::OPEN => Some(match control::parse::<control::Open>(&frame.body) {
                Ok(open) if open.versions.iter().flatten().any(|v| *v == control::VERSION) => {
                    control::accept(&self.id, &self.protocols())
                }
                Ok(_) => refuse(format!("handshake rejected: require version {}", control::VERSION)),
                Err(e) => refuse(format!("failed to decode handshake request: {}", words(&e))),
            }),
            control::ACCEPT => match control::parse::<control::Accept>(&frame.body) {
                Ok(accept) if accept.version == control::VERSION => None,
                Ok(accept) => Some(refuse(format!(
                    "unsupported protocol version {}: require version {}",
                    accept.version,
                    control::VERSION
                ))),
                Err(e) => Some(refuse(format!("malformed handshake response: {}", words(&e)))),
            },
            control::PING => Some(control::pong(&self.id)),
            control::PONG => None,
            control::CLOSE => {
                self.end = "closed";
                over = true;
                None
            }
            control::ERROR => {
                let error = control::parse::<control::Error>(&frame.body).unwrap_or_default();
                let text = error.err.unwrap_or_default();
                info!("session {}: error from the peer: {:?}", self.id, clipped(&text, MAX_TEXT));
                over = error.close.unwrap_or(false);
                None
            }
            other => {
                let text = format!("session: control type message not understood: '{other}'");
                Some(control::error_about(&self.id, frame, &text, false))
            }
        };
        if let Some(answer) = answer {
            self.sink.reply(&answer);
        }
        if over {
            self.close();
        }
    }

    /// The session is over, but for a shell that it has besides: that is none of session control's business.
    fn close(&mut self) {
        self.idle = None;
        self.files.close();
        self.forwards.close(Instant::now());
    }

    /// The protocols that are there for a session.
    fn protocols(&self) -> Vec<u16> {
        let config = self.context.config();
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
                self.end = "idle";
                self.sink.reply(&control::error(&self.id, "session timeout", true));
                self.close();
            }
            Some(idle) if !idle.pinged && now >= idle.since + PING_AFTER => {
                idle.pinged = true;
                self.sink.reply(&control::ping(&self.id));
            }
            _ => {}
        }
    }
}

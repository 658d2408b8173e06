//! A session's thread: one poll loop over its inbox, its terminal, its forwards and its timers. With a shell to keep it
//! outlives its link, until another session of the user takes the shell over.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use log::error;
use nix::poll::PollFlags;

use super::file_transfer::FileTransfer;
use super::inbox::HangUp;
use super::peer::Peer;
use super::port_forward::PortForward;
use super::router::{MAKING_ROOM, MAX_SESSIONS};
use super::shells::Admission;
use super::terminal::{self, Terminal};
use crate::audit::Record;
use crate::proto::control::{self, VERSION};
use crate::proto::{CONTROL, FILE_TRANSFER, Frame, MENDER_CLIENT, PORT_FORWARD, SHELL, clipped, shell};
use crate::sys::{PollSet, reason, thread};

/// Silence before the client is pinged, and before the session ends.
const PING_AFTER: Duration = Duration::from_secs(48);
const CLOSE_AFTER: Duration = Duration::from_secs(60);
/// A slow user's server acknowledges the tenth chunk when it has passed it on, and answers pings no sooner.
const SENDING: Duration = Duration::from_secs(540);
/// Time that a `new` waits for answers of the user's other clients.
const WAITING_LIMIT: Duration = terminal::ANSWER_LIMIT.saturating_add(Duration::from_millis(400));

struct Session {
    peer: Peer,
    terminal: Terminal,
    files: FileTransfer,
    forwards: PortForward,
    /// Set once the client has spoken another protocol than the terminal's: terminal clients don't answer these pings.
    ping_at: Option<Instant>,
    close_at: Option<Instant>,
    hung_up: bool,
    /// Reason for the audit log; `None` if the session continues on the next link.
    end: Option<&'static str>,
    /// A `new` that waits for answers of the user's other clients, and its deadline.
    waiting: Option<(Frame, Instant)>,
}

pub(crate) fn start(peer: Peer, terminal: Terminal) -> io::Result<()> {
    let name = format!("s-{}", peer.id);
    let run = move || {
        let (files, forwards, ping_at, close_at, hung_up, waiting) = Default::default();
        let end = Some("done");
        Session { peer, terminal, files, forwards, ping_at, close_at, hung_up, end, waiting }.run();
    };
    // File transfers look up owners and groups, which takes stack in glibc.
    thread::spawn(&name, thread::LOOKUP_STACK, run).map(drop)
}

impl Session {
    fn run(mut self) {
        // One that goes on by another link, with its shell, has this line already.
        if self.peer.admission.is_none() || self.peer.info.shell().is_none() {
            Record::new("session-start", Some(&self.peer.id), &self.peer.info.user).log(true);
        }
        let served = self.serve();
        if let Err(e) = &served {
            let reason = reason(e);
            self.end = Some("failed");
            error!("session {}: {reason}", self.peer.id);
            self.peer.inbox.close();
            self.peer.reply(&control::error(&self.peer.id, &reason, true));
            // The audit log has an end for each shell and transfer that has begun.
            terminal::log_end(&self.peer, "", "failed", Instant::now());
            self.files.abort(&self.peer, &"the session failed".into());
        }
        let Session { peer, terminal, files, forwards, end, .. } = self;
        // First, since forwards log their own lines.
        drop((terminal, files, forwards));
        if let Some(why) = end {
            Record::new("session-end", Some(&peer.id), &peer.info.user)
                .since(peer.info.traffic.since, Instant::now())
                .text("reason", why)
                .log(served.is_ok());
        }
        // Last: the daemon ends when no session is left, and must not miss these lines.
        drop(peer);
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            if let Some(why) = self.peer.inbox.hung_up().filter(|_| !self.hung_up) {
                self.hang_up(why, Instant::now());
            }
            if let Some(end) = self.terminal.follow_call(&mut self.peer, Instant::now()) {
                self.end = end;
            }
            if let Some((request, until)) = self.waiting.take() {
                self.open_terminal(request, until, Instant::now());
            }
            while self.waiting.is_none()
                && let Some(frame) = self.peer.inbox.pop(|frame| self.terminal.takes(frame))
            {
                self.handle(frame, Instant::now());
            }
            let now = Instant::now();
            if let Some(why) = self.terminal.left.take() {
                self.lose_client(why, self.has_only_terminal(), now);
            }
            self.check_end(now);
            self.files.acknowledge(&self.peer);
            self.files.proceed(&mut self.peer, now);
            self.forwards.answer(&mut self.peer, now);
            if self.is_over() && self.peer.inbox.close_if_empty() {
                return Ok(());
            }
            let mut set = PollSet::default();
            set.add(self.peer.wake.as_fd(), PollFlags::POLLIN);
            self.terminal.watch(&self.peer, &mut set, now);
            self.forwards.watch(&self.peer, &mut set, now);
            let waiting = self.waiting.as_ref().map(|(_, until)| *until);
            set.until(&[self.files.deadline(), self.ping_at, self.close_at(), waiting]);
            let events = set.wait()?;
            // Cleared before anything is looked at, since others than the inbox wake the session, too.
            self.peer.wake.clear();
            self.terminal.proceed(&mut self.peer, &events, Instant::now());
            self.forwards.proceed(&mut self.peer, &events, Instant::now());
        }
    }

    fn hang_up(&mut self, why: HangUp, now: Instant) {
        // A shell that goes on gets what was typed, and ends if its client wanted that.
        while let Some(frame) = self.peer.inbox.pop(|frame| self.terminal.takes(frame)) {
            self.handle(frame, now);
        }
        self.peer.inbox.close();
        // Whether its user has left, too, matters no more.
        (self.hung_up, self.end, self.terminal.left) = (true, Some(why.name()), None);
        (self.ping_at, self.close_at, self.waiting) = (None, None, None);
        self.files.hang_up(&self.peer, why.name(), now);
        self.forwards.hang_up();
        self.lose_client(why.name(), why == HangUp::LinkLost, now);
    }

    fn lose_client(&mut self, why: &'static str, may_keep: bool, now: Instant) {
        // The router detaches shells when the link is lost, but not one that came here since.
        if self.terminal.is_kept() || may_keep && self.peer.device.detach(&self.peer.info, &self.peer.wake) {
            self.peer.inbox.close();
            self.peer.leave();
            self.terminal.detach(&mut self.peer, why, now);
        } else {
            self.terminal.hang_up(&mut self.peer, why, now);
        }
    }

    fn has_only_terminal(&self) -> bool {
        self.files.is_idle() && self.forwards.is_idle()
    }

    /// Leads a `new` back to a shell of its user, or starts one when the limits allow it.
    fn open_terminal(&mut self, request: Frame, until: Instant, now: Instant) {
        let user = request.user();
        loop {
            let admission = self.peer.admission.take().map(Ok);
            match admission.unwrap_or_else(|| self.peer.admit(&user, now < until)) {
                Ok(Admission::Start(permit)) => {
                    return self.terminal.start(&mut self.peer, permit, &request, now);
                }
                Ok(Admission::Return(handover)) => {
                    if self.terminal.attach(&mut self.peer, &handover, Some(&request), now) {
                        return;
                    }
                    // That shell has ended meanwhile.
                }
                Ok(Admission::Wait) => return self.waiting = Some((request, until)),
                Err(refusal) => return self.peer.reply(&terminal::refusal(&self.peer.id, &user, refusal)),
            }
        }
    }

    fn check_end(&mut self, now: Instant) {
        let config = self.peer.device.config();
        let disabled = !config.file_transfer && !self.files.is_idle()
            || !config.port_forward && !self.forwards.is_idle();
        if self.close_at.is_some() && disabled {
            self.end_because("disabled", "disabled by the configuration");
        } else if self.ping_at.take_if(|at| now >= *at).is_some() {
            // An agent that was stopped has yet to ask.
            self.close_at = self.close_at.max(Some(now + (CLOSE_AFTER - PING_AFTER)));
            self.peer.ping(now);
        } else if self.close_at().is_some_and(|at| now >= at) {
            self.end_because("idle", "session timeout");
        }
    }

    fn close_at(&self) -> Option<Instant> {
        let more = if self.files.is_sending() { SENDING } else { Duration::ZERO };
        self.close_at.map(|at| at + more)
    }

    fn end_because(&mut self, end: &'static str, text: &str) {
        self.end = Some(end);
        self.peer.reply(&control::error(&self.peer.id, text, true));
        self.close();
    }

    /// Session control doesn't govern shells.
    fn close(&mut self) {
        (self.ping_at, self.close_at) = (None, None);
        self.files.close(&self.peer);
        self.forwards.close(Instant::now());
    }

    fn is_over(&self) -> bool {
        self.close_at.is_none()
            && self.terminal.is_idle()
            && self.has_only_terminal()
            && self.waiting.is_none()
    }

    fn handle(&mut self, frame: Frame, now: Instant) {
        if frame.sid.is_none() && !self.terminal.is_meant(&frame) {
            return;
        }
        let is_new = (frame.proto, frame.typ.as_str()) == (SHELL, shell::NEW);
        if !is_new && let Some(Admission::Return(handover)) = self.peer.admission.take() {
            self.terminal.attach(&mut self.peer, &handover, None, now);
        }
        // Frames that the router ignores without a session don't count: a `pong` may follow a `close`.
        let idles = match frame.proto {
            SHELL => false,
            CONTROL => !matches!(frame.typ.as_str(), control::CLOSE | control::PONG | control::ERROR),
            _ => true,
        };
        // A shell's session may be beyond the others' number. One that goes on without its shell would keep its thread from
        // the next one.
        if idles && self.close_at.is_none() && self.peer.device.threads.taken() > MAX_SESSIONS + MAKING_ROOM {
            return self.peer.reply(&control::error_about(&self.peer.id, &frame, "too many sessions", true));
        }
        self.peer.info.heard(frame.proto, now);
        if idles || self.close_at.is_some() {
            (self.ping_at, self.close_at) = (Some(now + PING_AFTER), Some(now + CLOSE_AFTER));
        }
        let config = self.peer.device.config();
        match frame.proto {
            SHELL if is_new && config.terminal && self.terminal.is_idle() => {
                self.open_terminal(frame, now + WAITING_LIMIT, now);
            }
            SHELL => self.terminal.handle(&mut self.peer, frame, now),
            CONTROL => self.handle_control(&frame),
            FILE_TRANSFER if config.file_transfer => self.files.handle(&mut self.peer, frame, now),
            PORT_FORWARD if config.port_forward => {
                if !self.forwards.handle(&mut self.peer, &frame, now) {
                    let text = "too many answers wait: the session is closed";
                    self.peer.reply(&control::error_about(&self.peer.id, &frame, text, true));
                    self.peer.inbox.hang_up(HangUp::InboxFull);
                }
            }
            other => {
                let text = format!("no handler registered for protocol: 0x{other:04X}");
                self.peer.reply(&control::error_about(&self.peer.id, &frame, &text, false));
            }
        }
    }

    fn handle_control(&mut self, frame: &Frame) {
        let id = &self.peer.id;
        let refusal = match frame.typ.as_str() {
            control::OPEN => match control::parse::<control::Open>(&frame.body) {
                Ok(open) if open.versions.iter().flatten().any(|v| *v == VERSION) => {
                    let accept = control::accept(id, &self.protocols());
                    return self.peer.reply(&accept);
                }
                Ok(_) => format!("handshake rejected: require version {VERSION}"),
                Err(e) => format!("failed to decode handshake request: {}", clipped(&e.to_string())),
            },
            control::ACCEPT => match control::parse::<control::Accept>(&frame.body) {
                Ok(accept) if accept.version == VERSION => return,
                Ok(control::Accept { version, .. }) => {
                    format!("unsupported protocol version {version}: require version {VERSION}")
                }
                Err(e) => format!("malformed handshake response: {}", clipped(&e.to_string())),
            },
            control::PING => return self.peer.reply(&control::pong(&self.peer.id)),
            control::PONG => return self.peer.credit.answered(Instant::now()),
            control::CLOSE => {
                self.end = Some("closed");
                return self.close();
            }
            control::ERROR => {
                let error = control::parse::<control::Error>(&frame.body).unwrap_or_default();
                let closes = error.close == Some(true);
                self.peer.log_error(error);
                if closes {
                    self.end = Some("closed");
                    self.close();
                }
                return;
            }
            other => {
                let text = format!("session: control type message not understood: '{other}'");
                return self.peer.reply(&control::error_about(&self.peer.id, frame, &text, false));
            }
        };
        self.peer.reply(&control::error_about(&self.peer.id, frame, &refusal, true));
        self.close();
    }

    fn protocols(&self) -> Vec<u16> {
        let config = self.peer.device.config();
        let enabled = [
            (SHELL, config.terminal),
            (FILE_TRANSFER, config.file_transfer),
            (PORT_FORWARD, config.port_forward),
            (MENDER_CLIENT, config.mender_client),
        ];
        enabled.into_iter().filter_map(|(protocol, enabled)| enabled.then_some(protocol)).collect()
    }
}

//! A session's thread: one poll loop over its inbox, its terminal, its forwards and its timers.
//!
//! It outlives its link where it has a shell to keep: without a client then, until a visitor brings the client of the
//! same or of another session, with which the thread goes on.

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};
use log::{error, info};
use nix::poll::PollFlags;

use super::detached::Kept;
use super::file_transfer::FileTransfer;
use super::inbox::HangUp;
use super::peer::Peer;
use super::port_forward::PortForward;
use super::shells::{MAX_SHELLS, Refusal};
use super::table::Visitor;
use super::terminal::{self, Terminal};
use crate::audit::Record;
use crate::proto::control::{self, VERSION};
use crate::proto::{
    CONTROL, FILE_TRANSFER, Frame, MAX_TEXT, MENDER_CLIENT, PORT_FORWARD, SHELL, clipped, shell,
};
use crate::sys::{PollSet, reason, thread};

/// Silence after which the client is asked whether it is there, and after which the session is over.
const PING_AFTER: Duration = Duration::from_secs(48);
const CLOSE_AFTER: Duration = Duration::from_secs(60);
/// How long a `new` waits for the answers of the user's other clients.
const WAITING_LIMIT: Duration = terminal::ANSWER_LIMIT.saturating_add(Duration::from_millis(400));

struct Session {
    peer: Peer,
    terminal: Terminal,
    files: FileTransfer,
    forwards: PortForward,
    /// When the client is asked whether it is there, and when its silence ends the session. Set once another protocol
    /// than the terminal's was spoken: terminal clients don't answer these pings.
    ping_at: Option<Instant>,
    close_at: Option<Instant>,
    /// The inbox's hang-up has been dealt with.
    hung_up: bool,
    /// Why the session ends, as the audit log has it.
    end: &'static str,
    /// The `new` that waits for the answers of the user's other clients, at most until then.
    waiting: Option<(Frame, Instant)>,
    /// Without a client: since when, and who comes.
    away: Option<(Instant, Receiver<Visitor>)>,
    /// The session goes on in the thread of this shell, with this `new`.
    moves_to: Option<(Kept, Frame)>,
}

/// For a text that may hold some of a client's body.
fn clip(text: &impl ToString) -> String {
    clipped(&text.to_string(), MAX_TEXT)
}

fn log_end(peer: &Peer, why: &str, good: bool) {
    Record::new("session-end", Some(&peer.id), &peer.info.user)
        .since(peer.info.traffic.since, Instant::now())
        .text("reason", why)
        .log(good);
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
    go_on(peer, Terminal::default())
}

/// The same with a shell that is there already.
pub(crate) fn go_on(peer: Peer, terminal: Terminal) -> io::Result<()> {
    let name = format!("s-{}", peer.id.as_str());
    // File transfers look up owners and groups.
    let run = move || {
        let (files, forwards, ping_at, close_at, hung_up, waiting, moves_to) = Default::default();
        let visitors = peer.device.detached.claim(&peer.wake);
        let away = visitors.map(|visitors| (Instant::now(), visitors));
        let end = "done";
        Session { peer, terminal, files, forwards, ping_at, close_at, hung_up, end, waiting, away, moves_to }
            .run();
    };
    thread::spawn(&name, thread::LOOKUP_STACK, run).map(drop)
}

impl Session {
    fn run(mut self) {
        Record::new("session-start", Some(&self.peer.id), &self.peer.info.user).log(true);
        let served = self.serve();
        if let Err(e) = &served {
            let reason = reason(e);
            self.end = "failed";
            error!("session {}: {reason}", self.peer.id);
            self.peer.inbox.close();
            self.peer.reply(&control::error(&self.peer.id, &reason, true));
            self.withdraw();
            // The audit log gets an end for each shell and transfer that has begun.
            self.terminal.abandon(&self.peer);
            self.files.abort(&self.peer, "failed", "the session failed");
        }
        let Session { mut peer, terminal, files, forwards, end, moves_to, .. } = self;
        if let Some((kept, request)) = moves_to {
            // First, since a permit is found by what wakes its session.
            peer.shell_permit = None;
            return kept.receive(peer.give_away(), Some(request));
        }
        // Forwards log their own lines before.
        drop((terminal, files, forwards));
        log_end(&peer, end, served.is_ok());
        // The daemon ends when no session is left, and must not miss their last lines.
        drop(peer);
    }

    fn serve(&mut self) -> io::Result<()> {
        loop {
            if !self.hung_up
                && let Some(why) = self.peer.inbox.hung_up()
            {
                self.hang_up(why, Instant::now());
            }
            self.look_for_visitors(Instant::now());
            if let Some((request, until)) = self.waiting.take() {
                self.open_terminal(request, until, Instant::now());
            }
            while self.waiting.is_none()
                && let Some(frame) = self.terminal.next_frame(&self.peer.inbox)
            {
                self.handle(frame, Instant::now());
            }
            if self.moves_to.is_some() {
                return Ok(());
            }
            let now = Instant::now();
            if let Some(why) = self.terminal.left()
                && !self.detach(why, now)
            {
                self.terminal.hang_up(&self.peer, why, now);
            }
            self.end_disabled(now);
            self.files.acknowledge(&self.peer);
            self.check_idle(now);
            self.files.proceed(&mut self.peer, now);
            self.forwards.answer(&mut self.peer, now);
            if self.is_over() && self.peer.inbox.close_if_empty() && !self.receive_last(now) {
                return Ok(());
            }
            let mut set = PollSet::default();
            set.add(self.peer.wake.as_fd(), PollFlags::POLLIN);
            self.terminal.watch(&self.peer, &mut set, now);
            self.forwards.watch(&self.peer, &mut set, now);
            let events = set.wait(self.deadline(now))?;
            // Before anything is looked at: the session is also woken by others than its inbox.
            self.peer.wake.clear();
            self.terminal.proceed(&mut self.peer, &events, Instant::now());
            self.forwards.proceed(&mut self.peer, &events, Instant::now());
        }
    }

    fn deadline(&self, now: Instant) -> Option<Instant> {
        let deadlines = [
            self.terminal.deadline(&self.peer, now),
            self.files.deadline(),
            self.forwards.deadline(&self.peer, now),
            self.ping_at,
            self.close_at,
            self.waiting.as_ref().map(|(_, until)| *until),
            self.away_until(),
        ];
        deadlines.into_iter().flatten().min()
    }

    fn hang_up(&mut self, why: HangUp, now: Instant) {
        (self.hung_up, self.end) = (true, why.name());
        (self.ping_at, self.close_at, self.waiting) = (None, None, None);
        self.files.hang_up(&self.peer, now);
        self.forwards = PortForward::default();
        let visitors = self.peer.device.detached.claim(&self.peer.wake);
        self.away = visitors.map(|visitors| (now, visitors));
        if self.away.is_some() && self.can_detach() {
            self.terminal.detach(&mut self.peer, why.name(), now);
        } else {
            self.terminal.hang_up(&self.peer, why.name(), now);
            if self.withdraw() {
                self.away = None;
            }
        }
    }

    fn can_detach(&self) -> bool {
        let keeps = !self.peer.device.config().sessions.keep_detached.is_zero();
        keeps && self.has_only_terminal() && self.terminal.can_detach()
    }

    /// The shell is not kept any more. False if it wasn't, or if somebody is on the way to it.
    fn withdraw(&self) -> bool {
        self.peer.device.detached.take(|kept| kept.is_of_thread(&self.peer.wake)).is_some()
    }

    /// Leaves the client, and keeps the shell for whoever may come. False if there is no shell to keep.
    fn detach(&mut self, why: &'static str, now: Instant) -> bool {
        if !self.can_detach() {
            return false;
        }
        self.peer.inbox.close();
        self.peer.leave();
        let Peer { device, id, info, wake, .. } = &self.peer;
        device.detached.keep(id, info, wake);
        self.away = device.detached.claim(wake).map(|visitors| (now, visitors));
        if self.away.is_some() {
            self.terminal.detach(&mut self.peer, why, now);
        }
        self.away.is_some()
    }

    fn has_only_terminal(&self) -> bool {
        self.files.is_idle() && self.forwards.is_idle()
    }

    fn away_until(&self) -> Option<Instant> {
        let (since, _) = self.away.as_ref()?;
        since.checked_add(self.peer.device.config().sessions.keep_detached)
    }

    fn look_for_visitors(&mut self, now: Instant) {
        let Some((_, visitors)) = &self.away else { return };
        match visitors.try_recv() {
            Ok(visitor) => self.receive(visitor, now),
            Err(TryRecvError::Disconnected) if self.terminal.leave(&self.peer.id, now) => {}
            Err(TryRecvError::Disconnected) => {
                self.terminal.hang_up(&self.peer, HangUp::LinkLost.name(), now)
            }
            Err(TryRecvError::Empty) => {
                if self.away_until().is_some_and(|until| now >= until) {
                    self.terminal.end_alone(&mut self.peer, now);
                }
            }
        }
    }

    /// The session is over. If somebody is on the way to it, it goes on with them all the same.
    fn receive_last(&mut self, now: Instant) -> bool {
        let claimed = || self.peer.device.detached.claim(&self.peer.wake);
        let visitors = self.away.take().map(|(_, visitors)| visitors).or_else(claimed);
        let visitor = visitors.filter(|_| !self.withdraw()).and_then(|visitors| visitors.recv().ok());
        visitor.map(|visitor| self.receive(visitor, now)).is_some()
    }

    fn receive(&mut self, Visitor { client, request }: Visitor, now: Instant) {
        let since = self.away.take().map_or(now, |(since, _)| since);
        (self.hung_up, self.end) = (false, "done");
        if client.id != self.peer.id {
            log_end(&self.peer, "reattached", true);
        }
        self.peer.receive(client, now);
        if let Some(request) = self.terminal.attach(&mut self.peer, request, since, now) {
            self.handle(request, now);
        }
    }

    /// `new`: leads back to a shell of this user, or makes one as soon as there may be another.
    fn open_terminal(&mut self, request: Frame, until: Instant, now: Instant) {
        let device = &self.peer.device;
        let (user, most) = (request.user(), device.config().sessions.max_per_user);
        let returns = self.has_only_terminal() && device.detached.has(&user);
        let permit = match self.peer.shell_permit.take() {
            Some(permit) => Ok(permit),
            None => device.acquire_shell(&user, &self.peer.wake),
        };
        let settled = permit.and_then(|permit| match permit.settle(most, returns) {
            None if now < until => Ok((permit, false)),
            None => Err(Refusal::OfUser),
            Some(result) => result.map(|()| (permit, true)),
        });
        match settled {
            Err(refusal) => self.peer.reply(&terminal::refusal(&self.peer.id, &user, refusal.text())),
            Ok((permit, false)) => {
                self.peer.shell_permit = Some(permit);
                self.waiting = Some((request, until));
            }
            Ok((permit, true)) => {
                let kept = returns.then(|| device.detached.take(|kept| kept.is_of(&user))).flatten();
                match kept {
                    Some(kept) => self.moves_to = Some((kept, request)),
                    // Another session was quicker.
                    None if device.shells.running() > MAX_SHELLS => {
                        let refusal = Refusal::OfDevice.text();
                        self.peer.reply(&terminal::refusal(&self.peer.id, &user, refusal));
                    }
                    None => {
                        self.peer.shell_permit = Some(permit);
                        self.terminal.handle(&mut self.peer, request, now);
                    }
                }
            }
        }
    }

    /// What the configuration doesn't allow any more ends.
    fn end_disabled(&mut self, now: Instant) {
        let config = self.peer.device.config();
        if !config.terminal.enabled {
            self.terminal.disable(&mut self.peer, now);
        }
        let files = !config.file_transfer && !self.files.is_idle();
        let forwards = !config.port_forward && !self.forwards.is_idle();
        if self.close_at.is_some() && (files || forwards) {
            self.end_because("disabled", "disabled by the configuration");
        }
    }

    fn check_idle(&mut self, now: Instant) {
        if self.close_at.is_some_and(|at| now >= at) {
            self.end_because("idle", "session timeout");
        } else if self.ping_at.take_if(|at| now >= *at).is_some() {
            self.peer.ping(now);
        }
    }

    fn end_because(&mut self, end: &'static str, text: &str) {
        self.end = end;
        self.peer.reply(&control::error(&self.peer.id, text, true));
        self.close();
    }

    /// Ends everything but a shell, which session control doesn't govern.
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
        self.peer.info.heard(frame.proto, now);
        if self.close_at.is_some() || starts_idling(&frame) {
            (self.ping_at, self.close_at) = (Some(now + PING_AFTER), Some(now + CLOSE_AFTER));
        }
        let config = self.peer.device.config();
        match frame.proto {
            SHELL if frame.typ == shell::NEW && config.terminal.enabled && self.terminal.is_idle() => {
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
        let answer = match frame.typ.as_str() {
            control::OPEN => match control::parse::<control::Open>(&frame.body) {
                Ok(open) if open.versions.iter().flatten().any(|v| *v == VERSION) => {
                    control::accept(id, &self.protocols())
                }
                Ok(_) => {
                    return self.refuse(frame, &format!("handshake rejected: require version {VERSION}"));
                }
                Err(e) => {
                    return self.refuse(frame, &format!("failed to decode handshake request: {}", clip(&e)));
                }
            },
            control::ACCEPT => match control::parse::<control::Accept>(&frame.body) {
                Ok(accept) if accept.version == VERSION => return,
                Ok(control::Accept { version, .. }) => {
                    let text = format!("unsupported protocol version {version}: require version {VERSION}");
                    return self.refuse(frame, &text);
                }
                Err(e) => return self.refuse(frame, &format!("malformed handshake response: {}", clip(&e))),
            },
            control::PING => control::pong(id),
            control::PONG => return self.peer.credit.answered(),
            control::CLOSE => {
                self.end = "closed";
                return self.close();
            }
            control::ERROR => {
                let error = control::parse::<control::Error>(&frame.body).unwrap_or_default();
                info!("session {id}: error from the client: {:?}", clip(&error.err.unwrap_or_default()));
                if error.close == Some(true) {
                    self.close();
                }
                return;
            }
            other => {
                let text = format!("session: control type message not understood: '{other}'");
                control::error_about(id, frame, &text, false)
            }
        };
        self.peer.reply(&answer);
    }

    /// Ends the session for a handshake that can't be agreed on.
    fn refuse(&mut self, cause: &Frame, text: &str) {
        self.peer.reply(&control::error_about(&self.peer.id, cause, text, true));
        self.close();
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
}

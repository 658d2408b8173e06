//! The remote terminal: protocol 1 for one session, in the session's thread.
//!
//! ```text
//!            new                    stop, expiry, no pong
//!  Nothing ──────▶ Running ────────────────────────────────▶ Ending ──▶ Nothing
//!     ▲               │ the shell ends by itself                (hang up, 2 s, kill)
//!     └───────────────┘
//! ```
//! A running shell is attached to a client or detached. A detached one fills its history.

mod clock;
mod detached;
mod history;
mod running;
mod shell;

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use nix::poll::PollFlags;

use self::clock::{Due, health};
pub(crate) use self::detached::Handover;
use self::history::History;
pub(crate) use self::running::ANSWER_LIMIT;
use self::running::{Running, STOP_GRACE, ping, requested_size};
use self::shell::Shell;
use super::peer::Peer;
use super::shells::{DEVICE_FULL, MAX_SHELLS, ShellPermit};
use crate::audit::Record;
use crate::outbox::Discard;
use crate::permits::Permit;
use crate::proto::shell as wire;
use crate::proto::{Frame, SHELL, SessionId, UserId};
use crate::sys::process::{Exit, SessionLeader};
use crate::sys::pty::WindowSize;
use crate::sys::{Events, PollSet, lock, reason};

/// For a process to come from its fork(2) to its exec(2), and between looks at one that has ended and can't be reaped
/// while another process traces it.
const EXEC_LIMIT: Duration = Duration::from_millis(200);
/// Short, since the daemon itself may have to end within two seconds.
const HANG_UP_GRACE: Duration = Duration::from_secs(1);
/// The last output may come through the terminal this long after the shell's end.
const DRAIN_LIMIT: Duration = Duration::from_millis(500);

/// Upstream's text for a shell that has ended by itself.
const ENDED: &str = "read /dev/ptmx: input/output error";

#[derive(Default)]
pub(crate) struct Terminal {
    state: State,
    /// How the user has left a shell that may be kept.
    pub(super) left: Option<&'static str>,
}

#[derive(Default)]
enum State {
    #[default]
    Nothing,
    Running(Box<Running>),
    Ending(Ending),
}

struct Ending {
    process: SessionLeader,
    /// For the audit log.
    why: &'static str,
    answer: bool,
    killed: bool,
    /// When to hang up again, once the shell itself has ended.
    again: Option<Instant>,
    deadline: Option<Instant>,
    /// Without one the shell is killed at once.
    _place: Option<Permit>,
}

impl Terminal {
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.state, State::Nothing)
    }

    /// While a shell ends, frames for the next one stay in the inbox, unless it does not end.
    pub(crate) fn takes(&self, frame: &Frame) -> bool {
        let is_ours = frame.proto == SHELL && frame.typ != wire::PONG;
        !is_ours || !matches!(&self.state, State::Ending(ending) if ending.deadline.is_some())
    }

    /// Whether a `stop` for all shells of a user concerns this session.
    pub(crate) fn is_meant(&self, stop: &Frame) -> bool {
        matches!(&self.state, State::Running(running) if running.info.user == stop.user())
    }

    pub(crate) fn handle(&mut self, peer: &mut Peer, frame: Frame, now: Instant) {
        if !peer.device.config().terminal {
            return peer.reply(&unknown(&peer.id, &frame));
        }
        match (&mut self.state, frame.typ.as_str()) {
            (State::Running(running), wire::PONG) => {
                peer.credit.answered(now);
                running.clock.pong(now);
                running.permit.answered();
            }
            (_, wire::PONG) => peer.credit.answered(now),
            (State::Running(running), wire::DATA) => {
                running.clock.active(now);
                running.permit.answered();
                let typed = running.shell.type_in(&frame.body);
                running.info.traffic.add_in(if typed.is_ok() { frame.body.len() } else { 0 }, now);
                if let Err(reason) = typed {
                    let id = peer.id.as_str();
                    let text =
                        format!("routeMessage: shell command execution error, session_id={id}: {reason}");
                    peer.reply(&wire::failure(&peer.id, wire::DATA, text));
                }
            }
            (State::Running(running), wire::RESIZE) => {
                match (requested_size(&frame), &mut running.restore) {
                    // The web interface sends its size right behind a `new`: the size in between has yet to be noticed.
                    (Some(size), Some((_, wanted))) => *wanted = size,
                    (Some(size), None) => running.resize(peer, size),
                    (None, _) => {}
                }
            }
            (State::Running(running), wire::STOP) => {
                // No output may follow the answer, and none has to precede it.
                running.discard.store(true, Ordering::SeqCst);
                if peer.device.config().keep_when_user_leaves && wire::is_of_absent_user(&frame) {
                    peer.reply(&wire::stopped(&peer.id));
                    self.left = Some("user disconnected");
                } else {
                    self.end(peer, "stopped", true, now);
                }
            }
            (_, wire::NEW) => {
                let full = peer.device.shells.running() >= MAX_SHELLS;
                let reason =
                    if full { DEVICE_FULL } else { "failed to start shell: shell is already running" };
                peer.reply(&refusal(&peer.id, &frame.user(), reason));
            }
            _ => answer_without_shell(&peer.id, &frame).iter().for_each(|answer| peer.reply(answer)),
        }
    }

    pub(crate) fn start(&mut self, peer: &mut Peer, permit: ShellPermit, frame: &Frame, now: Instant) {
        let (user, config) = (frame.user(), peer.device.config());
        let default = WindowSize { width: config.width, height: config.height };
        let size = requested_size(frame).unwrap_or(default);
        let shell = match Shell::start(peer, &user, size) {
            Ok(shell) => shell,
            Err(e) => {
                let reason = format!("failed to start shell: {e}");
                drop(permit);
                return peer.reply(&refusal(&peer.id, &user, &reason));
            }
        };
        let pid = shell.process.pid();
        Record::new("shell-start", Some(&peer.id), &user).with("pid", pid).log(true);
        let info = peer.info.set_shell(user, pid, now);
        let running = Running::new(shell, info, permit, History::new(peer.share.memory.none()));
        peer.reply(&wire::started(&peer.id));
        running.describe(&peer.id, now);
        self.state = State::Running(Box::new(running));
    }

    /// Closes the terminal, which hangs it up, and signals the processes. This frees the permit at once: nobody can
    /// type into the shell any more, however long it takes to end.
    fn end(&mut self, peer: &Peer, why: &'static str, answer: bool, now: Instant) {
        self.state = match std::mem::take(&mut self.state) {
            State::Running(running) => {
                let Running { shell: Shell { process, .. }, .. } = *running;
                process.hang_up();
                let _place = peer.device.dying.acquire();
                let deadline = Some(now + if _place.is_some() { STOP_GRACE } else { Duration::ZERO });
                State::Ending(Ending { process, why, answer, killed: false, again: None, deadline, _place })
            }
            other => other,
        };
    }

    /// Tells the client the reason, behind the output in flight.
    fn end_because(&mut self, peer: &mut Peer, why: &'static str, reason: &str, now: Instant) {
        info!("session {}: {reason}", peer.id);
        peer.reply(&wire::failure(&peer.id, wire::STOP, reason.to_owned()));
        self.end(peer, why, false, now);
    }

    pub(crate) fn watch<'a>(&'a self, peer: &Peer, set: &mut PollSet<'a>, now: Instant) {
        match &self.state {
            State::Nothing => {}
            State::Ending(Ending { again: Some(at), .. }) => set.until(&[Some(*at)]),
            State::Ending(ending) => {
                set.add(ending.process.as_fd(), PollFlags::POLLIN);
                set.until(&[ending.deadline]);
            }
            State::Running(running) => running.watch(peer, set, now),
        }
    }

    pub(crate) fn proceed(&mut self, peer: &mut Peer, events: &Events, now: Instant) {
        self.run(peer, events, now);
        self.wait_for_end(peer, events, now);
    }

    fn run(&mut self, peer: &mut Peer, events: &Events, now: Instant) {
        let State::Running(running) = &mut self.state else { return };
        let config = peer.device.config();
        if !config.terminal {
            return self.end_because(peer, "disabled", "the terminal was disabled", now);
        }
        let alone = running.detached.and_then(|since| since.checked_add(config.keep_detached));
        if alone.is_some_and(|at| now >= at) {
            return self.end_because(peer, "not reattached", "nobody came back to the shell", now);
        }
        let pty = events.of(&running.shell.pty);
        let ended = PollFlags::POLLHUP | PollFlags::POLLERR;
        if pty.contains(PollFlags::POLLOUT)
            && let Err(e) = running.shell.pass_input()
        {
            debug!("session {}: input lost: {}", peer.id, reason(&e));
        }
        if pty.intersects(ended) {
            running.shell.drop_input();
        }
        if running.exit.is_none() && !events.of(&running.shell.process).is_empty() {
            running.exit = running.shell.process.try_wait();
            if running.exit.is_some() {
                running.shell.pty.release();
                running.give_up = None;
            }
            running.give_up.get_or_insert(now + DRAIN_LIMIT);
        }
        let give_up = running.give_up.is_some_and(|at| now >= at);
        let readable = pty.intersects(PollFlags::POLLIN | ended);
        if give_up || readable || !running.history.is_sent() {
            running.pass_output(peer, now);
        }
        let shown = running.detached.is_some() || running.history.is_sent();
        match running.exit {
            // A background job may keep the terminal open; the shell's own output has arrived by now.
            Some(status) if shown && (running.at_end || (give_up && running.takes_output(peer, now))) => {
                return self.ended_by_itself(peer, status, now);
            }
            _ if !give_up => {}
            // The last output still waits for the link or for credit.
            Some(_) => running.give_up = Some(now + DRAIN_LIMIT),
            None => return self.end_because(peer, "hung up", ENDED, now),
        }
        if let Some((_, size)) = running.restore.take_if(|(at, _)| now >= *at) {
            running.resize(peer, size);
        }
        let asked = running.permit.asked();
        if asked.is_some() && running.asked != asked {
            ping(peer, now);
        }
        running.asked = asked;
        if asked.is_some_and(|at| now >= at + ANSWER_LIMIT) {
            if config.keep_when_user_leaves {
                self.left = Some("user gone");
            } else {
                let text = "the client did not answer, and its user wants another terminal";
                self.end_because(peer, "user gone", text, now);
            }
            return;
        }
        match running.clock.due(config.expiry, now) {
            Some(Due::Ping) => {
                ping(peer, now);
                peer.sink.ask_server();
            }
            Some(Due::Warn(left)) => {
                let left = left.as_secs_f32().ceil();
                let text = format!(
                    "\r\n[mender-connect] Idle: this session ends in {left} s unless something is typed.\r\n"
                );
                peer.reply(&wire::output(&peer.id).with_body(text));
            }
            Some(Due::End(why, text)) => self.end_because(peer, why, &text, now),
            None if running.detached.is_none() && peer.credit.wants_probe(now) => ping(peer, now),
            None => {}
        }
    }

    fn ended_by_itself(&mut self, peer: &mut Peer, status: Exit, now: Instant) {
        let State::Running(running) = std::mem::take(&mut self.state) else { return };
        let age = now.saturating_duration_since(running.info.traffic.since);
        log_end(peer, &text(status), "exited", now);
        if status.and_then(|status| status.code()) == Some(2) && age < Duration::from_secs(1) {
            warn!(
                "the shell ended at once with exit status 2: it may not know its arguments {:?}; \
                 a /bin/sh that is dash has no --login, set ShellArguments to [\"-l\"]",
                peer.device.config().arguments
            );
        }
        // Frees the permit first: the client may ask for the next shell as soon as it gets this.
        drop(running);
        peer.reply(&wire::failure(&peer.id, wire::STOP, ENDED));
    }

    fn wait_for_end(&mut self, peer: &mut Peer, events: &Events, now: Instant) {
        let State::Ending(ending) = &mut self.state else { return };
        let ended = match ending.again {
            None => !events.of(&ending.process).is_empty(),
            Some(at) => now >= at,
        };
        // The shell may have started another process meanwhile, and one that hasn't executed its program yet may handle
        // the signal as its shell does, and forget it.
        if ended && ending.process.hang_up() && ending.again.is_none() {
            ending.again = Some(now + EXEC_LIMIT);
            return;
        }
        if ended && let Some(status) = ending.process.try_wait() {
            let Ending { answer, why, .. } = *ending;
            log_end(peer, &text(status), why, now);
            self.state = State::Nothing;
            if answer {
                peer.reply(&wire::stopped(&peer.id));
            }
            return;
        }
        if ended {
            ending.again = Some(now + EXEC_LIMIT);
        }
        if ending.deadline.is_none_or(|at| now < at) {
            return;
        }
        if !ending.killed {
            debug!("session {}: killing the shell", peer.id);
            ending.process.kill();
            (ending.killed, ending.deadline) = (true, Some(now + STOP_GRACE));
            return;
        }
        let pid = ending.process.pid();
        warn!("session {}: process {pid} does not end", peer.id);
        ending.deadline = None;
        if std::mem::take(&mut ending.answer) {
            let text = format!("could not terminate shell: process {pid} does not end.");
            peer.reply(&wire::failure(&peer.id, wire::STOP, text));
        }
    }
}

fn text(status: Exit) -> String {
    status.map_or_else(|| "unknown".to_owned(), |status| status.to_string())
}

pub(crate) fn log_end(peer: &Peer, status: &str, why: &str, now: Instant) {
    let Some(shell) = lock(&peer.info.shell).take() else { return };
    let figures = shell.traffic.figures(now);
    Record::new("shell-end", Some(&peer.id), &shell.user)
        .with("pid", shell.pid)
        .since(shell.traffic.since, now)
        .bytes(figures.bytes_in, figures.bytes_out)
        .text("status", status)
        .text("reason", why)
        .log(true);
}

/// The answer to a refused `new`. Writes the audit log.
pub(crate) fn refusal(id: &SessionId, user: &UserId, reason: &str) -> Frame {
    Record::new("shell-refused", Some(id), user).text("reason", reason).log(false);
    wire::failure(id, wire::NEW, reason.to_owned())
}

pub(crate) fn unknown(id: &SessionId, frame: &Frame) -> Frame {
    let text = format!("unknown message protocol and type: {}/{}", frame.proto, frame.typ);
    wire::failure(id, &frame.typ, text)
}

/// The answer to any frame but `new` if there is no shell.
pub(crate) fn answer_without_shell(id: &SessionId, frame: &Frame) -> Option<Frame> {
    let text = match frame.typ.as_str() {
        wire::DATA => "session not found".to_owned(),
        wire::STOP => format!("routeMessage: StopShellMessage: session not found for id {}", id.as_str()),
        wire::RESIZE | wire::PONG => return None,
        _ => return Some(unknown(id, frame)),
    };
    Some(wire::failure(id, &frame.typ, text))
}

//! A shell without a client: it waits for its client or its user, and outlives the agent where the service manager
//! keeps its terminal.

use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, mem};

use crossbeam_channel::{Receiver, SendError};

use super::shell::{SMALL_INPUT, Shell};
use super::{
    ANSWER_LIMIT, Discard, HANG_UP_GRACE, History, Peer, Record, Running, State, Terminal, WindowSize,
    health, wire,
};
use crate::outbox::{Outbox, Sink};
use crate::proto::{Frame, Map, SHELL, SessionId};
use crate::session::credit::Credit;
use crate::session::inbox::HangUp;
use crate::session::shells::{Call, ShellPermit};
use crate::session::store::Place;
use crate::sys::clock;
use crate::sys::process::SessionLeader;
use crate::sys::pty::Pty;

/// Programs that get two SIGWINCH at once look only at the second size.
const REPAINT: Duration = Duration::from_millis(100);

pub(crate) struct Handover {
    running: Box<Running>,
    /// The frames in flight to the client, if it is the same one.
    credit: Option<Credit>,
}

impl Terminal {
    pub(crate) fn is_kept(&self) -> bool {
        matches!(&self.state, State::Running(running) if running.permit.is_detached())
    }

    pub(crate) fn detach(&mut self, peer: &mut Peer, why: &str, now: Instant) {
        let State::Running(running) = &mut self.state else { return };
        if running.detached.is_some() {
            return;
        }
        // Without a writer the new one drops everything.
        let sink = mem::replace(&mut peer.sink, Sink::new(&Outbox::new().0, Arc::clone(&peer.wake)));
        Record::new("shell-detach", Some(&peer.id), &running.info.user)
            .with("pid", running.info.pid)
            .since(running.info.traffic.since, now)
            .text("reason", why)
            .log(true);
        (running.detached, running.asked) = (Some(now), None);
        running.history.rewind(sink.delivered());
        running.clock.health = None;
    }

    /// Hands the shell over if another session asks for it, or ends it if it is detached. `Some` ends this session, with the
    /// reason for the audit log, if it has a line there.
    pub(crate) fn follow_call(&mut self, peer: &mut Peer, now: Instant) -> Option<Option<&'static str>> {
        let State::Running(running) = &self.state else { return None };
        // The next link's session may ask while this one's writer still has output in hand, which would come twice. The
        // router hangs up after that.
        running.detached?;
        let call = running.permit.take_call()?;
        if let Call::HandOver { resumes, to } = call {
            let State::Running(running) = mem::take(&mut self.state) else { return None };
            match to.send(Handover { running, credit: resumes.then(|| peer.credit.resumed()) }) {
                Ok(()) => return Some(if resumes { None } else { Some("reattached") }),
                // The other session has ended meanwhile. Another one may come.
                Err(SendError(Handover { running, .. })) => self.state = State::Running(running),
            }
            if peer.device.detach(&peer.info, &peer.wake) {
                return None;
            }
        }
        self.hang_up(peer, HangUp::LinkLost.name(), now);
        None
    }

    /// Ends the shell or, if the agent ends and the store has its terminal, leaves it to the next agent.
    pub(crate) fn hang_up(&mut self, peer: &mut Peer, why: &'static str, now: Instant) {
        let is_left = |running: &Running| running.shell.place.as_ref().is_some_and(Place::is_left);
        if matches!(&self.state, State::Running(running) if is_left(running)) {
            self.detach(peer, why, now);
            if let State::Running(running) = mem::take(&mut self.state) {
                running.describe(&peer.id, now);
                running.shell.process.leave();
            }
        }
        self.end(peer, why, false, now);
        if let State::Ending(ending) = &mut self.state {
            ending.answer = false;
            ending.deadline = ending.deadline.map(|at| at.min(now + HANG_UP_GRACE));
        }
    }

    /// Takes over another session's shell. `request` is the `new` that asks for it, if one does. False if the shell has
    /// ended.
    pub(crate) fn attach(
        &mut self,
        peer: &mut Peer,
        handover: &Receiver<Handover>,
        request: Option<&Frame>,
        now: Instant,
    ) -> bool {
        let Ok(Handover { mut running, credit }) = handover.recv_timeout(ANSWER_LIMIT) else { return false };
        let since = running.detached.take().unwrap_or(now);
        if let Some(credit) = credit {
            peer.credit = credit;
        }
        running.discard = Discard::default();
        running.permit.attach(&peer.wake);
        running.clock.health = health(now);
        running.info = peer.info.adopt_shell(&running.info);
        running.describe(&peer.id, now);
        Record::new("shell-attach", Some(&peer.id), &running.info.user)
            .with("pid", running.info.pid)
            .since(since, now)
            .log(true);
        if peer.credit.wants_probe(now) {
            super::ping(peer, now);
        }
        match request {
            None => {
                let lost = running.history.resume();
                if lost > 0 {
                    let text = format!("\r\n[mender-connect] {lost} bytes of output are lost\r\n");
                    peer.reply(&wire::output(&peer.id).with_body(text));
                }
            }
            Some(request) => {
                running.clock.active(now);
                running.welcome(peer, request, now.saturating_duration_since(since), now);
            }
        }
        self.state = State::Running(running);
        true
    }

    /// Takes over a shell from the agent before.
    pub(crate) fn adopt(
        peer: &Peer,
        description: &Frame,
        (pty, size): (Pty, WindowSize),
        permit: ShellPermit,
        place: Place,
        now: Instant,
    ) -> io::Result<Self> {
        let number = |key| description.props.int(key).and_then(|number| u64::try_from(number).ok());
        let numbers = number("end").zip(number("sent")).zip(number("typed"));
        let ((end, sent), typed) = numbers.ok_or(io::ErrorKind::InvalidData)?;
        let output = description.body.len().checked_sub(usize::try_from(typed).unwrap_or(usize::MAX));
        let (output, input) = description.body.split_at(output.ok_or(io::ErrorKind::InvalidData)?);
        let history = History::adopt(output, (end, sent), peer.share.memory.none());
        let history = history.ok_or(io::ErrorKind::InvalidData)?;
        // Last, since an error after it would kill the process instead of hanging it up.
        let process = SessionLeader::of_terminal(&pty, peer.device.config().user.uid)?;
        let info = peer.info.set_shell(description.user(), process.pid(), peer.info.traffic.since);
        let mut memory = peer.share.memory.none();
        memory.resize(input.len().saturating_sub(SMALL_INPUT));
        let shell = Shell { process, pty, size, input: input.to_vec().into(), place: Some(place), memory };
        let mut running = Running::new(shell, info, permit, history);
        running.clock.active(now);
        (running.detached, running.clock.health) = (Some(now), None);
        // After a crash the next agent must not type the same input once more.
        running.describe(&peer.id, now);
        Ok(Terminal { state: State::Running(Box::new(running)), ..Terminal::default() })
    }
}

impl Running {
    fn welcome(&mut self, peer: &mut Peer, request: &Frame, away: Duration, now: Instant) {
        peer.reply(&wire::started(&peer.id));
        let age = now.saturating_duration_since(self.info.traffic.since);
        // UTC, since a static executable has no time zones.
        let minutes = clock::now().saturating_sub(age).as_secs() / 60;
        let text = format!(
            "[mender-connect] Reattached to your shell of {:02}:{:02} (pid {}), detached {} s ago\r\n",
            minutes / 60 % 24,
            minutes % 60,
            self.info.pid,
            away.as_secs()
        );
        peer.reply(&wire::output(&peer.id).with_body(text));
        self.history.replay();
        let size = self.shell.size;
        match super::requested_size(request).filter(|wanted| *wanted != size) {
            Some(wanted) => self.resize(peer, wanted),
            None => {
                let height = if size.height > 1 { size.height - 1 } else { size.height + 1 };
                self.resize(peer, WindowSize { height, ..size });
                self.restore = Some((now + REPAINT, size));
            }
        }
    }

    /// Describes the shell for the next agent.
    pub(super) fn describe(&self, id: &SessionId, now: Instant) {
        let Some(place) = &self.shell.place else { return };
        let age = now.saturating_duration_since(self.info.traffic.since);
        // Not by the wall clock, which may be set before the next agent reads it.
        let started = clock::monotonic().saturating_sub(age).as_secs();
        // Output and input change too often to be written before the agent ends.
        let (output, (end, sent), input) = match place.is_left() {
            true => {
                (self.history.bytes.clone(), (self.history.end, self.history.sent), self.shell.input.clone())
            }
            false => Default::default(),
        };
        let number = |number: u64| i64::try_from(number).unwrap_or_default();
        let props = Map::new().with_str("user_id", self.info.user.as_str());
        let props = props.with_i64("started", number(started)).with_i64("typed", number(input.len() as u64));
        let props = props.with_i64("end", number(end)).with_i64("sent", number(sent));
        let body: Vec<u8> = output.into_iter().chain(input).collect();
        place.describe(Frame::new(SHELL, "", Some(id)).with_props(props).with_body(body));
    }
}

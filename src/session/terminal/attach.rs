//! A shell that outlives its client: it is left, and goes on in the session of the same client or its user's next one.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, SendError};

use super::{ANSWER_LIMIT, Discard, Frame, Peer, Record, Running, State, Terminal, WindowSize, wire};
use crate::outbox::Sink;
use crate::session::credit::Credit;
use crate::session::inbox::HangUp;
use crate::session::shells::Call;
use crate::sys::clock;

/// Programs that are told of two sizes at once look only at the second.
const REPAINT: Duration = Duration::from_millis(50);

/// A shell on its way to another session.
pub(crate) struct Handover {
    running: Box<Running>,
    /// For the same client: what is on the way to it.
    credit: Credit,
}

impl Terminal {
    /// True if the session's shell is kept without a client.
    pub(crate) fn is_kept(&self) -> bool {
        matches!(&self.state, State::Running(running) if running.permit.is_detached())
    }

    /// Why the user is gone, if the shell may be kept. It is told once.
    pub(crate) fn left(&mut self) -> Option<&'static str> {
        self.left.take()
    }

    /// The client is gone, and may come back.
    pub(crate) fn detach(&mut self, peer: &mut Peer, why: &str, now: Instant) {
        self.deferred.clear();
        let sink = std::mem::replace(&mut peer.sink, Sink::closed(&peer.wake));
        let State::Running(running) = &mut self.state else { return };
        Record::new("shell-detach", Some(&peer.id), &running.info.user)
            .with("pid", running.info.pid)
            .since(running.info.traffic.since, now)
            .text("reason", why)
            .log(true);
        (running.detached, running.asked) = (Some(now), None);
        running.history.rewind(sink.delivered());
        running.clock.pause();
    }

    /// Lets the detached shell go where it is wanted, or ends it. Returns why the session ends then, if it is logged.
    pub(crate) fn follow_call(&mut self, peer: &mut Peer, now: Instant) -> Option<Option<&'static str>> {
        let State::Running(running) = &self.state else { return None };
        let call = running.permit.call()?;
        if running.detached.is_none() {
            // The next link was quicker than this session.
            self.detach(peer, HangUp::LinkLost.name(), now);
        }
        match (call, std::mem::take(&mut self.state)) {
            (Call::HandOver { resumes, to }, State::Running(running)) => {
                let credit = std::mem::replace(&mut peer.credit, Credit::new(now));
                match to.send(Handover { running, credit }) {
                    Ok(()) => return Some(if resumes { None } else { Some("reattached") }),
                    Err(SendError(Handover { running, credit })) => {
                        // That session has ended. Another one may come.
                        (self.state, peer.credit) = (State::Running(running), credit);
                        if peer.device.detach(&peer.id, &peer.info, &peer.wake) {
                            return None;
                        }
                    }
                }
            }
            (_, state) => self.state = state,
        }
        if !self.leave(&peer.id, now) {
            self.hang_up(peer, HangUp::LinkLost.name(), now);
        }
        None
    }

    /// Goes on with a shell of another session: of the same client if it `resumes`, else with its user's `request` for a
    /// shell. False if the shell has ended.
    pub(crate) fn attach(
        &mut self,
        peer: &mut Peer,
        handover: &Receiver<Handover>,
        request: Option<&Frame>,
        resumes: bool,
        now: Instant,
    ) -> bool {
        let Ok(Handover { mut running, credit }) = handover.recv_timeout(ANSWER_LIMIT) else { return false };
        let since = running.detached.take().unwrap_or(now);
        if resumes {
            // The client never answers what the lost link asked it.
            peer.credit = credit;
            peer.credit.resume();
        }
        running.discard = Discard::default();
        running.permit.attach(&peer.wake);
        running.clock.resume(now);
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
            Some(request) => running.welcome(peer, request, now.saturating_duration_since(since), now),
        }
        self.state = State::Running(running);
        true
    }
}

impl Running {
    /// Shows the shell to another terminal.
    fn welcome(&mut self, peer: &mut Peer, request: &Frame, away: Duration, now: Instant) {
        peer.reply(&wire::started(&peer.id));
        let age = now.saturating_duration_since(self.info.traffic.since);
        // In UTC: a static executable has no time zones.
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
        let size = self.size;
        match super::requested_size(request).filter(|wanted| *wanted != size) {
            Some(wanted) => self.resize(peer, wanted),
            None => {
                let height = if size.height > 1 { size.height - 1 } else { size.height + 1 };
                self.resize(peer, WindowSize { height, ..size });
                self.restore = Some((now + REPAINT, size));
            }
        }
    }
}

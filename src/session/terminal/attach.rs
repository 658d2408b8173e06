//! A shell that outlives its client: it is left, and found again by the same client or by its user's next one.

use std::time::{Duration, Instant};

use super::{Discard, Frame, Peer, Record, Running, State, Terminal, WindowSize, wire};
use crate::outbox::Sink;
use crate::sys::clock;

/// Programs that are told of two sizes at once look only at the second.
const REPAINT: Duration = Duration::from_millis(50);

impl Terminal {
    /// True if there is a shell that another session of its user may find.
    pub(crate) fn can_detach(&self) -> bool {
        matches!(&self.state, State::Running(running) if !running.info.user.as_str().is_empty())
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
        running.permit.detach();
        running.clock.pause();
    }

    /// A client is there, since `since` of the last one: the same, or with its `request` for a shell another of the same
    /// user. Hands the request back if the shell has ended.
    pub(crate) fn attach(
        &mut self,
        peer: &mut Peer,
        request: Option<Frame>,
        since: Instant,
        now: Instant,
    ) -> Option<Frame> {
        let State::Running(running) = &mut self.state else { return request };
        running.detached = None;
        running.discard = Discard::default();
        running.permit.attach(&peer.wake);
        running.clock.resume(now);
        running.info = peer.info.adopt_shell(&running.info);
        running.describe(&peer.id, now);
        Record::new("shell-attach", Some(&peer.id), &running.info.user)
            .with("pid", running.info.pid)
            .since(since, now)
            .log(true);
        // The client never answers what the lost link asked it.
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
            Some(request) => running.welcome(peer, &request, now.saturating_duration_since(since), now),
        }
        None
    }

    /// Ends a shell to which nobody came back.
    pub(crate) fn end_alone(&mut self, peer: &mut Peer, now: Instant) {
        if matches!(self.state, State::Running(_)) {
            self.end_because(peer, "not reattached", "nobody came back to the shell".to_owned(), now);
        }
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

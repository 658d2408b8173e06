//! A shell that outlives the agent: what the next one has to know about it.

use std::io;

use super::clock::Clock;
use super::shell::Shell;
use super::{History, Instant, Peer, Running, State, Terminal, WindowSize};
use crate::proto::{Frame, Map, SHELL, SessionId};
use crate::session::shells::ShellPermit;
use crate::session::store::Place;
use crate::sys::clock;
use crate::sys::process::SessionLeader;
use crate::sys::pty::Pty;

impl Terminal {
    /// Goes on with a shell, without a client yet.
    pub(crate) fn adopt(
        peer: &Peer,
        description: &Frame,
        (pty, size): (Pty, WindowSize),
        permit: ShellPermit,
        place: Place,
        now: Instant,
    ) -> io::Result<Self> {
        let config = peer.device.config();
        let number = |key| description.props.int(key).and_then(|number| u64::try_from(number).ok());
        let numbers = number("end").zip(number("sent")).zip(number("typed"));
        let ((end, sent), typed) = numbers.ok_or(io::ErrorKind::InvalidData)?;
        let output = description.body.len().checked_sub(usize::try_from(typed).unwrap_or(usize::MAX));
        let (output, input) = description.body.split_at(output.ok_or(io::ErrorKind::InvalidData)?);
        let history = History::adopt(output, (end, sent), peer.device.memory.none());
        let history = history.ok_or(io::ErrorKind::InvalidData)?;
        // Last: on an error behind it the process would be killed instead of hung up.
        let process = SessionLeader::of_terminal(&pty, config.shell.user.uid)?;
        let info = peer.info.set_shell(description.user(), process.pid(), peer.info.traffic.since);
        let shell = Shell::adopt(process, pty, input, peer.device.memory.none());
        let mut clock = Clock::new(&config.sessions, info.traffic.since);
        clock.input(now);
        clock.pause();
        let mut running = Running::new(shell, info, permit, clock, size, history);
        (running.detached, running.place) = (Some(now), Some(place));
        Ok(Terminal { state: State::Running(Box::new(running)), ..Terminal::default() })
    }

    /// Leaves the shell to the next agent, if this one ends and a place is kept. False if it has to be ended.
    pub(crate) fn leave(&mut self, id: &SessionId, now: Instant) -> bool {
        match std::mem::take(&mut self.state) {
            State::Running(running) if running.place.as_ref().is_some_and(Place::is_left) => {
                running.describe(id, now);
                // Its end would be the process's.
                std::mem::forget(running.shell.process);
                true
            }
            other => {
                self.state = other;
                false
            }
        }
    }
}

impl Running {
    /// Tells the next agent of the shell, which belongs to this session now.
    pub(super) fn describe(&self, id: &SessionId, now: Instant) {
        let Some(place) = &self.place else { return };
        let age = now.saturating_duration_since(self.info.traffic.since);
        let started = clock::now().saturating_sub(age).as_secs();
        // Before this agent ends they change too often to be written down.
        let (output, (end, sent), input) = match place.is_left() {
            true => (self.history.bytes(), self.history.numbers(), self.shell.input.clone()),
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

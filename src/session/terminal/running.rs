//! A running shell: its output on the way to the client, or into the history while there is none.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::warn;
use nix::poll::PollFlags;

use super::clock::Clock;
use super::history::History;
use super::shell::{Shell, Then};
use crate::outbox::{Class, Discard};
use crate::proto::Frame;
use crate::proto::shell as wire;
use crate::session::device::Device;
use crate::session::peer::Peer;
use crate::session::shells::ShellPermit;
use crate::session::stats::ShellInfo;
use crate::sys::process::Exit;
use crate::sys::pty::WindowSize;
use crate::sys::{PollSet, reason};

/// Time for a client to answer when its user wants another shell.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(2);
/// Time for a stopped shell to end, before it is killed and again after that.
pub(super) const STOP_GRACE: Duration = Duration::from_secs(2);
/// When the history of a detached shell is full, the program waits this long before output is dropped.
const HOLD_LIMIT: Duration = Duration::from_secs(5);

/// Bytes of output in a frame, as the link allows. The smallest takes one read of a terminal.
const SMALLEST_OUTPUT: usize = 4 * 1024;
const LARGEST_OUTPUT: usize = 32 * 1024;

pub(super) struct Running {
    pub(super) shell: Shell,
    pub(super) info: Arc<ShellInfo>,
    pub(super) permit: ShellPermit,
    pub(super) clock: Clock,
    pub(super) history: History,
    pub(super) detached: Option<Instant>,
    /// The permit's question that the client was pinged for.
    pub(super) asked: Option<Instant>,
    /// Takes this size after another one has made programs redraw.
    pub(super) restore: Option<(Instant, WindowSize)>,
    pub(super) discard: Discard,
    /// Set when the process is reaped. Its last output may still be in the terminal.
    pub(super) exit: Option<Exit>,
    /// No process has the terminal open any more.
    pub(super) at_end: bool,
    /// When to stop waiting for the process's exit or for the end of output, whichever is missing.
    pub(super) give_up: Option<Instant>,
}

impl Running {
    pub(super) fn new(shell: Shell, info: Arc<ShellInfo>, permit: ShellPermit, history: History) -> Self {
        Running {
            clock: Clock::new(info.traffic.since),
            shell,
            info,
            permit,
            history,
            detached: None,
            asked: None,
            restore: None,
            discard: Discard::default(),
            exit: None,
            at_end: false,
            give_up: None,
        }
    }

    pub(super) fn watch<'a>(&'a self, peer: &Peer, set: &mut PollSet<'a>, now: Instant) {
        let credit = if self.detached.is_some() { None } else { peer.credit.deadline(now) };
        let answer = self.asked.map(|at| at + ANSWER_LIMIT);
        let config = peer.device.config();
        let clock = self.clock.deadline(config.expiry);
        let alone = self.detached.and_then(|since| since.checked_add(config.keep_detached));
        let hold = self.detached.map(|since| since + HOLD_LIMIT).filter(|at| now < *at);
        let restore = self.restore.map(|(at, _)| at);
        let takes_output = self.takes_output(peer, now);
        let unsent = (takes_output && self.detached.is_none() && !self.history.is_sent()).then_some(now);
        set.until(&[self.give_up, credit, clock, answer, restore, unsent, hold, alone]);
        let mut events = PollFlags::empty();
        events.set(PollFlags::POLLIN, takes_output);
        events.set(PollFlags::POLLOUT, !self.shell.input.is_empty());
        // poll(2) reports POLLHUP for a closed terminal all the time, even if asked for nothing.
        if !self.at_end && !events.is_empty() {
            set.add(self.shell.pty.as_fd(), events);
        }
        if self.exit.is_none() {
            set.add(self.shell.process.as_fd(), PollFlags::POLLIN);
        }
    }

    pub(super) fn pass_output(&mut self, peer: &mut Peer, now: Instant) {
        while self.takes_output(peer, now)
            && !(self.at_end && (self.detached.is_some() || self.history.is_sent()))
        {
            let most = peer.sink.piece(SMALLEST_OUTPUT, LARGEST_OUTPUT);
            let (message, (length, then)) = peer.sink.compose(&wire::output(&peer.id), most, |place| {
                let output = self.next_output(&peer.device, place, now);
                (output.0, output)
            });
            if length > 0 && self.detached.is_none() {
                let mark = self.history.mark(length);
                peer.sink.send(message, Class::Interactive, Some(&self.discard), Some(mark));
                peer.credit.sent(length, now);
            }
            match then {
                Then::More => {}
                Then::Wait => return,
                Then::End => {
                    self.at_end = true;
                    self.give_up = Some(now + STOP_GRACE);
                }
            }
            if self.detached.is_none() && peer.credit.wants_probe(now) {
                ping(peer, now);
            }
        }
    }

    fn next_output(&mut self, device: &Device, place: &mut [u8], now: Instant) -> (usize, Then) {
        if self.detached.is_none() && !self.history.is_sent() {
            return (self.history.unsent(place), Then::More);
        }
        let room = if self.holds(now) { self.history.room() } else { usize::MAX };
        let room = room.min(place.len());
        let (length, then) = self.shell.read_output(&mut place[..room]);
        if length > 0 {
            self.history.push(&place[..length]);
            self.info.traffic.add_out(length);
            if device.config().idle_includes_output {
                self.clock.active(now);
            }
        }
        (length, then)
    }

    /// The program waits rather than lose output of a detached shell.
    fn holds(&self, now: Instant) -> bool {
        self.detached.is_some_and(|since| now < since + HOLD_LIMIT)
    }

    /// If false, the output stays in the terminal and programs wait.
    pub(super) fn takes_output(&self, peer: &Peer, now: Instant) -> bool {
        if self.detached.is_some() {
            return !self.holds(now) || self.history.room() > 0;
        }
        peer.credit.takes(now) && peer.sink.takes_data(Class::Interactive)
    }

    pub(super) fn resize(&mut self, peer: &Peer, size: WindowSize) {
        if let Err(e) = self.shell.pty.resize(size) {
            warn!("session {}: resizing the terminal: {}", peer.id, reason(&e));
        }
        self.shell.size = size;
    }
}

pub(super) fn ping(peer: &mut Peer, now: Instant) {
    peer.credit.probed(now);
    // As output, which it proves delivered: it must not wait behind other sessions' answers.
    let probe = wire::ping(&peer.id).encode();
    peer.sink.send(probe.into(), Class::Interactive, None, None);
}

pub(super) fn requested_size(frame: &Frame) -> Option<WindowSize> {
    wire::window_size(frame).map(|(width, height)| WindowSize { width, height })
}

//! Frames that wait for a session. The link's reader fills the inbox and never waits.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::permits::{Permit, Permits};
use crate::proto::{Frame, SHELL, shell};
use crate::sys::wake::Wake;
use crate::sys::{lock, trim};

const MAX_FRAMES: usize = 1024;
/// Frames that an inbox keeps room for.
const SMALL: usize = 32;
/// The first frame is taken whatever its size.
const MAX_BYTES: usize = 2 << 20;
/// Bytes without a permit for the device's memory: a keystroke gets through when others have used that up.
const RESERVED: usize = 16 << 10;

pub struct Inbox {
    state: Mutex<State>,
    pub(crate) wake: Arc<Wake>,
}

struct State {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// Bytes of the frame that was taken last: its session has it until it asks for the next.
    handled: usize,
    memory: Permit,
    hung_up: Option<HangUp>,
    closed: bool,
    overflowed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HangUp {
    LinkLost,
    InboxFull,
    NoRoom,
}

impl HangUp {
    pub(crate) fn name(self) -> &'static str {
        match self {
            HangUp::LinkLost => "link lost",
            HangUp::InboxFull => "inbox full",
            HangUp::NoRoom => "too many sessions",
        }
    }
}

#[derive(Debug)]
pub(crate) enum Rejected {
    /// No room, or the session was hung up. True the first time.
    Full(Frame, bool),
    Closed(Frame),
}

impl State {
    /// False if the device has no memory for them.
    fn count(&mut self, bytes: usize) -> bool {
        let room = self.memory.resize((bytes + self.handled).saturating_sub(RESERVED));
        if room {
            self.bytes = bytes;
        }
        room
    }

    fn close(&mut self) {
        self.closed = true;
        // clear() would keep the queue's memory, which is no longer counted.
        self.frames = VecDeque::new();
        self.count(0);
    }
}

impl Inbox {
    pub(crate) fn new(wake: Arc<Wake>, memory: &Arc<Permits>) -> Self {
        let state = State {
            frames: VecDeque::new(),
            bytes: 0,
            handled: 0,
            memory: memory.none(),
            hung_up: None,
            closed: false,
            overflowed: false,
        };
        Inbox { state: Mutex::new(state), wake }
    }

    /// Queues a frame and wakes the session. Coalesces resizes, so that dragging a window can't fill the inbox, but
    /// replaces only the last frame: a resize must not overtake others, such as a `stop` and a `new`.
    pub(crate) fn push(&self, frame: Frame) -> Result<(), Rejected> {
        let mut state = lock(&self.state);
        match state.hung_up {
            // The id stays taken until the thread has ended: with a second one for each overflow, clients that read
            // nothing got 268 threads, 10 MiB.
            Some(_) => return Err(Rejected::Full(frame, false)),
            None if state.closed => return Err(Rejected::Closed(frame)),
            None => {}
        }
        let is_resize = |frame: &Frame| (frame.proto, frame.typ.as_str()) == (SHELL, shell::RESIZE);
        let last = state.frames.back().filter(|last| is_resize(last) && is_resize(&frame));
        let (replaces, old) = (last.is_some(), last.map_or(0, Frame::held));
        let bytes = state.bytes - old + frame.held();
        let full = !state.frames.is_empty() && (state.frames.len() >= MAX_FRAMES || bytes > MAX_BYTES);
        if (full && !replaces) || !state.count(bytes) {
            let first = !std::mem::replace(&mut state.overflowed, true);
            return Err(Rejected::Full(frame, first));
        }
        if replaces {
            state.frames.pop_back();
        }
        state.frames.push_back(frame);
        drop(state);
        self.wake.notify();
        Ok(())
    }

    /// The first frame that the session `takes` now.
    pub fn pop(&self, takes: impl Fn(&Frame) -> bool) -> Option<Frame> {
        let mut state = lock(&self.state);
        let at = state.frames.iter().position(takes);
        let frame = at.and_then(|at| state.frames.remove(at));
        state.handled = frame.as_ref().map_or(0, Frame::held);
        // The queue's own memory isn't counted.
        trim(&mut state.frames, SMALL);
        let bytes = state.bytes - state.handled;
        state.count(bytes);
        frame
    }

    /// Ends the session. Takes nothing more: what began later would outlive the link. A lost link's frames stay if
    /// they are for a shell that goes on.
    pub(crate) fn hang_up(&self, why: HangUp) {
        let mut state = lock(&self.state);
        state.hung_up.get_or_insert(why);
        let is_left =
            |frame: &Frame| why == HangUp::LinkLost && frame.proto == SHELL && frame.typ != shell::NEW;
        state.frames.retain(is_left);
        trim(&mut state.frames, SMALL);
        let bytes = state.frames.iter().map(Frame::held).sum();
        state.count(bytes);
        drop(state);
        self.wake.notify();
    }

    pub fn hung_up(&self) -> Option<HangUp> {
        lock(&self.state).hung_up
    }

    /// Closes the inbox unless a frame has come meanwhile.
    pub fn close_if_empty(&self) -> bool {
        let mut state = lock(&self.state);
        state.closed = state.frames.is_empty();
        state.closed
    }

    pub fn close(&self) {
        lock(&self.state).close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inbox() -> Inbox {
        Inbox::new(Arc::new(Wake::new().unwrap()), &Permits::new(64 << 20))
    }

    fn frame(bytes: usize) -> Frame {
        Frame::new(1, "t", None).with_body(vec![0; bytes])
    }

    #[test]
    fn is_bounded_in_frames_and_bytes() {
        let small = inbox();
        for _ in 0..MAX_FRAMES {
            small.push(frame(0)).unwrap();
        }
        assert!(matches!(small.push(frame(0)), Err(Rejected::Full(_, true))));
        assert!(matches!(small.push(frame(0)), Err(Rejected::Full(_, false))));
        assert!(small.pop(|_| true).is_some());
        small.push(frame(0)).unwrap();

        let large = inbox();
        large.push(frame(MAX_BYTES + 1)).unwrap();
        assert!(matches!(large.push(frame(1)), Err(Rejected::Full(..))));
        large.pop(|_| true).unwrap();
        large.push(frame(MAX_BYTES - frame(0).held())).unwrap();
    }

    /// 100 KiB for each session whose inbox had once been full, even with a frame left in it.
    #[test]
    fn a_short_one_keeps_no_memory() {
        let inbox = inbox();
        while inbox.push(frame(0)).is_ok() {}
        let length = || lock(&inbox.state).frames.len();
        while length() > 1 {
            inbox.pop(|_| true);
        }
        assert!(lock(&inbox.state).frames.capacity() <= 2 * SMALL);
    }

    #[test]
    fn a_keystroke_gets_through_when_others_have_used_up_the_memory() {
        let memory = Permits::new(3 << 20);
        let inbox = || Inbox::new(Arc::new(Wake::new().unwrap()), &memory);
        let (greedy, other) = (inbox(), inbox());
        greedy.push(frame(3 << 20)).unwrap();
        assert!(matches!(other.push(frame(2 * RESERVED)), Err(Rejected::Full(..))));
        other.push(frame(1)).unwrap();
        greedy.hang_up(HangUp::NoRoom);
        assert_eq!(memory.taken(), 0);
        other.push(frame(2 * RESERVED)).unwrap();
        other.pop(|_| true).unwrap();
        other.pop(|_| true).unwrap();
        // It counts while it is handled.
        other.hang_up(HangUp::NoRoom);
        assert_eq!(memory.taken(), frame(2 * RESERVED).held() - RESERVED);
        assert!(other.pop(|_| true).is_none());
        assert_eq!((memory.taken(), lock(&other.state).bytes), (0, 0));
    }

    /// A session that was busy, as with storage that hangs, began what came by a lost link, and held megabytes until then.
    #[test]
    fn of_a_lost_link_only_messages_for_its_shell_stay() {
        let memory = Permits::new(3 << 20);
        let inbox = Inbox::new(Arc::new(Wake::new().unwrap()), &memory);
        let of = |proto, typ| Frame::new(proto, typ, None).with_body(vec![0; RESERVED]);
        let all = [of(SHELL, "new"), of(SHELL, "shell"), of(SHELL + 1, "put_file"), of(SHELL, "stop")];
        all.iter().for_each(|frame| inbox.push(frame.clone()).unwrap());
        inbox.hang_up(HangUp::LinkLost);
        assert_eq!(memory.taken(), all[1].held() + all[3].held() - RESERVED);
        let left: Vec<Frame> = std::iter::from_fn(|| inbox.pop(|_| true)).collect();
        assert_eq!(left, [all[1].clone(), all[3].clone()]);
        assert_eq!(memory.taken(), 0);
    }

    #[test]
    fn a_resize_replaces_the_one_before() {
        let inbox = inbox();
        let resize = |body: &'static str| Frame::new(1, "resize", None).with_body(body);
        for frame in [frame(3), resize(""), resize("a"), resize("bb"), resize("c"), frame(3), frame(3)] {
            inbox.push(frame).unwrap();
        }
        for left in [frame(3), resize("c"), frame(3), frame(3)] {
            assert_eq!(inbox.pop(|_| true), Some(left));
        }
        assert!(inbox.pop(|_| true).is_none() && lock(&inbox.state).bytes == 0);
    }

    /// The size of a shell that was started after another was stopped went to that other.
    #[test]
    fn a_frame_does_not_overtake_others_by_replacing_one() {
        let inbox = inbox();
        let of = |typ, body: &'static str| Frame::new(1, typ, None).with_body(body);
        let sent = [of("resize", "old"), of("stop", ""), of("new", ""), of("resize", "new")];
        for frame in sent.clone() {
            inbox.push(frame).unwrap();
        }
        let read: Vec<Frame> = std::iter::from_fn(|| inbox.pop(|_| true)).collect();
        assert_eq!(read, sent);
    }

    #[test]
    fn nothing_is_lost_between_the_last_look_and_the_end() {
        let inbox = inbox();
        inbox.push(frame(0)).unwrap();
        assert!(!inbox.close_if_empty());
        inbox.pop(|_| true).unwrap();
        assert!(inbox.close_if_empty());
        assert!(matches!(inbox.push(frame(0)), Err(Rejected::Closed(_))));
    }
}

//! What waits to be read by a session. Filled by the reader, which never waits: a full inbox is its
//! session's problem alone.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::proto::Frame;
use crate::sys::wake::Wake;

/// Frames an inbox holds. A session empties it each time it wakes; only a busy one lets it grow.
const MAX_FRAMES: usize = 1024;
/// Bytes of payload an inbox holds. The first frame is taken whatever its size.
const MAX_BYTES: usize = 2 << 20;

/// A session's inbox.
#[derive(Debug)]
pub struct Inbox {
    state: Mutex<State>,
    wake: Arc<Wake>,
}

#[derive(Debug, Default)]
struct State {
    frames: VecDeque<Frame>,
    bytes: usize,
    /// The link is gone: nothing more will come.
    hung_up: bool,
    /// The session is gone: nothing more will be read.
    closed: bool,
    /// There was no room once.
    overflowed: bool,
}

/// Why a frame wasn't taken. It is handed back.
#[derive(Debug)]
pub enum Rejected {
    /// There is no room; whether it is the first time.
    Full(Frame, bool),
    /// The session has ended.
    Closed(Frame),
}

impl Inbox {
    /// Empty; `wake` is called whenever there is news.
    pub fn new(wake: Arc<Wake>) -> Self {
        Inbox { state: Mutex::default(), wake }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a frame. The session hears of it by [`Inbox::announce`].
    ///
    /// # Errors
    /// When the frame can't be taken.
    pub fn push(&self, frame: Frame) -> Result<(), Rejected> {
        let mut state = self.lock();
        if state.closed {
            return Err(Rejected::Closed(frame));
        }
        let bytes = state.bytes + frame.body.len();
        if !state.frames.is_empty() && (state.frames.len() >= MAX_FRAMES || bytes > MAX_BYTES) {
            let first = !std::mem::replace(&mut state.overflowed, true);
            return Err(Rejected::Full(frame, first));
        }
        state.bytes = bytes;
        state.frames.push_back(frame);
        Ok(())
    }

    /// Tells the session of what was pushed.
    pub fn announce(&self) {
        self.wake.notify();
    }

    /// Puts the frame in the place of the last one that waits, if that is of the same kind; otherwise gives it back. An
    /// earlier one isn't replaced: the frame would overtake those between them, such as a `stop` and a `new`.
    pub fn supersede(&self, frame: Frame) -> Option<Frame> {
        let mut state = self.lock();
        let same = |last: &&mut Frame| (last.proto, &last.typ) == (frame.proto, &frame.typ);
        let Some(old) = state.frames.back_mut().filter(same) else { return Some(frame) };
        let (before, after) = (old.body.len(), frame.body.len());
        *old = frame;
        state.bytes = state.bytes - before + after;
        None
    }

    /// The next frame, if there is one.
    pub fn pop(&self) -> Option<Frame> {
        let mut state = self.lock();
        let frame = state.frames.pop_front()?;
        state.bytes -= frame.body.len();
        Some(frame)
    }

    /// Tells the session that the link is gone. Nothing is taken from now on: what began later would outlive it.
    pub fn hang_up(&self) {
        let mut state = self.lock();
        state.hung_up = true;
        state.closed = true;
        state.frames.clear();
        state.bytes = 0;
        drop(state);
        self.wake.notify();
    }

    /// Whether the link is gone.
    pub fn is_hung_up(&self) -> bool {
        self.lock().hung_up
    }

    /// Ends the taking of frames, unless one has come that wants to be read first.
    pub fn close_if_empty(&self) -> bool {
        let mut state = self.lock();
        state.closed = state.frames.is_empty();
        state.closed
    }

    /// Ends the taking of frames; those that are there are lost.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.frames.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inbox() -> Inbox {
        Inbox::new(Arc::new(Wake::new().unwrap()))
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
        assert!(small.pop().is_some());
        small.push(frame(0)).unwrap();

        let large = inbox();
        large.push(frame(MAX_BYTES + 1)).unwrap();
        assert!(matches!(large.push(frame(1)), Err(Rejected::Full(..))));
        large.pop().unwrap();
        large.push(frame(MAX_BYTES)).unwrap();
    }

    #[test]
    fn the_last_frame_can_be_replaced_by_one_of_its_kind() {
        let inbox = inbox();
        let resize = |body: &'static str| Frame::new(1, "resize", None).with_body(body);
        assert!(inbox.supersede(resize("")).is_some());
        inbox.push(frame(3)).unwrap();
        inbox.push(resize("")).unwrap();
        for size in ["a", "bb", "c"] {
            assert!(inbox.supersede(resize(size)).is_none());
        }
        assert!(inbox.supersede(Frame::new(1, "other", None)).is_some());
        assert_eq!(inbox.pop(), Some(frame(3)));
        assert_eq!(inbox.pop(), Some(resize("c")));
        assert!(inbox.pop().is_none() && inbox.lock().bytes == 0);
    }

    /// The size of a shell that was started after another was stopped went to that other.
    #[test]
    fn a_frame_does_not_overtake_others_by_replacing_one() {
        let inbox = inbox();
        let of = |typ, body: &'static str| Frame::new(1, typ, None).with_body(body);
        let sent = [of("resize", "old"), of("stop", ""), of("new", ""), of("resize", "new")];
        for frame in sent.clone() {
            if let Some(frame) = inbox.supersede(frame) {
                inbox.push(frame).unwrap();
            }
        }
        let read: Vec<Frame> = std::iter::from_fn(|| inbox.pop()).collect();
        assert_eq!(read, sent);
    }

    #[test]
    fn nothing_is_lost_between_the_last_look_and_the_end() {
        let inbox = inbox();
        inbox.push(frame(0)).unwrap();
        assert!(!inbox.close_if_empty());
        inbox.pop().unwrap();
        assert!(inbox.close_if_empty());
        assert!(matches!(inbox.push(frame(0)), Err(Rejected::Closed(_))));
    }
}

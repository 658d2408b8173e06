//! What waits to be written to the websocket: filled by sessions, emptied by the link's writer.
//!
//! Bounds: a session has at most [`FRAMES_IN_FLIGHT`] frames of data and, since it stops reading its inbox
//! meanwhile, little more than [`REPLIES_IN_FLIGHT`] answers here. A count is a permit inside the queued
//! frame, so it can't drift.

mod message;

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use crate::proto::Frame;
use crate::sys::wake::Wake;

use self::message::Spares;
pub use self::message::{FRONT, Message};

/// Frames of data, and again of bulk, a session may have queued: one being written and one behind it.
pub const FRAMES_IN_FLIGHT: usize = 2;
/// Answers a session may have queued before it stops listening.
pub const REPLIES_IN_FLIGHT: usize = 32;

/// The payload of a ping that asks how far the messages have come: how many bytes were written before it.
pub type Probe = [u8; 8];

/// Messages up to this size are copied to be written together.
pub const SMALL: usize = 4 * 1024;

/// After so many interactive frames in a row one that waits as bulk has its turn.
const MAX_FAVOURED: u32 = 16;

/// What the writer does next, most urgent first.
#[derive(Debug)]
pub enum Work {
    /// Write the rest of what a session has begun.
    Rest,
    /// Say goodbye with this code and reason, and end.
    Close(u16, &'static str),
    /// Answer a ping.
    Pong(Bytes),
    /// The TLS layer has something of its own to say.
    Flush,
    /// Send this message. Whether it is bulk.
    Message(Message, bool),
    /// A probe was answered then.
    Answered(Probe, Instant),
    /// Nothing came before the deadline.
    Nothing,
}

/// What may leave now.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// Files and forwarded connections.
    pub bulk: bool,
    /// Everything else.
    pub interactive: bool,
}

/// Where the messages go.
pub trait Line: fmt::Debug + Send + Sync {
    /// Writes a small message, as far as that goes without waiting, unless others on the way leave no room for it.
    ///
    /// # Errors
    /// The message, if there is no room.
    fn write_now(&self, message: Message) -> Result<Written, Message>;
}

/// How much was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// All of it.
    All,
    /// Not all of it: the writer has to see to the rest, before anything else.
    Part,
}

/// The queues, shared by the writer, the reader and every session of a link.
#[derive(Debug, Default)]
pub struct Outbox {
    queues: Mutex<Queues>,
    filled: Condvar,
    spares: Arc<Spares>,
    piece: AtomicUsize,
    line: OnceLock<Arc<dyn Line>>,
}

#[derive(Debug, Default)]
struct Queues {
    /// Somebody writes: the writer, or a session on its own.
    busy: bool,
    /// The writer waits for a session to have written.
    awaited: bool,
    /// A session couldn't write all of it.
    rest: bool,
    close: Option<(u16, &'static str)>,
    /// Only the latest ping needs an answer (RFC 6455, 5.5.3).
    pong: Option<Bytes>,
    flush: bool,
    /// The latest answer speaks for those before.
    answered: Option<(Probe, Instant)>,
    interactive: VecDeque<Item>,
    bulk: VecDeque<Item>,
    /// Interactive frames that left in a row while bulk waited.
    favoured: u32,
}

#[derive(Debug)]
struct Item {
    message: Message,
    /// Void once its session has thrown away such a lot.
    epoch: Option<(Lot, u32)>,
    permit: Permit,
}

impl Item {
    /// Whether waking the writer would take longer than writing it.
    fn is_small(&self) -> bool {
        !matches!(self.permit.kind, Kind::Bulk) && self.message.size() <= SMALL
    }
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Queues> {
        // The critical sections can't panic half-way.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the writer to close the websocket.
    pub fn close(&self, code: u16, reason: &'static str) {
        self.lock().close.get_or_insert((code, reason));
        self.filled.notify_one();
    }

    /// Asks the writer to answer a ping.
    pub fn pong(&self, payload: Bytes) {
        self.lock().pong = Some(payload);
        self.filled.notify_one();
    }

    /// Asks the writer to send what the TLS layer has to say.
    pub fn flush(&self) {
        self.lock().flush = true;
        self.filled.notify_one();
    }

    /// Tells the writer of a probe's pong.
    pub fn answered(&self, probe: Probe, now: Instant) {
        self.lock().answered = Some((probe, now));
        self.filled.notify_one();
    }

    /// Where sessions may write on their own, from the next time on that the writer waits.
    pub fn set_line(&self, line: Arc<dyn Line>) {
        self.lock().busy = true;
        // Only once.
        let _ = self.line.set(line);
    }

    fn push(&self, item: Item) {
        let mut queues = self.lock();
        let item = match self.line.get() {
            Some(line) if queues.is_idle() && item.is_small() => {
                queues.busy = true;
                drop(queues);
                match self.write_now(line, item) {
                    None => return,
                    Some(refused) => {
                        queues = self.lock();
                        refused
                    }
                }
            }
            _ => item,
        };
        match item.permit.kind {
            Kind::Data | Kind::Reply => queues.interactive.push_back(item),
            Kind::Bulk => queues.bulk.push_back(item),
        }
        drop(queues);
        self.filled.notify_one();
    }

    /// Writes an item in the thread of the session that has made it: waking the writer would take longer. Back if
    /// there is no room.
    fn write_now(&self, line: &Arc<dyn Line>, item: Item) -> Option<Item> {
        let Item { message, epoch, permit } = item;
        let (written, refused) = match line.write_now(message) {
            Ok(written) => (written, None),
            Err(message) => (Written::All, Some(Item { message, epoch, permit })),
        };
        let mut queues = self.lock();
        queues.busy = false;
        queues.rest = written == Written::Part;
        if !queues.is_idle() || std::mem::take(&mut queues.awaited) {
            self.filled.notify_one();
        }
        refused
    }

    /// The next thing to do, waiting for it until `deadline`. What was done before has to be written.
    pub fn next(&self, room: Room, deadline: Instant) -> Work {
        let mut queues = self.lock();
        queues.busy = false;
        loop {
            if queues.busy {
                queues.awaited = true;
                queues = self.filled.wait(queues).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if let Some(work) = queues.take(room) {
                queues.busy = true;
                return work;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                queues.busy = true;
                return Work::Nothing;
            }
            queues = self.filled.wait_timeout(queues, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How large a message of bulk should be.
    pub fn set_piece(&self, bytes: usize) {
        self.piece.store(bytes, Ordering::Relaxed);
    }

    /// There is little to do: gives back what only busy times need.
    pub fn rest(&self) {
        self.spares.clear();
    }

    /// The next thing to do, if there is one.
    pub fn try_next(&self, room: Room) -> Option<Work> {
        self.lock().take(room)
    }
}

impl Queues {
    /// Whether nobody writes and nothing is to be written.
    fn is_idle(&self) -> bool {
        let urgent = self.close.is_some() || self.pong.is_some() || self.flush || self.rest;
        !(self.busy || urgent) && self.interactive.is_empty() && self.bulk.is_empty()
    }

    fn take(&mut self, room: Room) -> Option<Work> {
        if std::mem::take(&mut self.rest) {
            return Some(Work::Rest);
        }
        if let Some((code, reason)) = self.close.take() {
            return Some(Work::Close(code, reason));
        }
        if let Some(payload) = self.pong.take() {
            return Some(Work::Pong(payload));
        }
        if std::mem::take(&mut self.flush) {
            return Some(Work::Flush);
        }
        if let Some((probe, when)) = self.answered.take() {
            return Some(Work::Answered(probe, when));
        }
        while let Some(item) = self.pop(room) {
            let account = &item.permit.account;
            let void = |(lot, epoch)| epoch != account.epoch(lot).load(Ordering::SeqCst);
            if !item.epoch.is_some_and(void) {
                return Some(Work::Message(item.message, matches!(item.permit.kind, Kind::Bulk)));
            }
        }
        None
    }

    /// Interactive frames go first, but a terminal that never stops writing doesn't stop a transfer.
    fn pop(&mut self, room: Room) -> Option<Item> {
        let bulk = room.bulk && !self.bulk.is_empty();
        let interactive = room.interactive && !self.interactive.is_empty();
        if interactive && !(bulk && self.favoured >= MAX_FAVOURED) {
            self.favoured += u32::from(bulk);
            return self.interactive.pop_front();
        }
        self.favoured = 0;
        if bulk { self.bulk.pop_front() } else { None }
    }
}

/// Where a session puts its frames.
#[derive(Debug, Clone)]
pub struct FrameSink {
    outbox: Arc<Outbox>,
    account: Arc<Account>,
}

/// What one session has in the queue.
#[derive(Debug)]
struct Account {
    data: AtomicUsize,
    replies: AtomicUsize,
    bulk: AtomicUsize,
    output_epoch: AtomicU32,
    chunk_epoch: AtomicU32,
    /// The session waits for room and wants to be woken.
    starved: AtomicBool,
    wake: Arc<Wake>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    /// What a terminal shows.
    Data,
    Reply,
    /// Files and forwarded connections.
    Bulk,
}

/// What a session may throw away as a whole.
#[derive(Debug, Clone, Copy)]
enum Lot {
    /// A terminal's output.
    Output,
    /// Chunks of a file.
    Chunks,
}

/// One frame's place in the account, given back when the frame has left the queue.
#[derive(Debug)]
struct Permit {
    account: Arc<Account>,
    kind: Kind,
}

impl Account {
    fn count(&self, kind: Kind) -> &AtomicUsize {
        match kind {
            Kind::Data => &self.data,
            Kind::Reply => &self.replies,
            Kind::Bulk => &self.bulk,
        }
    }

    fn epoch(&self, lot: Lot) -> &AtomicU32 {
        match lot {
            Lot::Output => &self.output_epoch,
            Lot::Chunks => &self.chunk_epoch,
        }
    }
}

impl Permit {
    fn new(account: &Arc<Account>, kind: Kind) -> Self {
        account.count(kind).fetch_add(1, Ordering::SeqCst);
        Permit { account: Arc::clone(account), kind }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.account.count(self.kind).fetch_sub(1, Ordering::SeqCst);
        if self.account.starved.swap(false, Ordering::SeqCst) {
            self.account.wake.notify();
        }
    }
}

impl FrameSink {
    /// A sink of its own account; `wake` is called when room has come that was missed.
    pub fn new(outbox: &Arc<Outbox>, wake: Arc<Wake>) -> Self {
        let account = Account {
            data: AtomicUsize::new(0),
            replies: AtomicUsize::new(0),
            bulk: AtomicUsize::new(0),
            output_epoch: AtomicU32::new(0),
            chunk_epoch: AtomicU32::new(0),
            starved: AtomicBool::new(false),
            wake,
        };
        FrameSink { outbox: Arc::clone(outbox), account: Arc::new(account) }
    }

    /// How large a message of bulk should be, within these bounds, to be no obstacle to a keystroke's echo.
    pub fn piece(&self, least: usize, most: usize) -> usize {
        self.outbox.piece.load(Ordering::Relaxed).clamp(least, most)
    }

    /// The message for `frame` with another body of up to `most` bytes, to be queued: as many as `read` says it has
    /// put into what it is given. Besides, what `read` has to say.
    pub fn compose<T>(
        &self,
        frame: &Frame,
        most: usize,
        read: impl FnOnce(&mut [u8]) -> (usize, T),
    ) -> (Message, T) {
        self.outbox.spares.compose(frame, most, read)
    }

    /// Queues an answer. Never refused: ask [`FrameSink::takes_replies`] before taking on what needs one.
    pub fn reply(&self, frame: &Frame) {
        self.push(frame.into(), Kind::Reply, None);
    }

    /// Queues a terminal's output. Never refused: ask [`FrameSink::takes_data`] before reading it from its source.
    pub fn output(&self, message: Message) {
        self.push(message, Kind::Data, Some(Lot::Output));
    }

    /// Queues a message behind all interactive ones. Never refused: ask [`FrameSink::takes_bulk`] before.
    pub fn bulk(&self, message: Message) {
        self.push(message, Kind::Bulk, None);
    }

    /// Queues a chunk of a file, as [`FrameSink::bulk`] would.
    pub fn chunk(&self, message: Message) {
        self.push(message, Kind::Bulk, Some(Lot::Chunks));
    }

    fn push(&self, message: Message, kind: Kind, lot: Option<Lot>) {
        let epoch = lot.map(|lot| (lot, self.account.epoch(lot).load(Ordering::SeqCst)));
        let permit = Permit::new(&self.account, kind);
        self.outbox.push(Item { message, epoch, permit });
    }

    /// Whether there is room for an answer. If not, the session is woken when there is.
    pub fn takes_replies(&self) -> bool {
        self.has_room(Kind::Reply, REPLIES_IN_FLIGHT)
    }

    /// Whether there is room for data. If not, the session is woken when there is.
    pub fn takes_data(&self) -> bool {
        self.has_room(Kind::Data, FRAMES_IN_FLIGHT)
    }

    /// Whether there is room for a bulk frame. If not, the session is woken when there is.
    pub fn takes_bulk(&self) -> bool {
        self.has_room(Kind::Bulk, FRAMES_IN_FLIGHT)
    }

    fn has_room(&self, kind: Kind, limit: usize) -> bool {
        let count = self.account.count(kind);
        if count.load(Ordering::SeqCst) < limit {
            return true;
        }
        // Look again after raising the flag: room may have come in between, unannounced.
        self.account.starved.store(true, Ordering::SeqCst);
        count.load(Ordering::SeqCst) < limit
    }

    /// Throws away the terminal's output that is still queued.
    pub fn discard_output(&self) {
        self.discard(Lot::Output);
    }

    /// Throws away the chunks that are still queued.
    pub fn discard_chunks(&self) {
        self.discard(Lot::Chunks);
    }

    fn discard(&self, lot: Lot) {
        self.account.epoch(lot).fetch_add(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Room = Room { bulk: true, interactive: true };

    fn sink() -> (Arc<Outbox>, FrameSink, Arc<Wake>) {
        let outbox = Arc::new(Outbox::default());
        let wake = Arc::new(Wake::new().unwrap());
        let sink = FrameSink::new(&outbox, Arc::clone(&wake));
        (outbox, sink, wake)
    }

    fn frame(typ: &str) -> Frame {
        Frame::new(1, typ, None)
    }

    fn message(typ: &str) -> Message {
        (&frame(typ)).into()
    }

    fn next(outbox: &Outbox) -> Option<String> {
        match outbox.next(ALL, Instant::now()) {
            Work::Message(mut m, _) => Some(Frame::decode(&m.content().to_vec().into()).unwrap().typ),
            Work::Nothing => None,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn frames_leave_in_order_and_urgent_matters_first() {
        let (outbox, sink, _wake) = sink();
        sink.output(message("a"));
        sink.reply(&frame("b"));
        outbox.flush();
        outbox.pong(Bytes::from_static(b"1"));
        outbox.pong(Bytes::from_static(b"2"));
        let now = Instant::now();
        assert!(matches!(outbox.next(ALL, now), Work::Pong(p) if p == "2"));
        assert!(matches!(outbox.next(ALL, now), Work::Flush));
        assert_eq!(next(&outbox).as_deref(), Some("a"));
        outbox.close(1000, "");
        assert!(matches!(outbox.next(ALL, now), Work::Close(1000, "")));
        assert_eq!(next(&outbox).as_deref(), Some("b"));
        assert!(next(&outbox).is_none() && outbox.try_next(ALL).is_none());
    }

    #[test]
    fn room_comes_back_with_each_frame_that_leaves() {
        let (outbox, sink, _wake) = sink();
        for _ in 0..FRAMES_IN_FLIGHT {
            assert!(sink.takes_data());
            sink.output(message("d"));
        }
        assert!(!sink.takes_data() && sink.takes_replies());
        assert!(next(&outbox).is_some());
        assert!(sink.takes_data());
        for _ in 0..REPLIES_IN_FLIGHT {
            sink.reply(&frame("r"));
        }
        assert!(!sink.takes_replies());
    }

    #[test]
    fn what_is_thrown_away_makes_room_and_the_rest_stays() {
        let (outbox, sink, _wake) = sink();
        let fill = || {
            sink.output(message("output"));
            sink.reply(&frame("reply"));
            sink.chunk(message("chunk"));
            sink.bulk(message("bulk"));
        };
        let rest = || std::iter::from_fn(|| next(&outbox)).collect::<Vec<_>>();
        fill();
        sink.discard_output();
        sink.output(message("new"));
        assert_eq!(rest(), ["reply", "new", "chunk", "bulk"]);
        fill();
        sink.discard_chunks();
        sink.chunk(message("new"));
        assert_eq!(rest(), ["output", "reply", "bulk", "new"]);
        assert!(sink.takes_data() && sink.takes_bulk());
    }

    #[test]
    fn a_queue_that_goes_away_gives_all_room_back() {
        let (outbox, sink, _wake) = sink();
        sink.output(message("d"));
        sink.output(message("d"));
        assert!(!sink.takes_data());
        outbox.lock().interactive.clear();
        assert!(sink.takes_data());
    }

    #[test]
    fn bulk_waits_for_interactive_frames_but_not_for_ever() {
        let (outbox, sink, _wake) = sink();
        sink.bulk(message("bulk"));
        sink.output(message("echo"));
        assert_eq!(next(&outbox).as_deref(), Some("echo"));
        assert_eq!(next(&outbox).as_deref(), Some("bulk"));
        sink.bulk(message("bulk"));
        for _ in 0..100 {
            sink.output(message("flood"));
        }
        let order: Vec<String> = (0..=MAX_FAVOURED).filter_map(|_| next(&outbox)).collect();
        assert!(order.contains(&"bulk".to_owned()), "{order:?}");
    }

    #[test]
    fn what_there_is_no_room_for_stays() {
        let (outbox, sink, _wake) = sink();
        sink.bulk(message("bulk"));
        sink.output(message("echo"));
        let none = Room { bulk: false, interactive: false };
        assert!(outbox.try_next(none).is_none());
        let bulk = Room { bulk: true, interactive: false };
        assert!(matches!(outbox.try_next(bulk), Some(Work::Message(_, true))));
        outbox.answered([0; 8], Instant::now());
        assert!(matches!(outbox.try_next(none), Some(Work::Answered(..))));
        assert_eq!(next(&outbox).as_deref(), Some("echo"));
    }
}

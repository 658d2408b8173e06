//! The outbox as a session sees it: what it may put there, and its account of that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use super::{Item, Message, Outbox};
use crate::proto::Frame;
use crate::sys::wake::Wake;

/// Frames of data, and again of bulk, a session may have queued: one being written and one behind it.
pub const FRAMES_IN_FLIGHT: usize = 2;
/// Answers a session may have queued before it stops listening.
pub const REPLIES_IN_FLIGHT: usize = 32;

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

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// What a terminal shows.
    Data,
    Reply,
    /// Files and forwarded connections.
    Bulk,
}

/// What a session may throw away as a whole.
#[derive(Debug, Clone, Copy)]
pub(super) enum Lot {
    /// A terminal's output.
    Output,
    /// Chunks of a file.
    Chunks,
}

/// One frame's place in the account, given back when the frame has left the queue.
#[derive(Debug)]
pub(super) struct Permit {
    account: Arc<Account>,
    pub(super) kind: Kind,
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
    /// Whether what was put there as a part of `lot` in this epoch has been thrown away since.
    pub(super) fn is_void(&self, lot: Lot, epoch: u32) -> bool {
        self.account.epoch(lot).load(Ordering::SeqCst) != epoch
    }

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
        Message::compose(&self.outbox.spares, frame, most, read)
    }

    /// Queues an answer. Never refused: ask [`FrameSink::takes_replies`] before taking on what needs one.
    pub fn reply(&self, frame: &Frame) {
        self.push(frame.into(), Kind::Reply, None);
    }

    /// Queues answers as [`FrameSink::reply`] would, and wakes the writer once for all of them.
    pub fn replies(&self, frames: impl Iterator<Item = Frame>) {
        // Encoded before the queues are locked.
        let items: Vec<Item> = frames.map(|frame| self.item((&frame).into(), Kind::Reply, None)).collect();
        if !items.is_empty() {
            self.outbox.push(items);
        }
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
        self.outbox.push([self.item(message, kind, lot)]);
    }

    fn item(&self, message: Message, kind: Kind, lot: Option<Lot>) -> Item {
        let epoch = lot.map(|lot| (lot, self.account.epoch(lot).load(Ordering::SeqCst)));
        Item { message, epoch, permit: Permit::new(&self.account, kind) }
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

//! From the sessions and the reader to the link's writer: two bounded channels of messages, interactive before bulk,
//! and one of signals. Sessions wait while a channel is full, the reader never does; nobody waits for an ended writer.

mod pool;

use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};
use crossbeam_utils::sync::{Parker, Unparker};

use crate::proto::Frame;
use crate::sys::wake::Wake;

pub(crate) use self::pool::Pool;

/// The payload of a ping that measures the link: the number of bytes written before it.
pub(crate) type Probe = [u8; 8];

const MAX_INTERACTIVE: usize = 256;
const MAX_BULK: usize = 16;
const MAX_SIGNALS: usize = 64;
/// Buffers kept for messages to be composed in.
const MAX_BUFFERS: usize = 4;
/// Data messages of one class that a session may have here: one being written and one behind it.
const MAX_DATA: usize = 2;
/// Interactive messages in a row before a bulk message that waits has its turn.
const MAX_FAVOURED: u32 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Interactive,
    /// Files and forwarded connections.
    Bulk,
}

/// A task for the writer. All but messages are signals, which go first.
#[derive(Debug)]
pub enum Work {
    Message(Bytes, Class, Option<Mark>),
    /// Send a close frame with this code, and end.
    Close(u16),
    Pong(Bytes),
    /// Ask the server whether it is still there.
    Ping,
    /// The server answered this probe then.
    Answered(Probe, Instant),
}

/// The writer closes the websocket when every [`Outbox`] has been dropped.
const ABANDONED: Work = Work::Close(1000);

/// The classes whose messages the window has credit for.
#[derive(Debug, Clone, Copy)]
pub struct Sendable {
    pub interactive: bool,
    pub bulk: bool,
}

/// When set, the writer drops the messages that were queued with it.
pub(crate) type Discard = Arc<AtomicBool>;

/// How many bytes the link had written when the message was, or 0 as long as it isn't.
pub(crate) type Mark = Arc<AtomicU64>;

#[derive(Debug, Clone)]
pub struct Outbox {
    /// By class. Boxed, so that the channels of an idle link are small.
    messages: [Sender<Box<Item>>; 2],
    signals: Sender<Work>,
    shared: Arc<Shared>,
    /// Behind the channels, which are dropped first.
    writer: Waiting,
}

#[derive(Debug)]
struct Shared {
    /// See [`Sink::piece`].
    piece: AtomicUsize,
    /// See [`Sink::delivered`].
    delivered: AtomicU64,
    pool: Pool,
}

/// Wakes the writer, also when it is dropped: nobody may be left.
#[derive(Debug, Clone)]
struct Waiting(Unparker);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.unpark();
    }
}

#[derive(Debug)]
pub struct Queue {
    messages: [Receiver<Box<Item>>; 2],
    signals: Receiver<Work>,
    shared: Arc<Shared>,
    // Not `select!`: the channels wake the writer with a lock held for which it then waits, 4 context switches a message
    // on a single core.
    parker: Parker,
    /// Interactive messages that left in a row while bulk waited.
    favoured: u32,
}

#[derive(Debug)]
struct Item {
    message: Bytes,
    class: Class,
    discard: Option<Discard>,
    mark: Option<Mark>,
    /// Counts the message while it is data in a channel.
    account: Option<Arc<Account>>,
}

impl Outbox {
    pub fn new() -> (Outbox, Queue) {
        let (interactive, interactive_queue) = bounded(MAX_INTERACTIVE);
        let (bulk, bulk_queue) = bounded(MAX_BULK);
        let (signals, signal_queue) = bounded(MAX_SIGNALS);
        let (piece, delivered) = (AtomicUsize::new(0), AtomicU64::new(u64::MAX));
        let shared = Arc::new(Shared { piece, delivered, pool: Pool::new(MAX_BUFFERS) });
        let (parker, messages) = (Parker::new(), [interactive_queue, bulk_queue]);
        let writer = Waiting(parker.unparker().clone());
        let outbox = Outbox { messages: [interactive, bulk], signals, shared: Arc::clone(&shared), writer };
        (outbox, Queue { messages, signals: signal_queue, shared, parker, favoured: 0 })
    }

    /// For the reader: never waits, drops the signal while too many wait.
    pub(crate) fn signal(&self, signal: Work) {
        let _ = self.signals.try_send(signal);
        self.writer.0.unpark();
    }

    /// Asks the writer to close the websocket. Waits until `deadline` if too many signals wait.
    pub(crate) fn close(&self, code: u16, deadline: Instant) {
        let _ = self.signals.send_deadline(Work::Close(code), deadline);
        self.writer.0.unpark();
    }

    /// Sets what [`Sink::delivered`] returns: to be called when the link has ended.
    pub(crate) fn set_delivered(&self, bytes: u64) {
        self.shared.delivered.store(bytes, Ordering::SeqCst);
    }

    /// Queues an answer, waiting for its place.
    pub fn reply(&self, frame: &Frame) {
        self.put(Item::of(frame, Class::Interactive));
    }

    /// For the reader: never waits, returns false if there is no place for the answer.
    pub(crate) fn try_reply(&self, frame: &Frame) -> bool {
        let item = Item::of(frame, Class::Interactive);
        let sent = self.messages[item.class as usize].try_send(item).is_ok();
        self.writer.0.unpark();
        sent
    }

    fn put(&self, item: Box<Item>) {
        // Fails when the writer has ended.
        let _ = self.messages[item.class as usize].send(item);
        self.writer.0.unpark();
    }
}

impl Item {
    fn of(frame: &Frame, class: Class) -> Box<Self> {
        Box::new(Item { message: frame.encode().into(), class, discard: None, mark: None, account: None })
    }

    /// `None` if it is to be discarded.
    fn work(mut self) -> Option<Work> {
        let discarded = self.discard.as_ref().is_some_and(|discard| discard.load(Ordering::SeqCst));
        (!discarded).then(|| Work::Message(mem::take(&mut self.message), self.class, self.mark.take()))
    }
}

impl Drop for Item {
    fn drop(&mut self) {
        let Some(account) = &self.account else { return };
        account.queued[self.class as usize].fetch_sub(1, Ordering::SeqCst);
        if account.starved.swap(false, Ordering::SeqCst) {
            account.wake.notify();
        }
    }
}

impl Queue {
    /// Sets what [`Sink::piece`] returns.
    pub(crate) fn set_piece(&self, bytes: usize) {
        self.shared.piece.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn free_buffers(&self) {
        self.shared.pool.clear();
    }

    /// Takes the next task; `None` if none waits.
    pub fn try_next(&mut self, sendable: Sendable) -> Option<Work> {
        match self.signals.try_recv() {
            Ok(signal) => return Some(signal),
            Err(TryRecvError::Disconnected) => return Some(ABANDONED),
            Err(TryRecvError::Empty) => {}
        }
        std::iter::from_fn(|| self.pop(sendable)).find_map(|item| item.work())
    }

    /// As [`Queue::try_next`], but waits until `deadline`.
    pub fn next(&mut self, sendable: Sendable, deadline: Instant) -> Option<Work> {
        loop {
            let work = self.try_next(sendable);
            if work.is_some() || Instant::now() >= deadline {
                return work;
            }
            self.parker.park_deadline(deadline);
        }
    }

    /// Interactive messages go first, but a terminal that never stops writing doesn't stop a transfer.
    fn pop(&mut self, sendable: Sendable) -> Option<Box<Item>> {
        let [interactive, bulk] = &self.messages;
        let bulk_waits = sendable.bulk && !bulk.is_empty();
        if sendable.interactive
            && !(bulk_waits && self.favoured >= MAX_FAVOURED)
            && let Ok(item) = interactive.try_recv()
        {
            self.favoured += u32::from(bulk_waits);
            return Some(item);
        }
        self.favoured = 0;
        if bulk_waits { bulk.try_recv().ok() } else { None }
    }
}

/// A session's way into the outbox, which counts the session's data there.
#[derive(Debug, Clone)]
pub struct Sink {
    outbox: Outbox,
    account: Arc<Account>,
}

#[derive(Debug)]
struct Account {
    /// Data messages in the channels, by class: a transfer's must not be in the way of the same session's terminal.
    queued: [AtomicUsize; 2],
    /// The session waits for a place and wants to be woken.
    starved: AtomicBool,
    wake: Arc<Wake>,
}

impl Sink {
    /// `wake` tells the session that there is a place for data again, after [`Sink::takes_data`] found none.
    pub fn new(outbox: &Outbox, wake: Arc<Wake>) -> Self {
        let account = Account { queued: Default::default(), starved: AtomicBool::new(false), wake };
        Sink { outbox: outbox.clone(), account: Arc::new(account) }
    }

    /// One that drops everything, for a session without a link.
    pub(crate) fn closed(wake: &Arc<Wake>) -> Self {
        Sink::new(&Outbox::new().0, Arc::clone(wake))
    }

    /// How many bytes a data message should have, so that an echo doesn't wait long behind it.
    pub(crate) fn piece(&self, least: usize, most: usize) -> usize {
        self.outbox.shared.piece.load(Ordering::Relaxed).clamp(least, most)
    }

    /// Encodes `frame` with a body of up to `most` bytes into a pooled buffer, see [`Frame::encode_with`].
    pub fn compose<T>(
        &self,
        frame: &Frame,
        most: usize,
        read: impl FnOnce(&mut [u8]) -> (usize, T),
    ) -> (Bytes, T) {
        let size = frame.head_room() + most;
        let mut buffer = self.outbox.shared.pool.take(size);
        let (part, result) = frame.encode_with(&mut buffer[..size], read);
        (self.outbox.shared.pool.freeze(buffer, part), result)
    }

    /// True if there is a place for data. If not, the session is woken when there is.
    pub(crate) fn takes_data(&self, class: Class) -> bool {
        let queued = &self.account.queued[class as usize];
        if queued.load(Ordering::SeqCst) < MAX_DATA {
            return true;
        }
        // Look again after raising the flag: a place may have come in between, without a wake.
        self.account.starved.store(true, Ordering::SeqCst);
        queued.load(Ordering::SeqCst) < MAX_DATA
    }

    /// Queues data, waiting if many sessions have some. Ask [`Sink::takes_data`] before reading it from its source.
    pub fn send(&self, message: Bytes, class: Class, discard: Option<&Discard>) {
        self.send_marked(message, class, discard, None);
    }

    /// The same for a message whose fate its sender wants to know.
    pub(crate) fn send_marked(
        &self,
        message: Bytes,
        class: Class,
        discard: Option<&Discard>,
        mark: Option<Mark>,
    ) {
        self.account.queued[class as usize].fetch_add(1, Ordering::SeqCst);
        let account = Some(Arc::clone(&self.account));
        self.outbox.put(Box::new(Item { message, class, discard: discard.cloned(), mark, account }));
    }

    /// How many of the link's bytes the other side has got, as [`Mark`]s count them. While the link lives, it counts as all.
    pub(crate) fn delivered(&self) -> u64 {
        self.outbox.shared.delivered.load(Ordering::SeqCst)
    }

    pub fn reply(&self, frame: &Frame) {
        self.outbox.reply(frame);
    }

    /// Queues an answer behind the session's bulk data, waiting for its place.
    pub(crate) fn reply_behind_bulk(&self, frame: &Frame) {
        self.outbox.put(Item::of(frame, Class::Bulk));
    }
}

#[cfg(test)]
mod tests;

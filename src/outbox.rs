//! From the sessions and the reader to the writer: two bounded channels of messages, interactive before bulk, and one
//! of signals. Sessions wait while a channel is full, the reader never does; nobody waits for a writer that has ended.

mod pool;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use crossbeam_utils::sync::{Parker, Unparker};

use crate::permits::{Permit, Permits};
use crate::proto::Frame;
use crate::sys::wake::Wake;

pub(crate) use self::pool::Pool;

/// Payload of a probe: the number of bytes written before it.
pub(crate) type Probe = [u8; 8];

/// A key's echo waits for all that is queued before it, such as the answers to a flood: at 1 Mbit/s 256 of them took
/// 2 s, and with long paths 10 s.
const MAX_INTERACTIVE: usize = 32;
/// Further ones that [`Outbox::try_reply`] has room for, whatever the sessions send.
const MAX_ANSWERS: usize = 32;
/// Messages of terminals, two and a probe of each: behind the answers of 250 sessions, each of which waits for a place, an
/// echo took 9 s.
const MAX_OUTPUT: usize = 48;
/// Bytes of an answer's body. Longer ones, such as that to the `stat` of a long path, go with bulk data.
const SHORT: usize = 1024;
const MAX_BULK: usize = 16;
const MAX_SIGNALS: usize = 64;
const MAX_BUFFERS: usize = 4;
/// Bytes of a data message while there are as many as the bulk channel holds: each session may read one, or wait with
/// it for a place.
const CROWDED: usize = 32 * 1024;
/// Queued data messages of a session and class: one being written, one behind it.
const MAX_DATA: usize = 2;
/// Interactive messages in a row before a waiting bulk message has its turn.
const MAX_FAVOURED: u32 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Interactive,
    /// Files and forwards.
    Bulk,
}

/// Everything but messages is a signal, which goes first.
#[derive(Debug)]
pub enum Work {
    Message(Bytes, Class, Option<Mark>),
    /// Send a close frame, and end.
    Close(u16),
    Pong(Bytes),
    /// Ask the server now whether it is alive. If true, it has half of the usual time.
    Ping(bool),
    Answered(Probe, Instant),
}

/// Classes that the window has credit for.
#[derive(Debug, Clone, Copy)]
pub struct Sendable {
    pub interactive: bool,
    pub bulk: bool,
}

/// Once set, the writer drops the messages queued with it.
pub(crate) type Discard = Arc<AtomicBool>;

/// Bytes that the link had written when the message was; 0 until then.
pub(crate) type Mark = Arc<AtomicU64>;

#[derive(Clone)]
pub struct Outbox {
    /// By class. Boxed, so that the channels of an idle link are small.
    messages: [Sender<Box<Item>>; 2],
    /// Has an entry for each reply that waited for its place.
    places: Sender<()>,
    signals: Sender<Work>,
    shared: Arc<Shared>,
    writer: Unparker,
}

struct Shared {
    piece: AtomicUsize,
    delivered: AtomicU64,
    /// The writer has ended.
    over: AtomicBool,
    pool: Pool,
}

pub struct Queue {
    messages: [Receiver<Box<Item>>; 2],
    places: Receiver<()>,
    signals: Receiver<Work>,
    shared: Arc<Shared>,
    // Not `select!`: the channels wake the writer while holding a lock that it then waits for, 4 context switches a
    // message on a single core.
    parker: Parker,
    /// Interactive messages sent in a row while bulk waited.
    favoured: u32,
}

struct Item {
    message: Bytes,
    class: Class,
    /// Whether it has an entry among the places.
    waited: bool,
    discard: Option<Discard>,
    mark: Option<Mark>,
    /// A data message's, while it is queued.
    _place: Option<Permit>,
}

impl Outbox {
    pub fn new() -> (Outbox, Queue) {
        let (interactive, interactive_queue) = bounded(MAX_INTERACTIVE + MAX_ANSWERS + MAX_OUTPUT);
        let (places, taken) = bounded(MAX_INTERACTIVE);
        let (bulk, bulk_queue) = bounded(MAX_BULK);
        let (signals, signal_queue) = bounded(MAX_SIGNALS);
        let (piece, delivered) = (AtomicUsize::new(0), AtomicU64::new(u64::MAX));
        let over = AtomicBool::new(false);
        let shared = Arc::new(Shared { piece, delivered, over, pool: Pool::new(MAX_BUFFERS) });
        let (parker, messages) = (Parker::new(), [interactive_queue, bulk_queue]);
        let writer = parker.unparker().clone();
        let messages_in = [interactive, bulk];
        let outbox = Outbox { messages: messages_in, places, signals, shared: Arc::clone(&shared), writer };
        (outbox, Queue { messages, places: taken, signals: signal_queue, shared, parker, favoured: 0 })
    }

    /// Never waits: drops the signal if the channel is full.
    pub(crate) fn signal(&self, signal: Work) {
        let _ = self.signals.try_send(signal);
        self.writer.unpark();
    }

    /// Has the writer close the websocket. Waits for a place until `deadline`.
    pub(crate) fn close(&self, code: u16, deadline: Instant) {
        let _ = self.signals.send_deadline(Work::Close(code), deadline);
        self.writer.unpark();
    }

    /// Call it when the link has ended.
    pub(crate) fn set_delivered(&self, bytes: u64) {
        self.shared.delivered.store(bytes, Ordering::SeqCst);
    }

    /// Waits for a place.
    pub fn reply(&self, frame: &Frame) {
        let class = if frame.body.len() > SHORT { Class::Bulk } else { Class::Interactive };
        let mut item = Item::of(frame, class);
        item.waited = class == Class::Interactive && self.places.send(()).is_ok();
        self.queue(item);
    }

    /// Never waits: returns false if the channel is full.
    pub(crate) fn try_reply(&self, frame: &Frame) -> bool {
        let item = Item::of(frame, Class::Interactive);
        let sent = self.messages[item.class as usize].try_send(item).is_ok();
        self.writer.unpark();
        sent
    }

    fn queue(&self, item: Box<Item>) {
        // Fails once the writer has ended.
        let _ = self.messages[item.class as usize].send(item);
        self.writer.unpark();
    }
}

impl Item {
    fn of(frame: &Frame, class: Class) -> Box<Self> {
        let (message, waited, discard, mark, _place) = (frame.encode().into(), false, None, None, None);
        Box::new(Item { message, class, waited, discard, mark, _place })
    }
}

impl Queue {
    pub(crate) fn set_piece(&self, bytes: usize) {
        self.shared.piece.store(bytes, Ordering::Relaxed);
    }

    pub(crate) fn free_buffers(&self) {
        self.shared.pool.clear();
    }

    pub fn try_next(&mut self, sendable: Sendable) -> Option<Work> {
        if let Ok(signal) = self.signals.try_recv() {
            return Some(signal);
        }
        std::iter::from_fn(|| self.pop(sendable)).find_map(|item| {
            let discarded = item.discard.is_some_and(|discard| discard.load(Ordering::SeqCst));
            (!discarded).then_some(Work::Message(item.message, item.class, item.mark))
        })
    }

    /// [`Queue::try_next`], waiting until `deadline`.
    pub fn next(&mut self, sendable: Sendable, deadline: Instant) -> Option<Work> {
        loop {
            let work = self.try_next(sendable);
            if work.is_some() || Instant::now() >= deadline {
                return work;
            }
            self.parker.park_deadline(deadline);
        }
    }

    /// Interactive first, but a terminal that never stops writing must not stop a transfer.
    fn pop(&mut self, sendable: Sendable) -> Option<Box<Item>> {
        let [interactive, bulk] = &self.messages;
        let bulk_waits = sendable.bulk && !bulk.is_empty();
        if sendable.interactive
            && !(bulk_waits && self.favoured >= MAX_FAVOURED)
            && let Ok(item) = interactive.try_recv()
        {
            self.favoured += u32::from(bulk_waits);
            if item.waited {
                let _ = self.places.try_recv();
            }
            return Some(item);
        }
        self.favoured = 0;
        if bulk_waits { bulk.try_recv().ok() } else { None }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
    }
}

/// A session's handle to the outbox; counts the data that the session has there.
#[derive(Clone)]
pub struct Sink {
    outbox: Outbox,
    /// By class: a transfer must not block the terminal of the same session.
    places: [Arc<Permits>; 2],
    wake: Arc<Wake>,
}

impl Sink {
    /// Notifies `wake` when there is a place again after [`Sink::takes_data`] found none.
    pub fn new(outbox: &Outbox, wake: Arc<Wake>) -> Self {
        Sink { outbox: outbox.clone(), places: [(); 2].map(|()| Permits::new(MAX_DATA)), wake }
    }

    /// Size of a data message in bytes, such that an echo doesn't wait long behind it.
    pub(crate) fn piece(&self, least: usize, most: usize) -> usize {
        let crowded = self.outbox.shared.pool.lent() >= MAX_BULK;
        let most = if crowded { most.min(CROWDED).max(least) } else { most };
        self.outbox.shared.piece.load(Ordering::Relaxed).clamp(least, most)
    }

    /// [`Frame::encode_with`] into a pooled buffer, for a body of up to `most` bytes.
    pub fn compose<T>(
        &self,
        frame: &Frame,
        most: usize,
        read: impl FnOnce(&mut [u8]) -> (usize, T),
    ) -> (Bytes, T) {
        let size = frame.head_room() + most;
        let mut lent = self.outbox.shared.pool.take(size);
        let (part, result) = frame.encode_with(&mut lent.buffer[..size], read);
        // A buffer has room for the largest datagram, and most are small.
        let copies = part.len() < lent.buffer.len() / 2 && self.outbox.shared.pool.lent() > MAX_BULK;
        let message = match copies {
            true => Bytes::copy_from_slice(&lent.buffer[part]),
            false => Bytes::from_owner(lent).slice(part),
        };
        (message, result)
    }

    /// Has the session woken later if there is no place now. False for good once the writer has ended: what a terminal
    /// shows from then on is for the next link.
    pub(crate) fn takes_data(&self, class: Class) -> bool {
        // In this order: the end of the queue returns places.
        let has_place = self.places[class as usize].acquire_or_wake(&self.wake).is_some();
        has_place && !self.outbox.shared.over.load(Ordering::SeqCst)
    }

    /// May wait, if many sessions send. Call [`Sink::takes_data`] before reading the data from its source.
    pub fn send(&self, message: Bytes, class: Class, discard: Option<&Discard>, mark: Option<Mark>) {
        let _place = self.places[class as usize].acquire();
        let discard = discard.cloned();
        self.outbox.queue(Box::new(Item { message, class, waited: false, discard, mark, _place }));
    }

    /// Whether it is alive. A dead link is given up, within 10 s where its answers are quick.
    pub(crate) fn ask_server(&self) {
        self.outbox.signal(Work::Ping(false));
    }

    /// Bytes of the link that reached the other side, comparable with [`Mark`]s. All of them while the link lives.
    pub(crate) fn delivered(&self) -> u64 {
        self.outbox.shared.delivered.load(Ordering::SeqCst)
    }

    pub fn reply(&self, frame: &Frame) {
        self.outbox.reply(frame);
    }

    /// Queues an answer behind the session's bulk data. Waits for a place.
    pub(crate) fn reply_behind_bulk(&self, frame: &Frame) {
        self.outbox.queue(Item::of(frame, Class::Bulk));
    }
}

#[cfg(test)]
mod tests;

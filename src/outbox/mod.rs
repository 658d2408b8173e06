//! What waits to be written to the websocket: filled by sessions, emptied by the link's writer.
//!
//! Bounds: a session has at most [`sink::FRAMES_IN_FLIGHT`] frames of data and, since it stops reading its inbox
//! meanwhile, little more than [`REPLIES_IN_FLIGHT`] answers here. A count is a permit inside the queued
//! frame, so it can't drift. A session leaves its answers behind when it ends: while too many wait, none begins.

mod message;
mod sink;
mod spares;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use self::sink::{Kind, Lot, Permit};

pub use self::message::{FRONT, Message};
pub use self::sink::{FrameSink, REPLIES_IN_FLIGHT};
pub use self::spares::Spares;

/// The payload of a ping that asks how far the messages have come: how many bytes were written before it.
pub type Probe = [u8; 8];

/// Large buffers that wait to be used again.
const MAX_SPARES: usize = 4;

/// After so many interactive frames in a row one that waits as bulk has its turn.
const MAX_FAVOURED: u32 = 16;

/// When so many interactive frames wait, no more sessions should begin: those that end leave theirs behind.
const CROWD: usize = 4096;

/// What the writer does next, most urgent first.
#[derive(Debug)]
pub enum Work {
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

/// The queues, shared by the writer, the reader and every session of a link.
#[derive(Debug)]
pub struct Outbox {
    queues: Mutex<Queues>,
    filled: Condvar,
    spares: Arc<Spares>,
    piece: AtomicUsize,
}

#[derive(Debug, Default)]
struct Queues {
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

impl Default for Outbox {
    fn default() -> Self {
        Outbox {
            queues: Mutex::default(),
            filled: Condvar::new(),
            spares: Arc::new(Spares::new(MAX_SPARES)),
            piece: AtomicUsize::new(0),
        }
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

    /// Queues items behind those that wait, and wakes the writer once for all of them.
    fn push(&self, items: impl IntoIterator<Item = Item>) {
        let mut queues = self.lock();
        for item in items {
            match item.permit.kind {
                Kind::Data | Kind::Reply => queues.interactive.push_back(item),
                Kind::Bulk => queues.bulk.push_back(item),
            }
        }
        drop(queues);
        self.filled.notify_one();
    }

    /// The next thing to do, waiting for it until `deadline`.
    pub fn next(&self, room: Room, deadline: Instant) -> Work {
        let mut queues = self.lock();
        loop {
            if let Some(work) = queues.take(room) {
                return work;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Work::Nothing;
            }
            queues = self.filled.wait_timeout(queues, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether so much waits that no session should begin any more.
    pub fn is_crowded(&self) -> bool {
        self.lock().interactive.len() >= CROWD
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
    fn take(&mut self, room: Room) -> Option<Work> {
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
            if !item.epoch.is_some_and(|(lot, epoch)| item.permit.is_void(lot, epoch)) {
                return Some(Work::Message(item.message, item.permit.kind == Kind::Bulk));
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

#[cfg(test)]
mod tests;

//! A session's identity and its way to the client, lent to the handlers of its protocols.

use std::sync::Arc;
use std::time::Instant;

use super::credit::Credit;
use super::device::{Device, Table};
use super::inbox::Inbox;
use super::shells::ShellPermit;
use super::stats::Info;
use crate::outbox::Sink;
use crate::permits::{Permit, Permits};
use crate::proto::{Frame, SessionId, control};
use crate::sys::lock;
use crate::sys::wake::Wake;

/// When it is dropped the session is over, and its id free.
pub struct Peer {
    pub id: SessionId,
    pub(crate) device: Arc<Device>,
    pub inbox: Arc<Inbox>,
    /// Wakes the session's thread.
    pub wake: Arc<Wake>,
    pub info: Arc<Info>,
    /// For the shell that the session was started for.
    pub(crate) shell_permit: Option<ShellPermit>,
    pub sink: Sink,
    pub(crate) credit: Credit,
    /// For its forwards.
    pub(crate) look_ups: Arc<Permits>,
    pub(crate) table: Arc<Table>,
    pub(crate) _thread: Permit,
}

impl Peer {
    /// Sends a frame that waits for no credit, such as an answer.
    pub(crate) fn reply(&mut self, frame: &Frame) {
        self.credit.sent(frame.body.len(), Instant::now());
        self.sink.reply(frame);
    }

    /// Asks the client for a proof of delivery in a protocol that all clients of forwards know.
    pub(crate) fn ping(&mut self, now: Instant) {
        self.credit.probed(now);
        self.sink.reply(&control::ping(&self.id));
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let mut sessions = lock(&self.table);
        // Another session may have the id by now.
        if sessions.get(&self.id).is_some_and(|entry| Arc::ptr_eq(&entry.inbox, &self.inbox)) {
            sessions.remove(&self.id);
        }
    }
}

//! A session's identity and its way to the client, lent to the handlers of its protocols.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use super::credit::Credit;
use super::device::{Device, Entry, Table};
use super::inbox::Inbox;
use super::shells::Admission;
use super::stats::Info;
use crate::outbox::{Outbox, Sink};
use crate::permits::{Permit, Permits};
use crate::proto::{Frame, SessionId, control};
use crate::sys::lock;
use crate::sys::wake::Wake;

/// Look-ups of a session at a time.
const MAX_LOOK_UPS: usize = 4;

/// When it is dropped the session is over, and its id free.
#[derive(Debug)]
pub struct Peer {
    pub id: SessionId,
    pub(crate) device: Arc<Device>,
    pub inbox: Arc<Inbox>,
    /// Wakes the session's thread.
    pub wake: Arc<Wake>,
    pub info: Arc<Info>,
    /// For the shell that the session was started for.
    pub(crate) admission: Option<Admission>,
    pub sink: Sink,
    pub(crate) credit: Credit,
    /// For its forwards.
    pub(crate) look_ups: Arc<Permits>,
    table: Arc<Table>,
    /// Shared by a commit, which may outlive the session.
    pub(crate) thread: Arc<Permit>,
}

impl Peer {
    /// Nobody finds it by its id yet.
    pub(crate) fn new(
        device: &Arc<Device>,
        id: &SessionId,
        info: Arc<Info>,
        outbox: &Outbox,
        thread: Permit,
    ) -> io::Result<Self> {
        let wake = Arc::new(Wake::new()?);
        Ok(Peer {
            id: id.clone(),
            device: Arc::clone(device),
            inbox: Arc::new(Inbox::new(Arc::clone(&wake), &device.memory)),
            sink: Sink::new(outbox, Arc::clone(&wake)),
            wake,
            info,
            admission: None,
            credit: Credit::new(Instant::now()),
            look_ups: Permits::new(MAX_LOOK_UPS),
            table: Arc::default(),
            thread: Arc::new(thread),
        })
    }

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

    /// The session is found by its id from now on.
    pub(crate) fn enter(&mut self, table: &Arc<Table>) {
        self.table = Arc::clone(table);
        let entry = Entry { inbox: Arc::clone(&self.inbox), info: Arc::clone(&self.info) };
        lock(&self.table).insert(self.id.clone(), entry);
    }

    /// Frees the session's id.
    pub(crate) fn leave(&self) {
        let mut sessions = lock(&self.table);
        // Another session may have the id by now.
        if sessions.get(&self.id).is_some_and(|entry| Arc::ptr_eq(&entry.inbox, &self.inbox)) {
            sessions.remove(&self.id);
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.leave();
    }
}

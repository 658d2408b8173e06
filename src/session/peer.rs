//! A session's identity and its way to the client, lent to the handlers of its protocols.

use std::sync::Arc;
use std::time::Instant;

use super::credit::Credit;
use super::device::Device;
use super::inbox::Inbox;
use super::shells::ShellPermit;
use super::stats::Info;
use super::table::{Client, Table};
use crate::outbox::Sink;
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
    /// For the shell that the session was started for, or waits for.
    pub(crate) shell_permit: Option<ShellPermit>,
    pub sink: Sink,
    pub(crate) credit: Credit,
    /// For its forwards.
    pub(crate) look_ups: Arc<Permits>,
    pub(crate) table: Arc<Table>,
    /// Shared by a commit, which may outlive the session.
    pub(crate) thread: Arc<Permit>,
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

    pub(crate) fn new(device: &Arc<Device>, client: Client, thread: Permit, now: Instant) -> Self {
        let Client { id, inbox, info, sink, wake, table } = client;
        Peer {
            id,
            device: Arc::clone(device),
            inbox,
            wake,
            info,
            shell_permit: None,
            sink,
            credit: Credit::new(now),
            look_ups: Permits::new(MAX_LOOK_UPS),
            table,
            thread: Arc::new(thread),
        }
    }

    /// Frees the session's id.
    pub(crate) fn leave(&self) {
        let mut sessions = lock(&self.table);
        // Another session may have the id by now.
        if sessions.get(&self.id).is_some_and(|entry| Arc::ptr_eq(&entry.inbox, &self.inbox)) {
            sessions.remove(&self.id);
        }
    }

    /// Hands the client on to another thread. This one is left with nobody.
    pub(crate) fn give_away(&mut self) -> Client {
        Client {
            id: self.id.clone(),
            inbox: Arc::clone(&self.inbox),
            info: Arc::clone(&self.info),
            sink: self.sink.clone(),
            wake: Arc::clone(&self.wake),
            table: std::mem::take(&mut self.table),
        }
    }

    /// Goes on with another client, or with the same by another link.
    pub(crate) fn receive(&mut self, client: Client, now: Instant) {
        self.leave();
        let Client { id, inbox, info, sink, wake, table } = client;
        if id == self.id {
            self.credit.resume();
        } else {
            self.credit = Credit::new(now);
        }
        (self.id, self.inbox, self.info, self.sink, self.wake, self.table) =
            (id, inbox, info, sink, wake, table);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.leave();
    }
}

//! A session's identity and its way to the client, lent to its protocols' handlers.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use log::{Level, log};

use super::credit::Credit;
use super::device::{Device, Entry, Share, Table};
use super::inbox::Inbox;
use super::shells::Admission;
use super::stats::Info;
use crate::outbox::{Outbox, Sink};
use crate::permits::Permit;
use crate::proto::{Frame, SessionId, UserId, clipped, control};
use crate::sys::lock;
use crate::sys::wake::Wake;

/// Errors of a client that are logged. It needs no answer to send the next, so it could fill the log.
const MAX_ERRORS: u32 = 5;

/// Dropping it frees the session's id.
pub struct Peer {
    pub id: SessionId,
    pub(crate) device: Arc<Device>,
    pub inbox: Arc<Inbox>,
    pub wake: Arc<Wake>,
    pub info: Arc<Info>,
    /// The router's, for a first frame that needs a shell.
    pub(crate) admission: Option<Admission>,
    pub sink: Sink,
    pub(crate) credit: Credit,
    pub(crate) share: Arc<Share>,
    /// Errors that the client has sent.
    errors: u32,
    table: Arc<Table>,
    _thread: Permit,
}

impl Peer {
    pub(crate) fn new(
        device: &Arc<Device>,
        info: Arc<Info>,
        outbox: &Outbox,
        thread: Permit,
    ) -> io::Result<Self> {
        let (wake, share) = (Arc::new(Wake::new()?), device.share_of(&info.user));
        Ok(Peer {
            id: info.id.clone(),
            device: Arc::clone(device),
            inbox: Arc::new(Inbox::new(Arc::clone(&wake), &share.memory)),
            sink: Sink::new(outbox, Arc::clone(&wake)),
            wake,
            info,
            admission: None,
            credit: Credit::new(Instant::now()),
            share,
            errors: 0,
            table: Arc::default(),
            _thread: thread,
        })
    }

    pub(crate) fn admit(&self, user: &UserId, waits: bool) -> Result<Admission, &'static str> {
        let most = self.device.config().sessions_per_user;
        self.device.shells.acquire(user, most, (&self.info, &self.wake), waits)
    }

    pub(crate) fn log_error(&mut self, error: control::Error) {
        self.errors = self.errors.saturating_add(1);
        let level = if self.errors <= MAX_ERRORS { Level::Info } else { Level::Debug };
        let text = clipped(&error.err.unwrap_or_default());
        log!(level, "session {}: error from the client: {text:?}", self.id);
    }

    /// Needs no credit, but uses some.
    pub(crate) fn reply(&mut self, frame: &Frame) {
        self.credit.sent(frame.body.len(), Instant::now());
        self.sink.reply(frame);
    }

    /// Sends a probe in the protocol that all clients of forwards know.
    pub(crate) fn ping(&mut self, now: Instant) {
        self.credit.probed(now);
        self.sink.reply(&control::ping(&self.id));
    }

    pub(crate) fn enter(&mut self, table: &Arc<Table>) {
        self.table = Arc::clone(table);
        let entry = Entry { inbox: Arc::clone(&self.inbox), info: Arc::clone(&self.info) };
        lock(&self.table).insert(self.id.clone(), entry);
    }

    pub(crate) fn leave(&self) {
        // Another session may have taken the id.
        lock(&self.table).retain(|_, entry| !Arc::ptr_eq(&entry.inbox, &self.inbox));
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.leave();
    }
}

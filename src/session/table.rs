//! The sessions of one link, by their ids, and what it takes to speak to the client of one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::inbox::Inbox;
use super::stats::Info;
use crate::outbox::Sink;
use crate::proto::{Frame, SessionId};
use crate::sys::wake::Wake;

pub(crate) type Table = Mutex<HashMap<SessionId, Entry>>;

/// A session as others see it.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) info: Arc<Info>,
}

/// The client of a session.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: SessionId,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) info: Arc<Info>,
    pub(crate) sink: Sink,
    /// Wakes the session's thread.
    pub(crate) wake: Arc<Wake>,
    pub(crate) table: Arc<Table>,
}

/// A client that comes to a shell without one.
#[derive(Debug)]
pub(crate) struct Visitor {
    pub(crate) client: Client,
    /// `new`, unless the client knows the shell.
    pub(crate) request: Option<Frame>,
}

//! Ends a dial or a link from another thread, whatever it waits for, and tells whether it gets on.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::error::LinkError;
use crate::sys::net;

#[derive(Debug, Default)]
pub(super) struct Cancel {
    state: Mutex<State>,
    heard: AtomicBool,
}

#[derive(Debug, Default)]
struct State {
    cancelled: bool,
    established: bool,
    socket: Option<Arc<TcpStream>>,
}

/// Of an open link.
#[derive(Debug)]
pub(super) struct Activity {
    /// The reader has read since this was asked last.
    pub(super) heard: bool,
    /// Something waits to be read.
    pub(super) unread: bool,
}

impl Cancel {
    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn cancel(&self) {
        self.with(|state| {
            state.cancelled = true;
            // Of an open websocket only reading ends: then the reader ends, and the writer sends a close frame.
            state.shut_down(if state.established { Shutdown::Read } else { Shutdown::Both });
        });
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.with(|state| state.cancelled)
    }

    /// From here on `socket` is the one to shut down.
    pub(super) fn register(&self, socket: &Arc<TcpStream>) -> Result<(), LinkError> {
        self.with(|state| {
            state.socket = Some(Arc::clone(socket));
            if state.cancelled { Err(LinkError::Cancelled) } else { Ok(()) }
        })
    }

    pub(super) fn establish(&self) {
        self.with(|state| state.established = true);
    }

    pub(super) fn shut_down(&self) {
        self.with(|state| state.shut_down(Shutdown::Both));
    }

    /// To be called whenever the reader has read.
    pub(super) fn heard(&self) {
        self.heard.store(true, Ordering::Relaxed);
    }

    /// `None` until the link is established.
    pub(super) fn activity(&self) -> Option<Activity> {
        let heard = self.heard.swap(false, Ordering::Relaxed);
        self.with(|state| {
            let socket = state.socket.as_ref().filter(|_| state.established)?;
            Some(Activity { heard, unread: net::is_readable(socket.as_fd()) })
        })
    }
}

impl State {
    fn shut_down(&self, how: Shutdown) {
        if let Some(socket) = &self.socket {
            // Fails when it has ended already.
            let _ = socket.shutdown(how);
        }
    }
}

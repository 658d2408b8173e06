//! Ends a dial or a link from another thread, whatever it waits for, and tells whether the reader reads.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::sys::net;

#[derive(Debug)]
pub(super) struct Cancel {
    state: Mutex<State>,
    /// Disconnected by [`Cancel::cancel`]; for whoever waits on channels.
    pub(super) cancelled: Receiver<()>,
    /// The reader has read since [`Cancel::reads`] was called last.
    heard: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// `None` once cancelled.
    alive: Option<Sender<()>>,
    established: bool,
    socket: Option<Arc<TcpStream>>,
    /// Something waited to be read at the last call of [`Cancel::reads`].
    had_unread: bool,
}

impl Cancel {
    pub(super) fn new() -> Self {
        let (alive, cancelled) = bounded(0);
        let state = State { alive: Some(alive), established: false, socket: None, had_unread: false };
        Cancel { state: Mutex::new(state), cancelled, heard: AtomicBool::new(false) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn cancel(&self) {
        let mut state = self.lock();
        state.alive = None;
        // An open websocket is shut for reading alone: the reader then ends, and the writer sends a close frame.
        state.shut_down(if state.established { Shutdown::Read } else { Shutdown::Both });
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.lock().alive.is_none()
    }

    /// From here on `socket` is the one to shut down. Fails once cancelled.
    pub(super) fn register(&self, socket: &Arc<TcpStream>) -> io::Result<()> {
        let mut state = self.lock();
        state.socket = Some(Arc::clone(socket));
        if state.alive.is_none() { Err(io::ErrorKind::ConnectionAborted.into()) } else { Ok(()) }
    }

    pub(super) fn establish(&self) {
        self.lock().established = true;
    }

    pub(super) fn shut_down(&self) {
        self.lock().shut_down(Shutdown::Both);
    }

    /// To be called whenever the reader has read.
    pub(super) fn heard(&self) {
        self.heard.store(true, Ordering::Relaxed);
    }

    /// False if the reader hasn't read since the last call, though something waited to be read then and now. `None`
    /// until the link is established.
    pub(super) fn reads(&self) -> Option<bool> {
        let heard = self.heard.swap(false, Ordering::Relaxed);
        let mut state = self.lock();
        let socket = state.socket.as_ref().filter(|_| state.established)?;
        let unread = net::is_readable(socket.as_fd());
        let had_unread = std::mem::replace(&mut state.had_unread, unread);
        Some(heard || !had_unread || !unread)
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

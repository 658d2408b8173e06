//! From the reader to the sessions. Runs in the link's reader thread and never blocks it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use log::{debug, info, warn};

use super::inbox::{Inbox, Rejected};
use super::{Context, Entry, Info, Table, ThreadCount, mender_client, terminal, worker};
use crate::outbox::{FrameSink, Outbox};
use crate::proto::{CONTROL, Frame, MAX_ID, MENDER_CLIENT, SHELL, SessionId, control, shell};
use crate::sys::wake::Wake;

/// Session threads on the device, those of earlier links included. A server has a handful; this only keeps a mad one
/// from taking all memory.
const MAX_SESSIONS: usize = 256;
/// Besides, for shells alone, so that no flood of other sessions is in their way.
const SHELL_RESERVE: usize = 16;

/// Frames that their sessions don't hear of at once.
const MAX_UNANNOUNCED: usize = 64;

/// Starts a session.
pub type Start = fn(&Arc<Context>, Seat) -> io::Result<()>;

/// What a session has of its own. When it is dropped the session is over, and its name free.
pub struct Seat {
    /// Its name.
    pub id: SessionId,
    /// What it has to read.
    pub inbox: Arc<Inbox>,
    /// Calls it when there is news.
    pub wake: Arc<Wake>,
    /// Takes what it has to say.
    pub sink: FrameSink,
    /// What it tells about itself.
    pub info: Arc<Info>,
    table: Arc<Table>,
    _count: ThreadCount,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.table.remove(&self.id, &self.inbox);
    }
}

/// Knows the sessions of one link. When it is dropped they all end.
pub struct Router<S = Start> {
    context: Arc<Context>,
    table: Arc<Table>,
    outbox: Arc<Outbox>,
    /// For what is answered without a session.
    sink: FrameSink,
    /// The inboxes of the frames that their sessions haven't heard of yet.
    unannounced: Vec<Arc<Inbox>>,
    start: S,
}

impl Router {
    /// For a link whose writer empties `outbox`.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub fn new(context: &Arc<Context>, outbox: &Arc<Outbox>) -> io::Result<Self> {
        Router::with(context, outbox, worker::start)
    }
}

impl<S: FnMut(&Arc<Context>, Seat) -> io::Result<()>> Router<S> {
    /// The same with sessions that `start` starts.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub fn with(context: &Arc<Context>, outbox: &Arc<Outbox>, start: S) -> io::Result<Self> {
        let sink = FrameSink::new(outbox, Arc::new(Wake::new()?));
        let table = context.new_table();
        Ok(Router {
            context: Arc::clone(context),
            table,
            outbox: Arc::clone(outbox),
            sink,
            unannounced: Vec::new(),
            start,
        })
    }

    /// Tells the sessions of what has come: many frames that came at once wake a session once.
    pub fn announce(&mut self) {
        for inbox in self.unannounced.drain(..) {
            inbox.announce();
        }
    }

    /// Brings a frame to its session, which is made if need be. [`Router::announce`] is to be called when no more
    /// follow at once.
    pub fn route(&mut self, frame: Frame) {
        if let Some(what) = frame.too_long() {
            debug!("ignoring a message: its {what} is too long");
            if let Some(id) = frame.sid.filter(|id| id.as_str().len() <= MAX_ID) {
                let text = format!("{what} is longer than {MAX_ID} bytes");
                self.answer(&control::error(&id, &text, false));
            }
            return;
        }
        if frame.proto == MENDER_CLIENT && self.context.config().mender_client {
            return mender_client::handle(&self.context, &frame, &self.sink);
        }
        let Some(id) = frame.sid.clone() else {
            if (frame.proto, frame.typ.as_str()) == (SHELL, shell::STOP) {
                self.stop_shells_of_user(&frame);
            } else {
                debug!("ignoring a message without a session: {}/{:?}", frame.proto, frame.typ);
            }
            return;
        };
        let Some(frame) = self.deliver(&id, frame) else { return };
        match (frame.proto, frame.typ.as_str()) {
            (SHELL, shell::NEW) if self.context.config().terminal.enabled => self.create(&id, frame),
            (SHELL, _) if self.context.config().terminal.enabled => {
                if let Some(answer) = terminal::answer_without_shell(&id, &frame) {
                    self.answer(&answer);
                }
            }
            (SHELL, _) => self.answer(&terminal::unknown(&id, &frame)),
            // These are about a session that isn't there.
            (CONTROL, control::CLOSE | control::PONG | control::ERROR) => {}
            _ => self.create(&id, frame),
        }
    }

    /// Hands the frame to its session; back if there is none.
    fn deliver(&mut self, id: &SessionId, frame: Frame) -> Option<Frame> {
        let inbox = self.table.lock().get(id).map(|entry| Arc::clone(&entry.inbox));
        let Some(inbox) = inbox else { return Some(frame) };
        // Coalesces resizes, so that dragging a window can't fill the inbox.
        let frame = if (frame.proto, frame.typ.as_str()) == (SHELL, shell::RESIZE) {
            inbox.supersede(frame)?
        } else {
            frame
        };
        match inbox.push(frame) {
            Ok(()) => {
                self.unannounced.push(inbox);
                if self.unannounced.len() >= MAX_UNANNOUNCED {
                    self.announce();
                }
                None
            }
            Err(Rejected::Closed(frame)) => Some(frame),
            Err(Rejected::Full(frame, first)) => {
                if first {
                    warn!("session {id}: inbox full, refusing {}/{:?}", frame.proto, frame.typ);
                }
                self.overflow(id, &inbox, frame);
                None
            }
        }
    }

    /// A session that doesn't keep up. Keystrokes may be refused, but in anything else a gap would corrupt
    /// data.
    fn overflow(&mut self, id: &SessionId, inbox: &Inbox, frame: Frame) {
        match (frame.proto, frame.typ.as_str()) {
            (SHELL, shell::RESIZE | shell::PONG) => {}
            (SHELL, typ) => self.answer(&shell::failure(id, typ, "inbox full: the message was dropped")),
            _ => {
                self.answer(&control::error_about(id, &frame, "inbox full: the session is closed", true));
                inbox.hang_up();
            }
        }
    }

    fn create(&mut self, id: &SessionId, frame: Frame) {
        if self.outbox.is_crowded() {
            // A server that doesn't read what sessions leave behind gets no more of them.
            return debug!("dropping {}/{:?}: too many answers wait", frame.proto, frame.typ);
        }
        let mut limit = MAX_SESSIONS;
        if frame.proto == SHELL {
            limit += SHELL_RESERVE;
            // Without a permit there will be no shell: that is not worth a thread.
            let (user, most) = (frame.user(), self.context.config().sessions.max_per_user);
            if let Err(refusal) = self.context.shells.check(&user, most) {
                return self.answer(&terminal::refusal(id, &user, refusal.to_string()));
            }
        }
        let started = if self.context.threads() >= limit {
            Err("too many sessions".to_owned())
        } else {
            self.spawn(id, frame.clone()).map_err(|e| crate::sys::reason(&e))
        };
        if let Err(reason) = started {
            debug!("session {id}: {reason}");
            if frame.proto == SHELL {
                let text = format!("failed to start shell: {reason}");
                self.answer(&shell::failure(id, &frame.typ, text));
            } else {
                self.answer(&control::error_about(id, &frame, &reason, true));
            }
        }
    }

    fn spawn(&mut self, id: &SessionId, first: Frame) -> io::Result<()> {
        let wake = Arc::new(Wake::new()?);
        let inbox = Arc::new(Inbox::new(Arc::clone(&wake)));
        let info = Arc::new(Info::of(first.user(), Instant::now()));
        // Can't be refused: the inbox is empty.
        let _ = inbox.push(first);
        let entry = Entry { inbox: Arc::clone(&inbox), info: Arc::clone(&info) };
        let seat = Seat {
            id: id.clone(),
            sink: FrameSink::new(&self.outbox, Arc::clone(&wake)),
            inbox,
            wake,
            info,
            table: Arc::clone(&self.table),
            _count: ThreadCount::new(&self.context),
        };
        // Before it runs, so that it finds itself there when it ends.
        self.table.lock().insert(id.clone(), entry);
        (self.start)(&self.context, seat)
    }

    fn stop_shells_of_user(&mut self, frame: &Frame) {
        let user = frame.user();
        if user.as_str().is_empty() {
            return warn!("StopShellMessage: sessionId not given and userId empty");
        }
        let shells: Vec<SessionId> = self
            .table
            .lock()
            .iter()
            .filter(|(_, entry)| entry.info.shell().is_some_and(|shell| shell.user == user))
            .map(|(id, _)| id.clone())
            .collect();
        info!("stopping {} shells of user {user}", shells.len());
        for id in shells {
            let stop = Frame { sid: Some(id.clone()), ..frame.clone() };
            self.deliver(&id, stop);
        }
    }

    /// Answers in place of a session. A server that asks without end and doesn't read the answers gets no more.
    fn answer(&self, frame: &Frame) {
        if self.sink.takes_replies() {
            self.sink.reply(frame);
        } else {
            debug!("dropping an answer {}/{:?}: too many wait", frame.proto, frame.typ);
        }
    }
}

impl<S> Drop for Router<S> {
    fn drop(&mut self) {
        for (_, entry) in self.table.lock().drain() {
            entry.inbox.hang_up();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use crate::outbox::{REPLIES_IN_FLIGHT, Room};

    fn context() -> Arc<Context> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("conf");
        std::fs::write(&file, r#"{ "ShellCommand": "/bin/sh", "User": "root" }"#).unwrap();
        Context::new(config::load(&file, &dir.path().join("absent")).unwrap())
    }

    #[test]
    fn sessions_that_come_and_go_leave_no_more_behind_than_is_read() {
        let context = context();
        let outbox = Arc::new(Outbox::default());
        let begin = |_: &Arc<Context>, seat: Seat| {
            while seat.sink.takes_replies() {
                seat.sink.reply(&control::pong(&seat.id));
            }
            Ok(())
        };
        let mut router = Router::with(&context, &outbox, begin).unwrap();
        let mut flood = || {
            for number in 0..1000 {
                router.route(Frame::new(
                    CONTROL,
                    control::PING,
                    SessionId::new(&number.to_string()).as_ref(),
                ));
            }
            let all = Room { bulk: true, interactive: true };
            std::iter::from_fn(|| outbox.try_next(all)).count()
        };
        // And more once that was read.
        for left in [flood(), flood()] {
            assert!((4096..4096 + REPLIES_IN_FLIGHT).contains(&left), "{left}");
        }
        assert_eq!(context.counts().0, 0);
    }

    /// An inbox that had overflowed went on taking frames, though the client was told that the session is closed. What
    /// they began then outlived the link.
    #[test]
    fn a_session_that_was_closed_for_an_overflow_gets_nothing_more() {
        let context = context();
        let outbox = Arc::new(Outbox::default());
        let seats = std::cell::RefCell::new(Vec::new());
        let mut router = Router::with(&context, &outbox, |_: &Arc<Context>, seat| {
            seats.borrow_mut().push(seat);
            Ok(())
        });
        let router = router.as_mut().unwrap();
        let ping = Frame::new(CONTROL, control::PING, SessionId::new("s").as_ref());
        // More than any inbox holds, and then one more message.
        let mut sent = 0;
        while context.table().lock().values().all(|entry| !entry.inbox.is_hung_up()) {
            router.route(ping.clone());
            sent += 1;
            assert!(sent < 100_000);
        }
        router.route(ping);
        let seats = seats.borrow();
        assert_eq!(seats.len(), 2);
        assert!(seats[0].inbox.pop().is_none() && seats[1].inbox.pop().is_some());
    }
}

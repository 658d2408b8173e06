//! Routes frames from the reader to the sessions. Runs in the link's reader thread and never blocks it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use log::{debug, info, warn};

use super::device::{Device, Entry, Table};
use super::inbox::{HangUp, Rejected};
use super::peer::Peer;
use super::session;
use super::shells::Admission;
use super::stats::Info;
use super::terminal::{self, Terminal};
use crate::commands;
use crate::outbox::Outbox;
use crate::proto::{CONTROL, Frame, MAX_ID, MENDER_CLIENT, SHELL, SessionId, control, shell};
use crate::sys::{lock, reason};

/// Sessions without a shell, those of earlier links included. A server has a handful; the limit keeps a mad one from
/// taking all memory.
pub(crate) const MAX_SESSIONS: usize = 256;
/// Sessions that may still be ending while others take their place, or that are among their users' first.
pub(super) const MAKING_ROOM: usize = 8;
/// Sessions of a user, a terminal's included, that don't have to wait for another user's to end.
const FIRST: usize = 2;

/// The sessions of one link. Dropping it ends them all.
pub struct Router<S = fn(Peer) -> io::Result<()>> {
    device: Arc<Device>,
    table: Arc<Table>,
    outbox: Outbox,
    start: S,
}

impl Router {
    /// `table` is the one that the device has had since the link was dialled: a link that was replaced before it opened
    /// must not become the current one.
    pub fn new(device: &Arc<Device>, table: Arc<Table>, outbox: &Outbox) -> Self {
        Router::with(device, table, outbox, |peer| session::start(peer, Terminal::default()))
    }
}

impl<S: FnMut(Peer) -> io::Result<()>> Router<S> {
    pub fn with(device: &Arc<Device>, table: Arc<Table>, outbox: &Outbox, start: S) -> Self {
        // A client that is still there answers, which leads it back to its shell. Servers drop a ping for nobody.
        for id in device.shells.clients() {
            outbox.try_reply(&shell::ping(&id));
        }
        Router { device: Arc::clone(device), table, outbox: outbox.clone(), start }
    }

    pub fn route(&mut self, frame: Frame) {
        if let Some(what) = frame.too_long() {
            debug!("ignoring a message: its {what} is too long");
            if let Some(id) = frame.sid.filter(|id| id.as_str().len() <= MAX_ID) {
                let text = format!("{what} is longer than {MAX_ID} bytes");
                self.answer(&control::error(&id, &text, false));
            }
            return;
        }
        if frame.proto == MENDER_CLIENT && self.device.config().mender_client {
            return commands::handle(&self.device.commands, &frame, &self.outbox);
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
        // The reader of a link that was replaced may still have a frame in hand.
        let is_current = Arc::ptr_eq(&self.table, &self.device.table());
        let keeps = is_current && !self.device.config().keep_detached.is_zero();
        let kept = keeps.then(|| self.device.shells.resume(&id, &frame.user())).flatten();
        match (frame.proto, frame.typ.as_str()) {
            _ if kept.is_some() => self.create(&id, frame, kept),
            (SHELL, _) if !self.device.config().terminal => {
                self.answer(&terminal::unknown(&id, &frame));
            }
            (SHELL, typ) if typ != shell::NEW => {
                terminal::answer_without_shell(&id, &frame).iter().for_each(|answer| self.answer(answer));
            }
            // These concern a session that has ended.
            (CONTROL, control::CLOSE | control::PONG | control::ERROR) => {}
            _ => self.create(&id, frame, None),
        }
    }

    /// Returns the frame if it has no session.
    fn deliver(&mut self, id: &SessionId, frame: Frame) -> Option<Frame> {
        let inbox = lock(&self.table).get(id).map(|entry| Arc::clone(&entry.inbox));
        let Some(inbox) = inbox else { return Some(frame) };
        let (frame, first) = match inbox.push(frame) {
            Ok(()) => return None,
            Err(Rejected::Closed(frame)) => return Some(frame),
            Err(Rejected::Full(frame, first)) => (frame, first),
        };
        if first {
            warn!("session {id}: inbox full, refusing {}/{:?}", frame.proto, frame.typ);
        }
        // A client may repeat a keystroke, but a gap in anything else corrupts data.
        if frame.proto == SHELL {
            self.refuse(id, &frame, "inbox full: the message was dropped");
        } else {
            self.refuse(id, &frame, "inbox full: the session is closed");
            inbox.hang_up(HangUp::InboxFull);
        }
        None
    }

    /// A shell without a permit is refused here, without a thread.
    fn create(&mut self, id: &SessionId, first: Frame, kept: Option<(Arc<Info>, Admission)>) {
        let cause = first.without_body();
        let Err(why) = self.try_create(id, first, kept) else { return };
        debug!("session {id}: {why}");
        self.refuse(id, &cause, &why);
    }

    fn refuse(&self, id: &SessionId, frame: &Frame, why: &str) {
        match (frame.proto, frame.typ.as_str()) {
            // Nobody waits for an answer to these, and a client would take a failed `new` for the end of its shell.
            (SHELL, shell::RESIZE | shell::PONG) => {}
            (SHELL, shell::NEW) => self.answer(&terminal::refusal(id, &frame.user(), why)),
            (SHELL, typ) => self.answer(&shell::failure(id, typ, why.to_owned())),
            _ => self.answer(&control::error_about(id, frame, why, true)),
        }
    }

    fn try_create(
        &mut self,
        id: &SessionId,
        first: Frame,
        kept: Option<(Arc<Info>, Admission)>,
    ) -> Result<(), String> {
        let (user, is_shell) = (first.user(), first.proto == SHELL);
        let starts_shell = is_shell && kept.is_none();
        let failed = |e: io::Error| {
            let before = if starts_shell { "failed to start shell: " } else { "" };
            format!("{before}{}", reason(&e))
        };
        let taken = self.device.threads.taken();
        let is_first = || lock(&self.table).values().filter(|entry| entry.info.user == user).count() < FIRST;
        let room = is_shell
            || taken < MAX_SESSIONS
            || (taken < MAX_SESSIONS + MAKING_ROOM && (self.make_room() || is_first()));
        let thread = room.then(|| self.device.threads.acquire()).flatten();
        let thread = thread.ok_or_else(|| failed(io::Error::other("too many sessions")))?;
        let (info, resume) = kept.unzip();
        let info = info.unwrap_or_else(|| Info::of(id.clone(), user.clone(), Instant::now()));
        let mut peer = Peer::new(&self.device, info, &self.outbox, thread).map_err(failed)?;
        peer.admission = match resume {
            None if is_shell => Some(peer.admit(&user, true)?),
            resume => resume,
        };
        peer.enter(&self.table);
        peer.inbox.push(first).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        (self.start)(peer).map_err(failed)
    }

    /// Ends the session that has been idle longest and has nothing open. False if there is none.
    fn make_room(&self) -> bool {
        let mut sessions = lock(&self.table);
        // A session that was hung up ends anyway.
        let may_end = |entry: &Entry| !entry.info.is_busy() && entry.inbox.hung_up().is_none();
        let idle = sessions.iter().filter(|(_, entry)| may_end(entry));
        let longest = idle.min_by_key(|(_, entry)| entry.info.traffic.last_activity());
        let longest = longest.map(|(id, _)| id.clone()).and_then(|id| sessions.remove(&id));
        longest.inspect(|entry| entry.inbox.hang_up(HangUp::NoRoom)).is_some()
    }

    fn stop_shells_of_user(&mut self, frame: &Frame) {
        let user = frame.user();
        if user.as_str().is_empty() {
            return warn!("StopShellMessage: sessionId not given and userId empty");
        }
        info!("stopping all shells of user {user}");
        // Also those of a link before that has not ended yet.
        self.device.shells.dismiss(&user);
        // To all sessions, since the router doesn't know which shells are about to start. Each session compares the
        // user.
        let sessions: Vec<SessionId> = lock(&self.table).keys().cloned().collect();
        for id in sessions {
            // The body would count for each of them.
            self.deliver(&id, frame.without_body());
        }
    }

    /// Dropped while too many wait: a server may ask without end and read nothing.
    fn answer(&self, frame: &Frame) {
        if !self.outbox.try_reply(frame) {
            debug!("dropping an answer {}/{:?}: too many wait", frame.proto, frame.typ);
        }
    }
}

impl<S> Drop for Router<S> {
    fn drop(&mut self) {
        for (_, Entry { inbox, info }) in lock(&self.table).drain() {
            // Here rather than in the session's thread: a quicker client has to find its shell.
            self.device.detach(&info, &inbox.wake);
            inbox.hang_up(HangUp::LinkLost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use crate::config;
    use crate::outbox::{Queue, Sendable, Work};
    use crate::proto::Map;
    use crate::sys::wake::Wake;

    fn device() -> Arc<Device> {
        device_with(r#"{ "ShellCommand": "/bin/sh", "User": "root" }"#)
    }

    fn device_with(text: &str) -> Arc<Device> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("conf");
        std::fs::write(&file, text).unwrap();
        Device::new(config::load(&file, &dir.path().join("absent")).unwrap())
    }

    /// It runs in the link's reader: a server that asks without end and doesn't read gets no more answers.
    #[test]
    fn the_router_waits_for_no_place_for_its_answers() {
        let device = device();
        let (outbox, mut queue) = Outbox::new();
        let mut router =
            Router::with(&device, device.new_table(), &outbox, |_| Err(io::ErrorKind::WouldBlock.into()));
        for number in 0..1000 {
            let id = SessionId::new(&number.to_string());
            router.route(Frame::new(CONTROL, control::PING, id.as_ref()));
        }
        let all = Sendable { bulk: true, interactive: true };
        let left = std::iter::from_fn(|| queue.try_next(all)).count();
        assert!((1..1000).contains(&left), "{left}");
        assert_eq!(device.counts().0, 0);
    }

    fn device_that_keeps() -> Arc<Device> {
        device_of("")
    }

    fn device_of(settings: &str) -> Arc<Device> {
        let me = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap().name;
        // A session's thread is its parent here, and ends.
        let shell = r#""ShellCommand": "/bin/sh", "ShellArguments": ["-c", "trap '' TERM; echo; exec cat"]"#;
        let device = device_with(&format!(r#"{{ {shell}, "User": {me:?}{settings} }}"#));
        device.shells.open();
        device
    }

    fn of_alice(typ: &str, body: &'static str) -> Frame {
        let props = Map::new().with_str("user_id", "alice");
        Frame::new(SHELL, typ, SessionId::new("s").as_ref()).with_props(props).with_body(body)
    }

    /// The next message of a link, which delivers it.
    fn next(queue: &mut Queue) -> Frame {
        let all = Sendable { bulk: true, interactive: true };
        let work = queue.next(all, Instant::now() + Duration::from_secs(30));
        let Some(Work::Message(message, _, mark)) = work else { panic!("{work:?}") };
        mark.iter().for_each(|mark| mark.store(1, Ordering::SeqCst));
        Frame::decode(&message).unwrap()
    }

    /// The next output is this.
    fn assert_shows(queue: &mut Queue, output: &str) {
        let mut shown = String::new();
        while shown.len() < output.len() {
            let frame = next(queue);
            assert!(matches!(frame.typ.as_str(), shell::DATA | shell::PING), "{frame:?}");
            shown.push_str(str::from_utf8(&frame.body).unwrap());
        }
        assert_eq!(shown, output);
    }

    fn link(device: &Arc<Device>, table: Arc<Table>) -> (Router, Queue) {
        let (outbox, queue) = Outbox::new();
        (Router::new(device, table, &outbox), queue)
    }

    fn link_with_shell(device: &Arc<Device>) -> (Router, Queue) {
        let (mut router, mut queue) = link(device, device.new_table());
        router.route(of_alice(shell::NEW, ""));
        assert_eq!(next(&mut queue).typ, shell::NEW);
        assert_shows(&mut queue, "\r\n");
        (router, queue)
    }

    /// The session that these frames begin on a link that is lost before it starts.
    fn lost_with<const N: usize>(device: &Arc<Device>, frames: [Frame; N]) -> (Peer, Queue) {
        let (outbox, queue) = Outbox::new();
        let mut begun = None;
        let mut router = Router::with(device, device.new_table(), &outbox, |peer| {
            begun = Some(peer);
            Ok(())
        });
        frames.into_iter().for_each(|frame| router.route(frame));
        drop(router);
        (begun.unwrap(), queue)
    }

    /// A shell on its way from one link's session to the next one's was neither asked for nor found by a third link, if it
    /// had opened: the client had to type first, and got "session not found". Output was lost meanwhile.
    #[test]
    #[cfg_attr(miri, ignore = "starts a shell")]
    fn a_shell_between_two_sessions_comes_to_the_third() {
        let device = device_that_keeps();
        drop(link_with_shell(&device));

        let (second, _queue) = Outbox::new();
        let held = std::cell::RefCell::new(None);
        let mut router = Router::with(&device, device.new_table(), &second, |peer| {
            held.replace(Some(peer));
            Ok(())
        });
        router.route(of_alice(shell::PONG, ""));
        drop(router);
        let held = held.take().unwrap();

        let (mut router, mut queue) = link(&device, device.new_table());
        assert_eq!(next(&mut queue).typ, shell::PING);
        router.route(of_alice(shell::DATA, "typed\n"));
        session::start(held, Terminal::default()).unwrap();
        assert_shows(&mut queue, "typed\r\ntyped\r\n");
    }

    /// It was forgotten when the link was lost before the session had looked at it: what was typed, and the `stop` of a
    /// shell, which was kept.
    #[test]
    #[cfg_attr(miri, ignore = "starts a shell")]
    fn a_shell_gets_what_its_client_has_sent_by_a_lost_link() {
        for last in [shell::RESIZE, shell::STOP] {
            let device = device_that_keeps();
            drop(link_with_shell(&device));

            let frames = [(shell::PONG, ""), (shell::DATA, "typed\n"), (last, "")];
            let (peer, _queue) = lost_with(&device, frames.map(|(typ, body)| of_alice(typ, body)));
            session::start(peer, Terminal::default()).unwrap();
            if last == shell::STOP {
                assert_ends(&device);
                continue;
            }
            let deadline = Instant::now() + Duration::from_secs(30);
            while device.shells.kept().is_empty() && Instant::now() < deadline {
                std::thread::yield_now();
            }
            let (mut router, mut queue) = link(&device, device.new_table());
            assert_eq!(next(&mut queue).typ, shell::PING);
            router.route(of_alice(shell::PONG, ""));
            assert_shows(&mut queue, "typed\r\ntyped\r\n");
        }
    }

    /// The shell went to the next link's session without what its client had typed, if the link was lost while its own
    /// session was between its look at that and the one at who has called.
    #[test]
    #[cfg_attr(miri, ignore = "starts a shell")]
    fn a_shell_leaves_only_when_it_has_what_its_client_has_sent() {
        let device = device_that_keeps();
        let alice = of_alice(shell::NEW, "");
        let (mut peer, mut queue) = lost_with(&device, [alice.clone(), of_alice(shell::DATA, "typed\n")]);
        let (now, id) = (Instant::now(), SessionId::new("s").unwrap());
        let mut terminal = Terminal::default();
        let Some(Admission::Start(permit)) = peer.admission.take() else { panic!("no place") };
        terminal.start(&mut peer, permit, &alice, now);
        assert_eq!(next(&mut queue).typ, shell::NEW);
        let resumed = device.shells.resume(&id, &alice.user());
        drop(resumed);
        assert!(device.detach(&peer.info, &peer.wake), "it has been called");
        assert!(terminal.follow_call(&mut peer, now).is_none());
        assert!(device.shells.kept().is_empty(), "the call was taken");
    }

    /// The session that had given its shell away took it for one to keep, if its user had left by the link that was lost:
    /// the shell passed for detached while another session had it, and its user's next `new` waited for it in vain.
    #[test]
    #[cfg_attr(miri, ignore = "starts a shell")]
    fn a_shell_that_is_on_its_way_stays_that_if_its_user_has_left() {
        let device = device_of(r#", "Sessions": { "KeepWhenUserLeaves": true }"#);
        drop(link_with_shell(&device));
        let (id, user) = (SessionId::new("s").unwrap(), of_alice(shell::NEW, "").user());
        let call = || match device.shells.resume(&id, &user) {
            Some((_, Admission::Return(handover))) => handover,
            other => panic!("{other:?}"),
        };
        let handover = call().recv().unwrap();

        let left = Map::new().with_str("user_id", "alice").with_i64("status", 2);
        let left = of_alice(shell::STOP, "user disconnected").with_props(left);
        let (mut peer, _queue) = lost_with(&device, [of_alice(shell::PONG, ""), left]);
        let (to, from) = crossbeam_channel::bounded(1);
        peer.admission = Some(Admission::Return(from));
        let next = call();
        assert!(to.send(handover).is_ok());
        session::start(peer, Terminal::default()).unwrap();
        let _handover = next.recv().unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while device.threads.taken() > 0 && Instant::now() < deadline {
            std::thread::yield_now();
        }
        assert!(device.shells.kept().is_empty());
    }

    /// It had left its former session, and was dropped with the next one. Its client was told that a `new` had failed, and
    /// gave it up.
    #[test]
    #[cfg_attr(miri, ignore = "starts a shell")]
    fn a_shell_stays_where_it_is_if_the_next_session_cant_start() {
        let device = device_that_keeps();
        drop(link_with_shell(&device));

        let (second, mut queue) = Outbox::new();
        let mut router = Router::with(&device, device.new_table(), &second, |peer| {
            let deadline = Instant::now() + Duration::from_millis(200);
            while device.threads.taken() > 1 && Instant::now() < deadline {
                std::thread::yield_now();
            }
            drop(peer);
            Err(io::ErrorKind::WouldBlock.into())
        });
        router.route(of_alice(shell::PONG, ""));
        router.route(of_alice(shell::DATA, "lost\n"));
        assert_eq!(next(&mut queue).typ, shell::PING);
        assert_eq!(next(&mut queue).typ, shell::DATA);

        let (mut router, mut queue) = link(&device, device.new_table());
        assert_eq!(next(&mut queue).typ, shell::PING);
        router.route(of_alice(shell::DATA, "typed\n"));
        assert_shows(&mut queue, "typed\r\ntyped\r\n");
    }

    /// Its table became the device's current one when it opened, behind the link that had replaced it: that one's clients
    /// were led to no shell any more.
    #[test]
    #[cfg_attr(miri, ignore = "starts a shell")]
    fn a_link_that_was_replaced_may_open_late() {
        let device = device_that_keeps();
        drop(link_with_shell(&device));

        let (late, current) = (device.new_table(), device.new_table());
        let (mut router, mut queue) = link(&device, current);
        assert_eq!(next(&mut queue).typ, shell::PING);
        drop(link(&device, late));
        router.route(of_alice(shell::DATA, "typed\n"));
        assert_shows(&mut queue, "typed\r\ntyped\r\n");
    }

    /// Output that the writer of the link before has in hand came by the next one, too.
    #[test]
    #[cfg_attr(miri, ignore = "starts a shell")]
    fn a_shell_stays_with_its_link_until_that_has_ended() {
        let device = device_that_keeps();
        let (mut router, mut queue) = link_with_shell(&device);

        let (mut other, mut others) = link(&device, device.new_table());
        assert_eq!(next(&mut others).typ, shell::PING);
        other.route(of_alice(shell::PONG, ""));
        router.route(of_alice(shell::DATA, "first\n"));
        assert_shows(&mut queue, "first\r\nfirst\r\n");
        drop(router);
        other.route(of_alice(shell::DATA, "second\n"));
        assert_shows(&mut others, "second\r\nsecond\r\n");
    }

    /// It was kept if the next token came before its link had said goodbye: the client of a device that was no longer
    /// authorised came back to it.
    #[test]
    #[cfg_attr(miri, ignore = "starts a shell")]
    fn a_withdrawn_token_ends_an_attached_shell_whatever_follows() {
        let device = device_that_keeps();
        let (router, _queue) = link_with_shell(&device);
        device.shells.close();
        device.shells.open();
        drop(router);
        assert_ends(&device);
    }

    /// No shell is kept.
    fn assert_ends(device: &Device) {
        assert!(device.shells.kept().is_empty());
        let (wake, deadline) = (Arc::new(Wake::new().unwrap()), Instant::now() + Duration::from_secs(30));
        assert!(device.wait_until_quiet(&wake, deadline) && device.shells.running() == 0);
    }

    /// A `stop` for all shells of a user passed over one that was attached to a link before: it was kept.
    #[test]
    #[cfg_attr(miri, ignore = "starts a shell")]
    fn a_stop_of_all_shells_is_for_those_of_a_link_that_ends() {
        let device = device_that_keeps();
        let (router, _queue) = link_with_shell(&device);
        let (mut other, _others) = link(&device, device.new_table());
        other.route(Frame { sid: None, ..of_alice(shell::STOP, "") });
        drop(router);
        assert_ends(&device);
    }

    /// An inbox that had overflowed went on taking frames, though the client was told that the session is closed. What
    /// they began then outlived the link.
    #[test]
    fn a_session_that_was_closed_for_an_overflow_gets_nothing_more() {
        let device = device();
        let (outbox, _queue) = Outbox::new();
        let peers = std::cell::RefCell::new(Vec::new());
        let mut router = Router::with(&device, device.new_table(), &outbox, |peer| {
            peers.borrow_mut().push(peer);
            Ok(())
        });
        let ping = Frame::new(CONTROL, control::PING, SessionId::new("s").as_ref());
        // More than any inbox holds, and then one more message.
        let mut sent = 0;
        while lock(&device.table()).values().all(|entry| entry.inbox.hung_up().is_none()) {
            router.route(ping.clone());
            sent += 1;
            assert!(sent < 100_000);
        }
        router.route(ping.clone());
        assert_eq!(peers.borrow().len(), 1);
        assert!(peers.take().iter().all(|peer| peer.inbox.pop(|_| true).is_none()));
        // Its id is free when it has ended.
        router.route(ping);
        assert!(peers.take()[0].inbox.pop(|_| true).is_some());
    }
}

//! The table of shells: sessions come, wait, detach, return and end in any order, beside a model that says who gets
//! what, and who has to be woken.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError};

use super::{is_woken, wake};
use crate::proto::{SessionId, UserId};
use crate::session::shells::{Admission, Call, DEVICE_FULL, Kept, ShellPermit, Shells, USER_FULL};
use crate::session::stats::Info;
use crate::session::terminal::Handover;
use crate::sys::wake::Wake;

/// As in the agent.
const MAX_SHELLS: usize = 16;
const MAX_WAITING: usize = 4;

const USERS: [&str; 3] = ["a", "b", ""];
/// More than there can be shells.
const MANY: usize = 20;

struct Session {
    wake: Arc<Wake>,
    id: SessionId,
    user: usize,
    permit: Option<ShellPermit>,
    kind: Kind,
    /// The user's clients were asked whether they are there.
    asked: bool,
    /// It has to be woken, since it last looked.
    unheard: bool,
}

enum Kind {
    Waiting,
    Attached,
    /// The higher number was detached later.
    Detached(u32),
    /// Wanted by the call of this number: of the same client's session, or of another one of the user's.
    Called {
        number: u32,
        resumes: bool,
    },
    Ending,
    /// It has called for another session's shell.
    Expects(u32, Receiver<Handover>),
}

struct Model {
    shells: Arc<Shells>,
    sessions: Vec<Session>,
    most: usize,
    keeps: bool,
    start: Instant,
    /// The latest shell that was detached, or called for.
    number: u32,
    /// Shells of an earlier agent, which may have let users have more.
    adopted: bool,
}

/// The first byte is the limit for a user; then each two are a step and what it is about.
pub fn run(steps: &[u8]) {
    let [most, steps @ ..] = steps else { return };
    let mut model = Model {
        shells: Arc::default(),
        sessions: Vec::new(),
        most: if *most < 4 { (*most).into() } else { MANY },
        keeps: false,
        start: Instant::now(),
        number: 0,
        adopted: false,
    };
    for step in steps.chunks_exact(2) {
        model.step(step[0], step[1].into());
        model.check();
    }
    while let Some(session) = model.sessions.pop() {
        model.leave(session);
        model.check();
    }
}

impl Session {
    fn is_used(&self) -> bool {
        matches!(self.kind, Kind::Attached | Kind::Called { .. })
    }

    fn is_waiting(&self) -> bool {
        matches!(self.kind, Kind::Waiting)
    }

    fn runs(&self) -> bool {
        self.is_used() || matches!(self.kind, Kind::Detached(_) | Kind::Ending)
    }

    fn call(&mut self, kind: Kind) {
        (self.kind, self.unheard) = (kind, true);
    }
}

impl Model {
    fn step(&mut self, step: u8, about: usize) {
        let (user, id, many) = (about % 3, about / 3 % 4, about >= 240);
        let at = about.checked_rem(self.sessions.len());
        match (step % 14, at) {
            (0 | 1, _) => (0..if many { MANY } else { 1 }).for_each(|_| self.come(user, id)),
            (2, _) => self.resume(user, id),
            (3, _) => self.adopt(user, id),
            (4, _) => {
                self.shells.dismiss(|meant| meant.as_str() == USERS[user]);
                self.end(|session| session.user == user);
            }
            (5, _) => {
                self.shells.open();
                self.keeps = true;
            }
            (6, _) if many => {
                self.shells.close();
                self.keeps = false;
                self.end(|_| true);
            }
            (6, _) => {
                self.shells.wake();
                self.sessions.iter_mut().for_each(|session| session.unheard |= session.permit.is_some());
            }
            (7 | 8, Some(at)) => self.detach(at),
            (9 | 10, Some(at)) => self.follow(at),
            (11, Some(at)) => self.try_again(at),
            (12, Some(at)) => self.answer(at),
            (13, Some(at)) => {
                let session = self.sessions.swap_remove(at);
                self.leave(session);
            }
            _ => {}
        }
    }

    fn enter(&mut self, user: usize, id: usize, wake: Arc<Wake>, permit: Option<ShellPermit>, kind: Kind) {
        let id = SessionId::new(&id.to_string()).expect("a name");
        self.sessions.push(Session { wake, id, user, permit, kind, asked: false, unheard: false });
    }

    fn count(&self, is: impl Fn(&Session) -> bool) -> usize {
        self.sessions.iter().filter(|session| is(session)).count()
    }

    /// The shell that a user has left last, of those that are `wanted`.
    fn last(&mut self, user: usize, wanted: impl Fn(&Session) -> bool) -> Option<&mut Session> {
        let number =
            |session: &Session| if let Kind::Detached(number) = session.kind { Some(number) } else { None };
        let own = self.sessions.iter_mut().filter(|session| session.user == user && wanted(session));
        own.filter(|session| number(session).is_some()).max_by_key(|session| number(session))
    }

    /// The shell that a user has left last is wanted. False if there is none.
    fn call(&mut self, user: usize, wanted: impl Fn(&Session) -> bool, resumes: bool) -> bool {
        self.number += 1;
        let number = self.number;
        let shell = self.last(user, wanted);
        shell.map(|shell| shell.call(Kind::Called { number, resumes })).is_some()
    }

    /// A session asks for a shell.
    fn come(&mut self, user: usize, id: usize) {
        self.acquire(user, id, wake(), true);
    }

    fn acquire(&mut self, user: usize, id: usize, wake: Arc<Wake>, asks: bool) {
        let admission = self.shells.acquire(&UserId::from(USERS[user]), self.most as u32, &wake, true);
        let used = self.count(|session| session.is_used() && session.user == user);
        let room = used < self.most;
        if room && self.call(user, |_| true, false) {
            let Ok(Admission::Return(handover)) = admission else { panic!("{admission:?}") };
            return self.enter(user, id, wake, None, Kind::Expects(self.number, handover));
        }
        let keeps = self.last(user, |_| true).is_some();
        if !keeps && self.count(Session::runs) == MAX_SHELLS {
            return assert_eq!(admission.unwrap_err(), DEVICE_FULL);
        }
        if room {
            let Ok(Admission::Start(permit)) = admission else { panic!("{admission:?}") };
            return self.enter(user, id, wake, Some(permit), Kind::Attached);
        }
        let waiting = self.count(|session| session.is_waiting() && session.user == user);
        let mut own = self.sessions.iter_mut().filter(|session| session.is_used() && session.user == user);
        if if asks { waiting == MAX_WAITING } else { own.all(|session| !session.asked) } {
            return assert_eq!(admission.unwrap_err(), USER_FULL);
        }
        if asks {
            own.filter(|session| !session.asked)
                .for_each(|session| (session.asked, session.unheard) = (true, true));
        }
        let Ok(Admission::Wait) = admission else { panic!("{admission:?}") };
        self.enter(user, id, wake, None, Kind::Waiting);
    }

    /// A session that waits tries again.
    fn try_again(&mut self, at: usize) {
        if self.sessions[at].is_waiting() {
            let Session { user, id, wake, .. } = self.sessions.swap_remove(at);
            self.acquire(user, id.as_str().parse().expect("a number"), wake, false);
        }
    }

    /// The same client comes by another link.
    fn resume(&mut self, user: usize, id: usize) {
        let name = SessionId::new(&id.to_string()).expect("a name");
        let resumed = self.shells.resume(&name, &UserId::from(USERS[user]));
        if !self.call(user, |session| session.id == name, true) {
            return assert!(resumed.is_none());
        }
        let Some((info, Admission::Return(handover))) = resumed else { panic!("{resumed:?}") };
        assert_eq!(info.user.as_str(), USERS[user]);
        self.enter(user, id, wake(), None, Kind::Expects(self.number, handover));
    }

    fn kept(&mut self, id: &SessionId, user: usize) -> Kept {
        self.number += 1;
        let since = self.start + Duration::from_secs(1) * self.number;
        Kept { info: Info::of(id.clone(), USERS[user].into(), since), since }
    }

    fn adopt(&mut self, user: usize, id: usize) {
        let kept = self.kept(&SessionId::new(&id.to_string()).expect("a name"), user);
        let wake = wake();
        let permit = self.shells.adopt(kept, &wake);
        assert_eq!(permit.is_some(), self.count(Session::runs) < MAX_SHELLS);
        if permit.is_some() {
            self.enter(user, id, wake, permit, Kind::Detached(self.number));
            self.adopted = true;
        }
    }

    /// The client of a session is gone.
    fn detach(&mut self, at: usize) {
        let (id, user, wake) = {
            let session = &self.sessions[at];
            (session.id.clone(), session.user, Arc::clone(&session.wake))
        };
        let kept = self.kept(&id, user);
        let may = self.keeps && self.sessions[at].is_used();
        assert_eq!(self.shells.detach(kept, &wake), may);
        if may {
            (self.sessions[at].kind, self.sessions[at].asked) = (Kind::Detached(self.number), false);
            self.wake_waiting(user);
        }
    }

    /// A session does what others want of it, as `Terminal::follow_call` does.
    fn follow(&mut self, at: usize) {
        let session = &mut self.sessions[at];
        session.wake.clear();
        session.unheard = false;
        match session.kind {
            Kind::Ending => {
                let session = self.sessions.swap_remove(at);
                self.leave(session);
            }
            Kind::Called { number, .. } => {
                let expects = |other: &Session| matches!(other.kind, Kind::Expects(of, _) if of == number);
                let Some(to) = self.sessions.iter().position(expects) else { return self.detach(at) };
                let (mut permit, asked) =
                    (self.sessions[at].permit.take().expect("a permit"), self.sessions[at].asked);
                assert_eq!(self.sessions[to].user, self.sessions[at].user);
                permit.attach(&self.sessions[to].wake);
                let new = &mut self.sessions[to];
                (new.permit, new.kind, new.asked) = (Some(permit), Kind::Attached, asked);
                self.sessions.swap_remove(at);
            }
            _ => {}
        }
    }

    fn answer(&mut self, at: usize) {
        let session = &mut self.sessions[at];
        session.permit.iter().for_each(ShellPermit::answered);
        if std::mem::take(&mut session.asked) {
            let user = session.user;
            self.wake_waiting(user);
        }
    }

    fn leave(&mut self, session: Session) {
        let (user, runs) = (session.user, session.runs());
        drop(session);
        if runs {
            self.wake_waiting(user);
        }
    }

    fn end(&mut self, meant: impl Fn(&Session) -> bool) {
        let kept = self
            .sessions
            .iter_mut()
            .filter(|session| matches!(session.kind, Kind::Detached(_)) && meant(session));
        kept.for_each(|session| session.call(Kind::Ending));
    }

    fn wake_waiting(&mut self, user: usize) {
        let waiting = self.sessions.iter_mut().filter(|session| session.is_waiting() && session.user == user);
        waiting.for_each(|session| session.unheard = true);
    }

    fn check(&self) {
        assert_eq!(self.shells.running(), self.count(Session::runs));
        assert!(self.shells.running() <= MAX_SHELLS);
        let kept = self.shells.kept();
        assert_eq!(kept.len(), self.count(|session| matches!(session.kind, Kind::Detached(_))));
        for user in 0..USERS.len() {
            let own = self.count(|session| {
                session.user == user && session.runs() && !matches!(session.kind, Kind::Ending)
            });
            assert!(self.adopted || own <= self.most, "{own} shells of {:?}", USERS[user]);
            assert!(self.count(|session| session.is_waiting() && session.user == user) <= MAX_WAITING);
        }
        for session in &self.sessions {
            assert!(!session.unheard || is_woken(&session.wake), "session {} wasn't woken", session.id);
            match (&session.kind, session.permit.as_ref().and_then(ShellPermit::call)) {
                (Kind::Expects(call, handover), None) => {
                    // Otherwise it would wait for nobody.
                    let is_wanted = |other: &Session| matches!(other.kind, Kind::Called { number, .. } if number == *call);
                    let gone = handover.try_recv().is_err_and(|e| e == TryRecvError::Disconnected);
                    assert_eq!(gone, !self.sessions.iter().any(is_wanted));
                }
                (Kind::Called { resumes, .. }, Some(Call::HandOver { resumes: wanted, .. })) => {
                    assert_eq!(*resumes, wanted)
                }
                (Kind::Ending, Some(Call::End)) => {}
                (Kind::Detached(number), None) => {
                    let since = self.start + Duration::from_secs(1) * *number;
                    assert!(kept.iter().any(|kept| kept.info.id == session.id && kept.since == since));
                }
                (Kind::Waiting | Kind::Attached, None) => {}
                (_, call) => panic!("session {}: {call:?}", session.id),
            }
            if let Some(permit) = &session.permit {
                assert_eq!(permit.asked().is_some(), session.asked);
                assert_eq!(permit.is_detached(), !matches!(session.kind, Kind::Attached));
            }
        }
    }
}

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
    /// The session's that had the shell before, while it is still on its way here.
    before: Option<Arc<Wake>>,
    /// The place's: this session's, or that of the session that has called for its shell.
    info: Arc<Info>,
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
                self.shells.dismiss(&USERS[user].into());
                let ends = |kind: &Kind| matches!(kind, Kind::Attached | Kind::Detached(_) | Kind::Ending);
                self.end(|session| ends(&session.kind) && session.user == user);
            }
            (5, _) => {
                self.shells.open();
                self.keeps = true;
            }
            (6, _) if many => {
                self.shells.close();
                self.keeps = false;
                self.end(Session::runs);
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

    fn enter(
        &mut self,
        user: usize,
        (info, wake): (Arc<Info>, Arc<Wake>),
        permit: Option<ShellPermit>,
        kind: Kind,
    ) {
        let (before, asked, unheard) = Default::default();
        self.sessions.push(Session { wake, before, info, user, permit, kind, asked, unheard });
    }

    fn count(&self, is: impl Fn(&Session) -> bool) -> usize {
        self.sessions.iter().filter(|session| is(session)).count()
    }

    fn info(&self, user: usize, id: usize) -> Arc<Info> {
        Info::of(SessionId::new(&id.to_string()).expect("a name"), USERS[user].into(), self.start)
    }

    /// The shell that a user has left last.
    fn last(&mut self, user: usize) -> Option<&mut Session> {
        let number =
            |session: &Session| if let Kind::Detached(number) = session.kind { Some(number) } else { None };
        let own = self.sessions.iter_mut().filter(|session| session.user == user);
        own.filter(|session| number(session).is_some()).max_by_key(|session| number(session))
    }

    /// A session asks for a shell.
    fn come(&mut self, user: usize, id: usize) {
        self.acquire(user, self.info(user, id), wake(), true);
    }

    fn acquire(&mut self, user: usize, info: Arc<Info>, wake: Arc<Wake>, asks: bool) {
        let own = (&info, &wake);
        let admission = self.shells.acquire(&UserId::from(USERS[user]), self.most as u32, own, true);
        let used = self.count(|session| session.is_used() && session.user == user);
        let room = used < self.most;
        self.number += 1;
        let number = self.number;
        if room && let Some(shell) = self.last(user) {
            shell.call(Kind::Called { number, resumes: false });
            shell.info = Arc::clone(&info);
            let Ok(Admission::Return(handover)) = admission else { panic!("{admission:?}") };
            return self.enter(user, (info, wake), None, Kind::Expects(number, handover));
        }
        let keeps = self.last(user).is_some();
        if !keeps && self.count(Session::runs) == MAX_SHELLS {
            return assert_eq!(admission.unwrap_err(), DEVICE_FULL);
        }
        if room {
            let Ok(Admission::Start(permit)) = admission else { panic!("{admission:?}") };
            return self.enter(user, (info, wake), Some(permit), Kind::Attached);
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
        self.enter(user, (info, wake), None, Kind::Waiting);
    }

    /// A session that waits tries again.
    fn try_again(&mut self, at: usize) {
        if self.sessions[at].is_waiting() {
            let Session { user, info, wake, .. } = self.sessions.swap_remove(at);
            self.acquire(user, info, wake, false);
        }
    }

    /// The same client comes by another link, whether its shell is detached yet or not.
    fn resume(&mut self, user: usize, id: usize) {
        let wanted = self.info(user, id).id.clone();
        let resumed = self.shells.resume(&wanted, &UserId::from(USERS[user]));
        let may = self.keeps && !USERS[user].is_empty();
        let is_its = |session: &&mut Session| {
            let comes_back = session.is_used() || matches!(session.kind, Kind::Detached(_));
            may && comes_back && session.user == user && session.info.id == wanted
        };
        let Some((info, admission)) = resumed else {
            return assert!(self.sessions.iter_mut().find(is_its).is_none());
        };
        let Admission::Return(handover) = admission else { panic!("{admission:?}") };
        // There may be more of that name.
        let mut shells = self.sessions.iter_mut().filter(is_its);
        let shell = shells.find(|session| Arc::ptr_eq(&session.info, &info)).expect("a shell");
        self.number += 1;
        shell.call(Kind::Called { number: self.number, resumes: true });
        shell.asked = false;
        self.wake_waiting(user);
        self.enter(user, (info, wake()), None, Kind::Expects(self.number, handover));
    }

    fn kept(&mut self, info: &Info) -> Kept {
        self.number += 1;
        let since = self.start + Duration::from_secs(1) * self.number;
        Kept { info: Info::of(info.id.clone(), info.user.clone(), since), since }
    }

    fn adopt(&mut self, user: usize, id: usize) {
        let (kept, wake) = (self.kept(&self.info(user, id)), wake());
        let info = Arc::clone(&kept.info);
        let permit = self.shells.adopt(kept, &wake);
        assert_eq!(permit.is_some(), self.count(Session::runs) < MAX_SHELLS);
        if permit.is_some() {
            self.enter(user, (info, wake), permit, Kind::Detached(self.number));
            self.adopted = true;
        }
    }

    /// The client of a session is gone.
    fn detach(&mut self, at: usize) {
        let kept = self.kept(&Arc::clone(&self.sessions[at].info));
        let (number, session) = (self.number, &mut self.sessions[at]);
        let info = Arc::clone(&kept.info);
        let may = self.keeps && session.is_used() && session.before.is_none();
        assert_eq!(self.shells.detach(kept, &session.wake), may);
        if may && matches!(session.kind, Kind::Attached) {
            (session.info, session.kind, session.asked) = (info, Kind::Detached(number), false);
            let user = session.user;
            self.wake_waiting(user);
        }
    }

    /// A session does what others want of it, as `Terminal::follow_call` does, or gets its shell.
    fn follow(&mut self, at: usize) {
        let session = &mut self.sessions[at];
        if session.before.take().is_some() {
            session.unheard = true;
            return session.permit.iter_mut().for_each(|permit| permit.attach(&session.wake));
        }
        session.wake.clear();
        session.unheard = false;
        let call = session.permit.as_ref().and_then(ShellPermit::take_call);
        match (&session.kind, call) {
            (Kind::Ending, Some(Call::End)) => {
                let session = self.sessions.swap_remove(at);
                self.leave(session);
            }
            (Kind::Called { number, resumes }, Some(Call::HandOver { resumes: wanted, .. })) => {
                assert_eq!(*resumes, wanted);
                let number = *number;
                session.kind = Kind::Attached;
                let expects = |other: &Session| matches!(other.kind, Kind::Expects(of, _) if of == number);
                let Some(to) = self.sessions.iter().position(expects) else { return self.detach(at) };
                let Session { wake, permit, asked, user, .. } = &mut self.sessions[at];
                let (before, permit, asked) = (Some(Arc::clone(wake)), permit.take(), *asked);
                let user = *user;
                let new = &mut self.sessions[to];
                assert_eq!(new.user, user);
                (new.before, new.permit, new.kind, new.asked) = (before, permit, Kind::Attached, asked);
                self.sessions.swap_remove(at);
            }
            (Kind::Waiting | Kind::Attached | Kind::Detached(_) | Kind::Expects(..), None) => {}
            (_, call) => panic!("session {}: {call:?}", session.info.id),
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
        let ended = self.sessions.iter_mut().filter(|session| meant(session));
        ended.for_each(|session| session.call(Kind::Ending));
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
            let wake = session.before.as_ref().unwrap_or(&session.wake);
            assert!(!session.unheard || is_woken(wake), "session {} wasn't woken", session.info.id);
            match &session.kind {
                Kind::Expects(call, handover) => {
                    // Otherwise it would wait for nobody.
                    let is_wanted = |other: &Session| matches!(other.kind, Kind::Called { number, .. } if number == *call);
                    let gone = handover.try_recv().is_err_and(|e| e == TryRecvError::Disconnected);
                    assert_eq!(gone, !self.sessions.iter().any(is_wanted));
                }
                Kind::Detached(number) => {
                    let since = self.start + Duration::from_secs(1) * *number;
                    let is_this = |kept: &Kept| kept.info.id == session.info.id && kept.since == since;
                    assert!(kept.iter().any(is_this));
                }
                _ => {}
            }
            if let Some(permit) = &session.permit {
                assert_eq!(permit.asked().is_some(), session.asked);
                let is_detached = matches!(session.kind, Kind::Detached(_) | Kind::Called { .. });
                assert_eq!(permit.is_detached(), is_detached);
            }
        }
    }
}

//! The device's shells: their limits, whether their clients are still there, and the way back to detached ones.

use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::stats::Info;
use super::terminal::Handover;
use crate::proto::{SessionId, UserId};
use crate::sys::lock;
use crate::sys::wake::Wake;

/// Attached and detached ones.
pub(crate) const MAX_SHELLS: usize = 16;
/// Sessions of a user that wait for answers of the user's other clients. Further ones are refused at once.
const MAX_WAITING: usize = 4;

/// Upstream's texts.
pub(crate) const DEVICE_FULL: &str = "too many shells spawned";
pub(crate) const USER_FULL: &str = "user has too many open sessions";

#[derive(Debug, Default)]
pub(crate) struct Shells(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    places: Vec<Place>,
    /// Sessions with a `new` that waits for one of its user's clients to be gone.
    waiting: Vec<(UserId, Weak<Wake>)>,
    /// Detached shells are kept: the device is authorised, and the daemon isn't ending.
    keeps: bool,
}

#[derive(Debug)]
struct Place {
    user: UserId,
    /// The session's that has the shell, or has called for it.
    info: Arc<Info>,
    kind: Kind,
    /// When the client was asked whether it is there. `None` once it has answered.
    asked: Option<Instant>,
    /// The session's. Identifies the place.
    wake: Arc<Wake>,
}

#[derive(Debug)]
enum Kind {
    /// Or on the way to the session that has called for it.
    Attached,
    Detached(Instant),
    Called(Call),
}

#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub(crate) info: Arc<Info>,
    pub(crate) since: Instant,
}

#[derive(Debug, Clone)]
pub(crate) enum Call {
    /// Nobody may come back to the shell.
    End,
    /// To the same client's session if it `resumes`, otherwise to another one of its user's.
    HandOver { resumes: bool, to: Sender<Handover> },
}

#[derive(Debug)]
pub(crate) enum Admission {
    Start(ShellPermit),
    /// The user's other clients are being asked whether they are there.
    Wait,
    /// A detached shell: the client's own or the user's last one.
    Return(Receiver<Handover>),
}

#[derive(Debug)]
pub(crate) struct ShellPermit {
    shells: Arc<Shells>,
    wake: Arc<Wake>,
}

impl Place {
    /// Counts for its user: it has a client, or will have one.
    fn is_used(&self) -> bool {
        matches!(self.kind, Kind::Attached | Kind::Called(Call::HandOver { .. }))
    }

    fn kept(&self) -> Option<Kept> {
        let Kind::Detached(since) = self.kind else { return None };
        Some(Kept { info: Arc::clone(&self.info), since })
    }

    fn call(&mut self, call: Call) {
        self.kind = Kind::Called(call);
        self.wake.notify();
    }

    fn want(&mut self, resumes: bool) -> Admission {
        // Without room, so that a session that ends before it takes the shell leaves it where it is.
        let (to, handover) = bounded(0);
        self.call(Call::HandOver { resumes, to });
        Admission::Return(handover)
    }
}

impl State {
    fn place(&mut self, wake: &Arc<Wake>) -> Option<&mut Place> {
        self.places.iter_mut().find(|place| Arc::ptr_eq(&place.wake, wake))
    }

    fn wake_waiting(&self, user: &UserId) {
        let waiting = self.waiting.iter().filter(|(other, _)| other == user);
        waiting.filter_map(|(_, wake)| wake.upgrade()).for_each(|wake| wake.notify());
    }
}

impl Shells {
    pub(crate) fn running(&self) -> usize {
        lock(&self.0).places.len()
    }

    /// Admits a `new` of `user`, who may have `most` shells, in the session of `info` and `wake`. If only that limit is in
    /// the way and the session `waits`, asks the user's clients whether they are there, unless it has waited before.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        user: &UserId,
        most: u32,
        (info, wake): (&Arc<Info>, &Arc<Wake>),
        waits: bool,
    ) -> Result<Admission, &'static str> {
        let mut state = lock(&self.0);
        let is_this = |other: &Weak<Wake>| other.as_ptr() == Arc::as_ptr(wake);
        let asks = !state.waiting.iter().any(|(_, other)| is_this(other));
        // Also without those of sessions that have ended.
        state.waiting.retain(|(_, other)| other.strong_count() > 0 && !is_this(other));
        let waiting = state.waiting.iter().filter(|(other, _)| other == user).count();
        let used = state.places.iter().filter(|place| place.is_used() && place.user == *user).count();
        let room = used < usize::try_from(most).unwrap_or(usize::MAX);
        let full = state.places.len() >= MAX_SHELLS;
        let own = state.places.iter_mut().filter(|place| place.user == *user);
        let detached = own.filter_map(|place| place.kept().map(|kept| (kept.since, place)));
        match detached.max_by_key(|(since, _)| *since) {
            Some((_, place)) if room => {
                place.info = Arc::clone(info);
                return Ok(place.want(false));
            }
            None if full => return Err(DEVICE_FULL),
            _ => {}
        }
        if room {
            return Ok(Admission::Start(self.add(&mut state, user, (info, wake), Kind::Attached)));
        }
        let mut own = state.places.iter_mut().filter(|place| place.is_used() && place.user == *user);
        if asks && waiting < MAX_WAITING {
            for place in own.filter(|place| place.asked.is_none()) {
                place.asked = Some(Instant::now());
                place.wake.notify();
            }
        } else if asks || !waits || own.all(|place| place.asked.is_none()) {
            return Err(USER_FULL);
        }
        state.waiting.push((user.clone(), Arc::downgrade(wake)));
        Ok(Admission::Wait)
    }

    fn add(
        self: &Arc<Self>,
        state: &mut State,
        user: &UserId,
        (info, wake): (&Arc<Info>, &Arc<Wake>),
        kind: Kind,
    ) -> ShellPermit {
        let (user, info, asked) = (user.clone(), Arc::clone(info), None);
        state.places.push(Place { user, info, kind, asked, wake: Arc::clone(wake) });
        ShellPermit { shells: Arc::clone(self), wake: Arc::clone(wake) }
    }

    /// Admits a detached shell of the agent before; `None` if there are too many.
    pub(crate) fn adopt(self: &Arc<Self>, kept: Kept, wake: &Arc<Wake>) -> Option<ShellPermit> {
        let (mut state, Kept { info, since }) = (lock(&self.0), kept);
        let room = state.places.len() < MAX_SHELLS;
        room.then(|| self.add(&mut state, &info.user, (&info, wake), Kind::Detached(since)))
    }

    pub(crate) fn open(&self) {
        lock(&self.0).keeps = true;
    }

    /// Ends all shells, attached ones with their link. That may take until after the next [`Shells::open`].
    pub(crate) fn close(&self) {
        let mut state = lock(&self.0);
        state.keeps = false;
        state.places.iter_mut().for_each(|place| place.call(Call::End));
    }

    /// Ends the user's shells, attached ones with their link. One that is on its way is for the session that has called.
    pub(crate) fn dismiss(&self, user: &UserId) {
        let mut state = lock(&self.0);
        let own = state.places.iter_mut().filter(|place| place.user == *user);
        own.filter(|place| !matches!(place.kind, Kind::Called(_))).for_each(|place| place.call(Call::End));
    }

    /// It doesn't count for its user then, unless another session has called for it.
    pub(crate) fn detach(&self, kept: Kept, wake: &Arc<Wake>) -> bool {
        let mut state = lock(&self.0);
        let keeps = state.keeps;
        let Some(place) = state.place(wake).filter(|place| keeps && place.is_used()) else { return false };
        if matches!(place.kind, Kind::Attached) {
            (place.info, place.kind, place.asked) = (kept.info, Kind::Detached(kept.since), None);
            let user = place.user.clone();
            state.wake_waiting(&user);
        }
        true
    }

    /// For the same client on another link. Its shell may not be detached yet, or be on the way to its session of a link
    /// in between.
    pub(crate) fn resume(&self, id: &SessionId, user: &UserId) -> Option<(Arc<Info>, Admission)> {
        let mut state = lock(&self.0);
        let is_its = |place: &&mut Place| {
            place.user == *user && place.info.id == *id && (place.is_used() || place.kept().is_some())
        };
        let keeps = state.keeps && !user.as_str().is_empty();
        let place = state.places.iter_mut().find(is_its).filter(|_| keeps)?;
        place.asked = None;
        let resumed = (Arc::clone(&place.info), place.want(true));
        state.wake_waiting(user);
        Some(resumed)
    }

    pub(crate) fn kept(&self) -> Vec<Kept> {
        lock(&self.0).places.iter().filter_map(Place::kept).collect()
    }

    /// Sessions that may come back to a shell.
    pub(crate) fn clients(&self) -> Vec<SessionId> {
        let state = lock(&self.0);
        let kept = state.places.iter().filter(|_| state.keeps);
        kept.map(|place| place.info.id.clone()).collect()
    }

    pub(crate) fn wake(&self) {
        lock(&self.0).places.iter().for_each(|place| place.wake.notify());
    }
}

impl ShellPermit {
    fn with<T>(&self, look: impl FnOnce(&mut Place) -> T) -> Option<T> {
        lock(&self.shells.0).place(&self.wake).map(look)
    }

    pub(crate) fn asked(&self) -> Option<Instant> {
        self.with(|place| place.asked).flatten()
    }

    pub(crate) fn answered(&self) {
        let user = self.with(|place| place.asked.take().map(|_| place.user.clone())).flatten();
        user.iter().for_each(|user| lock(&self.shells.0).wake_waiting(user));
    }

    pub(crate) fn is_detached(&self) -> bool {
        self.with(|place| !matches!(place.kind, Kind::Attached | Kind::Called(Call::End))).unwrap_or(false)
    }

    /// A call to hand the shell over is there no more then: a later one counts as another.
    pub(crate) fn take_call(&self) -> Option<Call> {
        let take = |place: &mut Place| {
            let Kind::Called(call) = &place.kind else { return None };
            let call = call.clone();
            if let Call::HandOver { .. } = call {
                place.kind = Kind::Attached;
            }
            Some(call)
        };
        self.with(take).flatten()
    }

    pub(crate) fn attach(&mut self, wake: &Arc<Wake>) {
        self.with(|place| place.wake = Arc::clone(wake));
        self.wake = Arc::clone(wake);
        // Another session may have called meanwhile.
        wake.notify();
    }
}

impl Drop for ShellPermit {
    fn drop(&mut self) {
        let mut state = lock(&self.shells.0);
        if let Some(at) = state.places.iter().position(|place| Arc::ptr_eq(&place.wake, &self.wake)) {
            let place = state.places.swap_remove(at);
            state.wake_waiting(&place.user);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wake() -> Arc<Wake> {
        Arc::new(Wake::new().unwrap())
    }

    fn info(id: &str) -> Arc<Info> {
        Info::of(SessionId::new(id).unwrap(), "a".into(), Instant::now())
    }

    fn acquire(shells: &Arc<Shells>, user: &str, most: u32) -> Result<Admission, &'static str> {
        shells.acquire(&user.into(), most, (&info("s"), &wake()), true)
    }

    fn start(shells: &Arc<Shells>, user: &str, most: u32) -> ShellPermit {
        match acquire(shells, user, most).unwrap() {
            Admission::Start(permit) => permit,
            other => panic!("{other:?}"),
        }
    }

    /// A session that waits.
    fn wait(shells: &Arc<Shells>, user: &str, most: u32) -> Arc<Wake> {
        let wake = wake();
        let admission = shells.acquire(&user.into(), most, (&info("s"), &wake), true);
        assert!(matches!(admission, Ok(Admission::Wait)), "{admission:?}");
        wake
    }

    fn again(shells: &Arc<Shells>, waiting: &Arc<Wake>, waits: bool) -> Result<Admission, &'static str> {
        shells.acquire(&"a".into(), 2, (&info("s"), waiting), waits)
    }

    fn detach(shells: &Shells, permit: &ShellPermit, id: &str) -> bool {
        let kept = Kept { info: info(id), since: Instant::now() };
        shells.detach(kept, &permit.wake)
    }

    #[test]
    fn counts_by_user_and_in_all() {
        let shells = Arc::<Shells>::default();
        let first = start(&shells, "a", 2);
        let second = start(&shells, "a", 2);
        let third = wait(&shells, "a", 2);
        let _other = start(&shells, "", 2);
        assert_eq!(shells.running(), 3);
        assert!(matches!(again(&shells, &third, true), Ok(Admission::Wait)));
        drop(first);
        let Ok(Admission::Start(third)) = again(&shells, &third, true) else { panic!("there is room") };
        let fourth = wait(&shells, "a", 2);
        second.answered();
        assert!(matches!(again(&shells, &fourth, true), Ok(Admission::Wait)));
        third.answered();
        assert_eq!(again(&shells, &fourth, true).unwrap_err(), USER_FULL);
        let fifth = wait(&shells, "a", 2);
        assert_eq!(again(&shells, &fifth, false).unwrap_err(), USER_FULL);
        assert!(lock(&shells.0).waiting.is_empty());
        shells.open();
        let _waiting = wait(&shells, "a", 2);
        assert!(detach(&shells, &second, "s") && shells.running() == 3);
        let many = Arc::<Shells>::default();
        many.open();
        let mut permits: Vec<_> = (0..MAX_SHELLS).map(|_| start(&many, "a", 100)).collect();
        assert!(detach(&many, &permits[0], "s"));
        assert_eq!(acquire(&many, "b", 100).unwrap_err(), DEVICE_FULL);
        permits.pop();
        start(&many, "b", 100);
    }

    #[test]
    fn few_wait() {
        let shells = Arc::<Shells>::default();
        let _running = start(&shells, "a", 1);
        let _waiting: Vec<_> = (0..MAX_WAITING).map(|_| wait(&shells, "a", 1)).collect();
        assert_eq!(acquire(&shells, "a", 1).unwrap_err(), USER_FULL);
        // They are in nobody else's way.
        let _other = start(&shells, "b", 1);
        wait(&shells, "b", 1);
    }

    #[test]
    fn a_shell_without_a_client_is_for_one_session_of_its_user() {
        let shells = Arc::<Shells>::default();
        let (first, second) = (start(&shells, "a", 9), start(&shells, "a", 9));
        assert!(!detach(&shells, &first, "1"), "none is kept yet");
        shells.open();
        assert!(detach(&shells, &second, "2") && detach(&shells, &first, "1"));
        let id = SessionId::new("2").unwrap();
        assert!(shells.resume(&id, &"b".into()).is_none());
        assert!(matches!(acquire(&shells, "a", 9), Ok(Admission::Return(_))), "the last one");
        assert!(matches!(first.take_call(), Some(Call::HandOver { resumes: false, .. })));
        let Some((_, Admission::Return(former))) = shells.resume(&id, &"a".into()) else { panic!("{id}") };
        let again = shells.resume(&id, &"a".into());
        assert!(again.is_some() && former.recv().is_err(), "only the last link's session gets it");
        assert!(matches!(second.take_call(), Some(Call::HandOver { resumes: true, .. })));
        let third = start(&shells, "a", 9);
        assert!(detach(&shells, &third, "3") && third.take_call().is_none());
        shells.close();
        assert!(matches!(third.take_call(), Some(Call::End)) && shells.kept().is_empty());
        assert!(!detach(&shells, &start(&shells, "a", 9), "4"));
    }
}

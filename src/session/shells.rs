//! The limits on shells: who has one, who waits for one, and whether the users of those that run are still there.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use crate::proto::UserId;
use crate::sys::lock;
use crate::sys::wake::Wake;

/// Shells on the device at a time, those without a client included.
pub(crate) const MAX_SHELLS: usize = 16;
/// Sessions at a time that wait for the answers of a user's other clients. Further ones are refused at once.
const MAX_WAITING: usize = 4;

/// Why there can't be another shell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    OfDevice,
    OfUser,
}

impl Refusal {
    /// As clients know it.
    pub(crate) fn text(self) -> &'static str {
        match self {
            Refusal::OfDevice => "too many shells spawned",
            Refusal::OfUser => "user has too many open sessions",
        }
    }
}

#[derive(Debug, Default)]
pub(crate) struct Shells(Mutex<Vec<Place>>);

#[derive(Debug)]
struct Place {
    user: UserId,
    kind: Kind,
    /// When the client was asked whether it is there, unless it has answered.
    asked: Option<Instant>,
    /// The session's, which is also what tells places apart.
    wake: Arc<Wake>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// For a shell of this user whose client has gone without a word.
    Waiting,
    Attached,
    Detached,
}

/// The right to one shell, or to wait for it, returned on drop.
#[derive(Debug)]
pub(crate) struct ShellPermit {
    shells: Arc<Shells>,
    wake: Arc<Wake>,
}

fn count(places: &[Place], is: impl Fn(&Place) -> bool) -> usize {
    places.iter().filter(|place| is(place)).count()
}

/// Why `user`, who may have `most` shells, can't have another. The device's limit is checked first, unless the user
/// returns to a shell without a client.
fn refusal(places: &[Place], user: &UserId, most: u32, returns: bool) -> Option<Refusal> {
    let of_user = count(places, |place| place.kind == Kind::Attached && place.user == *user);
    match () {
        () if !returns && count(places, |place| place.kind != Kind::Waiting) >= MAX_SHELLS => {
            Some(Refusal::OfDevice)
        }
        () if of_user >= usize::try_from(most).unwrap_or(usize::MAX) => Some(Refusal::OfUser),
        () => None,
    }
}

fn wake_waiting(places: &[Place], user: &UserId) {
    let waiting = places.iter().filter(|place| place.kind == Kind::Waiting && place.user == *user);
    waiting.for_each(|place| place.wake.notify());
}

impl Shells {
    pub(crate) fn running(&self) -> usize {
        count(&lock(&self.0), |place| place.kind != Kind::Waiting)
    }

    /// A permit for the session of `wake`. If only the user's own limit is in the way, their clients are asked whether
    /// they are there, and the permit has to wait for the answers.
    pub(crate) fn acquire(
        self: &Arc<Self>,
        user: &UserId,
        most: u32,
        returns: bool,
        wake: &Arc<Wake>,
        now: Instant,
    ) -> Result<ShellPermit, Refusal> {
        let mut places = lock(&self.0);
        let kind = match refusal(&places, user, most, returns) {
            None => Kind::Attached,
            Some(Refusal::OfUser) if count(&places, |place| place.kind == Kind::Waiting) < MAX_WAITING => {
                for place in places.iter_mut() {
                    if place.kind == Kind::Attached && place.user == *user && place.asked.is_none() {
                        place.asked = Some(now);
                        place.wake.notify();
                    }
                }
                Kind::Waiting
            }
            Some(refusal) => return Err(refusal),
        };
        places.push(Place { user: user.clone(), kind, asked: None, wake: Arc::clone(wake) });
        Ok(ShellPermit { shells: Arc::clone(self), wake: Arc::clone(wake) })
    }
}

impl ShellPermit {
    fn with<T>(&self, change: impl FnOnce(&mut Vec<Place>, usize) -> T) -> Option<T> {
        let mut places = lock(&self.shells.0);
        let at = places.iter().position(|place| Arc::ptr_eq(&place.wake, &self.wake))?;
        Some(change(&mut places, at))
    }

    /// Whether there may be a shell now: an error if there will be none, `None` while an answer is missing.
    pub(crate) fn settle(&self, most: u32, returns: bool) -> Option<Result<(), Refusal>> {
        self.with(|places, at| {
            let Place { ref user, kind, .. } = places[at];
            let refusal = if kind == Kind::Waiting { refusal(places, user, most, returns) } else { None };
            let asked = |place: &Place| place.user == *user && place.asked.is_some();
            match refusal {
                Some(Refusal::OfUser) if places.iter().any(asked) => None,
                Some(refusal) => Some(Err(refusal)),
                None => {
                    places[at].kind = Kind::Attached;
                    Some(Ok(()))
                }
            }
        })
        .flatten()
    }

    /// When the client was asked whether it is there, unless it has answered.
    pub(crate) fn asked(&self) -> Option<Instant> {
        self.with(|places, at| places[at].asked).flatten()
    }

    /// The client is there.
    pub(crate) fn answered(&self) {
        self.with(|places, at| {
            if places[at].asked.take().is_some() {
                wake_waiting(places, &places[at].user);
            }
        });
    }

    /// The shell has no client any more, and doesn't count for its user.
    pub(crate) fn detach(&self) {
        self.with(|places, at| {
            (places[at].kind, places[at].asked) = (Kind::Detached, None);
            wake_waiting(places, &places[at].user);
        });
    }

    /// The shell has a client again, in the session of `wake`.
    pub(crate) fn attach(&mut self, wake: &Arc<Wake>) {
        self.with(|places, at| (places[at].kind, places[at].wake) = (Kind::Attached, Arc::clone(wake)));
        self.wake = Arc::clone(wake);
    }
}

impl Drop for ShellPermit {
    fn drop(&mut self) {
        self.with(|places, at| {
            let place = places.swap_remove(at);
            wake_waiting(places, &place.user);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wake() -> Arc<Wake> {
        Arc::new(Wake::new().unwrap())
    }

    fn acquire(shells: &Arc<Shells>, user: &str, most: u32) -> Result<ShellPermit, Refusal> {
        shells.acquire(&user.into(), most, false, &wake(), Instant::now())
    }

    #[test]
    fn counts_by_user_and_in_all() {
        let shells = Arc::<Shells>::default();
        let first = acquire(&shells, "a", 2).unwrap();
        let second = acquire(&shells, "a", 2).unwrap();
        let third = acquire(&shells, "a", 2).unwrap();
        assert_eq!(third.settle(2, false), None);
        let _other = acquire(&shells, "", 2).unwrap();
        assert_eq!(shells.running(), 3);
        drop(first);
        assert_eq!(third.settle(2, false), Some(Ok(())));
        let fourth = acquire(&shells, "a", 2).unwrap();
        second.answered();
        assert_eq!(fourth.settle(2, false), None);
        third.answered();
        assert_eq!(fourth.settle(2, false), Some(Err(Refusal::OfUser)));
        let fifth = acquire(&shells, "a", 2).unwrap();
        second.detach();
        assert_eq!((fifth.settle(2, false), shells.running()), (Some(Ok(())), 4));
        let many = Arc::<Shells>::default();
        let mut permits: Vec<_> = (0..MAX_SHELLS).map(|_| acquire(&many, "a", 100).unwrap()).collect();
        permits[0].detach();
        assert_eq!(acquire(&many, "a", 100).unwrap_err(), Refusal::OfDevice);
        permits.pop();
        assert!(acquire(&many, "a", 100).is_ok());
    }

    #[test]
    fn few_wait() {
        let shells = Arc::<Shells>::default();
        let _running = acquire(&shells, "a", 1).unwrap();
        let _waiting: Vec<_> = (0..MAX_WAITING).map(|_| acquire(&shells, "a", 1).unwrap()).collect();
        assert_eq!(acquire(&shells, "a", 1).unwrap_err(), Refusal::OfUser);
        assert!(acquire(&shells, "b", 1).is_ok());
    }
}

//! Counted rights: threads, look-ups, forwards, bytes of memory. Dropping a guard returns its share.

use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use nix::poll::PollFlags;

use crate::sys::wake::Wake;
use crate::sys::{lock, poll_one};

#[derive(Default)]
pub(crate) struct Permits {
    pub(crate) limit: usize,
    /// They come out of these.
    whole: Option<Arc<Permits>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    taken: usize,
    /// Notified when a permit is returned. Weak, since that may take long: a session that has ended closes its
    /// descriptor.
    refused: Vec<Weak<Wake>>,
}

pub(crate) struct Permit {
    permits: Arc<Permits>,
    count: usize,
}

impl Permits {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Permits { limit, ..Permits::default() })
    }

    /// Up to `limit` of them, for one of those who share them.
    pub(crate) fn share(self: &Arc<Self>, limit: usize) -> Arc<Self> {
        Arc::new(Permits { limit, whole: Some(Arc::clone(self)), ..Permits::default() })
    }

    pub(crate) fn taken(&self) -> usize {
        lock(&self.state).taken
    }

    /// A permit for zero, to be resized.
    pub(crate) fn none(self: &Arc<Self>) -> Permit {
        Permit { permits: Arc::clone(self), count: 0 }
    }

    pub(crate) fn acquire(self: &Arc<Self>) -> Option<Permit> {
        let mut permit = self.none();
        permit.resize(1).then_some(permit)
    }

    /// Notifies `wake` when a permit is returned, if there is none now.
    pub(crate) fn acquire_or_wake(self: &Arc<Self>, wake: &Arc<Wake>) -> Option<Permit> {
        self.change(0, 1, Some(wake)).then(|| Permit { permits: Arc::clone(self), count: 1 })
    }

    /// Fails without effect if there are not enough. Then notifies `wake` when some are returned.
    fn change(&self, from: usize, to: usize, wake: Option<&Arc<Wake>>) -> bool {
        let mut state = lock(&self.state);
        let (grows, taken) = (to > from, state.taken - from + to);
        if grows && taken > self.limit {
            // Also without those of sessions that have ended.
            let is_this = |known: &Weak<Wake>| wake.is_some_and(|wake| known.as_ptr() == Arc::as_ptr(wake));
            state.refused.retain(|known| known.strong_count() > 0 && !is_this(known));
            state.refused.extend(wake.map(Arc::downgrade));
            return false;
        }
        // Not taken first: to return it would wake the sessions that were refused meanwhile, which would wake this one.
        if self.whole.as_ref().is_some_and(|whole| !whole.change(from, to, wake)) {
            return false;
        }
        state.taken = taken;
        if !grows {
            let refused = std::mem::take(&mut state.refused);
            drop(state);
            refused.iter().filter_map(Weak::upgrade).for_each(|wake| wake.notify());
        }
        true
    }

    /// Takes all of them for a moment. Returns false at `deadline`.
    pub(crate) fn wait_until_unused(&self, wake: &Arc<Wake>, deadline: Instant) -> bool {
        while !self.change(0, self.limit, Some(wake)) {
            if Instant::now() >= deadline {
                return false;
            }
            let _ = poll_one(wake, PollFlags::POLLIN, Some(deadline));
            wake.clear();
        }
        self.change(self.limit, 0, None)
    }
}

impl Permit {
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Fails without effect if there are not enough.
    pub(crate) fn resize(&mut self, count: usize) -> bool {
        let may = count == self.count || self.permits.change(self.count, count, None);
        if may {
            self.count = count;
        }
        may
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.resize(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn there_are_only_so_many_and_returned_ones_are_announced() {
        let permits = Permits::new(16);
        let wake = Arc::new(Wake::new().unwrap());
        let mut all: Vec<_> = (0..16).map(|_| permits.acquire_or_wake(&wake).unwrap()).collect();
        assert!(permits.acquire_or_wake(&wake).is_none() && permits.acquire_or_wake(&wake).is_none());
        assert!(permits.acquire().is_none());
        assert_eq!(lock(&permits.state).refused.len(), 1);
        assert_eq!(permits.taken(), 16);
        all.pop();
        assert!(lock(&permits.state).refused.is_empty());
        assert!(permits.acquire_or_wake(&wake).is_some());
    }

    #[test]
    fn a_permit_grows_as_far_as_there_is_room() {
        let permits = Permits::new(10);
        let (mut a, mut b) = (permits.none(), permits.none());
        assert!(a.resize(6) && b.resize(4) && !b.resize(5));
        assert_eq!((a.count(), b.count(), permits.taken()), (6, 4, 10));
        assert!(a.resize(1) && b.resize(9));
        drop(b);
        assert_eq!(permits.taken(), 1);
    }

    #[test]
    fn a_share_is_a_part() {
        let all = Permits::new(4);
        let wake = Arc::new(Wake::new().unwrap());
        let (ours, theirs) = (all.share(3), all.share(3));
        let (mut a, mut b) = (ours.none(), theirs.none());
        assert!(!a.resize(4) && a.resize(3) && ours.acquire_or_wake(&wake).is_none());
        assert!(!b.resize(2) && b.resize(1) && theirs.acquire_or_wake(&wake).is_none());
        assert_eq!((ours.taken(), theirs.taken(), all.taken()), (3, 1, 4));
        // A refusal by the whole wakes nobody.
        let refused = |permits: &Permits| lock(&permits.state).refused.len();
        assert_eq!((refused(&ours), refused(&theirs), refused(&all)), (1, 0, 1));
        drop(a);
        assert_eq!((refused(&ours), refused(&all)), (0, 0));
        assert!(theirs.acquire_or_wake(&wake).is_some() && b.resize(3));
        assert_eq!((ours.taken(), theirs.taken(), all.taken()), (0, 3, 3));
    }

    #[test]
    fn the_last_one_returned_ends_the_wait() {
        let (permits, wake) = (Permits::new(2), Arc::new(Wake::new().unwrap()));
        let wait = |deadline| permits.wait_until_unused(&wake, deadline);
        assert!(wait(Instant::now()));
        let held = permits.acquire().unwrap();
        assert!(!wait(Instant::now()));
        let other = crate::sys::thread::spawn("other", 64 << 10, move || drop(held)).unwrap();
        assert!(wait(Instant::now() + Duration::from_secs(10)) && permits.taken() == 0);
        other.join().unwrap();
    }
}

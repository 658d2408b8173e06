//! How many names are looked up at a time. The resolver can't be interrupted, so a look-up that nobody waits for any more
//! still counts until its threads end: a silent name server mustn't fill the memory with them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::sys::wake::Wake;

/// Look-ups on the whole device. Each has up to two threads.
const MAX_RUNNING: usize = 16;

#[derive(Debug, Default)]
pub(crate) struct LookUps(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    running: usize,
    /// Sessions that were refused a permit, to be woken when there is one.
    waiting: Vec<Arc<Wake>>,
}

/// The right to one look-up, returned on drop.
#[derive(Debug)]
pub(crate) struct LookUpPermit(Arc<LookUps>);

impl LookUps {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A permit, if there is one; otherwise calls `wake` when there is.
    pub(crate) fn acquire(self: &Arc<Self>, wake: &Arc<Wake>) -> Option<LookUpPermit> {
        let mut state = self.lock();
        if state.running < MAX_RUNNING {
            state.running += 1;
            return Some(LookUpPermit(Arc::clone(self)));
        }
        if !state.waiting.iter().any(|known| Arc::ptr_eq(known, wake)) {
            state.waiting.push(Arc::clone(wake));
        }
        None
    }
}

impl Drop for LookUpPermit {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.0.lock();
            state.running -= 1;
            std::mem::take(&mut state.waiting)
        };
        waiting.iter().for_each(|wake| wake.notify());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn are_bounded_and_room_is_announced() {
        let look_ups = Arc::new(LookUps::default());
        let wake = Arc::new(Wake::new().unwrap());
        let mut permits: Vec<_> = (0..MAX_RUNNING).map(|_| look_ups.acquire(&wake).unwrap()).collect();
        assert!(look_ups.acquire(&wake).is_none() && look_ups.acquire(&wake).is_none());
        assert_eq!(look_ups.lock().waiting.len(), 1);
        permits.pop();
        assert!(look_ups.lock().waiting.is_empty());
        assert!(look_ups.acquire(&wake).is_some());
    }
}

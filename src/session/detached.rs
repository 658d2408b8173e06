//! Shells without a client, and the way back to them.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::stats::Info;
use super::table::{Client, Visitor};
use crate::proto::{Frame, SessionId, UserId};
use crate::sys::lock;
use crate::sys::wake::Wake;

#[derive(Debug, Default)]
pub(crate) struct Detached(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// `None` where no shell is kept: the device isn't authorised, or the daemon ends.
    kept: Option<Vec<Kept>>,
    /// By what their threads are woken, those shells whose threads don't know yet that they are kept.
    unclaimed: Vec<(Arc<Wake>, Receiver<Visitor>)>,
}

/// A detached shell as others see it. Dropping it tells the shell to end.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) id: SessionId,
    pub(crate) info: Arc<Info>,
    since: Instant,
    visitors: Sender<Visitor>,
    /// Behind the sender, which is dropped first.
    thread: Waking,
}

/// Wakes the shell's thread when it is dropped, too.
#[derive(Debug)]
struct Waking(Arc<Wake>);

impl Drop for Waking {
    fn drop(&mut self) {
        self.0.notify();
    }
}

impl Detached {
    /// From now on shells may be kept.
    pub(crate) fn open(&self) {
        lock(&self.0).kept.get_or_insert_default();
    }

    /// Ends all of them, and keeps no others.
    pub(crate) fn close(&self) {
        lock(&self.0).kept = None;
    }

    /// Keeps the shell of the session that `wake` wakes, whose thread has to claim it.
    pub(crate) fn keep(&self, id: &SessionId, info: &Arc<Info>, wake: &Arc<Wake>) {
        let mut state = lock(&self.0);
        let Some(kept) = &mut state.kept else { return };
        let (visitors, received) = bounded(1);
        let (info, thread) = (Arc::clone(info), Waking(Arc::clone(wake)));
        kept.push(Kept { id: id.clone(), info, since: Instant::now(), visitors, thread });
        state.unclaimed.push((Arc::clone(wake), received));
    }

    /// From where visitors come to the shell of the thread that `wake` wakes, if it is kept.
    pub(crate) fn claim(&self, wake: &Arc<Wake>) -> Option<Receiver<Visitor>> {
        let unclaimed = &mut lock(&self.0).unclaimed;
        let at = unclaimed.iter().position(|(other, _)| Arc::ptr_eq(other, wake))?;
        Some(unclaimed.swap_remove(at).1)
    }

    /// Takes the shell that was detached last of those that are `wanted`: for one visitor, who has to come.
    pub(crate) fn take(&self, wanted: impl Fn(&Kept) -> bool) -> Option<Kept> {
        let kept = &mut lock(&self.0).kept;
        let kept = kept.as_mut()?;
        kept.iter().rposition(wanted).map(|at| kept.remove(at))
    }

    pub(crate) fn has(&self, user: &UserId) -> bool {
        lock(&self.0).kept.iter().flatten().any(|kept| kept.is_of(user))
    }

    /// The session of each, and since when it is detached.
    pub(crate) fn list(&self) -> Vec<(SessionId, Arc<Info>, Instant)> {
        let state = lock(&self.0);
        let kept = state.kept.iter().flatten();
        kept.map(|kept| (kept.id.clone(), Arc::clone(&kept.info), kept.since)).collect()
    }

    /// Has all of them look at the configuration.
    pub(crate) fn wake(&self) {
        lock(&self.0).kept.iter().flatten().for_each(|kept| kept.thread.0.notify());
    }
}

impl Kept {
    pub(crate) fn is_of(&self, user: &UserId) -> bool {
        self.info.shell().is_some_and(|shell| shell.user == *user)
    }

    pub(crate) fn is_of_thread(&self, wake: &Arc<Wake>) -> bool {
        Arc::ptr_eq(&self.thread.0, wake)
    }

    pub(crate) fn wake(&self) -> Arc<Wake> {
        Arc::clone(&self.thread.0)
    }

    /// Leads a visitor to the shell, which lives until then.
    pub(crate) fn receive(self, client: Client, request: Option<Frame>) {
        let _ = self.visitors.send(Visitor { client, request });
    }
}

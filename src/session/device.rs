//! The state that all sessions share, beyond the life of a link.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use log::info;
use nix::sys::resource::{Resource, getrlimit};

use super::file_transfer::rate::{Counters, WEIGHT};
use super::inbox::Inbox;
use super::shells::{Kept, MAX_SHELLS, Shells};
use super::stats::{Figures, Info, seconds};
use super::store::Store;
use crate::commands::Commands;
use crate::config::Config;
use crate::permits::Permits;
use crate::proto::{SessionId, UserId};
use crate::sys::lock;
use crate::sys::wake::Wake;

/// Session threads. Those beyond [`super::router::MAX_SESSIONS`] are for shells and for sessions that make room.
pub(crate) const MAX_THREADS: usize = 272;
/// Look-ups at a time, of up to two threads each. An abandoned one counts until it ends, since the resolver can't be
/// interrupted: a silent name server must not fill the memory with threads.
const MAX_LOOK_UPS: usize = 10;
const MAX_LOOK_UPS_OF_USER: usize = 4;
/// The part of forwards and memory that one user can't take.
const LEFT_TO_OTHERS: usize = 8;
/// Bytes that wait in inboxes, for shells and for targets, beyond a small share of each session.
const MEMORY: usize = 16 << 20;
/// The hard limit of descriptors may be a million, but a forward takes 2 KiB of memory, too.
const MAX_FORWARDS: usize = 4096;
/// Descriptors that forwards leave, if that isn't more than two fifths: four for each session, one of them for its wake
/// and three for its files, four for each shell, and those of `status` and the link.
const RESERVED_DESCRIPTORS: usize = 4 * MAX_THREADS + 96;

pub type Table = Mutex<HashMap<SessionId, Entry>>;

pub struct Entry {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) info: Arc<Info>,
}

pub(crate) struct Share {
    pub(crate) look_ups: Arc<Permits>,
    pub(crate) forwards: Arc<Permits>,
    pub(crate) memory: Arc<Permits>,
}

pub struct Device {
    config: Mutex<Arc<Config>>,
    pub(crate) shells: Arc<Shells>,
    /// Keeps shells when the agent ends.
    pub(crate) store: Option<Arc<Store>>,
    pub(crate) transferred: Counters,
    pub(crate) commands: Arc<Commands>,
    look_ups: Arc<Permits>,
    shares: Mutex<HashMap<UserId, Arc<Share>>>,
    /// Sockets.
    pub(crate) forwards: Arc<Permits>,
    pub(crate) memory: Arc<Permits>,
    /// Shells that have time to end. Further ones are killed at once.
    pub(crate) dying: Arc<Permits>,
    /// Includes the sessions of earlier links.
    pub(crate) threads: Arc<Permits>,
    /// The current link's.
    table: Mutex<Arc<Table>>,
}

impl Device {
    pub fn new(config: Config) -> Arc<Self> {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _)| soft);
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let reserved = RESERVED_DESCRIPTORS.min(descriptors / 5 * 2);
        Arc::new(Device {
            config: Mutex::new(Arc::new(config)),
            shells: Arc::default(),
            store: Store::open(),
            transferred: Counters::default(),
            commands: Arc::default(),
            look_ups: Permits::new(MAX_LOOK_UPS),
            shares: Mutex::default(),
            forwards: Permits::new((descriptors - reserved).clamp(1, MAX_FORWARDS)),
            memory: Permits::new(MEMORY),
            dying: Permits::new(MAX_SHELLS),
            threads: Permits::new(MAX_THREADS),
            table: Mutex::default(),
        })
    }

    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&lock(&self.config))
    }

    pub(crate) fn share_of(&self, user: &UserId) -> Arc<Share> {
        let mut shares = lock(&self.shares);
        // A look-up that is abandoned outlasts its session, and the link.
        shares.retain(|_, share| Arc::strong_count(share) > 1 || share.look_ups.taken() > 0);
        let most = |whole: &Arc<Permits>| whole.share(whole.limit - whole.limit / LEFT_TO_OTHERS);
        let share = || {
            let look_ups = self.look_ups.share(MAX_LOOK_UPS_OF_USER);
            Arc::new(Share { look_ups, forwards: most(&self.forwards), memory: most(&self.memory) })
        };
        Arc::clone(shares.entry(user.clone()).or_insert_with(share))
    }

    /// False if the session of `wake` has no shell that may be kept.
    pub(crate) fn detach(&self, info: &Arc<Info>, wake: &Arc<Wake>) -> bool {
        let keeps = !self.config().keep_detached.is_zero();
        let of_user = info.shell().is_some_and(|shell| !shell.user.as_str().is_empty());
        let kept = Kept { info: Arc::clone(info), since: Instant::now() };
        keeps && of_user && self.shells.detach(kept, wake)
    }

    /// Wakes all sessions: running shells expire by the new configuration, disabled protocols end.
    pub(crate) fn reconfigure(&self, config: Config) {
        *lock(&self.config) = Arc::new(config);
        for entry in lock(&self.table()).values() {
            entry.inbox.wake.notify();
        }
        self.shells.wake();
    }

    /// For a link that is dialled now. The one before keeps its own table until its sessions have ended.
    pub fn new_table(&self) -> Arc<Table> {
        let table = Arc::default();
        *lock(&self.table) = Arc::clone(&table);
        table
    }

    pub(crate) fn table(&self) -> Arc<Table> {
        Arc::clone(&lock(&self.table))
    }

    /// Numbers of sessions and shells.
    pub fn counts(&self) -> (usize, usize) {
        (lock(&self.table()).len(), self.shells.running())
    }

    /// The longest-lived first.
    pub(crate) fn sessions(&self) -> Vec<Arc<Info>> {
        let mut sessions: Vec<_> =
            lock(&self.table()).values().map(|entry| Arc::clone(&entry.info)).collect();
        sessions.sort_by_key(|info| info.traffic.since);
        sessions
    }

    pub(crate) fn log_status(&self) {
        let (now, config, sessions) = (Instant::now(), self.config(), self.sessions());
        info!("  shells: {}/{MAX_SHELLS}", self.shells.running());
        info!("  sessions: {}", sessions.len());
        for info in sessions {
            let (id, shell) = (&info.id, info.shell());
            let Figures { age, idle, .. } =
                shell.as_ref().map_or(&*info.traffic, |s| &s.traffic).figures(now);
            let (age, idle) = (age as u64, idle as u64);
            match shell {
                Some(shell) => info!(
                    "   {id} status:active started:{age} s ago, last input:{idle} s ago, user:{}, shell:{} pid:{}",
                    shell.user,
                    config.shell.display(),
                    shell.pid
                ),
                None => info!("   {id} status:no shell started:{age} s ago"),
            }
        }
        for Kept { info, since } in self.shells.kept() {
            let pid = info.shell().map_or(0, |shell| shell.pid);
            info!("   {} status:detached for:{} s, pid:{pid}", info.id, seconds(since, now) as u64);
        }
        let [sent, received] = self.transferred.figures(now);
        info!("  file-transfer:");
        info!("   total: tx/rx {}/{}", sent.total, received.total);
        info!("   1m: tx rx {:.2} {:.2} ({WEIGHT:.2})", sent.average, received.average);
    }

    /// Waits for the end of all session threads. False if `deadline` came first.
    pub fn wait_until_quiet(&self, wake: &Arc<Wake>, deadline: Instant) -> bool {
        self.threads.wait_until_unused(wake, deadline)
    }
}

//! Sessions: from a frame to the thread that owns what it is about.
//!
//! The [`Router`] runs in the link's reader and never blocks. Each session has a thread with one poll
//! loop over its inbox, its terminal and its timers. It ends when nothing is left to do for it, and at once when
//! the link is gone.

mod credit;
mod file_transfer;
mod inbox;
mod info;
mod mender_client;
mod port_forward;
mod quota;
mod router;
mod terminal;
mod worker;

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use log::info;
use serde_json::{Value, json};

use self::file_transfer::rate::{Counters, Direction};
use self::inbox::Inbox;
use self::mender_client::Commands;
use crate::config::Config;
use crate::proto::SessionId;

use self::port_forward::look_ups::LookUps;

pub use self::info::{Info, ShellInfo};

pub(crate) use self::quota::{MAX_SHELLS, ShellQuota};
pub use self::router::Router;
#[cfg(fuzzing)]
pub use self::router::Seat;

/// The start of a session thread's name. A panic in one ends only that session, where the build
/// unwinds.
pub const THREAD_PREFIX: &str = "s-";

/// Forwarded connections that `status` tells of.
const MAX_FORWARDS_SHOWN: usize = 1024;

/// What all sessions of the device share, beyond the life of a link.
#[derive(Debug)]
pub struct Context {
    config: Mutex<Arc<Config>>,
    /// How many shells there may be.
    pub(crate) shells: Arc<ShellQuota>,
    /// How much was transferred.
    pub(crate) transferred: Counters,
    commands: Commands,
    look_ups: Arc<LookUps>,
    /// The sessions of the current link.
    table: Mutex<Arc<Table>>,
    /// Session threads, also those that only clean up after their link is gone.
    threads: Mutex<usize>,
    thread_ended: Condvar,
}

/// The sessions of one link, by name.
#[derive(Debug, Default)]
struct Table(Mutex<HashMap<SessionId, Entry>>);

impl Table {
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes the session with this inbox; another may have its name by now.
    fn remove(&self, id: &SessionId, inbox: &Arc<Inbox>) {
        let mut sessions = self.lock();
        if sessions.get(id).is_some_and(|entry| Arc::ptr_eq(&entry.inbox, inbox)) {
            sessions.remove(id);
        }
    }
}

/// A session as others see it.
#[derive(Debug, Clone)]
struct Entry {
    inbox: Arc<Inbox>,
    info: Arc<Info>,
}

impl Context {
    /// For a device with this configuration.
    pub fn new(config: Config) -> Arc<Self> {
        Arc::new(Context {
            config: Mutex::new(Arc::new(config)),
            shells: Arc::default(),
            transferred: Counters::default(),
            commands: Commands::default(),
            look_ups: Arc::default(),
            table: Mutex::default(),
            threads: Mutex::default(),
            thread_ended: Condvar::new(),
        })
    }

    /// The configuration as it is now.
    pub fn config(&self) -> Arc<Config> {
        Arc::clone(&self.config.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts another configuration in its place. What has begun goes on as it was,
    /// but shells expire as it says, and what it disables ends.
    pub fn reconfigure(&self, config: Config) {
        *self.config.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(config);
        for entry in self.table().lock().values() {
            entry.inbox.announce();
        }
    }

    /// How many session threads there are.
    fn threads(&self) -> usize {
        *self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An empty table for a new link. The one before keeps its own, until its sessions have ended.
    fn new_table(&self) -> Arc<Table> {
        let table = Arc::default();
        *self.table.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&table);
        table
    }

    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many sessions and shells there are.
    pub fn counts(&self) -> (usize, usize) {
        (self.table().lock().len(), self.shells.running())
    }

    /// The sessions, the longest-lived first.
    fn sessions(&self) -> Vec<(SessionId, Entry)> {
        let mut sessions: Vec<_> =
            self.table().lock().iter().map(|(id, entry)| (id.clone(), entry.clone())).collect();
        sessions.sort_by_key(|(_, entry)| entry.info.traffic.since);
        sessions
    }

    /// Logs the status of every session.
    pub fn log_status(&self) {
        let (now, config, sessions) = (Instant::now(), self.config(), self.sessions());
        info!("  shells: {}/{MAX_SHELLS}", self.shells.running());
        info!("  sessions: {}", sessions.len());
        let ago = |at: Instant| now.saturating_duration_since(at).as_secs();
        for (id, Entry { info, .. }) in sessions {
            match info.shell() {
                Some(shell) => info!(
                    "   {id} status:active started:{} s ago, last input:{} s ago, user:{}, shell:{} pid:{}",
                    ago(shell.traffic.since),
                    ago(shell.traffic.last()),
                    shell.user,
                    config.shell.command.display(),
                    shell.pid
                ),
                None => info!("   {id} status:no shell started:{} s ago", ago(info.traffic.since)),
            }
        }
        info!("  file-transfer:");
        for line in self.transferred.report(now) {
            info!("   {line}");
        }
    }

    /// Adds shells, sessions and what was transferred to what `status` tells.
    pub fn report(&self, document: &mut Value) {
        let (now, mut room) = (Instant::now(), MAX_FORWARDS_SHOWN);
        let sessions = self.sessions();
        let sessions = sessions.iter().map(|(id, entry)| entry.info.report(id, now, &mut room));
        document["sessions"] = sessions.collect();
        document["shells"] = json!({ "running": self.shells.running(), "max": MAX_SHELLS });
        let figures = |direction| self.transferred.figures(direction, now);
        let (received, sent) = (figures(Direction::Received), figures(Direction::Sent));
        document["transferred"] = json!({
            "bytes_in": received.total,
            "bytes_out": sent.total,
            "average_in": received.average,
            "average_out": sent.average,
        });
    }

    /// Waits until no session thread is left, at most until `deadline`. Tells whether that came first.
    pub fn wait_until_quiet(&self, deadline: Instant) -> bool {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        while *threads > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            threads = self.thread_ended.wait_timeout(threads, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

/// Counts a session thread for as long as it runs.
#[derive(Debug)]
struct ThreadCount(Arc<Context>);

impl ThreadCount {
    fn new(context: &Arc<Context>) -> Self {
        *context.threads.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        ThreadCount(Arc::clone(context))
    }
}

impl Drop for ThreadCount {
    fn drop(&mut self) {
        *self.0.threads.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.thread_ended.notify_all();
    }
}

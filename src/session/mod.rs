//! Sessions: from a frame to the thread that owns what it is about.
//!
//! The [`Router`] runs in the link's reader and never blocks. Each session has a thread with one poll
//! loop over its inbox, its terminal and its timers. It ends when nothing is left to do for it, and at once when
//! the link is gone.

mod file_transfer;
mod inbox;
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

use self::file_transfer::rate::Counters;
use self::inbox::Inbox;
use self::mender_client::Commands;
use crate::config::Config;
use crate::proto::{SessionId, UserId};

use self::port_forward::look_ups::LookUps;

pub use self::quota::{MAX_SHELLS, ShellQuota};
pub use self::router::Router;
#[cfg(fuzzing)]
pub use self::router::Seat;

/// The start of a session thread's name. A panic in one ends only that session, where the build
/// unwinds.
pub const THREAD_PREFIX: &str = "s-";

/// What all sessions of the device share, beyond the life of a link.
#[derive(Debug)]
pub struct Context {
    config: Mutex<Arc<Config>>,
    /// How many shells there may be.
    pub shells: Arc<ShellQuota>,
    /// How much was transferred.
    pub transferred: Counters,
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
    since: Instant,
}

/// What a session tells about itself.
#[derive(Debug, Default)]
pub struct Info {
    /// Whom its first message was from.
    user: UserId,
    shell: Mutex<Option<ShellInfo>>,
}

/// A shell for the status report.
#[derive(Debug, Clone)]
pub struct ShellInfo {
    /// Whose.
    pub user: UserId,
    /// Its process.
    pub pid: i32,
    /// Since when.
    pub started: Instant,
    /// When something was typed last.
    pub last_input: Instant,
    /// How many bytes were typed.
    pub typed: u64,
}

impl ShellInfo {
    fn input(&mut self, bytes: usize, now: Instant) {
        self.last_input = now;
        self.typed += bytes as u64;
    }
}

impl Info {
    fn lock(&self) -> MutexGuard<'_, Option<ShellInfo>> {
        self.shell.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of(user: UserId) -> Self {
        Info { user, shell: Mutex::default() }
    }

    /// A shell runs.
    pub fn set(&self, shell: ShellInfo) {
        *self.lock() = Some(shell);
    }

    fn take(&self) -> Option<ShellInfo> {
        self.lock().take()
    }

    fn update(&self, change: impl FnOnce(&mut ShellInfo)) {
        if let Some(shell) = self.lock().as_mut() {
            change(shell);
        }
    }
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

    /// Logs the status of every session.
    pub fn log_status(&self) {
        let (now, config) = (Instant::now(), self.config());
        let sessions: Vec<(SessionId, Entry)> =
            self.table().lock().iter().map(|(id, entry)| (id.clone(), entry.clone())).collect();
        info!("  shells: {}/{MAX_SHELLS}", self.shells.running());
        info!("  sessions: {}", sessions.len());
        let ago = |at: Instant| now.saturating_duration_since(at).as_secs();
        for (id, entry) in sessions {
            match entry.info.lock().clone() {
                Some(shell) => info!(
                    "   {id} status:active started:{} s ago, last input:{} s ago, user:{}, shell:{} pid:{}",
                    ago(shell.started),
                    ago(shell.last_input),
                    shell.user,
                    config.shell.command.display(),
                    shell.pid
                ),
                None => info!("   {id} status:no shell started:{} s ago", ago(entry.since)),
            }
        }
        info!("  file-transfer:");
        for line in self.transferred.report(now) {
            info!("   {line}");
        }
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

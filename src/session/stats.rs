//! Statistics of a session, for `status`, SIGUSR1 and the audit log. The session's threads write, any thread reads.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Instant;

use super::file_transfer::rate::Direction;
use crate::proto::forward::Target;
use crate::proto::{SessionId, UserId};
use crate::sys::lock;

pub(crate) fn seconds(since: Instant, now: Instant) -> f64 {
    now.saturating_duration_since(since).as_secs_f64()
}

/// Seconds, and bytes of payload to the device and from it.
pub(crate) struct Figures {
    pub(crate) age: f64,
    pub(crate) idle: f64,
    pub(crate) bytes_in: u64,
    pub(crate) bytes_out: u64,
}

#[derive(Debug, Clone)]
struct Counts {
    last_activity: Instant,
    bytes_in: u64,
    bytes_out: u64,
}

/// The bytes of a shell, transfer or forward count for its `session`, too.
#[derive(Debug)]
pub(crate) struct Traffic {
    pub(crate) since: Instant,
    counts: Mutex<Counts>,
    session: Option<Arc<Traffic>>,
}

impl Traffic {
    pub(crate) fn new(since: Instant, session: Option<&Arc<Traffic>>) -> Self {
        let counts = Counts { last_activity: since, bytes_in: 0, bytes_out: 0 };
        Traffic { since, counts: Mutex::new(counts), session: session.cloned() }
    }

    pub(crate) fn figures(&self, now: Instant) -> Figures {
        let Counts { last_activity, bytes_in, bytes_out } = *lock(&self.counts);
        Figures { age: seconds(self.since, now), idle: seconds(last_activity, now), bytes_in, bytes_out }
    }

    pub(crate) fn last_activity(&self) -> Instant {
        lock(&self.counts).last_activity
    }

    pub(crate) fn touch(&self, now: Instant) {
        lock(&self.counts).last_activity = now;
    }

    /// Counts payload to the device, which is activity.
    pub(crate) fn add_in(&self, bytes: usize, now: Instant) {
        self.touch(now);
        self.count(|counts| counts.bytes_in += bytes as u64);
    }

    pub(crate) fn add_out(&self, bytes: usize) {
        self.count(|counts| counts.bytes_out += bytes as u64);
    }

    fn count(&self, add: impl Fn(&mut Counts)) {
        add(&mut lock(&self.counts));
        self.session.iter().for_each(|session| add(&mut lock(&session.counts)));
    }
}

#[derive(Debug)]
pub struct Info {
    pub(crate) id: SessionId,
    /// The user of the first message.
    pub(crate) user: UserId,
    pub(crate) traffic: Arc<Traffic>,
    /// A bit for each protocol that the client has used.
    protocols: AtomicU32,
    pub(crate) shell: Mutex<Option<Arc<ShellInfo>>>,
    /// Listed as long as it lives.
    pub(crate) transfer: Mutex<Weak<TransferInfo>>,
    pub(crate) forwards: Mutex<Vec<Arc<ForwardInfo>>>,
}

#[derive(Debug)]
pub struct ShellInfo {
    pub(crate) user: UserId,
    pub(crate) pid: i32,
    pub(crate) traffic: Traffic,
}

#[derive(Debug)]
pub(crate) struct TransferInfo {
    pub(crate) direction: Direction,
    pub(crate) path: PathBuf,
    /// In bytes, if known. The size of a sent file is that of its start.
    pub(crate) size: Option<u64>,
    pub(crate) traffic: Traffic,
}

#[derive(Debug)]
pub(crate) struct ForwardInfo {
    pub(crate) target: Target,
    pub(crate) address: OnceLock<SocketAddr>,
    pub(crate) traffic: Traffic,
}

impl Info {
    pub(crate) fn of(id: SessionId, user: UserId, now: Instant) -> Arc<Self> {
        Arc::new(Info {
            id,
            user,
            traffic: Arc::new(Traffic::new(now, None)),
            protocols: AtomicU32::new(0),
            shell: Mutex::default(),
            transfer: Mutex::default(),
            forwards: Mutex::default(),
        })
    }

    pub(crate) fn heard(&self, proto: u16, now: Instant) {
        self.traffic.touch(now);
        self.protocols.fetch_or(1_u32.checked_shl(proto.into()).unwrap_or(0), Relaxed);
    }

    pub(crate) fn spoke(&self, proto: u16) -> bool {
        self.protocols.load(Relaxed) & 1 << proto != 0
    }

    pub fn set_shell(&self, user: UserId, pid: i32, now: Instant) -> Arc<ShellInfo> {
        let traffic = Traffic::new(now, Some(&self.traffic));
        Arc::clone(lock(&self.shell).insert(Arc::new(ShellInfo { user, pid, traffic })))
    }

    /// Takes over another session's shell, with its age and its traffic.
    pub(crate) fn adopt_shell(&self, shell: &ShellInfo) -> Arc<ShellInfo> {
        let adopted = self.set_shell(shell.user.clone(), shell.pid, shell.traffic.since);
        lock(&adopted.traffic.counts).clone_from(&lock(&shell.traffic.counts));
        adopted
    }

    pub(crate) fn shell(&self) -> Option<Arc<ShellInfo>> {
        lock(&self.shell).clone()
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.shell().is_some() || self.transfer().is_some() || self.forwards(0).0 > 0
    }

    pub(crate) fn transfer(&self) -> Option<Arc<TransferInfo>> {
        lock(&self.transfer).upgrade()
    }

    /// The number of forwards, and the first `most` of them.
    pub(crate) fn forwards(&self, most: usize) -> (usize, Vec<Arc<ForwardInfo>>) {
        let forwards = lock(&self.forwards);
        (forwards.len(), forwards.iter().take(most).cloned().collect())
    }
}

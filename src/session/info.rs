//! Statistics of a session, for `status`, SIGUSR1 and the audit log. The session's threads write, any thread reads, and
//! none waits: locks are held for a moment only, and counting a chunk takes relaxed atomics.

use std::net::SocketAddr;
use std::path::Path;
#[cfg(target_has_atomic = "64")]
use std::sync::atomic::AtomicU64;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::proto::forward::Target;
use crate::proto::{FILE_TRANSFER, MAX_TEXT, PORT_FORWARD, SHELL, SessionId, UserId, clipped};

/// Characters shown of a path.
const MAX_PATH: usize = 4096;

/// A counter that other threads read at any time.
#[cfg(target_has_atomic = "64")]
#[derive(Debug, Default)]
pub(crate) struct Number(AtomicU64);

#[cfg(target_has_atomic = "64")]
impl Number {
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    pub(crate) fn add(&self, more: usize) {
        self.0.fetch_add(more as u64, Relaxed);
    }
}

/// As above, for processors without 64-bit atomics, such as ARMv5.
#[cfg(not(target_has_atomic = "64"))]
#[derive(Debug, Default)]
pub(crate) struct Number(Mutex<u64>);

#[cfg(not(target_has_atomic = "64"))]
impl Number {
    pub(crate) fn get(&self) -> u64 {
        *lock(&self.0)
    }

    pub(crate) fn set(&self, value: u64) {
        *lock(&self.0) = value;
    }

    pub(crate) fn add(&self, more: usize) {
        *lock(&self.0) += more as u64;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Start, last activity and payload of a session, shell or forward.
#[derive(Debug)]
pub(crate) struct Traffic {
    pub(crate) since: Instant,
    /// Last activity, in nanoseconds from `since`.
    last: Number,
    /// To the device.
    pub(crate) bytes_in: Number,
    /// From the device.
    pub(crate) bytes_out: Number,
}

impl Traffic {
    fn new(since: Instant) -> Self {
        Traffic { since, last: Number::default(), bytes_in: Number::default(), bytes_out: Number::default() }
    }

    /// Notes activity.
    pub(crate) fn touch(&self, now: Instant) {
        let nanos = now.saturating_duration_since(self.since).as_nanos();
        self.last.set(u64::try_from(nanos).unwrap_or(u64::MAX));
    }

    /// The last activity.
    pub(crate) fn last(&self) -> Instant {
        self.since.checked_add(Duration::from_nanos(self.last.get())).unwrap_or(self.since)
    }

    fn report(&self, now: Instant) -> Value {
        json!({
            "age": seconds(now, self.since),
            "idle": seconds(now, self.last()),
            "bytes_in": self.bytes_in.get(),
            "bytes_out": self.bytes_out.get(),
        })
    }
}

/// Seconds from `then` to `now`.
fn seconds(now: Instant, then: Instant) -> f64 {
    now.saturating_duration_since(then).as_secs_f64()
}

/// A session, for `status`.
#[derive(Debug)]
pub struct Info {
    /// The sender of its first message.
    pub(crate) user: UserId,
    /// Of the whole session. Every inbound frame is activity.
    pub(crate) traffic: Traffic,
    /// A bit for each protocol that the client has used.
    protocols: AtomicU32,
    shell: Mutex<Option<Arc<ShellInfo>>>,
    transfer: Mutex<Weak<TransferInfo>>,
    forwards: Mutex<Vec<Arc<ForwardInfo>>>,
}

/// A shell, for `status`. Input is activity.
#[derive(Debug)]
pub struct ShellInfo {
    pub(crate) user: UserId,
    pub(crate) pid: i32,
    /// Input and output.
    pub(crate) traffic: Traffic,
}

/// A file transfer, for `status`.
#[derive(Debug)]
pub(crate) struct TransferInfo {
    direction: &'static str,
    path: String,
    size: Option<u64>,
    since: Instant,
    /// Transferred so far.
    pub(crate) bytes: Number,
}

/// A forward, for `status`.
#[derive(Debug)]
pub(crate) struct ForwardInfo {
    /// As the client named it.
    pub(crate) target: Target,
    /// Set once connected.
    pub(crate) address: OnceLock<SocketAddr>,
    pub(crate) traffic: Traffic,
}

impl ShellInfo {
    pub fn new(user: UserId, pid: i32, now: Instant) -> Arc<Self> {
        Arc::new(ShellInfo { user, pid, traffic: Traffic::new(now) })
    }
}

impl ForwardInfo {
    /// Counts data to the device or, if `out`, from it.
    pub(crate) fn moved(&self, session: &Info, bytes: usize, out: bool, now: Instant) {
        self.traffic.touch(now);
        for traffic in [&self.traffic, &session.traffic] {
            if out { &traffic.bytes_out } else { &traffic.bytes_in }.add(bytes);
        }
    }
}

impl Info {
    pub(crate) fn of(user: UserId, now: Instant) -> Self {
        Info {
            user,
            traffic: Traffic::new(now),
            protocols: AtomicU32::new(0),
            shell: Mutex::default(),
            transfer: Mutex::default(),
            forwards: Mutex::default(),
        }
    }

    /// Notes an inbound frame.
    pub(crate) fn heard(&self, proto: u16, now: Instant) {
        self.traffic.touch(now);
        let bit = 1_u32.checked_shl(proto.into()).unwrap_or(0);
        if self.protocols.load(Relaxed) & bit != bit {
            self.protocols.fetch_or(bit, Relaxed);
        }
    }

    /// Counts input.
    pub(crate) fn typed(&self, bytes: usize, now: Instant) {
        self.traffic.touch(now);
        self.traffic.bytes_in.add(bytes);
        if let Some(shell) = &*lock(&self.shell) {
            shell.traffic.touch(now);
            shell.traffic.bytes_in.add(bytes);
        }
    }

    pub fn set_shell(&self, shell: Arc<ShellInfo>) {
        *lock(&self.shell) = Some(shell);
    }

    pub(crate) fn take_shell(&self) -> Option<Arc<ShellInfo>> {
        lock(&self.shell).take()
    }

    pub(crate) fn shell(&self) -> Option<Arc<ShellInfo>> {
        lock(&self.shell).clone()
    }

    /// Has a shell, a transfer or a forward.
    pub(crate) fn is_busy(&self) -> bool {
        lock(&self.shell).is_some()
            || lock(&self.transfer).strong_count() > 0
            || !lock(&self.forwards).is_empty()
    }

    /// Registers a transfer. It is listed while the returned Arc lives.
    pub(crate) fn transfer(
        &self,
        direction: &'static str,
        path: &Path,
        size: Option<u64>,
        since: Instant,
    ) -> Arc<TransferInfo> {
        let path = clipped(&path.to_string_lossy(), MAX_PATH);
        let transfer = Arc::new(TransferInfo { direction, path, size, since, bytes: Number::default() });
        *lock(&self.transfer) = Arc::downgrade(&transfer);
        transfer
    }

    pub(crate) fn add_forward(&self, target: Target, now: Instant) -> Arc<ForwardInfo> {
        let forward = Arc::new(ForwardInfo { target, address: OnceLock::new(), traffic: Traffic::new(now) });
        lock(&self.forwards).push(Arc::clone(&forward));
        forward
    }

    pub(crate) fn remove_forward(&self, forward: &Arc<ForwardInfo>) {
        let mut forwards = lock(&self.forwards);
        if let Some(place) = forwards.iter().position(|other| Arc::ptr_eq(other, forward)) {
            forwards.remove(place);
        }
        if forwards.is_empty() {
            *forwards = Vec::new();
        }
    }

    /// The session's part of `status`, with at most `room` forwards; takes their number off `room`.
    pub(crate) fn report(&self, id: &SessionId, now: Instant, room: &mut usize) -> Value {
        let protocols = self.protocols.load(Relaxed);
        let spoken = [(SHELL, "terminal"), (FILE_TRANSFER, "files"), (PORT_FORWARD, "forwards")];
        let kinds: Vec<_> = spoken.iter().filter(|(p, _)| protocols & 1 << p != 0).map(|(_, k)| k).collect();
        let shell = self.shell().map(|shell| {
            let mut report = shell.traffic.report(now);
            report["user"] = clipped(shell.user.as_str(), MAX_TEXT).into();
            report["pid"] = shell.pid.into();
            report
        });
        let transfer = lock(&self.transfer).upgrade().map(|transfer| {
            json!({
                "direction": transfer.direction,
                "path": transfer.path,
                "size": transfer.size,
                "bytes": transfer.bytes.get(),
                "age": seconds(now, transfer.since),
            })
        });
        let (open, forwards) = {
            let forwards = lock(&self.forwards);
            (forwards.len(), forwards.iter().take(*room).cloned().collect::<Vec<_>>())
        };
        *room -= forwards.len();
        let forwards = forwards.iter().map(|forward| {
            let mut report = forward.traffic.report(now);
            let Target { host, port, transport } = &forward.target;
            report["protocol"] = transport.name().into();
            report["target"] = format!("{}:{port}", clipped(host, MAX_TEXT)).into();
            report["address"] = forward.address.get().map(ToString::to_string).into();
            report
        });
        let mut report = self.traffic.report(now);
        report["id"] = clipped(id.as_str(), MAX_TEXT).into();
        report["user"] = clipped(self.user.as_str(), MAX_TEXT).into();
        report["kinds"] = json!(kinds);
        report["shell"] = shell.into();
        report["transfers"] = transfer.into_iter().collect();
        report["forwards"] = forwards.collect();
        report["forwards_open"] = open.into();
        report
    }
}

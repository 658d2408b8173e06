//! The service manager: notifications as in sd_notify(3), and its store of descriptors. Without a manager nothing
//! happens.
// Not the crate sd-notify: it blocks on a manager that does not read.

use std::io::IoSlice;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::time::{ClockId, clock_gettime};

/// For this process, not for its children.
pub(crate) const VARIABLES: [&str; 8] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "FDSTORE",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
    "LISTEN_PIDFDID",
];
/// SD_LISTEN_FDS_START.
const FIRST: RawFd = 3;
/// Before the manager is told once more that the service is ready. It ends one that isn't in 90 s.
const AGAIN: Duration = Duration::from_secs(1);

pub(crate) fn variable<T: std::str::FromStr>(name: &str) -> Option<T> {
    std::env::var(name).ok()?.parse().ok()
}

#[derive(Debug)]
pub(crate) struct Manager(Option<UnixDatagram>);

impl Manager {
    pub(crate) fn from_environment() -> Self {
        let connect = || {
            let name = std::env::var_os("NOTIFY_SOCKET")?;
            let address = match name.as_bytes() {
                [] => return None,
                [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
                _ => SocketAddr::from_pathname(&name),
            };
            let socket = UnixDatagram::unbound().ok()?;
            socket.connect_addr(&address.ok()?).ok()?;
            Some(socket)
        };
        Manager(connect())
    }

    /// Never blocks on a manager that does not read: a message may be lost.
    pub(crate) fn send(&self, state: &str, descriptors: &[RawFd]) -> nix::Result<usize> {
        let socket = self.0.as_ref().ok_or(Errno::ENOTCONN)?;
        let rights = [ControlMessage::ScmRights(descriptors)];
        let rights = &rights[..usize::from(!descriptors.is_empty())];
        let text = [IoSlice::new(state.as_bytes())];
        sendmsg::<()>(socket.as_raw_fd(), &text, rights, MsgFlags::MSG_DONTWAIT, None)
    }
}

pub(crate) struct Service {
    manager: Manager,
    pub(crate) ready: bool,
    /// The manager was too busy to hear that it is: when to say so once more.
    again: Option<Instant>,
    status: String,
    /// Interval of watchdog messages, and when the next is due.
    watchdog: Option<(Duration, Instant)>,
}

impl Service {
    pub(crate) fn new(now: Instant) -> Self {
        let absent = std::env::var_os("WATCHDOG_PID").is_none();
        let ours = absent || variable("WATCHDOG_PID") == Some(std::process::id());
        let limit = variable::<u64>("WATCHDOG_USEC").filter(|micros| ours && *micros > 0);
        // Twice as often as required, as sd_watchdog_enabled(3) recommends.
        let watchdog = limit.map(|micros| (Duration::from_micros(micros) / 2, now));
        Service {
            manager: Manager::from_environment(),
            ready: false,
            again: None,
            status: String::new(),
            watchdog,
        }
    }

    pub(crate) fn send(&self, state: &str) {
        // A lost message is repeated or unimportant.
        let _ = self.manager.send(state, &[]);
    }

    /// Ends the start or a reload.
    pub(crate) fn ready(&mut self) {
        self.ready = true;
        let told = self.manager.send("READY=1", &[]);
        self.again = (told == Err(Errno::EAGAIN)).then(|| Instant::now() + AGAIN);
    }

    /// Announces a reload, which [`Service::ready`] ends. Does nothing during the start.
    pub(crate) fn reloading(&self) {
        if self.ready
            && let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC)
        {
            self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", Duration::from(now).as_micros()));
        }
    }

    /// Skips a repeated status.
    pub(crate) fn status(&mut self, status: String) {
        if status != self.status {
            self.send(&format!("STATUS={}", status.escape_debug()));
            self.status = status;
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.watchdog.map(|(_, at)| at).into_iter().chain(self.again).min()
    }

    /// Feeds the watchdog if that is due, and the link makes progress. Says once more what wasn't heard.
    pub(crate) fn feed(&mut self, now: Instant, makes_progress: impl FnOnce() -> bool) {
        if self.again.take_if(|at| now >= *at).is_some() {
            self.ready();
        }
        if let Some((interval, at)) = &mut self.watchdog
            && now >= *at
        {
            *at = now + *interval;
            if makes_progress() {
                self.send("WATCHDOG=1");
            }
        }
    }
}

/// Descriptors that the manager has kept for this process, with their names. Call it once.
pub(crate) fn kept_descriptors() -> Vec<(String, OwnedFd)> {
    if variable("LISTEN_PID") != Some(std::process::id()) {
        return Vec::new();
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let (names, count) = (names.split(':'), variable("LISTEN_FDS").unwrap_or(0));
    // SAFETY: the manager has opened them for this process, which is named; nobody else here knows of them.
    let own = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
    names.zip(FIRST..).take(count).map(|(name, fd)| (name.to_owned(), own(fd))).collect()
}

//! sd_notify(3) without its library: what systemd is told, and what it wants to know. Elsewhere nobody listens.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Environment variables for this process, not for its children.
pub(crate) const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// The socket of the service manager, if there is one.
#[derive(Debug)]
pub(crate) struct Notify {
    socket: Option<UnixDatagram>,
}

impl Notify {
    pub(crate) fn from_environment() -> Self {
        let name = std::env::var_os(VARIABLES[0]).unwrap_or_default();
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
            path => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path)),
        };
        let connect = |address| {
            let socket = UnixDatagram::unbound()?;
            socket.connect_addr(&address)?;
            // A manager that doesn't read mustn't hold anything up.
            socket.set_nonblocking(true)?;
            Ok::<_, std::io::Error>(socket)
        };
        Notify { socket: if name.is_empty() { None } else { address.and_then(connect).ok() } }
    }

    /// `state` has lines of the form `NAME=VALUE`.
    pub(crate) fn send(&self, state: &str) {
        if let Some(socket) = &self.socket {
            // The manager may not listen any more, and a lost message is either repeated or not important.
            let _ = socket.send(state.as_bytes());
        }
    }

    /// Reports a reload; `READY=1` has to follow.
    pub(crate) fn reloading(&self) {
        if let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC) {
            self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", Duration::from(now).as_micros()));
        }
    }
}

/// The watchdog's interval: the manager wants a sign of life within it.
pub(crate) fn watchdog() -> Option<Duration> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    let [_, micros, pid] = VARIABLES;
    let ours = std::env::var_os(pid).is_none() || number(pid) == Some(std::process::id().into());
    number(micros).filter(|micros| ours && *micros > 0).map(Duration::from_micros)
}

//! Messages to the service manager, as sd_notify(3) sends them. Elsewhere nobody listens.
// Not the crate sd-notify: its messages wait for a manager that doesn't read.

use std::ffi::{OsStr, OsString};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::sys::process::SERVICE_VARIABLES;

#[derive(Debug)]
pub(crate) struct Service {
    socket: Option<UnixDatagram>,
    pub(crate) ready: bool,
    /// The last one sent.
    status: String,
    /// The interval of signs of life, and when the next one is due.
    watchdog: Option<(Duration, Instant)>,
}

impl Service {
    /// Reads the environment; intervals start at `now`.
    pub(crate) fn new(now: Instant) -> Self {
        let [socket, micros, pid] = SERVICE_VARIABLES.map(std::env::var_os);
        let number = |text: &Option<OsString>| text.as_ref()?.to_str()?.parse::<u64>().ok();
        let ours = pid.is_none() || number(&pid) == Some(std::process::id().into());
        let limit = number(&micros).filter(|micros| ours && *micros > 0);
        // Twice as often as required, as sd_watchdog_enabled(3) recommends.
        let watchdog = limit.map(|micros| (Duration::from_micros(micros) / 2, now));
        let socket = socket.and_then(|name| connect(&name));
        Service { socket, ready: false, status: String::new(), watchdog }
    }

    fn send(&self, state: &str) {
        if let Some(socket) = &self.socket {
            // The manager may not listen any more, and a lost message is either repeated or not important.
            let _ = socket.send(state.as_bytes());
        }
    }

    /// Ends the start or a reload.
    pub(crate) fn ready(&mut self) {
        self.ready = true;
        self.send("READY=1");
    }

    /// Reports a reload, until the next [`Service::ready`]. During the start there is nothing to report.
    pub(crate) fn reloading(&self) {
        if self.ready
            && let Ok(now) = clock_gettime(ClockId::CLOCK_MONOTONIC)
        {
            self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", Duration::from(now).as_micros()));
        }
    }

    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// Sends a status text, unless it repeats the last one.
    pub(crate) fn status(&mut self, status: String) {
        if status != self.status {
            self.send(&format!("STATUS={}", status.escape_debug()));
            self.status = status;
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.watchdog.map(|(_, at)| at)
    }

    /// Sends a sign of life if one is due and `makes_progress` confirms that the link isn't stuck.
    pub(crate) fn feed(&mut self, now: Instant, makes_progress: impl FnOnce() -> bool) {
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

fn connect(name: &OsStr) -> Option<UnixDatagram> {
    let address = match name.as_bytes() {
        [] => return None,
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        _ => SocketAddr::from_pathname(name),
    };
    let socket = UnixDatagram::unbound().ok()?;
    socket.connect_addr(&address.ok()?).ok()?;
    // A manager that doesn't read mustn't hold anything up.
    socket.set_nonblocking(true).ok()?;
    Some(socket)
}

//! What the service manager is told.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use crate::sys::manager::{Manager, variable};

#[derive(Debug)]
pub(crate) struct Service {
    manager: Manager,
    pub(crate) ready: bool,
    /// The last one sent.
    status: String,
    /// The interval of signs of life, and when the next one is due.
    watchdog: Option<(Duration, Instant)>,
}

impl Service {
    /// Reads the environment; intervals start at `now`.
    pub(crate) fn new(now: Instant) -> Self {
        let absent = std::env::var_os("WATCHDOG_PID").is_none();
        let ours = absent || variable("WATCHDOG_PID") == Some(std::process::id());
        let limit = variable::<u64>("WATCHDOG_USEC").filter(|micros| ours && *micros > 0);
        // Twice as often as required, as sd_watchdog_enabled(3) recommends.
        let watchdog = limit.map(|micros| (Duration::from_micros(micros) / 2, now));
        Service { manager: Manager::from_environment(), ready: false, status: String::new(), watchdog }
    }

    fn send(&self, state: &str) {
        // A lost message is either repeated or not important.
        self.manager.send(state, &[]);
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

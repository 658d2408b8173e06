//! Messages to the service manager: readiness, status texts, and signs of life for the watchdog.

use std::time::{Duration, Instant};

use crate::sys::notify::{Notify, watchdog};

/// The daemon as a systemd service.
#[derive(Debug)]
pub(crate) struct Service {
    notify: Notify,
    ready: bool,
    /// The last status sent.
    status: String,
    /// The watchdog's interval, and when the next sign of life is due.
    feeding: Option<(Duration, Instant)>,
}

impl Service {
    /// Reads the environment; intervals start at `now`.
    pub(crate) fn new(now: Instant) -> Self {
        // Twice as often as required, as sd_watchdog_enabled(3) recommends.
        let feeding = watchdog().map(|limit| (limit / 2, now));
        Service { notify: Notify::from_environment(), ready: false, status: String::new(), feeding }
    }

    /// Reports that the start or a reload is done.
    pub(crate) fn ready(&mut self) {
        self.ready = true;
        self.notify.send("READY=1");
    }

    /// [`Service::ready`] was called.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready
    }

    /// Reports a reload, until the next [`Service::ready`].
    pub(crate) fn reloading(&self) {
        self.notify.reloading();
    }

    pub(crate) fn stopping(&self) {
        self.notify.send("STOPPING=1");
    }

    /// Sends a status text, unless it repeats the last one.
    pub(crate) fn status(&mut self, status: String) {
        if status != self.status {
            self.notify.send(&format!("STATUS={}", status.escape_debug()));
            self.status = status;
        }
    }

    /// When [`Service::feed`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.feeding.map(|(_, at)| at)
    }

    /// Sends a sign of life if one is due and `goes_on` confirms that all is well.
    pub(crate) fn feed(&mut self, now: Instant, goes_on: impl FnOnce() -> bool) {
        if let Some((interval, at)) = &mut self.feeding
            && now >= *at
        {
            *at = now + *interval;
            if goes_on() {
                self.notify.send("WATCHDOG=1");
            }
        }
    }
}

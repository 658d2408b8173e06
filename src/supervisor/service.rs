//! What the service manager is told: that the daemon is ready, how things stand and, again and again, that it goes on.

use std::time::{Duration, Instant};

use crate::sys::notify::{Notify, watchdog};

/// The daemon as a service.
#[derive(Debug)]
pub(crate) struct Service {
    notify: Notify,
    ready: bool,
    /// What the manager heard last.
    status: String,
    /// How often it wants a sign of life, and when it gets the next one.
    feeding: Option<(Duration, Instant)>,
}

impl Service {
    /// As the environment says, from `now` on.
    pub(crate) fn new(now: Instant) -> Self {
        // Twice as often as it has to be.
        let feeding = watchdog().map(|limit| (limit / 2, now));
        Service { notify: Notify::from_environment(), ready: false, status: String::new(), feeding }
    }

    /// The daemon does what it is there for, or does it again.
    pub(crate) fn ready(&mut self) {
        self.ready = true;
        self.notify.send("READY=1");
    }

    /// Whether that was said.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready
    }

    /// The configuration is being read again, until the next [`Service::ready`].
    pub(crate) fn reloading(&self) {
        self.notify.reloading();
    }

    /// The end has begun.
    pub(crate) fn stopping(&self) {
        self.notify.send("STOPPING=1");
    }

    /// How things stand, said once.
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

    /// A sign of life, if one is due and `goes_on` says that all does.
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

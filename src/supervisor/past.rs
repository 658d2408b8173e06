//! The history of attempts to connect, for `status`.

use std::time::Instant;

use serde_json::{Value, json};

use super::machine::{Machine, State};
use crate::auth::Credentials;
use crate::config::{Auth, Config};

/// History for `status` that the [`Machine`] doesn't need.
#[derive(Debug)]
pub(crate) struct Past {
    /// Start of the daemon.
    started: Instant,
    /// Since when the state is what it is.
    since: Instant,
    /// Attempts that failed since the last success.
    failed: u32,
    error: Option<(String, Instant)>,
}

impl Past {
    pub(crate) fn new(now: Instant) -> Self {
        Past { started: now, since: now, failed: 0, error: None }
    }

    pub(crate) fn changed(&mut self, state: State, now: Instant) {
        self.since = now;
        if matches!(state, State::Connected { .. }) {
            self.failed = 0;
        }
    }

    /// A link was lost or, if `dialled`, an attempt failed.
    pub(crate) fn lost(&mut self, dialled: bool, why: String, now: Instant) {
        self.failed = self.failed.saturating_add(dialled.into());
        self.failed_because(why, now);
    }

    pub(crate) fn failed_because(&mut self, why: String, now: Instant) {
        self.error = Some((why, now));
    }

    /// The part of `status` besides the sessions.
    pub(crate) fn report(&self, machine: &Machine, config: &Config, now: Instant) -> Value {
        let seconds = |since: Instant| now.saturating_duration_since(since).as_secs_f64();
        let next = machine.deadline().map(|at| at.saturating_duration_since(now).as_secs_f64());
        let credentials = machine.credentials.as_ref();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "pid": std::process::id(),
            "uptime": seconds(self.started),
            "connection": {
                "state": machine.state.name(),
                "for": seconds(self.since),
                "server": credentials.map(Credentials::shown_server_url),
                "failed_attempts": self.failed,
                "next_attempt_in": next,
                "last_error": self.error.as_ref().map(|(text, _)| text),
                "last_error_age": self.error.as_ref().map(|(_, at)| seconds(*at)),
            },
            "token": {
                "source": match config.auth {
                    Auth::Dbus => "dbus",
                    Auth::File { .. } => "file",
                },
                "length": credentials.map(|c| c.token.len()),
            },
        })
    }
}

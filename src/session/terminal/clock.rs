//! A shell's timers: the health check and the expiry. Pure.

use std::time::{Duration, Instant};

use crate::config::Expiry;

/// How often the client is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(60);
/// How much later than that its answer may come.
const PONG_GRACE: Duration = Duration::from_secs(5);

/// What clients are told to expect: the seconds until the next ping.
pub const PING_TIMEOUT: u16 = 65;

/// The timers of one shell.
#[derive(Debug)]
pub struct Clock {
    expiry: Expiry,
    started: Instant,
    last_input: Instant,
    next_ping: Instant,
    pong_limit: Instant,
}

/// What is due.
#[derive(Debug, PartialEq, Eq)]
pub enum Due {
    /// Ask the client.
    Ping,
    /// End the shell.
    End {
        /// Why, in the audit log's word.
        why: &'static str,
        /// Why, for the client.
        text: String,
    },
}

impl Clock {
    /// For a shell that starts now.
    pub fn new(expiry: Expiry, now: Instant) -> Self {
        Clock {
            expiry,
            started: now,
            last_input: now,
            next_ping: now + PING_INTERVAL,
            pong_limit: now + PING_INTERVAL + PONG_GRACE,
        }
    }

    /// Since when the shell runs.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// Something was typed.
    pub fn input(&mut self, now: Instant) {
        self.last_input = now;
    }

    /// The client has answered.
    pub fn pong(&mut self, now: Instant) {
        self.pong_limit = now + PING_INTERVAL + PONG_GRACE;
    }

    fn expires(&self) -> Option<Instant> {
        match self.expiry {
            Expiry::Never => None,
            Expiry::Idle(limit) => self.last_input.checked_add(limit),
            Expiry::Age(limit) => self.started.checked_add(limit),
        }
    }

    /// When [`Clock::due`] has something to say.
    pub fn deadline(&self) -> Instant {
        let next = self.next_ping.min(self.pong_limit);
        self.expires().map_or(next, |at| at.min(next))
    }

    /// What is due now, if anything.
    pub fn due(&mut self, now: Instant) -> Option<Due> {
        if self.expires().is_some_and(|at| now >= at) {
            let text = match self.expiry {
                Expiry::Idle(limit) => format!("no input for {} s", limit.as_secs()),
                Expiry::Age(limit) => format!("open for {} s", limit.as_secs()),
                Expiry::Never => String::new(),
            };
            return Some(Due::End { why: "expired", text: format!("session expired: {text}") });
        }
        if now >= self.pong_limit {
            let text = "health check failed: the client did not answer".to_owned();
            return Some(Due::End { why: "health check failed", text });
        }
        if now >= self.next_ping {
            // From now on, not from when it was due: a stopped process mustn't catch up.
            self.next_ping = now + PING_INTERVAL;
            return Some(Due::Ping);
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn end(due: Option<Due>) -> String {
        match due {
            Some(Due::End { text, .. }) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pings_each_minute_and_wants_answers() {
        let start = Instant::now();
        let mut clock = Clock::new(Expiry::Never, start);
        assert_eq!(clock.due(start + 59 * SECOND), None);
        assert_eq!(clock.deadline(), start + 60 * SECOND);
        assert_eq!(clock.due(start + 60 * SECOND), Some(Due::Ping));
        assert_eq!(clock.deadline(), start + 65 * SECOND);
        clock.pong(start + 61 * SECOND);
        assert_eq!(clock.due(start + 119 * SECOND), None);
        assert_eq!(clock.due(start + 120 * SECOND), Some(Due::Ping));
        assert_eq!(clock.deadline(), start + 126 * SECOND);
        assert!(end(clock.due(start + 126 * SECOND)).starts_with("health check failed"));
    }

    #[test]
    fn idleness_counts_from_the_last_input_and_age_from_the_start() {
        let start = Instant::now();
        let mut idle = Clock::new(Expiry::Idle(10 * SECOND), start);
        idle.input(start + 5 * SECOND);
        assert_eq!(idle.due(start + 14 * SECOND), None);
        assert_eq!(end(idle.due(start + 15 * SECOND)), "session expired: no input for 10 s");
        let mut age = Clock::new(Expiry::Age(10 * SECOND), start);
        age.input(start + 5 * SECOND);
        assert_eq!(age.deadline(), start + 10 * SECOND);
        assert_eq!(end(age.due(start + 10 * SECOND)), "session expired: open for 10 s");
    }
}

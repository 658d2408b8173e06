//! A shell's timers: health check, expiry, and the warning before an idle shell expires. No I/O.

use std::time::{Duration, Instant};

use crate::config::Expiry;

const PING_INTERVAL: Duration = Duration::from_secs(60);
/// The client's answer may come this much later. A little more than the server has, which is asked with the client: on a
/// link that is dead the shell is kept, not ended.
const PONG_GRACE: Duration = Duration::from_millis(10_500);

/// An idle shell warns its user this long before it expires, unless its limit is shorter.
const NOTICE: Duration = Duration::from_secs(60);

pub(super) struct Clock {
    started: Instant,
    last_activity: Instant,
    warned: bool,
    /// When the next ping and the client's answer are due; `None` without a client.
    pub(super) health: Option<(Instant, Instant)>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Due {
    Ping,
    /// Time left.
    Warn(Duration),
    /// Reason for the audit log, and text for the client.
    End(&'static str, String),
}

pub(super) fn health(now: Instant) -> Option<(Instant, Instant)> {
    Some((now + PING_INTERVAL, now + PING_INTERVAL + PONG_GRACE))
}

impl Clock {
    pub(super) fn new(started: Instant) -> Self {
        Clock { started, last_activity: started, warned: false, health: health(started) }
    }

    pub(super) fn active(&mut self, now: Instant) {
        if now > self.last_activity {
            self.last_activity = now;
            self.warned = false;
        }
    }

    pub(super) fn pong(&mut self, now: Instant) {
        if let Some((_, pong_limit)) = &mut self.health {
            *pong_limit = now + PING_INTERVAL + PONG_GRACE;
        }
    }

    fn expires(&self, expiry: Expiry) -> Option<(Instant, &'static str, Duration)> {
        let (since, what, limit) = match expiry {
            Expiry::Never => return None,
            Expiry::Idle(limit) => (self.last_activity, "no input", limit),
            Expiry::Age(limit) => (self.started, "open", limit),
        };
        Some((since.checked_add(limit)?, what, limit))
    }

    fn warns(&self, expiry: Expiry) -> Option<Instant> {
        match expiry {
            // Without a client nobody would see it.
            Expiry::Idle(limit) if limit > NOTICE && !self.warned && self.health.is_some() => {
                self.last_activity.checked_add(limit - NOTICE)
            }
            _ => None,
        }
    }

    pub(super) fn deadline(&self, expiry: Expiry) -> Option<Instant> {
        let ends = self.warns(expiry).or(self.expires(expiry).map(|(at, ..)| at));
        let health = self.health.map(|(ping, limit)| ping.min(limit));
        ends.into_iter().chain(health).min()
    }

    pub(super) fn due(&mut self, expiry: Expiry, now: Instant) -> Option<Due> {
        let expires = self.expires(expiry);
        if let Some((_, what, limit)) = expires.filter(|(at, ..)| now >= *at) {
            let text = format!("session expired: {what} for {} s", limit.as_secs());
            return Some(Due::End("expired", text));
        }
        if let Some((next_ping, pong_limit)) = &mut self.health {
            if now >= *next_ping {
                // Counted from now: a process that was stopped must not send the pings that it missed, nor miss answers to
                // them.
                *next_ping = now + PING_INTERVAL;
                *pong_limit = (*pong_limit).max(now + PONG_GRACE);
                return Some(Due::Ping);
            }
            if now >= *pong_limit {
                let text = "health check failed: the client did not answer".to_owned();
                return Some(Due::End("health check failed", text));
            }
        }
        if self.warns(expiry).is_some_and(|at| now >= at) {
            self.warned = true;
            return expires.map(|(at, ..)| Due::Warn(at - now));
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
            Some(Due::End(_, text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pings_each_minute_and_wants_answers() {
        let start = Instant::now();
        let mut clock = Clock::new(start);
        assert_eq!(clock.due(Expiry::Never, start + 59 * SECOND), None);
        assert_eq!(clock.deadline(Expiry::Never), Some(start + 60 * SECOND));
        assert_eq!(clock.due(Expiry::Never, start + 60 * SECOND), Some(Due::Ping));
        assert_eq!(clock.deadline(Expiry::Never), Some(start + 60 * SECOND + PONG_GRACE));
        clock.pong(start + 61 * SECOND);
        assert_eq!(clock.due(Expiry::Never, start + 119 * SECOND), None);
        assert_eq!(clock.due(Expiry::Never, start + 120 * SECOND), Some(Due::Ping));
        assert_eq!(clock.deadline(Expiry::Never), Some(start + 121 * SECOND + PONG_GRACE));
        assert!(
            end(clock.due(Expiry::Never, start + 121 * SECOND + PONG_GRACE))
                .starts_with("health check failed")
        );
    }

    /// A client was blamed for its silence while the agent's container was paused.
    #[test]
    fn a_client_is_asked_before_it_is_blamed() {
        let start = Instant::now();
        let (mut clock, later) = (Clock::new(start), start + 80 * SECOND);
        assert_eq!(clock.due(Expiry::Never, later), Some(Due::Ping));
        assert_eq!(clock.due(Expiry::Never, later), None);
        assert_eq!(clock.deadline(Expiry::Never), Some(later + PONG_GRACE));
        assert!(end(clock.due(Expiry::Never, later + PONG_GRACE)).starts_with("health check failed"));
    }

    #[test]
    fn idleness_counts_from_the_last_input_and_age_from_the_start() {
        let start = Instant::now();
        let (mut clock, idle) = (Clock::new(start), Expiry::Idle(10 * SECOND));
        clock.active(start + 5 * SECOND);
        assert_eq!(clock.due(idle, start + 14 * SECOND), None);
        assert_eq!(end(clock.due(idle, start + 15 * SECOND)), "session expired: no input for 10 s");
        let age = Expiry::Age(10 * SECOND);
        assert_eq!(clock.deadline(age), Some(start + 10 * SECOND));
        assert_eq!(end(clock.due(age, start + 10 * SECOND)), "session expired: open for 10 s");
    }

    #[test]
    fn the_idle_are_warned_a_minute_before() {
        let start = Instant::now();
        let (mut clock, idle) = (Clock::new(start), Expiry::Idle(70 * SECOND));
        clock.pong(start + 60 * SECOND);
        assert_eq!(clock.deadline(idle), Some(start + 10 * SECOND));
        assert_eq!(clock.due(idle, start + 9 * SECOND), None);
        assert_eq!(clock.due(idle, start + 10 * SECOND), Some(Due::Warn(60 * SECOND)));
        assert_eq!(clock.due(idle, start + 11 * SECOND), None);
        // An older time is no activity.
        clock.active(start);
        assert_eq!(clock.due(idle, start + 12 * SECOND), None);
        clock.active(start + 20 * SECOND);
        assert_eq!(clock.deadline(idle), Some(start + 30 * SECOND));
        assert_eq!(clock.due(idle, start + 31 * SECOND), Some(Due::Warn(59 * SECOND)));
        // Another limit counts from the same moment.
        assert_eq!(
            end(clock.due(Expiry::Idle(12 * SECOND), start + 32 * SECOND)),
            "session expired: no input for 12 s"
        );
        // One whose client is away is warned when it is back.
        let mut clock = Clock { health: None, ..Clock::new(start) };
        assert_eq!(clock.deadline(idle), Some(start + 70 * SECOND));
        assert_eq!(clock.due(idle, start + 30 * SECOND), None);
        clock.health = health(start + 40 * SECOND);
        assert_eq!(clock.due(idle, start + 40 * SECOND), Some(Due::Warn(30 * SECOND)));
        for expiry in [Expiry::Idle(60 * SECOND), Expiry::Age(70 * SECOND), Expiry::Never] {
            assert_eq!(Clock::new(start).due(expiry, start + 59 * SECOND), None, "{expiry:?}");
        }
    }
}

//! A shell's timers: the health check and the expiry, of which an idle user is warned. Pure.

use std::time::{Duration, Instant};

use crate::config::{Expiry, Sessions};

/// How often the client is asked whether it is there.
const PING_INTERVAL: Duration = Duration::from_secs(60);
/// How much later than that its answer may come.
const PONG_GRACE: Duration = Duration::from_secs(5);

/// How long before its end an idle shell warns its user. One with a shorter limit doesn't.
const NOTICE: Duration = Duration::from_secs(60);

/// What clients are told to expect: the seconds until the next ping.
pub(crate) const PING_TIMEOUT: u16 = 65;

#[derive(Debug)]
pub(crate) struct Clock {
    sessions: Sessions,
    started: Instant,
    last_activity: Instant,
    warned: bool,
    /// When the next ping is due, and until when its answer; `None` without a client.
    health: Option<(Instant, Instant)>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Ping,
    /// Tell the user how soon the shell is closed.
    Warn(Duration),
    /// End the shell: why, for the audit log and for the client.
    End(&'static str, String),
}

/// For a client that was heard at `now`.
fn health(now: Instant) -> Option<(Instant, Instant)> {
    Some((now + PING_INTERVAL, now + PING_INTERVAL + PONG_GRACE))
}

impl Clock {
    pub(crate) fn new(sessions: &Sessions, now: Instant) -> Self {
        Clock {
            sessions: sessions.clone(),
            started: now,
            last_activity: now,
            warned: false,
            health: health(now),
        }
    }

    /// There is no client to ask.
    pub(crate) fn pause(&mut self) {
        self.health = None;
    }

    pub(crate) fn resume(&mut self, now: Instant) {
        self.health = health(now);
    }

    pub(crate) fn input(&mut self, now: Instant) {
        if now > self.last_activity {
            self.last_activity = now;
            self.warned = false;
        }
    }

    pub(crate) fn output(&mut self, now: Instant) {
        if self.sessions.idle_includes_output {
            self.input(now);
        }
    }

    /// From now on the shell expires by this.
    pub(crate) fn follow(&mut self, sessions: &Sessions) {
        self.sessions.clone_from(sessions);
    }

    pub(crate) fn pong(&mut self, now: Instant) {
        if let Some((_, pong_limit)) = &mut self.health {
            *pong_limit = now + PING_INTERVAL + PONG_GRACE;
        }
    }

    /// When the shell ends, and by which limit.
    fn expires(&self) -> Option<(Instant, &'static str, Duration)> {
        let (since, what, limit) = match self.sessions.expiry {
            Expiry::Never => return None,
            Expiry::Idle(limit) => (self.last_activity, "no input", limit),
            Expiry::Age(limit) => (self.started, "open", limit),
        };
        Some((since.checked_add(limit)?, what, limit))
    }

    fn warns(&self) -> Option<Instant> {
        match self.sessions.expiry {
            Expiry::Idle(limit) if limit > NOTICE && !self.warned => {
                self.last_activity.checked_add(limit - NOTICE)
            }
            _ => None,
        }
    }

    /// When [`Clock::due`] has something to say.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        let expiry = self.warns().or(self.expires().map(|(at, ..)| at));
        let health = self.health.map(|(ping, limit)| ping.min(limit));
        expiry.into_iter().chain(health).min()
    }

    pub(crate) fn due(&mut self, now: Instant) -> Option<Due> {
        let expires = self.expires();
        if let Some((at, what, limit)) = expires
            && now >= at
        {
            let text = format!("session expired: {what} for {} s", limit.as_secs());
            return Some(Due::End("expired", text));
        }
        if self.health.is_some_and(|(_, limit)| now >= limit) {
            let text = "health check failed: the client did not answer".to_owned();
            return Some(Due::End("health check failed", text));
        }
        if self.warns().is_some_and(|at| now >= at) {
            self.warned = true;
            return expires.map(|(at, ..)| Due::Warn(at - now));
        }
        let (next_ping, _) = self.health.as_mut()?;
        (now >= *next_ping).then(|| {
            // From now on, not from when it was due: a stopped process mustn't catch up.
            *next_ping = now + PING_INTERVAL;
            Due::Ping
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn sessions(expiry: Expiry) -> Sessions {
        Sessions {
            expiry,
            max_per_user: 1,
            idle_includes_output: false,
            keep_detached: SECOND,
            keep_when_user_leaves: false,
        }
    }

    fn end(due: Option<Due>) -> String {
        match due {
            Some(Due::End(_, text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn pings_each_minute_and_wants_answers() {
        let start = Instant::now();
        let mut clock = Clock::new(&sessions(Expiry::Never), start);
        assert_eq!(clock.due(start + 59 * SECOND), None);
        assert_eq!(clock.deadline(), Some(start + 60 * SECOND));
        assert_eq!(clock.due(start + 60 * SECOND), Some(Due::Ping));
        assert_eq!(clock.deadline(), Some(start + 65 * SECOND));
        clock.pong(start + 61 * SECOND);
        assert_eq!(clock.due(start + 119 * SECOND), None);
        assert_eq!(clock.due(start + 120 * SECOND), Some(Due::Ping));
        assert_eq!(clock.deadline(), Some(start + 126 * SECOND));
        assert!(end(clock.due(start + 126 * SECOND)).starts_with("health check failed"));
    }

    #[test]
    fn idleness_counts_from_the_last_input_and_age_from_the_start() {
        let start = Instant::now();
        let mut idle = Clock::new(&sessions(Expiry::Idle(10 * SECOND)), start);
        idle.input(start + 5 * SECOND);
        assert_eq!(idle.due(start + 14 * SECOND), None);
        assert_eq!(end(idle.due(start + 15 * SECOND)), "session expired: no input for 10 s");
        let mut age = Clock::new(&sessions(Expiry::Age(10 * SECOND)), start);
        age.input(start + 5 * SECOND);
        assert_eq!(age.deadline(), Some(start + 10 * SECOND));
        assert_eq!(end(age.due(start + 10 * SECOND)), "session expired: open for 10 s");
    }

    #[test]
    fn the_idle_are_warned_a_minute_before() {
        let start = Instant::now();
        let mut clock = Clock::new(&sessions(Expiry::Idle(70 * SECOND)), start);
        clock.pong(start + 60 * SECOND);
        assert_eq!(clock.deadline(), Some(start + 10 * SECOND));
        assert_eq!(clock.due(start + 9 * SECOND), None);
        assert_eq!(clock.due(start + 10 * SECOND), Some(Due::Warn(60 * SECOND)));
        assert_eq!(clock.due(start + 11 * SECOND), None);
        // What is known already is no activity.
        clock.input(start);
        assert_eq!(clock.due(start + 12 * SECOND), None);
        clock.input(start + 20 * SECOND);
        assert_eq!(clock.deadline(), Some(start + 30 * SECOND));
        assert_eq!(clock.due(start + 31 * SECOND), Some(Due::Warn(59 * SECOND)));
        // Another limit counts from the same moment.
        clock.follow(&sessions(Expiry::Idle(12 * SECOND)));
        assert_eq!(end(clock.due(start + 32 * SECOND)), "session expired: no input for 12 s");
        for expiry in [Expiry::Idle(60 * SECOND), Expiry::Age(70 * SECOND), Expiry::Never] {
            let mut clock = Clock::new(&sessions(expiry), start);
            assert_eq!(clock.due(start + 59 * SECOND), None, "{expiry:?}");
        }
    }
}

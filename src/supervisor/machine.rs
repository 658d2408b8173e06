//! When to connect: a table of states and events. Pure; nothing else decides it.

use std::time::{Duration, Instant};

use crate::auth::{AuthEvent, Credentials};
use crate::backoff;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// There is no token; the authentication manager will announce one.
    Unauthorized,
    /// Until the next attempt.
    Waiting {
        until: Instant,
    },
    /// The manager was asked for the next attempt's token.
    Asking,
    Dialling,
    Connected {
        since: Instant,
    },
    Stopping,
}

impl State {
    /// The word that `status` shows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            State::Unauthorized => "unauthorized",
            State::Waiting { .. } => "waiting",
            State::Asking => "asking",
            State::Dialling => "connecting",
            State::Connected { .. } => "connected",
            State::Stopping => "stopping",
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) enum Event {
    Auth(AuthEvent),
    Connected,
    /// The link has ended, or the attempt failed.
    Lost {
        /// The server rejects the token.
        unauthorized: bool,
        /// From the server: no attempt before this has passed.
        retry_after: Option<Duration>,
    },
    /// Time has passed, possibly a deadline.
    Tick,
    /// The operator wants an attempt now, if there is neither a connection nor an attempt, and a look at the token.
    Hurry,
    Stop,
}

/// Actions in a list are to be taken in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// End the link or the attempt, with all its sessions.
    Close,
    /// Start an attempt with the current credentials.
    Dial,
    /// Ask the manager for the token.
    Ask,
    /// Have the manager fetch a new token.
    Fetch,
    LogWait(Duration),
    LogUnauthorized,
    /// Log that the link is lost and can't be made again, for this reason.
    LogNoReconnect(String),
}

/// The supervisor's state machine; no I/O.
#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) state: State,
    /// For the next attempt.
    pub(crate) credentials: Option<Credentials>,
    /// Attempts since the last success.
    attempt: u32,
    /// ReconnectIntervalSeconds.
    pub(crate) base: Duration,
    /// A source of uniform 64-bit numbers.
    random: fn() -> u64,
}

impl Machine {
    /// Starts unauthorised, with the manager already asked.
    pub(crate) fn new(base: Duration, random: fn() -> u64) -> Self {
        Machine { state: State::Unauthorized, credentials: None, attempt: 0, base, random }
    }

    /// When [`Event::Tick`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Waiting { until } => Some(until),
            _ => None,
        }
    }

    /// The state for people: at `now` or, without it, in words that stay true as long as the state.
    pub(crate) fn describe(&self, server: &str, now: Option<Instant>) -> String {
        match self.state {
            State::Unauthorized => "waiting for a token".to_owned(),
            State::Waiting { until } => {
                let left = now.map(|now| until.saturating_duration_since(now).as_secs_f32());
                let left = left.map_or_else(String::new, |left| format!(" in {left:.0} s"));
                format!("next attempt to connect to {server}{left}, {} failed", self.attempt)
            }
            State::Asking => "asking for a token".to_owned(),
            State::Dialling => format!("connecting to {server}"),
            State::Connected { since } => {
                let age = now.map(|now| now.saturating_duration_since(since).as_secs());
                let age = age.map_or_else(String::new, |age| format!(" for {age} s"));
                format!("connected to {server}{age}")
            }
            State::Stopping => "ending".to_owned(),
        }
    }

    /// The table.
    pub(crate) fn step(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match (self.state, event) {
            (State::Stopping, _) => vec![],
            (_, Event::Stop) => self.go(State::Stopping, vec![Action::Close]),

            (_, Event::Auth(AuthEvent::Announced(None))) => self.revoked(),
            (_, Event::Auth(AuthEvent::Announced(Some(new)))) => self.announced(new),
            (_, Event::Auth(AuthEvent::Answered(Some(new)))) => self.answered(new),
            (_, Event::Auth(AuthEvent::Answered(None))) => self.answered_nothing(),
            (State::Asking, Event::Auth(AuthEvent::Unanswered(why))) => match self.credentials {
                // The last known credentials may still be valid.
                Some(_) => self.go(State::Dialling, vec![Action::Dial]),
                None => self.go(State::Unauthorized, vec![Action::LogNoReconnect(why)]),
            },
            (_, Event::Auth(AuthEvent::Unanswered(_))) => vec![],

            (State::Dialling, Event::Connected) => self.go(State::Connected { since: now }, vec![]),
            (State::Dialling | State::Connected { .. }, Event::Lost { unauthorized, retry_after }) => {
                self.lost(now, unauthorized, retry_after)
            }
            (_, Event::Connected | Event::Lost { .. }) => vec![],

            (State::Waiting { until }, Event::Tick) if now >= until => {
                self.go(State::Asking, vec![Action::Ask])
            }
            (_, Event::Tick) => vec![],

            (State::Asking, Event::Hurry) => vec![],
            (State::Dialling | State::Connected { .. }, Event::Hurry) => vec![Action::Ask],
            (_, Event::Hurry) => self.go(State::Asking, vec![Action::Ask]),
        }
    }

    fn go(&mut self, state: State, actions: Vec<Action>) -> Vec<Action> {
        self.state = state;
        actions
    }

    /// The manager announces that it has no token any more.
    fn revoked(&mut self) -> Vec<Action> {
        self.credentials = None;
        self.go(State::Unauthorized, vec![Action::LogUnauthorized, Action::Close])
    }

    /// The manager announces a token: worth an attempt at once, even with the token we know.
    fn announced(&mut self, new: Credentials) -> Vec<Action> {
        let changed = self.learn(new);
        match self.state {
            State::Dialling | State::Connected { .. } if !changed => vec![],
            State::Dialling | State::Connected { .. } => {
                self.go(State::Dialling, vec![Action::Close, Action::Dial])
            }
            _ => self.go(State::Dialling, vec![Action::Dial]),
        }
    }

    /// The manager answers with a token; it may be a new manager.
    fn answered(&mut self, new: Credentials) -> Vec<Action> {
        let changed = self.learn(new);
        match self.state {
            State::Asking | State::Unauthorized => self.go(State::Dialling, vec![Action::Dial]),
            State::Waiting { .. } if changed => self.go(State::Dialling, vec![Action::Dial]),
            State::Dialling | State::Connected { .. } if changed => {
                self.go(State::Dialling, vec![Action::Close, Action::Dial])
            }
            _ => vec![],
        }
    }

    /// The manager answers without a token. A working link stays: a manager that has just started knows no token
    /// until somebody fetches one.
    fn answered_nothing(&mut self) -> Vec<Action> {
        match self.state {
            State::Asking if self.credentials.take().is_some() => {
                self.go(State::Unauthorized, vec![Action::LogNoReconnect("there is no token".to_owned())])
            }
            State::Asking => self.go(State::Unauthorized, vec![]),
            _ => vec![Action::Fetch],
        }
    }

    fn lost(&mut self, now: Instant, unauthorized: bool, retry_after: Option<Duration>) -> Vec<Action> {
        if let State::Connected { since } = self.state
            && now.saturating_duration_since(since) >= backoff::STABLE_AFTER
        {
            self.attempt = 0;
        }
        let mut wait = backoff::delay(self.attempt, self.base, (self.random)());
        if let Some(wish) = retry_after {
            // A whole fleet may have been given the same Retry-After: spread the attempts.
            wait = wait.max(wish + backoff::delay(0, self.base, (self.random)()));
        }
        self.attempt = self.attempt.saturating_add(1);
        let mut actions = vec![Action::Close, Action::LogWait(wait)];
        if unauthorized {
            actions.push(Action::Fetch);
        }
        self.go(State::Waiting { until: now + wait }, actions)
    }

    /// True if the credentials are new; the attempts so far then say nothing about them.
    fn learn(&mut self, new: Credentials) -> bool {
        let changed = self.credentials.as_ref() != Some(&new);
        if changed {
            self.attempt = 0;
            self.credentials = Some(new);
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Action::*;

    const BASE: Duration = Duration::from_secs(5);

    fn machine() -> Machine {
        // The longest wait each time.
        Machine::new(BASE, || u64::MAX)
    }

    fn good(token: &str) -> Credentials {
        Credentials::new(token, "http://127.0.0.1:1").unwrap()
    }

    fn announced(token: &str) -> Event {
        Event::Auth(AuthEvent::Announced(Some(good(token))))
    }

    fn answered(token: &str) -> Event {
        Event::Auth(AuthEvent::Answered(Some(good(token))))
    }

    fn lost() -> Event {
        Event::Lost { unauthorized: false, retry_after: None }
    }

    /// A machine in each state with the token "a", except where there can be none.
    fn in_state(state: State) -> Machine {
        let mut machine = machine();
        if state != State::Unauthorized {
            machine.credentials = Some(good("a"));
        }
        machine.state = state;
        machine
    }

    #[test]
    fn the_table() {
        let now = Instant::now();
        let waiting = State::Waiting { until: now + BASE };
        let due = State::Waiting { until: now };
        let connected = State::Connected { since: now };
        use State::{Asking, Dialling, Stopping, Unauthorized};
        let nothing = || Event::Auth(AuthEvent::Answered(None));
        let revoked = || Event::Auth(AuthEvent::Announced(None));
        let unanswered = || Event::Auth(AuthEvent::Unanswered("why".into()));
        let no_token = || LogNoReconnect("there is no token".into());
        let revoke = || vec![LogUnauthorized, Close];
        let table: Vec<(State, Event, State, Vec<Action>)> = vec![
            // A token, announced or as an answer, is used at once, and a changed one replaces a link.
            (Unauthorized, announced("a"), Dialling, vec![Dial]),
            (Unauthorized, answered("a"), Dialling, vec![Dial]),
            (waiting, announced("a"), Dialling, vec![Dial]),
            (waiting, announced("b"), Dialling, vec![Dial]),
            (waiting, answered("a"), waiting, vec![]),
            (waiting, answered("b"), Dialling, vec![Dial]),
            (Asking, announced("b"), Dialling, vec![Dial]),
            (Asking, answered("a"), Dialling, vec![Dial]),
            (Dialling, announced("a"), Dialling, vec![]),
            (Dialling, announced("b"), Dialling, vec![Close, Dial]),
            (connected, announced("a"), connected, vec![]),
            (connected, answered("a"), connected, vec![]),
            (connected, announced("b"), Dialling, vec![Close, Dial]),
            (connected, answered("b"), Dialling, vec![Close, Dial]),
            // No token.
            (Unauthorized, nothing(), Unauthorized, vec![Fetch]),
            (Asking, nothing(), Unauthorized, vec![no_token()]),
            (connected, nothing(), connected, vec![Fetch]),
            (waiting, nothing(), waiting, vec![Fetch]),
            (Unauthorized, revoked(), Unauthorized, revoke()),
            (waiting, revoked(), Unauthorized, revoke()),
            (Asking, revoked(), Unauthorized, revoke()),
            (Dialling, revoked(), Unauthorized, revoke()),
            (connected, revoked(), Unauthorized, revoke()),
            // No answer.
            (Asking, unanswered(), Dialling, vec![Dial]),
            (Unauthorized, unanswered(), Unauthorized, vec![]),
            (connected, unanswered(), connected, vec![]),
            // The link.
            (Dialling, Event::Connected, connected, vec![]),
            (waiting, Event::Connected, waiting, vec![]),
            (Unauthorized, lost(), Unauthorized, vec![]),
            // Time.
            (waiting, Event::Tick, waiting, vec![]),
            (due, Event::Tick, Asking, vec![Ask]),
            (connected, Event::Tick, connected, vec![]),
            // The operator.
            (connected, Event::Hurry, connected, vec![Ask]),
            (Dialling, Event::Hurry, Dialling, vec![Ask]),
            (waiting, Event::Hurry, Asking, vec![Ask]),
            (Unauthorized, Event::Hurry, Asking, vec![Ask]),
            (Asking, Event::Hurry, Asking, vec![]),
            (connected, Event::Stop, Stopping, vec![Close]),
            (waiting, Event::Stop, Stopping, vec![Close]),
            (Stopping, announced("b"), Stopping, vec![]),
            (Stopping, lost(), Stopping, vec![]),
        ];
        for (from, event, to, actions) in table {
            let mut machine = in_state(from);
            let case = format!("{from:?} and {event:?}");
            assert_eq!(machine.step(event, now), actions, "{case}");
            assert_eq!(machine.state, to, "{case}");
        }
    }

    #[test]
    fn waits_double_until_a_link_was_stable_or_the_token_changes() {
        let mut now = Instant::now();
        let mut machine = machine();
        machine.step(announced("a"), now);
        let fail = |machine: &mut Machine, now| {
            machine.state = State::Dialling;
            machine.step(lost(), now);
            let State::Waiting { until } = machine.state else { panic!() };
            (until - now).as_secs_f64().round() as u64
        };
        assert_eq!([fail(&mut machine, now), fail(&mut machine, now), fail(&mut machine, now)], [5, 10, 20]);
        // A link of a moment changes nothing.
        machine.state = State::Dialling;
        machine.step(Event::Connected, now);
        now += backoff::STABLE_AFTER / 2;
        machine.step(lost(), now);
        assert_eq!(fail(&mut machine, now), 80);
        machine.state = State::Dialling;
        machine.step(Event::Connected, now);
        now += backoff::STABLE_AFTER;
        machine.step(lost(), now);
        assert_eq!(fail(&mut machine, now), 10);
        // The same token announced again is tried at once, but is no reason to hurry afterwards.
        machine.step(announced("a"), now);
        assert_eq!(fail(&mut machine, now), 20);
        machine.step(announced("b"), now);
        assert_eq!(fail(&mut machine, now), 5);
    }

    #[test]
    fn a_refused_token_is_replaced_and_a_servers_wish_is_honoured() {
        let now = Instant::now();
        let mut machine = in_state(State::Dialling);
        let actions = machine.step(Event::Lost { unauthorized: true, retry_after: None }, now);
        assert_eq!(actions.last(), Some(&Fetch));
        let mut machine = in_state(State::Dialling);
        let wish = Some(Duration::from_secs(100));
        machine.step(Event::Lost { unauthorized: false, retry_after: wish }, now);
        let State::Waiting { until } = machine.state else { panic!() };
        assert_eq!((until - now).as_secs_f64().round(), 105.0);
    }
}

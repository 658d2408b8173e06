//! When to connect: a table of states and events. Pure; nothing else decides it.

use std::time::{Duration, Instant};

use crate::auth::{AuthEvent, Credentials};
use crate::backoff;
use crate::config::without_password;
use crate::session::stats::seconds;
use crate::status::{Connection, State};

/// Time between questions for the token while there is a link: the bus may have dropped the announcement of a
/// withdrawal, as it does when another program floods it.
const ASK_INTERVAL: Duration = Duration::from_secs(180);
/// A manager that still has no token so long after it was asked to fetch one has none to give.
const FETCH_LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub(crate) enum Event {
    Auth(AuthEvent),
    Connected,
    /// The link has ended, or the attempt failed. The server refused it with this HTTP status.
    Lost {
        refused: Option<u16>,
        retry_after: Option<Duration>,
    },
    Tick,
    /// By the operator: look at the token and, unless there is a link or an attempt, try now.
    RetryNow,
    Stop,
}

/// Actions in a list are to be taken in this order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// End the link or the attempt, with all its sessions.
    Close,
    /// Replaces a link or an attempt.
    Dial,
    Ask,
    /// Have the manager fetch a new token.
    Fetch,
    LogWait(Duration),
    LogUnauthorized,
    LogNoReconnect(String),
}

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) state: State,
    since: Instant,
    /// Time of the next attempt, in [`State::Waiting`], or question, in [`State::Connected`].
    until: Instant,
    /// For the next attempt.
    pub(crate) credentials: Option<Credentials>,
    /// Since when the manager has answered that there is no token, though none was withdrawn.
    doubted: Option<Instant>,
    /// See [`backoff::doublings`]: since the token changed or a link was stable.
    doublings: u32,
    /// When the last link was lost, or the start.
    lost: Instant,
    /// Attempts that failed since the last link, stable or not.
    failed: u64,
    /// ReconnectIntervalSeconds.
    pub(crate) base: Duration,
    /// Uniform.
    random: fn() -> u64,
}

impl Machine {
    /// The manager is asked already.
    pub(crate) fn new(base: Duration, random: fn() -> u64, now: Instant) -> Self {
        let state = State::Unauthorized;
        let (credentials, doubted, doublings, failed) = Default::default();
        let (since, until, lost) = (now, now, now);
        Machine { state, since, until, credentials, doubted, doublings, lost, failed, base, random }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        matches!(self.state, State::Waiting | State::Connected).then_some(self.until)
    }

    /// The server's URL for people.
    pub(crate) fn server(&self) -> Option<String> {
        self.credentials.as_ref().map(|credentials| without_password(&credentials.server_url))
    }

    pub(crate) fn token_length(&self) -> Option<usize> {
        self.credentials.as_ref().map(|credentials| credentials.token.len())
    }

    pub(crate) fn connection(&self, last_error: Option<&(String, Instant)>, now: Instant) -> Connection {
        Connection {
            failed_attempts: self.failed,
            r#for: seconds(self.since, now),
            last_error: last_error.map(|(reason, _)| reason.clone()),
            last_error_age: last_error.map(|(_, at)| seconds(*at, now)),
            next_attempt_in: (self.state == State::Waiting).then(|| seconds(now, self.until)),
            server: self.server(),
            state: self.state.name().to_owned(),
        }
    }

    /// For the log with the times as of `now`, for systemd without, so that the text changes with the state only.
    pub(crate) fn describe(&self, now: Option<Instant>) -> String {
        let server = self.server().unwrap_or_default();
        let (left, age) = now.map_or_else(Default::default, |now| {
            let (left, age) = (seconds(now, self.until), seconds(self.since, now) as u64);
            (format!(" in {left:.0} s"), format!(" for {age} s"))
        });
        match self.state {
            State::Unauthorized => "waiting for a token".to_owned(),
            State::Waiting => format!("next attempt to connect to {server}{left}, {} failed", self.failed),
            State::Asking => "asking for a token".to_owned(),
            State::Dialling => format!("connecting to {server}"),
            State::Connected => format!("connected to {server}{age}"),
            State::Stopping => "ending".to_owned(),
        }
    }

    pub(crate) fn step(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let (state, actions) = self.decide(event, now);
        if state != self.state {
            (self.state, self.since) = (state, now);
        }
        actions
    }

    fn decide(&mut self, event: Event, now: Instant) -> (State, Vec<Action>) {
        use Action::{Ask, Close, Dial, Fetch, LogNoReconnect, LogUnauthorized};
        use AuthEvent::{Answered, Changed};
        use State::{Asking, Connected, Dialling, Stopping, Unauthorized, Waiting};
        let state = self.state;
        if let Event::Auth(Changed(Some(_)) | Answered(Ok(Some(_)))) = event {
            self.doubted = None;
        }
        match (state, event) {
            (Stopping, _) => (Stopping, vec![]),
            (_, Event::Stop) => (Stopping, vec![Close]),

            // An announcement is worth an attempt at once, even with the token we know; an answer isn't.
            (Dialling | Connected, Event::Auth(Changed(Some(new)) | Answered(Ok(Some(new)))))
            | (Waiting, Event::Auth(Answered(Ok(Some(new)))))
                if self.credentials.as_ref() == Some(&new) =>
            {
                (state, vec![])
            }
            (_, Event::Auth(Changed(Some(new)) | Answered(Ok(Some(new))))) => {
                if self.credentials.as_ref() != Some(&new) {
                    // The attempts so far say nothing about it.
                    self.doublings = 0;
                    self.credentials = Some(new);
                }
                (Dialling, vec![Dial])
            }
            (_, Event::Auth(Changed(None))) => {
                self.credentials = None;
                (Unauthorized, vec![LogUnauthorized, Close])
            }
            (Asking, Event::Auth(Answered(Ok(None)))) => {
                let lost = self.credentials.take().map(|_| LogNoReconnect("there is no token".to_owned()));
                (Unauthorized, lost.into_iter().collect())
            }
            // A working link stays at first: a manager that has just started knows no token until somebody fetches one.
            (_, Event::Auth(Answered(Ok(None)))) => {
                let doubted = *self.doubted.get_or_insert(now);
                if self.credentials.is_some() && now.saturating_duration_since(doubted) >= FETCH_LIMIT {
                    return self.decide(Event::Auth(Changed(None)), now);
                }
                (state, vec![Fetch])
            }
            // The last known credentials may still be valid.
            (Asking, Event::Auth(Answered(Err(_)))) if self.credentials.is_some() => (Dialling, vec![Dial]),
            (Asking, Event::Auth(Answered(Err(reason)))) => {
                (Unauthorized, vec![LogNoReconnect(reason.to_string())])
            }

            (Dialling, Event::Connected) => {
                self.failed = 0;
                self.until = now + ASK_INTERVAL;
                (Connected, vec![])
            }
            (Dialling | Connected, Event::Lost { refused, retry_after }) => {
                (Waiting, self.lost(now, refused, retry_after))
            }

            (Waiting, Event::Tick) if now >= self.until => (Asking, vec![Ask]),
            (Connected, Event::Tick) if now >= self.until => {
                self.until = now + ASK_INTERVAL;
                (state, vec![Ask])
            }

            (Asking, Event::RetryNow) => (state, vec![]),
            (Dialling | Connected, Event::RetryNow) => (state, vec![Ask]),
            (_, Event::RetryNow) => (Asking, vec![Ask]),

            (_, Event::Auth(Answered(Err(_))) | Event::Connected | Event::Lost { .. } | Event::Tick) => {
                (state, vec![])
            }
        }
    }

    fn lost(&mut self, now: Instant, refused: Option<u16>, retry_after: Option<Duration>) -> Vec<Action> {
        let dialled = self.state == State::Dialling;
        if dialled {
            self.failed = self.failed.saturating_add(1);
        } else {
            self.lost = now;
            if now.saturating_duration_since(self.since) >= backoff::STABLE_AFTER {
                self.doublings = 0;
            }
        }
        let outage = now.saturating_duration_since(self.lost);
        let mut wait = backoff::delay(self.doublings, outage, self.base, (self.random)());
        if let Some(wish) = retry_after {
            // A whole fleet may have been given the same Retry-After: spread the attempts.
            wait = wait.max(wish + backoff::spread(self.base, (self.random)()));
        }
        // A server that takes links and ends them has too much to do, too.
        self.doublings = backoff::doublings(self.doublings, refused.is_some() || !dialled);
        self.until = now + wait;
        let fetch = (refused == Some(401)).then_some(Action::Fetch);
        [Action::Close, Action::LogWait(wait)].into_iter().chain(fetch).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::auth::Refusal;
    use Action::*;

    const BASE: Duration = Duration::from_secs(5);

    fn machine() -> Machine {
        // The longest wait each time.
        Machine::new(BASE, || u64::MAX, Instant::now())
    }

    fn good(token: &str) -> Credentials {
        Credentials::new(token, "http://127.0.0.1:1").unwrap()
    }

    fn changed(token: &str) -> Event {
        Event::Auth(AuthEvent::Changed(Some(good(token))))
    }

    fn answered(token: &str) -> Event {
        Event::Auth(AuthEvent::Answered(Ok(Some(good(token)))))
    }

    fn lost() -> Event {
        Event::Lost { refused: None, retry_after: None }
    }

    /// A machine in each state with the token "a", except where there can be none.
    fn in_state(state: State) -> Machine {
        let mut machine = machine();
        if state != State::Unauthorized {
            machine.credentials = Some(good("a"));
        }
        machine.state = state;
        machine.until = Instant::now() + BASE;
        machine
    }

    #[test]
    fn the_table() {
        let now = Instant::now();
        use State::{Asking, Connected, Dialling, Stopping, Unauthorized, Waiting};
        let nothing = || Event::Auth(AuthEvent::Answered(Ok(None)));
        let revoked = || Event::Auth(AuthEvent::Changed(None));
        let unanswered = || Event::Auth(AuthEvent::Answered(Err(Refusal::Silent("why".into()))));
        let no_token = || LogNoReconnect("there is no token".into());
        let revoke = || vec![LogUnauthorized, Close];
        let table: Vec<(State, Event, State, Vec<Action>)> = vec![
            // A token, announced or as an answer, is used at once, and a changed one replaces a link.
            (Unauthorized, changed("a"), Dialling, vec![Dial]),
            (Unauthorized, answered("a"), Dialling, vec![Dial]),
            (Waiting, changed("a"), Dialling, vec![Dial]),
            (Waiting, changed("b"), Dialling, vec![Dial]),
            (Waiting, answered("a"), Waiting, vec![]),
            (Waiting, answered("b"), Dialling, vec![Dial]),
            (Asking, changed("b"), Dialling, vec![Dial]),
            (Asking, answered("a"), Dialling, vec![Dial]),
            (Dialling, changed("a"), Dialling, vec![]),
            (Dialling, changed("b"), Dialling, vec![Dial]),
            (Connected, changed("a"), Connected, vec![]),
            (Connected, answered("a"), Connected, vec![]),
            (Connected, changed("b"), Dialling, vec![Dial]),
            (Connected, answered("b"), Dialling, vec![Dial]),
            // No token.
            (Unauthorized, nothing(), Unauthorized, vec![Fetch]),
            (Asking, nothing(), Unauthorized, vec![no_token()]),
            (Connected, nothing(), Connected, vec![Fetch]),
            (Waiting, nothing(), Waiting, vec![Fetch]),
            (Unauthorized, revoked(), Unauthorized, revoke()),
            (Waiting, revoked(), Unauthorized, revoke()),
            (Asking, revoked(), Unauthorized, revoke()),
            (Dialling, revoked(), Unauthorized, revoke()),
            (Connected, revoked(), Unauthorized, revoke()),
            // No answer.
            (Asking, unanswered(), Dialling, vec![Dial]),
            (Unauthorized, unanswered(), Unauthorized, vec![]),
            (Connected, unanswered(), Connected, vec![]),
            // The link.
            (Dialling, Event::Connected, Connected, vec![]),
            (Waiting, Event::Connected, Waiting, vec![]),
            (Unauthorized, lost(), Unauthorized, vec![]),
            // Time.
            (Waiting, Event::Tick, Waiting, vec![]),
            (Connected, Event::Tick, Connected, vec![]),
            // The operator.
            (Connected, Event::RetryNow, Connected, vec![Ask]),
            (Dialling, Event::RetryNow, Dialling, vec![Ask]),
            (Waiting, Event::RetryNow, Asking, vec![Ask]),
            (Unauthorized, Event::RetryNow, Asking, vec![Ask]),
            (Asking, Event::RetryNow, Asking, vec![]),
            (Connected, Event::Stop, Stopping, vec![Close]),
            (Waiting, Event::Stop, Stopping, vec![Close]),
            (Stopping, changed("b"), Stopping, vec![]),
            (Stopping, lost(), Stopping, vec![]),
        ];
        for (from, event, to, actions) in table {
            let mut machine = in_state(from);
            let case = format!("{from:?} and {event:?}");
            assert_eq!(machine.step(event, now), actions, "{case}");
            assert_eq!(machine.state, to, "{case}");
        }
        let mut due = in_state(Waiting);
        assert_eq!((due.step(Event::Tick, due.until), due.state), (vec![Ask], Asking));
    }

    /// A flood on the bus had dbus-daemon drop the signal that withdraws the token: the link stayed for good.
    #[test]
    fn a_withdrawal_that_nobody_heard_of_is_noticed() {
        let nothing = || Event::Auth(AuthEvent::Answered(Ok(None)));
        let mut machine = in_state(State::Dialling);
        let mut now = Instant::now();
        let mut ask = |machine: &mut Machine, answer| {
            assert_eq!(machine.step(Event::Tick, now), []);
            now = machine.deadline().unwrap();
            assert_eq!(machine.step(Event::Tick, now), [Ask]);
            machine.step(answer, now)
        };
        machine.step(Event::Connected, machine.since);
        // A manager that has a token again, by a fetch, is not doubted any more.
        for _ in 0..3 {
            assert_eq!(ask(&mut machine, nothing()), [Fetch]);
            assert_eq!(machine.step(nothing(), machine.doubted.unwrap()), [Fetch], "it takes its time");
            assert_eq!(ask(&mut machine, answered("a")), []);
        }
        assert_eq!(ask(&mut machine, nothing()), [Fetch]);
        assert_eq!(machine.state, State::Connected);
        assert_eq!(ask(&mut machine, nothing()), [LogUnauthorized, Close]);
        assert_eq!((machine.state, machine.credentials), (State::Unauthorized, None));
    }

    /// The attempt fails; returns the longest wait in seconds.
    fn fail(machine: &mut Machine, now: Instant, refused: Option<u16>) -> u64 {
        machine.state = State::Dialling;
        machine.step(Event::Lost { refused, retry_after: None }, now);
        (machine.deadline().unwrap() - now).as_secs_f64().round() as u64
    }

    #[test]
    fn refusals_double_the_wait_until_a_link_was_stable_or_the_token_changes() {
        let mut now = Instant::now();
        let mut machine = machine();
        machine.step(changed("a"), now);
        assert_eq!(
            [Some(503), Some(503), None, None].map(|why| fail(&mut machine, now, why)),
            [5, 10, 20, 20]
        );
        // A link of a moment is no better.
        machine.state = State::Dialling;
        machine.step(Event::Connected, now);
        now += backoff::STABLE_AFTER / 2;
        machine.step(lost(), now);
        assert_eq!(fail(&mut machine, now, Some(503)), 40);
        machine.state = State::Dialling;
        machine.step(Event::Connected, now);
        now += backoff::STABLE_AFTER;
        machine.step(lost(), now);
        assert_eq!(fail(&mut machine, now, Some(503)), 10);
        // The same token announced again is tried at once, but doesn't shorten the waits afterwards.
        machine.step(changed("a"), now);
        assert_eq!(fail(&mut machine, now, Some(503)), 20);
        machine.step(changed("b"), now);
        assert_eq!(fail(&mut machine, now, None), 5);
    }

    #[test]
    fn waits_follow_the_outage() {
        let mut now = Instant::now();
        let mut machine = in_state(State::Connected);
        now += 2 * backoff::STABLE_AFTER;
        machine.step(lost(), now);
        assert_eq!((machine.deadline().unwrap() - now).as_secs_f64().round(), 5.0);
        let waits =
            [0, 1, 30, 70, 1000].map(|later| fail(&mut machine, now + Duration::from_secs(later), None));
        assert_eq!(waits, [10, 10, 30, 70, 300]);
    }

    #[test]
    fn a_refused_token_is_replaced_and_a_servers_wish_is_honoured() {
        let now = Instant::now();
        let mut machine = in_state(State::Dialling);
        let actions = machine.step(Event::Lost { refused: Some(401), retry_after: None }, now);
        assert_eq!(actions.last(), Some(&Fetch));
        let mut machine = in_state(State::Dialling);
        let wish = Some(Duration::from_secs(100));
        machine.step(Event::Lost { refused: Some(503), retry_after: wish }, now);
        assert_eq!((machine.deadline().unwrap() - now).as_secs_f64().round(), 105.0);
    }
}

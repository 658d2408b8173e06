//! When to connect: State × Event → State + Actions. Pure.

use std::time::{Duration, Instant};

use crate::auth::{AuthEvent, Credentials};
use crate::backoff;
use crate::config::without_password;
use crate::session::stats::seconds;
use crate::status::{Connection, State};

/// Interval of questions for the token while connected: the bus may have dropped the signal that revokes it, as it does
/// when another program floods it. And without one: a manager that had no network doesn't fetch it again on its own.
const ASK_INTERVAL: Duration = Duration::from_secs(180);
/// A manager without a token so long after it was asked to fetch one has none.
const FETCH_LIMIT: Duration = Duration::from_secs(60);
/// Indexes of [`Machine::spare`].
const ATTEMPT: usize = 0;
const PING: usize = 1;
/// Changes of the network that count in a row; further ones count once an interval.
const CHANGES: u32 = 3;
const CHANGE_INTERVAL: Duration = Duration::from_secs(10);
/// Wait after a change of the network.
const SOON: Duration = Duration::from_secs(1);
/// An attempt under way while the network changes has this long.
const REDIAL: Duration = Duration::from_secs(10);
/// A later loss is not blamed on the change of the network.
const STALE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub(crate) enum Event {
    Auth(AuthEvent),
    Connected,
    /// `refused`: the HTTP status of a refusal.
    Lost {
        refused: Option<u16>,
        retry_after: Option<Duration>,
    },
    Tick,
    /// There may be a new route to the server, and the old one may be gone.
    NetworkChanged,
    /// By the operator: check the token and, if there is no link or dial, try now.
    RetryNow,
    Stop,
}

/// To be taken in the order of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Action {
    /// Ends the sessions, too.
    Close,
    /// Replaces a link or dial.
    Dial,
    Ask,
    /// Have the manager fetch a new token.
    Fetch,
    /// Have the server prove that it is alive, or be dialled by the new route, too.
    Ping,
    LogNetworkChanged,
    LogWait(Duration),
    LogUnauthorized,
    LogNoReconnect(String),
}

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) state: State,
    since: Instant,
    /// When the next attempt is due, in [`State::Waiting`], or the next question, in [`State::Connected`] and
    /// [`State::Unauthorized`].
    until: Instant,
    /// For the next attempt.
    pub(crate) credentials: Option<Credentials>,
    /// Since when the manager has answered that there is no token, without revoking one. It may have restarted.
    doubted: Option<Instant>,
    /// Since the token changed or a link was stable: see [`backoff::wait`].
    failures: u32,
    /// When the last link ended; initially the start.
    lost: Instant,
    refused: bool,
    /// Last change of the network that has caused no attempt yet.
    changed: Option<Instant>,
    /// When the budget of changes allows another attempt, and another ping.
    spare: [Instant; 2],
    /// In [`State::Dialling`]: when to dial anew for a change of the network, once; it may wait by the old route, or
    /// mender-auth's forwarder may.
    redial: Option<Instant>,
    redialled: bool,
    /// Failed attempts since the last link, stable or not.
    failed: u64,
    /// ReconnectIntervalSeconds.
    pub(crate) base: Duration,
    random: fn() -> u64,
}

impl Machine {
    /// The source asks on its own at the start.
    pub(crate) fn new(base: Duration, random: fn() -> u64, now: Instant) -> Self {
        Machine {
            state: State::Unauthorized,
            since: now,
            until: now + ASK_INTERVAL,
            credentials: None,
            doubted: None,
            failures: 0,
            lost: now,
            refused: false,
            changed: None,
            spare: [fresh(now); 2],
            redial: None,
            redialled: false,
            failed: 0,
            base,
            random,
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Waiting | State::Connected | State::Unauthorized => Some(self.until),
            State::Dialling => self.redial,
            State::Asking | State::Stopping => None,
        }
    }

    /// For display: without password.
    pub(crate) fn server(&self) -> Option<String> {
        self.credentials.as_ref().map(|credentials| without_password(&credentials.server_url))
    }

    pub(crate) fn token_length(&self) -> Option<usize> {
        self.credentials.as_ref().map(|credentials| credentials.token.reveal().len())
    }

    pub(crate) fn connection(&self, last_error: Option<&(String, Instant)>, now: Instant) -> Connection {
        Connection {
            failed_attempts: self.failed,
            r#for: seconds(self.since, now),
            last_error: last_error.map(|(reason, _)| reason.clone()),
            last_error_age: last_error.map(|(_, at)| seconds(*at, now)),
            next_attempt_in: (self.state == State::Waiting).then(|| seconds(now, self.until)),
            server: self.server(),
            state: self.state,
        }
    }

    /// With times as of `now` for the log; without them for systemd, so that the text changes only with the state.
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
            (self.redial, self.redialled) = (None, false);
            if state == State::Unauthorized {
                self.until = now + ASK_INTERVAL;
            }
        }
        actions
    }

    fn decide(&mut self, event: Event, now: Instant) -> (State, Vec<Action>) {
        use Action::{
            Ask, Close, Dial, Fetch, LogNetworkChanged, LogNoReconnect, LogUnauthorized, LogWait, Ping,
        };
        use AuthEvent::{Answered, Changed};
        use State::{Asking, Connected, Dialling, Stopping, Unauthorized, Waiting};
        let state = self.state;
        // A link may also end for a new token, or for want of one.
        if state == Connected {
            self.lost = now;
        }
        if let Event::Auth(Changed(Some(_)) | Answered(Ok(Some(_)))) = event {
            self.doubted = None;
        }
        match (state, event) {
            (Stopping, _) => (Stopping, vec![]),
            // The supervisor closes the link once no shell is kept any more.
            (_, Event::Stop) => (Stopping, vec![]),

            // Even a known token is worth an attempt at once if announced, but not if it is an answer.
            (Dialling | Connected, Event::Auth(Changed(Some(new)) | Answered(Ok(Some(new)))))
            | (Waiting, Event::Auth(Answered(Ok(Some(new)))))
                if self.credentials.as_ref() == Some(&new) =>
            {
                (state, vec![])
            }
            (_, Event::Auth(Changed(Some(new)) | Answered(Ok(Some(new))))) => {
                if self.credentials.as_ref() != Some(&new) {
                    // Earlier failures say nothing about the new token, and time without one was no outage.
                    (self.failures, self.lost) = (0, now);
                    self.credentials = Some(new);
                }
                // The dial that a change of the network may have held up is replaced.
                (self.redial, self.redialled) = (None, false);
                (Dialling, vec![Dial])
            }
            (_, Event::Auth(Changed(None))) => {
                self.credentials = None;
                // A manager that has restarted withdraws nothing when it can't fetch a token: shells are kept.
                let withdrawn = self.doubted.is_none().then_some(LogUnauthorized);
                (Unauthorized, withdrawn.into_iter().chain([Close]).collect())
            }
            (Asking, Event::Auth(Answered(Ok(None)))) => {
                self.doubted.get_or_insert(now);
                let lost = self.credentials.take().map(|_| LogNoReconnect("there is no token".to_owned()));
                (Unauthorized, lost.into_iter().chain([Fetch]).collect())
            }
            // Keep a working link at first: a manager that has just started knows no token until it fetches one.
            (_, Event::Auth(Answered(Ok(None)))) => {
                let doubted = *self.doubted.get_or_insert(now);
                if state == Connected && now.saturating_duration_since(doubted) >= FETCH_LIMIT {
                    self.doubted = None;
                    let (state, mut actions) = self.decide(Event::Auth(Changed(None)), now);
                    actions.push(Fetch);
                    return (state, actions);
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
            (Dialling, Event::Tick) if self.redial.take_if(|at| now >= *at).is_some() => {
                self.redialled = true;
                (state, vec![Dial])
            }
            (Connected | Unauthorized, Event::Tick) if now >= self.until => {
                self.until = now + ASK_INTERVAL;
                (state, vec![Ask])
            }

            // A server that has refused is reachable as it is; a wait below a second is short enough.
            (Waiting, Event::NetworkChanged) if self.refused => (state, vec![]),
            (Waiting, Event::NetworkChanged) if self.until <= now + SOON => {
                self.begin_outage(now);
                (state, vec![])
            }
            (Waiting, Event::NetworkChanged) => {
                let cut = self.soon(ATTEMPT, now, self.until).inspect(|at| self.until = *at);
                (state, cut.map_or(vec![], |at| vec![LogNetworkChanged, LogWait(at - now)]))
            }
            (Unauthorized, Event::NetworkChanged) => {
                self.until = self.until.min(now + SOON);
                (state, vec![])
            }
            (_, Event::NetworkChanged) => {
                self.changed = Some(now);
                let asks = matches!(state, Connected | Dialling);
                let ask = asks && self.soon(PING, now, now + SOON).is_some();
                if ask && state == Dialling && !self.redialled {
                    self.redial.get_or_insert(now + REDIAL);
                }
                (state, if ask { vec![LogNetworkChanged, Ping] } else { vec![] })
            }

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
        } else if now.saturating_duration_since(self.since) >= backoff::STABLE_AFTER {
            self.failures = 0;
        }
        let outage = now.saturating_duration_since(self.lost);
        self.refused = refused.is_some();
        // A server that accepts links and ends them is overloaded, too.
        let unanswered = dialled && !self.refused;
        let mut wait = backoff::wait(&mut self.failures, unanswered, outage, self.base, (self.random)());
        // The change explains the loss or the failure: try soon.
        if let Some(changed) = self.changed.take()
            && !self.refused
            && now < changed + STALE
        {
            wait = self.soon(ATTEMPT, now, now + wait).map_or(wait, |at| at - now);
        }
        if let Some(wish) = retry_after {
            // A whole fleet may have got the same Retry-After: spread the attempts.
            wait = wait.max(wish + backoff::spread(self.base.min(backoff::LONGEST), (self.random)()));
        }
        self.until = now + wait;
        let fetch = (refused == Some(401)).then_some(Action::Fetch);
        [Action::Close, Action::LogWait(wait)].into_iter().chain(fetch).collect()
    }

    /// A new network may be complete only after the first attempt, such as with its name servers: the outage begins
    /// anew, unless the network changes all the time.
    fn begin_outage(&mut self, now: Instant) {
        if self.spare[ATTEMPT] <= fresh(now) {
            self.lost = now;
        }
    }

    /// When a change of the network takes effect, if that is before `limit`: spread over a second, since a whole site
    /// may see it, and later if the network changes all the time.
    fn soon(&mut self, what: usize, now: Instant, limit: Instant) -> Option<Instant> {
        let at = (now + backoff::spread(SOON, (self.random)())).max(self.spare[what]);
        if at >= limit {
            return None;
        }
        if what == ATTEMPT {
            self.begin_outage(now);
        }
        self.spare[what] = self.spare[what].max(fresh(now)) + CHANGE_INTERVAL;
        Some(at)
    }
}

/// [`Machine::spare`] of a quiet network.
fn fresh(now: Instant) -> Instant {
    now.checked_sub((CHANGES - 1) * CHANGE_INTERVAL).unwrap_or(now)
}

#[cfg(test)]
mod tests;

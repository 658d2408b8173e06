use super::*;
use crate::auth::Refusal;
use Action::*;

const BASE: Duration = Duration::from_secs(5);
const NANO: Duration = Duration::from_nanos(1);

fn machine(now: Instant) -> Machine {
    // The longest wait each time.
    Machine::new(BASE, || u64::MAX, now)
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
fn in_state(state: State, now: Instant) -> Machine {
    let mut machine = machine(now);
    if state != State::Unauthorized {
        machine.credentials = Some(good("a"));
    }
    machine.state = state;
    machine.until = now + BASE;
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
        (Asking, nothing(), Unauthorized, vec![no_token(), Fetch]),
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
        // The network.
        (Connected, Event::NetworkChanged, Connected, vec![LogNetworkChanged, Ping]),
        (Dialling, Event::NetworkChanged, Dialling, vec![LogNetworkChanged, Ping]),
        (Asking, Event::NetworkChanged, Asking, vec![]),
        (Waiting, Event::NetworkChanged, Waiting, vec![LogNetworkChanged, LogWait(SOON - NANO)]),
        (Unauthorized, Event::NetworkChanged, Unauthorized, vec![]),
        // The operator.
        (Connected, Event::RetryNow, Connected, vec![Ask]),
        (Dialling, Event::RetryNow, Dialling, vec![Ask]),
        (Waiting, Event::RetryNow, Asking, vec![Ask]),
        (Unauthorized, Event::RetryNow, Asking, vec![Ask]),
        // It may be another source by now.
        (Asking, Event::RetryNow, Asking, vec![Ask]),
        (Connected, Event::Stop, Stopping, vec![]),
        (Waiting, Event::Stop, Stopping, vec![]),
        (Stopping, changed("b"), Stopping, vec![]),
        (Stopping, lost(), Stopping, vec![]),
    ];
    for (from, event, to, actions) in table {
        let mut machine = in_state(from, now);
        let case = format!("{from:?} and {event:?}");
        assert_eq!(machine.step(event, now), actions, "{case}");
        assert_eq!(machine.state, to, "{case}");
    }
    let mut due = in_state(Waiting, now);
    assert_eq!((due.step(Event::Tick, due.until), due.state), (vec![Ask], Asking));
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
    let mut machine = machine(now);
    machine.step(changed("a"), now);
    assert_eq!([Some(503), Some(503), None, None].map(|why| fail(&mut machine, now, why)), [5, 8, 17, 17]);
    // A link of a moment is no better.
    machine.state = State::Dialling;
    machine.step(Event::Connected, now);
    now += backoff::STABLE_AFTER / 2;
    machine.step(lost(), now);
    assert_eq!(fail(&mut machine, now, Some(503)), 34);
    machine.state = State::Dialling;
    machine.step(Event::Connected, now);
    now += backoff::STABLE_AFTER;
    machine.step(lost(), now);
    assert_eq!(fail(&mut machine, now, Some(503)), 8);
    // The same token announced again is tried at once, but doesn't shorten the waits afterwards.
    machine.step(changed("a"), now);
    assert_eq!(fail(&mut machine, now, Some(503)), 17);
    machine.step(changed("b"), now);
    assert_eq!(fail(&mut machine, now, None), 5);
}

#[test]
fn waits_follow_the_outage() {
    let mut now = Instant::now();
    let mut machine = in_state(State::Connected, now);
    now += 2 * backoff::STABLE_AFTER;
    machine.step(lost(), now);
    assert_eq!((machine.deadline().unwrap() - now).as_secs_f64().round(), 5.0);
    let waits = [0, 1, 30, 70, 1000].map(|later| fail(&mut machine, now + Duration::from_secs(later), None));
    assert_eq!(waits, [8, 8, 54, 126, 290]);
    // A new token ends a link, too: the time before that was none without the server. Nor was that without a token.
    for (state, token) in [(State::Connected, "b"), (State::Unauthorized, "c"), (State::Waiting, "d")] {
        machine.state = state;
        now += Duration::from_secs(86400);
        assert_eq!(machine.step(changed(token), now), [Dial]);
        assert_eq!([0, 1].map(|later| fail(&mut machine, now + Duration::from_secs(later), None)), [5, 8]);
    }
}

#[test]
fn a_network_that_changes_is_tried_at_once_but_not_all_the_time() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut machine = in_state(State::Waiting, start);
    let mut attempts = 0;
    // An hour in which it changes each second, and each attempt fails.
    for now in (0..3600).map(at) {
        machine.step(Event::NetworkChanged, now);
        if machine.deadline().is_some_and(|deadline| deadline <= now) {
            machine.step(Event::Tick, now);
            machine.state = State::Dialling;
            machine.step(lost(), now);
            attempts += 1;
        }
    }
    assert!((300..400).contains(&attempts), "{attempts} attempts in an hour");
    // A link is asked no more often.
    machine.state = State::Connected;
    let pings = (3600..7200).filter(|&n| !machine.step(Event::NetworkChanged, at(n)).is_empty()).count();
    assert!(pings < 400, "{pings} pings in an hour");
    // It is lost with the network, or long afterwards.
    let wait = |machine: &mut Machine, now: Instant| machine.deadline().unwrap().duration_since(now);
    machine.step(Event::NetworkChanged, at(9000));
    machine.step(lost(), at(9030));
    assert!(wait(&mut machine, at(9030)) <= SOON);
    machine.state = State::Connected;
    machine.step(Event::NetworkChanged, at(9040));
    machine.step(lost(), at(9040) + STALE);
    assert!(wait(&mut machine, at(9040) + STALE) > SOON);
    // The server's words count wherever it said them.
    machine.state = State::Dialling;
    machine.step(Event::NetworkChanged, at(9990));
    let retry_after = Some(Duration::from_secs(100));
    machine.step(Event::Lost { refused: Some(503), retry_after }, at(10_000));
    machine.step(Event::NetworkChanged, at(10_001));
    assert!(wait(&mut machine, at(10_001)) > Duration::from_secs(90));
}

#[test]
fn a_refused_token_is_replaced_and_a_servers_wish_is_honoured() {
    let now = Instant::now();
    let mut machine = in_state(State::Dialling, now);
    let actions = machine.step(Event::Lost { refused: Some(401), retry_after: None }, now);
    assert_eq!(actions.last(), Some(&Fetch));
    let mut machine = in_state(State::Dialling, now);
    let wish = Some(Duration::from_secs(100));
    machine.step(Event::Lost { refused: Some(503), retry_after: wish }, now);
    assert_eq!((machine.deadline().unwrap() - now).as_secs_f64().round(), 105.0);
    // Mender's agent ignores ReconnectIntervalSeconds: it may be anything, such as u32::MAX.
    let mut machine =
        Machine { base: Duration::from_secs(u32::MAX.into()), ..in_state(State::Dialling, now) };
    machine.step(Event::Lost { refused: Some(503), retry_after: wish }, now);
    assert_eq!((machine.deadline().unwrap() - now).as_secs_f64().round(), 390.0);
}

/// A flood on the bus had dbus-daemon drop the signal that withdraws the token: the link stayed for good.
#[test]
fn a_withdrawal_that_nobody_heard_of_is_noticed() {
    let nothing = || Event::Auth(AuthEvent::Answered(Ok(None)));
    let mut now = Instant::now();
    let mut machine = in_state(State::Dialling, now);
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
    assert_eq!(ask(&mut machine, nothing()), [LogUnauthorized, Close, Fetch]);
    assert_eq!((machine.state, machine.credentials), (State::Unauthorized, None));
}

/// A manager that restarted in an outage couldn't fetch a token and said that there was none, which ended the shells
/// that waited for the network.
#[test]
fn a_fetch_that_fails_after_the_managers_restart_withdraws_nothing() {
    let now = Instant::now();
    let nothing = || Event::Auth(AuthEvent::Answered(Ok(None)));
    let revoked = Event::Auth(AuthEvent::Changed(None));
    for state in [State::Unauthorized, State::Waiting, State::Asking, State::Dialling, State::Connected] {
        let mut machine = in_state(state, now);
        assert_eq!(machine.step(nothing(), now).last(), Some(&Fetch));
        if state != State::Connected {
            // It has restarted twice, or takes long to find out.
            assert_eq!(machine.step(nothing(), now + FETCH_LIMIT), [Fetch], "{state:?}");
        }
        assert_eq!(machine.step(revoked.clone(), now), [Close], "{state:?}");
        assert_eq!((machine.state, &machine.credentials), (State::Unauthorized, &None));
        // Once there is a token again, it can be withdrawn.
        machine.step(changed("b"), now);
        assert_eq!(machine.step(revoked.clone(), now), [LogUnauthorized, Close], "{state:?}");
    }
}

/// mender-auth fetches no token without a network, and didn't try again when that came up after the agent: a device that
/// started without one waited for another program to fetch it.
#[test]
fn a_missing_token_is_asked_for_again() {
    let start = Instant::now();
    let nothing = || Event::Auth(AuthEvent::Answered(Ok(None)));
    let mut machine = machine(start);
    assert_eq!(machine.step(nothing(), start), [Fetch]);
    machine.step(Event::Auth(AuthEvent::Changed(None)), start);
    assert_eq!(machine.step(Event::Tick, start), []);
    machine.step(Event::NetworkChanged, start);
    for due in [start + SOON, start + SOON + ASK_INTERVAL] {
        assert_eq!(machine.deadline(), Some(due));
        assert_eq!(machine.step(Event::Tick, due), [Ask]);
        assert_eq!(machine.step(nothing(), due), [Fetch]);
        machine.step(Event::Auth(AuthEvent::Changed(None)), due);
    }
    assert_eq!(machine.state, State::Unauthorized);
}

/// A device whose new network was complete a moment after its address, such as by its name server, waited for up to 290 s
/// more.
#[test]
fn an_attempt_that_comes_before_the_new_network_is_complete_is_followed_by_others() {
    let start = Instant::now();
    let mut machine = machine(start);
    machine.step(changed("a"), start);
    fail(&mut machine, start, None);
    let now = start + Duration::from_secs(600);
    assert_eq!(fail(&mut machine, now, None), 290);
    machine.step(Event::NetworkChanged, now);
    let at = machine.deadline().unwrap();
    assert!(at <= now + SOON);
    assert_eq!(fail(&mut machine, at + SOON / 4, None), 8);
    // And where it was noticed during an attempt.
    let now = now + Duration::from_secs(600);
    machine.state = State::Dialling;
    machine.step(Event::NetworkChanged, now);
    assert_eq!(fail(&mut machine, now, None), 1);
    assert_eq!(fail(&mut machine, now + SOON, None), 8);
}

/// mender-auth's forwarder, or the old route, may keep it waiting.
#[test]
fn an_attempt_under_way_when_the_network_changes_is_begun_anew_once() {
    let now = Instant::now();
    let mut machine = in_state(State::Dialling, now);
    assert_eq!(machine.deadline(), None);
    machine.step(Event::NetworkChanged, now);
    machine.step(Event::NetworkChanged, now + SOON);
    assert_eq!(machine.deadline(), Some(now + REDIAL));
    assert_eq!(machine.step(Event::Tick, now + REDIAL - NANO), vec![]);
    assert_eq!(machine.step(Event::Tick, now + REDIAL), vec![Dial]);
    machine.step(Event::NetworkChanged, now + REDIAL * 2);
    assert_eq!((machine.state, machine.deadline()), (State::Dialling, None));
    // A dial with a new token has begun by the new route.
    let mut machine = in_state(State::Dialling, now);
    machine.step(Event::NetworkChanged, now);
    assert_eq!(machine.step(changed("b"), now + SOON), [Dial]);
    assert_eq!(machine.deadline(), None);
}

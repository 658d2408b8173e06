//! The authentication manager: where token and URL come from, and what happens when they change.

use dbus::Message;
use dbus::channel::Channel;
use nix::sys::signal::Signal;

use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Style, Terminal};
use crate::harness::daemon;
use crate::harness::device::{Device, Generation};
use crate::harness::manager::{Answer, INTERFACE, Manager, PATH};
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, TOKEN};
use crate::harness::server::{Reply, Server};
use crate::harness::trace;
use crate::harness::wait::{SOON, eventually, millis, secs, skip};

fn bearer(device: &Device) -> &str {
    device.request().header("Authorization").expect("an Authorization header")
}

fn established(url: &str) -> String {
    format!("Connection established with {url}")
}

/// A rig whose first attempts fail and whose back-off is long.
fn backing_off() -> Rig {
    let rig = Setup::new().set("ReconnectIntervalSeconds", 300).start_with(|s| s.always(Reply::status(500)));
    rig.daemon.wait_for_log("connection manager failed to connect", SOON);
    rig
}

#[test]
fn connects_with_what_get_jwt_token_answers() {
    let (rig, device) = Rig::connected();
    assert_eq!(bearer(&device), format!("Bearer {TOKEN}"));
    rig.daemon.wait_for_log(&established(&rig.server.url()), SOON);
    for call in rig.manager.all_calls() {
        assert_eq!(call.interface, INTERFACE);
        assert_eq!(call.member, "GetJwtToken", "with a token at hand nothing else is called");
    }
}

#[test]
fn a_new_token_reconnects() {
    let (rig, device) = Rig::connected();
    rig.daemon.wait_for_log(&established(&rig.server.url()), SOON);
    let mark = rig.daemon.mark();
    rig.manager.change("another", &rig.server.url());
    let renewed = rig.device();
    assert_eq!(bearer(&renewed), "Bearer another");
    device.wait_end(SOON);
    rig.daemon.wait_for_log_after(mark, &established(&rig.server.url()), SOON);
}

#[test]
fn a_new_url_reconnects() {
    let (rig, device) = Rig::connected();
    let other = Server::start(Generation::New);
    rig.manager.change(TOKEN, &other.url());
    assert_eq!(bearer(&other.device()), format!("Bearer {TOKEN}"));
    device.wait_end(SOON);
    rig.daemon.wait_for_log(&established(&other.url()), SOON);

    let third = Server::start(Generation::Released);
    rig.manager.change("third", &third.url());
    assert_eq!(bearer(&third.device()), "Bearer third");
    rig.daemon.wait_for_log(&established(&third.url()), SOON);
}

#[test]
fn the_same_again_changes_nothing() {
    let (rig, device) = Rig::connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    for _ in 0..3 {
        rig.manager.signal(TOKEN, &rig.server.url());
    }
    rig.server.no_device(millis(500), "the signal brought nothing new");
    assert_eq!(terminal.run("echo still here"), "still here");
}

#[test]
fn an_emptied_token_disconnects_and_comes_back_unchanged() {
    let (rig, device) = Rig::connected();
    rig.manager.change("", "");
    rig.daemon.wait_for_log("dbusEventLoop terminated 0 sessions, 0 shells", SOON);
    device.wait_end(SOON);
    rig.server.no_device(millis(300), "there is no token");
    rig.manager.change(TOKEN, &rig.server.url());
    assert_eq!(bearer(&rig.device()), format!("Bearer {TOKEN}"));
}

#[test]
fn an_emptied_token_ends_the_shells() {
    let (rig, _device, _terminal) = Setup::new().terminal();
    let shells = proc::children(rig.daemon.pid());
    assert_eq!(shells.len(), 1);
    rig.manager.change("", "");
    rig.daemon.wait_for_log("dbusEventLoop terminated 1 sessions, 1 shells", SOON);
    shells.iter().for_each(|&pid| proc::wait_gone(pid, SOON));
}

#[test]
fn either_empty_string_is_no_authorisation() {
    for (token, url) in [("", Some("")), ("token", Some("")), ("", None)] {
        let (rig, device) = Rig::connected();
        let url = url.map_or_else(|| rig.server.url(), str::to_owned);
        rig.manager.change(token, &url);
        device.wait_end(SOON);
        rig.server.no_device(millis(200), "half an authorisation is none");
    }
}

#[test]
fn a_signal_cuts_the_back_off_short() {
    let rig = backing_off();
    let other = Server::start(Generation::New);
    rig.manager.change("good", &other.url());
    assert_eq!(bearer(&other.next_device(secs(5))), "Bearer good");
    rig.daemon.wait_for_log(&established(&other.url()), SOON);
}

#[test]
fn a_signal_cuts_a_hanging_dial_short() {
    let rig = Setup::new().start_with(|s| s.always(Reply::Silence));
    rig.server.wait_requests(1, SOON);
    let other = Server::start(Generation::New);
    rig.manager.change("good", &other.url());
    assert_eq!(bearer(&other.next_device(secs(5))), "Bearer good");
}

#[test]
fn an_unreachable_server_is_reported() {
    let mut rig = Setup::new().set("ReconnectIntervalSeconds", 1).start_with(|s| s.always(Reply::Close));
    let line = rig.daemon.wait_for_log("connection manager failed to connect", SOON);
    assert!(line.contains(&rig.server.url()), "it names the server: {line}");
    rig.server.stop();
    let mark = rig.daemon.mark();
    rig.daemon.signal(Signal::SIGHUP);
    rig.daemon.wait_for_log_after(mark, "connection manager failed to connect", SOON);
    rig.server.always(Reply::Upgrade);
    rig.server.resume();
    rig.daemon.signal(Signal::SIGHUP);
    rig.device();
}

#[test]
fn a_token_cleared_in_silence_is_noticed_when_the_link_drops() {
    let (mut rig, device) = Setup::new().set("ReconnectIntervalSeconds", 1).connected();
    rig.manager.set("", "");
    rig.server.stop();
    device.reset();
    rig.daemon.wait_for_log("error reconnecting:", SOON);
    let other = Server::start(Generation::New);
    rig.manager.change("other", &other.url());
    assert_eq!(bearer(&other.device()), "Bearer other");
}

#[test]
fn the_manager_is_asked_again_before_each_reconnect() {
    let (rig, device) = Setup::new().set("ReconnectIntervalSeconds", 1).connected();
    let other = Server::start(Generation::New);
    rig.manager.set("fresh", &other.url());
    device.hang_up();
    assert_eq!(bearer(&other.device()), "Bearer fresh");
}

#[test]
fn a_manager_that_comes_later_is_found() {
    let mut rig = Setup::new().without_manager().start();
    rig.daemon.wait_for_log("call to GetJWTToken on the Mender D-Bus API failed: ", SOON);
    rig.manager.appear();
    assert_eq!(bearer(&rig.device()), format!("Bearer {TOKEN}"));
}

#[test]
fn a_restarted_manager_is_asked_again() {
    let (mut rig, _device) = Rig::connected();
    rig.manager.vanish();
    rig.manager.set("after-restart", &rig.server.url());
    rig.manager.appear();
    assert_eq!(bearer(&rig.device()), "Bearer after-restart");
    // As mender-auth does: empty after its start, filled by somebody's fetch later.
    rig.manager.vanish();
    rig.manager.set("", "");
    rig.manager.appear();
    rig.manager.wait_calls("GetJwtToken", 3, SOON);
    rig.manager.change("filled", &rig.server.url());
    assert_eq!(bearer(&rig.device()), "Bearer filled");
}

#[test]
fn a_name_given_up_and_taken_again_is_a_new_owner() {
    let (rig, _device) = Rig::connected();
    rig.manager.release_name();
    rig.manager.set("owned-again", &rig.server.url());
    rig.manager.own_name();
    assert_eq!(bearer(&rig.device()), "Bearer owned-again");
}

#[test]
fn an_empty_token_at_start_is_fetched_once() {
    let rig = Setup::new().token("").url("").start();
    let calls = rig.manager.wait_calls("FetchJwtToken", 1, SOON);
    assert_eq!(calls[0].interface, INTERFACE);
    rig.server.no_device(millis(300), "there is no token yet");
    rig.manager.change("fetched", &rig.server.url());
    assert_eq!(bearer(&rig.device()), "Bearer fetched");
    assert_eq!(rig.manager.calls("FetchJwtToken").len(), 1);
}

#[test]
fn a_refused_token_is_fetched_anew_but_rarely() {
    let rig = Setup::new().set("ReconnectIntervalSeconds", 1).start_with(|s| s.require_token("valid"));
    rig.manager.wait_calls("FetchJwtToken", 1, SOON);
    rig.server.wait_requests(3, secs(30));
    assert_eq!(rig.manager.calls("FetchJwtToken").len(), 1, "at most once a minute");
    rig.manager.change("valid", &rig.server.url());
    rig.device();
}

#[test]
fn a_fetch_that_succeeds_connects() {
    for token in ["", "expired"] {
        let mut rig = Setup::new()
            .token(token)
            .set("ReconnectIntervalSeconds", 300)
            .without_manager()
            .start_with(|s| s.require_token("renewed"));
        rig.manager.on_fetch("renewed", &rig.server.url());
        rig.manager.appear();
        assert_eq!(bearer(&rig.device()), "Bearer renewed");
        assert_eq!(rig.manager.calls("FetchJwtToken").len(), 1);
    }
}

#[test]
fn other_refusals_fetch_nothing() {
    for status in [400, 403, 500] {
        let rig =
            Setup::new().set("ReconnectIntervalSeconds", 1).start_with(|s| s.always(Reply::status(status)));
        rig.server.wait_requests(2, secs(20));
        assert!(rig.manager.calls("FetchJwtToken").is_empty(), "after {status}");
    }
}

#[test]
fn a_manager_that_answers_nonsense_is_survived() {
    for answer in [Answer::WrongTypes, Answer::Error("out of order")] {
        let mut rig = Setup::new().without_manager().start();
        rig.manager.answer_get(answer);
        rig.manager.appear();
        rig.manager.wait_calls("GetJwtToken", 1, SOON);
        rig.manager.signal_nonsense();
        rig.manager.answer_get(Answer::Normal);
        rig.manager.change("sane", &rig.server.url());
        let device = rig.device();
        assert_eq!(bearer(&device), "Bearer sane");
        assert_healthy(&mut rig, &device);
    }
}

#[test]
fn a_late_answer_counts() {
    let mut rig = Setup::new().without_manager().start();
    rig.manager.answer_get(Answer::Late(secs(1)));
    rig.manager.appear();
    assert_eq!(bearer(&rig.device()), format!("Bearer {TOKEN}"));
}

#[test]
fn a_silent_manager_blocks_nothing_else() {
    let mut rig = Setup::new().asking(Answer::Silent);
    rig.manager.change("signalled", &rig.server.url());
    // The signal says it all; the call may time out in peace.
    assert_eq!(bearer(&rig.server.next_device(secs(20))), "Bearer signalled");
    rig.daemon.signal(Signal::SIGTERM);
    assert_eq!(rig.daemon.wait_exit(secs(3)).code(), Some(0));
}

#[test]
fn a_flood_of_signals_ends_with_the_last_one() {
    let (mut rig, _device) = Rig::connected();
    rig.manager.set("final", &rig.server.url());
    rig.manager.flood(2000, "final", &rig.server.url());
    let device = eventually(secs(60), "a link with the last token", || {
        Some(rig.device()).filter(|d| bearer(d) == "Bearer final")
    });
    assert_healthy(&mut rig, &device);
}

#[test]
fn a_signal_of_somebody_else_is_ignored() {
    let (rig, device) = Rig::connected();
    let evil = Server::start(Generation::New);
    let mut stranger = Channel::open_private(&rig.bus.address()).expect("connect");
    stranger.register().expect("register");
    let signal = Message::new_signal(PATH, INTERFACE, "JwtTokenStateChange").expect("valid");
    stranger.send(signal.append2("stolen", evil.url())).expect("send");
    stranger.flush();
    evil.no_device(millis(500), "the signal came from a stranger");
    assert!(!device.is_over());
    assert!(evil.requests().is_empty());
}

#[test]
fn no_bus_at_start_is_fatal() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let config = dir.path().join("conf");
    std::fs::write(&config, crate::harness::rig::bash_config().to_string()).expect("write");
    let output = daemon::command()
        .args(["--config", config.to_str().expect("UTF-8"), "--fallback-config", "/nonexistent", "daemon"])
        .env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", dir.path().join("no-bus").display()))
        .output()
        .expect("run");
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("mender-connect dbus failed to connect, error: "), "{log}");
}

#[test]
fn a_restarted_bus_is_found_again() {
    let (mut rig, _device) = Rig::connected();
    rig.bus.restart();
    rig.manager.set("new-bus", &rig.server.url());
    rig.manager.appear();
    let renewed = eventually(secs(40), "a link with the new token", || {
        Some(rig.server.next_device(secs(40))).filter(|d| bearer(d) == "Bearer new-bus")
    });
    // Signals work on the new bus, too.
    rig.manager.change("signalled", &rig.server.url());
    let device = rig.device();
    assert_eq!(bearer(&device), "Bearer signalled");
    renewed.wait_end(SOON);
    assert_healthy(&mut rig, &device);
}

#[test]
fn a_bus_away_for_a_while_is_waited_for() {
    let (mut rig, _device) = Rig::connected();
    rig.bus.kill();
    rig.manager.vanish();
    crate::harness::wait::throughout(secs(2), "the agent waits for its bus", || rig.daemon.is_running());
    rig.bus.restart();
    rig.manager = Manager::start(&rig.bus.address(), "back", &rig.server.url());
    let found = eventually(secs(40), "a link with the new token", || {
        Some(rig.server.next_device(secs(40))).filter(|d| bearer(d) == "Bearer back")
    });
    assert_healthy(&mut rig, &found);
}

/// With select(2), which libdbus uses when it isn't told better while it is compiled, descriptors end at 1023.
#[test]
fn the_bus_is_waited_for_without_select() {
    if !trace::is_possible() {
        return skip("strace is missing");
    }
    let traced = "exec strace -D -f -o trace -e trace=select,pselect6,poll,ppoll \"$@\"";
    let (rig, _device) = Setup::new().wrapper(traced).connected();
    let calls = std::fs::read_to_string(rig.dir.path().join("trace")).unwrap();
    assert!(calls.contains("poll(") && !calls.contains("select"), "{calls}");
}

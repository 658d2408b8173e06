//! What takes a minute by its nature. The module's name sorts first, so that these tests start
//! first and the others run meanwhile.

use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::control::complaint;
use crate::files::pattern;
use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::device::{Generation, Reading};
use crate::harness::forward::Client;
use crate::harness::msg::{COMMANDS, CONTROL, Msg, SHELL};
use crate::harness::proc;
use crate::harness::relay::{Relay, Shape};
use crate::harness::rest::{Rest, path_body};
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::server::Server;
use crate::harness::targets::{Role, Target};
#[cfg(feature = "tls")]
use crate::harness::tls::{Authority, TlsFront};
use crate::harness::trace;
use crate::harness::wait::{SOON, eventually, millis, secs, skip, throughout};
use crate::remote::FAILED;

#[test]
fn health_check() {
    let (rig, device) = Rig::connected();
    device.clients_fall_silent();
    let mut healthy = Terminal::new(&device, Style::Gui);
    let dead = Terminal::new(&device, Style::Cli);
    healthy.open_with_prompt();
    dead.open();
    let start = Instant::now();
    for terminal in [&healthy, &dead] {
        let sid = terminal.sid.clone();
        let ping =
            device.take(secs(66), "a health check", |m| m.sid.as_ref() == Some(&sid) && m.typ != "shell");
        assert_eq!((ping.proto, ping.typ.as_str(), ping.body.as_ref()), (SHELL, "ping", None));
        assert_eq!(ping.status(), Some(3));
        // Compact: a wide one would arm mender-cli's watchdog with 5 s of slack.
        assert!(ping.raw.windows(9).any(|w| w == b"\xa7timeout\x41"), "timeout is the fixint 65");
    }
    let after = start.elapsed();
    assert!((millis(57_000)..secs(64)).contains(&after), "the first ping came after {after:?}");
    healthy.pong();
    let shells = proc::children(rig.daemon.pid()).len();
    assert_eq!(shells, 2, "both are given time to answer");
    let deadline = secs(72) - start.elapsed();
    eventually(deadline, "the silent peer's shell to be ended", || {
        (proc::children(rig.daemon.pid()).len() == 1).then_some(())
    });
    assert!(start.elapsed() > secs(62), "ended too early, after {:?}", start.elapsed());
    dead.input("x");
    let sid = dead.sid.clone();
    let output = |m: &Msg| (m.typ.as_str(), m.status()) == ("shell", Some(1));
    let answer = || device.take(SOON, "an answer", |m| m.sid.as_ref() == Some(&sid) && !output(m));
    let mut last = answer();
    if last.typ == "stop" {
        // Telling the peer is allowed, should it be silent but alive.
        assert_eq!(last.status(), Some(2), "{}", last.summary());
        last = answer();
    }
    assert_eq!((last.typ.as_str(), last.status()), ("shell", Some(2)), "{}", last.summary());
    assert_eq!(last.text(), "session not found");
    healthy.forget_output();
    assert_eq!(healthy.run("echo healthy"), "healthy");
    device.nothing(millis(1), "terminals get no control messages", |m| m.proto == CONTROL);
}

/// The check ended a terminal whose link had died up to half a minute before, which was noticed only later.
#[test]
fn a_health_check_on_a_dead_link_ends_no_shell() {
    let setup = Setup::new().set("ReconnectIntervalSeconds", 1).set("HeartbeatSeconds", 28);
    let (rig, device) = setup.connected();
    device.clients_fall_silent();
    let start = Instant::now();
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open_with_prompt();
    // After the second heartbeat, whose answer must not do for the health check.
    throughout(secs(58).saturating_sub(start.elapsed()), "the link", || !device.is_over());
    device.go_mute();
    // A radio may stand still for a while: the server has as long as for any other ping.
    throughout(secs(67).saturating_sub(start.elapsed()), "the link", || !device.is_over());
    rig.daemon.wait_for_log("event=shell-detach", SOON * 2);
    let mut terminal = terminal.on(&rig.device());
    terminal.pong();
    terminal.forget_output();
    assert_eq!(terminal.run("echo here"), "here");
}

#[test]
fn session_timers() {
    let (_rig, device) = Rig::connected();
    let (silent, answering, shell_like, late) = (new_sid(), new_sid(), new_sid(), new_sid());
    let start = Instant::now();
    for sid in [&silent, &answering, &late] {
        device.send(CONTROL, "ping", sid, &[], b"");
        assert_eq!(device.next_of(sid, SOON).typ, "pong");
    }
    // Neither an empty session id nor a terminal's has timers.
    device.send(CONTROL, "ping", "", &[], b"");
    device.send(4, "bogus", "", &[], b"");
    let mut terminal = Terminal { sid: shell_like.clone(), ..Terminal::new(&device, Style::Cli) };
    terminal.open_with_prompt();
    // Any message starts the time anew.
    let renew = secs(20);
    device.nothing(renew, "no ping before 48 s", |m| m.typ == "ping");
    device.send(CONTROL, "pong", &late, &[], b"");
    for sid in [&silent, &answering] {
        let ping = device.next_of(sid, secs(40));
        assert_eq!((ping.proto, ping.typ.as_str(), ping.body.as_ref()), (CONTROL, "ping", None));
        assert!(ping.props.is_empty());
    }
    let after = start.elapsed();
    assert!((millis(47_000)..secs(54)).contains(&after), "the ping came after {after:?}");
    device.send(CONTROL, "pong", &answering, &[], b"");
    terminal.pong();
    let error = device.next_of(&silent, secs(20));
    assert_eq!(complaint(&error), ("session timeout".to_owned(), true, None, None));
    let after = start.elapsed();
    assert!((millis(58_500)..secs(66)).contains(&after), "the time-out came after {after:?}");
    assert_eq!(device.next_of(&late, secs(15)).typ, "ping");
    assert!(start.elapsed() > secs(66), "20 s later than the others");
    device.nothing(millis(500), "nothing else, for nobody", |m| m.proto == CONTROL);
    terminal.forget_output();
    assert_eq!(terminal.run("echo shell"), "shell");
}

#[test]
fn websocket_pings_every_25_seconds() {
    let (_rig, device) = Rig::connected();
    let connected = Instant::now();
    let pings = device.wait_pings(2, secs(60));
    let first = pings[0].0 - connected;
    let second = pings[1].0 - pings[0].0;
    println!("websocket pings after {first:?} and {second:?} more");
    assert!((secs(22)..secs(29)).contains(&first), "first after {first:?}");
    assert!((secs(22)..secs(29)).contains(&second), "second after {second:?}");
}

#[test]
fn a_silent_server_is_given_up_after_35_seconds() {
    let (mut rig, device) = Setup::new().set("ReconnectIntervalSeconds", 1).connected();
    let start = Instant::now();
    device.go_mute();
    device.wait_end(secs(90));
    let after = start.elapsed();
    println!("a silent server was given up after {after:?}");
    // The kernel's timers take up to two more.
    assert!((secs(33)..secs(40)).contains(&after), "given up after {after:?}");
    rig.daemon.wait_for_log("lost: no answer to a ping in 10 s", SOON);
    let device = rig.device();
    assert_healthy(&mut rig, &device);
}

/// The released server sends neither pings while data flows nor counts data as life; the agent's
/// own pings keep the link up there, and data counts for the agent.
#[test]
fn data_alone_keeps_the_link_with_the_released_server() {
    let (_rig, device) = Setup::new().generation(Generation::Released).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    device.go_mute();
    let start = Instant::now();
    while start.elapsed() < secs(75) {
        device.nothing(secs(10), "a shell without control messages", |m| m.proto == CONTROL);
        terminal.pong();
        assert!(!device.is_over(), "lost after {:?}", start.elapsed());
    }
    assert!(device.wait_pings(2, SOON).len() >= 2);
    terminal.forget_output();
    assert_eq!(terminal.run("echo alive"), "alive");
}

#[test]
fn a_peer_that_stops_reading_is_given_up() {
    let setup = Setup::new().config(script_config("exec yes")).set("ReconnectIntervalSeconds", 1);
    let (mut rig, device) = setup.set("Sessions", json!({ "KeepDetached": 0 })).connected();
    // One that answers would get no more output before its next answer.
    device.clients_fall_silent();
    let terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.next(SOON);
    let start = Instant::now();
    device.set_reading(Reading::Paused);
    let next = rig.server.next_device(secs(45));
    let after = start.elapsed();
    println!("a peer that stopped reading was given up after {after:?}");
    assert!(after > secs(8), "given up too early, after {after:?}");
    assert_healthy(&mut rig, &next);
}

#[test]
fn an_idle_agent_hardly_wakes_up() {
    let (rig, device, mut terminal) = Setup::new().terminal();
    assert_eq!(terminal.run("echo ready"), "ready");
    let pid = rig.daemon.pid();
    // Let the dust settle: what the last command left to do is done when nothing changes for 2 s.
    let mut last = proc::voluntary_switches(pid);
    eventually(secs(20), "the agent to become idle", || {
        throughout(secs(2), "running", || !device.is_over());
        let now = proc::voluntary_switches(pid);
        (std::mem::replace(&mut last, now) == now).then_some(())
    });
    let (before, start) = (proc::voluntary_switches(pid), Instant::now());
    throughout(secs(30), "the link", || !device.is_over());
    let wakeups = proc::voluntary_switches(pid) - before;
    let rate = wakeups as f64 / start.elapsed().as_secs_f64();
    println!("{wakeups} wake-ups in {:?}: {rate:.3} per second", start.elapsed());
    assert!(rate < 0.2, "{rate:.3} wake-ups per second with one idle shell");
    assert_eq!(terminal.run("echo still there"), "still there");
}

/// Orders without a session come and are answered; no session is left that would ask whether anybody is there.
#[test]
fn no_timer_runs_without_a_session() {
    let (_rig, device) = Rig::connected();
    device.send(COMMANDS, "bogus", "", &[], b"");
    let answer = device.take(SOON, "an answer", |m| m.typ == "bogus");
    assert_eq!((answer.proto, answer.sid.as_deref(), answer.status()), (COMMANDS, None, Some(2)));
    device.nothing(secs(62), "nobody is asked anything", |_| true);
}

/// A forwarding client that doesn't answer is gone, and its connections with it; one that answers stays.
#[test]
fn a_forwarding_client_that_vanishes() {
    let (_rig, device) = Rig::connected();
    let target = Target::start(Role::Echo);
    let alive = Client::open(&device);
    let staying = alive.connect("tcp", "127.0.0.1", target.port()).opened();
    let gone = Client::open(&device);
    gone.connect("tcp", "127.0.0.1", target.port()).opened();
    let sid = gone.sid().to_owned();
    gone.pause(true);
    target.wait_accepted(2);
    device.take(secs(52), "the question", |m| m.sid.as_ref() == Some(&sid) && m.typ == "ping");
    assert_eq!(target.ends(), 0);
    let error = device.take(secs(16), "the end", |m| m.sid.as_ref() == Some(&sid) && m.typ == "error");
    let (text, close, ..) = complaint(&error);
    assert_eq!((text.as_str(), close), ("session timeout", true));
    target.wait_ends(1);
    staying.write(b"alive");
    assert_eq!(staying.read(5), b"alive");
    alive.close();
}

/// The server passes ten chunks on to its user before it acknowledges them, or answers a ping behind them: where that took
/// a minute, since the chunks were large and the user slow, the download ended.
#[test]
fn a_download_for_a_slow_user() {
    let (rig, device) = Rig::connected();
    let file = rig.dir.path().join("file");
    std::fs::write(&file, pattern(1 << 20)).unwrap();
    let rest = Rest::open(&device);
    rest.ask("get_file", &path_body(file.to_str().unwrap()));
    device.nothing(secs(62), "the end of the download", |m| m.typ == "error");
    assert_eq!(rest.receive(|_| ()), Ok(1 << 20));
}

/// A manager that has no token has a minute to fetch one.
#[test]
fn a_withdrawal_that_nobody_announced() {
    let (rig, device) = Rig::connected();
    rig.manager.set("", "");
    let asked = Instant::now();
    rig.daemon.signal(Signal::SIGHUP);
    rig.manager.wait_calls("FetchJwtToken", 1, SOON);
    throughout(millis(62_000).saturating_sub(asked.elapsed()), "the link", || !device.is_over());
    rig.daemon.signal(Signal::SIGHUP);
    rig.daemon.wait_for_log("dbusEventLoop terminated", SOON);
    device.wait_end(SOON);
}

/// The writer asked its question when it had sent the ping: a link whose answer was there by then was lost 10 s later.
#[test]
fn an_answer_that_is_quicker_than_the_writer() {
    if !trace::is_possible() {
        return skip("strace is missing");
    }
    let slow = "exec strace -D -f -o /dev/null -e trace=sendto -e inject=sendto:delay_exit=100000 \"$@\"";
    let (rig, device) = Setup::new().wrapper(slow).set("HeartbeatSeconds", 15).connected();
    device.wait_pings(1, secs(20));
    throughout(secs(12), "the link", || !device.is_over());
    assert_eq!(rig.daemon.count_log(" lost: "), 0);
}

/// The writer may go on first, when the answer's time is over, and the reader has not had its turn.
#[test]
fn an_agent_that_is_stopped_and_continued_keeps_its_link() {
    let (rig, device) = Setup::new().set("HeartbeatSeconds", 10).connected();
    device.go_mute();
    device.wait_pings(1, SOON);
    rig.daemon.signal(Signal::SIGSTOP);
    let sid = new_sid();
    device.send(CONTROL, "ping", &sid, &[], b"");
    throughout(secs(12), "the link", || !device.is_over());
    rig.daemon.signal(Signal::SIGCONT);
    assert_eq!(device.next_of(&sid, SOON).typ, "pong");
    throughout(secs(1), "the link", || !device.is_over());
    assert_eq!(rig.daemon.count_log(" lost: "), 0);
}

/// Links by satellite, by NB-IoT or through a full modem: they connect in the time that it takes Mender's own agent and
/// half of that more, and they last.
#[test]
fn slow_links_connect_and_last() {
    let server = Server::start(Generation::Released);
    let far = Shape::round_trip(12_000);
    let mut relays = vec![Relay::link(server.address(), far).expect("a relay")];
    let plain = Setup::new().url(&format!("http://{}", relays[0].address()));
    let mut ways = vec![("a round trip of 12 s", millis(14_000), plain)];
    #[cfg(feature = "tls")]
    let (_front, _dir) = {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let authority = Authority::new();
        let ca = authority.write(dir.path());
        let front = TlsFront::start(&authority.identity(&["127.0.0.1"]), server.address());
        let narrow = Shape { up: Some(150), down: Some(150), ..Shape::default() };
        for (way, theirs, shape) in
            [("150 byte/s with TLS", millis(17_000), narrow), ("12 s with TLS", millis(20_000), far)]
        {
            let relay = Relay::link(([127, 0, 0, 1], front.port()).into(), shape).expect("a relay");
            let url = format!("https://{}", relay.address());
            relays.push(relay);
            ways.push((
                way,
                theirs,
                Setup::new().url(&url).env("SSL_CERT_FILE", ca.to_str().expect("UTF-8")),
            ));
        }
        (front, dir)
    };
    let start = Instant::now();
    let rigs: Vec<_> = ways.into_iter().map(|(way, theirs, setup)| (way, theirs, setup.start())).collect();
    for ((way, theirs, rig), relay) in rigs.iter().zip(&relays) {
        rig.daemon.wait_for_log("Connection established", (*theirs * 3 / 2).saturating_sub(start.elapsed()));
        let bytes = relay.sent_up.load(Ordering::Relaxed);
        println!("{way}: connected after {:?}, by {bytes} bytes sent", start.elapsed());
    }
    throughout(secs(45), "the links", || {
        rigs.iter().for_each(|(way, _, rig)| assert_eq!(rig.daemon.count_log(" lost: "), 0, "{way}"));
        true
    });
    rigs.iter().for_each(|(way, _, rig)| assert_eq!(rig.daemon.count_log(FAILED), 0, "{way}"));
}

//! How many shells there may be, and for how long.

use std::time::Instant;

use serde_json::json;

use crate::harness::client::{Style, Terminal};
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::wait::{SOON, eventually, millis, secs};

const TOO_MANY_OF_USER: &str = "user has too many open sessions";
const TOO_MANY: &str = "too many shells spawned";

#[test]
fn one_shell_per_user_unless_configured() {
    let (_rig, device) = Rig::connected();
    let mut first = Terminal::of_user(&device, "alice");
    first.open_with_prompt();
    let second = Terminal::of_user(&device, "alice");
    second.ask_new();
    second.expect("new", 2, Some(TOO_MANY_OF_USER));
    // The refused session doesn't exist.
    second.input("x");
    second.expect("shell", 2, Some("session not found"));
    Terminal::of_user(&device, "bob").open_with_prompt();
    assert_eq!(first.run("echo untouched"), "untouched");
    first.stop();
    second.open();
}

#[test]
fn a_missing_user_is_a_user_too() {
    let (_rig, device) = Rig::connected();
    let terminals = [Terminal::of_user(&device, ""), Terminal::of_user(&device, "")];
    let ask = |t: &Terminal| device.send(1, "new", &t.sid, &[], b"");
    ask(&terminals[0]);
    terminals[0].expect("new", 1, Some("Shell started"));
    ask(&terminals[1]);
    terminals[1].expect("new", 2, Some(TOO_MANY_OF_USER));
}

#[test]
fn max_per_user_is_honoured() {
    let (_rig, device) = Setup::new().set("Sessions", json!({ "MaxPerUser": 3 })).connected();
    let mut shells: Vec<Terminal> = (0..3).map(|_| Terminal::of_user(&device, "alice")).collect();
    shells.iter_mut().for_each(Terminal::open_with_prompt);
    let fourth = Terminal::of_user(&device, "alice");
    fourth.ask_new();
    fourth.expect("new", 2, Some(TOO_MANY_OF_USER));
    shells[1].input("exit\n");
    shells[1].expect_after_output("stop", SOON);
    fourth.open();
}

#[test]
fn sixteen_shells_and_no_more() {
    let (rig, device) = Setup::new().config(script_config("exec cat")).connected();
    let shells: Vec<Terminal> = (0..16).map(|_| Terminal::new(&device, Style::Cli)).collect();
    shells.iter().for_each(Terminal::open);
    assert_eq!(proc::children(rig.daemon.pid()).len(), 16);
    let extra = Terminal::new(&device, Style::Cli);
    extra.ask_new();
    extra.expect("new", 2, Some(TOO_MANY));
    // The count is looked at before the session is.
    shells[0].ask_new();
    shells[0].expect("new", 2, Some(TOO_MANY));
    shells[7].stop();
    extra.open();
    // Many refusals and many ends don't make the count drift.
    for _ in 0..20 {
        shells[7].ask_new();
        shells[7].expect("new", 2, Some(TOO_MANY));
    }
    extra.stop();
    shells[7].open();
}

fn sessions(settings: serde_json::Value) -> Setup {
    Setup::new().set("Sessions", settings)
}

#[test]
fn an_old_shell_expires_and_says_why() {
    let (rig, device) = sessions(json!({ "StopExpired": true, "ExpireAfter": 2 })).connected();
    let terminal = Terminal::new(&device, Style::Cli);
    // Before the shell's own time begins, however long the answer takes.
    let start = Instant::now();
    terminal.open();
    // Activity doesn't count.
    terminal.input("echo busy\n");
    let stop = terminal.expect_after_output("stop", SOON);
    assert_eq!(stop.status(), Some(2));
    assert!(!stop.text().is_empty(), "a reason is given");
    assert!((secs(2)..secs(8)).contains(&start.elapsed()), "after {:?}", start.elapsed());
    eventually(SOON, "the shell to be reaped", || proc::children(rig.daemon.pid()).is_empty().then_some(()));
    terminal.input("x");
    terminal.expect("shell", 2, Some("session not found"));
}

#[test]
fn an_idle_shell_expires_while_its_output_runs() {
    let script = script_config("while :; do echo output; sleep 0.1; done");
    let (_rig, device) = Setup::new()
        .config(script)
        .set("Sessions", json!({ "StopExpired": true, "ExpireAfterIdle": 2 }))
        .connected();
    let terminal = Terminal::new(&device, Style::Cli);
    let start = Instant::now();
    terminal.open();
    let stop = terminal.expect_after_output("stop", SOON);
    assert_eq!(stop.status(), Some(2));
    assert!(!stop.text().is_empty(), "a reason is given");
    assert!((secs(2)..secs(8)).contains(&start.elapsed()), "after {:?}", start.elapsed());
}

#[test]
fn input_keeps_an_idle_shell_alive_and_age_does_not_matter_then() {
    let (_rig, _device, mut terminal) =
        sessions(json!({ "StopExpired": true, "ExpireAfter": 1, "ExpireAfterIdle": 3 })).terminal();
    let start = Instant::now();
    let mut last = start;
    while start.elapsed() < secs(5) {
        last = Instant::now();
        assert_eq!(terminal.run("sleep 0.7; echo here"), "here");
        assert!(last.elapsed() < secs(3), "too slow a machine for this test");
    }
    let stop = terminal.expect_after_output("stop", SOON);
    assert_eq!(stop.status(), Some(2));
    assert!((secs(3)..secs(9)).contains(&last.elapsed()), "after {:?}", last.elapsed());
}

#[test]
fn expiry_can_be_switched_off() {
    let (_rig, device, mut terminal) =
        sessions(json!({ "StopExpired": false, "ExpireAfter": 1, "ExpireAfterIdle": 1 })).terminal();
    device.nothing(secs(3), "no expiry", |_| true);
    assert_eq!(terminal.run("echo alive"), "alive");
}

/// What is shown a minute before the end.
const NOTICE: &str = "[mender-connect] Idle: this session ends in";

#[test]
fn the_idle_are_told_a_minute_before() {
    let (rig, device) = sessions(json!({ "ExpireAfterIdle": 62 })).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    let start = Instant::now();
    terminal.open();
    let shown = terminal.read_until(NOTICE, SOON);
    assert!((secs(2)..secs(8)).contains(&start.elapsed()), "after {:?}", start.elapsed());
    let shown = shown + &terminal.read_until("unless something is typed.\r\n", SOON);
    assert!(shown.contains(&format!("\r\n{NOTICE} 60 s")), "{shown:?}");
    // Whoever types stays, and is told again.
    assert_eq!(terminal.run("echo here"), "here");
    terminal.read_until(NOTICE, SOON);
    assert!(proc::children(rig.daemon.pid()).len() == 1);
}

#[test]
fn those_who_type_and_shells_that_never_idle_are_told_nothing() {
    let idle = |limit: u32| sessions(json!({ "ExpireAfterIdle": limit }));
    for setup in [
        idle(60),
        idle(66),
        sessions(json!({ "ExpireAfter": 61 })),
        sessions(json!({ "StopExpired": false })),
    ] {
        let (_rig, _device, mut terminal) = setup.terminal();
        let start = Instant::now();
        while start.elapsed() < secs(3) {
            let shown = terminal.run("sleep 0.5; echo typing");
            assert_eq!(shown, "typing");
        }
    }
}

#[test]
fn output_keeps_a_shell_alive_where_it_is_to() {
    let mut config = script_config("for i in 1 2 3 4 5 6 7 8; do echo output; sleep 0.5; done; sleep 60");
    config["Sessions"] = json!({ "ExpireAfterIdle": 2, "IdleIncludesOutput": true });
    let (_rig, device) = Setup::new().config(config).connected();
    let terminal = Terminal::new(&device, Style::Cli);
    let start = Instant::now();
    terminal.open();
    let stop = terminal.expect_after_output("stop", SOON);
    assert_eq!(stop.status(), Some(2));
    assert!((millis(5500)..secs(12)).contains(&start.elapsed()), "after {:?}", start.elapsed());
}

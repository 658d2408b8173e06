//! Signals: a quick end whatever goes on, and the status report.

use std::time::Instant;

use nix::sys::signal::Signal;

use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Style, Terminal};
use crate::harness::device::Reading;
use crate::harness::manager::Answer;
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::server::Reply;
use crate::harness::wait::{SOON, eventually, secs};

/// Ends the agent; it must exit with 0 within 2 s and leave no child behind.
pub fn ends_quickly(rig: &mut Rig, signal: Signal) {
    let children = proc::children(rig.daemon.pid());
    let start = Instant::now();
    rig.daemon.signal(signal);
    let status = rig.daemon.wait_exit(secs(10));
    let took = start.elapsed();
    assert_eq!(status.code(), Some(0), "{signal}: {status}");
    // A busy machine adds some time to it.
    assert!(took < secs(3), "{signal}: took {took:?}");
    // Their parent is gone; whoever adopted them reaps them.
    for child in children {
        eventually(SOON, &format!("shell {child} to end"), || proc::has_ended(child).then_some(()));
    }
}

#[test]
fn term_and_int_end_an_idle_agent() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (mut rig, device) = Rig::connected();
        ends_quickly(&mut rig, signal);
        device.wait_end(SOON);
    }
}

/// A parent that ignores SIGCHLD passes that on, and then the kernel reaps the children. The agent never noticed the end
/// of a shell, and its user got no other.
#[test]
fn shells_end_where_the_parent_ignores_its_children() {
    let ignoring = r#"exec env --ignore-signal=CHLD "$@""#;
    let (mut rig, device) = Setup::new().wrapper(ignoring).connected();
    for _ in 0..2 {
        let (terminal, mark) = (Terminal::of_user(&device, "alice"), rig.daemon.mark());
        terminal.open();
        terminal.input("exit 3\n");
        terminal.expect_after_output("stop", SOON);
        rig.daemon.wait_for_log_after(mark, "status=\"exit status: 3\"", SOON);
    }
    ends_quickly(&mut rig, Signal::SIGTERM);
}

#[test]
fn term_ends_stubborn_shells() {
    let stubborn = "trap '' INT TERM HUP QUIT; echo ready; while :; do read x || sleep 1; done";
    let (mut rig, device) = Setup::new().config(script_config(stubborn)).connected();
    for _ in 0..8 {
        let mut terminal = Terminal::new(&device, Style::Cli);
        terminal.open();
        terminal.read_until("ready", SOON);
    }
    assert_eq!(proc::children(rig.daemon.pid()).len(), 8);
    ends_quickly(&mut rig, Signal::SIGTERM);
}

#[test]
fn term_ends_a_flood_nobody_reads() {
    let (mut rig, device) = Setup::new().config(script_config("exec yes")).connected();
    let terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.next(SOON);
    device.set_reading(Reading::Paused);
    // The socket buffers are full when the agent's writing stalls.
    let pid = rig.daemon.pid();
    let io = || std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let mut last = String::new();
    eventually(secs(30), "the agent to stall", || {
        let now = io();
        let same = now == last;
        last = now;
        same.then_some(())
    });
    ends_quickly(&mut rig, Signal::SIGTERM);
}

#[test]
fn term_ends_a_hanging_dial() {
    let mut rig = Setup::new().start_with(|s| s.always(Reply::Silence));
    rig.server.wait_requests(1, SOON);
    ends_quickly(&mut rig, Signal::SIGTERM);
}

#[test]
fn term_ends_a_back_off() {
    let mut rig =
        Setup::new().set("ReconnectIntervalSeconds", 300).start_with(|s| s.always(Reply::status(500)));
    rig.daemon.wait_for_log("connection manager failed to connect", SOON);
    ends_quickly(&mut rig, Signal::SIGTERM);
}

#[test]
fn term_ends_a_call_nobody_answers() {
    let mut rig = Setup::new().asking(Answer::Silent);
    ends_quickly(&mut rig, Signal::SIGTERM);
}

#[test]
fn term_ends_an_agent_without_authorisation() {
    let mut rig = Setup::new().token("").url("").start();
    rig.manager.wait_calls("GetJwtToken", 1, SOON);
    ends_quickly(&mut rig, Signal::SIGTERM);
}

#[test]
fn term_ends_an_agent_whose_bus_is_gone() {
    let (mut rig, _device) = Rig::connected();
    rig.bus.kill();
    ends_quickly(&mut rig, Signal::SIGTERM);
}

#[test]
fn usr1_reports_the_status() {
    let (rig, _device, mut terminal) = Setup::new().terminal();
    let mark = rig.daemon.mark();
    rig.daemon.signal(Signal::SIGUSR1);
    let version = format!("mender-connect daemon v{}", env!("CARGO_PKG_VERSION"));
    for text in [
        version.as_str(),
        " status: ",
        "  shells: 1/16",
        "  sessions: 1",
        terminal.sid.as_str(),
        "/bin/bash",
        "  file-transfer:",
        "   total: tx/rx 0/0",
        "   1m: tx rx ",
    ] {
        let line = rig.daemon.wait_for_log_after(mark, text, SOON);
        assert!(line.contains("level=info"), "{line}");
    }
    assert_eq!(terminal.run("echo undisturbed"), "undisturbed");
    terminal.stop();
    eventually(SOON, "neither shell nor session to be reported", || {
        let mark = rig.daemon.mark();
        rig.daemon.signal(Signal::SIGUSR1);
        rig.daemon.wait_for_log_after(mark, "   1m: ", SOON);
        let report = &rig.daemon.log()[mark..];
        let has = |text: &str| report.iter().any(|line| line.contains(text));
        (has("  shells: 0/16") && has("  sessions: 0")).then_some(())
    });
}

#[test]
fn usr1_is_harmless_at_any_time() {
    let mut rig = Setup::new().token("").url("").start();
    rig.manager.wait_calls("GetJwtToken", 1, SOON);
    for _ in 0..50 {
        rig.daemon.signal(Signal::SIGUSR1);
    }
    rig.daemon.wait_for_log("  shells: 0/16", SOON);
    rig.manager.change("token", &rig.server.url());
    let device = rig.device();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.ask_new();
    for _ in 0..50 {
        rig.daemon.signal(Signal::SIGUSR1);
    }
    terminal.expect("new", 1, Some("Shell started"));
    terminal.prompt();
    assert!(rig.daemon.is_running());
}

#[test]
fn signals_ignored_by_the_starter_still_end_the_agent() {
    let (mut rig, _device) =
        Setup::new().wrapper("trap '' INT TERM HUP QUIT PIPE USR1; exec \"$@\"").connected();
    rig.daemon.signal(Signal::SIGUSR1);
    rig.daemon.wait_for_log("  shells: 0/16", SOON);
    ends_quickly(&mut rig, Signal::SIGTERM);
}

/// A read with a time-out is interrupted by being stopped and continued, handler or not (signal(7)).
#[test]
fn an_agent_that_stood_still_goes_on() {
    let (mut rig, device, mut terminal) = Setup::new().terminal();
    for round in 0..3 {
        rig.daemon.freeze();
        if round == 1 {
            terminal.input("echo frozen\n");
        }
        rig.daemon.thaw();
        assert_eq!(terminal.run("echo $((6 * 7))").lines().last(), Some("42"));
    }
    assert_eq!(rig.daemon.count_log("lost"), 0);
    terminal.stop();
    assert_healthy(&mut rig, &device);
}

//! What goes wrong around the agent. After each fault it lives, is connected without help and is as good as new. (Refusals,
//! endings and proxies are in `link`, `tls` and `remote`, the authentication manager is in `auth`, what is used up in
//! `exhaustion`, kills are in `kills`.)

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::time::Instant;

use nix::sys::signal::Signal;

use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Style, Terminal};
use crate::harness::daemon;
use crate::harness::device::Device;
use crate::harness::front::Acceptor;
use crate::harness::manager::Answer;
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, TOKEN};
use crate::harness::server::Reply;
use crate::harness::wait::{SOON, eventually, millis, secs, throughout};

/// Shells end with their links, so that nothing may be left.
fn quick() -> Setup {
    let sessions = serde_json::json!({ "KeepDetached": 0 });
    Setup::new().set("ReconnectIntervalSeconds", 1).set("Sessions", sessions)
}

// ---- the server

#[test]
fn a_server_that_closes_its_half() {
    let (mut rig, device, terminal) = quick().terminal();
    let shell = proc::children(rig.daemon.pid());
    device.half_close();
    // The device closes the other half.
    device.wait_end(SOON);
    let device = rig.device();
    shell.iter().for_each(|pid| proc::wait_gone(*pid, SOON));
    drop(terminal);
    assert_healthy(&mut rig, &device);
}

#[test]
fn a_handshake_byte_by_byte() {
    let mut rig = quick().start_with(|s| s.always(Reply::Slowly));
    let device = rig.device();
    assert_eq!(rig.server.requests().len(), 1);
    assert_healthy(&mut rig, &device);
}

/// Accepts and sends a byte of a head without end every now and then.
fn trickling() -> Acceptor {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
    Acceptor::start("trickling", listener, |mut stream| {
        let mut bytes = b"HTTP/1.1 101 Slow\r\nX: ".iter().copied().chain(std::iter::repeat(b'x'));
        while bytes.next().is_some_and(|byte| stream.write_all(&[byte]).is_ok()) {
            // So slowly that the head doesn't become too long before the time is over.
            std::thread::park_timeout(secs(1));
        }
    })
}

/// No attempt to connect takes longer than 45 s, whether the other side says nothing or a little.
#[test]
fn peers_that_stall() {
    let trickling = trickling();
    let address: SocketAddr = trickling.address();
    let proxy = format!("http://{address}");
    let upgrade = quick().start_with(|s| s.script([Reply::Silence]));
    let bytes = quick().url(&proxy).start();
    let proxied = quick().url("http://device.example").env("HTTP_PROXY", &proxy).start();
    let tls = quick().url(&format!("https://{address}")).start();
    let all = [
        (upgrade, "the websocket handshake timed out"),
        (bytes, "the websocket handshake timed out"),
        (proxied, "timed out"),
        (tls, "tls"),
    ];
    // The next attempts will go where they should.
    for (rig, _) in &all {
        rig.manager.wait_calls("GetJwtToken", 1, SOON);
        rig.manager.set(TOKEN, &rig.server.url());
    }
    // Before anything else takes time.
    for (rig, why) in &all {
        let line = rig.daemon.wait_for_log("connection manager failed to connect", secs(60));
        let took = rig.daemon.started.elapsed();
        assert!(line.contains(why), "{line}");
        println!("{why}: {took:?}");
        assert!((secs(45)..secs(60)).contains(&took), "{why}: after {took:?}");
    }
    for (mut rig, _) in all {
        // The next attempt takes its time as well.
        rig.daemon.signal(Signal::SIGHUP);
        let device = rig.device();
        assert_healthy(&mut rig, &device);
    }
}

// ---- the authentication manager

#[test]
fn a_manager_that_crashes_in_mid_call() {
    let (mut rig, device) = quick().connected();
    rig.manager.answer_get(Answer::Silent);
    device.hang_up();
    rig.manager.wait_calls("GetJwtToken", 2, SOON);
    rig.manager.vanish();
    // What was good may still be.
    let device = rig.device();
    assert_healthy(&mut rig, &device);
    rig.manager.answer_get(Answer::Normal);
    rig.manager.appear();
    rig.manager.wait_calls("GetJwtToken", 3, SOON);
    assert_healthy(&mut rig, &device);
}

#[test]
fn a_manager_that_crashes_before_it_has_ever_answered() {
    let mut rig = Setup::new().asking(Answer::Silent);
    rig.manager.vanish();
    rig.daemon.wait_for_log("call to GetJWTToken on the Mender D-Bus API failed: ", SOON);
    rig.manager.answer_get(Answer::Normal);
    rig.manager.appear();
    let device = rig.device();
    assert_healthy(&mut rig, &device);
}

#[test]
fn a_manager_that_talks_nonsense() {
    let (mut rig, device) = quick().connected();
    rig.manager.answer_get(Answer::WrongTypes);
    for _ in 0..1000 {
        rig.manager.signal_nonsense();
    }
    device.hang_up();
    let device = rig.device();
    assert_healthy(&mut rig, &device);
}

/// It is waited for, and nothing waits with it.
#[test]
fn a_manager_that_takes_half_a_minute() {
    let mut fresh = Setup::new().asking(Answer::Late(secs(30)));
    let asked = Instant::now();
    let (mut rig, device) = quick().connected();
    rig.manager.answer_get(Answer::Late(secs(30)));
    device.hang_up();
    rig.manager.wait_calls("GetJwtToken", 2, SOON);
    // The old token serves meanwhile.
    let device = rig.device();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    fresh.daemon.signal(Signal::SIGUSR1);
    fresh.daemon.wait_for_log(" status: ", SOON);
    let late = fresh.server.next_device(secs(40));
    println!("connected {:?} after the question", asked.elapsed());
    assert!(asked.elapsed() > secs(29));
    assert_healthy(&mut fresh, &late);
    // The answer says nothing new, and so does the next one.
    throughout(secs(2), "the link", || !device.is_over());
    assert_eq!(terminal.run("echo there"), "there");
    terminal.stop();
    assert_healthy(&mut rig, &device);
}

// ---- the machine

#[test]
fn a_long_standstill() {
    let (mut rig, device, _terminal) = quick().terminal();
    let shells = proc::children(rig.daemon.pid());
    rig.daemon.freeze();
    device.reset();
    rig.bus.restart();
    rig.manager.appear();
    rig.daemon.thaw();
    let device = rig.device();
    shells.iter().for_each(|pid| proc::wait_gone(*pid, SOON));
    // It may have connected before it knew of the new bus.
    rig.manager.wait_calls("GetJwtToken", 2, SOON);
    assert_healthy(&mut rig, &device);
}

/// The agent's wall clock follows the file `clock`; its timers don't.
const CLOCK: &str =
    "export LD_PRELOAD='/usr/$LIB/faketime/libfaketimeMT.so.1' FAKETIME_TIMESTAMP_FILE=$PWD/clock
    export FAKETIME_NO_CACHE=1 DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1
    echo +0 >clock
    exec \"$@\"";

/// Sets the agent's clock by so much, as faketime has it; the log must show the year.
fn set_clock(rig: &Rig, offset: &str, year: &str) {
    // In one step, since the agent may read it at any time.
    let new = rig.dir.path().join("clock.new");
    std::fs::write(&new, format!("{offset}\n")).unwrap();
    std::fs::rename(new, rig.dir.path().join("clock")).unwrap();
    let mark = rig.daemon.mark();
    rig.daemon.signal(Signal::SIGUSR1);
    let line = rig.daemon.wait_for_log_after(mark, " status: ", SOON);
    assert!(line.contains(&format!("time=\"{year}")), "{line}");
}

#[test]
fn a_clock_that_jumps() {
    if !daemon::has_clock() {
        return;
    }
    let (mut rig, device, mut terminal) = Setup::new().wrapper(CLOCK).terminal();
    let jumps = [("+9000d", "20"), ("-9000d", "20"), ("-18000d", "19"), ("+0", "20")];
    for (offset, year) in jumps {
        set_clock(&rig, offset, year);
        assert_eq!(terminal.run("echo there"), "there");
        throughout(millis(300), "the link", || !device.is_over());
    }
    terminal.stop();
    assert_healthy(&mut rig, &device);
    // A wait doesn't end with a jump, nor does it grow.
    rig.server.script([Reply::with(503, "Retry-After", "3600")]);
    device.hang_up();
    rig.daemon.wait_for_log("retrying in 36", secs(20));
    set_clock(&rig, "+9000d", "20");
    rig.server.no_device(millis(500), "an hour isn't over");
    set_clock(&rig, "+0", "20");
    rig.manager.change("new", &rig.server.url());
    let device = rig.device();
    rig.server.script([Reply::status(500)]);
    set_clock(&rig, "+9000d", "20");
    device.hang_up();
    set_clock(&rig, "-18000d", "19");
    let device = rig.server.next_device(secs(30));
    assert_healthy(&mut rig, &device);
}

// ---- the shells

/// A shell that has many processes, and is getting more.
fn crowded() -> (Rig, Device, Terminal, u32) {
    // It doesn't pass a hang-up on to its jobs, as bash does.
    let setup = quick().set("ShellCommand", "/bin/sh").set("ShellArguments", serde_json::json!(["-i"]));
    let (rig, device) = setup.connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    let shell = terminal.run("echo $$").parse().expect("a process id");
    let jobs = "(for n in $(seq 1000); do sleep 1000 & [ $n != 50 ] || echo ma''ny; done; wait) &".repeat(3);
    terminal.input(format!("for n in $(seq 300); do sleep 1000 & done; {jobs}\n"));
    terminal.read_until("many", SOON);
    (rig, device, terminal, shell)
}

fn wait_session_gone(shell: u32) {
    eventually(SOON, "the last process to end", || proc::session(shell).is_empty().then_some(()));
}

#[test]
fn a_crowd_of_processes_in_a_shell_that_is_stopped() {
    let (mut rig, device, terminal, shell) = crowded();
    let mut other = Terminal::new(&device, Style::Cli);
    other.open_with_prompt();
    let start = Instant::now();
    terminal.ask_stop();
    assert_eq!(other.run("echo there"), "there");
    assert_eq!(terminal.expect_after_output("stop", SOON).status(), Some(1));
    println!("stopped after {:?}", start.elapsed());
    wait_session_gone(shell);
    other.stop();
    assert_healthy(&mut rig, &device);
}

#[test]
fn a_crowd_of_processes_in_a_shell_that_loses_its_link() {
    let (mut rig, device, _terminal, shell) = crowded();
    device.reset();
    wait_session_gone(shell);
    let device = rig.device();
    assert_healthy(&mut rig, &device);
}

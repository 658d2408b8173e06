//! Terminals that outlive their connection, and the way back to them.

use std::time::Instant;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Style, Terminal, size};
use crate::harness::daemon::emulated;
use crate::harness::device::{Device, Generation};
use crate::harness::msg::SHELL;
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::wait::{SOON, eventually, millis, secs, skip, throughout};

const TOO_MANY_OF_USER: &str = "user has too many open sessions";

fn setup(sessions: Value) -> Setup {
    Setup::new().set("ReconnectIntervalSeconds", 1).set("Sessions", sessions)
}

fn script(script: &str, sessions: Value) -> Setup {
    Setup::new().config(script_config(script)).set("ReconnectIntervalSeconds", 1).set("Sessions", sessions)
}

/// Cuts the link, and returns the next one.
fn cut(rig: &Rig, device: &Device) -> Device {
    let mark = rig.daemon.mark();
    device.reset();
    rig.daemon.wait_for_log_after(mark, "connectionmanager backoff", SOON);
    // It isn't waited for.
    rig.daemon.signal(Signal::SIGHUP);
    rig.device()
}

#[test]
fn the_same_client_goes_on_where_it_was() {
    let (rig, device) = setup(json!({})).connected();
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open_with_prompt();
    let shells = proc::children(rig.daemon.pid());
    let file = rig.dir.path().join("cut");
    let wait = format!("until [ -e {} ]; do sleep 0.01; done", file.display());
    // The number is not in the echo of the command line.
    terminal.run(&format!("{{ {wait}; echo mean$((40 + 2))while; }} & true"));
    let device = cut(&rig, &device);
    std::fs::write(&file, "").expect("a file");
    let mut terminal = terminal.on(&device);
    terminal.pong();
    assert_eq!(terminal.read_until("mean42while", SOON), "mean42while");
    assert_eq!(terminal.run("echo again"), "again");
    assert_eq!(proc::children(rig.daemon.pid()), shells);
    rig.daemon.wait_for_log("event=shell-detach", SOON);
    rig.daemon.wait_for_log("event=shell-attach", SOON);
    terminal.stop();
}

/// mender-auth restarts in an outage, can't fetch a token and announces that there is none: that ended the shell.
#[test]
fn a_manager_that_restarts_in_an_outage_ends_no_shell() {
    let (mut rig, device) = setup(json!({})).connected();
    let mut before = Terminal::of_user(&device, "alice");
    before.open_with_prompt();
    rig.server.stop();
    rig.manager.vanish();
    device.reset();
    rig.daemon.wait_for_log("event=shell-detach", SOON);
    rig.manager.set("", "");
    rig.manager.on_fetch("", "");
    rig.manager.appear();
    rig.manager.wait_calls("FetchJwtToken", 1, SOON);
    eventually(SOON, "the end of the attempts", || {
        (rig.status()["connection"]["state"] == "unauthorized").then_some(())
    });
    rig.server.resume();
    rig.manager.change("renewed", &rig.server.url());
    let mut after = Terminal::of_user(&rig.device(), "alice");
    after.reattached();
}

#[test]
fn another_session_of_the_user_gets_the_shell_and_what_it_has_shown() {
    let (rig, device) = setup(json!({})).connected();
    let mut before = Terminal::of_user(&device, "alice");
    before.open_with_prompt();
    assert_eq!(before.run("cd /tmp; here=kept; echo so''far"), "sofar");
    let device = cut(&rig, &device);
    let mut after = Terminal::of_user(&device, "alice");
    let notice = after.reattached();
    let pid = notice.split_once("(pid ").and_then(|(_, rest)| rest.split_once(')')).expect("a process id").0;
    assert_eq!(pid, proc::children(rig.daemon.pid())[0].to_string());
    let shown = after.prompt();
    assert!(shown.contains("sofar\r\n"), "{shown:?}");
    assert_eq!(after.run("echo $here $PWD"), "kept /tmp");
    // The old session is over.
    let before = before.on(&device);
    before.input("x");
    before.expect("shell", 2, Some("session not found"));
    after.stop();
}

#[test]
fn nobody_else_gets_it() {
    let (rig, device) = setup(json!({})).connected();
    let mut alice = Terminal::of_user(&device, "alice");
    alice.open_with_prompt();
    alice.run("secret=1");
    let nobody = Terminal::of_user(&device, "");
    nobody.open();
    let shells = proc::children(rig.daemon.pid());
    assert_eq!(shells.len(), 2);
    let device = cut(&rig, &device);
    // A shell without a user ends with its link.
    eventually(SOON, "one shell is left", || (proc::children(rig.daemon.pid()).len() == 1).then_some(()));
    let mut bob = Terminal::of_user(&device, "bob");
    bob.open_with_prompt();
    assert_eq!(bob.run("echo [$secret]"), "[]");
    let mut nobody = Terminal::of_user(&device, "");
    nobody.open_with_prompt();
    assert_eq!(nobody.run("echo [$secret]"), "[]");
    // Not by the session's id either.
    let thief = Terminal { user: "bob".to_owned(), ..alice.clone() }.on(&device);
    thief.input("echo $secret\n");
    thief.expect_after_output("shell", SOON);
    let mut alice = alice.on(&device);
    alice.forget_output();
    assert_eq!(alice.run("echo [$secret]"), "[1]");
}

#[test]
fn nothing_is_kept_for_longer_than_configured() {
    let (rig, device) = setup(json!({ "KeepDetached": 1 })).connected();
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open_with_prompt();
    let shell = proc::children(rig.daemon.pid())[0];
    let device = cut(&rig, &device);
    proc::wait_gone(shell, SOON);
    let ended = rig.daemon.wait_for_log("event=shell-end", SOON);
    assert!(ended.contains(r#"reason="not reattached""#), "{ended}");
    let mut after = Terminal::of_user(&device, "alice");
    after.open_with_prompt();
    assert_eq!(rig.status()["sessions"].as_array().map(Vec::len), Some(1));
}

/// A user who came back to an idle shell had only the rest of its time, and no warning if that had come meanwhile.
#[test]
fn a_user_who_comes_back_is_not_idle() {
    let (rig, device) = setup(json!({ "ExpireAfterIdle": 6 })).connected();
    let mut before = Terminal::of_user(&device, "alice");
    before.open_with_prompt();
    let typed = Instant::now();
    throughout(secs(1), "the link", || !device.is_over());
    let device = cut(&rig, &device);
    let after = Terminal::of_user(&device, "alice");
    // Before its idle time begins anew, however long the answer takes.
    let back = Instant::now();
    after.open();
    assert!(typed.elapsed() < secs(6), "too slow a machine for this test");
    let stop = after.expect_after_output("stop", SOON);
    assert!(stop.text().contains("no input for 6 s"), "{}", stop.summary());
    assert!(back.elapsed() >= secs(6), "after {:?}", back.elapsed());
}

#[test]
fn nothing_is_kept_when_the_agent_ends() {
    let (mut rig, device) = setup(json!({})).connected();
    let mut terminals = [Terminal::of_user(&device, "alice"), Terminal::of_user(&device, "bob")];
    terminals.iter_mut().for_each(Terminal::open_with_prompt);
    let shells = proc::children(rig.daemon.pid());
    let device = cut(&rig, &device);
    // One is back, the other is not.
    let [alice, _] = terminals;
    let mut alice = alice.on(&device);
    assert_eq!(alice.run("echo back"), "back");
    let started = Instant::now();
    rig.daemon.signal(Signal::SIGTERM);
    assert!(rig.daemon.wait_exit(SOON).success());
    assert!(started.elapsed() < secs(3) || emulated("time is the emulator's"), "{:?}", started.elapsed());
    shells.into_iter().for_each(|pid| proc::wait_gone(pid, SOON));
}

/// The server at HEAD says nothing when a tab is closed.
#[test]
fn a_user_who_has_gone_without_a_word_does_not_keep_the_place() {
    let (rig, device) = setup(json!({})).connected();
    device.clients_fall_silent();
    let mut gone = Terminal::of_user(&device, "alice");
    gone.open_with_prompt();
    let shell = proc::children(rig.daemon.pid())[0];
    let started = Instant::now();
    let mut next = Terminal::of_user(&device, "alice");
    next.open_with_prompt();
    let waited = started.elapsed();
    // The two seconds for an answer, and the shell's start.
    assert!(waited < secs(8), "{waited:?}");
    proc::wait_gone(shell, SOON);
    assert!(rig.daemon.wait_for_log("event=shell-end", SOON).contains("user gone"));
    assert_eq!(next.run("echo here"), "here");
}

#[test]
fn a_user_who_is_there_keeps_the_place() {
    let (_rig, device) = setup(json!({})).connected();
    device.clients_fall_silent();
    let mut first = Terminal::of_user(&device, "alice");
    first.open_with_prompt();
    let second = Terminal::of_user(&device, "alice");
    second.ask_new();
    let ping = first.next(SOON);
    assert_eq!((ping.proto, ping.typ.as_str()), (SHELL, "ping"));
    first.pong();
    second.expect("new", 2, Some(TOO_MANY_OF_USER));
    // A keystroke says it, too.
    let third = Terminal::of_user(&device, "alice");
    third.ask_new();
    assert_eq!(first.next(SOON).typ, "ping");
    first.input("");
    third.expect("new", 2, Some(TOO_MANY_OF_USER));
    assert_eq!(first.run("echo there"), "there");
}

/// Tells the agent what the server does when a user's connection ends.
fn leave(terminal: &Terminal) {
    terminal.send("stop", &[("status", 2.into())], b"user disconnected");
    terminal.expect_after_output("stop", SOON);
}

#[test]
fn a_shell_whose_user_leaves_is_kept_only_if_configured() {
    let (rig, device) = setup(json!({ "KeepWhenUserLeaves": true })).connected();
    let mut before = Terminal::of_user(&device, "alice");
    before.open_with_prompt();
    let shell = proc::children(rig.daemon.pid());
    leave(&before);
    let mut after = Terminal::of_user(&device, "alice");
    after.reattached();
    after.prompt();
    assert_eq!(proc::children(rig.daemon.pid()), shell);
    // Nor is it lost when the server says nothing.
    device.clients_fall_silent();
    let mut last = Terminal::of_user(&device, "alice");
    last.reattached();
    last.prompt();
    assert_eq!(proc::children(rig.daemon.pid()), shell);
    // A user's own stop ends it.
    last.stop();
    proc::wait_gone(shell[0], SOON);

    let (rig, device) = setup(json!({})).connected();
    let mut gone = Terminal::of_user(&device, "alice");
    gone.open_with_prompt();
    let shell = proc::children(rig.daemon.pid())[0];
    leave(&gone);
    proc::wait_gone(shell, SOON);
}

/// Nothing is lost but what the ring can't hold, and that is told.
#[test]
fn much_output_without_a_client_is_cut_at_a_line() {
    let shell = "echo ready; read line; seq 1 100000; echo do''ne; exec cat";
    let (rig, device) = script(shell, json!({})).connected();
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    terminal.read_until("ready\r\n", SOON);
    device.clients_fall_silent();
    terminal.input("\n");
    terminal.read_until("\r\n1\r\n", SOON);
    let device = cut(&rig, &device);
    // It goes on without anybody who reads.
    eventually(SOON, "the program's end", || {
        let shell = *proc::children(rig.daemon.pid()).first()?;
        let name = std::fs::read_to_string(format!("/proc/{shell}/comm")).ok()?;
        (name == "cat\n").then_some(())
    });
    let mut terminal = terminal.on(&device);
    terminal.forget_output();
    terminal.pong();
    let shown = terminal.read_until("done\r\n", SOON);
    let (notice, rest) = shown.trim_start().split_once("\r\n").expect("a line");
    assert!(
        notice.starts_with("[mender-connect] ") && notice.ends_with(" bytes of output are lost"),
        "{notice}"
    );
    let numbers: Vec<u32> = rest.lines().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(numbers.last(), Some(&100_000));
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "a gap behind the notice");
    assert!(numbers.len() > 9000, "{} lines", numbers.len());
}

#[test]
fn the_next_client_has_its_own_size() {
    let trap = "trap 'echo si''ze $(stty size)' WINCH; echo ready; while :; do read line; done";
    let (rig, device) = script(trap, json!({})).connected();
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    terminal.read_until("ready\r\n", SOON);
    let device = cut(&rig, &device);
    let mut wider = Terminal::of_user(&device, "alice");
    wider.send("new", &size(100, 30), b"");
    wider.expect("new", 1, Some("Shell started"));
    wider.read_until("size 30 100", SOON);
}

/// One line less, and then back. A busy machine's program may look at it only after that.
#[test]
fn the_same_size_again_is_another_in_between() {
    let redrawn = ["alice", "bob", "carol"].iter().any(|user| {
        let trap = "trap 'echo si''ze $(stty size)' WINCH; echo ready; while :; do read line; done";
        let (rig, device) = script(trap, json!({})).connected();
        let open = |device| {
            let terminal = Terminal::of_user(device, user);
            terminal.send("new", &size(100, 30), b"");
            terminal.expect("new", 1, Some("Shell started"));
            terminal
        };
        open(&device).read_until("ready\r\n", SOON);
        let shown = open(&cut(&rig, &device)).read_until("size 30 100", SOON);
        assert!(shown.contains("Reattached"), "{shown:?}");
        shown.contains("size 29 100")
    });
    assert!(redrawn, "three times the program saw its size only");
}

/// The web interface sends its size right behind its `new`: a program that didn't look before that saw the size that it
/// knew, and drew nothing.
#[test]
fn the_web_interfaces_same_size_is_another_in_between() {
    let redrawn = ["alice", "bob", "carol"].iter().any(|user| {
        let trap =
            "trap 'sleep 0.03; echo si''ze $(stty size)' WINCH; echo ready; while :; do read line; done";
        let (rig, device) = script(trap, json!({})).connected();
        let mut before = Terminal::of_user(&device, user);
        before.open();
        before.read_until("ready\r\n", SOON);
        let mut web = Terminal::of_user(&cut(&rig, &device), user);
        web.style = Style::Gui;
        web.open();
        let shown = web.read_until("size 24 80", SOON);
        assert!(shown.contains("Reattached"), "{shown:?}");
        shown.contains("size 23 80")
    });
    assert!(redrawn, "three times the program saw its size only");
}

/// The server takes what is under way before it cuts, since what is in its own hands can't be known to the agent.
#[test]
fn five_cuts_lose_no_byte() {
    for generation in [Generation::New, Generation::Released] {
        no_byte_is_lost(generation, 5, 900_000, |rig, device, terminal, all, _| {
            // A client that answers no more has the agent stop.
            device.clients_fall_silent();
            eventually(SOON, "the agent to stop", || {
                terminal.collect(all, usize::MAX, millis(500));
                let (rests, before) = (rig.is_at_rest(device), all.len());
                terminal.collect(all, usize::MAX, millis(1));
                (rests && all.len() == before).then_some(())
            });
            cut(rig, device)
        });
    }
}

/// The agent ends the link itself, in the middle of the output: what was shown between the end of the link's writer and
/// the session's notice of it was lost, up to half a megabyte, and what the writer still wrote could come twice.
#[test]
fn a_new_token_loses_no_byte() {
    no_byte_is_lost(Generation::New, 12, 400_000, |rig, device, terminal, all, part| {
        rig.manager.change(&format!("token-{part}"), &rig.server.url());
        let next = rig.device();
        device.wait_end(SOON);
        terminal.collect(all, usize::MAX, millis(1));
        next
    });
}

/// A long output comes whole though its link is `replaced` so many times, each time after so many bytes more.
fn no_byte_is_lost(
    generation: Generation,
    times: usize,
    size: usize,
    replaced: impl Fn(&Rig, &Device, &Terminal, &mut Vec<u8>, usize) -> Device,
) {
    let shell = "stty -echo; echo ready; read line; seq 1 900000; echo do''ne; exec cat";
    let (rig, mut device) = script(shell, json!({})).generation(generation).connected();
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    terminal.read_until("ready\r\n", SOON);
    terminal.input("\n");
    let expected: String = (1..=900_000).map(|n| format!("{n}\r\n")).collect::<String>() + "done\r\n";
    let mut all = Vec::new();
    for part in 1..=times {
        // Nothing more is read if the link before brought more than enough: the shell may be on its way here still.
        terminal.collect(&mut all, part * size, SOON);
        device = replaced(&rig, &device, &terminal, &mut all, part);
        terminal = terminal.on(&device);
        terminal.pong();
    }
    terminal.collect(&mut all, expected.len() - 1, SOON);
    let differs = all.iter().zip(expected.as_bytes()).position(|(a, b)| a != b);
    let there = differs.map(|at| String::from_utf8_lossy(&all[at..all.len().min(at + 200)]));
    assert_eq!((all.len(), differs), (expected.len(), None), "{generation:?}: {there:?}");
}

/// Waits until nothing comes, and returns the text on the client's screen.
fn screen(terminal: &Terminal, screen: &mut vt100::Parser) -> String {
    let mut output = Vec::new();
    terminal.collect(&mut output, usize::MAX, millis(700));
    screen.process(&output);
    screen.screen().contents()
}

/// A full-screen program that `command` starts, with `input` typed when it shows `ready`: what its user had on the screen
/// when it was `complete`, and the terminal that has come back to it, with what that shows.
fn come_back(
    rig: &Rig,
    device: &Device,
    command: &str,
    [ready, input]: [&str; 2],
    complete: impl Fn(&str) -> bool,
) -> Back {
    let mut before = Terminal::of_user(device, "alice");
    before.open_with_prompt();
    before.input(format!("{command}\n"));
    let mut parser = vt100::Parser::new(24, 80, 0);
    eventually(SOON, "the program", || screen(&before, &mut parser).contains(ready).then_some(()));
    before.input(input);
    // On a busy machine it pauses while it draws.
    let drawn = |terminal: &Terminal, parser: &mut vt100::Parser| {
        eventually(SOON, "a complete screen", || Some(screen(terminal, parser)).filter(|text| complete(text)))
    };
    let before = drawn(&before, &mut parser);
    let device = cut(rig, device);
    let terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    let mut parser = vt100::Parser::new(24, 80, 0);
    let after = drawn(&terminal, &mut parser);
    Back { terminal, parser, before, after, _device: device }
}

struct Back {
    terminal: Terminal,
    parser: vt100::Parser,
    before: String,
    after: String,
    _device: Device,
}

/// The first of these programs that is there. Without one the test can't run.
fn program(paths: &[&'static str]) -> Option<&'static str> {
    let found = paths.iter().find(|path| std::fs::exists(path).is_ok_and(|is| is)).copied();
    if found.is_none() {
        skip(&format!("there is no {}", paths[0]));
    }
    found
}

#[test]
fn a_full_screen_program_draws_itself_again() {
    let Some(vi) = program(&["/usr/bin/vim.tiny", "/usr/bin/vi"]) else { return };
    let (rig, device) = setup(json!({})).connected();
    let file = rig.dir.path().join("text");
    let text: String = (1..=200).map(|n| format!("line {n}: some text, ünïcödé and 漢字\n")).collect();
    std::fs::write(&file, text).expect("a file");
    let command = format!("{vi} -u NONE {}", file.display());
    let complete = |text: &str| text.contains("line 51:") && !text.contains("line 50:");
    let mut back = come_back(&rig, &device, &command, ["line 1:", "50Gzzdd"], complete);
    assert_eq!(back.after, back.before);
    back.terminal.input("u");
    eventually(SOON, "line 50 again", || {
        screen(&back.terminal, &mut back.parser).contains("line 50:").then_some(())
    });
    // Nothing of the replay was taken for input.
    back.terminal.input(":q!\n");
    back.terminal.prompt();
    back.terminal.stop();
}

/// Its own terminal emulator keeps a screen of its own: only what the agent's terminal shows has to be drawn again.
#[test]
fn a_terminal_multiplexer_draws_itself_again() {
    let Some(tmux) = program(&["/usr/bin/tmux"]) else { return };
    let (rig, device) = setup(json!({})).connected();
    let file = rig.dir.path().join("tmux.conf");
    std::fs::write(&file, "set -g status-right end\nset -g default-command \"exec sh\"\n").expect("a file");
    let socket = rig.dir.path().join("tmux");
    let command = format!("LC_ALL=C.UTF-8 {tmux} -f {} -S {} new", file.display(), socket.display());
    let input = "PS1=; seq 100 110; echo in''side\n";
    let complete = |text: &str| text.contains("110\ninside") && text.ends_with("end");
    let mut back = come_back(&rig, &device, &command, ["end", input], complete);
    assert_eq!(back.after, back.before);
    back.terminal.input("echo out''side\n");
    eventually(SOON, "an answer", || {
        screen(&back.terminal, &mut back.parser).contains("\noutside").then_some(())
    });
    back.terminal.input("exit\n");
    back.terminal.prompt();
    back.terminal.stop();
}

/// It changes what it shows by itself, by what it knows of the screen that was.
#[test]
fn a_program_that_goes_on_drawing_draws_itself_again() {
    let Some(htop) = program(&["/usr/bin/htop"]) else { return };
    let (rig, device) = setup(json!({})).connected();
    let command = format!("HOME={} {htop} -C -d 20 -p $$", rig.dir.path().display());
    let complete = |drawn: &str| {
        let has = |text| drawn.lines().filter(|line| line.contains(text)).count() == 1;
        let whole = has("Load average:") && has("TIME+") && has("F1Help") && has("F10Quit");
        whole && drawn.lines().count() == 24
    };
    let mut back = come_back(&rig, &device, &command, ["F10Quit", ""], complete);
    back.terminal.input("q");
    back.terminal.prompt();
    back.terminal.stop();
}

/// A number that a longer run sets: `MENDER_CONNECT_ROUNDS=10000`.
fn rounds(usual: u32) -> u32 {
    std::env::var("MENDER_CONNECT_ROUNDS").map_or(usual, |rounds| rounds.parse().expect("a number"))
}

/// Each with a shell: some are found again, some end with their time, some by their user's stop.
#[test]
fn many_cuts_leave_nothing_behind() {
    // Longer than a cut takes on a busy machine.
    let (mut rig, mut device) = script("exec cat", json!({ "KeepDetached": 5 })).connected();
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    for round in 0..rounds(60) {
        device = cut(&rig, &device);
        rig.daemon.take_log();
        match round % 3 {
            0 => {
                terminal = terminal.on(&device);
                terminal.input(format!("round {round}\n"));
                terminal.read_until(&format!("round {round}\r\nround {round}\r\n"), SOON);
            }
            1 => {
                terminal = Terminal::of_user(&device, "alice");
                terminal.reattached();
            }
            _ => {
                // Its time passes for one whose user doesn't come back.
                Terminal::of_user(&device, &format!("user {}", round % 12)).ask_new();
                terminal = Terminal::of_user(&device, "alice");
                terminal.reattached();
                terminal.ask_stop();
                assert_eq!(terminal.expect_after_output("stop", SOON).status(), Some(1));
                terminal.pending.clear();
                terminal.open();
            }
        }
    }
    terminal.ask_stop();
    terminal.expect_after_output("stop", SOON);
    let device = cut(&rig, &device);
    eventually(SOON, "the end of all shells", || proc::children(rig.daemon.pid()).is_empty().then_some(()));
    assert_healthy(&mut rig, &device);
}

/// Alice's and Bob's sessions, cuts and returns in any order: what either sees is their own.
#[test]
fn nobody_ever_sees_what_is_another_users() {
    let shell = "stty -echo; read name; while read line; do echo \"<$name:$line>\"; done";
    let (rig, mut device) = script(shell, json!({ "MaxPerUser": 3 })).connected();
    let mut random = numbers();
    let mut terminals: Vec<Terminal> = Vec::new();
    for round in 0..rounds(300) {
        match random() % 8 {
            0 => {
                device = cut(&rig, &device);
                rig.daemon.take_log();
                for terminal in &mut terminals {
                    terminal.device = device.clone();
                }
            }
            1 | 2 if terminals.len() < 4 => {
                let user = if random().is_multiple_of(2) { "alice" } else { "bob" };
                let terminal = Terminal::of_user(&device, user);
                terminal.ask_new();
                let answer = terminal.next(SOON);
                if answer.status() == Some(1) {
                    // A shell that was found again has its name.
                    terminal.input(format!("{user}\n"));
                    terminals.push(terminal);
                }
            }
            3 if !terminals.is_empty() => {
                let at = random() as usize % terminals.len();
                terminals.swap_remove(at).ask_stop();
            }
            4 if !terminals.is_empty() => {
                // Somebody tries with another's session.
                let at = random() as usize % terminals.len();
                let thief = Terminal { user: "mallory".to_owned(), ..terminals[at].clone() };
                thief.input("stolen\n");
            }
            _ if !terminals.is_empty() => {
                let at = random() as usize % terminals.len();
                terminals[at].input(format!("{round}\n"));
            }
            _ => {}
        }
        for terminal in &terminals {
            let other = if terminal.user == "alice" { "<bob:" } else { "<alice:" };
            for msg in device.drain(&terminal.sid) {
                let text = String::from_utf8_lossy(&msg.body.unwrap_or_default()).into_owned();
                assert!(!text.contains(other), "{} sees {text:?} in round {round}", terminal.user);
            }
        }
    }
    assert!(!rig.daemon.log().iter().any(|line| line.contains("mallory") && line.contains("shell-attach")));
}

/// Numbers that are the same in each run, unless `MENDER_CONNECT_SEED` says otherwise.
fn numbers() -> impl FnMut() -> u32 {
    let mut state: u64 =
        std::env::var("MENDER_CONNECT_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    }
}

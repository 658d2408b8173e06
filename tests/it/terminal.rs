//! What terminal clients rely on: the exchange of messages, in the words of the acceptance tests of
//! the server and of mender-cli.

use rmpv::Value;
use serde_json::json;

use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::device::{Device, Generation};
use crate::harness::msg::{self, CONTROL, Ints, SHELL, map};
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::wait::{SOON, eventually, millis};

const ALREADY_RUNNING: &str = "failed to start shell: shell is already running";
const NOT_FOUND: &str = "session not found";

/// The end of a shell that exited by itself.
pub const READ_ERROR: &str = "read /dev/ptmx: input/output error";

fn stop_not_found(terminal: &Terminal) -> String {
    format!("routeMessage: StopShellMessage: session not found for id {}", terminal.sid)
}

/// The remote-terminal acceptance test, step by step.
fn acceptance(style: Style, generation: Generation) {
    let (_rig, device) = Setup::new().generation(generation).connected();
    if style == Style::Python {
        // It answers no ping, and takes none for output.
        device.clients_fall_silent();
    }
    let mut terminal = Terminal::new(&device, style);
    // It knows the end of an output by the silence that follows.
    let pause = || {
        if style == Style::Python {
            device.nothing(millis(400), "silence behind a prompt", |_| true);
        }
    };
    terminal.open();
    terminal.prompt();
    pause();
    terminal.ask_new();
    terminal.expect("new", 2, Some(ALREADY_RUNNING));
    device.nothing(millis(200), "a refused `new` leaves the shell alone", |_| true);
    let listing = terminal.run("ls /");
    let has = |name: &str| listing.split_whitespace().any(|entry| entry == name);
    assert!(has("usr") && has("etc"), "{listing}");
    pause();
    terminal.input("ls /\n");
    let output = terminal.prompt();
    pause();
    assert!(output.contains("usr") && output.contains("etc"), "{output}");

    terminal.stop();
    terminal.ask_stop();
    terminal.expect("stop", 2, Some(&stop_not_found(&terminal)));
    terminal.input("ls /\n");
    terminal.expect("shell", 2, Some(NOT_FOUND));

    terminal.open();
    terminal.prompt();
    pause();
    assert_eq!(terminal.run("echo again"), "again");
    terminal.stop();
}

#[test]
fn acceptance_with_the_python_client() {
    acceptance(Style::Python, Generation::New);
}

#[test]
fn acceptance_with_mender_cli() {
    acceptance(Style::Cli, Generation::New);
}

#[test]
fn acceptance_with_the_web_interface() {
    acceptance(Style::Gui, Generation::New);
}

#[test]
fn acceptance_on_the_released_server() {
    acceptance(Style::Python, Generation::Released);
}

#[test]
fn an_unknown_shell_message_is_answered_in_kind() {
    let (_rig, device) = Rig::connected();
    let terminal = Terminal::new(&device, Style::Python);
    terminal.send("bogusmessage", &[], b"");
    terminal.expect("bogusmessage", 2, Some("unknown message protocol and type: 1/bogusmessage"));
}

/// mender-cli reads `status` only when it is eight bytes wide.
#[test]
fn status_is_a_wide_integer() {
    let (_rig, device) = Rig::connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.ask_new();
    let wide = |status: u8| [b"\xa6status\xd3\0\0\0\0\0\0\0".as_slice(), &[status]].concat();
    let contains = |raw: &[u8], needle: Vec<u8>| raw.windows(needle.len()).any(|w| w == needle);
    let started = terminal.expect("new", 1, Some("Shell started"));
    assert!(contains(&started.raw, wide(1)), "{:02x?}", started.raw);
    terminal.prompt();
    terminal.ask_new();
    let refused = terminal.expect("new", 2, Some(ALREADY_RUNNING));
    assert!(contains(&refused.raw, wide(2)), "{:02x?}", refused.raw);
}

#[test]
fn a_disabled_terminal_answers_as_unknown() {
    let (_rig, device) = Setup::new().set("Terminal", json!({ "Disable": true })).connected();
    let terminal = Terminal::new(&device, Style::Cli);
    for typ in ["new", "shell", "stop"] {
        terminal.send(typ, &[], b"");
        let text = format!("unknown message protocol and type: 1/{typ}");
        terminal.expect(typ, 2, Some(&text));
    }
    let sid = new_sid();
    device.send_value(
        &msg::message(
            CONTROL,
            "open",
            &sid,
            &[],
            &msg::encode(&map(&[("versions", Value::Array(vec![1.into()]))]), Ints::Compact),
        ),
        Ints::Compact,
    );
    let accept = device.next_of(&sid, SOON);
    let protocols = accept.field("protocols").expect("protocols");
    assert!(!protocols.as_array().expect("an array").contains(&Value::from(SHELL)), "{protocols}");
}

#[test]
fn a_shell_that_exits_says_stop_once_and_frees_its_slot() {
    let (rig, device, terminal) = Setup::new().terminal();
    terminal.input("exit 3\n");
    let stop = terminal.expect_after_output("stop", SOON);
    assert_eq!((stop.status(), stop.text().as_str()), (Some(2), READ_ERROR));
    eventually(SOON, "the shell to be reaped", || proc::children(rig.daemon.pid()).is_empty().then_some(()));
    // Clients answer a device's stop with their own.
    terminal.ask_stop();
    terminal.expect("stop", 2, Some(&stop_not_found(&terminal)));
    terminal.input("x");
    terminal.expect("shell", 2, Some(NOT_FOUND));
    // Neither the user's nor the session's place is taken any more.
    let mut second = Terminal::of_user(&device, &terminal.user);
    second.open_with_prompt();
    device.nothing(millis(200), "nothing more from the first session", |m| {
        m.sid.as_ref() == Some(&terminal.sid)
    });
}

#[test]
fn mender_cli_session_with_piped_input() {
    let (_rig, device) = Rig::connected();
    let terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.input("echo from''-piped-input\nexit\n");
    let mut output = String::new();
    loop {
        let msg = terminal.next(SOON);
        match msg.typ.as_str() {
            "shell" => output.push_str(&msg.text()),
            "stop" => break,
            other => panic!("unexpected {other}"),
        }
    }
    assert!(output.contains("from-piped-input"), "{output}");
}

#[test]
fn output_before_the_exit_comes_before_the_stop() {
    let (_rig, device) = Setup::new().config(script_config("echo last words")).connected();
    for _ in 0..20 {
        let terminal = Terminal::new(&device, Style::Cli);
        terminal.open();
        let mut output = String::new();
        loop {
            let msg = terminal.next(SOON);
            if msg.typ == "stop" {
                assert_eq!((msg.status(), msg.text().as_str()), (Some(2), READ_ERROR));
                break;
            }
            output.push_str(&msg.text());
        }
        assert_eq!(output, "last words\r\n");
    }
}

#[test]
fn a_background_child_does_not_keep_an_ended_shell_open() {
    let (rig, device, mut terminal) = Setup::new().terminal();
    let holder = terminal.run("(trap '' HUP INT TERM; exec sleep 45) & echo $!");
    let holder = holder.lines().last().and_then(|l| l.trim().parse::<i32>().ok()).expect("a process id");
    terminal.input("exit\n");
    let stop = terminal.expect_after_output("stop", SOON);
    assert_eq!((stop.status(), stop.text().as_str()), (Some(2), READ_ERROR));
    eventually(SOON, "the shell to be reaped", || proc::children(rig.daemon.pid()).is_empty().then_some(()));
    Terminal::of_user(&device, &terminal.user).open_with_prompt();
    // Whether the agent ended it or not: it mustn't outlive the test.
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(holder), nix::sys::signal::Signal::SIGKILL);
}

#[test]
fn stop_without_a_session_ends_all_shells_of_the_user() {
    let (rig, device) = Setup::new().set("Sessions", json!({ "MaxPerUser": 2 })).connected();
    let mut shells = [Terminal::of_user(&device, "alice"), Terminal::of_user(&device, "alice")];
    let mut other = Terminal::of_user(&device, "bob");
    shells.iter_mut().for_each(Terminal::open_with_prompt);
    other.open_with_prompt();
    assert_eq!(proc::children(rig.daemon.pid()).len(), 3);
    device.send(SHELL, "stop", "", &[("user_id", "alice".into())], b"");
    eventually(SOON, "alice's shells to end", || (proc::children(rig.daemon.pid()).len() == 1).then_some(()));
    for shell in &mut shells {
        shell.expect_after_output("stop", SOON);
        shell.input("x");
        shell.expect("shell", 2, Some(NOT_FOUND));
    }
    // None left, and nobody named at all: neither may harm anybody.
    device.send(SHELL, "stop", "", &[("user_id", "alice".into())], b"");
    device.send(SHELL, "stop", "", &[], b"");
    assert_eq!(other.run("echo alive"), "alive");
    assert!(!device.is_over(), "a shell message without sid would have made the released server hang up");
}

/// Reads up to the stop reply; behind it nothing may come.
fn stop_is_the_last_word(device: &Device, terminal: &Terminal) {
    terminal.ask_stop();
    let reply = terminal.expect_after_output("stop", SOON);
    assert_eq!((reply.status(), reply.body), (Some(1), None));
    let sid = terminal.sid.clone();
    device.nothing(millis(300), "the stop reply is the last word", |m| m.sid.as_ref() == Some(&sid));
}

#[test]
fn stop_is_answered_once_under_a_flood_of_output() {
    let (_rig, device) = Setup::new().config(script_config("exec yes")).connected();
    for _ in 0..3 {
        let terminal = Terminal::new(&device, Style::Cli);
        terminal.open();
        for _ in 0..5 {
            terminal.expect_after_output("shell", SOON);
        }
        stop_is_the_last_word(&device, &terminal);
    }
}

/// The race upstream loses: the shell's own end against the client's stop.
#[test]
fn stop_is_answered_once_when_the_shell_ends_meanwhile() {
    let (_rig, device) = Setup::new().config(script_config("read line; echo got it")).connected();
    for _ in 0..20 {
        let terminal = Terminal::new(&device, Style::Cli);
        terminal.open();
        terminal.input("\n");
        terminal.ask_stop();
        let mut stops = Vec::new();
        loop {
            let msg = terminal.next(SOON);
            if msg.typ == "stop" {
                let ended_first = msg.text() == READ_ERROR;
                stops.push((msg.status(), msg.text()));
                if !ended_first {
                    break;
                }
            }
        }
        let last = stops.pop().expect("a reply");
        match stops.as_slice() {
            [] => assert_eq!(last, (Some(1), String::new())),
            // It had ended before the stop arrived, and said so.
            [_] => assert_eq!(last, (Some(2), stop_not_found(&terminal))),
            more => panic!("too many stops: {more:?}"),
        }
        let sid = terminal.sid.clone();
        device.nothing(millis(20), "nothing behind the reply", |m| m.sid.as_ref() == Some(&sid));
    }
}

#[test]
fn a_shell_that_ignores_signals_is_killed() {
    let stubborn = "trap '' INT TERM HUP QUIT; echo ready; while :; do read x || sleep 1; done";
    let (rig, device) = Setup::new().config(script_config(stubborn)).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.read_until("ready", SOON);
    let shell = proc::children(rig.daemon.pid());
    let start = std::time::Instant::now();
    stop_is_the_last_word(&device, &terminal);
    assert!(start.elapsed() < millis(6000), "took {:?}", start.elapsed());
    shell.iter().for_each(|&pid| proc::wait_gone(pid, SOON));
}

#[test]
fn input_nobody_reads_is_queued_up_to_a_bound() {
    let (_rig, device) =
        Setup::new().config(script_config("stty raw -echo; echo ready; exec sleep 60")).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.read_until("ready", SOON);
    let block = vec![b'x'; 64 << 10];
    for _ in 0..15 {
        terminal.input(&block);
    }
    device.nothing(millis(300), "960 KiB are queued silently", |_| true);
    for _ in 0..4 {
        terminal.input(&block);
    }
    let refusal = terminal.next(SOON);
    assert_eq!((refusal.typ.as_str(), refusal.status()), ("shell", Some(2)), "{}", refusal.summary());
    assert!(!refusal.text().is_empty(), "a refusal has a reason");
    // What is refused is dropped; the session goes on, and its stop still works.
    terminal.ask_stop();
    let reply = eventually(SOON, "the stop reply", || Some(terminal.next(SOON)).filter(|m| m.typ == "stop"));
    assert_eq!((reply.status(), reply.body), (Some(1), None));
}

#[test]
fn a_paste_is_delivered_whole() {
    let (_rig, device) = Setup::new()
        .config(script_config("stty raw -echo; echo ready; head -c 900000 | cksum; read x"))
        .connected();
    let mut terminal = Terminal::new(&device, Style::Gui);
    terminal.open();
    terminal.read_until("ready", SOON);
    let paste: Vec<u8> =
        (0u32..900_000).map(|n| b'a' + (n.wrapping_mul(2_654_435_761) >> 24) as u8 % 26).collect();
    terminal.input(&paste);
    let printed = terminal.read_until(" 900000", SOON);
    let expected = cksum(&paste);
    assert!(printed.contains(&format!("{expected} 900000")), "expected {expected}, printed {printed}");
}

/// POSIX cksum.
fn cksum(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: u8| {
        (0..8).fold(
            crc ^ (u32::from(byte) << 24),
            |c, _| if c >> 31 == 1 { (c << 1) ^ 0x04c1_1db7 } else { c << 1 },
        )
    };
    let crc = bytes.iter().fold(0, |crc, &b| step(crc, b));
    let mut length = bytes.len();
    let mut crc = crc;
    while length > 0 {
        crc = step(crc, (length & 0xff) as u8);
        length >>= 8;
    }
    !crc
}

#[test]
fn output_is_lossless_and_in_order() {
    let (_rig, device) = Setup::new().config(script_config("seq 1 500000")).connected();
    let terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    let mut output = Vec::new();
    loop {
        let msg = terminal.next(SOON);
        let body = msg.body.clone().unwrap_or_default();
        if msg.typ == "stop" {
            break;
        }
        assert!(body.len() <= 32 << 10, "a frame carries at most 32 KiB, not {}", body.len());
        output.extend_from_slice(&body);
    }
    let mut at = 0;
    for n in 1..=500_000u32 {
        let line = format!("{n}\r\n");
        assert!(output[at..].starts_with(line.as_bytes()), "line {n} is missing at byte {at}");
        at += line.len();
    }
    assert_eq!(at, output.len(), "bytes behind the end");
}

#[test]
fn resize_is_never_answered() {
    let (_rig, device, mut terminal) = Setup::new().terminal();
    let unknown = Terminal::new(&device, Style::Gui);
    unknown.resize(10, 10);
    unknown.send("resize", &[("terminal_width", "wide".into())], b"");
    unknown.send("resize", &[], b"");
    terminal.resize(100, 30);
    terminal.pong();
    unknown.pong();
    device.nothing(millis(200), "neither resize nor pong is answered", |_| true);
    assert_eq!(terminal.run("stty size"), "30 100");
}

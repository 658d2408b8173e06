//! The audit log: the lines that docs/operations.md promises, with these keys in this order.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::signal::Signal;
use serde_json::json;

use crate::harness::client::{Style, Terminal};
use crate::harness::device::Reading;
use crate::harness::forward::Client;
use crate::harness::msg::{self, CONTROL, Ints, map};
use crate::harness::rest::{Form, Rest};
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::server::closed_port;
use crate::harness::targets::{Role, Target};
use crate::harness::wait::SOON;

/// The keys of each event.
const KEYS: &[(&str, &str)] = &[
    ("session-start", "session user"),
    ("session-end", "session user duration reason"),
    ("shell-start", "session user pid"),
    ("shell-refused", "session user reason"),
    ("shell-end", "session user pid duration bytes_in bytes_out status reason"),
    ("stat", "session user path size result"),
    ("stat", "session user path result reason"),
    ("transfer", "session user direction path bytes duration result sha256"),
    ("transfer", "session user direction path bytes duration result reason"),
    ("forward", "session user protocol target address duration bytes_in bytes_out result reason"),
    ("command", "session user command duration result reason"),
];

type Record = BTreeMap<String, String>;

/// Takes `key=value` or `key="value"` from the front of a line.
fn pair(line: &str) -> (String, String, &str) {
    let (key, rest) = line.split_once('=').unwrap_or_else(|| panic!("no key: {line}"));
    let end = if rest.starts_with('"') {
        let mut escaped = false;
        let close = rest.char_indices().skip(1).find(|(_, c)| {
            let found = *c == '"' && !escaped;
            escaped = *c == '\\' && !escaped;
            found
        });
        close.unwrap_or_else(|| panic!("no closing quote: {line}")).0 + 1
    } else {
        rest.find(' ').unwrap_or(rest.len())
    };
    let (value, rest) = rest.split_at(end);
    (key.to_owned(), value.trim_matches('"').to_owned(), rest.trim_start())
}

fn parse(line: &str) -> Record {
    let (_, mut rest) = line.split_once(" msg=audit ").expect("an audit line");
    let mut keys = Vec::new();
    let mut record = Record::new();
    while !rest.is_empty() {
        let (key, value, more) = pair(rest);
        keys.push(key.clone());
        assert!(record.insert(key, value).is_none(), "a key twice: {line}");
        rest = more;
    }
    let keys = keys.join(" ");
    let documented =
        |(event, its): &(&str, &str)| keys == format!("event {its}") && record["event"] == *event;
    assert!(KEYS.iter().any(documented), "not documented: {line}");
    record
}

/// All audit lines so far.
fn records(rig: &Rig) -> Vec<Record> {
    rig.daemon.log().iter().filter(|line| line.contains(" msg=audit ")).map(|line| parse(line)).collect()
}

/// Waits for a line with this in it.
fn record(rig: &Rig, text: &str) -> Record {
    parse(&rig.daemon.wait_for_log(text, SOON))
}

/// Other sessions may still be about to end, too.
fn session_end(rig: &Rig, sid: &str) -> Record {
    record(rig, &format!("event=session-end session={sid:?}"))
}

#[test]
fn a_shell_from_beginning_to_end() {
    let (rig, device) = Setup::new().config(script_config("read line; printf 12345; read line")).connected();
    let terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    let begun = record(&rig, "event=shell-start");
    terminal.input("abc\n");
    terminal.input("\n");
    terminal.expect_after_output("stop", SOON);
    let ended = record(&rig, "event=shell-end");
    for key in ["session", "user", "pid"] {
        assert_eq!(begun[key], ended[key]);
    }
    assert_eq!((ended["session"].as_str(), ended["bytes_in"].as_str()), (terminal.sid.as_str(), "5"));
    // The echo of what was typed, with carriage returns, and the output.
    assert_eq!(ended["bytes_out"], (5 + 2 + 5).to_string());
    assert_eq!((ended["status"].as_str(), ended["reason"].as_str()), ("exit status: 0", "exited"));
    assert_eq!(session_end(&rig, &terminal.sid)["reason"], "done");
}

#[test]
fn why_shells_end() {
    let script = || script_config("echo ready; read line");
    let (rig, device) =
        Setup::new().config(script()).set("Sessions", json!({ "KeepDetached": 0 })).connected();
    let stopped = Terminal::of_user(&device, "a");
    stopped.open();
    Terminal::of_user(&device, "a").ask_new();
    assert!(record(&rig, "event=shell-refused")["reason"].contains("too many open sessions"));
    stopped.ask_stop();
    stopped.expect_after_output("stop", SOON);
    assert_eq!(record(&rig, "event=shell-end")["reason"], "stopped");
    let lost = Terminal::of_user(&device, "b");
    lost.open();
    let mark = rig.daemon.mark();
    device.reset();
    let ended = parse(&rig.daemon.wait_for_log_after(mark, "event=shell-end", SOON));
    assert_eq!((ended["user"].as_str(), ended["reason"].as_str()), ("b", "link lost"));
    assert_eq!(session_end(&rig, &lost.sid)["reason"], "link lost");

    let expiring = Setup::new().config(script()).set("Sessions", json!({ "ExpireAfter": 1 }));
    let (rig, device) = expiring.connected();
    Terminal::new(&device, Style::Cli).open();
    assert_eq!(record(&rig, "event=shell-end")["reason"], "expired");
}

#[test]
fn transfers() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let inside = dir.path().join("in side");
    fs::create_dir(&inside).expect("a directory");
    let limits = json!({ "Chroot": inside, "AllowOverwrite": true, "MaxFileSize": 100 });
    let limits = json!({ "Enabled": true, "FileTransfer": limits });
    let (rig, device) = Setup::new().set("Limits", limits).connected();
    let file = inside.join("f\"ile");
    Rest::upload(&device, &Form::to(&file), b"hello").expect("an upload");
    let up = record(&rig, "direction=upload");
    let path = file.to_str().expect("UTF-8");
    let sha = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
    for (key, value) in [("bytes", "5"), ("result", "ok"), ("sha256", sha)] {
        assert_eq!(up[key], value, "{key}");
    }
    assert_eq!(up["path"], path.replace('"', "\\\""));
    Rest::download(&device, path).expect("a download");
    let down = record(&rig, "direction=download");
    assert_eq!((down["bytes"].as_str(), &down["sha256"]), ("5", &up["sha256"]));

    let mark = rig.daemon.mark();
    Rest::upload(&device, &Form::to(dir.path().join("outside")), b"x").expect_err("outside");
    let denied = parse(&rig.daemon.wait_for_log_after(mark, "event=transfer", SOON));
    assert_eq!((denied["result"].as_str(), denied["bytes"].as_str()), ("denied", "0"));
    assert!(denied["reason"].contains("outside chroot"), "{denied:?}");

    // The log calls a transfer denied that the configuration ends on the way, too.
    let mark = rig.daemon.mark();
    Rest::upload(&device, &Form::to(inside.join("large")), &[0; 100]).expect_err("too large");
    let denied = parse(&rig.daemon.wait_for_log_after(mark, "event=transfer", SOON));
    assert_eq!((denied["result"].as_str(), denied["bytes"].as_str()), ("denied", "100"));

    let mark = rig.daemon.mark();
    let rest = Rest::open(&device);
    rest.announce(&Form::to(inside.join("half"))).expect("announced");
    rest.send(2, "file_chunk", Some(0), b"half");
    rest.close();
    let broken = parse(&rig.daemon.wait_for_log_after(mark, "event=transfer", SOON));
    assert_eq!((broken["result"].as_str(), broken["bytes"].as_str()), ("failed", "4"));
    assert_eq!(broken["reason"], "the session was closed");
    assert_eq!(session_end(&rig, &rest.sid)["reason"], "closed");

    // The agent ends a session that can't read what comes, since nobody reads its answers.
    let mark = rig.daemon.mark();
    let rest = Rest::open(&device);
    rest.announce(&Form::to(inside.join("half"))).expect("announced");
    device.set_reading(Reading::Paused);
    (0..5000).for_each(|_| device.send(CONTROL, "ping", &rest.sid, &[], b""));
    rig.daemon.wait_for_log("inbox full", SOON);
    device.set_reading(Reading::Full);
    let ended = parse(&rig.daemon.wait_for_log_after(mark, "event=transfer", SOON));
    assert_eq!((ended["result"].as_str(), ended["reason"].as_str()), ("failed", "inbox full"));
    assert_eq!(session_end(&rig, &rest.sid)["reason"], "inbox full");
}

/// It was "done", as if nothing were left to do.
#[test]
fn a_session_that_its_client_closes_by_an_error_is_closed() {
    let (rig, device) = Rig::connected();
    let rest = Rest::open(&device);
    let error = map(&[("err", "enough".into()), ("close", true.into())]);
    device.send(CONTROL, "error", &rest.sid, &[], &msg::encode(&error, Ints::Compact));
    assert_eq!(session_end(&rig, &rest.sid)["reason"], "closed");
}

#[test]
fn forwards() {
    let echo = Target::start(Role::Echo);
    let (_refusing, closed) = closed_port();
    let allow = [format!("tcp/127.0.0.1:{}", echo.port()), format!("tcp/127.0.0.1:{closed}")];
    let (rig, device) = Setup::new().set("PortForward", json!({ "Allow": allow })).connected();
    let client = Client::open(&device);
    let connection = client.connect("tcp", "localhost", echo.port()).opened();
    connection.send(b"ping");
    assert_eq!(connection.read(4), b"ping");
    connection.stop();
    let done = record(&rig, "event=forward");
    let address = format!("127.0.0.1:{}", echo.port());
    for (key, value) in [
        ("session", client.sid()),
        ("protocol", "tcp"),
        ("target", &format!("localhost:{}", echo.port())),
        ("address", &address),
        ("bytes_in", "4"),
        ("bytes_out", "4"),
        ("result", "closed"),
        ("reason", "client"),
    ] {
        assert_eq!(done[key], value, "{key}");
    }
    for (port, result, why) in [(1, "denied", "access denied"), (closed, "failed", "connection refused")] {
        let mark = rig.daemon.mark();
        client.connect("tcp", "127.0.0.1", port);
        let refused = parse(&rig.daemon.wait_for_log_after(mark, "event=forward", SOON));
        assert_eq!((refused["result"].as_str(), refused["address"].as_str()), (result, ""));
        assert!(refused["reason"].contains(why), "{refused:?}");
    }
    let mark = rig.daemon.mark();
    let connection = client.connect("tcp", "127.0.0.1", echo.port()).opened();
    echo.wait_accepted(2);
    echo.hang_up();
    connection.stopped();
    let ended = parse(&rig.daemon.wait_for_log_after(mark, "event=forward", SOON));
    assert_eq!((ended["result"].as_str(), ended["reason"].as_str()), ("closed", "target"));
}

/// Whatever begins also ends in the log, however the agent is ended.
#[test]
fn each_beginning_has_its_end() {
    let echo = Target::start(Role::Echo);
    let (mut rig, device) = Setup::new().set("Sessions", json!({ "MaxPerUser": 4 })).connected();
    let terminals: Vec<Terminal> = (0..3).map(|_| Terminal::new(&device, Style::Cli)).collect();
    terminals.iter().for_each(Terminal::open);
    let client = Client::open(&device);
    let _connection = client.connect("tcp", "localhost", echo.port()).opened();
    let rest = Rest::open(&device);
    rest.announce(&Form::to(rig.dir.path().join("half"))).expect("announced");
    rig.daemon.signal(Signal::SIGTERM);
    rig.daemon.wait_exit(SOON);
    let records = records(&rig);
    let count = |event: &str| records.iter().filter(|record| record["event"] == event).count();
    assert_eq!((count("session-start"), count("session-end")), (5, 5));
    assert_eq!((count("shell-start"), count("shell-end")), (3, 3));
    assert_eq!((count("forward"), count("transfer")), (1, 1));
}

#[test]
fn the_journal_gets_the_same_with_a_priority() {
    let (rig, device) = Setup::new().journal().connected();
    Terminal::new(&device, Style::Cli).open();
    let line = rig.daemon.wait_for_log("event=shell-start", SOON);
    assert!(line.starts_with("<6>level=info msg=audit event=shell-start session="), "{line}");
}

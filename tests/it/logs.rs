//! The log: its form, and what must never be in it.

use nix::sys::signal::Signal;

use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::msg::SHELL;
use crate::harness::rig::{Rig, Setup, TOKEN};
use crate::harness::wait::SOON;

/// Splits a line into its time stamp (if there is one), level and message.
fn parse(line: &str) -> Option<(Option<&str>, &str, &str)> {
    let (time, rest) = match line.strip_prefix("time=\"") {
        Some(rest) => rest.split_once("\" ").map(|(time, rest)| (Some(time), rest))?,
        None => (None, line),
    };
    let (level, rest) = rest.strip_prefix("level=")?.split_once(' ')?;
    let message = rest.strip_prefix("msg=\"")?.strip_suffix('"')?;
    Some((time, level, message))
}

fn check(line: &str, stamped: bool) {
    // The journal takes a priority in front.
    let bare = line.strip_prefix('<').and_then(|rest| rest.split_once('>')).map(|(_, rest)| rest);
    let (time, level, message) =
        parse(bare.filter(|_| !stamped).unwrap_or(line)).unwrap_or_else(|| panic!("not a log line: {line}"));
    assert!(["info", "warning", "error", "debug", "trace"].contains(&level), "{line}");
    assert_eq!(time.is_some(), stamped, "{line}");
    if let Some(time) = time {
        let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        let rfc3339 =
            shape.starts_with("0000-00-00T00:00:00") && (shape.ends_with('Z') || shape.contains(":00"));
        assert!(rfc3339, "{line}");
    }
    let mut escaped = false;
    for c in message.chars() {
        assert!(escaped || c != '"', "an unescaped quote: {line}");
        escaped = c == '\\' && !escaped;
    }
}

#[test]
fn lines_look_as_logrus_writes_them() {
    let setup = Setup::new().set("Frobni\"cate", true).flag("--trace");
    let (rig, _device, terminal) = setup.terminal();
    terminal.stop();
    rig.daemon.wait_for_log("Connection established", SOON);
    // Those of the audit log have fields instead, see there.
    rig.daemon.log().iter().filter(|line| !line.contains(" msg=audit ")).for_each(|line| check(line, true));
    let quoted = rig.daemon.wait_for_log("Frobni", SOON);
    assert!(quoted.contains("Frobni\\\""), "quotes are escaped: {quoted}");
}

#[test]
fn the_journal_has_its_own_time_stamps() {
    let (rig, _device) = Setup::new().journal().connected();
    rig.daemon.wait_for_log("Connection established", SOON);
    rig.daemon.log().iter().for_each(|line| check(line, false));
}

#[test]
fn levels_follow_the_flags() {
    let lines = |flag: Option<&str>| {
        let setup = flag.into_iter().fold(Setup::new(), Setup::flag);
        let (rig, _device, terminal) = setup.terminal();
        terminal.stop();
        rig.daemon.wait_for_log("level=info ", SOON);
        let has = |level: &str| rig.daemon.count_log(&format!("level={level} ")) > 0;
        (has("info"), has("debug"), has("trace"))
    };
    assert_eq!(lines(None), (true, false, false));
    let (info, _, trace) = lines(Some("--debug"));
    assert!(info && !trace);
    assert!(lines(Some("--trace")).0);
}

#[test]
fn nothing_secret_at_any_level() {
    let (rig, device) = Setup::new().flag("--trace").connected();
    let mut terminal = Terminal::new(&device, Style::Gui);
    terminal.open_with_prompt();
    terminal.run("echo secret-keystrokes-$((40 + 2))");
    rig.manager.change("second.secret.token", &rig.server.url());
    let device = rig.device();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    rig.daemon.signal(Signal::SIGUSR1);
    rig.daemon.wait_for_log("  sessions: 1", SOON);
    rig.manager.change("", "");
    rig.daemon.wait_for_log("dbusEventLoop terminated", SOON);
    let log = rig.daemon.log().join("\n");
    for secret in [TOKEN, "second.secret.token", "secret-keystrokes", "payload.signature"] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[test]
fn what_is_said_last_is_written() {
    let all_is_written = |_| {
        let (mut rig, device) = Rig::connected();
        for _ in 0..100 {
            device.send(SHELL, "new", &new_sid(), &[("user_id", "one".into())], b"");
        }
        assert!(device.answers(b"all of them", SOON));
        rig.daemon.wait_for_log("event=shell-start", SOON);
        rig.daemon.signal(Signal::SIGTERM);
        assert!(rig.daemon.wait_exit(SOON).success());
        let last = rig.daemon.log();
        assert!(last.iter().any(|line| line.contains("SIGTERM received, ending")), "{last:#?}");
        rig.daemon.count_log("event=shell-start") == rig.daemon.count_log("event=shell-end")
    };
    // A machine that stands still for the quarter of a second that the last lines have may lose them.
    assert!((0..3).any(all_is_written), "three times an end was missing");
}

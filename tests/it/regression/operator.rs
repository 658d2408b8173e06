//! What an operator configures, starts and reads.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Output, Stdio};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::{self, emulated};
use crate::harness::proc;
use crate::harness::rig::{Setup, bash_config, is_root};
use crate::harness::wait::{SOON, eventually, skip};
use crate::token_file::{Place, next_shows};

/// A cursor's movement, C1's form of it, and what turns and breaks text.
const ODD: &str = "\x1b[2J\u{9b}1m\u{202e}\u{2066}\u{200f}\u{2028}\r\x7f";

fn assert_harmless(what: &str, output: &Output) {
    for bytes in [&output.stdout, &output.stderr] {
        let text = String::from_utf8_lossy(bytes);
        let odd = |c: char| c != '\n' && (c.is_control() || ODD.contains(c) && !c.is_ascii());
        assert!(!text.contains(odd), "{what}: {text:?}");
    }
}

/// `check` printed names of users and files, and the command line's errors printed arguments, with what a terminal obeys;
/// the JSON of `doctor` and `status` had characters that turn the text.
#[test]
fn nothing_that_a_terminal_obeys_reaches_it() {
    let dir = tempfile::tempdir().unwrap();
    let name = dir.path().join(ODD);
    let config = name.to_str().unwrap();
    let mut values = bash_config();
    for (key, value) in [("User", json!(ODD)), (ODD, json!(1)), ("Terminal", json!({ ODD: 1 }))] {
        values[key] = value;
    }
    let chroot = json!({ "Enabled": true, "FileTransfer": { "Chroot": ODD, "OwnerPut": ODD, "Umask": ODD } });
    let mut harmless = bash_config();
    harmless["Limits"] = chroot.clone();
    values["Limits"] = chroot;
    let shell = json!({ "ShellCommand": ODD, "Auth": { "Source": ODD } });
    let token =
        json!({ "Source": "file", "TokenFile": format!("/{ODD}"), "ServerURL": format!("http://{ODD}") });
    let mut file = bash_config();
    file["Auth"] = token;
    for text in
        [values.to_string(), harmless.to_string(), shell.to_string(), file.to_string(), ODD.to_owned()]
    {
        fs::write(&name, &text).unwrap();
        for command in [&["check"][..], &["doctor", "--json=false"], &["doctor", "--json"], &["daemon"]] {
            let files = ["--config", config, "--fallback-config", "/nonexistent"];
            let mut agent = daemon::command();
            agent.args(files).args(command).env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path=/{ODD}"));
            // A daemon whose token is missing would wait for it.
            if command != ["daemon"] || !text.contains("TokenFile") {
                let output = agent.stdin(Stdio::null()).output().unwrap();
                assert_harmless(&format!("{command:?} of {text}"), &output);
                if command.contains(&"--json") {
                    serde_json::from_slice::<Value>(&output.stdout).unwrap();
                }
            }
        }
    }
    for args in
        [&[ODD][..], &["help", ODD], &["--", ODD], &[&format!("--{ODD}")], &[&format!("--debug={ODD}")]]
    {
        assert_harmless(&format!("{args:?}"), &daemon::run(args));
    }
    for args in [&["status"][..], &["status", "--json"]] {
        let output = daemon::command().args(args).env("RUNTIME_DIRECTORY", &name).output().unwrap();
        assert_harmless(&format!("{args:?}"), &output);
    }
}

/// The start waited for whoever would write to a FIFO.
#[test]
fn a_fifo_is_no_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    for (main, fallback) in [(fifo.as_path(), Path::new("/nonexistent")), (Path::new("/nonexistent"), &fifo)]
    {
        for command in ["daemon", "check", "doctor"] {
            let mut agent = daemon::command();
            agent.arg("--config").arg(main).arg("--fallback-config").arg(fallback).arg(command);
            agent.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = agent.spawn().unwrap();
            let limit = SOON * 4;
            let status = eventually(limit, "an end", || child.try_wait().unwrap());
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(text.contains("it is no regular file") && status.code() == Some(1), "{command}: {text}");
        }
    }
}

/// Whoever can write the directory can put another configuration there.
#[test]
fn a_directory_that_others_may_write_is_warned_about() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("conf");
    fs::write(&config, bash_config().to_string()).unwrap();
    fs::set_permissions(&config, Permissions::from_mode(0o600)).unwrap();
    for (mode, warned) in [(0o700, false), (0o707, true), (0o1707, false)] {
        fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
        let files = ["--config", config.to_str().unwrap(), "--fallback-config", "/nonexistent", "check"];
        let report = String::from_utf8(daemon::run(&files).stdout).unwrap();
        let text = format!("its directory {} may be written by everybody", dir.path().display());
        assert_eq!(report.contains(&text), warned, "{mode:o}: {report}");
    }
}

/// A token that others can replace is another device's soon, and this device then its account's.
#[test]
fn a_token_that_others_may_replace_is_warned_about() {
    let place = Place::new();
    place.write("token", "one");
    place.mode("token", 0o602);
    let (rig, _device) = place.setup().connected();
    let line = rig.daemon.wait_for_log("token may be replaced: it may be written by everybody", SOON);
    assert!(line.contains("level=warning"), "{line}");
    let mut expected = vec!["may be written by everybody".to_owned()];
    if is_root() {
        std::os::unix::fs::chown(place.path("token"), Some(65_534), None).unwrap();
        fs::write(place.path("token"), "two").unwrap();
        next_shows(&rig, "two");
        rig.daemon
            .wait_for_log("it may be written by its owner, user 65534; it may be written by everybody", SOON);
        expected.push("may be written by its owner, user 65534".to_owned());
    }
    let config = rig.dir.path().join("mender-connect.conf");
    for command in ["check", "doctor"] {
        let args = ["--config", config.to_str().unwrap(), "--fallback-config", "/nonexistent", command];
        // Where doctor finds the daemon it makes no connection of its own.
        let run = rig.dir.path().join("run");
        let output = daemon::command().args(args).env("RUNTIME_DIRECTORY", run).output().unwrap();
        let report = String::from_utf8(output.stdout).unwrap();
        for text in &expected {
            assert!(report.contains(text), "{command}: {report}");
        }
    }
    // It is said again only when it is something else.
    place.mode("token", 0o600);
    let mark = rig.daemon.mark();
    fs::write(place.path("token"), "three").unwrap();
    next_shows(&rig, "three");
    let more = rig.daemon.log()[mark..].iter().filter(|line| line.contains("written by everybody")).count();
    assert_eq!(more, 0);
}
/// As process 1 of a container the agent never reaped the orphans that became its children: 11 zombies of 11 jobs.
#[test]
fn process_1_reaps_orphans_and_nobody_elses_children() {
    if !is_root() {
        return skip("only root can make a process namespace");
    }
    if emulated("the emulator is process 1") {
        return;
    }
    let wrapper = r#"exec unshare --pid --fork --kill-child --mount-proc "$@""#;
    let sessions = json!({ "MaxPerUser": 2, "KeepDetached": 0 });
    let (rig, device, mut terminal) = Setup::new().set("Sessions", sessions).wrapper(wrapper).terminal();
    let [agent] = proc::children(rig.daemon.pid())[..] else { panic!("one agent") };
    let only_shell = || (proc::children(agent).len() == 1).then_some(());
    assert_eq!(terminal.run("(for i in 1 2 3 4 5 6 7 8 9 10 11; do sleep 0.$i & done); echo begun"), "begun");
    assert_eq!(terminal.run("true; echo $?"), "0");
    eventually(SOON, "no child but the shell", only_shell);
    // The same while other shells come and go: each end is still seen, with its status.
    terminal.input("while sleep 0.01; do (true & false &) 2>/dev/null; done &\n");
    for _ in 0..20 {
        let mark = rig.daemon.mark();
        let mut other = Terminal::new(&device, Style::Cli);
        other.open_with_prompt();
        other.input("exit 3\n");
        let line = rig.daemon.wait_for_log_after(mark, "event=shell-end", SOON);
        assert!(line.contains(r#"status="exit status: 3" reason="exited""#), "{line}");
    }
    // Not by Ctrl-C: a shell disregards that when the program it waits for has ended in any other way.
    terminal.input("kill $!\n");
    eventually(SOON, "no child but the shell", only_shell);
    terminal.input("exit\n");
    eventually(SOON, "no child", || proc::children(agent).is_empty().then_some(()));
}

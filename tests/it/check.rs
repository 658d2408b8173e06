//! The command `check`. What it finds is tested in full beside the parser; here is what it prints, its exit
//! status, and that it keeps to itself.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::daemon;
use crate::harness::rig::user_name;
use crate::harness::trace;
use crate::harness::wait::skip;

struct Files {
    dir: TempDir,
}

impl Files {
    fn new(main: Option<&str>, fallback: Option<&str>) -> Files {
        let files = Files { dir: tempfile::tempdir().expect("a temporary directory") };
        for (name, text) in [("main.conf", main), ("fallback.conf", fallback)] {
            if let Some(text) = text {
                fs::write(files.path(name), text).expect("write");
                fs::set_permissions(files.path(name), Permissions::from_mode(0o600)).expect("chmod");
            }
        }
        files
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    fn args(&self, command: &str) -> [String; 5] {
        let [main, fallback] = ["main.conf", "fallback.conf"].map(|name| self.path(name));
        ["--config".into(), main, "--fallback-config".into(), fallback, command.into()]
    }

    fn run(&self, command: &str) -> Output {
        let bus = "unix:path=/nonexistent/bus";
        daemon::command().args(self.args(command)).env("DBUS_SYSTEM_BUS_ADDRESS", bus).output().expect("run")
    }

    /// What `check` prints, and its exit status.
    fn check(&self) -> (String, Option<i32>) {
        let output = self.run("check");
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        (String::from_utf8(output.stdout).expect("UTF-8"), output.status.code())
    }
}

fn check(main: Option<&str>, fallback: Option<&str>) -> (String, Option<i32>) {
    Files::new(main, fallback).check()
}

fn good() -> Value {
    json!({"ShellCommand": "/bin/sh", "ShellArguments": [], "User": user_name()})
}

/// The lines of values: key, value, origin.
fn values(report: &str) -> Vec<(&str, &str, &str)> {
    let lines = report.rsplit("\n\n").next().expect("a paragraph").lines();
    lines
        .map(|line| {
            let (key, rest) = line.split_once(' ').expect("a key");
            let (value, origin) = rest.trim().rsplit_once(' ').expect("a value and its origin");
            (key, value.trim(), origin)
        })
        .collect()
}

#[test]
fn a_report_names_files_values_and_origins() {
    let fallback = json!({"Terminal": {"width": 100}, "User": "nobody-at-all"}).to_string();
    let files = Files::new(Some(&good().to_string()), Some(&fallback));
    let (report, code) = files.check();
    assert_eq!(code, Some(0), "{report}");
    let heads =
        format!("main      {}\nfallback  {}\n\n", files.path("main.conf"), files.path("fallback.conf"));
    assert!(report.starts_with(&heads), "{report}");
    let user = json!(user_name()).to_string();
    for line in [
        ("User", user.as_str(), "main"),
        ("ShellArguments", "[]", "main"),
        ("Terminal.Width", "100", "fallback"),
        ("Terminal.Height", "40", "default"),
        ("Limits.FileTransfer.Counters.MaxBytesTxPerMinute", "0", "default"),
    ] {
        assert!(values(&report).contains(&line), "{line:?}: {report}");
    }
}

#[test]
fn what_the_daemon_refuses_is_an_error_in_its_words() {
    for (main, error) in [
        (None, "please provide a user to run the shell as"),
        (Some(json!({"User": "no-such-user-here"})), "user: unknown user no-such-user-here"),
        (
            Some(json!({"User": user_name(), "Sessions": {"ExpireAfter": -1}})),
            "Sessions.ExpireAfter: expected",
        ),
        (Some(json!({"User": user_name(), "Auth": {"Source": "x"}})), "Auth.Source \"x\" is not known"),
        (Some(json!([])), "expected an object, found an array"),
    ] {
        let text = main.map(|main| main.to_string());
        let files = Files::new(text.as_deref(), None);
        let (report, code) = files.check();
        assert_eq!(code, Some(1), "{report}");
        assert!(report.starts_with(&format!("error: {}: ", files.path("main.conf"))), "{report}");
        assert!(report.contains(error), "{error}: {report}");
        let output = files.run("daemon");
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(1) && log.replace('\\', "").contains(error), "{error}: {log}");
    }
}

#[test]
fn a_syntax_error_tells_where_and_hides_nothing_of_the_other_file() {
    let files = Files::new(Some("{\n  \"User\": \"x\"\n  \"Terminal\": {}\n}"), Some(r#"{"Usr": 1}"#));
    let (report, code) = files.check();
    assert_eq!(code, Some(1));
    let expected = format!(
        "error: {0}: expected `,` or `}}` at line 3 column 3\n\
         warning: {1}: Usr: unknown and ignored; is User meant?\n\n\
         main      {0} (can't be read: not counted in)\nfallback  {1}\n\n",
        files.path("main.conf"),
        files.path("fallback.conf")
    );
    assert!(report.starts_with(&expected), "{report}");
}

#[test]
fn warnings_do_not_count_and_nobody_has_to_read_them() {
    let mut config = good();
    config["Frobnicate"] = json!(1);
    let files = Files::new(Some(&config.to_string()), None);
    let (report, code) = files.check();
    assert!(report.starts_with("warning: ") && code == Some(0), "{report}");
    let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
    let status = daemon::command().args(files.args("check")).stdout(full).status().expect("run");
    assert_eq!(status.code(), Some(0));
}

/// A shell passes what another program writes as a pipe: it can be read once.
#[test]
fn a_pipe_will_do() {
    let script = r#"printf %s "$2" | "$1" --config /dev/stdin --fallback-config /nonexistent check"#;
    let mut command = Command::new("sh");
    daemon::bare(&mut command);
    command.args(["-c", script, "sh"]).arg(daemon::executable()).arg(good().to_string());
    if daemon::emulated("the shell starts the executable itself") {
        return;
    }
    let output = command.output().expect("run");
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn a_server_is_shown_without_user_and_password() {
    let mut config = good();
    config["Auth"] = json!({"Source": "file", "TokenFile": "/t", "ServerURL": "https://me:secret@host/x"});
    let (report, _) = check(Some(&config.to_string()), None);
    assert!(values(&report).contains(&("Auth.ServerURL", "\"https://host/x\"", "main")), "{report}");
    assert!(!report.contains("secret"), "{report}");
}

#[test]
fn the_network_is_not_touched() {
    if !trace::is_possible() {
        return skip("strace is missing");
    }
    let mut config = good();
    config["Auth"] = json!({"Source": "file", "TokenFile": "/t", "ServerURL": "https://localhost:1"});
    config["PortForward"] = json!({"Allow": ["tcp/localhost:22", "tcp/host.invalid:22"]});
    config["Limits"] =
        json!({"Enabled": true, "FileTransfer": {"OwnerPut": "no-such-user", "Chroot": "/no/such"}});
    for (config, sign) in [(config, "unknown user"), (good(), "\"dbus\""), (json!({}), "please provide")] {
        let files = Files::new(Some(&config.to_string()), None);
        let traced = daemon::command();
        let mut command = Command::new("strace");
        command.args(["-f", "-e", "trace=network,execve", "-o", &files.path("trace")]);
        command.arg(traced.get_program()).args(traced.get_args()).args(files.args("check"));
        command.env("DBUS_SYSTEM_BUS_ADDRESS", "tcp:host=localhost,port=1");
        command.envs(["HTTP_PROXY", "HTTPS_PROXY"].map(|name| (name, "http://localhost:1")));
        let output = command.output().expect("run strace");
        let report = String::from_utf8_lossy(&output.stdout);
        assert!(report.contains(sign), "{report}");
        let trace = fs::read_to_string(files.path("trace")).expect("a trace");
        assert!(trace.contains("execve(") && trace.contains("+++ exited"), "{trace}");
        // The name service asks a cache on this machine.
        let local = ["execve(", "+++", "---", "socket(AF_UNIX", "nscd/socket"];
        for line in trace.lines() {
            assert!(local.iter().any(|word| line.contains(word)), "{line}");
        }
    }
}

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    fs::read_to_string(path).expect("read the page")
}

/// The text between a heading and the next of its kind.
fn section<'a>(page: &'a str, heading: &str, next: &str) -> &'a str {
    let (_, rest) = page.split_once(heading).expect(heading);
    rest.split(next).next().expect("a section")
}

#[test]
fn the_example_of_the_page_is_what_it_prints() {
    let page = page();
    let section = section(&page, "## Check the configuration\n", "\n#");
    let block =
        |fence: &str| section.split(fence).nth(1).expect(fence).split("\n```").next().expect("an end");
    let files = Files::new(Some(block("```json\n")), None);
    let expected = block("it prints\n\n```\n").trim_end_matches('…');
    let (report, code) = files.check();
    let report = report
        .replace(&files.path("main.conf"), "/etc/mender/mender-connect.conf")
        .replace(&files.path("fallback.conf"), "/var/lib/mender/mender-connect.conf");
    assert_eq!(report.get(..expected.len()), Some(expected), "{report}");
    assert_eq!(code, Some(1));
}

#[test]
fn every_key_of_the_page_has_its_line_and_the_other_way_round() {
    let page = page();
    let (report, _) = check(Some(&good().to_string()), None);
    let listed: Vec<&str> = values(&report).into_iter().map(|(key, ..)| key).collect();
    let mut documented = Vec::new();
    let section = section(&page, "## Keys\n", "\n## Reload");
    let (first, limits) = section.split_once("## Limits on file transfer").expect("the limits");
    for (table, parent) in [(first, ""), (limits, "Limits.FileTransfer.")] {
        for row in table.lines().filter(|line| line.starts_with("| `")) {
            let keys = row.split('|').nth(1).expect("a column");
            documented.extend(keys.split('`').skip(1).step_by(2).map(|key| format!("{parent}{key}")));
        }
    }
    assert!(documented.len() > 30, "{documented:?}");
    for key in &documented {
        assert!(listed.contains(&key.as_str()), "{key} of the page isn't listed: {report}");
    }
    for key in listed {
        assert!(documented.iter().any(|known| known == key), "{key} isn't in the page's tables");
    }
}

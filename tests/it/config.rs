//! The configuration as the running agent takes it. Its rules are tested in full beside the parser;
//! here are the exact words of every refusal, and that the values arrive.

use std::fs;

use serde_json::json;
use tempfile::TempDir;

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon;
use crate::harness::rig::{Setup, bash_config, user_name};
use crate::harness::wait::SOON;

/// Runs the agent with these files (None: absent) and returns its exit code and log.
fn run(main: Option<&str>, fallback: Option<&str>) -> (Option<i32>, String, TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let paths = [("main.conf", main), ("fallback.conf", fallback)].map(|(name, text)| {
        let path = dir.path().join(name);
        if let Some(text) = text {
            fs::write(&path, text).expect("write");
        }
        path.display().to_string()
    });
    let output = daemon::command()
        .args(["--config", &paths[0], "--fallback-config", &paths[1], "daemon"])
        .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
        .output()
        .expect("run");
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned(), dir)
}

fn refused(config: &str, expected: &str) {
    let (code, log, _dir) = run(Some(config), None);
    assert_eq!(code, Some(1), "{config}: {log}");
    assert!(log.contains(expected), "{config} should be refused with {expected:?}: {log}");
}

#[test]
fn every_validation_has_its_words() {
    let user = user_name();
    refused(
        &json!({"ShellCommand": "bash", "User": user}).to_string(),
        "given shell (bash) is not an absolute path",
    );
    refused(
        &json!({"ShellCommand": "/etc/passwd", "User": user}).to_string(),
        "given shell (/etc/passwd) is not executable",
    );
    refused(
        &json!({"ShellCommand": "/no/such/shell", "User": user}).to_string(),
        "given shell (/no/such/shell) is not executable",
    );
    refused(r#"{"ShellCommand": "/bin/sh"}"#, "please provide a user to run the shell as");
    refused(r#"{"ShellCommand": "/bin/sh", "User": ""}"#, "please provide a user to run the shell as");
    refused(
        r#"{"ShellCommand": "/bin/sh", "User": "no-such-user-here"}"#,
        "user: unknown user no-such-user-here",
    );
    refused(
        &json!({"ShellCommand": "/bin/cat", "User": user}).to_string(),
        "ShellCommand /bin/cat is not present in /etc/shells",
    );
    // The order: the shell is looked at before the user.
    refused(r#"{"ShellCommand": "bash"}"#, "given shell (bash) is not an absolute path");
    refused(
        &json!({"ShellCommand": "bash", "User": user, "Terminal": {"Disable": true}}).to_string(),
        "given shell (bash) is not an absolute path",
    );
}

#[test]
fn files_that_cannot_be_read_as_configuration() {
    let syntax = "Error parsing mender configuration file: ";
    for text in ["", "{", "hello", "{} trailing", "{\"User\": \"root\",}", "{}{}"] {
        refused(text, syntax);
    }
    let types = "Error parsing config file: ";
    for text in [
        r#"{"User": 5}"#,
        r#"{"Terminal": {"Width": 70000}}"#,
        r#"{"Terminal": {"Width": -1}}"#,
        r#"{"ReconnectIntervalSeconds": "5"}"#,
        r#"{"Sessions": {"ExpireAfter": 4294967296}}"#,
        r#"{"ShellArguments": "--login"}"#,
        r#"{"ServerURL": 5}"#,
        "[]",
    ] {
        refused(text, types);
    }
    let (code, log, dir) = run(Some("{"), None);
    assert_eq!(code, Some(1));
    let expected =
        format!("Error loading configuration from file: {} (", dir.path().join("main.conf").display());
    assert!(log.contains(&expected), "{log}");
    // A broken fallback file is as fatal, and so is one that is no file.
    let (code, log, _dir) = run(None, Some("{"));
    assert!(code == Some(1) && log.contains(syntax), "{log}");
    let output = daemon::run(&["--config", "/", "--fallback-config", "/nonexistent", "daemon"]);
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(log.contains("Error loading configuration from file: / ("), "{log}");
}

#[test]
fn without_files_the_user_is_missing() {
    let (code, log, _dir) = run(None, None);
    assert_eq!(code, Some(1));
    assert!(log.contains("No configuration files present. Using defaults"), "{log}");
    assert!(log.contains("please provide a user to run the shell as"), "{log}");
}

#[test]
fn the_main_file_wins_field_by_field() {
    let user = user_name();
    let fallback = json!({
        "ShellCommand": "/no/such/shell", "User": user, "Terminal": {"Width": 111, "Height": 99},
        "ShellArguments": ["-c", "echo fallback"],
    });
    let main = json!({
        "SHELLCOMMAND": "/bin/sh", "terminal": {"height": 33, "WIDTH": null}, "shellArguments": ["-c", "stty size"],
    });
    let setup = Setup::new().config(main);
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("fallback.conf");
    fs::write(&file, fallback.to_string()).expect("write");
    // The rig's own fallback file doesn't exist; the last flag counts.
    let (_rig, device) = setup.fallback(&file).connected();
    let mut terminal = Terminal::new(&device, Style::Gui);
    terminal.send("new", &[], b"");
    terminal.expect("new", 1, Some("Shell started"));
    assert_eq!(terminal.read_until("\n", SOON), "33 111\r\n");
}

#[test]
fn deprecated_and_unknown_keys_are_warned_about() {
    let mut config = bash_config();
    for (key, value) in [
        ("ServerURL", json!("https://old.example")),
        ("Servers", json!([{"ServerURL": "https://old.example"}])),
        ("ClientProtocol", json!("https")),
        ("HttpsClient", json!({"Certificate": "/c"})),
        ("SkipVerify", json!(true)),
        ("ServerCertificate", json!("/c")),
        ("Frobnicate", json!({"Deep": 1})),
    ] {
        config[key] = value;
    }
    config["Terminal"] = json!({"Wdith": 100});
    let (rig, _device) = Setup::new().config(config).connected();
    for name in ["ServerURL", "Servers", "ClientProtocol", "HTTPSClient", "SkipVerify", "ServerCertificate"] {
        let line = rig.daemon.wait_for_log(&format!("{name} field is deprecated, ignoring."), SOON);
        assert!(line.contains("level=warning"), "{line}");
    }
    for name in ["Frobnicate", "Wdith"] {
        let line = rig.daemon.wait_for_log(name, SOON);
        assert!(line.contains("level=warning"), "{line}");
    }
}

#[test]
fn defaults_are_mentioned() {
    let (rig, _device) = Setup::new().config(json!({"User": user_name(), "SkipVerify": false})).connected();
    rig.daemon.wait_for_log("Defaulting ExpireAfterIdle to 10m0s", SOON);
    let warnings: Vec<String> =
        rig.daemon.log().into_iter().filter(|l| l.contains("level=warning")).collect();
    assert!(warnings.iter().any(|l| l.contains("ShellCommand")), "{warnings:?}");
    assert!(warnings.iter().any(|l| l.contains("ShellArguments")), "{warnings:?}");
    assert_eq!(rig.daemon.count_log("deprecated"), 0);
}

#[test]
fn empty_shell_arguments_are_kept() {
    let (_rig, device) = Setup::new()
        .config(json!({"ShellCommand": "/bin/sh", "ShellArguments": [], "User": user_name()}))
        .connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("tr '\\000' '|' </proc/$$/cmdline"), "/bin/sh|");
}

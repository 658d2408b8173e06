//! The command line: commands, Go's flag syntax, exit codes.

use std::process::Output;

use crate::harness::daemon::run;

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn version_in_all_its_forms() {
    for args in [&["version"][..], &["--version"], &["-version"], &["-v"]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        let text = stdout(&output);
        assert!(text.starts_with(VERSION), "{args:?}: {text}");
        assert!(text.contains("\ttarget: "), "the target is named: {text:?}");
        assert!(text.ends_with('\n') && text.trim_end().lines().count() == 1, "one line: {text:?}");
    }
}

#[test]
fn help_in_all_its_forms() {
    for args in [&[][..], &["help"], &["h"], &["--help"], &["-help"], &["-h"], &["--debug"]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
        let text = stdout(&output);
        for word in ["daemon", "version", "--config", "--fallback-config", "--debug", "--trace"] {
            assert!(text.contains(word), "{args:?} names {word}: {text}");
        }
    }
}

#[test]
fn an_unknown_command_exits_with_3() {
    for args in [&["frobnicate"][..], &["--debug", "frobnicate"]] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(3), "{args:?}");
        assert!(stderr(&output).contains("No help topic for 'frobnicate'"), "{}", stderr(&output));
    }
}

#[test]
fn bad_flags_exit_with_1() {
    for args in [
        &["--frobnicate"][..],
        &["-x", "daemon"],
        &["daemon", "--debug"],
        &["daemon", "--config", "/nonexistent"],
        &["--config"],
        &["--debug=maybe", "daemon"],
    ] {
        let output = run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}{}", stdout(&output), stderr(&output));
        assert!(!stderr(&output).is_empty(), "{args:?} is explained");
    }
}

/// Which file was read shows in what is wrong with it.
#[test]
fn flags_take_one_dash_or_two_and_equals_or_space() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("marked.conf");
    std::fs::write(&file, r#"{"ShellCommand": "marked-shell", "User": "root"}"#).expect("write");
    let file = file.to_str().expect("UTF-8");
    let none = "/nonexistent/conf";
    let joined = |flag: &str| format!("{flag}={file}");
    for args in [
        vec!["--config", file, "--fallback-config", none, "daemon"],
        vec!["-config", file, "-fallback-config", none, "daemon"],
        vec![&joined("--config"), "--fallback-config=/nonexistent/conf", "daemon"],
        vec![&joined("-config"), "-b", none, "daemon"],
        vec!["-c", file, "-b", none, "daemon"],
        vec![&joined("-c"), "-b=/nonexistent/conf", "daemon"],
        vec![&joined("--c"), "--b", none, "daemon"],
        vec!["-c", none, "-b", file, "daemon"],
        vec!["-c", none, "--fallback-config", file, "daemon"],
        vec!["-c", "/other", "-c", file, "-b", none, "daemon"],
        vec!["--debug", "-c", file, "-b", none, "daemon"],
        vec!["--debug=false", "-d=true", "-c", file, "-b", none, "daemon"],
        vec!["-trace", "-c", file, "-b", none, "daemon"],
        vec!["--dd", "-c", file, "-b", none, "daemon"],
        vec!["-dd", "-c", file, "-b", none, "daemon"],
    ] {
        let output = run(&args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let expected = "given shell (marked-shell) is not an absolute path";
        assert!(stderr(&output).contains(expected), "{args:?}: {}", stderr(&output));
    }
}

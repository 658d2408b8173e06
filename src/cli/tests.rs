use std::path::Path;

use super::*;

fn run(line: &str) -> Invocation {
    parse(line.split_whitespace().map(OsString::from))
}

fn options(line: &str) -> Options {
    match run(line) {
        Invocation::Daemon(options) => options,
        other => panic!("{line}: {other:?}"),
    }
}

fn printed(line: &str) -> String {
    match run(line) {
        Invocation::Print(text) => text,
        other => panic!("{line}: {other:?}"),
    }
}

fn refused(line: &str) -> (String, u8) {
    match run(line) {
        Invocation::Refuse(text, code) => (text, code),
        other => panic!("{line}: {other:?}"),
    }
}

fn help_for(command: &str) -> String {
    help_of(find(command.as_ref()).unwrap())
}

/// Returns the complaint about the flags and the help that follows it.
fn usage(line: &str) -> (String, String) {
    let (text, code) = refused(line);
    let (error, help) = text.strip_prefix("Incorrect Usage: ").unwrap().split_once("\n\n").unwrap();
    assert_eq!(code, 1);
    (error.to_owned(), help.to_owned())
}

#[test]
fn daemon_alone_has_the_defaults() {
    let expected = Options {
        config: "/etc/mender/mender-connect.conf".into(),
        fallback_config: "/var/lib/mender/mender-connect.conf".into(),
        ..Options::default()
    };
    assert_eq!(expected.level(), LevelFilter::Info);
    assert_eq!(options("daemon"), expected);
    assert_eq!(options("-- daemon"), expected);
    assert_eq!(options("daemon --"), expected);
    let more = Options { topic: Some("and".into()), ..expected };
    assert_eq!(options("daemon and whatever --follows"), more);
    assert!(help().contains(DEFAULT_CONFIG) && help().contains(DEFAULT_FALLBACK_CONFIG));
}

#[test]
fn files_are_taken_in_every_spelling() {
    for spelling in ["--config /x", "-config /x", "--config=/x", "-config=/x", "-c /x", "-c=/x", "--c /x"] {
        assert_eq!(options(&format!("{spelling} daemon")).config, PathBuf::from("/x"), "{spelling}");
    }
    for spelling in ["--fallback-config /x", "-fallback-config=/x", "-b /x", "--b=/x"] {
        assert_eq!(options(&format!("{spelling} daemon")).fallback_config, PathBuf::from("/x"));
    }
    assert_eq!(options("-c /a=b daemon").config, PathBuf::from("/a=b"));
    assert_eq!(options("-c=/a=b daemon").config, PathBuf::from("/a=b"));
    assert_eq!(options("-c -d daemon").config, PathBuf::from("-d"));
    assert_eq!(options("-c= daemon").config, PathBuf::new());
    assert_eq!(options("-c /a -config /b daemon").config, PathBuf::from("/b"), "the last wins");
}

#[test]
fn files_need_not_be_utf8() {
    let file = OsStr::from_bytes(b"/\xff=\xfe").to_owned();
    let mut attached = OsString::from("--fallback-config=");
    attached.push(&file);
    let args = ["-c".into(), file.clone(), attached, "daemon".into()];
    let Invocation::Daemon(options) = parse(args) else { panic!("not a daemon") };
    assert_eq!(options.config, PathBuf::from(&file));
    assert_eq!(options.fallback_config, PathBuf::from(&file));
}

#[test]
fn trace_wins_over_debug() {
    for (line, level) in [
        ("--debug", LevelFilter::Debug),
        ("-d", LevelFilter::Debug),
        ("--trace", LevelFilter::Trace),
        ("--dd", LevelFilter::Trace),
        ("-dd", LevelFilter::Trace),
        ("--trace --debug", LevelFilter::Trace),
        ("-d -dd", LevelFilter::Trace),
        ("--trace=false --debug", LevelFilter::Debug),
        ("--debug --debug=false", LevelFilter::Info),
    ] {
        assert_eq!(options(&format!("{line} daemon")).level(), level, "{line}");
    }
}

#[test]
fn switches_take_go_booleans() {
    for value in ["1", "t", "T", "true", "TRUE", "True"] {
        assert_eq!(options(&format!("--debug={value} daemon")).level(), LevelFilter::Debug);
    }
    for value in ["0", "f", "F", "false", "FALSE", "False"] {
        assert_eq!(options(&format!("--debug={value} daemon")).level(), LevelFilter::Info);
    }
    for value in ["x", "", "yes", "tRUE"] {
        let expected = format!("invalid boolean value \"{value}\" for -debug: parse error");
        assert_eq!(usage(&format!("--debug={value} daemon")), (expected, help()));
    }
    assert_eq!(usage("-d=2 daemon").0, "invalid boolean value \"2\" for -d: parse error");
    // A switch doesn't eat the next argument.
    assert_eq!(refused("--debug false"), ("No help topic for 'false'\n".into(), 3));
}

#[test]
fn wrong_flags_are_usage_errors() {
    for (line, error) in [
        ("--bogus daemon", "flag provided but not defined: -bogus"),
        ("-x", "flag provided but not defined: -x"),
        ("--bogus=1 daemon", "flag provided but not defined: -bogus"),
        ("--version --bogus", "flag provided but not defined: -bogus"),
        ("--CONFIG /x daemon", "flag provided but not defined: -CONFIG"),
        ("--config", "flag needs an argument: -config"),
        ("-d -b", "flag needs an argument: -b"),
        ("---debug daemon", "bad flag syntax: ---debug"),
        ("--=x daemon", "bad flag syntax: --=x"),
        ("-=x daemon", "bad flag syntax: -=x"),
    ] {
        assert_eq!(usage(line), (error.to_owned(), help()), "{line}");
    }
}

#[test]
fn global_flags_after_the_command_are_usage_errors() {
    let (error, help) = usage("daemon --debug");
    assert_eq!(error, "flag provided but not defined: -debug");
    assert_eq!(help, help_for("daemon"));
    assert_eq!(usage("daemon -c /x").0, "flag provided but not defined: -c");
    assert_eq!(usage("version --config=/x").0, "flag provided but not defined: -config");
    assert_eq!(usage("help -v").0, "flag provided but not defined: -v");
    assert_eq!(usage("daemon --help=x").0, "invalid boolean value \"x\" for -help: parse error");
}

#[test]
fn version_is_printed_however_it_is_asked_for() {
    let expected = format!("{}\ttarget: {}\n", env!("CARGO_PKG_VERSION"), env!("TARGET"));
    assert!(!env!("TARGET").is_empty());
    for line in ["version", "--version", "-version", "-v", "--version daemon", "-v --debug", "version x"] {
        assert_eq!(printed(line), expected, "{line}");
    }
}

#[test]
fn help_is_printed_however_it_is_asked_for() {
    for line in ["", "help", "h", "--help", "-h", "-help", "--help daemon", "-h -v", "--debug", "--"] {
        assert_eq!(printed(line), help(), "{line}");
    }
    for line in ["help daemon", "h daemon", "daemon --help", "daemon -h", "--debug daemon -h"] {
        assert_eq!(printed(line), help_for("daemon"), "{line}");
    }
    for line in ["help version", "version -h"] {
        assert_eq!(printed(line), help_for("version"), "{line}");
    }
    for line in ["help help", "help h", "help --help", "h -h"] {
        assert_eq!(printed(line), help_for("help"), "{line}");
    }
    assert!(matches!(run("daemon --help=false"), Invocation::Daemon(_)));
}

#[test]
fn unknown_commands_are_named() {
    for line in ["x", "help x", "h x", "--debug x", "-- x", "x --help"] {
        assert_eq!(refused(line), ("No help topic for 'x'\n".into(), 3), "{line}");
    }
    assert_eq!(refused("-"), ("No help topic for '-'\n".into(), 3));
    assert_eq!(refused("-- --debug"), ("No help topic for '--debug'\n".into(), 3));
    let empty = parse([OsString::new()]);
    assert_eq!(empty, Invocation::Refuse("No help topic for ''\n".into(), 3));
}

/// `check FILE && install FILE` installed what nobody had checked.
#[test]
fn the_tools_take_no_arguments() {
    for line in ["check /tmp/new.conf", "doctor x", "status --json x", "check -- x"] {
        let (error, help) = usage(line);
        assert!(error.starts_with("unexpected argument: "), "{line}: {error}");
        assert!(help.contains("--config, go before it"), "{help}");
    }
}

#[test]
fn the_tools_take_their_own_flags() {
    assert!(matches!(run("-c /x check"), Invocation::Check(options) if options.config == Path::new("/x")));
    for (line, expected) in [
        ("doctor", None),
        ("doctor --json", Some(true)),
        ("doctor --json=false", Some(false)),
        ("--debug doctor -json", Some(true)),
    ] {
        assert!(matches!(run(line), Invocation::Doctor(options) if options.json == expected), "{line}");
    }
    for (line, json, watch) in [
        ("status", None, false),
        ("status --json", Some(true), false),
        ("status --watch", None, true),
        ("status --watch --json --json=false", Some(false), true),
    ] {
        let Invocation::Status(options) = run(line) else { panic!("{line}") };
        assert_eq!((options.json, options.watch), (json, watch), "{line}");
    }
    for line in ["check --json", "doctor --watch", "daemon --json", "status --debug"] {
        let (error, help) = usage(line);
        assert!(error.starts_with("flag provided but not defined"), "{line}: {error}");
        assert!(help.starts_with("NAME:\n   mender-connect "), "{line}: {help}");
    }
    for command in ["check", "doctor", "status"] {
        assert!(help().contains(&format!("   {command} ")));
        assert!(printed(&format!("{command} --help")).contains(command));
    }
}

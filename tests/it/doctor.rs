//! The command `doctor`: what it prints, what it leaves alone, and the steps up to the token. Those from there on are
//! in `doctor_server`.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use nix::fcntl::OFlag;
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use serde_json::{Value, json};

use crate::harness::doctor::{Office, now, text, token, within};
use crate::harness::manager::{Answer, INTERFACE, NAME};
use crate::harness::rig::{Setup, is_root};
use crate::harness::wait::{SOON, skip};

/// Every step there is, in order.
const STEPS: [&str; 16] = [
    "daemon",
    "configuration",
    "shell",
    "user",
    "pty",
    "bus",
    "owner",
    "policy",
    "token",
    "server",
    "dns",
    "tcp",
    "proxy",
    "tls",
    "upgrade",
    "round-trip",
];

/// The exit status, and what comes out where standard output is a terminal.
fn on_a_terminal(mut command: Command) -> (Option<i32>, String) {
    let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC).expect("a PTY");
    grantpt(&master).expect("grant");
    unlockpt(&master).expect("unlock");
    let name = ptsname_r(&master).expect("its name");
    let slave = File::options().read(true).write(true).open(name).expect("open the PTY");
    let mut child = command.stdout(slave).stderr(Stdio::null()).spawn().expect("run doctor");
    drop(command);
    let mut output = Vec::new();
    let mut buffer = [0; 4096];
    let mut master = File::from(std::os::fd::OwnedFd::from(master));
    // The end is EIO.
    while let Ok(count @ 1..) = master.read(&mut buffer) {
        output.extend_from_slice(&buffer[..count]);
    }
    let code = child.wait().expect("wait").code();
    (code, String::from_utf8(output).expect("UTF-8").replace("\r\n", "\n"))
}

#[test]
fn a_good_way_is_walked_to_its_end() {
    let office = Office::open();
    let findings = office.ask();
    findings.assert_good();
    assert_eq!(findings.steps(), STEPS);
    assert_eq!(findings.found("daemon"), "running, waiting");
    assert_eq!(findings.found("token"), format!("{} bytes, expires in 7 days", office.token.len()));
    assert_eq!(findings.found("server"), format!("{}, mender-auth's forwarder", office.server.url()));
    assert!(findings.found("tls").contains("none here"));
    let device = office.server.device();
    assert_eq!(device.wait_pings(1, SOON)[0].1, b"doctor");
    assert_eq!(device.wait_close(SOON).map(|(code, _)| code), Some(1000));
    assert_eq!(office.server.requests().len(), 1);
    assert!(office.manager.calls("FetchJwtToken").is_empty(), "nobody is disturbed");
}

#[test]
fn people_get_text_and_programs_json() {
    let office = Office::open();
    let run = |flags: &[&str]| {
        office.tells("waiting");
        let output = office.command(flags).output().expect("run");
        (output.status.code(), String::from_utf8(output.stdout).expect("UTF-8"))
    };
    let terminal = |flags: &[&str]| {
        office.tells("waiting");
        on_a_terminal(office.command(flags))
    };
    for (code, text) in [terminal(&[]), run(&["--json=false"])] {
        assert_eq!(code, Some(0), "{text}");
        let good: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("✓ ")).collect();
        let names: Vec<_> = good.iter().map(|line| line.split(':').next().expect("a name")).collect();
        assert_eq!(names, STEPS, "{text}");
        office.assert_secret(&text);
    }
    for (code, text) in [terminal(&["--json"]), run(&[]), run(&["--json=true"])] {
        assert_eq!(code, Some(0), "{text}");
        let report: Value = serde_json::from_str(&text).expect("JSON");
        assert!(report["steps"][0]["seconds"].is_f64());
    }
    // A warning is no break.
    office.manager.set(&token(now() + 60), &office.server.url());
    let (code, text) = terminal(&[]);
    assert_eq!(code, Some(0), "{text}");
    let (_, end) = text.split_once("\n✓ token: ").expect("the token");
    assert!(end.lines().nth(1).is_some_and(|line| line.starts_with("  ! it expires soon")), "{text}");
    // A break is the last that is said, with what to do.
    office.manager.set("", "");
    for (code, text) in [terminal(&[]), run(&["--json=false"])] {
        assert_eq!(code, Some(1), "{text}");
        let (_, end) = text.split_once("\n✗ token: mender-auth has none").expect("a break");
        assert!(end.contains("\n  Is the device accepted on the server?"), "{text}");
        assert!(!end.contains('✓') && !end.contains('✗'), "{text}");
    }
}

#[test]
fn a_connected_agent_keeps_its_link_and_its_shells() {
    let office = Office::open();
    let (rig, device, mut terminal) = Setup::new().terminal();
    office.manager.set(&office.token, &rig.server.url());
    // It says that it is connected; it says nothing, and is only seen to run; what it says isn't understood.
    for state in [Some("connected"), None, Some("connecting"), Some("dancing"), Some("")] {
        let _ = std::fs::remove_file(office.dir.path().join("status.sock"));
        match state {
            Some("") => office.says("neither this nor that".to_owned()),
            Some(state) => office.tells(state),
            None => {}
        }
        let findings = office.run(office.command(&[]));
        findings.assert_good();
        assert_eq!(findings.steps(), STEPS);
        assert!(findings.found("upgrade").contains("the token is accepted"), "{findings:?}");
    }
    let requests = rig.server.requests();
    assert_eq!(requests.len(), 6);
    for request in &requests[1..] {
        assert_eq!(request.path, requests[0].path);
        assert_eq!(request.header("Authorization"), Some(format!("Bearer {}", office.token).as_str()));
        assert_eq!(request.header("Host"), requests[0].header("Host"));
        for header in ["Upgrade", "Sec-WebSocket-Key", "Sec-WebSocket-Version"] {
            assert_eq!(request.header(header), None, "{header} would end the agent's websocket");
        }
    }
    assert_eq!(terminal.run("echo still here"), "still here");
    drop(device);
}

/// doctor goes the whole way where no daemon runs. Others' daemons are out of sight in a PID namespace; OpenRC's process
/// beside an agent, with the agent's words behind its own, is none.
#[test]
fn without_a_daemon_a_websocket_is_opened() {
    let supervised = r#"
        (exec -a supervise-daemon bash -c 'sleep 60; :' mender-connect --start /usr/bin/mender-connect -- daemon) &
        until grep -aq ^supervise-daemon /proc/$!/cmdline; do :; done
        "$@""#;
    let apart = ["unshare", "--pid", "--fork", "--mount-proc", "bash", "-c", supervised, "bash"];
    if !is_root() || !Command::new(apart[0]).args(&apart[1..]).arg("true").status().is_ok_and(|s| s.success())
    {
        return skip("only root can make a PID namespace");
    }
    let office = Office::open();
    let findings = office.run(within(&apart, &office.command(&[])));
    findings.assert_good();
    assert_eq!(findings.found("daemon"), "not running");
    assert_eq!(office.server.device().wait_close(SOON).map(|(code, _)| code), Some(1000));
    // Without root one can neither ask a daemon nor, on some systems, see its process. It was called running.
    let office = office.env("RUNTIME_DIRECTORY", "/dev/null");
    let findings = office.run(within(&apart, &office.command(&[])));
    findings.assert_good();
    assert_eq!(findings.found("daemon"), "it may be running, its state can't be had: not a directory");
    assert!(findings.found("upgrade").contains("the token is accepted"), "{findings:?}");
}

/// As root one sees what the daemon has that a shell hasn't.
#[test]
fn another_environment_is_noticed() {
    if !is_root() {
        return skip("only root can look into a daemon's environment");
    }
    let office = Office::open();
    let rig = Setup::new().env("HTTPS_PROXY", "http://user:password@proxy.example:3128").start();
    rig.device();
    let findings = office.ask();
    let warnings = findings.warnings("daemon");
    let ours = warnings.split('"').find(|w| w.starts_with(&format!("process {} ", rig.daemon.pid())));
    assert!(ours.is_some_and(|w| w.contains("HTTPS_PROXY") && !w.contains("password")), "{warnings}");
}

#[test]
fn configurations_that_are_wrong() {
    for (key, value, step, words) in [
        ("User", json!(5), "configuration", "User"),
        ("ShellCommand", json!("bash"), "shell", "not an absolute path"),
        ("ShellCommand", json!("/no/shell"), "shell", "not executable"),
        ("ShellCommand", json!("/bin/cat"), "shell", "/etc/shells"),
        ("User", json!(""), "user", "please provide a user"),
        ("User", json!("nobody-of-that-name"), "user", "unknown user nobody-of-that-name"),
    ] {
        let (found, advice) = Office::open().set(key, value).ask().assert_break(step);
        assert!(found.contains(words) && !advice.is_empty(), "{found}: {advice}");
    }
    let dash = Office::open().set("ShellCommand", "/bin/sh").set("ShellArguments", json!(["--login"])).ask();
    dash.assert_good();
    let is_dash = std::fs::canonicalize("/bin/sh").expect("a shell").ends_with("dash");
    assert_eq!(dash.warnings("shell").contains("knows no --login"), is_dash);
}

#[test]
fn terminals_that_cannot_be_had() {
    let mounts = ["unshare", "--mount", "--propagation", "private", "sh", "-c"];
    let no_more = "mount -t devpts -o newinstance,ptmxmode=666,max=1 devpts /dev/pts && \
        mount --bind /dev/pts/ptmx /dev/ptmx && exec 3<>/dev/ptmx && exec \"$@\"";
    let none = "mount --bind /dev/null /dev/ptmx && exec \"$@\"";
    if !is_root() || !Command::new("unshare").args(["--mount", "true"]).status().is_ok_and(|s| s.success()) {
        return skip("only root can make a mount namespace");
    }
    for (script, words) in [(no_more, "kernel.pty.max"), (none, "devpts")] {
        let prefix = [&mounts[..], &[script, "sh"]].concat();
        let office = Office::open();
        let (_, advice) = office.run(within(&prefix, &office.command(&[]))).assert_break("pty");
        assert!(advice.contains(words), "{advice}");
        // Who wants no terminal needs none.
        let office = office.set("Terminal", json!({"Disable": true}));
        office.tells("waiting");
        office.run(within(&prefix, &office.command(&[]))).assert_good();
    }
}

#[test]
fn buses_that_cannot_be_asked() {
    let mut office = Office::open();
    office.manager.vanish();
    office.bus.kill();
    let (found, advice) = office.ask().assert_break("bus");
    assert!(found.contains("No such file") && advice.contains("systemctl status dbus"), "{found}: {advice}");
    let _deaf = UnixListener::bind(office.dir.path().join("bus")).expect("listen");
    let (found, _) = office.ask().assert_break("bus");
    assert!(found.contains("no answer within 5 s"), "{found}");
}

#[test]
fn managers_that_cannot_be_asked() {
    let mut office = Office::open();
    office.manager.vanish();
    let (found, advice) = office.ask().assert_break("owner");
    assert!(found.contains(NAME) && advice.contains("mender-authd"), "{found}: {advice}");

    // Not all that is sent to it: the test has something to tell it, too.
    let denied = format!(
        "<deny send_destination=\"{NAME}\" send_interface=\"{INTERFACE}\" send_member=\"GetJwtToken\"/>"
    );
    office.rebuild_bus(&format!("<policy context=\"mandatory\">{denied}</policy>"));
    office.manager.appear();
    let (found, advice) = office.ask().assert_break("policy");
    assert!(found.contains("ejected") || found.contains("denied"), "{found}");
    assert!(
        advice.contains(if is_root() { "AuthenticationManager.conf" } else { "Run this as root" }),
        "{advice}"
    );
}

#[test]
fn a_manager_that_the_bus_starts_is_waited_for() {
    let mut office = Office::open();
    let dir = text(office.dir.path()).to_owned();
    let service = |office: &mut Office, command| {
        let service = format!("[D-BUS Service]\nName={NAME}\nExec={command}\nUser=root\n");
        office.file(&format!("{NAME}.service"), &service);
        office.rebuild_bus(&format!("<servicedir>{dir}</servicedir>"));
    };
    service(&mut office, "/bin/sleep 8");
    let findings = office.ask();
    assert!(findings.found("owner").contains("the bus starts"), "{findings:?}");
    findings.assert_break("token");
    // `doctor` told the bus's error as mender-auth's answer, and its start by the bus as a good step.
    service(&mut office, "/bin/false");
    let (found, advice) = office.ask().assert_break("owner");
    assert!(found.contains("exited with status 1") && advice.contains("mender-authd"), "{found}: {advice}");
}

#[test]
fn managers_without_a_token() {
    let office = Office::open();
    office.manager.set("", &office.server.url());
    let (found, advice) = office.ask().assert_break("token");
    assert!(found.contains("has none") && advice.contains("accepted on the server"), "{found}: {advice}");
    office.manager.set(&office.token, "");
    let (found, _) = office.ask().assert_break("token");
    assert!(found.contains("names no server"), "{found}");
    for (answer, words) in [
        (Answer::Error("no \x1b[2J at\u{202e} all"), "answers: no \\u001b[2J at\\u202e all"),
        (Answer::WrongTypes, "unexpected types"),
        (Answer::Silent, "in time"),
    ] {
        office.manager.answer_get(answer);
        let (found, advice) = office.ask().assert_break("token");
        assert!(found.contains(words) && advice.contains("mender-authd"), "{found}: {advice}");
    }
}

#[test]
fn of_the_token_only_the_expiry_is_told() {
    let mut office = Office::open();
    for (expiry, found, warning) in [
        (now() - 3 * 3600, "expired 3 h ago", "hardly accept"),
        (now() + 1800 + 30, "expires in 30 min", "expires soon"),
        (now() + 7200 + 60, "expires in 2 h", ""),
    ] {
        office.token = token(expiry);
        office.manager.set(&office.token, &office.server.url());
        let findings = office.ask();
        findings.assert_good();
        assert_eq!(findings.found("token"), format!("{} bytes, {found}", office.token.len()));
        assert!(findings.warnings("token").contains(warning), "{findings:?}");
        assert_eq!(findings.warnings("token") == "[]", warning.is_empty(), "{findings:?}");
    }
    // Not a web token, which is the server's business.
    office.token = "FIRST.SECOND.THIRD".to_owned();
    office.manager.set(&office.token, &office.server.url());
    let findings = office.ask();
    findings.assert_good();
    assert_eq!(findings.found("token"), "18 bytes, no expiry to be read");
    // No header carries it.
    office.token = "FIRST.SEC\nOND.THIRD".to_owned();
    office.manager.set(&office.token, &office.server.url());
    let findings = office.ask();
    assert_eq!(findings.steps().last(), Some(&"token"), "{findings:?}");
}

#[test]
fn tokens_in_files() {
    let mut office = Office::open();
    // Nobody asks it.
    office.manager.vanish();
    office.bus.kill();
    let file = office.file("token", &format!(" {}\n", office.token));
    let auth = |file: &str, url: &str| json!({"Source": "file", "TokenFile": file, "ServerURL": url});
    let url = office.server.url();
    let office = office.set("Auth", auth(text(&file), &url));
    let mode = |mode| std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).expect("chmod");
    mode(0o600);
    let findings = office.ask();
    findings.assert_good();
    assert_eq!(findings.warnings("file"), "[]");
    assert!(findings.found("token").starts_with(&format!("{} bytes", office.token.len())));
    assert!(!findings.steps().contains(&"bus"));
    // A program of the device, such as stunnel, may listen there.
    assert_eq!(findings.found("server"), url);
    assert!(!findings.0.to_string().contains("mender-auth"), "{findings:?}");
    mode(0o604);
    assert!(office.ask().warnings("file").contains("others than its owner"));
    for empty in ["", "\n"] {
        office.file("token", empty);
        let (found, _) = office.ask().assert_break("file");
        assert!(found.contains("empty"), "{found}");
    }
    std::fs::remove_file(&file).expect("remove");
    let (found, _) = office.ask().assert_break("file");
    assert!(found.contains("no such file"), "{found}");
    let (found, _) = office.set("Auth", auth("/etc", &url)).ask().assert_break("file");
    assert!(found.contains("it is no regular file"), "{found}");
}

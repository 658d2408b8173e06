//! `mender-connect status`: what it tells, against the truth, as JSON, as text and on a screen.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::files::pattern;
use crate::forwards::assert_echo;
use crate::harness::client::{Style, Terminal};
use crate::harness::forward::Client;
use crate::harness::msg::FILES;
use crate::harness::rest::{Form, Rest, path_body};
use crate::harness::rig::{Rig, Setup, TOKEN, script_config};
use crate::harness::server::Reply;
use crate::harness::targets::{Role, Target, UdpEcho, stream};
use crate::harness::wait::{SOON, Watched, eventually, millis};
use crate::harness::{proc, pty};

/// What people read.
fn text(rig: &Rig) -> String {
    let output = rig.status_command(&[]).output().expect("run mender-connect");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn between(value: &Value, least: f64, most: f64) -> bool {
    value.as_f64().is_some_and(|value| (least..=most).contains(&value))
}

fn no_sessions(rig: &Rig) {
    eventually(SOON, "the session to end", || (rig.status()["sessions"] == json!([])).then_some(()));
}

/// These fields have these values.
fn assert_has(thing: &Value, expected: &Value) {
    for (key, value) in expected.as_object().expect("fields") {
        assert_eq!(&thing[key], value, "{key} of {thing}");
    }
}

#[test]
fn the_daemon_and_its_connection() {
    let (rig, _device) = Rig::connected();
    rig.daemon.wait_for_log("Connection established", SOON);
    let status = rig.status();
    let age = rig.daemon.started.elapsed().as_secs_f64();
    assert_has(
        &status,
        &json!({ "version": env!("CARGO_PKG_VERSION"), "pid": rig.daemon.pid(), "sessions": [] }),
    );
    assert!(between(&status["uptime"], 0.0, age), "{status}");
    let connection = &status["connection"];
    assert_has(
        connection,
        &json!({ "state": "connected", "server": rig.server.url(), "failed_attempts": 0 }),
    );
    assert_has(connection, &json!({ "next_attempt_in": null, "last_error": null, "last_error_age": null }));
    assert!(between(&connection["for"], 0.0, status["uptime"].as_f64().unwrap()), "{status}");
    assert_eq!(status["token"], json!({ "source": "dbus", "length": TOKEN.len() }));
    assert_eq!(status["shells"], json!({ "running": 0, "max": 16 }));
    let nothing = json!({ "bytes_in": 0, "bytes_out": 0, "average_in": 0.0, "average_out": 0.0 });
    assert_eq!(status["transferred"], nothing);
    let text = text(&rig);
    assert!(text.contains(&format!("connected ({}) for ", rig.server.url())), "{text}");
    assert!(text.contains("token of 24 bytes from dbus\nshells 0 of 16, files 0 B in, 0 B out\n"), "{text}");
}

#[test]
fn attempts_that_fail_and_the_next_one() {
    let setup = Setup::new().set("ReconnectIntervalSeconds", 300);
    let rig = setup.start_with(|server| server.script([Reply::status(500), Reply::status(500)]));
    rig.daemon.wait_for_log("connectionmanager backoff", SOON);
    let connection = rig.status()["connection"].clone();
    assert_has(&connection, &json!({ "state": "waiting", "failed_attempts": 1 }));
    assert!(between(&connection["next_attempt_in"], 0.0, 300.0), "{connection}");
    assert!(connection["last_error"].as_str().unwrap().contains("500"), "{connection}");
    assert!(between(&connection["last_error_age"], 0.0, SOON.as_secs_f64()), "{connection}");
    let mark = rig.daemon.mark();
    rig.daemon.signal(Signal::SIGHUP);
    rig.daemon.wait_for_log_after(mark, "connectionmanager backoff", SOON);
    assert_eq!(rig.status()["connection"]["failed_attempts"], 2);
    let text = text(&rig);
    assert!(text.contains(", 2 failed\n") && text.contains("s ago: ") && text.contains("500"), "{text}");
    // The error is still told when there is a connection, the attempts are forgotten.
    rig.daemon.signal(Signal::SIGHUP);
    rig.device();
    rig.daemon.wait_for_log("Connection established", SOON);
    let connection = rig.status()["connection"].clone();
    assert_has(&connection, &json!({ "state": "connected", "failed_attempts": 0 }));
    assert!(connection["last_error"].as_str().unwrap().contains("500"), "{connection}");
}

#[test]
fn a_device_without_authorisation_and_a_token_that_is_not_told() {
    let rig = Setup::new().token("").url("").start();
    rig.manager.wait_calls("GetJwtToken", 1, SOON);
    let status = rig.status();
    assert_has(&status["connection"], &json!({ "state": "unauthorized", "server": null }));
    assert_eq!(status["token"]["length"], Value::Null);
    assert!(text(&rig).contains("\nno token from dbus\n"));
    rig.manager.change("very-secret", &rig.server.url().replace("http://", "http://me:word@"));
    rig.device();
    rig.daemon.wait_for_log("Connection established", SOON);
    let status = rig.status();
    assert_eq!(status["connection"]["server"], rig.server.url());
    assert_eq!(status["token"]["length"], 11);
    for told in [status.to_string(), text(&rig)] {
        assert!(!told.contains("secret") && !told.contains("word"), "{told}");
    }
}

#[test]
fn a_shell() {
    let (rig, device) = Setup::new().config(script_config("exec cat")).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.input("hello\n");
    terminal.read_until("hello\r\nhello\r\n", SOON);
    let status = rig.status();
    assert_eq!(status["shells"]["running"], 1);
    let session = &status["sessions"][0];
    assert_has(session, &json!({ "id": terminal.sid, "user": terminal.user, "kinds": ["terminal"] }));
    assert_has(session, &json!({ "transfers": [], "forwards": [], "forwards_open": 0 }));
    let shell = &session["shell"];
    assert_has(shell, &json!({ "user": terminal.user, "pid": proc::children(rig.daemon.pid())[0] }));
    for thing in [session, shell] {
        assert_has(thing, &json!({ "bytes_in": 6, "bytes_out": 14 }));
        let age = thing["age"].as_f64().unwrap();
        assert!(between(&thing["idle"], 0.0, age), "{thing}");
        assert!(age < rig.daemon.started.elapsed().as_secs_f64(), "{thing}");
    }
    // It is idle until something is typed.
    let idle = |rig: &Rig| {
        let session = rig.status()["sessions"][0].clone();
        assert!(session["idle"].as_f64() <= session["shell"]["idle"].as_f64(), "{session}");
        session["shell"]["idle"].as_f64().unwrap()
    };
    let before = eventually(SOON, "it to be idle", || Some(idle(&rig)).filter(|idle| *idle > 1.0));
    terminal.input("x\n");
    terminal.read_until("x\r\nx\r\n", SOON);
    assert!(idle(&rig) < before);
    terminal.stop();
    no_sessions(&rig);
    assert_eq!(rig.status()["shells"]["running"], 0);
}

#[test]
fn an_upload_and_its_progress() {
    let (rig, device) = Rig::connected();
    let path = rig.dir.path().join("up\u{1b}[2J\u{9b}");
    let rest = Rest::open(&device);
    rest.announce(&Form { size: Some(1_000_000), ..Form::to(&path) }).unwrap();
    rest.send(FILES, "file_chunk", Some(0), &pattern(250_000));
    let session = eventually(SOON, "a quarter to have come", || {
        Some(rig.status()["sessions"][0].clone()).filter(|s| s["transfers"][0]["bytes"] == 250_000)
    });
    let transfer = &session["transfers"][0];
    assert_has(transfer, &json!({ "direction": "upload", "size": 1_000_000, "path": path.to_str() }));
    assert!(transfer["age"].as_f64() <= session["age"].as_f64(), "{session}");
    assert_has(&session, &json!({ "kinds": ["files"], "bytes_in": 250_000, "shell": null }));
    assert_eq!(rig.status()["transferred"]["bytes_in"], 250_000);
    // Nothing that a terminal obeys.
    let text = text(&rig);
    assert!(text.contains(r"up\u{1b}[2J\u{9b}, 25 % of 976.5 KiB"), "{text}");
    let json = String::from_utf8(rig.status_command(&["--json"]).output().unwrap().stdout).unwrap();
    assert!(json.contains(r"up\u001b[2J\u009b") && !json.trim_end().contains(char::is_control), "{json:?}");
    rest.close();
    no_sessions(&rig);
}

#[test]
fn a_download_that_nobody_acknowledges() {
    let (rig, device) = Rig::connected();
    let path = rig.dir.path().join("down");
    std::fs::write(&path, pattern(20_000_000)).unwrap();
    let rest = Rest::open(&device);
    rest.ask("get_file", &path_body(path.to_str().unwrap()));
    let mut sent = 0;
    let session = eventually(SOON, "all that was sent to have come", || {
        while let Some(Ok(chunk)) = device.try_take(millis(500), |m| m.sid.as_ref() == Some(&rest.sid)) {
            assert_eq!(chunk.typ, "file_chunk");
            sent += chunk.body.map_or(0, |body| body.len());
        }
        Some(rig.status()["sessions"][0].clone()).filter(|session| session["bytes_out"] == sent)
    });
    assert!((1..20_000_000).contains(&sent), "{sent} bytes");
    assert_has(
        &session["transfers"][0],
        &json!({ "direction": "download", "size": 20_000_000, "path": path.to_str(), "bytes": sent }),
    );
    assert_eq!(rig.status()["transferred"]["bytes_out"], sent);
    let text = text(&rig);
    assert!(text.contains(&format!("/down, {} % of 19.0 MiB", sent * 100 / 20_000_000)), "{text}");
    rest.send(FILES, "error", None, b"");
    eventually(SOON, "the transfer to end", || {
        (rig.status()["sessions"][0]["transfers"] == json!([])).then_some(())
    });
}

#[test]
fn forwards() {
    let (rig, device) = Rig::connected();
    let client = Client::open(&device);
    let (target, datagrams) = (Target::start(Role::Echo), UdpEcho::start());
    let tcp = client.connect("tcp", "localhost", target.port()).opened();
    assert_echo(&tcp, &stream(0, 1000));
    let udp = client.connect("udp", "127.0.0.1", datagrams.port()).opened();
    udp.send(b"datagram");
    assert_eq!(udp.next(SOON).as_deref(), Some(b"datagram".as_slice()));
    let session = rig.status()["sessions"][0].clone();
    assert_has(&session, &json!({ "id": client.sid(), "kinds": ["forwards"], "forwards_open": 2 }));
    assert_has(&session, &json!({ "bytes_in": 1008, "bytes_out": 1008 }));
    for (n, protocol, host, port, bytes) in
        [(0, "tcp", "localhost", target.port(), 1000), (1, "udp", "127.0.0.1", datagrams.port(), 8)]
    {
        let forward = &session["forwards"][n];
        assert_has(forward, &json!({ "protocol": protocol, "target": format!("{host}:{port}") }));
        assert_has(forward, &json!({ "address": format!("127.0.0.1:{port}") }));
        assert_has(forward, &json!({ "bytes_in": bytes, "bytes_out": bytes }));
        assert!(forward["idle"].as_f64() <= forward["age"].as_f64(), "{forward}");
        assert!(forward["age"].as_f64() <= session["age"].as_f64(), "{session}");
    }
    let text = text(&rig);
    let line = format!("  tcp localhost:{0} (127.0.0.1:{0}), ", target.port());
    assert!(text.contains(&line) && text.contains("1000 B in, 1000 B out\n"), "{text}");
    tcp.stop();
    let session = rig.status()["sessions"][0].clone();
    assert_has(&session, &json!({ "forwards_open": 1, "bytes_in": 1008 }));
    assert_eq!(session["forwards"][0]["protocol"], "udp");
}

#[test]
fn more_forwards_than_are_told_of() {
    let (rig, device) = Rig::connected();
    let target = Target::start(Role::Echo);
    let clients = [(); 3].map(|()| Client::open(&device));
    for client in &clients {
        let connections = [(); 400].map(|()| client.connect("tcp", "127.0.0.1", target.port()));
        connections.into_iter().for_each(|connection| drop(connection.opened()));
    }
    let status = rig.status();
    let count = |session: &Value| session["forwards"].as_array().unwrap().len();
    let counts: Vec<_> = status["sessions"].as_array().unwrap().iter().map(count).collect();
    assert_eq!(counts, [400, 400, 224]);
    assert_eq!(status["sessions"][2]["forwards_open"], 400);
    assert!(text(&rig).ends_with("  and 176 connections more\n"));
}

/// `status --watch` in a terminal of its own.
struct Screen {
    child: Child,
    keyboard: File,
    text: Arc<Watched<String>>,
}

impl Screen {
    fn start(status: &Command) -> Screen {
        let (master, slave) = pty::open_pair(OFlag::empty());
        let mut command = pty::session_on(&slave);
        command.arg(status.get_program()).args(status.get_args());
        command.envs(status.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let child = command.spawn().expect("start setsid");
        let keyboard = File::from(OwnedFd::from(master));
        let text = pty::screen(&keyboard);
        Screen { child, keyboard, text }
    }

    /// Waits for a picture that has this in it, and says how many there were until then.
    fn wait_for(&self, text: &str) -> usize {
        let found = self.text.wait(SOON, |screen| {
            let pictures: Vec<_> = screen.split("\x1b[H").skip(1).collect();
            let complete = |picture: &&str| picture.contains(text) && picture.ends_with("\x1b[J");
            pictures.last().is_some_and(complete).then_some(pictures.len())
        });
        found.unwrap_or_else(|| panic!("waited in vain for {text:?}: {:?}", self.text.peek(Clone::clone)))
    }
}

#[test]
fn a_watch_redraws_and_ends_by_an_interrupt() {
    let setup = Setup::new();
    let (mut rig, device) = Setup::new().connected();
    let mut screen = Screen::start(&rig.status_command(&["--watch"]));
    let drawn = screen.wait_for("shells 0 of 16");
    // Meant for the daemon: `kill -USR1 $(pidof mender-connect)`.
    kill(Pid::from_raw(screen.child.id() as i32), Signal::SIGUSR1).expect("kill");
    let terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    assert!(screen.wait_for("shells 1 of 16") > drawn);
    screen.wait_for(&format!("{}  user {}\x1b[K", terminal.sid, terminal.user));
    rig.daemon.signal(Signal::SIGKILL);
    rig.daemon.wait_exit(SOON);
    screen.wait_for("status.sock: connection refused");
    rig.restart(&setup);
    screen.wait_for("shells 0 of 16");
    screen.keyboard.write_all(b"\x03").expect("type");
    let status = screen.child.wait().expect("its end");
    assert_eq!(status.signal(), Some(Signal::SIGINT as i32), "{status}");
}

#[test]
fn a_watch_without_a_terminal_ends_with_its_reader() {
    let (mut rig, _device) = Rig::connected();
    for json in [false, true] {
        let flags: &[&str] = if json { &["--watch", "--json"] } else { &["--watch"] };
        let mut child = rig.status_command(flags).stdout(Stdio::piped()).spawn().expect("start");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut next = || lines.next().expect("a line").expect("UTF-8");
        if json {
            let document = |line: String| serde_json::from_str::<Value>(&line).expect("a document");
            let uptime = |line| document(line)["uptime"].as_f64().expect("a number");
            let first = uptime(next());
            assert!(uptime(next()) >= first + 0.9, "one each second");
            rig.daemon.signal(Signal::SIGKILL);
            rig.daemon.wait_exit(SOON);
            let end = document(next());
            assert!(end["error"].as_str().unwrap().ends_with("status.sock: connection refused"), "{end}");
        } else {
            let mut heads = 0;
            while heads < 2 {
                let line = next();
                assert!(!line.contains('\x1b'), "{line:?}");
                heads += usize::from(line.starts_with("mender-connect "));
            }
        }
        drop(lines);
        eventually(SOON, "its end", || child.try_wait().expect("wait"));
    }
}

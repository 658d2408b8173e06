//! The playground in a real terminal, as somebody trying it out would use it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Instant;

use nix::fcntl::{OFlag, open};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use rustix::termios::{Winsize, tcsetwinsize};

use crate::files::{names, pattern};
use crate::harness::daemon;
use crate::harness::http::read_request;
use crate::harness::wait::{SOON, Watched, eventually, millis, secs, skip, spawn};
use crate::harness::{proc, pty};

/// The example's executable; `cargo test` builds it, `cargo test --test it` alone doesn't.
fn playground() -> Option<PathBuf> {
    let me = std::env::current_exe().expect("this program's path");
    let path = me.ancestors().nth(2).expect("target/<profile>").join("examples/playground");
    if !path.is_file() {
        skip(&format!("{} is missing: run cargo test without --test", path.display()));
        return None;
    }
    Some(path)
}

fn size(width: u16, height: u16) -> Winsize {
    Winsize { ws_row: height, ws_col: width, ws_xpixel: 0, ws_ypixel: 0 }
}

/// A playground that believes to be in somebody's terminal.
struct Session {
    child: Child,
    master: File,
    slave: OwnedFd,
    screen: Arc<Watched<String>>,
    before: Termios,
}

const COLUMNS: u16 = 100;
const ROWS: u16 = 30;

impl Session {
    fn start() -> Option<Session> {
        Session::start_with(&[], "xterm-256color")
    }

    fn start_with(args: &[&str], term: &str) -> Option<Session> {
        let (master, slave) = pty::open_pair(OFlag::empty());
        tcsetwinsize(&slave, size(COLUMNS, ROWS)).expect("its size");
        let before = tcgetattr(&slave).expect("terminal settings");
        let mut command = pty::session_on(&slave);
        command.arg(playground()?).args(args).env("SHELL", "/bin/sh").env("TERM", term);
        let child = command.spawn().expect("start setsid");
        let master = File::from(OwnedFd::from(master));
        let screen = pty::screen(&master);
        let session = Session { child, master, slave, screen, before };
        session.wait_for("Ctrl-] leaves.");
        session.wait_for_prompt();
        Some(session)
    }

    fn screen(&self) -> String {
        self.screen.peek(Clone::clone)
    }

    fn wait_for(&self, text: &str) {
        let found = self.screen.wait(secs(30), |s| s.contains(text).then_some(()));
        assert!(found.is_some(), "waited in vain for {text:?} on the screen:\n{}", self.screen());
    }

    fn wait_for_prompt(&self) {
        self.wait_for_row("a prompt", |rows| {
            let above = rows[..rows.len() - 1].iter().rev().find(|row| !row.is_empty());
            above.filter(|row| row.ends_with(['#', '$'])).map(drop)
        });
    }

    /// Waits for something in the rows of the screen as they are seen.
    fn wait_for_row<T>(&self, what: &str, pick: impl Fn(&[String]) -> Option<T>) -> T {
        let found = self.screen.wait(secs(30), |s| {
            let mut terminal = vt100::Parser::new(ROWS, COLUMNS, 0);
            terminal.process(s.as_bytes());
            let rows: Vec<_> =
                terminal.screen().rows(0, COLUMNS).map(|row| row.trim_end().to_owned()).collect();
            pick(&rows)
        });
        found.unwrap_or_else(|| panic!("waited in vain for {what} on the screen:\n{}", self.screen()))
    }

    /// The download's rate in Mbit/s.
    fn wait_for_rate(&self) -> f64 {
        self.wait_for_row("a rate in the last row", |rows| {
            let (before, _) = rows.last()?.split_once(" Mbit/s")?;
            before.rsplit_once(' ')?.1.parse().ok()
        })
    }

    /// Waits until the last row has all of these.
    fn wait_for_status(&self, parts: &[&str]) -> String {
        let complete = |row: &&String| parts.iter().all(|part| row.contains(part));
        self.wait_for_row(&format!("{parts:?} in the last row"), |rows| rows.last().filter(complete).cloned())
    }

    fn type_in(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).expect("type");
    }

    fn is_raw(&self) -> bool {
        let now = tcgetattr(&self.slave).expect("terminal settings");
        !now.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
    }

    /// The agent's process id, as the banner tells it.
    fn agent(&self) -> u32 {
        let screen = self.screen();
        let line = screen.lines().find(|l| l.trim_start().starts_with("agent ")).expect("the agent's line");
        let pid = line.rsplit_once("pid ").map(|(_, rest)| rest.trim_end_matches(['\r', ')']));
        pid.and_then(|pid| pid.parse().ok()).unwrap_or_else(|| panic!("no pid in {line:?}"))
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Waits for the end; terminal and processes must be as before.
    fn wait_end(mut self) -> (ExitStatus, String) {
        let agent = self.agent();
        let status = eventually(secs(20), "the playground to end", || self.child.try_wait().expect("wait"));
        assert_eq!(
            tcgetattr(&self.slave).expect("terminal settings"),
            self.before,
            "the terminal is restored"
        );
        proc::wait_gone(agent, SOON);
        (status, self.screen())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the screen:\n{}", self.screen());
        }
        // In order, so that a failed test leaves no agent behind; by force only if that fails.
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        let _ = kill(self.pid(), Signal::SIGTERM);
        let deadline = Instant::now() + secs(15);
        while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::park_timeout(millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_session_at_the_terminal() {
    let Some(mut session) = Session::start() else { return };
    assert!(session.is_raw(), "keys go through one by one");
    assert!(proc::exists(session.agent()));
    session.type_in("stty size\r");
    // One row is the status line's.
    session.wait_for("29 100");
    tcsetwinsize(&session.master, size(120, 50)).expect("resize");
    eventually(SOON, "the new size to arrive", || {
        session.type_in("stty size\r");
        session.screen.wait(secs(1), |s| s.contains("49 120").then_some(()))
    });
    session.type_in("cat\r");
    session.type_in("twice\r");
    // Once by the terminal, once by cat, which therefore runs.
    let twice = session.screen.wait(SOON, |s| (s.matches("twice").count() >= 2).then_some(()));
    assert!(twice.is_some(), "cat does not run");
    session.type_in("\u{3}");
    // With the signal the kernel throws away what lies in the PTY; what is typed now may be lost.
    eventually(SOON, "the shell after Ctrl-C", || {
        session.type_in("echo af''ter\r");
        session.screen.wait(secs(1), |s| s.contains("after").then_some(()))
    });
    session.type_in("tty\r");
    session.wait_for("/dev/pts/");
    session.type_in("\u{1d}");
    let (status, screen) = session.wait_end();
    assert_eq!(status.code(), Some(0), "{screen}");
}

#[test]
fn the_shell_outlives_its_connection() {
    let Some(mut session) = Session::start() else { return };
    session.type_in("here=kept; echo so''far\r");
    session.wait_for("sofar");
    session.wait_for_status(&["link up 0:0", "  session ", "  echo ", " ms  ", "  Ctrl-] leave"]);
    session.type_in("\u{1e}");
    session.wait_for_status(&["link cut 0:01", "  Ctrl-^ give it back"]);
    session.type_in("lost\u{1e}");
    session.wait_for("[mender-connect] Reattached to your shell of ");
    session.wait_for_status(&["link back 0:0", "  Ctrl-^ cut"]);
    session.type_in("echo [$here]\r");
    session.wait_for("[kept]");
    session.type_in("\u{1d}");
    assert_eq!(session.wait_end().0.code(), Some(0));
}

#[test]
fn leaving_while_the_link_is_cut() {
    let Some(mut session) = Session::start() else { return };
    session.type_in("\u{1e}");
    session.wait_for_status(&["link cut "]);
    session.type_in("\u{1d}");
    assert_eq!(session.wait_end().0.code(), Some(0));
}

#[test]
fn the_status_line_survives_what_programs_do() {
    let Some(mut session) = Session::start() else { return };
    for (what, command) in [
        ("scrolling", "seq 1000 1100; echo do''ne1"),
        ("clearing", "printf '\\033[H\\033[2J\\033[3J'; echo do''ne2"),
        ("a terminal reset", "printf '\\033c'; seq 1000 1100; echo do''ne3"),
        (
            "margins, and the alternate screen",
            "printf '\\033[?1049h\\033[5;9r\\033[r'; seq 1000 1100; echo do''ne4",
        ),
        ("the main screen", "printf '\\033[?1049l'; seq 1000 1100; echo do''ne5"),
    ] {
        session.type_in(&format!("{command}\r"));
        let done = command.rsplit_once(' ').expect("an echo").1.replace('\'', "");
        session.wait_for_row(what, |rows| {
            let (status, shell) = rows.split_last()?;
            let ended = shell.iter().any(|row| row.ends_with(&done));
            (ended && status.starts_with(" link up ") && !shell.iter().any(|row| row.contains("link up")))
                .then_some(())
        });
    }
    session.type_in("\u{1d}");
    session.wait_for("the shell was stopped");
    session.wait_for_row("an empty last row", |rows| rows.last().filter(|row| row.is_empty()).map(drop));
    assert_eq!(session.wait_end().0.code(), Some(0));
}

#[test]
fn a_dumb_terminal_has_no_status_line() {
    let Some(mut session) = Session::start_with(&[], "dumb") else { return };
    session.type_in("stty size\r");
    session.wait_for("30 100");
    session.type_in("\u{1d}");
    let (status, screen) = session.wait_end();
    assert_eq!(status.code(), Some(0));
    assert!(!screen.contains("link up"), "{screen}");
}

/// On 1 Mbit/s a download takes nine minutes. Keys beside it have to be quick all the same.
#[test]
fn keys_stay_quick_beside_a_download_on_a_slow_link() {
    let Some(mut session) = Session::start_with(&["--slow"], "xterm-256color") else { return };
    session.type_in("\u{1f}");
    let first = session.wait_for_rate();
    let mut echoes: Vec<_> = (0..15)
        .map(|n| {
            let start = Instant::now();
            session.type_in(&format!("{}", n % 10));
            let typed: String = (0..=n).map(|n| (b'0' + n % 10) as char).collect();
            session
                .wait_for_row("the echo", |rows| rows.iter().any(|row| row.ends_with(&typed)).then_some(()));
            start.elapsed()
        })
        .collect();
    echoes.sort();
    let last = session.wait_for_rate();
    assert!((0.3..=1.0).contains(&last), "{first} to {last} Mbit/s");
    assert!(echoes[7] >= millis(40), "the link has a delay: {echoes:?}");
    // One may be unlucky on a busy machine.
    assert!(echoes[12] < millis(500), "{echoes:?}");
    session.wait_for_status(&["  echo ", "  Ctrl-_ stop"]);
    session.type_in("\u{1f}");
    session.wait_for_status(&["  Ctrl-_ download"]);
    session.type_in("\u{1d}");
    assert_eq!(session.wait_end().0.code(), Some(0));
}

#[test]
fn a_download_ends_and_tells_how_long_it_took() {
    let Some(mut session) = Session::start() else { return };
    session.type_in("\u{1f}");
    session.wait_for_status(&["  64 MiB in ", "  Ctrl-_ download"]);
    session.type_in("\u{1d}");
    assert_eq!(session.wait_end().0.code(), Some(0));
}

#[test]
fn the_end_of_the_shell_ends_it() {
    let Some(mut session) = Session::start() else { return };
    session.type_in("exit\r");
    let (status, screen) = session.wait_end();
    assert_eq!(status.code(), Some(0), "{screen}");
}

#[test]
fn leaving_a_full_screen_program_takes_its_screen_back() {
    let Some(mut session) = Session::start() else { return };
    session.type_in("printf '\\033[?1049hfu''ll'; cat\r");
    session.wait_for("full");
    session.type_in("\u{1d}");
    session.wait_for("\u{1b}[?1049l");
    assert_eq!(session.wait_end().0.code(), Some(0));
}

#[test]
fn a_signal_restores_the_terminal() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP] {
        let Some(session) = Session::start() else { return };
        kill(session.pid(), signal).expect("signal the playground");
        let (status, screen) = session.wait_end();
        assert_eq!(status.code(), Some(0), "{signal}: {screen}");
    }
}

#[test]
fn the_end_of_the_agent_ends_it() {
    let Some(session) = Session::start() else { return };
    kill(Pid::from_raw(session.agent() as i32), Signal::SIGKILL).expect("kill the agent");
    session.wait_for("the link is over");
    let (status, screen) = session.wait_end();
    assert_eq!(status.code(), Some(1), "{screen}");
}

/// Runs a playground without a terminal to its end; returns standard output and error too.
fn run(args: &[&str], shell: &str, input: &str) -> Option<(Option<i32>, String, String)> {
    let mut command = Command::new(playground()?);
    daemon::bare(&mut command);
    command.args(args).env("SHELL", shell);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("start the playground");
    // One that transfers doesn't read it, and may have ended.
    let typed = child.stdin.take().expect("piped").write_all(input.as_bytes());
    assert!(typed.is_ok() || input.is_empty(), "{typed:?}");
    let (done, result) = std::sync::mpsc::channel();
    let pid = Pid::from_raw(child.id() as i32);
    spawn("playground", move || done.send(child.wait_with_output()));
    let Ok(output) = result.recv_timeout(secs(40)) else {
        let _ = kill(pid, Signal::SIGTERM);
        panic!("{args:?} {input:?}: the playground did not end");
    };
    let output = output.expect("run the playground");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    Some((output.status.code(), text(&output.stdout), text(&output.stderr)))
}

#[test]
fn piped_input_is_typed_in() {
    for (input, shell) in [
        ("echo from''-the-pipe; exit\n", "/bin/bash"),
        ("echo from''-the-pipe\n", "/bin/bash"),
        ("echo from''-the-pipe", "/bin/sh"),
    ] {
        let Some((status, stdout, stderr)) = run(&[], shell, input) else { return };
        assert!(stdout.contains("from-the-pipe"), "{input:?}: {stdout}{stderr}");
        assert_eq!(status, Some(0), "{input:?}");
        // Before that, a file up, the same down, and one of the system's.
        let same =
            |name| stderr.lines().filter(|l| l.starts_with(name) && l.ends_with(", the same bytes")).count();
        assert_eq!((same("  put "), same("  get ")), (1, 2), "{stderr}");
        // And a request to a service.
        let forward = stderr.lines().find(|l| l.starts_with("  forward 127.0.0.1:")).unwrap_or(&stderr);
        assert!(forward.contains(": HTTP/1.1 200 OK, 52 bytes, "), "{forward}");
    }
}

#[test]
fn put_and_get_carry_a_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (local, remote, back) = (path("local"), path("remote"), path("back"));
    for size in [0, 200_000] {
        let bytes = pattern(size);
        fs::write(&local, &bytes).expect("write");
        fs::set_permissions(&local, fs::Permissions::from_mode(0o500)).expect("chmod");
        for args in [["put", &local, &remote], ["get", &remote, &back]] {
            let Some((status, stdout, stderr)) = run(&args, "/bin/sh", "") else { return };
            assert_eq!((status, stderr.as_str()), (Some(0), ""), "{args:?}: {stdout}");
            assert!(stdout.contains(&format!("{remote}: {size} bytes, mode 500, ")), "{args:?}: {stdout}");
        }
        for copy in [&remote, &back] {
            assert!(fs::read(copy).expect("a copy") == bytes, "{copy}: {size} bytes");
            assert_eq!(fs::metadata(copy).expect("a copy").mode() & 0o7777, 0o500, "{copy}");
            fs::remove_file(copy).expect("remove");
        }
        fs::remove_file(&local).expect("remove");
    }
}

#[test]
fn put_and_get_tell_why_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (there, missing, nowhere) = (path("there"), path("missing"), path("no/file"));
    fs::write(&there, "x").expect("write");
    for (args, why) in [
        (
            ["get", &missing, &path("got")],
            format!(
                "failed to retrieve file info: error received from device: \
                 failed to get file info from path '{missing}': stat {missing}: no such file or directory"
            ),
        ),
        (
            ["put", &there, &nowhere],
            format!(
                "failed to create target file: failed to create file: open {nowhere}: no such file or directory"
            ),
        ),
        (["put", &missing, &path("put")], format!("read {missing}: No such file or directory (os error 2)")),
    ] {
        let Some((status, stdout, stderr)) = run(&args, "/bin/sh", "") else { return };
        assert_eq!((status, stdout.as_str()), (Some(1), ""), "{args:?}: {stderr}");
        assert_eq!(stderr, format!("playground: {why}\n"), "{args:?}");
    }
    assert_eq!(names(dir.path()), ["there"]);
}

#[test]
fn a_signal_ends_a_transfer() {
    let Some(path) = playground() else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).expect("a FIFO");
    let mut command = Command::new(path);
    daemon::bare(&mut command);
    command.arg("put").arg(&fifo).arg(dir.path().join("remote")).stderr(Stdio::piped());
    let mut child = command.spawn().expect("start the playground");
    // It can be opened for writing as soon as the transfer reads from it, which never ends.
    let writer = || open(&fifo, OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty()).ok();
    let _writer = eventually(secs(30), "the transfer to begin", writer);
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).expect("signal the playground");
    let status = eventually(secs(20), "the playground to end", || child.try_wait().expect("wait"));
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("read");
    assert_eq!((status.code(), stderr.as_str()), (Some(1), "playground: interrupted by SIGINT\n"));
    assert_eq!(names(dir.path()), ["fifo"]);
}

#[test]
fn a_forward_carries_connections_until_interrupted() {
    let Some(path) = playground() else { return };
    let service = TcpListener::bind("127.0.0.1:0").expect("listen");
    let port = service.local_addr().expect("an address").port();
    let answer = [b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), pattern(200_000)].concat();
    let sent = answer.clone();
    let serving = spawn("service", move || {
        let (mut stream, _) = service.accept().expect("a connection");
        let request = read_request(&mut stream).expect("a request");
        stream.write_all(&sent).expect("answer");
        request
    });
    let mut command = Command::new(path);
    daemon::bare(&mut command);
    // Ctrl-C reaches the whole group.
    command.arg("forward").arg(format!("0:127.0.0.1:{port}")).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Its input stays open until it, or the test, is over.
    let mut child = command.spawn().expect("start the playground");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut line).expect("read");
    let address = line.split_once(" leads to ").unwrap_or_else(|| panic!("no address: {line:?}")).0;
    let ask = || {
        let mut client = TcpStream::connect(address).expect("connect");
        client.set_read_timeout(Some(secs(30))).expect("a time-out");
        let _ = client.write_all(b"GET /some/path HTTP/1.1\r\nHost: device\r\n\r\n");
        let mut got = Vec::new();
        let _ = client.read_to_end(&mut got);
        got
    };
    assert!(ask() == answer, "the service's answer");
    assert_eq!(serving.join().expect("the service").path, "/some/path");
    // The service is gone now, unless another test has been given its port meanwhile.
    let refused = || TcpStream::connect(("127.0.0.1", port)).is_err();
    let gone = refused() && ask() == b"" && refused();
    let children = proc::children(child.id());
    assert!(children.len() >= 2, "agent and bus: {children:?}");
    kill(Pid::from_raw(-(child.id() as i32)), Signal::SIGINT).expect("signal the group");
    let status = eventually(secs(20), "the playground to end", || child.try_wait().expect("wait"));
    let mut stderr = String::new();
    child.stderr.take().expect("piped").read_to_string(&mut stderr).expect("read");
    assert_eq!(status.code(), Some(0), "{stderr}");
    if gone {
        assert!(stderr.contains("connection refused"), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
    for pid in children {
        proc::wait_gone(pid, SOON);
    }
}

#[test]
fn unknown_arguments_are_answered_with_help() {
    let Some((status, stdout, _)) = run(&["--help"], "/bin/sh", "") else { return };
    assert_eq!(status, Some(0));
    for text in
        ["put LOCAL REMOTE", "Ctrl-^  cuts the link", "--slow  a link of 1 Mbit/s", "a temporary folder"]
    {
        assert!(stdout.contains(text), "{text}: {stdout}");
    }
    assert!(stdout.lines().all(|line| line.len() <= 120), "{stdout}");
    let ports = ["forward", "8080:localhost"];
    for args in [&["put", "/etc/hostname"][..], &["get", "not/absolute", "/tmp/x"], &["fetch"], &ports] {
        assert_eq!(run(args, "/bin/sh", ""), Some((Some(2), String::new(), stdout.clone())), "{args:?}");
    }
}

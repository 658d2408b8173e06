//! The remote terminal and the daemon's process.

use std::fs::{self, Permissions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::Instant;

use nix::fcntl::{OFlag, open};
use nix::pty::{grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;

use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::daemon::emulated;
use crate::harness::device::{Device, Generation};
use crate::harness::msg::{self, Ints, Msg, SHELL};
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, is_root, script_config};
use crate::harness::wait::{SOON, eventually, millis, secs, skip, spawn, throughout, within};
use crate::harness::wire;

/// The output of [`long_output`]'s shell.
fn numbers() -> String {
    (1..=900_000).fold(String::new(), |all, n| all + &n.to_string() + "\n")
}

/// A shell that writes six megabytes when it is told to, at a client of the released server.
fn long_output() -> (Rig, Device, Terminal) {
    let script = "stty -echo -opost; echo ready; read go; seq 1 900000; read end";
    let (rig, device) =
        Setup::new().generation(Generation::Released).config(script_config(script)).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.read_until("ready\n", SOON);
    (rig, device, terminal)
}

/// All that was written must arrive: the released server drops what exceeds its 25 places, and says nothing.
fn arrives_whole(device: &Device, terminal: &Terminal) -> Result<(), String> {
    let expected = numbers();
    terminal.input("go\n");
    let deadline = Instant::now() + secs(60);
    let mut output = String::new();
    while device.dropped() == 0 && output.len() < expected.len() {
        let msg = terminal.next(deadline.saturating_duration_since(Instant::now()));
        if msg.typ == "shell" {
            output += &msg.text();
        }
    }
    if device.dropped() > 0 {
        return Err(format!("messages dropped after {} bytes", output.len()));
    }
    assert!(output == expected, "the output is another one, of {} bytes", output.len());
    Ok(())
}

/// Up to 72 % of a long output was lost with the released server, however fast the client.
#[test]
fn long_output_comes_whole_through_the_released_server() {
    let (_rig, device, terminal) = long_output();
    device.set_client_rate(8 << 20);
    arrives_whole(&device, &terminal).unwrap();
}

/// The same where the client is a browser on a slow computer, which lost a quarter even of the rest.
#[test]
fn long_output_comes_whole_to_a_slow_client() {
    let (_rig, device, terminal) = long_output();
    device.set_client_rate(1 << 20);
    arrives_whole(&device, &terminal).unwrap();
}

/// A client that knows no `ping` can't say how far it is. Time has to do, and there are few questions. A busy machine
/// that keeps this server from reading for most of a second breaks that, hence three attempts.
#[test]
fn long_output_comes_whole_to_a_client_that_answers_no_ping() {
    if emulated("time stands for the client's answers, and an emulator takes too much of it") {
        return;
    }
    let attempt = |_| {
        let (_rig, device, terminal) = long_output();
        device.clients_fall_silent();
        device.set_client_rate(2 << 20);
        let start = Instant::now();
        arrives_whole(&device, &terminal)?;
        assert!(start.elapsed() < secs(30), "took {:?}", start.elapsed());
        device.nothing(millis(1), "no ping is left", |m| m.sid.as_ref() == Some(&terminal.sid));
        Ok(())
    };
    let failures = (0..3).map_while(|n| attempt(n).err()).collect::<Vec<String>>();
    assert!(failures.len() < 3, "{failures:?}");
}

/// The slot was taken until the old program had ended, up to two seconds later: a terminal that was reloaded in the
/// browser got "user has too many open sessions".
#[test]
fn a_stopped_shell_is_in_nobodys_way() {
    let stubborn = "trap '' INT TERM HUP QUIT; echo ready; while :; do read x || sleep 1; done";
    let is_beside_the_new_one = |_| {
        let (rig, device) = Setup::new().config(script_config(stubborn)).connected();
        let mut first = Terminal::of_user(&device, "alice");
        first.open();
        first.read_until("ready", SOON);
        first.ask_stop();
        // As soon as the agent has heard of the stop.
        eventually(SOON, "a new shell", || {
            let second = Terminal::of_user(&device, "alice");
            second.ask_new();
            (second.next(SOON).status() == Some(1)).then_some(())
        });
        // The old one may take its time all the same, and is answered for at its end.
        let both = proc::children(rig.daemon.pid()).len() == 2;
        first.expect("stop", 1, None);
        let third = Terminal::of_user(&device, "alice");
        third.ask_new();
        third.expect("new", 2, Some("user has too many open sessions"));
        both
    };
    // A busy machine may take the two seconds until the old program is killed, hence three attempts.
    assert!((0..3).any(is_beside_the_new_one), "three times the old program had ended before");
}

/// A process that a shell was just starting when it was hung up stayed, with neither a terminal nor anybody who knew of
/// it.
#[test]
fn what_a_shell_starts_while_it_is_hung_up_ends_with_it() {
    const LATE: &str = "86398.25";
    let hung_up = format!("sleep 0.2; sleep {LATE} & sleep 0.2; exit");
    let script = format!(
        "set -m; trap '' TERM; trap '{hung_up}' HUP; echo ready; while :; do read x || sleep 1; done"
    );
    let setup = Setup::new().config(script_config(&script)).set("ShellCommand", "/bin/bash");
    let (_rig, device) = setup.connected();
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    terminal.read_until("ready", SOON);
    terminal.stop();
    eventually(SOON, "no process to be left", || (!proc::has_argument(LATE)).then_some(()));
}

/// A shell's child that was hung up between its fork(2) and its exec(2) handled the signal as its shell does, and ran on.
#[test]
fn a_program_that_has_yet_to_start_ends_with_its_shell() {
    const LATE: &str = "86397.25";
    // Upon the first signal that finds the shell gone. Nothing else is started: that might miss a signal, too.
    let hung_up = format!("read _ _ _ parent _ </proc/$BASHPID/stat; [ $parent = $$ ] || exec sleep {LATE}");
    let child = format!("(trap '{hung_up}' HUP; echo ready; while :; do read -t 1 -u 3; done) & wait");
    let shell = format!("set -m; trap '' TERM; exec 3<> <(:); trap 'read -t 0.2 -u 3; exit' HUP; {child}");
    let setup = Setup::new().config(script_config(&shell));
    let (_rig, device) = setup.set("ShellCommand", "/bin/bash").connected();
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    terminal.read_until("ready", SOON);
    terminal.stop();
    eventually(SOON, "no process to be left", || (!proc::has_argument(LATE)).then_some(()));
}

/// A `stop` of all shells of a user passed over those that were about to start: they ran on until their client's health
/// check.
#[test]
fn a_stop_of_all_shells_is_for_those_that_start_too() {
    let (mut rig, device) = Setup::new().connected();
    let user = [("user_id", "alice".into())];
    let message = |sid: &str, typ| {
        let value = msg::message(SHELL, typ, sid, &user, b"");
        wire::encode(true, wire::BINARY, &msg::encode(&value, Ints::Compact))
    };
    for _ in 0..10 {
        let sid = new_sid();
        // In one write, so that the shell isn't there yet when the second one comes.
        let both = [message(&sid, "new"), message("", "stop")].concat();
        device.write(&both).expect("write to the device");
        for typ in ["new", "stop"] {
            let ours = |msg: &Msg| msg.sid.as_deref() == Some(&sid) && msg.typ == typ;
            assert_eq!(device.take(SOON, typ, ours).status(), Some(1));
        }
    }
    assert_healthy(&mut rig, &device);
}

/// Nothing but threads bounded how many programs that don't end could be left behind by reopening a terminal.
#[test]
fn programs_that_take_their_time_to_end_are_few() {
    let stubborn = "trap '' INT TERM HUP QUIT; echo ready; while :; do read x || sleep 1; done";
    let are_few = |_| {
        let (rig, device) = Setup::new().config(script_config(stubborn)).connected();
        for _ in 0..40 {
            let mut terminal = Terminal::new(&device, Style::Cli);
            terminal.open();
            terminal.read_until("ready", SOON);
            terminal.ask_stop();
        }
        // The last shell may not have been told yet, and those beyond the sixteen are killed, but not reaped at once.
        let few = || (proc::children(rig.daemon.pid()).len() <= 16).then_some(());
        within(millis(1000), few).is_some()
    };
    // A busy machine may take longer to reap them, hence three attempts.
    assert!((0..3).any(are_few), "three times more than sixteen were left");
}

/// A backspace over é or 漢 in cooked mode took one byte away and left the others.
#[test]
fn a_backspace_removes_a_character() {
    let script = r#"stty -echo; echo ready; read -r line; printf %s "$line" | od -An -tx1; echo done"#;
    let (_rig, device) = Setup::new().config(script_config(script)).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.read_until("ready\r\n", SOON);
    terminal.input("aé漢\u{7f}\u{7f}b\n");
    assert_eq!(terminal.read_until("done", SOON).trim(), "61 62\r\ndone");
}

/// As login(1) does. The shell was hung up two seconds later, and what it had written meanwhile was lost.
#[test]
fn a_terminal_may_be_closed_and_opened_again() {
    let script =
        "tty=$(tty); exec <&- >&- 2>&-; sleep 3; exec <>$tty >&0 2>&0; echo back; read -r line; echo $line";
    let (_rig, device) = Setup::new().config(script_config(script)).connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.read_until("back\r\n", SOON);
    terminal.input("typed\n");
    terminal.read_until("typed\r\ntyped\r\n", SOON);
}

/// An agent that is started with this user database and, further, through `command`.
fn with_account(home: &Path, command: &'static str, dir: &TempDir) -> Setup {
    let line = format!("pilot:x:54321:54321::{}:/bin/sh\n", home.display());
    let file = dir.path().join("passwd");
    fs::write(&file, fs::read_to_string("/etc/passwd").unwrap() + &line).unwrap();
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
    Setup::new().set("User", "pilot").env("ACCOUNTS", file.to_str().unwrap()).wrapper(command)
}

/// The shell's first directory was entered as root: where the home was a link, into a directory that was closed to its
/// user, who could then read there by relative names.
#[test]
fn a_home_is_entered_as_its_user() {
    if !is_root() {
        return skip("only root can switch to another user");
    }
    let dir = tempfile::tempdir().unwrap();
    let (secret, closed, home) = (dir.path().join("0/open"), dir.path().join("0"), dir.path().join("home"));
    fs::create_dir_all(&secret).unwrap();
    fs::write(secret.join("secret"), "root's\n").unwrap();
    fs::set_permissions(&secret, Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&closed, Permissions::from_mode(0o700)).unwrap();
    symlink(&secret, &home).unwrap();
    let wrapper = r#"exec unshare --mount sh -c 'mount --bind "$ACCOUNTS" /etc/passwd && exec "$@"' sh "$@""#;
    let (_rig, _device, mut terminal) = with_account(&home, wrapper, &dir).terminal();
    assert_eq!(terminal.run("id -u; cat secret 2>/dev/null; /bin/pwd"), "54321\n/");
}

/// A home that root may not enter, as with NFS and root_squash, left the user without any terminal: "fork/exec
/// /bin/bash: permission denied".
#[test]
fn a_home_that_is_closed_to_root_is_entered() {
    if !is_root() {
        return skip("only root can switch to another user");
    }
    let dir = tempfile::tempdir().unwrap();
    let home = dir.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::set_permissions(&home, Permissions::from_mode(0o700)).unwrap();
    chown(&home, Some(54321), Some(54321)).unwrap();
    let wrapper = r#"exec unshare --mount sh -c '
        mount --bind "$ACCOUNTS" /etc/passwd
        exec setpriv --bounding-set=-dac_override,-dac_read_search "$@"' sh "$@""#;
    let (_rig, _device, mut terminal) = with_account(&home, wrapper, &dir).terminal();
    assert_eq!(terminal.run("pwd"), home.to_str().unwrap());
}

/// An agent on a terminal of its own. When what is returned is dropped, the terminal is gone.
fn on_a_terminal(wrapper: &'static str) -> (Rig, Device, OwnedFd) {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let master = posix_openpt(flags).unwrap();
    grantpt(&master).and_then(|()| unlockpt(&master)).unwrap();
    let name = ptsname_r(&master).unwrap();
    let _slave = open(name.as_str(), flags, Mode::empty()).unwrap();
    let (rig, device) = Setup::new().env("TERMINAL", &name).wrapper(wrapper).connected();
    (rig, device, master.into())
}

/// An agent that was started by hand took its terminal's end for the wish to read the configuration, and stayed
/// connected without a console, in the way of the service.
#[test]
fn an_agent_started_by_hand_ends_with_its_terminal() {
    // The tests themselves may run under nohup.
    let started = r#"exec env --default-signal=HUP setsid --ctty "$@" <"$TERMINAL""#;
    let (mut rig, device, master) = on_a_terminal(started);
    // While the terminal is there, SIGHUP is the wish to reload.
    rig.daemon.signal(nix::sys::signal::Signal::SIGHUP);
    rig.daemon.wait_for_log("reading the configuration", SOON);
    assert!(device.answers(b"before", SOON));
    drop(master);
    assert_eq!(rig.daemon.wait_exit(SOON).code(), Some(0));
}

/// nohup(1) says that the terminal's end is nothing to end for.
#[test]
fn an_agent_under_nohup_outlives_its_terminal() {
    if emulated("it catches signals that it was started to ignore") {
        return;
    }
    let (mut rig, device, master) = on_a_terminal(r#"exec setsid --ctty nohup "$@" <"$TERMINAL" 2>&2"#);
    drop(master);
    rig.daemon.wait_for_log("SIGHUP received", SOON);
    assert!(device.answers(b"after", SOON) && rig.daemon.is_running());
}

/// One user's forwards could take all of the 1024 descriptors that systemd allows at first: nobody else got a shell.
/// What the daemon takes for itself, its children don't get.
#[test]
fn descriptors_last_beyond_the_soft_limit() {
    let limited = r#"ulimit -Sn 256; exec "$@""#;
    let (rig, device, mut terminal) = Setup::new().wrapper(limited).terminal();
    assert_eq!(terminal.run("ulimit -Sn"), "256");
    let limits = fs::read_to_string(format!("/proc/{}/limits", rig.daemon.pid())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let mut numbers = files.split_whitespace().skip(3);
    assert_eq!(numbers.next(), numbers.next(), "{files}");
    let target = crate::harness::targets::Target::start(crate::harness::targets::Role::Discard);
    let client = crate::harness::forward::Client::open(&device);
    for _ in 0..300 {
        client.connect("tcp", "127.0.0.1", target.port()).opened();
    }
    Terminal::of_user(&device, "somebody else").open_with_prompt();
}

/// Each `new` had a thread of its own before it was seen that there was no permit: 60,000 of them made 1,200 threads.
#[test]
fn shells_that_are_refused_take_no_threads() {
    let (rig, device) = Setup::new().set("Sessions", json!({ "MaxPerUser": 1 })).connected();
    let pid = rig.daemon.pid();
    let watch = spawn("watch", move || {
        let mut most = 0;
        while proc::is_running(pid) {
            most = most.max(proc::threads(pid));
            std::thread::park_timeout(millis(2));
        }
        most
    });
    let mallory = Terminal::of_user(&device, "mallory");
    mallory.open();
    for _ in 0..20_000 {
        let one = Terminal { sid: crate::harness::client::new_sid(), ..mallory.clone() };
        one.send("new", &[], b"");
    }
    assert!(device.answers(b"all of them", secs(60)));
    Terminal::of_user(&device, "alice").open();
    drop(rig);
    let most = watch.join().unwrap();
    println!("{most} threads");
    assert!(most < 60, "{most} threads");
}

/// Output without a reader kept the agent from noticing that nobody would read the input either: a thread was busy until
/// the client answered again.
#[test]
fn input_for_a_shell_that_has_ended_keeps_nobody_busy() {
    let script = "stty raw -echo; echo ready; exec yes";
    let (rig, device) = Setup::new().config(script_config(script)).connected();
    let terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    let is_ping = |msg: &Msg| msg.typ == "ping";
    let mut seen = 0;
    // Answers once, or it would be presumed to read.
    device.clients_fall_silent();
    device.take(SOON, "a ping", is_ping);
    terminal.pong();
    eventually(SOON, "the end of output", || {
        let new = device.drain(&terminal.sid).len();
        seen += new;
        (seen > 16 && new == 0).then_some(())
    });
    (0..16).for_each(|_| terminal.input(vec![b'x'; 60_000]));
    assert!(device.answers(b"all of it", SOON));
    let pid = rig.daemon.pid();
    let shell = proc::children(pid)[0];
    kill(Pid::from_raw(shell as i32), Signal::SIGKILL).unwrap();
    proc::wait_gone(shell, SOON);
    let before = proc::cpu_ticks(pid);
    throughout(secs(2), "it is quiet", || proc::cpu_ticks(pid) - before < 30);
}

/// Its end can be seen, but it can't be reaped: a thread was busy for as long as the debugger stood still.
#[test]
fn a_shell_that_a_debugger_holds_keeps_nobody_busy() {
    let (rig, device) = Setup::new().config(script_config("exec cat")).connected();
    let terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    let pid = rig.daemon.pid();
    let shell = Pid::from_raw(proc::children(pid)[0] as i32);
    ptrace::seize(shell, ptrace::Options::empty()).unwrap();
    kill(shell, Signal::SIGKILL).unwrap();
    terminal.expect_after_output("stop", SOON);
    let before = proc::cpu_ticks(pid);
    throughout(secs(2), "it is quiet", || proc::cpu_ticks(pid) - before < 30);
    waitpid(shell, None).unwrap();
    rig.daemon.wait_for_log("event=shell-end", SOON);
}

/// Its session's messages waited for its end for ever: the next `new` and `stop` got no answer.
#[test]
fn a_session_answers_though_its_shell_does_not_end() {
    let (rig, device) = Setup::new().config(script_config("exec cat")).connected();
    let terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    let shell = Pid::from_raw(proc::children(rig.daemon.pid())[0] as i32);
    ptrace::seize(shell, ptrace::Options::empty()).unwrap();
    terminal.ask_stop();
    terminal.expect("stop", 2, Some(&format!("could not terminate shell: process {shell} does not end.")));
    terminal.ask_new();
    terminal.expect("new", 2, Some("failed to start shell: shell is already running"));
    terminal.ask_stop();
    assert_eq!(terminal.next(SOON).status(), Some(2));
    let killed = WaitStatus::Signaled(shell, Signal::SIGKILL, false);
    eventually(SOON, "its end", || (waitpid(shell, None) == Ok(killed)).then_some(()));
    rig.daemon.wait_for_log("event=shell-end", SOON);
}

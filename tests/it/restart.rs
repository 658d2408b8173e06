//! Terminals that outlive a restart of the agent, with the unit of the package and systemd itself; and with a service
//! manager whose store has been tampered with.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use nix::fcntl::{OFlag, open};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::Mode;
use rmpv::Value;
use serde_json::json;

use crate::detach::collect;
use crate::harness::client::Terminal;
use crate::harness::daemon::executable;
use crate::harness::device::Device;
use crate::harness::machine::Machine;
use crate::harness::msg::{Ints, SHELL, encode, message};
use crate::harness::rig::{Setup, bash_config};
use crate::harness::wait::{SOON, eventually, millis, secs};

const UNIT: &str = include_str!("../../yocto/files/mender-connect.service");

/// A machine where systemd has started the agent.
fn machine(sessions: serde_json::Value) -> Option<(Machine, Device)> {
    let machine = Machine::with_systemd()?;
    machine.install(&executable(), "/usr/bin/mender-connect");
    let mut config = bash_config();
    config["Sessions"] = sessions;
    config["ReconnectIntervalSeconds"] = 1.into();
    machine.write("/etc/mender/mender-connect.conf", config.to_string());
    machine.write("/run/systemd/system/mender-connect.service", UNIT);
    machine.sh("systemctl daemon-reload; systemctl start mender-connect");
    let device = machine.device();
    Some((machine, device))
}

fn main_pid(machine: &Machine) -> u32 {
    let text = machine.sh("systemctl show --property MainPID --value mender-connect");
    text.trim().parse().expect("a process id")
}

fn stored(machine: &Machine) -> u32 {
    let text = machine.sh("systemctl show --property NFileDescriptorStore --value mender-connect");
    text.trim().parse().expect("a number")
}

/// Opens a terminal, which must lead back to the user's shell. Returns what it shows up to the prompt.
fn reattached(device: &Device, user: &str) -> (Terminal, String) {
    let mut terminal = Terminal::of_user(device, user);
    terminal.open();
    let notice = terminal.read_until(" s ago\r\n", SOON);
    assert!(notice.starts_with("[mender-connect] Reattached to your shell of "), "{notice:?}");
    let shown = terminal.prompt();
    (terminal, shown)
}

#[test]
fn a_shell_outlives_a_restart() {
    let Some((machine, device)) = machine(json!({})) else { return };
    let mut before = Terminal::of_user(&device, "alice");
    before.open_with_prompt();
    let pid = before.run("cd /tmp; here=kept; echo $$");
    assert_eq!(before.run("echo so''far"), "sofar");
    let agent = main_pid(&machine);
    machine.sh("systemctl restart mender-connect");
    assert_ne!(main_pid(&machine), agent);
    let device = machine.device();
    let mut other = Terminal::of_user(&device, "bob");
    other.open_with_prompt();
    assert_eq!(other.run("echo [$here]"), "[]");
    let (mut after, shown) = reattached(&device, "alice");
    assert!(shown.contains("sofar\r\n"), "{shown:?}");
    assert_eq!(after.run("echo $here $PWD $$"), format!("kept /tmp {pid}"));
    // A second time, by which the terminal has changed its session.
    machine.sh("systemctl restart mender-connect");
    let device = machine.device();
    let (mut after, _) = reattached(&device, "alice");
    assert_eq!(after.run("echo $here $$"), format!("kept {pid}"));
    other = reattached(&device, "bob").0;
    assert_eq!(stored(&machine), 4);
    after.stop();
    other.stop();
    eventually(SOON, "the store is empty", || (stored(&machine) == 0).then_some(()));
}

#[test]
fn the_same_client_misses_nothing_of_a_restart() {
    let Some((machine, mut device)) = machine(json!({})) else { return };
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open_with_prompt();
    terminal.input("stty -echo; PS1=; echo rea''dy\n");
    terminal.read_until("ready\r\n", SOON);
    terminal.input("seq 1 400000; echo do''ne\n");
    let expected: String = (1..=400_000).map(|n| format!("{n}\r\n")).collect::<String>() + "done\r\n";
    let mut all = Vec::new();
    for part in 1..=2 {
        collect(&terminal, &mut all, part * 900_000, SOON);
        // What the server has is taken before it notices the end.
        device.clients_fall_silent();
        collect(&terminal, &mut all, usize::MAX, millis(500));
        machine.sh("systemctl restart mender-connect");
        device = machine.device();
        terminal = Terminal { device: device.clone(), ..terminal };
        terminal.send("pong", &[], b"");
    }
    collect(&terminal, &mut all, expected.len() - 1, SOON);
    let differs = all.iter().zip(expected.as_bytes()).position(|(a, b)| a != b);
    assert_eq!((all.len(), differs), (expected.len(), None));
    terminal.input("echo again\n");
    terminal.read_until("again\r\n", SOON);
}

#[test]
fn a_shell_outlives_a_crash_of_the_agent() {
    let Some((machine, device)) = machine(json!({})) else { return };
    let mut before = Terminal::of_user(&device, "alice");
    before.open_with_prompt();
    let pid = before.run("trap '' TERM; echo $$");
    machine.sh(&format!("kill -KILL {}", main_pid(&machine)));
    let device = machine.server.next_device(SOON + secs(2));
    // Nobody has written down what it showed.
    let mut after = Terminal::of_user(&device, "alice");
    after.open();
    after.read_until(" s ago\r\n", SOON);
    assert_eq!(after.run("echo $$"), pid);
    // Its end is noticed, though it is nobody's child here.
    after.input("exit\n");
    after.expect_after_output("stop", SOON);
    eventually(SOON, "the store is empty", || (stored(&machine) == 0).then_some(()));
}

#[test]
fn a_stop_hangs_up_and_what_may_not_be_kept_ends_with_the_agent() {
    let Some((machine, device)) = machine(json!({})) else { return };
    let mut kept = Terminal::of_user(&device, "alice");
    kept.open_with_prompt();
    let shell = kept.run("echo $$");
    let mut nobody = Terminal::of_user(&device, "");
    nobody.open_with_prompt();
    let other = nobody.run("trap '' HUP; echo $$");
    let gone = |pid: &str| machine.try_sh(&format!("kill -0 {pid}")).0 != Some(0);
    machine.sh("systemctl restart mender-connect");
    assert!(gone(&other) && !gone(&shell));
    machine.sh("systemctl stop mender-connect");
    eventually(SOON, "the shell has ended", || gone(&shell).then_some(()));
}

#[test]
fn nothing_is_kept_where_detached_shells_are_not() {
    let Some((machine, device)) = machine(json!({"KeepDetached": 0})) else { return };
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open_with_prompt();
    let shell = terminal.run("trap '' HUP; echo $$");
    assert_eq!(stored(&machine), 0);
    machine.sh("systemctl restart mender-connect");
    assert_ne!(machine.try_sh(&format!("kill -0 {shell}")).0, Some(0));
}

#[test]
fn a_shell_of_another_user_than_the_configuration_has_is_hung_up() {
    let Some((machine, device)) = machine(json!({})) else { return };
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open_with_prompt();
    let shell = terminal.run("echo $$");
    let mut config = bash_config();
    config["User"] = "nobody".into();
    machine.write("/etc/mender/mender-connect.conf", config.to_string());
    machine.sh("systemctl restart mender-connect");
    let gone = || (machine.try_sh(&format!("kill -0 {shell}")).0 != Some(0)).then_some(());
    eventually(SOON, "the shell has ended", gone);
    let mut after = Terminal::of_user(&machine.device(), "alice");
    after.open_with_prompt();
    assert_eq!(after.run("id -un"), "nobody");
}

/// A terminal on which a session leader runs, which says when it is hung up.
fn leader(file: &str) -> (PtyMaster, std::process::Child) {
    let master =
        posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).expect("a PTY");
    grantpt(&master).and_then(|()| unlockpt(&master)).expect("a usable PTY");
    let name = ptsname_r(&master).expect("a name");
    let slave = open(name.as_str(), OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC, Mode::empty())
        .expect("a tty");
    let script =
        format!("trap 'echo hung up >{file}; exit' HUP; echo ready >{file}; while :; do sleep 0.05; done");
    let mut command = Command::new("setsid");
    command.args(["--ctty", "sh", "-c", &script]).stdin(Stdio::from(slave));
    let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("setsid");
    (master, child)
}

fn description(typ: &str, user: &str, numbers: [i64; 3], body: &[u8]) -> Vec<u8> {
    let [end, sent, typed] = numbers.map(Value::from);
    let props = [("user_id", user.into()), ("end", end), ("sent", sent), ("typed", typed)];
    encode(&message(SHELL, typ, "old", &props, body), Ints::Compact)
}

fn memory(bytes: &[u8]) -> OwnedFd {
    let file = memfd_create(c"test", MFdFlags::MFD_CLOEXEC).expect("a file in memory");
    File::from(file.try_clone().expect("a duplicate")).write_all(bytes).expect("write");
    file
}

/// Whatever a store holds: only what is a shell of the user's is gone on with, the rest is hung up.
#[test]
fn what_cannot_be_verified_is_hung_up() {
    let good = description("kept-1", "alice", [3, 0, 0], b"abc");
    let cases: Vec<(&str, Option<Vec<u8>>, bool)> = vec![
        ("good", Some(good.clone()), true),
        ("no description", None, false),
        ("empty", Some(vec![]), false),
        ("cut", Some(good[..good.len() - 1].to_vec()), false),
        ("garbage", Some(b"hello".to_vec()), false),
        ("another version", Some(description("kept-2", "alice", [3, 0, 0], b"abc")), false),
        ("no user", Some(description("kept-1", "", [3, 0, 0], b"abc")), false),
        ("more output than there was", Some(description("kept-1", "alice", [2, 0, 0], b"abc")), false),
        ("sent before it was there", Some(description("kept-1", "alice", [3, 4, 0], b"abc")), false),
        ("more input than there is", Some(description("kept-1", "alice", [3, 0, 4], b"abc")), false),
        ("negative", Some(description("kept-1", "alice", [3, 0, -1], b"abc")), false),
    ];
    for (case, text, kept) in cases {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let file = dir.path().join("state");
        let (master, mut child) = leader(file.to_str().expect("UTF-8"));
        let says =
            |text: &str| std::fs::read_to_string(&file).is_ok_and(|told| told.trim() == text).then_some(());
        eventually(SOON, "the leader is ready", || says("ready"));
        let mut descriptors = vec![master.as_fd().try_clone_to_owned().expect("a duplicate")];
        drop(master);
        descriptors.extend(text.as_deref().map(memory));
        let setup = Setup::new().descriptors(descriptors, "shell-1-0").env("FDSTORE", "32");
        let (rig, device) = setup.connected();
        if kept {
            assert!(!rig.status()["sessions"][0]["detached"].is_null(), "{case}");
            let terminal = Terminal { sid: "old".to_owned(), ..Terminal::of_user(&device, "alice") };
            terminal.send("pong", &[], b"");
            assert_eq!(terminal.next(SOON).text(), "abc", "{case}");
        } else {
            eventually(SOON, case, || says("hung up"));
            rig.daemon.wait_for_log("is not kept any longer", SOON);
            let mut terminal = Terminal::of_user(&device, "alice");
            terminal.open_with_prompt();
        }
        drop(rig);
        eventually(SOON, "the leader has ended", || child.try_wait().expect("wait"));
    }
}

#[test]
fn descriptors_for_another_process_are_not_touched() {
    let setup = Setup::new().env("LISTEN_PID", "1").env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", "a:b");
    let (_rig, _device, mut terminal) = setup.terminal();
    assert_eq!(terminal.run("env | grep -c LISTEN"), "0");
}

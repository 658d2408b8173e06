//! Shells that a service manager has kept for an earlier agent: its store may have been tampered with, or be another's.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::Stdio;

use nix::fcntl::OFlag;
use nix::pty::PtyMaster;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;
use nix::time::{ClockId, clock_gettime};
use rmpv::Value;
use serde_json::json;

use crate::harness::client::{Terminal, new_sid};
use crate::harness::daemon::emulated;
use crate::harness::msg::{Ints, SHELL, encode, message};
use crate::harness::pty;
use crate::harness::rig::Setup;
use crate::harness::wait::{SOON, eventually};

/// A terminal on which a session leader runs, which says when it is hung up.
fn leader(file: &str) -> (PtyMaster, std::process::Child) {
    let (master, slave) = pty::open_pair(OFlag::O_NONBLOCK);
    let script =
        format!("trap 'echo hung up >{file}; exit' HUP; echo ready >{file}; while :; do sleep 0.05; done");
    let mut command = pty::session_on(&slave);
    command.args(["sh", "-c", &script]).stdout(Stdio::null()).stderr(Stdio::null());
    let child = command.spawn().expect("setsid");
    (master, child)
}

fn description(typ: &str, user: &str, numbers: [i64; 3], body: &[u8]) -> Vec<u8> {
    let [end, sent, typed] = numbers.map(Value::from);
    // A second ago.
    let started = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a clock").tv_sec() - 1;
    let numbers = [("started", started.into()), ("end", end), ("sent", sent), ("typed", typed)];
    let props: Vec<_> = [("user_id", user.into())].into_iter().chain(numbers).collect();
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
    if emulated("it doesn't tell whose process leads a terminal's session") {
        return;
    }
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
            terminal.pong();
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

/// A kept shell with two bytes of input that have to be typed, and the file that describes it.
fn with_input() -> (Setup, std::process::Child, File, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("state");
    let (master, child) = leader(file.to_str().expect("UTF-8"));
    let ready = || std::fs::read_to_string(&file).is_ok_and(|told| told.trim() == "ready").then_some(());
    eventually(SOON, "the leader is ready", ready);
    let text = memory(&description("kept-1", "alice", [3, 0, 2], b"abcls"));
    let copy = File::from(text.try_clone().expect("a duplicate"));
    let descriptors = vec![master.as_fd().try_clone_to_owned().expect("a duplicate"), text];
    (Setup::new().descriptors(descriptors, "shell-1-0").env("FDSTORE", "32"), child, copy, dir)
}

fn holds(file: &File, wanted: &[u8]) -> bool {
    let mut text = vec![0; 4096];
    let length = file.read_at(&mut text, 0).expect("read the description");
    text[..length].windows(wanted.len()).any(|window| window == wanted)
}

/// An agent that took a shell over and was killed left the description as it had found it: the next one typed the same
/// input once more.
#[test]
fn what_was_typed_is_not_typed_again_after_a_crash() {
    if emulated("it doesn't tell whose process leads a terminal's session") {
        return;
    }
    let (setup, mut child, file, _dir) = with_input();
    let (rig, device) = setup.connected();
    let terminal = Terminal { sid: "old".to_owned(), ..Terminal::of_user(&device, "alice") };
    eventually(SOON, "another description", || (!holds(&file, b"abcls")).then_some(()));
    terminal.pong();
    terminal.next(SOON);
    drop(rig);
    eventually(SOON, "the leader has ended", || child.try_wait().expect("wait"));
}

/// Its age was told by the wall clock. Where that was set meanwhile, a shell had expired years ago.
#[test]
fn a_shell_is_as_old_as_the_monotonic_clock_says() {
    if emulated("it doesn't tell whose process leads a terminal's session") {
        return;
    }
    let (setup, mut child, _file, _dir) = with_input();
    let (rig, _device) = setup.set("Sessions", json!({ "ExpireAfter": 3600 })).connected();
    let age = rig.status()["sessions"][0]["shell"]["age"].as_f64();
    assert!(age.is_some_and(|age| (0.5..60.0).contains(&age)), "{age:?}");
    drop(rig);
    eventually(SOON, "the leader has ended", || child.try_wait().expect("wait"));
}

/// An agent that finds no bus at its start ends, and the next one goes on with what it has taken over.
#[test]
fn an_agent_that_cannot_go_on_leaves_shells_to_the_next() {
    if emulated("it doesn't tell whose process leads a terminal's session") || cfg!(not(feature = "dbus")) {
        return;
    }
    let (setup, mut child, file, dir) = with_input();
    let mut rig = setup.env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent").start();
    assert_eq!(rig.daemon.wait_exit(SOON).code(), Some(1));
    assert!(holds(&file, b"started") && holds(&file, b"abc"), "the agent wrote it down");
    drop((rig, dir));
    eventually(SOON, "the leader has ended", || child.try_wait().expect("wait"));
}

/// A shell that was just starting when the agent was told to end was hung up instead of left to the next one.
#[test]
fn a_shell_that_starts_while_the_agent_ends_is_left() {
    for _ in 0..5 {
        let name = format!("mender-connect-{}", new_sid());
        let address = SocketAddr::from_abstract_name(&name).expect("a name");
        // Nobody reads from it: the terminal stays in there.
        let store = UnixDatagram::bind_addr(&address).expect("a socket");
        let setup = Setup::new().env("NOTIFY_SOCKET", &format!("@{name}")).env("FDSTORE", "32");
        let (mut rig, device) = setup.connected();
        Terminal::of_user(&device, "alice").ask_new();
        rig.daemon.wait_for_log("event=session-start", SOON);
        rig.daemon.signal(Signal::SIGTERM);
        assert!(rig.daemon.wait_exit(SOON).success());
        assert_eq!(rig.daemon.count_log("event=shell-end"), 0, "{:?}", rig.daemon.log());
        drop(store);
    }
}

#[test]
fn descriptors_for_another_process_are_not_touched() {
    let setup = Setup::new().env("LISTEN_PID", "1").env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", "a:b");
    let (_rig, _device, mut terminal) = setup.terminal();
    assert_eq!(terminal.run("env | grep -c LISTEN"), "0");
}

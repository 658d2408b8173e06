//! Root file systems that can't be written to: this machine's own, and one with BusyBox and nothing else. Everything
//! works there, and nothing is written but what is uploaded. All of it takes root.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::files::{get, names, pattern, put, refused};
use crate::forwards::assert_echo;
use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::device::Device;
use crate::harness::forward::Client;
use crate::harness::msg::COMMANDS;
use crate::harness::program;
use crate::harness::rest::Form;
use crate::harness::rig::{Rig, Setup};
use crate::harness::root::{GID, GROUPS, Root, UID, USER, obstacle};
use crate::harness::targets::{Role, Target, UdpEcho, stream};
use crate::harness::trace;
use crate::harness::wait::{SOON, skip};
use crate::signals::ends_quickly;

/// Where the status socket is.
const RUN: &str = "/run/mender-connect";

/// Makes everything read-only but the folder `files` and a /run of the agent's own. The traces are written to
/// `trace`. The tracer is a grandchild: so the agent keeps the process id that the test knows.
const READ_ONLY: &str = r#"exec unshare --mount --propagation private /bin/sh -c '
    set -e
    mkdir files trace fixed
    mount --bind files files
    mount --bind trace trace
    while read -r _ _ _ _ place _; do
        place=$(printf %b "$place")
        case $place in
            /dev/pts | "$PWD/files" | "$PWD/trace") ;;
            *) mount -o remount,bind,ro "$place" ;;
        esac
    done </proc/self/mountinfo
    mount -t tmpfs tmpfs /run
    exec strace -D -ff -y -o trace/thread \
        -e trace=%file,fchmod,fchown,ftruncate,fallocate,fsetxattr,fremovexattr,bind "$@"' sh "$@""#;

/// What a shell prints, without waiting for a prompt: BusyBox asks for the cursor's place behind it.
fn printed(terminal: &mut Terminal, command: &str) -> String {
    // The quotes keep the echo of the line from looking like its output.
    terminal.input(format!("echo 'beg''in'; {command}; echo 'e''nd'\n"));
    terminal.read_until("begin\r\n", SOON);
    let output = terminal.read_until("end\r\n", SOON).replace("\r\n", "\n");
    output.strip_suffix("end\n").expect("just read").trim_end().to_owned()
}

/// A terminal is opened, resized and ended by its shell.
fn terminal(device: &Device) {
    let mut terminal = Terminal::new(device, Style::Cli);
    terminal.open();
    assert_eq!(printed(&mut terminal, "echo $((6 * 7))"), "42");
    assert_eq!(printed(&mut terminal, "stty size"), "24 80");
    terminal.resize(101, 33);
    assert_eq!(printed(&mut terminal, "stty size"), "33 101");
    assert!(printed(&mut terminal, "tty").starts_with("/dev/pts/"));
    terminal.input("exit\n");
    terminal.expect_after_output("stop", SOON);
}

/// Files go up to `folder`, which is `seen` for us, and come down again.
fn transfers(device: &Device, folder: &str, seen: &Path) {
    let path = format!("{folder}/up");
    let form = Form { mode: Some(0o640), uid: Some(1234), gid: Some(4321), ..Form::to(&path) };
    let bytes = pattern(300_000);
    put(device, &form, &bytes).unwrap();
    let file = seen.join("up");
    assert!(fs::read(&file).unwrap() == bytes);
    let metadata = fs::metadata(&file).unwrap();
    assert_eq!((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()), (0o640, 1234, 4321));
    assert!(get(device, &path).unwrap().bytes == bytes);
    put(device, &form, b"instead").unwrap();
    assert_eq!(get(device, &path).unwrap().bytes, b"instead");
    assert_eq!(names(seen), ["up"]);
}

/// Where nothing can be written that is said.
fn refuses_uploads(device: &Device, folder: &str) {
    let path = format!("{folder}/up");
    let text =
        format!("failed to create target file: failed to create file: open {path}: read-only file system");
    assert_eq!(put(device, &Form::to(&path), b"x"), Err(refused(400, &text)));
}

/// Connections by address and by a name that needs no resolver.
fn forwards(device: &Device) {
    let client = Client::open(device);
    let (target, datagrams) = (Target::start(Role::Echo), UdpEcho::start());
    for host in ["127.0.0.1", "localhost"] {
        let connection = client.connect("tcp", host, target.port()).opened();
        assert_echo(&connection, &stream(0, 200_000));
        connection.stop();
        let connection = client.connect("udp", host, datagrams.port());
        connection.send(b"datagram");
        assert_eq!(connection.next(SOON).as_deref(), Some(b"datagram".as_slice()));
        connection.stop();
    }
    client.close();
}

/// The server cuts the connection, the operator sends signals.
fn link(rig: &mut Rig, device: &Device) {
    device.reset();
    let device = rig.device();
    let mark = rig.daemon.mark();
    rig.daemon.signal(Signal::SIGUSR1);
    rig.daemon.wait_for_log_after(mark, "  shells: 0/16", SOON);
    rig.daemon.signal(Signal::SIGHUP);
    rig.daemon.wait_for_log_after(mark, "the configuration has not changed", SOON);
    terminal(&device);
    ends_quickly(rig, Signal::SIGTERM);
}

/// Warnings and errors in the log that the tests here don't bring about.
fn complaints(rig: &Rig) -> Vec<String> {
    let expected = ["/up: read-only file system", "defaulting to", " lost: ", "command=send-inventory"];
    let mut log = rig.daemon.log();
    log.retain(|line| line.contains("level=warning") || line.contains("level=error"));
    log.retain(|line| !expected.iter().any(|text| line.contains(text)));
    log
}

#[test]
fn nothing_is_written_but_uploads_and_the_status_socket() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    if !trace::is_possible() {
        return skip("strace is missing");
    }
    let setup = Setup::new().set("ShellCommand", "/bin/sh").set("ShellArguments", json!(["-i"]));
    let setup = setup.env("RUNTIME_DIRECTORY", RUN).wrapper(READ_ONLY);
    let (mut rig, device) = setup.set("ReconnectIntervalSeconds", 1).connected();
    let dir = rig.dir.path().canonicalize().unwrap();
    let place = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    terminal(&device);
    transfers(&device, &place("files"), &dir.join("files"));
    refuses_uploads(&device, &place("fixed"));
    assert_eq!(get(&device, "/etc/passwd").unwrap().bytes, fs::read("/etc/passwd").unwrap());
    forwards(&device);
    let run = format!("/proc/{}/root/{RUN}", rig.daemon.pid());
    assert_eq!(names(Path::new(&run)), ["status.sock"]);
    link(&mut rig, &device);
    assert_eq!(complaints(&rig), [] as [&str; 0]);
    assert_eq!(names(&dir.join("files")), ["up"]);
    assert!(names(&dir.join("fixed")).is_empty());

    let terminals = ["/dev/null", "/dev/ptmx", "/dev/tty"].map(Path::new);
    let folders: BTreeSet<PathBuf> = trace::changes(&dir.join("trace"))
        .into_iter()
        .filter(|path| !terminals.contains(&path.as_path()) && !path.starts_with("/dev/pts"))
        .map(|path| path.parent().expect("no root").to_owned())
        .collect();
    // The upload that was refused is among them, and so would be any other attempt.
    let [files, fixed] = ["files", "fixed"].map(|name| dir.join(name));
    assert_eq!(folders, BTreeSet::from([files, fixed, "/run".into(), RUN.into()]));
}

/// Without a shell: it is /bin/sh, with --login.
fn board_config() -> Value {
    json!({ "User": USER, "ReconnectIntervalSeconds": 1 })
}

#[test]
fn busybox_and_an_account_are_enough() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let root = Root::new();
    let client = "usr/bin/mender-update";
    program::write(&root.path(client), b"#!/bin/sh\ntest $1 = check-update\n");
    let (mut rig, device) = root.setup().config(board_config()).connected();

    let mut shell = Terminal::new(&device, Style::Cli);
    shell.open();
    let groups = GROUPS.map(|group| group.to_string()).join(" ");
    let home = format!("/home/{USER}");
    for (command, output) in [
        ("busybox id -u", UID.to_string()),
        ("busybox id -g", GID.to_string()),
        ("busybox id -G", groups),
        ("busybox id -un", USER.to_owned()),
        ("pwd", home.clone()),
        ("echo $HOME", home),
        ("echo $TERM", "xterm-256color".to_owned()),
        ("echo $LOGIN", "yes".to_owned()),
        ("busybox tty", "/dev/pts/0".to_owned()),
        ("busybox stat -c %u /dev/pts/0", UID.to_string()),
        ("echo through >/dev/tty", "through".to_owned()),
        ("echo x 2>/dev/null >file || echo no", "no".to_owned()),
    ] {
        assert_eq!(printed(&mut shell, command), output, "{command}");
    }
    shell.ask_stop();
    assert_eq!(shell.expect_after_output("stop", SOON).status(), Some(1));

    terminal(&device);
    transfers(&device, "/data", &root.path("data"));
    refuses_uploads(&device, "/etc");
    assert_eq!(get(&device, "/etc/passwd").unwrap().bytes, fs::read(root.path("etc/passwd")).unwrap());
    forwards(&device);
    for (typ, status) in [("check-update", 1), ("send-inventory", 2)] {
        let sid = new_sid();
        device.send(COMMANDS, typ, &sid, &[], b"");
        assert_eq!(device.next_of(&sid, SOON).status(), Some(status), "{typ}");
    }
    assert_eq!(names(Path::new(&format!("/proc/{}/root/run", rig.daemon.pid()))), ["dbus", "mender-connect"]);
    link(&mut rig, &device);
    assert_eq!(complaints(&rig), [] as [&str; 0]);
    assert_eq!(names(&root.path("data")), ["up"]);
}

#[test]
fn accounts_and_shells_are_those_of_the_board() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let root = Root::new();
    for (key, value, text) in [
        ("User", "nobody", "user: unknown user nobody"),
        ("ShellCommand", "/bin/busybox", "open /etc/shells: "),
        ("ShellCommand", "/bin/bash", "given shell (/bin/bash) is not executable"),
    ] {
        let mut rig = root.setup().config(board_config()).set(key, value).start();
        assert_eq!(rig.daemon.wait_exit(SOON).code(), Some(1), "{text}");
        rig.daemon.wait_for_log(text, SOON);
    }
}

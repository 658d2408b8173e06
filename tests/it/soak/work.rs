//! Terminals, forwards, commands and session control: one function is one job, which gives the bytes it compared.

use std::sync::atomic::{AtomicU64, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::stage::{Chance, eventually_if_linked};
use crate::control::complaint;
use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::connection::Connection;
use crate::harness::device::Device;
use crate::harness::forward::Client;
use crate::harness::msg::{self, COMMANDS, CONTROL, FILES, Ints, SHELL, map};
use crate::harness::proc;
use crate::harness::server::closed_port;
use crate::harness::targets::{Role, Target, UdpEcho, stream};
use crate::harness::wait::{SOON, secs};
use crate::harness::wire;

/// How long the jobs' background processes would last; no other process has this argument.
pub const MARK: &str = "86399.75";

pub fn terminal(device: &Device, chance: &mut Chance) -> usize {
    let style = [Style::Cli, Style::Gui, Style::Python][chance.below(3)];
    let mut terminal = Terminal::new(device, style);
    if !opens(&terminal) {
        return 0;
    }
    terminal.prompt();
    let mut checked = 0;
    for _ in 0..chance.between(1, 6) {
        checked += match chance.below(4) {
            0 => {
                let (width, height) = (chance.between(20, 300) as u16, chance.between(5, 100) as u16);
                terminal.resize(width, height);
                assert_eq!(terminal.run("stty size"), format!("{height} {width}"));
                0
            }
            1 => {
                let count = chance.size(40_000);
                let expected: Vec<String> = (1..=count).map(|n| n.to_string()).collect();
                let printed = terminal.run(&format!("seq 1 {count}"));
                assert!(printed == expected.join("\n"), "seq 1 {count} printed something else");
                printed.len()
            }
            2 if style != Style::Gui => binary(&mut terminal, chance),
            _ => {
                let word = format!("{:x}", chance.number());
                assert_eq!(terminal.run(&format!("echo {word}")), word);
                word.len()
            }
        };
    }
    match chance.below(5) {
        0 => {
            terminal.input("exit 7\n");
            assert_eq!(terminal.expect_after_output("stop", SOON).status(), Some(2));
        }
        1 => {
            let pid = terminal.run("echo $$").parse().expect("a process id");
            // Unless the link was cut just now.
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            assert_eq!(terminal.expect_after_output("stop", SOON).status(), Some(2));
        }
        2 => {
            terminal.input("yes\n");
            terminal.next(SOON);
            terminal.ask_stop();
            let reply = terminal.expect_after_output("stop", SOON);
            assert_eq!((reply.status(), reply.body), (Some(1), None));
        }
        3 => {
            terminal.run(&format!("{{ sleep {MARK} & }}"));
            terminal.stop();
        }
        _ => terminal.stop(),
    }
    checked
}

/// Whether there is a place for a shell: after several cuts all may be taken by those that are kept.
fn opens(terminal: &Terminal) -> bool {
    terminal.ask_new();
    let msg = terminal.next(SOON);
    let full = (msg.status(), msg.text().as_str()) == (Some(2), "too many shells spawned");
    assert!(full || (msg.typ.as_str(), msg.status()) == ("new", Some(1)), "{}", msg.summary());
    !full
}

/// The name of the user who comes back.
pub const KEEPER: &str = "keeper";

/// A user who comes back to the shell that a cut link left behind.
#[derive(Default)]
pub struct Keeper {
    /// The shell, and the session in which it was used last.
    left: Option<(String, Terminal)>,
}

/// How often the keeper found the shell again.
pub static RETURNS: AtomicU64 = AtomicU64::new(0);

impl Keeper {
    pub fn job(&mut self, device: &Device, chance: &mut Chance) -> usize {
        let Some(mut terminal) = self.come_back(device, chance) else { return 0 };
        let mut checked = 0;
        for _ in 0..chance.between(1, 10) {
            let word = format!("{:x}", chance.number());
            assert_eq!(terminal.run(&format!("echo {word}; sleep 0.1")), word);
            checked += word.len();
        }
        terminal.stop();
        self.left = None;
        checked
    }

    /// Either in the same session or in another of the same user. The shell may be over by now.
    fn come_back(&mut self, device: &Device, chance: &mut Chance) -> Option<Terminal> {
        let left = self.left.take();
        if let Some((pid, terminal)) = &left
            && chance.one_in(2)
        {
            let terminal = terminal.clone().on(device);
            if let Some(same) = process_id(&terminal) {
                assert_eq!(same, *pid, "the session has another shell");
                RETURNS.fetch_add(1, Ordering::Relaxed);
                return Some(self.use_shell(same, terminal));
            }
        }
        let terminal = Terminal::of_user(device, KEEPER);
        if !opens(&terminal) {
            return None;
        }
        let shell = process_id(&terminal).expect("it was just opened");
        match left {
            Some((pid, _)) if shell != pid => {
                let pid = pid.parse().expect("a number");
                let what = "the end of the shell for which there is another";
                eventually_if_linked(device, what, || !proc::is_running(pid));
            }
            Some(_) => _ = RETURNS.fetch_add(1, Ordering::Relaxed),
            None => {}
        }
        Some(self.use_shell(shell, terminal))
    }

    fn use_shell(&mut self, pid: String, terminal: Terminal) -> Terminal {
        self.left = Some((pid, terminal.clone()));
        terminal
    }
}

/// The terminal's shell, which has a prompt then, if the session is still there.
fn process_id(terminal: &Terminal) -> Option<String> {
    terminal.input("echo pid=$$=\n");
    let mut text = String::new();
    loop {
        let msg = terminal.next(SOON);
        if msg.status() != Some(1) {
            return None;
        }
        text += &msg.text();
        // Not in the echo of the command line.
        let mut values = text.split("pid=").skip(1).filter_map(|rest| rest.split_once('='));
        if let Some((pid, _)) = values.find(|(pid, _)| pid.parse::<u32>().is_ok())
            && (text.ends_with("# ") || text.ends_with("$ "))
        {
            return Some(pid.to_owned());
        }
    }
}

/// A paste of any bytes into a program that gives them back.
fn binary(terminal: &mut Terminal, chance: &mut Chance) -> usize {
    let size = chance.size(256 << 10);
    let bytes = chance.bytes(size);
    terminal.input(format!("stty raw -echo; printf 're''ady'; head -c {size}; stty sane\n"));
    terminal.read_until("ready", SOON);
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(chance.size(100_000).min(rest.len()));
        terminal.input(piece);
        rest = behind;
    }
    let mut back = Vec::with_capacity(size);
    while back.len() < size {
        let msg = terminal.next(SOON);
        assert_eq!((msg.typ.as_str(), msg.status()), ("shell", Some(1)), "{}", msg.summary());
        back.extend(msg.body.expect("output"));
    }
    terminal.pending = String::from_utf8_lossy(&back.split_off(size)).into_owned();
    assert!(back == bytes, "{size} bytes came back changed");
    terminal.prompt();
    2 * size
}

pub fn tcp(device: &Device, chance: &mut Chance) -> usize {
    let client = Client::open(device);
    let mut checked = 0;
    let to = |target: &Target| client.connect("tcp", "127.0.0.1", target.port());
    match chance.below(5) {
        0 => {
            let size = chance.size(4 << 20);
            let target = Target::start(Role::Source(size as u64));
            let connection = to(&target).opened();
            let bytes = connection.read_within(size, secs(60));
            assert!(bytes == stream(0, size), "{size} bytes came changed");
            assert!(connection.stopped().is_empty());
            target.wait_all_closed(1);
            checked += size;
        }
        1 => {
            let size = chance.size(300_000);
            let target = Target::start(Role::Discard);
            let connection = to(&target).opened();
            connection.write(&stream(0, size));
            connection.stop();
            eventually_if_linked(device, "all bytes", || target.received() == size as u64);
            target.assert_intact();
            target.wait_all_closed(1);
            checked += size;
        }
        2 => {
            let (_closed, port) = closed_port();
            client.connect("tcp", "127.0.0.1", port);
            let error = client.next_error();
            assert!(error.text.contains("refused"), "{error:?}");
        }
        _ => {
            let target = Target::start(Role::Echo);
            let connections: Vec<Connection> = (0..chance.between(1, 5)).map(|_| to(&target)).collect();
            let connections: Vec<Connection> = connections.into_iter().map(Connection::opened).collect();
            let mut at = vec![0; connections.len()];
            for _ in 0..chance.between(1, 20) {
                let n = chance.below(connections.len());
                let size = chance.size(40_000);
                let bytes = stream(at[n], size);
                connections[n].write(&bytes);
                assert!(connections[n].read(size) == bytes, "{size} bytes came back changed");
                at[n] += size as u64;
                checked += 2 * size;
            }
            for connection in connections {
                match chance.below(3) {
                    0 => connection.stop(),
                    1 => connection.ask_stop(),
                    _ => {}
                }
            }
            client.close();
            target.wait_all_closed(at.len());
            target.assert_intact();
            return checked;
        }
    }
    client.close();
    checked
}

pub fn udp(device: &Device, chance: &mut Chance) -> usize {
    let (client, target) = (Client::open(device), UdpEcho::start());
    let connection = client.connect("udp", "127.0.0.1", target.port()).opened();
    let mut checked = 0;
    for sent in 1..=chance.between(1, 40) {
        let size = chance.between(1, 4096);
        let datagram = chance.bytes(size);
        connection.send(&datagram);
        let back = connection.next(SOON);
        assert!(target.wait_received(sent)[sent - 1] == datagram, "a datagram arrived changed");
        assert!(back == Some(datagram), "a datagram came back changed");
        checked += 2 * size;
        if chance.one_in(4) {
            let size = chance.between(1, 60_000);
            let datagram = chance.bytes(size);
            target.send(&datagram);
            assert!(connection.next(SOON) == Some(datagram), "a datagram came changed");
            checked += size;
        }
    }
    if chance.one_in(2) {
        connection.stop();
    }
    client.close();
    checked
}

/// What the fake of the Mender client does.
pub const CLIENT: &str = "#!/bin/sh
case $(($(od -An -N1 -tu1 /dev/urandom) % 4)) in
0) exit 0 ;;
1) exit 5 ;;
2) kill -9 $$ ;;
*) sleep 0.2 ;;
esac
";

pub fn command(device: &Device, chance: &mut Chance) -> usize {
    let typ = ["check-update", "send-inventory"][chance.below(2)];
    let msg = if chance.one_in(2) {
        let sid = new_sid();
        device.send(COMMANDS, typ, &sid, &[("user_id", "u".into())], b"");
        let msg = device.next_of(&sid, SOON);
        device.send(CONTROL, "close", &sid, &[], b"");
        msg
    } else {
        device.send(COMMANDS, typ, "", &[], b"");
        // A hostile peer's commands may have lost their session, too, and be answered without.
        device.take(SOON, "an answer without sid", |m| m.sid.is_none() && m.typ == typ)
    };
    let good = match (msg.status(), msg.text().as_str()) {
        (Some(1), "") | (Some(2), "exit status 5" | "signal: killed") => true,
        (Some(2), text) => text.starts_with("Cannot find Mender client binary"),
        _ => false,
    };
    assert!(good && (msg.proto, msg.typ.as_str()) == (COMMANDS, typ), "{}", msg.summary());
    0
}

/// Sessions that are opened, asked and closed.
pub fn control(device: &Device, chance: &mut Chance) -> usize {
    let sids: Vec<String> = (0..chance.between(1, 8)).map(|_| new_sid()).collect();
    let versions = msg::encode(&map(&[("versions", rmpv::Value::Array(vec![1.into()]))]), Ints::Compact);
    for sid in &sids {
        device.send(CONTROL, "open", sid, &[("user_id", "u".into())], &versions);
    }
    for sid in &sids {
        assert_eq!(device.next_of(sid, SOON).typ, "accept");
    }
    for _ in 0..chance.between(1, 30) {
        let sid = &sids[chance.below(sids.len())];
        let (proto, typ) =
            [(CONTROL, "ping"), (CONTROL, "bogus"), (12_345, "new"), (SHELL, "stop")][chance.below(4)];
        device.send(proto, typ, sid, &[("user_id", "u".into())], b"");
        let msg = device.next_of(sid, SOON);
        match (proto, typ) {
            (CONTROL, "ping") => assert_eq!(msg.typ, "pong"),
            (SHELL, _) => assert!(msg.text().contains("session not found"), "{}", msg.summary()),
            _ => assert!(!complaint(&msg).1, "{}", msg.summary()),
        }
    }
    for sid in &sids {
        device.send(CONTROL, "close", sid, &[], b"");
    }
    0
}

/// What no server sends, but nothing that takes the link away or leaves a session behind.
pub fn nonsense(device: &Device, chance: &mut Chance) -> usize {
    let sid = new_sid();
    for _ in 0..chance.between(1, 20) {
        let size = chance.size(20_000);
        let bytes = match chance.below(3) {
            // Not msgpack.
            0 => [vec![0xc1], chance.bytes(size)].concat(),
            // Promises of 4 GiB.
            1 => [b"\x82\xa3hdr\x81\xa5proto\x01\xa4body\xc6\xff\xff\xff\xff".to_vec(), chance.bytes(size)]
                .concat(),
            _ => chance.bytes(4).iter().map(|byte| byte & 0x7f).collect(),
        };
        device.send_binary(&bytes);
    }
    device.send(SHELL, "bogus", &sid, &[], b"");
    assert_eq!((device.next_of(&sid, SOON).status()), Some(2));
    device.send(FILES, "bogus", &sid, &[], b"");
    assert_eq!(device.next_of(&sid, SOON).typ, "error");
    // In pieces, with a ping between them.
    let ping = msg::encode(&msg::message(CONTROL, "ping", &sid, &[], b""), Ints::Wide);
    let (first, second) = ping.split_at(chance.between(1, ping.len() - 1));
    let frames = [
        wire::encode(false, wire::BINARY, first),
        wire::encode(true, wire::PING, b"in between"),
        wire::encode(true, wire::CONTINUATION, second),
    ];
    device.write(&frames.concat()).expect("write to the device");
    assert_eq!(device.next_of(&sid, SOON).typ, "pong");
    device.send(CONTROL, "close", &sid, &[], b"");
    0
}

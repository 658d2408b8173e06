//! Peers that send what no peer should. The agent must survive, and a shell must still work.

use rmpv::Value;

use crate::harness::client::{Style, Terminal, new_sid, size};
use crate::harness::device::Device;
use crate::harness::msg::{self, CONTROL, Ints, SHELL, map};
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup};
use crate::harness::wait::{SOON, eventually, millis, secs};
use crate::harness::wire;

fn rig() -> (Rig, Device) {
    Setup::new().set("ReconnectIntervalSeconds", 1).connected()
}

/// A shell works, on this link or on the next if the agent preferred to drop this one.
fn still_works(rig: &mut Rig, device: &Device) {
    let mut device = device.clone();
    // Whatever was sent before has been dealt with when this is answered.
    let sid = new_sid();
    let asked = device.try_frame(
        true,
        wire::BINARY,
        &msg::encode(&msg::message(CONTROL, "ping", &sid, &[], b""), Ints::Compact),
    );
    let settled = eventually(secs(30), "an answer or a new link", || {
        if device.is_over() || asked.is_err() {
            return Some(false);
        }
        device.drain(&sid).iter().any(|m| m.typ == "pong").then_some(true)
    });
    if !settled {
        device = rig.next_link();
    }
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo works"), "works");
    terminal.stop();
    assert!(rig.daemon.is_running());
}

#[test]
fn garbage_is_survived() {
    let (mut rig, device) = rig();
    let valid =
        msg::encode(&msg::message(CONTROL, "ping", "s", &[("user_id", "u".into())], b"body"), Ints::Compact);
    let mut all: Vec<Vec<u8>> = vec![Vec::new(), vec![0xc1], vec![0xc0], b"hello".to_vec(), vec![0xff; 1000]];
    // Every way of cutting a good message short.
    all.extend((0..valid.len()).map(|end| valid[..end].to_vec()));
    // Something behind the document.
    all.push([valid.clone(), valid.clone()].concat());
    for bytes in all {
        if device.try_frame(true, wire::BINARY, &bytes).is_err() {
            break;
        }
    }
    still_works(&mut rig, &device);
}

#[test]
fn every_byte_changed_is_survived() {
    let (mut rig, mut device) = rig();
    let terminal = Terminal::new(&device, Style::Cli);
    let props = [("user_id", Value::from("u")), ("terminal_width", 80.into())];
    let valid = msg::encode(&msg::message(SHELL, "resize", &terminal.sid, &props, b""), Ints::Wide);
    for at in 0..valid.len() {
        for value in [0x00, 0x7f, 0x80, 0x91, 0xa1, 0xc0, 0xc1, 0xc6, 0xcb, 0xd9, 0xdd, 0xdf, 0xff] {
            let mut bytes = valid.clone();
            bytes[at] = value;
            if device.try_frame(true, wire::BINARY, &bytes).is_err() {
                device = rig.next_link();
            }
        }
    }
    still_works(&mut rig, &device);
}

#[test]
fn random_messages_are_survived() {
    let (mut rig, mut device) = rig();
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..3000 {
        let length = random() % 200;
        let mut bytes: Vec<u8> = (0..length).map(|_| (random() >> 32) as u8).collect();
        if random().is_multiple_of(2) {
            bytes.splice(0..0, *b"\x82\xa3hdr\x84\xa5proto");
        }
        if device.try_frame(true, wire::BINARY, &bytes).is_err() {
            device = rig.next_link();
        }
    }
    still_works(&mut rig, &device);
}

#[test]
fn promises_of_huge_lengths_allocate_nothing() {
    let (mut rig, device) = rig();
    let before = proc::rss_kib(rig.daemon.pid());
    for marker in [0xc6u8, 0xdb, 0xdd, 0xdf, 0xc9] {
        for head in [
            &b""[..],
            b"\x81\xa3hdr",
            b"\x82\xa3hdr\x81\xa5proto\x01\xa4body",
            b"\x81\xa3hdr\x82\xa5proto\x01\xa5props",
        ] {
            let bytes = [head, &[marker, 0xff, 0xff, 0xff, 0xff], b"short"].concat();
            let _ = device.try_frame(true, wire::BINARY, &bytes);
        }
    }
    still_works(&mut rig, &device);
    let after = proc::rss_kib(rig.daemon.pid());
    assert!(after < before + (32 << 10), "resident memory went from {before} to {after} KiB");
}

#[test]
fn deep_nesting_is_survived() {
    for marker in [0x91u8, 0x81] {
        let (mut rig, device) = rig();
        let deep = match marker {
            0x91 => vec![0x91; 1 << 20],
            _ => [0x81, 0xa1, b'k'].repeat(300_000),
        };
        let inside = |field: &[u8]| [field, &deep[..deep.len() - 100]].concat();
        for bytes in [
            deep.clone(),
            inside(b"\x81\xa3hdr"),
            inside(b"\x82\xa3hdr\x82\xa5proto\x01\xa3typ\xa3new\xa7unknown"),
            inside(b"\x81\xa3hdr\x83\xa5proto\x01\xa3typ\xa3new\xa5props"),
            inside(b"\x82\xa3hdr\x82\xa5proto\x01\xa3typ\xa3new\xa4body"),
        ] {
            let _ = device.try_frame(true, wire::BINARY, &bytes);
        }
        // The same as the body of a control message, which is a document of its own.
        let body = &deep[..deep.len() - 200];
        let open = msg::message(CONTROL, "open", &new_sid(), &[], body);
        let _ = device.try_frame(true, wire::BINARY, &msg::encode(&open, Ints::Compact));
        still_works(&mut rig, &device);
    }
}

#[test]
fn text_messages_are_ignored() {
    let (mut rig, device) = rig();
    device.send_frame(true, wire::TEXT, b"hello");
    device.send_frame(true, wire::TEXT, "{\"hdr\":{}}".as_bytes());
    device.send_frame(true, wire::TEXT, b"");
    still_works(&mut rig, &device);
}

#[test]
fn broken_websocket_frames_end_only_the_link() {
    let masked = [0x82, 0x80 | 4, 1, 2, 3, 4, 0, 0, 0, 0];
    let long_ping = [&[0x89, 126, 0, 200][..], &[0; 200]].concat();
    for (what, bytes) in [
        ("reserved opcode", &[0x83, 0][..]),
        ("reserved bits", &[0xf2, 0]),
        ("masked by the server", &masked),
        ("continuation of nothing", &[0x80, 1, b'x']),
        ("fragmented ping", &[0x09, 0]),
        ("long ping", &long_ping),
        ("invalid UTF-8", &[0x81, 2, 0xc3, 0x28]),
        ("close of one byte", &[0x88, 1, 3]),
        ("invalid close code", &[0x88, 2, 0, 1]),
    ] {
        let (mut rig, device) = rig();
        device.write(bytes).expect("write");
        println!("{what}");
        still_works(&mut rig, &device);
    }
}

#[test]
fn headers_of_wrong_types_are_survived() {
    let (mut rig, device) = rig();
    let odd = [
        Value::Nil,
        Value::from(-1),
        Value::from(1u64 << 40),
        Value::from(true),
        Value::from(1.5),
        Value::from(""),
        Value::from("text"),
        Value::from(&b"bin"[..]),
        Value::Array(vec![]),
        map(&[]),
        Value::Ext(-1, vec![0; 8]),
        Value::from("x".repeat(100_000)),
    ];
    for value in &odd {
        for field in ["proto", "typ", "sid", "props"] {
            let mut header =
                vec![("proto", Value::from(SHELL)), ("typ", "new".into()), ("sid", "odd".into())];
            header.retain(|(key, _)| *key != field);
            header.push((field, value.clone()));
            let _ = device.try_frame(
                true,
                wire::BINARY,
                &msg::encode(&map(&[("hdr", map(&header))]), Ints::Compact),
            );
        }
        let sid = new_sid();
        for prop in ["user_id", "terminal_width", "terminal_height", "status", "timeout", "msgid"] {
            for typ in ["resize", "shell", "pong", "stop"] {
                let message = msg::message(SHELL, typ, &sid, &[(prop, value.clone())], b"");
                let _ = device.try_frame(true, wire::BINARY, &msg::encode(&message, Ints::Compact));
            }
        }
        let header = map(&[("proto", SHELL.into()), ("typ", "shell".into()), ("sid", sid.as_str().into())]);
        let whole = map(&[("hdr", header), ("body", value.clone())]);
        let _ = device.try_frame(true, wire::BINARY, &msg::encode(&whole, Ints::Compact));
    }
    still_works(&mut rig, &device);
}

#[test]
fn messages_without_a_session_get_no_shell_message_back() {
    let (mut rig, device) = rig();
    for proto in [0, SHELL, 2, 3, 4, 77, CONTROL] {
        for typ in ["", "new", "shell", "stop", "resize", "open", "ping", "close", "bogus"] {
            if proto == 4 && typ != "bogus" {
                continue;
            }
            device.send(proto, typ, "", &[("user_id", "u".into())], b"x");
        }
    }
    still_works(&mut rig, &device);
    // The released server closes the link at a shell message without sid.
    assert!(device.broken().is_empty(), "{:?}", device.broken());
    assert!(!device.is_over());
}

#[test]
fn thousands_of_session_ids_are_survived() {
    let (mut rig, device) = rig();
    let idle = proc::threads(rig.daemon.pid());
    for _ in 0..5000 {
        let sid = new_sid();
        device.send(CONTROL, "ping", &sid, &[], b"");
        device.send(SHELL, "shell", &sid, &[], b"x");
    }
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.ask_new();
    let started =
        device.take(secs(40), "a shell beside the flood", |m| m.sid.as_ref() == Some(&terminal.sid));
    assert_eq!((started.typ.as_str(), started.status()), ("new", Some(1)), "{}", started.summary());
    terminal.prompt();
    assert_eq!(terminal.run("echo works"), "works");
    let threads = proc::threads(rig.daemon.pid());
    println!("threads: {idle} idle, {threads} after 5,000 session ids");
    assert!(threads < idle + 1100, "sessions are bounded in number; there are {threads} threads");
    assert!(rig.daemon.is_running());
}

#[test]
fn long_session_ids_and_users_are_survived() {
    let (mut rig, device) = rig();
    // Up to a bound, beyond which they would be a way to fill the memory and the log.
    for length in [3000, 500_000] {
        let long = "s".repeat(length);
        device.send(SHELL, "new", &long, &[("user_id", long.as_str().into())], b"");
        device.send(SHELL, "stop", &long, &[("user_id", long.as_str().into())], b"");
        device.send(CONTROL, "ping", &long, &[], b"");
    }
    rig.daemon.wait_for_log("the header's length is out of range", SOON);
    let longest = rig.daemon.log().iter().map(String::len).max();
    assert!(longest < Some(10_000), "a log line of {longest:?} bytes");
    let odd = "\u{0}\n\r\u{1b}[31m../../etc/passwd %s %n";
    device.send(SHELL, "stop", odd, &[("user_id", odd.into())], b"");
    device.send(SHELL, "bogus\ntime=\"forged\"", odd, &[], b"");
    let answer = device.take(SOON, "an answer to the odd session", |m| m.sid.as_deref() == Some(odd));
    assert!(answer.text().ends_with(odd), "{}", answer.summary());
    still_works(&mut rig, &device);
    let forged = rig.daemon.log().iter().any(|line| line.starts_with("time=\"forged"));
    assert!(!forged, "a peer can write lines into the log");
}

#[test]
fn shells_started_and_stopped_in_haste() {
    let (mut rig, device) = rig();
    let terminals: Vec<Terminal> = (0..4).map(|_| Terminal::new(&device, Style::Cli)).collect();
    for _ in 0..25 {
        for terminal in &terminals {
            terminal.ask_new();
            terminal.input("echo in haste\n");
            terminal.resize(100, 50);
            terminal.ask_stop();
        }
    }
    for terminal in &terminals {
        for n in 0..25 {
            let started = terminal.expect_after_output("new", SOON);
            assert_eq!((started.status(), started.text().as_str()), (Some(1), "Shell started"), "round {n}");
            let stopped = terminal.expect_after_output("stop", SOON);
            assert_eq!((stopped.status(), stopped.body), (Some(1), None), "round {n}");
        }
    }
    eventually(SOON, "no shell to be left", || proc::children(rig.daemon.pid()).is_empty().then_some(()));
    still_works(&mut rig, &device);
}

#[test]
fn a_storm_of_resizes_and_pings_is_survived() {
    let (mut rig, device) = rig();
    let mut terminal = Terminal::new(&device, Style::Gui);
    terminal.open_with_prompt();
    for n in 0..5000u16 {
        terminal.send("resize", &size(n, n.wrapping_mul(7)), b"");
        if n % 10 == 0 {
            device.ping(&n.to_be_bytes());
        }
    }
    // What didn't fit into the session's inbox was refused; a last one gets through.
    eventually(SOON, "the last size to arrive", || {
        terminal.resize(99, 33);
        terminal.forget_output();
        (terminal.run("stty size") == "33 99").then_some(())
    });
    let lines = rig.daemon.log().len();
    assert!(lines < 50, "a peer that sends too much fills the log: {lines} lines");
    terminal.stop();
    still_works(&mut rig, &device);
}

#[test]
fn a_device_connection_that_is_cut_in_the_middle_of_a_frame() {
    let (rig, mut device) = rig();
    for cut in [1, 2, 3, 10, 100] {
        let frame = wire::encode(true, wire::BINARY, &[0x80; 200]);
        device.write(&frame[..cut]).expect("write");
        device.hang_up();
        device = rig.next_link();
    }
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    device.nothing(millis(50), "nothing odd", |m| m.typ == "error");
}

//! Clients and users who mean harm.

use std::net::Ipv4Addr;
use std::time::Instant;

use rmpv::Value;

use crate::forwards::{assert_echo, session};
use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::daemon::emulated;
use crate::harness::device::Device;
use crate::harness::dns::{Answer, NameServer, obstacle};
use crate::harness::forward::{Client, target_body};
use crate::harness::msg::{COMMANDS, CONTROL, FILES, Ints, Msg, PORTS, SHELL, encode, map};
use crate::harness::proc;
use crate::harness::rig::Rig;
use crate::harness::targets::{Role, Target, stream};
use crate::harness::wait::{SOON, eventually, secs, skip};

/// The largest body that may be asked of memory.
const MOST_KIB: u64 = 40 << 10;

/// A body of one byte kept the message of a mebibyte alive that it came in, while the bounds of a forward counted the
/// byte: 260 such messages ended an agent that was limited to 256 MiB.
#[test]
fn a_small_body_does_not_keep_its_message() {
    let (rig, device, client) = session();
    let target = Target::start(Role::Stalled);
    let connection = client.connect("tcp", "127.0.0.1", target.port()).opened();
    let mut sent = 0;
    while connection.in_flight() < 4 {
        connection.send_anyway(&stream(sent, 64 << 10));
        sent += 64 << 10;
        connection.acked_within(crate::harness::wait::millis(200));
    }
    let ballast = Value::Binary(vec![0; 1 << 20]);
    let props = map(&[("connection_id", connection.id.as_str().into()), ("user_id", "u".into())]);
    let header =
        [("proto", PORTS.into()), ("typ", "forward".into()), ("sid", client.sid().into()), ("props", props)];
    let message = map(&[("hdr", map(&header)), ("body", Value::Binary(vec![7])), ("zzz", ballast)]);
    for _ in 0..300 {
        device.send_value(&message, Ints::Compact);
    }
    assert!(device.answers(b"all of it", secs(60)));
    let rss = proc::rss_kib(rig.daemon.pid());
    assert!(rss < MOST_KIB || emulated("its memory is the emulator's, too"), "{rss} KiB");
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo works"), "works");
    drop(rig);
}

/// `stop` left a connection among those that are owed an acknowledgement, and a new one of the same id, which followed
/// at once, was then owed 2^64 - 1 of them: the agent took all memory when the target ended.
#[test]
fn a_connection_id_is_used_again_at_once() {
    let (rig, device, _client) = session();
    let (sid, id) = (new_sid(), "again");
    let target = Target::start(Role::Stalled);
    let props = [("connection_id", Value::from(id)), ("user_id", "u".into())];
    let body = target_body("127.0.0.1", target.port(), "tcp");
    let of = |typ: &'static str| move |m: &Msg| m.proto == PORTS && m.typ == typ;
    device.send(PORTS, "new", &sid, &props, &body);
    device.take(SOON, "the answer to new", of("new"));
    // Until the target's buffers and the agent's are full, and acks are owed.
    loop {
        device.send(PORTS, "forward", &sid, &props, &[0; 64 << 10]);
        match device.try_take(crate::harness::wait::millis(500), of("ack")) {
            Some(ack) => ack.map(drop).unwrap(),
            None => break,
        }
    }
    let message = |typ, body: &[u8]| {
        let value = crate::harness::msg::message(PORTS, typ, &sid, &props, body);
        crate::harness::wire::encode(true, crate::harness::wire::BINARY, &encode(&value, Ints::Compact))
    };
    // One write, so that the agent reads them together.
    device.write(&[message("stop", b""), message("new", &body), message("forward", b"x")].concat()).unwrap();
    device.take(SOON, "the ack that was owed", of("ack"));
    device.take(SOON, "the answer to stop", of("stop"));
    device.take(SOON, "the answer to the second new", of("new"));
    device.take(SOON, "the one ack", of("ack"));
    target.release();
    drop(target);
    device.take(SOON, "the target's end", of("stop"));
    // Were more acks owed, they would come before this answer.
    device.send(CONTROL, "ping", &sid, &[], b"");
    device.take(SOON, "pong", |m| m.proto == CONTROL && m.typ == "pong");
    // It may ask a client that acknowledges nothing whether it is there.
    let asked = |m: &&Msg| m.proto == CONTROL && m.typ == "ping";
    let left = device.drain(&sid);
    let left: Vec<String> = left.iter().filter(|m| !asked(m)).map(Msg::summary).collect();
    assert!(left.is_empty(), "{left:#?}");
    drop(rig);
}

/// A path of 600,000 bytes was answered with 1,200,136 bytes, more than the server's own bus takes, which made it close
/// the link: one message of one user took the device from everybody, for minutes each time.
#[test]
fn what_is_too_long_is_neither_taken_nor_repeated() {
    let (_rig, device) = Rig::connected();
    let long = |n| "x".repeat(n);
    let path = |n| encode(&map(&[("path", format!("/{}", long(n)).into())]), Ints::Compact);
    let user = |n: usize| [("user_id", Value::from(long(n)))];
    let connection = |n: usize| [("connection_id", Value::from(long(n)))];
    let refused = |proto, typ: &str, props: &[(&str, Value)], body: &[u8]| {
        let sid = new_sid();
        device.send(proto, typ, &sid, props, body);
        let answer = device.next_of(&sid, SOON);
        assert!(answer.raw.len() < 1024, "{} bytes: {}", answer.raw.len(), answer.summary());
        assert!(answer.typ == "error" || answer.status() == Some(2), "{}", answer.summary());
    };
    for n in [4095, 100_000, 1_000_000] {
        for typ in ["stat", "get_file", "put_file"] {
            refused(FILES, typ, &user(1), &path(n));
        }
    }
    for n in [256, 100_000, 1_000_000] {
        refused(PORTS, "new", &connection(1), &target_body(&long(n), 80, "tcp"));
        refused(PORTS, "new", &connection(1), &target_body("localhost", 80, &long(n)));
    }
    for n in [257, 7000] {
        refused(SHELL, "new", &user(n), b"");
        refused(FILES, "stat", &user(n), &path(1));
        refused(PORTS, "new", &connection(n), &target_body("h", 1, "tcp"));
        refused(CONTROL, "bogus", &[("msgid", Value::from(long(n)))], b"");
        for proto in [SHELL, FILES, PORTS, COMMANDS, CONTROL, 12345] {
            refused(proto, &long(n), &user(1), b"");
        }
    }
    // Not an identifier, but repeated all the same.
    refused(FILES, "get_file", &[("other", Value::from(long(7000)))], &path(5000));
    // The session that this is about has no name that an answer could have.
    device.send(SHELL, "new", &long(257), &user(1), b"");
    device.send(CONTROL, "open", &long(7000), &user(1), b"\x81\xa8versions\x92\x01\xa4long");
    assert!(device.answers(b"still there", SOON));
    device.nothing(crate::harness::wait::millis(100), "nothing more", |_| true);
    // A path as long as the kernel takes is looked for, and not repeated whole.
    let sid = new_sid();
    device.send(FILES, "get_file", &sid, &user(1), &path(4094));
    let answer = device.next_of(&sid, SOON);
    let text = answer.field("err").unwrap().as_str().unwrap().to_owned();
    assert!(text.ends_with(": file name too long") && answer.raw.len() < 1024, "{text}");
}

/// Asks for a forward to a name that no server answers for.
fn look_up(device: &Device, sid: &str, id: usize) {
    let props = [("user_id", "u".into()), ("connection_id", Value::from(id.to_string()))];
    device.send(PORTS, "new", sid, &props, &target_body("silent.test", 80, "tcp"));
}

/// A forward to a name that is known opens at once.
fn assert_others_look_up(device: &Device, target: &Target) {
    let client = Client::open(device);
    let begun = Instant::now();
    assert_echo(&client.connect("tcp", "here.test", target.port()), b"by name");
    assert!(begun.elapsed() < secs(5), "{:?}", begun.elapsed());
    client.close();
}

/// Four look-ups of a session at a time: with three sessions, one user had all of the device's ten, and nobody else
/// reached a target by name while a name server was silent.
#[test]
fn names_of_one_user_leave_look_ups_to_others() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let known =
        [("here.test", Answer::Addresses(vec![Ipv4Addr::LOCALHOST])), ("silent.test", Answer::Silence)];
    let (names, target) = (NameServer::start(&known), Target::start(Role::Echo));
    let (rig, device) = names.setup().connected();
    let sids: Vec<String> = (0..20).map(|_| new_sid()).collect();
    for sid in &sids {
        device.discard(sid);
        // A look-up counts also when its client has given it up.
        for n in 0..20 {
            look_up(&device, sid, n);
            if n % 2 == 0 {
                let props = [("user_id", "u".into()), ("connection_id", Value::from(n.to_string()))];
                device.send(PORTS, "stop", sid, &props, b"");
            }
        }
    }
    assert!(device.answers(b"all of it", SOON));
    names.wait_asked("silent.test", 4);
    assert_others_look_up(&device, &target);
    // A thread that has given its answer takes a moment to end.
    let resolvers = || thread_names(&rig).iter().filter(|name| *name == "resolver\n").count();
    eventually(SOON, "two threads for each name", || (resolvers() <= 2 * 4).then_some(()));
}

/// The four were those of the user's open sessions: three sessions, each closed before the next, had all ten as well.
#[test]
fn names_of_sessions_that_have_ended_leave_look_ups_to_others() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let known =
        [("here.test", Answer::Addresses(vec![Ipv4Addr::LOCALHOST])), ("silent.test", Answer::Silence)];
    let (names, target) = (NameServer::start(&known), Target::start(Role::Echo));
    let (rig, device) = names.setup().connected();
    for ended in 1..=3 {
        let sid = new_sid();
        device.discard(&sid);
        for n in 0..4 {
            look_up(&device, &sid, n);
        }
        device.send(CONTROL, "close", &sid, &[("user_id", "u".into())], b"");
        eventually(SOON, "the session's end", || {
            (rig.daemon.count_log("event=session-end") == ended).then_some(())
        });
    }
    assert_others_look_up(&device, &target);
}

/// A session that waited for a look-up kept its descriptor after its end: within three seconds one user had 4,096.
#[test]
fn sessions_that_wait_for_a_look_up_leave_no_descriptor() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let names = NameServer::start(&[("silent.test", Answer::Silence)]);
    let (rig, device) = names.setup().connected();
    let user = [("user_id", "u".into())];
    let ask = |sid: &str, id: usize| {
        device.discard(sid);
        look_up(&device, sid, id);
    };
    let first = new_sid();
    (0..4).for_each(|id| ask(&first, id));
    assert!(device.answers(b"all look-ups", SOON));
    for ended in [50, 100, 150, 200] {
        for _ in 0..50 {
            let sid = new_sid();
            ask(&sid, 0);
            device.send(CONTROL, "close", &sid, &user, b"");
        }
        eventually(SOON, "their ends", || (rig.daemon.count_log("event=session-end") == ended).then_some(()));
    }
    let most = proc::descriptors(rig.daemon.pid());
    println!("{most} descriptors");
    assert!(most < 100, "{most} descriptors");
}

fn thread_names(rig: &Rig) -> Vec<String> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", rig.daemon.pid())).expect("the threads");
    // One may end meanwhile.
    tasks.flatten().flat_map(|task| std::fs::read_to_string(task.path().join("comm"))).collect()
}

/// Threads had the names of their sessions as they came, and the kernel's log shows the name of one that hangs.
#[test]
fn no_thread_has_a_control_character_in_its_name() {
    let (rig, device) = Rig::connected();
    let sid = "\n<0>\u{1b}[2J\u{9b}\0";
    device.send(CONTROL, "ping", sid, &[("user_id", "u".into())], b"");
    device.next_of(sid, SOON);
    for name in thread_names(&rig) {
        assert!(!name.trim_end_matches('\n').contains(char::is_control) && name.len() > 1, "{name:?}");
    }
}

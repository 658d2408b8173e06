//! The agent held memory and threads that it didn't count.

use std::io::Read;
use std::net::TcpListener;

use rmpv::Value;

use crate::disk::{Frozen, slow_disk};
use crate::harness::client::new_sid;
use crate::harness::daemon::emulated;
use crate::harness::device::{Device, Reading};
use crate::harness::forward::{new_id, target_body};
use crate::harness::msg::{CONTROL, FILES, Ints, Msg, PORTS, SHELL, encode, map};
use crate::harness::proc;
use crate::harness::rest::{Form, Rest, path_body};
use crate::harness::rig::{Rig, Setup};
use crate::harness::targets::Silent;
use crate::harness::wait::{SOON, eventually, millis, secs};

/// Bound for the agent's resident memory at its peak.
const MAX_RSS_KIB: u64 = 40 << 10;

fn assert_memory(rig: &Rig) {
    let peak = proc::peak_rss_kib(rig.daemon.pid());
    println!("peak {peak} KiB");
    assert!(peak < MAX_RSS_KIB || emulated("its memory is the emulator's, too"), "{peak} KiB");
}

fn props(id: &str) -> [(&'static str, Value); 2] {
    [("user_id", "u".into()), ("connection_id", Value::from(id))]
}

/// A session whose messages nobody reads.
fn unread(device: &Device) -> String {
    let sid = new_sid();
    device.discard(&sid);
    sid
}

/// Up to 1,024 answers of each session waited for credit: 78 MiB with 200 sessions.
#[test]
fn answers_that_wait_for_credit() {
    let (rig, device) = Rig::connected();
    let body = target_body("h", 1, &"x".repeat(256));
    for n in 0..200 {
        let sid = unread(&device);
        (0..1000).for_each(|_| device.send(PORTS, "new", &sid, &props("c"), &body));
        assert!(device.answers(format!("session {n}").as_bytes(), secs(60)));
    }
    assert_memory(&rig);
}

/// An ack for each frame was owed to a client that reads none, and all of them became answers when the target ended.
#[test]
fn acks_that_a_client_does_not_read() {
    let (rig, device) = Rig::connected();
    let target = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
    let port = target.local_addr().expect("an address").port();
    let (sid, id) = (new_sid(), "c".repeat(256));
    device.send(PORTS, "new", &sid, &props(&id), &target_body("127.0.0.1", port, "tcp"));
    device.take(SOON, "the answer to new", |m| m.typ == "new");
    let (mut stream, _) = target.accept().expect("a connection");
    stream.set_read_timeout(Some(SOON)).expect("set a time-out");
    let (mut asked, mut taken) = (0, 0);
    let is_over = |m: &Msg| (m.proto, m.typ.as_str()) == (CONTROL, "error");
    // It answers once: one that never does is presumed to read.
    while taken < 150_000 && device.try_take(millis(0), is_over).is_none() {
        if asked == 0 && device.try_take(millis(0), |m| m.typ == "ping").is_some() {
            device.send(CONTROL, "pong", &sid, &props(&id), b"");
            asked += 1;
        }
        (0..500).for_each(|_| device.send(PORTS, "forward", &sid, &props(&id), b"x"));
        let mut piece = [0; 500];
        if stream.read_exact(&mut piece).is_err() {
            break;
        }
        taken += piece.len();
    }
    println!("{taken} bytes were taken");
    drop(stream);
    assert!(device.answers(b"still there", SOON));
    eventually(SOON, "the forward's end", || (rig.daemon.count_log("event=forward") > 0).then_some(()));
    assert_memory(&rig);
    assert!(taken < 150_000);
}

/// As many as there may be descriptors: 48 MiB with 20,000 of them.
#[test]
fn forwards_of_many_sessions() {
    let (rig, device) = Rig::connected();
    let body = target_body("127.0.0.1", 9, "udp");
    let long = "c".repeat(250);
    for n in 0..50 {
        let sid = unread(&device);
        (0..512).for_each(|n| device.send(PORTS, "new", &sid, &props(&format!("{n}{long}")), &body));
        assert!(device.answers(format!("session {n}").as_bytes(), secs(60)));
    }
    let most = proc::descriptors(rig.daemon.pid());
    println!("{most} descriptors");
    assert!(most < 5000, "{most} descriptors");
    assert_memory(&rig);
}

/// A message of 3 KiB kept a buffer of 5 KiB, one of 6 KiB the buffer of 16 KiB that it was read into, and of both only
/// the body counted.
#[test]
fn messages_of_a_few_kibibytes() {
    for size in [3000, 6000, 9000] {
        let (rig, device) = Rig::connected();
        let target = Silent::start();
        for _ in 0..5 {
            let sid = unread(&device);
            for _ in 0..8 {
                let id = new_id();
                let to = target_body("127.0.0.1", target.address.port(), "tcp");
                device.send(PORTS, "new", &sid, &props(&id), &to);
                let header = [
                    ("proto", PORTS.into()),
                    ("typ", "forward".into()),
                    ("sid", sid.as_str().into()),
                    ("props", map(&props(&id))),
                ];
                let body = vec![7; size / 5 * 4 - 120];
                let frames = 500_000 / body.len();
                let [body, other] = [body, vec![0; size / 5]].map(Value::Binary);
                let message = map(&[("hdr", map(&header)), ("body", body), ("zzz", other)]);
                let message = encode(&message, Ints::Compact);
                (0..frames).for_each(|_| device.send_binary(&message));
            }
        }
        assert!(device.answers(b"all of it", secs(60)));
        assert_memory(&rig);
    }
}

/// A message of 33 KiB kept the whole read buffer, which the message before it had made as large as a mebibyte.
#[test]
fn messages_behind_larger_ones() {
    let (rig, device) = Rig::connected();
    let (sid, nobody, target) = (unread(&device), new_sid(), Silent::start());
    let large = vec![0; (1 << 20) - 200];
    for _ in 0..4 {
        let id = new_id();
        let to = target_body("127.0.0.1", target.address.port(), "tcp");
        device.send(PORTS, "new", &sid, &props(&id), &to);
        for _ in 0..25 {
            // Without an answer.
            device.send(SHELL, "resize", &nobody, &[], &large);
            device.send(PORTS, "forward", &sid, &props(&id), &[7; 33 << 10]);
        }
    }
    assert!(device.answers(b"all of it", secs(60)));
    assert_memory(&rig);
}

/// A pong that waited to be written kept that buffer, too.
#[test]
fn pongs_behind_large_messages() {
    let rig = Setup::new().start_with(|server| server.small_receive_buffer(64 << 10));
    let device = rig.device();
    let file = rig.dir.path().join("large");
    let sparse = std::fs::File::create(&file).and_then(|file| file.set_len(1 << 30));
    sparse.expect("a large file");
    device.set_reading(Reading::Paused);
    let body = path_body(file.to_str().expect("UTF-8"));
    for _ in 0..4 {
        device.send(FILES, "get_file", &unread(&device), &[("user_id", "u".into())], &body);
    }
    let mut before = None;
    eventually(SOON, "the writer to wait for the server", || {
        let sent = rig.status()["transferred"]["bytes_out"].as_u64().filter(|sent| *sent > 0);
        (sent.is_some() && sent == std::mem::replace(&mut before, sent)).then_some(())
    });
    let (nobody, large) = (new_sid(), vec![0; (1 << 20) - 200]);
    for n in 0..64 {
        device.send(SHELL, "resize", &nobody, &[], &large);
        device.ping(format!("ping {n}").as_bytes());
    }
    device.set_reading(Reading::Full);
    // Pings beyond those that wait get no answer.
    assert!((0..30).any(|n| device.answers(format!("again {n}").as_bytes(), secs(1))));
    assert_memory(&rig);
}

/// The allocator's share of small frames didn't count: 51 MiB with 250 sessions. And an inbox that had once been full
/// kept the queue's memory.
#[test]
fn inboxes_full_of_small_frames() {
    let (rig, device) = Rig::connected();
    let user = [("user_id", "u".into())];
    let sids: Vec<String> = (0..250).map(|_| unread(&device)).collect();
    for some in sids.chunks(25) {
        device.set_reading(Reading::Paused);
        for sid in some.iter().flat_map(|sid| std::iter::repeat_n(sid, 900)) {
            device.send(CONTROL, "ping", sid, &user, b"");
        }
        device.set_reading(Reading::Full);
        assert!(device.answers(some[0].as_bytes(), secs(60)));
    }
    assert_memory(&rig);
}

/// glibc kept what the threads of 250 sessions had freed: 19 MiB, for ever.
#[test]
fn memory_is_given_back_after_a_flood() {
    if emulated("the memory is the emulator's") {
        return;
    }
    let (rig, device) = Setup::new().set("HeartbeatSeconds", 10).connected();
    let (pid, user) = (rig.daemon.pid(), [("user_id", "u".into()), ("pad", "p".repeat(2000).into())]);
    let before = proc::rss_kib(pid);
    let sids: Vec<String> = (0..250).map(|_| unread(&device)).collect();
    device.set_reading(Reading::Paused);
    for sid in sids.iter().flat_map(|sid| std::iter::repeat_n(sid, 30)) {
        device.send(CONTROL, "ping", sid, &user, b"");
    }
    device.set_reading(Reading::Full);
    assert!(device.answers(b"all of it", secs(60)));
    sids.iter().for_each(|sid| device.send(CONTROL, "close", sid, &user, b""));
    eventually(secs(30), "the memory to be given back", || {
        (proc::threads(pid) < 16 && proc::rss_kib(pid) < before + 8192).then_some(())
    });
}

/// Each commit has a thread beside its session's, but only the latter counted: 405 threads while a disk hung.
#[test]
fn commits_that_hang() {
    let Some(disk) = slow_disk() else { return };
    let (rig, device) = Setup::new().wrapper(disk).connected();
    let uploads: Vec<Rest> = (0..200)
        .map(|n| {
            let rest = Rest::open(&device);
            rest.announce(&Form::to(format!("/mnt/{n}"))).expect("an upload");
            rest.send(FILES, "file_chunk", Some(0), b"data");
            rest.next();
            rest
        })
        .collect();
    let frozen = Frozen::new(rig.daemon.pid());
    uploads.iter().for_each(|rest| rest.send(FILES, "file_chunk", Some(4), b""));
    let commits = || {
        let names = proc::thread_names(rig.daemon.pid());
        names.iter().filter(|name| *name == "commit").count()
    };
    eventually(SOON, "commits to wait for the disk", || (commits() > 50).then_some(()));
    assert!(device.answers(b"all of it", SOON));
    let threads = proc::threads(rig.daemon.pid());
    drop(frozen);
    uploads.iter().for_each(|rest| assert_eq!(rest.next().typ, "ack"));
    println!("{threads} threads");
    assert!(threads < 300, "{threads} threads");
}

/// A message counted until its session took it from the inbox, not while it was handled: 150 sessions that waited for a
/// place for an answer had a mebibyte each.
#[test]
fn messages_that_are_being_handled() {
    let (rig, device) = Rig::connected();
    let user = [("user_id", "u".into())];
    let sids: Vec<String> = (0..150).map(|_| unread(&device)).collect();
    sids.iter().for_each(|sid| device.send(CONTROL, "ping", sid, &user, b""));
    assert!(device.answers(b"all sessions", secs(60)));
    // The answers are no longer than those that go before bulk data.
    let body = path_body(&"/.".repeat(400));
    device.set_reading(Reading::Paused);
    // More answers than there is room for on the way to the server.
    for sid in (0..20).map(|_| unread(&device)).flat_map(|sid| std::iter::repeat_n(sid, 75)) {
        device.send(FILES, "stat", &sid, &user, &body);
    }
    let body = vec![7; 1 << 20];
    sids.iter().for_each(|sid| device.send(CONTROL, "unknown", sid, &user, &body));
    // Until they have been taken: what is measured is the peak.
    let taken = || rig.daemon.count_log("inbox full") > 0 || proc::rss_kib(rig.daemon.pid()) > MAX_RSS_KIB;
    eventually(SOON, "all messages to be read", || taken().then_some(()));
    device.set_reading(Reading::Full);
    assert!(device.answers(b"all of it", secs(60)));
    assert_memory(&rig);
}

/// A list of a million numbers took eight bytes for each: 115 MiB with 30 sessions at once.
#[test]
fn lists_of_a_million_numbers() {
    let (rig, device) = Rig::connected();
    let user = [("user_id", "u".into())];
    let versions = vec![Value::from(2); 1_000_000];
    let body = encode(&map(&[("versions", Value::Array(versions))]), Ints::Compact);
    let sids: Vec<String> = (0..30).map(|_| unread(&device)).collect();
    sids.iter().for_each(|sid| device.send(CONTROL, "ping", sid, &user, b""));
    assert!(device.answers(b"all sessions", secs(60)));
    sids.iter().for_each(|sid| device.send(CONTROL, "open", sid, &user, &body));
    assert!(device.answers(b"all of it", secs(60)));
    eventually(secs(60), "their ends", || (rig.daemon.count_log("event=session-end") == 30).then_some(()));
    assert_memory(&rig);
}

/// A file that doesn't know its size was read into twice the memory that counted, and the allocator kept it: 56 MiB.
#[test]
fn files_that_are_read_to_learn_their_size() {
    let (rig, device) = Rig::connected();
    let user = [("user_id", "u".into())];
    // Larger than what is read.
    let body = path_body("/proc/kallsyms");
    let sids: Vec<String> = (0..250).map(|_| unread(&device)).collect();
    for sid in sids.iter().cycle().take(3 * sids.len()) {
        device.send(FILES, "stat", sid, &user, &body);
    }
    eventually(secs(60), "all answers", || (rig.daemon.count_log("event=stat") == 750).then_some(()));
    assert_memory(&rig);
}

/// Each download held a buffer of 384 KiB while it read: 104 MiB with 250 from storage that hung.
#[test]
fn downloads_from_slow_storage() {
    let (rig, device) = Rig::connected();
    // To a server that answers no pings the agent sends its largest messages.
    device.go_mute();
    let user = [("user_id", "u".into())];
    // The kernel makes it while it is read.
    let body = path_body("/proc/kallsyms");
    let sids: Vec<String> = (0..250).map(|_| unread(&device)).collect();
    sids.iter().for_each(|sid| device.send(FILES, "get_file", sid, &user, &body));
    eventually(secs(60), "64 MiB", || (device.bytes() > 64 << 20).then_some(()));
    assert_memory(&rig);
}

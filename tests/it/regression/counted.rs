//! What the agent held without counting it.

use std::io::Read;
use std::net::TcpListener;

use rmpv::Value;

use crate::harness::client::new_sid;
use crate::harness::daemon::emulated;
use crate::harness::device::Device;
use crate::harness::forward::target_body;
use crate::harness::msg::{CONTROL, Msg, PORTS};
use crate::harness::proc;
use crate::harness::rig::Rig;
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

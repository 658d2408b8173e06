//! How forwarded connections end: by the target, by the client, with the session, with the link.

use std::time::Instant;

use nix::sys::signal::Signal;

use crate::forwards::{NAME, assert_echo, assert_error, send_until_held, session, tcp, udp};
use crate::harness::connection::PIECE;
use crate::harness::forward::Client;
use crate::harness::msg::{CONTROL, Ints, PORTS, encode, map};
use crate::harness::proc;
use crate::harness::rig::Rig;
use crate::harness::targets::{Role, Silent, Target, UdpEcho, stream};
use crate::harness::wait::{SOON, eventually, millis};

#[test]
fn what_the_target_sent_before_its_end_comes_before_the_stop() {
    let (_rig, _device, client) = session();
    for count in [0, 1, 4096, 1_000_000] {
        let target = Target::start(Role::Source(count));
        let connection = tcp(&client, &target);
        let all = connection.stopped();
        assert!(all == stream(0, count as usize), "{} of {count} bytes", all.len());
    }
    // Also when the client takes its time.
    let target = Target::start(Role::Source(1_000_000));
    let connection = client.connect("tcp", "127.0.0.1", target.port());
    connection.hold();
    connection.held(2, SOON);
    target.wait_all_closed(1);
    connection.held_at_rest(millis(200));
    connection.release(1, false);
    connection.release(usize::MAX, true);
    assert!(connection.stopped() == stream(0, 1_000_000));
    client.close();
}

#[test]
fn the_end_of_the_targets_sending_is_the_end() {
    let (_rig, _device, client) = session();
    let target = Target::start(Role::HalfClose(b"bye"));
    let connection = client.connect("tcp", "127.0.0.1", target.port());
    assert_eq!(connection.stopped(), b"bye");
    client.settle();
    client.send("forward", Some(&connection.id), b"too late");
    assert_error(&client, "forward", "unknown connection", Some(&connection.id));
    // The agent has closed its side, too.
    target.wait_all_closed(1);
    client.close();
}

/// A service may have finished its answer while the request is still being sent: what the device has
/// acknowledged by then is the target's.
#[test]
fn what_was_acknowledged_before_the_targets_end_reaches_it() {
    let (_rig, _device, client) = session();
    for _ in 0..20 {
        let target = Target::start(Role::HalfClose(b"bye"));
        let connection = client.connect("tcp", "localhost", target.port());
        let mut sent = 0;
        while sent < 1_000_000 && connection.try_send(&stream(sent, PIECE)) {
            sent += PIECE as u64;
        }
        connection.stopped();
        client.settle();
        if connection.in_flight() == 1 {
            sent -= PIECE as u64;
            assert_error(&client, "forward", "unknown connection", Some(&connection.id));
        }
        target.wait_all_closed(1);
        target.assert_intact();
        assert_eq!(target.received(), sent);
    }
    client.close();
}

#[test]
fn stop_is_answered_and_closes_behind_the_data() {
    let (_rig, _device, client) = session();
    let target = Target::start(Role::Discard);
    let connection = tcp(&client, &target);
    connection.write(&stream(0, 300_000));
    connection.stop();
    target.wait_ends(1);
    assert_eq!(target.received(), 300_000);
    target.assert_intact();
    client.settle();
    client.send("stop", Some(&connection.id), b"");
    assert_error(&client, "stop", "unknown connection", Some(&connection.id));
    let datagrams = UdpEcho::start();
    let connection = udp(&client, &datagrams);
    connection.write(b"datagram");
    connection.stop();
    client.settle();
    client.send("forward", Some(&connection.id), b"x");
    assert_error(&client, "forward", "unknown connection", Some(&connection.id));
    client.close();
}

#[test]
fn stop_while_connecting() {
    let (rig, _device, client) = session();
    let before = proc::descriptors(rig.daemon.pid());
    let silent = Silent::start();
    for _ in 0..10 {
        let connection = client.connect("tcp", "127.0.0.1", silent.address.port());
        connection.send_anyway(b"never delivered");
        connection.stop();
    }
    client.settle();
    let after = || proc::descriptors(rig.daemon.pid()) <= before;
    eventually(SOON, "the sockets to be closed", || after().then_some(()));
    client.close();
}

#[test]
fn stop_while_data_waits_for_the_client() {
    let (rig, _device, client) = session();
    let target = Target::start(Role::Source(u64::MAX));
    for _ in 0..10 {
        let connection = tcp(&client, &target);
        connection.hold();
        connection.held(2, SOON);
        connection.stop();
        // Acks for what had come are no offence.
        connection.release(usize::MAX, true);
    }
    target.wait_all_closed(10);
    client.settle();
    // The window is free again.
    let connection = client.connect("tcp", "127.0.0.1", target.port());
    assert!(connection.read(2_000_000) == stream(0, 2_000_000));
    assert!(rig.daemon.count_log("panic") == 0);
    client.close();
}

/// What was acknowledged is the device's to deliver, also when the client has gone since.
#[test]
fn what_was_acknowledged_reaches_a_slow_target_behind_the_stop() {
    let (_rig, _device, client) = session();
    let target = Target::start(Role::Stalled);
    let connection = tcp(&client, &target);
    let acknowledged = send_until_held(&connection) - PIECE as u64;
    connection.stop();
    client.settle();
    println!("{acknowledged} bytes acknowledged");
    target.release();
    target.wait_ends(1);
    target.assert_intact();
    assert!(target.received() >= acknowledged, "{} of {acknowledged} bytes", target.received());
    client.close();
}

/// Small requests are often over before the device has found the host.
#[test]
fn what_was_acknowledged_while_connecting_reaches_the_target_behind_the_stop() {
    let (_rig, _device, client) = session();
    // With a name the resolver's answer must be noticed whatever the session does at that moment.
    for (host, rounds) in [("127.0.0.1", 20), (NAME, 1000)] {
        for round in 1..=rounds {
            let target = Target::start(Role::Discard);
            let connection = client.connect("tcp", host, target.port());
            connection.send(&stream(0, 1000));
            connection.acked();
            connection.stop();
            target.wait_ends(1);
            assert_eq!(target.received(), 1000, "{host}, round {round}");
        }
    }
    client.close();
}

/// Opens connections of each kind in a new session and ends it; everything must be gone.
fn assert_all_gone(rig: &Rig, client: Client, what: &str, end: impl FnOnce(&Client)) {
    let (echo, stalled) = (Target::start(Role::Echo), Target::start(Role::Stalled));
    let flood = Target::start(Role::Source(u64::MAX));
    let (silent, datagrams) = (Silent::start(), UdpEcho::start());
    let quiet = tcp(&client, &echo);
    assert_echo(&quiet, b"x");
    udp(&client, &datagrams).write(b"x");
    let deaf = tcp(&client, &stalled);
    deaf.send_anyway(&stream(0, 1 << 20));
    let source = tcp(&client, &flood);
    source.hold();
    source.held(1, SOON);
    client.connect("tcp", "127.0.0.1", silent.address.port()).send_anyway(b"x");
    let during = proc::descriptors(rig.daemon.pid());
    let start = Instant::now();
    end(&client);
    echo.wait_all_closed(1);
    flood.wait_all_closed(1);
    eventually(SOON, &format!("{what}: five sockets to be closed"), || {
        (proc::descriptors(rig.daemon.pid()) + 5 <= during).then_some(())
    });
    println!("{what}: all closed after {:?}", start.elapsed());
}

#[test]
fn everything_ends_with_the_session() {
    let (rig, device) = Rig::connected();
    let client = Client::open(&device);
    let sid = client.sid().to_owned();
    assert_all_gone(&rig, client, "close", Client::close);
    device.nothing(millis(150), "no stop follows the close", |m| {
        m.sid.as_ref() == Some(&sid) && m.proto == PORTS && m.typ == "stop"
    });
    let client = Client::open(&device);
    let sid = client.sid().to_owned();
    assert_all_gone(&rig, client, "a closing error", |_| {
        let body = encode(&map(&[("err", "over".into()), ("close", true.into())]), Ints::Compact);
        device.send(CONTROL, "error", &sid, &[], &body);
    });
    // And one session's end is nothing to another.
    let (first, second) = (Client::open(&device), Client::open(&device));
    let target = Target::start(Role::Echo);
    let (ended, alive) = (tcp(&first, &target), tcp(&second, &target));
    assert_echo(&ended, b"x");
    first.close();
    eventually(SOON, "the first to be closed", || (target.ends() == 1).then_some(()));
    assert_echo(&alive, b"alive");
    second.close();
}

#[test]
fn everything_ends_with_the_link() {
    let (rig, device) = Rig::connected();
    let client = Client::open(&device);
    assert_all_gone(&rig, client, "the link's end", |_| device.hang_up());
    let device = rig.next_link();
    let client = Client::open(&device);
    assert_all_gone(&rig, client, "a reset of the link", |_| device.reset());
    let device = rig.next_link();
    let sessions =
        || proc::thread_names(rig.daemon.pid()).into_iter().filter(|n| n.starts_with("s-")).count();
    eventually(SOON, "the sessions' threads to end", || (sessions() == 0).then_some(()));
    let client = Client::open(&device);
    assert_echo(&tcp(&client, &Target::start(Role::Echo)), b"a new link");
    client.close();
}

#[test]
fn the_agent_ends_in_the_middle_of_it() {
    let (mut rig, _device, client) = session();
    let (flood, stalled) = (Target::start(Role::Source(u64::MAX)), Target::start(Role::Stalled));
    let source = tcp(&client, &flood);
    source.read(1_000_000);
    let deaf = tcp(&client, &stalled);
    deaf.send_anyway(&stream(0, 1 << 20));
    let silent = Silent::start();
    client.connect("tcp", "127.0.0.1", silent.address.port());
    let start = Instant::now();
    rig.daemon.signal(Signal::SIGTERM);
    assert_eq!(rig.daemon.wait_exit(SOON).code(), Some(0));
    println!("ended after {:?}", start.elapsed());
    flood.wait_all_closed(1);
}

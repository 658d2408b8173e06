//! How much of forwarded data is on its way at a time: enough to be quick, never more than the client
//! and the released server can hold.

use crate::forwards::{assert_echo, session, tcp};
use crate::harness::connection::{Connection, PIECE};
use crate::harness::device::{Device, Generation};
use crate::harness::forward::Client;
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup};
use crate::harness::targets::{Role, Target, stream};
use crate::harness::wait::{SOON, eventually, millis, secs};

const BOTH: [Generation; 2] = [Generation::New, Generation::Released];
/// The most one connection may have under way; the client queues 20.
const PER_CONNECTION: usize = 16;
/// The slots of the released server's channel to a client.
const SLOTS: usize = 25;

/// A connection to an endless source whose data isn't read.
fn held(client: &Client, source: &Target) -> Connection {
    let connection = client.connect("tcp", "127.0.0.1", source.port());
    connection.hold();
    connection
}

/// How many messages wait for their acks when no more come.
fn held_at_rest(rig: &Rig, device: &Device, connection: &Connection) -> usize {
    eventually(SOON, "the agent to wait", || {
        let held = connection.held_at_rest(millis(200));
        (rig.is_at_rest(device) && connection.held_at_rest(millis(1)) == held).then_some(held)
    })
}

#[test]
fn several_messages_are_under_way_and_no_more_than_the_client_can_queue() {
    for generation in BOTH {
        let (rig, device) = Setup::new().generation(generation).connected();
        let client = Client::open(&device);
        let source = Target::start(Role::Source(u64::MAX));
        let connection = held(&client, &source);
        connection.held(1, SOON);
        let most = held_at_rest(&rig, &device, &connection);
        println!("{generation:?}: {most} messages under way, {:?}", connection.figures());
        assert!((4..=PER_CONNECTION).contains(&most), "{most} messages are under way");
        // An ack makes room for one.
        for acks in [1, 3] {
            let before = connection.figures().forwards;
            connection.release(acks, false);
            connection.held(most, SOON);
            assert_eq!(held_at_rest(&rig, &device, &connection), most);
            assert_eq!(connection.figures().forwards, before + acks);
        }
        connection.release(usize::MAX, true);
        assert!(connection.read(3_000_000) == stream(0, 3_000_000));
        let figures = connection.figures();
        assert!(figures.largest > PIECE, "messages of at most {} bytes", figures.largest);
        assert!(figures.largest < 1 << 20, "a message of {} bytes", figures.largest);
        assert!(figures.most_unacked <= PER_CONNECTION);
        client.close();
    }
}

#[test]
fn bulk_data_comes_in_large_messages() {
    const COUNT: usize = 16 << 20;
    let (_rig, _device, client) = session();
    let source = Target::start(Role::Source(COUNT as u64));
    let connection = tcp(&client, &source);
    assert!(connection.read_within(COUNT, secs(60)) == stream(0, COUNT));
    let figures = connection.figures();
    println!("16 MiB in {} messages, the largest of {} bytes", figures.forwards, figures.largest);
    assert!(figures.forwards < COUNT / PIECE / 2, "{} messages: one in 4 KiB at best", figures.forwards);
    connection.stopped();
    client.close();
}

#[test]
fn the_session_has_a_bound_over_all_connections() {
    for generation in BOTH {
        let (_rig, device) = Setup::new().generation(generation).connected();
        let client = Client::open(&device);
        let source = Target::start(Role::Source(u64::MAX));
        let connections: Vec<_> = (0..8).map(|_| held(&client, &source)).collect();
        source.wait_accepted(8);
        for connection in &connections {
            connection.held_at_rest(millis(200));
        }
        // The client itself counts more than 20 as its death.
        println!("{generation:?}: {} messages under way on 8 connections", client.most_unacked());
        assert!(client.most_unacked() >= 4, "{}", client.most_unacked());
        // Whoever had to wait gets its turn.
        connections.iter().for_each(|c| c.release(usize::MAX, true));
        for connection in &connections {
            assert!(connection.read_within(500_000, secs(30)) == stream(0, 500_000));
        }
        client.close();
    }
}

/// One message more than the channel holds is lost in the released server without a word.
#[test]
fn a_client_that_pauses_loses_nothing() {
    let (_rig, device) = Setup::new().generation(Generation::Released).connected();
    let client = Client::open(&device);
    let (source, echo) = (Target::start(Role::Source(u64::MAX)), Target::start(Role::Echo));
    let sources: Vec<_> = (0..4).map(|_| tcp(&client, &source)).collect();
    let echoes: Vec<_> = (0..4).map(|_| tcp(&client, &echo)).collect();
    // A client that has never answered is given time instead.
    let _more = tcp(&client, &source).read_within(500_000, secs(30));
    for round in 0..5 {
        client.pause(true);
        for connection in &echoes {
            connection.send(b"ping");
        }
        // Nothing more comes after a while without acks.
        let mut last = usize::MAX;
        eventually(SOON, "the agent to wait for acks", || {
            let now = client.backlog();
            let rested = now == std::mem::replace(&mut last, now);
            device.nothing(millis(200), "of nobody else", |m| m.sid.as_deref() != Some(client.sid()));
            rested.then_some(())
        });
        println!("round {round}: {last} messages in the server");
        assert!((4..=SLOTS).contains(&last), "{last} messages in a channel of {SLOTS}");
        client.pause(false);
        for connection in &echoes {
            connection.acked();
            assert_eq!(connection.read(4), b"ping");
        }
    }
    for connection in &sources {
        assert!(connection.read_within(1_000_000, secs(30)) == stream(0, 1_000_000));
    }
    client.close();
}

#[test]
fn connections_that_are_not_read_do_not_hold_up_the_others() {
    for count in [1, 2, 3] {
        let (_rig, _device, client) = session();
        let (source, echo) = (Target::start(Role::Source(u64::MAX)), Target::start(Role::Echo));
        let stuck: Vec<_> = (0..count).map(|_| held(&client, &source)).collect();
        for connection in &stuck {
            connection.held(1, SOON);
            connection.held_at_rest(millis(200));
        }
        let before = tcp(&client, &echo);
        for n in 0..20 {
            assert_echo(&before, &stream(n, 5000));
        }
        assert_echo(&tcp(&client, &echo), &stream(0, 200_000));
        println!("{count} stuck: at most {} under way", client.most_unacked());
        drop(client);
    }
}

#[test]
fn a_target_that_does_not_read_takes_little_memory_and_delays_nobody() {
    const SENT: usize = 8 << 20;
    let (rig, _device, client) = session();
    let pid = rig.daemon.pid();
    let echo = Target::start(Role::Echo);
    let other = tcp(&client, &echo);
    assert_echo(&other, b"warm");
    let idle = proc::rss_kib(pid);
    let target = Target::start(Role::Stalled);
    let connection = tcp(&client, &target);
    let mut sent = 0;
    while sent < SENT {
        connection.send(&stream(sent as u64, PIECE));
        sent += PIECE;
        if !connection.acked_within(millis(500)) {
            break;
        }
    }
    println!("{} KiB acknowledged for a target that doesn't read", (sent - PIECE) >> 10);
    assert!(sent < SENT, "acknowledged without end");
    assert_echo(&other, &stream(0, 100_000));
    let most = proc::rss_kib(pid);
    assert!(most < idle + 4096, "memory grew from {idle} to {most} KiB");
    target.release();
    connection.acked();
    connection.write(&stream(sent as u64, 1_000_000));
    target.wait_received((sent + 1_000_000) as u64);
    target.assert_intact();
    client.close();
}

/// No client of today does this: it sends without waiting for acks. The agent may end the session, but
/// not its memory, nor anybody else's session.
#[test]
fn a_client_without_manners_harms_only_itself() {
    let (rig, device, client) = session();
    let pid = rig.daemon.pid();
    let echo = Target::start(Role::Echo);
    let other = tcp(&client, &echo);
    assert_echo(&other, b"warm");
    let idle = proc::rss_kib(pid);
    let rude = Client::open(&device);
    let stalled = Target::start(Role::Stalled);
    let connection = tcp(&rude, &stalled);
    for n in 0..256 {
        connection.send_anyway(&stream(n * 65_536, 65_536));
        if n % 16 == 0 {
            assert_echo(&other, b"unharmed");
        }
    }
    let most = proc::rss_kib(pid);
    println!("16 MiB unasked: {} KiB more than before", most.saturating_sub(idle));
    assert!(most < idle + (8 << 10), "memory grew from {idle} to {most} KiB");
    assert_echo(&other, &stream(0, 100_000));
    client.close();
}

#[test]
fn surplus_acks_from_the_client_open_no_window() {
    let (_rig, _device, client) = session();
    let source = Target::start(Role::Source(u64::MAX));
    let echo = Target::start(Role::Echo);
    let connection = tcp(&client, &echo);
    for _ in 0..100 {
        client.send("ack", Some(&connection.id), b"");
    }
    assert_echo(&connection, b"alive");
    let connection = held(&client, &source);
    connection.held(1, SOON);
    let most = connection.held_at_rest(millis(200));
    assert!(most <= PER_CONNECTION, "{most} under way");
    client.close();
}

//! UDP through a forward: a message is a datagram and a datagram is a message.

use std::net::UdpSocket;

use crate::forwards::{assert_echo, assert_error, session, tcp, udp};
use crate::harness::targets::{Role, Target, UdpEcho, stream};
use crate::harness::wait::{SOON, millis};

/// The most that fits into a datagram.
const LARGEST: usize = 65_507;

#[test]
fn boundaries_are_kept_up_to_the_largest() {
    let (_rig, _device, client) = session();
    for bind in ["127.0.0.1:0", "[::1]:0"] {
        let target = UdpEcho::bind(bind);
        let connection = udp(&client, &target);
        for (n, size) in [1, 2, 508, 4096, 4097, 8192, 32_768, 65_000, LARGEST, 1].into_iter().enumerate() {
            let datagram = stream(n as u64, size);
            connection.send(&datagram);
            let back = connection.next(SOON).unwrap();
            assert!(back == datagram, "{size} bytes went, {} came back", back.len());
        }
        connection.acked();
        let sizes: Vec<usize> = target.wait_received(10).iter().map(Vec::len).collect();
        assert_eq!(sizes, [1, 2, 508, 4096, 4097, 8192, 32_768, 65_000, LARGEST, 1]);
    }
    client.close();
}

#[test]
fn several_datagrams_are_neither_merged_nor_split() {
    let (rig, _device, client) = session();
    let target = UdpEcho::start();
    let connection = udp(&client, &target);
    connection.send(b"hello");
    assert_eq!(connection.next(SOON).unwrap(), b"hello");
    // All of them lie in the socket when the agent looks.
    rig.daemon.freeze();
    let sizes = [10, 1, 2000, 5, 9000, 3, 1, 1, 400, 70];
    for (n, size) in sizes.into_iter().enumerate() {
        target.send(&vec![n as u8; size]);
    }
    rig.daemon.thaw();
    for (n, size) in sizes.into_iter().enumerate() {
        assert_eq!(connection.next(SOON), Some(vec![n as u8; size]));
    }
    // The other way, without regard for acks.
    for (n, size) in sizes.into_iter().enumerate() {
        connection.send_anyway(&vec![n as u8; size]);
    }
    let received = target.wait_received(11);
    assert!(received[1..].iter().enumerate().all(|(n, d)| *d == vec![n as u8; sizes[n]]));
    client.close();
}

/// Wake-on-LAN goes to a broadcast address, which Mender's agent may send to. Here it was "permission denied".
#[test]
fn datagrams_reach_a_broadcast_address() {
    let (_rig, _device, client) = session();
    let target = UdpSocket::bind("127.255.255.255:0").expect("bind");
    target.set_read_timeout(Some(SOON)).expect("a time limit");
    let port = target.local_addr().expect("an address").port();
    let connection = client.connect("udp", "127.255.255.255", port).opened();
    connection.write(b"wake up");
    let mut datagram = [0; 16];
    let length = target.recv(&mut datagram).expect("a datagram");
    assert_eq!(&datagram[..length], b"wake up");
    client.close();
}

#[test]
fn what_is_no_datagram_is_acknowledged_and_dropped() {
    let (_rig, _device, client) = session();
    let target = UdpEcho::start();
    let connection = udp(&client, &target);
    connection.send(&stream(0, LARGEST + 1));
    connection.acked();
    assert_echo(&connection, b"not merged with that");
    // Without a body; it may be sent as an empty datagram or not at all.
    connection.send(b"");
    connection.acked();
    connection.send(b"behind it");
    loop {
        let next = connection.next(SOON).expect("the connection lives");
        if !next.is_empty() {
            assert_eq!(next, b"behind it");
            break;
        }
    }
    client.close();
}

#[test]
fn a_client_that_does_not_read_loses_whole_datagrams_and_delays_nobody() {
    let (_rig, _device, client) = session();
    let (target, other) = (UdpEcho::start(), Target::start(Role::Echo));
    let connection = udp(&client, &target);
    let echo = tcp(&client, &other);
    connection.send(b"hello");
    assert_eq!(connection.next(SOON).unwrap(), b"hello");
    connection.hold();
    for n in 0..500_u32 {
        target.send(&n.to_be_bytes().repeat(250));
    }
    let held = connection.held_at_rest(millis(300));
    assert!((2..=16).contains(&held), "{held} datagrams are under way");
    assert_echo(&echo, b"flows");
    connection.release(usize::MAX, true);
    client.settle();
    target.send(b"the last");
    let (mut last, mut count) = (None, 0);
    loop {
        let datagram = connection.next(SOON).expect("the connection lives");
        if datagram == b"the last" {
            break;
        }
        let n = u32::from_be_bytes(*datagram.first_chunk().unwrap());
        assert!(datagram == n.to_be_bytes().repeat(250), "split or merged: {} bytes", datagram.len());
        assert!(last.is_none_or(|last| n > last), "{n} after {last:?}");
        (last, count) = (Some(n), count + 1);
    }
    println!("{count} of 500 datagrams came through");
    assert!(count >= held);
    client.close();
}

#[test]
fn a_port_where_nobody_listens_harms_only_its_own_connection() {
    let (_rig, _device, client) = session();
    let free = UdpEcho::start().address.port();
    let lost = client.connect("udp", "127.0.0.1", free).opened();
    let target = UdpEcho::start();
    let alive = udp(&client, &target);
    // The refusal comes back as an error of the socket; whether that is the end is the agent's choice.
    for n in 0..20 {
        if !lost.try_send(b"anybody there?") {
            break;
        }
        if !lost.acked_within(SOON) {
            client.settle();
            assert!(!lost.is_open(), "datagram {n} is never acknowledged");
            assert_error(&client, "forward", "unknown connection", Some(&lost.id));
        }
        assert_echo(&alive, b"unharmed");
    }
    client.settle();
    client.close();
}

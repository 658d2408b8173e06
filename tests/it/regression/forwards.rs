//! Port forwarding.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use std::os::fd::AsRawFd;

use serde_json::json;

use crate::forwards::{assert_echo, send_until_held, session, tcp, udp};
use crate::harness::connection::PIECE;
use crate::harness::forward::Client;
use crate::harness::network::{SERVER, with_network};
use crate::harness::proc;
use crate::harness::rig::{Setup, bash_config, is_root};
use crate::harness::targets::{Role, Silent, Target, UdpEcho};
use crate::harness::wait::{SOON, eventually, millis, secs, skip, spawn, throughout};

/// A target that answers each line after a while: how many lines it had taken when its connection ended or broke.
fn slow_lines(listener: TcpListener) -> usize {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut lines = 0;
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    while let Ok(1..) = reader.read_line(&mut line) {
        lines += 1;
        // The pace of an application, not a wait for anything.
        std::thread::park_timeout(millis(20));
        if (&stream).write_all(b"the answer to that line\n").is_err() {
            break;
        }
        line.clear();
    }
    lines
}

/// A client that had sent its commands and gone took most of them with it: the target's answers met a closed socket,
/// which was reset with what the target had not read yet. 2 of 100 pipelined commands arrived, and the audit log said
/// that all was well.
#[test]
fn a_target_that_talks_back_gets_all_that_was_acknowledged() {
    let (rig, _device, client) = session();
    for close in [false, true] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = spawn("slow-lines", move || slow_lines(listener));
        let connection = client.connect("tcp", "127.0.0.1", port).opened();
        connection.send("a command\n".repeat(100).as_bytes());
        connection.acked();
        if close {
            // mender-cli ends its session without a word about its connections.
            client.close();
        } else {
            connection.stop();
        }
        assert_eq!(target.join().unwrap(), 100);
        let line = rig.daemon.wait_for_log(&format!(":{port}"), SOON);
        assert!(line.contains("result=closed"), "{line}");
        if close {
            return;
        }
    }
}

/// As above, with more than the buffers of the agent and of the target's side hold: it was given up after ten seconds.
#[test]
fn a_slow_talker_gets_all_that_was_acknowledged() {
    let (rig, _device, client) = session();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let target = spawn("slow-blocks", move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        let (mut taken, mut block) = (0, vec![0; 16 << 10]);
        while let Ok(n @ 1..) = stream.read(&mut block) {
            taken += n;
            // The pace of an application, not a wait for anything: 13 s for all.
            std::thread::park_timeout(millis(500));
            if stream.write_all(b"taken\n").is_err() {
                break;
            }
        }
        taken
    });
    let connection = client.connect("tcp", "127.0.0.1", port).opened();
    for _ in 0..25 {
        connection.send(&[b'x'; 16 << 10]);
    }
    connection.acked();
    connection.stop();
    assert_eq!(target.join().unwrap(), 25 * (16 << 10));
    let line = rig.daemon.wait_for_log(&format!(":{port}"), SOON);
    assert!(line.contains("result=closed"), "{line}");
}

/// The audit log said that all was well when a target had not taken what was acknowledged.
#[test]
fn what_is_given_up_is_counted() {
    let (rig, _device, client) = session();
    let target = Target::start(Role::Stalled);
    let connection = tcp(&client, &target);
    let sent = send_until_held(&connection);
    connection.stop();
    // At least what is queued in the agent, and not what the target's kernel has.
    let line = rig.daemon.wait_for_log(&format!(":{}", target.port()), secs(30));
    let given_up = line.split("did not take the last ").nth(1).unwrap().split(' ').next().unwrap();
    let given_up: u64 = given_up.parse().unwrap();
    assert!(
        (16 << 10..sent).contains(&given_up) && line.contains("result=failed"),
        "{sent} were sent: {line}"
    );
}

/// Each forward that a target ended counted as failed, unless the target was so near that it acknowledged the end at once:
/// the end of the stream was taken for a byte of data.
#[test]
fn an_end_that_is_not_acknowledged_yet_is_no_lost_byte() {
    with_network(|network| {
        let server = network.server();
        let rig = network.agent(Setup::new(), &server).start();
        let device = server.next_device(SOON);
        let client = Client::open(&device);
        let listener = TcpListener::bind((SERVER, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        client.connect("tcp", &SERVER.to_string(), port).opened();
        let (target, _) = listener.accept().unwrap();
        rig.daemon.freeze();
        drop(target);
        network.go_dark();
        rig.daemon.thaw();
        let line = rig.daemon.wait_for_log("event=forward", SOON);
        network.answer();
        assert!(line.contains("result=closed") && line.contains(r#"reason="target""#), "{line}");
    });
}

/// After ten minutes without traffic a UDP forward was gone for good. mender-cli never uses one again that was stopped.
#[test]
fn a_udp_forward_comes_back_after_its_time() {
    let setup = Setup::new().set("PortForward", json!({ "IdleTimeout": 1 }));
    let (rig, device) = setup.connected();
    let client = Client::open(&device);
    let (echo, stream) = (UdpEcho::start(), Target::start(Role::Echo));
    let (datagrams, stream) = (udp(&client, &echo), tcp(&client, &stream));
    for round in 1..=3 {
        assert_echo(&datagrams, b"there and back");
        eventually(SOON, "the idle end", || (rig.daemon.count_log(r#"reason="idle""#) > round).then_some(()));
        if round == 1 {
            // Behind the line of the log.
            eventually(SOON, "TCP to be stopped", || (!stream.is_open()).then_some(()));
        }
        assert!(datagrams.is_open(), "its client doesn't know");
        assert_eq!(rig.status()["sessions"][0]["forwards_open"], 0);
    }
    // While its target may not be reached, datagrams are lost and nothing else.
    let mut config = bash_config();
    config["PortForward"] = json!({ "IdleTimeout": 0, "Allow": [] });
    let mark = rig.reload(&config);
    rig.daemon.wait_for_log_after(mark, "the new configuration is in use", SOON);
    datagrams.send(b"lost");
    datagrams.acked();
    rig.daemon.wait_for_log("access denied", SOON);
    config["PortForward"] = json!({ "IdleTimeout": 0 });
    let mark = rig.reload(&config);
    rig.daemon.wait_for_log_after(mark, "the new configuration is in use", SOON);
    assert_echo(&datagrams, b"there again");
    let before = rig.daemon.count_log(r#"reason="idle""#);
    throughout(millis(1500), "0 is for any time", || rig.daemon.count_log(r#"reason="idle""#) == before);
    client.close();
}

/// The checksum of RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// Sends the report that a router sends about a datagram: "destination unreachable" with this code.
fn unreachable(code: u8, from: SocketAddr, to: SocketAddr) {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else { panic!("IPv4 only") };
    let mut datagram = vec![0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0];
    datagram.extend(from.ip().octets());
    datagram.extend(to.ip().octets());
    datagram.extend(from.port().to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend([0, 9, 0, 0, b'x']);
    // The next hop's MTU, where the code is "fragmentation needed".
    let mut message = vec![3, code, 0, 0, 0, 0, 5, 0];
    message.extend(datagram);
    let sum = checksum(&message).to_be_bytes();
    message[2..4].copy_from_slice(&sum);
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp).unwrap();
    let here = SockaddrIn::from(std::net::SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0));
    assert_eq!(sendto(raw.as_raw_fd(), &message, &here, MsgFlags::empty()), Ok(message.len()));
}

/// A router's word about one datagram ended a UDP forward for good: "read: message too long" where the path's MTU had
/// shrunk, "read: no route to host" where a firewall refused once.
#[test]
fn no_report_of_the_network_ends_a_udp_forward() {
    if !is_root() {
        return skip("only root can send ICMP");
    }
    let (_rig, _device, client) = session();
    // An address of its own: for ten minutes the kernel believes the report of its small MTU.
    let target = UdpSocket::bind("127.0.7.1:0").unwrap();
    target.set_read_timeout(Some(SOON)).unwrap();
    let connection = client.connect("udp", "127.0.7.1", target.local_addr().unwrap().port()).opened();
    let mut buffer = [0; 100];
    connection.send(b"first");
    let (_, agent) = target.recv_from(&mut buffer).unwrap();
    // Net, host, protocol and port unreachable, fragmentation needed, prohibited.
    for code in [0, 1, 2, 3, 4, 9, 10, 13] {
        unreachable(code, agent, target.local_addr().unwrap());
        target.send_to(&[b'a' + code], agent).unwrap();
        assert_eq!(connection.next(SOON), Some(vec![b'a' + code]), "code {code}");
        connection.send(&[code]);
        let (n, _) = target.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..n], [code]);
    }
    client.close();
}

/// A connection to a local port where nothing listens was one to itself, and echoed, where the kernel took that very
/// port for its other end: one of 14,000 with the usual range of ports, each with this one.
#[test]
fn a_closed_port_is_refused_where_a_connection_could_meet_itself() {
    with_network(|network| {
        let server = network.server();
        let _rig = network.agent(Setup::new(), &server).start();
        let device = server.next_device(SOON);
        let client = Client::open(&device);
        network.near("echo '40000 40000' > /proc/sys/net/ipv4/ip_local_port_range");
        for (host, shown) in [("127.0.0.1", "127.0.0.1:40000"), ("::1", "[::1]:40000")] {
            for protocol in ["tcp", "udp"] {
                client.connect(protocol, host, 40000);
                let refused = client.next_error().text;
                assert_eq!(refused, format!("dial {protocol} {shown}: connect: connection refused"));
            }
        }
    });
}

/// Acks didn't tell a client when to wait for the sake of its session's bound: with 60 forwards to a service that had hung,
/// each with what had been acknowledged, one after the other ended.
#[test]
fn a_client_that_waits_for_acks_loses_no_forward() {
    let (_rig, _device, client) = session();
    let silent = Silent::start();
    let deaf: Vec<_> = (0..100).map(|_| client.connect("tcp", "127.0.0.1", silent.address.port())).collect();
    for connection in &deaf {
        let mut left = 17;
        while left > 0 && connection.acked_within(millis(30)) {
            connection.send(&[7; PIECE]);
            left -= 1;
        }
    }
    client.settle();
    assert_eq!(client.errors(), 0, "{:?}", client.next_error());
    client.close();
}

/// Small pieces were acknowledged up to the 4096th, and the next one ended the forward.
#[test]
fn a_client_of_small_pieces_that_waits_for_acks_loses_no_forward() {
    let (_rig, _device, client) = session();
    let silent = Silent::start();
    let connection = client.connect("tcp", "127.0.0.1", silent.address.port());
    let mut sent = 0;
    while sent < 5000 && client.errors() == 0 && connection.acked_within(millis(300)) {
        connection.send(b"x");
        sent += 1;
    }
    client.settle();
    println!("{sent} pieces");
    assert_eq!(client.errors(), 0, "{:?}", client.next_error());
    client.close();
}

/// A byte that waits for a target counted as 33, and took more than a hundred.
#[test]
fn a_byte_that_waits_counts_as_what_it_takes() {
    let (rig, _device, client) = session();
    let pid = rig.daemon.pid();
    let silent = Silent::start();
    let deaf: Vec<_> = (0..30).map(|_| client.connect("tcp", "127.0.0.1", silent.address.port())).collect();
    client.settle();
    let (before, begun, mut sent) = (proc::rss_kib(pid), std::time::Instant::now(), 0);
    while begun.elapsed() < secs(30) && client.errors() == 0 && sent < 30 * 4000 {
        for connection in &deaf {
            (0..20).for_each(|_| connection.send_anyway(b"x"));
            sent += 20;
        }
        let owed = || deaf.iter().map(|c| c.in_flight()).sum::<usize>();
        let limit = std::time::Instant::now() + secs(1);
        while owed() > 0 && std::time::Instant::now() < limit {
            client.settle();
        }
        if owed() > 4000 {
            break;
        }
    }
    let grown = proc::rss_kib(pid).saturating_sub(before);
    println!("{sent} bytes in {:?}: {grown} KiB", begun.elapsed());
    assert!(grown < 5 << 10, "{sent} bytes that wait take {grown} KiB");
    client.close();
}

/// The link's end, such as for a new token, ended what a client had left to its slow target before.
#[test]
fn what_a_client_has_left_outlives_the_link() {
    let (rig, device, client) = session();
    let target = Target::start(Role::Stalled);
    let connection = tcp(&client, &target);
    let acknowledged = send_until_held(&connection) - PIECE as u64;
    connection.stop();
    client.settle();
    device.hang_up();
    let _device = rig.next_link();
    target.release();
    let mut last = 0;
    eventually(SOON, "the target to have read all", || {
        let now = target.received();
        if now != last {
            println!("{now} of {acknowledged}");
            last = now;
        }
        (now >= acknowledged).then_some(())
    });
    target.assert_intact();
}

/// A target that had stood still for ten seconds, behind a client that had gone, got a part of what was acknowledged and
/// then an orderly end, as if that were all.
#[test]
fn a_target_does_not_take_a_part_for_all() {
    let (rig, _device, client) = session();
    let target = Target::start(Role::Stalled);
    let connection = tcp(&client, &target);
    let sent = send_until_held(&connection);
    connection.stop();
    rig.daemon.wait_for_log("the target did not take the last", secs(30));
    target.release();
    target.wait_all_closed(1);
    println!("{} of {sent} bytes, {} orderly ends", target.received(), target.ends());
    assert_eq!(target.ends(), 0);
    client.close();
}

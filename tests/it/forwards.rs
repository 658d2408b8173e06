//! Port forwarding as mender-cli uses it: each message, each text, and what happens at the ends.

use crate::harness::client::new_sid;
use crate::harness::connection::{Connection, PIECE};
use crate::harness::device::{Device, Generation};
use crate::harness::forward::{Client, DeviceError, new_id, target_body};
use crate::harness::msg::{Msg, PORTS};
use crate::harness::rig::{Rig, Setup};
use crate::harness::targets::{Role, Target, UdpEcho, stream};
use crate::harness::wait::{SOON, millis, secs};

const BOTH: [Generation; 2] = [Generation::New, Generation::Released];
const INVALID: &str = "invalid port-forward message: missing connection_id, remote_port or protocol";

/// No address but for the resolver, which makes 127.0.0.1 of it without asking anybody.
pub const NAME: &str = "127.1";

/// An agent and a client with an open session.
pub fn session() -> (Rig, Device, Client) {
    let (rig, device) = Rig::connected();
    let client = Client::open(&device);
    (rig, device, client)
}

/// A TCP connection that the device has confirmed.
pub fn tcp(client: &Client, target: &Target) -> Connection {
    client.connect("tcp", &target.address.ip().to_string(), target.port()).opened()
}

pub fn udp(client: &Client, target: &UdpEcho) -> Connection {
    client.connect("udp", &target.address.ip().to_string(), target.port()).opened()
}

/// Sends, and expects it back.
pub fn assert_echo(connection: &Connection, bytes: &[u8]) {
    connection.write(bytes);
    let back = connection.read(bytes.len());
    assert!(back == bytes, "{} bytes came back changed", bytes.len());
}

/// The next error must be this; the connection may be named.
pub fn assert_error(client: &Client, about: &str, text: &str, id: Option<&str>) {
    let error = client.next_error();
    let DeviceError { text: got, about: typ, connection } = &error;
    assert_eq!((typ.as_str(), got.as_str()), (about, text));
    assert!(connection.is_none() || connection.as_deref() == id, "about another connection: {error:?}");
}

/// A message as the device must write it, byte for byte.
fn template(typ: &str, sid: &str, id: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = if body.is_empty() { vec![0x81] } else { vec![0x82] };
    bytes.extend(b"\xa3hdr\x84\xa5proto\xcd\x00\x03\xa3typ");
    bytes.push(0xa0 | typ.len() as u8);
    bytes.extend(typ.as_bytes());
    bytes.extend(b"\xa3sid\xd9\x24");
    bytes.extend(sid.as_bytes());
    bytes.extend(b"\xa5props\x81\xadconnection_id\xd9\x24");
    bytes.extend(id.as_bytes());
    if !body.is_empty() {
        bytes.extend(b"\xa4body\xc4");
        bytes.push(body.len() as u8);
        bytes.extend(body);
    }
    bytes
}

#[test]
fn messages_are_as_the_reference_writes_them() {
    let (_rig, device) = Rig::connected();
    let target = Target::start(Role::Echo);
    // A session needs no open.
    let (sid, id) = (new_sid(), new_id());
    let send = |typ: &str, body: &[u8]| {
        device.send(
            PORTS,
            typ,
            &sid,
            &[("connection_id", id.as_str().into()), ("user_id", "u".into())],
            body,
        );
    };
    let expect = |typ: &str, body: &[u8]| {
        let msg = device.take(SOON, typ, |m: &Msg| m.sid.as_ref() == Some(&sid) && m.typ == typ);
        assert_eq!(msg.raw, template(typ, &sid, &id, body), "{}", msg.summary());
    };
    send("new", &target_body("127.0.0.1", target.port(), "tcp"));
    expect("new", b"");
    send("forward", b"nine byte");
    expect("ack", b"");
    expect("forward", b"nine byte");
    send("ack", b"");
    send("stop", b"");
    expect("stop", b"");
    device.nothing(millis(150), "that was all", |m| m.sid.as_ref() == Some(&sid));
}

#[test]
fn tcp_to_addresses_and_names() {
    for generation in BOTH {
        let (_rig, device) = Setup::new().generation(generation).connected();
        let client = Client::open(&device);
        for (bind, hosts) in
            [("127.0.0.1:0", &["127.0.0.1", "localhost", NAME][..]), ("[::1]:0", &["::1", "[::1]"])]
        {
            let target = Target::bind(bind, Role::Echo);
            for host in hosts {
                let connection = client.connect("tcp", host, target.port());
                // Before the answer to new, as the client does.
                assert_echo(&connection, b"ping");
                assert_echo(&connection, &stream(0, 100_000));
                assert!(connection.is_open(), "{host}: new is answered");
                connection.stop();
                target.wait_ends(1);
            }
            target.wait_all_closed(hosts.len());
        }
        client.close();
    }
}

#[test]
fn udp_to_addresses_and_names() {
    for generation in BOTH {
        let (_rig, device) = Setup::new().generation(generation).connected();
        let client = Client::open(&device);
        for (bind, hosts) in
            [("127.0.0.1:0", &["127.0.0.1", "localhost", NAME][..]), ("[::1]:0", &["::1", "[::1]"])]
        {
            let target = UdpEcho::bind(bind);
            for host in hosts {
                let connection = client.connect("udp", host, target.port());
                for size in [4, 1000] {
                    let datagram = stream(7, size);
                    connection.send(&datagram);
                    assert_eq!(connection.next(SOON), Some(datagram), "{host}");
                }
                connection.stop();
            }
        }
        client.close();
    }
}

/// What the command line client's own tests do: two mappings in one run, 1 KiB each way.
#[test]
fn both_protocols_in_one_session() {
    let (_rig, _device, client) = session();
    let (target, datagrams) = (Target::start(Role::Echo), UdpEcho::start());
    let (first, second) = (tcp(&client, &target), udp(&client, &datagrams));
    for n in 0..20 {
        assert_echo(&first, &stream(n * 1024, 1024));
        assert_echo(&second, &stream(n * 1024, 1024));
    }
    first.stop();
    assert_echo(&second, b"still here");
    client.close();
}

#[test]
fn what_comes_before_the_connection_is_there_is_kept_in_order() {
    let (_rig, _device, client) = session();
    let target = Target::start(Role::Echo);
    for host in ["127.0.0.1", "localhost", NAME] {
        let connection = client.connect("tcp", host, target.port());
        for n in 0..50 {
            connection.send_anyway(&stream(n * 1000, 1000));
        }
        connection.acked();
        assert!(connection.read(50_000) == stream(0, 50_000), "{host}: reordered or lost");
        assert_eq!(connection.figures().acks, 50);
        let datagrams = UdpEcho::start();
        let connection = client.connect("udp", host, datagrams.port());
        for n in 0..5 {
            connection.send_anyway(&[n; 100]);
        }
        for n in 0..5 {
            assert_eq!(connection.next(SOON), Some(vec![n; 100]), "{host}");
        }
        connection.acked();
    }
    client.close();
}

#[test]
fn refusals_have_the_known_words() {
    let (_rig, _device, client) = session();
    let id = new_id();
    let good = target_body("127.0.0.1", 1, "tcp");
    for (what, id, body) in [
        ("no connection_id", None, good.clone()),
        ("an empty connection_id", Some(""), good),
        ("no host", Some(id.as_str()), target_body("", 1, "tcp")),
        ("no port", Some(id.as_str()), target_body("127.0.0.1", 0, "tcp")),
        ("no protocol", Some(id.as_str()), target_body("127.0.0.1", 1, "")),
        ("an empty map", Some(id.as_str()), vec![0x80]),
        ("nils", Some(id.as_str()), b"\x83\xabremote_host\xc0\xabremote_port\xc0\xa8protocol\xc0".to_vec()),
    ] {
        println!("{what}");
        client.send("new", id, &body);
        assert_error(&client, "new", INVALID, id);
    }
    for protocol in ["x", "TCP", "sctp"] {
        client.send("new", Some(&id), &target_body("127.0.0.1", 1, protocol));
        assert_error(&client, "new", &format!("unknown protocol: {protocol}"), Some(&id));
    }
    for body in
        [&b""[..], b"\xc1", b"hello", b"\x81\xabremote_host\x07", b"\x81\xabremote_port\xce\0\x01\0\0"]
    {
        client.send("new", Some(&id), body);
        let error = client.next_error();
        assert_eq!(error.about, "new");
        assert!(!error.text.is_empty(), "{body:?}");
    }
    for typ in ["forward", "stop"] {
        client.send(typ, Some(&id), b"data");
        assert_error(&client, typ, "unknown connection", Some(&id));
        // Without an id it is unknown as well as invalid.
        for id in [None, Some("")] {
            client.send(typ, id, b"data");
            let error = client.next_error();
            assert!(error.about == typ && [INVALID, "unknown connection"].contains(&error.text.as_str()));
        }
    }
    client.send("bogus", Some(&id), b"");
    assert_error(&client, "bogus", "unknown message type", Some(&id));
    // An ack for what isn't there is no reason to say anything else.
    client.send("ack", Some(&id), b"");
    client.settle();
    assert_eq!(client.errors(), 0);
    assert_echo(&tcp(&client, &Target::start(Role::Echo)), b"nothing is broken");
    client.close();
}

#[test]
fn a_failed_connection_says_why() {
    let (_rig, _device, client) = session();
    for (host, text) in [
        ("127.0.0.1", "dial tcp 127.0.0.1:1: connect: connection refused"),
        ("::1", "dial tcp [::1]:1: connect: connection refused"),
    ] {
        let connection = client.connect("tcp", host, 1);
        assert_error(&client, "new", text, Some(&connection.id));
        // Whether the device has said stop or not, the connection is unknown now.
        client.settle();
        client.send("forward", Some(&connection.id), b"x");
        assert_error(&client, "forward", "unknown connection", Some(&connection.id));
    }
    // The client reads the error of an address that has a route: the last one's, such as IPv6's, led astray.
    client.connect("tcp", "localhost", 1);
    let refused = client.next_error().text;
    assert!(
        refused.starts_with("dial tcp ") && refused.ends_with(":1: connect: connection refused"),
        "{refused}"
    );
    // Too long for the name system: nobody is asked.
    let name = format!("{}.invalid", "x".repeat(70));
    client.connect("tcp", &name, 80);
    let unknown = client.next_error().text;
    assert!(unknown.starts_with(&format!("dial tcp: lookup {name}: ")), "{unknown}");
    client.connect("udp", &name, 80);
    let unknown = client.next_error().text;
    assert!(unknown.starts_with(&format!("dial udp: lookup {name}: ")), "{unknown}");
    client.close();
}

#[test]
fn data_for_a_connection_that_fails_is_acknowledged_once_at_most() {
    let (_rig, _device, client) = session();
    for host in ["127.0.0.1", "localhost", NAME] {
        let connection = client.connect("tcp", host, 1);
        for _ in 0..5 {
            connection.send_anyway(b"data");
        }
        let dial = client.next_error();
        assert_eq!(dial.about, "new", "the failure itself comes first: {dial:?}");
        // Behind it the agent acknowledges what came while it looked up the name.
        client.settle();
        // Each one is acknowledged or refused.
        for _ in 0..connection.in_flight() {
            assert_error(&client, "forward", "unknown connection", Some(&connection.id));
        }
        assert_eq!(client.errors(), 0);
    }
    client.close();
}

/// Sends to a target that reads nothing until a piece isn't acknowledged, which on a busy machine may take its time.
/// Returns how many bytes.
pub fn send_until_held(connection: &Connection) -> u64 {
    let mut sent = 0_u64;
    while connection.in_flight() == 0 || connection.acked_within(secs(3)) {
        connection.send(&stream(sent, PIECE));
        sent += PIECE as u64;
        assert!(sent < 64 << 20, "a target that reads nothing takes {sent} bytes");
    }
    sent
}

#[test]
fn every_forward_is_acknowledged_exactly_once() {
    let (_rig, _device, client) = session();
    let target = Target::start(Role::Discard);
    let connection = tcp(&client, &target);
    let mut sent = 0;
    for n in 0..300 {
        let bytes = stream(sent, n * 37 % 4097);
        connection.write(&bytes);
        sent += bytes.len() as u64;
    }
    connection.send(b"");
    // No client sends such; none is refused.
    for size in [4097, 65_536, 1 << 20] {
        target.wait_received(sent);
        connection.send(&stream(sent, size));
        sent += size as u64;
    }
    connection.acked();
    target.wait_received(sent);
    target.assert_intact();
    client.settle();
    assert_eq!(connection.figures().acks, 303);
    assert_eq!((target.received(), connection.figures().forwards), (sent, 0));
    client.close();
}

#[test]
fn a_duplicate_id_is_refused_and_the_first_unharmed() {
    let (_rig, device, client) = session();
    let (target, other) = (Target::start(Role::Echo), Target::start(Role::Echo));
    let first = tcp(&client, &target);
    client.send("new", Some(&first.id), &target_body("127.0.0.1", other.port(), "tcp"));
    let error = client.next_error();
    assert!(error.about == "new" && !error.text.is_empty(), "{error:?}");
    assert_echo(&first, b"the first");
    assert_eq!(other.accepted(), 0, "nothing is dialled for the second");
    // Also while the first is being connected.
    let early = client.connect("tcp", NAME, target.port());
    client.send("new", Some(&early.id), &target_body("127.0.0.1", other.port(), "udp"));
    assert_eq!(client.next_error().about, "new");
    assert_echo(&early, b"the first again");
    // After its end an id may come again.
    first.stop();
    let again = client.register(&first.id, false);
    client.send("new", Some(&again.id), &target_body("127.0.0.1", other.port(), "tcp"));
    assert_echo(&again, b"another");
    // Another session has ids of its own.
    let stranger = Client::open(&device);
    let same = stranger.register(&again.id, false);
    stranger.send("new", Some(&same.id), &target_body("127.0.0.1", other.port(), "tcp"));
    assert_echo(&same, b"of the stranger");
    stranger.close();
    assert_echo(&again, b"of the first session");
    client.close();
}

#[test]
fn a_reset_by_the_target_is_a_stop_and_what_is_in_flight_is_answered() {
    let (rig, _device, client) = session();
    for round in 0..20 {
        let target = Target::start(Role::Reset);
        let connection = tcp(&client, &target);
        connection.write(b"first");
        target.wait_received(5);
        // Data and reset lie before the agent together.
        rig.daemon.freeze();
        target.release();
        target.wait_all_closed(1);
        connection.send(b"second");
        rig.daemon.thaw();
        connection.stopped();
        client.settle();
        // The one in flight came when the connection had gone, or it was acknowledged: then it was too late to be
        // written, unless the reset was still on its way.
        match (connection.in_flight(), client.errors()) {
            (0, 0) => {}
            (0, _) => {
                assert_error(&client, "forward", "write tcp: connection reset by peer", Some(&connection.id));
            }
            (1, _) => assert_error(&client, "forward", "unknown connection", Some(&connection.id)),
            (n, _) => panic!("round {round}: {n} in flight"),
        }
        assert!(!connection.try_send(b"third"), "stopped");
    }
    client.settle();
    assert_eq!(client.errors(), 0);
    client.close();
}

//! The forwarding client and the targets tried on themselves: each fault must be one, and nothing else.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rmpv::Value;
use tungstenite::Message;

use crate::harness::connection::Connection;
use crate::harness::device::Generation;
use crate::harness::forward::{Client, target_body};
use crate::harness::msg::{self, CONTROL, Ints, PORTS, encode, map};
use crate::harness::server::Server;
use crate::harness::targets::{Role, Silent, Target, UdpEcho, fill, stream};
use crate::harness::wait::{SOON, millis};
use crate::selftest;

/// A device played by the test.
struct Fake {
    _server: Server,
    socket: selftest::Client,
    client: Client,
}

impl Fake {
    fn start() -> Fake {
        let (server, socket, device) = selftest::pair(Generation::New);
        let client = Client::start(&device);
        let mut fake = Fake { _server: server, socket, client };
        let open = fake.next();
        assert_eq!(open["hdr"]["typ"].as_str(), Some("open"));
        // One array item, eight bytes wide.
        let body: &[u8] = b"\x81\xa8versions\x91\xd3\0\0\0\0\0\0\0\x01";
        assert_eq!(open["body"].as_slice(), Some(body));
        fake
    }

    fn next(&mut self) -> Value {
        let bytes = self.socket.read().unwrap().into_data();
        rmpv::decode::read_value(&mut &bytes[..]).unwrap()
    }

    /// The next message must be of this type and connection; returns its body.
    fn expect(&mut self, typ: &str, id: &str) -> Vec<u8> {
        let value = self.next();
        assert_eq!(value["hdr"]["typ"].as_str(), Some(typ), "{value}");
        assert_eq!(value["hdr"]["props"]["connection_id"].as_str(), Some(id), "{value}");
        value["body"].as_slice().unwrap_or_default().to_vec()
    }

    fn send(&mut self, typ: &str, id: &str, body: &[u8]) {
        self.send_props(typ, &[("connection_id", id.into())], body);
    }

    fn send_props(&mut self, typ: &str, props: &[(&str, Value)], body: &[u8]) {
        let message = msg::message(PORTS, typ, self.client.sid(), props, body);
        self.socket.send(Message::binary(encode(&message, Ints::Compact))).unwrap();
    }

    fn connected(&mut self) -> Connection {
        let connection = self.client.connect("tcp", "127.0.0.1", 8080);
        assert_eq!(self.expect("new", &connection.id), target_body("127.0.0.1", 8080, "tcp"));
        let id = connection.id.clone();
        self.send("new", &id, b"");
        connection.opened()
    }

    /// The client must die of what was sent, with these words.
    fn assert_dead(self, words: &str) {
        let death = catch_unwind(AssertUnwindSafe(|| self.client.next_control(SOON))).unwrap_err();
        let text = death.downcast_ref::<String>().expect("a message");
        assert!(text.contains(words), "it died of something else: {text}");
        // Dropping it would be the second panic, and is meant to be one.
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(self.client)));
        assert!(dropped.is_err(), "a fault that nobody waited for must not be missed");
    }
}

#[test]
fn a_client_sends_one_piece_at_a_time() {
    let mut fake = Fake::start();
    let connection = fake.connected();
    connection.send(b"first");
    assert_eq!(fake.expect("forward", &connection.id), b"first");
    assert!(!connection.acked_within(millis(50)));
    std::thread::scope(|scope| {
        scope.spawn(|| connection.write(&stream(0, 10_000)));
        for (from, size) in [(0, 4096), (4096, 4096), (8192, 1808)] {
            fake.send("ack", &connection.id, b"");
            assert_eq!(fake.expect("forward", &connection.id), stream(from, size));
        }
        fake.send("ack", &connection.id, b"");
    });
    assert_eq!((connection.in_flight(), connection.figures().acks), (0, 4));
    let body = encode(&map(&[("err", "why".into()), ("msgtype", "forward".into())]), Ints::Compact);
    fake.send_props("error", &[], &body);
    assert_eq!(fake.client.next_error().text, "why");
    fake.send("stop", &connection.id, b"");
    assert_eq!(connection.stopped(), b"");
    assert!(!connection.try_send(b"more"));
}

#[test]
fn a_client_acknowledges_what_it_has_written() {
    let mut fake = Fake::start();
    let connection = fake.connected();
    fake.send("forward", &connection.id, b"some ");
    fake.send("forward", &connection.id, b"data");
    for _ in 0..2 {
        fake.expect("ack", &connection.id);
    }
    assert_eq!((connection.read(3), connection.read(6)), (b"som".to_vec(), b"e data".to_vec()));
    connection.hold();
    for n in 0..20 {
        fake.send("forward", &connection.id, &[n]);
    }
    connection.held(20, SOON);
    assert_eq!(connection.held_at_rest(millis(50)), 20);
    connection.release(5, false);
    assert_eq!(connection.read(5), [0, 1, 2, 3, 4]);
    connection.release(20, true);
    fake.send("stop", &connection.id, b"");
    assert_eq!(connection.stopped().len(), 15);
    for _ in 0..20 {
        fake.expect("ack", &connection.id);
    }
    let figures = connection.figures();
    assert_eq!((figures.forwards, figures.most_unacked, figures.largest), (22, 20, 5));
    assert_eq!(fake.client.most_unacked(), 20);
}

#[test]
fn what_kills_a_client() {
    let dead = |words: &str, kill: &dyn Fn(&mut Fake, &str)| {
        let mut fake = Fake::start();
        let connection = fake.connected();
        kill(&mut fake, &connection.id);
        fake.assert_dead(words);
    };
    dead("an ack for nothing", &|fake, id| fake.send("ack", id, b""));
    dead("an unknown connection", &|fake, _| fake.send("ack", "another", b""));
    dead("an unknown connection", &|fake, _| fake.send("forward", "another", b"x"));
    dead("not in this", &|fake, id| fake.send("forward", id, b""));
    dead("not in this", &|fake, id| fake.send("new", id, b""));
    dead("not in this", &|fake, id| fake.send("stop", id, b"with a body"));
    dead("not in this", &|fake, id| fake.send("bogus", id, b""));
    dead("not in this", &|fake, id| {
        fake.send("stop", id, b"");
        fake.send("stop", id, b"");
    });
    dead("not in this", &|fake, id| {
        fake.send("stop", id, b"");
        fake.send("forward", id, b"x");
    });
    dead("strange props", &|fake, id| {
        let props = [("connection_id", id.into()), ("user_id", "u".into())];
        fake.send_props("stop", &props, b"");
    });
    let error = encode(
        &map(&[("err", "e".into()), ("close", true.into()), ("msgtype", "new".into())]),
        Ints::Compact,
    );
    dead("an error of another form", &|fake, _| fake.send_props("error", &[], &error));
}

#[test]
fn two_acks_for_one_forward_kill_a_client() {
    let mut fake = Fake::start();
    let connection = fake.connected();
    connection.send(b"once");
    fake.send("ack", &connection.id, b"");
    fake.send("ack", &connection.id, b"");
    fake.assert_dead("an ack for nothing");
}

#[test]
fn too_many_messages_kill_a_client() {
    let mut fake = Fake::start();
    let connection = fake.connected();
    connection.hold();
    for _ in 0..21 {
        fake.send("forward", &connection.id, b"x");
    }
    fake.assert_dead("21 messages unacknowledged");
}

#[test]
fn the_control_protocol_and_a_pause() {
    let mut fake = Fake::start();
    let connection = fake.connected();
    let ping = msg::message(CONTROL, "ping", fake.client.sid(), &[], b"");
    fake.socket.send(Message::binary(encode(&ping, Ints::Compact))).unwrap();
    assert_eq!(fake.next()["hdr"]["typ"].as_str(), Some("pong"));
    fake.client.pause(true);
    for _ in 0..30 {
        fake.send("forward", &connection.id, b"x");
    }
    crate::harness::wait::eventually(SOON, "the backlog", || (fake.client.backlog() >= 29).then_some(()));
    fake.client.pause(false);
    assert_eq!(connection.read(30), [b'x'; 30]);
}

fn dial(target: &Target) -> TcpStream {
    let stream = TcpStream::connect(target.address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

fn read_all(mut stream: &TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn targets_do_what_they_say() {
    let echo = Target::start(Role::Echo);
    let mut peer = dial(&echo);
    peer.write_all(b"there").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_all(&peer), b"there");
    echo.wait_all_closed(1);
    assert_eq!((echo.accepted(), echo.ends()), (1, 1));

    let source = Target::start(Role::Source(100_001));
    assert!(read_all(&dial(&source)) == stream(0, 100_001));

    let half = Target::start(Role::HalfClose(b"bye"));
    let mut peer = dial(&half);
    assert_eq!(read_all(&peer), b"bye");
    peer.write_all(&stream(0, 1000)).unwrap();
    half.wait_received(1000);
    half.assert_intact();
    assert_eq!(half.ends(), 0);
    drop(peer);
    half.wait_ends(1);

    let discard = Target::start(Role::Discard);
    dial(&discard).write_all(&[&stream(0, 10)[..], b"?"].concat()).unwrap();
    discard.wait_ends(1);
    assert!(catch_unwind(AssertUnwindSafe(|| discard.assert_intact())).is_err(), "byte 10 is wrong");

    let reset = Target::start(Role::Reset);
    let mut peer = dial(&reset);
    peer.write_all(b"x").unwrap();
    reset.wait_received(1);
    reset.release();
    assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), ErrorKind::ConnectionReset);

    let stalled = Target::start(Role::Stalled);
    let mut peer = dial(&stalled);
    peer.set_write_timeout(Some(millis(200))).unwrap();
    let mut sent = 0;
    while peer.write_all(&stream(sent, 4096)).is_ok() {
        sent += 4096;
    }
    assert!(stalled.received() == 0 && sent > 0);
    stalled.release();
    stalled.wait_received(sent);
    stalled.assert_intact();
}

#[test]
fn the_silent_answer_nobody_and_datagrams_come_back() {
    let silent = Silent::start();
    let error = TcpStream::connect_timeout(&silent.address, millis(500)).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::WouldBlock), "{error}");
    for bind in ["127.0.0.1:0", "[::1]:0"] {
        let target = UdpEcho::bind(bind);
        let socket = UdpSocket::bind(bind).unwrap();
        socket.connect(target.address).unwrap();
        socket.set_read_timeout(Some(SOON)).unwrap();
        let mut buffer = vec![0; 70_000];
        for size in [0, 1, 65_507] {
            socket.send(&stream(0, size)).unwrap();
            assert_eq!(socket.recv(&mut buffer).unwrap(), size);
            assert!(buffer[..size] == stream(0, size));
        }
        target.send(b"unasked");
        assert_eq!(socket.recv(&mut buffer).unwrap(), 7);
        assert_eq!(target.wait_received(3)[1].len(), 1);
    }
}

#[test]
fn the_stream_tells_places_apart() {
    let all = stream(0, 1 << 16);
    let mut part = vec![0; 1000];
    fill(777, &mut part);
    assert!(all[777..1777] == part[..]);
    for shift in [1, 8, 64, 4096, 32_768] {
        let same = all.iter().zip(&all[shift..]).filter(|(a, b)| a == b).count();
        assert!(same < all.len() / 100, "shifted by {shift}, {same} bytes are the same");
    }
}

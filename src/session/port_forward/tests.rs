use super::*;
use crate::config;
use crate::outbox::{Outbox, Queue, Sendable, Work};
use crate::proto::{Map, PORT_FORWARD, SessionId};
use crate::session::{Device, Router};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;

struct Scene {
    forwarder: PortForward,
    peer: Peer,
    queue: Queue,
}

fn scene() -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let me = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap().name;
    let file = dir.path().join("conf");
    let text = format!(r#"{{ "ShellCommand": "/bin/sh", "User": {me:?} }}"#);
    std::fs::write(&file, text).unwrap();
    let device = Device::new(config::load(&file, &dir.path().join("absent")).unwrap());
    let (outbox, queue) = Outbox::new();
    let mut peer = None;
    let start = |started| {
        peer = Some(started);
        Ok(())
    };
    let first = Frame::new(PORT_FORWARD, forward::STOP, SessionId::new("s").as_ref());
    Router::with(&device, device.new_table(), &outbox, start).route(first);
    let peer = peer.unwrap();
    Scene { forwarder: PortForward::default(), peer, queue }
}

impl Scene {
    /// From a client that has read everything.
    fn handle(&mut self, frame: &Frame, now: Instant) {
        self.peer.credit.prove_all();
        assert!(self.forwarder.handle(&mut self.peer, frame, now));
        self.forwarder.answer(&mut self.peer, now);
    }

    /// Opens a forward to a target that listens only.
    fn open(&mut self, now: Instant) -> TcpListener {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        self.handle(&about(forward::NEW).with_body(target(listener.local_addr().unwrap().port())), now);
        self.turn(now);
        listener
    }

    fn proceed(&mut self, now: Instant) {
        self.forwarder.proceed(&mut self.peer, &Events::default(), now);
        self.forwarder.answer(&mut self.peer, now);
    }

    fn turn(&mut self, now: Instant) {
        let mut set = PollSet::default();
        self.forwarder.watch(&self.peer, &mut set, now);
        set.until(&[Some(Instant::now() + Duration::from_secs(10))]);
        let events = set.wait().unwrap();
        self.forwarder.proceed(&mut self.peer, &events, now);
        self.forwarder.answer(&mut self.peer, now);
    }

    fn deadline(&self, now: Instant) -> Option<Instant> {
        let mut set = PollSet::default();
        self.forwarder.watch(&self.peer, &mut set, now);
        set.deadline
    }
}

fn next_type(queue: &mut Queue) -> Option<String> {
    match queue.try_next(Sendable { bulk: true, interactive: true })? {
        Work::Message(message, ..) => Some(Frame::decode(&message).unwrap().typ),
        other => panic!("{other:?}"),
    }
}

fn about(typ: &str) -> Frame {
    Frame::new(PORT_FORWARD, typ, None).with_props(Map::new().with_str("connection_id", "c"))
}

/// The configuration's default.
const IDLE_LIMIT: Duration = Duration::from_secs(600);

fn target(port: u16) -> Vec<u8> {
    target_of(port, "tcp")
}

fn target_of(port: u16, protocol: &str) -> Vec<u8> {
    Map::new()
        .with_str("remote_host", "127.0.0.1")
        .with_i64("remote_port", port.into())
        .with_str("protocol", protocol)
        .finish()
}

#[test]
fn a_connection_without_traffic_is_closed_after_ten_minutes() {
    let mut scene = scene();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let start = Instant::now();
    scene.handle(&about(forward::NEW).with_body(target(port)), start);
    scene.turn(start);
    assert_eq!(next_type(&mut scene.queue).as_deref(), Some("new"));
    // Traffic towards the target counts.
    let later = start + IDLE_LIMIT / 2;
    scene.handle(&about(forward::FORWARD).with_body("x"), later);
    assert_eq!(next_type(&mut scene.queue).as_deref(), Some("ack"));
    assert_eq!(scene.deadline(later), Some(later + IDLE_LIMIT));
    scene.proceed(start + IDLE_LIMIT);
    assert_eq!(next_type(&mut scene.queue), None);
    scene.proceed(later + IDLE_LIMIT);
    assert_eq!(next_type(&mut scene.queue).as_deref(), Some("stop"));
    // The target is given time to take what it was sent.
    let mut now = later + IDLE_LIMIT;
    while !scene.forwarder.is_idle() {
        now = scene.deadline(now).unwrap();
        assert!(now <= later + IDLE_LIMIT + FINISH_LIMIT + LOOK_INTERVAL);
        scene.proceed(now);
    }
    assert!(now >= later + IDLE_LIMIT + FINISH_LIMIT);
}

/// After ten idle minutes a client's datagrams were answered with "unknown connection" for good.
#[test]
fn a_udp_forward_comes_back_with_a_datagram() {
    let mut scene = scene();
    let target = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    target.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut now = Instant::now();
    scene.handle(&about(forward::NEW).with_body(target_of(target.local_addr().unwrap().port(), "udp")), now);
    scene.turn(now);
    assert_eq!(next_type(&mut scene.queue).as_deref(), Some("new"));
    for n in 0..3 {
        scene.handle(&about(forward::FORWARD).with_body(vec![n]), now);
        while !scene.forwarder.all().all(Connection::is_open) {
            scene.turn(now);
        }
        assert_eq!(next_type(&mut scene.queue).as_deref(), Some("ack"));
        let mut datagram = [0; 10];
        assert_eq!((target.recv(&mut datagram).unwrap(), datagram[0]), (1, n));
        now = scene.deadline(now).unwrap();
        assert_eq!(scene.peer.device.forwards.taken(), 1);
        scene.proceed(now);
        // The client hears nothing of it, and nothing is kept open.
        assert_eq!((next_type(&mut scene.queue), scene.peer.device.forwards.taken()), (None, 0));
        assert!(scene.forwarder.is_idle());
    }
    scene.handle(&about(forward::STOP), now);
    assert_eq!(next_type(&mut scene.queue).as_deref(), Some("stop"));
    scene.handle(&about(forward::FORWARD).with_body("x"), now);
    assert_eq!(next_type(&mut scene.queue).as_deref(), Some("error"));
}

/// They took 115 MiB, uncounted, in all sessions of a device.
#[test]
fn udp_forwards_asleep_count() {
    let mut scene = scene();
    let start = Instant::now();
    let memory = Arc::clone(&scene.peer.device.memory);
    let mut most = memory.none();
    assert!(most.resize(16 << 20));
    for left in [1 << 20, 4096] {
        assert!(most.resize((16 << 20) - left));
        for n in 0..100 {
            let id = Map::new().with_str("connection_id", n.to_string().as_str());
            scene.handle(&about(forward::NEW).with_props(id).with_body(target_of(9, "udp")), start);
            while !scene.forwarder.all().all(Connection::is_open) {
                scene.turn(start);
            }
            while next_type(&mut scene.queue).is_some() {}
        }
        scene.proceed(start + IDLE_LIMIT);
        let asleep = scene.forwarder.asleep.len();
        assert!(asleep == 100 || left == 4096 && (1..50).contains(&asleep), "{asleep}");
        assert!(memory.taken() - most.count() >= asleep * 900 - 8192);
        scene.forwarder.close(start);
        assert_eq!(memory.taken(), most.count());
    }
}

/// A service that refuses a request before it has read all of it, and closes: the client's next piece met the reset,
/// and the answer that had come before was thrown away.
#[test]
fn what_the_target_said_before_its_reset_reaches_the_client() {
    let mut scene = scene();
    let now = Instant::now();
    let listener = scene.open(now);
    scene.handle(&about(forward::FORWARD).with_body("request"), now);
    let (mut stream, _) = listener.accept().unwrap();
    assert_eq!(stream.peek(&mut [0; 10]).unwrap(), 7);
    stream.write_all(b"too large").unwrap();
    drop(stream);
    scene.handle(&about(forward::FORWARD).with_body("the rest"), now);
    while !scene.forwarder.connections.is_empty() {
        scene.turn(now);
    }
    let all: Vec<_> = std::iter::from_fn(|| next_type(&mut scene.queue)).collect();
    let count = |typ| all.iter().filter(|other| *other == typ).count();
    assert_eq!(["new", "ack", "forward", "error", "stop"].map(count), [1, 2, 1, 1, 1], "{all:?}");
    assert!(scene.forwarder.is_idle());
}

/// A target that was too slow got what had waited for it, and an orderly end behind that, though a piece was missing.
#[test]
fn a_target_that_lacks_a_piece_gets_a_reset() {
    let mut scene = scene();
    let now = Instant::now();
    let listener = scene.open(now);
    let (mut stream, _) = listener.accept().unwrap();
    // A client that doesn't wait for acks.
    while !scene.forwarder.connections.is_empty() {
        scene.handle(&about(forward::FORWARD).with_body(vec![0; 64 << 10]), now);
        while next_type(&mut scene.queue).is_some() {}
    }
    stream.set_nonblocking(true).unwrap();
    let limit = now + Duration::from_secs(30);
    let end = loop {
        assert!(Instant::now() < limit, "it has no end");
        scene.proceed(now);
        match stream.read(&mut [0; 64 << 10]) {
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Ok(1..) => {}
            end => break end.map_err(|e| e.kind()),
        }
    };
    assert_eq!(end, Err(std::io::ErrorKind::ConnectionReset));
    assert!(scene.forwarder.is_idle());
}

/// 128 KiB for each forward whose queue had once been full.
#[test]
fn an_empty_queue_keeps_no_memory() {
    let mut scene = scene();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let body = target(listener.local_addr().unwrap().port());
    let start = Instant::now();
    scene.handle(&about(forward::NEW).with_body(body), start);
    // It opens in the next turn.
    for _ in 0..1000 {
        scene.handle(&about(forward::FORWARD).with_body("x"), start);
        while next_type(&mut scene.queue).is_some() {}
    }
    let queue = |scene: &Scene| {
        let queue = &scene.forwarder.connections.values().next().unwrap().to_target;
        (queue.len(), queue.capacity())
    };
    assert_eq!(queue(&scene).0, 1000);
    while queue(&scene).0 > 0 {
        scene.turn(start);
    }
    assert!(queue(&scene).1 < 100, "room for {} pieces", queue(&scene).1);
}

/// All frames of a burst were counted until its end, though the target had taken them: 4 MiB of them ended the
/// forward.
#[test]
fn what_the_target_has_taken_is_not_counted() {
    let mut scene = scene();
    let target = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = target.local_addr().unwrap().port();
    let start = Instant::now();
    scene.handle(&about(forward::NEW).with_body(target_of(port, "udp")), start);
    scene.turn(start);
    for _ in 0..200 {
        scene.handle(&about(forward::FORWARD).with_body(vec![0; 60_000]), start);
        while let Some(typ) = next_type(&mut scene.queue) {
            assert!(typ == "new" || typ == "ack", "{typ}");
        }
    }
    // A busy kernel delivers on loopback a moment later.
    while scene.peer.device.memory.taken() > 0 {
        scene.turn(start);
    }
    assert_eq!(scene.forwarder.connections.len(), 1);
}

/// `stop` left the connection's id among those that are owed an ack. A new connection of the same id was then owed
/// less than none: 2^64 acks at its end.
#[test]
fn an_id_that_is_used_again_at_once_is_owed_nothing() {
    let mut scene = scene();
    // A target that does not read.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let body = target(listener.local_addr().unwrap().port());
    let start = Instant::now();
    scene.handle(&about(forward::NEW).with_body(body.clone()), start);
    scene.turn(start);
    for _ in 0..1000 {
        if !scene.forwarder.owing.is_empty() {
            break;
        }
        scene.handle(&about(forward::FORWARD).with_body(vec![0; 64 << 10]), start);
        // Acks are sent by a writer that doesn't wait for long.
        while next_type(&mut scene.queue).is_some() {}
    }
    scene.handle(&about(forward::STOP), start);
    scene.handle(&about(forward::NEW).with_body(body), start);
    assert!(scene.forwarder.owing.is_empty());
    scene.turn(start);
    while next_type(&mut scene.queue).is_some() {}
    scene.handle(&about(forward::FORWARD).with_body("x"), start);
    scene.handle(&about(forward::STOP), start);
    let all: Vec<_> = std::iter::from_fn(|| next_type(&mut scene.queue)).collect();
    assert_eq!(all, ["ack", "stop"]);
}

/// The ack that was owed for data was forgotten when its client's `stop` lay behind it.
#[test]
fn data_with_a_stop_behind_it_is_acknowledged() {
    let mut scene = scene();
    let now = Instant::now();
    let _listener = scene.open(now);
    for frame in [about(forward::FORWARD).with_body("x"), about(forward::STOP)] {
        assert!(scene.forwarder.handle(&mut scene.peer, &frame, now));
    }
    scene.forwarder.answer(&mut scene.peer, now);
    let mut all: Vec<_> = std::iter::from_fn(|| next_type(&mut scene.queue)).collect();
    // `stop` goes behind bulk data.
    all.sort();
    assert_eq!(all, ["ack", "new", "stop"]);
}

/// Acknowledged data was given up after ten seconds, though the target's name may take 45 to be found.
#[test]
fn data_waits_for_the_look_up_of_its_target_also_without_its_client() {
    let mut scene = scene();
    let start = Instant::now();
    // The look-up does not begin.
    let look_ups = Arc::clone(&scene.peer.share.look_ups);
    let _others: Vec<_> = std::iter::from_fn(|| look_ups.acquire()).collect();
    let body = Map::new().with_str("remote_host", "name.test").with_i64("remote_port", 1);
    scene.handle(&about(forward::NEW).with_body(body.with_str("protocol", "tcp").finish()), start);
    scene.handle(&about(forward::FORWARD).with_body("x"), start);
    assert_eq!(next_type(&mut scene.queue).as_deref(), Some("ack"));
    scene.handle(&about(forward::STOP), start);
    let mut now = start;
    while !scene.forwarder.is_idle() {
        now = scene.deadline(now).unwrap();
        scene.proceed(now);
    }
    assert!((44..=46).contains(&(now - start).as_secs()), "{:?}", now - start);
}

/// The audit log had the bytes of datagrams that the system had refused to send.
#[test]
fn datagrams_that_were_not_sent_are_not_counted() {
    let mut scene = scene();
    let nobody = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let now = Instant::now();
    scene.handle(&about(forward::NEW).with_body(target_of(nobody, "udp")), now);
    scene.turn(now);
    // The report about the first one refuses the second.
    for body in ["a", "more"] {
        scene.handle(&about(forward::FORWARD).with_body(body), now);
    }
    assert_eq!(scene.peer.info.traffic.figures(now).bytes_in, 1);
}

/// 128 KiB for each session that had once owed many acks, as long as it lived.
#[test]
fn acks_that_were_owed_keep_no_memory() {
    let mut scene = scene();
    let target = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let now = Instant::now();
    scene.handle(&about(forward::NEW).with_body(target_of(target.local_addr().unwrap().port(), "udp")), now);
    scene.proceed(now);
    for _ in 0..4000 {
        assert!(scene.forwarder.handle(&mut scene.peer, &about(forward::FORWARD).with_body("x"), now));
    }
    assert_eq!(scene.forwarder.owing.len(), 4000);
    scene.handle(&about(forward::STOP), now);
    assert!(scene.forwarder.owing.capacity() <= 2 * RESERVED_ANSWERS);
}

/// 128 KiB for each forward that had once had many pieces for its target, uncounted.
#[test]
fn a_queue_that_has_become_short_keeps_no_memory() {
    let mut scene = scene();
    let now = Instant::now();
    let listener = scene.open(now);
    let mut pass = |body: Vec<u8>| {
        scene.forwarder.handle(&mut scene.peer, &about(forward::FORWARD).with_body(body), now);
        let connection = scene.forwarder.connections.values().next().unwrap();
        (connection.to_target.len(), connection.to_target.capacity())
    };
    // As much as the kernel takes, which becomes more at times, many small pieces, and a large one behind them.
    while pass(vec![0; 64 << 10]).0 == 0 {}
    while pass(vec![0]).0 <= 4000 {}
    let (length, capacity) = pass(vec![0; 900 << 10]);
    assert!(length > 4000 && capacity > 4000, "{length} of {capacity}");
    let (mut stream, _) = listener.accept().unwrap();
    let mut piece = vec![0; 16 << 10];
    let connection = scene.forwarder.connections.values_mut().next().unwrap();
    // The kernel may take the large one with the last of the small ones.
    while connection.to_target.len() > 1 {
        stream.read_exact(&mut piece).unwrap();
        connection.flush(now);
    }
    assert!(connection.to_target.capacity() < 100, "{}", connection.to_target.capacity());
}

/// It counted as the bytes that were left of it: 512 forwards, each with a target that had taken nearly all of a
/// mebibyte, held half a gibibyte.
#[test]
fn a_piece_counts_as_a_whole_until_the_target_has_it_all() {
    const LENGTH: usize = 1 << 20;
    let mut scene = scene();
    let now = Instant::now();
    let listener = scene.open(now);
    scene.handle(&about(forward::FORWARD).with_body(vec![0; LENGTH]), now);
    let (mut stream, _) = listener.accept().unwrap();
    let connection = scene.forwarder.connections.values_mut().next().unwrap();
    assert!(!connection.to_target.is_empty());
    let mut piece = vec![0; 16 << 10];
    while !connection.to_target.is_empty() {
        let (left, counted) = (connection.to_target[0].len(), connection.memory.count());
        assert!(left < LENGTH && counted >= LENGTH, "{left} bytes are left, and {counted} count");
        stream.read_exact(&mut piece).unwrap();
        connection.flush(now);
    }
    assert_eq!(connection.memory.count(), 0);
}

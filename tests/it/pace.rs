//! How much is on the way to a server, which tells by its pongs what has come.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::files::pattern;
use crate::harness::client::{Style, Terminal};
use crate::harness::device::{Device, Generation};
use crate::harness::front::Acceptor;
use crate::harness::msg::FILES;
use crate::harness::relay::{Relay, Shape};
use crate::harness::rest::{Rest, path_body};
use crate::harness::rig::{Rig, Setup};
use crate::harness::server::Server;
use crate::harness::wait::{SOON, millis, secs, spawn};
use crate::harness::wire;

/// Far more than may be on the way.
const SIZE: usize = 24 << 20;
/// The most that may be on the way, and the chunks that may wait to be taken, sixteen as they are large.
const MOST: u64 = (4 << 20) + 16 * (384 << 10) + (1 << 20);

fn with_file() -> (Rig, Device, String) {
    let (rig, device) = Setup::new().connected();
    let path = rig.dir.path().join("large");
    fs::write(&path, pattern(SIZE)).unwrap();
    (rig, device, path.to_str().unwrap().to_owned())
}

/// A download as the server sees it.
struct Receiver {
    rest: Rest,
    received: u64,
    chunks: u64,
}

impl Receiver {
    /// Takes chunks and acknowledges every tenth, until none comes for so long or there are enough bytes more.
    fn take(&mut self, enough: u64, patience: Duration) {
        let start = self.received;
        while self.received < start + enough {
            let chunk = self.rest.device.try_take(patience, |m| m.sid.as_deref() == Some(&self.rest.sid));
            let Some(chunk) = chunk else { return };
            self.received += chunk.unwrap().body.map_or(0, |body| body.len() as u64);
            self.chunks += 1;
            if self.chunks.is_multiple_of(10) {
                self.rest.send(FILES, "ack", Some(self.received), b"");
            }
        }
    }
}

#[test]
fn a_key_passes_a_file_that_the_server_has_not_confirmed() {
    let (_rig, device, path) = with_file();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    let rest = Rest::open(&device);
    rest.ask("get_file", &path_body(&path));
    let mut file = Receiver { rest, received: 0, chunks: 0 };
    file.take(4 << 20, SOON);
    let probes = device.wait_pings(1, SOON);
    assert!(probes.iter().all(|(_, payload)| payload.len() == 8), "{probes:?}");
    // Only the pongs are missing from here on.
    device.go_mute();
    let before = file.received;
    file.take(SIZE as u64, secs(1));
    let unconfirmed = file.received - before;
    println!("{unconfirmed} bytes came without being confirmed");
    assert!(unconfirmed < MOST, "{unconfirmed} bytes");
    for _ in 0..20 {
        assert_eq!(terminal.run("echo here"), "here");
    }
    let last = device.wait_pings(1, SOON).pop().unwrap().1;
    device.send_frame(true, wire::PONG, &last);
    let held = file.received;
    file.take(1, SOON);
    assert!(file.received > held, "the pong made no room");
    // A server that has ceased to answer gets everything all the same.
    file.take(SIZE as u64 - file.received, secs(20));
    assert_eq!(file.received, SIZE as u64);
}

#[test]
fn a_server_that_never_answers_pings_gets_its_file() {
    let (_rig, device, path) = with_file();
    device.go_mute();
    let file = Rest::download(&device, &path).unwrap();
    assert!(file.bytes == pattern(SIZE));
    let probes = device.wait_pings(1, SOON).len();
    assert!(probes < 10, "{probes} pings that nobody answers");
    let largest = file.chunks.iter().max().unwrap();
    assert!(*largest >= 64 << 10, "chunks of at most {largest} bytes");
}

#[test]
fn who_types_is_not_probed() {
    let (_rig, device) = Setup::new().connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    for _ in 0..5 {
        terminal.run("true");
    }
    assert_eq!(device.pings(), 0, "after {} bytes", device.bytes());
}

/// With 2G a first answer takes longer than 300 ms: then a chunk of 384 KiB, which takes a minute, was sent, and the
/// server gives up a transfer that is silent for a minute.
#[test]
fn chunks_suit_a_slow_link_with_a_long_round_trip() {
    let server = Server::start(Generation::New);
    let shape = Shape { delay: millis(400), up: Some(6000), down: Some(20_000), queue: 32 << 10 };
    let relay = Relay::link(server.address(), shape).expect("a relay");
    assert_suited(&server, relay.address());
}

/// mender-auth's forwarder takes blocks of 16 KiB, and its socket's window opens in leaps.
#[test]
#[allow(clippy::disallowed_methods, reason = "the forwarder takes its time")]
fn chunks_suit_a_forwarder_with_a_slow_link() {
    let server = Server::start(Generation::New);
    let target = server.address();
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen");
    let forwarder = Acceptor::start("forwarder", listener, move |agent| {
        let server = TcpStream::connect(target).expect("connect");
        let copy = |mut from: TcpStream, mut to: TcpStream, rate: f64| {
            move || {
                let mut block = vec![0; 16384];
                while let Ok(length @ 1..) = from.read(&mut block) {
                    std::thread::sleep(millis(300) + Duration::from_secs_f64(length as f64 / rate));
                    if to.write_all(&block[..length]).is_err() {
                        break;
                    }
                }
                let _ = from.shutdown(Shutdown::Both);
                let _ = to.shutdown(Shutdown::Both);
            }
        };
        let again = |stream: &TcpStream| stream.try_clone().expect("clone");
        let down = spawn("forwarder-down", copy(again(&server), again(&agent), 20e3));
        copy(agent, server, 6e3)();
        let _ = down.join();
    });
    assert_suited(&server, forwarder.address());
}

fn assert_suited(server: &Server, way: SocketAddr) {
    let rig = Setup::new().url(&format!("http://{way}")).start();
    let device = server.next_device(SOON * 2);
    let path = rig.dir.path().join("large");
    fs::write(&path, pattern(4 << 20)).unwrap();
    let rest = Rest::open(&device);
    rest.ask("get_file", &path_body(path.to_str().unwrap()));
    let begun = Instant::now();
    let (mut last, mut silence, mut largest) = (begun, Duration::ZERO, 0);
    let (mut received, mut chunks) = (0, 0_u64);
    while begun.elapsed() < secs(35) {
        let Some(chunk) = device.try_take(secs(1), |m| m.sid.as_deref() == Some(&rest.sid)) else {
            silence = silence.max(last.elapsed());
            if device.is_over() {
                println!("the link has ended after {:?}", begun.elapsed());
                break;
            }
            continue;
        };
        let length = chunk.unwrap().body.map_or(0, |body| body.len() as u64);
        println!("{:6.2} s: {length} bytes", begun.elapsed().as_secs_f64());
        (last, largest) = (Instant::now(), largest.max(length));
        received += length;
        chunks += 1;
        if chunks.is_multiple_of(10) {
            rest.send(FILES, "ack", Some(received), b"");
        }
    }
    println!("{received} bytes, silent for {silence:?}");
    println!("{}", rig.daemon.log().join("\n"));
    assert!(!device.is_over());
    assert!(largest <= 64 << 10, "a chunk of {largest} bytes");
    assert!(silence < secs(20), "silent for {silence:?}");
}

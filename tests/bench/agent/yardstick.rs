//! What the bench itself can do: an agent that costs nothing writes the same message again and again.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::envelope::{FILES, Message};
use crate::files::CHUNK;
use crate::forwarder;
use crate::forwards::listen;
use crate::harness::relay::{Relay, Shape};
use crate::harness::wait::spawn;
use crate::harness::wire;
use crate::link::Link;
use crate::row::{MIB, SOON};
use crate::stage::wait;

const LARGE: usize = 256 << 10;
const SPAN: Duration = Duration::from_secs(2);

/// What lies between. Told where the server is.
type Between = fn(std::net::SocketAddr) -> Result<Option<Relay>, String>;

pub fn run() -> Result<(), String> {
    let direct: Between = |_| Ok(None);
    let link: Between = |server| Relay::link(server, Shape::round_trip(20)).map(Some);
    let forwarder: Between = |server| forwarder::start(server).map(Some);
    for (what, between, body) in [
        ("messages of 256 KiB", direct, LARGE),
        ("messages of 4 KiB", direct, CHUNK),
        ("messages of 256 KiB over a link of 20 ms", link, LARGE),
        ("messages of 256 KiB through mender-auth's forwarder", forwarder, LARGE),
    ] {
        println!("{what}: {:.0} MiB/s", measure(between, body)?);
    }
    Ok(())
}

fn measure(between: Between, body: usize) -> Result<f64, String> {
    let listener = listen()?;
    let server = listener.local_addr().map_err(|e| e.to_string())?;
    let relay = between(server)?;
    let address = relay.as_ref().map_or(server, Relay::address);
    let mut agent = TcpStream::connect(address).map_err(|e| format!("connect: {e}"))?;
    let frame = masked(&vec![b'x'; body]);
    let writer = spawn("yardstick", move || while agent.write_all(&frame).is_ok() {});
    let mut link = Link::new(wait(&listener, SOON)?)?;
    // Whatever has to fill is full then.
    let settled = Instant::now() + SPAN / 4;
    link.rest(settled)?;
    let (mut bytes, started) = (0, Instant::now());
    while started.elapsed() < SPAN {
        bytes += link.next_of(1, SOON)?.body;
    }
    let rate = bytes as f64 / MIB / started.elapsed().as_secs_f64();
    drop(link);
    drop(relay);
    let _ = writer.join();
    Ok(rate)
}

/// A chunk as an agent sends it. The mask is zero, which unmasks as any other does.
fn masked(body: &[u8]) -> Vec<u8> {
    let message =
        Message { proto: FILES, typ: "file_chunk", session: 1, offset: Some(0), body, ..Message::default() };
    let mut frame = message.frame();
    let length = match frame[1] {
        126 => 4,
        127 => 10,
        _ => 2,
    };
    debug_assert_eq!(frame[0], 0x80 | wire::BINARY);
    frame[1] |= 0x80;
    frame.splice(length..length, [0; 4]);
    frame
}

//! How much is on the way to a server, which tells by its pongs what has come.

use std::fs;
use std::time::Duration;

use crate::files::pattern;
use crate::harness::client::{Style, Terminal};
use crate::harness::device::Device;
use crate::harness::msg::FILES;
use crate::harness::rest::{Rest, path_body};
use crate::harness::rig::{Rig, Setup};
use crate::harness::wait::{SOON, secs};
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

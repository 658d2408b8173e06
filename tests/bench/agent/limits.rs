//! The machine's limits beside an agent: for each figure the kernel, or ring, does the same without one.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, ConnectionCommon, ServerConnection};

use crate::forwarder;
use crate::forwards::listen;
use crate::harness::relay::Relay;
use crate::harness::tls::{self, Authority};
use crate::harness::wait::spawn;
use crate::interrupt::unblocked;
use crate::row::{MIB, Measure, Row, SOON, Scale, median, percentile};
use crate::stage::{Agent, wait};
use crate::table::number;
use crate::terminal::bare_echo;

struct Limit {
    row: &'static str,
    figure: &'static str,
    what: &'static str,
    alone: fn(Scale) -> Result<f64, String>,
}

const LIMITS: [Limit; 6] = [
    Limit { row: "keys", figure: "echo, median", what: "a terminal's echo", alone: echo },
    Limit { row: "download-0ms", figure: "rate", what: "TCP on loopback", alone: loopback },
    Limit { row: "download-tls", figure: "rate", what: "ring seals records of 16 KiB", alone: seal },
    Limit {
        row: "forward-to-client-0ms",
        figure: "rate",
        what: "TCP through a loop that copies",
        alone: relayed,
    },
    Limit { row: "upload-0ms", figure: "rate", what: "TCP on loopback, 4 KiB at a time", alone: chunks },
    Limit {
        row: "shells-1-at-a-time",
        figure: "rate",
        what: "fork, exec and wait for a shell",
        alone: shells,
    },
];

/// Prints a table. Each round measures the machine and then the agent.
pub fn run(agent: &Agent, rows: &[Row], scale: Scale, rounds: usize) -> Result<(), String> {
    println!("| row | figure | what the machine does alone | alone | {} | {0} / alone |", agent.name);
    println!("|---|---|---|---:|---:|---:|");
    for Limit { row, figure, what, alone } in LIMITS {
        let measured = rows.iter().find(|known| known.name == row).ok_or("no such row")?;
        let mut measure: Measure = (measured.prepare)(agent, scale)?;
        let (mut limits, mut values, mut unit) = (Vec::new(), Vec::new(), "");
        for _ in 0..rounds {
            limits.push(alone(scale)?);
            let found = measure()?.into_iter().find(|found| found.what == figure).ok_or("no such figure")?;
            values.push(found.value);
            unit = found.unit;
        }
        let (limit, value) = (median(limits), median(values));
        let ratio = number(value / limit);
        println!("| {row} | {figure} ({unit}) | {what} | {} | {} | {ratio} |", number(limit), number(value));
    }
    Ok(())
}

fn echo(scale: Scale) -> Result<f64, String> {
    let times = bare_echo(scale.pick(2000, 500))?;
    Ok(percentile(&times, 50))
}

fn loopback(scale: Scale) -> Result<f64, String> {
    flow(scale.span, 256 << 10, None)
}

fn chunks(scale: Scale) -> Result<f64, String> {
    flow(scale.span, 4 << 10, None)
}

/// Through a loop that copies, like mender-auth's forwarder and any forward.
fn relayed(scale: Scale) -> Result<f64, String> {
    flow(scale.span, 64 << 10, Some(forwarder::start))
}

/// MiB in a second, from one thread to another.
fn flow(
    span: Duration,
    piece: usize,
    between: Option<fn(std::net::SocketAddr) -> Result<Relay, String>>,
) -> Result<f64, String> {
    let listener = listen()?;
    let server = listener.local_addr().map_err(|e| e.to_string())?;
    let relay = between.map(|start| start(server)).transpose()?;
    let address = relay.as_ref().map_or(server, Relay::address);
    let mut sender = TcpStream::connect(address).map_err(|e| format!("connect: {e}"))?;
    let writer = spawn("sender", move || {
        let piece = vec![b'x'; piece];
        while sender.write_all(&piece).is_ok() {}
    });
    let mut receiver = wait(&listener, SOON)?;
    let (mut bytes, mut buffer, start) = (0, vec![0; 256 << 10], Instant::now());
    while start.elapsed() < span {
        bytes += receiver.read(&mut buffer).map_err(|e| format!("read: {e}"))?;
    }
    let rate = bytes as f64 / MIB / start.elapsed().as_secs_f64();
    drop((receiver, relay));
    let _ = writer.join();
    Ok(rate)
}

/// MiB in a second through one side of a TLS connection, into nothing.
fn seal(scale: Scale) -> Result<f64, String> {
    let authority = Authority::new();
    let server = tls::config(&authority.identity(&["localhost"]));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| e.to_string())?
        .with_root_certificates(authority.roots())
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").map_err(|e| e.to_string())?;
    let mut client = ClientConnection::new(Arc::new(client), name).map_err(|e| e.to_string())?;
    let mut server = ServerConnection::new(Arc::new(server)).map_err(|e| e.to_string())?;
    while client.is_handshaking() || server.is_handshaking() {
        pass(&mut client, &mut server)
            .and_then(|()| pass(&mut server, &mut client))
            .map_err(|e| format!("a handshake: {e}"))?;
    }
    let (mut bytes, record, start) = (0, vec![b'x'; 16 << 10], Instant::now());
    while start.elapsed() < scale.span {
        bytes += client.writer().write(&record).map_err(|e| e.to_string())?;
        while client.wants_write() {
            client.write_tls(&mut std::io::sink()).map_err(|e| e.to_string())?;
        }
    }
    Ok(bytes as f64 / MIB / start.elapsed().as_secs_f64())
}

/// Carries all that one side of a TLS connection has written to the other.
fn pass<A, B>(from: &mut ConnectionCommon<A>, to: &mut ConnectionCommon<B>) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    while from.wants_write() {
        from.write_tls(&mut bytes)?;
    }
    let mut bytes = bytes.as_slice();
    while !bytes.is_empty() {
        to.read_tls(&mut bytes)?;
        to.process_new_packets().map_err(std::io::Error::other)?;
    }
    Ok(())
}

fn shells(scale: Scale) -> Result<f64, String> {
    let (mut count, start) = (0, Instant::now());
    while start.elapsed() < scale.span {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "exit 0"]).stdin(Stdio::null()).stdout(Stdio::null());
        unblocked(|| command.status()).map_err(|e| format!("/bin/sh: {e}"))?;
        count += 1;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

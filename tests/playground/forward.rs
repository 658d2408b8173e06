//! TCP connections through the agent. Each has a session of its own, so that the device's errors, which
//! don't name the connection, tell which one failed.

use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use crate::harness::connection::PIECE;
use crate::harness::device::Device;
use crate::harness::forward::{new_id, target_body};
use crate::harness::http::read_request;
use crate::harness::msg::PORTS;
use crate::harness::wait::{SOON, Watched, secs, spawn};
use crate::keyboard::{Signals, unless_signalled};
use crate::session::Session;

/// Longer than anybody plays.
const AGES: Duration = secs(365 * 86_400);
const LOOPBACK: &str = "127.0.0.1";

/// What the device can be asked to connect to.
#[derive(Debug, Clone)]
struct Target {
    host: String,
    port: u16,
}

/// A local port that leads to a target.
#[derive(Debug)]
pub struct Job {
    local: u16,
    target: Target,
}

impl Job {
    /// From `LOCAL_PORT:HOST:PORT`; an IPv6 address may be in brackets.
    pub fn parse(text: &str) -> Option<Job> {
        let (local, target) = text.split_once(':')?;
        let (host, port) = target.rsplit_once(':')?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let target = Target { host: host.to_owned(), port: port.parse().ok()? };
        let complete = !target.host.is_empty() && target.port != 0;
        local.parse().ok().filter(|_| complete).map(|local| Job { local, target })
    }
}

/// Carries connections until a signal, the end of standard input or of the link.
pub fn run(job: Job, device: &Device, signals: &Signals) -> Result<(), String> {
    let Job { local, target } = job;
    let explain = |e| format!("listen on {LOOPBACK}:{local}: {e}");
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, local)).map_err(explain)?;
    let address = listener.local_addr().map_err(explain)?;
    let (over, ended) = channel();
    let (watched, link) = (device.clone(), over.clone());
    spawn("link", move || link.send(Err(format!("the link is over: {}", watched.wait_end(AGES)))));
    let stdin = over.clone();
    let end = if io::stdin().is_terminal() {
        "Ctrl-C ends it."
    } else {
        spawn("stdin", move || {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            stdin.send(Ok(()))
        });
        "Ctrl-C or the end of its input ends it."
    };
    println!("{address} leads to {}:{} through the agent. {end}", target.host, target.port);
    let device = device.clone();
    spawn("listener", move || {
        loop {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) => return over.send(Err(format!("accept: {e}"))),
            };
            let (device, target) = (device.clone(), target.clone());
            spawn("carry", move || {
                let _ = carry(&device, &target, stream, |why| eprintln!("playground: {why}"));
            });
        }
    });
    // A signal is the usual end.
    unless_signalled(signals, move || ended.recv().map_err(|e| e.to_string())?).unwrap_or(Ok(()))
}

/// Reaches a service through the agent and shows what came of it.
pub fn demonstrate(device: &Device, signals: &Signals) -> Result<(), String> {
    let service = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|e| e.to_string())?;
    let port = service.local_addr().map_err(|e| e.to_string())?.port();
    spawn("service", move || {
        let (mut stream, _) = service.accept().map_err(|e| e.to_string())?;
        let path = read_request(&mut stream)?.path;
        let body = format!("You have reached {path} of a service on the device.\n");
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        stream.write_all((head + &body).as_bytes()).map_err(|e| e.to_string())
    });
    let (device, target) = (device.clone(), Target { host: LOOPBACK.to_owned(), port });
    let answer = unless_signalled(signals, move || ask(&device, target))?;
    eprintln!("  forward {LOOPBACK}:{port}: {}", answer.unwrap_or_else(|why| format!("no answer: {why}")));
    Ok(())
}

/// One HTTP request; returns what there is to tell about the answer.
fn ask(device: &Device, target: Target) -> Result<String, String> {
    let start = Instant::now();
    let explain = |e: io::Error| e.to_string();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(explain)?;
    let mut client = TcpStream::connect(listener.local_addr().map_err(explain)?).map_err(explain)?;
    client.set_read_timeout(Some(SOON)).map_err(explain)?;
    let (stream, _) = listener.accept().map_err(explain)?;
    let device = device.clone();
    let carrying = spawn("carry", move || carry(&device, &target, stream, |_| {}));
    let mut answer = String::new();
    let request = b"GET /hello HTTP/1.1\r\nHost: playground\r\nConnection: close\r\n\r\n";
    let read = client.write_all(request).and_then(|()| client.read_to_string(&mut answer));
    drop(client);
    let late = matches!(&read, Err(e) if e.kind() == ErrorKind::WouldBlock);
    if !late {
        // The device knows better why there is no answer.
        carrying.join().map_err(|_| "the client failed".to_owned())??;
    }
    read.map_err(explain)?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or("the connection ended early")?;
    let status = head.lines().next().unwrap_or_default();
    Ok(format!("{status}, {} bytes, {:.1} ms", body.len(), start.elapsed().as_secs_f64() * 1000.0))
}

/// A connection's session, and the id that its messages carry.
#[derive(Debug)]
struct Connection {
    session: Session,
    id: String,
}

impl Connection {
    fn post(&self, typ: &str, body: &[u8]) {
        self.session.post(PORTS, typ, &[("connection_id", self.id.as_str().into())], body);
    }
}

#[derive(Debug, Default)]
struct State {
    /// A message with data isn't acknowledged yet.
    in_flight: bool,
    stopped: bool,
}

/// Carries one connection to its end; an error is the device's. `tell` hears it before the application sees the
/// end.
fn carry(device: &Device, target: &Target, stream: TcpStream, tell: impl FnOnce(&str)) -> Result<(), String> {
    let connection = Arc::new(Connection { session: Session::open(device), id: new_id() });
    let state = Arc::new(Watched::new(State::default()));
    connection.post("new", &target_body(&target.host, target.port, "tcp"));
    let stream = Arc::new(stream);
    let up = {
        let (connection, state, stream) = (Arc::clone(&connection), Arc::clone(&state), Arc::clone(&stream));
        spawn("carry-up", move || send(&connection, &state, &stream))
    };
    let result = receive(&connection, &state, &stream)
        .map_err(|why| format!("{}:{}: {why}", target.host, target.port))
        .inspect_err(|why| tell(why));
    state.update(|s| s.stopped = true);
    let _ = stream.shutdown(Shutdown::Both);
    let _ = up.join();
    connection.session.close();
    result
}

/// Sends what the application writes, one message at a time, and `stop` at its end.
fn send(connection: &Connection, state: &Watched<State>, mut stream: &TcpStream) {
    let mut buffer = [0; PIECE];
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        let stopped = state.wait(AGES, |s| {
            let go = s.stopped || !s.in_flight;
            s.in_flight = true;
            go.then_some(s.stopped)
        });
        if stopped != Some(false) {
            return;
        }
        connection.post("forward", &buffer[..count]);
    }
    if !state.peek(|s| s.stopped) {
        connection.post("stop", b"");
    }
}

/// Passes to the application what comes, until the device stops or refuses the connection.
fn receive(connection: &Connection, state: &Watched<State>, mut stream: &TcpStream) -> Result<(), String> {
    let mut result = Ok(());
    loop {
        let msg = match connection.session.take(AGES) {
            Some(Ok(msg)) => msg,
            // The end of the link is told once for all connections.
            _ => return result,
        };
        match (msg.proto, msg.typ.as_str()) {
            (PORTS, "ack") => state.update(|s| s.in_flight = false),
            (PORTS, "forward") => {
                if stream.write_all(msg.body.as_deref().unwrap_or_default()).is_err() {
                    // The other thread sees it too, and stops.
                    let _ = stream.shutdown(Shutdown::Both);
                }
                // Not before: an application that doesn't read holds the device up.
                connection.post("ack", b"");
            }
            (PORTS, "stop") => return result,
            (PORTS, "error") => {
                let text =
                    |name| msg.field(name).and_then(|v| v.as_str().map(str::to_owned)).unwrap_or_default();
                let why = text("err");
                // What crossed the device's stop isn't worth a word.
                if why != "unknown connection" {
                    result = Err(why);
                }
                if text("msgtype") == "new" {
                    return result;
                }
            }
            _ => {}
        }
    }
}

//! Forwarded ports, as mender-cli uses them: each message is acknowledged, and towards the device there is one at
//! a time for each connection.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::cores::{Core, Pinned};
use crate::envelope::{Kind, Message, PORTS};
use crate::files::{CHUNK, close, content, open, rate, way};
use crate::harness::msg::{self, Ints, map};
use crate::harness::wait::{Watched, spawn};
use crate::link::Link;
use crate::process::Meter;
use crate::row::{Measure, Row, SOON, Scale, figure, row};
use crate::stage::{self, Agent, Stage, config, wait};

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for millis in [0, 20, 100] {
        let about = format!("a forward of what a target writes without end, {millis} ms round trip");
        rows.push(row(format!("forward-to-client-{millis}ms"), about, move |agent, scale| {
            prepare_to_client(agent, scale, millis)
        }));
    }
    let about = "a forward to a target that reads at once, with the agent on one core";
    rows.push(row("forward-to-device-0ms", about, prepare_to_device));
    let about = "100 commands in one message to a target that takes 20 ms for each, and the end at once";
    rows.push(row("pipelined", about, prepare_pipelined));
    rows
}

/// A script's way to talk to Redis or a modem: all lines at once, and then the end.
fn prepare_pipelined(agent: &Agent, _: Scale) -> Result<Measure, String> {
    let stage = Stage::start(agent, &config("exit 0"), way(0))?;
    let target = listen()?;
    stage.measured(move |stage| {
        let session = stage.session();
        let link = &mut stage.link;
        open(link, session)?;
        let arrived = Arc::new(Watched::new(0));
        let counted = Arc::clone(&arrived);
        let thread = serve(&target, move |stream| {
            let Ok(mut answers) = stream.try_clone() else { return };
            for _ in BufReader::new(stream).lines().map_while(Result::ok) {
                counted.update(|lines| *lines += 1);
                std::thread::sleep(Duration::from_millis(20));
                if answers.write_all(b"OK\n").is_err() {
                    return;
                }
            }
        })?;
        connect(link, session, 1, port(&target)?)?;
        let lines: String = (0..100).map(|line| format!("command {line}\n")).collect();
        push(link, session, &of_connection("forward", session, 1, lines.as_bytes()))?;
        link.put(&of_connection("stop", session, 1, &[]))?;
        // Long enough for all of them.
        link.rest(Instant::now() + Duration::from_secs(4))?;
        close(link, session)?;
        let _ = thread.join();
        Ok(vec![figure("commands that arrive", "of 100", arrived.peek(|lines| f64::from(*lines)))])
    })
}

fn prepare_to_client(agent: &Agent, scale: Scale, millis: u64) -> Result<Measure, String> {
    let mut stage = Stage::start(agent, &config("exit 0"), way(millis))?;
    let content = Arc::new(content());
    // The delay makes it slow.
    let verified = if millis == 0 { content.len() } else { content.len() / 64 };
    let target = listen()?;
    let source = spawn_source(&target, Arc::clone(&content), Some(verified))?;
    stage.explained(|stage| verify_to_client(stage, port(&target)?, &content[..verified]))?;
    let _ = source.join();
    stage.measured(move |stage| {
        let session = stage.session();
        open(&mut stage.link, session)?;
        let source = spawn_source(&target, Arc::clone(&content), None)?;
        let meter = Meter::start(stage.pid())?;
        connect(&mut stage.link, session, 1, port(&target)?)?;
        let ack = of_connection("ack", session, 1, &[]);
        let (mut bytes, mut messages) = (0, 0);
        let end = Instant::now() + scale.span;
        while Instant::now() < end {
            let Some(header) = stage.link.next(end)? else { break };
            if header.session != session {
                continue;
            }
            if header.kind != Kind::Forward {
                return Err(stage.link.unexpected(&header));
            }
            bytes += header.body as u64;
            messages += 1;
            stage.link.put(&ack)?;
        }
        let figures = rate(bytes, messages, &meter)?;
        close(&mut stage.link, session)?;
        let _ = source.join();
        Ok(figures)
    })
}

fn prepare_to_device(agent: &Agent, scale: Scale) -> Result<Measure, String> {
    let mut stage = Stage::start_pinned(agent, &config("exit 0"), way(0))?;
    let content = content();
    let target = listen()?;
    stage.explained(|stage| verify_to_device(stage, &target, &content))?;
    stage.measured(move |stage| {
        let _here = Pinned::to(Core::Server)?;
        let session = stage.session();
        open(&mut stage.link, session)?;
        let thread = spawn_sink(&target, None)?;
        connect(&mut stage.link, session, 1, port(&target)?)?;
        let forward = of_connection("forward", session, 1, &content[..CHUNK]);
        let meter = Meter::start(stage.pid())?;
        let mut bytes = 0;
        while meter.elapsed() < scale.span {
            push(&mut stage.link, session, &forward)?;
            bytes += CHUNK as u64;
        }
        let mut figures = rate(bytes, 1, &meter)?;
        // Their size is the client's.
        figures.truncate(2);
        close(&mut stage.link, session)?;
        let _ = thread.join();
        Ok(figures)
    })
}

fn verify_to_device(stage: &mut Stage, target: &TcpListener, content: &[u8]) -> Result<(), String> {
    let sink = Arc::new(Watched::new(Vec::new()));
    let session = stage.session();
    let link = &mut stage.link;
    open(link, session)?;
    let thread = spawn_sink(target, Some(Arc::clone(&sink)))?;
    connect(link, session, 1, port(target)?)?;
    for piece in content.chunks(CHUNK) {
        push(link, session, &of_connection("forward", session, 1, piece))?;
    }
    let arrived = sink.wait(SOON, |got| (got.len() >= content.len()).then(|| *got == content));
    if arrived != Some(true) {
        return Err("the target got something else".to_owned());
    }
    close(link, session)?;
    let _ = thread.join();
    Ok(())
}

/// Sends a piece and waits for its ack.
fn push(link: &mut Link, session: u32, forward: &[u8]) -> Result<(), String> {
    link.put(forward)?;
    link.expect(session, Kind::Ack, SOON).map(drop)
}

fn verify_to_client(stage: &mut Stage, port: u16, content: &[u8]) -> Result<(), String> {
    let session = stage.session();
    let link = &mut stage.link;
    open(link, session)?;
    connect(link, session, 1, port)?;
    link.verify(true);
    let ack = of_connection("ack", session, 1, &[]);
    let mut bytes = 0;
    while bytes < content.len() {
        let header = link.expect(session, Kind::Forward, SOON)?;
        if content.get(bytes..bytes + header.body) != Some(link.body(&header)) {
            return Err(format!("wrong content behind byte {bytes}"));
        }
        bytes += header.body;
        link.put(&ack)?;
    }
    link.expect(session, Kind::Stop, SOON)?;
    link.verify(false);
    close(link, session)
}

/// A message of one connection.
pub fn of_connection(typ: &str, session: u32, connection: u32, body: &[u8]) -> Vec<u8> {
    Message { proto: PORTS, typ, session, connection: Some(connection), body, ..Message::default() }.frame()
}

/// The request for a connection to a port of this machine.
pub fn new_connection(session: u32, connection: u32, port: u16) -> Vec<u8> {
    let fields =
        [("remote_host", "127.0.0.1".into()), ("remote_port", port.into()), ("protocol", "tcp".into())];
    of_connection("new", session, connection, &msg::encode(&map(&fields), Ints::Compact))
}

/// Connects to a port of this machine.
pub fn connect(link: &mut Link, session: u32, connection: u32, port: u16) -> Result<(), String> {
    link.put(&new_connection(session, connection, port))?;
    link.expect(session, Kind::New, SOON).map(drop)
}

pub fn listen() -> Result<TcpListener, String> {
    stage::listen((Ipv4Addr::LOCALHOST, 0).into())
}

pub fn port(listener: &TcpListener) -> Result<u16, String> {
    listener.local_addr().map(|address| address.port()).map_err(|e| e.to_string())
}

type Thread = std::thread::JoinHandle<()>;

/// Serves the next connection in a thread, which ends with it.
fn serve(target: &TcpListener, run: impl FnOnce(TcpStream) + Send + 'static) -> Result<Thread, String> {
    let target = target.try_clone().map_err(|e| e.to_string())?;
    Ok(spawn("target", move || {
        let Ok(stream) = wait(&target, SOON) else { return };
        let limit = Some(Duration::from_secs(30));
        if stream.set_read_timeout(limit).and(stream.set_write_timeout(limit)).is_ok() {
            run(stream);
        }
    }))
}

/// A target that writes the content, so much of it or without end.
fn spawn_source(target: &TcpListener, content: Arc<Vec<u8>>, size: Option<usize>) -> Result<Thread, String> {
    serve(target, move |mut stream| match size {
        Some(size) => {
            let _ = stream.write_all(&content[..size]);
        }
        None => while stream.write_all(&content[..256 << 10]).is_ok() {},
    })
}

/// A target that reads, and keeps what it has read if somebody wants to see it.
fn spawn_sink(target: &TcpListener, keep: Option<Arc<Watched<Vec<u8>>>>) -> Result<Thread, String> {
    serve(target, move |mut stream| {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            if let Some(keep) = &keep {
                keep.update(|kept| kept.extend_from_slice(&buffer[..count]));
            }
        }
    })
}

//! A terminal: how fast what is printed arrives, and how soon a key's echo.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::openpty;

use crate::cores::{Core, Pinned};
use crate::envelope::{Header, Kind, Message, SHELL};
use crate::files::{content, write_file};
use crate::interrupt::unblocked;
use crate::link::Link;
use crate::process::Meter;
use crate::row::{Figure, GIB, MIB, Measure, Row, SOON, Scale, figure, percentile, row};
use crate::stage::{Agent, Stage, Way, config, folder};

/// Printed at a time.
const SLICE: usize = 32 << 20;
/// What a shell says when it is ready.
const READY: &[u8] = b"READY";
/// A shell that does nothing: the terminal itself echoes what is typed, up to 4095 keys.
pub const ECHO: &str = "printf READY; exec sleep 3600";

pub fn rows() -> Vec<Row> {
    vec![
        row(
            "terminal-output",
            "a terminal to which 256 MiB are printed, beside a bare read loop",
            prepare_output,
        ),
        row("keys", "2,000 keys, one at a time, to a terminal that echoes", |agent, scale| {
            measure_keys(Stage::start(agent, &config(ECHO), Way::Direct)?, scale)
        }),
        row(
            "keys-one-core",
            "the same with the agent on one core and the server on another",
            |agent, scale| {
                measure_keys_pinned(Stage::start_pinned(agent, &config(ECHO), Way::Direct)?, scale)
            },
        ),
        row("keys-forwarder", "the same through a relay like mender-auth's", |agent, scale| {
            measure_keys_pinned(Stage::start_pinned(agent, &config(ECHO), Way::Forwarder)?, scale)
        }),
    ]
}

/// Prints a file whenever a line has come. Raw, so that everything arrives as it is.
fn print(file: &Path) -> String {
    format!("stty raw -echo; printf READY; while read go; do cat {}; done", file.display())
}

fn prepare_output(agent: &Agent, scale: Scale) -> Result<Measure, String> {
    let dir = folder()?;
    let file = dir.path().join("printed");
    let content = content();
    write_file(&file, &content, content.len())?;
    let script = print(&file);
    let mut stage = Stage::start(agent, &config(&script), Way::Direct)?;
    stage.explained(|stage| verify_output(stage, &content))?;
    write_file(&file, &content, SLICE)?;
    stage.measured(move |stage| {
        let _ = &dir;
        let session = stage.session();
        start_shell(&mut stage.link, session)?;
        let mut bare = Bare::start(&script)?;
        let (mut bare_seconds, mut seconds, mut cpu, mut messages) = (0.0, 0.0, 0.0, 0);
        // In turns, since the kernel has its faster and its slower moments.
        let slices = scale.pick(8, 2);
        for _ in 0..slices {
            bare_seconds += bare.slice()?.as_secs_f64();
            let meter = Meter::start(stage.pid())?;
            messages += slice(&mut stage.link, session)?;
            let took = meter.read()?;
            (seconds, cpu) = (seconds + took.0, cpu + took.1);
        }
        stop_shell(&mut stage.link, session)?;
        let bytes = (slices * SLICE) as f64;
        Ok(vec![
            figure("rate", "MiB/s", bytes / MIB / seconds),
            figure("agent's CPU", "s/GiB", cpu / (bytes / GIB)),
            figure("a message", "B", bytes / messages as f64),
            figure("a bare read loop's rate", "MiB/s", bytes / MIB / bare_seconds),
            figure("of that", "×", bare_seconds / seconds),
        ])
    })
}

/// Has a slice printed and counts the messages.
fn slice(link: &mut Link, session: u32) -> Result<u64, String> {
    type_in(link, session, b"\n")?;
    let (mut bytes, mut messages) = (0, 0);
    while bytes < SLICE {
        bytes += link.expect(session, Kind::Shell, SOON)?.body;
        messages += 1;
    }
    Ok(messages)
}

fn verify_output(stage: &mut Stage, content: &[u8]) -> Result<(), String> {
    let session = stage.session();
    let link = &mut stage.link;
    start_shell(link, session)?;
    link.verify(true);
    type_in(link, session, b"\n")?;
    let mut bytes = 0;
    while bytes < content.len() {
        let header = link.expect(session, Kind::Shell, SOON)?;
        if content.get(bytes..bytes + header.body) != Some(link.body(&header)) {
            return Err(format!("wrong output behind byte {bytes}"));
        }
        bytes += header.body;
    }
    link.verify(false);
    stop_shell(link, session)
}

/// A terminal without an agent: how fast the same can be read at all.
struct Bare {
    master: File,
    shell: Child,
    buffer: Vec<u8>,
}

impl Bare {
    fn start(script: &str) -> Result<Bare, String> {
        let start = || {
            let pty = openpty(None, None)?;
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]).stdin(Stdio::from(pty.slave.try_clone()?));
            command.stdout(pty.slave).stderr(Stdio::null());
            let shell = unblocked(|| command.spawn())?;
            let mut bare = Bare { master: File::from(pty.master), shell, buffer: vec![0; 64 << 10] };
            bare.read(READY.len())?;
            Ok(bare)
        };
        start().map_err(|e: std::io::Error| format!("a terminal without an agent: {e}"))
    }

    /// Has a slice printed; returns how long it took.
    fn slice(&mut self) -> Result<Duration, String> {
        let started = Instant::now();
        let read = self.master.write_all(b"\n").and_then(|()| self.read(SLICE));
        read.map_err(|e| format!("a bare read loop: {e}"))?;
        Ok(started.elapsed())
    }

    fn read(&mut self, mut count: usize) -> std::io::Result<()> {
        let limit = PollTimeout::try_from(SOON).unwrap_or(PollTimeout::MAX);
        while count > 0 {
            if poll(&mut [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)], limit)? == 0 {
                return Err(std::io::ErrorKind::TimedOut.into());
            }
            count = count.saturating_sub(self.master.read(&mut self.buffer)?);
        }
        Ok(())
    }
}

/// Microseconds until the echo of each key from a terminal without an agent.
pub fn bare_echo(count: usize) -> Result<Vec<f64>, String> {
    let mut bare = Bare::start(ECHO)?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        let started = Instant::now();
        bare.master.write_all(b"x").and_then(|()| bare.read(1)).map_err(|e| format!("a bare echo: {e}"))?;
        times.push(started.elapsed().as_secs_f64() * 1e6);
    }
    Ok(times)
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.shell.kill();
        let _ = self.shell.wait();
    }
}

fn measure_keys(stage: Stage, scale: Scale) -> Result<Measure, String> {
    stage.measured(move |stage| press_keys(stage, scale.pick(2000, 500)))
}

fn measure_keys_pinned(stage: Stage, scale: Scale) -> Result<Measure, String> {
    stage.measured(move |stage| {
        let _here = Pinned::to(Core::Server)?;
        press_keys(stage, scale.pick(2000, 500))
    })
}

fn press_keys(stage: &mut Stage, count: usize) -> Result<Vec<Figure>, String> {
    let session = stage.session();
    start_shell(&mut stage.link, session)?;
    let mut keys = Keys::new(session);
    // Caches fill, clocks speed up.
    for _ in 0..200 {
        keys.press(&mut stage.link)?;
    }
    let meter = Meter::start(stage.pid())?;
    let mut times = Vec::with_capacity(count);
    for _ in 0..count {
        times.push(keys.press(&mut stage.link)?.as_secs_f64() * 1e6);
    }
    let cpu = meter.read()?.1;
    stop_shell(&mut stage.link, session)?;
    Ok(vec![
        figure("echo, median", "µs", percentile(&times, 50)),
        figure("echo, 95th percentile", "µs", percentile(&times, 95)),
        figure("echo, 99th percentile", "µs", percentile(&times, 99)),
        figure("agent's CPU for a key", "µs", cpu * 1e6 / count as f64),
    ])
}

/// Keys that are pressed and echoed.
pub struct Keys {
    pub session: u32,
    frames: Vec<Vec<u8>>,
    pressed: usize,
    at: Instant,
}

impl Keys {
    pub fn new(session: u32) -> Keys {
        let frames = (b'a'..=b'z').map(|key| shell_message("shell", session, &[key])).collect();
        Keys { session, frames, pressed: 0, at: Instant::now() }
    }

    /// Sends a key.
    pub fn send(&mut self, link: &mut Link) -> Result<(), String> {
        link.put(&self.frames[self.pressed % self.frames.len()])?;
        self.at = Instant::now();
        link.flush()
    }

    /// How long the echo took that has come.
    pub fn take(&mut self, link: &Link, header: &Header) -> Result<Duration, String> {
        let elapsed = self.at.elapsed();
        let key = b'a' + (self.pressed % self.frames.len()) as u8;
        self.pressed += 1;
        match (header.kind, link.body(header)) {
            (Kind::Shell, [echo]) if *echo == key => Ok(elapsed),
            _ => Err(link.unexpected(header)),
        }
    }

    /// Sends a key and waits for its echo.
    pub fn press(&mut self, link: &mut Link) -> Result<Duration, String> {
        self.send(link)?;
        let header = link.next_of(self.session, SOON)?;
        self.take(link, &header)
    }
}

/// A message to a shell.
pub fn shell_message(typ: &str, session: u32, body: &[u8]) -> Vec<u8> {
    Message { proto: SHELL, typ, session, body, ..Message::default() }.frame()
}

/// Types into a shell.
pub fn type_in(link: &mut Link, session: u32, keys: &[u8]) -> Result<(), String> {
    link.put(&shell_message("shell", session, keys))?;
    link.flush()
}

/// Asks for a shell.
pub fn new_shell(session: u32) -> Vec<u8> {
    Message { proto: SHELL, typ: "new", session, size: Some((80, 24)), ..Message::default() }.frame()
}

/// Starts a shell and waits until it is ready.
pub fn start_shell(link: &mut Link, session: u32) -> Result<(), String> {
    link.put(&new_shell(session))?;
    let header = link.expect(session, Kind::New, SOON)?;
    if header.status != 1 {
        return Err(link.unexpected(&header));
    }
    let mut greeting = Vec::new();
    while greeting != READY {
        let header = link.expect(session, Kind::Shell, SOON)?;
        greeting.extend_from_slice(link.body(&header));
    }
    Ok(())
}

/// Ends a shell and waits until the agent says so, or that it has ended by itself.
pub fn stop_shell(link: &mut Link, session: u32) -> Result<(), String> {
    link.put(&shell_message("stop", session, &[]))?;
    while link.next_of(session, SOON)?.kind != Kind::Stop {}
    Ok(())
}

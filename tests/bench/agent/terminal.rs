//! A terminal: how fast what is printed arrives, and how soon a key's echo.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::pty::openpty;

use crate::envelope::{Header, Kind, Message, SHELL};
use crate::files::{content, rate, write_file};
use crate::link::Link;
use crate::process::Meter;
use crate::row::{Figure, MIB, Measure, Row, SOON, Scale, figure, percentile, row};
use crate::stage::{Agent, Stage, Way, config, folder};

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
            prepare_keys(agent, scale, Way::Direct)
        }),
        row("keys-forwarder", "the same through a relay like mender-auth's", |agent, scale| {
            prepare_keys(agent, scale, Way::Forwarder)
        }),
    ]
}

/// Prints a file when a line has come. Raw, so that everything arrives as it is.
fn print(file: &Path) -> String {
    format!("stty raw -echo; printf READY; read go; exec cat {}", file.display())
}

fn prepare_output(agent: &Agent, scale: Scale) -> Result<Measure, String> {
    let dir = folder()?;
    let file = dir.path().join("printed");
    let content = content();
    write_file(&file, &content, content.len())?;
    let script = print(&file);
    let mut stage = Stage::start(agent, &config(&script), Way::Direct)?;
    stage.link.verify(true);
    stage.explained(|stage| output(stage, content.len(), Some(&content)))?;
    stage.link.verify(false);
    let size = scale.pick(256 << 20, 32 << 20);
    write_file(&file, &content, size)?;
    stage.measured(move |stage| {
        let _ = &dir;
        let bare = bare_loop(&script, size)?;
        let mut figures = output(stage, size, None)?;
        figures.push(figure("a bare read loop's rate", "MiB/s", bare));
        figures.push(figure("of that", "×", figures[0].value / bare));
        Ok(figures)
    })
}

/// Has so much printed.
fn output(stage: &mut Stage, size: usize, content: Option<&[u8]>) -> Result<Vec<Figure>, String> {
    let session = stage.session();
    start_shell(&mut stage.link, session)?;
    let meter = Meter::start(stage.pid())?;
    type_in(&mut stage.link, session, b"\n")?;
    let (mut bytes, mut messages) = (0, 0);
    while bytes < size {
        let header = stage.link.expect(session, Kind::Shell, SOON)?;
        if let Some(content) = content
            && content.get(bytes..bytes + header.body) != Some(stage.link.body(&header))
        {
            return Err(format!("wrong output behind byte {bytes}"));
        }
        bytes += header.body;
        messages += 1;
    }
    let figures = rate(bytes as u64, messages, &meter)?;
    stop_shell(&mut stage.link, session)?;
    Ok(figures)
}

/// The rate in MiB/s at which the same can be read from a terminal at all.
fn bare_loop(script: &str, size: usize) -> Result<f64, String> {
    let run = || {
        let pty = openpty(None, None)?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::from(pty.slave.try_clone()?));
        let mut child = command.stdout(pty.slave).stderr(Stdio::null()).spawn()?;
        // The slave's last copy here.
        drop(command);
        let mut master = File::from(pty.master);
        let mut buffer = vec![0; 64 << 10];
        let mut greeting = Vec::new();
        while greeting.len() < READY.len() {
            let count = master.read(&mut buffer)?;
            greeting.extend_from_slice(&buffer[..count]);
        }
        let started = Instant::now();
        master.write_all(b"\n")?;
        let mut bytes = 0;
        while bytes < size {
            bytes += master.read(&mut buffer)?;
        }
        let elapsed = started.elapsed();
        child.wait()?;
        Ok(size as f64 / MIB / elapsed.as_secs_f64())
    };
    run().map_err(|e: std::io::Error| format!("a bare read loop: {e}"))
}

fn prepare_keys(agent: &Agent, scale: Scale, way: Way) -> Result<Measure, String> {
    let count = scale.pick(2000, 500);
    Stage::start(agent, &config(ECHO), way)?.measured(move |stage| {
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
        let mut figures = vec![
            figure("echo, median", "µs", percentile(&times, 50)),
            figure("echo, 95th percentile", "µs", percentile(&times, 95)),
            figure("echo, 99th percentile", "µs", percentile(&times, 99)),
        ];
        figures.push(figure("agent's CPU for a key", "µs", cpu * 1e6 / count as f64));
        Ok(figures)
    })
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

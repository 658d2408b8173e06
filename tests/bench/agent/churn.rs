//! What comes and goes: forwards and shells per second.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cores::{Core, Pinned};
use crate::envelope::{Header, Kind, SHELL};
use crate::files::{close, open};
use crate::forwards::{listen, new_connection, of_connection, port};
use crate::harness::wait::spawn;
use crate::link::Link;
use crate::process::Meter;
use crate::row::{Figure, Measure, Row, Scale, figure, row};
use crate::stage::{Agent, Stage, Way, config};
use crate::terminal::{new_shell, shell_message};

/// How long the first of them may take.
const LIMIT: Duration = Duration::from_secs(60);

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for at_once in [1, 16] {
        let about =
            format!("forwards opened, used and stopped, {at_once} at a time, with the agent on one core");
        rows.push(row(format!("forwards-{at_once}-at-a-time"), about, move |agent, scale| {
            prepare_forwards(agent, scale, at_once)
        }));
    }
    for at_once in [1, 16] {
        let about = format!("shells that end at once, {at_once} at a time");
        rows.push(row(format!("shells-{at_once}-at-a-time"), about, move |agent, scale| {
            prepare_shells(agent, scale, at_once)
        }));
    }
    rows
}

fn prepare_forwards(agent: &Agent, scale: Scale, at_once: usize) -> Result<Measure, String> {
    let target = {
        let _here = Pinned::to(Core::Server)?;
        Echo::start()?
    };
    let mut last = 0;
    Stage::start_pinned(agent, &config("exit 0"), Way::Direct)?.measured(move |stage| {
        let _here = Pinned::to(Core::Server)?;
        let session = stage.session();
        open(&mut stage.link, session)?;
        // As a whole: its drop ends it.
        let target = &target;
        let mut run = Forwards { session, port: target.port, last, slots: Vec::new() };
        let figures = spin(stage, scale, at_once, &mut run)?;
        last = run.last;
        close(&mut stage.link, session)?;
        Ok(figures)
    })
}

fn prepare_shells(agent: &Agent, scale: Scale, at_once: usize) -> Result<Measure, String> {
    let mut last = 0;
    Stage::start(agent, &config("exit 0"), Way::Direct)?.measured(move |stage| {
        let mut run = Shells { last, open: Vec::new() };
        let figures = spin(stage, scale, at_once, &mut run)?;
        last = run.last;
        Ok(figures)
    })
}

/// Something that is begun, goes through its states and is over.
trait Churn {
    fn begin(&mut self, link: &mut Link) -> Result<(), String>;
    /// Takes a message. `true` when one of them is over with it.
    fn take(&mut self, link: &mut Link, header: &Header) -> Result<bool, String>;
}

/// Keeps so many of them going for a time.
fn spin(
    stage: &mut Stage,
    scale: Scale,
    at_once: usize,
    churn: &mut dyn Churn,
) -> Result<Vec<Figure>, String> {
    let meter = Meter::start(stage.pid())?;
    for _ in 0..at_once {
        churn.begin(&mut stage.link)?;
    }
    let started = Instant::now();
    let (mut over, mut under_way, mut figures) = (0u64, at_once, None);
    while under_way > 0 {
        let header = stage.link.next(Instant::now() + LIMIT)?;
        let header = header.ok_or_else(|| format!("nothing from the agent for {LIMIT:?}"))?;
        if !churn.take(&mut stage.link, &header)? {
            continue;
        }
        over += 1;
        if figures.is_none() && started.elapsed() > scale.span {
            let (elapsed, cpu) = meter.read()?;
            figures = Some(vec![
                figure("rate", "per s", over as f64 / elapsed),
                figure("agent's CPU for each", "ms", cpu / over as f64 * 1e3),
            ]);
        }
        if figures.is_none() {
            churn.begin(&mut stage.link)?;
        } else {
            under_way -= 1;
        }
    }
    figures.ok_or_else(|| "none was over".to_owned())
}

struct Forwards {
    session: u32,
    port: u16,
    last: u32,
    slots: Vec<Slot>,
}

/// A connection, and what hasn't come yet.
struct Slot {
    connection: u32,
    ack: bool,
    echo: bool,
}

impl Churn for Forwards {
    fn begin(&mut self, link: &mut Link) -> Result<(), String> {
        self.last += 1;
        self.slots.push(Slot { connection: self.last, ack: false, echo: false });
        link.put(&new_connection(self.session, self.last, self.port))
    }

    fn take(&mut self, link: &mut Link, header: &Header) -> Result<bool, String> {
        if header.session != self.session {
            return Ok(false);
        }
        if header.kind == Kind::Error {
            return Err(link.unexpected(header));
        }
        // Upstream's may say something behind the stop.
        let found = self.slots.iter().position(|slot| slot.connection == header.connection);
        let Some(at) = found else { return Ok(false) };
        let slot = &mut self.slots[at];
        let message = |typ, body: &[u8]| of_connection(typ, self.session, slot.connection, body);
        match header.kind {
            Kind::New => link.put(&message("forward", b"a question"))?,
            Kind::Ack => slot.ack = true,
            Kind::Forward => {
                link.put(&message("ack", &[]))?;
                slot.echo = true;
            }
            Kind::Stop if slot.ack && slot.echo => {
                self.slots.swap_remove(at);
                return Ok(true);
            }
            _ => return Err(link.unexpected(header)),
        }
        if slot.ack && slot.echo {
            link.put(&of_connection("stop", self.session, slot.connection, &[]))?;
        }
        Ok(false)
    }
}

struct Shells {
    last: u32,
    /// Their sessions, and whether they were told to stop, as clients do when they hear of the end.
    open: Vec<(u32, bool)>,
}

impl Churn for Shells {
    fn begin(&mut self, link: &mut Link) -> Result<(), String> {
        self.last += 1;
        self.open.push((self.last, false));
        link.put(&new_shell(self.last))
    }

    fn take(&mut self, link: &mut Link, header: &Header) -> Result<bool, String> {
        let found = self.open.iter().position(|(session, _)| *session == header.session);
        let Some(at) = found.filter(|_| header.proto == SHELL) else { return Ok(false) };
        match header.kind {
            Kind::New if header.status == 1 => {}
            Kind::Shell if header.status == 1 => {}
            Kind::Stop if self.open[at].1 => {
                self.open.swap_remove(at);
                return Ok(true);
            }
            Kind::Stop => {
                self.open[at].1 = true;
                link.put(&shell_message("stop", header.session, &[]))?;
            }
            _ => return Err(link.unexpected(header)),
        }
        Ok(false)
    }
}

/// A target that says what it hears, to all its clients in one thread.
pub struct Echo {
    pub port: u16,
    stop: Arc<AtomicBool>,
}

impl Echo {
    pub fn start() -> Result<Echo, String> {
        let listener = listen()?;
        let port = port(&listener)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        spawn("echo", move || echo(&listener, &stopped));
        Ok(Echo { port, stop })
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

fn echo(listener: &TcpListener, stop: &AtomicBool) {
    let mut clients: Vec<TcpStream> = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let fd = |stream| PollFd::new(stream, PollFlags::POLLIN);
        let mut fds = vec![fd(listener.as_fd())];
        fds.extend(clients.iter().map(|client| fd(client.as_fd())));
        if poll(&mut fds, PollTimeout::NONE).is_err() || stop.load(Ordering::SeqCst) {
            return;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        let mut ready = ready.into_iter();
        let arrived = ready.next() == Some(true);
        clients.retain_mut(|client| {
            if ready.next() != Some(true) {
                return true;
            }
            match client.read(&mut buffer) {
                Ok(count @ 1..) => client.write_all(&buffer[..count]).is_ok(),
                _ => false,
            }
        });
        if arrived && let Ok((client, _)) = listener.accept() {
            let _ = client.set_nodelay(true);
            clients.push(client);
        }
    }
}

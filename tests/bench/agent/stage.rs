//! A bus, a manager and a server around one agent, whosever it is.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use tempfile::TempDir;
use tungstenite::handshake::derive_accept_key;

use crate::cores::{Core, Pinned};
use crate::forwarder;
use crate::harness::bus::Bus;
use crate::harness::daemon::{self, Daemon};
use crate::harness::http;
use crate::harness::manager::Manager;
use crate::harness::relay::{Relay, Shape};
use crate::harness::rig::{TOKEN, user_name};
use crate::harness::tls::{Authority, TlsFront};
use crate::harness::wait::spawn;
use crate::interrupt::unblocked;
use crate::link::Link;
use crate::row::{Figure, Measure};

/// How long an agent may take to connect. Upstream's takes ten seconds.
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// The same after an outage.
const RETURN_LIMIT: Duration = Duration::from_secs(600);

/// An executable that is measured.
#[derive(Debug, Clone)]
pub struct Agent {
    pub name: String,
    pub path: PathBuf,
}

/// What lies between agent and server.
#[derive(Debug, Clone, Copy)]
pub enum Way {
    Direct,
    /// The server at this address, at a port of its own.
    At(Ipv4Addr),
    Link(Shape),
    Forwarder,
    Tls,
}

/// A connected agent. Fields drop in this order: the agent first.
pub struct Stage {
    daemon: Daemon,
    pub link: Link,
    pub relay: Option<Relay>,
    _tls: Option<TlsFront>,
    /// From its start to its handshake's request.
    pub connected_after: Duration,
    listener: Option<TcpListener>,
    _manager: Manager,
    _bus: Bus,
    dir: TempDir,
    sessions: u32,
}

/// A configuration whose shell runs this script; as many as anybody wants.
pub fn config(script: &str) -> Value {
    json!({
        "ShellCommand": "/bin/sh",
        "ShellArguments": ["-c", script],
        "User": user_name(),
        "Sessions": { "MaxPerUser": 1000 },
    })
}

/// A folder in memory where there is such a place, so that no disk is measured.
pub fn folder() -> Result<TempDir, String> {
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("mender-connect-bench-");
    builder.tempdir_in("/dev/shm").or_else(|_| builder.tempdir()).map_err(|e| format!("a folder: {e}"))
}

impl Stage {
    /// Starts an agent and waits until it is connected.
    pub fn start(agent: &Agent, config: &Value, way: Way) -> Result<Stage, String> {
        Stage::start_with(agent, config, way, start)
    }

    /// The agent has a core, and everything else another.
    pub fn start_pinned(agent: &Agent, config: &Value, way: Way) -> Result<Stage, String> {
        let _server = Pinned::to(Core::Server)?;
        Stage::start_with(agent, config, way, |agent, config, dir, bus| {
            let _agent = Pinned::to(Core::Agent)?;
            start(agent, config, dir, bus)
        })
    }

    fn start_with(
        agent: &Agent,
        config: &Value,
        way: Way,
        start: impl FnOnce(&Agent, &Value, &Path, &Bus) -> Result<Daemon, String>,
    ) -> Result<Stage, String> {
        let dir = folder()?;
        let mut bus = Bus::absent(dir.path());
        unblocked(|| bus.try_restart())?;
        let address = if let Way::At(address) = way { address } else { Ipv4Addr::LOCALHOST };
        let listener = listen((address, 0).into())?;
        let server = listener.local_addr().map_err(|e| e.to_string())?;
        let relay = match way {
            Way::Direct | Way::At(_) | Way::Tls => None,
            Way::Link(shape) => Some(Relay::link(server, shape)?),
            Way::Forwarder => Some(forwarder::start(server)?),
        };
        let address: SocketAddr = relay.as_ref().map_or(server, Relay::address);
        let tls = matches!(way, Way::Tls).then(|| {
            let authority = Authority::new();
            authority.write(dir.path());
            TlsFront::start(&authority.identity(&["localhost"]), server)
        });
        let url = tls.as_ref().map(|tls| format!("https://localhost:{}", tls.port()));
        let url = url.unwrap_or_else(|| format!("http://{address}"));
        let manager = Manager::start(&bus.address(), TOKEN, &url);
        let daemon = unblocked(|| start(agent, config, dir.path(), &bus))?;
        let (link, at) = accept(&listener, CONNECT_LIMIT)
            .map_err(|why| format!("{why}; the end of its log:\n{}", log_tail(dir.path())))?;
        let connected_after = at.saturating_duration_since(daemon.started);
        let _manager = manager;
        let listener = Some(listener);
        let sessions = 0;
        Ok(Stage {
            daemon,
            link,
            relay,
            _tls: tls,
            connected_after,
            listener,
            _manager,
            _bus: bus,
            dir,
            sessions,
        })
    }

    /// The link is lost, and the server is away while `outage` goes on, or only out of reach. How long it takes from
    /// that one's end until the agent asks for a new link.
    pub fn lose(
        &mut self,
        away: bool,
        outage: impl FnOnce() -> Result<(), String>,
    ) -> Result<Duration, String> {
        let mut listener = self.listener.take().ok_or("there is no server")?;
        let address = listener.local_addr().map_err(|e| e.to_string())?;
        self.link.close();
        if away {
            drop(listener);
            outage()?;
            listener = listen(address)?;
        } else {
            outage()?;
        }
        let back = Instant::now();
        let (link, at) = accept(&listener, RETURN_LIMIT)?;
        (self.link, self.listener) = (link, Some(listener));
        Ok(at.saturating_duration_since(back))
    }

    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// A folder for this agent's files.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A number for a new session.
    pub fn session(&mut self) -> u32 {
        self.sessions += 1;
        self.sessions
    }

    /// Runs something; when it fails, what the agent logged is added to why.
    pub fn explained<T>(&mut self, run: impl FnOnce(&mut Stage) -> Result<T, String>) -> Result<T, String> {
        run(self).map_err(|why| format!("{why}; the end of its log:\n{}", log_tail(self.dir.path())))
    }

    /// Makes it what is run in each round. In between somebody minds the link, which would be lost otherwise
    /// while others have their turn.
    pub fn measured(
        self,
        mut run: impl FnMut(&mut Stage) -> Result<Vec<Figure>, String> + 'static,
    ) -> Result<Measure, String> {
        let mut minded = Some(Minded::begin(self));
        Ok(Box::new(move || {
            let mut stage = minded.take().ok_or("it failed before")?.end()?;
            let figures = stage.explained(|stage| {
                // So that no ping falls due soon.
                stage.link.ping()?;
                stage.link.settle(Duration::from_millis(50), Duration::from_secs(60))?;
                run(stage)
            })?;
            minded = Some(Minded::begin(stage));
            Ok(figures)
        }))
    }
}

/// A stage whose link a thread minds.
struct Minded {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Stage, String>>>,
}

impl Minded {
    fn begin(mut stage: Stage) -> Minded {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = spawn("minder", move || {
            while !stopped.load(Ordering::SeqCst) {
                stage.explained(|stage| stage.link.rest(Instant::now() + Duration::from_millis(200)))?;
            }
            Ok(stage)
        });
        Minded { stop, thread: Some(thread) }
    }

    fn end(&mut self) -> Result<Stage, String> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().ok_or("it ended before")?.join().map_err(|_| "the minder panicked")?
    }
}

impl Drop for Minded {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn start(agent: &Agent, config: &Value, dir: &Path, bus: &Bus) -> Result<Daemon, String> {
    let file = dir.join("mender-connect.conf");
    std::fs::write(&file, config.to_string()).map_err(|e| format!("{}: {e}", file.display()))?;
    let log = File::create(dir.join("log")).map_err(|e| format!("create a log: {e}"))?;
    let mut command = Command::new(&agent.path);
    daemon::bare(&mut command);
    command.arg("--config").arg(&file);
    command.arg("--fallback-config").arg(dir.join("absent.conf"));
    command.arg("daemon").env("DBUS_SYSTEM_BUS_ADDRESS", bus.address()).current_dir(dir);
    // Only agents that connect with TLS read it.
    command.env("SSL_CERT_FILE", dir.join("ca.pem"));
    Ok(Daemon::start_logging_to(command, log))
}

/// The agent's connection, and when its handshake's request was there.
fn accept(listener: &TcpListener, limit: Duration) -> Result<(Link, Instant), String> {
    let mut stream = wait(listener, limit)?;
    let request = http::read_request(&mut stream)?;
    let key = request.header("Sec-WebSocket-Key").ok_or("not a websocket's handshake")?;
    let headers =
        [("Upgrade", "websocket"), ("Connection", "Upgrade")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let accept = ("Sec-WebSocket-Accept".to_owned(), derive_accept_key(key.as_bytes()));
    http::respond(&mut stream, 101, &[headers.as_slice(), &[accept]].concat(), None);
    Ok((Link::new(stream)?, request.at))
}

pub fn listen(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).map_err(|e| format!("listen on {address}: {e}"))
}

/// The next connection.
pub fn wait(listener: &TcpListener, limit: Duration) -> Result<TcpStream, String> {
    let timeout = PollTimeout::try_from(limit).map_err(|e| e.to_string())?;
    match poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], timeout) {
        Ok(1..) => listener.accept().map(|(stream, _)| stream).map_err(|e| format!("accept: {e}")),
        _ => Err(format!("no connection from the agent within {limit:?}")),
    }
}

fn log_tail(dir: &Path) -> String {
    let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}

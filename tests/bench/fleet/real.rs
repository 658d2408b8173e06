//! The same with real agents: one process each, with the token from a file, and a server in this thread.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::libc::linger;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt::Linger};
use nix::time::clock_getcpuclockid;
use nix::unistd::{Pid, User, getuid};
use tungstenite::handshake::derive_accept_key;

use super::wire::{PING, PONG, Parser, encode};

/// Agents that may be starting at a time: more than the server's queue holds would be back-off before the outage.
const STARTING: usize = 32;
/// All agents have to be back after this time.
const LIMIT: Duration = Duration::from_secs(1800);
/// The memory of so many agents is read, since the kernel walks all their pages for it.
const SAMPLE: usize = 100;
/// How the server names an agent's token, before its number.
const TOKEN: &str = "fleet-";

pub struct Scene {
    pub executable: PathBuf,
    pub agents: usize,
    pub outage: Duration,
    /// ReconnectIntervalSeconds.
    pub base: u64,
    /// After the outage the server refuses one of so many upgrades with 503; 0: none.
    pub refuse_every: usize,
    /// The Retry-After of a refusal in seconds.
    pub retry_after: u64,
}

pub struct Measured {
    /// Connects after the outage's end, ascending, those included that were refused.
    pub connects: Vec<Duration>,
    /// From the outage's end to each agent's link, ascending.
    pub returns: Vec<Duration>,
    /// From each refusal to the agent's next connect, ascending.
    pub waits: Vec<Duration>,
    /// PSS in KiB of a sample of agents, ascending: before the outage and after it. Empty without the right to read it.
    pub memory: [Vec<u64>; 2],
    /// CPU time of all agents: until all are connected, and from the outage's begin until all are back.
    pub cpu: [Duration; 2],
    /// From the first agent's start until all are connected.
    pub start: Duration,
    /// Links that broke without an outage.
    pub broken: usize,
    /// Agents that have used up the user's inotify instances and look at their token file at intervals.
    pub unwatched: usize,
}

/// Fails unless all agents come back, none before the time that the server told it.
pub fn measure(scene: &Scene) -> Measured {
    let descriptors = scene.agents as u64 + 100;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(descriptors), hard.max(descriptors))
        .unwrap_or_else(|e| panic!("{descriptors} descriptors: {e}"));
    let folder = tempfile::tempdir().unwrap();
    let mut server = Server::new(scene);
    let mut fleet = Fleet(Vec::new());
    let begin = Instant::now();
    for agent in 0..scene.agents {
        fleet.0.push(start(scene, &folder.path().join(agent.to_string()), &server.url));
        server.expect_links((agent + 1).saturating_sub(STARTING));
    }
    server.expect_links(scene.agents);
    let start = begin.elapsed();
    let (before, starting) = (fleet.memory(), fleet.cpu());

    server.fail();
    server.serve(scene.outage, |_| false);
    server.recover();
    let all_back = server.serve(LIMIT, |server| server.links >= scene.agents);
    let log = |agent: usize| fs::read_to_string(folder.path().join(format!("{agent}/log"))).unwrap();
    if !all_back {
        let missing = server.agents.iter().position(|agent| agent.back.is_none()).unwrap_or_default();
        panic!("{} of {} agents are back; one isn't:\n{}", server.links, scene.agents, log(missing));
    }
    let mut returns: Vec<_> = server.agents.iter().flat_map(|agent| agent.back).collect();
    returns.sort();
    server.waits.sort();
    if let Some(earliest) = server.waits.first() {
        assert!(earliest.as_secs() >= scene.retry_after, "an agent was back after {earliest:?}");
    }
    Measured {
        connects: server.connects,
        returns,
        waits: server.waits,
        memory: [before, fleet.memory()],
        cpu: [starting, fleet.cpu().saturating_sub(starting)],
        start,
        broken: server.broken,
        unwatched: (0..scene.agents).filter(|agent| log(*agent).contains("can't be watched")).count(),
    }
}

/// Starts an agent with everything of its own below `folder`.
fn start(scene: &Scene, folder: &Path, url: &str) -> Child {
    let agent = folder.file_name().unwrap().display().to_string();
    let file = |name: &str, text: &str| {
        let path = folder.join(name);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
        path
    };
    fs::create_dir(folder).unwrap();
    let user = User::from_uid(getuid()).unwrap().unwrap().name;
    let (token, base) = (file("token", &format!("{TOKEN}{agent}")), scene.base);
    let config = format!(
        r#"{{"User": {user:?}, "ReconnectIntervalSeconds": {base},
            "Auth": {{"Source": "file", "TokenFile": {token:?}, "ServerURL": {url:?}}}}}"#
    );
    Command::new(&scene.executable)
        .arg("--config")
        .arg(file("config", &config))
        .args(["--fallback-config", "/nonexistent", "daemon"])
        .env_clear()
        .env("RUNTIME_DIRECTORY", folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(fs::File::create(folder.join("log")).unwrap())
        .spawn()
        .unwrap_or_else(|e| panic!("agent {agent}: {}: {e}", scene.executable.display()))
}

struct Fleet(Vec<Child>);

impl Fleet {
    fn memory(&self) -> Vec<u64> {
        let sample = self.0.iter().step_by(self.0.len().div_ceil(SAMPLE));
        let text = sample.flat_map(|agent| fs::read_to_string(format!("/proc/{}/smaps_rollup", agent.id())));
        let field = |text: String| text.lines().find_map(|line| line.strip_prefix("Pss:")).map(str::to_owned);
        let mut memory: Vec<_> =
            text.flat_map(field).map(|line| line.trim().trim_end_matches(" kB").parse().unwrap()).collect();
        memory.sort();
        memory
    }

    fn cpu(&self) -> Duration {
        let pids = self.0.iter().map(|agent| Pid::from_raw(agent.id() as i32));
        pids.map(|pid| Duration::from(clock_getcpuclockid(pid).unwrap().now().unwrap())).sum()
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // All at first, so that they end side by side.
        for agent in &mut self.0 {
            let _ = agent.kill();
        }
        for agent in &mut self.0 {
            let _ = agent.wait();
        }
    }
}

#[derive(Clone, Default)]
struct Agent {
    /// After the outage's end.
    back: Option<Duration>,
    refused: Option<Instant>,
}

struct Connection {
    stream: TcpStream,
    accepted: Instant,
    head: Vec<u8>,
    /// Since the upgrade.
    parser: Option<Parser>,
}

/// It knows the tokens of all agents, accepts at once and answers pings.
struct Server {
    url: String,
    epoll: Epoll,
    /// `None` in the outage.
    listener: Option<TcpListener>,
    address: std::net::SocketAddr,
    connections: HashMap<RawFd, Connection>,
    links: usize,
    agents: Vec<Agent>,
    /// The outage's end.
    end: Option<Instant>,
    upgrades: usize,
    refuse_every: usize,
    retry_after: u64,
    connects: Vec<Duration>,
    waits: Vec<Duration>,
    broken: usize,
}

impl Server {
    fn new(scene: &Scene) -> Server {
        // Agents connect from 127.0.0.1. Where the server had that address, an agent could connect to itself while there
        // is no server, by a port that happens to be the server's.
        let listener = TcpListener::bind("127.0.0.2:0").unwrap();
        let address = listener.local_addr().unwrap();
        let mut server = Server {
            url: format!("http://{address}"),
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap(),
            listener: None,
            address,
            connections: HashMap::new(),
            links: 0,
            agents: vec![Agent::default(); scene.agents],
            end: None,
            upgrades: 0,
            refuse_every: scene.refuse_every,
            retry_after: scene.retry_after,
            connects: Vec::new(),
            waits: Vec::new(),
            broken: 0,
        };
        server.listen(listener);
        server
    }

    fn listen(&mut self, listener: TcpListener) {
        listener.set_nonblocking(true).unwrap();
        listen(&listener, Backlog::MAXCONN).unwrap();
        self.watch(&listener);
        self.listener = Some(listener);
    }

    fn watch(&self, socket: &(impl AsRawFd + std::os::fd::AsFd)) {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, socket.as_raw_fd() as u64);
        self.epoll.add(socket, event).unwrap();
    }

    /// Closes all connections with a reset, as a server does whose machine has been started anew.
    fn fail(&mut self) {
        self.listener = None;
        for connection in self.connections.values() {
            setsockopt(&connection.stream, Linger, &linger { l_onoff: 1, l_linger: 0 }).unwrap();
        }
        self.connections.clear();
        self.links = 0;
    }

    fn recover(&mut self) {
        self.end = Some(Instant::now());
        self.listen(TcpListener::bind(self.address).unwrap());
    }

    fn expect_links(&mut self, number: usize) {
        let connected = self.serve(Duration::from_secs(60), |server| server.links >= number);
        assert!(connected, "{} links in place of {number}", self.links);
    }

    /// Until that is so. False if it isn't in time.
    fn serve(&mut self, limit: Duration, is_over: impl Fn(&Server) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        let mut events = [EpollEvent::empty(); 256];
        while !is_over(self) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let timeout = EpollTimeout::try_from(left + Duration::from_millis(1)).unwrap();
            let ready = self.epoll.wait(&mut events, timeout).expect("epoll");
            for event in &events[..ready] {
                let fd = event.data() as RawFd;
                if self.listener.as_ref().is_some_and(|listener| listener.as_raw_fd() == fd) {
                    self.accept();
                } else if self.read(fd).is_none() {
                    let closed = self.connections.remove(&fd).unwrap();
                    if closed.parser.is_some() {
                        self.links -= 1;
                        self.broken += 1;
                    }
                }
            }
        }
        true
    }

    fn accept(&mut self) {
        loop {
            let stream = match self.listener.as_ref().unwrap().accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => panic!("accept: {e}"),
            };
            let accepted = Instant::now();
            self.connects.extend(self.end.map(|end| accepted - end));
            stream.set_nonblocking(true).unwrap();
            self.watch(&stream);
            let connection = Connection { accepted, head: Vec::new(), parser: None, stream };
            self.connections.insert(connection.stream.as_raw_fd(), connection);
        }
    }

    /// `None` when the connection is to be closed.
    fn read(&mut self, fd: RawFd) -> Option<()> {
        let connection = self.connections.get_mut(&fd).unwrap();
        let mut buffer = [0; 4096];
        let size = connection.stream.read(&mut buffer).ok().filter(|size| *size > 0)?;
        let Some(parser) = &mut connection.parser else {
            connection.head.extend_from_slice(&buffer[..size]);
            return if connection.head.ends_with(b"\r\n\r\n") { self.upgrade(fd) } else { Some(()) };
        };
        parser.feed(&buffer[..size]);
        while let Some(frame) = parser.next().unwrap() {
            if frame.opcode == PING {
                connection.stream.write_all(&encode(true, PONG, &frame.payload)).ok()?;
            }
        }
        Some(())
    }

    fn upgrade(&mut self, fd: RawFd) -> Option<()> {
        let connection = self.connections.get_mut(&fd).unwrap();
        let head = String::from_utf8_lossy(&connection.head);
        let header = |name| {
            let mut headers = head.lines().filter_map(|line| line.split_once(": "));
            headers.find(|(other, _)| other.eq_ignore_ascii_case(name)).unwrap_or_else(|| panic!("{head}")).1
        };
        let token = header("Authorization").strip_prefix("Bearer ").and_then(|t| t.strip_prefix(TOKEN));
        let number = token.and_then(|token| token.parse::<usize>().ok());
        let agent = number.and_then(|number| self.agents.get_mut(number)).expect("a token of the fleet");
        if let Some(refused) = agent.refused.take() {
            self.waits.push(connection.accepted - refused);
        }
        self.upgrades += usize::from(self.end.is_some());
        if self.end.is_some() && self.refuse_every > 0 && self.upgrades.is_multiple_of(self.refuse_every) {
            agent.refused = Some(Instant::now());
            let retry_after = self.retry_after;
            let refusal =
                format!("HTTP/1.1 503 Busy\r\nRetry-After: {retry_after}\r\nContent-Length: 0\r\n\r\n");
            let _ = connection.stream.write_all(refusal.as_bytes());
            return None;
        }
        let accept = derive_accept_key(header("Sec-WebSocket-Key").as_bytes());
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {accept}\r\n\r\n"
        );
        connection.stream.write_all(answer.as_bytes()).ok()?;
        agent.back = agent.back.or(self.end.map(|end| end.elapsed()));
        connection.parser = Some(Parser::default());
        self.links += 1;
        Some(())
    }
}

//! A name server on a loopback address of its own. An agent asks it when it runs in a mount namespace with
//! another /etc/resolv.conf, which takes root, as the port does.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use super::doctor::within;
use super::front::Acceptor;
use super::rig::{Setup, is_root};
use super::wait::{SOON, Watched, spawn};

/// RFC 1035, 4.1.1, and RFC 2136, 2.2.
pub const SERVFAIL: u8 = 2;
pub const NXDOMAIN: u8 = 3;
pub const NOTIMP: u8 = 4;
pub const REFUSED: u8 = 5;

/// What a name gets.
#[derive(Debug, Clone)]
pub enum Answer {
    Addresses(Vec<Ipv4Addr>),
    /// These the first time, those later.
    Changing(Ipv4Addr, Ipv4Addr),
    Silence,
    /// To the queries for IPv4 and for IPv6 addresses.
    Each(Single, Single),
}

/// What one query gets.
#[derive(Debug, Clone, Copy)]
pub enum Single {
    Address(IpAddr),
    /// An error (RFC 1035, 4.1.1): no addresses.
    Code(u8),
    Silence,
    /// Not before [`NameServer::release`].
    Held(IpAddr),
    /// The last name of a chain of eight aliases has the address.
    Alias(IpAddr),
    /// Doesn't fit a datagram: TCP has to be used.
    Truncated(IpAddr),
}

/// Names in a chain of aliases.
const ALIASES: usize = 8;

#[derive(Debug, Default)]
struct State {
    names: HashMap<String, Answer>,
    /// Names whose IPv4 addresses were asked for.
    asked: Vec<String>,
    /// Replies that wait to be released, if none is to be sent before.
    held: Option<Vec<(SocketAddr, Vec<u8>)>>,
    /// Those of [`Single::Held`].
    late: Vec<(SocketAddr, Vec<u8>)>,
    quit: bool,
}

#[derive(Debug)]
pub struct NameServer {
    pub address: Ipv4Addr,
    socket: Arc<UdpSocket>,
    state: Arc<Watched<State>>,
    thread: Option<JoinHandle<()>>,
    _tcp: Acceptor,
}

/// A value for the variable RESOLVER: options by which each resolver waits for a minute, instead of 30 s.
pub const PATIENT: &str = "timeout:60 attempts:2";
/// In the agent's /etc/hosts, as 127.0.0.1.
pub const PINNED: &str = "pinned.test";

/// Starts the agent with another name server.
const NAMESPACE: &str = r#"exec unshare --mount --propagation private /bin/sh -c '
    set -e
    printf "nameserver $NAME_SERVER\noptions ${RESOLVER:-timeout:30 attempts:1}\n" >resolv.conf
    mount --bind resolv.conf /etc/resolv.conf
    { echo 127.0.0.1 pinned.test; echo "  127.0.0.1 $HOSTS_NAMES indented.test"; grep -v "${UNNAMED:-^#}" /etc/hosts || :; } >hosts
    mount --bind hosts /etc/hosts
    exec "$@"' sh "$@""#;

/// Why no agent can be started so.
pub fn obstacle() -> Option<&'static str> {
    if !is_root() {
        return Some("only root can give an agent another name server");
    }
    let made = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "mount", "--bind", "/dev/null", "/etc/resolv.conf"])
        .output()
        .is_ok_and(|output| output.status.success());
    (!made).then_some("no mount namespace can be made here")
}

impl NameServer {
    /// Knows these names and no others.
    pub fn start(names: &[(&str, Answer)]) -> NameServer {
        static SERVERS: AtomicU8 = AtomicU8::new(64);
        // The port is always the same, so each has an address of its own, whoever else runs these tests.
        let [.., high, low] = std::process::id().to_be_bytes();
        let address = Ipv4Addr::new(127, SERVERS.fetch_add(1, Ordering::Relaxed), high, low);
        let socket = Arc::new(UdpSocket::bind((address, 53)).expect("bind the name server's port"));
        let names = names.iter().map(|(name, answer)| ((*name).to_owned(), answer.clone())).collect();
        let state = Arc::new(Watched::new(State { names, ..State::default() }));
        let (shared, ours) = (Arc::clone(&state), Arc::clone(&socket));
        let thread = spawn("name-server", move || {
            let mut buffer = [0; 1024];
            loop {
                let Ok((count, peer)) = ours.recv_from(&mut buffer) else { continue };
                if shared.peek(|s| s.quit) {
                    return;
                }
                shared.update(|s| match s.answer(&buffer[..count], false) {
                    Some((answer, true)) => s.late.push((peer, answer)),
                    Some((answer, false)) => match &mut s.held {
                        Some(held) => held.push((peer, answer)),
                        None => drop(ours.send_to(&answer, peer)),
                    },
                    None => {}
                });
            }
        });
        let (shared, listener) = (Arc::clone(&state), TcpListener::bind((address, 53)));
        let listener = listener.expect("bind the name server's TCP port");
        let tcp = Acceptor::start("name-server-tcp", listener, move |mut stream| {
            let mut length = [0; 2];
            // RFC 1035, 4.2.2.
            while stream.read_exact(&mut length).is_ok() {
                let mut question = vec![0; u16::from_be_bytes(length).into()];
                let read = stream.read_exact(&mut question);
                let answer = read.ok().and_then(|()| shared.update(|s| s.answer(&question, true)));
                let Some((answer, _)) = answer else { return };
                let length = u16::try_from(answer.len()).expect("a short answer").to_be_bytes();
                let _ = stream.write_all(&[&length, &answer[..]].concat());
            }
        });
        NameServer { address, socket, state, thread: Some(thread), _tcp: tcp }
    }

    /// Keeps all answers back from now on.
    pub fn hold(&self) {
        self.state.update(|s| s.held = Some(Vec::new()));
    }

    /// Sends what was kept back, and answers at once again.
    pub fn release(&self) {
        let held = self.state.update(|s| (s.held.take().unwrap_or_default(), std::mem::take(&mut s.late)));
        for (peer, answer) in held.0.into_iter().chain(held.1) {
            let _ = self.socket.send_to(&answer, peer);
        }
    }

    /// An agent that asks this server and no other.
    pub fn setup(&self) -> Setup {
        Setup::new().wrapper(NAMESPACE).env("NAME_SERVER", &self.address.to_string())
    }

    /// The command, asking this server and no other.
    pub fn asked_by(&self, command: &Command) -> Command {
        let mut command = within(&["/bin/sh", "-c", NAMESPACE, "sh"], command);
        command.env("NAME_SERVER", self.address.to_string());
        command
    }

    /// How often a name's IPv4 addresses were asked for.
    pub fn asked(&self, name: &str) -> usize {
        self.state.peek(|s| s.asked.iter().filter(|asked| *asked == name).count())
    }

    pub fn wait_asked(&self, name: &str, count: usize) {
        let times = |s: &mut State| s.asked.iter().filter(|asked| *asked == name).count();
        let found = self.state.wait(SOON, |s| (times(s) >= count).then_some(()));
        assert!(found.is_some(), "waited {SOON:?} in vain for question {count} about {name}");
    }
}

impl State {
    /// RFC 1035, 4.1: the question comes back with what there is. True if it is to be held.
    fn answer(&mut self, question: &[u8], tcp: bool) -> Option<(Vec<u8>, bool)> {
        let (mut name, mut at) = (Vec::new(), 12);
        loop {
            let length = usize::from(*question.get(at)?);
            at += 1;
            if length == 0 {
                break;
            }
            name.push(String::from_utf8_lossy(question.get(at..at + length)?).to_lowercase());
            at += length;
        }
        let name = name.join(".");
        let ipv4 = question.get(at..at + 2)? == [0, 1];
        let question = question.get(..at + 4)?;
        if ipv4 {
            self.asked.push(name.clone());
        }
        let asked = self.asked.iter().filter(|asked| **asked == name).count();
        let ipv4s = |addresses: &[Ipv4Addr]| addresses.iter().map(|a| IpAddr::from(*a)).collect();
        let (mut held, mut aliases, mut truncated) = (false, 0, false);
        let (code, addresses): (u8, Vec<IpAddr>) = match self.names.get(&name) {
            Some(Answer::Silence) => return None,
            Some(Answer::Each(a, aaaa)) => match if ipv4 { a } else { aaaa } {
                Single::Address(address) => (0, vec![*address]),
                Single::Code(code) => (*code, Vec::new()),
                Single::Silence => return None,
                Single::Held(address) => {
                    held = true;
                    (0, vec![*address])
                }
                Single::Alias(address) => {
                    aliases = ALIASES;
                    (0, vec![*address])
                }
                Single::Truncated(address) => {
                    truncated = !tcp;
                    (0, if truncated { Vec::new() } else { vec![*address] })
                }
            },
            Some(_) if !ipv4 => (0, Vec::new()),
            Some(Answer::Addresses(addresses)) => (0, ipv4s(addresses)),
            Some(Answer::Changing(first, later)) => (0, ipv4s(&[if asked == 1 { *first } else { *later }])),
            None => (NXDOMAIN, Vec::new()),
        };
        // The identification; a recursive answer.
        let mut reply = question[..2].to_vec();
        let (flags, records) = (0x81 | u8::from(truncated) << 1, aliases + addresses.len());
        reply.extend([flags, 0x80 | code, 0, 1, 0, records as u8, 0, 0, 0, 0]);
        reply.extend(&question[12..]);
        // Where the name is that the next record is about (RFC 1035, 4.1.4).
        let mut owner = [0xc0, 12];
        for alias in 0..aliases {
            reply.extend(owner);
            reply.extend([0, 5, 0, 1, 0, 0, 0, 0, 0, 4]);
            owner = (0xc000 | reply.len() as u16).to_be_bytes();
            // One label and the root.
            reply.extend([2, b'a', b'a' + alias as u8, 0]);
        }
        for address in addresses {
            let (kind, octets) = match address {
                IpAddr::V4(address) => (1, address.octets().to_vec()),
                IpAddr::V6(address) => (28, address.octets().to_vec()),
            };
            reply.extend(owner);
            reply.extend([0, kind, 0, 1, 0, 0, 0, 0, 0, octets.len() as u8]);
            reply.extend(octets);
        }
        Some((reply, held))
    }
}

impl Drop for NameServer {
    fn drop(&mut self) {
        self.state.update(|s| s.quit = true);
        if let Ok(socket) = UdpSocket::bind("127.0.0.1:0") {
            let _ = socket.send_to(b"", (self.address, 53));
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

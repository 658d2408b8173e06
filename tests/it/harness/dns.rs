//! A name server on a loopback address of its own. An agent asks it when it runs in a mount namespace with
//! another /etc/resolv.conf, which takes root, as the port does.

use std::collections::HashMap;
use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use super::doctor::within;
use super::rig::{Setup, is_root};
use super::wait::{SOON, Watched, spawn};

/// What a name gets.
#[derive(Debug, Clone)]
pub enum Answer {
    Addresses(Vec<Ipv4Addr>),
    /// These the first time, those later.
    Changing(Ipv4Addr, Ipv4Addr),
    Silence,
}

#[derive(Debug, Default)]
struct State {
    names: HashMap<String, Answer>,
    /// Names whose IPv4 addresses were asked for.
    asked: Vec<String>,
    quit: bool,
}

#[derive(Debug)]
pub struct NameServer {
    address: Ipv4Addr,
    state: Arc<Watched<State>>,
    thread: Option<JoinHandle<()>>,
}

/// Starts the agent with another name server.
const NAMESPACE: &str = r#"exec unshare --mount --propagation private /bin/sh -c '
    set -e
    printf "nameserver $NAME_SERVER\noptions timeout:30 attempts:1\n" >resolv.conf
    mount --bind resolv.conf /etc/resolv.conf
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
        let socket = UdpSocket::bind((address, 53)).expect("bind the name server's port");
        let names = names.iter().map(|(name, answer)| ((*name).to_owned(), answer.clone())).collect();
        let state = Arc::new(Watched::new(State { names, ..State::default() }));
        let shared = Arc::clone(&state);
        let thread = spawn("name-server", move || {
            let mut buffer = [0; 1024];
            loop {
                let Ok((count, peer)) = socket.recv_from(&mut buffer) else { continue };
                if shared.peek(|s| s.quit) {
                    return;
                }
                if let Some(answer) = shared.update(|s| s.answer(&buffer[..count])) {
                    let _ = socket.send_to(&answer, peer);
                }
            }
        });
        NameServer { address, state, thread: Some(thread) }
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
    /// RFC 1035, 4.1: the question comes back with what there is.
    fn answer(&mut self, question: &[u8]) -> Option<Vec<u8>> {
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
        let addresses = match self.names.get(&name) {
            Some(Answer::Silence) => return None,
            Some(_) if !ipv4 => Some(Vec::new()),
            Some(Answer::Addresses(addresses)) => Some(addresses.clone()),
            Some(Answer::Changing(first, later)) => Some(vec![if asked == 1 { *first } else { *later }]),
            None => None,
        };
        // The identification; a recursive answer, and whether the name exists.
        let mut reply = question[..2].to_vec();
        reply.extend([0x81, if addresses.is_some() { 0x80 } else { 0x83 }, 0, 1]);
        let addresses = addresses.unwrap_or_default();
        reply.extend([0, addresses.len() as u8, 0, 0, 0, 0]);
        reply.extend(&question[12..]);
        for address in addresses {
            reply.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 0, 0, 4]);
            reply.extend(address.octets());
        }
        Some(reply)
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

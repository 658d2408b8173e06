//! What a forward leads to: small services on loopback. One thread for each connection; dropping a
//! service ends them all.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};

use super::wait::{SOON, Watched, millis, spawn};

/// Bytes that tell their place in a stream: no shift, swap or repetition leaves them the same.
pub fn fill(from: u64, bytes: &mut [u8]) {
    for (at, byte) in (from..).zip(bytes) {
        let mut word = (at / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        *byte = (word >> (at % 8 * 8)) as u8;
    }
}

/// So many of those bytes.
pub fn stream(from: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    fill(from, &mut bytes);
    bytes
}

/// What a TCP service does with each connection.
#[derive(Debug, Clone, Copy)]
pub enum Role {
    /// Sends back what it reads.
    Echo,
    /// Reads to the end.
    Discard,
    /// Sends so many bytes of [`stream`] and closes.
    Source(u64),
    /// Sends this, closes its sending side and reads to the end.
    HalfClose(&'static [u8]),
    /// Reads nothing until released, then to the end. Its receive buffer is small.
    Stalled,
    /// Reads once, waits to be released, then resets the connection.
    Reset,
}

#[derive(Debug, Default)]
struct Progress {
    accepted: usize,
    streams: HashMap<usize, TcpStream>,
    /// Bytes read over all connections.
    received: u64,
    /// Where a connection's bytes first weren't those of [`stream`].
    wrong: Option<u64>,
    /// Ends of connections that were read.
    ends: usize,
    released: bool,
    quit: bool,
}

/// A TCP service.
#[derive(Debug)]
pub struct Target {
    pub address: SocketAddr,
    progress: Arc<Watched<Progress>>,
    thread: Option<JoinHandle<()>>,
}

impl Target {
    /// Listens on 127.0.0.1.
    pub fn start(role: Role) -> Target {
        Target::bind("127.0.0.1:0", role)
    }

    pub fn bind(address: &str, role: Role) -> Target {
        Target::try_bind(address, role).expect("listen on loopback")
    }

    /// Fails if another test has the port.
    pub fn try_bind(address: &str, role: Role) -> std::io::Result<Target> {
        let listener = TcpListener::bind(address)?;
        // More than one session opens at a time.
        listen(&listener, Backlog::new(1024).expect("a backlog")).expect("a longer backlog");
        if matches!(role, Role::Stalled) {
            // Accepted connections inherit it.
            setsockopt(&listener, sockopt::RcvBuf, &(64 << 10)).expect("set SO_RCVBUF");
        }
        let address = listener.local_addr().expect("an address");
        let progress = Arc::new(Watched::new(Progress::default()));
        let shared = Arc::clone(&progress);
        let thread = spawn("target", move || accept(&listener, role, &shared));
        Ok(Target { address, progress, thread: Some(thread) })
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    pub fn release(&self) {
        self.progress.update(|p| p.released = true);
    }

    fn wait<R>(&self, what: &str, mut pick: impl FnMut(&Progress) -> Option<R>) -> R {
        let found = self.progress.wait(SOON, |p| pick(p));
        found.unwrap_or_else(|| {
            let state = self.progress.peek(|p| {
                let open = p.streams.len();
                format!("{} accepted, {open} open, {} ends, {} bytes", p.accepted, p.ends, p.received)
            });
            panic!("waited {SOON:?} in vain for the target to have {what}: {state}")
        })
    }

    /// Connections it ever had.
    pub fn accepted(&self) -> usize {
        self.progress.peek(|p| p.accepted)
    }

    pub fn wait_accepted(&self, count: usize) {
        self.wait(&format!("accepted {count}"), |p| (p.accepted >= count).then_some(()));
    }

    /// Waits until every connection is over, after there have been so many.
    pub fn wait_all_closed(&self, count: usize) {
        let closed = |p: &Progress| (p.accepted >= count && p.streams.is_empty()).then_some(());
        self.wait(&format!("had and lost {count} connections"), closed);
    }

    pub fn received(&self) -> u64 {
        self.progress.peek(|p| p.received)
    }

    pub fn wait_received(&self, count: u64) {
        self.wait(&format!("read {count} bytes"), |p| (p.received >= count).then_some(()));
    }

    /// Waits until so many connections were read to their ends.
    pub fn wait_ends(&self, count: usize) {
        self.wait(&format!("read {count} ends"), |p| (p.ends >= count).then_some(()));
    }

    /// Connections that were read to their ends.
    pub fn ends(&self) -> usize {
        self.progress.peek(|p| p.ends)
    }

    /// Asserts that each connection brought a beginning of [`stream`].
    pub fn assert_intact(&self) {
        let wrong = self.progress.peek(|p| p.wrong);
        assert!(wrong.is_none(), "what the target read differs from byte {wrong:?} on");
    }

    /// Ends all connections from this side.
    pub fn hang_up(&self) {
        self.progress.peek(|p| p.streams.values().for_each(|s| drop(s.shutdown(Shutdown::Both))));
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.progress.update(|p| (p.quit, p.released) = (true, true));
        self.hang_up();
        let _ = TcpStream::connect_timeout(&self.address, millis(500));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.hang_up();
        self.progress.wait(SOON, |p| p.streams.is_empty().then_some(()));
    }
}

fn accept(listener: &TcpListener, role: Role, progress: &Arc<Watched<Progress>>) {
    loop {
        let Ok((stream, _)) = listener.accept() else { return };
        let kept = stream.try_clone().expect("a descriptor");
        let number = progress.update(|p| {
            if p.quit {
                return None;
            }
            p.accepted += 1;
            p.streams.insert(p.accepted, kept);
            Some(p.accepted)
        });
        let Some(number) = number else { return };
        let progress = Arc::clone(progress);
        spawn("target-peer", move || {
            let _ = stream.set_nodelay(true);
            serve(&stream, role, &progress);
            if matches!(role, Role::Reset) {
                let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
                let _ = setsockopt(&stream, sockopt::Linger, &linger);
            }
            // The one kept for hanging up closes.
            drop(stream);
            progress.update(|p| drop(p.streams.remove(&number)));
        });
    }
}

fn serve(mut stream: &TcpStream, role: Role, progress: &Watched<Progress>) {
    let mut buffer = vec![0; 64 << 10];
    match role {
        Role::Source(count) => {
            let mut sent = 0;
            while sent < count {
                let piece = (count - sent).min(buffer.len() as u64) as usize;
                fill(sent, &mut buffer[..piece]);
                if stream.write_all(&buffer[..piece]).is_err() {
                    return;
                }
                sent += piece as u64;
            }
        }
        Role::HalfClose(text) => {
            if stream.write_all(text).is_err() || stream.shutdown(Shutdown::Write).is_err() {
                return;
            }
            read_to_end(stream, &mut buffer, progress, |_| true);
        }
        Role::Stalled => {
            progress.wait(Duration::from_secs(600), |p| p.released.then_some(()));
            read_to_end(stream, &mut buffer, progress, |_| true);
        }
        Role::Echo => read_to_end(stream, &mut buffer, progress, |bytes| stream.write_all(bytes).is_ok()),
        Role::Discard => read_to_end(stream, &mut buffer, progress, |_| true),
        Role::Reset => {
            let count = stream.read(&mut buffer).unwrap_or(0);
            progress.update(|p| p.received += count as u64);
            progress.wait(Duration::from_secs(600), |p| p.released.then_some(()));
        }
    }
}

fn read_to_end(
    mut stream: &TcpStream,
    buffer: &mut [u8],
    progress: &Watched<Progress>,
    mut each: impl FnMut(&[u8]) -> bool,
) {
    let mut at = 0;
    let mut expected = vec![0; buffer.len()];
    loop {
        let count = match stream.read(buffer) {
            Ok(0) => {
                progress.update(|p| p.ends += 1);
                return;
            }
            Ok(count) => count,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let bytes = &buffer[..count];
        fill(at, &mut expected[..count]);
        let wrong = bytes.iter().zip(&expected).position(|(a, b)| a != b);
        progress.update(|p| {
            p.received += count as u64;
            p.wrong = p.wrong.or(wrong.map(|offset| at + offset as u64));
        });
        at += count as u64;
        if !each(bytes) {
            return;
        }
    }
}

/// A listener whose queue is full: whoever connects waits for an answer that doesn't come.
#[derive(Debug)]
pub struct Silent {
    pub address: SocketAddr,
    _listener: TcpListener,
    _queued: Vec<TcpStream>,
}

impl Silent {
    pub fn start() -> Silent {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
        listen(&listener, Backlog::new(0).expect("a backlog")).expect("a shorter backlog");
        let address = listener.local_addr().expect("an address");
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, millis(300)) {
            queued.push(stream);
            assert!(queued.len() < 16, "the queue of descriptor {} never fills", listener.as_raw_fd());
        }
        Silent { address, _listener: listener, _queued: queued }
    }
}

#[derive(Debug, Default)]
struct Datagrams {
    received: Vec<Vec<u8>>,
    peer: Option<SocketAddr>,
    quit: bool,
}

/// A UDP service that sends each datagram back.
#[derive(Debug)]
pub struct UdpEcho {
    pub address: SocketAddr,
    socket: UdpSocket,
    state: Arc<Watched<Datagrams>>,
    thread: Option<JoinHandle<()>>,
}

impl UdpEcho {
    pub fn start() -> UdpEcho {
        UdpEcho::bind("127.0.0.1:0")
    }

    pub fn bind(address: &str) -> UdpEcho {
        let socket = UdpSocket::bind(address).expect("bind on loopback");
        let address = socket.local_addr().expect("an address");
        let state = Arc::new(Watched::new(Datagrams::default()));
        let (served, shared) = (socket.try_clone().expect("a descriptor"), Arc::clone(&state));
        let thread = spawn("udp-target", move || {
            let mut buffer = vec![0; 65_536];
            loop {
                let Ok((count, peer)) = served.recv_from(&mut buffer) else { continue };
                if shared.peek(|s| s.quit) {
                    return;
                }
                shared.update(|s| {
                    s.received.push(buffer[..count].to_vec());
                    s.peer = Some(peer);
                });
                let _ = served.send_to(&buffer[..count], peer);
            }
        });
        UdpEcho { address, socket, state, thread: Some(thread) }
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Waits for so many datagrams in all.
    pub fn wait_received(&self, count: usize) -> Vec<Vec<u8>> {
        let found = self.state.wait(SOON, |s| (s.received.len() >= count).then(|| s.received.clone()));
        found.unwrap_or_else(|| {
            let got = self.state.peek(|s| s.received.len());
            panic!("waited {SOON:?} in vain for datagram {count}; {got} came")
        })
    }

    /// Sends to whoever sent last.
    pub fn send(&self, datagram: &[u8]) {
        let peer = self.state.peek(|s| s.peer).expect("somebody sent something");
        self.socket.send_to(datagram, peer).expect("send a datagram");
    }
}

impl Drop for UdpEcho {
    fn drop(&mut self) {
        self.state.update(|s| s.quit = true);
        let _ = self.socket.send_to(b"", self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

//! The loopback server: listens, judges handshakes by script and hands connected devices to the test.

use std::collections::VecDeque;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket, sockopt,
};
use tungstenite::handshake::derive_accept_key;

use super::device::{Device, Generation};
use super::http::{self, Request};
use super::wait::{SOON, Watched, spawn};

pub const CONNECT_PATH: &str = "/api/devices/v1/deviceconnect/connect";

/// What a handshake gets.
#[derive(Debug, Clone)]
pub enum Reply {
    Upgrade,
    /// The same, a byte at a time.
    Slowly,
    /// An HTTP status with headers and a small body.
    Status(u16, Vec<(String, String)>),
    /// The bytes of a head, where `{accept}` stands for the right Sec-WebSocket-Accept. Opens a websocket.
    Head(String),
    /// 101 with a Sec-WebSocket-Accept that belongs to another key.
    WrongAccept,
    /// The request is read and never answered.
    Silence,
    /// The connection is closed without an answer, as mender-auth does when the server is away.
    Close,
    /// Bytes that aren't HTTP.
    Garbage,
}

impl Reply {
    pub fn status(code: u16) -> Reply {
        Reply::Status(code, Vec::new())
    }

    pub fn with(code: u16, header: &str, value: &str) -> Reply {
        Reply::Status(code, vec![(header.to_owned(), value.to_owned())])
    }
}

#[derive(Debug)]
struct Shared {
    script: VecDeque<Reply>,
    default: Reply,
    generation: Generation,
    /// When set, another token is answered with 401.
    token: Option<String>,
    receive_buffer: Option<usize>,
    requests: Vec<Request>,
    faults: Vec<String>,
    devices: VecDeque<Device>,
    /// Kept open for [`Reply::Silence`].
    silent: Vec<TcpStream>,
    stop: bool,
}

/// A deviceconnect service for one test.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    /// Other tests would get the port while the server is stopped.
    _port: TcpListener,
    shared: Arc<Watched<Shared>>,
    thread: Option<JoinHandle<()>>,
}

/// A port of loopback where connections are refused, in use for all that ask for any. A [`Server`], or another program
/// that sets SO_REUSEADDR, may still listen there.
pub fn closed_port() -> (TcpListener, u16) {
    let port = reserve((Ipv4Addr::LOCALHOST, 0).into());
    let number = port.local_addr().expect("a bound address").port();
    (port, number)
}

/// Binds this address, with port 0 any free one, without listening.
fn reserve(address: SocketAddr) -> TcpListener {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).expect("a socket");
    // The standard library sets it for those that listen.
    setsockopt(&socket, sockopt::ReuseAddr, &true).expect("set SO_REUSEADDR");
    bind(socket.as_raw_fd(), &SockaddrStorage::from(address)).expect("bind on loopback");
    socket.into()
}

impl Server {
    pub fn start(generation: Generation) -> Server {
        Server::bind("127.0.0.1:0".parse().expect("an address"), generation)
    }

    /// Listens at this address; with port 0 at any free one.
    pub fn bind(address: SocketAddr, generation: Generation) -> Server {
        let shared = Shared {
            script: VecDeque::new(),
            default: Reply::Upgrade,
            generation,
            token: None,
            receive_buffer: None,
            requests: Vec::new(),
            faults: Vec::new(),
            devices: VecDeque::new(),
            silent: Vec::new(),
            stop: false,
        };
        let port = reserve(address);
        let address = port.local_addr().expect("a bound address");
        let mut server =
            Server { address, _port: port, shared: Arc::new(Watched::new(shared)), thread: None };
        server.listen();
        server
    }

    fn listen(&mut self) {
        let listener = TcpListener::bind(self.address).expect("listen on loopback");
        let shared = Arc::clone(&self.shared);
        shared.update(|s| s.stop = false);
        self.thread = Some(spawn("server", move || accept(&listener, &shared)));
    }

    /// Stops listening. Connected devices stay.
    pub fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.shared.update(|s| s.stop = true);
            let _ = TcpStream::connect(self.address);
            let _ = thread.join();
        }
    }

    /// Listens again at the same address.
    pub fn resume(&mut self) {
        self.stop();
        self.listen();
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the authentication manager hands out.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers the next handshakes in this order, then as before.
    pub fn script(&self, replies: impl IntoIterator<Item = Reply>) {
        self.shared.update(|s| s.script.extend(replies));
    }

    /// Answers every handshake that isn't scripted so.
    pub fn always(&self, reply: Reply) {
        self.shared.update(|s| s.default = reply);
    }

    /// Accepts only this token.
    pub fn require_token(&self, token: &str) {
        self.shared.update(|s| s.token = Some(token.to_owned()));
    }

    /// Gives later connections a small receive buffer, so that a slow reader is felt soon. Less than
    /// loopback's segments of 64 KiB make TCP itself crawl.
    pub fn small_receive_buffer(&self, bytes: usize) {
        self.shared.update(|s| s.receive_buffer = Some(bytes));
    }

    /// The next device that completes the handshake, if one does.
    pub fn try_device(&self, limit: Duration) -> Option<Device> {
        self.shared.wait(limit, |s| s.devices.pop_front())
    }

    /// The next device that completes the handshake.
    pub fn next_device(&self, limit: Duration) -> Device {
        self.try_device(limit).unwrap_or_else(|| {
            let (requests, faults) = self.shared.peek(|s| (s.requests.clone(), s.faults.clone()));
            panic!("waited {limit:?} in vain for a device; requests {requests:#?}, faults {faults:?}")
        })
    }

    /// The next device, within the usual time.
    pub fn device(&self) -> Device {
        self.next_device(SOON)
    }

    /// Asserts that no device connects for a while.
    pub fn no_device(&self, span: Duration, why: &str) {
        assert!(self.try_device(span).is_none(), "a device connected: {why}");
    }

    pub fn requests(&self) -> Vec<Request> {
        self.shared.peek(|s| s.requests.clone())
    }

    /// Waits until `count` handshakes have been requested in all.
    pub fn wait_requests(&self, count: usize, limit: Duration) -> Vec<Request> {
        let found = self.shared.wait(limit, |s| (s.requests.len() >= count).then(|| s.requests.clone()));
        found.unwrap_or_else(|| {
            panic!("waited {limit:?} in vain for handshake {count}; there were {:#?}", self.requests())
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Watched<Shared>>) {
    loop {
        let Ok((stream, _)) = listener.accept() else { return };
        if shared.peek(|s| s.stop) {
            return;
        }
        let shared = Arc::clone(shared);
        spawn("handshake", move || {
            if let Err(fault) = handshake(stream, &shared) {
                shared.update(|s| s.faults.push(fault));
            }
        });
    }
}

fn handshake(mut stream: TcpStream, shared: &Watched<Shared>) -> Result<(), String> {
    if let Some(bytes) = shared.peek(|s| s.receive_buffer) {
        setsockopt(&stream, sockopt::RcvBuf, &bytes).map_err(|e| e.to_string())?;
    }
    let request = http::read_request(&mut stream)?;
    let (reply, generation) = shared.update(|s| {
        s.requests.push(request.clone());
        let wrong_token = s.token.as_ref().is_some_and(|token| {
            request.header("Authorization").and_then(|h| h.strip_prefix("Bearer ")) != Some(token)
        });
        let scripted = s.script.pop_front();
        let reply = match scripted {
            Some(reply) => reply,
            None if wrong_token => Reply::with(401, "WWW-Authenticate", "Bearer realm=\"ManagementJWT\""),
            None => s.default.clone(),
        };
        (reply, s.generation)
    });
    match reply {
        Reply::Status(code, headers) => {
            http::respond(&mut stream, code, &headers, Some("{\"error\":\"scripted\"}"));
        }
        Reply::Silence => shared.update(|s| s.silent.push(stream)),
        Reply::Close => drop(stream),
        Reply::Garbage => {
            let _ = stream.write_all(b"\x00\x01SSH-2.0-notawebserver\r\n\r\n");
        }
        Reply::Upgrade | Reply::Slowly | Reply::Head(_) | Reply::WrongAccept => {
            if let Err(fault) = check(&request) {
                http::respond(&mut stream, 400, &[], Some(&fault));
                return Err(fault);
            }
            let key = request.header("Sec-WebSocket-Key").unwrap_or_default();
            let accept = match reply {
                Reply::WrongAccept => derive_accept_key(b"a key of somebody else"),
                _ => derive_accept_key(key.as_bytes()),
            };
            let headers = [
                ("Upgrade".to_owned(), "websocket".to_owned()),
                ("Connection".to_owned(), "Upgrade".to_owned()),
                ("Sec-WebSocket-Accept".to_owned(), accept),
            ];
            match &reply {
                Reply::Slowly => http::respond_slowly(&mut stream, 101, &headers),
                Reply::Head(head) => {
                    let _ = stream.write_all(head.replace("{accept}", &headers[2].1).as_bytes());
                }
                _ => http::respond(&mut stream, 101, &headers, None),
            }
            if !matches!(reply, Reply::WrongAccept) {
                stream.set_read_timeout(None).map_err(|e| e.to_string())?;
                let device = Device::start(stream, generation, request);
                shared.update(|s| s.devices.push_back(device));
            }
        }
    }
    Ok(())
}

/// What every server demands of a device's handshake.
fn check(request: &Request) -> Result<(), String> {
    let has = |name: &str, value: &str| {
        request.header(name).is_some_and(|h| h.split(',').any(|part| part.trim().eq_ignore_ascii_case(value)))
    };
    if request.method != "GET" || request.path != CONNECT_PATH {
        return Err(format!("wrong request line: {} {}", request.method, request.path));
    }
    if !has("Upgrade", "websocket") || !has("Connection", "Upgrade") || !has("Sec-WebSocket-Version", "13") {
        return Err("not a websocket handshake".to_owned());
    }
    match request.header("Authorization").map(|h| h.split(' ').collect::<Vec<_>>()) {
        Some(parts) if parts.len() == 2 && parts[0].eq_ignore_ascii_case("Bearer") => Ok(()),
        other => Err(format!("malformed Authorization: {} parts", other.map_or(0, |p| p.len()))),
    }
}

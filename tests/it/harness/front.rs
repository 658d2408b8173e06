//! Things that stand between device and server: an accept loop, a plain relay, an HTTP proxy.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::http::{self, Request};
use super::wait::{Watched, spawn};

/// Accepts connections and serves each in a thread of its own, until dropped.
#[derive(Debug)]
pub struct Acceptor {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Acceptor {
    pub fn start(
        name: &'static str,
        listener: TcpListener,
        serve: impl Fn(TcpStream) + Send + Sync + 'static,
    ) -> Acceptor {
        let address = listener.local_addr().expect("a bound address");
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let serve = Arc::new(serve);
        let thread = spawn(name, move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let serve = Arc::clone(&serve);
                spawn(name, move || serve(stream));
            }
        });
        Acceptor { address, stop, thread: Some(thread) }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Acceptor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Copies both ways until either side ends.
pub fn relay(one: TcpStream, other: TcpStream) {
    let (Ok(one_again), Ok(other_again)) = (one.try_clone(), other.try_clone()) else { return };
    let back = spawn("relay-back", move || copy(other_again, one_again));
    copy(one, other);
    let _ = back.join();
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 32 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// An HTTP proxy that knows CONNECT only and leads every name to one server.
pub struct Proxy {
    acceptor: Acceptor,
    requests: Arc<Watched<Vec<Request>>>,
    refusal: Arc<Watched<Option<u16>>>,
}

impl Proxy {
    pub fn start(target: SocketAddr) -> Proxy {
        let requests = Arc::new(Watched::new(Vec::new()));
        let refusal = Arc::new(Watched::new(None));
        let (seen, refuse) = (Arc::clone(&requests), Arc::clone(&refusal));
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
        let acceptor = Acceptor::start("proxy", listener, move |mut stream| {
            let Ok(request) = http::read_request(&mut stream) else { return };
            let connect = request.method == "CONNECT";
            seen.update(|r| r.push(request));
            match refuse.peek(|r| *r) {
                Some(status) => http::respond(&mut stream, status, &[], Some("refused")),
                None if !connect => http::respond(&mut stream, 405, &[], Some("CONNECT only")),
                None => {
                    let Ok(server) = TcpStream::connect(target) else { return };
                    http::respond(&mut stream, 200, &[], None);
                    let _ = stream.set_read_timeout(None);
                    let _ = stream.set_nodelay(true);
                    let _ = server.set_nodelay(true);
                    relay(stream, server);
                }
            }
        });
        Proxy { acceptor, requests, refusal }
    }

    /// The proxy's `host:port`.
    pub fn authority(&self) -> String {
        self.acceptor.address().to_string()
    }

    /// Answers every request with this status from now on; `None` serves again.
    pub fn refuse(&self, status: Option<u16>) {
        self.refusal.update(|r| *r = status);
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.peek(Clone::clone)
    }

    pub fn wait_requests(&self, count: usize, limit: Duration) -> Vec<Request> {
        let found = self.requests.wait(limit, |r| (r.len() >= count).then(|| r.clone()));
        found.unwrap_or_else(|| panic!("waited {limit:?} in vain for request {count} at the proxy"))
    }
}

/// A SOCKS5 proxy (RFC 1928, 1929) that leads every name to one server.
pub struct Socks {
    acceptor: Acceptor,
    asked: Arc<Watched<Vec<String>>>,
}

impl Socks {
    /// Demands this user and password, if there are any; answers requests with this code.
    pub fn start(target: SocketAddr, login: Option<(&'static str, &'static str)>, code: u8) -> Socks {
        let asked = Arc::new(Watched::new(Vec::new()));
        let seen = Arc::clone(&asked);
        let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
        let acceptor = Acceptor::start("socks", listener, move |mut stream| {
            let Ok(place) = Self::request(&mut stream, login) else { return };
            seen.update(|asked| asked.push(place));
            let _ = stream.write_all(&[5, code, 0, 1, 127, 0, 0, 1, 0, 0]);
            if let (0, Ok(server)) = (code, TcpStream::connect(target)) {
                let _ = (stream.set_nodelay(true), server.set_nodelay(true));
                relay(stream, server);
            }
        });
        Socks { acceptor, asked }
    }

    fn bytes(mut stream: &TcpStream, count: impl Into<usize>) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; count.into()];
        stream.read_exact(&mut bytes).map(|()| bytes)
    }

    /// The place that a client wants to get to.
    fn request(stream: &mut TcpStream, login: Option<(&str, &str)>) -> std::io::Result<String> {
        let count = Self::bytes(stream, 2_usize)?[1];
        let methods = Self::bytes(stream, count)?;
        let method = if login.is_some() { 2 } else { 0 };
        if !methods.contains(&method) {
            stream.write_all(&[5, 0xff])?;
            return Err(std::io::ErrorKind::PermissionDenied.into());
        }
        stream.write_all(&[5, method])?;
        if let Some((user, word)) = login {
            let length = Self::bytes(stream, 2_usize)?[1];
            let name = Self::bytes(stream, length)?;
            let length = Self::bytes(stream, 1_usize)?[0];
            let right = name == user.as_bytes() && Self::bytes(stream, length)? == word.as_bytes();
            stream.write_all(&[1, u8::from(!right)])?;
            if !right {
                return Err(std::io::ErrorKind::PermissionDenied.into());
            }
        }
        let head = Self::bytes(stream, 4_usize)?;
        let host = match head[3] {
            1 => std::net::Ipv4Addr::from(
                <[u8; 4]>::try_from(Self::bytes(stream, 4_usize)?).unwrap_or_default(),
            )
            .to_string(),
            3 => {
                let length = Self::bytes(stream, 1_usize)?[0];
                String::from_utf8_lossy(&Self::bytes(stream, length)?).into_owned()
            }
            _ => std::net::Ipv6Addr::from(
                <[u8; 16]>::try_from(Self::bytes(stream, 16_usize)?).unwrap_or_default(),
            )
            .to_string(),
        };
        let port = Self::bytes(stream, 2_usize)?;
        Ok(format!("{host}:{}", u16::from_be_bytes([port[0], port[1]])))
    }

    /// The proxy's `host:port`.
    pub fn authority(&self) -> String {
        self.acceptor.address().to_string()
    }

    pub fn asked(&self) -> Vec<String> {
        self.asked.peek(Clone::clone)
    }
}

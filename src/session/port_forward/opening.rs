//! The way to an open forward: look-up, access, connect, within one time limit.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use nix::libc;
use nix::poll::PollFlags;
use nix::sys::socket::{SockType, getsockopt, sockopt};

use crate::config::Allowed;
use crate::permits::Permit;
use crate::proto::forward::{Target, Transport};
use crate::session::peer::Peer;
use crate::session::stats::ForwardInfo;
use crate::sys::{names, net, poll_one, reason};

/// Limit of look-up and connect together. glibc's resolver alone may take 16 s before it succeeds.
const OPEN_LIMIT: Duration = Duration::from_secs(45);

/// How a forward ended: the fields `result` and `reason` of the audit log.
pub(super) type End = (&'static str, String);
pub(super) const FAILED: &str = "failed";
const DENIED: &str = "denied";

/// The connected socket, once there is one. The error's reason is the text for the client, too.
type Opened = Result<Option<(OwnedFd, SocketAddr)>, End>;
type Addresses = VecDeque<SocketAddr>;

#[derive(Debug)]
pub(super) struct Opening {
    shown: Arc<ForwardInfo>,
    deadline: Instant,
    /// With the session's permit.
    look_up: Option<(Receiver<io::Result<Vec<SocketAddr>>>, Permit)>,
    attempt: Option<Attempt>,
}

#[derive(Debug)]
struct Attempt {
    socket: OwnedFd,
    address: SocketAddr,
    others: Addresses,
    until: Instant,
}

impl Opening {
    pub(super) fn new(shown: &Arc<ForwardInfo>, now: Instant) -> Self {
        Opening { shown: Arc::clone(shown), deadline: now + OPEN_LIMIT, look_up: None, attempt: None }
    }

    /// Becomes writable when the attempt to connect is decided.
    pub(super) fn socket(&self) -> Option<&OwnedFd> {
        self.attempt.as_ref().map(|attempt| &attempt.socket)
    }

    /// When [`Opening::advance`] has something to decide.
    pub(super) fn deadline(&self) -> Instant {
        self.attempt.as_ref().map_or(self.deadline, |attempt| attempt.until)
    }

    pub(super) fn advance(&mut self, peer: &Peer, now: Instant) -> Opened {
        if self.attempt.is_none() {
            let error = |this: &Self, what: &str| format!(": lookup {}: {what}", this.shown.target.host);
            let found = self.resolve(peer, now);
            let found = found.map_err(|what| self.failed(&error(self, &what)))?;
            let Some(addresses) = found else { return Ok(None) };
            let addresses = self.permitted(addresses, peer.device.config().forward_targets.as_deref())?;
            return self.connect(addresses, error(self, "no such host"), now);
        }
        let mut writable = false;
        let decided = |attempt: &mut Attempt| {
            writable = is_writable(&attempt.socket);
            writable || now >= attempt.until
        };
        let Some(Attempt { socket, address, others, .. }) = self.attempt.take_if(decided) else {
            return Ok(None);
        };
        let errno = match writable {
            true => getsockopt(&socket, sockopt::SocketError).unwrap_or_else(|e| e as i32),
            false => libc::ETIMEDOUT,
        };
        let error = match errno {
            0 => return Ok(Some((socket, address))),
            libc::ETIMEDOUT => "i/o timeout".to_owned(),
            _ => format!("connect: {}", reason(&io::Error::from_raw_os_error(errno))),
        };
        self.connect(others, format!(" {address}: {error}"), now)
    }

    /// The target's addresses, once they are known. The error is Go's text.
    fn resolve(&mut self, peer: &Peer, now: Instant) -> Result<Option<Addresses>, String> {
        let Target { host, port, .. } = &self.shown.target;
        if let Some((answer, _)) = &self.look_up {
            if let Ok(found) = answer.try_recv() {
                self.look_up = None;
                return found.map(|addresses| Some(addresses.into())).map_err(|e| e.to_string());
            }
        } else if let Some(addresses) = known_addresses(host) {
            return Ok(Some(addresses.into_iter().map(|address| SocketAddr::new(address, *port)).collect()));
        }
        if now >= self.deadline {
            return Err("i/o timeout".to_owned());
        }
        if self.look_up.is_none()
            && let Some(ours) = peer.look_ups.acquire_or_wake(&peer.wake)
            && let Some(permit) = peer.device.look_ups.acquire_or_wake(&peer.wake)
        {
            let wake = Arc::clone(&peer.wake);
            let answer =
                names::look_up(host, *port, permit, move || wake.notify()).map_err(|e| reason(&e))?;
            self.look_up = Some((answer, ours));
        }
        Ok(None)
    }

    /// Keeps the addresses that may be reached, and no others, whatever the name resolves to later.
    fn permitted(&self, mut addresses: Addresses, allowed: Option<&[Allowed]>) -> Result<Addresses, End> {
        let Target { host, port, transport } = &self.shown.target;
        let (transport, any) = (transport.name(), !addresses.is_empty());
        addresses.retain(|address| {
            allowed.is_none_or(|all| all.iter().any(|a| a.permits(transport, host, address.ip(), *port)))
        });
        if any && addresses.is_empty() {
            let text = format!("access denied: {transport}/{host}:{port} is not in PortForward.Allow");
            return Err((DENIED, text));
        }
        Ok(addresses)
    }

    /// Begins to connect to the first address that can be tried. `last` is the error if there is none.
    fn connect(&mut self, mut addresses: Addresses, mut last: String, now: Instant) -> Opened {
        let kind = match self.shown.target.transport {
            Transport::Tcp => SockType::Stream,
            Transport::Udp => SockType::Datagram,
        };
        while let Some(address) = addresses.pop_front() {
            let left = self.deadline.saturating_duration_since(now);
            let until = now + net::connect_limit(left, addresses.len() + 1);
            match net::begin_connect(address, kind) {
                Ok(socket) => {
                    self.attempt = Some(Attempt { socket, address, others: addresses, until });
                    return Ok(None);
                }
                Err(e) => last = format!(" {address}: connect: {}", reason(&e)),
            }
        }
        Err(self.failed(&last))
    }

    /// As Go words it: "dial tcp 127.0.0.1:1: connect: …", "dial tcp: lookup name: …".
    fn failed(&self, what: &str) -> End {
        (FAILED, format!("dial {}{what}", self.shown.target.transport.name()))
    }
}

/// True if a connect(2) in progress has succeeded or failed.
fn is_writable(socket: &OwnedFd) -> bool {
    poll_one(socket, PollFlags::POLLOUT, Some(Instant::now())).is_ok_and(|events| !events.is_empty())
}

/// The addresses of a host that needs no look-up.
fn known_addresses(host: &str) -> Option<Vec<IpAddr>> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    match bare.parse() {
        Ok(address) => Some(vec![address]),
        // By definition (RFC 6761, 6.3).
        Err(_) => bare
            .eq_ignore_ascii_case("localhost")
            .then(|| vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]),
    }
}

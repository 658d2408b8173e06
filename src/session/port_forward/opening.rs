//! Opens a forward: look-up, access check and connect, within one time limit.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::SockType;

use crate::config::Allowed;
use crate::permits::Permit;
use crate::proto::forward::{Target, Transport};
use crate::session::peer::Peer;
use crate::sys::names::{self, Query};
use crate::sys::race::{Event, Race, has_route};
use crate::sys::{net, reason};

/// For look-up and connect together. glibc's resolver alone may take 16 s before it succeeds.
const OPEN_LIMIT: Duration = Duration::from_secs(45);

/// The audit log's `result` and `reason`. The latter is the client's text, too.
pub(super) type End = (&'static str, String);
pub(super) const FAILED: &str = "failed";
const DENIED: &str = "denied";

pub(super) struct Opening {
    deadline: Instant,
    /// `None` until there is a permit for the look-up.
    race: Option<Race>,
    /// The reason if all fails, and its weight: the first one of the greatest weight counts. Addresses without a route
    /// are tried last.
    failure: Option<(u8, End)>,
}

impl Opening {
    pub(super) fn new(now: Instant) -> Self {
        Opening { deadline: now + OPEN_LIMIT, race: None, failure: None }
    }

    pub(super) fn sockets(&self) -> impl Iterator<Item = &OwnedFd> {
        self.race.iter().flat_map(Race::sockets)
    }

    pub(super) fn deadline(&self) -> Instant {
        let next = self.race.as_ref().and_then(Race::deadline);
        next.map_or(self.deadline, |next| next.min(self.deadline))
    }

    /// `descriptors` grows and shrinks with the number of sockets; it holds at least one.
    pub(super) fn advance(
        &mut self,
        peer: &Peer,
        target: &Target,
        descriptors: &mut Permit,
        now: Instant,
    ) -> Result<Option<(OwnedFd, SocketAddr)>, End> {
        if self.race.is_none() {
            self.race = Opening::begin(peer, target, now)?;
        }
        let (host, failure) = (&target.host, &mut self.failure);
        let config = peer.device.config();
        let mut note = |weight, end| {
            if failure.as_ref().is_none_or(|(known, _)| *known < weight) {
                *failure = Some((weight, end));
            }
        };
        let winner = self.race.as_mut().and_then(|race| {
            race.advance(now, &mut |sockets| descriptors.resize(sockets), &mut |event| match event {
                Event::Answered(_, Ok(addresses)) => {
                    if let Err(denied) = permit(target, addresses, config.forward_targets.as_deref()) {
                        note(2, denied);
                    }
                }
                Event::Answered(query, Err(e)) => {
                    let weight = u8::from(query == Query::A);
                    note(weight, failed(target, &format!(": lookup {host}: {e}")));
                }
                Event::Failed(address, e) => {
                    note(3 + u8::from(has_route(address)), failed(target, &not_connected(address, &e)));
                }
            })
        });
        if winner.is_none() && !self.race.as_ref().is_some_and(Race::is_over) {
            if now < self.deadline {
                return Ok(None);
            }
            let late = |address| not_connected(address, &Errno::ETIMEDOUT.into());
            let pending = self.race.as_ref().and_then(Race::pending);
            let what = pending.map_or_else(|| format!(": lookup {host}: i/o timeout"), late);
            return Err(failed(target, &what));
        }
        self.race = None;
        descriptors.resize(1);
        let nothing = || failed(target, &format!(": lookup {host}: no such host"));
        winner.map(Some).ok_or_else(|| self.failure.take().map_or_else(nothing, |(_, end)| end))
    }

    /// `None` if there is no permit for a look-up yet.
    fn begin(peer: &Peer, target: &Target, now: Instant) -> Result<Option<Race>, End> {
        let Target { host, port, transport } = target;
        let kind = match transport {
            Transport::Tcp => SockType::Stream,
            Transport::Udp => SockType::Datagram,
        };
        if let Some(mut addresses) = known_addresses(host, *port) {
            permit(target, &mut addresses, peer.device.config().forward_targets.as_deref())?;
            return Ok(Some(Race::new(kind, addresses, now)));
        }
        let Some(permit) = peer.share.look_ups.acquire_or_wake(&peer.wake) else { return Ok(None) };
        // Until it ends, whether or not the client waits for it.
        let answers = names::look_up(host, *port, permit, Arc::clone(&peer.wake))
            .map_err(|e| failed(target, &format!(": lookup {host}: {}", reason(&e))))?;
        Ok(Some(Race::awaiting(kind, answers, now)))
    }
}

/// Keeps the allowed addresses. Only these are connected to, whatever the name resolves to later.
fn permit(target: &Target, addresses: &mut Vec<SocketAddr>, allowed: Option<&[Allowed]>) -> Result<(), End> {
    let Target { host, port, transport } = target;
    let (transport, any) = (transport.name(), !addresses.is_empty());
    addresses
        .retain(|address| allowed.is_none_or(|all| all.iter().any(|a| a.permits(transport, host, *address))));
    if any && addresses.is_empty() {
        let text = format!("access denied: {transport}/{host}:{port} is not in PortForward.Allow");
        return Err((DENIED, text));
    }
    Ok(())
}

fn not_connected(address: SocketAddr, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ETIMEDOUT) => format!(" {address}: i/o timeout"),
        _ => format!(" {address}: connect: {}", reason(error)),
    }
}

/// Go's text: "dial tcp 127.0.0.1:1: connect: …", "dial tcp: lookup name: …".
fn failed(target: &Target, what: &str) -> End {
    (FAILED, format!("dial {}{what}", target.transport.name()))
}

fn known_addresses(host: &str, port: u16) -> Option<Vec<SocketAddr>> {
    let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if let Some(address) = net::literal(bare, port) {
        return Some(vec![address]);
    }
    // RFC 6761, 6.3.
    let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let all = loopback.map(|address: IpAddr| SocketAddr::new(address, port));
    bare.eq_ignore_ascii_case("localhost").then(|| all.to_vec())
}

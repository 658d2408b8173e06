//! Dials: from credentials to an open websocket.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use log::{debug, warn};
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::SockType;
use tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tungstenite::{Bytes, Error, Message, WebSocket};

use super::endpoint::{Endpoint, IN_CLEAR};
use super::error::{LinkError, MAX_MESSAGE};
use super::halves::Half;
use super::http::{self, Answer};
use super::proxy::{self, Kind as ProxyKind};
use super::socket::{Cancel, Socket};
#[cfg(feature = "tls")]
use super::tls::client as tls_client;
use crate::auth::Credentials;
use crate::encoding::base64;
use crate::sys::names::{self, Query};
use crate::sys::race::{Event, Race, has_route};
use crate::sys::{PollSet, net, reason};

/// In bytes.
pub(super) const BUFFER: usize = 16 * 1024;
const PING_PAYLOAD: Bytes = Bytes::from_static(b"doctor");

pub(crate) enum Progress<'a> {
    Server(&'a Endpoint),
    /// Whether there is one.
    Proxy(bool),
    /// The host of the proxy, or else of the server; without a query it is an address.
    Resolved(&'a str, Option<Query>, &'a [SocketAddr]),
    /// A query or, without one, an attempt to connect.
    Failed(Option<Query>, &'a LinkError),
    Connected(SocketAddr),
    Tunnel(ProxyKind, &'a Endpoint),
    /// TLS version, and what the certificate is for; `None` without TLS.
    Secured(Option<String>),
    Answered(&'a Answer),
    Opened,
}

pub(super) type Observer<'a> = &'a mut dyn FnMut(Progress<'_>);

/// Without `upgrade` it asks for no websocket, and fails with [`LinkError::Refused`] at best.
pub(super) fn dial(
    credentials: &Credentials,
    cancel: &Arc<Cancel>,
    upgrade: bool,
    progress: Observer<'_>,
) -> Result<WebSocket<Half>, LinkError> {
    let server = Endpoint::parse(&credentials.server_url)?;
    let handshake = if server.tls { Some(tls_client(&server)?) } else { None };
    let mut nonce = [0; 16];
    getrandom::fill(&mut nonce).map_err(|_| io::Error::other("no random numbers"))?;
    let key = upgrade.then(|| base64(&nonce));
    let request = http::request(&server, &credentials.token, key.as_deref())?;
    progress(Progress::Server(&server));
    let proxy = proxy::proxy_for(&server, |name| std::env::var(name).ok())?;
    let first = proxy.as_ref().map_or(&server, |p| &p.endpoint);
    progress(Progress::Proxy(proxy.is_some()));
    let label = if proxy.is_some() { " (the proxy)" } else { "" };
    let mut socket = open_socket(first, label, cancel, progress)?;
    if let Some(proxy) = &proxy {
        debug!("asking the proxy {} for {}", proxy.endpoint.authority(), server.authority());
        proxy.tunnel(&mut socket, &server)?;
        progress(Progress::Tunnel(proxy.kind, &proxy.endpoint));
    }
    let (tls, version) = handshake.map(|handshake| handshake(&mut socket)).transpose()?.unzip();
    progress(Progress::Secured(version));
    let mut stream = Half::new(socket, tls);
    let answer = http::ask(&mut stream, &request).map_err(|e| match e.kind() {
        io::ErrorKind::TimedOut if upgrade => LinkError::TimedOut("the websocket handshake"),
        io::ErrorKind::TimedOut => LinkError::TimedOut("the answer"),
        _ => LinkError::NoAnswer(e),
    })?;
    progress(Progress::Answered(&answer));
    answer.accepts(key.as_deref())?;
    if server.sends_in_clear() {
        warn!("{IN_CLEAR}");
    }
    progress(Progress::Opened);
    Ok(websocket(stream, BUFFER, MAX_MESSAGE))
}

#[cfg(not(feature = "tls"))]
fn tls_client(_: &Endpoint) -> Result<super::halves::Handshake, LinkError> {
    let reason = "built without TLS, only http servers can be reached".to_owned();
    Err(LinkError::Tls(reason, super::error::TlsFault::LeftOut))
}

/// A trial for `doctor`. With `upgrade` it opens a websocket and pings; that ends the device's own, if any.
pub(crate) fn trial(
    credentials: &Credentials,
    upgrade: bool,
    progress: Observer<'_>,
) -> Result<(), LinkError> {
    let mut websocket = dial(credentials, &Arc::new(Cancel::new()?), upgrade, progress)?;
    websocket.send(Message::Ping(PING_PAYLOAD))?;
    loop {
        match websocket.read() {
            Ok(Message::Pong(payload)) if payload == PING_PAYLOAD => break,
            Ok(Message::Close(frame)) => {
                // The report must not repeat the server's text.
                return Err(frame.map(|frame| CloseFrame { reason: "".into(), ..frame }).into());
            }
            Ok(_) => {}
            Err(Error::Io(e)) if e.kind() == io::ErrorKind::TimedOut => {
                return Err(LinkError::TimedOut("the answer to a ping"));
            }
            Err(e) => return Err(e.into()),
        }
    }
    // The trial has succeeded even if the server never gets the close frame.
    let _ = websocket.close(Some(CloseFrame { code: 1000.into(), reason: "".into() }));
    let _ = websocket.flush();
    Ok(())
}

/// `most`: largest inbound message in bytes. The writer never reads, and has no buffer for it.
pub(super) fn websocket<S: Read + Write>(stream: S, read_buffer: usize, most: usize) -> WebSocket<S> {
    let config = WebSocketConfig::default().read_buffer_size(read_buffer).write_buffer_size(BUFFER);
    let config = config.max_message_size(Some(most)).max_frame_size(Some(most));
    WebSocket::from_raw_socket(stream, Role::Client, Some(config))
}

fn open_socket(
    target: &Endpoint,
    label: &str,
    cancel: &Arc<Cancel>,
    progress: Observer<'_>,
) -> Result<Socket, LinkError> {
    let not_connected = |address: SocketAddr, e: &io::Error| LinkError::Connect {
        address: format!("{address}{label}"),
        reason: reason(e),
    };
    let no_addresses = |reason| LinkError::Resolve { host: target.host.clone(), reason };
    let mut failure = None;
    let mut race = match net::literal(&target.host, target.port) {
        Some(address) => {
            progress(Progress::Resolved(&target.host, None, &[address]));
            Race::new(SockType::Stream, vec![address], Instant::now())
        }
        None => {
            let answers = names::look_up(&target.host, target.port, (), Arc::clone(&cancel.wake))?;
            Race::awaiting(SockType::Stream, answers, Instant::now())
        }
    };
    loop {
        cancel.wake.clear();
        if cancel.is_over() {
            return Err(LinkError::Cancelled);
        }
        if cancel.again.swap(false, Ordering::SeqCst) {
            race.try_again(Instant::now());
        }
        let winner = race.advance(Instant::now(), &mut |_| true, &mut |event| {
            let (query, weight, e) = match event {
                Event::Answered(query, Ok(addresses)) => {
                    return progress(Progress::Resolved(&target.host, Some(query), addresses));
                }
                Event::Answered(query, Err(e)) => {
                    (Some(query), u8::from(query == Query::A), no_addresses(e.to_string()))
                }
                Event::Failed(address, e) => {
                    (None, 2 + u8::from(has_route(address)), not_connected(address, &e))
                }
            };
            progress(Progress::Failed(query, &e));
            // The first of the greatest weight is reported.
            if failure.as_ref().is_none_or(|(known, _)| *known < weight) {
                failure = Some((weight, e));
            }
        });
        if let Some((socket, address)) = winner {
            progress(Progress::Connected(address));
            return Ok(Socket::new(socket, address, cancel)?);
        }
        if race.is_over() {
            let nothing = || no_addresses("no addresses".to_owned());
            return Err(failure.map_or_else(nothing, |(_, failure)| failure));
        }
        if cancel.left().is_zero() {
            let late = |address| not_connected(address, &Errno::ETIMEDOUT.into());
            return Err(race.pending().map_or(LinkError::TimedOut("the name look-up"), late));
        }
        cancel.set_attempts(race.sockets());
        let mut set = PollSet::default();
        set.add(cancel.wake.as_fd(), PollFlags::POLLIN);
        race.sockets().for_each(|socket| set.add(socket.as_fd(), PollFlags::POLLOUT));
        set.until(&[race.deadline(), Some(cancel.deadline)]);
        set.wait()?;
    }
}

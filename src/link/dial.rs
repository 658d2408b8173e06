//! From credentials to an open websocket.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::select;
use log::debug;
use nix::errno::Errno;
use nix::sys::socket::{SockFlag, SockType};
use tungstenite::WebSocket;
use tungstenite::handshake::client::generate_key;
use tungstenite::protocol::{Role, WebSocketConfig};

use super::cancel::Cancel;
use super::deadline::{ATTEMPT_LIMIT, Deadline};
use super::endpoint::Endpoint;
use super::error::{LinkError, MAX_MESSAGE};
use super::halves::{ReadHalf, WriteHalf};
use super::http::{Answer, Request};
use super::proxy::ProxySettings;
use super::tls;
use crate::auth::Credentials;
use crate::outbox::Outbox;
use crate::sys::{names, net, reason};

/// TCP_NOTSENT_LOWAT in bytes. Small, so that an echo doesn't queue behind a download.
const UNSENT_LIMIT: u16 = 16 * 1024;
const BUFFER: usize = 16 * 1024;

/// A step that was made; in this order, as far as they are needed.
pub(crate) enum Progress<'a> {
    /// The URL is valid.
    Server(&'a Endpoint),
    /// The proxy that leads to the server, if any.
    Proxy(Option<&'a Endpoint>),
    /// The addresses of the proxy, or else of the server.
    Resolved(&'a [SocketAddr]),
    /// One of the addresses can't be connected to.
    Failed(&'a LinkError),
    Connected(SocketAddr),
    /// The proxy leads to the server.
    Tunnel,
    /// The connection is ready for the request; the version of TLS, if that is spoken.
    Secured(Option<String>),
    Answered(&'a Answer),
    /// The answer opens a websocket.
    Opened,
}

/// Connects to the server that `credentials` name.
pub(super) fn dial(
    credentials: &Credentials,
    proxies: &ProxySettings,
    cancel: &Arc<Cancel>,
    outbox: &Outbox,
) -> Result<(WebSocket<ReadHalf>, WriteHalf), LinkError> {
    let (request, stream) = reach(credentials, proxies, cancel, &mut |_| {})?;
    let mut websocket = upgrade(&request, stream, &mut |_| {})?;
    let write_half = websocket.get_mut().open(outbox, cancel)?;
    Ok((websocket, write_half))
}

/// The way to the server, up to what is to be asked of it. `progress` hears of each step that was made.
pub(super) fn reach(
    credentials: &Credentials,
    proxies: &ProxySettings,
    cancel: &Cancel,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(Request, ReadHalf), LinkError> {
    let deadline = Instant::now() + ATTEMPT_LIMIT;
    let server = Endpoint::parse(&credentials.server_url)?;
    let tls = if server.tls { Some(tls::Client::new(&server)?) } else { None };
    let request = Request::new(&server, &credentials.token)?;
    progress(Progress::Server(&server));

    let proxy = proxies.proxy_for(&server)?;
    let first = proxy.as_ref().map_or(&server, |p| &p.endpoint);
    progress(Progress::Proxy(proxy.as_ref().map(|p| &p.endpoint)));
    let socket = open_socket(first, deadline, cancel, progress)?;
    if let Some(proxy) = &proxy {
        debug!("asking the proxy {} for {}", proxy.endpoint.authority(), server.authority());
        proxy.tunnel(Deadline { socket: &socket, deadline: Some(deadline) }, &server)?;
        progress(Progress::Tunnel);
    }
    let tls = tls
        .map(|client| client.handshake(Deadline { socket: &socket, deadline: Some(deadline) }))
        .transpose()?;

    let stream = ReadHalf::new(Arc::clone(&socket), tls, deadline);
    progress(Progress::Secured(stream.tls_version()));
    Ok((request, stream))
}

/// Opens a websocket at the end of the way.
pub(super) fn upgrade(
    request: &Request,
    mut stream: ReadHalf,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<WebSocket<ReadHalf>, LinkError> {
    let key = generate_key();
    let answer = request.ask(&mut stream, Some(&key))?;
    progress(Progress::Answered(&answer));
    answer.accepts(&key)?;
    progress(Progress::Opened);
    Ok(WebSocket::from_raw_socket(stream, Role::Client, Some(websocket_config(MAX_MESSAGE))))
}

pub(super) fn websocket_config(max_message: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .max_message_size(Some(max_message))
        .max_frame_size(Some(max_message))
}

fn open_socket(
    target: &Endpoint,
    deadline: Instant,
    cancel: &Cancel,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Arc<TcpStream>, LinkError> {
    let mut last = LinkError::Resolve { host: target.host.clone(), reason: "no addresses".to_owned() };
    let addresses = resolve(target, deadline, cancel)?;
    progress(Progress::Resolved(&addresses));
    for (at, &address) in addresses.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        match connect_to(address, net::connect_limit(left, addresses.len() - at), cancel) {
            Ok(socket) => {
                progress(Progress::Connected(address));
                return Ok(socket);
            }
            Err(_) if cancel.is_cancelled() => return Err(LinkError::Cancelled),
            Err(e) => {
                last = LinkError::Connect { address: address.to_string(), reason: reason(&e) };
                progress(Progress::Failed(&last));
            }
        }
    }
    Err(last)
}

fn resolve(target: &Endpoint, deadline: Instant, cancel: &Cancel) -> Result<Vec<SocketAddr>, LinkError> {
    if let Some(address) = target.address() {
        return Ok(vec![SocketAddr::new(address, target.port)]);
    }
    let failed = |reason| LinkError::Resolve { host: target.host.clone(), reason };
    let answered = names::look_up(&target.host, target.port, (), || {})?;
    select! {
        recv(answered) -> addresses => match addresses {
            Ok(Ok(addresses)) => Ok(addresses),
            Ok(Err(e)) => Err(failed(e.to_string())),
            Err(_) => Err(failed("the resolver failed".to_owned())),
        },
        recv(cancel.cancelled) -> _ => Err(LinkError::Cancelled),
        default(deadline.saturating_duration_since(Instant::now())) => Err(LinkError::TimedOut("the name look-up")),
    }
}

fn connect_to(address: SocketAddr, limit: Duration, cancel: &Cancel) -> io::Result<Arc<TcpStream>> {
    let fd = net::socket_for(address, SockType::Stream, SockFlag::empty())?;
    let stream = Arc::new(TcpStream::from(fd));
    // On Linux the limit for sending is the one for connecting, too. Zero is an error.
    stream.set_write_timeout(Some(limit.max(Duration::from_millis(1))))?;
    stream.set_nodelay(true)?;
    net::set_unsent_limit(stream.as_fd(), UNSENT_LIMIT)?;
    cancel.register(&stream).map_err(io::Error::other)?;
    match net::connect_to(stream.as_fd(), address) {
        Ok(()) => Ok(stream),
        Err(Errno::EINPROGRESS | Errno::EAGAIN) => Err(Errno::ETIMEDOUT.into()),
        Err(e) => Err(e.into()),
    }
}

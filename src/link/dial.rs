//! From credentials to an open websocket.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use crossbeam_channel::{Receiver, select};
use log::debug;
use nix::errno::Errno;
use nix::sys::socket::{SockFlag, SockType};
use tungstenite::client::{IntoClientRequest, client_with_config};
use tungstenite::handshake::client::Request;
use tungstenite::http::header::{self, AUTHORIZATION, HeaderValue, RETRY_AFTER};
use tungstenite::http::{Response, Uri};
use tungstenite::protocol::WebSocketConfig;
use tungstenite::{Error, HandshakeError, WebSocket};

use super::endpoint::Endpoint;
use super::probe::Progress;
use super::proxy::ProxySettings;
use super::stream::{Deadline, ReadHalf, WriteHalf};
use super::{Cancel, LinkError, MAX_MESSAGE, USER_AGENT, tls};
use crate::auth::Credentials;
use crate::outbox::Outbox;
use crate::sys::{clock, names, net, reason};

/// For all steps together, as in Mender's agent. No step has a shorter limit: on a slow link TLS alone may need half of it.
pub const ATTEMPT_LIMIT: Duration = Duration::from_secs(45);

/// A server that wants us away for longer still gets a visit then.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);
/// What may wait unsent in the kernel. Little, so that a keystroke's echo doesn't queue there.
const UNSENT_LIMIT: u16 = 16 * 1024;
const BUFFER: usize = 16 * 1024;

/// An open websocket: the half to read from and the half to write to.
pub type Open = (WebSocket<ReadHalf>, WriteHalf);

/// Connects to the server that `credentials` name. Ends early when `cancel` says so or `gone` is disconnected.
///
/// # Errors
/// Which step failed and why.
pub fn dial(
    credentials: &Credentials,
    proxies: &ProxySettings,
    cancel: &Cancel,
    gone: &Receiver<()>,
    outbox: &Arc<Outbox>,
) -> Result<Open, LinkError> {
    let (request, stream) = reach(credentials, proxies, cancel, gone, &mut |_| {})?;
    let (mut websocket, _) =
        client_with_config(request, stream, Some(limits(MAX_MESSAGE))).map_err(upgrade_error)?;
    let write_half = websocket.get_mut().open(outbox, cancel.heard())?;
    Ok((websocket, write_half))
}

/// The way to the server, up to what is to be asked of it. `progress` hears of each step that was made.
///
/// # Errors
/// Which step failed and why.
pub fn reach(
    credentials: &Credentials,
    proxies: &ProxySettings,
    cancel: &Cancel,
    gone: &Receiver<()>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(Request, ReadHalf), LinkError> {
    let deadline = Instant::now() + ATTEMPT_LIMIT;
    let server = Endpoint::parse(&credentials.server_url)?;
    let tls = if server.tls { Some(tls::Client::new(&server)?) } else { None };
    let mut bearer = HeaderValue::from_str(&format!("Bearer {}", credentials.token.reveal()))
        .map_err(|_| LinkError::Token)?;
    bearer.set_sensitive(true);
    let url = server.websocket_url();
    let uri: Uri = url.parse().map_err(|_| LinkError::Url(url.clone()))?;
    let mut request = uri.into_client_request().map_err(|e| LinkError::Url(e.to_string()))?;
    request.headers_mut().insert(AUTHORIZATION, bearer);
    request.headers_mut().insert(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));

    progress(Progress::Server(&server));

    let proxy = proxies.proxy_for(&server)?;
    let first = proxy.as_ref().map_or(&server, |p| &p.endpoint);
    progress(Progress::Proxy(proxy.as_ref().map(|p| &p.endpoint)));
    let socket = open_socket(first, deadline, cancel, gone, progress)?;
    if let Some(proxy) = &proxy {
        debug!("asking the proxy {} for {}", proxy.endpoint.authority(), server.authority());
        proxy.tunnel(Deadline { socket: &socket, deadline }, &server)?;
        progress(Progress::Tunnel);
    }
    let tls = tls.map(|client| client.handshake(Deadline { socket: &socket, deadline })).transpose()?;

    let stream = ReadHalf::new(Arc::clone(&socket), tls, deadline);
    progress(Progress::Secured(stream.tls_version()));
    Ok((request, stream))
}

/// For messages of up to `most` bytes.
pub fn limits(most: usize) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(BUFFER)
        .max_message_size(Some(most))
        .max_frame_size(Some(most))
}

fn open_socket(
    target: &Endpoint,
    deadline: Instant,
    cancel: &Cancel,
    gone: &Receiver<()>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Arc<TcpStream>, LinkError> {
    let mut last = LinkError::Resolve { host: target.host.clone(), reason: "no addresses".to_owned() };
    let addresses = resolve(target, deadline, gone)?;
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

/// The addresses of a host.
fn resolve(target: &Endpoint, deadline: Instant, gone: &Receiver<()>) -> Result<Vec<SocketAddr>, LinkError> {
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
        recv(gone) -> _ => Err(LinkError::Cancelled),
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

pub fn upgrade_error<H: tungstenite::handshake::HandshakeRole>(error: HandshakeError<H>) -> LinkError {
    match error {
        HandshakeError::Interrupted(_) => LinkError::TimedOut("the websocket handshake"),
        HandshakeError::Failure(Error::Http(response)) => {
            let retry_after = retry_after(&response);
            LinkError::Refused { status: response.status().as_u16(), retry_after }
        }
        HandshakeError::Failure(Error::Io(e)) if e.kind() == io::ErrorKind::TimedOut => {
            LinkError::TimedOut("the websocket handshake")
        }
        HandshakeError::Failure(Error::Io(e)) => LinkError::Broken(reason(&e)),
        HandshakeError::Failure(e) => LinkError::Broken(e.to_string()),
    }
}

/// The server's wish on 429 and 503, in seconds or as a date.
fn retry_after<T>(response: &Response<T>) -> Option<Duration> {
    if !matches!(response.status().as_u16(), 429 | 503) {
        return None;
    }
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wish = match value.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let date = httpdate::parse_http_date(value).ok()?.duration_since(UNIX_EPOCH).ok()?;
            date.saturating_sub(clock::now())
        }
    };
    Some(wish.min(LONGEST_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, value: &str) -> Option<Duration> {
        retry_after(&Response::builder().status(status).header(RETRY_AFTER, value).body(()).unwrap())
    }

    #[test]
    fn retry_after_in_both_forms() {
        assert_eq!(answer(503, "17"), Some(Duration::from_secs(17)));
        assert_eq!(answer(429, " 99999999 "), Some(LONGEST_RETRY_AFTER));
        assert_eq!(answer(401, "17"), None);
        assert_eq!(answer(503, "soon"), None);
        assert_eq!(answer(503, "Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let date = httpdate::fmt_http_date(UNIX_EPOCH + clock::now() + Duration::from_secs(100));
        let wait = answer(503, &date).unwrap().as_secs();
        assert!((98..=100).contains(&wait), "{wait}");
    }
}

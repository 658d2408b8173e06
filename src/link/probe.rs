//! The way that [`dial`](super::dial) takes, for one who wants to see how far it leads. Runs in the caller's thread.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, UNIX_EPOCH};

use tungstenite::client::client_with_config;
use tungstenite::error::ProtocolError;
use tungstenite::handshake::client::Request;
use tungstenite::http::header::{AUTHORIZATION, HOST, HeaderValue};
use tungstenite::protocol::CloseFrame;
use tungstenite::{Bytes, Error, HandshakeError, Message, WebSocket};

use super::dial::{limits, reach, upgrade_error};
use super::endpoint::Endpoint;
use super::stream::ReadHalf;
use super::{Cancel, LinkError, MAX_MESSAGE, ProxySettings, USER_AGENT, reader};
use crate::auth::Credentials;

/// The connection ended where an HTTP answer was expected.
pub const CLOSED: &str = "closed without an answer";
/// Something else came there.
pub const NOT_HTTP: &str = "the answer is no HTTP";

const MAX_ANSWER: usize = 16 * 1024;
const PING: &[u8] = b"doctor";

/// A step that was made. In this order, as far as they are needed.
pub enum Progress<'a> {
    /// The URL is of use.
    Server(&'a Endpoint),
    /// Through which proxy the server is reached.
    Proxy(Option<&'a Endpoint>),
    /// The addresses of the proxy, or else of the server.
    Resolved(&'a [SocketAddr]),
    /// One of them can't be connected to.
    Failed(&'a LinkError),
    /// One of them was.
    Connected(SocketAddr),
    /// The proxy leads to the server.
    Tunnel,
    /// Nothing is left but to ask; the version of TLS, if that is spoken.
    Secured(Option<String>),
    /// The server has answered.
    Answered(Answer),
    /// A websocket was opened, and a ping came back.
    Pong,
}

/// What an HTTP answer says, as far as it can be shown: its texts may be anything, the token included.
#[derive(Debug, Clone, Copy)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// The server's clock (`Date`), since 1970.
    pub date: Option<Duration>,
    /// Whether it is a redirect to https.
    pub to_https: bool,
}

impl Answer {
    fn new<'a>(status: u16, header: impl Fn(&str) -> Option<&'a [u8]>) -> Self {
        let text = |name| header(name).and_then(|value| std::str::from_utf8(value).ok());
        let date = text("date").and_then(|date| httpdate::parse_http_date(date).ok());
        Answer {
            status,
            date: date.and_then(|date| date.duration_since(UNIX_EPOCH).ok()),
            to_https: text("location").is_some_and(|place| place.starts_with("https:")),
        }
    }
}

/// Goes the way to the server and tells `progress` of each step. With `upgrade` a websocket is opened at its end and
/// closed again, which ends the one that the device may have. Without, the server is only asked the same question
/// without wanting a websocket: it judges the token, and then refuses (400).
///
/// # Errors
/// Which step failed and why; any status but 101 is [`LinkError::Refused`].
pub fn probe(
    credentials: &Credentials,
    proxies: &ProxySettings,
    upgrade: bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), LinkError> {
    let (_alive, gone) = crossbeam_channel::bounded(0);
    let (request, stream) = reach(credentials, proxies, &Cancel::default(), &gone, progress)?;
    if !upgrade {
        let answer = ask(&request, stream)?;
        progress(Progress::Answered(answer));
        return Err(LinkError::Refused { status: answer.status, retry_after: None });
    }
    let (websocket, response) =
        client_with_config(request, stream, Some(limits(MAX_MESSAGE))).map_err(|e| match e {
            HandshakeError::Failure(Error::Protocol(ProtocolError::HandshakeIncomplete)) => {
                LinkError::Broken(CLOSED.to_owned())
            }
            HandshakeError::Failure(Error::Protocol(ProtocolError::HttparseError(_))) => {
                LinkError::Broken(NOT_HTTP.to_owned())
            }
            other => {
                if let HandshakeError::Failure(Error::Http(response)) = &other {
                    progress(Progress::Answered(Answer::new(response.status().as_u16(), |name| {
                        response.headers().get(name).map(HeaderValue::as_bytes)
                    })));
                }
                upgrade_error(other)
            }
        })?;
    let header = |name: &str| response.headers().get(name).map(HeaderValue::as_bytes);
    progress(Progress::Answered(Answer::new(response.status().as_u16(), header)));
    ping(websocket)?;
    progress(Progress::Pong);
    Ok(())
}

/// The same request but for the wish for a websocket.
fn ask(request: &Request, mut stream: ReadHalf) -> Result<Answer, LinkError> {
    let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let question = format!(
        "GET {} HTTP/1.1\r\nHost: {}\r\nAuthorization: {}\r\nUser-Agent: {USER_AGENT}\r\nConnection: close\r\n\r\n",
        request.uri().path(),
        header(HOST),
        header(AUTHORIZATION)
    );
    let broken = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::TimedOut => LinkError::TimedOut("the answer"),
        _ => LinkError::Broken(crate::sys::reason(&e)),
    };
    stream.write_all(question.as_bytes()).map_err(broken)?;
    let mut bytes = vec![0; MAX_ANSWER];
    let mut filled = 0;
    loop {
        let n = stream.read(&mut bytes[filled..]).map_err(broken)?;
        filled += n;
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut response = httparse::Response::new(&mut headers);
        match (response.parse(&bytes[..filled]), response.code) {
            (Ok(httparse::Status::Complete(_)), Some(status)) => {
                return Ok(Answer::new(status, |name| {
                    let found = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name));
                    found.map(|h| h.value)
                }));
            }
            (Ok(_), _) if n == 0 && filled == 0 => return Err(LinkError::Broken(CLOSED.to_owned())),
            (Ok(_), _) if n > 0 => {}
            _ => return Err(LinkError::Broken(NOT_HTTP.to_owned())),
        }
    }
}

/// Sends a ping, waits for its answer and says goodbye.
fn ping(mut websocket: WebSocket<ReadHalf>) -> Result<(), LinkError> {
    websocket.send(Message::Ping(Bytes::from_static(PING))).map_err(reader::lost)?;
    loop {
        match websocket.read() {
            Ok(Message::Pong(payload)) if payload == PING => break,
            Ok(Message::Close(frame)) => {
                let code = frame.map_or(1005, |f| f.code.into());
                return Err(LinkError::Closed { code, reason: String::new() });
            }
            Ok(_) => {}
            Err(Error::Io(e)) if e.kind() == std::io::ErrorKind::TimedOut => {
                return Err(LinkError::TimedOut("the answer to a ping"));
            }
            Err(e) => return Err(reader::lost(e)),
        }
    }
    let frame = CloseFrame { code: 1000.into(), reason: "".into() };
    // Whether the server hears it or not, this is the end.
    let _ = websocket.close(Some(frame));
    let _ = websocket.flush();
    Ok(())
}

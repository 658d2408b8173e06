//! Why there is no link.

use std::io;
use std::time::Duration;

use log::debug;
use thiserror::Error;
use tungstenite::error::ProtocolError;

use super::socket::SILENCE_LIMIT;

/// The largest inbound message in bytes: the server sends a pasted text of up to 1 MiB as one.
pub(super) const MAX_MESSAGE: usize = (1 << 20) + (1 << 10);

#[derive(Debug, Error)]
pub enum LinkError {
    #[error("malformed server URL: {0}")]
    Url(String),
    #[error("the token has characters that no HTTP header can carry")]
    Token,
    #[error("lookup {host}: {reason}")]
    Resolve { host: String, reason: String },
    /// No address accepted a connection; this is about the last one.
    #[error("dial tcp {address}: connect: {reason}")]
    Connect { address: String, reason: String },
    #[error("proxy: {0}")]
    Proxy(String),
    #[error("tls: {0}")]
    Tls(String, TlsFault),
    /// The server answered the upgrade with another status than 101; 401 means that it doesn't accept the token.
    #[error("websocket: bad handshake: HTTP status {status}")]
    Refused { status: u16, retry_after: Option<Duration> },
    /// The server did not answer the upgrade with HTTP.
    #[error("connection lost: {0}")]
    NoAnswer(AnswerFault),
    /// The named step of a dial took too long.
    #[error("{0} timed out")]
    TimedOut(&'static str),
    #[error("nothing heard from the server for {} s", SILENCE_LIMIT.as_secs())]
    Silent,
    /// The server closed the websocket with this code (RFC 6455, 7.4), or 1005 if it sent none.
    #[error("closed by the server: {code} {reason:?}")]
    Closed { code: u16, reason: String },
    /// The server sent more than `MAX_MESSAGE` bytes at once.
    #[error("connection lost: the server sent a message that is too large")]
    TooLarge,
    /// The connection ended without a close frame.
    #[error("connection lost: {0}")]
    Broken(String),
    /// The agent closed the link.
    #[error("closed")]
    Cancelled,
    /// The system refused a thread or a descriptor.
    #[error("out of resources: {}", crate::sys::reason(.0))]
    Resources(#[from] io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFault {
    /// Built without TLS.
    LeftOut,
    /// The system has no trusted certificates.
    NoRoots,
    /// No trusted certificate vouches for the server's.
    Issuer,
    /// The certificate is for another name.
    Name,
    /// The certificate isn't valid yet, or any more, by the system's clock.
    Dates,
    /// The server doesn't speak TLS on that port.
    NotTls,
    Other,
}

#[derive(Debug, Error)]
pub enum AnswerFault {
    #[error("closed without an answer")]
    Closed,
    #[error("the answer is no HTTP")]
    NotHttp,
    #[error("the answer is too long")]
    TooLong,
    #[error("{}", crate::sys::reason(.0))]
    Io(#[from] io::Error),
}

impl LinkError {
    /// The close code to send to the server.
    pub(super) fn close_code(&self) -> u16 {
        if matches!(self, LinkError::TooLarge) { 1009 } else { 1000 }
    }
}

/// For an open websocket, where only reading times out after [`SILENCE_LIMIT`].
impl From<tungstenite::Error> for LinkError {
    fn from(error: tungstenite::Error) -> Self {
        use tungstenite::Error;
        match error {
            Error::Io(e) if e.kind() == io::ErrorKind::TimedOut => LinkError::Silent,
            Error::Io(e) => LinkError::Broken(crate::sys::reason(&e)),
            Error::Capacity(_) => {
                debug!("an inbound message may have {MAX_MESSAGE} bytes");
                LinkError::TooLarge
            }
            Error::ConnectionClosed | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
                LinkError::Broken("the server hung up".to_owned())
            }
            other => LinkError::Broken(other.to_string()),
        }
    }
}

//! Why a link ended, or couldn't be made.

use std::io;
use std::time::Duration;

use log::debug;
use thiserror::Error;
use tungstenite::error::ProtocolError;
use tungstenite::protocol::CloseFrame;

/// In bytes: the server sends a pasted text of up to 1 MiB as one message.
pub(super) const MAX_MESSAGE: usize = (1 << 20) + (1 << 10);

#[derive(Debug, Error)]
pub enum LinkError {
    #[error("malformed server URL: {0}")]
    Url(String),
    #[error("the token has characters that no HTTP header can carry")]
    Token,
    #[error("lookup {host}: {reason}")]
    Resolve { host: String, reason: String },
    /// `address`: the first one that failed, or the one that never answered.
    #[error("dial tcp {address}: connect: {reason}")]
    Connect { address: String, reason: String },
    #[error("proxy: {0}")]
    Proxy(String),
    #[error("tls: {0}")]
    Tls(String, TlsFault),
    /// 401: the server does not accept the token.
    #[error("websocket: bad handshake: HTTP status {status}")]
    Refused { status: u16, retry_after: Option<Duration> },
    /// The request for the websocket or the tunnel failed. UnexpectedEof: no answer; InvalidData: no HTTP.
    #[error("connection lost: {}", crate::sys::reason(.0))]
    NoAnswer(io::Error),
    #[error("{0} timed out")]
    TimedOut(&'static str),
    /// The server or the network stopped answering.
    #[error("{0}")]
    Dead(String),
    /// RFC 6455, 7.4; 1005 if the server sent no code.
    #[error("closed by the server: {code} {reason:?}")]
    Closed { code: u16, reason: String },
    #[error("connection lost: the server sent a message that is too large")]
    TooLarge,
    #[error("connection lost: {0}")]
    Broken(String),
    #[error("closed")]
    Cancelled,
    #[error("out of resources: {}", crate::sys::reason(.0))]
    Resources(#[from] io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsFault {
    LeftOut,
    NoRoots,
    /// No trusted certificate signed the server's.
    Issuer,
    Name,
    /// Expired or not yet valid, by the system's clock.
    Dates,
    /// A key or signature that ring cannot verify, trusted or not.
    Kind,
    NotTls,
    Other,
}

impl From<Option<CloseFrame>> for LinkError {
    fn from(frame: Option<CloseFrame>) -> Self {
        let (code, reason) = frame.map_or((1005, String::new()), |f| (f.code.into(), f.reason.to_string()));
        LinkError::Closed { code, reason }
    }
}

impl From<tungstenite::Error> for LinkError {
    fn from(error: tungstenite::Error) -> Self {
        use tungstenite::Error;
        match error {
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

//! The link thread after the websocket is open: message by message, frame by frame, to its session.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use log::{debug, warn};
use tungstenite::error::ProtocolError;
use tungstenite::{Error, Message, WebSocket};

use super::stream::ReadHalf;
use super::{Cancel, Inbound, LinkError, MAX_MESSAGE};
use crate::outbox::Outbox;
use crate::proto::Frame;

/// What is said of a message beyond [`MAX_MESSAGE`].
pub const TOO_LARGE: &str = "the server sent a message that is too large";

/// How many malformed messages of one link are worth a warning.
const WARNINGS: u32 = 5;

/// Reads until the link ends and says why it did.
pub fn run(
    socket: &mut WebSocket<ReadHalf>,
    outbox: &Arc<Outbox>,
    inbound: &mut dyn Inbound,
    cancel: &Cancel,
) -> LinkError {
    let mut malformed = 0;
    loop {
        let message = match socket.read() {
            Ok(message) => message,
            Err(Error::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                inbound.pause();
                continue;
            }
            Err(e) => return lost(e),
        };
        if cancel.is_cancelled() {
            return LinkError::Cancelled;
        }
        let bytes: Bytes = match message {
            // The peers don't tell the two apart.
            Message::Binary(bytes) => bytes,
            Message::Text(text) => text.into(),
            Message::Ping(payload) => {
                outbox.pong(payload);
                continue;
            }
            Message::Close(frame) => {
                let (code, reason) =
                    frame.map_or((1005, String::new()), |f| (f.code.into(), f.reason.to_string()));
                return LinkError::Closed { code, reason };
            }
            Message::Pong(payload) => {
                // Only a probe's has this length, and only that is worth waking the writer.
                if let Ok(probe) = payload.as_ref().try_into() {
                    outbox.answered(probe, Instant::now());
                }
                continue;
            }
            Message::Frame(_) => continue,
        };
        match Frame::decode(&bytes) {
            Ok(frame) => inbound.frame(frame),
            Err(e) => {
                malformed += 1;
                match malformed {
                    1..WARNINGS => warn!("ignoring a malformed message of {} bytes: {e}", bytes.len()),
                    WARNINGS => {
                        warn!("ignoring a malformed message: {e}; no more warnings on this connection")
                    }
                    _ => debug!("ignoring a malformed message of {} bytes: {e}", bytes.len()),
                }
            }
        }
    }
}

fn lost(error: Error) -> LinkError {
    match error {
        Error::Io(e) if e.kind() == io::ErrorKind::TimedOut => LinkError::Silent,
        Error::Io(e) => LinkError::Broken(crate::sys::reason(&e)),
        Error::Capacity(_) => {
            debug!("an inbound message may have {MAX_MESSAGE} bytes");
            LinkError::Broken(TOO_LARGE.to_owned())
        }
        Error::ConnectionClosed | Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => {
            LinkError::Broken("the server hung up".to_owned())
        }
        other => LinkError::Broken(other.to_string()),
    }
}

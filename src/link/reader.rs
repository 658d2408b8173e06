//! The link thread after the websocket is open: message by message, frame by frame, to its session.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use log::{debug, warn};
use tungstenite::{Error, Message, WebSocket};

use super::Inbound;
use super::cancel::Cancel;
use super::error::LinkError;
use crate::outbox::{Outbox, Spares};
use crate::proto::Frame;

/// Messages up to this size come in one read buffer with others.
const SMALL: usize = 5 * 1024;
/// Smaller ones would waste too much of a buffer for those.
const TINY: usize = 2 * 1024;
/// As many of them as the server sends of a file without an answer, and some more.
const MAX_SPARES: usize = 24;

/// How many malformed messages of one link are worth a warning.
const WARNINGS: u32 = 5;

/// Reads until the link ends and says why it did.
pub fn run(
    socket: &mut WebSocket<impl Read + Write>,
    outbox: &Arc<Outbox>,
    inbound: &mut dyn Inbound,
    cancel: &Cancel,
) -> LinkError {
    let spares = Arc::new(Spares::new(MAX_SPARES));
    let mut malformed = 0;
    loop {
        let message = match socket.read() {
            Ok(message) => message,
            Err(Error::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                inbound.pause();
                continue;
            }
            Err(e) => return e.into(),
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
                match payload.as_ref().try_into() {
                    Ok(probe) => outbox.answered(probe, Instant::now()),
                    // Once in a while.
                    Err(_) => spares.clear(),
                }
                continue;
            }
            Message::Frame(_) => continue,
        };
        // A piece of the read buffer would keep all of it, and have another one allocated.
        let bytes = match bytes.len() {
            ..TINY => Bytes::copy_from_slice(&bytes),
            TINY..=SMALL => Lent::copy(&spares, &bytes),
            _ => bytes,
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

/// A message's memory, which is used again when nobody needs any of the message any more.
struct Lent {
    bytes: Vec<u8>,
    length: usize,
    home: Arc<Spares>,
}

impl Lent {
    fn copy(spares: &Arc<Spares>, message: &[u8]) -> Bytes {
        let mut bytes = spares.take(SMALL);
        bytes[..message.len()].copy_from_slice(message);
        Bytes::from_owner(Lent { bytes, length: message.len(), home: Arc::clone(spares) })
    }
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.home.give(std::mem::take(&mut self.bytes));
    }
}

/// Reads what a server sends after the upgrade, in messages of up to `most` bytes. For the fuzz target.
#[cfg(fuzzing)]
pub fn read(
    stream: impl Read + Write,
    most: usize,
    outbox: &Arc<Outbox>,
    inbound: &mut dyn Inbound,
) -> LinkError {
    let config = Some(super::dial::limits(most));
    let role = tungstenite::protocol::Role::Client;
    let mut socket = WebSocket::from_raw_socket(stream, role, config);
    run(&mut socket, outbox, inbound, &Cancel::default())
}

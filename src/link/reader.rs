//! The link thread once the websocket is open: reads messages and hands their frames on.

use std::convert::Infallible;
use std::io::{Read, Write};
use std::time::Instant;

use bytes::Bytes;
use log::{Level, log};
use tungstenite::{Message, WebSocket};

use super::error::LinkError;
use super::socket::Cancel;
use crate::outbox::{Outbox, Pool, Work};
use crate::proto::Frame;

/// In bytes: a pooled buffer, for the server's chunks.
const SMALL: usize = 5 * 1024;
/// In bytes. Smaller messages would waste a pooled buffer.
const TINY: usize = 4 * 1024;
/// More than the chunks that the server sends without an ack.
const MAX_BUFFERS: usize = 24;

/// Warnings about malformed messages, per link.
const WARNINGS: u32 = 5;

pub(super) fn run(
    socket: &mut WebSocket<impl Read + Write>,
    outbox: &Outbox,
    inbound: &mut impl FnMut(Frame),
    cancel: &Cancel,
) -> Result<Infallible, LinkError> {
    let pool = Pool::new(MAX_BUFFERS);
    let mut malformed = 0_u32;
    let mut receive = |bytes: Bytes| {
        // Copy: a slice would keep the whole read buffer, which is as large as the largest message before it, and
        // tungstenite would allocate another.
        let bytes = match bytes.len() {
            length @ TINY..=SMALL => {
                let mut lent = pool.take(SMALL);
                lent.buffer[..length].copy_from_slice(&bytes);
                Bytes::from_owner(lent).slice(..length)
            }
            _ => Bytes::copy_from_slice(&bytes),
        };
        match Frame::decode(&bytes) {
            Ok(frame) => inbound(frame),
            Err(e) => {
                malformed = malformed.saturating_add(1);
                let level = if malformed <= WARNINGS { Level::Warn } else { Level::Debug };
                let last = if malformed == WARNINGS { "; no more warnings on this connection" } else { "" };
                log!(level, "ignoring a malformed message of {} bytes: {e}{last}", bytes.len());
            }
        }
    };
    loop {
        match socket.read()? {
            // A shutdown ends no reads while the other side sends without a pause.
            _ if cancel.is_over() => return Err(LinkError::Cancelled),
            // Clients use both alike.
            Message::Binary(bytes) => receive(bytes),
            Message::Text(text) => receive(text.into()),
            // Copied, as above.
            Message::Ping(payload) => outbox.signal(Work::Pong(Bytes::copy_from_slice(&payload))),
            Message::Pong(payload) => match payload.as_ref().try_into() {
                // Only probes have this length.
                Ok(probe) => outbox.signal(Work::Answered(probe, Instant::now())),
                // The answer to the heartbeat: a good time to free memory.
                Err(_) => pool.clear(),
            },
            Message::Close(frame) => return Err(frame.into()),
            Message::Frame(_) => {}
        }
    }
}

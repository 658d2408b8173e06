//! The thread that writes to the websocket, the only one that does.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use tungstenite::protocol::CloseFrame;
use tungstenite::{Error, Message, WebSocket};

use super::stream::WriteHalf;
use super::{LinkError, PING_INTERVAL, WRITE_LIMIT};
use crate::outbox::{Outbox, Work};

/// As the reference agent's.
const PING_PAYLOAD: &[u8] = b"60";

/// Writes until asked to close, or until writing fails: then the connection is shut down, so that the
/// reader notices as well.
///
/// # Errors
/// What the link died of, if it was the writing.
pub fn run(mut socket: WebSocket<WriteHalf>, outbox: &Arc<Outbox>) -> Result<(), LinkError> {
    let result = write(&mut socket, outbox).map_err(|e| match e {
        Error::Io(e) if e.kind() == io::ErrorKind::TimedOut => {
            LinkError::Broken(format!("the server took nothing for {} s", WRITE_LIMIT.as_secs()))
        }
        Error::Io(e) => LinkError::Broken(crate::sys::reason(&e)),
        e => LinkError::Broken(e.to_string()),
    });
    socket.get_ref().shut_down();
    result
}

fn write(socket: &mut WebSocket<WriteHalf>, outbox: &Outbox) -> Result<(), Error> {
    let mut next_ping = Instant::now() + PING_INTERVAL;
    loop {
        // What is buffered goes out before waiting, and only then: a burst is one system call.
        let work = match outbox.try_next() {
            Some(work) => work,
            None => {
                socket.flush()?;
                outbox.next(next_ping)
            }
        };
        match work {
            Work::Frame(message) => socket.write(Message::Binary(message.into()))?,
            Work::Pong(payload) => socket.write(Message::Pong(payload))?,
            Work::Flush => socket.get_mut().flush_tls()?,
            Work::Nothing => {}
            Work::Close(code, reason) => {
                let frame = CloseFrame { code: code.into(), reason: reason.into() };
                return socket.close(Some(frame));
            }
        }
        let now = Instant::now();
        if now >= next_ping {
            socket.write(Message::Ping(PING_PAYLOAD.into()))?;
            next_ping = now + PING_INTERVAL;
        }
    }
}

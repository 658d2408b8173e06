//! `doctor`'s trial connection: the daemon's dial, step by step. Runs in the caller's thread.

use std::io;
use std::sync::Arc;

use tungstenite::protocol::CloseFrame;
use tungstenite::{Bytes, Error, Message, WebSocket};

use super::cancel::Cancel;
use super::dial::{self, Progress};
use super::error::LinkError;
use super::halves::ReadHalf;
use super::proxy::ProxySettings;
use crate::auth::Credentials;

const PING: &[u8] = b"doctor";

/// Connects to the server and tells `progress` of each step. With `upgrade` it opens a websocket, sends a ping through
/// it and closes it, which ends the one that the device may have. Without, it asks the server the same question without
/// wanting a websocket, and any answer is [`LinkError::Refused`].
pub(crate) fn trial(
    credentials: &Credentials,
    proxies: &ProxySettings,
    upgrade: bool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<(), LinkError> {
    let cancel = Arc::new(Cancel::new());
    if upgrade {
        return ping(dial::dial(credentials, proxies, &cancel, progress)?);
    }
    let (request, stream) = dial::reach(credentials, proxies, &cancel, progress)?;
    let answer = request.ask(stream, None)?;
    progress(Progress::Answered(&answer));
    Err(answer.refusal())
}

fn ping(mut websocket: WebSocket<ReadHalf>) -> Result<(), LinkError> {
    websocket.send(Message::Ping(Bytes::from_static(PING))).map_err(LinkError::from)?;
    loop {
        match websocket.read() {
            Ok(Message::Pong(payload)) if payload == PING => break,
            Ok(Message::Close(frame)) => {
                let code = frame.map_or(1005, |f| f.code.into());
                return Err(LinkError::Closed { code, reason: String::new() });
            }
            Ok(_) => {}
            Err(Error::Io(e)) if e.kind() == io::ErrorKind::TimedOut => {
                return Err(LinkError::TimedOut("the answer to a ping"));
            }
            Err(e) => return Err(e.into()),
        }
    }
    // The trial has succeeded, whether or not the server receives the close frame.
    let _ = websocket.close(Some(CloseFrame { code: 1000.into(), reason: "".into() }));
    let _ = websocket.flush();
    Ok(())
}

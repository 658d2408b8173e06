//! Answers of the shell protocol that need no shell.

use crate::audit::Record;
use crate::proto::shell as wire;
use crate::proto::{Frame, SessionId, UserId};

const NOT_FOUND: &str = "session not found";

/// The answer to a `new` that gets no shell, which is put on record.
pub(crate) fn refusal(id: &SessionId, user: &UserId, reason: &str) -> Frame {
    Record::new("shell-refused", Some(id), user).text("reason", reason).log(false);
    wire::failure(id, wire::NEW, reason.to_owned())
}

/// The answer where the terminal is disabled, and to types that it does not know.
pub(crate) fn unknown(id: &SessionId, frame: &Frame) -> Frame {
    let text = format!("unknown message protocol and type: {}/{}", frame.proto, frame.typ);
    wire::failure(id, &frame.typ, text)
}

/// What a session without a shell says to a frame of the shell protocol other than `new`.
pub(crate) fn answer_without_shell(id: &SessionId, frame: &Frame) -> Option<Frame> {
    match frame.typ.as_str() {
        wire::DATA => Some(wire::failure(id, wire::DATA, NOT_FOUND)),
        wire::STOP => {
            let text = format!("routeMessage: StopShellMessage: session not found for id {}", id.as_str());
            Some(wire::failure(id, wire::STOP, text))
        }
        wire::RESIZE | wire::PONG => None,
        _ => Some(unknown(id, frame)),
    }
}

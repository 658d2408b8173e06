//! Frames of the terminal. Both directions use the types `new`, `shell`, `resize`, `stop`, `ping`, `pong`.

use bytes::Bytes;

use super::{Frame, Map, SHELL, SessionId};

pub(crate) const NEW: &str = "new";
pub(crate) const DATA: &str = "shell";
pub(crate) const RESIZE: &str = "resize";
pub(crate) const STOP: &str = "stop";
pub(crate) const PING: &str = "ping";
pub(crate) const PONG: &str = "pong";

const NORMAL: i64 = 1;
const ERROR: i64 = 2;
const CONTROL: i64 = 3;

/// Seconds until the next ping, as a ping announces them.
const PING_TIMEOUT: i64 = 65;

/// In 64 bits: mender-cli notices failures only in this form; other clients read any.
fn status(value: i64) -> Map {
    Map::new().with_i64("status", value)
}

pub(crate) fn started(sid: &SessionId) -> Frame {
    Frame::new(SHELL, NEW, Some(sid)).with_props(status(NORMAL)).with_body("Shell started")
}

/// Without the output itself.
pub fn output(sid: &SessionId) -> Frame {
    Frame::new(SHELL, DATA, Some(sid)).with_props(status(NORMAL))
}

pub(crate) fn stopped(sid: &SessionId) -> Frame {
    Frame::new(SHELL, STOP, Some(sid)).with_props(status(NORMAL))
}

/// The frame `typ` failed; with [`STOP`] the shell has ended.
pub(crate) fn failure(sid: &SessionId, typ: &str, reason: impl Into<Bytes>) -> Frame {
    Frame::new(SHELL, typ, Some(sid)).with_props(status(ERROR)).with_body(reason)
}

/// The server sends this `stop` for a user whose connection has ended.
pub(crate) fn is_of_absent_user(frame: &Frame) -> bool {
    frame.props.int("status") == Some(ERROR) && frame.body == "user disconnected"
}

pub(crate) fn ping(sid: &SessionId) -> Frame {
    // In the shortest form: mender-cli would enforce the seconds if it could read the number.
    Frame::new(SHELL, PING, Some(sid)).with_props(status(CONTROL).with_int("timeout", PING_TIMEOUT))
}

/// Columns and rows, if both are positive. Truncated to 16 bits, as in Go.
pub fn window_size(frame: &Frame) -> Option<(u16, u16)> {
    let dimension = |key| frame.props.int(key).filter(|n| *n > 0).map(|n| n as u16);
    Some((dimension("terminal_width")?, dimension("terminal_height")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_needs_both_dimensions() {
        let size =
            |width: i64, height: i64| {
                window_size(&Frame::new(SHELL, NEW, None).with_props(
                    Map::new().with_int("terminal_width", width).with_i64("terminal_height", height),
                ))
            };
        assert_eq!(size(80, 24), Some((80, 24)));
        assert_eq!(size(0, 24), None);
        assert_eq!(size(80, -1), None);
        assert_eq!(window_size(&Frame::new(SHELL, NEW, None)), None);
    }
}

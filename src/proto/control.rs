//! Session control: opens, probes and closes sessions.

use rmp::encode;
use serde::Deserialize;

pub use super::msgpack::parse;
use super::{CONTROL, Frame, Map, SessionId};

pub const OPEN: &str = "open";
pub const ACCEPT: &str = "accept";
pub(crate) const PING: &str = "ping";
pub(crate) const PONG: &str = "pong";
pub(crate) const CLOSE: &str = "close";
pub(crate) const ERROR: &str = "error";

pub const VERSION: i64 = 1;

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Open {
    pub(crate) versions: Option<Vec<i64>>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub struct Accept {
    #[serde(default)]
    pub version: i64,
    pub protocols: Option<Vec<u16>>,
}

/// Incoming errors may lack any field; outgoing ones always have these.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Error {
    pub err: Option<String>,
    pub close: Option<bool>,
}

pub fn accept(sid: &SessionId, protocols: &[u16]) -> Frame {
    let list = |out: &mut Vec<u8>| {
        encode::write_array_len(out, u32::try_from(protocols.len()).unwrap_or(0))?;
        // In 16 bits each, as the reference agent writes them.
        protocols.iter().try_for_each(|protocol| encode::write_u16(out, *protocol))
    };
    let body = Map::new().with_int("version", VERSION).with("protocols", list).finish();
    Frame::new(CONTROL, ACCEPT, Some(sid)).with_body(body)
}

pub(crate) fn ping(sid: &SessionId) -> Frame {
    Frame::new(CONTROL, PING, Some(sid))
}

pub(crate) fn pong(sid: &SessionId) -> Frame {
    Frame::new(CONTROL, PONG, Some(sid))
}

/// An error that no message caused. With `close` the session is over.
pub(crate) fn error(sid: &SessionId, text: &str, close: bool) -> Frame {
    error_about(sid, &Frame::new(0, "", None), text, close)
}

pub fn error_about(sid: &SessionId, cause: &Frame, text: &str, close: bool) -> Frame {
    let mut body = Map::new().with_str("err", text).with("close", |out| encode::write_bool(out, close));
    if cause.proto != 0 {
        body = body.with("msgproto", |out| encode::write_u16(out, cause.proto));
    }
    let body = body.with_cause(&cause.typ, cause.props.str("msgid")).finish();
    Frame::new(CONTROL, ERROR, Some(sid)).with_body(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_read_in_any_width_and_with_nils() {
        let open = |bytes: &[u8]| parse::<Open>(bytes);
        assert_eq!(open(b"\x81\xa8versions\x91\x01").unwrap().versions, Some(vec![1]));
        let wide = open(b"\x82\xa1x\xc0\xa8versions\x92\xd3\0\0\0\0\0\0\0\x01\xcc\x02").unwrap();
        assert_eq!(wide.versions, Some(vec![1, 2]));
        assert_eq!(open(b"\x81\xa8versions\xc0").unwrap().versions, None);
        assert!(open(b"").is_err() && open(b"\x81\xa8versions\x01").is_err());
        assert_eq!(parse::<Error>(b"\x81\xa3err\xc0").unwrap(), Error::default());
    }

    #[test]
    fn deep_bodies_and_claimed_lengths_are_errors() {
        let mut deep = b"\x81\xa1x".to_vec();
        deep.extend(std::iter::repeat_n(0x91, if cfg!(miri) { 2000 } else { 200_000 }));
        assert!(parse::<Open>(&deep).is_err());
        assert!(parse::<Open>(b"\x81\xa8versions\xdd\xff\xff\xff\xff\x01").is_err());
    }
}

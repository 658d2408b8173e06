//! Frames of port forwarding: `new` opens a forward, `forward` carries data both ways, each answered by one `ack`, and
//! `stop` ends it.

use std::sync::Arc;

use serde::Deserialize;

use super::msgpack::parse;
use super::{Frame, Map, PORT_FORWARD, SessionId, clipped};

pub const NEW: &str = "new";
pub(crate) const FORWARD: &str = "forward";
pub const ACK: &str = "ack";
pub(crate) const STOP: &str = "stop";
pub(crate) const ERROR: &str = "error";

const CONNECTION_ID: &str = "connection_id";
/// In bytes, as in DNS.
const MAX_HOST: usize = 255;
/// Upstream's text, whichever field is missing.
const INCOMPLETE: &str = "invalid port-forward message: missing connection_id, remote_port or protocol";

/// Chosen by the client; never empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConnectionId(Arc<str>);

impl ConnectionId {
    /// The error goes to the client.
    pub fn of(frame: &Frame) -> Result<Self, String> {
        match frame.props.str(CONNECTION_ID) {
            Some(id) if !id.is_empty() => Ok(ConnectionId(id.into())),
            _ => Err(INCOMPLETE.to_owned()),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Tcp,
    Udp,
}

impl Transport {
    pub fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    pub host: String,
    pub port: u16,
    pub transport: Transport,
}

#[derive(Debug, Deserialize)]
struct New {
    remote_host: Option<String>,
    remote_port: Option<u16>,
    protocol: Option<String>,
}

impl Target {
    /// The error goes to the client.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let new: New = parse(body).map_err(|e| clipped(&e.to_string()))?;
        let (host, port) = (new.remote_host.unwrap_or_default(), new.remote_port.unwrap_or_default());
        if host.len() > MAX_HOST {
            return Err(format!("invalid port-forward message: remote_host is longer than {MAX_HOST} bytes"));
        }
        let transport = match new.protocol.as_deref().unwrap_or_default() {
            name if name.is_empty() || host.is_empty() || port == 0 => return Err(INCOMPLETE.to_owned()),
            "tcp" => Transport::Tcp,
            "udp" => Transport::Udp,
            other => return Err(format!("unknown protocol: {}", clipped(other))),
        };
        Ok(Target { host, port, transport })
    }
}

/// Without data.
pub fn about(sid: &SessionId, typ: &str, connection: &ConnectionId) -> Frame {
    Frame::new(PORT_FORWARD, typ, Some(sid)).with_props(Map::new().with_str(CONNECTION_ID, &*connection.0))
}

pub(crate) fn error(sid: &SessionId, typ: &str, text: &str) -> Frame {
    let body = Map::new().with_str("err", text).with_cause(typ, None).finish();
    Frame::new(PORT_FORWARD, ERROR, Some(sid)).with_body(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let target = |body: &[u8]| Target::decode(body);
        let good = b"\x83\xabremote_host\xa9localhost\xabremote_port\xcd\x4a\x3a\xa8protocol\xa3udp";
        let wanted = Target { host: "localhost".into(), port: 19002, transport: Transport::Udp };
        assert_eq!(target(good), Ok(wanted));
        for incomplete in [
            b"\x80".as_slice(),
            b"\x82\xabremote_host\xa1x\xa8protocol\xa3tcp",
            b"\x83\xabremote_host\xa0\xabremote_port\x01\xa8protocol\xa3tcp",
            b"\x83\xabremote_host\xa1x\xabremote_port\x00\xa8protocol\xa3tcp",
            b"\x82\xabremote_host\xa1x\xabremote_port\x01",
        ] {
            assert_eq!(target(incomplete), Err(INCOMPLETE.to_owned()));
        }
        let long = |n| {
            let host = Map::new().with_str("remote_host", "h".repeat(n).as_str());
            let body =
                host.with("remote_port", |out| rmp::encode::write_u16(out, 1)).with_str("protocol", "tcp");
            target(&body.finish()).map(|target| target.host.len())
        };
        assert_eq!(long(255), Ok(255));
        let refused = "invalid port-forward message: remote_host is longer than 255 bytes";
        assert_eq!(long(256), Err(refused.to_owned()));
        let unknown = b"\x83\xabremote_host\xa1x\xabremote_port\x01\xa8protocol\xa4sctp";
        assert_eq!(target(unknown), Err("unknown protocol: sctp".to_owned()));
        assert!(target(b"\x81\xabremote_port\xce\0\x01\0\0").is_err() && target(b"").is_err());
    }
}

//! A client's session beside the shell: a forward's or a download's. Nothing here panics when the link is cut.

use std::time::Duration;

use rmpv::Value;

use crate::harness::client::new_sid;
use crate::harness::device::Device;
use crate::harness::msg::{self, CONTROL, Ints, Msg, encode, map};
use crate::harness::wire;

#[derive(Debug)]
pub struct Session {
    device: Device,
    sid: String,
}

impl Session {
    pub fn open(device: &Device) -> Session {
        let session = Session { device: device.clone(), sid: new_sid() };
        let versions = map(&[("versions", Value::Array(vec![1.into()]))]);
        session.post(CONTROL, "open", &[], &encode(&versions, Ints::Compact));
        session
    }

    pub fn post(&self, proto: u16, typ: &str, props: &[(&str, Value)], body: &[u8]) {
        let user = [("user_id", "aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee".into())];
        let message = msg::message(proto, typ, &self.sid, &[&user, props].concat(), body);
        // The end of the link is noticed where messages are taken.
        let _ = self.device.try_frame(true, wire::BINARY, &encode(&message, Ints::Compact));
    }

    /// The next message; `None` after this time, an error when the link is over. Answers pings.
    pub fn take(&self, limit: Duration) -> Option<Result<Msg, String>> {
        let next = self.device.try_take(limit, |m| m.sid.as_deref() == Some(&self.sid));
        if let Some(Ok(msg)) = &next
            && (msg.proto, msg.typ.as_str()) == (CONTROL, "ping")
        {
            self.post(CONTROL, "pong", &[], b"");
        }
        next
    }

    pub fn close(&self) {
        self.device.discard(&self.sid);
        self.post(CONTROL, "close", &[], b"");
    }
}

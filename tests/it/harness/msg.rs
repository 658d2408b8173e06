//! Mender's envelope, written and read with `rmpv` so that the agent's codec isn't its own judge.

use rmpv::Value;

pub const SHELL: u16 = 1;
pub const FILES: u16 = 2;
pub const PORTS: u16 = 3;
pub const COMMANDS: u16 = 4;
pub const CONTROL: u16 = 0xffff;

/// A message the device sent, checked against what server and clients can read.
#[derive(Debug, Clone, PartialEq)]
pub struct Msg {
    pub proto: u16,
    pub typ: String,
    pub sid: Option<String>,
    pub props: Vec<(String, Value)>,
    pub body: Option<Vec<u8>>,
    /// The message as it came, for markers that a decoded value no longer shows.
    pub raw: Vec<u8>,
}

impl Msg {
    pub fn prop(&self, name: &str) -> Option<&Value> {
        self.props.iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    pub fn status(&self) -> Option<i64> {
        self.prop("status").and_then(Value::as_i64)
    }

    /// The body as text; empty when there is none.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(self.body.as_deref().unwrap_or_default()).into_owned()
    }

    /// The body as a msgpack map.
    pub fn map(&self) -> Vec<(String, Value)> {
        let mut bytes = self.body.as_deref().expect("a message with a body");
        let value = rmpv::decode::read_value(&mut bytes).expect("a msgpack body");
        assert!(bytes.is_empty(), "trailing bytes after the body's document");
        string_map(value).expect("a map with string keys")
    }

    pub fn field(&self, name: &str) -> Option<Value> {
        self.map().into_iter().find(|(key, _)| key == name).map(|(_, value)| value)
    }

    /// For failure messages.
    pub fn summary(&self) -> String {
        let mut text = self.text();
        if text.len() > 300 {
            let cut = (0..=300).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
            text.truncate(cut);
            text.push('…');
        }
        format!(
            "proto {} typ {:?} sid {:?} props {:?} body {text:?}",
            self.proto, self.typ, self.sid, self.props
        )
    }
}

fn string_map(value: Value) -> Result<Vec<(String, Value)>, String> {
    let Value::Map(entries) = value else { return Err(format!("expected a map, got {value}")) };
    entries
        .into_iter()
        .map(|(key, value)| match key.as_str() {
            Some(key) => Ok((key.to_owned(), value)),
            None => Err(format!("a map key that is no string: {key}")),
        })
        .collect()
}

/// Decodes what the device sent and refuses what a peer in the field would stumble over.
pub fn decode(bytes: &[u8]) -> Result<Msg, String> {
    let mut rest = bytes;
    let value = rmpv::decode::read_value(&mut rest).map_err(|e| format!("not msgpack: {e}"))?;
    if !rest.is_empty() {
        return Err(format!("{} bytes after the document", rest.len()));
    }
    let mut msg =
        Msg { proto: 0, typ: String::new(), sid: None, props: Vec::new(), body: None, raw: bytes.to_vec() };
    let mut proto = None;
    for (key, value) in string_map(value)? {
        match (key.as_str(), value) {
            ("hdr", header) => {
                for (key, value) in string_map(header)? {
                    match (key.as_str(), value) {
                        ("proto", Value::Integer(n)) => {
                            let n = n.as_u64().and_then(|n| u16::try_from(n).ok());
                            proto = Some(n.ok_or("proto is no u16")?);
                        }
                        ("typ", Value::String(s)) => msg.typ = s.into_str().ok_or("typ is no UTF-8")?,
                        ("sid", Value::String(s)) => msg.sid = Some(s.into_str().ok_or("sid is no UTF-8")?),
                        ("props", props) => {
                            msg.props = string_map(props)?;
                            if msg.props.is_empty() {
                                return Err("empty props must be left out".to_owned());
                            }
                        }
                        (key, value) => return Err(format!("unexpected header field {key}: {value}")),
                    }
                }
            }
            ("body", Value::Binary(body)) if body.is_empty() => {
                return Err("an empty body must be left out".to_owned());
            }
            ("body", Value::Binary(body)) => msg.body = Some(body),
            (key, value) => return Err(format!("unexpected field {key}: {value}")),
        }
    }
    msg.proto = proto.ok_or("no proto")?;
    if msg.sid.as_deref() == Some("") {
        return Err("an empty sid must be left out".to_owned());
    }
    if msg.proto == SHELL && msg.sid.is_none() {
        // The released server closes the whole link then.
        return Err("a shell message without sid".to_owned());
    }
    Ok(msg)
}

/// How integers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ints {
    /// The shortest form, as JavaScript and Python write them.
    Compact,
    /// Always marker d3 and eight bytes, as Go's older codec does.
    Wide,
}

/// Writes a value.
pub fn encode(value: &Value, ints: Ints) -> Vec<u8> {
    let mut out = Vec::new();
    write(&mut out, value, ints);
    out
}

fn write(out: &mut Vec<u8>, value: &Value, ints: Ints) {
    match value {
        Value::Map(entries) => {
            rmp::encode::write_map_len(out, entries.len() as u32).expect("write to memory");
            for (key, value) in entries {
                write(out, key, ints);
                write(out, value, ints);
            }
        }
        Value::Array(items) => {
            rmp::encode::write_array_len(out, items.len() as u32).expect("write to memory");
            items.iter().for_each(|item| write(out, item, ints));
        }
        Value::Integer(n) if ints == Ints::Wide && n.is_i64() => {
            rmp::encode::write_i64(out, n.as_i64().expect("checked")).expect("write to memory");
        }
        other => rmpv::encode::write_value(out, other).expect("write to memory"),
    }
}

/// A map from pairs.
pub fn map(entries: &[(&str, Value)]) -> Value {
    Value::Map(entries.iter().map(|(key, value)| (Value::from(*key), value.clone())).collect())
}

/// A message to the device, as the server's own encoder lays it out: what is empty is left out.
pub fn message(proto: u16, typ: &str, sid: &str, props: &[(&str, Value)], body: &[u8]) -> Value {
    let mut header = vec![("proto", Value::from(proto))];
    if !typ.is_empty() {
        header.push(("typ", typ.into()));
    }
    if !sid.is_empty() {
        header.push(("sid", sid.into()));
    }
    if !props.is_empty() {
        header.push(("props", map(props)));
    }
    let mut whole = vec![("hdr", map(&header))];
    if !body.is_empty() {
        whole.push(("body", Value::from(body)));
    }
    map(&whole)
}

//! Maps with string keys: properties of frames, and bodies that the agent writes.

use std::io::Write;

use rmp::encode;

use super::MAX_ID;
use super::msgpack::{Cursor, DecodeError, Value};

/// Bytes of properties that an answer repeats, not counting the last one.
const MAX_READABLE: usize = 512;

/// Stays encoded, so that properties can be sent back unchanged.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Map {
    pairs: u32,
    /// Without the header.
    bytes: Vec<u8>,
}

impl Map {
    pub fn new() -> Self {
        Map::default()
    }

    /// nil is an empty map.
    pub(crate) fn decode(cursor: &mut Cursor<'_>, what: &'static str) -> Result<Self, DecodeError> {
        let pairs = cursor.map(what)?.unwrap_or(0);
        Ok(Map { pairs, bytes: cursor.raw(2 * u64::from(pairs))?.to_vec() })
    }

    pub fn is_empty(&self) -> bool {
        self.pairs == 0
    }

    /// In bytes, without the header.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// `write` writes the value; writing to a Vec cannot fail.
    pub(crate) fn with<E>(mut self, key: &str, write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Self {
        self.pairs += 1;
        let _ = encode::write_str(&mut self.bytes, key);
        let _ = write(&mut self.bytes);
        self
    }

    pub(crate) fn with_int(self, key: &str, value: i64) -> Self {
        self.with(key, |out| encode::write_sint(out, value).map(drop))
    }

    pub fn with_i64(self, key: &str, value: i64) -> Self {
        self.with(key, |out| encode::write_i64(out, value))
    }

    /// Omits `None`.
    pub fn with_str<'a>(self, key: &str, value: impl Into<Option<&'a str>>) -> Self {
        match value.into() {
            Some(value) => self.with(key, |out| encode::write_str(out, value)),
            None => self,
        }
    }

    /// Type and id of the message that an error is about, if it has them.
    pub(crate) fn with_cause(self, typ: &str, id: Option<&str>) -> Self {
        self.with_str("msgtype", Some(typ).filter(|typ| !typ.is_empty())).with_str("msgid", id)
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let _ = encode::write_map_len(out, self.pairs);
        out.extend_from_slice(&self.bytes);
    }

    pub(crate) fn finish(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(5 + self.bytes.len());
        self.encode(&mut out);
        out
    }

    /// The part that every decoder can read: scalars with names, limited in length and number.
    pub(crate) fn readable(&self) -> Self {
        let mut kept = Map::new();
        for (name, encoded) in self.pairs() {
            if let (Value::Blob(bytes), Ok(value)) = (name, (Cursor { rest: encoded }).value())
                && let Ok(text) = std::str::from_utf8(bytes)
                && (text.len() <= MAX_ID && kept.len() <= MAX_READABLE)
                && !matches!(value, Value::Map | Value::Other)
                && !matches!(value, Value::Blob(text) if text.len() > MAX_ID)
            {
                kept = kept.with(text, |out| out.write_all(encoded));
            }
        }
        kept
    }

    fn pairs(&self) -> impl Iterator<Item = (Value<'_>, &[u8])> {
        let mut cursor = Cursor { rest: &self.bytes };
        (0..self.pairs).map_while(move |_| Some((cursor.value().ok()?, cursor.raw(1).ok()?)))
    }

    /// The last value wins, as in Go's maps. nil counts as absent.
    fn get(&self, key: &str) -> Option<Value<'_>> {
        let (_, value) = self.pairs().filter(|(name, _)| *name == Value::Blob(key.as_bytes())).last()?;
        Cursor { rest: value }.value().ok().filter(|value| *value != Value::Nil)
    }

    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Any width; also a float without fraction.
    pub fn int(&self, key: &str) -> Option<i64> {
        match self.get(key)? {
            Value::Int(n) => i64::try_from(n).ok(),
            Value::Float(f) if f.fract() == 0.0 && f.abs() < 9e15 => Some(f as i64),
            _ => None,
        }
    }

    pub fn str(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Blob(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn properties_are_read_leniently() {
        let props = Map::new()
            .with_i64("offset", 4096)
            .with_int("small", -3)
            .with_str("user_id", "someone")
            .with_int("twice", 1)
            .with_int("twice", 2)
            .with("float", |out| encode::write_f64(out, 80.0))
            .with("part", |out| encode::write_f64(out, 80.5))
            .with("none", encode::write_nil)
            .with("deep", |out| encode::write_array_len(out, 0).map(drop));
        assert_eq!(props.int("offset"), Some(4096));
        assert_eq!(props.int("small"), Some(-3));
        assert_eq!(props.str("user_id"), Some("someone"));
        assert_eq!(props.int("twice"), Some(2));
        assert_eq!(props.int("float"), Some(80));
        for absent in ["part", "none", "deep", "user_id", "missing"] {
            assert_eq!(props.int(absent), None, "{absent}");
        }
    }
}

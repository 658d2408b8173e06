//! The envelope and its codec. Clients and the server depend on this encoding:
//! - `body` is bin, never an array, and absent if empty: the released server takes an empty bin for data.
//! - `proto` is a 16-bit integer: JavaScript clients get a 64-bit one as a BigInt and compare with `===`.
//! - `offset` and `status` are 64-bit integers whatever their value: Go clients assert the type `int64`.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use rmp::encode;

use super::MAX_ID;
use super::map::Map;
use super::msgpack::{Cursor, DecodeError, Value};

/// Bytes that the allocator takes for a frame's parts.
const OVERHEAD: usize = 128;
/// In bytes, as in the reference agent. Answers and log lines repeat parts of it.
const MAX_HEADER: usize = 8 * 1024;

/// Chosen by the server; never empty.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SessionId(Arc<str>);

impl SessionId {
    /// An empty `id` means no session.
    pub fn new(id: &str) -> Option<Self> {
        (!id.is_empty()).then(|| SessionId(id.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The server chooses it, and it goes into logs.
        fmt::Display::fmt(&self.0.escape_debug(), f)
    }
}

/// The property `user_id`: the sender, if the server names one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct UserId(Arc<str>);

impl UserId {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<&str> for UserId {
    fn from(id: &str) -> Self {
        UserId(id.into())
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.escape_debug(), f)
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    pub proto: u16,
    pub typ: String,
    /// `None` for commands to the device as a whole.
    pub sid: Option<SessionId>,
    pub props: Map,
    /// Empty means absent.
    pub body: Bytes,
}

impl Frame {
    pub fn new(proto: u16, typ: &str, sid: Option<&SessionId>) -> Self {
        Frame { proto, typ: typ.to_owned(), sid: sid.cloned(), props: Map::new(), body: Bytes::new() }
    }

    pub fn with_props(self, props: Map) -> Self {
        Frame { props, ..self }
    }

    pub fn with_body(self, body: impl Into<Bytes>) -> Self {
        Frame { body: body.into(), ..self }
    }

    pub fn user(&self) -> UserId {
        self.props.str("user_id").unwrap_or_default().into()
    }

    /// The first identifier longer than [`MAX_ID`]: answers and log lines repeat identifiers.
    pub(crate) fn too_long(&self) -> Option<&'static str> {
        let ids = ["user_id", "connection_id", "msgid"].map(|key| (key, self.props.str(key)));
        let sid = self.sid.as_ref().map(SessionId::as_str);
        let mut all = [("sid", sid), ("typ", Some(&self.typ))].into_iter().chain(ids);
        Some(all.find(|(_, id)| id.is_some_and(|id| id.len() > MAX_ID))?.0)
    }

    pub(crate) fn without_body(&self) -> Self {
        Frame { body: Bytes::new(), ..self.clone() }
    }

    /// Memory held, in bytes, roughly.
    pub fn held(&self) -> usize {
        let sid = self.sid.as_ref().map_or(0, |sid| sid.as_str().len());
        size_of::<Frame>() + OVERHEAD + self.typ.len() + sid + self.props.len() + self.body.len()
    }

    /// Shares the memory of the message if the body is most of it. Ignores bytes after the document.
    pub fn decode(message: &Bytes) -> Result<Self, DecodeError> {
        let mut cursor = Cursor { rest: message };
        let mut header = None;
        let mut body: &[u8] = &[];
        for _ in 0..cursor.map("the message")?.unwrap_or(0) {
            match cursor.value()? {
                Value::Blob(b"hdr") => {
                    let before = cursor.rest.len();
                    header = Frame::decode_header(&mut cursor)?;
                    if before - cursor.rest.len() > MAX_HEADER {
                        return Err(DecodeError::Range("the header's length"));
                    }
                }
                Value::Blob(b"body") => body = cursor.blob("body")?.unwrap_or_default(),
                _ => cursor.skip(1)?,
            }
        }
        // A slice keeps the whole message, but `held` counts only the body.
        let body = match body.len() < message.len() / 16 * 15 {
            true => Bytes::copy_from_slice(body),
            false => message.slice_ref(body),
        };
        Ok(header.ok_or(DecodeError::NoHeader)?.with_body(body))
    }

    /// `None` for nil.
    fn decode_header(cursor: &mut Cursor<'_>) -> Result<Option<Self>, DecodeError> {
        let Some(fields) = cursor.map("the header")? else { return Ok(None) };
        let mut frame = Frame::new(0, "", None);
        for _ in 0..fields {
            match cursor.value()? {
                Value::Blob(b"proto") => frame.proto = cursor.int("proto")?.unwrap_or(0),
                Value::Blob(b"typ") => frame.typ = text(cursor, "typ")?,
                Value::Blob(b"sid") => frame.sid = SessionId::new(&text(cursor, "sid")?),
                Value::Blob(b"props") => frame.props = Map::decode(cursor, "props")?,
                _ => cursor.skip(1)?,
            }
        }
        Ok(Some(frame))
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.head_room() + self.body.len());
        self.encode_head(self.body.len(), &mut out);
        out.extend_from_slice(&self.body);
        out
    }

    /// `read` writes the body behind [`Frame::head_room`] in `buffer` and returns its length and a result to pass on.
    /// Returns the place of the message in `buffer`.
    pub fn encode_with<T>(
        &self,
        buffer: &mut [u8],
        read: impl FnOnce(&mut [u8]) -> (usize, T),
    ) -> (Range<usize>, T) {
        let body = self.head_room();
        let (length, result) = read(&mut buffer[body..]);
        let mut head = Vec::with_capacity(body);
        self.encode_head(length, &mut head);
        let start = body - head.len();
        buffer[start..body].copy_from_slice(&head);
        (start..body + length, result)
    }

    /// Upper bound of the head in bytes.
    pub fn head_room(&self) -> usize {
        let sid = self.sid.as_ref().map_or(0, |sid| sid.as_str().len());
        54 + self.typ.len() + sid + self.props.len()
    }

    /// For a body of `length` bytes.
    fn encode_head(&self, length: usize, out: &mut Vec<u8>) {
        let sid = self.sid.as_ref().map_or("", SessionId::as_str);
        let texts = [("typ", &*self.typ), ("sid", sid)].into_iter().filter(|(_, text)| !text.is_empty());
        let fields = 1 + texts.clone().count() + usize::from(!self.props.is_empty());
        out.push(if length == 0 { 0x81 } else { 0x82 });
        // Writing to a Vec cannot fail.
        let _ = encode::write_str(out, "hdr");
        out.push(0x80 | fields as u8);
        let _ = encode::write_str(out, "proto");
        let _ = encode::write_u16(out, self.proto);
        for (key, text) in texts {
            let _ = encode::write_str(out, key);
            let _ = encode::write_str(out, text);
        }
        if !self.props.is_empty() {
            let _ = encode::write_str(out, "props");
            self.props.encode(out);
        }
        if length > 0 {
            let _ = encode::write_str(out, "body");
            let _ = encode::write_bin_len(out, u32::try_from(length).unwrap_or(u32::MAX));
        }
    }
}

fn text(cursor: &mut Cursor<'_>, what: &'static str) -> Result<String, DecodeError> {
    Ok(String::from_utf8_lossy(cursor.blob(what)?.unwrap_or_default()).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sid() -> Option<SessionId> {
        SessionId::new("s")
    }

    fn decode(bytes: &[u8]) -> Result<Frame, DecodeError> {
        Frame::decode(&Bytes::copy_from_slice(bytes))
    }

    #[test]
    fn absent_and_nil_and_empty_are_the_same() {
        // The test client of the server sends every field, as nil or empty.
        let explicit =
            b"\x82\xa3hdr\x84\xa5proto\xcd\x00\x01\xa3typ\xa3new\xa3sid\xc0\xa5props\xc0\xa4body\xc4\x00";
        let frame = decode(explicit).unwrap();
        assert_eq!(frame, Frame::new(1, "new", None));
        assert_eq!(frame.encode(), b"\x81\xa3hdr\x82\xa5proto\xcd\x00\x01\xa3typ\xa3new");
    }

    #[test]
    fn order_and_unknown_keys_do_not_matter() {
        let frame = decode(
            b"\x84\x01\x92\x01\x02\xa4body\xa2hi\xa4more\x81\xa1x\xc3\xa3hdr\x85\xa5props\x81\xa1k\x07\xa3sid\xa1s\xa1?\xc3\xa3typ\xa1t\xa5proto\xd3\0\0\0\0\0\0\xff\xff",
        );
        let expected = Frame::new(0xffff, "t", sid().as_ref())
            .with_props(Map::new().with_int("k", 7))
            .with_body(&b"hi"[..]);
        assert_eq!(frame, Ok(expected));
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        assert_eq!(decode(b""), Err(DecodeError::Truncated));
        assert_eq!(decode(b"\x80"), Err(DecodeError::NoHeader));
        assert_eq!(decode(b"\x81\xa3hdr\xc0"), Err(DecodeError::NoHeader));
        assert_eq!(decode(b"\x81\xa3hdr\x81\xa5proto\xce\0\x01\0\0"), Err(DecodeError::Range("proto")));
        assert_eq!(decode(b"hello"), Err(DecodeError::Type("the message")));
        let sized = |typ: usize| Frame::new(1, &"t".repeat(typ), None).with_body(vec![0; 100_000]).encode();
        assert!(decode(&sized(MAX_HEADER - 20)).is_ok());
        assert_eq!(decode(&sized(MAX_HEADER)), Err(DecodeError::Range("the header's length")));
        // A Vec<u8> in serde's default form: an array, which Go refuses as well.
        let array = b"\x82\xa3hdr\x81\xa5proto\x01\xa4body\x92\x01\x02";
        assert_eq!(decode(array), Err(DecodeError::Type("body")));
        let whole = Frame::new(1, "shell", sid().as_ref()).with_body(&b"data"[..]).encode();
        for n in 0..whole.len() {
            assert!(decode(&whole[..n]).is_err(), "{n} bytes were enough");
        }
    }

    #[test]
    fn the_longest_head_has_room() {
        let long = "x".repeat(70_000);
        let props = (0..70_000).fold(Map::new(), |props, _| props.with_int("k", 1));
        let frame = Frame::new(1, &long, SessionId::new(&long).as_ref()).with_props(props);
        let mut head = Vec::new();
        frame.encode_head(70_000, &mut head);
        assert_eq!(head.len(), frame.head_room());
    }

    #[test]
    fn a_body_that_is_read_makes_the_same_message() {
        let frame = Frame::new(2, "typ", sid().as_ref());
        for (most, body) in [(3, &b"abc"[..]), (70_000, b"abc"), (70_000, &[7; 70_000]), (300, b""), (0, b"")]
        {
            let mut buffer = vec![7; frame.head_room() + most];
            let (place, result) = frame.encode_with(&mut buffer, |buffer| {
                assert_eq!(buffer.len(), most);
                buffer[..body.len()].copy_from_slice(body);
                (body.len(), "result")
            });
            assert_eq!((&buffer[place], result), (&frame.clone().with_body(body).encode()[..], "result"));
        }
    }

    #[test]
    fn offsets_take_eight_bytes() {
        let frame = Frame::new(2, "ack", None).with_props(Map::new().with_i64("offset", 0));
        assert!(frame.encode().ends_with(b"\x81\xa6offset\xd3\0\0\0\0\0\0\0\0"));
    }
}

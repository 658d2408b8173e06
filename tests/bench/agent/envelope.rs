//! Mender's envelope for bulk: frames made once and sent many times, and a reader of the first bytes that
//! allocates nothing. The harness's own codec is thorough instead.

use std::ops::Range;

use rmp::decode::{self, NumValueReadError};
use rmp::encode;

pub const SHELL: u16 = 1;
pub const FILES: u16 = 2;
pub const PORTS: u16 = 3;
pub const CONTROL: u16 = 0xffff;

/// What the server reads of each message at most: header and a little of the body.
pub const HEAD: usize = 512;

/// A session id of the server's form; its number is what the bench knows it by.
pub fn session_id(number: u32) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

/// A message to the device.
#[derive(Default)]
pub struct Message<'a> {
    pub proto: u16,
    pub typ: &'a str,
    pub session: u32,
    pub offset: Option<i64>,
    pub connection: Option<u32>,
    pub size: Option<(u16, u16)>,
    pub body: &'a [u8],
}

impl Message<'_> {
    /// The whole websocket frame, as the server writes it: whoever asks is in the props.
    pub fn frame(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.body.len() + 256);
        self.write(&mut out).expect("writing to memory");
        crate::harness::wire::encode(true, crate::harness::wire::BINARY, &out)
    }

    fn write(&self, out: &mut Vec<u8>) -> Result<(), encode::ValueWriteError> {
        encode::write_map_len(out, if self.body.is_empty() { 1 } else { 2 })?;
        encode::write_str(out, "hdr")?;
        encode::write_map_len(out, 4)?;
        encode::write_str(out, "proto")?;
        encode::write_u16(out, self.proto)?;
        encode::write_str(out, "typ")?;
        encode::write_str(out, self.typ)?;
        encode::write_str(out, "sid")?;
        encode::write_str(out, &session_id(self.session))?;
        encode::write_str(out, "props")?;
        let count = 1
            + u32::from(self.offset.is_some())
            + u32::from(self.connection.is_some())
            + if self.size.is_some() { 2 } else { 0 };
        encode::write_map_len(out, count)?;
        if let Some(offset) = self.offset {
            encode::write_str(out, "offset")?;
            encode::write_i64(out, offset)?;
        }
        if let Some(number) = self.connection {
            encode::write_str(out, "connection_id")?;
            encode::write_str(out, &session_id(number))?;
        }
        if let Some((width, height)) = self.size {
            encode::write_str(out, "terminal_width")?;
            encode::write_u16(out, width)?;
            encode::write_str(out, "terminal_height")?;
            encode::write_u16(out, height)?;
        }
        encode::write_str(out, "user_id")?;
        encode::write_str(out, &session_id(1))?;
        if !self.body.is_empty() {
            encode::write_str(out, "body")?;
            encode::write_bin(out, self.body)?;
        }
        Ok(())
    }
}

/// A frame whose offset changes from one use to the next.
pub struct Template {
    frame: Vec<u8>,
    at: usize,
}

impl Template {
    /// From a message that has an offset.
    pub fn new(message: &Message) -> Template {
        let frame = message.frame();
        let name = b"offset\xd3";
        let at = frame.windows(name.len()).position(|w| w == name).expect("an offset") + name.len();
        Template { frame, at }
    }

    pub fn with(&mut self, offset: u64) -> &[u8] {
        self.frame[self.at..self.at + 8].copy_from_slice(&offset.to_be_bytes());
        &self.frame
    }

    /// As [`Template::with`], with another body of the same length.
    pub fn with_body(&mut self, offset: u64, body: &[u8]) -> &[u8] {
        let start = self.frame.len() - body.len();
        self.frame[start..].copy_from_slice(body);
        self.with(offset)
    }
}

/// What kind of message came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    Accept,
    Ack,
    Chunk,
    Error,
    FileInfo,
    Forward,
    New,
    Ping,
    Pong,
    Shell,
    Stop,
    #[default]
    Other,
}

/// A message of the device.
#[derive(Debug, Clone, Default)]
pub struct Header {
    pub proto: u16,
    pub kind: Kind,
    pub session: u32,
    pub connection: u32,
    pub offset: Option<i64>,
    pub status: i64,
    /// Where the body begins, and its length.
    pub start: usize,
    pub body: usize,
}

impl Header {
    /// Reads the first bytes of a message of `total` bytes.
    pub fn read(head: &[u8], total: usize) -> Result<Header, String> {
        let mut header = Header::default();
        let mut rest = head;
        let fields = decode::read_map_len(&mut rest).map_err(|e| format!("no map: {e}"))?;
        for _ in 0..fields {
            match text(&mut rest)? {
                b"hdr" => header.read_fields(&mut rest)?,
                b"body" => {
                    let length = decode::read_bin_len(&mut rest).map_err(|e| format!("body: {e}"))?;
                    header.start = head.len() - rest.len();
                    header.body = length as usize;
                    if header.start + header.body != total {
                        return Err(format!("{total} bytes with a body of {length} at {}", header.start));
                    }
                }
                other => return Err(format!("field {:?}", String::from_utf8_lossy(other))),
            }
        }
        if header.body == 0 && !rest.is_empty() {
            return Err(format!("{} bytes behind the message", rest.len()));
        }
        Ok(header)
    }

    fn read_fields(&mut self, rest: &mut &[u8]) -> Result<(), String> {
        let fields = decode::read_map_len(rest).map_err(|e| format!("hdr: {e}"))?;
        for _ in 0..fields {
            match text(rest)? {
                b"proto" => self.proto = number(rest)? as u16,
                b"typ" => self.kind = kind(text(rest)?),
                b"sid" => self.session = id(text(rest)?),
                b"props" => self.read_props(rest)?,
                other => return Err(format!("hdr.{:?}", String::from_utf8_lossy(other))),
            }
        }
        Ok(())
    }

    fn read_props(&mut self, rest: &mut &[u8]) -> Result<(), String> {
        let props = decode::read_map_len(rest).map_err(|e| format!("props: {e}"))?;
        for _ in 0..props {
            match text(rest)? {
                // Servers take nothing but the full width.
                b"offset" => {
                    self.offset = Some(decode::read_i64(rest).map_err(|e| format!("offset: {e}"))?);
                }
                b"status" => self.status = number(rest)?,
                b"timeout" => {
                    number(rest)?;
                }
                b"connection_id" => self.connection = id(text(rest)?),
                // The device may say who asked.
                b"user_id" => {
                    text(rest)?;
                }
                other => return Err(format!("props.{:?}", String::from_utf8_lossy(other))),
            }
        }
        Ok(())
    }

    /// Where in the message the body is.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.body
    }
}

fn number(rest: &mut &[u8]) -> Result<i64, String> {
    decode::read_int(rest).map_err(|e: NumValueReadError| e.to_string())
}

fn text<'a>(rest: &mut &'a [u8]) -> Result<&'a [u8], String> {
    let length = decode::read_str_len(rest).map_err(|e| e.to_string())? as usize;
    let (text, behind) = rest.split_at_checked(length).ok_or("a string that is cut off")?;
    *rest = behind;
    Ok(text)
}

/// The number in an id of [`session_id`]; 0 for others.
fn id(text: &[u8]) -> u32 {
    if text.len() != 36 {
        return 0;
    }
    text[24..].iter().fold(0, |number: u32, digit| {
        number.wrapping_mul(10).wrapping_add(u32::from(digit.wrapping_sub(b'0')))
    })
}

fn kind(typ: &[u8]) -> Kind {
    match typ {
        b"accept" => Kind::Accept,
        b"ack" => Kind::Ack,
        b"file_chunk" => Kind::Chunk,
        b"error" => Kind::Error,
        b"file_info" => Kind::FileInfo,
        b"forward" => Kind::Forward,
        b"new" => Kind::New,
        b"ping" => Kind::Ping,
        b"pong" => Kind::Pong,
        b"shell" => Kind::Shell,
        b"stop" => Kind::Stop,
        _ => Kind::Other,
    }
}

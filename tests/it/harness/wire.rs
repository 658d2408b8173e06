//! Websocket frames (RFC 6455, section 5.2) as a server sees them: written unmasked, read masked.
//! By hand, so that tests can send what a library refuses to.

pub const CONTINUATION: u8 = 0x0;
pub const TEXT: u8 = 0x1;
pub const BINARY: u8 = 0x2;
pub const CLOSE: u8 = 0x8;
pub const PING: u8 = 0x9;
pub const PONG: u8 = 0xa;

/// One frame on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireFrame {
    pub fin: bool,
    pub opcode: u8,
    pub payload: Vec<u8>,
}

/// The bytes of an unmasked frame.
pub fn encode(fin: bool, opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(payload.len() + 10);
    out.push(if fin { 0x80 | opcode } else { opcode });
    match payload.len() {
        n @ 0..=125 => out.push(n as u8),
        n @ 126..=0xffff => {
            out.push(126);
            out.extend_from_slice(&(n as u16).to_be_bytes());
        }
        n => {
            out.push(127);
            out.extend_from_slice(&(n as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
    out
}

/// Collects bytes until they make frames.
#[derive(Debug, Default)]
pub struct Parser {
    buffer: Vec<u8>,
}

impl Parser {
    pub fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame. An error describes how the device broke the protocol.
    pub fn next(&mut self) -> Result<Option<WireFrame>, String> {
        let Some((&first, &second)) = self.buffer.first().zip(self.buffer.get(1)) else { return Ok(None) };
        if first & 0x70 != 0 {
            return Err(format!("reserved bits set in 0x{first:02x}"));
        }
        if second & 0x80 == 0 {
            return Err("the client must mask its frames".to_owned());
        }
        let (length, mut at) = match second & 0x7f {
            126 => match self.buffer.get(2..4) {
                Some(b) => (u64::from(u16::from_be_bytes(b.try_into().expect("two bytes"))), 4),
                None => return Ok(None),
            },
            127 => match self.buffer.get(2..10) {
                Some(b) => (u64::from_be_bytes(b.try_into().expect("eight bytes")), 10),
                None => return Ok(None),
            },
            n => (u64::from(n), 2),
        };
        if length > 8 << 20 {
            return Err(format!("a message of {length} bytes: the server reads at most 8 MiB"));
        }
        let Some(mask) = self.buffer.get(at..at + 4).map(<[u8]>::to_vec) else { return Ok(None) };
        at += 4;
        let end = at + length as usize;
        if self.buffer.len() < end {
            return Ok(None);
        }
        let payload = self.buffer[at..end].iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m).collect();
        self.buffer.drain(..end);
        Ok(Some(WireFrame { fin: first & 0x80 != 0, opcode: first & 0x0f, payload }))
    }
}

//! The thread that writes to the websocket, the only one that does.
//!
//! It puts messages into websocket frames itself: tungstenite would copy each one first. A large message is masked
//! where it is and written from there; small ones gather, so that a burst is one system call.

use std::io::{self, Write};
use std::time::Instant;

use tungstenite::protocol::frame::FrameHeader;
use tungstenite::protocol::frame::coding::{Control, Data, OpCode};

use super::deadline::{PING_INTERVAL, WRITE_LIMIT};
use super::error::LinkError;
use super::halves::WriteHalf;
use super::pace::Pace;
use crate::outbox::{FRONT, Message, Outbox, Work};

/// As the reference agent's.
const PING_PAYLOAD: &[u8] = b"60";
/// Messages up to this size are copied to be written together.
const SMALL: usize = 4 * 1024;
/// What gathers before it is written.
const BATCH: usize = 16 * 1024;

/// Writes until asked to close, or until writing fails: then the connection is shut down, so that the
/// reader notices as well.
///
/// # Errors
/// What the link died of, if it was the writing.
pub fn run(half: WriteHalf, outbox: &Outbox) -> Result<(), LinkError> {
    let mut writer = Writer { half, batch: Vec::new(), masks: Masks::default(), pace: Pace::default() };
    let result = writer.write(outbox).map_err(|e| match e.kind() {
        io::ErrorKind::TimedOut => {
            LinkError::Broken(format!("the server took nothing for {} s", WRITE_LIMIT.as_secs()))
        }
        _ => LinkError::Broken(crate::sys::reason(&e)),
    });
    writer.half.shut_down();
    result
}

struct Writer {
    half: WriteHalf,
    /// Frames that are to be written together.
    batch: Vec<u8>,
    masks: Masks,
    pace: Pace,
}

impl Writer {
    fn write(&mut self, outbox: &Outbox) -> io::Result<()> {
        let mut next_ping = Instant::now() + PING_INTERVAL;
        let mut work = Work::Nothing;
        while self.obey(work)? {
            let now = Instant::now();
            if now >= next_ping {
                self.control(Control::Ping, PING_PAYLOAD)?;
                next_ping = now + PING_INTERVAL;
                self.batch.shrink_to(0);
                outbox.rest();
            }
            outbox.set_piece(self.pace.piece(now));
            let room = self.pace.room(now);
            // What has gathered goes out before waiting, and only then.
            work = match outbox.try_next(room) {
                Some(work) => work,
                None => {
                    // The window may have shrunk below what was written since the last probe: nothing would tell that
                    // it has arrived.
                    self.probe(false)?;
                    self.flush()?;
                    let more_room = self.pace.deadline().filter(|deadline| *deadline > now);
                    outbox.next(room, more_room.map_or(next_ping, |at| at.min(next_ping)))
                }
            };
        }
        Ok(())
    }

    /// Does what is to be done. `false` when that was the last thing.
    fn obey(&mut self, work: Work) -> io::Result<bool> {
        match work {
            Work::Message(message, bulk) => self.message(message, bulk)?,
            Work::Answered(probe, when) => self.pace.answered(probe, when),
            Work::Pong(payload) => self.control(Control::Pong, &payload)?,
            Work::Flush => self.half.flush_tls()?,
            Work::Nothing => {}
            Work::Close(code, reason) => {
                let payload = [&code.to_be_bytes(), reason.as_bytes()].concat();
                self.control(Control::Close, &payload)?;
                self.flush()?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn message(&mut self, mut message: Message, bulk: bool) -> io::Result<()> {
        if bulk {
            self.probe(true)?;
        }
        let content = message.content();
        let length = content.len();
        let header = Header::new(OpCode::Data(Data::Binary), length, self.masks.next()?)?;
        apply(header.mask, content);
        let frame = message.behind(header.bytes());
        self.pace.wrote(frame.len());
        if length <= SMALL {
            self.gather(frame)?;
        } else {
            self.flush()?;
            self.half.write_all(frame)?;
        }
        self.probe(false)
    }

    /// Asks how far the messages have come, if it is time for that.
    fn probe(&mut self, bulk: bool) -> io::Result<()> {
        match self.pace.probe(bulk, Instant::now()) {
            Some(probe) => self.control(Control::Ping, &probe),
            None => Ok(()),
        }
    }

    fn control(&mut self, kind: Control, payload: &[u8]) -> io::Result<()> {
        let header = Header::new(OpCode::Control(kind), payload.len(), self.masks.next()?)?;
        let mut frame = [header.bytes(), payload].concat();
        apply(header.mask, &mut frame[header.length..]);
        self.gather(&frame)
    }

    fn gather(&mut self, frame: &[u8]) -> io::Result<()> {
        if self.batch.len() + frame.len() > BATCH {
            self.flush()?;
        }
        self.batch.extend_from_slice(frame);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.half.write_all(&self.batch)?;
        self.batch.clear();
        Ok(())
    }
}

/// A websocket frame's header (RFC 6455, 5.2).
struct Header {
    bytes: [u8; FRONT],
    length: usize,
    mask: [u8; 4],
}

impl Header {
    fn new(opcode: OpCode, payload: usize, mask: [u8; 4]) -> io::Result<Self> {
        let header = FrameHeader { opcode, mask: Some(mask), ..FrameHeader::default() };
        let mut bytes = [0; FRONT];
        header.format(payload as u64, &mut bytes.as_mut_slice()).map_err(io::Error::other)?;
        Ok(Header { bytes, length: header.len(payload as u64), mask })
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// Masking keys: nobody may be able to foresee them (RFC 6455, 5.3), so they are the system's random bytes, fetched
/// for many frames at a time.
#[derive(Debug, Default)]
struct Masks {
    keys: Vec<[u8; 4]>,
}

impl Masks {
    fn next(&mut self) -> io::Result<[u8; 4]> {
        if let Some(key) = self.keys.pop() {
            return Ok(key);
        }
        let mut bytes = [0; 256];
        getrandom::fill(&mut bytes)?;
        let (keys, _) = bytes.as_chunks();
        self.keys.extend_from_slice(&keys[1..]);
        Ok(keys[0])
    }
}

/// Masks `bytes`.
fn apply(mask: [u8; 4], bytes: &mut [u8]) {
    // Eight at a time is quick even where the compiler is told to save space.
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (chunks, rest) = bytes.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = (u64::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbox::FrameSink;
    use crate::proto::Frame;
    use crate::sys::wake::Wake;
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn every_byte_is_masked_with_its_own() {
        let mask = [1, 2, 3, 4];
        for length in 0..40 {
            let mut bytes = vec![0; length];
            apply(mask, &mut bytes);
            let expected: Vec<u8> = mask.iter().copied().cycle().take(length).collect();
            assert_eq!(bytes, expected);
        }
    }

    /// Without the probe everything would wait for an answer to nothing, for ever.
    #[test]
    fn room_that_is_lacking_is_asked_for() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let outbox = Arc::new(Outbox::default());
        let pace = super::super::pace::tests::without_room_or_probe(Instant::now());
        let half = WriteHalf::plain(ours);
        let mut writer = Writer { half, batch: Vec::new(), masks: Masks::default(), pace };
        let theirs = Arc::clone(&outbox);
        let writer = crate::sys::thread::spawn("writer", crate::sys::thread::LARGE_STACK, move || {
            writer.write(&theirs)
        })
        .unwrap();
        let sink = FrameSink::new(&outbox, Arc::new(Wake::new().unwrap()));
        sink.bulk((&Frame::new(2, "file_chunk", None)).into());
        let mut next = |opcode| {
            let mut head = [0; 6];
            server.read_exact(&mut head).unwrap();
            assert_eq!(head[0] & 0xf, opcode);
            let mut payload = vec![0; usize::from(head[1] & 0x7f)];
            server.read_exact(&mut payload).unwrap();
            payload.iter().zip(head[2..].iter().cycle()).map(|(byte, mask)| byte ^ mask).collect::<Vec<u8>>()
        };
        let probe = next(9);
        outbox.answered(probe.try_into().unwrap(), Instant::now());
        // Of the transfer's own a probe goes first.
        next(9);
        next(2);
        outbox.close(1000, "");
        writer.join().unwrap().unwrap();
    }

    #[test]
    fn keys_are_not_used_twice() {
        let mut masks = Masks::default();
        let mut keys: Vec<_> = (0..1000).map(|_| masks.next().unwrap()).collect();
        keys.sort_unstable();
        keys.dedup();
        // Two of a thousand random ones are alike once in ten thousand runs.
        assert!(keys.len() >= 998, "{}", keys.len());
    }

    #[test]
    fn headers_of_every_length() {
        for (payload, start) in [
            (125, &[0x82, 0x80 | 125][..]),
            (126, &[0x82, 0x80 | 126, 0, 126]),
            (65_536, &[0x82, 0x80 | 127, 0, 0, 0, 0, 0, 1, 0, 0]),
        ] {
            let header = Header::new(OpCode::Data(Data::Binary), payload, [9, 8, 7, 6]).unwrap();
            assert_eq!(header.bytes(), [start, &[9, 8, 7, 6]].concat());
        }
    }
}

//! The server's end of a websocket, made to be faster than any agent: one large buffer, nothing allocated for a
//! message, of most messages only the first bytes looked at, and writes collected until there is nothing to
//! read.

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{MsgFlags, recv};
use nix::sys::time::TimeSpec;

use crate::envelope::{CONTROL, HEAD, Header, Kind, Message, SHELL};
use crate::harness::wire;
use crate::interrupt::is_interrupted;

const BUFFER: usize = 512 << 10;
/// A write without progress for so long is an error.
const WRITE_LIMIT: Duration = Duration::from_secs(30);
/// How long a read blocks before the deadline is looked at; a nearer one is waited for exactly.
const PATIENCE: Duration = Duration::from_millis(100);
/// Upstream's agent hears nothing but pings and pongs: a link without is dead to it after 60 s.
const PING_EVERY: Duration = Duration::from_secs(30);
/// The rest of a message is skipped if it is so long.
const LARGE: usize = 16 << 10;
/// So much is written at once at most.
const BATCH: usize = 256 << 10;

pub struct Link {
    stream: TcpStream,
    buffer: Box<[u8]>,
    /// What of the buffer hasn't been looked at.
    start: usize,
    end: usize,
    out: Vec<u8>,
    frame: Frame,
    message: Partial,
    /// Whole messages are unmasked and kept while content is verified.
    whole: Option<Vec<u8>>,
    pinged: Instant,
    /// Data frames received.
    pub frames: u64,
    /// Pings of sessions are the caller's, too.
    pub passes_pings: bool,
    /// A session whose client has gone: nobody answers its pings.
    pub gone: Option<u32>,
}

/// The frame that is being read.
#[derive(Default)]
struct Frame {
    open: bool,
    left: usize,
    mask: [u8; 4],
    /// How far into the mask.
    phase: usize,
    fin: bool,
    large: bool,
}

/// The message that is being read.
struct Partial {
    begun: bool,
    total: usize,
    head: [u8; HEAD],
}

enum Step {
    Message,
    More,
    Starved,
}

impl Link {
    /// Takes over a stream whose handshake is done.
    pub fn new(stream: TcpStream) -> Result<Link, String> {
        stream.set_nodelay(true).map_err(|e| e.to_string())?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(|e| e.to_string())?;
        stream.set_write_timeout(Some(WRITE_LIMIT)).map_err(|e| e.to_string())?;
        Ok(Link {
            stream,
            buffer: vec![0; BUFFER].into_boxed_slice(),
            start: 0,
            end: 0,
            out: Vec::with_capacity(BATCH * 2),
            frame: Frame::default(),
            message: Partial { begun: false, total: 0, head: [0; HEAD] },
            whole: None,
            pinged: Instant::now(),
            frames: 0,
            passes_pings: false,
            gone: None,
        })
    }

    /// From now on messages are read as a whole, or not any more. Between messages only.
    pub fn verify(&mut self, verify: bool) {
        self.whole = verify.then(Vec::new);
    }

    /// Queues a frame; it leaves when nothing is left to read.
    pub fn put(&mut self, frame: &[u8]) -> Result<(), String> {
        self.out.extend_from_slice(frame);
        if self.out.len() >= BATCH {
            self.flush()?;
        }
        Ok(())
    }

    /// Queues a message.
    pub fn say(&mut self, message: &Message) -> Result<(), String> {
        self.put(&message.frame())
    }

    pub fn flush(&mut self) -> Result<(), String> {
        if !self.out.is_empty() {
            (&self.stream).write_all(&self.out).map_err(|e| format!("writing to the agent: {e}"))?;
            self.out.clear();
        }
        Ok(())
    }

    /// The next message, or nothing until `deadline`. Pings of any kind are answered on the way.
    pub fn next(&mut self, deadline: Instant) -> Result<Option<Header>, String> {
        loop {
            match self.step()? {
                Step::Message => {
                    if let Some(header) = self.complete()? {
                        return Ok(Some(header));
                    }
                }
                Step::More => {}
                Step::Starved => {
                    if !self.fill(deadline)? {
                        return Ok(None);
                    }
                }
            }
        }
    }

    /// The next message of a session; others are dropped. None coming is an error.
    pub fn next_of(&mut self, session: u32, limit: Duration) -> Result<Header, String> {
        let deadline = Instant::now() + limit;
        loop {
            match self.next(deadline)? {
                Some(header) if header.session == session => return Ok(header),
                Some(_) => {}
                None => return Err(format!("nothing from the agent for {limit:?}")),
            }
        }
    }

    /// The next message of a session, which has to be of this kind.
    pub fn expect(&mut self, session: u32, kind: Kind, limit: Duration) -> Result<Header, String> {
        let header = self.next_of(session, limit)?;
        if header.kind == kind { Ok(header) } else { Err(self.unexpected(&header)) }
    }

    /// What to say about a message that shouldn't have come.
    pub fn unexpected(&self, header: &Header) -> String {
        let body = String::from_utf8_lossy(self.body(header)).into_owned();
        format!(
            "unexpected {:?} of protocol {}, status {}: {body:?}",
            header.kind, header.proto, header.status
        )
    }

    /// Lets the agent be until `deadline`, but for its pings. Messages are dropped.
    pub fn rest(&mut self, deadline: Instant) -> Result<(), String> {
        while self.next(deadline)?.is_some() {}
        Ok(())
    }

    /// Drops messages until none has come for `span`.
    pub fn settle(&mut self, span: Duration, limit: Duration) -> Result<(), String> {
        let end = Instant::now() + limit;
        while self.next(Instant::now() + span)?.is_some() {
            if Instant::now() > end {
                return Err(format!("the agent still talks after {limit:?}"));
            }
        }
        Ok(())
    }

    /// A websocket ping.
    pub fn ping(&mut self) -> Result<(), String> {
        self.pinged = Instant::now();
        self.put(&wire::encode(true, wire::PING, b"60"))?;
        self.flush()
    }

    /// The body of the message that came last, as far as it was read.
    pub fn body(&self, header: &Header) -> &[u8] {
        let bytes = self.whole.as_deref().unwrap_or(&self.message.head);
        bytes.get(header.range()).unwrap_or_else(|| bytes.get(header.start..).unwrap_or_default())
    }

    /// Waits for bytes, having written what is queued. `false` when the deadline has passed.
    fn fill(&mut self, deadline: Instant) -> Result<bool, String> {
        self.flush()?;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            // Only a frame's first bytes are ever left over.
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        // Of a large message's rest not even a copy is made. To know before it is here that one comes, little is
        // read behind another.
        let skipped = self.start == self.end && self.frame.left >= LARGE && self.skips();
        let room = match self.frame.large {
            _ if skipped => self.frame.left.min(self.buffer.len()),
            true => LARGE.min(self.buffer.len() - self.end),
            false => self.buffer.len() - self.end,
        };
        loop {
            if is_interrupted() {
                return Err("interrupted".to_owned());
            }
            let now = Instant::now();
            if now - self.pinged > PING_EVERY {
                self.ping()?;
            }
            let left = deadline.saturating_duration_since(now);
            let mut flags = if skipped { MsgFlags::MSG_TRUNC } else { MsgFlags::empty() };
            if left < PATIENCE {
                let mut fds = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
                match ppoll(&mut fds, Some(TimeSpec::from_duration(left)), None) {
                    Ok(0) if left.is_zero() => return Ok(false),
                    Ok(0) | Err(nix::Error::EINTR) => continue,
                    Ok(_) => flags |= MsgFlags::MSG_DONTWAIT,
                    Err(e) => return Err(format!("poll: {e}")),
                }
            }
            match recv(self.stream.as_raw_fd(), &mut self.buffer[self.end..self.end + room], flags) {
                Ok(0) => return Err("the agent closed the connection".to_owned()),
                Ok(count) if skipped => {
                    self.frame.left -= count;
                    self.frame.phase += count;
                    self.message.total += count;
                    return Ok(true);
                }
                Ok(count) => {
                    self.end += count;
                    return Ok(true);
                }
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => {}
                Err(e) => return Err(format!("reading from the agent: {e}")),
            }
        }
    }

    /// Whether nobody wants to know the message's next bytes.
    fn skips(&self) -> bool {
        self.whole.is_none() && self.message.total >= HEAD
    }

    /// Reads on in what the buffer holds.
    fn step(&mut self) -> Result<Step, String> {
        if !self.frame.open && !self.begin_frame()? {
            return Ok(Step::Starved);
        }
        let skips = self.skips();
        let count = self.frame.left.min(self.end - self.start);
        let bytes = &self.buffer[self.start..self.start + count];
        let frame = &mut self.frame;
        let unmask = |i: usize, byte: u8| byte ^ frame.mask[(frame.phase + i) & 3];
        match &mut self.whole {
            Some(whole) => whole.extend(bytes.iter().enumerate().map(|(i, byte)| unmask(i, *byte))),
            None if !skips => {
                let head = &mut self.message.head[self.message.total..];
                for (i, (to, from)) in head.iter_mut().zip(bytes).enumerate() {
                    *to = unmask(i, *from);
                }
            }
            None => {}
        }
        self.start += count;
        self.message.total += count;
        frame.left -= count;
        frame.phase += count;
        frame.open = frame.left > 0;
        Ok(match (frame.left, frame.fin) {
            (0, true) => Step::Message,
            (0, false) => Step::More,
            _ => Step::Starved,
        })
    }

    /// Reads a frame's first bytes and deals with control frames. `false`: they aren't all there.
    fn begin_frame(&mut self) -> Result<bool, String> {
        loop {
            let bytes = &self.buffer[self.start..self.end];
            let [first, second, ..] = *bytes else { return Ok(false) };
            if second & 0x80 == 0 {
                return Err("an unmasked frame".to_owned());
            }
            let (length, at) = match second & 0x7f {
                126 => match bytes.get(2..4) {
                    Some(&[a, b]) => (usize::from(u16::from_be_bytes([a, b])), 4),
                    _ => return Ok(false),
                },
                127 => match bytes.get(2..).and_then(|b| b.first_chunk()) {
                    Some(b) => (u64::from_be_bytes(*b) as usize, 10),
                    None => return Ok(false),
                },
                short => (usize::from(short), 2),
            };
            let Some(mask) = bytes.get(at..).and_then(|b| b.first_chunk()).copied() else { return Ok(false) };
            let opcode = first & 0x0f;
            if opcode < wire::CLOSE {
                if !self.message.begun {
                    (self.message.begun, self.message.total) = (true, 0);
                    if let Some(whole) = &mut self.whole {
                        whole.clear();
                    }
                }
                self.start += at + 4;
                let (fin, large) = (first & 0x80 != 0, length >= 4 * LARGE);
                self.frame = Frame { open: true, left: length, mask, phase: 0, fin, large };
                self.frames += 1;
                return Ok(true);
            }
            let Some(payload) = bytes.get(at + 4..at + 4 + length) else { return Ok(false) };
            let payload: Vec<u8> = payload.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m).collect();
            self.start += at + 4 + length;
            match opcode {
                wire::PING => self.put(&wire::encode(true, wire::PONG, &payload))?,
                wire::CLOSE => return Err(format!("the agent closed the websocket: {payload:?}")),
                _ => {}
            }
        }
    }

    /// What to do with a whole message: nothing for the caller when it was a ping.
    fn complete(&mut self) -> Result<Option<Header>, String> {
        self.message.begun = false;
        let total = self.message.total;
        let head = self.whole.as_deref().unwrap_or(&self.message.head);
        let header = Header::read(&head[..total.min(head.len())], total)?;
        if header.kind == Kind::Ping && matches!(header.proto, CONTROL | SHELL) && !self.passes_pings {
            if self.gone != Some(header.session) {
                self.pong(&header)?;
            }
            return Ok(None);
        }
        Ok(Some(header))
    }

    /// Answers a session's ping.
    pub fn pong(&mut self, ping: &Header) -> Result<(), String> {
        self.say(&Message { proto: ping.proto, typ: "pong", session: ping.session, ..Message::default() })
    }

    /// Ends the connection.
    pub fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

//! Files down and up, by the released server's rules.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::envelope::{CONTROL, FILES, Header, Kind, Message, Template};
use crate::harness::msg::{self, Ints, map};
use crate::harness::relay::Shape;
use crate::link::Link;
use crate::process::Meter;
use crate::row::{Figure, GIB, MIB, Measure, Row, SOON, Scale, figure, row};
use crate::stage::{Agent, Stage, Way, config};

/// What the server cuts an upload into.
pub const CHUNK: usize = 4096;
/// What of an upload the server has on the way at most.
pub const WINDOW: u64 = 80 << 10;
/// The server acknowledges a download's chunks by so many.
pub const ACK_EVERY: u64 = 10;
/// What is verified, and repeated in larger files.
const BLOCK: usize = 8 << 20;

pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for millis in [0, 20, 100] {
        let about = format!("downloads of 256 MiB, {millis} ms round trip");
        rows.push(row(format!("download-{millis}ms"), about, move |agent, scale| {
            prepare_download(agent, scale, way(millis))
        }));
    }
    let about = "the same over TLS, 0 ms round trip; all that is measured besides ends TLS, too";
    rows.push(row("download-tls", about, |agent, scale| prepare_download(agent, scale, Way::Tls)));
    for millis in [0, 20, 100] {
        let about = format!("uploads of 64 MiB, {millis} ms round trip");
        rows.push(row(format!("upload-{millis}ms"), about, move |agent, scale| {
            prepare_upload(agent, scale, millis)
        }));
    }
    rows
}

/// One file after the other until time is up, and of the last one what has come by then.
fn prepare_download(agent: &Agent, scale: Scale, way: Way) -> Result<Measure, String> {
    let mut stage = Stage::start(agent, &config("exit 0"), way)?;
    let content = content();
    let (small, large) = (stage.dir().join("small"), stage.dir().join("large"));
    write_file(&small, &content, BLOCK)?;
    write_file(&large, &content, 256 << 20)?;
    stage.explained(|stage| verify_download(stage, &small, &content))?;
    stage.measured(move |stage| {
        let meter = Meter::start(stage.pid())?;
        let end = Instant::now() + scale.span;
        let (mut bytes, mut chunks) = (0, 0);
        while Instant::now() < end {
            let session = stage.session();
            let mut download = Download::start(&mut stage.link, session, &large)?;
            while Instant::now() < end && !download.step(&mut stage.link, end)? {}
            (bytes, chunks) = (bytes + download.bytes, chunks + download.chunks);
            close(&mut stage.link, session)?;
        }
        rate(bytes, chunks, &meter)
    })
}

/// One file after the other until time is up. The last one ends then, too, and is complete all the same.
fn prepare_upload(agent: &Agent, scale: Scale, millis: u64) -> Result<Measure, String> {
    let mut stage = Stage::start(agent, &config("exit 0"), way(millis))?;
    let content = content();
    let target = stage.dir().join("upload");
    // The delay makes it slow.
    let verified = if millis == 0 { BLOCK } else { BLOCK / 64 };
    stage.explained(|stage| verify_upload(stage, &target, &content[..verified]))?;
    stage.measured(move |stage| {
        let meter = Meter::start(stage.pid())?;
        let end = Instant::now() + scale.span;
        let mut bytes = 0;
        while Instant::now() < end {
            let session = stage.session();
            let mut upload = Upload::start(&mut stage.link, session, &target)?;
            while upload.sent < 64 << 20 && Instant::now() < end {
                upload.step(&mut stage.link, &content[..CHUNK])?;
            }
            upload.finish(&mut stage.link)?;
            bytes += upload.sent;
            close(&mut stage.link, session)?;
        }
        let mut figures = rate(bytes, 1, &meter)?;
        // Their size is the server's.
        figures.truncate(2);
        Ok(figures)
    })
}

/// No relay where there is nothing to delay.
pub fn way(millis: u64) -> Way {
    if millis == 0 { Way::Direct } else { Way::Link(Shape::round_trip(millis)) }
}

/// Bytes in a time as figures.
pub fn rate(bytes: u64, messages: u64, meter: &Meter) -> Result<Vec<Figure>, String> {
    let (elapsed, cpu) = meter.read()?;
    let bytes = bytes as f64;
    Ok(vec![
        figure("rate", "MiB/s", bytes / MIB / elapsed),
        figure("agent's CPU", "s/GiB", cpu / (bytes / GIB)),
        figure("a message", "B", bytes / messages as f64),
    ])
}

/// Something that doesn't repeat.
pub fn content() -> Vec<u8> {
    let mut state = 1u64;
    let mut content = Vec::with_capacity(BLOCK);
    while content.len() < BLOCK {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        content.extend_from_slice(&(state ^ (state >> 33)).to_le_bytes());
    }
    content
}

/// Writes the content again and again.
pub fn write_file(path: &Path, content: &[u8], size: usize) -> Result<(), String> {
    let write = || {
        let mut file = File::create(path)?;
        let mut left = size;
        while left > 0 {
            let count = left.min(content.len());
            file.write_all(&content[..count])?;
            left -= count;
        }
        Ok(())
    };
    write().map_err(|e: std::io::Error| format!("{}: {e}", path.display()))
}

/// What clients and server begin a session with.
pub fn open(link: &mut Link, session: u32) -> Result<(), String> {
    let body = msg::encode(&map(&[("versions", vec![rmpv::Value::from(1)].into())]), Ints::Compact);
    link.say(&Message { proto: CONTROL, typ: "open", session, body: &body, ..Message::default() })?;
    link.expect(session, Kind::Accept, SOON).map(drop)
}

/// Ends a session; what of it is under way is dropped.
pub fn close(link: &mut Link, session: u32) -> Result<(), String> {
    link.say(&Message { proto: CONTROL, typ: "close", session, ..Message::default() })?;
    link.flush()
}

fn request(
    link: &mut Link,
    session: u32,
    typ: &str,
    path: &Path,
    more: &[(&str, rmpv::Value)],
) -> Result<(), String> {
    let path = path.to_str().ok_or("a path that is no UTF-8")?;
    let body = msg::encode(&map(&[&[("path", path.into())], more].concat()), Ints::Compact);
    link.say(&Message { proto: FILES, typ, session, body: &body, ..Message::default() })
}

/// A file that comes from the device.
pub struct Download {
    pub session: u32,
    ack: Template,
    pub bytes: u64,
    chunks: u64,
    /// With less, the device is left waiting.
    pub acks: bool,
}

impl Download {
    pub fn start(link: &mut Link, session: u32, path: &Path) -> Result<Download, String> {
        open(link, session)?;
        request(link, session, "stat", path, &[])?;
        link.expect(session, Kind::FileInfo, SOON)?;
        request(link, session, "get_file", path, &[])?;
        let ack = Message { proto: FILES, typ: "ack", session, offset: Some(0), ..Message::default() };
        Ok(Download { session, ack: Template::new(&ack), bytes: 0, chunks: 0, acks: true })
    }

    /// Takes a message of this session. `true` at the file's end.
    pub fn take(&mut self, link: &mut Link, header: &Header) -> Result<bool, String> {
        if header.kind != Kind::Chunk {
            return Err(link.unexpected(header));
        }
        if header.offset != Some(self.bytes as i64) {
            return Err(format!("a chunk at {:?} instead of {}", header.offset, self.bytes));
        }
        self.bytes += header.body as u64;
        let end = header.body == 0;
        self.chunks += u64::from(!end);
        if self.acks && (end || self.chunks.is_multiple_of(ACK_EVERY)) {
            link.put(self.ack.with(self.bytes))?;
        }
        Ok(end)
    }

    /// Takes the next message. `true` at the file's end.
    fn step(&mut self, link: &mut Link, end: Instant) -> Result<bool, String> {
        match link.next(end)? {
            Some(header) if header.session == self.session => self.take(link, &header),
            _ => Ok(false),
        }
    }
}

fn verify_download(stage: &mut Stage, path: &Path, content: &[u8]) -> Result<(), String> {
    let session = stage.session();
    let mut download = Download::start(&mut stage.link, session, path)?;
    stage.link.verify(true);
    loop {
        let header = stage.link.next_of(session, SOON)?;
        let at = download.bytes as usize;
        if download.take(&mut stage.link, &header)? {
            break;
        }
        if content.get(at..at + header.body) != Some(stage.link.body(&header)) {
            return Err(format!("wrong content in the chunk at {at}"));
        }
    }
    stage.link.verify(false);
    if download.bytes != content.len() as u64 {
        return Err(format!("{} bytes of a file of {}", download.bytes, content.len()));
    }
    close(&mut stage.link, session)
}

/// A file that goes to the device.
pub struct Upload {
    session: u32,
    chunk: Template,
    pub sent: u64,
    acked: u64,
    pub target: PathBuf,
}

impl Upload {
    pub fn start(link: &mut Link, session: u32, target: &Path) -> Result<Upload, String> {
        open(link, session)?;
        let more = [("src_path", "upload".into()), ("mode", 0o600.into())];
        request(link, session, "put_file", target, &more)?;
        link.expect(session, Kind::Ack, SOON)?;
        let body = [0; CHUNK];
        let chunk = Message {
            proto: FILES,
            typ: "file_chunk",
            session,
            offset: Some(0),
            body: &body,
            ..Message::default()
        };
        Ok(Upload { session, chunk: Template::new(&chunk), sent: 0, acked: 0, target: target.to_owned() })
    }

    /// Whether the window is full.
    pub fn is_held(&self) -> bool {
        self.sent > self.acked + WINDOW
    }

    /// Sends a chunk, without waiting for anything.
    pub fn send(&mut self, link: &mut Link, body: &[u8]) -> Result<(), String> {
        link.put(self.chunk.with_body(self.sent, body))?;
        self.sent += body.len() as u64;
        Ok(())
    }

    /// Sends a chunk and waits for one new ack if the window is full.
    fn step(&mut self, link: &mut Link, body: &[u8]) -> Result<(), String> {
        self.send(link, body)?;
        if self.is_held() { self.wait(link, self.acked + 1) } else { Ok(()) }
    }

    /// Waits for an ack of so much.
    fn wait(&mut self, link: &mut Link, least: u64) -> Result<(), String> {
        while self.acked < least {
            let header = link.expect(self.session, Kind::Ack, Duration::from_secs(60))?;
            // One that says nothing new doesn't count.
            let offset = header.offset.and_then(|offset| u64::try_from(offset).ok()).unwrap_or_default();
            self.acked = self.acked.max(offset);
        }
        Ok(())
    }

    /// Sends the end and waits until the device has said that it has everything.
    pub fn finish(&mut self, link: &mut Link) -> Result<(), String> {
        let offset = Some(self.sent as i64);
        link.say(&Message {
            proto: FILES,
            typ: "file_chunk",
            session: self.session,
            offset,
            ..Message::default()
        })?;
        self.wait(link, self.sent)
    }
}

fn verify_upload(stage: &mut Stage, target: &Path, content: &[u8]) -> Result<(), String> {
    let session = stage.session();
    let mut upload = Upload::start(&mut stage.link, session, target)?;
    for body in content.chunks(CHUNK) {
        upload.step(&mut stage.link, body)?;
    }
    upload.finish(&mut stage.link)?;
    close(&mut stage.link, session)?;
    // Upstream's says so before the file is in place.
    let right = crate::harness::wait::eventually(SOON, "the uploaded file", || {
        std::fs::read(target).ok().filter(|file| file.len() == content.len())
    });
    if right == content { Ok(()) } else { Err("wrong content in the uploaded file".to_owned()) }
}

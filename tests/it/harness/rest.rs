//! The server's handlers for file up- and downloads: what they send, what they insist on, when they acknowledge,
//! when they give up. Both generations do the same here; where one is stricter, that is what is done.

use std::time::Duration;

use rmpv::Value;

use super::client::new_sid;
use super::device::Device;
use super::msg::{CONTROL, FILES, Ints, Msg, encode, map};
use super::wait::secs;

/// How long the real server waits for the next message.
const PATIENCE: Duration = secs(60);
/// The server's window for uploads.
const WINDOW: u64 = 81_920;
const CHUNK: usize = 4096;

/// What a user of the server gets to see when it didn't work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The HTTP status.
    pub status: u64,
    pub text: String,
}

/// What a download brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Downloaded {
    pub bytes: Vec<u8>,
    pub path: String,
    /// As the X-MEN-File headers have them: the mode in octal.
    pub mode: String,
    pub uid: u64,
    pub gid: u64,
    pub size: i64,
    /// The sizes of the chunks.
    pub chunks: Vec<usize>,
}

/// One request's session.
pub struct Rest {
    pub device: Device,
    pub sid: String,
}

/// The parts of an upload's form.
#[derive(Debug, Clone, Default)]
pub struct Form {
    pub path: String,
    pub src_path: Option<String>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub mode: Option<u32>,
    pub size: Option<i64>,
}

impl Form {
    pub fn to(path: impl AsRef<std::path::Path>) -> Form {
        Form { path: path.as_ref().to_str().expect("UTF-8").to_owned(), ..Form::default() }
    }

    pub fn body(&self) -> Vec<u8> {
        let mut fields = Vec::new();
        if let Some(src_path) = &self.src_path {
            fields.push(("src_path", Value::from(src_path.as_str())));
        }
        fields.push(("path", Value::from(self.path.as_str())));
        let numbers = [("uid", self.uid), ("gid", self.gid), ("mode", self.mode)];
        for (name, number) in numbers {
            if let Some(number) = number {
                fields.push((name, Value::from(number)));
            }
        }
        if let Some(size) = self.size {
            fields.push(("size", Value::from(size)));
        }
        encode(&map(&fields), Ints::Compact)
    }
}

/// A path as the body of `stat` and `get_file`.
pub fn path_body(path: &str) -> Vec<u8> {
    encode(&map(&[("path", path.into())]), Ints::Compact)
}

/// Where an offset stands in a message it must be marker d3 and eight bytes: the servers assert int64.
pub fn offset_of(msg: &Msg) -> u64 {
    let mut wide = b"\xa6offset\xd3".to_vec();
    let offset = msg.prop("offset").and_then(Value::as_u64).expect("an offset");
    wide.extend(offset.to_be_bytes());
    assert!(
        msg.raw.windows(wide.len()).any(|w| w == wide),
        "the offset isn't int64 on the wire: {}",
        msg.summary()
    );
    offset
}

impl Rest {
    /// Opens a session and shakes hands.
    pub fn open(device: &Device) -> Rest {
        let rest = Rest { device: device.clone(), sid: new_sid() };
        let versions = encode(&map(&[("versions", Value::Array(vec![1.into()]))]), Ints::Compact);
        rest.send(CONTROL, "open", None, &versions);
        let accept = rest.next();
        assert_eq!((accept.proto, accept.typ.as_str()), (CONTROL, "accept"), "{}", accept.summary());
        let protocols = accept.field("protocols").expect("protocols");
        let offered = protocols.as_array().expect("an array").contains(&Value::from(2));
        assert!(offered, "file transfer is offered: {protocols}");
        rest
    }

    /// Sends a message of this session, as one user's.
    pub fn send(&self, proto: u16, typ: &str, offset: Option<u64>, body: &[u8]) {
        let mut props = Vec::new();
        if let Some(offset) = offset {
            props.push(("offset", Value::from(offset as i64)));
        }
        props.push(("user_id", Value::from("aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee")));
        let mut header =
            vec![("proto", Value::from(proto)), ("typ", Value::from(typ)), ("sid", self.sid.as_str().into())];
        header.push(("props", map(&props)));
        let mut message = vec![("hdr", map(&header))];
        if !body.is_empty() {
            message.push(("body", Value::Binary(body.to_vec())));
        }
        self.device.send_value(&map(&message), Ints::Wide);
    }

    pub fn ask(&self, typ: &str, body: &[u8]) {
        self.send(FILES, typ, None, body);
    }

    /// The next message that isn't a ping, which is answered.
    pub fn next(&self) -> Msg {
        loop {
            let msg = self.device.next_of(&self.sid, PATIENCE);
            if (msg.proto, msg.typ.as_str()) == (CONTROL, "ping") {
                self.send(CONTROL, "pong", None, b"");
                continue;
            }
            return msg;
        }
    }

    pub fn close(&self) {
        self.send(CONTROL, "close", None, b"");
    }

    /// What the server makes of an error: the code in it counts, else the status of the step it came in.
    pub fn refused(msg: &Msg, default: u64) -> Refused {
        assert_eq!(msg.typ, "error", "{}", msg.summary());
        let text = msg.field("err").and_then(|v| v.as_str().map(str::to_owned)).expect("err");
        let code = msg.field("code").and_then(|v| v.as_u64()).filter(|c| *c > 0);
        Refused { status: code.unwrap_or(default), text }
    }

    /// stat, as the server does it before a download.
    pub fn stat(&self, path: &str) -> Result<Msg, Refused> {
        self.ask("stat", &path_body(path));
        let info = self.next();
        if info.typ != "file_info" {
            let Refused { status, text } = Self::refused(&info, 400);
            let text = format!("failed to retrieve file info: error received from device: {text}");
            return Err(Refused { status, text });
        }
        assert!(info.props.is_empty(), "file_info has no props: {}", info.summary());
        let mode = info.field("mode").and_then(|v| v.as_u64()).expect("a mode");
        let irregular = [31, 27, 26, 25, 24, 21, 19].iter().any(|bit| mode & (1 << bit) != 0);
        if irregular {
            return Err(Refused { status: 400, text: "path is not a regular file".to_owned() });
        }
        Ok(info)
    }

    /// The whole GET.
    pub fn download(device: &Device, path: &str) -> Result<Downloaded, Refused> {
        let rest = Rest::open(device);
        let result = rest.download_here(path);
        rest.close();
        result
    }

    fn download_here(&self, path: &str) -> Result<Downloaded, Refused> {
        let info = self.stat(path)?;
        let number = |name: &str| info.field(name).and_then(|v| v.as_u64()).expect("a number");
        let mut result = Downloaded {
            bytes: Vec::new(),
            path: info.field("path").and_then(|v| v.as_str().map(str::to_owned)).expect("a path"),
            mode: format!("{:o}", number("mode")),
            uid: number("uid"),
            gid: number("gid"),
            size: info.field("size").and_then(|v| v.as_i64()).expect("a size"),
            chunks: Vec::new(),
        };
        self.ask("get_file", &path_body(path));
        self.receive(|bytes| {
            result.chunks.push(bytes.len());
            result.bytes.extend_from_slice(bytes);
        })?;
        Ok(result)
    }

    /// Takes chunks until the end, acknowledging every tenth and the end.
    pub fn receive(&self, mut sink: impl FnMut(&[u8])) -> Result<u64, Refused> {
        let (mut total, mut count) = (0, 0);
        loop {
            let msg = self.next();
            if msg.typ != "file_chunk" {
                return Err(Self::refused(&msg, 500));
            }
            assert_eq!(offset_of(&msg), total, "wrong offset received");
            // The released server knows the end by a missing body; so does this one, being stricter.
            let Some(bytes) = &msg.body else {
                self.send(FILES, "ack", Some(total), b"");
                return Ok(total);
            };
            assert!(msg.raw.len() < 1 << 20, "no message may reach 1 MiB");
            total += bytes.len() as u64;
            sink(bytes);
            count += 1;
            if count % 10 == 0 {
                self.send(FILES, "ack", Some(total), b"");
            }
        }
    }

    /// The whole PUT.
    pub fn upload(device: &Device, form: &Form, bytes: &[u8]) -> Result<(), Refused> {
        let rest = Rest::open(device);
        let result = rest.upload_here(form, bytes.chunks(CHUNK));
        rest.close();
        result
    }

    /// put_file and its first ack.
    pub fn announce(&self, form: &Form) -> Result<(), Refused> {
        self.ask("put_file", &form.body());
        let first = self.next();
        if first.typ != "ack" {
            return Err(Self::refused(&first, 400));
        }
        offset_of(&first);
        Ok(())
    }

    /// Sends chunks within the server's window, then the end, and waits for it to be acknowledged.
    pub fn upload_here<'a>(
        &self,
        form: &Form,
        chunks: impl Iterator<Item = &'a [u8]>,
    ) -> Result<(), Refused> {
        self.announce(form)?;
        let (mut sent, mut acked) = (0_u64, 0_u64);
        let mut take_ack = |sent: u64, wait: bool| -> Result<Option<u64>, Refused> {
            let msg = match wait {
                true => self.next(),
                false => {
                    match self.device.try_take(Duration::ZERO, |m| m.sid.as_deref() == Some(&self.sid)) {
                        Some(msg) => msg.expect("a link"),
                        None => return Ok(None),
                    }
                }
            };
            if (msg.proto, msg.typ.as_str()) == (CONTROL, "ping") {
                self.send(CONTROL, "pong", None, b"");
                return Ok(Some(acked));
            }
            if msg.typ != "ack" {
                return Err(Self::refused(&msg, 400));
            }
            let offset = offset_of(&msg);
            assert!(offset <= sent, "an ack of {offset} when {sent} were sent");
            assert!(offset > acked, "acks must rise: {offset} after {acked}");
            acked = offset;
            Ok(Some(acked))
        };
        let mut last = 0;
        for chunk in chunks {
            self.send(FILES, "file_chunk", Some(sent), chunk);
            sent += chunk.len() as u64;
            while let Some(ack) = take_ack(sent, sent > last + WINDOW)? {
                last = ack;
            }
        }
        assert!(last < sent || sent == 0, "data was acknowledged to the end before the end");
        self.send(FILES, "file_chunk", Some(sent), b"");
        while last < sent {
            last = take_ack(sent, true)?.unwrap_or(last);
        }
        Ok(())
    }
}

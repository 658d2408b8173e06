//! Frames of file transfer: `stat` → `file_info`; `get_file` and `put_file`, then `file_chunk` one way (an empty one is
//! the end of the file) and `ack` the other; `error`, which ends a transfer.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rmp::encode;

use super::msgpack::{Cursor, DecodeError, Value};
use super::{FILE_TRANSFER, Frame, Map, SessionId};

pub const STAT: &str = "stat";
pub(crate) const FILE_INFO: &str = "file_info";
pub const GET_FILE: &str = "get_file";
pub const PUT_FILE: &str = "put_file";
pub(crate) const FILE_CHUNK: &str = "file_chunk";
pub(crate) const ACK: &str = "ack";
pub(crate) const ERROR: &str = "error";

/// The kernel's PATH_MAX in bytes, including the terminating NUL.
const PATH_MAX: usize = 4096;

const OFFSET: &str = "offset";

/// Body of `stat`, `get_file` and `put_file`. Only `put_file` has more than a path.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Request {
    pub path: PathBuf,
    /// Name at the source, used if `path` is a directory.
    pub src_path: Option<PathBuf>,
    pub size: Option<u64>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    /// As in chmod(2).
    pub mode: Option<u32>,
}

impl Request {
    /// The error goes to the client.
    pub fn decode(body: &[u8]) -> Result<Self, String> {
        let request = Self::parse(body).map_err(|e| format!("malformed request parameters: {e}"))?;
        let too_long = |path: &PathBuf| path.as_os_str().len() >= PATH_MAX;
        let fault = match &request {
            Request { path, .. } if path.as_os_str().is_empty() => "path: cannot be blank",
            Request { path, .. } if too_long(path) => "path: the length must be below 4096",
            Request { src_path: Some(path), .. } if too_long(path) => {
                "src_path: the length must be below 4096"
            }
            _ => return Ok(request),
        };
        Err(format!("invalid request parameters: {fault}."))
    }

    fn parse(body: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor { rest: body };
        let mut request = Request::default();
        for _ in 0..cursor.map("the body")?.unwrap_or(0) {
            match cursor.value()? {
                Value::Blob(b"path") => request.path = path(&mut cursor, "path")?.unwrap_or_default(),
                Value::Blob(b"src_path") => request.src_path = path(&mut cursor, "src_path")?,
                Value::Blob(b"size") => request.size = cursor.int("size")?,
                Value::Blob(b"uid") => request.uid = cursor.int("uid")?,
                Value::Blob(b"gid") => request.gid = cursor.int("gid")?,
                Value::Blob(b"mode") => request.mode = cursor.int("mode")?,
                _ => cursor.skip(1)?,
            }
        }
        Ok(request)
    }
}

/// A path need not be UTF-8.
fn path(cursor: &mut Cursor<'_>, what: &'static str) -> Result<Option<PathBuf>, DecodeError> {
    Ok(cursor.blob(what)?.map(|bytes| OsString::from_vec(bytes.to_vec()).into()))
}

/// Go's `os.FileMode`, by which clients recognise regular files.
pub(crate) fn go_mode(mode: u32) -> u32 {
    const DEVICE: u32 = 1 << 26;
    let kind = match mode & 0o170_000 {
        0o100_000 => 0,
        0o040_000 => 1 << 31, // directory
        0o120_000 => 1 << 27, // symbolic link
        0o060_000 => DEVICE,
        0o020_000 => DEVICE | 1 << 21, // character device
        0o010_000 => 1 << 25,          // named pipe
        0o140_000 => 1 << 24,          // socket
        _ => 1 << 19,                  // irregular
    };
    // Set-uid, set-gid, sticky.
    let bits = [(0o4000, 1 << 23), (0o2000, 1 << 22), (0o1000, 1 << 20)];
    bits.iter().filter(|(bit, _)| mode & bit != 0).fold(kind | mode & 0o777, |all, (_, bit)| all | bit)
}

/// Msgpack's timestamp extension, in the shortest of its three forms.
fn timestamp(out: &mut Vec<u8>, (seconds, nanoseconds): (i64, u32)) -> Result<(), encode::ValueWriteError> {
    let bytes = match u64::try_from(seconds) {
        Ok(s) if nanoseconds == 0 && s <= u64::from(u32::MAX) => (s as u32).to_be_bytes().to_vec(),
        Ok(s) if s < 1 << 34 => (u64::from(nanoseconds) << 34 | s).to_be_bytes().to_vec(),
        _ => [&nanoseconds.to_be_bytes()[..], &seconds.to_be_bytes()].concat(),
    };
    encode::write_ext_meta(out, bytes.len() as u32, -1)?;
    out.extend(bytes);
    Ok(())
}

/// `modified` in seconds and nanoseconds.
pub(crate) fn file_info(
    sid: &SessionId,
    path: &Path,
    size: i64,
    (uid, gid): (u32, u32),
    mode: u32,
    modified: (i64, u32),
) -> Frame {
    let path = path.as_os_str().as_bytes();
    let body = Map::new()
        // Bytes, UTF-8 or not, as Go's strings may be.
        .with("path", |out| encode::write_str_len(out, path.len() as u32).map(|_| out.extend(path)))
        .with_i64("size", size)
        .with("uid", |out| encode::write_u32(out, uid))
        .with("gid", |out| encode::write_u32(out, gid))
        .with("mode", |out| encode::write_u32(out, go_mode(mode)))
        .with("modtime", |out| timestamp(out, modified))
        .finish();
    Frame::new(FILE_TRANSFER, FILE_INFO, Some(sid)).with_body(body)
}

fn at(offset: u64) -> Map {
    Map::new().with_i64(OFFSET, i64::try_from(offset).unwrap_or(i64::MAX))
}

/// Without a body it is the end of the file.
pub fn chunk(sid: &SessionId, offset: u64) -> Frame {
    Frame::new(FILE_TRANSFER, FILE_CHUNK, Some(sid)).with_props(at(offset))
}

/// Acknowledges all bytes before `offset`. Repeats `user`, as the reference agent does.
pub fn ack(sid: &SessionId, offset: u64, user: Option<&str>) -> Frame {
    Frame::new(FILE_TRANSFER, ACK, Some(sid)).with_props(at(offset).with_str("user_id", user))
}

/// Repeats only properties that the server can read, since it closes the link for others. `code` is an HTTP status, for
/// clients that asked the server over HTTP.
pub fn error(sid: &SessionId, cause: &Frame, text: &str, code: Option<u16>) -> Frame {
    let mut body = Map::new().with_str("err", text).with_cause(&cause.typ, cause.props.str("msgid"));
    if let Some(code) = code {
        body = body.with_int("code", code.into());
    }
    Frame::new(FILE_TRANSFER, ERROR, Some(sid)).with_props(cause.props.readable()).with_body(body.finish())
}

/// `None` if absent, an error if it is no number of bytes.
pub fn offset(frame: &Frame) -> Option<Result<u64, ()>> {
    frame.props.has(OFFSET).then(|| frame.props.int(OFFSET).and_then(|n| u64::try_from(n).ok()).ok_or(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_leniently() {
        let body = b"\x87\xa8src_path\xa1s\xa4path\xc4\x03/\xff\x01\xa4size\xcd\x01\x00\xa3uid\xc0\xa3gid\xd3\0\0\0\0\0\0\0\x07\xa4mode\xce\0\0\x01\xa0\xa7modtime\xd7\xff\x1do4TeS\xf1\x00";
        let request = Request::decode(body).unwrap();
        assert_eq!(request.path.as_os_str().as_encoded_bytes(), b"/\xff\x01");
        assert_eq!(request.src_path, Some("s".into()));
        assert_eq!((request.size, request.uid, request.gid), (Some(256), None, Some(7)));
        assert_eq!(request.mode, Some(0o640));
    }

    #[test]
    fn bad_requests_have_their_texts() {
        let error = |body: &[u8]| Request::decode(body).unwrap_err();
        assert_eq!(error(b"\x80"), "invalid request parameters: path: cannot be blank.");
        assert_eq!(error(b"\x81\xa4path\xc0"), "invalid request parameters: path: cannot be blank.");
        assert!(error(b"").starts_with("malformed request parameters: "));
        assert!(error(b"\x81\xa4path\x01").starts_with("malformed request parameters: "));
        assert!(error(b"\x82\xa4path\xa1x\xa3uid\xff").starts_with("malformed request parameters: "));
    }

    #[test]
    fn paths_end_where_the_kernels_do() {
        let request = |key, n| {
            let body = Map::new().with_str("path", "/p").with_str(key, "p".repeat(n).as_str());
            Request::decode(&body.finish()).map(drop)
        };
        for key in ["path", "src_path"] {
            assert_eq!(request(key, 4095), Ok(()));
            let refused = format!("invalid request parameters: {key}: the length must be below 4096.");
            assert_eq!(request(key, 4096), Err(refused));
        }
    }

    #[test]
    fn errors_give_back_what_can_be_read() {
        let error = |props: &[u8]| {
            let message = [b"\x81\xa3hdr\x82\xa5proto\x02\xa5props", props].concat();
            let cause = Frame::decode(&message.into()).unwrap();
            error(&SessionId::new("s").unwrap(), &cause, "no", None).props
        };
        let good = Map::new().with_str("user_id", "u").with_i64("offset", 7);
        assert_eq!(error(b"\x82\xa7user_id\xa1u\xa6offset\xd3\0\0\0\0\0\0\0\x07"), good);
        // Names that are a number, no UTF-8, a map; values that are a map, an extension; at last a name that is bin.
        let strange = b"\x87\x70\xa1u\xa7user_i\xfe\xa1u\x81\x01\x02\xc0\xa1m\x81\x01\x02\xa1x\xd4\x05\x00\
            \xa7user_id\xa1u\xc4\x06offset\xd3\0\0\0\0\0\0\0\x07";
        assert_eq!(error(strange), good);
        assert!(error(b"\x81\x01\x02").is_empty());
        assert!(error(b"\xc0").is_empty());
    }

    #[test]
    fn modes_as_go_has_them() {
        for (posix, go) in [
            (0o100_644, 0o644),
            (0o041_777, 0x8010_01ff),
            (0o120_777, 1 << 27 | 0o777),
            (0o010_600, 1 << 25 | 0o600),
            (0o020_620, 1 << 26 | 1 << 21 | 0o620),
            (0o060_660, 1 << 26 | 0o660),
            (0o140_755, 1 << 24 | 0o755),
            (0o106_755, 1 << 23 | 1 << 22 | 0o755),
        ] {
            assert_eq!(go_mode(posix), go, "{posix:o}");
        }
    }

    #[test]
    fn times_beyond_the_short_forms() {
        let form = |time| {
            let mut out = Vec::new();
            timestamp(&mut out, time).unwrap();
            out
        };
        assert_eq!(form((1 << 31, 0)), b"\xd6\xff\x80\0\0\0");
        assert_eq!(form((1 << 33, 0))[..2], *b"\xd7\xff");
        assert_eq!(form((-1, 5)), b"\xc7\x0c\xff\0\0\0\x05\xff\xff\xff\xff\xff\xff\xff\xff");
        assert_eq!(form((1 << 34, 0))[..3], *b"\xc7\x0c\xff");
    }
}

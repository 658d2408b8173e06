//! One HTTP/1.1 request and the head of its answer: for a tunnel, an upgrade and `doctor`.

use std::io::{self, ErrorKind, Read, Write};
use std::time::{Duration, UNIX_EPOCH};

use log::warn;
use sha1::{Digest, Sha1};
use tungstenite::Error;
use tungstenite::error::ProtocolError;

use super::endpoint::{Endpoint, PATH, USER_AGENT};
use super::error::LinkError;
use crate::auth::Token;
use crate::encoding::base64;
use crate::sys::clock;

/// Cookies and policies of gateways add up to 60 KiB and more.
pub(super) const MAX_HEAD: usize = 128 * 1024;
/// Interim answers such as "103 Early Hints", as in Go's client.
const MAX_INTERIM: usize = 5;
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);

const UPGRADE: &str =
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ";
const ACCEPT: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// The fields that the agent uses. Never show other text of an answer: the server may echo the token.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(super) status: u16,
    /// Since 1970.
    pub(crate) date: Option<Duration>,
    pub(crate) redirects_to_https: bool,
    /// From an answer 429 or 503; at most an hour.
    retry_after: Option<Duration>,
    /// Sec-WebSocket-Accept, if the other headers fit a websocket.
    accept: Option<String>,
    /// The server chose a subprotocol, though none was offered.
    has_subprotocol: bool,
}

impl Answer {
    /// `None` if it is no HTTP. Accepts bare line feeds, as Go does.
    fn parse(head: &str) -> Option<Self> {
        let mut lines = head.lines();
        let status =
            lines.next()?.strip_prefix("HTTP/1.")?.split(' ').skip(1).find(|word| !word.is_empty())?;
        let status = status.parse().ok().filter(|_| status.len() == 3)?;
        // Continuation lines (RFC 9112, 5.2); no header read here is that long.
        let lines = lines.filter(|line| !line.is_empty() && !line.starts_with([' ', '\t']));
        // A space before the colon makes it another header, as in Go.
        let headers: Vec<(&str, &str)> = lines.map(|line| line.split_once(':')).collect::<Option<_>>()?;
        let all = |wanted: &'static str| {
            let found = headers.iter().filter(move |(name, _)| name.eq_ignore_ascii_case(wanted));
            found.map(|(_, value)| value.trim())
        };
        let header = |name| all(name).next();
        let lists = |name, wanted| {
            all(name).flat_map(|list| list.split(',')).any(|value| value.trim().eq_ignore_ascii_case(wanted))
        };
        let is_websocket = lists("Upgrade", "websocket") && lists("Connection", "Upgrade");
        let date = header("Date").and_then(since_1970);
        let wait = |value| retry_after(value, date.unwrap_or_else(clock::now));
        Some(Answer {
            status,
            date,
            redirects_to_https: header("Location").is_some_and(|place| place.starts_with("https:")),
            retry_after: header("Retry-After").filter(|_| matches!(status, 429 | 503)).and_then(wait),
            accept: header("Sec-WebSocket-Accept").filter(|_| is_websocket).map(str::to_owned),
            has_subprotocol: header("Sec-WebSocket-Protocol").is_some(),
        })
    }

    /// Verifies the upgrade for a request with this key (RFC 6455, 4.1). Without a key any answer is a refusal.
    pub(super) fn accepts(&self, key: Option<&str>) -> Result<(), LinkError> {
        let Some(key) = key.filter(|_| self.status == 101) else {
            return Err(LinkError::Refused { status: self.status, retry_after: self.retry_after });
        };
        let expected = base64(&Sha1::new().chain_update(key).chain_update(ACCEPT).finalize());
        let fault = match &self.accept {
            Some(accept) if *accept == expected => {
                if self.has_subprotocol {
                    warn!("the server chose a subprotocol, though none was offered: it is ignored");
                }
                return Ok(());
            }
            Some(_) => ProtocolError::SecWebSocketAcceptKeyMismatch,
            None => ProtocolError::MissingUpgradeWebSocketHeader,
        };
        Err(LinkError::Broken(Error::Protocol(fault).to_string()))
    }
}

fn since_1970(date: &str) -> Option<Duration> {
    httpdate::parse_http_date(date).ok()?.duration_since(UNIX_EPOCH).ok()
}

/// `now` by the server's clock, if it tells: this device's may be wrong.
fn retry_after(value: &str, now: Duration) -> Option<Duration> {
    let wait = match value.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => since_1970(value.trim())?.saturating_sub(now),
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

fn no_http() -> io::Error {
    io::Error::new(ErrorKind::InvalidData, "the answer is no HTTP")
}

/// Reads the head byte by byte: what follows belongs to the tunnel or the websocket.
pub(super) fn ask(mut stream: impl Read + Write, request: &str) -> io::Result<Answer> {
    stream.write_all(request.as_bytes())?;
    for _ in 0..=MAX_INTERIM {
        let answer = Answer::parse(&read_head(&mut stream)?).ok_or_else(no_http)?;
        if !matches!(answer.status, 100 | 102..=199) {
            return Ok(answer);
        }
    }
    Err(io::Error::other("the answer is too long"))
}

fn read_head(stream: &mut impl Read) -> io::Result<String> {
    let mut head = Vec::new();
    while head.len() < MAX_HEAD {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 {
            return Err(io::Error::new(ErrorKind::UnexpectedEof, "closed without an answer"));
        }
        head.push(byte[0]);
        // Recognise other protocols at their first bytes: they may send no more.
        if !head.starts_with(b"HTTP/1.") && !b"HTTP/1.".starts_with(&head) {
            return Err(no_http());
        }
        if head.ends_with(b"\n\n") || head.ends_with(b"\n\r\n") {
            return Ok(String::from_utf8_lossy(&head).into_owned());
        }
    }
    Err(io::Error::other("the answer is too long"))
}

/// Without a key it asks for no websocket: the server judges the token, then refuses. Contains the token.
pub(super) fn request(server: &Endpoint, token: &Token, key: Option<&str>) -> Result<String, LinkError> {
    let token = token.reveal();
    if !token.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\t')) {
        return Err(LinkError::Token);
    }
    let host = server.host_header();
    let headers = key.map_or_else(|| "Connection: close".to_owned(), |key| format!("{UPGRADE}{key}"));
    Ok(format!(
        "GET {PATH} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\nUser-Agent: {USER_AGENT}\r\n\
         {headers}\r\n\r\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(head: &str) -> Answer {
        Answer::parse(head).unwrap()
    }

    #[test]
    fn retry_after_in_both_forms() {
        let wait = |status: u16, value: &str| {
            answer(&format!("HTTP/1.1 {status} x\r\nretry-after: {value}\r\n\r\n")).retry_after
        };
        assert_eq!(wait(503, "17"), Some(Duration::from_secs(17)));
        assert_eq!(wait(429, " 99999999 "), Some(LONGEST_RETRY_AFTER));
        assert_eq!(wait(401, "17"), None);
        assert_eq!(wait(503, "soon"), None);
        assert_eq!(wait(503, "Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let date = httpdate::fmt_http_date(UNIX_EPOCH + clock::now() + Duration::from_secs(100));
        let left = wait(503, &date).unwrap().as_secs();
        assert!((98..=100).contains(&left), "{left}");
        // A device that boots in 1970 waited for an hour.
        let date = "Sat, 06 Nov 2094 08:49:20 GMT\r\nDate: Sat, 06 Nov 2094 08:49:03 GMT";
        assert_eq!(wait(503, date), Some(Duration::from_secs(17)));
    }

    #[test]
    fn a_websocket_is_one_by_all_its_headers() {
        // The key and its answer of RFC 6455, 1.3.
        let (key, accept) =
            ("dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n");
        let upgrade = "upgrade: WebSocket\r\nConnection: keep-alive, upgrade\r\n";
        let error = |status: u16, headers: &[&str]| {
            let answer = answer(&format!("HTTP/1.1 {status} x\r\n{}\r\n", headers.concat()));
            answer.accepts(Some(key)).map_err(|e| e.to_string())
        };
        assert_eq!(error(101, &[upgrade, accept]), Ok(()));
        let apart = "UPGRADE: h2c\r\nupgrade: websocket\r\nCONNECTION: keep-alive\r\nconnection: UPGRADE\r\n";
        assert_eq!(error(101, &[apart, accept, "Sec-WebSocket-Protocol: x\r\n"]), Ok(()));
        for (status, headers, why) in [
            (200, &[upgrade, accept][..], "HTTP status 200"),
            (101, &[accept], "Upgrade: websocket"),
            (101, &["Upgrade: websocket\r\n", accept], "Upgrade: websocket"),
            (101, &[upgrade], "Upgrade: websocket"),
            (101, &[upgrade, "Sec-WebSocket-Accept: x\r\n"], "Sec-WebSocket-Accept"),
        ] {
            let error = error(status, headers).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    /// The stream's answer, and what is left of the stream.
    fn asked(bytes: &str) -> (Result<u16, String>, String) {
        let mut stream = std::io::Cursor::new(bytes.as_bytes().to_vec());
        // Nothing is sent.
        let answer = ask(Deaf(&mut stream), "").map(|answer| answer.status).map_err(|e| e.to_string());
        let mut rest = String::new();
        stream.read_to_string(&mut rest).unwrap();
        (answer, rest)
    }

    struct Deaf<'a>(&'a mut std::io::Cursor<Vec<u8>>);

    impl Read for Deaf<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for Deaf<'_> {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn heads_are_read_as_go_reads_them() {
        let many = "X: y\r\n".repeat(300);
        let interim = "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n";
        for (head, answer) in [
            ("HTTP/1.1 200 OK\r\nA: b\r\n\r\n", Ok(200)),
            ("HTTP/1.0 200\nA: b\n\n", Ok(200)),
            ("HTTP/1.0  200  OK\r\n\r\n", Ok(200)),
            ("HTTP/1.1 200 OK\r\nA: b\r\n folded\r\n\r\n", Ok(200)),
            ("HTTP/1.1 200 OK\r\nA : b\r\n\r\n", Ok(200)),
            (&format!("HTTP/1.1 101 x\r\n{many}\r\n"), Ok(101)),
            (&format!("HTTP/1.1 100 Continue\r\n\r\n{interim}HTTP/1.1 101 x\r\n\r\n"), Ok(101)),
            (&interim.repeat(MAX_INTERIM + 1), Err("the answer is too long")),
            ("HTTP/1.1 200 OK\r\nA: b\r\n", Err("closed without an answer")),
            ("HTTP/1.1 200 OK\r\nno header\r\n\r\n", Err("the answer is no HTTP")),
            ("HTTP/1.1 OK\r\n\r\n", Err("the answer is no HTTP")),
            ("HTTP/2 200\r\n\r\n", Err("the answer is no HTTP")),
        ] {
            assert_eq!(asked(head).0, answer.map_err(str::to_owned), "{head}");
        }
        assert_eq!(asked("HTTP/1.1 101 x\n\nrest"), (Ok(101), "rest".to_owned()));
        assert_eq!(asked("220 ready"), (Err("the answer is no HTTP".to_owned()), "20 ready".to_owned()));
        assert!(asked(&format!("HTTP/1.1 200 {}", "x".repeat(MAX_HEAD))).0.unwrap_err().contains("too long"));
    }
}

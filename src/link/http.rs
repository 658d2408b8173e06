//! One HTTP/1.1 request and the head of its answer, for the proxy's tunnel, the websocket's upgrade and `doctor`.

use std::io::{Read, Write};
use std::time::{Duration, UNIX_EPOCH};

use tungstenite::Error;
use tungstenite::error::ProtocolError;
use tungstenite::handshake::derive_accept_key;

use super::endpoint::{Endpoint, PATH, USER_AGENT};
use super::error::{AnswerFault, LinkError};
use crate::auth::Token;
use crate::sys::clock;

/// In bytes.
const MAX_HEAD: usize = 16 * 1024;
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(3600);

const UPGRADE: &str =
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: ";

/// The parts of an answer's head that the agent uses. None of its texts is shown: the server may echo the token.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(super) status: u16,
    /// Since 1970.
    pub(crate) date: Option<Duration>,
    pub(crate) redirects_to_https: bool,
    /// Retry-After of an answer 429 or 503, at most an hour.
    retry_after: Option<Duration>,
    /// Sec-WebSocket-Accept, if the other headers are a websocket's.
    accept: Option<String>,
}

impl Answer {
    fn new(status: u16, headers: &[httparse::Header<'_>]) -> Self {
        let header = |name: &str| {
            let found = headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
            std::str::from_utf8(found.value).ok()
        };
        let lists = |name, wanted| {
            header(name).is_some_and(|list| list.split(',').any(|v| v.trim().eq_ignore_ascii_case(wanted)))
        };
        let is_websocket = lists("Upgrade", "websocket")
            && lists("Connection", "Upgrade")
            && header("Sec-WebSocket-Protocol").is_none();
        Answer {
            status,
            date: header("Date").and_then(since_1970),
            redirects_to_https: header("Location").is_some_and(|place| place.starts_with("https:")),
            retry_after: header("Retry-After").filter(|_| matches!(status, 429 | 503)).and_then(retry_after),
            accept: header("Sec-WebSocket-Accept").filter(|_| is_websocket).map(str::to_owned),
        }
    }

    /// Checks that the server opens a websocket for the request with this key (RFC 6455, 4.1). Without one it is refused.
    pub(super) fn accepts(&self, key: Option<&str>) -> Result<(), LinkError> {
        let Some(key) = key.filter(|_| self.status == 101) else {
            return Err(LinkError::Refused { status: self.status, retry_after: self.retry_after });
        };
        let fault = match &self.accept {
            Some(accept) if *accept == derive_accept_key(key.as_bytes()) => return Ok(()),
            Some(_) => ProtocolError::SecWebSocketAcceptKeyMismatch,
            None => ProtocolError::MissingUpgradeWebSocketHeader,
        };
        Err(LinkError::Broken(Error::Protocol(fault).to_string()))
    }
}

fn since_1970(date: &str) -> Option<Duration> {
    httpdate::parse_http_date(date).ok()?.duration_since(UNIX_EPOCH).ok()
}

fn retry_after(value: &str) -> Option<Duration> {
    let wait = match value.trim().parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => since_1970(value.trim())?.saturating_sub(clock::now()),
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

/// Sends a request and reads its answer's head, byte by byte: what follows belongs to the tunnel or the websocket.
pub(super) fn ask(mut stream: impl Read + Write, request: &str) -> Result<Answer, AnswerFault> {
    stream.write_all(request.as_bytes())?;
    let mut head = Vec::new();
    while head.len() < MAX_HEAD {
        let mut byte = [0];
        if stream.read(&mut byte)? == 0 {
            return Err(AnswerFault::Closed);
        }
        head.push(byte[0]);
        // Another protocol is recognised at its first bytes, since it may send no more of them.
        if byte == *b"\n" || head.len() == "HTTP/1.1".len() {
            let mut headers = [httparse::EMPTY_HEADER; 64];
            let mut response = httparse::Response::new(&mut headers);
            match response.parse(&head) {
                Ok(httparse::Status::Partial) => {}
                Ok(_) => return Ok(Answer::new(response.code.unwrap_or(0), response.headers)),
                Err(_) => return Err(AnswerFault::NotHttp),
            }
        }
    }
    Err(AnswerFault::TooLong)
}

/// Asks the server for a websocket with this key. Without one it asks for none: the server judges the token, then
/// refuses. The text contains the token.
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
        let mut headers = [httparse::EMPTY_HEADER; 8];
        let mut response = httparse::Response::new(&mut headers);
        assert!(response.parse(head.as_bytes()).unwrap().is_complete());
        Answer::new(response.code.unwrap(), response.headers)
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
        for (status, headers, why) in [
            (200, &[upgrade, accept][..], "HTTP status 200"),
            (101, &[accept], "Upgrade: websocket"),
            (101, &["Upgrade: websocket\r\n", accept], "Upgrade: websocket"),
            (101, &[upgrade], "Upgrade: websocket"),
            (101, &[upgrade, accept, "Sec-WebSocket-Protocol: x\r\n"], "Upgrade: websocket"),
            (101, &[upgrade, "Sec-WebSocket-Accept: x\r\n"], "Sec-WebSocket-Accept"),
        ] {
            let error = error(status, headers).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }
}

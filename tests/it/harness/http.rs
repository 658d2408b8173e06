//! Just enough HTTP/1.1 to be a websocket server and a proxy: one request head, one response head.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    pub at: Instant,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

/// Reads up to the empty line, byte by byte so that nothing behind it is consumed.
pub fn read_request(stream: &mut TcpStream) -> Result<Request, String> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).map_err(|e| e.to_string())?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err("closed before the request was complete".to_owned()),
            // As web servers do, which don't wait for the end of a line of TLS.
            Ok(_) if head.is_empty() && !byte[0].is_ascii_alphabetic() => return Err("no HTTP".to_owned()),
            Ok(_) => head.push(byte[0]),
            Err(e) => return Err(format!("reading the request: {e}")),
        }
        if head.len() > 64 << 10 {
            return Err("an endless request".to_owned());
        }
    }
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Request::new(&mut headers);
    parsed.parse(&head).map_err(|e| format!("malformed request: {e}"))?;
    Ok(Request {
        method: parsed.method.unwrap_or_default().to_owned(),
        path: parsed.path.unwrap_or_default().to_owned(),
        headers: parsed
            .headers
            .iter()
            .map(|h| (h.name.to_owned(), String::from_utf8_lossy(h.value).into_owned()))
            .collect(),
        at: Instant::now(),
    })
}

fn head(status: u16, headers: &[(String, String)]) -> String {
    let mut text = format!("HTTP/1.1 {status} Scripted\r\n");
    for (key, value) in headers {
        text.push_str(&format!("{key}: {value}\r\n"));
    }
    text
}

/// Writes a response head, each byte in a segment of its own.
pub fn respond_slowly(stream: &mut TcpStream, status: u16, headers: &[(String, String)]) {
    let _ = stream.set_nodelay(true);
    for byte in format!("{}\r\n", head(status, headers)).bytes() {
        let _ = stream.write_all(&[byte]);
    }
}

/// Writes a response head, and a body when there is one.
pub fn respond(stream: &mut TcpStream, status: u16, headers: &[(String, String)], body: Option<&str>) {
    let mut text = head(status, headers);
    if let Some(body) = body {
        text.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    } else {
        text.push_str("\r\n");
    }
    // A device that has gone meanwhile is the test's business, not ours.
    let _ = stream.write_all(text.as_bytes());
}

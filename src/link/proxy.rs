//! HTTP and SOCKS5 proxies, configured by the environment.

use std::io::{self, ErrorKind, Read, Write};
use std::net::IpAddr;

use percent_encoding::percent_decode_str;

use super::endpoint::{Endpoint, USER_AGENT};
use super::error::LinkError;
use super::http;
use crate::encoding::base64;
use crate::sys::net::contains;
use crate::sys::reason;

/// For http, for https, exceptions.
pub(crate) const PROXY_VARIABLES: [&str; 6] =
    ["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"];

pub(super) struct Proxy {
    pub(super) endpoint: Endpoint,
    pub(super) kind: Kind,
    login: Option<(Vec<u8>, Vec<u8>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// CONNECT (RFC 9110, 9.3.6).
    Http,
    /// RFC 1928, and RFC 1929 for user and password.
    Socks5,
}

/// RFC 1928, section 6; from code 1 on.
const SOCKS_FAULTS: [&str; 8] = [
    "general SOCKS server failure",
    "connection not allowed by ruleset",
    "network unreachable",
    "host unreachable",
    "connection refused",
    "TTL expired",
    "command not supported",
    "address type not supported",
];

/// By these variables, as curl and Go read them. `None` for the device itself, where mender-auth's forwarder listens.
pub(super) fn proxy_for(
    server: &Endpoint,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<Proxy>, LinkError> {
    let set = |at: usize| {
        let mut values = [at, at + 3].into_iter().filter_map(|at| variable(PROXY_VARIABLES[at]));
        values.find(|value| !value.trim().is_empty())
    };
    let exceptions = set(2).unwrap_or_default();
    let mut exceptions = exceptions.split(',').map(str::trim).filter(|entry| !entry.is_empty());
    let direct = server.is_loopback() || exceptions.any(|entry| covers(entry, server));
    set(server.tls.into()).filter(|_| !direct).map(|url| Proxy::parse(&url)).transpose()
}

/// NO_PROXY entries: `*`, an address, a network, a name (covers its subdomains), or a name after a dot or `*.` (covers
/// only those). All but networks may have a port; IPv6 is in brackets if and only if it has one.
fn covers(entry: &str, server: &Endpoint) -> bool {
    let (entry, host) = (entry.to_ascii_lowercase(), server.host.to_ascii_lowercase());
    let address = server.address();
    if entry == "*" {
        return true;
    }
    if let Some((network, prefix)) = entry.split_once('/')
        && let (Ok(network), Ok(prefix)) = (network.parse(), prefix.parse())
    {
        return address.is_some_and(|address| contains(network, prefix, address));
    }
    let (name, port) = match entry.strip_prefix('[') {
        Some(entry) => entry.split_once("]:"),
        None => entry.split_once(':').filter(|(_, port)| !port.contains(':')),
    }
    .unwrap_or((&entry, ""));
    if name.is_empty() || !(port.is_empty() || port.parse() == Ok(server.port)) {
        return false;
    }
    if let Ok(exception) = name.parse::<IpAddr>() {
        return address == Some(exception.to_canonical());
    }
    match name.strip_prefix('*').unwrap_or(name) {
        below if below.starts_with('.') => host.ends_with(below),
        _ => host.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
    }
}

impl Proxy {
    fn parse(url: &str) -> Result<Self, LinkError> {
        let bad = |what: &str| LinkError::Proxy(format!("the proxy's URL has {what}"));
        let url = url.trim();
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let (scheme, login, endpoint) = Endpoint::split(&url).map_err(bad)?;
        let kind = match &*scheme {
            "http" => Kind::Http,
            // As in Go, the proxy resolves names for both.
            "socks5" | "socks5h" => Kind::Socks5,
            _ => return Err(bad("a scheme other than http, socks5 and socks5h")),
        };
        let login = login.map(|login| login.split_once(':').unwrap_or((login, "")));
        let login = login
            .map(|(user, word)| (percent_decode_str(user).collect(), percent_decode_str(word).collect()));
        Ok(Proxy { endpoint, kind, login })
    }

    pub(super) fn tunnel(&self, stream: impl Read + Write, server: &Endpoint) -> Result<(), LinkError> {
        let result = match self.kind {
            Kind::Http => self.connect(stream, server),
            Kind::Socks5 => self.socks(stream, server),
        };
        result.map_err(|e| {
            let closed = e.kind() == ErrorKind::UnexpectedEof;
            let reason = if closed { "closed the connection".to_owned() } else { reason(&e) };
            LinkError::Proxy(format!("{}: {reason}", self.endpoint.authority()))
        })
    }

    fn connect(&self, stream: impl Read + Write, server: &Endpoint) -> io::Result<()> {
        let target = server.target();
        let authorization = self.login.as_ref().map_or_else(String::new, |(user, word)| {
            format!("Proxy-Authorization: Basic {}\r\n", base64(&[user, &b":"[..], word].concat()))
        });
        let request = format!(
            "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: {USER_AGENT}\r\n{authorization}\r\n"
        );
        match http::ask(stream, &request)?.status {
            200..=299 => Ok(()),
            status => Err(io::Error::other(format!("answered with HTTP status {status}"))),
        }
    }

    fn socks(&self, mut stream: impl Read + Write, server: &Endpoint) -> io::Result<()> {
        let mut say = |bytes: &[&[u8]], answer: &mut [u8]| {
            stream.write_all(&bytes.concat()).and_then(|()| stream.read_exact(answer))
        };
        let fault = |reason: &str| io::Error::other(reason);
        let length =
            |text: &[u8]| u8::try_from(text.len()).map_err(|_| fault("a name is longer than 255 bytes"));
        let (mut answer, methods) = ([0; 2], if self.login.is_some() { &[0, 2][..] } else { &[0] });
        say(&[&[5, methods.len() as u8], methods], &mut answer)?;
        match (answer, &self.login) {
            ([5, 0], _) => {}
            ([5, 2], Some((user, word))) => {
                say(&[&[1, length(user)?], user, &[length(word)?], word], &mut answer)?;
                if answer[1] != 0 {
                    return Err(fault("user or password is wrong"));
                }
            }
            ([5, _], None) => return Err(fault("wants a user and a password")),
            ([5, _], Some(_)) => return Err(fault("takes no password")),
            _ => return Err(fault("is no SOCKS5 proxy")),
        }
        let host = server.bare_host().as_bytes();
        let place = match server.address() {
            Some(IpAddr::V4(address)) => [&[1], &address.octets()[..]].concat(),
            Some(IpAddr::V6(address)) => [&[4], &address.octets()[..]].concat(),
            None => [&[3, length(host)?], host].concat(),
        };
        // With the first byte of the bound address, which may be a length.
        let mut answer = [0; 5];
        say(&[&[5, 1, 0], &place, &server.port.to_be_bytes()], &mut answer)?;
        let [5, code, _, kind, first] = answer else { return Err(fault("is no SOCKS5 proxy")) };
        if code != 0 {
            let known = SOCKS_FAULTS.get(usize::from(code) - 1);
            return Err(
                known.map_or_else(|| fault(&format!("answered with code {code}")), |text| fault(text))
            );
        }
        let rest = match kind {
            1 => 3,
            4 => 15,
            _ => first.into(),
        };
        say(&[], &mut vec![0; rest + 2])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn host(set: &[(&str, &str)], url: &str) -> Option<String> {
        let variable = |name: &str| set.iter().find(|(k, _)| *k == name).map(|(_, v)| (*v).to_owned());
        let proxy = proxy_for(&Endpoint::parse(url).unwrap(), variable);
        proxy.ok().unwrap().map(|p| p.endpoint.authority())
    }

    #[test]
    fn each_scheme_has_its_proxy_and_loopback_has_none() {
        let both = [("HTTP_PROXY", "plain:3128"), ("https_proxy", "http://secure")];
        assert_eq!(host(&both, "http://example.com").as_deref(), Some("plain:3128"));
        assert_eq!(host(&both, "https://example.com").as_deref(), Some("secure:80"));
        for url in
            ["http://localhost:1", "http://127.0.0.1:1", "https://[::1]:1", "http://[::ffff:127.0.0.1]:1"]
        {
            assert_eq!(host(&both, url), None, "{url}");
        }
        assert_eq!(host(&[("HTTP_PROXY", "p:1")], "https://example.com"), None);
        let upper = [("https_proxy", "lower"), ("HTTPS_PROXY", "upper")];
        assert_eq!(host(&upper, "https://example.com").as_deref(), Some("upper:80"));
        let empty = [("https_proxy", "lower"), ("HTTPS_PROXY", " ")];
        assert_eq!(host(&empty, "https://example.com").as_deref(), Some("lower:80"));
    }

    #[test]
    fn exceptions() {
        let except = |list| [("HTTP_PROXY", "p:1"), ("NO_PROXY", list)];
        for (list, server, direct) in [
            ("*", "http://example.com", true),
            ("example.com", "http://example.com", true),
            ("example.com", "http://a.Example.com", true),
            ("example.com", "http://badexample.com", false),
            (".example.com", "http://a.example.com", true),
            (".example.com", "http://example.com", false),
            ("other, example.com:8080", "http://example.com:8080", true),
            ("example.com:8080", "http://example.com", false),
            ("10.0.0.0/8", "http://10.1.2.3", true),
            ("10.0.0.0/8", "http://11.1.2.3", false),
            ("fe80::/10", "http://[fe80::1]", true),
            ("0.0.0.0/0", "http://8.8.8.8", true),
            ("10.1.2.3", "http://10.1.2.3:99", true),
            ("[fe80::1]:99", "http://[fe80::1]:99", true),
            ("fe80::1", "http://[fe80::1]:99", true),
            ("10.0.0.0/99,,/", "http://10.0.0.1", false),
            ("*.example.com", "http://a.example.com", true),
            ("*.example.com", "http://example.com", false),
            (".example.com:80", "http://a.example.com", true),
            ("example.com:", "http://example.com:8080", true),
            (":80", "http://example.com", false),
            ("EXAMPLE.com", "http://example.COM", true),
            ("10.1.2.3:80", "http://10.1.2.3:81", false),
            ("::ffff:10.1.2.3", "http://10.1.2.3", true),
            ("[fe80::1]", "http://[fe80::1]", false),
            ("fe80::1", "http://[fe80::1%25lo]", true),
            ("2001:db8::/32", "http://[2001:db8::1]", true),
        ] {
            assert_eq!(host(&except(list), server).is_none(), direct, "{list} and {server}");
        }
    }

    struct Peer {
        answer: Cursor<Vec<u8>>,
        asked: Vec<u8>,
    }

    impl Read for Peer {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.answer.read(buffer)
        }
    }

    impl Write for Peer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.asked.write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn ask(proxy: &str, server: &str, answer: &[u8]) -> (Result<(), String>, Vec<u8>, usize) {
        let mut peer = Peer { answer: Cursor::new(answer.into()), asked: Vec::new() };
        let server = Endpoint::parse(server).unwrap();
        let result = Proxy::parse(proxy).ok().unwrap().tunnel(&mut peer, &server).map_err(|e| e.to_string());
        (result, peer.asked, peer.answer.position() as usize)
    }

    #[test]
    fn a_tunnel_takes_only_the_answer_from_the_stream() {
        let answer = "HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n";
        let tunnel = format!("{answer}tunnel");
        let (result, asked, taken) =
            ask("http://us%40er:p%3Aw@proxy", "https://example.com", tunnel.as_bytes());
        assert_eq!((result, taken), (Ok(()), answer.len()));
        let login = base64(b"us@er:p:w");
        let wanted = format!(
            "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\nUser-Agent: {USER_AGENT}\r\nProxy-Authorization: Basic {login}\r\n\r\n"
        );
        assert_eq!(String::from_utf8(asked).unwrap(), wanted);
    }

    #[test]
    fn refusals_are_told() {
        let error = |answer: &str| ask("proxy:1", "https://example.com", answer.as_bytes()).0.unwrap_err();
        assert_eq!(
            error("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"),
            "proxy: proxy:1: answered with HTTP status 407"
        );
        assert_eq!(error("HTTP/1.1 200"), "proxy: proxy:1: closed the connection");
        assert_eq!(error("220 ftp ready\r\n\r\n"), "proxy: proxy:1: the answer is no HTTP");
        let long = format!("HTTP/1.1 200 {}", "x".repeat(http::MAX_HEAD));
        assert_eq!(error(&long), "proxy: proxy:1: the answer is too long");
        for url in ["https://proxy", "socks4://proxy", "http://pro xy", "http://u:secret@"] {
            let error = Proxy::parse(url).err().unwrap().to_string();
            assert!(error.starts_with("proxy: the proxy's URL has ") || error.contains("no host"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[test]
    fn socks() {
        let name = [&b"\x05\x01\x00\x03\x0bexample.com"[..], &443_u16.to_be_bytes()].concat();
        let granted = b"\x05\x00\x05\x00\x00\x01\x7f\x00\x00\x01\x04\x38tunnel";
        let (result, asked, taken) = ask("socks5://proxy", "https://example.com", granted);
        assert_eq!((result, taken), (Ok(()), granted.len() - 6));
        assert_eq!(asked, [&b"\x05\x01\x00"[..], &name].concat());
        // With a password, and an answer that has a name; then IPv6.
        let granted = b"\x05\x02\x01\x00\x05\x00\x00\x03\x02ab\x04\x38tunnel";
        let (result, asked, taken) = ask("socks5h://us%40er:p%3Aw@proxy", "https://example.com", granted);
        assert_eq!((result, taken), (Ok(()), granted.len() - 6));
        assert_eq!(asked, [&b"\x05\x02\x00\x02\x01\x05us@er\x03p:w"[..], &name].concat());
        let granted = [&b"\x05\x00\x05\x00\x00\x04"[..], &[0; 18], b"tunnel"].concat();
        let (result, asked, taken) = ask("socks5://proxy", "http://[fe80::1%25lo]", &granted);
        assert_eq!((result, taken), (Ok(()), granted.len() - 6));
        assert_eq!(asked[..10], *b"\x05\x01\x00\x05\x01\x00\x04\xfe\x80\x00");
        for (login, answer, why) in [
            ("", &b"\x05\xff"[..], "wants a user and a password"),
            ("u:secret@", b"\x05\xff", "takes no password"),
            ("u:secret@", b"\x05\x02\x01\x01", "user or password is wrong"),
            ("", b"\x05\x00\x05\x02\x00\x01\x00", "connection not allowed by ruleset"),
            ("", b"\x05\x00\x05\x05\x00\x01\x00", "connection refused"),
            ("", b"\x05\x00\x05\x63\x00\x01\x00", "answered with code 99"),
            ("", b"HTTP/1.1 400", "is no SOCKS5 proxy"),
            ("", b"\x05\x00\x05", "closed the connection"),
        ] {
            let error = ask(&format!("socks5://{login}proxy"), "https://example.com", answer).0.unwrap_err();
            assert_eq!(error, format!("proxy: proxy:1080: {why}"));
        }
    }
}

//! HTTP proxies: which one the environment names for a server, and how to get through.

use std::io::{Read, Write};

use percent_encoding::percent_decode_str;

use super::endpoint::{Endpoint, USER_AGENT, Url};
use super::error::{AnswerFault, LinkError};
use super::http;
use crate::encoding::base64;
use crate::sys::net::contains;

/// In upper and lower case: for http, for https, and the exceptions.
pub(crate) const PROXY_VARIABLES: [[&str; 3]; 2] =
    [["HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"], ["http_proxy", "https_proxy", "no_proxy"]];

/// As curl and Go read them.
#[derive(Default, Clone)]
pub(crate) struct ProxySettings {
    http: Option<String>,
    https: Option<String>,
    exceptions: String,
}

pub(super) struct Proxy {
    pub(super) endpoint: Endpoint,
    /// A header line, or empty.
    authorization: String,
}

impl ProxySettings {
    pub(crate) fn from_environment() -> Self {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let set = |name: &str| lookup(name).filter(|v| !v.trim().is_empty());
        let [upper, lower] = PROXY_VARIABLES;
        let [http, https, exceptions] = [0, 1, 2].map(|at| set(upper[at]).or_else(|| set(lower[at])));
        ProxySettings { http, https, exceptions: exceptions.unwrap_or_default() }
    }

    /// The proxy for `server`; none for the device itself, where mender-auth's forwarder listens.
    pub(super) fn proxy_for(&self, server: &Endpoint) -> Result<Option<Proxy>, LinkError> {
        let setting = if server.tls { &self.https } else { &self.http };
        let mut exceptions = self.exceptions.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        let direct = server.is_loopback() || exceptions.any(|entry| covers(entry, server));
        setting.as_deref().filter(|_| !direct).map(Proxy::parse).transpose()
    }
}

/// `entry` of NO_PROXY is `*`, an address, a network, a name (which covers its subdomains), or a name after a dot (which
/// covers only those). All but the network may have a port.
fn covers(entry: &str, server: &Endpoint) -> bool {
    if entry == "*" {
        return true;
    }
    if let (Some((network, prefix)), Some(address)) = (entry.split_once('/'), server.address()) {
        let network = network.parse().ok().zip(prefix.parse().ok());
        return network.is_some_and(|(network, prefix)| contains(network, prefix, address));
    }
    let (name, port) = match entry.rsplit_once(':') {
        Some((name, port)) if !name.contains(':') || name.ends_with(']') => (name, Some(port)),
        _ => (entry, None),
    };
    if port.is_some_and(|p| p.parse() != Ok(server.port)) {
        return false;
    }
    let name = name.trim_start_matches('[').trim_end_matches(']').to_lowercase();
    if let Some(address) = server.address() {
        return name.parse() == Ok(address);
    }
    let host = server.host.to_lowercase();
    let parent = name.trim_start_matches("*.").trim_start_matches('.');
    let below = host.strip_suffix(parent).is_some_and(|rest| rest.ends_with('.'));
    below || (host == name)
}

impl Proxy {
    fn parse(url: &str) -> Result<Self, LinkError> {
        let bad = |what: &str| LinkError::Proxy(format!("the proxy's URL has {what}"));
        let url = url.trim();
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let parts = Url::parse(&url).map_err(|_| bad("a wrong form"))?;
        if parts.scheme != "http" {
            return Err(bad("a scheme other than http"));
        }
        let login = parts.login;
        let endpoint = parts.endpoint(false, 80);
        let authorization = login.map_or_else(String::new, |login| {
            let (user, word) = login.split_once(':').unwrap_or((login, ""));
            let plain: Vec<u8> =
                percent_decode_str(user).chain(*b":").chain(percent_decode_str(word)).collect();
            format!("Proxy-Authorization: Basic {}\r\n", base64(&plain))
        });
        Ok(Proxy { endpoint, authorization })
    }

    /// Asks the proxy on `stream` for a tunnel to `server` (RFC 9110, 9.3.6).
    pub(super) fn tunnel(&self, stream: impl Read + Write, server: &Endpoint) -> Result<(), LinkError> {
        let target = server.target();
        let request = format!(
            "CONNECT {target} HTTP/1.1\r\nHost: {target}\r\nUser-Agent: {USER_AGENT}\r\n{}\r\n",
            self.authorization
        );
        match http::ask(stream, &request) {
            Ok(answer) if matches!(answer.status, 200..=299) => Ok(()),
            Ok(answer) => Err(LinkError::Proxy(format!("answered with HTTP status {}", answer.status))),
            Err(AnswerFault::Closed) => Err(LinkError::Proxy("closed the connection".to_owned())),
            Err(fault) => Err(LinkError::Proxy(fault.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn settings(pairs: &[(&str, &str)]) -> ProxySettings {
        let pairs: Vec<(String, String)> =
            pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        ProxySettings::from_lookup(|name| pairs.iter().find(|(k, _)| k == name).map(|(_, v)| v.clone()))
    }

    fn host(settings: &ProxySettings, url: &str) -> Option<String> {
        let proxy = settings.proxy_for(&Endpoint::parse(url).unwrap());
        proxy.ok().unwrap().map(|p| p.endpoint.authority())
    }

    #[test]
    fn each_scheme_has_its_proxy_and_loopback_has_none() {
        let both = settings(&[("HTTP_PROXY", "plain:3128"), ("https_proxy", "http://secure")]);
        assert_eq!(host(&both, "http://example.com").as_deref(), Some("plain:3128"));
        assert_eq!(host(&both, "https://example.com").as_deref(), Some("secure:80"));
        for url in ["http://localhost:1", "http://127.0.0.1:1", "https://[::1]:1"] {
            assert_eq!(host(&both, url), None, "{url}");
        }
        assert_eq!(host(&settings(&[("HTTP_PROXY", "p:1")]), "https://example.com"), None);
    }

    #[test]
    fn exceptions() {
        let except = |list| settings(&[("HTTP_PROXY", "p:1"), ("NO_PROXY", list)]);
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

    fn ask(proxy: &str, answer: &str) -> (Result<(), String>, String, usize) {
        let mut peer = Peer { answer: Cursor::new(answer.into()), asked: Vec::new() };
        let server = Endpoint::parse("https://example.com").unwrap();
        let result = Proxy::parse(proxy).ok().unwrap().tunnel(&mut peer, &server).map_err(|e| e.to_string());
        (result, String::from_utf8(peer.asked).unwrap(), peer.answer.position() as usize)
    }

    #[test]
    fn a_tunnel_takes_only_the_answer_from_the_stream() {
        let answer = "HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n";
        let (result, asked, taken) = ask("http://us%40er:p%3Aw@proxy", &format!("{answer}tunnel"));
        assert_eq!((result, taken), (Ok(()), answer.len()));
        let login = base64(b"us@er:p:w");
        let wanted = format!(
            "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\nUser-Agent: {USER_AGENT}\r\nProxy-Authorization: Basic {login}\r\n\r\n"
        );
        assert_eq!(asked, wanted);
    }

    #[test]
    fn refusals_are_told() {
        let error = |answer: &str| ask("proxy:1", answer).0.unwrap_err();
        assert_eq!(
            error("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n"),
            "proxy: answered with HTTP status 407"
        );
        assert_eq!(error("HTTP/1.1 200"), "proxy: closed the connection");
        assert_eq!(error("220 ftp ready\r\n\r\n"), "proxy: the answer is no HTTP");
        let long = format!("HTTP/1.1 200 {}", "x".repeat(20_000));
        assert_eq!(error(&long), "proxy: the answer is too long");
        assert!(Proxy::parse("socks5://proxy").is_err());
    }
}

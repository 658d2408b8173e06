//! The place to connect to, from the URL of a server or proxy.

use std::net::IpAddr;

use super::error::LinkError;
use crate::sys::net;

/// Web application firewalls refuse requests without a user agent.
pub(super) const USER_AGENT: &str = concat!("mender-connect/", env!("CARGO_PKG_VERSION"));
/// A path in the server URL is ignored.
pub(crate) const PATH: &str = "/api/devices/v1/deviceconnect/connect";

/// Warning of log, `doctor` and `check`.
pub(crate) const IN_CLEAR: &str = "http: whoever is in between can read the token and all else";

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) tls: bool,
    /// Name or address, without brackets. The zone of an IPv6 address means nothing to other hosts.
    pub(crate) host: String,
    pub(super) port: u16,
}

impl Endpoint {
    /// Scheme, login and place of `SCHEME://[LOGIN@]HOST[:PORT][/…]`.
    pub(super) fn split(url: &str) -> Result<(String, Option<&str>, Self), &'static str> {
        let (scheme, rest) = url.trim().split_once("://").ok_or("no scheme")?;
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (login, place) = match authority.rsplit_once('@') {
            Some((login, place)) => (Some(login), place),
            None => (None, authority),
        };
        let (host, port) = match place.strip_prefix('[') {
            Some(place) => {
                let (host, port) = place.split_once(']').ok_or("a bracket that isn't closed")?;
                // The percent sign of a zone should be escaped (RFC 6874); accept both.
                let host = host.replacen("%25", "%", 1);
                if net::without_zone(&host).parse::<IpAddr>().is_err() {
                    return Err("no IPv6 address in its brackets");
                }
                (host, port)
            }
            None => {
                let (host, port) = place.split_at(place.find(':').unwrap_or(place.len()));
                (host.to_owned(), port)
            }
        };
        if host.is_empty() {
            return Err("no host");
        }
        let strange = |byte| !matches!(byte, b'!'..=b'~') || b"\"<>\\^`{|}".contains(&byte);
        if host.bytes().any(strange) || (host.contains('%') && !host.contains(':')) {
            return Err("a character that no host name has");
        }
        let port = match port.strip_prefix(':') {
            None if !port.is_empty() => return Err("something behind the brackets"),
            None | Some("") => None,
            // `parse` would accept it.
            Some(digits) if digits.starts_with('+') => return Err("a port with a sign"),
            Some(digits) => Some(digits.parse().map_err(|_| "a port that is no number up to 65535")?),
        };
        let scheme = scheme.to_ascii_lowercase();
        let (tls, default_port) = match &*scheme {
            "https" | "wss" => (true, 443),
            "socks5" | "socks5h" => (false, 1080),
            _ => (false, 80),
        };
        Ok((scheme, login, Endpoint { tls, host, port: port.unwrap_or(default_port) }))
    }

    pub(crate) fn parse(url: &str) -> Result<Self, LinkError> {
        let (scheme, _, server) = Self::split(url).map_err(|why| LinkError::Url(why.to_owned()))?;
        match &*scheme {
            "http" | "ws" | "https" | "wss" => Ok(server),
            other => Err(LinkError::Url(format!("unknown scheme {other:?}"))),
        }
    }

    pub(crate) fn authority(&self) -> String {
        joined(&self.host, self.port)
    }

    /// Without zone, for others.
    pub(super) fn target(&self) -> String {
        joined(self.bare_host(), self.port)
    }

    pub(super) fn host_header(&self) -> String {
        let target = self.target();
        let default_port = if self.tls { ":443" } else { ":80" };
        target.strip_suffix(default_port).unwrap_or(&target).to_owned()
    }

    pub(super) fn bare_host(&self) -> &str {
        net::without_zone(&self.host)
    }

    /// IPv4 in IPv6 (`::ffff:127.0.0.1`) is IPv4.
    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.bare_host().parse().ok().map(|address: IpAddr| address.to_canonical())
    }

    pub(crate) fn sends_in_clear(&self) -> bool {
        !self.tls && !self.is_loopback()
    }

    pub(crate) fn is_loopback(&self) -> bool {
        self.host.eq_ignore_ascii_case("localhost") || self.address().is_some_and(|a| a.is_loopback())
    }
}

fn joined(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes_ports_and_addresses() {
        let url = |text| {
            let endpoint = Endpoint::parse(text).map_err(|e| e.to_string())?;
            Ok::<_, String>((endpoint.tls, endpoint.host_header()))
        };
        for (given, tls, host) in [
            ("http://127.0.0.1:4711", false, "127.0.0.1:4711"),
            (" https://hosted.mender.io/ ", true, "hosted.mender.io"),
            ("https://host:444/base/path?query", true, "host:444"),
            ("HTTPS://host:?query", true, "host"),
            ("ws://host:80", false, "host"),
            ("wss://user:w@rd@host#f", true, "host"),
            ("http://[::1]:8080", false, "[::1]:8080"),
            ("https://[::1]", true, "[::1]"),
            ("http://[fe80::1%25eth0]:8080", false, "[fe80::1]:8080"),
            ("http://[fe80::1%eth0]", false, "[fe80::1]"),
        ] {
            assert_eq!(url(given), Ok((tls, host.to_owned())), "{given}");
        }
        for bad in [
            "",
            "host",
            "ftp://host",
            "http://",
            "https://:443",
            "http://ho st",
            "http://host:65536",
            "http://host:+1",
            "http://[::1",
            "http://[::1]1",
            "http://[name]",
            "http://::1",
            "http://a%20b",
            "http://a\r\nb",
            "http://é",
        ] {
            let error = url(bad).unwrap_err();
            assert!(error.starts_with("malformed server URL: "), "{bad}: {error}");
        }
    }

    #[test]
    fn knows_the_machine_itself() {
        for (host, itself) in [("localhost", true), ("127.8.9.1", true), ("::1", true), ("10.0.0.1", false)] {
            let endpoint = Endpoint { tls: false, host: host.to_owned(), port: 1 };
            assert_eq!(endpoint.is_loopback(), itself, "{host}");
        }
    }
}

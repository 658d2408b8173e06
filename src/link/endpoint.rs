//! Where to connect to, from the server URL.

use std::net::IpAddr;

use tungstenite::http::Uri;

use super::error::LinkError;

/// Web application firewalls refuse requests without one.
pub(super) const USER_AGENT: &str = concat!("mender-connect/", env!("CARGO_PKG_VERSION"));
/// The path that devices connect to. A path in the server URL is ignored.
pub(crate) const PATH: &str = "/api/devices/v1/deviceconnect/connect";

/// A server, or a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) tls: bool,
    /// A name or an address, without brackets.
    pub(crate) host: String,
    pub(super) port: u16,
}

impl Endpoint {
    pub(super) fn parse(url: &str) -> Result<Self, LinkError> {
        let uri: Uri = url.trim().parse().map_err(|e| LinkError::Url(format!("{e}")))?;
        let (tls, default_port) = match uri.scheme_str() {
            Some("http" | "ws") => (false, 80),
            Some("https" | "wss") => (true, 443),
            Some(other) => return Err(LinkError::Url(format!("unknown scheme {other:?}"))),
            None => return Err(LinkError::Url("no scheme".to_owned())),
        };
        let host = uri.host().unwrap_or_default();
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() {
            return Err(LinkError::Url("no host".to_owned()));
        }
        Ok(Endpoint { tls, host: host.to_owned(), port: uri.port_u16().unwrap_or(default_port) })
    }

    pub(crate) fn authority(&self) -> String {
        let Endpoint { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    pub(super) fn host_header(&self) -> String {
        let authority = self.authority();
        let default_port = if self.tls { ":443" } else { ":80" };
        authority.strip_suffix(default_port).unwrap_or(&authority).to_owned()
    }

    pub(crate) fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    pub(crate) fn is_loopback(&self) -> bool {
        self.host.eq_ignore_ascii_case("localhost") || self.address().is_some_and(|a| a.is_loopback())
    }
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
            ("https://hosted.mender.io/", true, "hosted.mender.io"),
            ("https://host:444/base/path?query", true, "host:444"),
            ("ws://host:80", false, "host"),
            ("wss://user:word@host", true, "host"),
            ("http://[::1]:8080", false, "[::1]:8080"),
        ] {
            assert_eq!(url(given), Ok((tls, host.to_owned())), "{given}");
        }
        for bad in ["", "host", "ftp://host", "http://", "https://:443", "http://ho st"] {
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

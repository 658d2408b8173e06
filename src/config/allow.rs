//! `PortForward.Allow`: which targets may be reached.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::sys::net::{contains, zone_index};

/// One entry, such as `tcp/192.168.1.0/24:80-443`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    transport: String,
    host: Host,
    /// Name or number of the only interface permitted.
    zone: Option<String>,
    ports: RangeInclusive<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    Any,
    Network(IpAddr, u32),
    /// In lower case.
    Name(String),
}

impl Allowed {
    /// Reads `tcp/HOST:PORTS` or `udp/HOST:PORTS`. HOST is an address, `[…]` around it for IPv6, which may have a zone
    /// (`%eth0`), a network (`address/bits`), a name, or `*`; PORTS is a port, a range, or `*`.
    pub fn parse(entry: &str) -> Result<Self, String> {
        let (transport, rest) = entry.split_once('/').ok_or("expected tcp/HOST:PORTS or udp/HOST:PORTS")?;
        if !matches!(transport, "tcp" | "udp") {
            return Err(format!("unknown protocol {transport:?}, expected tcp or udp"));
        }
        let (host, ports) = rest.rsplit_once(':').ok_or("the port is missing; * stands for any")?;
        if host.contains(':') && !host.starts_with('[') {
            return Err("an IPv6 address is written in brackets".to_owned());
        }
        let (plain, zone) = match host.strip_suffix(']').and_then(|host| host.split_once('%')) {
            Some((address, zone)) if !zone.is_empty() => (format!("{address}]"), Some(zone.to_owned())),
            _ => (host.to_owned(), None),
        };
        let (transport, host, ports) = (transport.to_owned(), parse_host(&plain)?, parse_ports(ports)?);
        if zone.is_some() && !matches!(host, Host::Network(IpAddr::V6(_), _)) {
            return Err("only an IPv6 address has a zone".to_owned());
        }
        Ok(Allowed { transport, host, zone, ports })
    }

    /// `place` is an address that `name` resolved to.
    pub fn permits(&self, transport: &str, name: &str, place: SocketAddr) -> bool {
        if let (Some(zone), SocketAddr::V6(place)) = (&self.zone, place)
            && zone_index(zone) != Some(place.scope_id())
        {
            return false;
        }
        // An IPv4-mapped IPv6 address reaches the IPv4 address.
        let address = place.ip().to_canonical();
        let host = match &self.host {
            Host::Any => true,
            Host::Network(network, bits) => contains(*network, *bits, address),
            Host::Name(allowed) if allowed == "localhost" => address.is_loopback(),
            Host::Name(allowed) => name.trim_end_matches('.').eq_ignore_ascii_case(allowed),
        };
        host && self.transport == transport && self.ports.contains(&place.port())
    }
}

fn parse_host(host: &str) -> Result<Host, String> {
    let (name, bits) = host.rsplit_once('/').map_or((host, None), |(name, bits)| (name, Some(bits)));
    let bare = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
    if let Ok(address) = bare.parse::<IpAddr>() {
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Some(most), number).filter(|bits| *bits <= most);
        let bits = bits.ok_or_else(|| format!("a network of {address} has 0 to {most} bits"))?;
        // `Allowed::permits` compares IPv4-mapped IPv6 addresses as IPv4.
        return Ok(match address.to_canonical() {
            plain if plain != address && bits >= 96 => Host::Network(plain, bits - 96),
            _ => Host::Network(address, bits),
        });
    }
    // Digits and dots that are no address are a typing error, not a name.
    let numeric = name.chars().all(|c| c.is_ascii_digit() || c == '.');
    let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'));
    match bits {
        Some(_) => Err(format!("{name:?} is no address")),
        None if host == "*" => Ok(Host::Any),
        None if numeric || !plain => Err(format!("{name:?} is neither an address nor a name")),
        None => Ok(Host::Name(name.trim_end_matches('.').to_ascii_lowercase())),
    }
}

/// Digits only: `parse` would accept a sign.
fn number<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

fn parse_ports(ports: &str) -> Result<RangeInclusive<u16>, String> {
    if ports == "*" {
        return Ok(1..=u16::MAX);
    }
    let port = |text| {
        let port = number(text).filter(|port| *port > 0);
        port.ok_or_else(|| format!("{text:?} is no port, expected 1 to 65535"))
    };
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let range = port(first)?..=port(last)?;
    if range.is_empty() { Err(format!("the range {ports} is empty")) } else { Ok(range) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn permits(entry: &str, transport: &str, name: &str, address: &str, port: u16) -> bool {
        let place = crate::sys::net::literal(address, port).unwrap();
        Allowed::parse(entry).unwrap().permits(transport, name, place)
    }

    #[test]
    fn entries_match_what_they_say() {
        assert!(permits("tcp/127.0.0.1:22", "tcp", "127.0.0.1", "127.0.0.1", 22));
        assert!(permits("tcp/127.0.0.1:22", "tcp", "x", "::ffff:127.0.0.1", 22));
        assert!(permits("tcp/[::ffff:10.0.0.1]:22", "tcp", "x", "10.0.0.1", 22));
        assert!(permits("tcp/[::ffff:10.0.0.0]/104:22", "tcp", "x", "10.9.9.9", 22));
        assert!(!permits("tcp/[::ffff:10.0.0.0]/104:22", "tcp", "x", "11.0.0.1", 22));
        assert!(!permits("tcp/127.0.0.1:22", "udp", "127.0.0.1", "127.0.0.1", 22));
        assert!(!permits("tcp/127.0.0.1:22", "tcp", "127.0.0.1", "127.0.0.1", 23));
        assert!(!permits("tcp/127.0.0.1:22", "tcp", "127.0.0.2", "127.0.0.2", 22));
        for (address, port, allowed) in [
            ("192.168.1.0", 80, true),
            ("192.168.1.255", 443, true),
            ("192.168.2.1", 80, false),
            ("192.168.1.1", 444, false),
        ] {
            assert_eq!(permits("tcp/192.168.1.0/24:80-443", "tcp", "x", address, port), allowed);
        }
        assert!(permits("udp/[::1]:53", "udp", "::1", "::1", 53));
        assert!(permits("udp/[fe80::]/10:*", "udp", "x", "fe80::1", 1));
        assert!(permits("udp/[fe80::1%lo]:*", "udp", "x", "fe80::1%1", 1));
        assert!(permits("udp/[fe80::1]:*", "udp", "x", "fe80::1%1", 1));
        for other in ["fe80::1%7", "fe80::2%1", "::ffff:10.0.0.1"] {
            assert!(!permits("udp/[fe80::1%lo]:*", "udp", "x", other, 1));
        }
        assert!(permits("tcp/localhost:*", "tcp", "localhost", "::1", 9));
        assert!(permits("tcp/localhost:*", "tcp", "127.0.0.1", "127.0.0.1", 9));
        assert!(!permits("tcp/localhost:*", "tcp", "localhost", "10.0.0.1", 9), "the address counts");
        assert!(permits("tcp/Router.lan:80", "tcp", "router.LAN.", "10.0.0.1", 80));
        assert!(!permits("tcp/router.lan:80", "tcp", "other.lan", "10.0.0.1", 80));
        assert!(permits("tcp/*:80", "tcp", "anything", "8.8.8.8", 80));
    }

    #[test]
    fn what_means_nothing_is_named() {
        for (entry, why) in [
            ("", "expected tcp/HOST:PORTS"),
            ("127.0.0.1:22", "expected tcp/HOST:PORTS"),
            ("sctp/host:1", "unknown protocol"),
            ("tcp/host", "the port is missing"),
            ("tcp/host:", "is no port"),
            ("tcp/host:0", "is no port"),
            ("tcp/host:65536", "is no port"),
            ("tcp/host:9-8", "is empty"),
            ("tcp/::1:22", "in brackets"),
            ("tcp/host:+80", "is no port"),
            ("tcp/10.0.0.0/+8:1", "0 to 32 bits"),
            ("tcp/10.0.0.0/33:1", "0 to 32 bits"),
            ("tcp/name/8:1", "is no address"),
            ("tcp/[fe80::1%]:1", "neither an address nor a name"),
            ("tcp/[10.0.0.1%lo]:1", "has a zone"),
            ("tcp/:1", "neither an address nor a name"),
            ("tcp/10.0.0.256:1", "neither an address nor a name"),
            ("tcp/ho st:1", "neither an address nor a name"),
        ] {
            let error = Allowed::parse(entry).unwrap_err();
            assert!(error.contains(why), "{error}, expected {why}");
        }
    }
}

//! An entry of `PortForward.Allow`, then a line break and what is looked up in it: a byte for the transport, two for the
//! port, sixteen for the address, and the name.

#![no_main]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use libfuzzer_sys::fuzz_target;
use mender_connect::internals::Allowed;

fuzz_target!(|data: &[u8]| {
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    let Ok(entry) = std::str::from_utf8(&data[..end]) else { return };
    let Ok(allowed) = Allowed::parse(entry) else {
        assert!(understand(entry).is_none(), "{entry:?} is refused");
        return;
    };
    let entry = understand(entry).unwrap_or_else(|| panic!("{entry:?} is taken as {allowed:?}"));

    let mut probes = vec![(entry.transport, entry.host, entry.address, entry.ports.0)];
    if let Some((head, name)) = data.get(end + 1..).and_then(|rest| rest.split_first_chunk::<19>()) {
        let transport = if head[0] & 1 == 0 { "tcp" } else { "udp" };
        let port = u16::from_be_bytes([head[1], head[2]]);
        let mut octets = [0; 16];
        octets.copy_from_slice(&head[3..]);
        let address = match head[0] & 2 {
            0 => IpAddr::from(octets),
            _ => IpAddr::from([octets[0], octets[1], octets[2], octets[3]]),
        };
        let name = std::str::from_utf8(name).unwrap_or_default();
        probes.extend([
            (transport, name, address, port),
            (entry.transport, name, address, entry.ports.1),
            (entry.transport, name, entry.address, port),
            // One bit of the entry's own address is another one.
            (entry.transport, entry.host, flipped(entry.address, head[0] >> 1), entry.ports.0),
        ]);
    }
    let (first, last) = entry.ports;
    let at = |port| (entry.transport, entry.host, entry.address, port);
    probes.extend([at(first.wrapping_sub(1)), at(last), at(last.wrapping_add(1))]);
    for (transport, name, address, port) in probes {
        let permitted = allowed.permits(transport, name, SocketAddr::new(address, port));
        let expected = entry.permits(transport, name, address, port);
        assert_eq!(permitted, expected, "{allowed:?} about {transport} {name:?} {address} {port}");
    }
});

/// An entry as the manual describes it.
struct Entry<'a> {
    transport: &'a str,
    host: &'a str,
    /// An interface. The probes' addresses have none, which is number zero.
    zone: Option<&'a str>,
    ports: (u16, u16),
    /// The address in it; one of loopback's for a name.
    address: IpAddr,
    /// `None` for a name, or for any address at all.
    bits: Option<u32>,
}

fn understand(entry: &str) -> Option<Entry<'_>> {
    let transport = ["tcp", "udp"].into_iter().find(|name| entry.starts_with(&format!("{name}/")))?;
    let rest = &entry[4..];
    let colon = rest.rfind(':')?;
    let (host, ports) = (&rest[..colon], &rest[colon + 1..]);
    let ports = match ports {
        "*" => (1, 65535),
        range => match range.find('-') {
            Some(dash) => (number(&range[..dash], 65535)?, number(&range[dash + 1..], 65535)?),
            None => (number(range, 65535)?, number(range, 65535)?),
        },
    };
    if ports.0 == 0 || ports.0 > ports.1 {
        return None;
    }
    let ports = (ports.0 as u16, ports.1 as u16);
    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let open = host.find('%').filter(|at| host.ends_with(']') && at + 2 < host.len());
    let zone = open.map(|at| &host[at + 1..host.len() - 1]);
    let zoneless = open.map_or(host.to_owned(), |at| format!("{}]", &host[..at]));
    let (plain, bits) = match zoneless.rfind('/') {
        Some(slash) => (&zoneless[..slash], Some(&zoneless[slash + 1..])),
        None => (&*zoneless, None),
    };
    let bare = plain.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let address = match bare {
        Some(bare) => bare.parse().ok(),
        None => plain.parse().ok().map(IpAddr::V4),
    };
    if let Some(address) = address {
        let width = if address.is_ipv4() { 32 } else { 128 };
        let mut bits = bits.map_or(Some(width), |bits| number(bits, width))?;
        let mut address: IpAddr = address;
        // IPv4 in IPv6's clothes, which are 96 bits.
        if address != address.to_canonical() && bits >= 96 {
            (address, bits) = (address.to_canonical(), bits - 96);
        }
        let possible = zone.is_none() || address.is_ipv6();
        return possible.then_some(Entry { transport, host, zone, ports, address, bits: Some(bits) });
    }
    let name = host == "*"
        || host.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
            && host.bytes().any(|b| !b.is_ascii_digit() && b != b'.');
    name.then_some(Entry { transport, host, zone: None, ports, address: loopback, bits: None })
}

fn number(text: &str, most: u32) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|number| digits && *number <= most)
}

impl Entry<'_> {
    fn permits(&self, transport: &str, name: &str, address: IpAddr, port: u16) -> bool {
        let host = match self.bits {
            Some(bits) => {
                let (own, other) = (digits(self.address), digits(address.to_canonical()));
                own.len() == other.len() && own[..bits as usize] == other[..bits as usize]
            }
            None if self.host == "*" => true,
            None => {
                let [own, name] =
                    [self.host, name].map(|name| name.trim_end_matches('.').to_ascii_lowercase());
                if own == "localhost" { address.to_canonical().is_loopback() } else { own == name }
            }
        };
        let zone = self.zone.is_none_or(|zone| address.is_ipv4() || zone.parse::<u32>() == Ok(0));
        host && zone && self.transport == transport && (self.ports.0..=self.ports.1).contains(&port)
    }
}

/// The bits one by one.
fn digits(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("{:032b}", v4.to_bits()),
        IpAddr::V6(v6) => format!("{:0128b}", v6.to_bits()),
    }
}

fn flipped(address: IpAddr, bit: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() ^ 1 << (bit % 32)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() ^ 1 << (bit % 128)).into(),
    }
}

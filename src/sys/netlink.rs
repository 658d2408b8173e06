//! Changes of the network, by rtnetlink(7).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

const GROUPS: libc::c_int = libc::RTMGRP_LINK
    | libc::RTMGRP_IPV4_IFADDR
    | libc::RTMGRP_IPV6_IFADDR
    | libc::RTMGRP_IPV4_ROUTE
    | libc::RTMGRP_IPV6_ROUTE;

/// Sizes of `struct nlmsghdr`, `struct ifaddrmsg` and `struct rtattr`.
const MESSAGE: usize = 16;
const ADDRESS: usize = 8;
const ATTRIBUTE: usize = 4;
/// Size of `struct rtmsg`.
const ROUTE: usize = 12;

pub(crate) struct Netlink {
    pub(crate) socket: OwnedFd,
    known: Known,
}

/// Interface and gateway.
type Way = (Option<u32>, Vec<u8>);

#[derive(Default)]
struct Known {
    /// Indexes of interfaces that have had a carrier.
    running: Vec<u32>,
    /// Interfaces and their addresses, but link-local ones.
    addresses: Vec<(u32, Vec<u8>)>,
    /// The last default route of each family, table and metric.
    routes: Vec<([Option<u32>; 3], Way)>,
}

/// Only what affects connections: not refreshed addresses, nor routes between nearby hosts.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    /// A new default route or address, an address whose carrier is back, or the kernel lost messages.
    pub(crate) new: bool,
    /// An address was removed, or the kernel lost messages.
    pub(crate) gone: bool,
}

impl Netlink {
    pub(crate) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUPS.cast_unsigned()))?;
        Ok(Netlink { socket, known: Known::read() })
    }

    pub(crate) fn read(&mut self) -> Changes {
        let (mut changes, mut buffer) = (Changes::default(), [0; 8192]);
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => changes.add(&buffer[..length], &mut self.known),
                Err(Errno::ENOBUFS) => {
                    (changes.new, changes.gone) = (true, true);
                    self.known = Known::read();
                }
                Err(Errno::EINTR) => {}
                Err(_) => return changes,
            }
        }
    }
}

impl Known {
    fn read() -> Self {
        let mut known = Known::default();
        for interface in getifaddrs().into_iter().flatten() {
            let Ok(index) = if_nametoindex(&*interface.interface_name) else { continue };
            if interface.flags.contains(InterfaceFlags::IFF_RUNNING) {
                known.running.push(index);
            }
            let Some(address) = interface.address else { continue };
            let v4 = address.as_sockaddr_in().map(|address| address.ip());
            let v6 = address.as_sockaddr_in6().map(|address| address.ip());
            let v4 = v4.filter(|ip| !ip.is_link_local()).map(|ip| (index, ip.octets().to_vec()));
            let v6 = v6.filter(|ip| !ip.is_unicast_link_local()).map(|ip| (index, ip.octets().to_vec()));
            known.addresses.extend(v4.into_iter().chain(v6));
        }
        known
    }
}

impl Changes {
    fn add(&mut self, mut bytes: &[u8], known: &mut Known) {
        while let (Some(length), Some(kind)) = (word(bytes, 0), half(bytes, 4))
            && let Some(message) = bytes.get(MESSAGE..length as usize)
        {
            match (kind, message) {
                // The destination of a default route has 0 bits.
                (libc::RTM_NEWROUTE, [family, 0, _, _, _table, _, _scope, libc::RTN_UNICAST, ..]) => {
                    let number = |wanted| attribute(message, ROUTE, wanted).and_then(|value| word(value, 0));
                    let key = [Some((*family).into()), number(libc::RTA_TABLE), number(libc::RTA_PRIORITY)];
                    // One gateway, or several with their interfaces.
                    let ways = [libc::RTA_GATEWAY, libc::RTA_MULTIPATH];
                    let gateway = ways.iter().find_map(|way| attribute(message, ROUTE, *way));
                    let way = (number(libc::RTA_OIF), gateway.unwrap_or_default().to_owned());
                    // IPv6's is replaced to renew its lifetime, with each router advertisement.
                    let replaces =
                        half(bytes, 6).is_some_and(|flags| flags & libc::NLM_F_REPLACE as u16 != 0);
                    self.new |= !(replaces && known.routes.contains(&(key, way.clone())));
                    known.routes.retain(|(other, _)| *other != key);
                    known.routes.push((key, way));
                }
                (libc::RTM_NEWADDR, [_family, _, flags, libc::RT_SCOPE_UNIVERSE, ..]) => {
                    let tentative = u32::from(*flags) & libc::IFA_F_TENTATIVE != 0;
                    // `struct ifa_cacheinfo`: created, changed.
                    let times = attribute(message, ADDRESS, libc::IFA_CACHEINFO);
                    let refreshed = times.is_some_and(|times| word(times, 8) != word(times, 12));
                    // One may be refreshed before it is usable, by a second router.
                    let place = place(message);
                    let is_known = known.addresses.contains(&place);
                    self.new |= !(tentative || is_known && refreshed);
                    if !tentative && !is_known {
                        known.addresses.push(place);
                    }
                }
                (libc::RTM_DELADDR, _) => {
                    self.gone = true;
                    let gone = place(message);
                    known.addresses.retain(|place| *place != gone);
                }
                // A static address and its routes stay while the cable is unplugged.
                (libc::RTM_NEWLINK, _) => {
                    let (Some(index), Some(flags)) = (word(message, 4), word(message, 8)) else { return };
                    let was_running = known.running.contains(&index);
                    known.running.retain(|other| *other != index);
                    if flags & libc::IFF_RUNNING.cast_unsigned() != 0 {
                        self.new |= !was_running && known.addresses.iter().any(|(place, _)| *place == index);
                        known.running.push(index);
                    }
                }
                _ => {}
            }
            bytes = bytes.get((length as usize).next_multiple_of(4)..).unwrap_or_default();
        }
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

/// Interface and address of a message about an address.
fn place(message: &[u8]) -> (u32, Vec<u8>) {
    // The other side's, on a line between two.
    let peer = || attribute(message, ADDRESS, libc::IFA_ADDRESS);
    let address = attribute(message, ADDRESS, libc::IFA_LOCAL).or_else(peer).unwrap_or_default();
    (word(message, 4).unwrap_or_default(), address.to_owned())
}

/// An attribute of a message whose own part has `from` bytes.
fn attribute(message: &[u8], from: usize, wanted: u16) -> Option<&[u8]> {
    let mut rest = message.get(from..)?;
    loop {
        let length = usize::from(half(rest, 0)?);
        let value = rest.get(ATTRIBUTE..length)?;
        if half(rest, 2)? == wanted {
            return Some(value);
        }
        rest = rest.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonsense_is_no_change() {
        let mut header = 24_u32.to_ne_bytes().to_vec();
        header.extend(libc::RTM_NEWADDR.to_ne_bytes());
        header.resize(MESSAGE + ADDRESS, 0);
        header[MESSAGE + 2] = libc::IFA_F_TENTATIVE as u8;
        let attribute = |length: u16| [length.to_ne_bytes(), libc::IFA_CACHEINFO.to_ne_bytes()].concat();
        for (length, rest) in [
            (0, vec![]),
            (15, vec![]),
            (u32::MAX, vec![]),
            (24, vec![]),
            (28, attribute(0)),
            (28, attribute(3)),
            (28, attribute(4)),
            (28, attribute(60000)),
            (29, [attribute(5), vec![1]].concat()),
        ] {
            let mut message = [header.clone(), rest].concat();
            message[..4].copy_from_slice(&length.to_ne_bytes());
            let mut changes = Changes::default();
            changes.add(&message, &mut Known::default());
            assert!(!changes.new && !changes.gone, "{message:?}: {changes:?}");
        }
    }

    /// A default route by several gateways was the same as that by any others: it was used only when the next attempt to
    /// connect came by itself, up to 290 s later.
    #[test]
    fn a_default_route_by_other_gateways_is_a_change() {
        let mut known = Known::default();
        let mut is_new = |gateways: &[u8]| {
            let (kind, flags) = (libc::RTM_NEWROUTE, libc::NLM_F_REPLACE as u16);
            let route = [libc::AF_INET as u8, 0, 0, 0, 254, 0, 0, libc::RTN_UNICAST, 0, 0, 0, 0];
            let value = gateways.repeat(8);
            let attribute = [ATTRIBUTE as u16 + value.len() as u16, libc::RTA_MULTIPATH];
            let attribute = attribute.map(u16::to_ne_bytes).concat();
            let length = (MESSAGE + ROUTE + attribute.len() + value.len()) as u32;
            let header =
                [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]].concat();
            let mut changes = Changes::default();
            changes.add(&[&header[..], &route, &attribute, &value].concat(), &mut known);
            changes.new
        };
        assert_eq!([&[1, 2], &[1, 2], &[1, 3]].map(|gateways| is_new(gateways)), [true, false, true]);
    }

    /// The messages of a kernel are in the tests with network namespaces.
    #[test]
    fn the_kernel_lets_us_listen() {
        let mut netlink = Netlink::open().unwrap();
        assert!(!netlink.read().gone);
    }
}

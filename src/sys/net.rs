//! Sockets and addresses, beyond std.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;
#[cfg(test)]
use nix::sys::socket::sockopt;
use nix::sys::socket::sockopt::{Broadcast, Linger, SetBool, SetStruct};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, getpeername, getsockname, setsockopt, socket,
};

/// Acknowledges at once. The kernel forgets the option after a while.
#[derive(Clone)]
pub(crate) struct QuickAck;
nix::setsockopt_impl!(QuickAck, libc::IPPROTO_TCP, libc::TCP_QUICKACK, bool, SetBool);

/// Limits unsent bytes in the kernel: messages still in this program can be reordered.
#[derive(Clone, Copy)]
pub(crate) struct UnsentLimit;
nix::setsockopt_impl!(UnsentLimit, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, u32, SetStruct<u32>);
#[cfg(test)]
nix::getsockopt_impl!(UnsentLimit, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, u32, sockopt::GetStruct<u32>);

/// SIOCOUTQNSD. SIOCOUTQ, by its other name TIOCOUTQ, counts the unacknowledged bytes, too.
const UNSENT: libc::Ioctl = 0x894b;

/// Makes close(2) reset the connection.
pub(crate) fn discard(socket: BorrowedFd<'_>) {
    let _ = setsockopt(&socket, Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
}

/// How many written bytes the other side has not got: the unsent ones and, if it has fallen silent, the unacknowledged
/// ones. Otherwise an acknowledgement may only be late.
pub(crate) fn undelivered(socket: BorrowedFd<'_>) -> u64 {
    if is_silent(socket) { unacknowledged(socket) } else { waiting(socket, UNSENT) }
}

pub(crate) fn is_silent(socket: BorrowedFd<'_>) -> bool {
    // tcpi_retransmits: time-outs since the last acknowledgement.
    tcp_info(socket)[2] > 0
}

/// True if unacknowledged bytes remain, and the last acknowledgement came less than `limit` ago.
pub(crate) fn is_delivering(socket: BorrowedFd<'_>, limit: Duration) -> bool {
    // tcpi_last_ack_recv, in milliseconds.
    let [.., a, b, c, d] = tcp_info(socket);
    unacknowledged(socket) > 0 && u128::from(u32::from_ne_bytes([a, b, c, d])) < limit.as_millis()
}

/// The end of the stream counts as a byte.
pub(crate) fn unacknowledged(socket: BorrowedFd<'_>) -> u64 {
    waiting(socket, libc::TIOCOUTQ)
}

/// The first bytes of `struct tcp_info`. nix panics if the kernel's length differs.
fn tcp_info(socket: BorrowedFd<'_>) -> [u8; 60] {
    let (mut info, mut length) = ([0; 60], 60);
    let place = info.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most the bytes that `length` says; the descriptor is open as long as it is borrowed.
    unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut length)
    };
    info
}

/// 0 if the kernel doesn't tell.
fn waiting(socket: BorrowedFd<'_>, count: libc::Ioctl) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both counts have the kernel write one integer; the descriptor is open as long as it is borrowed.
    unsafe { libc::ioctl(socket.as_raw_fd(), count, &raw mut bytes) };
    u64::try_from(bytes).unwrap_or(0)
}

/// `prefix` in bits.
pub(crate) fn contains(network: IpAddr, prefix: u32, address: IpAddr) -> bool {
    match (network, address) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= prefix,
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= prefix,
        _ => false,
    }
}

pub(crate) fn without_zone(host: &str) -> &str {
    host.split_once('%').map_or(host, |(address, _)| address)
}

/// `None` for names and unknown zones. The zone of an IPv6 address is the name or number of an interface.
pub(crate) fn literal(host: &str, port: u16) -> Option<SocketAddr> {
    let Some((address, zone)) = host.split_once('%') else {
        return Some(SocketAddr::new(host.parse().ok()?, port));
    };
    Some(SocketAddrV6::new(address.parse().ok()?, port, 0, zone_index(zone)?).into())
}

/// `zone`: name or number of an interface.
pub(crate) fn zone_index(zone: &str) -> Option<u32> {
    zone.parse().ok().or_else(|| if_nametoindex(zone).ok())
}

/// The socket becomes writable once the connection succeeds or fails.
pub(crate) fn begin_connect(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    // As Go does, for Wake-on-LAN and its like. No effect on a stream.
    let _ = setsockopt(&socket, Broadcast, &true);
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(e) => Err(e.into()),
    }
}

/// A socket to a local port that nothing listens on may get that port as its own, and is then connected to itself.
pub(crate) fn meets_itself(socket: &OwnedFd) -> bool {
    let ours = getsockname::<SockaddrStorage>(socket.as_raw_fd());
    ours.is_ok() && ours == getpeername(socket.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_may_have_zones() {
        for (text, address) in [
            ("127.0.0.1", Some("127.0.0.1:1")),
            ("::1", Some("[::1]:1")),
            ("fe80::1%7", Some("[fe80::1%7]:1")),
            ("fe80::1%lo", Some("[fe80::1%1]:1")),
            ("fe80::1%nosuch", None),
            ("127.0.0.1%lo", None),
            ("[::1]", None),
            ("name", None),
        ] {
            assert_eq!(literal(text, 1).map(|a| a.to_string()).as_deref(), address, "{text}");
        }
    }
}

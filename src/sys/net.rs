//! Sockets and addresses: what std doesn't offer.

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::sockopt::{Linger, SetBool, SetStruct, TcpUserTimeout};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, connect, recv, setsockopt, socket,
};

#[derive(Clone)]
struct QuickAck;
nix::setsockopt_impl!(QuickAck, libc::IPPROTO_TCP, libc::TCP_QUICKACK, bool, SetBool);

#[derive(Clone)]
struct UnsentLimit;
nix::setsockopt_impl!(UnsentLimit, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, u32, SetStruct<u32>);

// SIOCOUTQ by its other name, and SIOCOUTQNSD.
nix::ioctl_read_bad!(unacknowledged, libc::TIOCOUTQ, libc::c_int);
nix::ioctl_read_bad!(unsent, 0x894b, libc::c_int);

/// Acknowledges received bytes at once. The kernel forgets it after a while, hence "re-arm".
pub(crate) fn rearm_quick_ack(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(setsockopt(&socket, QuickAck, &true)?)
}

/// A write waits while more than `bytes` have not been sent yet, so that the messages queued behind it in this program
/// can still be reordered.
pub(crate) fn set_unsent_limit(socket: BorrowedFd<'_>, bytes: u16) -> io::Result<()> {
    Ok(setsockopt(&socket, UnsentLimit, &bytes.into())?)
}

/// Makes closing a TCP socket reset its connection, so that nothing is sent any more. Returns how many written bytes the
/// other side has not got: those that were not sent and, if it has fallen silent, those that it has not acknowledged.
/// Otherwise the acknowledgement of what it has read may only be late.
pub(crate) fn discard_undelivered(socket: BorrowedFd<'_>) -> u64 {
    let _ = setsockopt(&socket, Linger, &libc::linger { l_onoff: 1, l_linger: 0 });
    // tcpi_retransmits: time-outs since the last acknowledgement.
    waiting(socket, if tcp_info(socket)[2] > 0 { unacknowledged } else { unsent })
}

/// True if something waits for its acknowledgement, and the last one was less than `limit` ago.
pub(crate) fn is_delivering(socket: BorrowedFd<'_>, limit: Duration) -> bool {
    // tcpi_last_ack_recv: milliseconds.
    let [.., a, b, c, d] = tcp_info(socket);
    undelivered(socket) > 0 && u128::from(u32::from_ne_bytes([a, b, c, d])) < limit.as_millis()
}

/// Bytes that were written and not acknowledged.
pub(crate) fn undelivered(socket: BorrowedFd<'_>) -> u64 {
    waiting(socket, unacknowledged)
}

/// The other side is gone if it acknowledges nothing, or has no room for more, for `limit`.
pub(crate) fn set_user_timeout(socket: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    let millis = u32::try_from(limit.as_millis()).unwrap_or(u32::MAX);
    Ok(setsockopt(&socket, TcpUserTimeout, &millis)?)
}

/// The begin of `struct tcp_info`. Not by nix, which panics where the system has another length for it.
#[allow(unsafe_code)]
fn tcp_info(socket: BorrowedFd<'_>) -> [u8; 60] {
    let (mut info, mut length) = ([0; 60], 60);
    let place = info.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most the bytes that `length` says; the descriptor is open as long as it is borrowed.
    unsafe {
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, place, &raw mut length)
    };
    info
}

/// Bytes that were written to a socket and that `count` counts.
#[allow(unsafe_code)]
fn waiting(
    socket: BorrowedFd<'_>,
    count: unsafe fn(RawFd, *mut libc::c_int) -> nix::Result<libc::c_int>,
) -> u64 {
    let mut bytes = 0;
    // SAFETY: both counts have the kernel write one integer; the descriptor is open as long as it is borrowed.
    let result = unsafe { count(socket.as_raw_fd(), &raw mut bytes) };
    result.ok().and_then(|_| u64::try_from(bytes).ok()).unwrap_or(0)
}

/// True if something waits to be read: bytes, an end or an error.
pub(crate) fn is_readable(socket: BorrowedFd<'_>) -> bool {
    let look = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
    recv(socket.as_raw_fd(), &mut [0], look) != Err(Errno::EAGAIN)
}

/// True if `address` is in the network of `network`'s first `prefix` bits.
pub(crate) fn contains(network: IpAddr, prefix: u32, address: IpAddr) -> bool {
    match (network, address) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= prefix,
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros() >= prefix,
        _ => false,
    }
}

/// Without the zone of an IPv6 address.
pub(crate) fn without_zone(host: &str) -> &str {
    host.split_once('%').map_or(host, |(address, _)| address)
}

/// The address that `host` is, if it is one. An IPv6 address may have a zone, the name or number of an interface. If
/// that doesn't exist the address is none, either.
pub(crate) fn literal(host: &str, port: u16) -> Option<SocketAddr> {
    let Some((address, zone)) = host.split_once('%') else {
        return Some(SocketAddr::new(host.parse().ok()?, port));
    };
    Some(SocketAddrV6::new(address.parse().ok()?, port, 0, zone_index(zone)?).into())
}

/// Of an interface that is named, or given by this number.
pub(crate) fn zone_index(zone: &str) -> Option<u32> {
    zone.parse().ok().or_else(|| if_nametoindex(zone).ok())
}

/// Begins to connect a non-blocking socket, which becomes writable when that is decided.
pub(crate) fn begin_connect(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, kind, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    match connect(socket.as_raw_fd(), &SockaddrStorage::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(e) => Err(e.into()),
    }
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

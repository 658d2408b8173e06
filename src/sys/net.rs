//! Sockets and addresses: what std doesn't offer.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrIn, SockaddrIn6, connect, recv, socket,
};

/// Acknowledge what has come at once. The kernel forgets it after a while, hence "re-arm".
///
/// # Errors
/// What setsockopt(2) says.
pub fn rearm_quick_ack(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_int(socket, libc::TCP_QUICKACK, 1)
}

/// Let a write wait while more than `bytes` have not been sent yet, so that what is queued behind it
/// in this program can still be reordered.
///
/// # Errors
/// What setsockopt(2) says.
pub fn set_unsent_limit(socket: BorrowedFd<'_>, bytes: u16) -> io::Result<()> {
    set_int(socket, libc::TCP_NOTSENT_LOWAT, libc::c_int::from(bytes))
}

/// Whether something waits to be read: bytes, an end or an error.
pub fn has_news(socket: BorrowedFd<'_>) -> bool {
    let look = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
    recv(socket.as_raw_fd(), &mut [0], look) != Err(Errno::EAGAIN)
}

#[allow(unsafe_code)]
fn set_int(socket: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of_val(&value) as libc::socklen_t;
    // SAFETY: the descriptor is open for as long as it is borrowed, and the kernel copies `length`
    // bytes from `value`, which is exactly its size, before the call returns.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            option,
            (&raw const value).cast::<libc::c_void>(),
            length,
        )
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether `address` is in the network of `network`'s first `prefix` bits.
pub fn contains(network: IpAddr, prefix: u32, address: IpAddr) -> bool {
    let same =
        |a: u128, b: u128, bits: u32| prefix <= bits && (prefix == 0 || (a ^ b) >> (bits - prefix) == 0);
    match (network, address) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(a.to_bits().into(), b.to_bits().into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
        _ => false,
    }
}

/// The time limit for connecting to the first of `addresses`, where `left` is what there is for all of them: a dead one
/// must leave time for the others. As in Go's net.Dialer an equal share of at least 2 s, but of at most 10 s.
pub fn connect_limit(left: Duration, addresses: usize) -> Duration {
    if addresses <= 1 {
        return left;
    }
    let share = left / u32::try_from(addresses).unwrap_or(u32::MAX);
    share.clamp(Duration::from_secs(2), Duration::from_secs(10)).min(left)
}

/// A socket for `address`, not yet connected.
///
/// # Errors
/// What socket(2) says.
pub fn socket_for(address: SocketAddr, kind: SockType, flags: SockFlag) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    Ok(socket(family, kind, flags | SockFlag::SOCK_CLOEXEC, None)?)
}

/// Connects a socket. On a non-blocking one a connection may be under way afterwards: it then becomes writable
/// when that is decided.
///
/// # Errors
/// What connect(2) says; EINPROGRESS only on a blocking socket, for a time-out.
pub fn connect_to(socket: BorrowedFd<'_>, address: SocketAddr) -> nix::Result<()> {
    match address {
        SocketAddr::V4(v4) => connect(socket.as_raw_fd(), &SockaddrIn::from(v4)),
        SocketAddr::V6(v6) => connect(socket.as_raw_fd(), &SockaddrIn6::from(v6)),
    }
}

/// Begins to connect a non-blocking socket.
///
/// # Errors
/// What socket(2) and connect(2) say.
pub fn begin_connect(address: SocketAddr, kind: SockType) -> io::Result<OwnedFd> {
    let socket = socket_for(address, kind, SockFlag::SOCK_NONBLOCK)?;
    match connect_to(std::os::fd::AsFd::as_fd(&socket), address) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_share_the_time() {
        let limit = |left, addresses| connect_limit(Duration::from_secs(left), addresses).as_secs();
        assert_eq!(
            [limit(45, 1), limit(45, 3), limit(30, 2), limit(9, 30), limit(1, 30), limit(0, 1)],
            [45, 10, 10, 2, 1, 0]
        );
    }
}

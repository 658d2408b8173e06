//! Socket options that std doesn't offer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

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

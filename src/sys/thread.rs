//! Starts all threads.

use std::io;
use std::thread::{Builder, JoinHandle};

/// For threads that call nothing but this program and the kernel.
pub(crate) const SMALL_STACK: usize = 128 * 1024;
/// For TLS, name resolution and user look-ups: for the latter two glibc loads NSS modules (sssd, LDAP) with an unknown
/// need of stack.
pub(crate) const LARGE_STACK: usize = 256 * 1024;
/// For user look-ups alone: musl reads /etc/passwd and /etc/group itself. Untouched stack takes no memory.
pub(crate) const LOOKUP_STACK: usize = if cfg!(target_env = "musl") { SMALL_STACK } else { LARGE_STACK };

/// `top -H` shows 15 bytes of `name`. EAGAIN: the system or a limit allows no more threads.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    stack: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.to_owned()).stack_size(stack).spawn(body)
}

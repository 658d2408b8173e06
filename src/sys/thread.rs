//! The one way to start a thread.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Enough for what calls nothing but this program and the kernel.
pub(crate) const SMALL_STACK: usize = 128 * 1024;
/// For threads that do TLS, resolve names or look up users and groups: for the latter two glibc loads NSS modules (sssd,
/// LDAP), whose appetites aren't ours to know.
pub(crate) const LARGE_STACK: usize = 256 * 1024;
/// For threads that look up users and groups and do nothing else of size. musl reads /etc/passwd and /etc/group itself.
/// A stack is address space: what isn't touched takes no memory.
pub(crate) const LOOKUP_STACK: usize = if cfg!(target_env = "musl") { SMALL_STACK } else { LARGE_STACK };

/// Starts a thread with a name, of which `top -H` shows 15 bytes, and a stack of `stack` bytes. EAGAIN: the system or a
/// limit allows no more threads.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    stack: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    // The name may be a client's, and std panics on a zero.
    Builder::new().name(name.replace('\0', "")).stack_size(stack).spawn(body)
}

//! The one way to start a thread.

use std::io;
use std::thread::{Builder, JoinHandle};

/// Enough for a session: its loop, msgpack, a spawn.
pub const SMALL_STACK: usize = 128 * 1024;
/// For threads that do TLS or resolve names: glibc's resolver loads modules with appetites of their own.
pub const LARGE_STACK: usize = 256 * 1024;

/// Starts a thread with a name, as `top -H` shows it (15 bytes), and a stack of `stack` bytes.
///
/// # Errors
/// EAGAIN when the system or a limit allows no more threads.
pub fn spawn<T: Send + 'static>(
    name: &str,
    stack: usize,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let mut end = name.len().min(15);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    let name: String = name[..end].chars().filter(|c| *c != '\0').collect();
    Builder::new().name(name).stack_size(stack).spawn(body)
}

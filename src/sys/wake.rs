//! Wakes a thread in poll(2) from any other thread.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// An eventfd. Notifications before a clear count as one.
#[derive(Debug)]
pub struct Wake {
    fd: EventFd,
    pending: AtomicBool,
}

impl Wake {
    pub fn new() -> io::Result<Self> {
        let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Wake { fd, pending: AtomicBool::new(false) })
    }

    /// Wakes the sleeper, now or at its next poll(2).
    pub(crate) fn notify(&self) {
        if !self.pending.swap(true, Ordering::SeqCst) {
            // The counter is at most one, so this cannot fail.
            let _ = self.fd.write(1);
        }
    }

    /// Check the reasons for the wake-up afterwards, not before.
    pub fn clear(&self) {
        // Fails if nobody has notified.
        let _ = self.fd.read();
        // A swap, not a store: a thread that notified meanwhile wrote nothing, so its earlier writes must be visible
        // now.
        self.pending.swap(false, Ordering::SeqCst);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::is_ready;
    use nix::poll::PollFlags;

    fn is_awake(wake: &Wake) -> bool {
        is_ready(wake, PollFlags::POLLIN)
    }

    #[test]
    fn calls_are_kept_until_cleared() {
        let wake = Wake::new().unwrap();
        assert!(!is_awake(&wake));
        wake.notify();
        wake.notify();
        assert!(is_awake(&wake) && is_awake(&wake));
        wake.clear();
        assert!(!is_awake(&wake));
        wake.notify();
        assert!(is_awake(&wake));
    }
}

//! The daemon's signals, read from a descriptor by the supervisor's poll loop.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;

/// The signals the daemon acts on. While it exists they are blocked for their ordinary effect.
#[derive(Debug)]
pub(crate) struct Signals {
    fd: SignalFd,
    /// At the start there was a controlling terminal, and its hang-up was not to be ignored (nohup).
    on_terminal: bool,
}

impl Signals {
    /// Blocks the signals in the calling thread and all that it starts later: to be called first.
    ///
    /// # Errors
    /// EMFILE, ENFILE or ENOMEM.
    pub(crate) fn block() -> io::Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGHUP] {
            set.add(signal);
        }
        set.thread_block()?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Signals { fd, on_terminal: has_terminal() && !ignores_hang_up() })
    }

    /// Whether the terminal that the process was started on is gone, which is what its SIGHUP then means.
    pub(crate) fn lost_terminal(&self) -> bool {
        self.on_terminal && !has_terminal()
    }

    /// The next signal that has come, if any.
    pub(crate) fn next(&self) -> Option<Signal> {
        let info = self.fd.read_signal().ok().flatten()?;
        i32::try_from(info.ssi_signo).ok().and_then(|n| Signal::try_from(n).ok())
    }
}

/// Whether the process has a controlling terminal: /dev/tty can't be opened without.
fn has_terminal() -> bool {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    open("/dev/tty", flags, Mode::empty()).is_ok()
}

/// Whether the process was started with SIGHUP ignored, as proc(5) tells.
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    ignored.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & 1 != 0)
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

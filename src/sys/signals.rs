//! The daemon's signals, as a descriptor for the poll loop.

use std::io;

use nix::fcntl::{OFlag, open};
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::stat::Mode;

use super::process;

/// Blocked while this exists.
pub(crate) struct Signals {
    pub(crate) fd: SignalFd,
    /// Started on a controlling terminal, without nohup.
    on_terminal: bool,
}

impl Signals {
    /// Call it first: it blocks the signals in this thread and those that it starts later.
    pub(crate) fn block() -> io::Result<Self> {
        let mut set = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1, Signal::SIGHUP]);
        // A file above RLIMIT_FSIZE is the error of its upload.
        set.add(Signal::SIGXFSZ);
        // A parent that ignores it passes that on: the kernel reaps our children then, and nobody learns of their ends.
        // SAFETY: installs no handler.
        unsafe { signal(Signal::SIGCHLD, SigHandler::SigDfl) }?;
        if process::adopts_orphans() {
            set.add(Signal::SIGCHLD);
        }
        set.thread_block()?;
        // Blocked, it comes in any case; programs get the default, too.
        // SAFETY: installs no handler.
        let nohup = matches!(unsafe { signal(Signal::SIGHUP, SigHandler::SigDfl) }?, SigHandler::SigIgn);
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        Ok(Signals { fd, on_terminal: has_terminal() && !nohup })
    }

    /// SIGHUP then means that the terminal is gone.
    pub(crate) fn lost_terminal(&self) -> bool {
        self.on_terminal && !has_terminal()
    }

    pub(crate) fn next(&self) -> Option<Signal> {
        let info = self.fd.read_signal().ok().flatten()?;
        Signal::try_from(info.ssi_signo.cast_signed()).ok()
    }
}

/// /dev/tty opens only with a controlling terminal.
fn has_terminal() -> bool {
    let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    open("/dev/tty", flags, Mode::empty()).is_ok()
}

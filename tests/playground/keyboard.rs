//! What comes from the caller: signals and the terminal's raw mode.

use std::any::Any;
use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::termios::{self, SetArg, Termios};

use crate::harness::wait::spawn;

/// The signals that end the playground or resize its window, as a descriptor to poll.
pub struct Signals {
    set: SigSet,
    fd: SignalFd,
}

impl Signals {
    /// Takes the signals away from their default action, for this thread and those it starts.
    pub fn block() -> Result<Signals, String> {
        let set: SigSet =
            [Signal::SIGWINCH, Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT]
                .into_iter()
                .collect();
        set.thread_block().map_err(|e| format!("block signals: {e}"))?;
        let fd = SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map_err(|e| format!("signalfd: {e}"))?;
        Ok(Signals { set, fd })
    }

    /// Runs something that starts a process, which mustn't inherit the mask.
    pub fn unblocked<R>(&self, body: impl FnOnce() -> R) -> R {
        let _ = self.set.thread_unblock();
        let result = body();
        let _ = self.set.thread_block();
        result
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The next signal that has come.
    pub fn next(&self) -> Option<Signal> {
        let info = self.fd.read_signal().ok()??;
        Signal::try_from(info.ssi_signo as i32).ok()
    }
}

/// Does the work and returns what came of it, unless a signal comes first, which is an error.
pub fn unless_signalled<T: Send + 'static>(
    signals: &Signals,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<Result<T, String>, String> {
    // The harness fails by panicking; what it says becomes the error.
    std::panic::set_hook(Box::new(|_| {}));
    let (done, working) = std::io::pipe().map_err(|e| format!("a pipe: {e}"))?;
    let worker = spawn("work", move || {
        // Closed at the end, however that comes.
        let _working = working;
        work()
    });
    loop {
        let mut fds =
            [PollFd::new(signals.fd(), PollFlags::POLLIN), PollFd::new(done.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::NONE).map_err(|e| format!("poll: {e}"))?;
        while let Some(signal) = signals.next() {
            if signal != Signal::SIGWINCH {
                return Err(format!("interrupted by {signal}"));
            }
        }
        if fds[1].any() == Some(true) {
            let result = worker.join();
            let _ = std::panic::take_hook();
            return Ok(result.unwrap_or_else(|panic| Err(message(&*panic))));
        }
    }
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("the work failed").to_owned()
}

/// Raw mode on standard input, taken back on drop.
pub struct RawMode {
    before: Option<Termios>,
}

impl RawMode {
    /// Does nothing when standard input is no terminal.
    pub fn enter() -> Result<RawMode, String> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(RawMode { before: None });
        }
        let explain = |e: Errno| format!("terminal settings: {e}");
        let before = termios::tcgetattr(&stdin).map_err(explain)?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(&stdin, SetArg::TCSADRAIN, &raw).map_err(explain)?;
        Ok(RawMode { before: Some(before) })
    }

    pub fn is_raw(&self) -> bool {
        self.before.is_some()
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = termios::tcsetattr(std::io::stdin(), SetArg::TCSADRAIN, before);
        }
    }
}

/// Columns and rows of the caller's window; 80x24 when there is none.
pub fn window_size() -> (u16, u16) {
    let size = rustix::termios::tcgetwinsize(std::io::stdin())
        .or_else(|_| rustix::termios::tcgetwinsize(std::io::stdout()))
        .ok()
        .filter(|size| size.ws_col > 0 && size.ws_row > 0);
    size.map_or((80, 24), |size| (size.ws_col, size.ws_row))
}

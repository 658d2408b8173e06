//! Pseudo-terminals: the master side.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::pty::{PtyMaster, posix_openpt, ptsname_r, unlockpt};
use nix::sys::stat::Mode;
use nix::sys::termios::{InputFlags, SetArg, tcgetattr, tcsetattr};
use nix::unistd::{Uid, fchown};

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, libc::winsize);
nix::ioctl_read_bad!(window_size, libc::TIOCGWINSZ, libc::winsize);

/// In characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowSize {
    pub(crate) width: u16,
    pub(crate) height: u16,
}

impl WindowSize {
    /// Fails if that is no terminal.
    pub(crate) fn of(terminal: impl AsFd) -> io::Result<Self> {
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the kernel writes one winsize before the call returns; the descriptor is open as long as it is borrowed.
        unsafe { window_size(terminal.as_fd().as_raw_fd(), &raw mut size) }?;
        Ok(WindowSize { width: size.ws_col, height: size.ws_row })
    }
}

/// Non-blocking and close-on-exec; closing it hangs the terminal up.
#[derive(Debug)]
pub(crate) struct Pty {
    master: PtyMaster,
    /// Without it a terminal that all programs have closed is at its end, though login(1) opens it once more.
    slave: Option<OwnedFd>,
}

impl Pty {
    /// Returns the slave, too. It belongs to `owner`, as after a login, since some programs open their terminal by
    /// name. ENOSPC: out of PTYs (`kernel.pty.max`).
    pub(crate) fn open(size: WindowSize, owner: Option<Uid>) -> io::Result<(Self, OwnedFd)> {
        let master = posix_openpt(OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        unlockpt(&master)?;
        let name = ptsname_r(&master)?;
        let slave = open(name.as_str(), OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_CLOEXEC, Mode::empty())?;
        // Without CAP_CHOWN, or on a read-only devpts, only those programs fail.
        let _ = fchown(&slave, owner, None);
        // Clients speak UTF-8: in cooked mode backspace must remove a character, not a byte.
        let mut modes = tcgetattr(&slave)?;
        modes.input_flags.insert(InputFlags::IUTF8);
        tcsetattr(&slave, SetArg::TCSANOW, &modes)?;
        let pty = Pty { master, slave: Some(slave.try_clone()?) };
        pty.resize(size)?;
        Ok((pty, slave))
    }

    /// Call it when the session's leader has ended: nobody opens the terminal any more.
    pub(crate) fn release(&mut self) {
        self.slave = None;
    }

    /// The kernel sends SIGWINCH to the foreground process group.
    pub(crate) fn resize(&self, size: WindowSize) -> io::Result<()> {
        let size = libc::winsize { ws_row: size.height, ws_col: size.width, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the kernel reads one winsize before the call returns; the descriptor is open as long as `self` lives.
        unsafe { set_window_size(self.master.as_raw_fd(), &raw const size) }?;
        Ok(())
    }

    /// Takes over a master that another process opened. Fails for any other descriptor.
    pub(crate) fn adopt(master: OwnedFd) -> io::Result<(Self, WindowSize)> {
        // SAFETY: the descriptor is the wrapper's now; TIOCGPTN, below, fails if it isn't a master.
        let pty = Pty { master: unsafe { PtyMaster::from_owned_fd(master) }, slave: None };
        ptsname_r(&pty.master)?;
        let size = WindowSize::of(&pty.master)?;
        Ok((pty, size))
    }

    /// `Ok(0)`: no process holds the slave any more (EIO in the kernel).
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match nix::unistd::read(&self.master, buffer) {
            Err(Errno::EIO) => Ok(0),
            other => other.map_err(Into::into),
        }
    }

    /// Writes as much as the terminal takes now. EIO: no process holds the slave.
    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        nix::unistd::write(&self.master, bytes).map_err(Into::into)
    }
}

impl AsFd for Pty {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::poll_one;
    use nix::poll::PollFlags;
    use std::fs::File;
    use std::io::{Read, Write};

    const SIZE: WindowSize = WindowSize { width: 132, height: 43 };

    #[test]
    fn carries_bytes_both_ways_and_ends_when_the_other_side_closes() {
        let (mut pty, slave) = Pty::open(SIZE, None).unwrap();
        pty.release();
        let mut slave = File::from(slave);
        let mut buffer = [0; 64];
        assert_eq!(pty.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(pty.write(b"hello\n").unwrap(), 6);
        let n = slave.read(&mut buffer).unwrap();
        assert_eq!(&buffer[..n], b"hello\n");
        slave.write_all(b"out").unwrap();
        drop(slave);
        // The terminal echoes the input before.
        let mut seen = Vec::new();
        loop {
            // The kernel may still be carrying it over.
            poll_one(&pty, PollFlags::POLLIN, None).unwrap();
            match pty.read(&mut buffer).unwrap() {
                0 => break,
                n => seen.extend_from_slice(&buffer[..n]),
            }
        }
        assert_eq!(seen, b"hello\r\nout");
    }

    #[test]
    fn has_its_size_from_the_start() {
        let (_pty, slave) = Pty::open(SIZE, None).unwrap();
        let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: TIOCGWINSZ fills one winsize.
        let result = unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
        assert_eq!((result, size.ws_col, size.ws_row), (0, 132, 43));
    }
}

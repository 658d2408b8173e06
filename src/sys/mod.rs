//! Wrappers of the kernel and libc. The only place with `unsafe`.

pub(crate) mod beneath;
pub(crate) mod children;
pub(crate) mod clock;
mod errno;
pub(crate) mod manager;
pub(crate) mod names;
pub(crate) mod net;
pub(crate) mod privilege;
pub(crate) mod process;
pub(crate) mod pty;
pub(crate) mod race;
pub(crate) mod signals;
pub(crate) mod thread;
pub(crate) mod users;
pub(crate) mod wake;
pub(crate) mod wipe;

use std::ffi::{CStr, OsStr};
use std::io::{self, Write};
#[cfg(feature = "dbus")]
use std::os::fd::OwnedFd;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::NixPath;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};

pub(crate) use self::errno::reason;

/// Release builds abort on a panic, so that no lock is ever poisoned there.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// To the standard output. A reader that closed its end of the pipe is no reason to fail.
pub(crate) fn print(text: &str) {
    let mut out = io::stdout();
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

/// renameat2(2) within a directory, with RENAME_NOREPLACE or RENAME_EXCHANGE. nix has it for glibc only. EINVAL: the file
/// system, ENOSYS: the kernel (before 3.15) doesn't support it.
#[allow(unsafe_code)]
pub(crate) fn rename(dir: BorrowedFd<'_>, from: &OsStr, to: &OsStr, flags: libc::c_uint) -> nix::Result<()> {
    let dir = dir.as_raw_fd();
    let rename = |from: &CStr, to: &CStr| {
        // SAFETY: both names end in NUL and outlive the call, which only reads them.
        unsafe { libc::syscall(libc::SYS_renameat2, dir, from.as_ptr(), dir, to.as_ptr(), flags) }
    };
    let result = from.with_nix_path(|from| to.with_nix_path(|to| rename(from, to)))??;
    Errno::result(result).map(drop)
}

/// A duplicate of the socket of a bus connection whose watch is enabled. libdbus names its own by number only, and
/// closes it in whichever call notices that the connection is lost.
#[cfg(feature = "dbus")]
#[allow(unsafe_code)]
pub(crate) fn duplicate_socket(channel: &mut dbus::channel::Channel) -> io::Result<OwnedFd> {
    if !channel.is_connected() {
        return Err(io::Error::other("the connection was lost"));
    }
    // SAFETY: libdbus keeps the socket of a connected channel open between calls on the channel, and the exclusive
    // borrow rules out such a call before the duplicate exists.
    unsafe { BorrowedFd::borrow_raw(channel.watch().fd) }.try_clone_to_owned()
}

/// The descriptors for one poll(2).
#[derive(Default)]
pub(crate) struct PollSet<'a>(Vec<PollFd<'a>>);

impl<'a> PollSet<'a> {
    pub(crate) fn add(&mut self, fd: BorrowedFd<'a>, events: PollFlags) {
        self.0.push(PollFd::new(fd, events));
    }

    /// Waits until an event or `deadline`. An interruption counts as no event.
    pub(crate) fn wait(mut self, deadline: Option<Instant>) -> io::Result<Events> {
        match nix::poll::poll(&mut self.0, deadline.map_or(PollTimeout::NONE, timeout_until)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let events = self.0.iter().filter_map(|fd| Some((fd.as_fd().as_raw_fd(), fd.revents()?)));
        Ok(Events(events.filter(|(_, events)| !events.is_empty()).collect()))
    }
}

/// The events that poll(2) found. Only a hint: a descriptor that was opened since may have the number of a closed one.
#[derive(Debug, Default)]
pub(crate) struct Events(Vec<(RawFd, PollFlags)>);

impl Events {
    pub(crate) fn of(&self, fd: &impl AsFd) -> PollFlags {
        let fd = fd.as_fd().as_raw_fd();
        self.0.iter().find(|(ready, _)| *ready == fd).map_or(PollFlags::empty(), |(_, events)| *events)
    }
}

/// Waits for a single descriptor as a poll set does for many, and returns its events.
pub fn poll_one(fd: &impl AsFd, events: PollFlags, deadline: Option<Instant>) -> io::Result<PollFlags> {
    let mut set = PollSet::default();
    set.add(fd.as_fd(), events);
    Ok(set.wait(deadline)?.of(fd))
}

/// Rounded up to milliseconds: waking a moment early would only cost a second turn.
fn timeout_until(at: Instant) -> PollTimeout {
    let left = at.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
    PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn a_rename_to_a_new_name_replaces_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("from"), "new").unwrap();
        std::fs::write(path("taken"), "old").unwrap();
        let fd = std::fs::File::open(dir.path()).unwrap();
        let rename =
            |to: &str| rename(fd.as_fd(), OsStr::new("from"), OsStr::new(to), libc::RENAME_NOREPLACE);
        assert_eq!(rename("taken"), Err(Errno::EEXIST));
        assert_eq!(std::fs::read_to_string(path("taken")).unwrap(), "old");
        assert_eq!(rename("free"), Ok(()));
        assert!(path("free").exists() && !path("from").exists());
    }
}

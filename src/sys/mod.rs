//! Wrappers of kernel and libc; all of the `unsafe` code.

#![allow(unsafe_code)]

pub(crate) mod beneath;
pub(crate) mod children;
pub(crate) mod clock;
pub(crate) mod manager;
pub(crate) mod names;
pub(crate) mod net;
pub(crate) mod netlink;
pub(crate) mod privilege;
pub(crate) mod process;
pub(crate) mod pty;
pub(crate) mod race;
pub(crate) mod signals;
pub(crate) mod thread;
pub(crate) mod users;
pub(crate) mod wake;
pub(crate) mod wipe;

use std::collections::VecDeque;
use std::ffi::{CStr, OsStr};
use std::fs;
use std::io::{self, Write};
#[cfg(feature = "dbus")]
use std::os::fd::OwnedFd;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::NixPath;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::unistd::geteuid;

/// Go's texts for errors that differ from nix's: clients and operators compare with them.
const GO_TEXTS: [(Errno, &str); 9] = [
    (Errno::EAGAIN, "resource temporarily unavailable"),
    (Errno::EBADF, "bad file descriptor"),
    (Errno::EDQUOT, "disk quota exceeded"),
    (Errno::EIO, "input/output error"),
    (Errno::ELOOP, "too many levels of symbolic links"),
    (Errno::ENFILE, "too many open files in system"),
    (Errno::ENOMEM, "cannot allocate memory"),
    (Errno::EOPNOTSUPP, "operation not supported"),
    (Errno::EXDEV, "invalid cross-device link"),
];

/// Go's text: lower case, without the number.
pub(crate) fn reason(error: &io::Error) -> String {
    let Some(errno) = error.raw_os_error().map(Errno::from_raw) else { return error.to_string() };
    let known = GO_TEXTS.iter().find(|(known, _)| *known == errno);
    let mut text = known.map_or(errno.desc(), |(_, text)| text).to_owned();
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

/// Ignores poison: release builds abort on a panic.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives back the memory of a queue that was longer, all but a few times what it holds and `least`.
pub(crate) fn trim<T>(queue: &mut VecDeque<T>, least: usize) {
    let (capacity, length) = (queue.capacity(), queue.len());
    if capacity > 2 * least && capacity / 4 > length {
        queue.shrink_to(least.max(2 * length));
    }
}

/// Escapes what a terminal obeys: C0, C1, line separators and bidirectional controls. The escapes are JSON's, so that
/// JSON stays valid.
pub(crate) fn visible(line: &str) -> String {
    escape(line, "")
}

/// The same for a text with lines and columns of our own.
pub(crate) fn visible_lines(text: &str) -> String {
    escape(text, "\n\t")
}

fn escape(text: &str, kept: &str) -> String {
    let hidden = |c| {
        let bidi = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        (bidi || char::is_control(c)) && !kept.contains(c)
    };
    text.chars().map(|c| if hidden(c) { format!("\\u{:04x}", c as u32) } else { c.to_string() }).collect()
}

/// Lists who, besides root and this process's user, can change a file or replace it.
pub(crate) fn writers(file: &Path) -> Vec<String> {
    let exists = file.exists();
    let nearest = if exists { Some(file) } else { file.parent() };
    let real = nearest.and_then(|path| fs::canonicalize(path).ok()).unwrap_or_default();
    // A directory of the path that isn't the file's own has a symbolic link, which may be replaced, too.
    let links = file.ancestors().skip(1).filter_map(|place| fs::canonicalize(place).ok());
    let links: Vec<_> = links.filter(|place| !real.starts_with(place)).collect();
    let mut found = Vec::new();
    for (n, place) in real.ancestors().chain(links.iter().map(PathBuf::as_path)).enumerate() {
        let Ok(stat) = fs::metadata(place) else { continue };
        let (owner, group, mode) = (stat.uid(), stat.gid(), stat.mode());
        // In a sticky directory others can only add names that don't exist.
        let sticky = stat.is_dir() && mode & 0o1000 != 0 && (exists || n > 0);
        let mut add = |who: String| {
            found.push(match exists && n == 0 {
                true => format!("may be written by {who}"),
                false => format!("its directory {} may be written by {who}", place.display()),
            });
        };
        if ![0, geteuid().as_raw()].contains(&owner) {
            add(format!("its owner, user {owner}"));
        }
        if mode & 0o020 != 0 && group != 0 && !sticky {
            add(format!("its group, {group}"));
        }
        if mode & 0o002 != 0 && !sticky {
            add("everybody".to_owned());
        }
    }
    found
}

/// Ignores errors: the reader may have closed the pipe.
pub(crate) fn print(text: &str) {
    let mut out = io::stdout();
    let _ = out.write_all(visible_lines(text).as_bytes());
    let _ = out.flush();
}

/// renameat2(2) within a directory, which nix has for glibc only. EINVAL: unsupported by the file system, ENOSYS: by
/// the kernel (before 3.15).
pub(crate) fn rename(dir: BorrowedFd<'_>, from: &OsStr, to: &OsStr, flags: libc::c_uint) -> nix::Result<()> {
    let dir = dir.as_raw_fd();
    let rename = |from: &CStr, to: &CStr| {
        // SAFETY: both names end in NUL and outlive the call, which only reads them.
        unsafe { libc::syscall(libc::SYS_renameat2, dir, from.as_ptr(), dir, to.as_ptr(), flags) }
    };
    let result = from.with_nix_path(|from| to.with_nix_path(|to| rename(from, to)))??;
    Errno::result(result).map(drop)
}

/// Duplicates the socket of a channel whose watch is enabled. libdbus tells only its number, and closes it in whichever
/// call notices that the connection is lost.
#[cfg(feature = "dbus")]
pub(crate) fn duplicate_socket(channel: &mut dbus::channel::Channel) -> io::Result<OwnedFd> {
    if !channel.is_connected() {
        return Err(io::Error::other("the connection was lost"));
    }
    // SAFETY: libdbus keeps the socket of a connected channel open between calls on the channel, and the exclusive
    // borrow rules out such a call before the duplicate exists.
    unsafe { BorrowedFd::borrow_raw(channel.watch().fd) }.try_clone_to_owned()
}

/// Gives unused pages back to the system. musl does so by itself, glibc hardly: it kept 19 MiB of 25 after a flood.
pub(crate) fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes an integer, and moves no memory that is in use.
    unsafe {
        libc::malloc_trim(0)
    };
}

#[derive(Default)]
pub(crate) struct PollSet<'a> {
    fds: Vec<PollFd<'a>>,
    pub(crate) deadline: Option<Instant>,
}

impl<'a> PollSet<'a> {
    pub(crate) fn add(&mut self, fd: BorrowedFd<'a>, events: PollFlags) {
        self.fds.push(PollFd::new(fd, events));
    }

    /// The first of all these times ends the wait.
    pub(crate) fn until(&mut self, deadlines: &[Option<Instant>]) {
        self.deadline = deadlines.iter().copied().flatten().chain(self.deadline).min();
    }

    pub(crate) fn wait(mut self) -> io::Result<Events> {
        // Rounded up to milliseconds: waking early would cost a second turn.
        let left = |at: Instant| at.saturating_duration_since(Instant::now()) + Duration::from_micros(999);
        let limit = |at| PollTimeout::try_from(left(at)).unwrap_or(PollTimeout::MAX);
        while let Err(e) = nix::poll::poll(&mut self.fds, self.deadline.map(limit)) {
            if e != Errno::EINTR {
                return Err(e.into());
            }
        }
        let events = self.fds.iter().filter_map(|fd| Some((fd.as_fd().as_raw_fd(), fd.revents()?)));
        Ok(Events(events.filter(|(_, events)| !events.is_empty()).collect()))
    }
}

/// Only a hint: a descriptor opened since may have the number of a closed one.
#[derive(Debug, Default)]
pub(crate) struct Events(Vec<(RawFd, PollFlags)>);

impl Events {
    pub(crate) fn of(&self, fd: &impl AsFd) -> PollFlags {
        let fd = fd.as_fd().as_raw_fd();
        self.0.iter().find(|(ready, _)| *ready == fd).map_or(PollFlags::empty(), |(_, events)| *events)
    }
}

/// Whether one of `events`, or an error, is there now.
pub(crate) fn is_ready(fd: &impl AsFd, events: PollFlags) -> bool {
    poll_one(fd, events, Some(Instant::now())).is_ok_and(|events| !events.is_empty())
}

/// `PollSet::wait` for one descriptor.
pub fn poll_one(fd: &impl AsFd, events: PollFlags, deadline: Option<Instant>) -> io::Result<PollFlags> {
    let mut set = PollSet::default();
    set.add(fd.as_fd(), events);
    set.until(&[deadline]);
    Ok(set.wait()?.of(fd))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn reasons_are_in_gos_words() {
        let words = |errno: Errno| reason(&errno.into());
        assert_eq!(words(Errno::ENOENT), "no such file or directory");
        assert_eq!(words(Errno::EMFILE), "too many open files");
        assert_eq!(words(Errno::EAGAIN), "resource temporarily unavailable");
        assert_eq!(words(Errno::ENOMEM), "cannot allocate memory");
        assert_eq!(reason(&io::Error::other("no number")), "no number");
    }

    #[test]
    fn nothing_from_outside_moves_the_cursor() {
        assert_eq!(visible("a \"quoted\" é → ✓ e\u{301} 漢"), "a \"quoted\" é → ✓ e\u{301} 漢");
        assert_eq!(visible("\x1b[2J\r\n\u{9b}1m\x7f"), r"\u001b[2J\u000d\u000a\u009b1m\u007f");
        let bidi = "\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\u{2066}\u{2069}\u{61c}";
        assert_eq!(visible(bidi), r"\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\u061c");
        assert_eq!(visible_lines("a\n\tb\x1b\n"), "a\n\tb\\u001b\n");
    }

    #[test]
    fn whoever_can_replace_a_file_is_found() {
        use std::os::unix::fs::{PermissionsExt, symlink};
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let mode =
            |name: &str, mode| fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
        fs::create_dir_all(path("a/b")).unwrap();
        fs::write(path("a/b/file"), "").unwrap();
        fs::create_dir(path("links")).unwrap();
        symlink(path("a/b/file"), path("links/link")).unwrap();
        let check = |name: &str, expected: &[&str]| {
            let real = fs::canonicalize(dir.path()).unwrap();
            let expected = expected.iter().map(|text| text.replace("DIR", real.to_str().unwrap()));
            assert_eq!(writers(&path(name)), expected.collect::<Vec<_>>(), "{name}");
        };
        check("a/b/file", &[]);
        check("a/b/none", &[]);
        mode("a/b/file", 0o622 & !0o020);
        check("a/b/file", &["may be written by everybody"]);
        mode("a/b/file", 0o600);
        mode("a", 0o777 & !0o020);
        for name in ["a/b/file", "a/b/none", "links/link"] {
            check(name, &["its directory DIR/a may be written by everybody"]);
        }
        mode("a", 0o755);
        mode("links", 0o757);
        check("links/link", &["its directory DIR/links may be written by everybody"]);
        check("links/none", &["its directory DIR/links may be written by everybody"]);
        symlink(path("a"), path("links/a")).unwrap();
        check("links/a/b/none", &["its directory DIR/links may be written by everybody"]);
        mode("a", 0o1777);
        check("a/b/file", &[]);
        check("a/none", &["its directory DIR/a may be written by everybody"][..]);
    }

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

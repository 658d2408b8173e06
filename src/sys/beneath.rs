//! Opens files by path without leaving a directory, whatever happens to that path meanwhile. For any thread.
//!
//! Where there is openat2(2) (Linux 5.6) the boundary is the kernel's. Elsewhere the path is opened component by
//! component, each with O_NOFOLLOW in a directory that is held open, so that it reaches an entry of that directory and
//! nothing else. Links can't be followed safely that way: below a boundary they are refused.
//!
//! Neither is a boundary against mounts and hard links in the directory. A directory that was reached stays open,
//! wherever it is moved afterwards.

use std::ffi::{CStr, OsStr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::sync::OnceLock;

use nix::NixPath;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::libc;
use nix::sys::stat::{Mode, SFlag, fstat};

/// Retries of openat2(2) after EAGAIN, which any rename(2) on the system may cause.
const MAX_RACES: usize = 32;
const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Nothing above the starting directory is reachable: not by `..`, not by an absolute path, and not through a
    /// link.
    pub(crate) beneath: bool,
    /// Follow symbolic links. Otherwise any link in the path is ELOOP, the last component included, unless that is
    /// opened as the link itself (O_PATH and O_NOFOLLOW). With `beneath` it needs [`follows_links`].
    pub(crate) follow_links: bool,
}

/// True if links can be followed without leaving the directory. Probes openat2(2) once: older container runtimes answer
/// EPERM to system calls that they don't know.
pub(crate) fn follows_links() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let rules = Rules { beneath: false, follow_links: true };
        let answer = ask_kernel(AT_FDCWD, Path::new("/"), DIRECTORY, rules);
        !matches!(answer, Err(Errno::ENOSYS | Errno::EPERM))
    })
}

/// Opens `path`, from `dir` if it is relative, with O_PATH or as a directory; O_CLOEXEC is always added. Fails with EXDEV
/// for a way out, ELOOP for a link that isn't to be followed, else as open(2).
pub(crate) fn open(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> nix::Result<OwnedFd> {
    let flags = flags | OFlag::O_CLOEXEC;
    if !follows_links() {
        return walk(dir, path, flags, rules);
    }
    // EAGAIN: something was renamed while the kernel resolved `..`.
    let mut answers = std::iter::repeat_with(|| ask_kernel(dir, path, flags, rules)).take(MAX_RACES);
    let answer = answers.find(|answer| !matches!(answer, Err(Errno::EAGAIN)));
    answer.unwrap_or(Err(Errno::EAGAIN))
}

/// Opens the very file that `fd` (O_PATH) refers to, so that the checks on `fd` hold for it; O_CLOEXEC and O_LARGEFILE are
/// always added. Needs procfs on `/proc`, which only root can change, else ENOENT. A link is ELOOP.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: OFlag) -> nix::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    openat(AT_FDCWD, path.as_str(), flags | OFlag::O_CLOEXEC | OFlag::O_LARGEFILE, Mode::empty())
}

/// Attributes of `name` in `dir`, a set of STATX_ATTR_*. None before Linux 4.11; nothing tells of mounts before 5.8.
#[allow(unsafe_code)]
pub(crate) fn attributes(dir: BorrowedFd<'_>, name: &OsStr) -> u64 {
    // struct statx: 256 bytes, whose second eight are stx_attributes. Older versions of musl don't have it.
    let mut statx = [0_u64; 32];
    let (dir, flags, place) = (dir.as_raw_fd(), AtFlags::AT_SYMLINK_NOFOLLOW.bits(), statx.as_mut_ptr());
    // SAFETY: the name ends in NUL, the kernel writes one struct statx, and both outlive the call.
    let ask = |name: &CStr| unsafe { libc::syscall(libc::SYS_statx, dir, name.as_ptr(), flags, 0, place) };
    let _ = name.with_nix_path(ask);
    statx[1]
}

fn ask_kernel(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> nix::Result<OwnedFd> {
    // Links of procfs lead to what a process has open, wherever that is.
    let mut resolve = ResolveFlag::RESOLVE_NO_MAGICLINKS;
    resolve.set(ResolveFlag::RESOLVE_BENEATH, rules.beneath);
    resolve.set(ResolveFlag::RESOLVE_NO_SYMLINKS, !rules.follow_links);
    openat2(dir, path, OpenHow::new().flags(flags).resolve(resolve))
}

fn walk(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> nix::Result<OwnedFd> {
    if rules.follow_links && !rules.beneath {
        return openat(dir, path, flags, Mode::empty());
    }
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::RootDir if rules.beneath => return Err(Errno::EXDEV),
            // By name: a directory that is moved meanwhile has another parent. Without links it means the same.
            Component::ParentDir if rules.beneath => drop(names.pop().ok_or(Errno::EXDEV)?),
            other => names.push(other.as_os_str()),
        }
    }
    let mut here = openat(dir, ".", DIRECTORY, Mode::empty())?;
    for (at, name) in names.iter().enumerate() {
        let entry = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        here = openat(&here, *name, entry, Mode::empty())?;
        let itself = at + 1 == names.len() && flags.contains(OFlag::O_NOFOLLOW);
        if !itself && SFlag::from_bits_truncate(fstat(&here)?.st_mode) & SFlag::S_IFMT == SFlag::S_IFLNK {
            return Err(Errno::ELOOP);
        }
    }
    // A slash at the end means a directory as well.
    if flags.contains(OFlag::O_DIRECTORY) || path.as_os_str().as_bytes().ends_with(b"/") {
        return openat(&here, ".", flags | OFlag::O_DIRECTORY, Mode::empty());
    }
    Ok(here)
}

#[cfg(test)]
mod tests;

//! Opens files by path without leaving a directory, whatever happens to that path meanwhile.
//!
//! With openat2(2) (Linux 5.6) the kernel enforces the boundary. Older kernels: the path is opened component by
//! component, each with O_NOFOLLOW in a directory that is held open, so that it can only reach an entry of that
//! directory. Symbolic links cannot be followed safely that way, and are refused.
//!
//! Mounts and hard links in the directory are not covered. An open directory stays open wherever it is moved.

use std::ffi::{CStr, OsStr};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::sync::OnceLock;

use nix::NixPath;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::libc;
use nix::sys::stat::{Mode, SFlag};

/// Retries after EAGAIN, which any rename(2) on the system may cause.
const MAX_RACES: usize = 32;
const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY).union(OFlag::O_CLOEXEC);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Nothing above the starting directory is reachable, be it by `..`, an absolute path or a link.
    pub(crate) beneath: bool,
    /// Otherwise any link in the path is ELOOP, even the last component, unless that is opened as a link (O_PATH and
    /// O_NOFOLLOW). With `beneath` it needs [`follows_links`].
    pub(crate) follow_links: bool,
}

/// Whether links can be followed within a boundary. Probes openat2(2) once: older container runtimes answer EPERM to
/// unknown system calls.
pub(crate) fn follows_links() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let rules = Rules { beneath: false, follow_links: true };
        let answer = ask_kernel(AT_FDCWD, Path::new("/"), DIRECTORY, rules);
        !matches!(answer, Err(Errno::ENOSYS | Errno::EPERM))
    })
}

/// `path` may be relative to `dir`; `flags` need O_PATH or O_DIRECTORY. EXDEV: a way out, ELOOP: a link that is not to
/// be followed; else as open(2).
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

/// Opens the very file behind an O_PATH descriptor, so that checks of `fd` hold for it. Needs procfs on /proc, else
/// ENOENT. A link is ELOOP.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: OFlag) -> nix::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    openat(AT_FDCWD, path.as_str(), flags | OFlag::O_CLOEXEC | OFlag::O_LARGEFILE, Mode::empty())
}

/// nix's fails with EOVERFLOW for files of 2 GiB and large inodes on 32-bit glibc.
pub(crate) fn fstat(fd: impl AsFd) -> nix::Result<libc::stat64> {
    fstatat(fd, OsStr::new(""), AtFlags::AT_EMPTY_PATH)
}

pub(crate) fn fstatat(dir: impl AsFd, name: &OsStr, flags: AtFlags) -> nix::Result<libc::stat64> {
    let (dir, mut stat) = (dir.as_fd().as_raw_fd(), MaybeUninit::uninit());
    // SAFETY: the name ends in NUL, libc writes one struct stat64, and both outlive the call.
    let ask = |name: &CStr| unsafe { libc::fstatat64(dir, name.as_ptr(), stat.as_mut_ptr(), flags.bits()) };
    Errno::result(name.with_nix_path(ask)?)?;
    // SAFETY: the call has succeeded.
    Ok(unsafe { stat.assume_init() })
}

/// STATX_ATTR_* bits; 0 before Linux 4.11. Mounts are reported since 5.8.
pub(crate) fn attributes(dir: BorrowedFd<'_>, name: &OsStr) -> u64 {
    // struct statx has 256 bytes; stx_attributes are the second eight. Older versions of musl lack it.
    let mut statx = [0_u64; 32];
    let (dir, flags, place) = (dir.as_raw_fd(), AtFlags::AT_SYMLINK_NOFOLLOW.bits(), statx.as_mut_ptr());
    // SAFETY: the name ends in NUL, the kernel writes one struct statx, and both outlive the call.
    let ask = |name: &CStr| unsafe { libc::syscall(libc::SYS_statx, dir, name.as_ptr(), flags, 0, place) };
    let _ = name.with_nix_path(ask);
    statx[1]
}

fn ask_kernel(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> nix::Result<OwnedFd> {
    // Links of procfs lead to whatever a process has open.
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
    // A trailing slash means a directory, too.
    if flags.contains(OFlag::O_DIRECTORY) || path.as_os_str().as_bytes().ends_with(b"/") {
        return openat(&here, ".", flags | OFlag::O_DIRECTORY, Mode::empty());
    }
    Ok(here)
}

#[cfg(test)]
mod tests;

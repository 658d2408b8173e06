//! Opens files by path without leaving a directory, whatever happens to that path meanwhile.
//!
//! For any thread: nothing is shared but whether the kernel has openat2(2).
//!
//! Two implementations, with the same answers. Where there is openat2(2) (Linux 5.6) the boundary is the
//! kernel's. Elsewhere a walk opens the path component by component, and its boundary rests on three
//! things:
//!
//! - every open(2) has one component as its path and O_NOFOLLOW, in a directory that is held open: so it
//!   reaches an entry of that directory and nothing else;
//! - a link is opened itself and read through that descriptor, so that nothing can take its place between
//!   check and use, and its text is walked like the path: no other than the walk ever follows one;
//! - `..` goes back to the directory that the walk came from, which is still open. The kernel isn't asked
//!   for the parent: a directory moved elsewhere meanwhile would answer with one outside.
//!
//! Neither is a boundary against mounts and hard links in the directory: what they show is there. And what
//! was there when it was reached stays open to us, wherever it is moved afterwards.
//!
//! The walk differs in this: it stops at 256 directories below the start, takes links of procfs outside of
//! its root for magic ones without exception, doesn't know the mount option `nosymfollow`, and may answer
//! ELOOP or ENOTDIR where a link and something else change places at that moment.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::libc;
use nix::sys::stat::Mode;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::geteuid;

/// MAXSYMLINKS, as in the kernel.
const MAX_LINKS: u32 = 40;
/// Directories below the start that the walk holds open: a path mustn't use up the descriptors of other sessions.
const MAX_DEPTH: usize = 256;
/// Retries of openat2(2) after EAGAIN, which any rename(2) on the system may cause.
const MAX_RACES: u32 = 32;
const DIRECTORY: OFlag = OFlag::O_PATH.union(OFlag::O_DIRECTORY);
/// Mode of a created file until its owner changes it.
const PRIVATE: Mode = Mode::S_IRUSR.union(Mode::S_IWUSR);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// Nothing above the starting directory is reachable: not by `..`, not by an absolute path, and not through a
    /// link.
    pub(crate) beneath: bool,
    /// Follow symbolic links. Otherwise any link in the path is ELOOP, the last component included, unless that is
    /// opened as the link itself (O_PATH and O_NOFOLLOW).
    pub(crate) follow_links: bool,
}

/// Opens `path`, from `dir` if it is relative.
///
/// `flags` are those of open(2); O_CLOEXEC and O_LARGEFILE are always added. A created file has mode 0600 (less the
/// umask). The magic links of procfs are never followed.
///
/// Fails with EXDEV for a way out, ELOOP for a forbidden link or more than 40 of them, EINVAL for a NUL in the path
/// or O_CREAT together with O_DIRECTORY, else as open(2).
pub(crate) fn open(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> io::Result<OwnedFd> {
    let flags = effective(flags)?;
    if has_openat2() {
        for _ in 0..MAX_RACES {
            match ask_kernel(dir, path, flags, rules) {
                // A rename while `..` was resolved. Or a lease that stands in the way, which the walk finds as well.
                Err(Errno::EAGAIN) => {}
                answer => return Ok(answer?),
            }
        }
    }
    walk(dir, path, flags, rules)
}

/// Opens the very file that `fd` (O_PATH) refers to, for reading or whatever `flags` say; O_CLOEXEC and O_LARGEFILE
/// are always added. So what was checked on `fd` holds for what is opened here.
///
/// Needs procfs on `/proc`, which only root can change, else ENOENT. A link is ELOOP, O_CREAT is EINVAL.
pub(crate) fn reopen(fd: BorrowedFd<'_>, flags: OFlag) -> io::Result<OwnedFd> {
    if flags.contains(OFlag::O_CREAT) {
        return Err(Errno::EINVAL.into());
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    // This link alone is to be followed.
    let flags = effective(flags)? - OFlag::O_NOFOLLOW;
    Ok(openat(AT_FDCWD, path.as_str(), flags, Mode::empty())?)
}

/// The flags as both implementations accept them. openat2(2) is stricter than open(2) with O_PATH, and kernels differ
/// in what they do with the pair that is refused here.
fn effective(flags: OFlag) -> io::Result<OFlag> {
    if flags.contains(OFlag::O_PATH) {
        return Ok(flags.intersection(DIRECTORY | OFlag::O_NOFOLLOW) | OFlag::O_CLOEXEC);
    }
    if flags.contains(OFlag::O_CREAT | OFlag::O_DIRECTORY) {
        return Err(Errno::EINVAL.into());
    }
    Ok(flags | OFlag::O_CLOEXEC | OFlag::O_LARGEFILE)
}

/// Probes openat2(2) once. Older container runtimes answer EPERM to system calls that they don't know.
fn has_openat2() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| {
        let how = OpenHow::new().flags(DIRECTORY | OFlag::O_CLOEXEC);
        let answer = openat2(AT_FDCWD, "/", how.resolve(ResolveFlag::RESOLVE_NO_MAGICLINKS));
        !matches!(answer, Err(Errno::ENOSYS | Errno::EPERM))
    })
}

fn ask_kernel(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> nix::Result<OwnedFd> {
    let mut resolve = ResolveFlag::RESOLVE_NO_MAGICLINKS;
    resolve.set(ResolveFlag::RESOLVE_BENEATH, rules.beneath);
    resolve.set(ResolveFlag::RESOLVE_NO_SYMLINKS, !rules.follow_links);
    let creates = flags.contains(OFlag::O_CREAT) || flags.contains(OFlag::O_TMPFILE);
    // Mode bits for a file that isn't created are EINVAL.
    let mode = if creates { PRIVATE } else { Mode::empty() };
    openat2(dir, path, OpenHow::new().flags(flags).mode(mode).resolve(resolve))
}

/// Resolves the path in user space; the module's documentation says what makes that safe.
fn walk(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> io::Result<OwnedFd> {
    let mut rest = path.as_os_str().as_bytes().to_vec();
    if rest.is_empty() {
        return Err(Errno::ENOENT.into());
    } else if rest.contains(&0) {
        return Err(Errno::EINVAL.into());
    } else if rest.len() >= libc::PATH_MAX as usize {
        return Err(Errno::ENAMETOOLONG.into());
    }
    let mut way = if rest.starts_with(b"/") { Way::from_root(rules)? } else { Way::from(dir, rules)? };
    let (mut done, mut links) = (0, 0);
    loop {
        let (mut name, tail) = first_component(&rest[done..]);
        let last = tail.iter().all(|b| *b == b'/');
        if rules.beneath && name == b".." {
            way.back()?;
            name = b".";
        }
        let slash = last && !tail.is_empty() && name != b"." && name != b"..";
        let wanted = if !last {
            DIRECTORY
        } else if !slash {
            flags
        } else if flags.contains(OFlag::O_CREAT) {
            way.search()?;
            return Err(Errno::EISDIR.into());
        } else {
            flags.difference(OFlag::O_NOFOLLOW) | OFlag::O_DIRECTORY
        };
        let link = match entry(way.here(), name, wanted)? {
            Entry::Opened(file) if last => return Ok(file.into()),
            Entry::Opened(directory) => {
                if name != b"." {
                    way.enter(directory)?;
                }
                done = rest.len() - tail.len();
                continue;
            }
            Entry::Link(link) => link,
        };
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::ELOOP.into());
        }
        if last && is_strangers_link(way.here(), &link)? && strangers_links_are_barred() {
            return Err(Errno::EACCES.into());
        }
        if !rules.follow_links {
            return Err(Errno::ELOOP.into());
        }
        let text = readlinkat(&link, "")?.into_vec();
        if is_magic(way.here(), &link)? {
            return Err(Errno::ELOOP.into());
        }
        if text.starts_with(b"/") {
            way = Way::from_root(rules)?;
        }
        rest = [text.as_slice(), tail].concat();
        done = 0;
    }
}

/// Splits off the first component; the remainder starts with a slash or is empty. Only slashes mean the directory
/// itself.
fn first_component(path: &[u8]) -> (&[u8], &[u8]) {
    let Some(start) = path.iter().position(|b| *b != b'/') else { return (b".", b"") };
    let path = &path[start..];
    path.split_at(path.iter().position(|b| *b == b'/').unwrap_or(path.len()))
}

/// The directories that the walk has entered, all open. With `beneath` the first is the start and the last the
/// current one; without it only the current one is kept, since the kernel may then resolve `..`.
struct Way {
    above: Vec<File>,
    here: File,
    beneath: bool,
}

impl Way {
    fn from(dir: BorrowedFd<'_>, rules: Rules) -> io::Result<Way> {
        let here = open_entry(dir, b".", DIRECTORY)?;
        Ok(Way { above: Vec::new(), here, beneath: rules.beneath })
    }

    fn from_root(rules: Rules) -> io::Result<Way> {
        if rules.beneath {
            return Err(Errno::EXDEV.into());
        }
        let here = open_entry(AT_FDCWD, b"/", DIRECTORY)?;
        Ok(Way { above: Vec::new(), here, beneath: rules.beneath })
    }

    fn here(&self) -> &File {
        &self.here
    }

    /// Checks search permission on the current directory: the kernel requires it for `.` and `..` as well.
    fn search(&self) -> io::Result<()> {
        open_entry(&self.here, b".", DIRECTORY).map(drop)
    }

    fn enter(&mut self, directory: File) -> io::Result<()> {
        if self.above.len() >= MAX_DEPTH {
            return Err(Errno::ENAMETOOLONG.into());
        }
        let left = std::mem::replace(&mut self.here, directory);
        if self.beneath {
            self.above.push(left);
        }
        Ok(())
    }

    fn back(&mut self) -> io::Result<()> {
        self.search()?;
        self.here = self.above.pop().ok_or(Errno::EXDEV)?;
        Ok(())
    }
}

enum Entry {
    Opened(File),
    /// A link to follow, as an O_PATH descriptor.
    Link(File),
}

/// Opens the entry `name` of `dir` in one step, so that a file may be created without a race. Only if that fails does
/// it check whether the entry is a link to follow.
fn entry(dir: &File, name: &[u8], flags: OFlag) -> io::Result<Entry> {
    let opened = open_entry(dir, name, flags);
    if flags.contains(OFlag::O_NOFOLLOW) || flags.contains(OFlag::O_CREAT | OFlag::O_EXCL) {
        return opened.map(Entry::Opened);
    }
    match opened {
        // O_PATH without O_DIRECTORY opens a link itself.
        Ok(file) if flags & DIRECTORY == OFlag::O_PATH && is_link(&file)? => Ok(Entry::Link(file)),
        Ok(file) => Ok(Entry::Opened(file)),
        Err(error) => match open_entry(dir, name, OFlag::O_PATH) {
            Ok(file) if is_link(&file)? => Ok(Entry::Link(file)),
            _ => Err(error),
        },
    }
}

/// Opens one component, never through a link.
fn open_entry(dir: impl AsFd, name: &[u8], flags: OFlag) -> io::Result<File> {
    let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    Ok(openat(dir, name, flags, PRIVATE)?.into())
}

fn is_link(file: &File) -> io::Result<bool> {
    Ok(file.metadata()?.is_symlink())
}

/// True if procfs answers the link with a file instead of a path, as it does with all but those in its root: `self`,
/// `mounts` and the like.
fn is_magic(dir: &File, link: &File) -> io::Result<bool> {
    const PROC_ROOT_INO: u64 = 1;
    let on_procfs = fstatfs(link).is_ok_and(|fs| fs.filesystem_type() == PROC_SUPER_MAGIC);
    Ok(on_procfs && dir.metadata()?.ino() != PROC_ROOT_INO)
}

/// proc(5), protected_symlinks: true for a link in a directory like /tmp that neither we nor the directory's owner
/// made.
fn is_strangers_link(dir: &File, link: &File) -> io::Result<bool> {
    const STICKY_AND_FOR_ALL: u32 = 0o1002;
    let (dir, link) = (dir.metadata()?, link.metadata()?);
    let shared = dir.mode() & STICKY_AND_FOR_ALL == STICKY_AND_FOR_ALL;
    Ok(shared && link.uid() != dir.uid() && link.uid() != geteuid().as_raw())
}

/// The sysctl protected_symlinks; if it can't be read, true to be on the safe side.
fn strangers_links_are_barred() -> bool {
    fs::read("/proc/sys/fs/protected_symlinks").map_or(true, |text| !text.starts_with(b"0"))
}

#[cfg(test)]
mod tests;

//! Finds files within Limits.FileTransfer.
//!
//! A path is resolved once, by [`beneath`]'s rules, into a descriptor, and all checks are about the descriptor. So
//! nothing can be exchanged between a check and its use.

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, OFlag, fcntl, open};
use nix::libc::{self, stat64};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::{Gid, Group, Uid, User, geteuid};

use crate::config::FileLimits;
use crate::permits::{Permit, Permits};
use crate::proto::clipped;
use crate::proto::file::Request;
use crate::sys::beneath::{self, Rules, fstat, fstatat};
use crate::sys::privilege::owns_all_files;
use crate::sys::reason;

pub(super) const TOO_LARGE: &str = "the file size is over the limit";
pub(super) const OVERWRITE: &str = "forbidden to overwrite the file";
const OUTSIDE: &str = "the target file path is outside chroot";
const OWNER: &str = "the file owner does not match";
const GROUP: &str = "the file group does not match";
const OVER_DIRECTORY: &str = "conflicting file path: cannot overwrite directory";

/// Bytes that are read at most to learn a file's size.
const MAX_COPY: usize = 1 << 20;
const LARGEST_PAGE: i64 = 64 << 10;

const DEFAULT_MODE: u32 = 0o644;
/// Set-uid and set-gid, as chmod(2) and as Go have them.
const SET_ID: u32 = 0o6000 | 1 << 23 | 1 << 22;

pub(super) type Limits<'a> = Option<&'a FileLimits>;
pub(super) type Result<T> = std::result::Result<T, Failure>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(super) text: String,
    /// By the limits, not by the system.
    pub(super) denied: bool,
}

impl<T: Into<String>> From<T> for Failure {
    fn from(text: T) -> Self {
        Failure { text: text.into(), denied: false }
    }
}

impl Failure {
    pub(super) fn io(what: impl Display, e: impl Into<io::Error>) -> Self {
        format!("{what}: {}", reason(&e.into())).into()
    }

    pub(super) fn denied(limit: &str) -> Self {
        Failure::limited(format!("access denied: {limit}"))
    }

    pub(super) fn limited(text: impl Into<String>) -> Self {
        Failure { text: text.into(), denied: true }
    }

    pub(super) fn result(&self) -> &'static str {
        if self.denied { "denied" } else { "failed" }
    }
}

pub(super) struct Target {
    pub(super) dir: OwnedFd,
    pub(super) name: OsString,
    pub(super) path: PathBuf,
}

impl Target {
    pub(super) fn lstat(&self) -> Result<Option<stat64>> {
        self.look_at(&self.name)
    }

    pub(super) fn look_at(&self, name: &OsStr) -> Result<Option<stat64>> {
        match fstatat(&self.dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(e) => {
                Err(Failure::io(format!("error checking file location: lstat {}", shown(&self.path)), e))
            }
        }
    }

    /// Finds what would keep rename(2) from replacing `existing`, besides what keeps the temporary file from being
    /// created. Trying it out isn't safe: the name may be another file's by now.
    fn can_be_replaced(&self, existing: &stat64) -> Result<()> {
        let failed = |e| Failure::io(creating(&self.path), e);
        let dir = fstat(&self.dir).map_err(failed)?;
        let attributes = |name| beneath::attributes(self.dir.as_fd(), name);
        let target = attributes(&self.name);
        if target & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0 {
            return Err(failed(Errno::EBUSY));
        }
        let fixed = (libc::STATX_ATTR_IMMUTABLE | libc::STATX_ATTR_APPEND) as u64;
        let sticky = dir.st_mode & libc::S_ISVTX != 0;
        let ours = [dir.st_uid, existing.st_uid].contains(&geteuid().as_raw());
        if (target | attributes(OsStr::new("."))) & fixed != 0 || sticky && !ours && !owns_all_files() {
            return Err(failed(Errno::EPERM));
        }
        Ok(())
    }
}

fn kind(stat: &stat64) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

fn resolve(limits: Limits<'_>, path: &Path, flags: OFlag, what: &str) -> Result<OwnedFd> {
    let failed = |e| Failure::io(what, e);
    let Some(limits) = limits else {
        return open(path, flags | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed);
    };
    let beneath = limits.chroot.is_some();
    // Before Linux 5.6, links below a chroot can't be followed safely, and are refused.
    let follow_links = limits.follow_symlinks && (!beneath || beneath::follows_links());
    let (start, rest) = match &limits.chroot {
        // By components, since a sibling's name may begin like the chroot's. The chroot's own path may hold links.
        Some(chroot) => (chroot.as_path(), path.strip_prefix(chroot).map_err(|_| Failure::denied(OUTSIDE))?),
        None => (Path::new("."), path),
    };
    let mut rest = if rest.as_os_str().is_empty() { OsString::from(".") } else { rest.into() };
    // Stripping the prefix has dropped a slash at the end, which means a directory.
    if path.as_os_str().as_bytes().ends_with(b"/") {
        rest.push("/");
    }
    let start_flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let start = open(start, start_flags, Mode::empty()).map_err(failed)?;
    let rules = Rules { beneath, follow_links };
    beneath::open(start.as_fd(), Path::new(&rest), flags, rules).map_err(|e| match e {
        Errno::EXDEV => Failure::denied(OUTSIDE),
        Errno::ELOOP if !follow_links => Failure::denied("forbidden to follow the link"),
        other => failed(other),
    })
}

/// O_PATH has no effect on a device or a FIFO, and doesn't wait for one.
fn find(limits: Limits<'_>, path: &Path, flags: OFlag, what: &str) -> Result<(OwnedFd, stat64)> {
    let fd = resolve(limits, path, OFlag::O_PATH | flags, what)?;
    let stat = fstat(&fd).map_err(|e| Failure::io(what, e))?;
    Ok((fd, stat))
}

/// Reads the content of a file that doesn't know its size, if it may be sent.
pub(super) fn stat(limits: Limits<'_>, path: &Path, memory: &Arc<Permits>) -> Result<Known> {
    let what = format!("failed to get file info from path '{0}': stat {0}", shown(path));
    let (found, mut stat) = find(limits, path, OFlag::empty(), &what)?;
    let may = kind(&stat) == SFlag::S_IFREG && may_get(limits, &stat).is_ok();
    // A file that can't be read is an error when the client asks for it.
    let content = if may { read_first(&found, &mut stat, memory).unwrap_or(None) } else { None };
    Ok(Known { path: path.to_owned(), stat, content })
}

/// Opens a regular file; others have no content with a known end. The metadata is what the limits were checked against.
pub(super) fn source(
    limits: Limits<'_>,
    path: &Path,
    known: Option<Known>,
    memory: &Arc<Permits>,
) -> Result<(Content, stat64)> {
    let what = format!("failed to open file for reading: open {}", shown(path));
    // For this limit a link is not a regular file, wherever it leads.
    let regular_only = limits.is_some_and(|l| l.regular_files_only);
    let flags = if regular_only { OFlag::O_NOFOLLOW } else { OFlag::empty() };
    let (found, mut stat) = find(limits, path, flags, &what)?;
    if regular_only && kind(&stat) != SFlag::S_IFREG {
        return Err(Failure::denied("only regular files are allowed"));
    }
    let known = known.filter(|known| {
        known.path == path && (known.stat.st_dev, known.stat.st_ino) == (stat.st_dev, stat.st_ino)
    });
    let told = known.as_ref().map(|known| known.stat.st_size).filter(|size| *size > 0);
    may_get(limits, &stat)?;
    match kind(&stat) {
        SFlag::S_IFREG => {}
        SFlag::S_IFDIR => return Err(Failure::io(what, Errno::EISDIR)),
        _ => return Err((what + ": not a regular file").into()),
    }
    let content = match known {
        Some(Known { content: Some(content), stat: known, .. }) => {
            stat.st_size = known.st_size;
            Some(content)
        }
        _ => read_first(&found, &mut stat, memory).map_err(|e| Failure::io(&what, e))?,
    };
    if let Some(content) = content {
        // It has its size only now.
        may_get(limits, &stat)?;
        return Ok((content, stat));
    }
    // The client expects the size that it was told, even if the file has grown.
    stat.st_size = told.map_or(stat.st_size, |told| told.min(stat.st_size));
    let file = open_for_reading(&found).map_err(|e| Failure::io(what, e))?;
    Ok((Content { file, _memory: memory.none() }, stat))
}

pub(super) struct Known {
    pub(super) path: PathBuf,
    pub(super) stat: stat64,
    pub(super) content: Option<Content>,
}

/// The file, or a copy with a permit for its memory.
pub(super) struct Content {
    pub(super) file: File,
    _memory: Permit,
}

fn open_for_reading(found: &OwnedFd) -> io::Result<File> {
    // Opened without O_NONBLOCK, which fails with EAGAIN while smbd or knfsd holds a lease on the file. So open(2)
    // waits for the holder to give way, at most /proc/sys/fs/lease-break-time, and holds up this session's thread only.
    let file = beneath::reopen(found.as_fd(), OFlag::O_RDONLY)?;
    // Read with O_NONBLOCK, since a file such as trace_pipe may have nothing to read for now.
    fcntl(&file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(file.into())
}

/// Copies a file that doesn't know its size: procfs claims none, sysfs a page, and both occupy no blocks. `None` for
/// other files and large ones.
fn read_first(found: &OwnedFd, stat: &mut stat64, memory: &Arc<Permits>) -> io::Result<Option<Content>> {
    let mut permit = memory.none();
    if stat.st_blocks != 0 || stat.st_size > LARGEST_PAGE || !permit.resize(MAX_COPY) {
        return Ok(None);
    }
    // Fails before Linux 3.17.
    let Ok(copy) = memfd_create(c"copy", MFdFlags::MFD_CLOEXEC) else { return Ok(None) };
    let mut file = File::from(copy);
    // By way of a small buffer. As files, io::copy would hand both to system calls that procfs doesn't support well.
    let source: &mut dyn Read = &mut open_for_reading(found)?.take(MAX_COPY as u64 + 1);
    let length = io::copy(source, &mut file)?;
    if length > MAX_COPY as u64 {
        return Ok(None);
    }
    file.rewind()?;
    permit.resize(length as usize);
    stat.st_size = length as _;
    Ok(Some(Content { file, _memory: permit }))
}

fn may_get(limits: Limits<'_>, stat: &stat64) -> Result<()> {
    let Some(limits) = limits else { return Ok(()) };
    // An owner or group without a name matches none.
    let owner = || User::from_uid(Uid::from_raw(stat.st_uid)).ok().flatten().map(|user| user.name);
    if !limits.owner_get.is_empty() && !owner().is_some_and(|name| limits.owner_get.contains(&name)) {
        return Err(Failure::denied(OWNER));
    }
    let group = || Group::from_gid(Gid::from_raw(stat.st_gid)).ok().flatten().map(|group| group.name);
    if !limits.group_get.is_empty() && !group().is_some_and(|name| limits.group_get.contains(&name)) {
        return Err(Failure::denied(GROUP));
    }
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    if limits.max_file_size.is_some_and(|max| size > max.get()) {
        return Err(Failure::denied(TOO_LARGE));
    }
    Ok(())
}

pub(super) fn target(limits: Limits<'_>, request: &Request) -> Result<(Target, Attributes)> {
    let max = limits.and_then(|l| l.max_file_size);
    if request.size.zip(max).is_some_and(|(size, max)| size > max.get()) {
        return Err(Failure::denied(TOO_LARGE));
    }
    let target = locate(limits, request)?;
    let attributes = Attributes::new(limits, request)?;
    attributes.check(&target)?;
    if limits.is_some_and(|l| !l.allow_suid) && request.mode.is_some_and(|mode| mode & SET_ID != 0) {
        return Err(Failure::denied("the set uid mode is forbidden"));
    }
    Ok((target, attributes))
}

/// If the path is a directory, the file gets the source's name in it.
fn locate(limits: Limits<'_>, request: &Request) -> Result<Target> {
    let path = &request.path;
    let source = request.src_path.as_deref().and_then(Path::file_name);
    // The chroot's parent is outside, and none of our business.
    let is_chroot = limits.and_then(|l| l.chroot.as_ref()).is_some_and(|chroot| chroot == path);
    let bytes = path.as_os_str().as_bytes();
    // `Path` ignores both.
    let names_directory = is_chroot || bytes.ends_with(b"/") || bytes.ends_with(b"/.");
    let (parent, name) = match (path.parent(), path.file_name()) {
        (Some(parent), Some(name)) if !names_directory => (parent, name),
        _ => return inside(limits, path, source),
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let dir = open_directory(limits, parent, path)?;
    let target = Target { dir, name: name.to_owned(), path: path.clone() };
    let is_directory = target.lstat()?.is_some_and(|stat| kind(&stat) == SFlag::S_IFDIR);
    if is_directory && source.is_some() { inside(limits, path, source) } else { Ok(target) }
}

fn inside(limits: Limits<'_>, path: &Path, source: Option<&OsStr>) -> Result<Target> {
    let dir = open_directory(limits, path, path)?;
    let name = source.ok_or(OVER_DIRECTORY)?;
    Ok(Target { dir, name: name.to_owned(), path: path.join(name) })
}

fn open_directory(limits: Limits<'_>, dir: &Path, path: &Path) -> Result<OwnedFd> {
    let open = |flags| resolve(limits, dir, flags | OFlag::O_DIRECTORY, &creating(path));
    // O_PATH serves for a directory that may be written but not listed; only fsync(2) fails on it.
    open(OFlag::O_RDONLY).or_else(|_| open(OFlag::O_PATH))
}

/// A path for an answer, clipped. Quoted, with `\xFF`, if it isn't UTF-8.
pub(super) fn shown(path: &Path) -> String {
    path.to_str().map_or_else(|| clipped(&format!("{path:?}")), clipped)
}

pub(super) fn creating(path: &Path) -> String {
    format!("failed to create target file: failed to create file: open {}", shown(path))
}

/// Checked before the first byte and again at the commit: the client decides how long after that it comes.
#[derive(Clone, Copy, Default)]
pub(super) struct Attributes {
    /// By the request or OwnerPut.
    pub(super) uid: Option<Uid>,
    /// By the request or GroupPut.
    pub(super) gid: Option<Gid>,
    /// At most 0o4777.
    pub(super) mode: u32,
    pub(super) replaces_nothing: bool,
    pub(super) owner_put: Option<Uid>,
    pub(super) group_put: Option<Gid>,
}

impl Attributes {
    fn new(limits: Limits<'_>, request: &Request) -> Result<Self> {
        let owner = named("owner", limits.and_then(|l| l.owner_put.as_deref()), User::from_name)?;
        let group = named("group", limits.and_then(|l| l.group_put.as_deref()), Group::from_name)?;
        let (owner_put, group_put) = (owner.map(|user| user.uid), group.map(|group| group.gid));
        let preserve_owner = limits.is_none_or(|l| l.preserve_owner);
        let preserve_mode = limits.is_none_or(|l| l.preserve_mode);
        let wanted = request.mode.filter(|_| preserve_mode).unwrap_or(DEFAULT_MODE);
        let plain = limits.and_then(|l| l.umask).map_or(wanted, |umask| !umask) & 0o777;
        // As upstream: never set-gid and sticky, and set-uid only where limits allow it.
        let set_uid = if limits.is_some_and(|l| l.allow_suid) { wanted & 0o4000 } else { 0 };
        Ok(Attributes {
            uid: owner_put.or(request.uid.filter(|_| preserve_owner).map(Uid::from_raw)),
            gid: group_put.or(request.gid.filter(|_| preserve_owner).map(Gid::from_raw)),
            mode: plain | set_uid,
            replaces_nothing: limits.is_some_and(|l| !l.allow_overwrite),
            owner_put,
            group_put,
        })
    }

    pub(super) fn check(&self, target: &Target) -> Result<()> {
        let Some(existing) = target.lstat()? else { return Ok(()) };
        self.may_replace(Some(&existing))?;
        target.can_be_replaced(&existing)
    }

    pub(super) fn may_replace(&self, existing: Option<&stat64>) -> Result<()> {
        let Some(existing) = existing else { return Ok(()) };
        if self.replaces_nothing {
            return Err(Failure::denied(OVERWRITE));
        }
        if self.owner_put.is_some_and(|uid| uid.as_raw() != existing.st_uid) {
            return Err(Failure::denied(OWNER));
        }
        if self.group_put.is_some_and(|gid| gid.as_raw() != existing.st_gid) {
            return Err(Failure::denied(GROUP));
        }
        match kind(existing) {
            SFlag::S_IFREG => Ok(()),
            SFlag::S_IFDIR => Err(OVER_DIRECTORY.into()),
            _ => Err("conflicting file path: cannot overwrite irregular file".into()),
        }
    }
}

fn named<T>(what: &str, name: Option<&str>, find: fn(&str) -> nix::Result<Option<T>>) -> Result<Option<T>> {
    let Some(name) = name else { return Ok(None) };
    let what = format!("failed to preserve file owner/group: {what} {name}");
    match find(name) {
        Ok(None) => Err((what + ": unknown name").into()),
        found => found.map_err(|e| Failure::io(what, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// An upload to `file/.` replaced the file.
    #[test]
    fn a_dot_at_the_end_means_a_directory() {
        let base = tempfile::tempdir().unwrap();
        fs::write(base.path().join("file"), "").unwrap();
        let to = |path| Request {
            path: base.path().join(path),
            src_path: Some("source".into()),
            ..Request::default()
        };
        assert_eq!(locate(None, &to(".")).unwrap().name, "source");
        assert!(locate(None, &to("file/.")).is_err());
        assert!(locate(None, &to("absent/.")).is_err());
    }

    /// The check asked rmdir(2), which removes an empty directory that takes the name meanwhile.
    #[test]
    fn a_directory_that_takes_the_name_outlives_the_check() {
        let base = tempfile::tempdir().unwrap();
        let place = base.path().join("target");
        fs::write(&place, "a file").unwrap();
        let target = Target {
            dir: File::open(base.path()).unwrap().into(),
            name: "target".into(),
            path: place.clone(),
        };
        let file = target.lstat().unwrap().unwrap();
        fs::remove_file(&place).unwrap();
        fs::create_dir(&place).unwrap();
        assert_eq!(target.can_be_replaced(&file), Ok(()));
        assert!(place.is_dir());
    }
}

//! The file that an upload is written to before it takes its target's name.
//!
//! With O_TMPFILE it has no name until it is complete and on the disk, so that nothing is left of it whatever ends the
//! agent. Where that fails, and to replace a file, it has a name made from the target's and this process's stamp: the
//! next upload to the same target removes what other processes have left.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use log::{debug, info};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, renameat};
use nix::libc;
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fsync, linkat, unlinkat};
use sha2::{Digest, Sha256};

use super::place::{self, Attributes, Failure, Result, Target};
use crate::encoding::hex;
use crate::sys;
use crate::sys::beneath::{self, fstat};

/// Nobody may read an incomplete file.
const MODE: Mode = Mode::S_IWUSR;
/// O_LARGEFILE: nothing sets it for openat(2) on 32-bit glibc, and the file ends at 2 GiB.
const WRITING: OFlag = OFlag::O_WRONLY.union(OFlag::O_CLOEXEC).union(OFlag::O_LARGEFILE);

/// Removed on drop, unless it was committed.
pub(super) struct Temporary {
    pub(super) file: File,
    pub(super) target: Target,
    pub(super) attributes: Attributes,
    name: OnceLock<OsString>,
    /// Set by whichever comes first: taking the target's name, or giving up.
    decided: AtomicBool,
}

/// Hidden, and of a fixed length whatever the target's name.
fn prefix(target: &OsStr) -> String {
    let digest = Sha256::digest(target.as_bytes());
    format!(".mender-connect-{}-", hex(&digest[..8]))
}

/// Not the process id, which may be the same after a reboot.
fn stamp() -> &'static str {
    static STAMP: OnceLock<String> = OnceLock::new();
    STAMP.get_or_init(|| format!("{:x}-", getrandom::u64().unwrap_or_else(|_| std::process::id().into())))
}

fn fresh_name(target: &OsStr) -> OsString {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    format!("{}{}{:x}", prefix(target), stamp(), COUNTER.fetch_add(1, Ordering::Relaxed)).into()
}

impl Temporary {
    /// Creates the file, after removing what other processes' uploads to the target have left.
    pub(super) fn create(target: Target, attributes: Attributes) -> Result<Self> {
        remove_left_over(&target);
        let Some(file) = nameless(&target.dir) else { return Self::with_name(target, attributes) };
        Self::of(file, target, attributes, OnceLock::new())
    }

    fn with_name(target: Target, attributes: Attributes) -> Result<Self> {
        let name = fresh_name(&target.name);
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | WRITING;
        let file = openat(&target.dir, name.as_os_str(), flags, MODE)
            .map_err(|e| Failure::io(place::creating(&target.path), e))?
            .into();
        Self::of(file, target, attributes, name.into())
    }

    /// Changes the owner first, so that a failure comes before the first byte.
    fn of(file: File, target: Target, attributes: Attributes, name: OnceLock<OsString>) -> Result<Self> {
        let temporary = Temporary { file, target, attributes, name, decided: AtomicBool::new(false) };
        temporary.give_to_owner()?;
        Ok(temporary)
    }

    /// After an error the target is as before.
    pub(super) fn commit(&self) -> Result<()> {
        let result = self.complete();
        self.remove();
        result
    }

    fn complete(&self) -> Result<()> {
        let (mode, path) = (self.attributes.mode, place::shown(&self.target.path));
        // On file systems without modes, such as FAT, the file doesn't have the mode that it was created with.
        if let Err(e) = fchmod(&self.file, Mode::from_bits_truncate(mode))
            && fstat(&self.file).is_ok_and(|now| now.st_mode & 0o7777 == MODE.bits())
        {
            return Err(Failure::io(format!("failed to set file permissions: chmod {path} to {mode:o}"), e));
        }
        fsync(&self.file).map_err(|e| self.not_committed(e))?;
        self.take_name()?;
        match fsync(&self.target.dir) {
            // Some file systems don't support it, nor does an O_PATH descriptor.
            Ok(()) | Err(Errno::EINVAL | Errno::EBADF | Errno::ENOTSUP) => Ok(()),
            Err(e) => Err(self.not_committed(e)),
        }
    }

    pub(super) fn not_committed(&self, e: impl Into<io::Error>) -> Failure {
        Failure::io(format!("failed to commit uploaded file: {}", place::shown(&self.target.path)), e)
    }

    /// Calls fchown(2) only for a difference that was asked for: FAT, exFAT, NTFS and CIFS keep no owners and answer
    /// EPERM, and a file in a set-gid directory gets that directory's group.
    fn give_to_owner(&self) -> Result<()> {
        let (uid, gid) = (self.attributes.uid, self.attributes.gid);
        let now = fstat(&self.file).map_err(|e| self.not_committed(e))?;
        let (old_uid, old_gid) = (Uid::from_raw(now.st_uid), Gid::from_raw(now.st_gid));
        if uid.is_none_or(|uid| uid == old_uid) && gid.is_none_or(|gid| gid == old_gid) {
            return Ok(());
        }
        fchown(&self.file, uid, gid).map_err(|e| {
            let (uid, gid) = (uid.unwrap_or(old_uid), gid.unwrap_or(old_gid));
            let path = place::shown(&self.target.path);
            Failure::io(format!("failed to set file owner: chown {path} to {uid}:{gid}"), e)
        })
    }

    fn take_name(&self) -> Result<()> {
        let Target { dir, name: target, .. } = &self.target;
        let Attributes { replaces_nothing, owner_put, group_put, .. } = self.attributes;
        let failed = |e| self.not_committed(e);
        if self.decided.swap(true, Ordering::SeqCst) {
            return Err(failed(Errno::ECANCELED));
        }
        // linkat(2) replaces nothing, and a kill can't interrupt it half-way.
        let name = match (link(&self.file, dir, target), self.name.get()) {
            (Ok(()), _) => {
                self.announce();
                return Ok(());
            }
            (Err(Errno::EEXIST), _) if replaces_nothing => return Err(Failure::denied(place::OVERWRITE)),
            (Err(_), Some(name)) => name,
            (Err(Errno::EEXIST), None) => {
                let name = fresh_name(target);
                link(&self.file, dir, &name).map_err(failed)?;
                self.name.get_or_init(|| name)
            }
            (Err(e), None) => return Err(failed(e)),
        };
        let rename = |flags| sys::rename(dir.as_fd(), name, target, flags);
        if replaces_nothing || owner_put.is_some() || group_put.is_some() {
            // FAT and exFAT have no hard links. Under FUSE they reject these flags, too, and so do old kernels.
            let unknown = |e| matches!(e, Errno::EINVAL | Errno::ENOSYS | Errno::EPERM | Errno::EOPNOTSUPP);
            match rename(libc::RENAME_NOREPLACE) {
                Err(Errno::EEXIST) if replaces_nothing => return Err(Failure::denied(place::OVERWRITE)),
                Err(Errno::EEXIST) => match rename(libc::RENAME_EXCHANGE) {
                    // The old file has the temporary name now. If it may not be replaced, it gets its own name back.
                    Ok(()) => {
                        let may = self.attributes.may_replace(self.target.look_at(name)?.as_ref());
                        return may.inspect_err(|_| _ = rename(libc::RENAME_EXCHANGE));
                    }
                    Err(e) if unknown(e) => {}
                    Err(e) => return Err(failed(e)),
                },
                Err(e) if unknown(e) => {}
                other => return other.map_err(failed),
            }
        }
        // Another program may still create the file between this check and rename(2).
        self.attributes.may_replace(self.target.lstat()?.as_ref())?;
        renameat(dir, name.as_os_str(), dir, target.as_os_str()).map_err(failed)
    }

    /// Programs that watch the directory for complete files wait for IN_CLOSE_WRITE or IN_MOVED_TO. linkat(2) makes neither,
    /// and the nameless file's own IN_CLOSE_WRITE has a name such as `#123`.
    fn announce(&self) {
        let Target { dir, name, .. } = &self.target;
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let Ok(found) = openat(dir, name.as_os_str(), flags, Mode::empty()) else { return };
        let itself = |fd| fstat(fd).ok().map(|stat| (stat.st_dev, stat.st_ino));
        if itself(found.as_fd()).is_some_and(|found| Some(found) == itself(self.file.as_fd())) {
            let _ = beneath::reopen(found.as_fd(), OFlag::O_WRONLY);
        }
    }

    /// Called by another thread than the commit's: keeps the file from taking its target's name, if it hasn't yet.
    pub(super) fn give_up(&self) {
        if !self.decided.swap(true, Ordering::SeqCst) {
            self.remove();
        }
    }

    fn remove(&self) {
        if let Some(name) = self.name.get() {
            remove(&self.target.dir, name);
        }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        self.remove();
    }
}

/// `None` on any error: the way by name reports it.
fn nameless(dir: &OwnedFd) -> Option<File> {
    let file = File::from(openat(dir, ".", OFlag::O_TMPFILE | WRITING, MODE).ok()?);
    // Proves early that linking works: linkat(2) checks for EEXIST last, and "." always exists.
    (link(&file, dir, OsStr::new(".")) == Err(Errno::EEXIST)).then_some(file)
}

/// The first way needs /proc, the second CAP_DAC_READ_SEARCH, which not every root has.
fn link(file: &File, dir: &OwnedFd, name: &OsStr) -> nix::Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    match linkat(AT_FDCWD, path.as_str(), dir, name, AtFlags::AT_SYMLINK_FOLLOW) {
        Err(Errno::ENOENT) => linkat(file, "", dir, name, AtFlags::AT_EMPTY_PATH),
        other => other,
    }
}

fn remove(dir: &OwnedFd, name: &OsStr) {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(e) => debug!("removing {}: {e}", name.display()),
    }
}

/// Removes the target's temporary files of other processes: there is one agent at a time.
fn remove_left_over(target: &Target) {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let Ok(mut listing) = Dir::openat(&target.dir, ".", flags, Mode::empty()) else { return };
    let prefix = prefix(&target.name);
    // Up to an error, which a directory that can't be read repeats for ever.
    for entry in listing.iter().map_while(nix::Result::ok) {
        let name = entry.file_name().to_bytes();
        if name.strip_prefix(prefix.as_bytes()).is_some_and(|rest| !rest.starts_with(stamp().as_bytes())) {
            let name = OsStr::from_bytes(name);
            info!("removing {}, left over from an earlier upload", name.display());
            remove(&target.dir, name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{getgid, getuid};
    use std::fs;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn target(dir: &Path, name: &str) -> Target {
        Target { dir: File::open(dir).unwrap().into(), name: name.into(), path: dir.join(name) }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn attributes(mode: u32) -> Attributes {
        Attributes { uid: Some(getuid()), gid: Some(getgid()), mode, ..Attributes::default() }
    }

    /// Both ways: unnamed, if the file system supports it, and named.
    const WAYS: [fn(Target, Attributes) -> Result<Temporary>; 2] = [Temporary::create, Temporary::with_name];

    #[test]
    fn a_commit_replaces_the_target_and_a_drop_does_not() {
        for create in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let place = || target(dir.path(), "t");
            fs::write(dir.path().join("t"), "old").unwrap();
            let mut dropped = create(place(), attributes(0o600)).unwrap();
            dropped.file.write_all(b"half").unwrap();
            assert_eq!(names(dir.path()).len(), 1 + usize::from(dropped.name.get().is_some()));
            drop(dropped);
            assert_eq!(names(dir.path()), ["t"]);
            assert_eq!(fs::read_to_string(dir.path().join("t")).unwrap(), "old");
            let mut committed = create(place(), attributes(0o640)).unwrap();
            committed.file.write_all(b"new").unwrap();
            committed.commit().unwrap();
            assert_eq!(names(dir.path()), ["t"]);
            assert_eq!(fs::read_to_string(dir.path().join("t")).unwrap(), "new");
            assert_eq!(dir.path().join("t").metadata().unwrap().permissions().mode() & 0o7777, 0o640);
        }
    }

    #[test]
    fn a_file_has_no_name_where_the_file_system_can() {
        let dir = tempfile::tempdir().unwrap();
        let flags = OFlag::O_TMPFILE | OFlag::O_WRONLY;
        let can = nix::fcntl::open(dir.path(), flags, MODE).is_ok();
        let temporary = Temporary::create(target(dir.path(), "t"), attributes(0o600)).unwrap();
        assert_eq!(names(dir.path()).is_empty(), can);
        temporary.commit().unwrap();
        assert_eq!(names(dir.path()), ["t"]);
    }

    #[test]
    fn a_commit_that_fails_leaves_the_target_alone() {
        for create in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let temporary = create(target(dir.path(), "t"), attributes(0o600)).unwrap();
            // Nothing can replace a directory.
            fs::create_dir(dir.path().join("t")).unwrap();
            let failure = temporary.commit().unwrap_err();
            assert_eq!(failure, "conflicting file path: cannot overwrite directory".into());
            assert_eq!(names(dir.path()), ["t"]);
        }
    }

    #[test]
    fn a_commit_that_may_replace_nothing_does_not() {
        for create in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let attributes = Attributes { replaces_nothing: true, ..attributes(0o600) };
            let commits = [(); 2].map(|()| create(target(dir.path(), "t"), attributes).unwrap());
            let [first, second] = commits.map(|temporary| temporary.commit());
            assert_eq!((first, second), (Ok(()), Err(Failure::denied(place::OVERWRITE))));
            assert_eq!(names(dir.path()), ["t"]);
        }
    }

    #[test]
    fn only_what_another_process_has_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let place = || target(dir.path(), "t");
        let under_way = Temporary::with_name(place(), attributes(0o600)).unwrap();
        let ours = prefix(OsStr::new("t"));
        let path = |name: &str| dir.path().join(name);
        fs::write(path(&format!("{ours}dead-0")), "left over").unwrap();
        fs::write(path("someone"), "else's").unwrap();
        std::os::unix::fs::symlink("someone", path(&format!("{ours}link"))).unwrap();
        fs::create_dir(path(&format!("{ours}dir"))).unwrap();
        fs::write(path(&format!("{}dead-0", prefix(OsStr::new("other")))), "another target's").unwrap();
        let before = names(dir.path());
        drop(Temporary::create(place(), attributes(0o600)).unwrap());
        let mut gone: Vec<String> = before.into_iter().filter(|n| !names(dir.path()).contains(n)).collect();
        gone.sort();
        assert_eq!(gone, [format!("{ours}dead-0"), format!("{ours}link")]);
        assert_eq!(fs::read_to_string(path("someone")).unwrap(), "else's");
        under_way.commit().unwrap();
        assert!(path("t").exists());
    }

    #[test]
    fn a_removed_file_is_not_committed() {
        for create in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let temporary = create(target(dir.path(), "t"), attributes(0o600)).unwrap();
            temporary.give_up();
            let failure = temporary.commit().unwrap_err();
            assert!(failure.text.ends_with("/t: operation canceled"), "{failure:?}");
            assert!(names(dir.path()).is_empty());
        }
    }

    #[test]
    fn the_longest_names_fit() {
        for create in WAYS {
            let dir = tempfile::tempdir().unwrap();
            let name = "n".repeat(255);
            // The second replaces the first, by way of the temporary name.
            for _ in 0..2 {
                create(target(dir.path(), &name), attributes(0o600)).unwrap().commit().unwrap();
                assert_eq!(names(dir.path()), [name.as_str()]);
            }
        }
    }
}

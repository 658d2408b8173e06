//! The file that an upload is written to before it takes its target's name.
//!
//! It lies in the target's directory under a name of ours, made from the target's, and is locked while it is
//! written to. So what is left of an upload that was cut by a power failure can be told from one under way and from
//! anybody else's file: the next upload to the same target removes it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU32, Ordering};

use data_encoding::HEXLOWER;
use log::{debug, info};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::{UnlinkatFlags, fchown, fsync, geteuid, unlinkat};
use sha2::{Digest, Sha256};

use super::place::{Attributes, Target};

/// Nobody may read what isn't complete.
const MODE: Mode = Mode::S_IWUSR;
const ATTEMPTS: u32 = 100;

/// An upload's file. Removed when dropped, unless it was committed.
#[derive(Debug)]
pub struct Temporary {
    file: Flock<File>,
    dir: OwnedFd,
    name: OsString,
    target: OsString,
    committed: bool,
}

/// The step at which a commit failed.
#[derive(Debug)]
pub enum CommitError {
    Owner(Errno),
    Permissions(Errno),
    Commit(Errno),
}

/// The start of the names of a target's temporary files: hidden, of a length of its own, whatever the target's.
fn prefix(target: &OsStr) -> String {
    let digest = Sha256::digest(target.as_bytes());
    format!(".mender-connect-{}-", HEXLOWER.encode(&digest[..8]))
}

impl Temporary {
    /// Creates the file for `target`, after removing what earlier uploads to it have left behind.
    ///
    /// # Errors
    /// What creating a file may say.
    pub fn create(target: &Target) -> io::Result<Self> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let prefix = prefix(&target.name);
        remove_stale(&target.dir, &prefix);
        for _ in 0..ATTEMPTS {
            let number = COUNTER.fetch_add(1, Ordering::Relaxed);
            let name: OsString = format!("{prefix}{:x}-{number:x}", std::process::id()).into();
            let flags =
                OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let fd = match openat(&target.dir, name.as_os_str(), flags, MODE) {
                Err(Errno::EEXIST) => continue,
                other => other?,
            };
            // Before it was locked another upload may have taken it for left over.
            let Ok(file) = Flock::lock(File::from(fd), FlockArg::LockExclusiveNonblock) else { continue };
            let temporary = Temporary {
                file,
                dir: target.dir.try_clone()?,
                name,
                target: target.name.clone(),
                committed: false,
            };
            if fstat(&*temporary.file)?.st_nlink == 1 {
                return Ok(temporary);
            }
        }
        Err(Errno::EEXIST.into())
    }

    /// To write to.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file what it is to be, lasting, and gives it its target's name. On an error the target is as before.
    ///
    /// # Errors
    /// Which step failed.
    pub fn commit(mut self, attributes: Attributes) -> Result<(), CommitError> {
        // First the owner: changing it takes the set-uid bit away.
        fchown(self.file.as_fd(), Some(attributes.uid), Some(attributes.gid)).map_err(CommitError::Owner)?;
        let mode = Mode::from_bits_truncate(attributes.mode);
        fchmod(self.file.as_fd(), mode).map_err(CommitError::Permissions)?;
        fsync(&*self.file).map_err(CommitError::Commit)?;
        renameat(&self.dir, self.name.as_os_str(), &self.dir, self.target.as_os_str())
            .map_err(CommitError::Commit)?;
        self.committed = true;
        match fsync(&self.dir) {
            // Some file systems can't, and a directory opened by path alone can't either.
            Ok(()) | Err(Errno::EINVAL | Errno::EBADF | Errno::ENOTSUP) => Ok(()),
            Err(e) => Err(CommitError::Commit(e)),
        }
    }

    /// A way to remove the file while another thread commits it; after the commit it does nothing.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub fn remover(&self) -> io::Result<Remover> {
        Ok(Remover { dir: self.dir.try_clone()?, name: self.name.clone() })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.committed {
            remove(&self.dir, &self.name);
        }
    }
}

/// See [`Temporary::remover`].
#[derive(Debug)]
pub struct Remover {
    dir: OwnedFd,
    name: OsString,
}

impl Remover {
    /// Removes the file if it still has its temporary name.
    pub fn remove(&self) {
        remove(&self.dir, &self.name);
    }
}

fn remove(dir: &OwnedFd, name: &OsStr) {
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => {}
        Err(e) => debug!("removing {}: {e}", name.display()),
    }
}

/// Removes the files of `prefix` that are provably left over: ours by name and owner, plain, with no other name,
/// and not locked by an upload under way.
fn remove_stale(dir: &OwnedFd, prefix: &str) {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let Ok(mut listing) = Dir::openat(dir, ".", flags, Mode::empty()) else { return };
    for entry in listing.iter().flatten() {
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name.as_bytes().starts_with(prefix.as_bytes()) && is_stale(dir, name) {
            info!("removing {}, left over from an earlier upload", name.display());
            remove(dir, name);
        }
    }
}

fn is_stale(dir: &OwnedFd, name: &OsStr) -> bool {
    let flags = OFlag::O_WRONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let Ok(fd) = openat(dir, name, flags, Mode::empty()) else { return false };
    let ours = fstat(&fd).is_ok_and(|stat| {
        stat.st_mode & 0o170_000 == 0o100_000 && stat.st_uid == geteuid().as_raw() && stat.st_nlink == 1
    });
    ours && Flock::lock(fd, FlockArg::LockExclusiveNonblock).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
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
        Attributes { uid: nix::unistd::getuid(), gid: nix::unistd::getgid(), mode }
    }

    #[test]
    fn a_commit_replaces_the_target_and_a_drop_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let place = target(dir.path(), "t");
        fs::write(dir.path().join("t"), "old").unwrap();
        let dropped = Temporary::create(&place).unwrap();
        dropped.file().write_all(b"half").unwrap();
        assert_eq!(names(dir.path()).len(), 2);
        drop(dropped);
        assert_eq!(fs::read_to_string(dir.path().join("t")).unwrap(), "old");
        let committed = Temporary::create(&place).unwrap();
        committed.file().write_all(b"new").unwrap();
        committed.commit(attributes(0o640)).unwrap();
        assert_eq!(names(dir.path()), ["t"]);
        assert_eq!(fs::read_to_string(dir.path().join("t")).unwrap(), "new");
        assert_eq!(dir.path().join("t").metadata().unwrap().permissions().mode() & 0o7777, 0o640);
    }

    #[test]
    fn only_what_is_left_over_and_ours_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let place = target(dir.path(), "t");
        let under_way = Temporary::create(&place).unwrap();
        let ours = prefix(OsStr::new("t"));
        let path = |name: &str| dir.path().join(name);
        fs::write(path(&format!("{ours}dead-0")), "left over").unwrap();
        fs::write(path("someone"), "else's").unwrap();
        fs::hard_link(path("someone"), path(&format!("{ours}hard-link"))).unwrap();
        std::os::unix::fs::symlink("someone", path(&format!("{ours}link"))).unwrap();
        fs::create_dir(path(&format!("{ours}dir"))).unwrap();
        fs::write(path(&format!("{}dead-0", prefix(OsStr::new("other")))), "another target's").unwrap();
        let before = names(dir.path());
        let second = Temporary::create(&place).unwrap();
        drop(second);
        let gone: Vec<String> = before.into_iter().filter(|n| !names(dir.path()).contains(n)).collect();
        assert_eq!(gone, [format!("{ours}dead-0")]);
        under_way.commit(attributes(0o600)).unwrap();
        assert!(path("t").exists());
    }

    #[test]
    fn a_removed_file_is_not_committed() {
        let dir = tempfile::tempdir().unwrap();
        let temporary = Temporary::create(&target(dir.path(), "t")).unwrap();
        temporary.remover().unwrap().remove();
        assert!(matches!(temporary.commit(attributes(0o600)), Err(CommitError::Commit(Errno::ENOENT))));
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn the_longest_names_fit() {
        let dir = tempfile::tempdir().unwrap();
        let name = "n".repeat(255);
        Temporary::create(&target(dir.path(), &name)).unwrap().commit(attributes(0o600)).unwrap();
        assert_eq!(names(dir.path()), [name]);
    }
}

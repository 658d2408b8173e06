//! Privileges and limits that the process changes at its start, and that its programs get back. For use before any other
//! thread is started: capabilities belong to threads, and are inherited.

use std::io;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;

// Sets of one capability, by the numbers of capabilities(7).
const CHOWN: u64 = 1 << 0;
const DAC_OVERRIDE: u64 = 1 << 1;
const DAC_READ_SEARCH: u64 = 1 << 2;
const FOWNER: u64 = 1 << 3;
const FSETID: u64 = 1 << 4;
const KILL: u64 = 1 << 5;
const SETGID: u64 = 1 << 6;
const SETUID: u64 = 1 << 7;

/// linux/capability.h: the header of version 3, which has two sets.
const THIS_THREAD: [u32; 2] = [0x2008_0522, 0];

/// The process's umask and limits, soft and hard, at its start.
struct Inherited {
    umask: Mode,
    core: (rlim_t, rlim_t),
    files: (rlim_t, rlim_t),
}

static INHERITED: OnceLock<Inherited> = OnceLock::new();

/// Keeps the memory, which holds the token, out of core files and away from other processes of the user; new files
/// are for the user alone. Raises the limit on descriptors to the hard one: systemd's soft limit, 1024, is for
/// programs that use select(2), and one session's forwards could use it up.
pub(crate) fn keep_to_oneself() -> io::Result<()> {
    let (core, files) = (getrlimit(Resource::RLIMIT_CORE)?, getrlimit(Resource::RLIMIT_NOFILE)?);
    let _ = INHERITED.set(Inherited { umask: umask(Mode::from_bits_truncate(0o077)), core, files });
    setrlimit(Resource::RLIMIT_CORE, 0, core.1)?;
    setrlimit(Resource::RLIMIT_NOFILE, files.1, files.1)?;
    // The limit doesn't count where core files are piped to a program.
    Ok(prctl::set_dumpable(false)?)
}

/// Gives a program the umask and limits that the daemon was started with. Async-signal-safe, for use between fork and
/// exec.
pub(crate) fn restore() -> io::Result<()> {
    let Some(inherited) = INHERITED.get() else { return Ok(()) };
    umask(inherited.umask);
    setrlimit(Resource::RLIMIT_CORE, inherited.core.0, inherited.core.1)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, inherited.files.0, inherited.files.1)?)
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs {
    pub(crate) shells: bool,
    /// Shells of root, with all privileges.
    pub(crate) root_shells: bool,
    /// Reading and writing files of any user.
    pub(crate) files: bool,
    /// Running programs with all of root's privileges: shells with sudo, the Mender client.
    pub(crate) privileged_programs: bool,
}

impl Needs {
    /// A bit for each capability.
    fn capabilities(self) -> u64 {
        let shells = if self.shells { CHOWN | KILL | SETGID | SETUID } else { 0 };
        let files = if self.files { CHOWN | DAC_OVERRIDE | FOWNER | FSETID } else { 0 };
        // Certificates and other things to be read may belong to anybody.
        DAC_READ_SEARCH | shells | files
    }
}

static HELD: OnceLock<Needs> = OnceLock::new();

/// True if [`reduce`] kept enough for `needs`.
pub(crate) fn suffices_for(needs: Needs) -> bool {
    let Some(held) = HELD.get() else { return true };
    let programs = held.privileged_programs || !needs.privileged_programs;
    let root_shells = held.root_shells || !needs.root_shells;
    let capabilities = needs.capabilities() & !held.capabilities() == 0;
    programs && (!geteuid().is_root() || capabilities && root_shells)
}

/// Drops root's capabilities beyond `needs`, for ever. Unless a program run by the daemon may need more, such
/// programs can't get any either (the bounding set, no_new_privs). On an error it has dropped as many as it could.
pub(crate) fn reduce(needs: Needs) -> io::Result<()> {
    let kept = needs.capabilities();
    let _ = HELD.set(needs);
    if !needs.privileged_programs {
        prctl::set_no_new_privs()?;
    }
    // An operator who starts the daemon as another user has chosen its privileges.
    if !geteuid().is_root() {
        return Ok(());
    }
    if !needs.privileged_programs {
        bound(kept)?;
    }
    limit(kept, needs.root_shells)
}

/// Removes all capabilities but `kept` from the bounding set.
#[allow(unsafe_code)]
fn bound(kept: u64) -> io::Result<()> {
    for capability in (0..u64::BITS).filter(|capability| kept & 1 << capability == 0) {
        // SAFETY: takes integers and touches no memory of ours.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
        match Errno::result(result) {
            // Beyond the last one that the kernel knows.
            Err(Errno::EINVAL) => break,
            other => other?,
        };
    }
    Ok(())
}

/// Drops all capabilities but `kept` from this thread. They may stay permitted: a program that gets more of them by
/// exec(2) than its parent was permitted loses its parent-death signal.
#[allow(unsafe_code)]
fn limit(kept: u64, permitted: bool) -> io::Result<()> {
    let mut sets = capabilities()?;
    for ([effective, allowed, _], kept) in sets.iter_mut().zip([kept as u32, (kept >> 32) as u32]) {
        *effective &= kept;
        *allowed &= if permitted { u32::MAX } else { kept };
    }
    let mut header = THIS_THREAD;
    // SAFETY: the kernel reads one header and two sets; both live until the call returns.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()) })?;
    Ok(())
}

/// This thread's effective, permitted and inheritable capabilities: the lower 32 of each, then the upper ones.
#[allow(unsafe_code)]
fn capabilities() -> io::Result<[[u32; 3]; 2]> {
    // The kernel writes to the header where it doesn't know the version, and an emulator always needs it to be writable.
    let (mut header, mut sets) = (THIS_THREAD, [[0; 3]; 2]);
    // SAFETY: the kernel reads and writes one header and writes two sets; both live until the call returns.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) })?;
    Ok(sets)
}

/// True if this thread may treat any file as its own, as in sticky directories.
pub(crate) fn owns_all_files() -> bool {
    capabilities().is_ok_and(|[[effective, ..], _]| u64::from(effective) & FOWNER != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_feature_has_its_capabilities() {
        let needs = |shells, files| {
            Needs { shells, root_shells: false, files, privileged_programs: true }.capabilities()
        };
        assert_eq!(needs(false, false), 0b0000_0100);
        assert_eq!(needs(true, false), 0b1110_0101);
        assert_eq!(needs(false, true), 0b0001_1111);
        assert_eq!(needs(true, true), 0b1111_1111);
    }
}

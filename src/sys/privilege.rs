//! Privileges and limits that the process changes at its start, and that programs get back. Call these before starting
//! threads: capabilities belong to threads, and are inherited.

use std::io;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::geteuid;

// Bits of capabilities(7).
const CHOWN: u64 = 1 << 0;
const DAC_OVERRIDE: u64 = 1 << 1;
const DAC_READ_SEARCH: u64 = 1 << 2;
const FOWNER: u64 = 1 << 3;
const FSETID: u64 = 1 << 4;
const KILL: u64 = 1 << 5;
const SETGID: u64 = 1 << 6;
const SETUID: u64 = 1 << 7;

/// linux/capability.h: header of version 3, with two sets.
const THIS_THREAD: [u32; 2] = [0x2008_0522, 0];

/// Umask, and soft and hard limits, at the start.
struct Inherited {
    umask: Mode,
    limits: [(Resource, Option<(rlim_t, rlim_t)>); 2],
}

static INHERITED: OnceLock<Inherited> = OnceLock::new();

/// Keeps the token in memory out of core files and away from the user's other processes, and new files private. Raises
/// the limit on descriptors to the hard one: systemd's soft limit, 1024, is for programs that use select(2), and one
/// session's forwards could use it up.
pub(crate) fn keep_to_oneself() -> io::Result<()> {
    let limits = [Resource::RLIMIT_CORE, Resource::RLIMIT_NOFILE].map(|limit| (limit, getrlimit(limit).ok()));
    let _ = INHERITED.set(Inherited { umask: umask(Mode::from_bits_truncate(0o077)), limits });
    for (limit, found) in limits {
        let Some((_, hard)) = found else { continue };
        let soft = if limit == Resource::RLIMIT_CORE { 0 } else { hard };
        // EPERM where fs.nr_open is below the hard limit, or where a filter forbids prlimit(2), as systemd's @resources did.
        // Go's programs pass over that, too.
        let _ = setrlimit(limit, soft, hard);
    }
    // The limit does not apply where core files are piped to a program.
    Ok(prctl::set_dumpable(false)?)
}

/// For a child between fork and exec: async-signal-safe.
pub(crate) fn restore() {
    let Some(inherited) = INHERITED.get() else { return };
    umask(inherited.umask);
    for (limit, found) in inherited.limits {
        // An error means that it is unchanged.
        let _ = found.map(|(soft, hard)| setrlimit(limit, soft, hard));
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs {
    pub(crate) shells: bool,
    /// With all privileges.
    pub(crate) root_shells: bool,
    /// Access to files of any user.
    pub(crate) files: bool,
    /// Programs with all of root's privileges: sudo in shells, the Mender client.
    pub(crate) privileged_programs: bool,
}

impl Needs {
    /// A bit for each capability.
    fn capabilities(self) -> u64 {
        let shells = if self.shells { CHOWN | KILL | SETGID | SETUID } else { 0 };
        let files = if self.files { CHOWN | DAC_OVERRIDE | FOWNER | FSETID } else { 0 };
        // Certificates and the like may belong to anybody.
        DAC_READ_SEARCH | shells | files
    }
}

static HELD: OnceLock<Needs> = OnceLock::new();

/// Whether [`reduce`] kept enough for `needs`.
pub(crate) fn suffices_for(needs: Needs) -> bool {
    let Some(held) = HELD.get() else { return true };
    let programs = held.privileged_programs || !needs.privileged_programs;
    let root_shells = held.root_shells || !needs.root_shells;
    let capabilities = needs.capabilities() & !held.capabilities() == 0;
    programs && (!geteuid().is_root() || capabilities && root_shells)
}

/// Drops root's capabilities beyond `needs`, for ever, and bars programs from regaining them (bounding set,
/// no_new_privs) unless one may need them. On an error it has dropped as many as it could.
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
    let bounded = !needs.privileged_programs;
    for capability in (0..u64::BITS).filter(|capability| bounded && kept & 1 << capability == 0) {
        // SAFETY: takes integers and touches no memory of ours.
        let result = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(capability), 0, 0, 0) };
        match Errno::result(result) {
            // EINVAL: beyond the last capability of this kernel. EPERM: without CAP_SETPCAP, as in units and containers
            // that grant little. With no_new_privs programs gain nothing beyond the permitted set, reduced below.
            Err(Errno::EINVAL | Errno::EPERM) => break,
            other => other?,
        };
    }
    let mut sets = capabilities()?;
    for ([effective, permitted, _], kept) in sets.iter_mut().zip([kept as u32, (kept >> 32) as u32]) {
        *effective &= kept;
        // Root shells need them: a program that gains capabilities by exec(2) beyond its parent's loses its parent-death
        // signal.
        *permitted &= if needs.root_shells { u32::MAX } else { kept };
    }
    let mut header = THIS_THREAD;
    // SAFETY: the kernel reads one header and two sets; both live until the call returns.
    Errno::result(unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_ptr()) })?;
    Ok(())
}

/// Effective, permitted and inheritable: the lower 32 bits of each, then the upper ones.
fn capabilities() -> io::Result<[[u32; 3]; 2]> {
    // The kernel writes to the header if it doesn't know the version; emulators need it writable in any case.
    let (mut header, mut sets) = (THIS_THREAD, [[0; 3]; 2]);
    // SAFETY: the kernel reads and writes one header and writes two sets; both live until the call returns.
    Errno::result(unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), sets.as_mut_ptr()) })?;
    Ok(sets)
}

/// CAP_FOWNER, which overrides sticky directories.
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

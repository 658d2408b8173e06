//! Child processes: a shell on its terminal, the Mender client; starting, watching, ending, reaping.

use std::collections::HashSet;
use std::ffi::{CString, OsString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::libc;
use nix::poll::PollFlags;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, killpg, sigprocmask};
use nix::sys::termios::tcgetsid;
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, Uid, chdir, geteuid, getpid, getppid, getsid, setgid, setgroups, setsid, setuid};

use super::pty::Pty;
use super::users::User;
use super::wake::Wake;
use super::{children, lock, manager, poll_one, privilege, thread};

nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);

/// On every architecture but MIPS.
const KERNEL_SIGNALS: usize = 64;
/// Rounds of signalling, to catch processes forked meanwhile.
const HANG_UP_ROUNDS: u32 = 20;

/// Leader of a session on a terminal. Dropping it before it was reaped kills it and waits for it.
#[derive(Debug)]
pub(crate) struct SessionLeader {
    pid: Pid,
    /// `None` if an earlier agent started it: init reaps it.
    child: Option<Child>,
    /// Readable once the process has ended.
    exit: OwnedFd,
    ended: bool,
}

/// `None` if only its parent was told.
pub(crate) type Exit = Option<ExitStatus>;

impl SessionLeader {
    /// Starts `command` on the terminal `tty`; if this process is root, as `user`. The working directory is `user`'s
    /// home or, if the user cannot enter that, `/`.
    ///
    /// `environment` is complete, and its last variable of a name counts. Signals have default actions, umask and
    /// limits are those that the daemon was started with, and `tty` is the only open descriptor. With
    /// `no_new_privileges` no program can become more than the user. Unless it `outlives` this process, it gets SIGTERM
    /// when that ends.
    pub(crate) fn spawn(
        command: &Path,
        arguments: &[String],
        user: &User,
        no_new_privileges: bool,
        environment: Vec<(String, OsString)>,
        outlives: bool,
        tty: OwnedFd,
    ) -> io::Result<Self> {
        let home = CString::new(user.home.as_os_str().as_bytes())?;
        let switch = geteuid().is_root().then(|| (user.groups.clone(), user.gid, user.uid));
        let mut spawn = Command::new(command);
        spawn.args(arguments).env_clear().envs(environment);
        let parent = getpid();
        let prepare = move || {
            setsid()?;
            // SAFETY: takes an integer; standard input is the terminal by now.
            unsafe { set_controlling_terminal(libc::STDIN_FILENO, 0) }?;
            give_back_defaults()?;
            if no_new_privileges {
                prctl::set_no_new_privs()?;
            }
            // The user last: it may not change groups.
            if let Some((groups, gid, uid)) = &switch {
                // Without CAP_SETGID, as in containers that grant nothing, root's shell has the groups of the daemon.
                setgroups(groups).or_else(|e| if uid.is_root() { Ok(()) } else { Err(e) })?;
                setgid(*gid)?;
                setuid(*uid)?;
            }
            // As the user: root may not enter every home (NFS with root_squash), but may enter directories that the
            // user may not.
            chdir(home.as_c_str()).or_else(|_| chdir(c"/"))?;
            if outlives {
                return Ok(());
            }
            // Sent when the forking thread ends, such as when the daemon is killed, besides the terminal's hang-up,
            // which the shell might ignore. Setting it before setuid would be undone. Not SIGKILL: an interactive
            // shell, which ignores SIGTERM, passes the hang-up on to its jobs.
            prctl::set_pdeathsig(Signal::SIGTERM)?;
            // The parent may have ended before.
            if getppid() == parent { Ok(()) } else { Err(Errno::ESRCH.into()) }
        };
        // SAFETY: between fork and exec another thread may hold any lock for ever. `prepare` neither locks nor allocates:
        // it makes system calls on values made above and, in `privilege::restore`, on a static that is only read.
        unsafe { spawn.pre_exec(prepare) };
        let mut child = start(spawn, tty)?;
        let pid = pid_of(&child);
        let exit = watch_exit(pid).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
            forget(&child);
        })?;
        Ok(SessionLeader { pid, child: Some(child), exit, ended: false })
    }

    /// The leader of the session on this terminal: a process of `user`, and not our child.
    pub(crate) fn of_terminal(pty: &Pty, user: Uid) -> io::Result<Self> {
        // ENOTTY: its leader has ended.
        let pid = tcgetsid(pty)?;
        let exit = pidfd_open(pid)?;
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let mut uids = status.lines().filter_map(|line| line.strip_prefix("Uid:")?.split_whitespace().next());
        // The real one. If the process has ended meanwhile, its pid may be another's, but then the terminal has no session.
        if uids.next() != Some(&user.to_string()) || tcgetsid(pty)? != pid {
            return Err(Errno::EPERM.into());
        }
        Ok(SessionLeader { pid, child: None, exit, ended: false })
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Reaps the process. Call it when the descriptor is readable.
    pub(crate) fn try_wait(&mut self) -> Option<Exit> {
        let Some(child) = &mut self.child else {
            self.ended = true;
            return Some(None);
        };
        let status = child.try_wait().ok().flatten();
        if status.is_some() && !std::mem::replace(&mut self.ended, true) {
            forget(child);
        }
        status.map(Some)
    }

    /// Sends SIGHUP (and SIGCONT, for stopped ones) to all processes of the session, and SIGTERM to the shell's group.
    /// Jobs that ignore a hang-up survive. Returns whether there were others than the shell.
    pub(crate) fn hang_up(&self) -> bool {
        if self.ended {
            return false;
        }
        // Until the leader is reaped, its pid, session and group are reserved. Init may reap one at any time, but pids
        // are not reused so soon.
        let (leader, mut told) = (self.pid, HashSet::new());
        for _ in 0..HANG_UP_ROUNDS {
            let before = told.len();
            for pid in session_members(leader).into_iter().filter(|pid| told.insert(*pid)) {
                let _ = kill(pid, Signal::SIGHUP);
                let _ = kill(pid, Signal::SIGCONT);
            }
            if told.len() == before {
                break;
            }
        }
        let _ = killpg(leader, Signal::SIGTERM);
        told.len() > 1
    }

    /// To the next agent.
    pub(crate) fn leave(mut self) {
        // Or dropping it would kill the process.
        self.ended = true;
    }

    /// To the shell's own group, which the shell cannot leave.
    pub(crate) fn kill(&self) {
        if !self.ended {
            let _ = killpg(self.pid, Signal::SIGKILL);
        }
    }
}

impl AsFd for SessionLeader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.exit.as_fd()
    }
}

impl Drop for SessionLeader {
    fn drop(&mut self) {
        // The shell's jobs are in groups of their own.
        self.hang_up();
        self.kill();
        if let Some(child) = &mut self.child
            && !self.ended
        {
            let _ = child.wait();
            forget(child);
        }
    }
}

/// Runs `program` without input, and discards its output. Errors are in Go's words: "exit status 1", "signal: killed",
/// or why it did not start.
pub(crate) fn run(program: &Path, argument: &str, limit: Duration) -> Result<(), String> {
    let failed = |e: io::Error| format!("fork/exec {}: {}", program.display(), super::reason(&e));
    let mut command = Command::new(program);
    command.arg(argument);
    for ours in manager::VARIABLES {
        command.env_remove(ours);
    }
    // SAFETY: as for a shell; the calls are on constants and that static.
    unsafe { command.pre_exec(give_back_defaults) };
    let nothing = fs::File::options().read(true).write(true).open("/dev/null");
    let child = nothing.and_then(|nothing| start(command, nothing.into()));
    let mut child = child.map_err(failed)?;
    let deadline = Some(Instant::now() + limit);
    let exit = watch_exit(pid_of(&child)).and_then(|exit| poll_one(&exit, PollFlags::POLLIN, deadline));
    let ended = exit.map(|events| !events.is_empty());
    if !matches!(ended, Ok(true)) {
        let _ = child.kill();
    }
    let status = child.wait();
    forget(&child);
    let status = status.map_err(failed)?;
    match (ended.map_err(failed)?, status.code(), status.signal()) {
        (false, ..) => Err(format!("timed out after {} s", limit.as_secs())),
        (_, Some(0), _) => Ok(()),
        (_, Some(code), _) => Err(format!("exit status {code}")),
        (.., Some(9)) => Err("signal: killed".to_owned()),
        (.., signal) => Err(format!("signal: {}", signal.unwrap_or(0))),
    }
}

/// Started and not reaped. Process 1 has other children, too: orphans.
struct Children {
    /// Their pids are not known yet.
    starting: usize,
    running: Vec<Pid>,
}

static CHILDREN: Mutex<Children> = Mutex::new(Children { starting: 0, running: Vec::new() });

fn start(command: Command, stdio: OwnedFd) -> io::Result<Child> {
    lock(&CHILDREN).starting += 1;
    // Not under the lock: it waits for exec, and so maybe for a file system.
    let child = children::start(command, stdio);
    let mut children = lock(&CHILDREN);
    children.starting -= 1;
    children.running.extend(child.iter().map(pid_of));
    drop(children);
    reap_orphans();
    child
}

/// Call it right after reaping: the pid may be reused from then on.
fn forget(child: &Child) {
    lock(&CHILDREN).running.retain(|pid| *pid != pid_of(child));
    // It may have hidden an orphan from waitid.
    reap_orphans();
}

/// Whether orphans become our children, as in a container.
pub(crate) fn adopts_orphans() -> bool {
    getpid() == Pid::from_raw(1) || prctl::get_child_subreaper() == Ok(true)
}

/// Reaps ended orphans; our own children are reaped by their owners.
pub(crate) fn reap_orphans() {
    let ended = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    while adopts_orphans()
        && let Ok(status) = waitid(Id::All, ended | WaitPidFlag::WNOWAIT)
        && let Some(pid) = status.pid()
    {
        let children = lock(&CHILDREN);
        // A caller that changes that calls again.
        if children.starting > 0 || children.running.contains(&pid) || waitid(Id::Pid(pid), ended).is_err() {
            return;
        }
    }
}

pub(crate) fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(child.id().cast_signed())
}

/// Restores default signals, umask and limits for a program.
fn give_back_defaults() -> io::Result<()> {
    // By number, bypassing libc, which reserves some real-time signals. On no architecture is the kernel's `struct
    // sigaction` larger than this, and in each layout zeroes mean "default action, no flags, empty mask".
    let (default, none) = ([0_u64; 8], std::ptr::null::<u64>());
    for signal in 1..=KERNEL_SIGNALS {
        // SAFETY: reads one kernel sigaction from memory that is at least as large; the default action installs no
        // handler. SIGKILL and SIGSTOP answer with an error, which changes nothing.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), none, KERNEL_SIGNALS / 8) };
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    privilege::restore();
    Ok(())
}

/// Unsets an empty variable, for libraries that take it for a path. Call it at the start: it does nothing once there
/// are threads.
pub(crate) fn unset_if_empty(variable: &str) {
    let empty = std::env::var_os(variable).is_some_and(|value| value.is_empty());
    if empty && numbers_in("/proc/self/task").len() == 1 {
        // SAFETY: no other thread reads the environment.
        unsafe { std::env::remove_var(variable) };
    }
}

/// Numeric names in a directory of procfs.
pub(crate) fn numbers_in(path: &str) -> Vec<i32> {
    let entries = fs::read_dir(path).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// Readable once the child has ended.
fn watch_exit(pid: Pid) -> io::Result<OwnedFd> {
    match pidfd_open(pid) {
        Err(Errno::ENOSYS | Errno::EPERM) => watch_with_thread(pid),
        other => Ok(other?),
    }
}

/// For kernels before 5.3.
fn watch_with_thread(pid: Pid) -> io::Result<OwnedFd> {
    let wake = Wake::new()?;
    let exit = wake.as_fd().try_clone_to_owned()?;
    thread::spawn("exit-watch", thread::SMALL_STACK, move || {
        wait_for_exit(pid);
        wake.notify();
    })?;
    Ok(exit)
}

/// Does not reap the child.
pub(super) fn wait_for_exit(pid: Pid) {
    while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(Errno::EINTR) {}
}
fn pidfd_open(pid: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: takes two integers and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the kernel has just made this descriptor for us (close-on-exec); nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Includes `leader` even without /proc.
fn session_members(leader: Pid) -> Vec<Pid> {
    let all = numbers_in("/proc").into_iter().map(Pid::from_raw);
    all.filter(|pid| getsid(Some(*pid)) == Ok(leader)).chain([leader]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pty::WindowSize;

    fn shell(script: &str) -> (Pty, SessionLeader) {
        let me = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap();
        let user = crate::sys::users::lookup(&me.name).unwrap();
        let (pty, tty) = Pty::open(WindowSize { width: 80, height: 24 }, None).unwrap();
        let arguments = ["-c".to_string(), script.to_string()];
        let leader =
            SessionLeader::spawn(Path::new("/bin/sh"), &arguments, &user, false, Vec::new(), false, tty)
                .unwrap();
        (pty, leader)
    }

    fn wait(leader: &mut SessionLeader) -> ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if poll_one(leader, PollFlags::POLLIN, Some(deadline)).unwrap().contains(PollFlags::POLLIN) {
                return leader.try_wait().unwrap().unwrap();
            }
            assert!(Instant::now() < deadline, "the process did not end");
        }
    }

    #[test]
    fn reports_the_exit_status() {
        let (_pty, mut leader) = shell("exit 3");
        assert_eq!(leader.try_wait().is_some(), leader.ended);
        assert_eq!(wait(&mut leader).code(), Some(3));
    }

    #[test]
    fn a_thread_stands_in_for_pidfd_on_old_kernels() {
        let (_pty, mut leader) = shell("read line; exit 4");
        leader.exit = watch_with_thread(leader.pid).unwrap();
        assert!(leader.try_wait().is_none());
        _pty.write(b"go\n").unwrap();
        assert_eq!(wait(&mut leader).code(), Some(4));
    }

    #[test]
    fn background_jobs_end_with_a_leader_that_is_hung_up_or_dropped() {
        for drops in [false, true] {
            let (pty, mut leader) = shell("set -m; sleep 1000 & echo job $!; wait");
            let mut seen = String::new();
            let mut buffer = [0; 256];
            while !seen.contains('\n') {
                poll_one(&pty, PollFlags::POLLIN, None).unwrap();
                let n = pty.read(&mut buffer).unwrap();
                seen.push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
            let job: i32 = seen.trim().trim_start_matches("job ").parse().unwrap();
            let watch = pidfd_open(Pid::from_raw(job));
            if drops {
                drop(leader);
            } else {
                leader.hang_up();
                wait(&mut leader);
            }
            if let Ok(fd) = watch {
                let deadline = Instant::now() + Duration::from_secs(10);
                let events = poll_one(&fd, PollFlags::POLLIN, Some(deadline)).unwrap();
                assert!(events.contains(PollFlags::POLLIN), "the job lives on");
            }
        }
    }

    #[test]
    fn a_command_runs_to_its_end_or_its_limit() {
        let run = |program: &str, limit| run(Path::new(program), "100", limit);
        let minute = Duration::from_secs(60);
        assert_eq!(run("/bin/true", minute), Ok(()));
        assert_eq!(run("/bin/false", minute), Err("exit status 1".to_owned()));
        assert_eq!(run("/bin/sleep", Duration::from_millis(100)), Err("timed out after 0 s".to_owned()));
        let missing = "fork/exec /missing: no such file or directory";
        assert_eq!(run("/missing", minute), Err(missing.to_owned()));
    }

    #[test]
    fn a_missing_program_is_an_error() {
        let me = nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap().unwrap();
        let user = crate::sys::users::lookup(&me.name).unwrap();
        let (_pty, tty) = Pty::open(WindowSize { width: 80, height: 24 }, None).unwrap();
        let error =
            SessionLeader::spawn(Path::new("/bin/x"), &[], &user, false, Vec::new(), false, tty).unwrap_err();
        assert_eq!(crate::sys::reason(&error), "no such file or directory");
    }
}

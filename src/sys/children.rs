//! Starts programs from a thread whose own descriptor table has no client's file open.
//!
//! A forked child inherits all descriptors and closes them at execve(2). FUSE, NFS and CIFS answer that with a flush,
//! so that no shell would start while an upload waits for hung storage.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use log::warn;
use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::unistd::{getpid, getppid};

use super::process::{numbers_in, pid_of, wait_for_exit};
use super::{lock, reason, thread};

type Job = (Command, Sender<io::Result<Child>>);

struct Nursery {
    jobs: Sender<Job>,
    /// Carries the descriptor of each job, in order.
    socket: UnixDatagram,
}

static NURSERY: OnceLock<Mutex<Nursery>> = OnceLock::new();

/// Call it before files are opened. Without it the calling thread starts programs itself.
pub(crate) fn prepare() -> io::Result<()> {
    let (socket, theirs) = UnixDatagram::pair()?;
    let (jobs, queue) = unbounded();
    let (ready, is_ready) = bounded(1);
    thread::spawn("children", thread::SMALL_STACK, move || {
        let unshared = unshare(CloneFlags::CLONE_FILES);
        if let Err(e) = unshared {
            warn!("shells won't start while an upload waits for storage that hangs: unshare: {e}");
        }
        close_all_but(&theirs, unshared.is_ok());
        let _ = ready.send(());
        serve(&queue, &theirs);
    })?;
    // Files opened later are not in that table.
    let _ = is_ready.recv();
    let _ = NURSERY.set(Mutex::new(Nursery { jobs, socket }));
    Ok(())
}

/// `stdio` becomes all three standard descriptors.
pub(crate) fn start(command: Command, stdio: OwnedFd) -> io::Result<Child> {
    let Some(nursery) = NURSERY.get() else { return start_here(command, stdio) };
    let (reply, child) = bounded(1);
    let nursery = lock(nursery);
    let rights = [stdio.as_raw_fd()];
    let control = [ControlMessage::ScmRights(&rights)];
    let message = [IoSlice::new(&[0])];
    sendmsg::<()>(nursery.socket.as_raw_fd(), &message, &control, MsgFlags::empty(), None)?;
    let _ = nursery.jobs.send((command, reply));
    drop(nursery);
    // Without an answer no thread could be started.
    child.recv().unwrap_or_else(|_| Err(Errno::EAGAIN.into()))
}

fn start_here(mut command: Command, stdio: OwnedFd) -> io::Result<Child> {
    command.stdin(stdio.try_clone()?).stdout(stdio.try_clone()?).stderr(Stdio::from(stdio));
    command.spawn()
}

/// No program inherits what the daemon has inherited, and terminals kept by the service manager would never hang up
/// while they are open here. A table that others use keeps them, close-on-exec as the daemon's own always are.
fn close_all_but(socket: &UnixDatagram, is_own_table: bool) {
    // The process's table has the same ones yet; /proc/thread-self is missing before Linux 3.17.
    let others = numbers_in("/proc/self/fd").into_iter();
    for fd in others.filter(|fd| *fd > libc::STDERR_FILENO && *fd != socket.as_raw_fd()) {
        // SAFETY: closes it where nobody else uses it, or sets its flag; one that is closed by now (the directory's own)
        // answers with an error.
        unsafe {
            if is_own_table { libc::close(fd) } else { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) }
        };
    }
}

fn serve(jobs: &Receiver<Job>, socket: &UnixDatagram) {
    for (command, reply) in jobs {
        let stdio = receive(socket);
        // A thread each: the shell, or the user's home, may be on hung storage.
        let started = thread::spawn("child", thread::SMALL_STACK, move || {
            let child = stdio.and_then(|stdio| start_here(command, stdio));
            let pid = child.as_ref().ok().map(pid_of);
            let _ = reply.send(child);
            // The child gets its parent-death signal when this thread ends.
            pid.into_iter().for_each(wait_for_exit);
        });
        if let Err(e) = started {
            warn!("no thread for a program: {}", reason(&e));
        }
    }
}

/// For an exit while threads wait for hung storage: the kernel makes whoever closes the last descriptor wait for the
/// flush. A process that does nothing else keeps them, so that the daemon can end.
pub(crate) fn leave_descriptors_behind() {
    let parent = getpid();
    // SAFETY: fork(2), only that both have one table of descriptors. The new process makes system calls only, and ends here.
    unsafe {
        if libc::syscall(libc::SYS_clone, libc::CLONE_FILES, 0, 0, 0, 0) == 0 {
            // Its parent changes when all threads of this process have let go of the table.
            while getppid() == parent {
                libc::poll(std::ptr::null_mut(), 0, 50);
            }
            // Readers of the log wait for end of file.
            for fd in 0..=libc::STDERR_FILENO {
                libc::close(fd);
            }
            libc::_exit(0);
        }
    }
}
fn receive(socket: &UnixDatagram) -> io::Result<OwnedFd> {
    let mut space = nix::cmsg_space!(RawFd);
    let mut byte = [0];
    let mut message = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut message, Some(&mut space), flags)?;
    let fd = received.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // EMFILE: the kernel omits descriptors that the table has no room for.
    let fd = fd.ok_or(Errno::EMFILE)?;
    // SAFETY: the kernel has just made this descriptor for the message, which has a single one; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

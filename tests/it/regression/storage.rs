//! File systems that people have: sticks, overlays, read-only mounts, and storage that hangs. Each agent has its mounts in
//! a mount namespace of its own, below /mnt.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::emulated;
use crate::harness::device::Device;
use crate::harness::msg::FILES;
use crate::harness::rest::{Form, Rest};
use crate::harness::rig::{Rig, Setup, is_root};
use crate::harness::wait::{SOON, eventually, millis, secs, skip};

/// A directory by FUSE at /mnt/fuse, whose server's id is in `fuse.pid`.
const BOUND: &str = r#"exec unshare -m sh -c '
    set -e
    mkdir source
    mount -t tmpfs tmpfs /mnt
    mkdir /mnt/fuse
    bindfs -f source /mnt/fuse >/dev/null 2>&1 &
    echo $! >fuse.pid
    until mountpoint -q /mnt/fuse; do kill -0 $!; sleep 0.02; done
    exec "$@"' sh "$@""#;

/// exFAT by FUSE at /mnt/fuse, as on a stick, with an owner for all files.
const STICK: &str = r#"exec unshare -m sh -c '
    set -e
    mount -t tmpfs tmpfs /mnt
    mkdir /mnt/fuse
    truncate -s 16M disk
    mkfs.exfat disk >/dev/null
    device=$(losetup --find --show disk)
    mount.exfat-fuse -d -o uid=1000,gid=1000 "$device" /mnt/fuse >/dev/null 2>&1 &
    echo $! >fuse.pid
    until mountpoint -q /mnt/fuse; do kill -0 $!; sleep 0.02; done
    losetup -d "$device"
    exec "$@"' sh "$@""#;

/// The server of a file system. Killed when dropped, which sets free those who wait for it.
struct Fuse(Pid);

impl Drop for Fuse {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
    }
}

impl Fuse {
    /// From now on it answers nothing. What one of its threads has already read could not be taken back by SIGKILL.
    fn hang(&self) {
        kill(self.0, Signal::SIGSTOP).unwrap();
        let stopped = |task: fs::DirEntry| {
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T'))
        };
        eventually(SOON, "the file system hangs", || {
            let mut tasks = fs::read_dir(format!("/proc/{}/task", self.0)).unwrap();
            tasks.all(|task| task.is_ok_and(stopped)).then_some(())
        });
    }
}

/// An agent with a file system at /mnt/fuse, and where that is for others.
fn fuse(setup: Setup, mount: &'static str, program: &str) -> Option<(Rig, Device, PathBuf, Fuse)> {
    if !is_root() {
        skip("mounting a file system needs root");
        return None;
    }
    if Command::new(program).arg("-V").output().is_err() || !Path::new("/dev/fuse").exists() {
        skip(&format!(
            "{program} or FUSE is missing: install the packages 'bindfs', 'exfat-fuse' and 'exfatprogs'"
        ));
        return None;
    }
    let (rig, device) = setup.wrapper(mount).connected();
    let pid = fs::read_to_string(rig.dir.path().join("fuse.pid")).unwrap();
    let fuse = Fuse(Pid::from_raw(pid.trim().parse().unwrap()));
    let seen = PathBuf::from(format!("/proc/{}/root/mnt/fuse", rig.daemon.pid()));
    Some((rig, device, seen, fuse))
}

/// An upload to storage that hangs kept every shell from starting: each child closes the descriptors of the daemon at
/// execve(2), which FUSE answers with a flush that waits for what is written.
#[test]
fn a_shell_starts_while_an_upload_waits_for_storage_that_hangs() {
    let Some((mut rig, device, _, fuse)) = fuse(Setup::new(), BOUND, "bindfs") else { return };
    let rest = Rest::open(&device);
    rest.announce(&Form::to("/mnt/fuse/f")).unwrap();
    fuse.hang();
    rest.send(FILES, "file_chunk", Some(0), b"never written");
    let opened = |number: usize| {
        let begun = Instant::now();
        let mut terminal = Terminal::of_user(&device, &format!("user {number}"));
        terminal.open_with_prompt();
        let took = begun.elapsed();
        assert_eq!(terminal.run("echo fine"), "fine");
        terminal.stop();
        took
    };
    // The quickest: this machine has other things to do.
    let quickest = (0..5).map(opened).min().unwrap();
    assert!(quickest < millis(200), "{quickest:?}");
    // Also by another link, while the session of the first one still waits.
    device.hang_up();
    let device = rig.next_link();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo fine"), "fine");
    if emulated("the emulator shares no descriptors between processes") {
        return;
    }
    let begun = Instant::now();
    rig.daemon.signal(Signal::SIGTERM);
    assert_eq!(rig.daemon.wait_exit(SOON).code(), Some(0));
    assert!(begun.elapsed() < secs(2), "{:?}", begun.elapsed());
}

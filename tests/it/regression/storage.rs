//! File systems that people have: sticks, overlays, read-only mounts, and storage that hangs. Each agent has its mounts in
//! a mount namespace of its own, below /mnt.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::files::{names, pattern, put, refused};
use crate::harness::aftermath::assert_no_temporary_files;
use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::emulated;
use crate::harness::device::Device;
use crate::harness::msg::FILES;
use crate::harness::rest::{Form, Refused, Rest};
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

/// A file system by FUSE at /mnt/fuse, as on a stick.
const STICK: &str = r#"exec unshare -m sh -c '
    set -e
    mount -t tmpfs tmpfs /mnt
    mkdir /mnt/fuse
    truncate -s 16M disk
    $FORMAT disk >/dev/null
    device=$(losetup --find --show disk)
    $MOUNT "$device" /mnt/fuse >/dev/null 2>&1 &
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
            "{program} or FUSE is missing: install 'bindfs', 'exfat-fuse', 'exfatprogs', 'fusefat' and 'dosfstools'"
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
    assert!(begun.elapsed() < secs(3), "{:?}", begun.elapsed());
}

const FORBIDDEN: &str = "access denied: forbidden to overwrite the file";

/// What must work on any file system: a new file, one in its place, and none in the place of one.
fn uploads_work(rig: &Rig, device: &Device, dir: &str) {
    let seen = PathBuf::from(format!("/proc/{}/root{dir}", rig.daemon.pid()));
    let form = Form { size: Some(100_000), ..Form::to(format!("{dir}/f")) };
    for turn in 0..2 {
        let bytes = pattern(100_000 + turn);
        put(device, &Form { size: Some(bytes.len() as i64), ..form.clone() }, &bytes).unwrap();
        assert!(fs::read(seen.join("f")).unwrap() == bytes, "{dir}");
    }
    let config = json!({ "Enabled": true, "FileTransfer": { "AllowOverwrite": false } });
    let mut whole = crate::harness::rig::bash_config();
    whole["Limits"] = config;
    let mark = rig.reload(&whole);
    rig.daemon.wait_for_log_after(mark, "the new configuration is in use", SOON);
    assert_eq!(put(device, &form, b"other"), Err(refused(400, FORBIDDEN)));
    put(device, &Form::to(format!("{dir}/g")), b"new").unwrap();
    assert_eq!(
        (names(&seen), fs::read(seen.join("g")).unwrap()),
        (vec!["f".into(), "g".into()], b"new".into())
    );
}

#[test]
fn uploads_to_file_systems_in_memory_and_to_an_overlay() {
    if !is_root() {
        return skip("mounting a file system needs root");
    }
    let script = "exec unshare -m sh -c 'set -e
        mount -t tmpfs tmpfs /mnt
        cd /mnt
        mkdir tmpfs ramfs lower upper work overlay
        mount -t tmpfs tmpfs tmpfs
        mount -t ramfs ramfs ramfs
        mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay overlay
        cd \"$OLDPWD\"
        exec \"$@\"' sh \"$@\"";
    for name in ["tmpfs", "ramfs", "overlay"] {
        let (rig, device) = Setup::new().wrapper(script).connected();
        uploads_work(&rig, &device, &format!("/mnt/{name}"));
    }
}

/// Uploads to a stick arrived whole and then failed, since files there have no owners of their own.
#[test]
fn uploads_to_a_stick_with_exfat() {
    // With an owner for all files.
    let setup = Setup::new().env("FORMAT", "mkfs.exfat");
    let setup = setup.env("MOUNT", "mount.exfat-fuse -d -o uid=1000,gid=1000");
    let Some((rig, device, seen, _fuse)) = fuse(setup, STICK, "mount.exfat-fuse") else { return };
    // An owner that is asked for and can't be given is refused before the first byte.
    let form = Form { uid: Some(0), gid: Some(0), ..Form::to("/mnt/fuse/f") };
    let refusal = Rest::open(&device).announce(&form).unwrap_err().text;
    let text = "failed to set file owner: chown /mnt/fuse/f to 0:0: operation not permitted";
    assert_eq!(refusal, text);
    assert!(names(&seen).is_empty());
    // The one that all files have is as good as given.
    put(&device, &Form { uid: Some(1000), ..form }, b"x").unwrap_err();
    put(&device, &Form { uid: Some(1000), gid: Some(1000), ..Form::to("/mnt/fuse/f") }, b"x").unwrap();
    assert_eq!(seen.join("f").metadata().unwrap().uid(), 1000);
    uploads_work(&rig, &device, "/mnt/fuse");
}

/// Files have neither owners nor modes there, and get a name by renaming alone.
#[test]
fn uploads_to_a_stick_with_fat() {
    let setup = Setup::new().env("FORMAT", "mkfs.vfat").env("MOUNT", "fusefat -f -o rw+");
    let Some((rig, device, seen, _fuse)) = fuse(setup, STICK, "fusefat") else { return };
    let form = Form { uid: Some(1), gid: Some(1), ..Form::to("/mnt/fuse/f") };
    let refusal = Rest::open(&device).announce(&form).unwrap_err().text;
    assert!(refusal.starts_with("failed to set file owner: chown /mnt/fuse/f to 1:1: "), "{refusal}");
    assert!(names(&seen).is_empty());
    uploads_work(&rig, &device, "/mnt/fuse");
}

/// Nobody can tell before the first byte: what statvfs(3) says is the disk's space.
#[test]
fn a_quota_that_is_used_up_is_told_and_nothing_is_left() {
    if !is_root() {
        return skip("mounting a file system needs root");
    }
    if Command::new("btrfs").arg("version").output().is_err() {
        return skip("the package 'btrfs-progs' is missing");
    }
    let script = "exec unshare -m sh -c 'set -e
        truncate -s 128M disk
        mkfs.btrfs -q disk
        mount -o loop disk /mnt
        btrfs -q quota enable /mnt
        btrfs -q subvolume create /mnt/home
        btrfs -q qgroup limit 2M /mnt/home
        exec \"$@\"' sh \"$@\"";
    let (rig, device) = Setup::new().wrapper(script).connected();
    let form = Form::to("/mnt/home/f");
    put(&device, &form, b"old").unwrap();
    let bytes = pattern(4 << 20);
    let refusal = put(&device, &form, &bytes).unwrap_err();
    assert!(refusal.text.contains("disk quota exceeded"), "{refusal:?}");
    let seen = PathBuf::from(format!("/proc/{}/root/mnt/home", rig.daemon.pid()));
    eventually(SOON, "nothing else", || (names(&seen) == ["f"]).then_some(()));
    assert_eq!(fs::read(seen.join("f")).unwrap(), b"old");
    put(&device, &form, b"new").unwrap();
}

/// Files on a disk at /mnt/disk that can't be replaced.
const OBSTACLES: &str = r#"exec unshare -m sh -c '
    set -e
    mount -t tmpfs tmpfs /mnt
    mkdir /mnt/disk
    truncate -s 16M disk
    mkfs.ext4 -q disk
    mount -o loop disk /mnt/disk
    rmdir /mnt/disk/lost+found
    mkdir /mnt/disk/frozen /mnt/disk/growing /mnt/disk/readonly /mnt/disk/directory
    mkdir -m 1777 /mnt/disk/sticky
    for name in immutable append mounted bound frozen/f growing/f readonly/f sticky/f; do
        echo old >/mnt/disk/$name
    done
    chown 1:1 /mnt/disk/sticky /mnt/disk/sticky/f
    mount --bind /mnt/disk/mounted /mnt/disk/mounted
    mount --bind /mnt/disk/mounted /mnt/disk/bound
    mount -o remount,bind,ro /mnt/disk/bound
    mount --bind /mnt/disk/readonly /mnt/disk/readonly
    mount -o remount,bind,ro /mnt/disk/readonly
    chattr +i /mnt/disk/immutable /mnt/disk/frozen
    chattr +a /mnt/disk/append /mnt/disk/growing
    exec setpriv --bounding-set=-fowner "$@"' sh "$@""#;

/// An upload over a file that can't be replaced failed after all of it was sent, and the released server doesn't pass on
/// an error that comes so late: it says after a minute that there was no answer.
#[test]
fn what_cannot_be_replaced_is_refused_before_the_first_byte() {
    if emulated("it doesn't tell what is mounted and immutable") {
        return;
    }
    if !is_root() {
        return skip("mounting a file system needs root");
    }
    let (rig, device) = Setup::new().wrapper(OBSTACLES).connected();
    let seen = PathBuf::from(format!("/proc/{}/root/mnt/disk", rig.daemon.pid()));
    let refusals = [
        ("immutable", "operation not permitted"),
        ("append", "operation not permitted"),
        ("mounted", "device or resource busy"),
        ("bound", "device or resource busy"),
        ("frozen/f", "operation not permitted"),
        ("frozen/new", "operation not permitted"),
        ("growing/f", "operation not permitted"),
        ("readonly/f", "read-only file system"),
        ("readonly/new", "read-only file system"),
        ("sticky/f", "operation not permitted"),
    ];
    for (name, why) in refusals {
        let path = format!("/mnt/disk/{name}");
        let refusal = Rest::open(&device).announce(&Form::to(&path)).unwrap_err().text;
        assert_eq!(
            refusal,
            format!("failed to create target file: failed to create file: open {path}: {why}")
        );
        if !name.ends_with("new") {
            assert_eq!(fs::read(seen.join(name)).unwrap(), b"old\n", "{name}");
        }
        assert_no_temporary_files(seen.join(name).parent().unwrap());
    }
    let refusal = Rest::open(&device).announce(&Form::to("/mnt/disk/directory")).unwrap_err().text;
    assert_eq!(refusal, "conflicting file path: cannot overwrite directory");
    assert!(seen.join("directory").is_dir());
    // New names are free in a directory that only grows.
    put(&device, &Form::to("/mnt/disk/growing/new"), b"new").unwrap();

    // What changes during the upload is told before the last byte is acknowledged, not after the end.
    let form = Form { size: Some(8), ..Form::to("/mnt/disk/late") };
    put(&device, &form, b"old file").unwrap();
    let rest = Rest::open(&device);
    rest.announce(&form).unwrap();
    let chattr = |how| Command::new("chattr").arg(how).arg(seen.join("late")).status().unwrap();
    assert!(chattr("+i").success());
    rest.send(FILES, "file_chunk", Some(0), b"new file");
    let refusal: Refused = Rest::refused(&rest.next(), 400);
    assert!(refusal.text.ends_with("open /mnt/disk/late: operation not permitted"), "{refusal:?}");
    assert_eq!(fs::read(seen.join("late")).unwrap(), b"old file");
    assert!(chattr("-i").success());
    for name in ["immutable", "frozen", "append", "growing"] {
        let _ = Command::new("chattr").arg("-ia").arg(seen.join(name)).status();
    }
}

/// A file that is larger than the file system allows, as 4 GiB on FAT, failed when it had got so far.
#[test]
fn a_file_beyond_the_limit_of_its_file_system_is_refused_before_the_first_byte() {
    if !is_root() {
        return skip("mounting a file system needs root");
    }
    // ext2 with small blocks has room for 16 GiB in a file.
    let script = "exec unshare -m sh -c 'set -e
        truncate -s 20G disk
        mkfs.ext2 -q -b 1024 -N 64 disk
        mount -o loop disk /mnt
        exec \"$@\"' sh \"$@\"";
    let (_rig, device) = Setup::new().wrapper(script).connected();
    let form = Form { size: Some(17 << 30), ..Form::to("/mnt/f") };
    let refusal = Rest::open(&device).announce(&form).unwrap_err().text;
    let text = "failed to create target file: failed to create file: open /mnt/f: file too large";
    assert_eq!(refusal, text);
    put(&device, &Form { size: Some(3), ..form }, b"new").unwrap();
}

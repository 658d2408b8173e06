//! Disks that are full and commits that fail. The small disk is a file system in memory that only the agent
//! sees, in a mount namespace of its own; that takes root.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;

use crate::files::{names, pattern, put, refused};
use crate::harness::aftermath::{assert_healthy, assert_no_temporary_files};
use crate::harness::client::{Style, Terminal};
use crate::harness::device::Device;
use crate::harness::msg::{CONTROL, FILES};
use crate::harness::rest::{Form, Rest, offset_of};
use crate::harness::rig::{Rig, Setup, is_root};
use crate::harness::trace;
use crate::harness::wait::{SOON, eventually, millis, skip};

/// An agent with a megabyte at /mnt, and where that is for others.
fn small_disk() -> Option<(Rig, Device, PathBuf)> {
    if !is_root() {
        skip("mounting a file system needs root");
        return None;
    }
    let script = "exec unshare -m sh -c 'mount -t tmpfs -o size=1m tmpfs /mnt && exec \"$@\"' sh \"$@\"";
    let (rig, device) = Setup::new().wrapper(script).connected();
    let seen = PathBuf::from(format!("/proc/{}/root/mnt", rig.daemon.pid()));
    Some((rig, device, seen))
}

#[test]
fn a_disk_that_fills_up_keeps_the_old_file() {
    let Some((mut rig, device, mnt)) = small_disk() else { return };
    put(&device, &Form::to("/mnt/f"), b"old").unwrap();
    let text = "failed to write file chunk: write /mnt/f: no space left on device";
    assert_eq!(put(&device, &Form::to("/mnt/f"), &pattern(2 << 20)), Err(refused(400, text)));
    eventually(SOON, "the temporary file to go", || (names(&mnt) == ["f"]).then_some(()));
    assert_eq!(fs::read(mnt.join("f")).unwrap(), b"old");
    put(&device, &Form::to("/mnt/g"), &pattern(500_000)).unwrap();
    assert_no_temporary_files(&mnt);
    assert_healthy(&mut rig, &device);
}

/// A directory that can't be listed, on a medium with bad blocks or in FUSE, kept the upload's thread busy for ever.
#[test]
fn a_directory_that_cannot_be_listed_takes_uploads() {
    if !trace::sees_the_agent() {
        return;
    }
    let failing =
        "exec strace -D -f -qq -o /dev/null -e trace=getdents64 -e inject=getdents64:error=EIO \"$@\"";
    let (_rig, device) = Setup::new().wrapper(failing).connected();
    let dir = tempfile::tempdir().unwrap();
    put(&device, &Form::to(dir.path().join("f").display().to_string()), b"content").unwrap();
    assert_eq!(names(dir.path()), ["f"]);
}

/// A limit on the size of files (LimitFSIZE, ulimit -f) ended the agent, and all sessions with it: by SIGXFSZ.
#[test]
fn a_file_above_the_limit_of_files_is_an_error_of_its_upload() {
    let (mut rig, device) = Setup::new().wrapper("ulimit -f 100; exec \"$@\"").connected();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f").display().to_string();
    let text = format!("failed to write file chunk: write {path}: file too large");
    assert_eq!(put(&device, &Form::to(&path), &pattern(300_000)), Err(refused(400, &text)));
    put(&device, &Form::to(&path), &pattern(30_000)).unwrap();
    assert_no_temporary_files(dir.path());
    assert_healthy(&mut rig, &device);
}

#[test]
fn a_file_that_will_not_fit_is_refused_at_once() {
    let Some((_rig, device, mnt)) = small_disk() else { return };
    let form = Form { size: Some(2 << 20), ..Form::to("/mnt/f") };
    let refusal = put(&device, &form, b"never sent").unwrap_err();
    let text = "failed to create target file: failed to create file: open /mnt/f: no space left on device (2097152 bytes needed, ";
    assert!(refusal.text.starts_with(text), "{refusal:?}");
    assert!(names(&mnt).is_empty());
    put(&device, &Form { size: Some(500_000), ..form }, &pattern(500_000)).unwrap();
}

#[test]
fn a_commit_that_fails_is_told_and_leaves_nothing() {
    let (rig, device) = Rig::connected();
    let dir = rig.dir.path().join("files");
    fs::create_dir(&dir).unwrap();
    let path = dir.join("f");
    let rest = Rest::open(&device);
    rest.announce(&Form::to(&path)).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"data");
    // Meanwhile a directory has taken the name.
    fs::create_dir(&path).unwrap();
    rest.send(FILES, "file_chunk", Some(4), b"");
    // The data may be acknowledged before.
    let error = std::iter::repeat_with(|| rest.next()).find(|m| m.typ != "ack").unwrap();
    let text = "conflicting file path: cannot overwrite directory";
    assert_eq!(error.field("err").unwrap().as_str(), Some(text));
    assert_eq!(names(&dir), ["f"]);
    assert!(path.is_dir());
    // The session goes on.
    fs::remove_dir(&path).unwrap();
    rest.upload_here(&Form::to(&path), [b"data".as_slice()].into_iter()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn an_owner_that_cannot_be_given_is_told() {
    // Without this capability root is like anybody else here.
    let setup = match is_root() {
        true => Setup::new().wrapper("exec setpriv --bounding-set=-chown \"$@\""),
        false => Setup::new(),
    };
    let (rig, device) = setup.connected();
    let path = rig.dir.path().join("f");
    let form = Form { uid: Some(1), ..Form::to(&path) };
    let refusal = put(&device, &form, b"x").unwrap_err().text;
    let text = format!("failed to set file owner: chown {} to 1:", path.display());
    assert!(refusal.starts_with(&text) && refusal.ends_with(": operation not permitted"), "{refusal}");
    assert!(!path.exists());
}

/// A file without a name gets one by /proc, or by a capability of root's.
#[test]
fn an_upload_where_there_is_no_proc() {
    if !is_root() {
        return skip("mounting a file system needs root");
    }
    let script = "exec unshare -m sh -c 'mount -t tmpfs tmpfs /mnt && mount -t tmpfs tmpfs /proc && exec \"$@\"' sh \"$@\"";
    let (rig, device) = Setup::new().wrapper(script).connected();
    let mnt = PathBuf::from(format!("/proc/{}/root/mnt", rig.daemon.pid()));
    for content in [b"first", b"again"] {
        let rest = Rest::open(&device);
        let before = names(&mnt);
        rest.announce(&Form::to("/mnt/f")).unwrap();
        rest.send(FILES, "file_chunk", Some(0), content);
        rest.next();
        assert_eq!(names(&mnt), before, "no name yet");
        rest.send(FILES, "file_chunk", Some(5), b"");
        assert_eq!(offset_of(&rest.next()), 5);
        assert_eq!(names(&mnt), ["f"]);
        assert_eq!(fs::read(mnt.join("f")).unwrap(), content);
    }
}

/// A disk that writes nothing back while it is frozen. Thaws when dropped, since nothing else can end those who wait.
pub struct Frozen(File);

impl Frozen {
    /// Freezes the agent's /mnt.
    pub fn new(agent: u32) -> Frozen {
        // By descriptor: the agent may not live until it thaws.
        let frozen = Frozen(File::open(format!("/proc/{agent}/root/mnt")).unwrap());
        assert!(frozen.command("-f"), "freeze the file system");
        frozen
    }

    fn command(&self, what: &str) -> bool {
        let path = format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd());
        Command::new("fsfreeze").args([what, &path]).status().is_ok_and(|status| status.success())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.command("-u");
    }
}

/// Starts an agent with a disk at /mnt that can be frozen.
pub fn slow_disk() -> Option<&'static str> {
    if !is_root() {
        skip("mounting a file system needs root");
        return None;
    }
    Some(
        "exec unshare -m sh -c 'dd if=/dev/zero of=disk bs=1M count=16 2>/dev/null && \
         mkfs.ext4 -q disk && mount -o loop disk /mnt && exec \"$@\"' sh \"$@\"",
    )
}

#[test]
fn a_commit_that_takes_long_holds_nothing_up() {
    let Some(script) = slow_disk() else { return };
    let (rig, device) = Setup::new().wrapper(script).connected();
    let mnt = PathBuf::from(format!("/proc/{}/root/mnt", rig.daemon.pid()));
    let rest = Rest::open(&device);
    rest.announce(&Form::to("/mnt/f")).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"data");
    rest.next();
    let frozen = Frozen::new(rig.daemon.pid());
    rest.send(FILES, "file_chunk", Some(4), b"");
    // The session still answers, and so does everybody else.
    for _ in 0..3 {
        rest.send(CONTROL, "ping", None, b"");
        assert_eq!(rest.next().typ, "pong");
    }
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo fine"), "fine");
    device.nothing(millis(300), "no ack before the file is in place", |m| m.typ == "ack");
    assert!(!mnt.join("f").exists());
    drop(frozen);
    assert_eq!(offset_of(&rest.next()), 4);
    assert_eq!(fs::read(mnt.join("f")).unwrap(), b"data");
}

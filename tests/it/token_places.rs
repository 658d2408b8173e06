//! A token file wherever it may be: behind links, in folders and on file systems that come and go, in a container, and
//! where nothing can be watched.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;

use crate::harness::daemon::emulated;
use crate::harness::device::Device;
use crate::harness::proc;
use crate::harness::rest::Rest;
use crate::harness::rig::{Rig, Setup, is_root};
use crate::harness::root::{self, Root};
use crate::harness::wait::{SOON, eventually, millis, secs, skip, throughout};
use crate::token_file::{Place, next_shows, shows};

/// The next connection where no event tells of the new token: the file is read every ten seconds.
#[track_caller]
fn later_shows(rig: &Rig, token: &str) -> Device {
    let device = rig.server.next_device(secs(15));
    shows(&device, token);
    device
}

/// As Kubernetes mounts secrets: the file is a link through a link to a folder, which is replaced as a whole.
#[test]
fn a_folder_that_is_swapped() {
    let place = Place::new();
    let release = |name: &str, token: &str| {
        fs::create_dir(place.path(name)).expect("a folder");
        place.write(&format!("{name}/token"), token);
        symlink(name, place.path("..data_tmp")).expect("symlink");
        fs::rename(place.path("..data_tmp"), place.path("..data")).expect("rename");
    };
    release("..1", "one");
    symlink("..data/token", place.path("token")).expect("symlink");
    let (rig, device) = place.setup().connected();
    shows(&device, "one");
    for (name, token) in [("..2", "two"), ("..3", "three")] {
        release(name, token);
        next_shows(&rig, token);
    }
    fs::remove_dir_all(place.path("..1")).expect("remove");
    place.write("..3/token", "four");
    next_shows(&rig, "four");
    assert_eq!(rig.daemon.count_log("terminated"), 0, "it was never withdrawn");
}

/// Nor one in a folder that has just come.
#[test]
fn a_half_written_token_in_a_new_folder_is_not_taken() {
    let place = Place::new();
    let rig = Setup::new().token_file(&place.path("new/token")).start();
    rig.daemon.wait_for_log("waiting for a new token in", SOON);
    fs::create_dir(place.path("new")).expect("a folder");
    place.write("new/token", "");
    let mut file = File::create(place.path("new/token")).expect("open");
    let mut n = 0;
    throughout(millis(1800), "nobody reads half a token", || {
        n += 1;
        file.write_all(b"x").expect("write");
        rig.server.try_device(millis(0)).is_none()
    });
    drop(file);
    later_shows(&rig, &"x".repeat(n));
}

#[test]
fn whatever_is_missing_at_the_start_may_come_later() {
    let place = Place::new();
    let mut rig = Setup::new().token_file(&place.path("a/b/token")).start();
    let line = rig.daemon.wait_for_log("no token from", SOON);
    assert!(line.contains("level=warning") && line.contains("no such file or directory"), "{line}");
    let line = rig.daemon.wait_for_log("waiting for a new token in", SOON);
    assert!(line.contains("level=info"), "{line}");
    fs::create_dir(place.path("a")).expect("a folder");
    fs::create_dir(place.path("a/b")).expect("a folder");
    place.write("a/b/token", "one");
    later_shows(&rig, "one");
    // All of it goes and comes back.
    let mark = rig.daemon.mark();
    fs::remove_dir_all(place.path("a")).expect("remove");
    rig.daemon.wait_for_log_after(mark, "no token from", SOON);
    fs::create_dir_all(place.path("a/b")).expect("folders");
    place.write("a/b/token", "two");
    later_shows(&rig, "two");
    // Moved away, and another one in its place.
    fs::create_dir_all(place.path("c/b")).expect("folders");
    place.write("c/b/token", "three");
    fs::rename(place.path("a"), place.path("old")).expect("rename");
    fs::rename(place.path("c"), place.path("a")).expect("rename");
    later_shows(&rig, "three");
    place.write("old/b/token", "two again");
    rig.server.no_device(millis(1500), "nobody looks there any more");
    assert_eq!(rig.daemon.count_log("can't be watched"), 0);
    assert!(rig.daemon.is_running());
}

/// Whose file it is may keep it to himself for a while.
#[test]
fn a_file_that_becomes_readable() {
    if !is_root() {
        return skip("only root can start an agent as somebody else");
    }
    let place = Place::new();
    fs::set_permissions(place.dir.path(), Permissions::from_mode(0o755)).expect("chmod");
    place.write("token", "one");
    let script = r#"chmod 755 . && exec setpriv --reuid=65534 --regid=65534 --clear-groups "$@""#;
    let rig = place.setup().set("User", "nobody").wrapper(script).start();
    let line = rig.daemon.wait_for_log("no token from", SOON);
    assert!(line.contains("permission denied"), "{line}");
    place.mode("token", 0o644);
    next_shows(&rig, "one");
    // Its folder may be passed, but not looked into.
    fs::set_permissions(place.dir.path(), Permissions::from_mode(0o711)).expect("chmod");
    fs::write(place.path("token"), "two").expect("write");
    next_shows(&rig, "two");
    place.write("new", "three");
    place.mode("new", 0o644);
    fs::rename(place.path("new"), place.path("token")).expect("rename");
    next_shows(&rig, "three");
    assert_eq!(rig.daemon.count_log("can't be watched"), 0);
}

/// A file system that comes and goes, and a file that is mounted by itself; in a mount namespace.
#[test]
fn mounts() {
    let possible = Command::new("unshare").args(["--mount", "true"]).output();
    if !possible.is_ok_and(|output| output.status.success()) {
        return skip("no mount namespace can be made here, that takes root");
    }
    let place = Place::new();
    let script = r#"exec unshare --mount --propagation private /bin/sh -c '
        set -e
        mkdir "$PLACE/volume" "$PLACE/outside"
        mount -t tmpfs tmpfs "$PLACE/volume"
        umask 077
        echo one >"$PLACE/volume/token"
        echo three >"$PLACE/outside/token"
        exec "$@"' sh "$@""#;
    let setup = Setup::new().token_file(&place.path("volume/token")).wrapper(script);
    let (rig, device) = setup.env("PLACE", place.dir.path().to_str().expect("UTF-8")).connected();
    shows(&device, "one");
    let here = place.dir.path().display().to_string();
    let inside = |script: &str| {
        let mut command = Command::new("nsenter");
        command.args(["--mount", "--target", &rig.daemon.pid().to_string(), "/bin/sh", "-ec", script]);
        assert!(command.env("PLACE", &here).status().expect("run nsenter").success(), "{script}");
    };
    inside("umount $PLACE/volume");
    rig.daemon.wait_for_log("no token from", SOON);
    // Nobody tells that it is back.
    inside("mount -t tmpfs tmpfs $PLACE/volume; umask 077; echo two >$PLACE/volume/token");
    later_shows(&rig, "two");
    // Changes of what is mounted on a name aren't its folder's.
    inside("mount --bind $PLACE/outside/token $PLACE/volume/token");
    rig.daemon.signal(Signal::SIGHUP);
    next_shows(&rig, "three");
    inside("echo four >$PLACE/outside/token");
    next_shows(&rig, "four");
}

/// Nothing can be watched: the file is looked at every ten seconds, until something can.
#[test]
fn without_inotify_it_is_looked_at_now_and_then() {
    const LIMIT: &str = "/proc/sys/user/max_inotify_instances";
    let place = Place::new();
    place.write("token", "one");
    let script = r#"exec unshare --user --map-root-user /bin/sh -c '
        echo 0 >/proc/sys/user/max_inotify_instances && exec "$@"' sh "$@""#;
    let probe = Command::new("/bin/sh").args(["-c", script, "sh", "true"]).output().expect("run sh");
    if !probe.status.success() {
        return skip("no user namespace with limits of its own can be made here");
    }
    let (rig, device) = place.setup().wrapper(script).connected();
    shows(&device, "one");
    let line = rig.daemon.wait_for_log("can't be watched: too many open files", SOON);
    assert!(line.contains("level=warning"), "{line}");
    place.replace("token", "two");
    later_shows(&rig, "two");
    let pid = rig.daemon.pid().to_string();
    let lift = ["--user", "--preserve-credentials", "--target", &pid, "/bin/sh", "-c"];
    let lifted = Command::new("nsenter").args(lift).arg(format!("echo 9 >{LIMIT}")).status();
    assert!(lifted.expect("run nsenter").success());
    eventually(secs(15), "a new watch", || {
        let targets = proc::descriptor_targets(rig.daemon.pid());
        targets.iter().any(|target| target.contains("inotify")).then_some(())
    });
    place.replace("token", "three");
    next_shows(&rig, "three");
    assert_eq!(rig.daemon.count_log("can't be watched"), 1);
}

/// As a container has it: a root with little more than the executable, and processes of its own.
#[test]
fn in_a_container() {
    if let Some(why) = root::obstacle() {
        return skip(why);
    }
    if emulated("its first process would be the emulator") {
        return;
    }
    let root = Root::new();
    let script = r#"cp mender-connect.conf "$ROOT/etc/mender/"
        exec unshare --mount --pid --fork --kill-child --propagation private /bin/sh -c '
        mount -t proc proc "$ROOT/proc" || exit
        exec chroot "$ROOT" "$1" daemon' sh "$@""#;
    let setup = Setup::new().token_file(Path::new("/run/token")).set("ShellCommand", "/bin/sh");
    let at = root.path("/").display().to_string();
    let rig = setup.wrapper(script).env("ROOT", &at).start();
    rig.daemon.wait_for_log("waiting for a new token in /run/token", SOON);
    root.write("run/token", "one");
    let device = next_shows(&rig, "one");
    root.write("data/file", "content");
    assert_eq!(Rest::download(&device, "/data/file").expect("a download").bytes, b"content");
}

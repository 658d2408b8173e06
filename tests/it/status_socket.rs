//! The socket of `mender-connect status`: who may ask, what is in its way, and that nobody who asks disturbs anybody.

use std::fs::{self, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use nix::sys::signal::Signal;
use rmpv::Value;

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::{self, emulated};
use crate::harness::msg::CONTROL;
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup, is_root};
use crate::harness::wait::{SOON, eventually, secs, skip, spawn, throughout};
use crate::signals::ends_quickly;

fn socket(rig: &Rig) -> PathBuf {
    rig.dir.path().join("run/status.sock")
}

/// The command `status` of whoever has this directory.
fn ask(directory: &Path) -> Command {
    let mut command = daemon::command();
    command.arg("status").env("RUNTIME_DIRECTORY", directory);
    command
}

fn assert_refused(output: &Output, why: &str) {
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains(why) && told.contains("Is the daemon running"), "{told}");
    assert!(output.stdout.is_empty());
}

#[test]
fn only_root_and_the_daemons_user_can_ask() {
    let (rig, _device) = Rig::connected();
    let path = socket(&rig);
    let mode = |path: &Path| fs::symlink_metadata(path).expect("it").mode() & 0o7777;
    assert_eq!((mode(path.parent().expect("a folder")), mode(&path)), (0o700, 0o700));
    if !is_root() {
        return skip("only root can try as another user");
    }
    // Where the executable and the socket's folder are is in nobody's way.
    let copy = tempfile::tempdir().expect("a temporary directory");
    let executable = copy.path().join("mender-connect");
    // By another process: what this one has open for writing others can't execute.
    let copied = Command::new("cp").arg(daemon::command().get_program()).arg(&executable).status();
    assert!(copied.expect("run cp").success());
    for folder in [copy.path(), rig.dir.path(), path.parent().expect("a folder")] {
        fs::set_permissions(folder, Permissions::from_mode(0o755)).expect("chmod");
    }
    let arguments = daemon::command();
    let mut command = Command::new(executable);
    command
        .args(arguments.get_args())
        .arg("status")
        .env("RUNTIME_DIRECTORY", path.parent().expect("a folder"));
    assert!(command.output().expect("run").status.success());
    assert_refused(&command.uid(65534).gid(65534).output().expect("run"), "status.sock: permission denied");
}

/// In a /run of its own the default place is used, and a /run that can't be written is only worth a warning.
#[test]
fn the_default_place_and_a_run_that_is_read_only() {
    if !is_root() {
        return skip("mounting a file system needs root");
    }
    for (script, obstacle) in [
        (
            r#"exec unshare -m sh -c 'mount -t tmpfs tmpfs /run && exec env -u RUNTIME_DIRECTORY "$@"' sh "$@""#,
            None,
        ),
        (
            r#"exec unshare -m sh -c 'mount -t tmpfs -o ro tmpfs /run && exec env -u RUNTIME_DIRECTORY "$@"' sh "$@""#,
            Some("read-only file system"),
        ),
        (
            r#"exec unshare -m sh -c 'mount -t tmpfs tmpfs /run && RUNTIME_DIRECTORY=/run/a/b exec "$@"' sh "$@""#,
            Some("no such file or directory"),
        ),
    ] {
        let (mut rig, _device) = Setup::new().wrapper(script).connected();
        let run = PathBuf::from(format!("/proc/{}/root/run/mender-connect", rig.daemon.pid()));
        match obstacle {
            None => {
                let output = ask(&run).output().expect("run");
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                assert_eq!(rig.daemon.count_log("no status: "), 0);
            }
            Some(why) => {
                let line = rig.daemon.wait_for_log("no status: ", SOON);
                assert!(line.contains("level=warning") && line.contains(why), "{line}");
                assert_eq!(rig.daemon.count_log("no status: "), 1);
            }
        }
        ends_quickly(&mut rig, Signal::SIGTERM);
    }
}

/// Something else is where the socket should be. It stays, and the agent does without.
#[test]
fn what_is_in_the_way_stays() {
    type Prepare = fn(&Path);
    let obstacles: [(&str, Prepare); 7] = [
        ("something is in its place", |run| fs::create_dir_all(run.join("status.sock")).unwrap()),
        ("something is in its place", |run| {
            fs::create_dir(run).unwrap();
            symlink("/nonexistent/target", run.join("status.sock")).unwrap();
        }),
        ("something is in its place", |run| {
            fs::create_dir(run).unwrap();
            fs::write(run.join("status.sock"), "x").unwrap();
        }),
        ("no directory of the daemon's own", |run| fs::write(run, "x").unwrap()),
        ("no directory of the daemon's own", |run| symlink("/tmp", run).unwrap()),
        ("no directory of the daemon's own", |run| symlink("/nonexistent/target", run).unwrap()),
        ("no directory of the daemon's own", |run| {
            fs::create_dir(run).unwrap();
            fs::set_permissions(run, Permissions::from_mode(0o777)).unwrap();
        }),
    ];
    for (why, prepare) in obstacles {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let run = dir.path().join("run");
        prepare(&run);
        let listing = || Command::new("ls").arg("-lR").arg(dir.path()).output().expect("ls").stdout;
        let before = listing();
        let run = run.to_str().expect("UTF-8");
        let (mut rig, _device) = Setup::new().env("RUNTIME_DIRECTORY", run).connected();
        let line = rig.daemon.wait_for_log("no status: ", SOON);
        assert!(line.contains("level=warning") && line.contains(why), "{line}");
        ends_quickly(&mut rig, Signal::SIGTERM);
        assert_eq!(rig.daemon.count_log("no status: "), 1);
        assert!(listing() == before, "{why}");
        assert!(!Path::new("/nonexistent").exists());
    }
}

#[test]
fn a_killed_daemons_socket_is_replaced_and_the_own_one_removed() {
    let setup = Setup::new();
    let (mut rig, _device) = Setup::new().connected();
    let first = rig.status()["pid"].clone();
    rig.daemon.signal(Signal::SIGKILL);
    rig.daemon.wait_exit(SOON);
    assert!(socket(&rig).exists());
    assert_refused(&rig.status_command(&[]).output().expect("run"), "status.sock: connection refused");
    rig.restart(&setup);
    rig.device();
    let second = rig.status()["pid"].clone();
    assert!(second == rig.daemon.pid() && second != first, "{second}");
    ends_quickly(&mut rig, Signal::SIGTERM);
    assert!(!socket(&rig).exists());
    assert_refused(&rig.status_command(&[]).output().expect("run"), "status.sock: no such file or directory");
}

#[test]
fn the_first_of_two_daemons_keeps_its_socket() {
    let (rig, _device) = Rig::connected();
    let run = rig.dir.path().join("run");
    // Also when the first one stands still and its queue is full.
    let mut waiting = Vec::new();
    for frozen in [false, true] {
        if frozen {
            rig.daemon.freeze();
            waiting.extend((0..17).map(|_| UnixStream::connect(socket(&rig)).expect("connect")));
        }
        let other = Setup::new().env("RUNTIME_DIRECTORY", run.to_str().expect("UTF-8"));
        let start = Instant::now();
        let (mut other, _device) = other.connected();
        assert!(start.elapsed() < secs(4), "{:?}", start.elapsed());
        let line = other.daemon.wait_for_log("no status: ", SOON);
        assert!(line.contains("another daemon has it"), "{line}");
        ends_quickly(&mut other, Signal::SIGTERM);
    }
    rig.daemon.thaw();
    assert_eq!(rig.status()["pid"], rig.daemon.pid());
}

/// A hundred sessions whose names take so much space that no socket's buffer holds the document.
fn make_it_long(rig: &Rig, device: &crate::harness::device::Device) {
    for n in 0..100 {
        let sid = format!("{n:03}{}", "\u{1}".repeat(253));
        let props = [("user_id", Value::from("\u{1}".repeat(256)))];
        device.send(CONTROL, "ping", &sid, &props, b"");
        // Any other message of a session keeps it for a while.
        device.discard(&sid);
    }
    eventually(SOON, "a long document", || (rig.status().to_string().len() > 300_000).then_some(()));
}

#[test]
fn clients_that_do_not_read_disturb_nobody() {
    let (mut rig, device, mut terminal) = Setup::new().terminal();
    make_it_long(&rig, &device);
    let threads = proc::threads(rig.daemon.pid());
    let path = socket(&rig);
    let clients: Vec<_> = (0..200)
        .map(|_| {
            let path = path.clone();
            spawn("unread", move || UnixStream::connect(path))
        })
        .collect();
    eventually(SOON, "answers to be under way", || (proc::threads(rig.daemon.pid()) > threads).then_some(()));
    let before = proc::cpu_ticks(rig.daemon.pid());
    for _ in 0..20 {
        let start = Instant::now();
        assert_eq!(terminal.run("echo $((6 * 7))"), "42");
        assert!(start.elapsed() < secs(2), "{:?}", start.elapsed());
    }
    throughout(secs(2), "few threads", || proc::threads(rig.daemon.pid()) <= threads + 4);
    let spent = proc::cpu_ticks(rig.daemon.pid()) - before;
    assert!(spent < 100, "{spent} ticks");
    drop(clients);
    ends_quickly(&mut rig, Signal::SIGTERM);
}

#[test]
fn clients_that_go_away_leave_nothing() {
    let (rig, device) = Rig::connected();
    make_it_long(&rig, &device);
    let (pid, path) = (rig.daemon.pid(), socket(&rig));
    let (threads, descriptors) = (proc::threads(pid), proc::descriptors(pid));
    for n in 0..300 {
        let mut client = UnixStream::connect(&path).expect("connect");
        if n % 2 == 0 {
            let _ = client.read(&mut [0; 100]);
        }
    }
    // Fewer, if the forwards' look-ups weren't quite over.
    eventually(SOON, "everything to be as before", || {
        (proc::threads(pid) <= threads && proc::descriptors(pid) <= descriptors).then_some(())
    });
    assert_eq!(rig.status()["pid"], pid);
}

#[test]
fn without_descriptors_it_waits_without_spinning() {
    if emulated("its descriptors are the emulator's, too") {
        return;
    }
    let (rig, device) = Rig::connected();
    let pid = rig.daemon.pid();
    eventually(SOON, "the start to be over", || {
        (rig.status()["connection"]["state"] == "connected").then_some(())
    });
    eventually(SOON, "the answer to be over", || {
        (!proc::thread_names(pid).contains(&"status".to_owned())).then_some(())
    });
    // Fewer than are open, but poll(2) refuses to look at more than the limit.
    rig.daemon.limit("nofile", 8);
    let mut client = UnixStream::connect(socket(&rig)).expect("connect");
    let line = rig.daemon.wait_for_log("status can't be told: ", SOON);
    assert!(line.contains("too many open files"), "{line}");
    let before = proc::cpu_ticks(pid);
    // It tries again after five seconds.
    throughout(secs(7), "it is quiet", || proc::cpu_ticks(pid) - before < 60);
    assert_eq!(rig.daemon.count_log("status can't be told: "), 1);
    rig.daemon.lift("nofile");
    let mut document = String::new();
    client.read_to_string(&mut document).expect("an answer");
    assert!(document.ends_with("}\n"), "{document}");
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
}

#[test]
fn a_daemon_that_does_not_answer_is_not_waited_for() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    assert_refused(&ask(dir.path()).output().expect("run"), "status.sock: no such file or directory");
    let listener = UnixListener::bind(dir.path().join("status.sock")).expect("bind");
    let silent = spawn("silent", {
        let listener = listener.try_clone().expect("clone");
        move || listener.accept()
    });
    let start = Instant::now();
    assert_refused(&ask(dir.path()).output().expect("run"), "no answer in time");
    assert!((secs(5)..SOON).contains(&start.elapsed()), "{:?}", start.elapsed());
    drop(silent.join());
    for (answer, why) in [
        (vec![b' '; 1 << 20], "the answer is no status document"),
        (b"{".to_vec(), "the answer is no status document"),
        (b"".to_vec(), "the answer is no status document"),
    ] {
        let listener = listener.try_clone().expect("clone");
        let endless = answer.len() > 1;
        let server = spawn("odd", move || {
            let (mut stream, _) = listener.accept().expect("accept");
            while stream.write_all(&answer).is_ok() && endless {}
        });
        assert_refused(&ask(dir.path()).output().expect("run"), why);
        server.join().expect("no panic");
    }
    // Of several directories the first one counts.
    std::fs::remove_file(dir.path().join("status.sock")).expect("remove");
    let both = format!("{}:/nonexistent", dir.path().display());
    let why = format!("{}/status.sock: no such file or directory", dir.path().display());
    assert_refused(&ask(Path::new(&both)).output().expect("run"), &why);
}

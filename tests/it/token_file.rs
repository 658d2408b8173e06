//! A token from a file: where there is no bus, and in builds that know none.

use std::fs::{self, File, Permissions};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::unistd::{Pid, mkfifo};
use tempfile::TempDir;

use crate::harness::client::{Style, Terminal};
use crate::harness::device::Device;
use crate::harness::rig::{Rig, Setup};
use crate::harness::wait::{SOON, eventually, millis, secs, throughout};
use crate::harness::{proc, trace};

/// A folder of the token's own.
pub struct Place {
    pub dir: TempDir,
}

impl Place {
    pub fn new() -> Place {
        Place { dir: tempfile::tempdir().expect("a temporary directory") }
    }

    /// Where no other test makes or removes anything meanwhile, nor further up: that wakes who looks for a name there,
    /// too.
    fn quiet() -> Place {
        Place { dir: tempfile::tempdir_in("/dev/shm").expect("a temporary directory") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes into the file, for its owner alone.
    pub fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path(name), text).expect("write");
        self.mode(name, 0o600);
    }

    pub fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.path(name), Permissions::from_mode(mode)).expect("chmod");
    }

    /// As whoever is careful does it.
    pub fn replace(&self, name: &str, text: &str) {
        self.write("temporary", text);
        fs::rename(self.path("temporary"), self.path(name)).expect("rename");
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.path(name)).expect("remove");
    }

    pub fn setup(&self) -> Setup {
        Setup::new().token_file(&self.path("token"))
    }
}

#[track_caller]
pub fn shows(device: &Device, token: &str) {
    let header = device.request().header("Authorization").expect("an Authorization header");
    assert_eq!(header, format!("Bearer {token}"));
}

/// A place with the token "one", and an agent that is connected with it.
fn connected() -> (Place, Rig, Device) {
    connected_at(Place::new())
}

fn connected_at(place: Place) -> (Place, Rig, Device) {
    place.write("token", "one");
    let (rig, device) = place.setup().connected();
    shows(&device, "one");
    rig.daemon.wait_for_log("Connection established", SOON);
    (place, rig, device)
}

/// The next connection comes well before a retry would make up for an event that was missed.
#[track_caller]
pub fn next_shows(rig: &Rig, token: &str) -> Device {
    let device = rig.server.next_device(secs(6));
    shows(&device, token);
    device
}

#[test]
fn connects_without_any_bus() {
    let (_place, rig, device) = connected();
    assert!(rig.daemon.started.elapsed() < secs(5));
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo $((6 * 7))"), "42");
    let log = rig.daemon.log();
    assert!(!log.iter().any(|line| line.contains("level=warning") || line.contains("one")), "{log:#?}");
}

/// Neither the one that the environment names nor the usual one.
#[test]
fn no_bus_is_looked_for() {
    if !trace::sees_the_agent() {
        return;
    }
    let place = Place::new();
    place.write("token", "one");
    let trace = place.path("trace");
    let script = r#"exec strace -f -o "$TRACE" -e trace=connect "$@""#;
    let setup = place.setup().wrapper(script).env("TRACE", trace.to_str().expect("UTF-8"));
    let (mut rig, _device) = setup.connected();
    rig.daemon.wait_for_log("Connection established", SOON);
    let agent = proc::children(rig.daemon.pid())[0];
    kill(Pid::from_raw(agent as i32), Signal::SIGTERM).expect("a signal");
    rig.daemon.wait_exit(SOON);
    let trace = fs::read_to_string(trace).expect("the trace");
    assert!(trace.contains("AF_INET"), "{trace}");
    let bus = rig.bus.address();
    let bus = bus.trim_start_matches("unix:path=");
    assert!(!trace.contains(bus) && !trace.contains("dbus"), "{trace}");
}

#[test]
fn white_space_around_it_is_not_the_tokens() {
    let place = Place::new();
    place.write("token", " \n\tone.two-three_four \r\n\n");
    let (_rig, device) = place.setup().connected();
    shows(&device, "one.two-three_four");
}

#[test]
fn a_new_token_reconnects_whichever_way_it_comes() {
    let (place, rig, device) = connected();
    place.replace("token", "two");
    next_shows(&rig, "two");
    device.wait_end(SOON);
    place.write("token", "three");
    next_shows(&rig, "three");
    place.remove("token");
    place.write("token", "four");
    next_shows(&rig, "four");
    // A link appears, and no file is opened.
    place.write("other", "five");
    place.remove("token");
    fs::hard_link(place.path("other"), place.path("token")).expect("link");
    next_shows(&rig, "five");
    place.write("file", "six");
    place.remove("token");
    symlink("file", place.path("token")).expect("symlink");
    next_shows(&rig, "six");
    // What it leads to is replaced.
    place.replace("file", "seven");
    next_shows(&rig, "seven");
    assert_eq!(rig.daemon.count_log("terminated"), 0, "it was never withdrawn");
}

#[test]
fn a_half_written_token_is_not_taken() {
    let (place, rig, device) = connected();
    let mut file = File::create(place.path("token")).expect("open");
    file.write_all(b"half").expect("write");
    // What happens to this one's mode, or to others' files, says nothing about its content.
    place.mode("token", 0o640);
    place.mode("token", 0o600);
    let (mut n, mut terminal) = (0, Terminal::new(&device, Style::Cli));
    terminal.open_with_prompt();
    throughout(millis(1800), "nobody reads half a token", || {
        n += 1;
        place.write(&format!("other-{}", n % 3), n.to_string());
        rig.server.try_device(millis(0)).is_none() && !device.is_over()
    });
    assert_eq!(terminal.run("echo still here"), "still here");
    file.write_all(b"-and-half").expect("write");
    drop(file);
    next_shows(&rig, "half-and-half");
}

#[test]
fn an_emptied_or_removed_token_is_withdrawn_after_a_second() {
    for empty in [true, false] {
        let (place, rig, device) = connected();
        Terminal::new(&device, Style::Cli).open();
        if empty {
            place.write("token", "\n");
        } else {
            place.remove("token");
        }
        assert!(!device.ended_within(millis(500)), "another may be about to come");
        device.wait_end(SOON);
        rig.daemon.wait_for_log("terminated 1 sessions, 1 shells", SOON);
        let why = if empty { "it is empty" } else { "no such file or directory" };
        let path = place.path("token");
        rig.daemon.wait_for_log(&format!("no token from {}: {why}", path.display()), SOON);
        rig.server.no_device(millis(300), "there is no token");
        place.write("token", "one");
        next_shows(&rig, "one");
    }
}

/// All terminals ended when the device had no descriptors left, such as for the next terminal to find out why.
#[test]
fn a_token_that_the_device_cannot_read_just_now_stays() {
    let (place, rig, device) = connected();
    rig.daemon.limit("nofile", 8);
    place.write("token", "one");
    rig.daemon
        .wait_for_log(&format!("no token from {}: too many open files", place.path("token").display()), SOON);
    assert!(!device.ended_within(millis(500)), "the token is as good as before");
    rig.daemon.lift("nofile");
    place.write("token", "two");
    next_shows(&rig, "two");
}

#[test]
fn the_same_again_changes_nothing() {
    let (place, rig, device) = connected();
    place.replace("token", "one\n");
    place.write("token", "one");
    rig.server.no_device(millis(1500), "it is the same token");
    assert!(!device.is_over());
}

#[test]
fn what_is_no_token_is_none() {
    let place = Place::new();
    let rig = place.setup().start();
    rig.daemon.wait_for_log("waiting for a new token in", SOON);
    let told = |why: &str| {
        let line = rig.daemon.wait_for_log(why, SOON);
        assert!(line.contains("level=warning") && line.contains("no token from"), "{line}");
    };
    told("no such file or directory");
    place.replace("token", "");
    told("it is empty");
    place.replace("token", "two\nlines");
    told("it has something else in it");
    place.write("token", b"\xff\xfe");
    place.write("token", "x".repeat(16 * 1024));
    told("it is too large for a token");
    place.remove("token");
    mkfifo(&place.path("token"), Mode::S_IRWXU).expect("mkfifo");
    told("it is no regular file");
    place.remove("token");
    symlink("/dev/zero", place.path("token")).expect("symlink");
    rig.server.no_device(millis(1200), "none of these is a token");
    symlink("token", place.path("loop")).expect("symlink");
    fs::rename(place.path("loop"), place.path("token")).expect("rename");
    told("too many levels of symbolic links");
    place.replace("token", &"y".repeat(8000));
    next_shows(&rig, &"y".repeat(8000));
    assert_eq!(rig.daemon.count_log("waiting for a new token in"), 1);
}

#[test]
fn a_file_that_others_may_read_is_warned_about_once() {
    let place = Place::new();
    place.write("token", "one");
    place.mode("token", 0o644);
    let (rig, _device) = place.setup().connected();
    let line = rig.daemon.wait_for_log("can be read by others than its owner", SOON);
    assert!(line.contains("level=warning"), "{line}");
    for token in ["two", "three"] {
        fs::write(place.path("token"), token).expect("write");
        next_shows(&rig, token);
    }
    assert_eq!(rig.daemon.count_log("can be read by others"), 1);
}

/// The machine asks again for the token that the server didn't like, and waits for another one all the time.
#[test]
fn a_refused_token_is_tried_again_and_replaced() {
    let place = Place::new();
    place.write("token", "old");
    let setup = place.setup().set("ReconnectIntervalSeconds", 1);
    let rig = setup.start_with(|server| server.require_token("new"));
    rig.server.wait_requests(2, SOON);
    rig.daemon.wait_for_log("waiting for a new token in", SOON);
    assert_eq!(rig.daemon.count_log("waiting for a new token in"), 1);
    place.replace("token", "new");
    next_shows(&rig, "new");
}

/// How much the agent watches.
fn watches(rig: &Rig) -> usize {
    let folder = format!("/proc/{}/fdinfo", rig.daemon.pid());
    let infos =
        fs::read_dir(folder).expect("descriptors").filter_map(|e| fs::read_to_string(e.ok()?.path()).ok());
    let counts: Vec<usize> =
        infos.map(|info| info.matches("inotify wd:").count()).filter(|&n| n > 0).collect();
    assert_eq!(counts.len(), 1, "one inotify descriptor");
    counts[0]
}

#[test]
fn nothing_happens_without_a_change() {
    let (place, rig, _device) = connected_at(Place::quiet());
    let (mut last, mut since) = (0, Instant::now());
    eventually(SOON, "three seconds without a wake-up", || {
        let switches = proc::voluntary_switches(rig.daemon.pid());
        if switches != last {
            (last, since) = (switches, Instant::now());
        }
        (since.elapsed() > secs(3)).then_some(())
    });
    let watches = watches(&rig);
    for n in 0..20 {
        // The file lives on under another name, and is nobody's concern any more.
        fs::hard_link(place.path("token"), place.path(&format!("old-{n}"))).expect("link");
        place.replace("token", &format!("token-{n}"));
        next_shows(&rig, &format!("token-{n}"));
    }
    assert_eq!(self::watches(&rig), watches);
    rig.daemon.signal(Signal::SIGHUP);
    rig.daemon.wait_for_log("the configuration has not changed", SOON);
    assert_eq!(self::watches(&rig), watches);
}

/// The guide's commands.
#[test]
fn the_guides_commands_make_a_token() {
    const GUIDE: &str = include_str!("../../docs/guide.md");
    let (_, section) = GUIDE.split_once("## Without D-Bus").expect("the section");
    let commands = section.split("```\n").nth(2).expect("its commands");
    let place = Place::new();
    let commands = commands.replace("/run/mender", place.path("mender").to_str().expect("UTF-8"));
    let rig = Setup::new().token_file(&place.path("mender/token")).start();
    for token in ["one", "two"] {
        let status = Command::new("/bin/sh").args(["-ec", &commands]).env("TOKEN", token).status();
        assert!(status.expect("run sh").success());
        // No event tells of a directory that is new.
        shows(&rig.server.next_device(secs(15)), token);
    }
    assert_eq!(rig.daemon.count_log("can be read by others"), 0);
}

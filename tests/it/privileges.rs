//! What the agent keeps of root's privileges, by its configuration, and what its programs get.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::emulated;
use crate::harness::program;
use crate::harness::rest::{Form, Rest};
use crate::harness::rig::{Setup, is_root};
use crate::harness::trace;
use crate::harness::wait::skip;
use crate::remote::shell_works;

/// A line of /proc/PID/status.
fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect(name);
    line.trim_start_matches(':').trim()
}

fn capability_set(status: &str, name: &str) -> u64 {
    u64::from_str_radix(field(status, name), 16).expect("a number")
}

fn status(pid: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).expect("read the status")
}

fn capabilities(pid: &str, set: &str) -> u64 {
    capability_set(&status(pid), set)
}

/// Names as in capabilities(7), by their numbers.
const NAMES: [&str; 8] =
    ["chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid"];

fn names(set: u64) -> Vec<&'static str> {
    assert!(set < 1 << NAMES.len(), "{set:x}");
    (0..NAMES.len()).filter(|n| set & 1 << n != 0).map(|n| NAMES[n]).collect()
}

fn cannot_tell() -> bool {
    if !is_root() {
        skip("only root has privileges to give up");
        return true;
    }
    emulated("its privileges are the emulator's")
}

#[test]
fn the_daemon_keeps_what_its_features_need() {
    if cannot_tell() {
        return;
    }
    let all = capabilities("self", "CapBnd");
    let off = json!({ "Disable": true });
    let shells = ["chown", "dac_read_search", "kill", "setgid", "setuid"];
    let files = ["chown", "dac_override", "dac_read_search", "fowner", "fsetid"];
    let plain = || Setup::new().set("User", "nobody");
    for (setup, kept, bounded) in [
        (plain(), &NAMES[..], false),
        (plain().set("FileTransfer", off.clone()), &shells, false),
        // The Mender client runs as root.
        (plain().set("Terminal", off.clone()), &files, false),
        (plain().set("MenderClient", off.clone()).set("Terminal", off.clone()), &files, true),
    ] {
        let (rig, device) = setup.connected();
        let pid = rig.daemon.pid().to_string();
        for task in fs::read_dir(format!("/proc/{pid}/task")).expect("threads") {
            // The thread that connected to the bus may end meanwhile.
            let Ok(task) = fs::read_to_string(task.expect("a thread").path().join("status")) else {
                continue;
            };
            let set = |name| capability_set(&task, name);
            assert_eq!([names(set("CapEff")), names(set("CapPrm"))], [kept, kept], "{task}");
            assert_eq!(set("CapBnd"), if bounded { set("CapEff") } else { all });
            assert_eq!(field(&task, "NoNewPrivs"), if bounded { "1" } else { "0" });
        }
        drop(device);
    }
}

#[test]
fn roots_shell_may_do_everything() {
    if cannot_tell() {
        return;
    }
    let (rig, _device, mut terminal) = Setup::new().terminal();
    let daemon = rig.daemon.pid().to_string();
    assert_eq!(names(capabilities(&daemon, "CapEff")), NAMES);
    let shell = terminal.run("echo $$");
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(capabilities(&shell, set), capabilities("self", set), "{set}");
    }
    assert_eq!(field(&status(&shell), "NoNewPrivs"), "0");
    assert_eq!(terminal.run("umask"), terminal.run("grep Umask /proc/$$/status | cut -f2"));
}

/// A program that is set-uid works in a shell unless the configuration says that none may.
#[test]
fn nothing_in_a_confined_shell_becomes_more_than_its_user() {
    use std::os::unix::fs::PermissionsExt;
    if cannot_tell() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
    let program = dir.path().join("id");
    program::copy(Path::new("/usr/bin/id"), &program);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).expect("chmod");
    let command = format!("{} -u", program.display());
    for (confined, euid) in [(false, "0"), (true, "65534")] {
        let terminal = json!({ "NoNewPrivileges": confined });
        let (_rig, _device, mut terminal) =
            Setup::new().set("User", "nobody").set("Terminal", terminal).terminal();
        assert_eq!(terminal.run(&command), euid, "a confined shell: {confined}");
    }
    // Root's own shell has what the daemon has, and no more.
    let (_rig, _device, mut terminal) =
        Setup::new().set("Terminal", json!({ "NoNewPrivileges": true })).terminal();
    let shell = terminal.run("echo $$");
    assert_eq!(names(capabilities(&shell, "CapEff")), NAMES);
}

/// With what is left the daemon still does what it's for: other people's files and shells.
#[test]
fn nothing_is_lacking_that_is_needed() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    if cannot_tell() {
        return;
    }
    let dir = tempfile::tempdir().expect("a temporary directory");
    let private = dir.path().join("private");
    fs::create_dir(&private).expect("a directory");
    fs::set_permissions(&private, fs::Permissions::from_mode(0o700)).expect("chmod");
    chown(&private, Some(65534), Some(65534)).expect("chown");
    let file = private.join("file");
    fs::write(&file, "theirs").expect("write");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
    chown(&file, Some(65534), Some(65534)).expect("chown");

    let (_rig, device) = Setup::new().set("User", "nobody").connected();
    let path = file.to_str().expect("UTF-8");
    assert_eq!(Rest::download(&device, path).expect("a download").bytes, b"theirs");
    let form = Form { uid: Some(2), gid: Some(3), mode: Some(0o640), ..Form::to(&file) };
    Rest::upload(&device, &form, b"new").expect("an upload");
    let stat = fs::metadata(&file).expect("the file");
    assert_eq!((stat.uid(), stat.gid(), stat.mode() & 0o7777), (2, 3, 0o640));

    // Somebody else's processes get the hang-up and are killed, too.
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("id -u"), "65534");
    terminal.run("trap '' HUP TERM");
    terminal.stop();
}

/// The kernel sets no limit on descriptors once fs.nr_open was lowered below the hard limit. The agent said "Operation not
/// permitted" and ended.
#[test]
fn a_limit_that_cannot_be_raised_stays() {
    let Some((_rig, device)) = trace::refusing("prlimit64", "RLIMIT_NOFILE, {", "EPERM") else { return };
    shell_works(&device);
}

/// Neither read nor set: systemd's @resources had prlimit64 once, and units that exclude it are common. The agent ended.
#[test]
fn limits_that_a_filter_hides_stay() {
    if !trace::sees_the_agent() {
        return;
    }
    let script = "exec strace -D -f -qq -o trace -e trace=prlimit64 -e inject=prlimit64:error=EPERM \"$@\"";
    let (_rig, device) = Setup::new().wrapper(script).connected();
    shell_works(&device);
}

/// A container that grants no capabilities has root nevertheless. Its shell failed for want of CAP_SETGID.
#[test]
fn root_without_capabilities_has_a_shell_of_root() {
    if cannot_tell() {
        return;
    }
    let without = "exec setpriv --bounding-set=-all \"$@\"";
    let (_rig, _device, mut terminal) = Setup::new().wrapper(without).terminal();
    assert_eq!(terminal.run("id -u"), "0");
    let (_rig, device) = Setup::new().set("User", "nobody").wrapper(without).connected();
    let terminal = Terminal::new(&device, Style::Cli);
    terminal.ask_new();
    terminal.expect("new", 2, Some("failed to start shell: fork/exec /bin/bash: operation not permitted"));
}

/// A terminal belongs to its user where it can. Without CAP_CHOWN, as in units that grant little, there was none.
#[test]
fn a_terminal_that_cannot_be_given_to_its_user_is_used() {
    if cannot_tell() {
        return;
    }
    let without = "exec setpriv --bounding-set=-chown \"$@\"";
    let (_rig, device) = Setup::new().set("User", "nobody").wrapper(without).connected();
    shell_works(&device);
}

/// Without CAP_SETPCAP, as in the drop-in that confines the service, the bounding set can't be changed. The agent then warned
/// at each start and kept all capabilities that it had, also those that its configuration doesn't need.
#[test]
fn capabilities_are_given_up_where_the_bounding_set_stays() {
    if cannot_tell() {
        return;
    }
    let without = "exec setpriv --bounding-set=-setpcap \"$@\"";
    let off = json!({ "Disable": true });
    let confined = json!({ "NoNewPrivileges": true });
    let setup = || Setup::new().wrapper(without).set("MenderClient", off.clone());
    let (rig, _device) = setup().set("User", "nobody").set("Terminal", off.clone()).connected();
    let pid = rig.daemon.pid().to_string();
    let files = ["chown", "dac_override", "dac_read_search", "fowner", "fsetid"];
    for set in ["CapEff", "CapPrm"] {
        assert_eq!(names(capabilities(&pid, set)), files, "{set}");
    }
    assert_eq!(field(&status(&pid), "NoNewPrivs"), "1");
    assert_eq!(rig.daemon.count_log("couldn't be given up"), 0);

    // Its programs have no more than it.
    let (_rig, _device, mut terminal) = setup().set("Terminal", confined).terminal();
    let shell = terminal.run("echo $$");
    for set in ["CapEff", "CapPrm"] {
        assert_eq!(names(capabilities(&shell, set)), NAMES, "{set}");
    }
}

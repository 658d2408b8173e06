//! The account that shells run as.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::files::get;
use crate::harness::client::{Style, Terminal};
use crate::harness::rig::{Setup, is_root};
use crate::harness::wait::{SOON, eventually, secs, skip};

/// An agent with an /etc/group of its own: `group` in its directory.
const OWN_GROUPS: &str = r#"exec unshare -m sh -c '
    cp /etc/group group && mount --bind group /etc/group && exec "$@"' sh "$@""#;

/// A user's groups were those of the agent's start: `usermod -aG` had no effect until the configuration was read again.
/// While the database doesn't answer a login waits, nobody else.
#[test]
fn groups_are_looked_up_at_each_login() {
    if !is_root() {
        return skip("only root can be another user, and mount");
    }
    let (rig, device) = Setup::new().set("User", "nobody").wrapper(OWN_GROUPS).connected();
    let login = || {
        let mut terminal = Terminal::new(&device, Style::Cli);
        terminal.open_with_prompt();
        let groups = terminal.run("id -G");
        terminal.stop();
        groups
    };
    assert!(!login().contains("54399"));
    let mut file = OpenOptions::new().append(true).open(rig.dir.path().join("group")).unwrap();
    file.write_all(b"added:x:54399:nobody\n").unwrap();
    assert!(login().contains(" 54399"));

    // Now it hangs: nobody writes to this FIFO.
    let pid = rig.daemon.pid().to_string();
    let script = "mkfifo fifo && mount --bind fifo /etc/group";
    let mut command = Command::new("nsenter");
    command.args(["-t", &pid, "-m", "-w", "sh", "-c", script]).current_dir(rig.dir.path());
    if !command.status().is_ok_and(|status| status.success()) {
        return skip("nsenter can't mount in the agent's namespace");
    }
    let mut terminal = Terminal::new(&device, Style::Cli);
    let begun = Instant::now();
    terminal.ask_new();
    assert!(!get(&device, "/proc/version").unwrap().bytes.is_empty());
    assert!(begun.elapsed() < secs(4), "others wait: {:?}", begun.elapsed());
    terminal.expect("new", 1, Some("Shell started"));
    terminal.prompt();
    assert_eq!(terminal.run("echo fine"), "fine");
    rig.daemon.wait_for_log("nobody gets the groups that were known before", SOON);
}

/// The agent gives up CAP_SYS_PTRACE, and saw none of its users' processes where /proc shows them to a group only.
#[test]
fn jobs_end_where_proc_shows_them_to_a_group() {
    if !is_root() {
        return skip("only root can be another user, and mount");
    }
    let script = r#"exec unshare -m sh -c '
        mount -t proc -o hidepid=2,gid=54399 proc /proc && exec setpriv --groups 0,54399 "$@"' sh "$@""#;
    let (_rig, _device, mut terminal) = Setup::new().set("User", "nobody").wrapper(script).terminal();
    // The shell itself tells its other jobs.
    let job = terminal.run("sleep 1000 & disown; echo $!");
    let job = job.lines().last().unwrap_or_default().trim();
    assert!(Path::new(&format!("/proc/{job}/stat")).exists(), "{job:?}");
    terminal.stop();
    eventually(SOON, "the job to end", || (!Path::new(&format!("/proc/{job}")).exists()).then_some(()));
}

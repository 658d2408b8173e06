//! The scripts for sysvinit, BusyBox and OpenRC, run as those run them, on machines of their own.

use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::executable;
use crate::harness::rig::bash_config;
use crate::harness::wait::{SOON, eventually};
use crate::machine::{Machine, have_tools};

const INIT: &str = include_str!("../../yocto/files/mender-connect.init");
const OPENRC: &str = include_str!("../../yocto/files/mender-connect.openrc");
const PIDFILE: &str = "/run/mender-connect.pid";

/// Whose shell and programs run the script.
#[derive(Debug, Clone, Copy, PartialEq)]
enum World {
    /// dash and dpkg's start-stop-daemon.
    Debian,
    Bash,
    /// BusyBox in the place of all programs it has a name for.
    BusyBox,
}

/// What turns a Debian machine into the world.
fn conversion(world: World) -> &'static str {
    match world {
        World::Debian => "ln -sf dash /bin/sh",
        World::Bash => "ln -sf bash /bin/sh",
        World::BusyBox => {
            r#"
            cp /run/tools/busybox/bin/busybox /bin/busybox
            for name in $(/bin/busybox --list); do
                for folder in /usr/sbin /usr/bin; do
                    [ $name = busybox ] || [ ! -e $folder/$name ] || /bin/busybox ln -sf /bin/busybox $folder/$name
                done
            done
            [ "$(readlink /usr/sbin/start-stop-daemon)" = /bin/busybox ]"#
        }
    }
}

/// A machine with the agent installed, but not started.
fn installed(tools: &[&str]) -> Option<Machine> {
    if !have_tools(tools) {
        return None;
    }
    let machine = Machine::start()?;
    machine.install(&executable(), "/usr/bin/mender-connect");
    configure(&machine, &bash_config());
    Some(machine)
}

fn configure(machine: &Machine, config: &Value) {
    machine.write("/etc/mender/mender-connect.conf", config.to_string());
}

/// The same with the init script.
fn scripted(world: World) -> Option<Machine> {
    let tools: &[&str] = if world == World::BusyBox { &["busybox/bin/busybox"] } else { &[] };
    let machine = installed(tools)?;
    machine.write("/etc/init.d/mender-connect", INIT);
    machine.sh("chmod 755 /etc/init.d/mender-connect");
    machine.sh(conversion(world));
    Some(machine)
}

/// Runs the init script.
fn service(machine: &Machine, action: &str) -> (Option<i32>, String) {
    machine.try_sh(&format!("/etc/init.d/mender-connect {action}"))
}

#[track_caller]
fn expect(machine: &Machine, action: &str, status: i32, text: &str) {
    let (got, printed) = service(machine, action);
    assert!(got == Some(status) && printed.contains(text), "{action}: {got:?} {printed}");
}

/// The process the PID file names, once it is the agent's only one. A running script has the same name.
fn pid(machine: &Machine) -> u32 {
    let pid = eventually(SOON, "one agent, in the PID file", || {
        let (_, text) = machine.try_sh(&format!("cat {PIDFILE}"));
        let pid = text.trim().parse().ok()?;
        (machine.pids_of("mender-connect") == [pid]).then_some(pid)
    });
    assert_eq!(machine.sh(&format!("readlink /proc/{pid}/exe")).trim(), "/usr/bin/mender-connect");
    pid
}

fn gone(machine: &Machine) {
    // What has ended counts for some until the first process has noticed.
    eventually(SOON, "no agent", || machine.pids_of("mender-connect").is_empty().then_some(()));
    assert!(!machine.exists(PIDFILE), "no PID file is left");
    expect(machine, "status", 3, "not running");
}

/// One machine's day, without trouble.
fn ordinary(world: World) {
    let Some(machine) = scripted(world) else { return };
    machine.write("/etc/default/mender-connect", "OPTIONS=--debug\nNO_PROXY=here.example\n");
    expect(&machine, "status", 3, "not running");
    expect(&machine, "start", 0, "started");
    machine.device();
    machine.wait_syslog("mender-connect: ");
    machine.wait_syslog("level=debug");
    let first = pid(&machine);
    let environment = machine.sh(&format!("tr '\\0' '\\n' </proc/{first}/environ"));
    assert!(environment.contains("NO_PROXY=here.example\n"), "{environment}");
    expect(&machine, "status", 0, &format!("process {first}"));
    expect(&machine, "start", 0, "already running");
    assert_eq!(pid(&machine), first);
    assert!(!machine.exists("/run/mender-connect.log"), "the log's pipe has no name any more");

    expect(&machine, "reload", 0, "");
    machine.wait_syslog("the configuration has not changed");
    assert_eq!(pid(&machine), first);

    let mut before = first;
    for action in ["restart", "force-reload"] {
        expect(&machine, action, 0, "started");
        machine.device();
        let now = pid(&machine);
        assert_ne!(now, before);
        before = now;
    }

    expect(&machine, "stop", 0, "stopped");
    gone(&machine);
    eventually(SOON, "the logger to end", || machine.pids_of("logger").is_empty().then_some(()));
    expect(&machine, "stop", 0, "not running");
    expect(&machine, "reload", 7, "not running");
    expect(&machine, "restart", 0, "started");
    machine.device();
    pid(&machine);
}

/// One machine's bad day.
fn trouble(world: World) {
    let Some(machine) = scripted(world) else { return };
    // The agent crashes.
    expect(&machine, "start", 0, "started");
    machine.device();
    let crashed = pid(&machine);
    machine.sh(&format!("kill -9 {crashed}"));
    eventually(SOON, "the crash", || machine.pids_of("mender-connect").is_empty().then_some(()));
    expect(&machine, "status", 1, "dead");
    expect(&machine, "start", 0, "started");
    machine.device();
    pid(&machine);

    // It doesn't listen.
    let stuck = pid(&machine);
    machine.sh(&format!("kill -STOP {stuck}"));
    expect(&machine, "stop", 0, "stopped");
    gone(&machine);

    // Its number has become another process's, which is the machine's first here.
    machine.write(PIDFILE, "1\n");
    expect(&machine, "status", 1, "dead");
    expect(&machine, "stop", 0, "not running");
    machine.write(PIDFILE, "1\n");
    expect(&machine, "start", 0, "started");
    machine.device();
    // An update replaces the program, and nobody reads the log any more.
    let old = pid(&machine);
    let logger = machine.pids_of("logger");
    assert_eq!(logger.len(), 1, "{logger:?}");
    machine.sh(&format!(
        "kill -9 {} && cd /usr/bin && cp mender-connect new && mv new mender-connect",
        logger[0]
    ));
    expect(&machine, "status", 0, &format!("process {old}"));
    expect(&machine, "reload", 0, "");
    expect(&machine, "status", 0, &format!("process {old}"));
    expect(&machine, "restart", 0, "started");
    machine.device();
    assert_ne!(pid(&machine), old);
    expect(&machine, "stop", 0, "stopped");

    // It can't run.
    configure(&machine, &json!({ "User": "nobody of this name" }));
    expect(&machine, "start", 1, "did not start");
    gone(&machine);
    machine.wait_syslog("unknown user");
    machine.sh("rm /usr/bin/mender-connect");
    expect(&machine, "start", 5, "not installed");
    expect(&machine, "", 2, "Usage:");
    expect(&machine, "begin", 2, "Usage:");
}

#[test]
fn the_init_script_runs_under_debian() {
    ordinary(World::Debian);
}

#[test]
fn the_init_script_runs_under_bash() {
    ordinary(World::Bash);
}

#[test]
fn the_init_script_runs_under_busybox() {
    ordinary(World::BusyBox);
}

#[test]
fn the_init_script_copes_with_trouble_under_debian() {
    trouble(World::Debian);
}

#[test]
fn the_init_script_copes_with_trouble_under_busybox() {
    trouble(World::BusyBox);
}

#[test]
fn the_init_script_needs_no_logger() {
    let Some(machine) = scripted(World::BusyBox) else { return };
    machine.sh("rm /usr/bin/logger");
    expect(&machine, "start", 0, "started");
    machine.device();
    pid(&machine);
    expect(&machine, "stop", 0, "stopped");
    gone(&machine);
}

/// Each made an agent, and the PID file named one.
#[test]
fn two_starts_at_once_make_one_agent() {
    for world in [World::Debian, World::BusyBox] {
        let Some(machine) = scripted(world) else { return };
        // A killed script has left this link, which locks nothing.
        machine.sh("ln -s 99999 /run/mender-connect.lock");
        machine.sh("for n in 1 2 3; do /etc/init.d/mender-connect start & done; wait");
        machine.device();
        pid(&machine);
        expect(&machine, "stop", 0, "stopped");
        gone(&machine);
        assert!(!machine.exists("/run/mender-connect.lock"), "the lock is left");
    }
}

/// Each start would leave another agent behind that nobody could stop.
#[test]
fn the_init_script_starts_nothing_without_its_pid_file() {
    for world in [World::Debian, World::BusyBox] {
        let Some(machine) = scripted(world) else { return };
        machine.sh("mount -t tmpfs -o ro tmpfs /run");
        expect(&machine, "start", 1, PIDFILE);
        assert!(machine.pids_of("mender-connect").is_empty(), "it is started");
        machine.sh("umount /run");
        expect(&machine, "start", 0, "started");
        machine.device();
        pid(&machine);
    }
}

#[test]
fn the_init_script_restarts_the_agent_whose_terminal_it_runs_in() {
    for world in [World::Debian, World::BusyBox] {
        let Some(machine) = scripted(world) else { return };
        expect(&machine, "start", 0, "started");
        let mut terminal = Terminal::new(&machine.device(), Style::Cli);
        let before = pid(&machine);
        terminal.open_with_prompt();
        terminal.input("/etc/init.d/mender-connect restart\n");
        let device = machine.device();
        assert_ne!(pid(&machine), before);
        expect(&machine, "status", 0, "running");
        // The new agent is as usable as the old one.
        let mut terminal = Terminal::new(&device, Style::Cli);
        terminal.open_with_prompt();
        assert_eq!(terminal.run("echo $((6 * 7))"), "42");
        expect(&machine, "reload", 0, "");
        assert_eq!(terminal.run("echo on"), "on");
    }
}

/// A machine that OpenRC has booted, as far as its programs can tell.
fn openrc() -> Option<Machine> {
    let machine = installed(&["openrc/sbin/openrc-run"])?;
    machine.sh("cd /run/tools/openrc && for folder in *; do cp -a $folder/. /$folder/; done
        mkdir /run/openrc && cd /run/openrc && echo default >softlevel
        mkdir starting started stopping inactive failed daemons options exclusive scheduled tmp");
    machine.write("/etc/init.d/mender-connect", OPENRC);
    // The bus is up already.
    machine.write("/etc/init.d/dbus", "#!/sbin/openrc-run\nstart() { :; }\nstop() { :; }\n");
    machine.sh("chmod 755 /etc/init.d/mender-connect /etc/init.d/dbus");
    Some(machine)
}

/// The agent's process, once it is the only one and another than `before`.
fn supervised(machine: &Machine, before: Option<u32>) -> u32 {
    eventually(SOON, "one agent", || match machine.pids_of("mender-connect")[..] {
        [pid] if Some(pid) != before => Some(pid),
        _ => None,
    })
}

#[test]
fn openrc_starts_respawns_and_stops_it() {
    let Some(machine) = openrc() else { return };
    let rc = |action: &str| machine.try_sh(&format!("rc-service mender-connect {action}"));
    machine.write("/etc/conf.d/mender-connect", "error_log=/run/agent.log\ncommand_args='--debug daemon'\n");
    assert_eq!(rc("status").0, Some(3));
    let (status, text) = rc("start");
    assert_eq!(status, Some(0), "{text}");
    machine.device();
    let first = supervised(&machine, None);
    assert_eq!(rc("status").0, Some(0));
    let log = || machine.read("/run/agent.log");
    eventually(SOON, "the log", || log().contains("level=debug").then_some(()));
    let (_, text) = rc("start");
    assert!(text.contains("already been started"), "{text}");
    assert_eq!(supervised(&machine, None), first);

    let (status, text) = rc("reload");
    assert_eq!(status, Some(0), "{text}");
    eventually(SOON, "the reload", || log().contains("the configuration has not changed").then_some(()));
    assert_eq!(supervised(&machine, None), first);

    machine.sh(&format!("kill -9 {first}"));
    machine.device();
    let second = supervised(&machine, Some(first));

    let (status, text) = rc("restart");
    assert_eq!(status, Some(0), "{text}");
    machine.device();
    let third = supervised(&machine, Some(second));

    // Its end isn't waited for longer than it takes.
    machine.sh(&format!("kill -STOP {third}"));
    let (status, text) = rc("stop");
    assert_eq!(status, Some(0), "{text}");
    eventually(SOON, "no agent", || machine.pids_of("mender-connect").is_empty().then_some(()));
    assert_eq!(rc("status").0, Some(3));
    machine.server.no_device(Duration::from_secs(3), "it is stopped");
}

/// With the token in a file there may be no bus, and so no service of one.
#[test]
fn openrc_starts_it_without_the_service_of_a_bus() {
    let Some(machine) = openrc() else { return };
    machine.sh("rm /etc/init.d/dbus");
    let (status, text) = machine.try_sh("rc-service mender-connect start");
    assert_eq!(status, Some(0), "{text}");
    machine.device();
}

#[test]
fn openrc_restarts_the_agent_whose_terminal_it_runs_in() {
    let Some(machine) = openrc() else { return };
    machine.sh("rc-service mender-connect start");
    let mut terminal = Terminal::new(&machine.device(), Style::Cli);
    let before = supervised(&machine, None);
    terminal.open_with_prompt();
    terminal.input("rc-service mender-connect restart\n");
    machine.device();
    supervised(&machine, Some(before));
    eventually(SOON, "OpenRC to know it", || {
        let (status, _) = machine.try_sh("rc-service mender-connect status");
        (status == Some(0)).then_some(())
    });
    machine.sh("rc-service mender-connect reload");
    machine.server.no_device(Duration::from_millis(300), "a reload keeps the link");
}

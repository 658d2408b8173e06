//! Terminals that outlive a restart of the agent, with the unit of the package and systemd itself.

use serde_json::json;

use crate::harness::client::Terminal;
use crate::harness::daemon::executable;
use crate::harness::device::Device;
use crate::harness::rig::bash_config;
use crate::harness::wait::{SOON, eventually, millis, secs};
use crate::machine::Machine;
use crate::packaging::UNIT;

/// A machine where systemd has started the agent.
fn machine(sessions: serde_json::Value) -> Option<(Machine, Device)> {
    let machine = Machine::with_systemd()?;
    machine.install(&executable(), "/usr/bin/mender-connect");
    let mut config = bash_config();
    config["Sessions"] = sessions;
    config["ReconnectIntervalSeconds"] = 1.into();
    machine.write("/etc/mender/mender-connect.conf", config.to_string());
    machine.write("/run/systemd/system/mender-connect.service", UNIT);
    machine.sh("systemctl daemon-reload; systemctl start mender-connect");
    let device = machine.device();
    Some((machine, device))
}

fn main_pid(machine: &Machine) -> u32 {
    let text = machine.sh("systemctl show --property MainPID --value mender-connect");
    text.trim().parse().expect("a process id")
}

fn stored(machine: &Machine) -> u32 {
    let text = machine.sh("systemctl show --property NFileDescriptorStore --value mender-connect");
    text.trim().parse().expect("a number")
}

/// Whether the process has ended.
fn gone(machine: &Machine, pid: &str) -> bool {
    machine.try_sh(&format!("kill -0 {pid}")).0 != Some(0)
}

/// Opens a terminal, which must lead back to the user's shell. Returns what it shows up to the prompt.
fn reattached(device: &Device, user: &str) -> (Terminal, String) {
    let mut terminal = Terminal::of_user(device, user);
    terminal.reattached();
    let shown = terminal.prompt();
    (terminal, shown)
}

#[test]
fn a_shell_outlives_a_restart() {
    let Some((machine, device)) = machine(json!({})) else { return };
    let mut before = Terminal::of_user(&device, "alice");
    before.open_with_prompt();
    let pid = before.run("cd /tmp; here=kept; echo $$");
    assert_eq!(before.run("echo so''far"), "sofar");
    let agent = main_pid(&machine);
    machine.sh("systemctl restart mender-connect");
    assert_ne!(main_pid(&machine), agent);
    let device = machine.device();
    let mut other = Terminal::of_user(&device, "bob");
    other.open_with_prompt();
    assert_eq!(other.run("echo [$here]"), "[]");
    let (mut after, shown) = reattached(&device, "alice");
    assert!(shown.contains("sofar\r\n"), "{shown:?}");
    assert_eq!(after.run("echo $here $PWD $$"), format!("kept /tmp {pid}"));
    // A second time, by which the terminal has changed its session.
    machine.sh("systemctl restart mender-connect");
    let device = machine.device();
    let (mut after, _) = reattached(&device, "alice");
    assert_eq!(after.run("echo $here $$"), format!("kept {pid}"));
    other = reattached(&device, "bob").0;
    assert_eq!(stored(&machine), 4);
    after.stop();
    other.stop();
    eventually(SOON, "the store is empty", || (stored(&machine) == 0).then_some(()));
}

#[test]
fn the_same_client_misses_nothing_of_a_restart() {
    let Some((machine, mut device)) = machine(json!({})) else { return };
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open_with_prompt();
    terminal.input("stty -echo; PS1=; echo rea''dy\n");
    terminal.read_until("ready\r\n", SOON);
    terminal.input("seq 1 400000; echo do''ne\n");
    let expected: String = (1..=400_000).map(|n| format!("{n}\r\n")).collect::<String>() + "done\r\n";
    let mut all = Vec::new();
    for part in 1..=2 {
        terminal.collect(&mut all, part * 900_000, SOON);
        // The client takes what the server has before the server notices the end.
        device.clients_fall_silent();
        terminal.collect(&mut all, usize::MAX, millis(500));
        machine.sh("systemctl restart mender-connect");
        device = machine.device();
        terminal = terminal.on(&device);
        terminal.pong();
    }
    terminal.collect(&mut all, expected.len() - 1, SOON);
    let differs = all.iter().zip(expected.as_bytes()).position(|(a, b)| a != b);
    assert_eq!((all.len(), differs), (expected.len(), None));
    terminal.input("echo again\n");
    terminal.read_until("again\r\n", SOON);
}

#[test]
fn a_shell_outlives_a_crash_of_the_agent() {
    let Some((machine, device)) = machine(json!({})) else { return };
    let mut before = Terminal::of_user(&device, "alice");
    before.open_with_prompt();
    let pid = before.run("trap '' TERM; echo $$");
    machine.sh(&format!("kill -KILL {}", main_pid(&machine)));
    let device = machine.server.next_device(SOON + secs(2));
    // Nobody has written down what it showed.
    let mut after = Terminal::of_user(&device, "alice");
    after.reattached();
    assert_eq!(after.run("echo $$"), pid);
    // Its end is noticed, though it is nobody's child here.
    after.input("exit\n");
    after.expect_after_output("stop", SOON);
    eventually(SOON, "the store is empty", || (stored(&machine) == 0).then_some(()));
}

#[test]
fn a_stop_hangs_up_and_what_may_not_be_kept_ends_with_the_agent() {
    let Some((machine, device)) = machine(json!({})) else { return };
    let mut kept = Terminal::of_user(&device, "alice");
    kept.open_with_prompt();
    let shell = kept.run("echo $$");
    let mut nobody = Terminal::of_user(&device, "");
    nobody.open_with_prompt();
    let other = nobody.run("trap '' HUP; echo $$");
    machine.sh("systemctl restart mender-connect");
    assert!(gone(&machine, &other) && !gone(&machine, &shell));
    machine.sh("systemctl stop mender-connect");
    eventually(SOON, "the shell has ended", || gone(&machine, &shell).then_some(()));
}

#[test]
fn nothing_is_kept_where_detached_shells_are_not() {
    let Some((machine, device)) = machine(json!({"KeepDetached": 0})) else { return };
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open_with_prompt();
    let shell = terminal.run("trap '' HUP; echo $$");
    assert_eq!(stored(&machine), 0);
    machine.sh("systemctl restart mender-connect");
    assert!(gone(&machine, &shell));
}

#[test]
fn a_shell_of_another_user_than_the_configuration_has_is_hung_up() {
    let Some((machine, device)) = machine(json!({})) else { return };
    let mut terminal = Terminal::of_user(&device, "alice");
    terminal.open_with_prompt();
    let shell = terminal.run("echo $$");
    let mut config = bash_config();
    config["User"] = "nobody".into();
    machine.write("/etc/mender/mender-connect.conf", config.to_string());
    machine.sh("systemctl restart mender-connect");
    eventually(SOON, "the shell has ended", || gone(&machine, &shell).then_some(()));
    let mut after = Terminal::of_user(&machine.device(), "alice");
    after.open_with_prompt();
    assert_eq!(after.run("id -un"), "nobody");
}

//! An agent without root, set up as the guide says.

use crate::harness::bus::MENDERS_POLICY;
use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::executable;
use crate::harness::manager::Manager;
use crate::harness::wait::SOON;
use crate::machine::Machine;

const TOKEN: &str = "of.the.machine";
const GUIDE: &str = include_str!("../../docs/guide.md");
const DROP_IN: &str = include_str!("../../yocto/files/mender-connect-user.conf");

/// The guide's commands, on a machine of its own: its user, its configuration, its bus with Mender's policy and ours.
#[test]
fn the_guides_commands_make_it_run() {
    let Some(machine) = Machine::start() else { return };
    let (_, section) = GUIDE.split_once("## Without root").expect("the section");
    let commands = section.split("```").nth(1).expect("its commands");
    machine.write("/usr/bin/orders", "#!/bin/sh\necho \"$@\" >>/run/orders");
    machine.sh("chmod 755 /usr/bin/orders && mv /usr/bin/orders /usr/bin/systemctl");
    machine.install(&executable(), "/usr/bin/mender-connect");
    machine.write(
        "/etc/mender/mender-connect.conf",
        r#"{ "User": "mender-connect", "ShellCommand": "/bin/sh", "ShellArguments": ["-i"] }"#,
    );
    machine.sh("chmod 600 /etc/mender/mender-connect.conf");
    // As meta-mender has it.
    machine.sh("mkdir -p -m 700 /var/lib/mender && chmod 700 /var/lib/mender");
    machine.sh(&format!("set -e\ncd {}\n{commands}", env!("CARGO_MANIFEST_DIR")));
    let stat = machine.sh("stat -c %a:%U:%G /etc/mender/mender-connect.conf");
    assert_eq!(stat.trim(), "640:root:mender-connect");
    assert!(machine.read("/run/orders").contains("restart mender-connect"));
    let account = machine.sh("getent passwd mender-connect");
    assert!(account.trim_end().ends_with(":/var/lib/mender-connect:/bin/sh"), "{account}");

    // A second bus, since the machine's is open to all. The folder is the machine's and ours.
    let policy = "<include>/etc/dbus-1/system.d/io.mender.connect.conf</include>";
    let mut text = String::from("<busconfig><type>system</type><fork/><auth>EXTERNAL</auth>");
    text += "<listen>unix:path=/run/test/second</listen><policy context=\"default\"><allow user=\"*\"/>";
    text += "<allow send_destination=\"*\"/><allow own=\"*\"/><allow receive_sender=\"*\"/></policy>";
    machine.write("/run/bus.conf", format!("{text}{MENDERS_POLICY}{policy}</busconfig>"));
    machine.sh("chmod 755 /run/test; dbus-daemon --nopidfile --config-file=/run/bus.conf >/run/bus.log 2>&1");
    let address = format!("unix:path={}", machine.dir.path().join("second").display());
    let _manager = Manager::start(&address, TOKEN, &machine.server.url());
    let (_, command) = DROP_IN.rsplit_once("ExecStart=").expect("a command");
    let command = command.lines().next().expect("a command");
    machine.sh(&format!(
        "export DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/test/second
        exec setpriv --reuid=mender-connect --regid=mender-connect --init-groups {command} >/run/agent.log 2>&1 &"
    ));
    let device = machine.device();
    let bearer = format!("Bearer {TOKEN}");
    assert_eq!(device.request().header("Authorization"), Some(bearer.as_str()));
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.input("id -un; echo ready''\n");
    let output = terminal.read_until("ready\r", SOON);
    assert!(output.contains("mender-connect\r"), "{output}");
}

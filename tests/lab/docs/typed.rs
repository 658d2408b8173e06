//! Runs the commands of the pages on a machine of their own, with the agent installed from its package, in the order
//! in which they are written. Those that can't be run there are run elsewhere, and [`ELSEWHERE`] says where.
//!
//! systemd doesn't run there. Scripts stand for its tools and do to the agent what its unit says.

use std::fs;
use std::process::Command;

use super::facts::tests;
use super::{PAGES, commands_of, read, root};
use crate::harness::daemon::executable;
use crate::harness::program;
use crate::machine::Machine;
use crate::packaging;

/// Who runs a command that isn't run here.
#[derive(Debug, Clone, Copy)]
enum By {
    /// This script, with these words; every change has to pass it.
    Script(&'static str, &'static str),
    /// This test of behaviour.
    Test(&'static str),
    /// This one of the lab.
    Lab(&'static str),
    /// Nobody, since it takes too long: the release script for these targets, which do exist.
    Targets,
}

const ELSEWHERE: [(&str, By); 18] = [
    // As far as it goes without a container engine.
    (
        "CROSS_CONFIG=cross.toml cross build --release --locked --target armv7-unknown-linux-musleabihf",
        By::Lab("packaging::cross_has_an_image_for_each_target"),
    ),
    ("tests/playground/run", By::Test("playground::a_session_at_the_terminal")),
    ("tests/playground/run --slow", By::Test("playground::keys_stay_quick_beside_a_download_on_a_slow_link")),
    ("tests/run", By::Script(".ci/run", "\ntests/run\n")),
    // Parts of it.
    ("tests/run config::", By::Script(".ci/run", "\ntests/run\n")),
    ("tests/run check::", By::Script(".ci/run", "\ntests/run\n")),
    ("tests/lab/run docs::", By::Script(".ci/run", "\ntests/lab/run\n")),
    ("tests/run terminal::", By::Script(".ci/run", "\ntests/run\n")),
    ("tests/playground/record docs/terminal.svg", By::Script(".ci/run", "\ntests/playground/record ")),
    (".ci/size", By::Script(".ci/run", "\n    .ci/size\n")),
    ("cargo build --release --locked", By::Script(".ci/run", "\n    cargo build --release --locked\n")),
    (".ci/release", By::Script(".ci/boards", "\n.ci/release\n")),
    (
        ".ci/release arm-unknown-linux-musleabihf riscv64gc-unknown-linux-musl i686-unknown-linux-musl",
        By::Targets,
    ),
    (
        ".ci/release armv7-unknown-linux-musleabihf -- --no-default-features --features dbus,vendored-dbus",
        By::Script(
            ".ci/boards",
            "\n.ci/release $arm -- --no-default-features --features dbus,vendored-dbus\n",
        ),
    ),
    // One of those that it builds without an argument.
    (".ci/release x86_64-unknown-linux-musl", By::Script(".ci/boards", "\n.ci/release\n")),
    (
        "cargo deb --no-build --no-strip --variant static --target x86_64-unknown-linux-musl",
        By::Lab("packaging::the_static_package_has_all_licences"),
    ),
    ("yocto/update-crates", By::Lab("yocto::generated_files_are_current")),
    (
        "make BR2_EXTERNAL=/path/to/the/checkout/yocto/files/buildroot menuconfig",
        By::Lab("buildroot::options_are_declared_and_used"),
    ),
];

/// Commands that go on until they are stopped: run until this is in their log.
const ENDLESS: [(&str, &str); 1] = [("mender-connect --debug daemon", "Connection established")];

/// Starts and stops the agent by the lines of its unit, and waits until it is connected. Whether units are enabled the
/// real one knows without systemd.
const SYSTEMCTL: &str = r#"#!/bin/sh
verb= units=
for word; do
    case $word in
        -*) ;;
        *) if [ "$verb" ]; then units="$units $word"; else verb=$word; fi ;;
    esac
done
unit=/etc/systemd/system/mender-connect.service
[ -f $unit ] || unit=/lib/systemd/system/mender-connect.service
value() { sed -n "s/^$1=//p" $unit | tail -n 1; }
pid() { cat /run/main.pid 2>/dev/null; }
running() { [ "$(pid)" ] && kill -0 $(pid) 2>/dev/null; }
connections() { grep -c 'Connection established' /run/journal; }
start() {
    touch /run/journal
    before=$(connections)
    setsid $(value ExecStart) >>/run/journal 2>&1 </dev/null &
    echo $! >/run/main.pid
    while running && [ $(connections) = $before ]; do sleep 0.05; done
}
stop() {
    running || return 0
    kill $(pid)
    tail --pid=$(pid) -f /dev/null
}
case $* in
    "enable --now mender-connect") systemctl enable mender-connect && verb=start ;;
    *able*) SYSTEMD_OFFLINE=1 exec systemctl.real "$@" ;;
esac
case "$verb $units" in
    daemon-reload*) ;;
    "stop "*.timer) rm /run/timer-${units# } ;;
    start*mender-connect*) running || start ;;
    stop*mender-connect*) stop ;;
    restart*mender-connect*) stop; start ;;
    reload*mender-connect*) MAINPID=$(pid); command=$(value ExecReload); eval "${command:-kill -HUP \$MAINPID}" ;;
    is-active*mender-connect* | status*mender-connect*) running && echo active ;;
    cat*mender-connect*) cat $unit ;;
    status*mender-authd | status*dbus) echo active ;;
    # The tests' bus has a policy of its own.
    reload*dbus) ;;
    *) echo "the tests' systemctl doesn't know $*" >&2; exit 1 ;;
esac
"#;

/// Runs the command; with a timer it only notes it.
const SYSTEMD_RUN: &str = r#"#!/bin/sh
name= timer=
while :; do
    case $1 in
        --unit=*) name=${1#*=} ;;
        --on-active=*) timer=yes ;;
        -*) echo "the tests' systemd-run doesn't know $1" >&2; exit 1 ;;
        *) break ;;
    esac
    shift
done
[ -z "$timer" ] || exec touch /run/timer-$name.timer
exec "$@"
"#;

/// The agent's log. What the real one doesn't understand is an error.
const JOURNALCTL: &str = r#"#!/bin/sh
mkdir -p /run/no-journal
said=$(journalctl.real --directory=/run/no-journal "$@" 2>&1)
case $said in *option* | *nvalid* | *ot\ found*) echo "$said" >&2; exit 1 ;; esac
pattern=. last=
for word; do
    [ "$last" != -g ] || pattern=$word
    last=$word
done
grep -e "$pattern" /run/journal || :
"#;

/// A machine for the commands of a page: the project's checkout is the working folder, as far as commands need it.
fn machine(page: &str) -> Option<Machine> {
    let machine = packaging::machine()?;
    for (name, script) in [("systemctl", SYSTEMCTL), ("systemd-run", SYSTEMD_RUN), ("journalctl", JOURNALCTL)]
    {
        machine.write("/run/script", script);
        machine.sh(&format!(
            "[ -e /usr/bin/{name}.real ] || mv /usr/bin/{name} /usr/bin/{name}.real
            rm -f /usr/bin/{name}
            install -m 755 /run/script /usr/bin/{name}"
        ));
    }
    // The operator's yes.
    machine.write("/etc/apt/apt.conf.d/yes", "APT::Get::Assume-Yes \"true\";\n");
    let checkout = machine.dir.path().join("checkout");
    for folder in ["target/release", "target/debian"] {
        fs::create_dir_all(checkout.join(folder)).unwrap();
    }
    let copied = Command::new("cp").arg("-r").arg(root().join("yocto")).arg(&checkout).status().unwrap();
    assert!(copied.success());
    program::copy(&executable(), &checkout.join("target/release/mender-connect"));
    let package = |architecture: &str| format!("mender-connect-rs_1.0.0-1_{architecture}.deb");
    // The guide's example is for a board.
    let here = package(if page == "docs/guide.md" { "armhf" } else { "amd64" });
    for copy in [format!("target/debian/{}", package("amd64")), here] {
        fs::copy(machine.dir.path().join("new.deb"), checkout.join(copy)).unwrap();
    }
    machine.sh(
        "cp $(find /usr/share/ca-certificates -name '*.crt' | head -n 1) /run/test/checkout/authority.crt",
    );
    if page == "docs/migration.md" {
        packaging::install_upstream(&machine, packaging::UNIT_FILE);
        machine.sh("cp /run/mender-connect.deb /run/test/checkout/mender-connect_2.3.1_amd64.deb");
    } else {
        machine.sh("dpkg -i /run/test/new.deb");
        machine.device();
    }
    Some(machine)
}

/// A piece of a script that runs the command, and ends the script when it fails.
fn checked(command: &str) -> String {
    let run = match ENDLESS.iter().find(|(endless, _)| *endless == command) {
        None => command.to_owned(),
        Some((_, text)) => format!(
            "{command} >/run/endless 2>&1 & pid=$!
            until grep -q '{text}' /run/endless; do kill -0 $pid || break; sleep 0.05; done
            kill $pid; wait $pid"
        ),
    };
    format!("{run}\nstatus=$?; [ $status = 0 ] || {{ echo \"exit status $status\"; exit 1; }}\n")
}

fn run(page: &str) {
    let here = |command: &String| !ELSEWHERE.iter().any(|(other, _)| other == command);
    let blocks =
        commands_of(page).into_iter().map(|block| block.into_iter().filter(&here).collect::<Vec<_>>());
    let blocks: Vec<_> = blocks.filter(|block| !block.is_empty()).collect();
    assert!(!blocks.is_empty());
    let Some(machine) = machine(page) else { return };
    for block in blocks {
        let script: String = block.iter().map(|command| checked(command)).collect();
        let (status, text) = machine.try_sh(&format!("cd /run/test/checkout\n{script}"));
        assert_eq!(status, Some(0), "{page}: {block:#?}\n{text}\n{}", machine.try_sh("cat /run/journal").1);
    }
}

#[test]
fn of_the_readme() {
    run("README.md");
}

#[test]
fn of_the_guide() {
    run("docs/guide.md");
}

#[test]
fn of_operations() {
    run("docs/operations.md");
}

#[test]
fn of_the_migration() {
    run("docs/migration.md");
}

#[test]
fn of_troubleshooting() {
    run("docs/troubleshooting.md");
}

#[test]
fn of_the_manual() {
    run("docs/man/mender-connect.8");
    run("docs/man/mender-connect.conf.5");
}

/// Whoever is said to run a command does, and each command that is said to be run elsewhere is in a page.
#[test]
fn those_run_elsewhere_are() {
    let commands: Vec<String> = PAGES.iter().flat_map(|page| commands_of(page)).flatten().collect();
    assert!(commands.len() > 60, "{}", commands.len());
    let me = std::env::current_exe().expect("this program's path");
    let (tests, lab) = (tests(), Command::new(me).arg("--list").output().expect("list the tests").stdout);
    let lab = String::from_utf8(lab).expect("UTF-8");
    for (command, by) in ELSEWHERE {
        assert!(commands.iter().any(|c| c == command), "no page has {command}");
        match by {
            By::Script(script, words) => {
                assert!(read(script).contains(words), "{script} doesn't run {command}")
            }
            By::Test(test) => assert!(tests.contains(&format!("{test}: test\n")), "{test}: {command}"),
            By::Lab(test) => assert!(lab.contains(&format!("{test}: test\n")), "{test}: {command}"),
            By::Targets => {
                let known =
                    Command::new("rustc").args(["--print", "target-list"]).output().expect("run rustc");
                let known = String::from_utf8(known.stdout).expect("UTF-8");
                for target in command.split(' ').skip(1) {
                    assert!(known.lines().any(|line| line == target), "{target}");
                }
            }
        }
    }
    // The layer's page has no others.
    for command in commands_of("yocto/README.md").iter().flatten() {
        assert!(ELSEWHERE.iter().any(|(other, _)| other == command), "{command}");
    }
}

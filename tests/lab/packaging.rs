//! The systemd unit and the Debian package, built by cargo-deb and installed by dpkg on a machine of its own.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;
use std::time::Duration;

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::executable;
use crate::harness::rig::bash_config;
use crate::harness::wait::{SOON, eventually, skip};
use crate::machine::{Machine, have_tools, tools};

pub const UNIT: &str = include_str!("../../yocto/files/mender-connect.service");
const CONFINED: &str = include_str!("../../yocto/files/mender-connect-confined.conf");
const USER: &str = include_str!("../../yocto/files/mender-connect-user.conf");
const OPERATIONS: &str = include_str!("../../docs/operations.md");
const CONFIG: &str = include_str!("../../yocto/files/debian/mender-connect.conf");
const COPYRIGHT: &str = include_str!("../../yocto/files/debian/copyright");
const BINARY: &str = "/usr/bin/mender-connect";
const CONFFILE: &str = "/etc/mender/mender-connect.conf";
const SCRIPT: &str = "/etc/init.d/mender-connect";
pub const UNIT_FILE: &str = "/lib/systemd/system/mender-connect.service";
const ENABLED: &str = "/etc/systemd/system/multi-user.target.wants/mender-connect.service";

/// Asks systemd about the unit with these drop-ins.
fn analyze(drop_ins: &[&str], arguments: &[&str]) -> Option<Output> {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("mender-connect.service");
    fs::write(&copy, UNIT.replace(BINARY, &executable().display().to_string())).unwrap();
    let folder = copy.with_extension("service.d");
    fs::create_dir(&folder).unwrap();
    for text in drop_ins {
        let name = if *text == CONFINED { "confined.conf" } else { "user.conf" };
        fs::write(folder.join(name), text.replace(BINARY, &executable().display().to_string())).unwrap();
    }
    let output = Command::new("systemd-analyze").args(arguments).arg(&copy).output();
    if output.is_err() {
        skip("systemd-analyze is missing");
    }
    output.ok()
}

#[test]
fn systemd_understands_the_unit() {
    for drop_ins in [&[][..], &[CONFINED], &[USER], &[CONFINED, USER]] {
        // Other units' faults are none of ours.
        let Some(output) = analyze(drop_ins, &["verify", "--man=no", "--recursive-errors=no"]) else {
            return;
        };
        let printed = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !printed.contains("mender-connect"), "{printed}");
    }
    // A minimal Debian has no procps: what the unit runs is the agent or the shell.
    let runs: Vec<_> = UNIT.lines().filter(|line| line.starts_with("Exec")).collect();
    assert_eq!(runs.len(), 2, "{runs:?}");
    for line in runs {
        let (_, program) = line.split_once('=').unwrap();
        assert!(program.starts_with("/usr/bin/mender-connect ") || program.starts_with("/bin/sh "), "{line}");
    }
}

/// By systemd, where procps and with it /bin/kill are missing.
#[test]
fn a_reload_takes_no_kill_command() {
    let Some(machine) = Machine::with_systemd() else { return };
    machine.install(&executable(), BINARY);
    machine.write(CONFFILE, bash_config().to_string());
    machine.write("/run/systemd/system/mender-connect.service", UNIT);
    machine.sh("rm -f /bin/kill; systemctl daemon-reload; systemctl start mender-connect");
    machine.device();
    let before = agent(&machine);
    machine.write(CONFFILE, "{ \"User\": ");
    machine.sh("systemctl reload mender-connect");
    eventually(SOON, "systemd to be told that the configuration is broken", || {
        let status = machine.sh("systemctl show --property StatusText mender-connect");
        status.contains("not reloaded").then_some(())
    });
    assert_eq!(agent(&machine), before);
}

/// The page states them as systemd 252 gives them.
#[test]
fn exposure_is_as_stated() {
    let scores = [(&[][..], "9.6"), (&[CONFINED], "3.3"), (&[USER], "6.5"), (&[CONFINED, USER], "2.2")];
    for (drop_ins, score) in scores {
        let Some(output) = analyze(drop_ins, &["security", "--offline=true", "--no-pager"]) else { return };
        let printed = String::from_utf8_lossy(&output.stdout);
        let line = printed.lines().find(|line| line.contains("Overall exposure level")).unwrap_or(&printed);
        assert!(line.contains(&format!(": {score} ")), "{line}");
        let stated =
            OPERATIONS.lines().any(|line| line.contains(score)) && OPERATIONS.contains("with systemd 252");
        assert!(stated, "{score}");
    }
}

#[test]
fn the_unit_is_at_least_upstreams() {
    // But for its type: this agent says when it is ready.
    assert!(UNIT.lines().any(|line| line == "Type=notify"));
    let upstream = "Description=Mender Connect service
        Wants=network-online.target mender-client.service mender-authd.service
        After=systemd-resolved.service network-online.target mender-client.service mender-authd.service
        User=root
        Group=root
        ExecStart=/usr/bin/mender-connect daemon
        Restart=always
        WantedBy=multi-user.target";
    for line in upstream.lines().map(str::trim) {
        assert!(UNIT.lines().any(|l| l == line), "{line}");
    }
}

#[test]
fn the_copyright_file_names_every_crate_that_is_not_under_apache() {
    let mut command = Command::new(env!("CARGO"));
    command.args(["tree", "--locked", "--edges=normal,no-proc-macro", "--prefix=none", "--format={p}|{l}"]);
    let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).unwrap();
    let named: BTreeSet<&str> = COPYRIGHT
        .lines()
        .filter_map(|line| line.strip_prefix("Files: "))
        .flat_map(|names| names.split(' '))
        .filter(|name| !["*", "libdbus", "musl", "zig"].contains(name))
        .collect();
    let other: BTreeSet<&str> = tree
        .lines()
        .filter_map(|line| line.split_once('|'))
        .filter(|(_, licence)| !licence.contains("Apache-2.0") || licence.starts_with("Apache-2.0 AND"))
        .filter_map(|(krate, _)| krate.split(' ').next())
        .collect();
    assert_eq!(named, other);
}

/// Our package, built once, of the executable under test.
fn package() -> &'static Path {
    static PACKAGE: OnceLock<PathBuf> = OnceLock::new();
    PACKAGE.get_or_init(|| {
        // A target folder of its own, where this executable is what a release build would have made.
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("deb");
        fs::create_dir_all(target.join("release")).unwrap();
        let program = target.join("release/mender-connect");
        // As cargo strips a release build.
        let strip = Command::new("strip").arg("-o").arg(&program).arg(executable()).status();
        assert!(strip.is_ok_and(|status| status.success()), "strip of binutils is needed");
        cargo_deb(&target, &[])
    })
}

fn cargo_deb(target: &Path, options: &[&str]) -> PathBuf {
    let package = target.join("package.deb");
    let mut command = Command::new(tools().join("bin/cargo-deb"));
    command.args(["--no-build", "--fast", "--quiet", "--output"]).arg(&package).args(options);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env("CARGO_TARGET_DIR", target);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    package
}

fn dpkg_deb(option: &str, package: &Path) -> String {
    let output = Command::new("dpkg-deb").arg(option).arg(package).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn lintian_finds_no_error() {
    if have_tools(&["bin/cargo-deb"]) {
        lintian(package());
    }
}

fn lintian(package: &Path) {
    let mut command = Command::new("lintian");
    command.args(["--allow-root", "--fail-on=error"]).arg(package);
    let Ok(output) = command.output() else { return skip("lintian is missing") };
    let printed = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{printed}{}", String::from_utf8_lossy(&output.stderr));
}

/// The package of a static executable has its licences, which .ci/release writes, and depends on no library.
#[test]
fn the_static_package_has_all_licences() {
    if !have_tools(&["bin/cargo-deb"]) {
        return;
    }
    let target = tempfile::tempdir().unwrap();
    fs::create_dir(target.path().join("release")).unwrap();
    // Tests have no executable of .ci/release.
    let source = target.path().join("main.c");
    fs::write(&source, "int main(void) { return 0; }\n").unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-static", "-s", "-o"]).arg(target.path().join("release/mender-connect")).arg(&source);
    assert!(cc.status().is_ok_and(|status| status.success()), "cc and a static libc are needed");
    fs::write(target.path().join("release/THIRD-PARTY-LICENSES"), "theirs").unwrap();
    let package = cargo_deb(target.path(), &["--variant=static"]);
    lintian(&package);
    let fields = dpkg_deb("--field", &package);
    assert!(fields.starts_with("Package: mender-connect-rs\n"), "{fields}");
    let manifest = include_str!("../../Cargo.toml");
    let depends = fields.lines().find(|line| line.starts_with("Depends: ")).unwrap();
    let wanted = depends.replace("Depends: ", "depends = \"$auto, ");
    assert!(manifest.contains(&wanted), "{wanted}");
    let contents = dpkg_deb("--contents", &package);
    for file in ["THIRD-PARTY-LICENSES", "copyright", "changelog.Debian.gz"] {
        let path = format!("/usr/share/doc/mender-connect-rs/{file}\n");
        assert!(contents.contains(&path), "{path}: {contents}");
    }
}

/// They are of the version that the guide names.
#[test]
fn cross_has_an_image_for_each_target() {
    let guide = include_str!("../../docs/guide.md");
    let (_, version) = guide.split_once("(https://github.com/cross-rs/cross) ").unwrap();
    let (version, rest) = version.split_once(',').unwrap();
    let (_, built) = rest.split_once(" cross build --release --locked --target ").unwrap();
    let known = Command::new("rustc").args(["--print", "target-list"]).output().unwrap();
    let known = String::from_utf8(known.stdout).unwrap();
    let sections: Vec<_> = include_str!("../../cross.toml").split("\n[target.").skip(1).collect();
    for section in &sections {
        let (target, settings) = section.split_once("]\n").unwrap();
        assert!(known.lines().any(|line| line == target), "{target}");
        assert_eq!(settings.trim(), format!("image = \"ghcr.io/cross-rs/{target}:{version}\""));
    }
    let built = built.lines().next().unwrap();
    assert!(sections.iter().any(|section| section.starts_with(&format!("{built}]"))), "{built}");
}

/// A machine with our package at /run/test/new.deb, and a systemd that takes orders and does nothing.
pub fn machine() -> Option<Machine> {
    if !have_tools(&["bin/cargo-deb"]) {
        return None;
    }
    let package = package();
    let machine = Machine::start()?;
    fs::copy(package, machine.dir.path().join("new.deb")).unwrap();
    machine.write(
        "/usr/bin/orders",
        "#!/bin/sh
        case \"$*\" in
            *--value*) exit 1 ;;
            *show*) grep \"^${3#--property=}=\" /run/shown ;;
            *able*) SYSTEMD_OFFLINE=1 exec systemctl.real \"$@\" ;;
            *) echo \"$@\" >>/run/orders ;;
        esac",
    );
    machine.sh("rm -f /usr/sbin/policy-rc.d
        mkdir -p /run/systemd/system
        mv /usr/bin/systemctl /usr/bin/systemctl.real
        mv /usr/bin/orders /usr/bin/systemctl && chmod 755 /usr/bin/systemctl");
    build(&machine, "mender-auth", "4.0.0", "");
    machine.sh("dpkg -i /run/mender-auth.deb");
    Some(machine)
}

/// Builds a package in the machine from what lies in /run/<name>, as /run/<name>.deb.
fn build(machine: &Machine, name: &str, version: &str, fields: &str) {
    let control = format!(
        "Package: {name}\nVersion: {version}\nArchitecture: amd64\nMaintainer: nobody <nobody@localhost>\n\
         Description: stands for the real one\n{fields}"
    );
    machine.write(&format!("/run/{name}/DEBIAN/control"), control);
    machine.sh(&format!("cd /run && chmod -R u=rwX,go=rX {name} && dpkg-deb -b {name} {name}.deb"));
}

/// Installs a package that is like Mender's own, with scripts such as debhelper writes.
pub fn install_upstream(machine: &Machine, unit_file: &str) {
    let put = |path: &str, text: &str| machine.write(&format!("/run/mender-connect{path}"), text);
    put(BINARY, "#!/bin/sh\necho upstream\n");
    put(CONFFILE, CONFIG);
    put(unit_file, UNIT);
    put("/usr/share/doc/mender-connect/copyright", "somebody's");
    put("/DEBIAN/conffiles", "/etc/mender/mender-connect.conf\n");
    put(
        "/DEBIAN/postinst",
        "#!/bin/sh
        set -e
        deb-systemd-helper unmask mender-connect.service
        if deb-systemd-helper --quiet was-enabled mender-connect.service; then
            deb-systemd-helper enable mender-connect.service
        else
            deb-systemd-helper update-state mender-connect.service
        fi
        deb-systemd-invoke start mender-connect.service",
    );
    put("/DEBIAN/prerm", "#!/bin/sh\n[ \"$1\" != remove ] || deb-systemd-invoke stop mender-connect.service");
    put(
        "/DEBIAN/postrm",
        "#!/bin/sh
        set -e
        if [ \"$1\" = remove ]; then
            deb-systemd-helper mask mender-connect.service
        elif [ \"$1\" = purge ]; then
            deb-systemd-helper purge mender-connect.service
            deb-systemd-helper unmask mender-connect.service
        fi",
    );
    machine.sh("cd /run/mender-connect && chmod 755 usr/bin/* DEBIAN/p*");
    build(machine, "mender-connect", "2.3.1", "Depends: dbus\n");
    machine.sh("dpkg -i /run/mender-connect.deb");
    assert_eq!(machine.sh("mender-connect"), "upstream\n");
    assert!(machine.exists(ENABLED));
}

/// What systemd was told since it was asked last.
fn orders(machine: &Machine) -> Vec<String> {
    let (_, text) = machine.try_sh("cat /run/orders; rm -f /run/orders");
    let wanted = ["start", "stop", "restart"];
    let lines = text.lines().filter(|line| line.split(' ').any(|word| wanted.contains(&word)));
    lines.map(str::to_owned).collect()
}

#[track_caller]
fn expect_order(machine: &Machine, verb: &str) {
    let orders = orders(machine);
    assert!(
        orders.len() == 1
            && orders[0].ends_with("mender-connect.service")
            && orders[0].split(' ').any(|word| word == verb),
        "{verb}: {orders:?}"
    );
}

/// All files that differ from those outside, but for the package managers' own.
fn changes(machine: &Machine) -> BTreeSet<String> {
    let found = machine.sh("cd /run/changes && find . ! -type d");
    let own = ["./var/lib/dpkg/", "./var/lib/apt/", "./var/cache/", "./var/log/"];
    found.lines().filter(|path| !own.iter().any(|o| path.starts_with(o))).map(str::to_owned).collect()
}

/// Purges our package, after which nothing of it is left.
fn purge(machine: &Machine, before: &BTreeSet<String>) {
    machine.sh("dpkg -P mender-connect-rs");
    let after = changes(machine);
    let left: Vec<_> = after.symmetric_difference(before).collect();
    assert!(left.is_empty(), "{left:?}");
    assert!(!machine.exists("/etc/mender"));
}

/// The installed agent connects.
fn runs(machine: &Machine) {
    machine.sh("mender-connect daemon >/dev/null 2>&1 &");
    machine.device();
    machine.sh("kill $(pidof mender-connect)");
    eventually(SOON, "the agent to end", || machine.pids_of("mender-connect").is_empty().then_some(()));
}

/// Whether the package is installed, and everything of it is in its place.
#[track_caller]
fn installed(machine: &Machine) {
    let status = machine.sh("dpkg-query -W -f '${Status}' mender-connect-rs");
    assert_eq!(status, "install ok installed");
    for file in [BINARY, CONFFILE, SCRIPT, UNIT_FILE] {
        machine.sh(&format!("test -f {file}"));
    }
    assert_eq!(machine.sh("dpkg --verify mender-connect-rs | grep -v ' c '; :"), "");
}

#[test]
fn the_package_installs_upgrades_and_goes() {
    let Some(machine) = machine() else { return };
    let before = changes(&machine);
    machine.sh("dpkg -i /run/test/new.deb");
    installed(&machine);
    expect_order(&machine, "start");
    let listed = machine.sh("dpkg -L mender-connect-rs | while read -r f; do [ -d $f ] || echo $f; done");
    let mut listed: Vec<&str> = listed.lines().collect();
    listed.sort_unstable();
    let copyright = "/usr/share/doc/mender-connect-rs/copyright";
    let changelog = "/usr/share/doc/mender-connect-rs/changelog.Debian.gz";
    let manual =
        ["5/mender-connect.conf.5", "8/mender-connect.8"].map(|page| format!("/usr/share/man/man{page}.gz"));
    let example = "/usr/share/doc/mender-connect-rs/examples/mender-connect.conf.example";
    assert_eq!(
        listed,
        [SCRIPT, CONFFILE, UNIT_FILE, BINARY, changelog, copyright, example, &manual[0], &manual[1]]
    );
    let newest = machine.sh(&format!("zcat {changelog} | head -n 1"));
    assert!(
        newest.starts_with(concat!("mender-connect-rs (", env!("CARGO_PKG_VERSION"), "-1) ")),
        "{newest}"
    );
    machine.sh(&format!("gzip -t {}", manual.join(" ")));
    assert_eq!(machine.read(CONFFILE), CONFIG);
    assert_eq!(machine.read(copyright), COPYRIGHT);
    let mode = |path: &str| fs::metadata(machine.path(path)).unwrap().permissions().mode() & 0o7777;
    assert_eq!((mode(CONFFILE), mode(BINARY)), (0o600, 0o755));
    assert!(machine.exists(ENABLED));
    runs(&machine);

    // Again, as an upgrade does, with a changed configuration, and the service turned off.
    machine.write(CONFFILE, r#"{"User":"root","ShellCommand":"/bin/bash"}"#);
    machine.sh("SYSTEMD_OFFLINE=1 systemctl.real disable mender-connect.service; dpkg -i /run/test/new.deb");
    installed(&machine);
    expect_order(&machine, "restart");
    assert!(machine.read(CONFFILE).contains("root"));
    assert!(!machine.exists(ENABLED), "what an administrator turned off stays off");
    machine.sh("SYSTEMD_OFFLINE=1 systemctl.real enable mender-connect.service; dpkg -i /run/test/new.deb");
    expect_order(&machine, "restart");
    assert!(machine.exists(ENABLED));

    machine.sh("dpkg -r mender-connect-rs");
    expect_order(&machine, "stop");
    assert!(!machine.exists(BINARY) && machine.exists(CONFFILE));
    machine.sh("dpkg -i /run/test/new.deb");
    installed(&machine);
    assert!(machine.exists(ENABLED), "it comes back as it was");
    expect_order(&machine, "restart");
    machine.sh("dpkg -r mender-connect-rs");
    purge(&machine, &before);
}

/// The script would start a second agent beside the service's.
#[test]
fn with_systemd_the_script_leaves_it_to_systemd() {
    let Some(machine) = machine() else { return };
    machine.sh("dpkg -i /run/test/new.deb");
    orders(&machine);
    // The shell has more to do: it must not become the script, whose parent would be process 1 then.
    machine.sh("/etc/init.d/mender-connect restart; :");
    expect_order(&machine, "restart");
    assert!(machine.pids_of("mender-connect").is_empty());
}

/// A machine that sysvinit started: without systemd.
fn without_systemd() -> Option<Machine> {
    let machine = machine()?;
    machine.sh("rmdir /run/systemd/system; rm -f /usr/bin/systemctl /sbin/runlevel /sbin/init");
    // invoke-rc.d starts nothing without them.
    machine.sh("touch /sbin/init; printf '#!/bin/sh\necho N 2\n' >/sbin/runlevel; chmod 755 /sbin/runlevel");
    Some(machine)
}

fn agent(machine: &Machine) -> u32 {
    eventually(SOON, "one agent", || match machine.pids_of("mender-connect")[..] {
        [pid] => Some(pid),
        _ => None,
    })
}

#[test]
fn without_systemd_the_script_is_run() {
    let Some(machine) = without_systemd() else { return };
    let before = changes(&machine);
    machine.sh("dpkg -i /run/test/new.deb");
    installed(&machine);
    machine.device();
    let first = agent(&machine);
    assert!(!machine.sh("ls /etc/rc2.d").lines().all(|name| !name.ends_with("mender-connect")));

    machine.sh("dpkg -i /run/test/new.deb");
    machine.device();
    assert_ne!(agent(&machine), first, "an upgrade starts the new one");

    machine.sh("dpkg -r mender-connect-rs");
    eventually(SOON, "the agent to end", || machine.pids_of("mender-connect").is_empty().then_some(()));
    assert!(machine.exists(SCRIPT), "it is configuration");
    purge(&machine, &before);
}

#[test]
fn without_systemd_an_upgrade_in_its_own_terminal_is_finished() {
    let Some(machine) = without_systemd() else { return };
    machine.write(CONFFILE, bash_config().to_string());
    machine.sh("dpkg --force-confold -i /run/test/new.deb");
    let device = machine.device();
    let first = agent(&machine);
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.input("dpkg -i /run/test/new.deb && echo 'finis''hed'\n");
    let text = terminal.read_until("finished\r\n", Duration::from_secs(60));
    assert!(text.contains("once you restart it"), "{text}");
    installed(&machine);
    assert_eq!(agent(&machine), first);
    machine.sh("/etc/init.d/mender-connect restart");
    machine.device();
    assert_ne!(agent(&machine), first);
}

#[test]
fn an_upgrade_in_its_own_terminal_is_finished() {
    let Some(machine) = machine() else { return };
    machine.sh("dpkg -i /run/test/new.deb");
    expect_order(&machine, "start");
    // What systemd does with a service, and so with its terminals.
    let (status, text) = machine.try_sh(
        "mount -t cgroup2 cgroup2 /mnt && mkdir -p /mnt/packaging-test/mender-connect.service &&
        echo $$ >/mnt/packaging-test/mender-connect.service/cgroup.procs",
    );
    if status != Some(0) {
        return skip(&format!("no cgroup can be made here: {text}"));
    }
    let upgrade = "echo $$ >/mnt/packaging-test/mender-connect.service/cgroup.procs
        dpkg -i /run/test/new.deb
        echo $$ >/mnt/cgroup.procs";
    for keeps_none in ["", "NFileDescriptorStore=0\n"] {
        machine.write("/run/shown", keeps_none);
        let text = machine.sh(upgrade);
        assert!(text.contains("once you restart it"), "{text}");
        assert!(orders(&machine).is_empty());
    }
    // su(1) starts programs in the cgroup of another session. The shell is the agent here.
    let text = machine.sh("echo MainPID=$$ >/run/shown; dpkg -i /run/test/new.deb; :");
    assert!(text.contains("once you restart it"), "{text}");
    assert!(orders(&machine).is_empty());
    machine.write("/run/shown", "NFileDescriptorStore=2\n");
    let text = machine.sh(upgrade);
    assert!(!text.contains("once you restart it"), "{text}");
    expect_order(&machine, "restart");
    machine.sh("rmdir /mnt/packaging-test/mender-connect.service /mnt/packaging-test");
}

/// From Mender's package to ours and on, with the administrator's configuration.
fn takes_the_place(unit_file: &str, install: &str) {
    let Some(machine) = machine() else { return };
    let before = changes(&machine);
    install_upstream(&machine, unit_file);
    let modified = r#"{"User":"root","ShellCommand":"/bin/bash","Terminal":{"Width":100}}"#;
    machine.write(CONFFILE, modified);
    orders(&machine);
    machine.sh(&format!("{install} /run/test/new.deb"));
    installed(&machine);
    let orders = orders(&machine);
    assert!(orders.iter().any(|order| order.contains("stop")), "{orders:?}");
    assert!(orders.last().is_some_and(|order| order.contains("start")), "{orders:?}");
    assert_eq!(machine.read(CONFFILE), modified, "the administrator's configuration is kept");
    assert!(machine.exists(ENABLED));
    runs(&machine);

    // What is left of Mender's package goes without harm.
    machine.sh("dpkg -P mender-connect");
    installed(&machine);
    assert_eq!(machine.read(CONFFILE), modified);
    assert!(machine.exists(ENABLED), "it is still enabled");

    purge(&machine, &before);
}

#[test]
fn the_package_takes_the_place_of_upstreams() {
    takes_the_place(UNIT_FILE, "dpkg -i");
}

/// Newer Debian's packages have it there, and /lib is a link.
#[test]
fn the_package_takes_the_place_of_one_with_its_unit_below_usr() {
    takes_the_place(
        "/usr/lib/systemd/system/mender-connect.service",
        "apt-get -y -o Dpkg::Options::=--force-confold install",
    );
}

/// It conflicts with every version of mender-connect but that of its release.
#[test]
fn the_package_lives_beside_menders_inventory_script() {
    let Some(machine) = machine() else { return };
    build(
        &machine,
        "mender-client-version-inventory-script",
        "6.0.1",
        "Conflicts: mender-connect (<< 3.0.1), mender-connect (>= 3.0.2)\n",
    );
    machine.sh("dpkg -i /run/mender-client-version-inventory-script.deb && dpkg -i /run/test/new.deb");
    installed(&machine);
}

/// Somebody went back to Mender's package: what is left of ours goes without harm.
#[test]
fn a_purge_leaves_upstreams_service_on() {
    let Some(machine) = machine() else { return };
    install_upstream(&machine, UNIT_FILE);
    machine.sh("dpkg -i /run/test/new.deb && dpkg -r mender-connect-rs && dpkg -i /run/mender-connect.deb");
    assert!(machine.exists(ENABLED));
    machine.sh("dpkg -P mender-connect-rs");
    assert_eq!(machine.sh("mender-connect"), "upstream\n");
    assert_eq!(machine.read(CONFFILE), CONFIG);
    assert!(machine.exists(ENABLED), "it is still enabled");
}

/// Somebody went back to Mender's package, and came again: its removal masks the unit.
#[test]
fn the_package_runs_when_it_comes_back_after_upstreams() {
    let Some(machine) = machine() else { return };
    install_upstream(&machine, UNIT_FILE);
    machine.sh("dpkg -i /run/test/new.deb && dpkg -r mender-connect-rs && dpkg -i /run/mender-connect.deb");
    machine.sh("dpkg -i /run/test/new.deb");
    installed(&machine);
    let state = || machine.try_sh("SYSTEMD_OFFLINE=1 systemctl.real is-enabled mender-connect.service").1;
    assert_eq!(state().trim(), "enabled");
    machine.sh("dpkg -P mender-connect");
    assert_eq!(state().trim(), "enabled", "what is left of Mender's package goes without harm");
    // Its purge turns off what it turned on.
    machine.sh("dpkg -r mender-connect-rs && dpkg -i /run/mender-connect.deb && dpkg -P mender-connect");
    machine.sh("dpkg -i /run/test/new.deb");
    assert_eq!(state().trim(), "enabled");

    // Off stays off on that way, too.
    machine.sh("dpkg -r mender-connect-rs && dpkg -i /run/mender-connect.deb");
    machine
        .sh("SYSTEMD_OFFLINE=1 systemctl.real disable mender-connect.service && dpkg -i /run/test/new.deb");
    assert_eq!(state().trim(), "disabled");
}

#[test]
fn upstreams_service_that_was_turned_off_stays_off() {
    let Some(machine) = machine() else { return };
    install_upstream(&machine, UNIT_FILE);
    machine.sh("SYSTEMD_OFFLINE=1 systemctl.real disable mender-connect.service");
    orders(&machine);
    machine.sh("dpkg -i /run/test/new.deb");
    installed(&machine);
    assert!(!machine.exists(ENABLED));
    expect_order(&machine, "stop");
}

/// An image that gets systemd after the package, or a system that changes over to it. The unit was off there.
#[test]
fn the_service_is_on_where_systemd_comes_later() {
    let Some(machine) = machine() else { return };
    let before = changes(&machine);
    machine.sh("rm -r /run/systemd; mv /usr/bin/systemctl /run/systemctl");
    machine.sh("dpkg -i /run/test/new.deb");
    machine.sh("mv /run/systemctl /usr/bin/systemctl; mkdir -p /run/systemd/system");
    installed(&machine);
    assert!(machine.exists(ENABLED));
    assert_eq!(machine.sh("SYSTEMD_OFFLINE=1 systemctl.real is-enabled mender-connect.service"), "enabled\n");
    machine.sh("dpkg -r mender-connect-rs");
    purge(&machine, &before);
}

/// systemd made a unit of the script that is left, and took it for running when Mender's package came after a boot.
#[test]
fn what_is_left_does_not_keep_upstreams_agent_from_being_started() {
    let Some(machine) = Machine::with_systemd() else { return };
    if !have_tools(&["bin/cargo-deb"]) {
        return;
    }
    fs::copy(package(), machine.dir.path().join("new.deb")).unwrap();
    build(&machine, "mender-auth", "4.0.0", "");
    machine.sh("dpkg -i /run/mender-auth.deb /run/test/new.deb && dpkg -r mender-connect-rs");
    // As the next boot does.
    machine.try_sh("systemctl daemon-reload; systemctl start mender-connect");
    let (_, state) = machine.try_sh("systemctl is-active mender-connect");
    assert_ne!(state.trim(), "active");
    machine.sh("dpkg -P mender-connect-rs");
    let (_, state) = machine.try_sh("systemctl is-enabled mender-connect");
    assert_ne!(state.trim(), "masked");
}

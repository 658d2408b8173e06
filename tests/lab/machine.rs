//! A whole machine for what is installed and started the usual way: this one's file system under a layer that
//! vanishes, processes of its own, a system bus where everybody looks for it, and a syslog. Nothing outside
//! changes. The network is this machine's. This takes root.

use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, mpsc};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::harness::bus::Bus;
use crate::harness::daemon::{bare, executable};
use crate::harness::device::{Device, Generation};
use crate::harness::manager::Manager;
use crate::harness::rig::{TOKEN, is_root};
use crate::harness::server::Server;
use crate::harness::wait::{SOON, Watched, eventually, secs, skip, spawn};
use crate::harness::{proc, program};

/// Runs in name spaces of its own; $1 is where the tools lie. What the machine's files have in addition to
/// those they cover is at /run/changes, the test's folder at /run/test. The last shell is the machine's first process
/// and takes care of orphans.
const BOOT: &str = r#"
set -e
here=$PWD
mkdir disk
mount -t tmpfs -o mode=755 tmpfs disk
mkdir disk/upper disk/work disk/root
mount -t overlay -o lowerdir=/,upperdir=disk/upper,workdir=disk/work overlay disk/root
cd disk/root
mount -t proc proc proc
mount -t tmpfs -o mode=755 tmpfs run
mkdir -p run/dbus run/test run/tools run/changes
mount --bind "$here" run/test
mount --bind "$here/disk/upper" run/changes
if [ -d "$1" ]; then mount --bind "$1" run/tools; fi
ln -s ../test/bus run/dbus/system_bus_socket
mount -t tmpfs -o mode=755 tmpfs dev
for name in null zero full random urandom tty; do
    touch dev/$name
    mount --bind /dev/$name dev/$name
done
mkdir dev/pts
mount -t devpts -o newinstance,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /run/test/log dev/log
exec chroot . /bin/sh -c 'echo ready; sleep infinity & wait'
"#;

/// Instead of the last line: systemd as the first process, with nothing started but what the test starts.
const SYSTEMD: &str = r#"
mount --rbind /sys sys
umount -l sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
mount -t cgroup2 cgroup2 sys/fs/cgroup
touch "$here/console" dev/console
mount --bind "$here/console" dev/console
mkdir -p run/systemd/system
echo '[Unit]' >run/systemd/system/test.target
echo ready
exec env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin chroot . /lib/systemd/systemd --system \
    --unit=test.target --log-target=console --log-color=no --show-status=no
"#;

const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Fields drop in this order: the processes first.
pub struct Machine {
    boot: Child,
    /// The machine's first process, as seen from here.
    init: u32,
    _manager: Manager,
    pub server: Server,
    _bus: Bus,
    syslog: Arc<Watched<Vec<String>>>,
    pub dir: TempDir,
}

/// The folder into which `tests/lab/packaging-tools` fetches.
pub fn tools() -> PathBuf {
    // target/<profile>/mender-connect -> target/packaging
    executable().ancestors().nth(2).expect("target/<profile>").join("packaging")
}

/// Whether all of these tools are there; says so if not.
pub fn have_tools(names: &[&str]) -> bool {
    let missing: Vec<_> = names.iter().filter(|name| !tools().join(name).exists()).collect();
    if !missing.is_empty() {
        skip(&format!("{missing:?} missing below {}: run tests/lab/packaging-tools", tools().display()));
    }
    missing.is_empty()
}

impl Machine {
    /// `None`, and said so, where no machine can be made.
    pub fn start() -> Option<Machine> {
        Self::boot(BOOT)
    }

    /// One that systemd runs.
    pub fn with_systemd() -> Option<Machine> {
        if !Path::new("/lib/systemd/systemd").exists() {
            skip("systemd is missing");
            return None;
        }
        let (start, _) = BOOT.trim_end().rsplit_once('\n').expect("lines");
        let machine = Self::boot(&format!("{start}{SYSTEMD}"))?;
        let up = || (machine.try_sh("systemctl is-active test.target").0 == Some(0)).then_some(());
        eventually(SOON, "systemd is up", up);
        Some(machine)
    }

    fn boot(script: &str) -> Option<Machine> {
        if !is_root() {
            skip("a machine of its own needs root");
            return None;
        }
        let dir = tempfile::tempdir().expect("a temporary directory");
        let bus = Bus::start(dir.path());
        let syslog = syslog(&dir.path().join("log"));
        let server = Server::start(Generation::New);
        let manager = Manager::start(&bus.address(), TOKEN, &server.url());
        let mut command = Command::new("unshare");
        bare(&mut command);
        command.args(["--mount", "--propagation", "private", "--pid", "--cgroup", "--fork", "--kill-child"]);
        command.args(["/bin/sh", "-c", script, "sh"]).arg(tools());
        command.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut boot = match command.spawn() {
            Ok(boot) => boot,
            Err(e) => {
                skip(&format!("cannot run unshare: {e}"));
                return None;
            }
        };
        let mut line = String::new();
        let out = boot.stdout.take().expect("piped");
        BufReader::new(out).read_line(&mut line).expect("read what the machine says");
        if line != "ready\n" {
            let _ = boot.wait();
            skip("no machine of its own can be made here, see above");
            return None;
        }
        let init = *proc::children(boot.id()).first().expect("the machine's first process");
        Some(Machine { boot, init, _manager: manager, server, _bus: bus, syslog, dir })
    }

    /// Where a file of the machine is found from here. Its folders mustn't be absolute links: those lead
    /// somewhere out here.
    pub fn path(&self, absolute: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{absolute}", self.init))
    }

    pub fn exists(&self, absolute: &str) -> bool {
        self.path(absolute).symlink_metadata().is_ok()
    }

    pub fn read(&self, absolute: &str) -> String {
        let path = self.path(absolute);
        std::fs::read_to_string(path).unwrap_or_else(|e| panic!("read {absolute}: {e}"))
    }

    pub fn write(&self, absolute: &str, text: impl AsRef<[u8]>) {
        let path = self.path(absolute);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("make the folder");
        if text.as_ref().starts_with(b"#!") {
            program::write(&path, text.as_ref());
        } else {
            std::fs::write(path, text).unwrap_or_else(|e| panic!("write {absolute}: {e}"));
        }
    }

    /// Copies a file, with its mode.
    pub fn install(&self, from: &Path, to: &str) {
        let path = self.path(to);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("make the folder");
        program::copy(from, &path);
    }

    /// Runs a shell script in the machine: to its end, and until nobody has its output open any more.
    pub fn run(&self, script: &str) -> Output {
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={}", self.init)).args(["--mount", "--pid", "--root"]);
        command.args(["--", "/bin/sh", "-c"]).arg(format!("cd /\n{script}"));
        command.env_clear().env("PATH", PATH).stdin(Stdio::null());
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("run nsenter");
        let (done, wait) = mpsc::channel();
        spawn("machine-command", move || done.send(child.wait_with_output()));
        // Packages take a minute to be installed where the machine also builds for the boards.
        match wait.recv_timeout(secs(300)) {
            Ok(output) => output.expect("the command's output"),
            Err(_) => panic!("not over, or its output still open, after five minutes: {script}"),
        }
    }

    /// Runs a script, its output and errors together, and its exit status.
    pub fn try_sh(&self, script: &str) -> (Option<i32>, String) {
        let output = self.run(&format!("exec 2>&1\n{script}"));
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a script that has to succeed, and gives what it printed.
    pub fn sh(&self, script: &str) -> String {
        let (status, text) = self.try_sh(script);
        assert_eq!(status, Some(0), "{script}\n{text}");
        text
    }

    /// The processes of this name, as the machine counts.
    pub fn pids_of(&self, name: &str) -> Vec<u32> {
        let (_, text) = self.try_sh(&format!("pidof {name}"));
        text.split_whitespace().map(|pid| pid.parse().expect("a number")).collect()
    }

    /// The agent's next connection.
    pub fn device(&self) -> Device {
        self.server.next_device(SOON)
    }

    /// Waits for a line of the syslog that contains `text`.
    pub fn wait_syslog(&self, text: &str) -> String {
        let found = |lines: &mut Vec<String>| lines.iter().find(|line| line.contains(text)).cloned();
        let line = self.syslog.wait(SOON, found);
        line.unwrap_or_else(|| panic!("waited in vain for the syslog to say {text:?}: {:?}", self.syslog))
    }
}

/// Collects what arrives at a socket as the syslog daemon's, until an empty message.
fn syslog(socket: &Path) -> Arc<Watched<Vec<String>>> {
    let socket = UnixDatagram::bind(socket).expect("bind the syslog's socket");
    let lines = Arc::new(Watched::default());
    let filled: Arc<Watched<Vec<String>>> = Arc::clone(&lines);
    spawn("syslog", move || {
        let mut message = [0; 8192];
        while let Ok(n @ 1..) = socket.recv(&mut message) {
            filled.update(|lines| lines.push(String::from_utf8_lossy(&message[..n]).into_owned()));
        }
    });
    lines
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The first process takes all others along, and unshare ends with it.
        let _ = kill(Pid::from_raw(self.init as i32), Signal::SIGKILL);
        let _ = self.boot.wait();
        let _ = UnixDatagram::unbound().and_then(|socket| socket.send_to(&[], self.dir.path().join("log")));
    }
}

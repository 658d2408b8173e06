//! Bus, manager, server and agent put together.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::bus::Bus;
use super::client::{Style, Terminal};
use super::daemon::{self, Daemon};
use super::device::{Device, Generation};
use super::manager::{Answer, Manager};
use super::proc;
use super::server::Server;
use super::wait::{SOON, millis};

/// The token every rig starts with.
pub const TOKEN: &str = "header.payload.signature";

/// A whole device and its server. Fields drop in this order: the agent first.
pub struct Rig {
    pub daemon: Daemon,
    pub manager: Manager,
    pub server: Server,
    pub bus: Bus,
    pub dir: TempDir,
}

/// What a rig is made of.
pub struct Setup {
    config: Value,
    generation: Generation,
    token: String,
    url: Option<String>,
    env: Vec<(String, String)>,
    flags: Vec<String>,
    wrapper: Option<String>,
    fallback: Option<PathBuf>,
    journal: bool,
    manager: bool,
    policy: String,
    token_file: Option<PathBuf>,
    /// What the service manager passes on.
    descriptors: Vec<OwnedFd>,
}

/// A configuration whose shell is bash without anybody's start-up files, run as the current user.
pub fn bash_config() -> Value {
    json!({
        "ShellCommand": "/bin/bash",
        "ShellArguments": ["--noprofile", "--norc", "--noediting", "-i"],
        "User": user_name(),
    })
}

/// A configuration whose shell runs this script and ends.
pub fn script_config(script: &str) -> Value {
    json!({ "ShellCommand": "/bin/sh", "ShellArguments": ["-c", script], "User": user_name() })
}

/// The name of the user who runs the tests.
pub fn user_name() -> String {
    let user = nix::unistd::User::from_uid(nix::unistd::getuid()).expect("read the password database");
    user.expect("the current user has an entry in the password database").name
}

pub fn is_root() -> bool {
    nix::unistd::getuid().is_root()
}

/// Gives this thread, and all that it starts from now on, a network of its own: a loopback interface, which has fe80::1,
/// too. Or tells why that can't be.
pub fn network_of_our_own() -> Option<&'static str> {
    if !is_root() {
        return Some("only root can make a network");
    }
    if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
        return Some("no network namespace can be made here");
    }
    let ip = |words: &str| {
        let output = std::process::Command::new("ip").args(words.split(' ')).output();
        output.is_ok_and(|output| output.status.success())
    };
    let made = ip("link set lo up") && ip("address add fe80::1/64 dev lo nodad");
    (!made).then_some("a network needs iproute2 and IPv6")
}

impl Setup {
    pub fn new() -> Setup {
        Setup {
            config: bash_config(),
            generation: Generation::New,
            token: TOKEN.to_owned(),
            url: None,
            env: Vec::new(),
            flags: Vec::new(),
            wrapper: None,
            fallback: None,
            journal: false,
            manager: true,
            policy: String::new(),
            token_file: None,
            descriptors: Vec::new(),
        }
    }

    /// Replaces the whole configuration.
    pub fn config(mut self, config: Value) -> Setup {
        self.config = config;
        self
    }

    /// Sets one key of the configuration.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Setup {
        self.config[key] = value.into();
        self
    }

    pub fn generation(mut self, generation: Generation) -> Setup {
        self.generation = generation;
        self
    }

    /// What the manager answers at first; the URL is the server's unless given.
    pub fn token(mut self, token: &str) -> Setup {
        token.clone_into(&mut self.token);
        self
    }

    pub fn url(mut self, url: &str) -> Setup {
        self.url = Some(url.to_owned());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Setup {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// A global flag in front of `daemon`.
    pub fn flag(mut self, flag: &str) -> Setup {
        self.flags.push(flag.to_owned());
        self
    }

    /// A shell script that ends in `exec "$@"` and starts the agent.
    pub fn wrapper(mut self, script: &str) -> Setup {
        self.wrapper = Some(script.to_owned());
        self
    }

    /// The fallback configuration file; by default there is none.
    pub fn fallback(mut self, file: &Path) -> Setup {
        self.fallback = Some(file.to_owned());
        self
    }

    /// Pretends that standard error is the journal's.
    pub fn journal(mut self) -> Setup {
        self.journal = true;
        self
    }

    /// The manager isn't on the bus at first.
    pub fn without_manager(mut self) -> Setup {
        self.manager = false;
        self
    }

    /// What the bus doesn't allow, as elements of its configuration.
    pub fn policy(mut self, policy: &str) -> Setup {
        policy.clone_into(&mut self.policy);
        self
    }

    /// The token comes from this file, and there is neither manager nor bus.
    pub fn token_file(mut self, file: &Path) -> Setup {
        self.token_file = Some(file.to_owned());
        self.without_manager()
    }

    /// Two descriptors at most that the service manager has kept for the agent, both under this name.
    pub fn descriptors(mut self, descriptors: Vec<OwnedFd>, name: &str) -> Setup {
        let names = vec![name; descriptors.len()].join(":");
        let count = descriptors.len().to_string();
        self.descriptors = descriptors;
        let then = self.wrapper.take().unwrap_or_else(|| "exec \"$@\"".to_owned());
        let script = format!("export LISTEN_PID=$$; exec 3<&0 4<&1 </dev/null >/dev/null; {then}");
        self.env("LISTEN_FDS", &count).env("LISTEN_FDNAMES", &names).wrapper(&script)
    }

    pub fn start(self) -> Rig {
        self.start_with(|_| {})
    }

    /// Lets the test script the server before the agent starts.
    pub fn start_with(self, prepare: impl FnOnce(&Server)) -> Rig {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut bus = Bus::with_policy(dir.path(), &self.policy);
        if self.token_file.is_none() {
            bus.restart();
        }
        let server = Server::start(self.generation);
        prepare(&server);
        let url = self.url.clone().unwrap_or_else(|| server.url());
        let mut manager = Manager::absent(&bus.address(), &self.token, &url);
        if self.manager {
            manager.appear();
        }
        let daemon = self.daemon(&dir, &bus.address(), &url);
        Rig { daemon, manager, server, bus, dir }
    }

    fn daemon(&self, dir: &TempDir, bus: &str, url: &str) -> Daemon {
        let streams = std::array::from_fn(|n| {
            let descriptor = self.descriptors.get(n).map(|d| d.try_clone().expect("a duplicate"));
            descriptor.map_or_else(Stdio::null, Stdio::from)
        });
        Daemon::start(streams, self.command(dir, bus, url), self.journal)
    }

    fn command(&self, dir: &TempDir, bus: &str, url: &str) -> Command {
        let config = dir.path().join("mender-connect.conf");
        let mut settings = self.config.clone();
        if let Some(file) = &self.token_file {
            settings["Auth"] = json!({ "Source": "file", "TokenFile": file, "ServerURL": url });
        }
        std::fs::write(&config, settings.to_string()).expect("write the configuration");
        let mut command = match &self.wrapper {
            None => daemon::command(),
            Some(script) => {
                let mut command = Command::new("/bin/sh");
                daemon::bare(&mut command);
                let agent = daemon::command();
                command.arg("-c").arg(script).arg("sh").arg(agent.get_program()).args(agent.get_args());
                command
            }
        };
        command.args(&self.flags);
        command.arg("--config").arg(config);
        let absent = || dir.path().join("absent.conf");
        command.arg("--fallback-config").arg(self.fallback.clone().unwrap_or_else(absent));
        command.arg("daemon");
        command.env("DBUS_SYSTEM_BUS_ADDRESS", bus);
        command.env("RUNTIME_DIRECTORY", dir.path().join("run"));
        command.envs(self.env.iter().cloned());
        command.current_dir(dir.path());
        command
    }
}

impl Rig {
    /// Starts the agent anew, after its end.
    pub fn restart(&mut self, setup: &Setup) {
        self.daemon = setup.daemon(&self.dir, &self.bus.address(), &self.server.url());
    }

    /// Its path is nearly as long as paths can be, and so are the answers that name it.
    pub fn deep_directory(&self) -> PathBuf {
        let mut dir = self.dir.path().to_owned();
        while dir.as_os_str().len() < 3700 {
            dir.push("d".repeat(250));
        }
        std::fs::create_dir_all(&dir).expect("a deep directory");
        dir
    }

    /// The command `status` with these flags, which asks this agent.
    pub fn status_command(&self, flags: &[&str]) -> Command {
        let mut command = daemon::command();
        command.arg("status").args(flags).env("RUNTIME_DIRECTORY", self.dir.path().join("run"));
        command.stdin(std::process::Stdio::null());
        command
    }

    /// What it says.
    pub fn status(&self) -> Value {
        let output = self.status_command(&["--json"]).output().expect("run mender-connect");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && told.is_empty(), "{told}");
        serde_json::from_slice(&output.stdout).expect("a document")
    }

    /// Whether the agent waits for something, and all that it wrote has come. A busy machine may keep either from going on
    /// for a while.
    pub fn is_at_rest(&self, device: &Device) -> bool {
        proc::sleeps(self.daemon.pid()) && device.answers(&device.bytes().to_be_bytes(), SOON)
    }

    /// The usual one, connected.
    pub fn connected() -> (Rig, Device) {
        Setup::new().connected()
    }

    /// The connection after a lost one. Back-off grows with every loss; the operator's signal cuts
    /// it short.
    pub fn next_link(&self) -> Device {
        if let Some(device) = self.server.try_device(millis(400)) {
            return device;
        }
        let mark = self.daemon.mark();
        self.daemon.signal(Signal::SIGHUP);
        self.daemon.wait_for_log_after(mark, "SIGHUP received", SOON);
        // One that is lost already may be first in the queue.
        loop {
            let device = self.server.device();
            if device.answers(b"the next link", SOON) {
                return device;
            }
        }
    }

    /// Writes another configuration and has the agent read it.
    pub fn reload(&self, config: &Value) -> usize {
        std::fs::write(self.dir.path().join("mender-connect.conf"), config.to_string())
            .expect("write the configuration");
        let mark = self.daemon.mark();
        self.daemon.signal(Signal::SIGHUP);
        mark
    }

    /// The device's connection, once it is there. Where another program runs the agent, that takes a while to start.
    pub fn device(&self) -> Device {
        self.server.next_device(SOON * 4)
    }
}

impl Setup {
    /// Starts and waits until the manager, which answers so from the beginning, is asked for the token.
    pub fn asking(self, answer: Answer) -> Rig {
        let mut rig = self.without_manager().start();
        rig.manager.answer_get(answer);
        rig.manager.appear();
        rig.manager.wait_calls("GetJwtToken", 1, SOON);
        rig
    }

    /// Starts and waits for the connection.
    pub fn connected(self) -> (Rig, Device) {
        let rig = self.start();
        let device = rig.device();
        (rig, device)
    }

    /// Starts, connects and opens a terminal with a prompt.
    pub fn terminal(self) -> (Rig, Device, Terminal) {
        let (rig, device) = self.connected();
        let mut terminal = Terminal::new(&device, Style::Cli);
        terminal.open_with_prompt();
        (rig, device, terminal)
    }
}

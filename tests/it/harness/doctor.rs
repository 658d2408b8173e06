//! `mender-connect doctor`, with bus, manager and server around it but no daemon.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use data_encoding::BASE64URL_NOPAD;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::bus::Bus;
use super::daemon;
use super::device::Generation;
use super::dns::NameServer;
use super::manager::Manager;
use super::rig::bash_config;
use super::server::Server;
use super::wait::spawn;

/// Who the token is for: must not be told.
const SUBJECT: &str = "b7a8-subject-of-the-token";

/// A token like mender-auth's that expires then, in seconds since 1970.
pub fn token(expiry: u64) -> String {
    let part = |value: Value| BASE64URL_NOPAD.encode(value.to_string().as_bytes());
    let header = part(json!({"alg": "RS256", "typ": "JWT"}));
    let payload = part(json!({"jti": "4f1c", "sub": SUBJECT, "exp": expiry, "iss": "Mender"}));
    format!("{header}.{payload}.{}", BASE64URL_NOPAD.encode(b"the signature of the token"))
}

/// Seconds since 1970.
#[allow(clippy::disallowed_methods, reason = "the harness runs on the machine that builds")]
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs()
}

/// The command, started by these words.
pub fn within(prefix: &[&str], command: &Command) -> Command {
    let mut outer = Command::new(prefix[0]);
    daemon::bare(&mut outer);
    outer.args(&prefix[1..]).arg(command.get_program()).args(command.get_args());
    outer.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(dir) = command.get_current_dir() {
        outer.current_dir(dir);
    }
    outer
}

/// A device and its server.
pub struct Office {
    pub manager: Manager,
    pub server: Server,
    pub bus: Bus,
    pub token: String,
    pub dir: TempDir,
    config: Value,
    env: Vec<(String, String)>,
}

impl Office {
    pub fn open() -> Office {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let (bus, server) = (Bus::start(dir.path()), Server::start(Generation::New));
        let token = token(now() + 7 * 86_400 + 60);
        let manager = Manager::start(&bus.address(), &token, &server.url());
        Office { manager, server, bus, token, dir, config: bash_config(), env: Vec::new() }
    }

    /// With another server URL.
    pub fn at(url: &str) -> Office {
        let office = Office::open();
        office.manager.set(&office.token, url);
        office
    }

    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Office {
        self.config[key] = value.into();
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Office {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Lays the bus's configuration anew, with this in it, and the manager's name taken again.
    pub fn rebuild_bus(&mut self, more: &str) {
        let file = self.dir.path().join("bus.conf");
        let text = std::fs::read_to_string(&file).expect("read the bus's configuration");
        std::fs::write(&file, text.replace("</busconfig>", &format!("{more}</busconfig>"))).expect("write");
        self.manager.vanish();
        self.bus.restart();
    }

    pub fn command(&self, flags: &[&str]) -> Command {
        let config = self.dir.path().join("mender-connect.conf");
        std::fs::write(&config, self.config.to_string()).expect("write the configuration");
        let mut command = daemon::command();
        command.arg("--config").arg(config).args(["--fallback-config", "/nonexistent", "doctor"]).args(flags);
        command.env("DBUS_SYSTEM_BUS_ADDRESS", self.bus.address());
        command.env("RUNTIME_DIRECTORY", self.dir.path());
        command.envs(self.env.iter().cloned()).current_dir(self.dir.path());
        command
    }

    /// A daemon in this state says so to whoever asks, once.
    pub fn tells(&self, state: &str) {
        let status = json!({
            "connection": { "failed_attempts": 0, "for": 1.5, "state": state },
            "pid": 1,
            "sessions": [],
            "shells": { "max": 16, "running": 0 },
            "token": { "length": null, "source": "dbus" },
            "transferred": { "average_in": 0.0, "average_out": 0.0, "bytes_in": 0, "bytes_out": 0 },
            "uptime": 2.5,
            "version": "1",
        });
        self.says(status.to_string());
    }

    /// What comes from the daemon's socket, once.
    pub fn says(&self, text: String) {
        let socket = self.dir.path().join("status.sock");
        let _ = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(socket).expect("listen");
        spawn("status", move || {
            let (mut stream, _) = listener.accept().expect("accept");
            stream.write_all(text.as_bytes()).expect("write");
        });
    }

    /// What doctor finds where no agent has a connection.
    pub fn ask(&self) -> Findings {
        self.ask_beside("waiting")
    }

    /// What it finds beside a daemon in this state.
    pub fn ask_beside(&self, state: &str) -> Findings {
        self.tells(state);
        self.run(self.command(&[]))
    }

    /// By a name that this name server knows, and beside a daemon that waits.
    pub fn ask_by_name(&self, host: &str, names: &NameServer) -> Findings {
        let port = self.server.address().port();
        self.manager.set(&self.token, &format!("http://{host}:{port}"));
        self.tells("waiting");
        self.run(names.asked_by(&self.command(&[])))
    }

    pub fn run(&self, mut command: Command) -> Findings {
        let output = command.output().expect("run doctor");
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        self.assert_secret(&text);
        assert_eq!(errors, "");
        let report: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert_eq!(report["ok"].as_bool(), Some(output.status.success()), "{text}");
        Findings(report)
    }

    /// Neither the token nor anything of it is in there.
    pub fn assert_secret(&self, text: &str) {
        for part in self.token.split('.').chain([SUBJECT, "4f1c"]) {
            assert!(!text.contains(part), "{text}");
        }
    }

    pub fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).expect("write");
        path
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// What doctor said, as JSON.
#[derive(Debug)]
pub struct Findings(pub Value);

impl Findings {
    pub fn steps(&self) -> Vec<&str> {
        let steps = self.0["steps"].as_array().expect("steps");
        steps.iter().map(|step| step["step"].as_str().expect("a name")).collect()
    }

    /// What was found at a step.
    pub fn found(&self, name: &str) -> &str {
        self.step(name)["found"].as_str().expect("found")
    }

    pub fn warnings(&self, name: &str) -> String {
        self.step(name)["warnings"].to_string()
    }

    fn step(&self, name: &str) -> &Value {
        let steps = self.0["steps"].as_array().expect("steps");
        steps.iter().find(|step| step["step"] == name).unwrap_or_else(|| panic!("no {name}: {self:#?}"))
    }

    pub fn assert_good(&self) {
        assert_eq!(self.0["ok"], true, "{self:#?}");
        let steps = self.0["steps"].as_array().expect("steps");
        assert!(steps.iter().all(|step| step["ok"] == true && step["advice"].is_null()), "{self:#?}");
    }

    /// The last step is this one and has failed, the others have not. What was found, and the advice.
    pub fn assert_break(&self, name: &str) -> (String, String) {
        assert_eq!(self.0["ok"], false, "{self:#?}");
        let (last, others) = self.0["steps"].as_array().expect("steps").split_last().expect("a step");
        assert!(others.iter().all(|step| step["ok"] == true && step["advice"].is_null()), "{self:#?}");
        assert_eq!(last["step"], name, "{self:#?}");
        assert_eq!(last["ok"], false, "{self:#?}");
        let field = |name: &str| last[name].as_str().expect("a text").to_owned();
        let advice = field("advice");
        assert!(!advice.contains("\\u000a"), "the advice's own lines: {advice}");
        (field("found"), advice)
    }
}

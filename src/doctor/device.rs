//! The steps on the device: daemon, configuration, PTY, token.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use nix::errno::Errno;
use nix::unistd::geteuid;

use super::{Break, Report, expiry, span};
use crate::auth::{self, Credentials};
use crate::config::{self, Auth, Config, ConfigError, Key};
use crate::link::PROXY_VARIABLES;
use crate::status;
use crate::sys::pty::{Pty, WindowSize};
use crate::sys::{clock, process, reason, writers};

/// Variables that change the daemon's behaviour, besides those for proxies.
const VARIABLES: [&str; 3] = ["SSL_CERT_FILE", "SSL_CERT_DIR", "DBUS_SYSTEM_BUS_ADDRESS"];

/// Warn about a token that expires sooner; in seconds.
const SOON: u64 = 3600;

/// Returns whether an agent is or may be connected: a second websocket with its token would end it.
pub(crate) fn daemon(report: &mut Report) -> bool {
    let processes = daemons();
    for pid in &processes {
        let others = differing(*pid).join(", ");
        if !others.is_empty() {
            report.warn(format!(
                "process {pid} has other values than this shell of: {others}. What it finds may differ"
            ));
        }
    }
    let (found, occupied) = match status::fetch() {
        Ok(status) => {
            let state = status.connection.state;
            let occupied = matches!(state, status::State::Dialling | status::State::Connected);
            (format!("running, {}", state.name()), occupied)
        }
        Err(e) => {
            let absent = matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused);
            let found = match processes.first() {
                Some(pid) => format!("process {pid} runs, and doesn't tell its state: {}", reason(&e)),
                None if absent => "not running".to_owned(),
                // Without root neither socket nor process may be in sight.
                None => format!("it may be running, its state can't be had: {}", reason(&e)),
            };
            (found, !absent || !processes.is_empty())
        }
    };
    report.good("daemon", &found);
    occupied
}

/// Pids of all `mender-connect … daemon`, upstream's included.
fn daemons() -> Vec<i32> {
    let is_daemon = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        // OpenRC's process beside the agent has the agent's words behind its own.
        !line.starts_with(b"supervise-daemon\0")
            && words.any(|word| word.rsplit(|byte| *byte == b'/').next() == Some(b"mender-connect"))
            && words.any(|word| word == b"daemon")
    };
    process::numbers_in("/proc").into_iter().filter(is_daemon).collect()
}

/// Variables that differ from ours; empty if the environment cannot be read.
fn differing(pid: i32) -> Vec<&'static str> {
    let Ok(environment) = fs::read(format!("/proc/{pid}/environ")) else { return Vec::new() };
    let theirs = |name: &str| {
        let mut entries = environment.split(|byte| *byte == 0);
        entries.find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"=")).unwrap_or_default()
    };
    let ours = |name: &str| std::env::var_os(name).unwrap_or_default().into_encoded_bytes();
    let names = PROXY_VARIABLES.into_iter().chain(VARIABLES);
    names.filter(|name| theirs(name) != ours(name)).collect()
}

pub(crate) fn configuration(report: &mut Report, main: &Path, fallback: &Path) -> Result<Config, Break> {
    let files = [main, fallback].into_iter().filter(|file| file.exists());
    let files = files.map(|file| file.display().to_string()).collect::<Vec<_>>().join(" over ");
    let files = if files.is_empty() { "no file, defaults" } else { &files };
    let config = config::load(main, fallback).map_err(|e| {
        let (step, advice) = match e {
            ConfigError::Unusable(Key::ShellCommand, _) | ConfigError::ShellNotListed(_) => {
                ("shell", "Set ShellCommand to the absolute path of a program that /etc/shells lists.")
            }
            ConfigError::Unusable(Key::User, _) if cfg!(target_env = "musl") => {
                ("user", "Set User to a name of /etc/passwd: this executable asks no other user database.")
            }
            ConfigError::Unusable(Key::User, _) => {
                ("user", "Set User to the name of one of this device's users.")
            }
            _ => ("configuration", "Correct the file; `mender-connect check` says whether it is right."),
        };
        if step != "configuration" {
            report.good("configuration", files);
        }
        report.bad(step, &e.to_string(), advice)
    })?;
    report.good("configuration", files);

    let Config { shell, arguments, user, .. } = &config;
    if config::knows_no_login(shell, arguments) {
        let advice = "set ShellArguments to [\"-l\"]";
        report.warn(format!("this shell is dash, which knows no --login and ends at once: {advice}"));
    }
    report.good("shell", &format!("{} {}", shell.display(), arguments.join(" ")));

    if !geteuid().is_root() && geteuid() != user.uid {
        report.warn("doctor isn't run by root: whether the shell could be this user's wasn't tried");
    }
    report.good("user", &format!("{}, uid {}", user.name, user.uid));
    Ok(config)
}

pub(crate) fn terminal(report: &mut Report, config: &Config) -> Result<(), Break> {
    if !config.terminal {
        report.good("pty", "not needed, Terminal.Disable is set");
        return Ok(());
    }
    let owner = geteuid().is_root().then_some(config.user.uid);
    Pty::open(WindowSize { width: config.width, height: config.height }, owner).map_err(|e| {
        let advice = match e.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOSPC) => {
                "All PTYs are in use: end some of their programs or raise the sysctl kernel.pty.max."
            }
            _ => "A file system of type devpts has to be mounted on /dev/pts, and /dev/ptmx has to exist.",
        };
        report.bad("pty", &reason(&e), advice)
    })?;
    report.good("pty", "can be opened");
    Ok(())
}

pub(crate) fn credentials(report: &mut Report, config: &Config) -> Result<Credentials, Break> {
    let credentials = match &config.auth {
        #[cfg(feature = "dbus")]
        Auth::Dbus => super::bus::credentials(report)?,
        #[cfg(not(feature = "dbus"))]
        Auth::Dbus => {
            let why = "built without D-Bus, there is nothing to get a token from";
            return Err(report.bad("bus", why, "Use an executable with it, or set Auth.Source to \"file\"."));
        }
        Auth::File { token, server_url } => from_file(report, token, server_url)?,
    };
    let now = clock::now().as_secs();
    let token = credentials.token.reveal();
    let end = match expiry(token) {
        None => "no expiry to be read".to_owned(),
        Some(at) if at <= now => {
            report.warn("the server will hardly accept it, unless this device's clock is wrong");
            format!("expired {} ago", span(now - at))
        }
        Some(at) => {
            if at - now < SOON {
                report.warn("it expires soon: the next one has to be fetched");
            }
            format!("expires in {}", span(at - now))
        }
    };
    report.good("token", &format!("{} bytes, {end}", token.len()));
    Ok(credentials)
}

fn from_file(report: &mut Report, file: &Path, server_url: &str) -> Result<Credentials, Break> {
    let name = file.display();
    let (credentials, mode) = auth::look_into(file, server_url).map_err(|e| {
        let advice = match e.kind() {
            ErrorKind::PermissionDenied if !geteuid().is_root() => {
                "Run this as the daemon's user, or as root."
            }
            ErrorKind::Other => "Whoever fetches the token has to write it there, and nothing else.",
            _ => "Auth.TokenFile has to name a file that the daemon may read.",
        };
        report.bad("file", &format!("{name}: {}", reason(&e)), advice)
    })?;
    if mode & 0o044 != 0 {
        report.warn(format!("others than its owner can read the token: chmod 600 {name}"));
    }
    for text in writers(file) {
        report.warn(format!("others can put another device's token there: {name} {text}"));
    }
    report.good("file", &format!("{name}, mode {:03o}", mode & 0o777));
    Ok(credentials)
}

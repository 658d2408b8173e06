//! The playground: a private bus with an authentication manager, a loopback server and the real
//! agent, and a live shell of that agent through its websocket. Ctrl-] leaves.
//!
//! `tests/playground/run` builds and starts it. With a terminal on standard input the shell gets
//! it in raw mode; anything else is typed into the shell, whose end ends the playground. `put` and
//! `get` transfer one file instead; `forward` carries connections.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a demonstration fails by panicking")]
#![allow(dead_code, reason = "the harness serves the integration tests first")]

mod forward;
#[path = "../it/harness/mod.rs"]
mod harness;
mod keyboard;
mod screen;
mod transfer;

use std::fs::File;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use harness::bus::Bus;
use harness::client::{Style, Terminal};
use harness::daemon::{self, Daemon};
use harness::device::Generation;
use harness::manager::Manager;
use harness::rig::{TOKEN, user_name};
use harness::server::Server;
use keyboard::Signals;
use serde_json::json;
use transfer::Direction;

const HELP: &str = "\
The demonstration: a private D-Bus, a loopback server and the real agent, started for the occasion.

  tests/playground/run                   a live shell of the agent; Ctrl-^ cuts its connection, Ctrl-] leaves
  tests/playground/run put LOCAL REMOTE  uploads LOCAL with its mode, as REMOTE on the device
  tests/playground/run get REMOTE LOCAL  downloads the device's REMOTE, as LOCAL
  tests/playground/run forward LOCAL_PORT:HOST:PORT
                                         carries TCP connections to LOCAL_PORT through the agent to
                                         HOST:PORT, until Ctrl-C
  tests/playground/run --help            says this

The device is this machine, and the agent has your rights. REMOTE starts with a slash; files pass through
memory. The exit status of a transfer is 0, or 1 with the device's reason on standard error.

A forward listens on 127.0.0.1 and tells where; LOCAL_PORT 0 is any free port. HOST is looked up and reached
by the device; an IPv6 address may be in brackets. When standard input isn't a terminal, its end ends the
forward too. The device's reasons against a connection go to standard error, the others go on.
";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    // The script has left the directory it was called in.
    let local = |path| PathBuf::from(std::env::var_os("PLAYGROUND_CALLED_IN").unwrap_or_default()).join(path);
    let job = match args[..] {
        [] => Some(Job::Shell),
        ["put", from, to] if to.starts_with('/') => {
            let (local, remote) = (local(from), to.to_owned());
            Some(Job::Transfer(transfer::Job { direction: Direction::Put, local, remote }))
        }
        ["get", from, to] if from.starts_with('/') => {
            let (local, remote) = (local(to), from.to_owned());
            Some(Job::Transfer(transfer::Job { direction: Direction::Get, local, remote }))
        }
        ["forward", ports] => forward::Job::parse(ports).map(Job::Forward),
        ["--help" | "-h"] => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => None,
    };
    let Some(job) = job else {
        eprint!("{HELP}");
        return ExitCode::from(2);
    };
    match play(job) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("playground: {why}");
            ExitCode::FAILURE
        }
    }
}

/// What was asked for.
enum Job {
    Shell,
    Transfer(transfer::Job),
    Forward(forward::Job),
}

/// Carries out the job.
fn play(job: Job) -> Result<(), String> {
    // First of all: every thread started from here on leaves these signals to us.
    let signals = Signals::block()?;
    let dir = tempfile::Builder::new().prefix("mender-playground-").tempdir().map_err(|e| e.to_string())?;
    let log = dir.path().join("mender-connect.log");
    let shell = shell();
    let config = dir.path().join("mender-connect.conf");
    let text = json!({
        "ShellCommand": shell,
        // bash sets PATH and the prompt in its login files; other shells may not know the option.
        "ShellArguments": if shell.ends_with("/bash") { vec!["--login"] } else { Vec::new() },
        "User": user_name(),
        // Somebody waits.
        "ReconnectIntervalSeconds": 1,
    });
    std::fs::write(&config, text.to_string()).map_err(|e| format!("write {}: {e}", config.display()))?;

    let mut bus = Bus::absent(dir.path());
    signals.unblocked(|| bus.try_restart())?;
    let server = Server::start(Generation::New);
    let _manager = Manager::start(&bus.address(), TOKEN, &server.url());
    let agent = signals.unblocked(|| start_agent(&config, &log, &bus))?;

    let next = || {
        server.try_device(Duration::from_secs(15)).ok_or_else(|| {
            let log = std::fs::read_to_string(&log).unwrap_or_default();
            format!("the agent did not connect within 15 s; its log:\n{log}")
        })
    };
    let device = next()?;
    match job {
        Job::Shell => {}
        Job::Transfer(job) => {
            println!("{}", transfer::run(&job, &device, &signals)?);
            return Ok(());
        }
        Job::Forward(job) => return forward::run(job, &device, &signals),
    }
    banner(&bus, &server, &agent, &config, &log);
    transfer::demonstrate(dir.path(), &device, &signals)?;
    forward::demonstrate(&device, &signals)?;
    let leave = if std::io::stdin().is_terminal() {
        "Ctrl-^ cuts the connection, Ctrl-] leaves."
    } else {
        "It ends with its input."
    };
    eprintln!("You are in {shell} of that agent, as {}, through its websocket. {leave}", user_name());
    screen::run(Terminal::new(&device, Style::Cli), &signals, next)
}

/// The caller's shell if the agent may start it, else a common one.
fn shell() -> String {
    let listed = std::fs::read_to_string("/etc/shells").unwrap_or_default();
    let usable = |shell: &String| listed.lines().any(|line| line == shell) && Path::new(shell).is_file();
    let candidates = std::env::var("SHELL").into_iter().chain(["/bin/bash".to_owned()]);
    candidates.into_iter().find(usable).unwrap_or_else(|| "/bin/sh".to_owned())
}

fn start_agent(config: &Path, log: &Path, bus: &Bus) -> Result<Daemon, String> {
    let executable = daemon::executable();
    if !executable.is_file() {
        return Err(format!("{} is missing: run `cargo build` first", executable.display()));
    }
    let file = File::create(log).map_err(|e| format!("create {}: {e}", log.display()))?;
    let mut command = daemon::command();
    command.arg("--config").arg(config);
    command.arg("--fallback-config").arg(config.with_extension("absent"));
    command.arg("daemon");
    command.env("DBUS_SYSTEM_BUS_ADDRESS", bus.address());
    command.env("RUNTIME_DIRECTORY", config.with_file_name("run"));
    Ok(Daemon::start_logging_to(command, file))
}

fn banner(bus: &Bus, server: &Server, agent: &Daemon, config: &Path, log: &Path) {
    eprintln!("mender-connect playground");
    eprintln!("  D-Bus   {} (dbus-daemon, pid {})", bus.address(), bus.pid().unwrap_or_default());
    eprintln!("  server  {} (in this process, pid {})", server.url(), std::process::id());
    eprintln!("  agent   {} (pid {})", daemon::executable().display(), agent.pid());
    eprintln!("  config  {}", config.display());
    eprintln!("  log     {}", log.display());
}

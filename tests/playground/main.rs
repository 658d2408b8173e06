//! The playground: a private bus with an authentication manager, a loopback server and the real
//! agent, and a live shell of that agent through its websocket. Ctrl-] leaves.
//!
//! `tests/playground/run` builds and starts it. With a terminal on standard input the shell gets
//! it in raw mode; anything else is typed into the shell, whose end ends the playground. `put` and
//! `get` transfer one file instead; `forward` carries connections. `--slow` puts a relay between
//! agent and server.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a demonstration fails by panicking")]
#![allow(dead_code, reason = "the harness serves the integration tests first")]

mod display;
mod forward;
#[path = "../it/harness/mod.rs"]
mod harness;
mod keyboard;
mod screen;
mod session;
mod status;
mod transfer;

use std::cell::Cell;
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
use harness::relay::{Relay, Shape};
use harness::rig::{TOKEN, user_name};
use harness::server::{Reply, Server};
use harness::wait::millis;
use keyboard::Signals;
use screen::Stage;
use serde_json::json;
use transfer::Direction;

const HELP: &str = "\
A live terminal of mender-connect, without a Mender server and without a device. It starts a private D-Bus, a server
on loopback and the real agent, and connects you with a shell of that agent.

  tests/playground/run [--slow]                         a live shell
  tests/playground/run [--slow] put LOCAL REMOTE        uploads the file LOCAL as REMOTE, with its mode
  tests/playground/run [--slow] get REMOTE LOCAL        downloads the file REMOTE as LOCAL
  tests/playground/run [--slow] forward PORT:HOST:PORT  forwards TCP connections, until Ctrl-C
  tests/playground/run --help                           prints this

Keys of the live shell; all others go to the shell:

  Ctrl-^  cuts the link between agent and server. The shell goes on. Ctrl-^ again gives the link back, and the agent
          takes you back to your shell, with a notice.
  Ctrl-_  downloads a file of 64 MiB beside the shell; Ctrl-_ again stops it. The bytes are thrown away.
  Ctrl-]  leaves. So do \"exit\" and the end of the shell.

In most terminals Ctrl-6, Ctrl-7 and Ctrl-5 are the same three keys, whatever the keyboard's layout.

The last row of the screen is the status line: the link and since when it has been so, the session's id, the time from
a key to the shell's answer, the download's rate, and the keys.

Options:

  --slow  a link of 1 Mbit/s each way and 40 ms round trip. Start a download and type: the keys stay quick.

The device is this machine, and the agent has your rights: what you do in the shell is real. The playground itself
writes only to a temporary folder, which it removes at the end, and to target/, where it is built. It listens on
loopback only. As root it installs the Debian package dbus if that is missing.

REMOTE starts with a slash. The exit status of a transfer is 0, or 1 with the device's reason on standard error.
PORT:HOST:PORT is the local port (0: any free one), and the host and port that the device connects to; an IPv6 address
may be in brackets. Without a terminal, what you pipe in is typed into the shell, and its end ends the playground.

Examples:

  tests/playground/run
  tests/playground/run --slow
  tests/playground/run get /etc/hostname /tmp/hostname
  tests/playground/run forward 8080:localhost:80
  echo 'uname -a' | tests/playground/run
";

/// A link that is slow, but no rarity.
const SLOW: Shape = Shape { delay: millis(20), up: Some(125_000), down: Some(125_000), queue: 256 << 10 };
/// Sparse.
const FILE_SIZE: u64 = 64 << 20;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
    let slow = args.first() == Some(&"--slow");
    if slow {
        args.remove(0);
    }
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
    match play(job, slow) {
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
fn play(job: Job, slow: bool) -> Result<(), String> {
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
    let relay = slow.then(|| Relay::link(server.address(), SLOW)).transpose()?;
    let url = relay.as_ref().map_or_else(|| server.url(), |relay| format!("http://{}", relay.address()));
    let manager = Manager::start(&bus.address(), TOKEN, &url);
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
    if slow {
        eprintln!("  link    1 Mbit/s each way, 40 ms round trip");
    }
    transfer::demonstrate(dir.path(), &device, &signals)?;
    forward::demonstrate(&device, &signals)?;
    let leave = if std::io::stdin().is_terminal() {
        "Ctrl-^ cuts the link and gives it back, Ctrl-_ downloads a file, Ctrl-] leaves."
    } else {
        "It ends with its input."
    };
    eprintln!("You are in {shell} of that agent, as {}, through its websocket.\n{leave}", user_name());
    let file = dir.path().join("download");
    let sized = File::create(&file).and_then(|file| file.set_len(FILE_SIZE));
    sized.map_err(|e| format!("create {}: {e}", file.display()))?;
    let outages = Cell::new(0);
    let stage = Stage {
        signals: &signals,
        file: &file,
        cut: &|device| {
            server.always(Reply::Close);
            device.reset();
        },
        give_back: &|| {
            server.always(Reply::Upgrade);
            // The agent's back-off grows with the outage, but it tries at once with another token.
            outages.set(outages.get() + 1);
            manager.change(&format!("{TOKEN}{}", outages.get()), &url);
            next()
        },
    };
    screen::run(Terminal::new(&device, Style::Cli), &stage)
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
    let executable = daemon::executable();
    let here = std::env::current_dir().unwrap_or_default();
    let executable = executable.strip_prefix(here).unwrap_or(&executable);
    eprintln!("  agent   {} (pid {})", executable.display(), agent.pid());
    eprintln!("  config  {}", config.display());
    eprintln!("  log     {}", log.display());
}

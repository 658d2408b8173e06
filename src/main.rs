//! Arguments, configuration, log, run; a `Result` becomes an exit code.

use std::io::Write;
use std::process::ExitCode;

use log::{error, warn};
use mender_connect::cli::{self, Invocation, Options};
use mender_connect::sys::privilege;
use mender_connect::sys::process;
use mender_connect::sys::signals::Signals;
use mender_connect::sys::wipe::Wiping;
use mender_connect::{check, config, doctor, logging, session, status, supervisor, sys};

#[global_allocator]
static MEMORY: Wiping = Wiping;

const USAGE: u8 = 1;
const UNKNOWN_COMMAND: u8 = 3;

fn main() -> ExitCode {
    // Whoever reads this output may have gone away, which is no reason to fail.
    match cli::parse(std::env::args_os().skip(1)) {
        Invocation::Print(text) => {
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Invocation::UnknownCommand(text) => {
            let _ = writeln!(std::io::stderr(), "{text}");
            ExitCode::from(UNKNOWN_COMMAND)
        }
        Invocation::Usage { error, help } => {
            let _ = write!(std::io::stderr(), "Incorrect Usage: {error}\n\n{help}");
            ExitCode::from(USAGE)
        }
        Invocation::Daemon(options) => match daemon(options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => {
                error!("{e}");
                ExitCode::FAILURE
            }
        },
        Invocation::Check(options) => finish(check::run(&options.config, &options.fallback_config)),
        Invocation::Doctor { options, json } => {
            finish(doctor::run(&options.config, &options.fallback_config, json))
        }
        Invocation::Status { json, watch } => finish(status::show(json, watch)),
    }
}

/// Of a command that has said itself what there is to say.
fn finish(good: bool) -> ExitCode {
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn daemon(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    let signals = Signals::block()?;
    process::keep_descriptors_private();
    logging::init(options.level)?;
    std::panic::set_hook(Box::new(|panic| {
        error!("panic: {panic}");
        // A session clears up after itself, if the build unwinds. Without any other thread the daemon would be
        // a ruin: the init system starts it anew.
        let thread = std::thread::current();
        if !thread.name().is_some_and(|name| name.starts_with(session::THREAD_PREFIX)) {
            std::process::abort();
        }
    }));
    privilege::keep_to_oneself()?;
    let load = move || config::load(&options.config, &options.fallback_config);
    let config = load()?;
    if let Err(e) = privilege::reduce(supervisor::needs(&config)) {
        warn!("privileges that aren't needed couldn't be given up: {}", sys::reason(&e));
    }
    supervisor::run(config, load, &signals)?;
    Ok(())
}

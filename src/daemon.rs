//! The daemon's process: signals, log, panic policy, privileges, then the supervisor.

use std::error::Error;

use log::{error, warn};

use crate::cli::Options;
use crate::config;
use crate::logging::{self, Logger};
use crate::supervisor;
use crate::sys::signals::Signals;
use crate::sys::{children, privilege, reason};

/// Returns false if the daemon could not start or go on, which it has logged.
pub(crate) fn run(options: Options) -> bool {
    let log = logging::init(options.level());
    // A panic in any thread aborts the process, even in builds that unwind: the init system starts a new one.
    std::panic::set_hook(Box::new(|panic| {
        error!("panic: {panic}");
        log.finish();
        std::process::abort();
    }));
    let result = serve(options, log);
    if let Err(e) = &result {
        error!("{e}");
    }
    log.finish();
    result.is_ok()
}

fn serve(options: Options, log: &'static Logger) -> Result<(), Box<dyn Error>> {
    let signals = Signals::block()?;
    privilege::keep_to_oneself()?;
    let load = move || config::load(&options.config, &options.fallback_config);
    let config = load()?;
    if let Err(e) = privilege::reduce(supervisor::needs(&config)) {
        warn!("privileges that aren't needed couldn't be given up: {}", reason(&e));
    }
    log.start()?;
    children::prepare()?;
    supervisor::run(config, load, &signals)?;
    Ok(())
}

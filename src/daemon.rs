//! The daemon's process: signals, log, panic policy, privileges, then the supervisor.

use log::{error, warn};

use crate::cli::Options;
use crate::config;
use crate::logging;
use crate::supervisor;
use crate::sys;
use crate::sys::privilege;
use crate::sys::process;
use crate::sys::signals::Signals;

pub(crate) fn run(options: Options) -> Result<(), Box<dyn std::error::Error>> {
    let signals = Signals::block()?;
    process::keep_descriptors_private();
    logging::init(options.level)?;
    std::panic::set_hook(Box::new(|panic| {
        error!("panic: {panic}");
        // A session clears up after itself, if the build unwinds. Without any other thread the daemon would be
        // a ruin: the init system starts it anew.
        let thread = std::thread::current();
        if !thread.name().is_some_and(|name| name.starts_with("s-")) {
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

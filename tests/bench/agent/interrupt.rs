//! Ctrl-C and its like: what was measured so far is printed, and agents, buses and files don't stay behind.

use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SigSet, Signal};

use crate::harness::wait::spawn;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn signals() -> SigSet {
    [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect()
}

/// From now on such a signal makes every wait for an agent fail; the second one ends the bench. First of all, so
/// that every thread leaves them alone.
pub fn catch() -> Result<(), String> {
    signals().thread_block().map_err(|e| format!("block signals: {e}"))?;
    spawn("signals", || {
        while signals().wait().is_ok() {
            if INTERRUPTED.swap(true, Ordering::SeqCst) {
                std::process::exit(130);
            }
        }
    });
    Ok(())
}

pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// Starts processes that know these signals.
pub fn unblocked<T>(start: impl FnOnce() -> T) -> T {
    let _ = signals().thread_unblock();
    let started = start();
    let _ = signals().thread_block();
    started
}

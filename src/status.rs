//! The state of the running daemon, over a Unix socket; and the command `status` that shows it.

/// Prints the running daemon's state, with `watch` again each second. Whether there was a daemon to ask.
pub fn show(json: bool, watch: bool) -> bool {
    let _ = (json, watch);
    false
}

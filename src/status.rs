//! The state of the running daemon, over a Unix socket; and the command `status` that shows it.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

/// Prints the running daemon's state, with `watch` again each second. Whether there was a daemon to ask.
pub fn show(json: bool, watch: bool) -> bool {
    let _ = (json, watch);
    false
}

/// Asks the running daemon for its state.
///
/// # Errors
/// Why it can't be had.
pub fn fetch() -> io::Result<Value> {
    let directory = std::env::var("RUNTIME_DIRECTORY").unwrap_or_default();
    let directory = directory.split(':').next().filter(|d| !d.is_empty()).unwrap_or("/run/mender-connect");
    let socket = UnixStream::connect(PathBuf::from(directory).join("status.sock"))?;
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut text = Vec::new();
    socket.take(1 << 20).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

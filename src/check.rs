//! The command `check`: what the daemon would make of its configuration, without running it.

use std::path::Path;

/// Reads the files as the daemon would and prints what it found. Whether the daemon would start with them.
pub fn run(main: &Path, fallback: &Path) -> bool {
    let _ = (main, fallback);
    false
}

//! The remote terminal and the daemon's process.

//! The way to the server and to forward targets.

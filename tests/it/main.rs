//! Integration tests: the real executable against a private bus, an authentication manager and a
//! loopback server. `tests/run` runs them as they are meant to be run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod harness;
mod selftest;

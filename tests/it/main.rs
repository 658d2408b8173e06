//! Integration tests: the real executable against a private bus, an authentication manager and a
//! loopback server. `tests/run` runs them as they are meant to be run: many at a time, because most
//! of them wait.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod at_length;
mod auth;
mod cli;
mod commands;
mod config;
mod control;
mod disk;
mod files;
mod forward_access;
mod forward_datagrams;
mod forward_ends;
mod forward_flow;
mod forward_load;
mod forward_names;
mod forwards;
mod harness;
mod heavy;
mod hostile;
mod inits;
mod layers;
mod limits;
mod link;
mod logs;
mod packaging;
mod playground;
mod quotas;
mod remote;
mod resources;
mod selftest;
mod selftest_forward;
mod shell;
mod signals;
mod terminal;

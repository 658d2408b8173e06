//! Integration tests: the real executable against a private bus, an authentication manager and a
//! loopback server. `tests/run` runs them as they are meant to be run: many at a time, because most
//! of them wait.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]
#![cfg_attr(
    not(all(feature = "tls", feature = "dbus")),
    allow(dead_code, reason = "the harness serves the tests of every feature")
)]

mod cli;
mod features;
mod fleet;
mod harness;
mod layers;
mod regression;
mod selftest;
mod selftest_forward;
mod token_file;
mod token_places;

// The token of these comes from the bus.
#[cfg(feature = "dbus")]
mod at_length;
#[cfg(feature = "dbus")]
mod audit;
#[cfg(feature = "dbus")]
mod auth;
#[cfg(feature = "dbus")]
mod boards;
#[cfg(feature = "dbus")]
mod check;
#[cfg(feature = "dbus")]
mod commands;
#[cfg(feature = "dbus")]
mod config;
#[cfg(feature = "dbus")]
mod control;
#[cfg(feature = "dbus")]
mod detach;
#[cfg(feature = "dbus")]
mod disk;
#[cfg(feature = "dbus")]
mod doctor;
#[cfg(feature = "dbus")]
mod doctor_server;
#[cfg(feature = "dbus")]
mod exhaustion;
#[cfg(feature = "dbus")]
mod faults;
#[cfg(feature = "dbus")]
mod files;
#[cfg(feature = "dbus")]
mod forward_access;
#[cfg(feature = "dbus")]
mod forward_datagrams;
#[cfg(feature = "dbus")]
mod forward_ends;
#[cfg(feature = "dbus")]
mod forward_flow;
#[cfg(feature = "dbus")]
mod forward_load;
#[cfg(feature = "dbus")]
mod forward_names;
#[cfg(feature = "dbus")]
mod forwards;
#[cfg(feature = "dbus")]
mod heavy;
#[cfg(feature = "dbus")]
mod hostile;
#[cfg(feature = "dbus")]
mod kills;
#[cfg(feature = "dbus")]
mod limits;
#[cfg(feature = "dbus")]
mod link;
#[cfg(feature = "dbus")]
mod logs;
#[cfg(feature = "dbus")]
mod networks;
#[cfg(feature = "dbus")]
mod pace;
#[cfg(feature = "dbus")]
mod playground;
#[cfg(feature = "dbus")]
mod privileges;
#[cfg(feature = "dbus")]
mod quotas;
#[cfg(feature = "dbus")]
mod reload;
#[cfg(feature = "dbus")]
mod remote;
#[cfg(feature = "dbus")]
mod resources;
#[cfg(feature = "dbus")]
mod restart;
#[cfg(feature = "dbus")]
mod secrets;
#[cfg(feature = "dbus")]
mod service;
#[cfg(feature = "dbus")]
mod shell;
#[cfg(feature = "dbus")]
mod signals;
#[cfg(feature = "dbus")]
mod soak;
#[cfg(feature = "dbus")]
mod status;
#[cfg(feature = "dbus")]
mod status_socket;
#[cfg(feature = "dbus")]
mod terminal;
#[cfg(all(feature = "dbus", feature = "tls"))]
mod tls;
#[cfg(feature = "dbus")]
mod unprivileged;
#[cfg(all(feature = "dbus", feature = "tls"))]
mod year_2040;

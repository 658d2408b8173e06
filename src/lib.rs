//! The parts of mender-connect and how they fit: start here.
//!
//! ```text
//!                 ┌────────────────────────────── mender-connect ───────────────────────────┐
//!  mender-auth ──▶│ supervisor (main thread)   poll{ D-Bus, signals, network, wake, time }  │
//!   over D-Bus    │    Machine: State × Event → State + Actions                             │
//!                 │      │ dials, closes                      ▲ Connected / Lost(reason)    │
//!                 │      ▼                                    │                             │
//!  Mender server  │ link thread: dial ▸ TLS ▸ upgrade, then the blocking reader             │
//!   (websocket) ─▶│   read ▸ decode ▸ Router{ SessionId → Inbox }   never waits             │
//!                 │                              │                                          │
//!                 │                              ▼ one thread per session                   │
//!                 │   "s-1f0c…": poll{ wake, terminal, process, timers }                    │
//!                 │                              │ Frame                                    │
//!                 │                              ▼                                          │
//!  Mender server ◀│ link-writer thread: Outbox ▸ Pace ▸ websocket                           │
//!                 └─────────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Beside the daemon run `check`, `doctor` and the command `status`. The log has a writing thread of its own. `sys` is
//! kernel and libc, and has the only `unsafe`; `proto` and `backoff` do no I/O.
//!
//! Arrows point one way: `run → daemon → supervisor → { auth, link, status → session } → { outbox, audit, config,
//! proto, permits, backoff, encoding, sys }`. `link` and `session` don't know each other; the supervisor joins them.
//!
//! A *message* is the websocket's; a *frame* is our decoded unit; a *session* is one session id's life; a *link* is one
//! websocket's life; a *permit* is a counted right held by a guard.
//!
//! The reader waits for nobody: inboxes are bounded. A session waits only for its place in the outbox. Only the reader
//! reads from the websocket, only the writer writes to it, and only the session touches its terminal. When the link is
//! gone its router is dropped, which ends the sessions, and dropping them releases what they own. A session with a shell
//! goes on without a client, until its user is back or its time is over.

// Not for all of the package: the tests share their harness between crates.
#![deny(unreachable_pub)]

mod audit;
mod auth;
mod backoff;
mod check;
mod cli;
mod commands;
mod config;
mod daemon;
mod doctor;
mod encoding;
mod link;
mod logging;
mod outbox;
mod permits;
mod proto;
// Closed by its `mod` line; its items still say `pub`.
#[allow(unreachable_pub)]
mod session;
mod status;
mod supervisor;
mod sys;

use std::io::Write;
use std::process::ExitCode;

use self::cli::Invocation;

// The executable is the only user of this library, with the exceptions below: everything else is `pub(crate)`, so that
// the compiler reports what nobody uses.

/// The executable installs it. Benchmarks and fuzz targets have allocators of their own.
pub use self::sys::wipe::Wiping;

/// For the benchmarks (`tests/bench`), the fuzz targets (`tests/fuzz`) and the tests of the documentation.
#[doc(hidden)]
pub mod internals {
    pub use crate::backoff::wait;
    #[cfg(fuzzing)]
    pub use crate::config::of_texts;
    pub use crate::config::{Allowed, Auth, Config, Expiry, Sessions, Shell, Terminal, load};
    pub use crate::link::LinkError;
    #[cfg(fuzzing)]
    pub use crate::link::read;
    pub use crate::outbox::{Class, Outbox, Queue, Sendable, Sink, Work};
    pub use crate::proto::{
        CONTROL, FILE_TRANSFER, Frame, MENDER_CLIENT, Map, PORT_FORWARD, SHELL, SessionId, control, file,
        forward, shell,
    };
    #[cfg(fuzzing)]
    pub use crate::session::Peer;
    pub use crate::session::{Device, Router};
    pub use crate::sys::poll_one;
    pub use crate::sys::users::{User, lookup};
    pub use crate::sys::wake::Wake;
}

/// The whole program: runs what the command line asks for.
pub fn run() -> ExitCode {
    let good = match cli::parse(std::env::args_os().skip(1)) {
        Invocation::Print(text) => {
            sys::print(&text);
            true
        }
        Invocation::Refuse(text, code) => {
            let _ = std::io::stderr().write_all(sys::visible_lines(&text).as_bytes());
            return ExitCode::from(code);
        }
        // A command that fails has told why.
        Invocation::Daemon(options) => daemon::run(options),
        Invocation::Check(options) => check::run(&options.config, &options.fallback_config),
        Invocation::Doctor(options) => doctor::run(&options.config, &options.fallback_config, options.json),
        Invocation::Status(options) => status::show(options.json.unwrap_or(false), options.watch),
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

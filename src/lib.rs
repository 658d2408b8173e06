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
//! Beside the daemon there are the commands `check`, `doctor` and `status`. docs/architecture.md defines the terms and
//! follows a keystroke, a chunk and a token through the modules; tests/it/layers.rs has the arrows between them.
//!
//! Every queue is bounded, and the reader never waits. A link that ends drops its router, which ends the sessions; a
//! session with a shell goes on without a client until its user returns or its time is over.

// Not in Cargo.toml: the test crates share a harness that not all of them use.
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
// Its `mod` line closes it; its items still say `pub`.
#[allow(unreachable_pub)]
mod session;
mod status;
mod supervisor;
mod sys;

use std::io::Write;
use std::process::ExitCode;

use nix::sys::signal::{SigSet, Signal};

use self::cli::Invocation;

// Only the executable and the exceptions below use this library. Everything else is `pub(crate)`, so that the compiler
// reports unused code.

/// Installed by the executable; benchmarks and fuzz targets have allocators of their own.
pub use self::sys::wipe::Wiping;

/// For tests/bench, tests/fuzz and the tests of the documentation.
#[doc(hidden)]
pub mod internals {
    pub use crate::backoff::wait;
    #[cfg(fuzzing)]
    pub use crate::config::model::of_texts;
    pub use crate::config::{Allowed, Auth, Config, Expiry, load};
    pub use crate::link::LinkError;
    #[cfg(fuzzing)]
    pub use crate::link::model::read;
    pub use crate::outbox::{Class, Outbox, Queue, Sendable, Sink, Work};
    pub use crate::proto::{
        CONTROL, FILE_TRANSFER, Frame, MENDER_CLIENT, Map, PORT_FORWARD, SHELL, SessionId, control, file,
        forward, shell,
    };
    pub use crate::session::{Device, Router};
    #[cfg(fuzzing)]
    pub use crate::session::{Peer, models};
    pub use crate::sys::poll_one;
    pub use crate::sys::users::{User, lookup};
    pub use crate::sys::wake::Wake;
}

pub fn run() -> ExitCode {
    // As Go does. Containers pass on variables that aren't set as empty ones.
    sys::process::unset_if_empty("SSL_CERT_FILE");
    // `kill -USR1 $(pidof mender-connect)`, for the daemon's state, must not end a command that runs beside it.
    let _ = SigSet::from(Signal::SIGUSR1).thread_block();
    let good = match cli::parse(std::env::args_os().skip(1)) {
        Invocation::Print(text) => {
            sys::print(&text);
            true
        }
        Invocation::Refuse(text, code) => {
            let _ = std::io::stderr().write_all(sys::visible_lines(&text).as_bytes());
            return ExitCode::from(code);
        }
        // A command that fails prints its own report.
        Invocation::Daemon(options) => daemon::run(options),
        Invocation::Check(options) => check::run(&options.config, &options.fallback_config),
        Invocation::Doctor(options) => doctor::run(&options.config, &options.fallback_config, options.json),
        Invocation::Status(options) => status::show(options.json.unwrap_or(false), options.watch),
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

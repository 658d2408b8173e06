//! The insides of mender-connect. The program is small enough to be read in an evening; start here.
//!
//! ```text
//!                 ┌────────────────────────────── mender-connect ───────────────────────────┐
//!  mender-auth ──▶│ supervisor (main thread)   poll{ D-Bus, signals, wake, next deadline }  │
//!   over D-Bus    │    Machine: State × Event → State + Actions                             │
//!                 │      │ dials, closes                      ▲ Connected / Lost(why)       │
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
//! | module | what it is |
//! |---|---|
//! | [`cli`], [`config`], [`logging`], [`audit`] | what the operator says and is told |
//! | [`check`], [`doctor`] | commands: what the configuration means, how far the way to the server leads |
//! | [`supervisor`] | when to connect; signals, reload, what systemd is told |
//! | [`status`] | what the daemon tells about itself, over a socket; the command that asks |
//! | [`auth`] | token and server URL, from mender-auth over D-Bus (feature `dbus`) or from a file |
//! | [`link`] | one websocket's life: dial, read, write; TLS (feature `tls`) |
//! | [`session`] | from a frame to the thread that owns what it is about; terminals, files, ports, commands |
//! | [`outbox`] | from sessions to the writer: order, bounds, back-pressure |
//! | [`proto`] | the messages; no I/O |
//! | [`backoff`] | how long to wait; pure |
//! | [`sys`] | kernel and libc; the only `unsafe` |
//!
//! Words, each for one thing: a *message* is the websocket's; a *frame* is our decoded unit; a *session* is one
//! session id's life; a *link* is one websocket's life; a *permit* is a counted right held by a guard.
//!
//! Arrows point one way: `main → supervisor → { auth, link, status → session } → { outbox, audit, config, proto, backoff, sys }`, and beside
//! the supervisor `check` and `doctor`. `link` and `session` don't know each other; the supervisor joins them. A session waits for nobody: its inbox and its share of
//! the outbox are bounded, and it polls for room. Only the reader reads from the websocket, only the writer writes to
//! it, and only the session touches its terminal. When the link is gone its router is dropped, which ends the sessions,
//! and what they own is released when they are dropped.

pub mod audit;
pub mod auth;
pub mod backoff;
pub mod check;
pub mod cli;
pub mod config;
pub mod doctor;
pub mod link;
pub mod logging;
pub mod outbox;
pub mod proto;
pub mod session;
pub mod status;
pub mod supervisor;
pub mod sys;

//! Everything a test puts around the agent: a private bus, an authentication manager, a loopback
//! server with its clients, and the agent itself as a child process.
//!
//! Nothing here shares code with the agent: its own msgpack writer, its own websocket framing.
//! Nothing sleeps for a fixed time: every wait is for an event and has a deadline, and a missed
//! deadline says what was awaited. When a test panics, [`daemon::Daemon`] prints its log.

pub mod aftermath;
pub mod bus;
pub mod client;
pub mod connection;
pub mod daemon;
pub mod device;
pub mod dns;
pub mod doctor;
pub mod forward;
pub mod front;
pub mod http;
pub mod manager;
pub mod msg;
pub mod network;
pub mod proc;
pub mod program;
pub mod pty;
mod reader;
pub mod relay;
pub mod rest;
pub mod rig;
pub mod root;
pub mod server;
pub mod targets;
pub mod tls;
pub mod trace;
pub mod wait;
pub mod wire;

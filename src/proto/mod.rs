//! The protocol spoken through the websocket. Does no I/O. A message carries one [`Frame`], a msgpack map:
//! `{ "hdr": { "proto": u16, "typ": str?, "sid": str?, "props": { str: any }? }, "body": bin? }`
//!
//! Decoding accepts whatever clients send: integers of any width, bodies as str or bin, nil for absent values, unknown
//! keys. Encoding produces what strict decoders require; [`frame`] says where that matters.

pub mod control;
pub mod file;
pub mod forward;
pub(crate) mod frame;
mod map;
pub(crate) mod msgpack;
pub mod shell;

pub(crate) use frame::UserId;
pub use frame::{Frame, SessionId};
pub use map::Map;

/// Largest identifier in bytes: of a session, user, forward or message, or a message type.
pub(crate) const MAX_ID: usize = 256;

/// In characters.
const MAX_TEXT: usize = 256;

pub const SHELL: u16 = 1;
pub const FILE_TRANSFER: u16 = 2;
pub const PORT_FORWARD: u16 = 3;
pub const MENDER_CLIENT: u16 = 4;
pub const CONTROL: u16 = 0xffff;

/// A client's text, for answers and log lines.
pub(crate) fn clipped(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

#[cfg(test)]
mod golden;

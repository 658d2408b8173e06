//! The language spoken through the websocket. Does no I/O. One websocket message carries one [`Frame`], a msgpack map:
//! `{ "hdr": { "proto": u16, "typ": str?, "sid": str?, "props": { str: any }? }, "body": bin? }`
//!
//! Decoding accepts any form that a client may send: integers of any width, bodies as str or bin, nil for absent
//! values, unknown keys. Encoding produces the form that the other decoders insist on; [`frame`] says where it matters.

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

/// Longest identifier in bytes: a session's, a user's, a connection's, a message's, a message type.
pub(crate) const MAX_ID: usize = 256;

/// Characters of a client's text that answers and log lines repeat.
pub(crate) const MAX_TEXT: usize = 256;

pub const SHELL: u16 = 1;
pub const FILE_TRANSFER: u16 = 2;
pub const PORT_FORWARD: u16 = 3;
pub const MENDER_CLIENT: u16 = 4;
pub const CONTROL: u16 = 0xffff;

pub(crate) fn clipped(text: &str, characters: usize) -> String {
    text.chars().take(characters).collect()
}

#[cfg(test)]
mod golden;

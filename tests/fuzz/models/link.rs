//! The reader of a websocket. The agent's crate compiles this as a part of `link`, in fuzzing builds only.

use std::io::{Read, Write};

use super::dial::{BUFFER, websocket};
use super::error::LinkError;
use super::reader::run;
use super::socket::Cancel;
use crate::outbox::Outbox;
use crate::proto::Frame;

/// Reads messages of up to `most` bytes, as after the upgrade.
pub fn read(
    stream: impl Read + Write,
    most: usize,
    outbox: &Outbox,
    mut inbound: impl FnMut(Frame),
) -> LinkError {
    let Ok(cancel) = Cancel::new() else { return LinkError::Cancelled };
    let Err(lost) = run(&mut websocket(stream, BUFFER, most), outbox, &mut inbound, &cancel);
    lost
}

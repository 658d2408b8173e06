//! A file to the server: chunks with their offsets, then an empty one.
//!
//! The server acknowledges every tenth chunk whatever its size, so the credit has to be more than that, and the chunks'
//! size adapts to the link.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::time::Instant;

use super::About;
use super::place::{self, Content, Failure, Known, Result};
use super::rate::{Direction, EXHAUSTED};
use crate::outbox::{Class, Discard};
use crate::proto::file;
use crate::session::credit;
use crate::session::peer::Peer;
use crate::session::stats::TransferInfo;
use crate::sys::reason;

const SMALLEST_CHUNK: usize = 2 * 1024;
/// With 16 in flight it limits a download's rate on a link with a long RTT.
const LARGEST_CHUNK: usize = 384 * 1024;

pub(super) struct Download {
    content: Content,
    /// MaxFileSize: checked against the size at the start or, if that is unknown, on the way.
    max_size: Option<NonZeroU64>,
    /// Chunks in flight: end offset, and number among the session's messages.
    in_flight: VecDeque<(u64, u64)>,
    at_end: bool,
    max_rate: Option<NonZeroU64>,
    pub(super) discard: Discard,
}

impl Download {
    /// `known` is the answer to the `stat` before.
    pub(super) fn start(peer: &Peer, known: Option<Known>, info: &mut TransferInfo) -> Result<Self> {
        let config = peer.device.config();
        let limits = config.limits.as_ref();
        let (content, stat) = place::source(limits, &info.path, known, &peer.share.memory)?;
        let max_rate = limits.and_then(|l| l.max_tx_bytes_per_minute);
        if peer.device.transferred.exhausted(Direction::Sent, max_rate, info.traffic.since) {
            return Err(Failure::limited(EXHAUSTED));
        }
        // Files of /proc that are too large to be read first have the size zero, and content.
        info.size = u64::try_from(stat.st_size).ok().filter(|size| *size > 0);
        let max_size = limits.and_then(|l| l.max_file_size);
        let (in_flight, discard) = (VecDeque::new(), Discard::default());
        Ok(Download { content, max_size, in_flight, at_end: false, max_rate, discard })
    }

    pub(super) fn proceed(&mut self, about: &mut About, peer: &mut Peer, now: Instant) -> Result<()> {
        // By chunks instead of credit: clients do acknowledge chunks, so none is presumed delivered.
        while !self.at_end && self.in_flight.len() < credit::LIMIT && peer.sink.takes_data(Class::Bulk) {
            if peer.device.transferred.exhausted(Direction::Sent, self.max_rate, now) {
                return Err(Failure::limited(EXHAUSTED));
            }
            let end = about.info.size.or(self.max_size.map(NonZeroU64::get));
            let left = end.map_or(u64::MAX, |end| end - about.bytes);
            // Without a size only another byte, which isn't sent, tells whether the file is over the limit.
            if left == 0 && about.info.size.is_none() && self.read(&mut [0], about)? > 0 {
                return Err(Failure::denied(place::TOO_LARGE));
            }
            let most = peer.sink.piece(SMALLEST_CHUNK, LARGEST_CHUNK);
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(most);
            let chunk = file::chunk(&peer.id, about.bytes);
            let (message, read) = peer.sink.compose(&chunk, most, |place| {
                let read = self.read(place, about);
                let filled = *read.as_ref().unwrap_or(&0);
                about.count(&place[..filled], peer, now);
                (filled, read)
            });
            let read = read?;
            self.in_flight.push_back((about.bytes, peer.credit.sent(read, now)));
            self.at_end = read == 0;
            peer.sink.send(message, Class::Bulk, Some(&self.discard), None);
        }
        Ok(())
    }

    fn read(&mut self, place: &mut [u8], about: &About) -> Result<usize> {
        let path = || place::shown(&about.info.path);
        let mut filled = 0;
        while filled < place.len() {
            match self.content.file.read(&mut place[filled..]) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::io(format!("failed to read file: read {}", path()), e)),
            }
        }
        // Some files, as in procfs, always have fewer bytes than their size. One that has shrunk isn't the file that
        // was asked for.
        if filled < place.len()
            && let Some(size) = about.info.size
        {
            let now = self.content.file.metadata().map_err(|e| reason(&e))?.len();
            if now < size {
                let sent = about.bytes + filled as u64;
                return Err(format!(
                    "failed to read file: {} has shrunk from {size} to {now} bytes while it was read, {sent} were sent",
                    path()
                )
                .into());
            }
        }
        Ok(filled)
    }

    pub(super) fn ack(&mut self, peer: &mut Peer, offset: u64) {
        while let Some(&(_, number)) = self.in_flight.front().filter(|(end, _)| *end <= offset) {
            peer.credit.prove(number);
            self.in_flight.pop_front();
        }
    }

    /// The last chunk, which is empty, needs no ack.
    pub(super) fn is_complete(&self) -> bool {
        self.at_end && self.in_flight.len() <= 1
    }
}

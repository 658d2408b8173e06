//! A file to the server: chunks, each with its offset, then the end.
//!
//! The server acknowledges every tenth chunk whatever its size, so that the session's credit must be more than that. It
//! is the chunks' size that adapts to the connection.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

use nix::sys::stat::FileStat;

use super::About;
use super::place::{self, Failure};
use super::rate::{Counters, Direction, EXHAUSTED};
use crate::config::FileLimits;
use crate::outbox::{Class, Discard};
use crate::proto::file;
use crate::session::credit;
use crate::session::peer::Peer;
use crate::sys::reason;

const SMALLEST_CHUNK: usize = 2 * 1024;
const LARGEST_CHUNK: usize = 256 * 1024;

pub(crate) struct Download {
    file: File,
    /// Bytes to send: the file's size when the transfer began, `None` if unknown.
    pub(super) size: Option<u64>,
    /// MaxFileSize. Checked against `size` at the start and, if that is unknown, on the way.
    max_size: Option<NonZeroU64>,
    acked: u64,
    /// The chunks in flight: their end offsets and their numbers among the session's messages.
    in_flight: VecDeque<(u64, u64)>,
    at_end: bool,
    max_rate: Option<NonZeroU64>,
    /// For the chunks that are still queued.
    discard: Discard,
}

impl Download {
    /// Opens the file. If the client was told its metadata before, as `known`, and the file has grown since, it is
    /// sent only up to that size, which the client expects.
    pub(super) fn start(
        limits: Option<&FileLimits>,
        counters: &Counters,
        path: &Path,
        known: Option<&FileStat>,
        now: Instant,
    ) -> Result<Self, Failure> {
        let (file, stat) = place::source(limits, path)?;
        let max_rate = limits.and_then(|l| l.max_tx_bytes_per_minute);
        if counters.exhausted(Direction::Sent, max_rate, now) {
            return Err(Failure { text: EXHAUSTED.to_owned(), denied: true });
        }
        // Files of /proc say zero and have content all the same.
        let size = u64::try_from(stat.st_size).ok().filter(|size| *size > 0);
        let told = known.filter(|k| (k.st_dev, k.st_ino) == (stat.st_dev, stat.st_ino) && k.st_size > 0);
        let size = size.map(|size| told.map_or(size, |k| size.min(k.st_size as u64)));
        Ok(Download {
            file: file.into(),
            size,
            max_size: limits.and_then(|l| l.max_file_size),
            acked: 0,
            in_flight: VecDeque::new(),
            at_end: false,
            max_rate,
            discard: Discard::default(),
        })
    }

    /// Sends what may be sent now. An error is for the client and ends the download.
    pub(super) fn proceed(
        &mut self,
        about: &mut About,
        peer: &mut Peer,
        now: Instant,
    ) -> Result<(), Failure> {
        // What the client acknowledges for certain is never presumed to be delivered.
        while !self.at_end && self.in_flight.len() < credit::LIMIT && peer.sink.takes_data(Class::Bulk) {
            if peer.device.transferred.exhausted(Direction::Sent, self.max_rate, now) {
                return Err(Failure::system(EXHAUSTED));
            }
            let end = self.size.or(self.max_size.map(NonZeroU64::get));
            let left = end.map_or(u64::MAX, |end| end - about.bytes);
            // Without a size only another byte, which isn't sent, tells whether the limit is the file's end.
            if left == 0 && self.size.is_none() && self.read(&mut [0], about).map_err(Failure::system)? > 0 {
                return Err(Failure::too_large());
            }
            let most = peer.sink.piece(SMALLEST_CHUNK, LARGEST_CHUNK);
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(most);
            let chunk = file::chunk(&peer.id, about.bytes);
            let (message, read) = peer.sink.compose(&chunk, most, |place| {
                let read = self.read(place, about);
                about.count(&place[..*read.as_ref().unwrap_or(&0)]);
                (*read.as_ref().unwrap_or(&0), read)
            });
            let read = read.map_err(Failure::system)?;
            peer.device.transferred.add(Direction::Sent, read as u64, now);
            self.in_flight.push_back((about.bytes, peer.credit.sent(read, now)));
            // An empty chunk is the end.
            self.at_end = read == 0;
            peer.sink.send(message, Class::Bulk, Some(&self.discard));
        }
        Ok(())
    }

    /// Fills `place`, or up to the end.
    fn read(&mut self, place: &mut [u8], about: &About) -> Result<usize, String> {
        let mut filled = 0;
        while filled < place.len() {
            match self.file.read(&mut place[filled..]) {
                Ok(0) => {
                    self.check_end(about, filled)?;
                    break;
                }
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    return Err(format!(
                        "failed to read file: read {}: {}",
                        place::shown(&about.path),
                        reason(&e)
                    ));
                }
            }
        }
        Ok(filled)
    }

    /// Handles a file that gave fewer bytes than its size. Some, as in procfs, always do; one that has shrunk isn't
    /// the file that was asked for.
    fn check_end(&self, about: &About, read: usize) -> Result<(), String> {
        let Some(size) = self.size else { return Ok(()) };
        let now = self.file.metadata().map_err(|e| reason(&e))?.len();
        if now < size {
            return Err(format!(
                "failed to read file: {} has shrunk from {size} to {now} bytes while it was read, {} were sent",
                place::shown(&about.path),
                about.bytes + read as u64
            ));
        }
        Ok(())
    }

    /// All bytes before `offset` have arrived.
    pub(super) fn ack(&mut self, peer: &mut Peer, offset: u64) {
        self.acked = self.acked.max(offset);
        while let Some(&(_, number)) = self.in_flight.front().filter(|(end, _)| *end <= self.acked) {
            peer.credit.prove(number);
            self.in_flight.pop_front();
        }
    }

    /// Drops the chunks that are still queued.
    pub(super) fn discard(&self) {
        self.discard.store(true, Ordering::SeqCst);
    }

    /// True if the client has acknowledged all of the `sent` bytes, and they are the whole file.
    pub(super) fn is_complete(&self, sent: u64) -> bool {
        self.at_end && self.acked >= sent
    }
}

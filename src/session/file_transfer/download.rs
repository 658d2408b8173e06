//! A file to the server: chunks, each with its offset, then the end.
//!
//! The server acknowledges every tenth chunk whatever its size, and the released server loses messages when more
//! than about twenty wait in one session. So the number of chunks in flight is fixed between the two, and it is their
//! size that adapts to the connection: it grows as long as acks come without waiting in queues.

use std::fs::File;
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::stat::FileStat;
use sha2::{Digest, Sha256};

use super::place::{self, Failure, Source};
use super::rate::{Counters, Direction, EXHAUSTED};
use crate::config::FileLimits;
use crate::outbox::FrameSink;
use crate::proto::SessionId;
use crate::proto::file;
use crate::sys::reason;

/// Chunks that may be on the way. The server needs ten to say anything at all.
const MAX_IN_FLIGHT: usize = 20;
/// The server acknowledges when it has so many.
const ACK_EVERY: usize = 10;
const FIRST_CHUNK: usize = 4 * 1024;
const LARGEST_CHUNK: usize = 256 * 1024;
/// An ack that takes so much longer than the quickest one has waited in a queue.
const QUEUEING: Duration = Duration::from_millis(50);

/// A file that is being sent.
pub struct Download {
    file: File,
    path: PathBuf,
    /// How many bytes will be sent, where that is known: the file's size when the transfer began.
    size: Option<u64>,
    sent: u64,
    acked: u64,
    /// The ends of the chunks on the way, and when each was handed over.
    in_flight: std::collections::VecDeque<(u64, Instant)>,
    at_end: bool,
    pace: Pace,
    max_rate: Option<NonZeroU64>,
    digest: Sha256,
}

/// How large chunks are.
struct Pace {
    chunk: usize,
    /// The quickest ack of this transfer.
    quickest: Duration,
}

impl Pace {
    /// Learns from the time between a chunk's sending and its ack.
    fn learn(&mut self, took: Duration) {
        self.quickest = self.quickest.min(took);
        if took <= self.quickest * 2 + QUEUEING {
            self.chunk = (self.chunk * 2).min(LARGEST_CHUNK);
        } else if took > self.quickest * 4 + 4 * QUEUEING {
            self.chunk = (self.chunk / 2).max(FIRST_CHUNK);
        }
    }
}

impl Download {
    /// Opens the file. If its metadata was told before, as `known`, and it has grown since, just as many bytes
    /// are sent as were told: that is what the client expects.
    ///
    /// # Errors
    /// The text for the peer.
    pub fn start(
        limits: Option<&FileLimits>,
        counters: &Counters,
        path: &Path,
        known: Option<&FileStat>,
        now: Instant,
    ) -> Result<Self, Failure> {
        let Source { file, stat } = place::source(limits, path)?;
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
            path: path.to_owned(),
            size,
            sent: 0,
            acked: 0,
            in_flight: std::collections::VecDeque::with_capacity(MAX_IN_FLIGHT),
            at_end: false,
            pace: Pace { chunk: FIRST_CHUNK, quickest: Duration::MAX / 8 },
            max_rate,
            digest: Sha256::new(),
        })
    }

    /// Sends what may be sent now.
    ///
    /// # Errors
    /// The text for the peer; the download is over.
    pub fn proceed(
        &mut self,
        sid: &SessionId,
        sink: &FrameSink,
        counters: &Counters,
        now: Instant,
    ) -> Result<(), String> {
        while !self.at_end && self.in_flight.len() < MAX_IN_FLIGHT && sink.takes_bulk() {
            if counters.exhausted(Direction::Sent, self.max_rate, now) {
                return Err(EXHAUSTED.to_owned());
            }
            let left = self.size.map_or(u64::MAX, |size| size - self.sent);
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(self.pace.chunk);
            let head = file::chunk(sid, self.sent);
            let mut message = head.encode_head(wanted);
            let start = message.len();
            let read = self.read(wanted, &mut message)?;
            if read < wanted {
                self.check_end(read)?;
                // The length in front of the bytes was a promise.
                let bytes = message.split_off(start);
                message = head.encode_head(read);
                message.extend(bytes);
            }
            self.digest.update(&message[message.len() - read..]);
            counters.add(Direction::Sent, read as u64, now);
            self.sent += read as u64;
            if read > 0 {
                self.in_flight.push_back((self.sent, now));
            }
            // An empty chunk is the end.
            self.at_end = read == 0;
            sink.chunk(message);
        }
        Ok(())
    }

    fn read(&self, wanted: usize, message: &mut Vec<u8>) -> Result<usize, String> {
        let mut file = (&self.file).take(wanted as u64);
        file.read_to_end(message)
            .map_err(|e| format!("failed to read file: read {}: {}", self.path.display(), reason(&e)))
    }

    /// The file gave less than it said. Some always do; a file that has shrunk isn't the one that was asked for.
    fn check_end(&self, read: usize) -> Result<(), String> {
        let Some(size) = self.size else { return Ok(()) };
        let now = self.file.metadata().map(|m| m.len()).map_err(|e: io::Error| reason(&e))?;
        if now < size {
            return Err(format!(
                "failed to read file: {} has shrunk from {size} to {now} bytes while it was read, {} were sent",
                self.path.display(),
                self.sent + read as u64
            ));
        }
        Ok(())
    }

    /// So much has arrived.
    pub fn ack(&mut self, offset: u64, now: Instant) {
        self.acked = self.acked.max(offset.min(self.sent));
        let mut count = 0;
        while let Some((end, handed_over)) = self.in_flight.front().copied()
            && end <= self.acked
        {
            self.in_flight.pop_front();
            count += 1;
            if count == ACK_EVERY {
                self.pace.learn(now.saturating_duration_since(handed_over));
            }
        }
    }

    /// Whether everything has arrived.
    pub fn is_complete(&self) -> bool {
        self.at_end && self.acked >= self.sent
    }

    /// Which file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// The checksum of what was sent.
    pub fn digest(self) -> Sha256 {
        self.digest
    }
}

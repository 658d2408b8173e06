//! A file from the server: `put_file`, then chunks, then an empty one, which is acknowledged when the file is in place.
//!
//! The server stops waiting as soon as an ack reaches the end of the file. So acks of chunks stay one byte below what
//! has arrived, and only the last one, after the commit, has it all.

use std::io::{Seek, SeekFrom, Write};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;
use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;

use super::About;
use super::place::{self, Failure, Result};
use super::rate::{Direction, EXHAUSTED};
use super::temporary::Temporary;
use crate::proto::Frame;
use crate::proto::file::{self, Request};
use crate::session::peer::Peer;
use crate::session::router::MAX_SESSIONS;
use crate::session::stats::TransferInfo;
use crate::sys::thread;

/// Acks at a time. Later ones cover earlier ones, and the server has fewer chunks in flight.
const MAX_ACKS: usize = 24;

pub(super) struct Upload {
    temporary: Arc<Temporary>,
    max_size: Option<NonZeroU64>,
    max_rate: Option<NonZeroU64>,
    /// Offsets, one for each chunk: the server sends a chunk for each ack, so that cumulative acks would leave one
    /// fewer in flight.
    pub(super) due_acks: Vec<u64>,
}

impl Upload {
    pub(super) fn start(peer: &Peer, request: &Request, info: &mut TransferInfo) -> Result<Self> {
        let config = peer.device.config();
        let limits = config.limits.as_ref();
        let (target, attributes) = place::target(limits, request)?;
        let max_rate = limits.and_then(|l| l.max_rx_bytes_per_minute);
        if peer.device.transferred.exhausted(Direction::Received, max_rate, info.traffic.since) {
            return Err(Failure::limited(EXHAUSTED));
        }
        enough_space(&target, request.size)?;
        let temporary = Arc::new(Temporary::create(target, attributes)?);
        // lseek(2) fails beyond the file system's largest file: 4 GiB on FAT.
        let mut file = &temporary.file;
        file.seek(SeekFrom::Start(request.size.unwrap_or(0)))
            .map_err(|_| Failure::io(place::creating(&temporary.target.path), Errno::EFBIG))?;
        let _ = file.rewind();
        info.size = request.size;
        info.path.clone_from(&temporary.target.path);
        let max_size = limits.and_then(|l| l.max_file_size);
        Ok(Upload { temporary, max_size, max_rate, due_acks: Vec::new() })
    }

    pub(super) fn chunk(
        &mut self,
        about: &mut About,
        frame: &Frame,
        peer: &Peer,
        now: Instant,
    ) -> Result<()> {
        let offset = file::offset(frame).ok_or("invalid file chunk message: missing offset property")?;
        if offset != Ok(about.bytes) {
            return Err("received unexpected chunk offset".into());
        }
        if frame.body.is_empty() {
            return Ok(());
        }
        let failed = |e| {
            Failure::io(format!("failed to write file chunk: write {}", place::shown(&about.info.path)), e)
        };
        (&self.temporary.file).write_all(&frame.body).map_err(failed)?;
        about.count(&frame.body, peer, now);
        let too_large = self.max_size.is_some_and(|max| about.bytes >= max.get());
        if too_large || peer.device.transferred.exhausted(Direction::Received, self.max_rate, now) {
            return Err(Failure::limited(format!("failed to write file chunk: {EXHAUSTED}")));
        }
        // Now, since released servers don't pass on an error that comes after the file's end.
        if about.info.size == Some(about.bytes) {
            self.temporary.attributes.check(&self.temporary.target)?;
        }
        self.due_acks.truncate(MAX_ACKS - 1);
        // Nothing can be acknowledged below the first byte.
        self.due_acks.extend(Some(about.bytes - 1).filter(|offset| *offset > 0));
        Ok(())
    }

    /// In a thread of its own, unless there are many: a device may write back its cache for half a minute, and the
    /// session has other requests to answer.
    pub(super) fn commit(&self, peer: &Peer) -> Result<Commit> {
        let (report, result) = crossbeam_channel::bounded(1);
        let (temporary, wake) = (Arc::clone(&self.temporary), Arc::clone(&peer.wake));
        let threads = &peer.device.threads;
        let thread = (threads.taken() < MAX_SESSIONS).then(|| threads.acquire()).flatten();
        let own = thread.is_some();
        let body = move || {
            let result = temporary.commit();
            drop(temporary);
            let _ = report.send(result);
            wake.notify();
            // A commit that hangs counts among the device's threads after its session's end.
            drop(thread);
        };
        if own {
            thread::spawn("commit", thread::SMALL_STACK, body)
                .map_err(|e| self.temporary.not_committed(e))?;
        } else {
            body();
        }
        Ok(Commit { result, temporary: Arc::clone(&self.temporary), give_up: None })
    }
}

pub(super) struct Commit {
    pub(super) result: Receiver<Result<()>>,
    pub(super) temporary: Arc<Temporary>,
    /// Set when the session is hung up: nobody waits for the answer.
    pub(super) give_up: Option<(Instant, &'static str)>,
}

#[allow(clippy::useless_conversion, reason = "32-bit systems count in other types")]
fn enough_space(target: &place::Target, size: Option<u64>) -> Result<()> {
    let (Some(size), Ok(stat)) = (size, fstatvfs(&target.dir)) else { return Ok(()) };
    let blocks = if nix::unistd::geteuid().is_root() { stat.blocks_free() } else { stat.blocks_available() };
    let free = u64::from(blocks).saturating_mul(u64::from(stat.fragment_size()));
    // Some file systems report no size at all.
    if size <= free || stat.blocks() == 0 {
        return Ok(());
    }
    let Failure { text, .. } = Failure::io(place::creating(&target.path), Errno::ENOSPC);
    Err(format!("{text} ({size} bytes needed, {free} free)").into())
}

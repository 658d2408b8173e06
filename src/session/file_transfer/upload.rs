//! A file from the server: `put_file`, then chunks, then the end, which is answered when the file is in place.
//!
//! The server stops waiting as soon as an ack reaches the end of the file, so the acks of data stay one byte
//! below what has come, and only the last one, after the commit, says it all.

use std::io::Write;
use std::num::NonZeroU64;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;
use nix::errno::Errno;
use nix::sys::statvfs::fstatvfs;
use sha2::{Digest, Sha256};

use super::place::{self, Attributes, Failure};
use super::rate::{Counters, Direction, EXHAUSTED};
use super::temporary::{CommitError, Remover, Temporary};
use crate::config::FileLimits;
use crate::proto::Frame;
use crate::proto::file::{self, Request};
use crate::sys::wake::Wake;
use crate::sys::{reason, thread};

/// Acks at a time; a further one covers the previous ones. The server has fewer chunks in flight.
const MAX_ACKS: usize = 24;

pub(crate) struct Upload {
    temporary: Temporary,
    attributes: Attributes,
    path: PathBuf,
    max_size: Option<NonZeroU64>,
    max_rate: Option<NonZeroU64>,
    received: u64,
    /// Offsets to acknowledge.
    due: Vec<u64>,
    digest: Sha256,
}

pub(crate) enum Progress {
    More,
    End,
}

impl Upload {
    /// Creates the file. The error is the text for the client.
    pub(crate) fn start(
        limits: Option<&FileLimits>,
        counters: &Counters,
        request: &Request,
        now: Instant,
    ) -> Result<Self, Failure> {
        let target = place::target(limits, request)?;
        let max_rate = limits.and_then(|l| l.max_rx_bytes_per_minute);
        if counters.exhausted(Direction::Received, max_rate, now) {
            return Err(Failure::system(EXHAUSTED));
        }
        let attributes = Attributes::new(limits, request)?;
        if let Some(size) = request.size {
            enough_space(&target, size)?;
        }
        let temporary = Temporary::create(&target).map_err(|e| place::cannot_create(&target.path, &e))?;
        Ok(Upload {
            temporary,
            attributes,
            path: target.path,
            max_size: limits.and_then(|l| l.max_file_size),
            max_rate,
            received: 0,
            due: Vec::new(),
            digest: Sha256::new(),
        })
    }

    /// Writes a chunk. The error is the text for the client and ends the upload.
    pub(crate) fn chunk(
        &mut self,
        frame: &Frame,
        counters: &Counters,
        now: Instant,
    ) -> Result<Progress, String> {
        match file::offset(frame) {
            None => return Err("invalid file chunk message: missing offset property".to_owned()),
            Some(offset) if offset != Ok(self.received) => {
                return Err("received unexpected chunk offset".to_owned());
            }
            Some(_) => {}
        }
        if frame.body.is_empty() {
            return Ok(Progress::End);
        }
        let failed = |why: &str| format!("failed to write file chunk: {why}");
        self.temporary
            .file()
            .write_all(&frame.body)
            .map_err(|e| failed(&format!("write {}: {}", place::shown(&self.path), reason(&e))))?;
        self.digest.update(&frame.body);
        self.received += frame.body.len() as u64;
        counters.add(Direction::Received, frame.body.len() as u64, now);
        let too_large = self.max_size.is_some_and(|max| self.received >= max.get());
        if too_large || counters.exhausted(Direction::Received, self.max_rate, now) {
            return Err(failed(EXHAUSTED));
        }
        if self.due.len() == MAX_ACKS {
            self.due.pop();
        }
        // A chunk of one byte at the start has none.
        self.due.extend(Some(self.received - 1).filter(|offset| *offset > 0));
        Ok(Progress::More)
    }

    /// The offsets to acknowledge now. One for each chunk: the server sends one for each ack that it waits for, and
    /// so keeps one more in flight than with cumulative acks.
    pub(crate) fn due_acks(&mut self) -> std::vec::Drain<'_, u64> {
        self.due.drain(..)
    }

    /// Completes the file in a thread of its own: a device may take half a minute to write back its cache, and the
    /// session has other requests to answer meanwhile. The error is the text for the client.
    pub(crate) fn commit(self, wake: &Arc<Wake>) -> Result<Commit, String> {
        let Upload { temporary, attributes, path, received, digest, .. } = self;
        let failed = |e: std::io::Error| {
            format!("failed to commit uploaded file: {}: {}", place::shown(&path), reason(&e))
        };
        let remover = temporary.remover().map_err(failed)?;
        let (report, result) = crossbeam_channel::bounded(1);
        let (wake, shown) = (Arc::clone(wake), place::shown(&path));
        thread::spawn("commit", thread::SMALL_STACK, move || {
            let result = temporary.commit(attributes).map_err(|e| commit_error(&shown, e, attributes));
            let _ = report.send(result);
            wake.notify();
        })
        .map_err(failed)?;
        Ok(Commit { result, remover, path, size: received, digest })
    }

    /// The target's path.
    pub(crate) fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Bytes so far.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }
}

/// A commit in progress.
pub(crate) struct Commit {
    result: Receiver<Result<(), Failure>>,
    remover: Remover,
    /// The target's path.
    pub(crate) path: PathBuf,
    /// In bytes.
    pub(crate) size: u64,
    digest: Sha256,
}

impl Commit {
    /// The result, if the commit has ended.
    pub(crate) fn try_result(&self) -> Option<Result<(), Failure>> {
        match self.result.try_recv() {
            Ok(result) => Some(result),
            Err(crossbeam_channel::TryRecvError::Empty) => None,
            Err(crossbeam_channel::TryRecvError::Disconnected) => {
                let path = place::shown(&self.path);
                Some(Err(Failure::system(format!("failed to commit uploaded file: {path}: internal error"))))
            }
        }
    }

    /// Gives up: the target stays as it is, unless the commit has replaced it already.
    pub(crate) fn abandon(&self) {
        self.remover.remove();
    }

    /// The checksum of the bytes received.
    pub(crate) fn digest(self) -> Sha256 {
        self.digest
    }
}

fn commit_error(path: &str, error: CommitError, attributes: Attributes) -> Failure {
    let why = |errno: Errno| reason(&std::io::Error::from(errno));
    Failure::system(match error {
        CommitError::Denied(failure) => return failure,
        CommitError::Owner(e) => {
            format!(
                "failed to set file owner: chown {path} to {}:{}: {}",
                attributes.uid,
                attributes.gid,
                why(e)
            )
        }
        CommitError::Permissions(e) => {
            format!("failed to set file permissions: chmod {path} to {:o}: {}", attributes.mode, why(e))
        }
        CommitError::Commit(e) => format!("failed to commit uploaded file: {path}: {}", why(e)),
    })
}

/// Checks whether a file of `size` bytes fits, as far as that can be known before.
#[allow(clippy::useless_conversion, reason = "32-bit systems count in other types")]
fn enough_space(target: &place::Target, size: u64) -> Result<(), Failure> {
    let Ok(stat) = fstatvfs(&target.dir) else { return Ok(()) };
    let blocks = if nix::unistd::geteuid().is_root() { stat.blocks_free() } else { stat.blocks_available() };
    let free = u64::from(blocks).saturating_mul(u64::from(stat.fragment_size()));
    // Some file systems don't know their size and say zero.
    if size <= free || stat.blocks() == 0 {
        return Ok(());
    }
    let failure = place::cannot_create(&target.path, &Errno::ENOSPC.into());
    Err(Failure { text: format!("{} ({size} bytes needed, {free} free)", failure.text), ..failure })
}

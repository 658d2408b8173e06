//! File transfer: protocol 2 for one session, one file at a time. Runs in the session's thread.

mod download;
mod place;
pub(crate) mod rate;
mod temporary;
mod upload;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use log::{debug, info};
use nix::sys::stat::FileStat;
use sha2::{Digest, Sha256};

use self::download::Download;
use self::place::Failure;
use self::rate::Direction;
use self::upload::{Commit, Upload};
use super::peer::Peer;
use super::stats::TransferInfo;
use crate::audit::Record;
use crate::proto::control;
use crate::proto::file::{self, Request};
use crate::proto::{Frame, MAX_TEXT, clipped};

/// Error code for violated limits: the server passes it on as the HTTP status.
const FORBIDDEN: u16 = 403;
/// Time for a commit in progress after the link is gone.
const HANG_UP_GRACE: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(crate) struct FileTransfer {
    transfer: Option<Box<Transfer>>,
    /// The latest answer to `stat`: the client expects a download of that size.
    known: Option<(PathBuf, FileStat)>,
    /// Chunks of an earlier transfer may still arrive, and are ignored without an error.
    stray_chunks: bool,
    stray_acks: bool,
}

struct Transfer {
    about: About,
    stage: Stage,
    shown: Arc<TransferInfo>,
}

enum Stage {
    Sending(Download),
    Receiving(Upload),
    Committing(Commit),
}

/// The part of a transfer that all stages have in common.
struct About {
    direction: Direction,
    /// Without its body. Errors refer to it.
    request: Frame,
    started: Instant,
    path: PathBuf,
    /// Payload so far.
    bytes: u64,
    digest: Sha256,
}

impl About {
    fn count(&mut self, payload: &[u8]) {
        self.bytes += payload.len() as u64;
        self.digest.update(payload);
    }

    /// Acknowledges `offset` bytes. Repeats the request's user, if any.
    fn ack(&self, peer: &Peer, offset: u64) -> Frame {
        let user = self.request.props.str("user_id").filter(|user| !user.is_empty());
        file::ack(&peer.id, offset, user)
    }

    /// Writes the transfer's line in the audit log. An error is the `result` field and the reason.
    fn log(&self, peer: &Peer, outcome: Result<(), (&str, &str)>) {
        let record = Record::new("transfer", Some(&peer.id), &self.request.user())
            .with("direction", self.direction.name())
            .path("path", &self.path)
            .with("bytes", self.bytes)
            .since(self.started, Instant::now());
        match outcome {
            Ok(()) => {
                let digest = HEXLOWER.encode(&self.digest.clone().finalize());
                record.with("result", "ok").with("sha256", digest).log(true);
            }
            Err((result, why)) => record.with("result", result).text("reason", why).log(false),
        }
    }
}

impl FileTransfer {
    /// True if nothing is left to do. A complete file is committed even after its session's end.
    pub(crate) fn is_idle(&self) -> bool {
        self.transfer.is_none()
    }

    /// Handles a frame of the file transfer protocol.
    pub(crate) fn handle(&mut self, peer: &mut Peer, frame: Frame, now: Instant) {
        if self.is_idle() {
            // The client, which waits for each answer, has read the last one.
            peer.credit.prove_all();
        }
        let stage = self.transfer.as_deref().map(|transfer| &transfer.stage);
        let refusal = match (stage, frame.typ.as_str()) {
            (_, file::STAT) => return self.stat(peer, &frame),
            (None, file::GET_FILE) => return self.start(peer, &frame, Direction::Sent, now),
            (None, file::PUT_FILE) => return self.start(peer, &frame, Direction::Received, now),
            (_, file::GET_FILE | file::PUT_FILE) => "another file transfer is in progress".to_owned(),
            (Some(Stage::Sending(_)), file::ACK) => return self.take_ack(peer, &frame),
            (Some(Stage::Receiving(_)), file::FILE_CHUNK) => return self.take_chunk(peer, &frame, now),
            (_, file::ERROR) => return self.take_error(peer, &frame),
            (Some(Stage::Sending(_)), other @ file::FILE_CHUNK) => {
                let text = format!("received unexpected message type '{other}'; expected 'ack'");
                return self.fail(peer, &frame, &Failure::system(text));
            }
            (Some(Stage::Receiving(_)), other @ file::ACK) => {
                let text = format!("received unexpected message type '{other}' during file upload");
                return self.fail(peer, &frame, &Failure::system(text));
            }
            // On the way when their transfer ended.
            (_, file::ACK) if self.stray_acks => return,
            (_, file::FILE_CHUNK) if self.stray_chunks => return,
            (_, file::FILE_CHUNK | file::ACK) => "no file transfer in progress".to_owned(),
            (_, other) => format!("session: filetransfer message type '{other}' not supported"),
        };
        refuse(peer, &frame, &Failure::system(refusal));
    }

    /// Does what is possible now.
    pub(crate) fn proceed(&mut self, peer: &mut Peer, now: Instant) {
        let Some(Transfer { about, stage, shown }) = self.transfer.as_deref_mut() else { return };
        match stage {
            Stage::Receiving(_) => {}
            Stage::Sending(download) => {
                let before = about.bytes;
                let result = download.proceed(about, peer, now);
                shown.traffic.add_out((about.bytes - before) as usize);
                match result {
                    Ok(()) => self.finish_sending(peer),
                    Err(failure) => {
                        let request = about.request.clone();
                        self.fail(peer, &request, &failure);
                    }
                }
            }
            Stage::Committing(commit) => match commit.try_result() {
                Some(result) => self.finish_receiving(peer, result),
                None if commit.give_up.is_some_and(|at| now >= at) => {
                    self.abort(peer, "failed", "the connection was lost");
                }
                None => {}
            },
        }
    }

    /// Acknowledges received chunks. To be called when the inbox is empty.
    pub(crate) fn acknowledge(&mut self, peer: &Peer) {
        if let Some(Transfer { about, stage: Stage::Receiving(upload), .. }) = self.transfer.as_deref_mut() {
            // The server sends a chunk only for an ack that it has read: it never has too many of them on the way.
            for offset in upload.due_acks.drain(..) {
                peer.sink.reply(&about.ack(peer, offset));
            }
        }
    }

    /// When to call [`FileTransfer::proceed`] without an event.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.transfer.as_deref()?.stage {
            Stage::Committing(commit) => commit.give_up,
            _ => None,
        }
    }

    /// Ends the session: aborts a transfer in progress, but still commits a complete file.
    pub(crate) fn close(&mut self, peer: &Peer) {
        if self.committing().is_none() {
            self.abort(peer, "failed", "the session was closed");
        }
    }

    /// Ends a transfer of a session that can't go on.
    pub(crate) fn abandon(&mut self, peer: &Peer) {
        self.abort(peer, "failed", "the session failed");
    }

    pub(crate) fn hang_up(&mut self, peer: &Peer, now: Instant) {
        match self.committing() {
            Some(commit) => commit.give_up = Some(now + HANG_UP_GRACE),
            None => self.abort(peer, "failed", "the connection was lost"),
        }
    }

    fn committing(&mut self) -> Option<&mut Commit> {
        match &mut self.transfer.as_deref_mut()?.stage {
            Stage::Committing(commit) => Some(commit),
            _ => None,
        }
    }

    fn stat(&mut self, peer: &mut Peer, frame: &Frame) {
        let config = peer.device.config();
        let found = Request::decode(&frame.body)
            .map_err(Failure::system)
            .and_then(|request| Ok((place::stat(config.limits.as_ref(), &request.path)?, request.path)));
        match found {
            Ok((stat, path)) => {
                peer.reply(&file::file_info(&peer.id, &path, &stat));
                self.known = Some((path, stat));
            }
            Err(failure) => refuse(peer, frame, &failure),
        }
    }

    fn start(&mut self, peer: &mut Peer, frame: &Frame, direction: Direction, now: Instant) {
        let (request, path, digest) = (frame.without_body(), PathBuf::new(), Sha256::new());
        let mut about = About { direction, request, started: now, path, bytes: 0, digest };
        self.stray_chunks |= direction == Direction::Received;
        match self.begin(peer, &frame.body, &mut about) {
            Ok((stage, size)) => {
                debug!("session {}: {} of {:?}", peer.id, direction.name(), about.path);
                let shown = peer.info.set_transfer(direction, &about.path, size, now);
                self.transfer = Some(Box::new(Transfer { about, stage, shown }));
                match direction {
                    Direction::Sent => self.stray_acks = true,
                    Direction::Received => peer.reply(&file::ack(&peer.id, 0, None)),
                }
            }
            Err(failure) => {
                about.log(peer, Err((failure.result(), &failure.text)));
                refuse(peer, frame, &failure);
            }
        }
    }

    /// The transfer's first stage, and its size if that is known.
    fn begin(&self, peer: &Peer, body: &[u8], about: &mut About) -> Result<(Stage, Option<u64>), Failure> {
        let config = peer.device.config();
        let (limits, counters) = (config.limits.as_ref(), &peer.device.transferred);
        let request = Request::decode(body).map_err(Failure::system)?;
        about.path.clone_from(&request.path);
        match about.direction {
            Direction::Sent => {
                let known = self.known.as_ref().filter(|(path, _)| *path == request.path);
                let known = known.map(|(_, stat)| stat);
                let download = Download::start(limits, counters, &request.path, known, about.started)?;
                let size = download.size;
                Ok((Stage::Sending(download), size))
            }
            Direction::Received => {
                let upload = Upload::start(limits, counters, &request, about.started)?;
                about.path.clone_from(upload.path());
                Ok((Stage::Receiving(upload), request.size))
            }
        }
    }

    fn take_ack(&mut self, peer: &mut Peer, frame: &Frame) {
        let Some(Transfer { about, stage: Stage::Sending(download), .. }) = self.transfer.as_deref_mut()
        else {
            return;
        };
        let why = match file::offset(frame) {
            Some(Ok(offset)) => {
                download.ack(peer, offset.min(about.bytes));
                return self.finish_sending(peer);
            }
            Some(Err(())) => "invalid offset data type: require int64",
            None => "ack message: offset property cannot be blank",
        };
        self.fail(peer, frame, &Failure::system(why));
    }

    fn finish_sending(&mut self, peer: &Peer) {
        let complete = |transfer: &mut Box<Transfer>| matches!(&transfer.stage, Stage::Sending(download) if download.is_complete(transfer.about.bytes));
        if let Some(transfer) = self.transfer.take_if(complete) {
            transfer.about.log(peer, Ok(()));
        }
    }

    fn take_chunk(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) {
        let Some(Transfer { about, stage, shown }) = self.transfer.as_deref_mut() else { return };
        let Stage::Receiving(upload) = stage else { return };
        let before = about.bytes;
        let mut result = upload.chunk(about, frame, &peer.device.transferred, now);
        shown.traffic.add_in((about.bytes - before) as usize, now);
        if result.is_ok() && frame.body.is_empty() {
            result = upload.commit(&peer.wake).map(|commit| *stage = Stage::Committing(commit));
        }
        if let Err(text) = result {
            self.fail(peer, frame, &Failure::system(text));
        }
    }

    fn finish_receiving(&mut self, peer: &mut Peer, result: Result<(), Failure>) {
        let Some(transfer) = self.transfer.take() else { return };
        let Transfer { about, stage, .. } = *transfer;
        // First: as long as the file is open for writing it can't be executed.
        drop(stage);
        match result {
            Ok(()) => {
                peer.reply(&about.ack(peer, about.bytes));
                about.log(peer, Ok(()));
            }
            Err(failure) => {
                about.log(peer, Err((failure.result(), &failure.text)));
                refuse(peer, &about.request, &failure);
            }
        }
    }

    /// Handles the client's error, which ends the transfer.
    fn take_error(&mut self, peer: &Peer, frame: &Frame) {
        let text = control::parse::<control::Error>(&frame.body).ok().and_then(|e| e.err).unwrap_or_default();
        info!("session {}: error from the client: {:?}", peer.id, clipped(&text, MAX_TEXT));
        self.close(peer);
    }

    /// Ends the transfer in progress because of `cause`, and reports that.
    fn fail(&mut self, peer: &mut Peer, cause: &Frame, failure: &Failure) {
        self.abort(peer, failure.result(), &failure.text);
        refuse(peer, cause, failure);
    }

    /// Ends an incomplete transfer, with `result` in the audit log.
    fn abort(&mut self, peer: &Peer, result: &str, why: &str) {
        let Some(transfer) = self.transfer.take() else { return };
        let result = match &transfer.stage {
            Stage::Sending(download) => {
                download.discard();
                result
            }
            Stage::Receiving(_) => result,
            Stage::Committing(commit) => {
                commit.abandon();
                "abandoned"
            }
        };
        transfer.about.log(peer, Err((result, why)));
    }
}

/// Refuses a request, or reports why a transfer has ended.
fn refuse(peer: &mut Peer, cause: &Frame, failure: &Failure) {
    debug!("session {}: {}: {}", peer.id, cause.typ.escape_debug(), failure.text);
    // Not for uploads: the server's answer would be another one than upstream's.
    let code = (failure.denied && cause.typ != file::PUT_FILE).then_some(FORBIDDEN);
    peer.reply(&file::error(&peer.id, cause, &failure.text, code));
}

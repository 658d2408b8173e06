//! File transfer: protocol 2 for one session, one file at a time. Runs in the session's thread.

mod download;
mod place;
pub(crate) mod rate;
mod temporary;
mod upload;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use data_encoding::HEXLOWER;
use log::{debug, info};
use nix::sys::stat::FileStat;
use sha2::{Digest, Sha256};

use self::download::Download;
use self::place::Failure;
use self::rate::Direction;
use self::upload::{Commit, Progress, Upload};
use super::peer::Peer;
use super::stats::TransferInfo;
use crate::audit::Record;
use crate::proto::control;
use crate::proto::file::{self, Request};
use crate::proto::{Frame, MAX_TEXT, UserId, clipped};

/// Error code for violated limits: the server passes it on as the HTTP status.
const FORBIDDEN: u16 = 403;
/// Time for a commit in progress after the link is gone.
const HANG_UP_GRACE: Duration = Duration::from_secs(1);

const NONE_IN_PROGRESS: &str = "no file transfer in progress";

#[derive(Default)]
pub(crate) struct FileTransfer {
    state: State,
    /// The latest answer to `stat`: the client expects a download of that size.
    known: Option<(PathBuf, FileStat)>,
    /// Chunks of an earlier transfer may still arrive, and are ignored without an error.
    stray_chunks: bool,
    stray_acks: bool,
}

#[derive(Default)]
enum State {
    #[default]
    Idle,
    Sending(Box<Sending>),
    Receiving(Box<Receiving>),
    Committing(Box<Committing>),
}

/// A transfer, besides its bytes.
struct About {
    /// The request, without its body. Errors refer to it.
    request: Frame,
    user: UserId,
    started: Instant,
}

struct Sending {
    about: About,
    download: Download,
    shown: Arc<TransferInfo>,
}

struct Receiving {
    about: About,
    upload: Upload,
    shown: Arc<TransferInfo>,
}

struct Committing {
    about: About,
    commit: Commit,
    _shown: Arc<TransferInfo>,
    /// Set when the link is gone: a deadline for the commit, whose answer nobody waits for.
    give_up: Option<Instant>,
}

impl FileTransfer {
    /// True if nothing is left to do. A complete file is committed even after its session's end.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Handles a frame of the file transfer protocol.
    pub(crate) fn handle(&mut self, peer: &mut Peer, frame: Frame, now: Instant) {
        if self.is_idle() {
            // The client, which waits for each answer, has read the last one.
            peer.credit.prove_all();
        }
        match (&mut self.state, frame.typ.as_str()) {
            (_, file::STAT) => self.stat(peer, &frame),
            (State::Idle, file::GET_FILE) => self.start_sending(peer, &frame, now),
            (State::Idle, file::PUT_FILE) => self.start_receiving(peer, &frame, now),
            (_, file::GET_FILE | file::PUT_FILE) => {
                refuse(peer, &frame, &Failure::system("another file transfer is in progress"));
            }
            (State::Sending(_), file::ACK) => self.take_ack(peer, &frame, now),
            (State::Receiving(_), file::FILE_CHUNK) => self.take_chunk(peer, &frame, now),
            (_, file::ERROR) => self.take_error(peer, &frame),
            (State::Sending(_), other @ file::FILE_CHUNK) => {
                let text = format!("received unexpected message type '{other}'; expected 'ack'");
                self.fail(peer, &frame, &text);
            }
            (State::Receiving(_), other @ file::ACK) => {
                let text = format!("received unexpected message type '{other}' during file upload");
                self.fail(peer, &frame, &text);
            }
            // On the way when their transfer ended.
            (_, file::ACK) if self.stray_acks => {}
            (_, file::FILE_CHUNK) if self.stray_chunks => {}
            (_, file::FILE_CHUNK | file::ACK) => refuse(peer, &frame, &Failure::system(NONE_IN_PROGRESS)),
            (_, other) => {
                let text = format!("session: filetransfer message type '{other}' not supported");
                refuse(peer, &frame, &Failure::system(text));
            }
        }
    }

    /// Does what is possible now.
    pub(crate) fn proceed(&mut self, peer: &mut Peer, now: Instant) {
        match &mut self.state {
            State::Idle | State::Receiving(_) => {}
            State::Sending(sending) => {
                let before = sending.download.sent();
                let result = sending.download.proceed(peer, now);
                let sent = sending.download.sent();
                sending.shown.traffic.add_out((sent - before) as usize);
                if let Err(failure) = result {
                    let request = sending.about.request.clone();
                    self.abort_as(peer, failure.result(), &failure.text);
                    return refuse(peer, &request, &failure);
                }
                self.finish_sending(peer, now);
            }
            State::Committing(committing) => {
                if let Some(result) = committing.commit.try_result() {
                    return self.finish_receiving(peer, result, now);
                }
                if committing.give_up.is_some_and(|at| now >= at) {
                    self.abort_as(peer, "failed", "the connection was lost");
                }
            }
        }
    }

    /// Acknowledges received chunks. To be called when the inbox is empty.
    pub(crate) fn acknowledge(&mut self, peer: &mut Peer) {
        if let State::Receiving(receiving) = &mut self.state {
            let Receiving { about, upload, .. } = &mut **receiving;
            // The server sends a chunk only for an ack that it has read: it never has too many of them on the way.
            for offset in upload.due_acks() {
                peer.sink.reply(&file::ack(&peer.id, offset, user_of(about)));
            }
        }
    }

    /// When to call [`FileTransfer::proceed`] without an event.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Committing(committing) => committing.give_up,
            _ => None,
        }
    }

    /// Ends the session: aborts a transfer in progress, but still commits a complete file.
    pub(crate) fn close(&mut self, peer: &Peer) {
        if !matches!(self.state, State::Committing(_)) {
            self.abort_as(peer, "failed", "the session was closed");
        }
    }

    /// Ends a transfer of a session that can't go on.
    pub(crate) fn abandon(&mut self, peer: &Peer) {
        self.abort_as(peer, "failed", "the session failed");
    }

    pub(crate) fn hang_up(&mut self, peer: &Peer, now: Instant) {
        match &mut self.state {
            State::Committing(committing) => committing.give_up = Some(now + HANG_UP_GRACE),
            _ => self.abort_as(peer, "failed", "the connection was lost"),
        }
    }

    fn stat(&mut self, peer: &mut Peer, frame: &Frame) {
        let config = peer.device.config();
        let limits = config.limits.as_ref();
        let found = Request::decode(&frame.body)
            .map_err(Failure::system)
            .and_then(|request| Ok((place::stat(limits, &request.path)?, request.path)));
        match found {
            Ok((stat, path)) => {
                peer.reply(&file::file_info(&peer.id, &path, &stat));
                self.known = Some((path, stat));
            }
            Err(failure) => refuse(peer, frame, &failure),
        }
    }

    fn start_sending(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) {
        let about = About { user: frame.user(), request: frame.without_body(), started: now };
        let config = peer.device.config();
        let limits = config.limits.as_ref();
        let known = self.known.as_ref();
        let mut asked = PathBuf::new();
        let started = Request::decode(&frame.body).map_err(Failure::system).and_then(|request| {
            asked.clone_from(&request.path);
            let known = known.filter(|(path, _)| *path == request.path).map(|(_, stat)| stat);
            Download::start(limits, &peer.device.transferred, &request.path, known, now)
        });
        match started {
            Ok(download) => {
                debug!("session {}: sending {:?}", peer.id, download.path());
                self.stray_acks = true;
                let shown = peer.info.set_transfer(Direction::Sent, download.path(), download.size(), now);
                self.state = State::Sending(Box::new(Sending { about, download, shown }));
            }
            Err(failure) => {
                log_refusal(peer, "download", &asked, &about, &failure);
                refuse(peer, frame, &failure);
            }
        }
    }

    fn start_receiving(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) {
        let about = About { user: frame.user(), request: frame.without_body(), started: now };
        let config = peer.device.config();
        let limits = config.limits.as_ref();
        self.stray_chunks = true;
        let (mut asked, mut size) = (PathBuf::new(), None);
        let started = Request::decode(&frame.body).map_err(Failure::system).and_then(|request| {
            asked.clone_from(&request.path);
            size = request.size;
            Upload::start(limits, &peer.device.transferred, &request, now)
        });
        match started {
            Ok(upload) => {
                debug!("session {}: receiving {:?}", peer.id, upload.path());
                let shown = peer.info.set_transfer(Direction::Received, upload.path(), size, now);
                self.state = State::Receiving(Box::new(Receiving { about, upload, shown }));
                peer.reply(&file::ack(&peer.id, 0, None));
            }
            // The one refusal without a code: the server's answer would be another one than upstream's.
            Err(failure) => {
                log_refusal(peer, "upload", &asked, &about, &failure);
                refuse(peer, frame, &Failure { denied: false, ..failure });
            }
        }
    }

    fn take_ack(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) {
        let State::Sending(sending) = &mut self.state else { return };
        match file::offset(frame) {
            Some(Ok(offset)) => {
                sending.download.ack(peer, offset);
                self.finish_sending(peer, now);
            }
            Some(Err(())) => self.fail(peer, frame, "invalid offset data type: require int64"),
            None => self.fail(peer, frame, "ack message: offset property cannot be blank"),
        }
    }

    fn finish_sending(&mut self, peer: &Peer, now: Instant) {
        match std::mem::take(&mut self.state) {
            State::Sending(sending) if sending.download.is_complete() => {
                let Sending { about, download, .. } = *sending;
                let record = record(peer, "download", download.path(), &about, download.sent(), now);
                log_success(record, download.digest());
            }
            other => self.state = other,
        }
    }

    fn take_chunk(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) {
        let State::Receiving(receiving) = &mut self.state else { return };
        let before = receiving.upload.received();
        let progress = receiving.upload.chunk(frame, &peer.device.transferred, now);
        let received = receiving.upload.received();
        receiving.shown.traffic.add_in((received - before) as usize, now);
        match progress {
            Ok(Progress::More) => {}
            Ok(Progress::End) => self.commit(peer),
            Err(text) => self.fail(peer, frame, &text),
        }
    }

    fn commit(&mut self, peer: &mut Peer) {
        let State::Receiving(receiving) = std::mem::take(&mut self.state) else { return };
        let Receiving { about, upload, shown } = *receiving;
        let record = record(peer, "upload", upload.path(), &about, upload.received(), Instant::now());
        match upload.commit(&peer.wake) {
            Ok(commit) => {
                let committing = Committing { about, commit, _shown: shown, give_up: None };
                self.state = State::Committing(Box::new(committing));
            }
            Err(text) => {
                log_failure(record, "failed", &text);
                tell_failure(peer, &about.request, &text);
            }
        }
    }

    fn finish_receiving(&mut self, peer: &mut Peer, result: Result<(), Failure>, now: Instant) {
        let State::Committing(committing) = std::mem::take(&mut self.state) else { return };
        let Committing { about, commit, .. } = *committing;
        let record = record(peer, "upload", &commit.path, &about, commit.size, now);
        match result {
            Ok(()) => {
                peer.reply(&file::ack(&peer.id, commit.size, user_of(&about)));
                log_success(record, commit.digest());
            }
            Err(failure) => {
                log_failure(record, failure.result(), &failure.text);
                tell_failure(peer, &about.request, &failure.text);
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
    fn fail(&mut self, peer: &mut Peer, cause: &Frame, text: &str) {
        self.abort_as(peer, "failed", text);
        tell_failure(peer, cause, text);
    }

    /// Ends an incomplete transfer, with `result` in the audit log.
    fn abort_as(&mut self, peer: &Peer, result: &str, why: &str) {
        let now = Instant::now();
        let (record, result) = match std::mem::take(&mut self.state) {
            State::Idle => return,
            State::Sending(sending) => {
                let Sending { about, download, .. } = &*sending;
                download.discard();
                (record(peer, "download", download.path(), about, download.sent(), now), result)
            }
            State::Receiving(receiving) => {
                let Receiving { about, upload, .. } = &*receiving;
                (record(peer, "upload", upload.path(), about, upload.received(), now), result)
            }
            State::Committing(committing) => {
                let Committing { about, commit, .. } = &*committing;
                commit.abandon();
                (record(peer, "upload", &commit.path, about, commit.size, now), "abandoned")
            }
        };
        log_failure(record, result, why);
    }
}

/// The part that all of a transfer's audit lines have in common.
fn record(peer: &Peer, direction: &str, path: &Path, about: &About, bytes: u64, now: Instant) -> Record {
    Record::new("transfer", Some(&peer.id), &about.user)
        .with("direction", direction)
        .path("path", path)
        .with("bytes", bytes)
        .since(about.started, now)
}

fn log_refusal(peer: &Peer, direction: &str, path: &Path, about: &About, failure: &Failure) {
    log_failure(record(peer, direction, path, about, 0, about.started), failure.result(), &failure.text);
}

fn tell_failure(peer: &mut Peer, cause: &Frame, text: &str) {
    peer.reply(&file::error(&peer.id, cause, text, None));
}

/// Refuses a request; a transfer in progress goes on.
fn refuse(peer: &mut Peer, cause: &Frame, failure: &Failure) {
    debug!("session {}: {}: {}", peer.id, cause.typ.escape_debug(), failure.text);
    let code = failure.denied.then_some(FORBIDDEN);
    peer.reply(&file::error(&peer.id, cause, &failure.text, code));
}

fn log_success(record: Record, digest: Sha256) {
    record.with("result", "ok").with("sha256", HEXLOWER.encode(&digest.finalize())).log(true);
}

fn log_failure(record: Record, result: &str, why: &str) {
    record.with("result", result).text("reason", why).log(false);
}

/// The user whom acks repeat, if any.
fn user_of(about: &About) -> Option<&str> {
    Some(about.user.as_str()).filter(|user| !user.is_empty())
}

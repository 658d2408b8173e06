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
use self::upload::{Commit, Progress, Upload};
use super::Context;
use super::info::{Info, TransferInfo};
use crate::audit::Record;
use crate::outbox::FrameSink;
use crate::proto::file::{self, FileInfo, Request};
use crate::proto::{Frame, MAX_TEXT, SessionId, UserId, clipped};
use crate::sys::wake::Wake;

/// Error code for violated limits: the server passes it on as the HTTP status.
const FORBIDDEN: u16 = 403;
/// Time for a commit in progress after the link is gone.
const HANG_UP_GRACE: Duration = Duration::from_secs(1);

const NONE_IN_PROGRESS: &str = "no file transfer in progress";

pub(crate) struct FileTransfer {
    context: Arc<Context>,
    id: SessionId,
    sink: FrameSink,
    wake: Arc<Wake>,
    info: Arc<Info>,
    state: State,
    /// The latest answer to `stat`: the client expects a download of that size.
    known: Option<(PathBuf, FileStat)>,
    /// Chunks of an earlier transfer may still arrive, and are ignored without an error.
    stray_chunks: bool,
    stray_acks: bool,
}

enum State {
    Idle,
    Sending(Box<Sending>),
    Receiving(Box<Receiving>),
    Committing(Box<Committing>),
}

/// A transfer, besides its bytes.
struct About {
    /// The request. Errors refer to it.
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
    /// Calls `wake` when a commit has ended.
    pub(crate) fn new(
        context: Arc<Context>,
        id: SessionId,
        sink: FrameSink,
        wake: Arc<Wake>,
        info: Arc<Info>,
    ) -> Self {
        FileTransfer {
            context,
            id,
            sink,
            wake,
            info,
            state: State::Idle,
            known: None,
            stray_chunks: false,
            stray_acks: false,
        }
    }

    /// True if nothing is left to do. A complete file is committed even after its session's end.
    pub(crate) fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Handles a frame of the file transfer protocol.
    pub(crate) fn handle(&mut self, frame: Frame, now: Instant) {
        match (&mut self.state, frame.typ.as_str()) {
            (_, file::STAT) => self.stat(&frame),
            (State::Idle, file::GET_FILE) => self.start_sending(frame, now),
            (State::Idle, file::PUT_FILE) => self.start_receiving(frame, now),
            (_, file::GET_FILE | file::PUT_FILE) => {
                self.refuse(&frame, &Failure::system("another file transfer is in progress"));
            }
            (State::Sending(_), file::ACK) => self.take_ack(&frame, now),
            (State::Receiving(_), file::FILE_CHUNK) => self.take_chunk(&frame, now),
            (_, file::ERROR) => self.take_error(&frame),
            (State::Sending(_), other @ file::FILE_CHUNK) => {
                let text = format!("received unexpected message type '{other}'; expected 'ack'");
                self.fail(&frame, &text);
            }
            (State::Receiving(_), other @ file::ACK) => {
                let text = format!("received unexpected message type '{other}' during file upload");
                self.fail(&frame, &text);
            }
            // On the way when their transfer ended.
            (_, file::ACK) if self.stray_acks => {}
            (_, file::FILE_CHUNK) if self.stray_chunks => {}
            (_, file::FILE_CHUNK | file::ACK) => self.refuse(&frame, &Failure::system(NONE_IN_PROGRESS)),
            (_, other) => {
                let text = format!("session: filetransfer message type '{other}' not supported");
                self.refuse(&frame, &Failure::system(text));
            }
        }
    }

    /// Does what is possible now.
    pub(crate) fn proceed(&mut self, now: Instant) {
        match &mut self.state {
            State::Idle | State::Receiving(_) => {}
            State::Sending(sending) => {
                let counters = &self.context.transferred;
                let request = sending.about.request.clone();
                let before = sending.download.sent();
                let result = sending.download.proceed(&self.id, &self.sink, counters, now);
                let sent = sending.download.sent();
                sending.shown.bytes.set(sent);
                self.info.traffic.bytes_out.add((sent - before) as usize);
                if let Err(failure) = result {
                    self.abort_as(failure.result(), &failure.text);
                    return self.refuse(&request, &failure);
                }
                self.finish_sending(now);
            }
            State::Committing(committing) => {
                if let Some(result) = committing.commit.try_result() {
                    return self.finish_receiving(result, now);
                }
                if committing.give_up.is_some_and(|at| now >= at) {
                    self.abort("the connection was lost");
                }
            }
        }
    }

    /// Acknowledges received chunks. To be called when the inbox is empty.
    pub(crate) fn acknowledge(&mut self) {
        if let State::Receiving(receiving) = &mut self.state {
            let user = user_of(&receiving.about);
            let acks = receiving.upload.due_acks().map(|offset| file::ack(&self.id, offset, user));
            self.sink.replies(acks);
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
    pub(crate) fn close(&mut self) {
        if !matches!(self.state, State::Committing(_)) {
            self.abort("the session was closed");
        }
    }

    pub(crate) fn hang_up(&mut self, now: Instant) {
        match &mut self.state {
            State::Committing(committing) => committing.give_up = Some(now + HANG_UP_GRACE),
            _ => self.abort("the connection was lost"),
        }
    }

    #[allow(clippy::useless_conversion, reason = "32-bit systems count in other types")]
    fn stat(&mut self, frame: &Frame) {
        let config = self.context.config();
        let limits = config.limits.as_ref();
        let found = Request::decode(&frame.body)
            .map_err(Failure::system)
            .and_then(|request| Ok((place::stat(limits, &request.path)?, request.path)));
        match found {
            Ok((stat, path)) => {
                let info = FileInfo {
                    path: path.to_string_lossy().into_owned(),
                    size: stat.st_size.into(),
                    uid: stat.st_uid,
                    gid: stat.st_gid,
                    mode: stat.st_mode,
                    modified: (stat.st_mtime.into(), u32::try_from(stat.st_mtime_nsec).unwrap_or(0)),
                };
                self.known = Some((path, stat));
                self.sink.reply(&file::file_info(&self.id, &info));
            }
            Err(failure) => self.refuse(frame, &failure),
        }
    }

    fn start_sending(&mut self, frame: Frame, now: Instant) {
        let about = About { user: frame.user(), request: frame, started: now };
        let config = self.context.config();
        let limits = config.limits.as_ref();
        let known = self.known.as_ref();
        let mut asked = PathBuf::new();
        let started = Request::decode(&about.request.body).map_err(Failure::system).and_then(|request| {
            asked.clone_from(&request.path);
            let known = known.filter(|(path, _)| *path == request.path).map(|(_, stat)| stat);
            Download::start(limits, &self.context.transferred, &request.path, known, now)
        });
        match started {
            Ok(download) => {
                debug!("session {}: sending {:?}", self.id, download.path());
                self.stray_acks = true;
                let shown = self.info.transfer("download", download.path(), download.size(), now);
                self.state = State::Sending(Box::new(Sending { about, download, shown }));
            }
            Err(failure) => {
                self.log_refusal("download", &asked, &about, &failure);
                self.refuse(&about.request, &failure);
            }
        }
    }

    fn start_receiving(&mut self, frame: Frame, now: Instant) {
        let about = About { user: frame.user(), request: frame, started: now };
        let config = self.context.config();
        let limits = config.limits.as_ref();
        self.stray_chunks = true;
        let (mut asked, mut size) = (PathBuf::new(), None);
        let started = Request::decode(&about.request.body).map_err(Failure::system).and_then(|request| {
            asked.clone_from(&request.path);
            size = request.size;
            Upload::start(limits, &self.context.transferred, &request, now)
        });
        match started {
            Ok(upload) => {
                debug!("session {}: receiving {:?}", self.id, upload.path());
                let shown = self.info.transfer("upload", upload.path(), size, now);
                self.state = State::Receiving(Box::new(Receiving { about, upload, shown }));
                self.sink.reply(&file::ack(&self.id, 0, None));
            }
            // The one refusal without a code: the server's answer would be another one than upstream's.
            Err(failure) => {
                self.log_refusal("upload", &asked, &about, &failure);
                self.refuse(&about.request, &Failure { denied: false, ..failure });
            }
        }
    }

    fn take_ack(&mut self, frame: &Frame, now: Instant) {
        let State::Sending(sending) = &mut self.state else { return };
        match file::offset(frame) {
            Some(Ok(offset)) => {
                sending.download.ack(offset);
                self.finish_sending(now);
            }
            Some(Err(())) => self.fail(frame, "invalid offset data type: require int64"),
            None => self.fail(frame, "ack message: offset property cannot be blank"),
        }
    }

    fn finish_sending(&mut self, now: Instant) {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Sending(sending) if sending.download.is_complete() => {
                let Sending { about, download, .. } = *sending;
                let record = self.record("download", download.path(), &about, download.sent(), now);
                log_success(record, download.digest());
            }
            other => self.state = other,
        }
    }

    fn take_chunk(&mut self, frame: &Frame, now: Instant) {
        let State::Receiving(receiving) = &mut self.state else { return };
        let before = receiving.upload.received();
        let progress = receiving.upload.chunk(frame, &self.context.transferred, now);
        let received = receiving.upload.received();
        receiving.shown.bytes.set(received);
        self.info.traffic.bytes_in.add((received - before) as usize);
        match progress {
            Ok(Progress::More) => {}
            Ok(Progress::End) => self.commit(),
            Err(text) => self.fail(frame, &text),
        }
    }

    fn commit(&mut self) {
        let State::Receiving(receiving) = std::mem::replace(&mut self.state, State::Idle) else { return };
        let Receiving { about, upload, shown } = *receiving;
        let record = self.record("upload", upload.path(), &about, upload.received(), Instant::now());
        match upload.commit(&self.wake) {
            Ok(commit) => {
                let committing = Committing { about, commit, _shown: shown, give_up: None };
                self.state = State::Committing(Box::new(committing));
            }
            Err(text) => {
                log_failure(record, "failed", &text);
                self.tell_failure(&about.request, &text);
            }
        }
    }

    fn finish_receiving(&mut self, result: Result<(), Failure>, now: Instant) {
        let State::Committing(committing) = std::mem::replace(&mut self.state, State::Idle) else { return };
        let Committing { about, commit, .. } = *committing;
        let record = self.record("upload", &commit.path, &about, commit.size, now);
        match result {
            Ok(()) => {
                self.sink.reply(&file::ack(&self.id, commit.size, user_of(&about)));
                log_success(record, commit.digest());
            }
            Err(failure) => {
                log_failure(record, failure.result(), &failure.text);
                self.tell_failure(&about.request, &failure.text);
            }
        }
    }

    /// The part that all of a transfer's audit lines have in common.
    fn record(&self, direction: &str, path: &Path, about: &About, bytes: u64, now: Instant) -> Record {
        Record::new("transfer", Some(&self.id), &about.user)
            .with("direction", direction)
            .text("path", path.to_string_lossy())
            .with("bytes", bytes)
            .since(about.started, now)
    }

    fn log_refusal(&self, direction: &str, path: &Path, about: &About, failure: &Failure) {
        log_failure(self.record(direction, path, about, 0, about.started), failure.result(), &failure.text);
    }

    /// Handles the client's error, which ends the transfer.
    fn take_error(&mut self, frame: &Frame) {
        let text = crate::proto::control::parse::<crate::proto::control::Error>(&frame.body)
            .ok()
            .and_then(|e| e.err)
            .unwrap_or_default();
        info!("session {}: error from the peer: {:?}", self.id, clipped(&text, MAX_TEXT));
        self.close();
    }

    /// Ends the transfer in progress because of `cause`, and reports that.
    fn fail(&mut self, cause: &Frame, text: &str) {
        self.abort(text);
        self.tell_failure(cause, text);
    }

    fn tell_failure(&self, cause: &Frame, text: &str) {
        self.sink.reply(&file::error(&self.id, cause, text, None));
    }

    /// Refuses a request; a transfer in progress goes on.
    fn refuse(&self, cause: &Frame, failure: &Failure) {
        debug!("session {}: {}: {}", self.id, cause.typ.escape_debug(), failure.text);
        let code = failure.denied.then_some(FORBIDDEN);
        self.sink.reply(&file::error(&self.id, cause, &failure.text, code));
    }

    fn abort(&mut self, why: &str) {
        self.abort_as("failed", why);
    }

    /// Ends an incomplete transfer, with `result` in the audit log.
    fn abort_as(&mut self, result: &str, why: &str) {
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Idle => {}
            State::Sending(sending) => {
                self.sink.discard_chunks();
                let Sending { about, download, .. } = &*sending;
                let record = self.record("download", download.path(), about, download.sent(), Instant::now());
                log_failure(record, result, why);
            }
            State::Receiving(receiving) => {
                let Receiving { about, upload, .. } = &*receiving;
                let record = self.record("upload", upload.path(), about, upload.received(), Instant::now());
                log_failure(record, result, why);
            }
            State::Committing(committing) => {
                let Committing { about, commit, .. } = &*committing;
                commit.abandon();
                let record = self.record("upload", &commit.path, about, commit.size, Instant::now());
                log_failure(record, "abandoned", why);
            }
        }
    }
}

impl Drop for FileTransfer {
    fn drop(&mut self) {
        // Only after a panic is there still something under way.
        self.abort("internal error");
    }
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

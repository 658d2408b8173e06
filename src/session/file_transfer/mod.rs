//! File transfer: protocol 2 for one session, one file at a time, in the session's thread.

mod download;
mod place;
pub(crate) mod rate;
mod temporary;
mod upload;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use log::debug;
use sha2::{Digest, Sha256};

use self::download::Download;
use self::place::{Failure, Known, Result};
use self::rate::Direction;
use self::upload::{Commit, Upload};
use super::peer::Peer;
use super::stats::{Traffic, TransferInfo};
use crate::audit::Record;
use crate::encoding::hex;
use crate::proto::Frame;
use crate::proto::control;
use crate::proto::file::{self, Request};
use crate::sys::lock;

/// The server passes it on as the HTTP status.
const FORBIDDEN: u16 = 403;
const HANG_UP_GRACE: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(crate) struct FileTransfer {
    transfer: Option<Box<Transfer>>,
    known: Option<Known>,
    /// Set once there may be late chunks or acks of an earlier transfer, which are ignored.
    stray_chunks: bool,
    stray_acks: bool,
}

struct Transfer {
    about: About,
    stage: Stage,
}

enum Stage {
    Sending(Download),
    Receiving(Upload),
    Committing(Commit),
}

struct About {
    info: Arc<TransferInfo>,
    /// Without its body, for errors.
    request: Frame,
    bytes: u64,
    digest: Sha256,
}

impl About {
    fn count(&mut self, payload: &[u8], peer: &Peer, now: Instant) {
        self.bytes += payload.len() as u64;
        self.digest.update(payload);
        peer.device.transferred.add(self.info.direction, payload.len() as u64, now);
        match self.info.direction {
            Direction::Sent => self.info.traffic.add_out(payload.len()),
            Direction::Received => self.info.traffic.add_in(payload.len(), now),
        }
    }

    /// Acknowledges `offset` bytes. Repeats the request's user, as upstream does.
    fn ack(&self, peer: &Peer, offset: u64) -> Frame {
        let user = self.request.props.str("user_id").filter(|user| !user.is_empty());
        file::ack(&peer.id, offset, user)
    }

    /// Writes the audit log. An error has the `result` and the reason.
    fn log(&self, peer: &Peer, outcome: std::result::Result<(), (&str, &str)>) {
        let record = Record::new("transfer", Some(&peer.id), &self.request.user())
            .with("direction", self.info.direction.name())
            .path("path", &self.info.path)
            .with("bytes", self.bytes)
            .since(self.info.traffic.since, Instant::now());
        match outcome {
            Ok(()) => {
                let digest = hex(&self.digest.clone().finalize());
                record.with("result", "ok").with("sha256", digest).log(true);
            }
            Err((result, why)) => record.with("result", result).text("reason", why).log(false),
        }
    }
}

impl FileTransfer {
    pub(crate) fn is_idle(&self) -> bool {
        self.transfer.is_none()
    }

    pub(crate) fn is_sending(&self) -> bool {
        matches!(self.transfer.as_deref(), Some(Transfer { stage: Stage::Sending(_), .. }))
    }

    pub(crate) fn handle(&mut self, peer: &mut Peer, frame: Frame, now: Instant) {
        if self.is_idle() {
            // The client waits for each answer, so it has read the last one.
            peer.credit.prove_all();
        }
        let stage = self.transfer.as_deref_mut().map(|transfer| &mut transfer.stage);
        let result = match (stage, frame.typ.as_str()) {
            (_, file::STAT) => self.stat(peer, &frame),
            (None, file::GET_FILE | file::PUT_FILE) => self.start(peer, &frame, now),
            (_, file::GET_FILE | file::PUT_FILE) => Err("another file transfer is in progress".into()),
            (Some(Stage::Sending(download)), file::ACK) => match file::offset(&frame) {
                Some(Ok(offset)) => {
                    download.ack(peer, offset);
                    self.finish_sending(peer);
                    Ok(())
                }
                Some(Err(())) => self.fail(peer, "invalid offset data type: require int64"),
                None => self.fail(peer, "ack message: offset property cannot be blank"),
            },
            (Some(Stage::Receiving(_)), file::FILE_CHUNK) => self.take_chunk(peer, &frame, now),
            (_, file::ERROR) => {
                let error = control::parse::<control::Error>(&frame.body).unwrap_or_default();
                peer.log_error(error);
                return self.close(peer);
            }
            (Some(Stage::Sending(_)), file::FILE_CHUNK) => {
                self.fail(peer, "received unexpected message type 'file_chunk'; expected 'ack'")
            }
            (Some(Stage::Receiving(_)), file::ACK) => {
                self.fail(peer, "received unexpected message type 'ack' during file upload")
            }
            // In flight when their transfer ended.
            (_, file::ACK) if self.stray_acks => return,
            (_, file::FILE_CHUNK) if self.stray_chunks => return,
            (_, file::FILE_CHUNK | file::ACK) => Err("no file transfer in progress".into()),
            (_, other) => Err(format!("session: filetransfer message type '{other}' not supported").into()),
        };
        if let Err(failure) = result {
            refuse(peer, &frame, &failure);
        }
    }

    pub(crate) fn proceed(&mut self, peer: &mut Peer, now: Instant) {
        let Some(Transfer { about, stage, .. }) = self.transfer.as_deref_mut() else { return };
        match stage {
            Stage::Receiving(_) => {}
            Stage::Sending(download) => match download.proceed(about, peer, now) {
                Ok(()) => self.finish_sending(peer),
                Err(failure) => {
                    let request = about.request.clone();
                    self.abort(peer, &failure);
                    refuse(peer, &request, &failure);
                }
            },
            Stage::Committing(commit) => {
                if let Ok(result) = commit.result.try_recv() {
                    self.finish_receiving(peer, result);
                } else if let Some((_, why)) = commit.give_up.filter(|(at, _)| now >= *at) {
                    self.abort(peer, &why.into());
                }
            }
        }
    }

    /// Acknowledges received chunks. Called when the inbox is empty.
    pub(crate) fn acknowledge(&mut self, peer: &Peer) {
        if let Some(Transfer { about, stage: Stage::Receiving(upload), .. }) = self.transfer.as_deref_mut() {
            // These acks need no credit: the server sends a chunk only for an ack that it has read.
            for offset in upload.due_acks.drain(..) {
                peer.sink.reply(&about.ack(peer, offset));
            }
        }
    }

    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.transfer.as_deref()?.stage {
            Stage::Committing(commit) => commit.give_up.map(|(at, _)| at),
            _ => None,
        }
    }

    /// A complete file is still committed.
    pub(crate) fn close(&mut self, peer: &Peer) {
        if !matches!(self.transfer.as_deref(), Some(Transfer { stage: Stage::Committing(_), .. })) {
            self.abort(peer, &"the session was closed".into());
        }
    }

    pub(crate) fn hang_up(&mut self, peer: &Peer, why: &'static str, now: Instant) {
        match self.transfer.as_deref_mut() {
            // The server has told its user of an empty file's success already: it waits for no ack.
            Some(Transfer { about: About { bytes: 0, .. }, stage: Stage::Committing(_), .. }) => {}
            Some(Transfer { stage: Stage::Committing(commit), .. }) => {
                commit.give_up = Some((now + HANG_UP_GRACE, why));
            }
            _ => self.abort(peer, &why.into()),
        }
    }

    fn stat(&mut self, peer: &mut Peer, frame: &Frame) -> Result<()> {
        let path = Request::decode(&frame.body)?.path;
        self.known = None;
        let result = place::stat(peer.device.config().limits.as_ref(), &path, &peer.share.memory);
        let record = Record::new("stat", Some(&peer.id), &frame.user()).path("path", &path);
        match &result {
            Ok(known) => record.with("size", known.stat.st_size).with("result", "ok").log(true),
            Err(e) => record.with("result", e.result()).text("reason", &e.text).log(false),
        }
        let stat = &self.known.insert(result?).stat;
        let owner = (stat.st_uid, stat.st_gid);
        // 32-bit systems count in other types.
        #[allow(clippy::useless_conversion)]
        let modified = (stat.st_mtime.into(), u32::try_from(stat.st_mtime_nsec).unwrap_or(0));
        peer.reply(&file::file_info(&peer.id, &path, stat.st_size, owner, stat.st_mode, modified));
        Ok(())
    }

    fn start(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) -> Result<()> {
        let receives = frame.typ == file::PUT_FILE;
        let mut info = TransferInfo {
            direction: if receives { Direction::Received } else { Direction::Sent },
            path: PathBuf::new(),
            size: None,
            traffic: Traffic::new(now, Some(&peer.info.traffic)),
        };
        self.stray_chunks |= receives;
        let begun = Request::decode(&frame.body).map_err(Failure::from).and_then(|request| {
            info.path.clone_from(&request.path);
            Ok(match info.direction {
                Direction::Sent => Stage::Sending(Download::start(peer, self.known.take(), &mut info)?),
                Direction::Received => Stage::Receiving(Upload::start(peer, &request, &mut info)?),
            })
        });
        let (info, request) = (Arc::new(info), frame.without_body());
        let about = About { info, request, bytes: 0, digest: Sha256::new() };
        let stage = begun.inspect_err(|failure| about.log(peer, Err((failure.result(), &failure.text))))?;
        debug!("session {}: {} of {:?}", peer.id, about.info.direction.name(), about.info.path);
        *lock(&peer.info.transfer) = Arc::downgrade(&about.info);
        self.transfer = Some(Box::new(Transfer { about, stage }));
        self.stray_acks |= !receives;
        if receives {
            peer.reply(&file::ack(&peer.id, 0, None));
        }
        Ok(())
    }

    fn finish_sending(&mut self, peer: &Peer) {
        let done = |stage: &Stage| matches!(stage, Stage::Sending(download) if download.is_complete());
        if let Some(transfer) = self.transfer.take_if(|transfer| done(&transfer.stage)) {
            transfer.about.log(peer, Ok(()));
        }
    }

    fn take_chunk(&mut self, peer: &mut Peer, frame: &Frame, now: Instant) -> Result<()> {
        let Some(Transfer { about, stage, .. }) = self.transfer.as_deref_mut() else { return Ok(()) };
        let Stage::Receiving(upload) = stage else { return Ok(()) };
        let mut result = upload.chunk(about, frame, peer, now);
        if result.is_ok() && frame.body.is_empty() {
            result = upload.commit(peer).map(|commit| *stage = Stage::Committing(commit));
        }
        result.or_else(|failure| self.fail(peer, failure))
    }

    fn finish_receiving(&mut self, peer: &mut Peer, result: Result<()>) {
        let Some(transfer) = self.transfer.take() else { return };
        let Transfer { about, stage, .. } = *transfer;
        // First, since a file that is open for writing can't be executed.
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

    fn fail(&mut self, peer: &Peer, failure: impl Into<Failure>) -> Result<()> {
        let failure = failure.into();
        self.abort(peer, &failure);
        Err(failure)
    }

    pub(crate) fn abort(&mut self, peer: &Peer, failure: &Failure) {
        let Some(transfer) = self.transfer.take() else { return };
        let Transfer { about, stage, .. } = *transfer;
        let mut result = failure.result();
        match &stage {
            Stage::Sending(download) => download.discard.store(true, Ordering::SeqCst),
            Stage::Receiving(_) => {}
            Stage::Committing(commit) => {
                // The target stays as it is unless the commit has replaced it already.
                commit.temporary.give_up();
                result = "abandoned";
            }
        }
        about.log(peer, Err((result, &failure.text)));
    }
}

fn refuse(peer: &mut Peer, cause: &Frame, failure: &Failure) {
    debug!("session {}: {}: {}", peer.id, cause.typ.escape_debug(), failure.text);
    // Not for uploads: the server would answer otherwise than with upstream's agent.
    let upload = matches!(cause.typ.as_str(), file::PUT_FILE | file::FILE_CHUNK);
    let code = (failure.denied && !upload).then_some(FORBIDDEN);
    peer.reply(&file::error(&peer.id, cause, &failure.text, code));
}

//! A token in a file that another program updates, watched with inotify.
//!
//! Watches the file, the directory of its path and, if symbolic links are involved, the directory that the file really
//! is in. inotify does not report changes elsewhere (a directory further up, a mount, another host), so the file is
//! also read at an interval.

use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::mem;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::PollFlags;
use nix::sys::inotify::{AddWatchFlags as Mask, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

use super::{AuthEvent, Credentials, Source};
use crate::sys::{PollSet, reason, writers};

/// In bytes. No server accepts a larger token, and freed blocks up to this size are wiped.
const LARGEST: usize = 16 * 1024;
/// A token that is missing for this long has been withdrawn, rather than being replaced.
const SETTLING: Duration = Duration::from_secs(1);
/// A writer has this long for its next write, or to close the file.
const WRITING: Duration = Duration::from_secs(10);
const INTERVAL: Duration = Duration::from_secs(10);

/// The file is complete after these.
const COMPLETE: Mask = Mask::IN_CLOSE_WRITE.union(Mask::IN_MOVED_TO);

#[derive(Default)]
pub(crate) struct TokenFile {
    path: PathBuf,
    server_url: String,
    inotify: Option<Inotify>,
    watches: Vec<WatchDescriptor>,
    /// The path without symbolic links; `None` if it led nowhere.
    real: Option<PathBuf>,
    current: Option<Credentials>,
    asked: bool,
    last_read: Option<Instant>,
    /// When to read the file after a change, unless an event comes first.
    settles: Option<Instant>,
    /// The last warning about watching the file, reading it, its readers, its writers; `None` if resolved.
    unwatched: Option<String>,
    unread: Option<String>,
    exposed: Option<String>,
    writable: Option<String>,
    told_to_wait: bool,
}

impl TokenFile {
    pub(crate) fn new(path: &Path, server_url: &str) -> Self {
        let (path, server_url) = (path.to_owned(), server_url.to_owned());
        TokenFile { path, server_url, asked: true, ..TokenFile::default() }
    }
}

impl Source for TokenFile {
    fn watch<'a>(&'a self, set: &mut PollSet<'a>) {
        self.inotify.iter().for_each(|inotify| set.add(inotify.as_fd(), PollFlags::POLLIN));
        // A question is answered at once.
        let due = self.asked.then(Instant::now).or(self.settles);
        set.until(&[due.or(self.last_read.map(|at| at + INTERVAL))]);
    }

    fn process(&mut self, now: Instant) -> io::Result<Vec<AuthEvent>> {
        let complete = self.receive(now);
        let before = self.current.clone();
        let due = match self.settles {
            // Don't read while another program writes, not even for a question.
            Some(at) => now >= at,
            None => self.asked || self.last_read.is_none_or(|at| now >= at + INTERVAL),
        };
        if complete || due {
            self.look(now, due && self.settles.is_some());
        }
        let changed = (before != self.current).then(|| AuthEvent::Changed(self.current.clone()));
        let answered = mem::take(&mut self.asked).then(|| AuthEvent::Answered(Ok(self.current.clone())));
        Ok(changed.into_iter().chain(answered).collect())
    }

    fn ask(&mut self, _: Instant) {
        self.asked = true;
    }

    fn fetch(&mut self, _: Instant) {
        if !mem::replace(&mut self.told_to_wait, true) {
            info!("waiting for a new token in {}", self.path.display());
        }
    }
}

impl TokenFile {
    /// Returns whether the file should be read now.
    fn receive(&mut self, now: Instant) -> bool {
        // One read per turn: further events keep the descriptor readable.
        let events = match self.inotify.as_ref().map(Inotify::read_events) {
            None | Some(Err(Errno::EAGAIN | Errno::EINTR)) => return false,
            Some(Ok(events)) => events,
            Some(Err(_)) => {
                self.inotify = None;
                return true;
            }
        };
        // A link beside the file may have been swapped, as Kubernetes does with secrets: then any name may be the
        // file's.
        let moved = fs::canonicalize(&self.path).ok() != self.real;
        let (paths, mut complete) = ([Some(&self.path), self.real.as_ref()], false);
        for InotifyEvent { wd, mask, name, .. } in events {
            let overflow = mask.contains(Mask::IN_Q_OVERFLOW);
            // An event without a name is about the file itself, or the end of a watch.
            let named = |name| paths.iter().flatten().any(|path| path.file_name() == Some(name));
            let ours = moved || name.as_deref().is_none_or(named);
            if !(overflow || ours && self.watches.contains(&wd)) {
                continue;
            }
            let modified = mask.contains(Mask::IN_MODIFY);
            complete = mask.intersects(COMPLETE) || complete && !modified;
            self.settles = self.settles.max(Some(now + if modified { WRITING } else { SETTLING }));
        }
        if moved && !complete {
            self.watch_all();
        }
        complete
    }

    /// A missing token revokes the current one only once `settled`.
    fn look(&mut self, now: Instant, settled: bool) {
        (self.settles, self.last_read) = (None, Some(now));
        // Watch before reading, so that no change in between is missed.
        self.watch_all();
        let shown = self.path.display().to_string();
        match look_into(&self.path, &self.server_url) {
            Ok((credentials, mode)) => {
                let exposed = format!("{shown} can be read by others than its owner");
                complain(&mut self.exposed, Some(exposed).filter(|_| mode & 0o044 != 0));
                // Another device's token would connect this device to that one's account.
                let writers = writers(&self.path).join("; it ");
                let writable = Some(format!("{shown} may be replaced: it {writers}"));
                complain(&mut self.writable, writable.filter(|_| !writers.is_empty()));
                complain(&mut self.unread, None);
                if self.current.as_ref() != Some(&credentials) {
                    debug!("a token from {shown}");
                    self.told_to_wait = false;
                    self.current = Some(credentials);
                }
            }
            Err(_) if !settled && self.current.is_some() => self.settles = Some(now + SETTLING),
            Err(why) => {
                complain(&mut self.unread, Some(format!("no token from {shown}: {}", reason(&why))));
                // A device that lacks something, and storage that fails, withdraw no token.
                use Errno::{EHOSTDOWN, EIO, EMFILE, ENFILE, ENOMEM, ENOTCONN, ESTALE, ETIMEDOUT};
                let errno = why.raw_os_error().map(Errno::from_raw);
                let fails = [EHOSTDOWN, EIO, EMFILE, ENFILE, ENOMEM, ENOTCONN, ESTALE, ETIMEDOUT];
                if errno.is_none_or(|errno| !fails.contains(&errno)) {
                    self.current = None;
                }
            }
        }
    }

    fn watch_all(&mut self) {
        self.real = fs::canonicalize(&self.path).ok();
        let failure = self.try_watch_all().err().map(|e| {
            // Remove all of them: some would use up the user's limit and still miss changes.
            (self.inotify, self.watches) = (None, Vec::new());
            let (path, seconds, why) = (self.path.display(), INTERVAL.as_secs(), reason(&e.into()));
            format!("{path} can't be watched: {why}; looking at it every {seconds} s")
        });
        complain(&mut self.unwatched, failure);
    }

    fn try_watch_all(&mut self) -> nix::Result<()> {
        let inotify = match &mut self.inotify {
            Some(inotify) => inotify,
            none => none.insert(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?),
        };
        let events =
            COMPLETE | Mask::IN_MODIFY | Mask::IN_ATTRIB | Mask::IN_CREATE | Mask::IN_DELETE | Mask::IN_MOVE;
        let (mut watches, mut refused) = (Vec::new(), Ok(()));
        let paths = [Some(&*self.path), self.real.as_deref()].into_iter().flatten();
        // The file itself too: it may be a mount, or in a directory that we may enter but not read.
        for path in paths.filter_map(Path::parent).chain([&*self.path]) {
            match inotify.add_watch(path, events) {
                Ok(watch) => watches.push(watch),
                Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(Errno::EACCES) => refused = Err(Errno::EACCES),
                Err(e) => return Err(e),
            }
        }
        for old in mem::replace(&mut self.watches, watches) {
            if !self.watches.contains(&old) {
                // Fails if the kernel has already removed the watch.
                let _ = inotify.rm_watch(old);
            }
        }
        if self.watches.is_empty() { refused } else { Ok(()) }
    }
}

/// Warns, unless `text` repeats the last warning.
fn complain(last: &mut Option<String>, text: Option<String>) {
    if *last != text {
        text.iter().for_each(|text| warn!("{text}"));
        *last = text;
    }
}

/// Returns the mode of the file, too.
pub(crate) fn look_into(path: &Path, server_url: &str) -> io::Result<(Credentials, u32)> {
    // Opening a FIFO must not block, nor a terminal become our controlling one.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    let stat = file.metadata()?;
    if !stat.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::with_capacity(LARGEST);
    if file.take(LARGEST as u64).read_to_end(&mut bytes)? == LARGEST {
        return Err(io::Error::other("it is too large for a token"));
    }
    let token = match std::str::from_utf8(&bytes).map(str::trim) {
        // As HTTP headers allow.
        Ok(token) if token.bytes().all(|byte| byte.is_ascii_graphic()) => token,
        _ => return Err(io::Error::other("it has something else in it")),
    };
    // The URL is never empty: the configuration requires one.
    let credentials = Credentials::new(token, server_url).ok_or_else(|| io::Error::other("it is empty"))?;
    Ok((credentials, stat.mode()))
}

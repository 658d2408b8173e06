//! A token in a file that another program keeps up to date, watched with inotify.
//!
//! Runs in the supervisor's thread. Each directory on the way to the file, through all symbolic links, is watched for
//! the one name in it that leads on; so whatever is replaced, there or further up, is noticed, as is what doesn't
//! exist yet. The file itself is watched, too: when it is a mount of its own, its directory's events are elsewhere.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use log::{debug, info, warn};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::PollFlags;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use super::{AuthEvent, Credentials, Source};
use crate::sys::reason;

/// In bytes: no server takes a larger token, and freed blocks up to this size are wiped.
const LARGEST: usize = 16 * 1024;
/// A token that is missing for this long is withdrawn, not just being replaced.
const SETTLING: Duration = Duration::from_secs(1);
/// A writer is expected to write more, or to close the file, within this time.
const WRITING: Duration = Duration::from_secs(10);
/// Interval of looking at what inotify can't watch.
const RETRY: Duration = Duration::from_secs(10);
/// MAXSYMLINKS, as in the kernel.
const MAX_LINKS: usize = 40;

/// Events of a name on the way to the file.
const PLACE: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_ATTRIB);
const CONTENT: AddWatchFlags =
    AddWatchFlags::IN_MODIFY.union(AddWatchFlags::IN_CLOSE_WRITE).union(AddWatchFlags::IN_ATTRIB);
/// Events that mean that new content is complete.
const COMPLETE: AddWatchFlags = AddWatchFlags::IN_CLOSE_WRITE.union(AddWatchFlags::IN_MOVED_TO);

pub(crate) struct TokenFile {
    path: PathBuf,
    server_url: String,
    inotify: Option<Inotify>,
    watches: Vec<Watch>,
    /// `None` before the first look.
    current: Option<Option<Credentials>>,
    /// The supervisor waits for an answer.
    asked: bool,
    /// When to look at the file next, unless an event comes first.
    settles: Option<Instant>,
    retry: Option<Instant>,
    /// A file system on the way was unmounted: no event will tell when it is back.
    unmounted: bool,
    /// The last complaint of each kind that still holds: about watching, the file, its mode.
    unwatched: String,
    unread: String,
    exposed: String,
    told_to_wait: bool,
}

/// A watched name in a directory, or the file itself.
struct Watch {
    descriptor: WatchDescriptor,
    name: Option<OsString>,
}

impl TokenFile {
    /// Looks at the file at the first `process`.
    pub(crate) fn new(path: &Path, server_url: &str) -> Self {
        TokenFile {
            path: path.to_owned(),
            server_url: server_url.to_owned(),
            inotify: None,
            watches: Vec::new(),
            current: None,
            asked: true,
            settles: None,
            retry: None,
            unmounted: false,
            unwatched: String::new(),
            unread: String::new(),
            exposed: String::new(),
            told_to_wait: false,
        }
    }
}

impl Source for TokenFile {
    fn watch(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        self.inotify.as_ref().map(|inotify| (inotify.as_fd(), PollFlags::POLLIN))
    }

    fn deadline(&self) -> Option<Instant> {
        // An answer is due at once.
        let answer = self.asked.then(Instant::now);
        answer.or(self.settles).or(self.retry)
    }

    fn process(&mut self, now: Instant) -> Result<Vec<AuthEvent>, super::SourceError> {
        let mut events = Vec::new();
        let complete = self.receive(now);
        let due = self.settles.or(self.retry).is_some_and(|at| now >= at);
        // A question reads the file, but not while another program writes it.
        if complete || due || self.settles.is_none() && self.asked || self.current.is_none() {
            let before = self.current.clone();
            self.look(now, due && self.settles.is_some());
            if before.is_some() && before != self.current {
                events.extend(self.current.clone().map(AuthEvent::Changed));
            }
        }
        if mem::take(&mut self.asked) {
            events.extend(self.current.clone().map(AuthEvent::Answered));
        }
        Ok(events)
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
    /// Reads inotify's events. True if the file should be read now.
    fn receive(&mut self, now: Instant) -> bool {
        // Events that don't fit into one read keep the descriptor readable.
        let events = match self.inotify.as_ref().map(Inotify::read_events) {
            None | Some(Err(Errno::EAGAIN | Errno::EINTR)) => return false,
            Some(Ok(events)) => events,
            Some(Err(_)) => {
                self.inotify = None;
                return true;
            }
        };
        let (mut complete, mut moved) = (false, false);
        for event in events {
            let mask = event.mask;
            let lost = mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
            let over = mask.intersects(AddWatchFlags::IN_IGNORED | AddWatchFlags::IN_UNMOUNT);
            let ours = |w: &Watch| w.descriptor == event.wd && (over || w.name == event.name);
            if !lost && !self.watches.iter().any(ours) {
                continue;
            }
            let modified = mask.contains(AddWatchFlags::IN_MODIFY);
            complete = mask.intersects(COMPLETE) || complete && !modified;
            self.unmounted |= mask.contains(AddWatchFlags::IN_UNMOUNT);
            moved |= lost || over || mask.intersects(PLACE);
            self.settles = self.settles.max(Some(now + if modified { WRITING } else { SETTLING }));
        }
        if moved && !complete {
            self.watch_all(now);
        }
        complete
    }

    /// Reads the file. A missing token revokes the current one only once that has `settled`.
    fn look(&mut self, now: Instant, settled: bool) {
        self.settles = None;
        // Watch before reading, so that no change in between is missed.
        self.watch_all(now);
        let found = look_into(&self.path, &self.server_url);
        let shown = self.path.display().to_string();
        match found {
            Ok((credentials, mode)) => {
                self.unmounted = false;
                self.unread.clear();
                if mode & 0o044 == 0 {
                    self.exposed.clear();
                } else {
                    complain(&mut self.exposed, format!("{shown} can be read by others than its owner"));
                }
                let credentials = Some(Some(credentials));
                if self.current != credentials {
                    debug!("a token from {shown}");
                    self.told_to_wait = false;
                }
                self.current = credentials;
            }
            Err(why) => {
                if !settled && matches!(self.current, Some(Some(_))) {
                    self.settles = Some(now + SETTLING);
                    return;
                }
                complain(&mut self.unread, format!("no token from {shown}: {}", reason(&why)));
                self.current = Some(None);
            }
        }
        if self.unmounted {
            self.retry = Some(now + RETRY);
        }
    }

    /// Watches the directories that the path leads through now, and no others.
    fn watch_all(&mut self, now: Instant) {
        self.retry = None;
        match self.try_watch_all() {
            Ok(()) => self.unwatched.clear(),
            Err(e) => {
                // Incomplete watches would miss changes, and may use up the user's limit of watches.
                self.inotify = None;
                self.retry = Some(now + RETRY);
                let (path, seconds) = (self.path.display(), RETRY.as_secs());
                let why = reason(&e);
                let text = format!("{path} can't be watched: {why}; looking at it every {seconds} s");
                complain(&mut self.unwatched, text);
            }
        }
    }

    fn try_watch_all(&mut self) -> io::Result<()> {
        let inotify = match self.inotify.take() {
            Some(inotify) => inotify,
            None => {
                self.watches.clear();
                Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?
            }
        };
        let watches = walk(&inotify, &self.path)?;
        for old in mem::replace(&mut self.watches, watches) {
            if !self.watches.iter().any(|new| new.descriptor == old.descriptor) {
                // The kernel may have removed the watch.
                let _ = inotify.rm_watch(old.descriptor);
            }
        }
        self.inotify = Some(inotify);
        Ok(())
    }
}

/// Logs a complaint unless it repeats the last one of its kind.
fn complain(last: &mut String, text: String) {
    if *last != text {
        warn!("{text}");
        *last = text;
    }
}

/// Adds a watch for each step of the path, as far as it exists.
fn walk(inotify: &Inotify, path: &Path) -> io::Result<Vec<Watch>> {
    let mut watches = Vec::new();
    let mut ahead = steps(path);
    let (mut place, mut links) = (PathBuf::from("/"), 0);
    // Whether the last directory could be watched. Those before may belong to others, who let one pass but not look.
    let mut seen = Ok(());
    while let Some(name) = ahead.pop_front() {
        if name == ".." {
            place.pop();
            continue;
        }
        let mask = if ahead.is_empty() { PLACE | CONTENT } else { PLACE };
        match inotify.add_watch(&place, mask | AddWatchFlags::IN_ONLYDIR) {
            Ok(descriptor) => {
                watches.push(Watch { descriptor, name: Some(name.clone()) });
                seen = Ok(());
            }
            Err(Errno::EACCES) => seen = Err(Errno::EACCES),
            // The previous watch reports when the directory is created.
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(e) => return Err(e.into()),
        }
        let next = place.join(&name);
        match fs::read_link(&next) {
            Ok(target) => {
                links += 1;
                if links > MAX_LINKS {
                    return Ok(watches);
                }
                if target.is_absolute() {
                    place = PathBuf::from("/");
                }
                for step in steps(&target).into_iter().rev() {
                    ahead.push_front(step);
                }
            }
            // It is no link.
            Err(e) if e.kind() == ErrorKind::InvalidInput => place = next,
            Err(_) => return seen.map(|()| watches).map_err(Into::into),
        }
    }
    match inotify.add_watch(&place, CONTENT) {
        Ok(descriptor) => watches.push(Watch { descriptor, name: None }),
        Err(Errno::EACCES | Errno::ENOENT) => seen?,
        Err(e) => return Err(e.into()),
    }
    Ok(watches)
}

/// The path's names and each "..".
fn steps(path: &Path) -> VecDeque<OsString> {
    let step = |component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsStr::new("..").to_owned()),
        _ => None,
    };
    path.components().filter_map(step).collect()
}

/// The credentials in the file, and its mode. For doctor.
pub(crate) fn look_into(path: &Path, server_url: &str) -> io::Result<(Credentials, u32)> {
    let (bytes, mode) = read(path)?;
    let credentials = Credentials::new(parse(&bytes)?, server_url);
    Ok((credentials.ok_or_else(|| io::Error::other("there is no server's URL for it"))?, mode))
}

/// The file's content and mode. `read_to_end` would leave pieces of the token in memory as its buffer grows.
fn read(path: &Path) -> io::Result<(Vec<u8>, u32)> {
    // Opening a FIFO mustn't block, nor a terminal become our controlling one.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let mut file: File = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    let stat = file.metadata()?;
    if !stat.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let (mut bytes, mut length) = (vec![0; LARGEST], 0);
    while length < LARGEST {
        match file.read(&mut bytes[length..]) {
            Ok(0) => {
                bytes.truncate(length);
                return Ok((bytes, stat.mode()));
            }
            Ok(more) => length += more,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Err(io::Error::other("it is too large for a token"))
}

/// Strips white space. Fails if the rest can't be in an HTTP header.
fn parse(bytes: &[u8]) -> io::Result<&str> {
    match std::str::from_utf8(bytes).map(str::trim) {
        Ok("") => Err(io::Error::other("it is empty")),
        Ok(token) if token.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(token),
        _ => Err(io::Error::other("it has something else in it")),
    }
}

//! One file transfer after the other, in a folder of its own, beside a model that knows each answer, what each file holds,
//! and that nothing else changes.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;

use super::{config, next, session};
use crate::outbox::Queue;
use crate::proto::{FILE_TRANSFER, Frame, Map, SessionId, file};
use crate::session::device::Device;
use crate::session::file_transfer::FileTransfer;
use crate::session::peer::Peer;
use crate::sys::poll_one;

/// As in the agent, for a link that has not been measured.
const CHUNK: usize = 2 * 1024;
const IN_FLIGHT: usize = 16;
const QUEUED: usize = 2;

/// The step that ends the session.
const CLOSE: u8 = 11;
const MAX_SIZE: usize = 5000;
const LENGTHS: [usize; 5] = [1, 2, CHUNK, 2999, MAX_SIZE];

/// Below the folder that the limits name, or meant to be outside.
const NAMES: [&str; 16] = [
    "a",
    "b",
    "long",
    "empty",
    "new",
    "d/new",
    "d/",
    "d",
    "link",
    "out",
    "../secret",
    "..",
    "d/../a",
    "d/up/secret",
    "",
    "no/where",
];
/// The first ones are files, or can be.
const PLAIN: usize = 6;

/// The folder that is watched.
static ALL: LazyLock<PathBuf> = LazyLock::new(|| {
    let all = std::env::temp_dir().join(format!("fuzz-files-{}", std::process::id()));
    fill(&all);
    all
});
static AT_FIRST: LazyLock<BTreeMap<PathBuf, Entry>> = LazyLock::new(|| look(&ALL));

#[derive(Debug, Clone, PartialEq)]
enum Entry {
    File(Vec<u8>),
    Link(PathBuf),
    Folder,
}

enum Transfer {
    None,
    Sending(Sending),
    Receiving(Upload),
    Committing(Upload),
}

struct Upload {
    content: Vec<u8>,
    /// Nothing speaks against it.
    sure: bool,
}

struct Sending {
    content: Vec<u8>,
    sent: usize,
    /// The chunks that the client has not acknowledged, by their ends.
    in_flight: VecDeque<usize>,
    at_end: bool,
}

struct Model {
    peer: Peer,
    queue: Queue,
    files: FileTransfer,
    limited: bool,
    replaces: bool,
    largest: usize,
    transfer: Transfer,
    /// Chunks that wait for the writer: of which download, if it is still to be sent, their offsets, and their bytes.
    queued: VecDeque<(Option<u32>, usize, Vec<u8>)>,
    downloads: u32,
    /// There has been an upload, or a download: chunks and acks may be on the way.
    had: [bool; 2],
    seen: BTreeMap<PathBuf, Entry>,
}

/// The first byte says what is limited; then each three are a step and what it is about.
pub fn run(data: &[u8]) {
    let [limited, steps @ ..] = data else { return };
    let on = |bit: u8| limited >> bit & 1 == 1;
    let text = format!(
        r#"{{ "Limits": {{ "Enabled": {}, "FileTransfer": {{ "Chroot": {:?}, "FollowSymLinks": {}, "AllowOverwrite": {},
            "MaxFileSize": {}, "RegularFilesOnly": {} }} }} }}"#,
        on(0),
        ALL.join("root"),
        on(1),
        on(2),
        if on(3) { MAX_SIZE } else { 0 },
        on(4)
    );
    let device = Device::new(config(&text));
    let (peer, queue) = session(&device, &SessionId::new("s").expect("a name"), "u");
    let mut model = Model {
        peer,
        queue,
        files: FileTransfer::default(),
        limited: on(0),
        replaces: on(2),
        largest: if on(0) && on(3) { MAX_SIZE } else { usize::MAX },
        transfer: Transfer::None,
        queued: VecDeque::new(),
        downloads: 0,
        had: [false; 2],
        seen: AT_FIRST.clone(),
    };
    for step in steps.chunks_exact(3) {
        model.step(step[0], step[1].into(), step[2].into());
    }
    model.step(CLOSE, 0, 0);
    model.settle();
    let changed = model.seen != *AT_FIRST;
    assert_eq!(look(&ALL), model.seen);
    drop(model);
    assert_eq!(device.memory.taken(), 0);
    if changed {
        fs::remove_dir_all(&*ALL).expect("remove all");
        fill(&ALL);
    }
}

fn fill(all: &Path) {
    let root = all.join("root");
    fs::create_dir_all(root.join("d")).expect("a folder");
    for (name, length) in
        [("root/a", 1), ("root/b", 2 * CHUNK), ("root/long", 60_000), ("root/empty", 0), ("secret", 6)]
    {
        fs::write(all.join(name), vec![length as u8; length]).expect("a file");
    }
    for (name, to) in [("link", "a"), ("out", "../secret"), ("d/up", "../..")] {
        symlink(to, root.join(name)).expect("a link");
    }
}

/// All that is below a folder.
fn look(folder: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let kind = fs::symlink_metadata(&path).expect("its kind").file_type();
        let entry = match () {
            () if kind.is_symlink() => Entry::Link(fs::read_link(&path).expect("a link")),
            () if kind.is_dir() => {
                found.extend(look(&path));
                Entry::Folder
            }
            () => Entry::File(fs::read(&path).expect("a file")),
        };
        found.insert(path, entry);
    }
    found
}

/// The body of a request.
fn request(path: &Path, source: Option<&str>, size: Option<usize>) -> Vec<u8> {
    let body = Map::new().with_str("path", path.to_str()).with_str("src_path", source);
    size.map_or(body.clone(), |size| body.with_i64("size", size as i64)).finish()
}

fn offset(offset: i64) -> Map {
    Map::new().with_i64("offset", offset)
}

/// That the answer is an error, or an ack of so many bytes.
fn expect(answer: Option<Frame>, ack: Option<usize>) {
    let answer =
        answer.map(|answer| (answer.props.int("offset").filter(|_| answer.typ == "ack"), answer.typ));
    let expected = ack.map_or((None, "error"), |bytes| (Some(bytes as i64), "ack"));
    assert_eq!(answer.as_ref().map(|(offset, typ)| (*offset, typ.as_str())), Some(expected));
}

impl Model {
    fn step(&mut self, step: u8, a: usize, b: usize) {
        let received = match &self.transfer {
            Transfer::Receiving(upload) => upload.content.len(),
            _ => 0,
        };
        match step % 12 {
            0 => self.put(a % NAMES.len(), b),
            1 | 2 => self.chunk(received, LENGTHS[a % LENGTHS.len()], b as u8),
            3 => self.chunk(b, a, 0),
            4 => self.chunk(received, 0, 0),
            5 => self.ack(match (a % 4, &self.transfer) {
                (0, Transfer::Sending(sending)) => sending.in_flight.front().map(|end| *end as i64),
                (1, _) => Some(i64::MAX),
                (2, _) => None,
                _ => Some(b as i64 - 1),
            }),
            6 => self.get(a % NAMES.len()),
            7 => self.stat(a % NAMES.len()),
            8 => (0..=a % 64).for_each(|_| self.write()),
            9 => self.settle(),
            10 if a % 2 == 0 => expect(self.handle("other", Map::new(), Vec::new()), None),
            10 => {
                assert!(self.handle(file::ERROR, Map::new(), Vec::new()).is_none());
                self.end();
            }
            _ => {
                self.files.close(&self.peer);
                self.end();
            }
        }
        self.proceed();
    }

    /// The session takes a frame. Returns its answer.
    fn handle(&mut self, typ: &str, props: Map, body: Vec<u8>) -> Option<Frame> {
        let frame = Frame::new(FILE_TRANSFER, typ, Some(&self.peer.id)).with_props(props).with_body(body);
        self.files.handle(&mut self.peer, frame, Instant::now());
        self.files.acknowledge(&self.peer);
        let answer = next(&mut self.queue, false);
        assert!(next(&mut self.queue, false).is_none());
        answer
    }

    fn path(&self, name: usize) -> PathBuf {
        ALL.join("root").join(NAMES[name])
    }

    fn is_idle(&self) -> bool {
        matches!(self.transfer, Transfer::None)
    }

    fn put(&mut self, name: usize, b: usize) {
        let (path, idle) = (self.path(name), self.is_idle());
        let size = [Some(b), Some(MAX_SIZE + 1), None, None][b % 4];
        let answer =
            self.handle(file::PUT_FILE, Map::new(), request(&path, Some("x").filter(|_| b >= 128), size));
        if !idle {
            return expect(answer, None);
        }
        self.had[0] = true;
        let fits = size.is_none_or(|size| size <= self.largest);
        let may = !self.limited || self.replaces || !path.exists();
        let sure = name < PLAIN && fits && may;
        if sure || answer.as_ref().is_some_and(|answer| answer.typ == "ack") {
            assert!(fits);
            self.transfer = Transfer::Receiving(Upload { content: Vec::new(), sure });
            return expect(answer, Some(0));
        }
        expect(answer, None);
    }

    fn chunk(&mut self, at: usize, length: usize, fill: u8) {
        let answer = self.handle(file::FILE_CHUNK, offset(at as i64), vec![fill; length]);
        match &mut self.transfer {
            Transfer::None | Transfer::Committing(_) if self.had[0] => assert!(answer.is_none()),
            Transfer::None | Transfer::Committing(_) => expect(answer, None),
            Transfer::Receiving(Upload { content, .. }) if at == content.len() && length == 0 => {
                assert!(answer.is_none());
                let Transfer::Receiving(upload) = std::mem::replace(&mut self.transfer, Transfer::None)
                else {
                    return;
                };
                self.transfer = Transfer::Committing(upload);
            }
            Transfer::Receiving(Upload { content, .. })
                if at == content.len() && content.len() + length < self.largest =>
            {
                content.extend(vec![fill; length]);
                match content.len() - 1 {
                    0 => assert!(answer.is_none()),
                    bytes => expect(answer, Some(bytes)),
                }
            }
            Transfer::Receiving(_) | Transfer::Sending(_) => {
                expect(answer, None);
                self.end();
            }
        }
    }

    fn ack(&mut self, bytes: Option<i64>) {
        let answer = self.handle(file::ACK, bytes.map_or(Map::new(), offset), Vec::new());
        match (&mut self.transfer, bytes) {
            (Transfer::None | Transfer::Committing(_), _) if self.had[1] => assert!(answer.is_none()),
            (Transfer::None | Transfer::Committing(_), _) => expect(answer, None),
            (Transfer::Sending(sending), Some(bytes @ 0..)) => {
                assert!(answer.is_none());
                while sending.in_flight.pop_front_if(|end| *end as i64 <= bytes).is_some() {}
            }
            _ => {
                expect(answer, None);
                self.end();
            }
        }
    }

    fn get(&mut self, name: usize) {
        let (path, idle) = (self.path(name), self.is_idle());
        let content = fs::canonicalize(&path).and_then(|real| Ok((fs::read(&real)?, real)));
        let answer = self.handle(file::GET_FILE, Map::new(), request(&path, None, None));
        let content = content.ok().filter(|(content, _)| content.len() <= self.largest);
        let sure = name < PLAIN && content.is_some();
        if !idle || (!sure && answer.is_some()) {
            return expect(answer, None);
        }
        assert!(answer.is_none());
        let (content, real) = content.expect("a file");
        assert!(!self.limited || real.starts_with(ALL.join("root")));
        (self.had[1], self.downloads) = (true, self.downloads + 1);
        self.transfer =
            Transfer::Sending(Sending { content, sent: 0, in_flight: VecDeque::new(), at_end: false });
    }

    fn stat(&mut self, name: usize) {
        let path = self.path(name);
        let answer = self.handle(file::STAT, Map::new(), request(&path, None, None));
        let real = fs::canonicalize(&path);
        if answer.is_some_and(|answer| answer.typ == file::FILE_INFO) {
            assert!(!self.limited || real.expect("a file").starts_with(ALL.join("root")));
        } else {
            // A commit may have come in between.
            let commits = matches!(self.transfer, Transfer::Committing(_));
            assert!(real.is_err() || (self.limited && name >= PLAIN) || commits);
        }
    }

    /// The writer sends a chunk.
    fn write(&mut self) {
        while self.queued.pop_front_if(|(download, ..)| download.is_none()).is_some() {}
        let sent = next(&mut self.queue, true);
        let sent =
            sent.map(|sent| (sent.typ, sent.props.int("offset").map(|at| at as usize), sent.body.to_vec()));
        let expected = self.queued.pop_front();
        assert_eq!(sent, expected.map(|(_, at, bytes)| (file::FILE_CHUNK.to_owned(), Some(at), bytes)));
        self.proceed();
    }

    /// The transfer ends, unless its file is complete.
    fn end(&mut self) {
        if let Transfer::Sending(_) = &self.transfer {
            let own = self.queued.iter_mut().filter(|(download, ..)| *download == Some(self.downloads));
            own.for_each(|(download, ..)| *download = None);
        }
        if !matches!(self.transfer, Transfer::Committing(_)) {
            self.transfer = Transfer::None;
        }
    }

    /// Waits for a commit.
    fn settle(&mut self) {
        while let Transfer::Committing(_) = &self.transfer {
            let limit = Instant::now() + Duration::from_secs(100);
            assert!(!poll_one(&*self.peer.wake, PollFlags::POLLIN, Some(limit)).expect("poll").is_empty());
            self.peer.wake.clear();
            self.proceed();
        }
    }

    fn proceed(&mut self) {
        self.files.proceed(&mut self.peer, Instant::now());
        if let Transfer::Sending(Sending { content, sent, in_flight, at_end }) = &mut self.transfer {
            while !*at_end && in_flight.len() < IN_FLIGHT && self.queued.len() < QUEUED {
                let chunk: Vec<_> = content[*sent..].iter().take(CHUNK).copied().collect();
                *at_end = chunk.is_empty();
                in_flight.push_back(*sent + chunk.len());
                self.queued.push_back((Some(self.downloads), *sent, chunk));
                *sent = in_flight[in_flight.len() - 1];
            }
            if *at_end && in_flight.len() <= 1 {
                self.transfer = Transfer::None;
            }
        }
        match &self.transfer {
            Transfer::Committing(_) if self.files.is_idle() => self.committed(),
            _ => assert_eq!(self.files.is_idle(), self.is_idle()),
        }
    }

    /// A file has its name, or none.
    fn committed(&mut self) {
        let Transfer::Committing(upload) = std::mem::replace(&mut self.transfer, Transfer::None) else {
            return;
        };
        let (answer, now) = (next(&mut self.queue, false), look(&ALL));
        let mut changed = now.iter().filter(|(path, entry)| self.seen.get(*path) != Some(entry));
        if upload.sure || answer.as_ref().is_some_and(|answer| answer.typ == file::ACK) {
            expect(answer, Some(upload.content.len()));
            let file = Entry::File(upload.content);
            match changed.next() {
                Some((path, entry)) => {
                    assert_eq!(*entry, file);
                    let root = ALL.join("root");
                    assert!(
                        !self.limited
                            || (path.starts_with(root) && (self.replaces || !self.seen.contains_key(path)))
                    );
                }
                // It was like that before.
                None => assert!(self.seen.values().any(|entry| *entry == file)),
            }
        } else {
            expect(answer, None);
        }
        assert!(changed.next().is_none() && self.seen.keys().all(|path| now.contains_key(path)));
        self.seen = now;
    }
}

//! Files up and down, each byte compared.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::stage::{Chance, eventually_if_linked};
use crate::files::refused;
use crate::harness::device::Device;
use crate::harness::msg::{CONTROL, FILES};
use crate::harness::rest::{Form, Rest, path_body};
use crate::harness::wait::Watched;

/// The largest file.
const LARGEST: usize = 8 << 20;
/// Targets of each uploader.
const TARGETS: usize = 3;

/// A file's content, which needn't be kept to be known.
#[derive(Debug, Clone)]
struct Content {
    seed: u64,
    size: usize,
}

impl Content {
    fn new(chance: &mut Chance, size: usize) -> Content {
        Content { seed: chance.number(), size }
    }

    fn bytes(&self) -> Vec<u8> {
        Chance(self.seed).bytes(self.size)
    }
}

/// A file that is uploaded to.
#[derive(Debug)]
struct Target {
    path: PathBuf,
    /// What it may hold: what was uploaded last, and of later uploads those that were cut.
    allowed: Vec<Content>,
    /// The last upload's end, by a cut even.
    ended: Instant,
}

/// A complete upload whose link is cut may take its target's name for another second, after a later one even.
const LATE: Duration = Duration::from_secs(2);

/// Notes an upload's end.
struct Ends<'a>(&'a Uploads, usize);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.targets.update(|targets| targets[self.1].ended = Instant::now());
    }
}

impl Target {
    /// Old or new, but whole.
    fn check(&self) {
        let found = fs::read(&self.path).unwrap_or_else(|e| panic!("read {}: {e}", self.path.display()));
        let good = self.allowed.iter().any(|c| c.size == found.len() && c.bytes() == found);
        assert!(good, "{} holds {} strange bytes of {:?}", self.path.display(), found.len(), self.allowed);
    }
}

/// One uploader's targets.
#[derive(Debug, Default)]
pub struct Uploads {
    dir: PathBuf,
    targets: Watched<Vec<Target>>,
}

impl Uploads {
    pub fn new(dir: PathBuf, chance: &mut Chance) -> Arc<Uploads> {
        fs::create_dir(&dir).unwrap();
        let target = |n: usize| {
            let (path, content) = (dir.join(format!("target-{n}")), Content::new(chance, 1000));
            fs::write(&path, content.bytes()).unwrap();
            Target { path, allowed: vec![content], ended: Instant::now() }
        };
        let targets = (0..TARGETS).map(target).collect();
        Arc::new(Uploads { dir, targets: Watched::new(targets) })
    }

    pub fn job(&self, device: &Device, chance: &mut Chance) -> usize {
        match chance.below(12) {
            0 => self.refused(device, chance),
            1 => self.abandoned(device, chance),
            2 => self.put(device, chance.below(TARGETS), &Content::new(chance, 0), 0o644),
            _ => {
                let size = chance.size(LARGEST);
                let content = Content::new(chance, size);
                let mode = [0o600, 0o644, 0o755][chance.below(3)];
                self.put(device, chance.below(TARGETS), &content, mode)
            }
        }
    }

    fn put(&self, device: &Device, at: usize, content: &Content, mode: u32) -> usize {
        let path = self.targets.update(|targets| {
            let target = &mut targets[at];
            target.check();
            if target.allowed.len() > 1 && target.ended.elapsed() < LATE {
                return None;
            }
            target.allowed.push(content.clone());
            Some(target.path.clone())
        });
        let Some(path) = path else { return 0 };
        let _ends = Ends(self, at);
        let form = Form { mode: Some(mode), ..Form::to(&path) };
        let before = path.metadata().unwrap().ino();
        let result = Rest::upload(device, &form, &content.bytes());
        assert_eq!(result, Ok(()), "{}", path.display());
        if content.size == 0 {
            // The commit of an empty file is not acknowledged, and the file it replaces may be empty, too.
            eventually_if_linked(device, "the empty file", || path.metadata().unwrap().ino() != before);
        }
        self.targets.update(|targets| {
            targets[at].allowed = vec![content.clone()];
            targets[at].check();
        });
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, mode);
        content.size
    }

    fn refused(&self, device: &Device, chance: &mut Chance) -> usize {
        let (path, text) = match chance.below(2) {
            0 => (self.dir.clone(), "conflicting file path: cannot overwrite directory".to_owned()),
            _ => {
                let path = self.dir.join("missing/file");
                let why = format!("open {}: no such file or directory", path.display());
                (path, format!("failed to create target file: failed to create file: {why}"))
            }
        };
        assert_eq!(Rest::upload(device, &Form::to(path), b"data"), Err(refused(400, &text)));
        0
    }

    /// The client goes away half-way.
    fn abandoned(&self, device: &Device, chance: &mut Chance) -> usize {
        let path = self.targets.peek(|targets| targets[chance.below(TARGETS)].path.clone());
        let rest = Rest::open(device);
        rest.announce(&Form::to(path)).unwrap();
        device.discard(&rest.sid);
        let size = chance.size(60_000);
        for (n, chunk) in chance.bytes(size).chunks(4096).enumerate() {
            rest.send(FILES, "file_chunk", Some(n as u64 * 4096), chunk);
        }
        rest.close();
        0
    }

    /// In a quiet moment.
    pub fn check(&self) {
        self.targets.peek(|targets| targets.iter().for_each(Target::check));
        let names = fs::read_dir(&self.dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let strange: Vec<String> = names.filter(|name| !name.starts_with("target-")).collect();
        assert!(strange.is_empty(), "left in {}: {strange:?}", self.dir.display());
    }

    /// Uploads to each target, which removes what a killed agent has left.
    pub fn sweep(&self, device: &Device, chance: &mut Chance) {
        for at in 0..TARGETS {
            self.put(device, at, &Content::new(chance, 5000), 0o600);
        }
    }
}

/// Files to be downloaded.
#[derive(Debug)]
pub struct Downloads {
    dir: PathBuf,
    files: Vec<(String, Vec<u8>)>,
}

impl Downloads {
    pub fn new(dir: &Path, chance: &mut Chance) -> Arc<Downloads> {
        let dir = dir.to_owned();
        fs::create_dir(&dir).unwrap();
        let make = |size: usize| {
            let (path, bytes) = (dir.join(format!("{size}")), chance.bytes(size));
            fs::write(&path, &bytes).unwrap();
            (path.to_str().unwrap().to_owned(), bytes)
        };
        let files = [0, 1, 2047, 2048, 100_000, 262_145, 1 << 20, 3_000_001, LARGEST].map(make).into();
        nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        Arc::new(Downloads { dir, files })
    }

    pub fn job(&self, device: &Device, chance: &mut Chance) -> usize {
        let (path, bytes) = &self.files[chance.below(self.files.len())];
        match chance.below(10) {
            0 => {
                let path = self.dir.join("missing");
                let refusal = Rest::download(device, path.to_str().unwrap()).unwrap_err();
                assert!(refusal.text.ends_with("missing: no such file or directory"), "{refusal:?}");
                0
            }
            1 => {
                let path = self.dir.join("fifo");
                let refusal = Rest::download(device, path.to_str().unwrap()).unwrap_err();
                assert_eq!(refusal, refused(400, "path is not a regular file"));
                0
            }
            2 => {
                // The client goes away half-way.
                let rest = Rest::open(device);
                rest.ask("get_file", &path_body(path));
                rest.next();
                device.discard(&rest.sid);
                rest.send(CONTROL, "close", None, b"");
                0
            }
            _ => {
                let got = Rest::download(device, path).unwrap();
                assert_eq!((got.size as usize, got.bytes.len()), (bytes.len(), bytes.len()), "{path}");
                assert!(got.bytes == *bytes, "{path} came changed");
                bytes.len()
            }
        }
    }
}

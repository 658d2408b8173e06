use super::*;
use crate::sys::thread;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const FOLLOW: Rules = Rules { beneath: false, follow_links: true };
const BENEATH: Rules = Rules { beneath: true, follow_links: true };
const NO_LINKS: Rules = Rules { beneath: false, follow_links: false };
const STRICT: Rules = Rules { beneath: true, follow_links: false };

const ITSELF: OFlag = OFlag::O_PATH.union(OFlag::O_NOFOLLOW);
const LISTED: OFlag = OFlag::O_RDONLY.union(OFlag::O_DIRECTORY);

type Open = fn(BorrowedFd<'_>, &Path, OFlag, Rules) -> nix::Result<OwnedFd>;

/// The kernel's answer, however often renames elsewhere disturb it.
fn kernel(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> nix::Result<OwnedFd> {
    loop {
        match ask_kernel(dir, path, flags | OFlag::O_CLOEXEC, rules) {
            Err(Errno::EAGAIN) => {}
            answer => return answer,
        }
    }
}

fn walked(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> nix::Result<OwnedFd> {
    walk(dir, path, flags | OFlag::O_CLOEXEC, rules)
}

const WALK: (&str, Open) = ("walk", walked);

/// Those that follow links beneath a directory.
fn followers() -> Vec<(&'static str, Open)> {
    let all: [(&str, Open); 2] = [("open", open), ("openat2", kernel)];
    all.into_iter().filter(|_| follows_links()).collect()
}

fn implementations() -> Vec<(&'static str, Open)> {
    followers().into_iter().chain([WALK]).collect()
}

fn content(fd: OwnedFd) -> String {
    let mut text = String::new();
    File::from(reopen(fd.as_fd(), OFlag::O_RDONLY).unwrap()).read_to_string(&mut text).unwrap();
    text
}

fn directory(path: &Path) -> File {
    File::open(path).unwrap()
}

/// `base/in` is where paths start; `base/out` is what must stay out of reach.
fn inside_and_outside() -> (TempDir, File) {
    let base = tempfile::tempdir().unwrap();
    for dir in ["in", "in/dir", "out"] {
        fs::create_dir(base.path().join(dir)).unwrap();
    }
    for file in ["in/file", "in/dir/file"] {
        fs::write(base.path().join(file), "inside").unwrap();
    }
    for file in ["file", "out/file"] {
        fs::write(base.path().join(file), "outside").unwrap();
    }
    let start = directory(&base.path().join("in"));
    (base, start)
}

#[test]
fn no_path_leads_out() {
    let (_base, start) = inside_and_outside();
    let ways_out = [
        "..",
        "../",
        "../file",
        "../in/file",
        "dir/../..",
        "dir/../../out/file",
        "./.././out/file",
        "/",
        "//etc/passwd",
        "/etc/passwd",
        "/proc/self/root/etc/passwd",
    ];
    for (name, open) in implementations() {
        for path in ways_out {
            for (flags, rules) in [(OFlag::O_PATH, BENEATH), (ITSELF, STRICT), (LISTED, STRICT)] {
                let error = open(start.as_fd(), path.as_ref(), flags, rules).unwrap_err();
                assert_eq!(error, Errno::EXDEV, "{name}: {path} {flags:?}");
            }
        }
    }
}

#[test]
fn no_link_leads_out() {
    let (base, start) = inside_and_outside();
    let at = |name: &str| base.path().join("in").join(name);
    let outside = base.path().join("out");
    symlink("/", at("root")).unwrap();
    symlink(&outside, at("absolute")).unwrap();
    symlink("../out", at("relative")).unwrap();
    symlink(outside.join("file"), at("absolute-file")).unwrap();
    symlink("../out/file", at("relative-file")).unwrap();
    symlink("..", at("parent")).unwrap();
    symlink("dir/../..", at("detour")).unwrap();
    symlink("relative", at("two-steps")).unwrap();
    symlink("../relative", at("dir/back-and-out")).unwrap();
    symlink("dir/../../in/file", at("out-and-in")).unwrap();
    symlink(at("file"), at("absolute-inside")).unwrap();
    symlink("../new", at("dangling")).unwrap();
    let ways_out = [
        "root",
        "root/etc/passwd",
        "absolute/file",
        "absolute/",
        "relative/file",
        "relative/",
        "absolute-file",
        "relative-file",
        "parent",
        "parent/file",
        "parent/in/file",
        "detour/out/file",
        "two-steps/file",
        "dir/back-and-out/file",
        "dir/../relative/file",
        "out-and-in",
        "absolute-inside",
        "dangling",
    ];
    for path in ways_out {
        for flags in [OFlag::O_PATH, LISTED] {
            for (name, open) in followers() {
                let error = open(start.as_fd(), path.as_ref(), flags, BENEATH).unwrap_err();
                assert_eq!(error, Errno::EXDEV, "{name}: {path} {flags:?}");
            }
            let error = walked(start.as_fd(), path.as_ref(), flags, BENEATH).unwrap_err();
            assert_eq!(error, Errno::ELOOP, "walk: {path} {flags:?}");
        }
    }
}

#[test]
fn links_are_followed_only_as_allowed() {
    let (base, start) = inside_and_outside();
    symlink("dir", base.path().join("in/link")).unwrap();
    symlink("file", base.path().join("in/file-link")).unwrap();
    let paths = ["link/file", "file-link", "dir/../link//./file"];
    for path in paths {
        for (name, open) in followers() {
            let fd = open(start.as_fd(), path.as_ref(), OFlag::O_PATH, BENEATH).unwrap();
            assert_eq!(content(fd), "inside", "{name}: {path}");
        }
        let fd = walked(start.as_fd(), path.as_ref(), OFlag::O_PATH, FOLLOW).unwrap();
        assert_eq!(content(fd), "inside", "walk: {path}");
        // Without openat2 the agent refuses them whatever the limits allow.
        let error = walked(start.as_fd(), path.as_ref(), OFlag::O_PATH, BENEATH).unwrap_err();
        assert_eq!(error, Errno::ELOOP, "walk: {path}");
    }
    for (name, open) in implementations() {
        for (path, rules) in paths.into_iter().flat_map(|path| [(path, NO_LINKS), (path, STRICT)]) {
            let error = open(start.as_fd(), path.as_ref(), OFlag::O_PATH, rules).unwrap_err();
            assert_eq!(error, Errno::ELOOP, "{name}: {path}");
        }
        let error = open(start.as_fd(), "link/file".as_ref(), ITSELF, STRICT).unwrap_err();
        assert_eq!(error, Errno::ELOOP, "{name}");
        let fd = open(start.as_fd(), "file-link".as_ref(), ITSELF, STRICT).unwrap();
        assert!(File::from(fd).metadata().unwrap().is_symlink(), "{name}");
    }
}

#[test]
fn odd_paths_have_their_errors() {
    let (_base, start) = inside_and_outside();
    let cases = [
        ("file\0/x", OFlag::O_PATH, Errno::EINVAL),
        ("none\0", OFlag::O_PATH, Errno::EINVAL),
        ("none", OFlag::O_PATH, Errno::ENOENT),
        ("file/", OFlag::O_PATH, Errno::ENOTDIR),
        ("file", LISTED, Errno::ENOTDIR),
        ("file/none", OFlag::O_PATH, Errno::ENOTDIR),
    ];
    for (name, open) in implementations() {
        for (path, flags, expected) in cases {
            let error = open(start.as_fd(), path.as_ref(), flags, STRICT).unwrap_err();
            assert_eq!(error, expected, "{name}: {path} {flags:?}");
        }
        let fd = open(start.as_fd(), "dir/..".as_ref(), LISTED, STRICT).unwrap();
        assert_eq!(fcntl(&fd, FcntlArg::F_GETFD).unwrap(), libc::FD_CLOEXEC, "{name}");
    }
}

#[test]
fn reopening_gives_the_same_file_whatever_has_its_name_now() {
    let (base, start) = inside_and_outside();
    let checked = open(start.as_fd(), "file".as_ref(), OFlag::O_PATH, STRICT).unwrap();
    fs::rename(base.path().join("file"), base.path().join("in/file")).unwrap();
    let opened = reopen(checked.as_fd(), OFlag::O_RDONLY).unwrap();
    assert_eq!(fcntl(&opened, FcntlArg::F_GETFD).unwrap(), libc::FD_CLOEXEC);
    assert_eq!(content(opened), "inside");

    symlink("dir/file", base.path().join("in/link")).unwrap();
    let link = open(start.as_fd(), "link".as_ref(), ITSELF, STRICT).unwrap();
    assert_eq!(reopen(link.as_fd(), OFlag::O_RDONLY).unwrap_err(), Errno::ELOOP);
}

// The walk against the kernel, over a generated tree and generated paths.

/// Knuth's MMIX generator: the same tree and the same paths in each run.
struct Lcg(u64);

impl Lcg {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % limit
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    /// Up to `most` components, with the odd doubled or trailing slash.
    fn path(&mut self, most: usize, names: &[&str]) -> String {
        let mut path = String::new();
        for _ in 0..=self.below(most) {
            if !path.is_empty() {
                path.push_str(self.pick(&["/", "/", "/", "/", "/", "/", "//", "///", "/./"]));
            }
            path.push_str(match self.below(8) {
                0 => "..",
                1 => ".",
                _ => self.pick(names),
            });
        }
        if self.below(6) == 0 {
            path.push_str(self.pick(&["/", "//", "/.", "/.."]));
        }
        path
    }
}

/// Names that generated paths and link texts are made of: directories, files, links with generated texts, and links with
/// a fixed meaning.
const NAMES: &[&str] = &[
    "n1", "n2", "n1", "n2", "n1", "n2", "n3", "f1", "f2", "l1", "l2", "l3", "l4", "new", "self", "up", "out",
    "root", "proc",
];

/// Returns the temporary directory and the start, with a directory `out` beside it.
fn tree(random: &mut Lcg) -> (TempDir, PathBuf) {
    let base = tempfile::tempdir().unwrap();
    let (start, out) = (base.path().join("start"), base.path().join("out"));
    for top in [&start, &out] {
        for dir in ["", "n1", "n2", "n1/n1", "n1/n2", "n2/n1", "n2/n3", "n1/n1/n2", "n1/n1/n3"] {
            let dir = top.join(dir);
            fs::create_dir_all(&dir).unwrap();
            for file in ["f1", "f2"] {
                fs::write(dir.join(file), "x").unwrap();
            }
            for link in ["l1", "l2", "l3", "l4"] {
                symlink(random.path(3, NAMES), dir.join(link)).unwrap();
            }
        }
        for (link, text) in
            [("self", "self"), ("up", ".."), ("out", out.to_str().unwrap()), ("root", "/"), ("proc", "/proc")]
        {
            symlink(text, top.join(link)).unwrap();
        }
    }
    (base, start)
}

#[test]
fn the_walk_opens_what_the_kernel_opens_and_nothing_outside() {
    let mut random = Lcg(0x6d65_6e64_6572);
    let (_base, start) = tree(&mut random);
    let dir = directory(&start);
    let identity = |fd: &OwnedFd| {
        let stat = fstat(fd).unwrap();
        (stat.st_dev, stat.st_ino)
    };
    let (mut alike, mut refused) = (0, 0);
    for _ in 0..3000 {
        let path = random.path(6, NAMES);
        let path = if random.below(20) == 0 { format!("/{path}") } else { path };
        for flags in [OFlag::O_PATH, ITSELF, LISTED, DIRECTORY] {
            for rules in [BENEATH, STRICT, NO_LINKS] {
                let ours = walked(dir.as_fd(), path.as_ref(), flags, rules);
                if rules.beneath
                    && let Ok(fd) = &ours
                {
                    let place = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
                    assert!(place.starts_with(&start), "{path:?} {flags:?} {rules:?}: {place:?}");
                }
                // With links the walk is stricter.
                if rules.follow_links || !follows_links() {
                    continue;
                }
                match kernel(dir.as_fd(), path.as_ref(), flags, rules) {
                    Ok(theirs) => {
                        assert_eq!(
                            identity(&ours.unwrap()),
                            identity(&theirs),
                            "{path:?} {flags:?} {rules:?}"
                        );
                        alike += 1;
                    }
                    Err(_) => refused += 1,
                }
            }
        }
    }
    println!("opened: {alike}, refused: {refused}");
    assert!(!follows_links() || alike > 1000 && refused > 1000, "{alike} opened, {refused} refused");
}

// Races: one thread changes the tree while this one opens a path through it.

/// Opens until ten thousand answers are in and both a success and a refusal were among them: never a file outside.
fn race(opens: &[(&str, Open)], path: &str, turn: impl Fn(&Path) + Send + Sync + Clone + 'static) {
    const ROUNDS: usize = 10_000;
    for (name, open) in opens {
        let (base, start) = inside_and_outside();
        let stop = Arc::new(AtomicBool::new(false));
        let (at, ended, turn) = (base.path().to_owned(), Arc::clone(&stop), turn.clone());
        let swapper = thread::spawn("swapper", thread::SMALL_STACK, move || {
            while !ended.load(Ordering::Relaxed) {
                turn(&at);
            }
        });
        let deadline = Instant::now() + Duration::from_secs(30);
        let (mut inside, mut refused) = (0, 0);
        while inside + refused < ROUNDS || inside == 0 || refused == 0 {
            match open(start.as_fd(), path.as_ref(), OFlag::O_PATH, BENEATH) {
                Ok(fd) => {
                    assert_eq!(content(fd), "inside", "{name}: {path}");
                    inside += 1;
                }
                Err(errno) => {
                    let usual = [Errno::EXDEV, Errno::ENOENT, Errno::ENOTDIR, Errno::ELOOP];
                    assert!(usual.contains(&errno), "{name}: {path}: {errno}");
                    refused += 1;
                }
            }
            assert!(Instant::now() < deadline, "{name}: {path}: {inside} inside, {refused} refused");
        }
        stop.store(true, Ordering::Relaxed);
        swapper.unwrap().join().unwrap();
        println!("{name}: {path}: {inside} inside, {refused} refused");
    }
}

/// `a` and `b` change names. Not at once: RENAME_EXCHANGE isn't in every libc.
fn exchange(a: &Path, b: &Path) {
    let aside = a.with_file_name("aside");
    for (from, to) in [(a, aside.as_path()), (b, a), (&aside, b)] {
        fs::rename(from, to).unwrap();
    }
}

#[test]
fn a_directory_swapped_for_a_link_doesnt_lead_out() {
    for text in ["../out", "/proc/self/cwd", "dir/../../out"] {
        race(&implementations(), "dir/file", move |base| {
            let link = base.join("in/link");
            if link.symlink_metadata().is_err() {
                symlink(text, &link).unwrap();
            }
            exchange(&base.join("in/dir"), &link);
        });
    }
}

#[test]
fn a_file_swapped_for_a_link_doesnt_lead_out() {
    race(&implementations(), "dir/../file", |base| {
        let link = base.join("in/link");
        if link.symlink_metadata().is_err() {
            symlink("../out/file", &link).unwrap();
        }
        exchange(&base.join("in/file"), &link);
    });
}

#[test]
fn a_link_that_changes_its_text_doesnt_lead_out() {
    race(&followers(), "link/file", |base| {
        for text in ["dir", "../out"] {
            let next = base.join("in/next");
            symlink(text, &next).unwrap();
            fs::rename(next, base.join("in/link")).unwrap();
        }
    });
}

/// The way up from a directory that was moved outside meanwhile isn't the way down to it.
#[test]
fn a_directory_moved_out_doesnt_lead_out_by_its_parents() {
    race(&followers(), "dir/deep/../../file", |base| {
        let (here, there) = (base.join("in/dir/deep"), base.join("out/deep"));
        if !here.exists() {
            fs::create_dir(&here).unwrap();
        }
        fs::rename(&here, &there).unwrap();
        fs::rename(&there, &here).unwrap();
    });
}

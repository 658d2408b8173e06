use super::*;
use crate::sys::thread;
use nix::fcntl::{FcntlArg, fcntl};
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const FOLLOW: Rules = Rules { beneath: false, follow_links: true };
const BENEATH: Rules = Rules { beneath: true, follow_links: true };
const NO_LINKS: Rules = Rules { beneath: false, follow_links: false };
const STRICT: Rules = Rules { beneath: true, follow_links: false };

const READ: OFlag = OFlag::O_RDONLY.union(OFlag::O_NONBLOCK);
const CREATE: OFlag = OFlag::O_WRONLY.union(OFlag::O_CREAT).union(OFlag::O_NONBLOCK);

type Open = fn(BorrowedFd<'_>, &Path, OFlag, Rules) -> io::Result<OwnedFd>;

/// The kernel's answer, however often renames elsewhere disturb it.
fn kernel(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> io::Result<OwnedFd> {
    let flags = effective(flags)?;
    loop {
        match ask_kernel(dir, path, flags, rules) {
            Err(Errno::EAGAIN) => {}
            answer => return Ok(answer?),
        }
    }
}

fn walked(dir: BorrowedFd<'_>, path: &Path, flags: OFlag, rules: Rules) -> io::Result<OwnedFd> {
    walk(dir, path, effective(flags)?, rules)
}

fn implementations() -> Vec<(&'static str, Open)> {
    let mut all: Vec<(&str, Open)> = vec![("open", open), ("walk", walked)];
    if has_openat2() {
        all.push(("openat2", kernel));
    }
    all
}

fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap())
}

fn content(fd: OwnedFd) -> String {
    let mut text = String::new();
    File::from(fd).read_to_string(&mut text).unwrap();
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
        "root",
        "root/etc/passwd",
        "absolute/file",
        "absolute/",
        "relative/file",
        "relative/",
        "relative/..",
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
    for (name, open) in implementations() {
        for path in ways_out {
            for flags in [READ, OFlag::O_PATH, CREATE] {
                // What ends in a slash can't be created, and that is found first.
                if flags == CREATE && path.ends_with('/') {
                    continue;
                }
                let error = open(start.as_fd(), path.as_ref(), flags, BENEATH).unwrap_err();
                assert_eq!(errno(&error), Errno::EXDEV, "{name}: {path} {flags:?}");
            }
        }
    }
    assert!(!base.path().join("new").exists());
}

#[test]
fn links_are_followed_only_as_allowed() {
    let (base, start) = inside_and_outside();
    symlink("dir", base.path().join("in/link")).unwrap();
    symlink("file", base.path().join("in/file-link")).unwrap();
    for (name, open) in implementations() {
        for path in ["link/file", "file-link", "link/../file", "dir/../link//./file"] {
            let fd = open(start.as_fd(), path.as_ref(), READ, BENEATH).unwrap();
            assert_eq!(content(fd), "inside", "{name}: {path}");
            for rules in [NO_LINKS, STRICT] {
                let error = open(start.as_fd(), path.as_ref(), READ, rules).unwrap_err();
                assert_eq!(errno(&error), Errno::ELOOP, "{name}: {path}");
            }
        }
        let link = OFlag::O_PATH | OFlag::O_NOFOLLOW;
        let fd = open(start.as_fd(), "file-link".as_ref(), link, STRICT).unwrap();
        assert!(File::from(fd).metadata().unwrap().is_symlink(), "{name}");
    }
}

#[test]
fn forty_links_are_followed_and_no_more() {
    let (base, start) = inside_and_outside();
    symlink("file", base.path().join("in/1")).unwrap();
    for n in 2..=41 {
        symlink(format!("{}", n - 1), base.path().join(format!("in/{n}"))).unwrap();
    }
    for (name, open) in implementations() {
        let fd = open(start.as_fd(), "40".as_ref(), READ, BENEATH).unwrap();
        assert_eq!(content(fd), "inside", "{name}");
        let error = open(start.as_fd(), "41".as_ref(), READ, BENEATH).unwrap_err();
        assert_eq!(errno(&error), Errno::ELOOP, "{name}");
    }
}

#[test]
fn odd_paths_have_their_errors() {
    let (_base, start) = inside_and_outside();
    let long = "x/".repeat(3000);
    let cases = [
        ("", READ, Errno::ENOENT),
        ("file\0/x", READ, Errno::EINVAL),
        ("none\0", READ, Errno::EINVAL),
        (long.as_str(), READ, Errno::ENAMETOOLONG),
        ("file/", READ, Errno::ENOTDIR),
        ("file/.", READ, Errno::ENOTDIR),
        ("file/../file", READ, Errno::ENOTDIR),
        ("none/../file", READ, Errno::ENOENT),
        ("new/", CREATE, Errno::EISDIR),
        ("dir/.", CREATE, Errno::EISDIR),
        ("new", CREATE | OFlag::O_DIRECTORY, Errno::EINVAL),
        ("file", CREATE | OFlag::O_EXCL, Errno::EEXIST),
        ("dir/..", CREATE | OFlag::O_EXCL, Errno::EEXIST),
    ];
    for (name, open) in implementations() {
        for (path, flags, expected) in cases {
            let error = open(start.as_fd(), path.as_ref(), flags, BENEATH).unwrap_err();
            assert_eq!(errno(&error), expected, "{name}: {path:.20} {flags:?}");
        }
    }
}

#[test]
fn what_is_created_is_private_and_closed_on_exec() {
    for (name, open) in implementations() {
        let (base, start) = inside_and_outside();
        let file = open(start.as_fd(), "dir/new".as_ref(), CREATE | OFlag::O_EXCL, STRICT).unwrap();
        let flags = fcntl(&file, FcntlArg::F_GETFD).unwrap();
        assert_eq!(flags, libc::FD_CLOEXEC, "{name}");
        let mode = base.path().join("in/dir/new").metadata().unwrap().mode();
        assert_eq!(mode & 0o7777 & !0o600, 0, "{name}");
    }
}

/// The walk holds the directories of its way open, so it stops before that hurts others; openat2 needn't.
#[test]
fn the_walk_is_bounded_in_depth() {
    let base = tempfile::tempdir().unwrap();
    let start = directory(base.path());
    let (deepest, too_deep) = ("d/".repeat(MAX_DEPTH), "d/".repeat(MAX_DEPTH + 2));
    fs::create_dir_all(base.path().join(&too_deep)).unwrap();
    symlink("d/d/../..", base.path().join("to-and-fro")).unwrap();
    walk(start.as_fd(), deepest.as_ref(), DIRECTORY, STRICT).unwrap();
    let error = walk(start.as_fd(), too_deep.as_ref(), DIRECTORY, STRICT).unwrap_err();
    assert_eq!(errno(&error), Errno::ENAMETOOLONG);
    walk(start.as_fd(), too_deep.as_ref(), DIRECTORY, NO_LINKS).unwrap();
    walk(start.as_fd(), "d/../".repeat(800).as_ref(), DIRECTORY, STRICT).unwrap();
    walk(start.as_fd(), "to-and-fro/".repeat(40).as_ref(), DIRECTORY, BENEATH).unwrap();
}

#[test]
fn strangers_links_are_told_from_ours() {
    if !geteuid().is_root() {
        return;
    }
    let (base, _start) = inside_and_outside();
    let (dir, link) = (base.path().join("in/dir"), base.path().join("in/dir/link"));
    symlink("file", &link).unwrap();
    // Mode and owner of the directory, owner of the link.
    for (mode, dir_owner, link_owner, strange) in [
        (0o1777, 0, 1234, true),
        (0o1777, 1235, 1234, true),
        (0o1777, 1234, 1234, false),
        (0o1777, 1234, 0, false),
        (0o1775, 0, 1234, false),
        (0o0777, 0, 1234, false),
    ] {
        chown(&dir, Some(dir_owner), None).unwrap();
        lchown(&link, Some(link_owner), None).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(mode)).unwrap();
        let dir = directory(&dir);
        let link = open_entry(&dir, b"link", OFlag::O_PATH).unwrap();
        assert_eq!(is_strangers_link(&dir, &link).unwrap(), strange, "{mode:o} {dir_owner} {link_owner}");
    }
}

#[test]
fn reopening_gives_the_same_file_whatever_has_its_name_now() {
    let (base, start) = inside_and_outside();
    let checked = open(start.as_fd(), "file".as_ref(), OFlag::O_PATH, STRICT).unwrap();
    fs::rename(base.path().join("file"), base.path().join("in/file")).unwrap();
    let opened = reopen(checked.as_fd(), READ | OFlag::O_NOFOLLOW).unwrap();
    assert_eq!(fcntl(&opened, FcntlArg::F_GETFD).unwrap(), libc::FD_CLOEXEC);
    assert_eq!(content(opened), "inside");
    let error = reopen(checked.as_fd(), CREATE).unwrap_err();
    assert_eq!(errno(&error), Errno::EINVAL);

    symlink("dir/file", base.path().join("in/link")).unwrap();
    let link = OFlag::O_PATH | OFlag::O_NOFOLLOW;
    let link = open(start.as_fd(), "link".as_ref(), link, BENEATH).unwrap();
    assert_eq!(errno(&reopen(link.as_fd(), READ).unwrap_err()), Errno::ELOOP);
}

// Both implementations against each other, over a generated tree and generated paths.

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

/// Names that generated paths and link texts are made of. `n…` are directories, `f…` files, `l…` links
/// with generated texts; some have a fixed meaning, see [`Tree`]. No chain has 20 to 40 links: a kernel
/// that starts over on the same path goes on counting, and so may stop at half of its limit.
const NAMES: &[&str] = &[
    "n1", "n2", "n1", "n2", "n1", "n2", "n1", "n2", "n1", "n2", "n1", "n2", "n3", "f1", "f2", "f1", "f2",
    "l1", "l2", "l3", "l4", "l5", "l6", "l7", "l1", "l2", "l3", "l4", "l5", "l6", "l7", "new", "new",
    "loop1", "self", "chain5", "chain41", "barred", "readable", "pipe", "socket", "dangling", "slashed",
    "up", "out", "shared",
];
/// Those that lead to places where nothing may be created.
const SYSTEM_NAMES: &[&str] = &["root", "proc", "magic", "magic-dir", "proc-self", "mounts"];

/// Deep enough that no number of `..` in a path and the 40 links it may meet climbs out: what O_CREAT
/// makes stays in the temporary directory.
const CLIMB: usize = 8 + 40 * 4;

struct Tree {
    base: TempDir,
    start: PathBuf,
    /// Has a number that the generated paths name.
    held: File,
}

impl Tree {
    fn new(random: &mut Lcg) -> Tree {
        let base = tempfile::tempdir().unwrap();
        let start = base.path().join("d/".repeat(CLIMB)).join("start");
        let held = base.path().join("held");
        fs::write(&held, "x").unwrap();
        let held = File::open(held).unwrap();
        fs::create_dir_all(&start).unwrap();
        let out = base.path().join("out");
        for top in [&start, &out] {
            for dir in ["", "n1", "n2", "n1/n1", "n1/n2", "n2/n1", "n2/n3", "n1/n1/n2", "n1/n1/n3"] {
                let dir = top.join(dir);
                fs::create_dir_all(&dir).unwrap();
                for file in ["f1", "f2"] {
                    fs::write(dir.join(file), "x").unwrap();
                }
                for link in ["l1", "l2", "l3", "l4", "l5", "l6", "l7"] {
                    if random.below(3) > 0 {
                        let text = random.path(3, NAMES);
                        let absolute = random.below(8) == 0;
                        let text = if absolute { start.join(text) } else { text.into() };
                        symlink(text, dir.join(link)).unwrap();
                    }
                }
            }
            let fd = format!("/proc/self/fd/{}", held.as_raw_fd());
            let magic_dir = format!("/proc/self/fd/../{}", random.pick(&["root", "cwd", "fd/0/.."]));
            for (link, text) in [
                ("loop1", "loop2"),
                ("loop2", "n1/../loop1"),
                ("self", "self"),
                ("dangling", "n1/new"),
                ("slashed", "n1//"),
                ("up", ".."),
                ("out", out.to_str().unwrap()),
                ("root", "/"),
                ("proc", "/proc"),
                ("proc-self", "/proc/self"),
                ("mounts", "/proc/mounts"),
                ("magic", &fd),
                ("magic-dir", &magic_dir),
                ("chain1", "n1"),
            ] {
                symlink(text, top.join(link)).unwrap();
            }
            for n in 2..=41 {
                symlink(format!("chain{}", n - 1), top.join(format!("chain{n}"))).unwrap();
            }
            nix::unistd::mkfifo(&top.join("pipe"), PRIVATE).unwrap();
            fs::create_dir(top.join("shared")).unwrap();
            for (link, text) in [("l1", "../f1"), ("l2", "../n1"), ("l3", "../new"), ("l4", "../f1")] {
                symlink(text, top.join("shared").join(link)).unwrap();
            }
            if geteuid().is_root() {
                lchown(top.join("shared/l1"), Some(1234), None).unwrap();
                lchown(top.join("shared/l2"), Some(1234), None).unwrap();
                lchown(top.join("shared/l3"), Some(1234), None).unwrap();
            }
            // Shared like /tmp; with entries but without the right to search; the other way round.
            for (dir, mode) in [("shared", 0o1777), ("readable", 0o644), ("barred", 0o311)] {
                let dir = top.join(dir);
                fs::create_dir_all(dir.join("n1")).unwrap();
                fs::set_permissions(dir, fs::Permissions::from_mode(mode)).unwrap();
            }
        }
        // By a short name, since a socket's path is.
        let socket = base.path().join("socket");
        let _gone = UnixListener::bind(&socket).unwrap();
        fs::rename(socket, start.join("socket")).unwrap();
        Tree { base, start, held }
    }

    /// A path to try: within the tree if it `creates`, else anywhere.
    fn path(&self, random: &mut Lcg, creates: bool) -> String {
        let both = [NAMES, SYSTEM_NAMES].concat();
        let path = random.path(6, if creates { NAMES } else { &both });
        let pid = std::process::id();
        let held = self.held.as_raw_fd();
        match random.below(if creates { 60 } else { 40 }) {
            0 => format!("{}/{path}", self.start.display()),
            1 => format!("{}/out/{path}", self.base.path().display()),
            _ if creates => path,
            2 => format!("/{path}"),
            3 => format!("/..//{}/{path}", self.start.display()),
            4 => format!("/proc/self/fd/{held}"),
            5 => format!("/proc/self/fd/{held}/{path}"),
            6 => format!("/proc/{pid}/root{}/{path}", self.start.display()),
            7 => format!("proc/{}/{path}", random.pick(&["self", "thread-self", "1", "none"])),
            8 => {
                let process = random.pick(&["/proc/self", "/proc/1", "proc/thread-self", "proc-self"]);
                let entry = random.pick(&["exe", "cwd", "root", "ns/mnt", "status", "fd", "exe/", "root/"]);
                format!("{process}/{entry}")
            }
            9 => format!("{}/{path}", random.pick(&["/proc/mounts", "/proc/net", "/proc", "/proc/self"])),
            10 => {
                random.pick(&["", "/", "//", ".", "..", "./", "../", "/.", "/..", "/proc/../proc/."]).into()
            }
            11 => format!("n1/{}", "x".repeat(250 + random.below(10))),
            _ => path,
        }
    }
}

impl Drop for Tree {
    /// Lets the temporary directory be removed by others than root.
    fn drop(&mut self) {
        for top in [self.start.clone(), self.base.path().join("out")] {
            for dir in ["readable", "barred"] {
                let _ = fs::set_permissions(top.join(dir), fs::Permissions::from_mode(0o700));
            }
        }
    }
}

/// What came of opening: where it is, what it is, how it was opened. What was created is removed again.
fn outcome(result: io::Result<OwnedFd>) -> Result<String, Errno> {
    let file = File::from(result.map_err(|e| errno(&e))?);
    let place = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let status = file.metadata().unwrap();
    let closed_on_exec = fcntl(&file, FcntlArg::F_GETFD).unwrap();
    // How the name was to be taken, which the kernel keeps as well, the walk has its own way with.
    let of_names = OFlag::O_NOFOLLOW | OFlag::O_DIRECTORY;
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).unwrap()) - of_names;
    let flags = (closed_on_exec, flags);
    let place = place.display().to_string();
    if status.nlink() == 0 {
        // O_TMPFILE names what it makes by number.
        let dir = place.rsplit_once('/').unwrap().0;
        return Ok(format!("unnamed in {dir} {:o} {flags:?}", status.mode()));
    }
    // Only files with content were there before.
    let created = status.is_file() && status.len() == 0 && !place.starts_with("/proc");
    if created {
        fs::remove_file(&place).unwrap();
        return Ok(format!("created {place} {:o} {flags:?}", status.mode()));
    }
    Ok(format!("{place} {}:{} {flags:?}", status.dev(), status.ino()))
}

fn compare(tree: &Tree, random: &mut Lcg, rounds: usize) {
    let start = directory(&tree.start);
    let (link, dir) = (OFlag::O_NOFOLLOW, OFlag::O_DIRECTORY);
    let path = OFlag::O_PATH;
    let all_flags = [
        READ,
        READ | link,
        READ | dir,
        READ | dir | link,
        path,
        path | link,
        path | dir,
        path | dir | link,
        OFlag::O_WRONLY | OFlag::O_NONBLOCK,
        OFlag::O_RDWR | OFlag::O_TMPFILE,
        CREATE,
        CREATE | link,
        CREATE | OFlag::O_EXCL,
        CREATE | OFlag::O_EXCL | link,
    ];
    let (mut opened, mut refused) = (0, std::collections::BTreeMap::new());
    for _ in 0..rounds {
        for creates in [false, true] {
            let path = tree.path(random, creates);
            for flags in all_flags.into_iter().filter(|f| f.contains(OFlag::O_CREAT) == creates) {
                for rules in [FOLLOW, BENEATH, NO_LINKS, STRICT] {
                    let theirs = outcome(kernel(start.as_fd(), path.as_ref(), flags, rules));
                    let ours = outcome(walked(start.as_fd(), path.as_ref(), flags, rules));
                    assert_eq!(ours, theirs, "{path:?} {flags:?} {rules:?}");
                    match theirs {
                        Ok(_) => opened += 1,
                        Err(errno) => *refused.entry(errno.to_string()).or_insert(0) += 1,
                    }
                }
            }
        }
    }
    println!("opened: {opened}, refused: {refused:#?}");
    assert!(opened > rounds, "{opened} of {rounds} paths led somewhere");
    for expected in [Errno::EXDEV, Errno::ELOOP, Errno::ENOENT, Errno::ENOTDIR, Errno::EISDIR, Errno::ENXIO] {
        assert!(refused.contains_key(&expected.to_string()), "{expected} never came up");
    }
}

#[test]
fn both_implementations_answer_alike() {
    if !has_openat2() {
        return;
    }
    let mut random = Lcg(0x6d65_6e64_6572);
    let tree = Tree::new(&mut random);
    compare(&tree, &mut random, 1500);
}

// Races: one thread changes the tree while this one opens a path through it.

/// Opens until ten thousand answers are in and both a success and a refusal were among them: never a file outside.
fn race(path: &str, turn: impl Fn(&Path) + Send + Sync + Clone + 'static) {
    const ROUNDS: usize = 10_000;
    for (name, open) in implementations() {
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
            match open(start.as_fd(), path.as_ref(), READ, BENEATH) {
                Ok(fd) => {
                    assert_eq!(content(fd), "inside", "{name}: {path}");
                    inside += 1;
                }
                Err(error) => {
                    let errno = errno(&error);
                    // The last two: what was a link when it was opened was none when it was looked at.
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
        race("dir/file", move |base| {
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
    race("dir/../file", |base| {
        let link = base.join("in/link");
        if link.symlink_metadata().is_err() {
            symlink("../out/file", &link).unwrap();
        }
        exchange(&base.join("in/file"), &link);
    });
}

#[test]
fn a_link_that_changes_its_text_doesnt_lead_out() {
    race("link/file", |base| {
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
    race("dir/deep/../../file", |base| {
        let (here, there) = (base.join("in/dir/deep"), base.join("out/deep"));
        if !here.exists() {
            fs::create_dir(&here).unwrap();
        }
        fs::rename(&here, &there).unwrap();
        fs::rename(&there, &here).unwrap();
    });
}

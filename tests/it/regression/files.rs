//! File transfer.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::files::{get, names, pattern, put, refused};
use crate::harness::aftermath::assert_no_temporary_files;
use crate::harness::client::{Style, Terminal};
use crate::harness::device::Device;
use crate::harness::msg::FILES;
use crate::harness::rest::{Form, Refused, Rest, path_body};
use crate::harness::rig::{Rig, Setup, is_root};
use crate::harness::trace;
use crate::harness::wait::{SOON, Watched, skip, spawn};

fn limits(limits: Value) -> Setup {
    Setup::new().set("Limits", json!({ "Enabled": true, "FileTransfer": limits }))
}

/// An empty directory of the rig's.
fn directory(rig: &Rig) -> PathBuf {
    let dir = rig.dir.path().join("files");
    fs::create_dir(&dir).unwrap();
    dir
}

/// Announces an upload and sends its only chunk; `end` commits it.
fn begin(device: &Device, path: &Path) -> Rest {
    let rest = Rest::open(device);
    rest.announce(&Form::to(path)).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"uploaded");
    rest.next();
    rest
}

fn end(rest: &Rest) -> Result<(), Refused> {
    rest.send(FILES, "file_chunk", Some(8), b"");
    let answer = rest.next();
    if answer.typ == "ack" { Ok(()) } else { Err(Rest::refused(&answer, 400)) }
}

/// Uploads to a USB stick (FAT or exFAT, mounted with `uid=`) arrived whole and then failed: the agent changed the
/// file's owner to its own ids, though nobody had asked for an owner, and such file systems answer EPERM.
#[test]
fn an_upload_without_an_owner_needs_no_chown() {
    if !trace::is_possible() {
        return skip("strace is missing");
    }
    let script = "exec strace -D -f -o trace -e trace=fchown,?fchown32 \
                  -e inject=fchown,?fchown32:error=EPERM \"$@\"";
    let (rig, device) = Setup::new().wrapper(script).connected();
    let dir = directory(&rig);
    put(&device, &Form::to(dir.join("f")), b"content").unwrap();
    assert_eq!(fs::read(dir.join("f")).unwrap(), b"content");
    if !is_root() {
        return skip("only root can give the directory to another group");
    }
    // The file belongs to the directory's group from the start, as it would to the mount's on a stick.
    chown(&dir, None, Some(4321)).unwrap();
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o2755)).unwrap();
    put(&device, &Form::to(dir.join("g")), b"content").unwrap();
    assert_eq!(
        (fs::read(dir.join("g")).unwrap(), dir.join("g").metadata().unwrap().gid()),
        (b"content".into(), 4321)
    );
    // An owner that was asked for still has to be given.
    for form in
        [Form { uid: Some(1), ..Form::to(dir.join("h")) }, Form { gid: Some(0), ..Form::to(dir.join("h")) }]
    {
        let refusal = put(&device, &form, b"content").unwrap_err().text;
        assert!(refusal.ends_with(": operation not permitted"), "{refusal}");
    }
    assert_eq!(names(&dir), ["f", "g"]);
}

/// A program that holds a lease on a file, as smbd does for its clients, until it is told to give way.
struct LeaseHolder {
    child: Child,
    /// The lines that it printed.
    said: Arc<Watched<Vec<String>>>,
}

const LEASE: &str = r#"
import fcntl, os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
fd = os.open(sys.argv[1], os.O_RDONLY)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
signal.sigwait([signal.SIGIO])
print("asked", flush=True)
sys.stdin.readline()
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
"#;

impl LeaseHolder {
    fn start(path: &Path) -> LeaseHolder {
        let mut command = Command::new("python3");
        command.args(["-c", LEASE]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("run python3");
        let said = Arc::new(Watched::new(Vec::new()));
        let (output, heard) = (child.stdout.take().unwrap(), Arc::clone(&said));
        spawn("lease holder", move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                heard.update(|said| said.push(line));
            }
        });
        let holder = LeaseHolder { child, said };
        holder.wait("held");
        holder
    }

    fn wait(&self, line: &str) {
        let found = self.said.wait(SOON, |said| said.iter().any(|l| l == line).then_some(()));
        assert!(found.is_some(), "the lease's holder didn't say {line:?}");
    }

    fn give_way(&mut self) {
        self.child.stdin.take().unwrap().write_all(b"\n").unwrap();
    }
}

impl Drop for LeaseHolder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A download of a file under a lease failed at once with "resource temporarily unavailable": the agent opened it with
/// O_NONBLOCK. Other programs wait for the moment that the holder takes to give way.
#[test]
fn a_download_waits_for_the_holder_of_a_lease() {
    if !Command::new("python3").arg("-V").output().is_ok_and(|output| output.status.success()) {
        return skip("python3 is missing");
    }
    let (mut rig, device) = Rig::connected();
    let path = directory(&rig).join("f");
    let bytes = pattern(100_000);
    fs::write(&path, &bytes).unwrap();
    let ask = |device: &Device| {
        let holder = LeaseHolder::start(&path);
        let rest = Rest::open(device);
        rest.ask("get_file", &path_body(path.to_str().unwrap()));
        holder.wait("asked");
        (holder, rest)
    };
    let (mut holder, rest) = ask(&device);
    // Only that session waits.
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo fine"), "fine");
    holder.give_way();
    let mut got = Vec::new();
    rest.receive(|chunk| got.extend_from_slice(chunk)).unwrap();
    assert!(got == bytes, "{} bytes", got.len());
    // Neither the end of the link nor that of the agent waits for the kernel's 45 seconds.
    let (_holder, _rest) = ask(&device);
    device.hang_up();
    let device = rig.next_link();
    assert_eq!(get(&device, "/proc/version").unwrap().bytes, fs::read("/proc/version").unwrap());
    rig.daemon.signal(Signal::SIGTERM);
    assert_eq!(rig.daemon.wait_exit(SOON).code(), Some(0));
}

/// MaxFileSize was compared with the size that the file claims. Files of procfs claim none, so all of a file came down
/// that has more than the limit.
#[test]
fn the_size_limit_holds_for_a_file_that_claims_no_size() {
    let whole = fs::read("/proc/version").unwrap();
    let (rig, device) = limits(json!({ "MaxFileSize": whole.len() - 1 })).connected();
    let rest = Rest::open(&device);
    rest.ask("get_file", &path_body("/proc/version"));
    let mut got = Vec::new();
    let refusal = rest.receive(|chunk| got.extend_from_slice(chunk)).unwrap_err();
    assert_eq!(refusal, refused(403, "access denied: the file size is over the limit"));
    assert!(got.len() < whole.len(), "no more than the limit");
    let line = rig.daemon.wait_for_log("event=transfer", SOON);
    assert!(
        line.contains(" result=denied reason=\"access denied: the file size is over the limit\""),
        "{line}"
    );
    // The session can be used again.
    let small = directory(&rig).join("small");
    fs::write(&small, "x").unwrap();
    rest.ask("get_file", &path_body(small.to_str().unwrap()));
    assert_eq!(rest.receive(|_| ()), Ok(1));

    let (_rig, device) = limits(json!({ "MaxFileSize": whole.len() })).connected();
    assert_eq!(get(&device, "/proc/version").unwrap().bytes, whole);
}

/// AllowOverwrite was checked when the upload was announced only: a file that appeared after that was replaced, and of
/// two uploads to one new name the second replaced the first.
fn nothing_is_replaced(setup: Setup) {
    let (rig, device) = setup.connected();
    let dir = directory(&rig);
    let forbidden = refused(400, "access denied: forbidden to overwrite the file");
    let path = dir.join("meanwhile");
    let rest = begin(&device, &path);
    fs::write(&path, "somebody's").unwrap();
    assert_eq!(end(&rest), Err(forbidden.clone()));
    assert_eq!(fs::read(&path).unwrap(), b"somebody's");
    let line = rig.daemon.wait_for_log("event=transfer", SOON);
    assert!(line.contains(" result=denied ") && line.contains("forbidden to overwrite"), "{line}");

    let [first, second] = [(); 2].map(|()| begin(&device, &dir.join("both")));
    first.send(FILES, "file_chunk", Some(8), b"");
    second.send(FILES, "file_chunk", Some(8), b"");
    let answers = [first, second].map(|rest| rest.next());
    let won = answers.iter().filter(|answer| answer.typ == "ack").count();
    let lost = answers.iter().filter(|answer| answer.typ == "error");
    assert_eq!(lost.map(|answer| Rest::refused(answer, 400)).collect::<Vec<_>>(), [forbidden]);
    assert_eq!((won, fs::read(dir.join("both")).unwrap()), (1, b"uploaded".into()));
    assert_eq!(names(&dir), ["both", "meanwhile"], "nothing temporary is left");
}

#[test]
fn without_overwriting_an_upload_replaces_nothing_that_appears_meanwhile() {
    nothing_is_replaced(limits(json!({ "AllowOverwrite": false })));
}

/// As above on a file system without O_TMPFILE, where the file has a temporary name.
#[test]
fn without_overwriting_a_temporary_name_replaces_nothing_either() {
    if !trace::is_possible() {
        return skip("strace is missing");
    }
    let script = "exec strace -D -f -o trace -e trace=linkat -e inject=linkat:error=EPERM \"$@\"";
    nothing_is_replaced(limits(json!({ "AllowOverwrite": false })).wrapper(script));
}

/// As above where the file system knows neither RENAME_NOREPLACE nor hard links, as exFAT by FUSE. Two uploads at the
/// very same moment could both succeed there, so only the first half of the story is told.
#[test]
fn without_overwriting_the_last_resort_looks_right_before_the_rename() {
    if !trace::is_possible() {
        return skip("strace is missing");
    }
    let script = "exec strace -D -f -o trace -e trace=linkat,renameat2 -e inject=linkat:error=EPERM \
                  -e inject=renameat2:error=EINVAL \"$@\"";
    let (rig, device) = limits(json!({ "AllowOverwrite": false })).wrapper(script).connected();
    let path = directory(&rig).join("f");
    let [first, second] = [(); 2].map(|()| begin(&device, &path));
    assert_eq!(end(&first), Ok(()));
    assert_eq!(end(&second), Err(refused(400, "access denied: forbidden to overwrite the file")));
}

/// OwnerPut and GroupPut were checked when the upload was announced only, so that a file of root's that appeared after
/// that was replaced.
#[test]
fn a_strangers_file_that_appears_meanwhile_is_not_replaced() {
    if !is_root() {
        return skip("only root can give a file to somebody else");
    }
    for (key, name, what) in [("OwnerPut", "nobody", "owner"), ("GroupPut", "nogroup", "group")] {
        let (rig, device) = limits(json!({ "AllowOverwrite": true, key: name })).connected();
        let dir = directory(&rig);
        let path = dir.join("f");
        let rest = begin(&device, &path);
        fs::write(&path, "root's").unwrap();
        let text = format!("access denied: the file {what} does not match");
        assert_eq!(end(&rest), Err(refused(400, &text)));
        assert_eq!(fs::read(&path).unwrap(), b"root's");
        assert_no_temporary_files(&dir);
        // One that satisfies the limit is replaced.
        fs::remove_file(&path).unwrap();
        let [first, second] = [(); 2].map(|()| begin(&device, &path));
        assert_eq!((end(&first), end(&second)), (Ok(()), Ok(())));
    }
}

/// Files of /proc and /sys came with the size that they claim, 0 or a page, which `mender-cli cp` compares with what it
/// has got, and fails.
#[test]
fn a_file_that_does_not_know_its_size_has_that_of_its_content() {
    let (rig, device) = Rig::connected();
    for path in
        ["/proc/version", "/proc/self/status", "/proc/uptime", "/sys/kernel/mm/transparent_hugepage/enabled"]
    {
        let got = get(&device, path).unwrap();
        assert!(!got.bytes.is_empty() && got.size == got.bytes.len() as i64, "{path}: {got:?}");
    }
    // One that is too large to be read first comes all the same.
    let large = get(&device, "/proc/self/pagemap").map(|got| got.bytes.len());
    assert!(large.is_err() || large.unwrap() > 1 << 20);
    let empty = directory(&rig).join("empty");
    fs::write(&empty, "").unwrap();
    assert_eq!(get(&device, &empty).unwrap().size, 0);
}

/// Built for a 32-bit glibc, the agent asked for sizes of 31 bits.
#[test]
fn a_file_of_three_gibibytes_can_be_read() {
    let (rig, device) = Rig::connected();
    let path = directory(&rig).join("large");
    fs::File::create(&path).and_then(|file| file.set_len(3 << 30)).unwrap();
    let (rest, path) = (Rest::open(&device), path.to_str().unwrap());
    let info = rest.stat(path).unwrap();
    assert_eq!(info.field("size").and_then(|size| size.as_i64()), Some(3 << 30));
    rest.ask("get_file", &path_body(path));
    assert_eq!(rest.next().typ, "file_chunk");
}

/// A name that isn't UTF-8 came back with replacement characters, so that the server saved the file by another name.
#[test]
fn a_name_of_any_bytes_comes_back_as_it_is() {
    let (rig, device) = Rig::connected();
    let mut path = directory(&rig).into_os_string().into_vec();
    path.extend(b"/caf\xe9");
    fs::write(OsStr::from_bytes(&path), "content").unwrap();
    let rest = Rest::open(&device);
    let body = |path: &[u8]| [b"\x81\xa4path\xda", &(path.len() as u16).to_be_bytes()[..], path].concat();
    rest.ask("stat", &body(&path));
    let info = rest.next();
    assert_eq!(info.typ, "file_info");
    assert!(info.raw.windows(path.len()).any(|bytes| bytes == path), "{}", info.summary());
    assert!(rig.daemon.wait_for_log("event=stat", SOON).contains("caf\\xE9\" size=7 result=ok"));
    path.push(b'x');
    rest.ask("stat", &body(&path));
    let refusal = Rest::refused(&rest.next(), 400).text;
    assert!(refusal.ends_with("/caf\\xE9x\": no such file or directory"), "{refusal}");
    let line = rig.daemon.wait_for_log("event=stat session=", SOON);
    assert!(line.contains(" user="), "{line}");
}

/// A program that watches a directory for files that are complete, by IN_MOVED_TO or IN_CLOSE_WRITE, saw none of the name
/// when there was no such file before.
#[test]
fn who_watches_a_directory_sees_a_new_file() {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let (rig, device) = Rig::connected();
    let dir = directory(&rig);
    let watch = Inotify::init(InitFlags::IN_NONBLOCK).unwrap();
    watch.add_watch(&dir, AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CLOSE_WRITE).unwrap();
    for round in ["a new file", "one that is replaced"] {
        put(&device, &Form::to(dir.join("name")), b"uploaded").unwrap();
        let seen = watch.read_events().unwrap_or_default();
        let all: Vec<_> = seen.iter().map(|event| (event.mask, event.name.clone())).collect();
        println!("{round}: {all:?}");
        let named =
            |event: &nix::sys::inotify::InotifyEvent| event.name.as_deref() == Some(OsStr::new("name"));
        assert!(seen.iter().any(named), "{round}: {all:?}");
    }
}

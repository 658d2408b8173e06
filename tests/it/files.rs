//! File transfer through the server's own handlers, for both of its generations.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::harness::device::{Device, Generation};
use crate::harness::msg::{CONTROL, FILES, Msg};
use crate::harness::rest::{Downloaded, Form, Refused, Rest, offset_of, path_body};
use crate::harness::rig::{Rig, Setup, is_root};
use crate::harness::trace;
use crate::harness::wait::{SOON, eventually, millis, skip};

const BOTH: [Generation; 2] = [Generation::New, Generation::Released];

/// Bytes that no shift or swap of parts leaves the same.
pub fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub fn get(device: &Device, path: impl AsRef<Path>) -> Result<Downloaded, Refused> {
    Rest::download(device, path.as_ref().to_str().expect("UTF-8"))
}

pub fn put(device: &Device, form: &Form, bytes: &[u8]) -> Result<(), Refused> {
    Rest::upload(device, form, bytes)
}

pub fn refused(status: u64, text: &str) -> Refused {
    Refused { status, text: text.to_owned() }
}

/// The names in a directory.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A rig and an empty directory for files.
fn rig_and_dir(generation: Generation) -> (Rig, Device, PathBuf) {
    let (rig, device) = Setup::new().generation(generation).connected();
    let dir = rig.dir.path().join("files");
    fs::create_dir(&dir).unwrap();
    (rig, device, dir)
}

fn error_text(msg: &Msg) -> String {
    assert_eq!((msg.proto, msg.typ.as_str()), (FILES, "error"), "{}", msg.summary());
    msg.field("err").and_then(|v| v.as_str().map(str::to_owned)).expect("err")
}

#[test]
fn files_come_down_as_they_are() {
    for generation in BOTH {
        let (_rig, device, dir) = rig_and_dir(generation);
        // Around the sizes of chunks and windows.
        for size in [0, 1, 4095, 4096, 4097, 40_960, 81_920, 200_000, 5_000_000] {
            let path = dir.join(format!("f{size}"));
            let bytes = pattern(size);
            fs::write(&path, &bytes).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
            let name = path.to_str().unwrap();
            let got = Rest::download(&device, name).unwrap();
            assert!(got.bytes == bytes, "{size} bytes came down as {} others", got.bytes.len());
            assert_eq!((got.path.as_str(), got.mode.as_str(), got.size), (name, "640", size as i64));
            let meta = path.metadata().unwrap();
            assert_eq!((got.uid, got.gid), (meta.uid().into(), meta.gid().into()));
        }
    }
}

#[test]
fn chunks_grow_on_a_quick_link_but_never_too_large() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    let path = dir.join("large");
    fs::write(&path, pattern(20_000_000)).unwrap();
    let got = get(&device, &path).unwrap();
    let largest = got.chunks.iter().max().unwrap();
    assert!(got.chunks[0] <= 16 * 1024, "starts with {}", got.chunks[0]);
    assert!((64 * 1024..=256 * 1024).contains(largest), "grows to {largest}");
}

#[test]
fn at_most_sixteen_chunks_and_at_least_ten_are_on_the_way() {
    let (_rig, device, dir) = rig_and_dir(Generation::Released);
    let path = dir.join("large");
    fs::write(&path, pattern(8_000_000)).unwrap();
    let rest = Rest::open(&device);
    rest.ask("get_file", &path_body(path.to_str().unwrap()));
    let (mut total, mut half) = (0, 0);
    // Without an ack just sixteen come.
    for n in 0..16 {
        if n == 10 {
            half = total;
        }
        let chunk = rest.next();
        assert_eq!((chunk.typ.as_str(), offset_of(&chunk)), ("file_chunk", total));
        total += chunk.body.as_ref().map_or(0, Vec::len) as u64;
    }
    device.nothing(millis(300), "no seventeenth chunk", |m| m.sid.as_deref() == Some(&rest.sid));
    // After an ack for ten, ten more.
    rest.send(FILES, "ack", Some(half), b"");
    for _ in 0..10 {
        assert_eq!(rest.next().typ, "file_chunk");
    }
    device.nothing(millis(300), "no more than ten", |m| m.sid.as_deref() == Some(&rest.sid));
    rest.close();
}

#[test]
fn files_go_up_whole_with_owner_and_mode() {
    for generation in BOTH {
        let (_rig, device, dir) = rig_and_dir(generation);
        for size in [0, 1, 2, 4096, 4097, 81_920, 81_921, 4 << 20] {
            let path = dir.join(format!("f{size}"));
            let bytes = pattern(size);
            let mut form = Form { src_path: Some("source.bin".into()), mode: Some(0o600), ..Form::to(&path) };
            if is_root() {
                (form.uid, form.gid) = (Some(123), Some(145));
            }
            Rest::upload(&device, &form, &bytes).unwrap();
            // The server doesn't wait for the end of an empty file.
            let there = || path.exists().then_some(());
            eventually(SOON, "the file", there);
            let meta = path.metadata().unwrap();
            assert!(fs::read(&path).unwrap() == bytes, "{size} bytes");
            assert_eq!(meta.mode() & 0o7777, 0o600);
            if is_root() {
                assert_eq!((meta.uid(), meta.gid()), (123, 145));
            }
        }
        assert_eq!(names(&dir).len(), 8, "nothing temporary is left: {:?}", names(&dir));
    }
}

#[test]
fn a_plain_upload_gets_the_usual_mode_and_the_agents_owner() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    put(&device, &Form::to(dir.join("f")), b"content").unwrap();
    let meta = dir.join("f").metadata().unwrap();
    assert_eq!(meta.mode() & 0o7777, 0o644);
    assert_eq!(meta.uid(), nix::unistd::getuid().as_raw());
    // Without limits the high bits never get through.
    put(&device, &Form { mode: Some(0o7755), ..Form::to(dir.join("s")) }, b"x").unwrap();
    assert_eq!(dir.join("s").metadata().unwrap().mode() & 0o7777, 0o755);
}

#[test]
fn explicit_nils_are_as_good_as_nothing() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    let rest = Rest::open(&device);
    let path = dir.join("f");
    let name = path.to_str().unwrap().as_bytes();
    let mut body = b"\x86\xa4path\xd9".to_vec();
    body.push(name.len() as u8);
    body.extend(name);
    body.extend(b"\xa3uid\xc0\xa3gid\xc0\xa4mode\xc0\xa4size\xc0\xa8src_path\xc0");
    rest.ask("put_file", &body);
    assert_eq!(rest.next().typ, "ack");
    rest.send(FILES, "file_chunk", Some(0), b"data");
    rest.send(FILES, "file_chunk", Some(4), b"");
    let last = rest.next();
    let done = if offset_of(&last) == 4 { last } else { rest.next() };
    assert_eq!(offset_of(&done), 4);
    assert_eq!(fs::read(&path).unwrap(), b"data");
}

#[test]
fn the_last_ack_comes_when_the_file_is_in_place() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    let path = dir.join("f");
    fs::write(&path, "old").unwrap();
    let rest = Rest::open(&device);
    rest.announce(&Form::to(&path)).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"new content");
    let ack = rest.next();
    assert!(offset_of(&ack) < 11, "data is never acknowledged to its end");
    assert_eq!(fs::read(&path).unwrap(), b"old", "nothing is replaced before the end");
    rest.send(FILES, "file_chunk", Some(11), b"");
    assert_eq!(offset_of(&rest.next()), 11);
    assert_eq!(fs::read(&path).unwrap(), b"new content");
}

#[test]
fn what_is_broken_off_leaves_nothing() {
    let (rig, device, dir) = rig_and_dir(Generation::New);
    let path = dir.join("f");
    fs::write(&path, "old").unwrap();
    let begin = || {
        let rest = Rest::open(&device);
        rest.announce(&Form::to(&path)).unwrap();
        rest.send(FILES, "file_chunk", Some(0), b"half of it");
        rest.next();
        rest
    };
    let untouched = || {
        eventually(SOON, "the temporary file to go", || (names(&dir) == ["f"]).then_some(()));
        assert_eq!(fs::read(&path).unwrap(), b"old");
    };
    begin().close();
    untouched();
    begin().ask("error", b"\x81\xa3err\xa3why");
    untouched();
    // A gap in the data.
    let rest = begin();
    rest.send(FILES, "file_chunk", Some(4096), b"later");
    assert_eq!(error_text(&rest.next()), "received unexpected chunk offset");
    untouched();
    // What was on the way is passed over; the session can be used again.
    rest.send(FILES, "file_chunk", Some(8192), b"later still");
    rest.announce(&Form::to(&path)).unwrap();
    rest.close();
    untouched();
    let rest = begin();
    rest.send(FILES, "file_chunk", None, b"x");
    assert_eq!(error_text(&rest.next()), "invalid file chunk message: missing offset property");
    untouched();
    let rest = begin();
    rest.ask("ack", b"");
    assert_eq!(error_text(&rest.next()), "received unexpected message type 'ack' during file upload");
    untouched();
    begin();
    device.hang_up();
    untouched();
    drop(rig);
}

#[test]
fn the_end_of_the_agent_leaves_nothing() {
    let (mut rig, device, dir) = rig_and_dir(Generation::New);
    let path = dir.join("f");
    let rest = Rest::open(&device);
    rest.announce(&Form::to(&path)).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"half of it");
    rest.next();
    rig.daemon.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(rig.daemon.wait_exit(SOON).code(), Some(0));
    assert!(names(&dir).is_empty(), "{:?}", names(&dir));
}

/// Where a file can't do without a name until it is complete.
#[test]
fn an_upload_after_a_kill_removes_what_was_left() {
    if !trace::is_possible() {
        return skip("strace is missing");
    }
    let setup = Setup::new()
        .wrapper("exec strace -D -f -o trace -e trace=linkat -e inject=linkat:error=ENOENT \"$@\"");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let mut rig = setup.start();
    let rest = Rest::open(&rig.device());
    rest.announce(&Form::to(&path)).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"half of it");
    rest.next();
    rig.daemon.signal(nix::sys::signal::Signal::SIGKILL);
    rig.daemon.wait_exit(SOON);
    assert_eq!(names(dir.path()).len(), 1);
    fs::write(dir.path().join(".other"), "somebody's").unwrap();
    rig.restart(&Setup::new());
    put(&rig.device(), &Form::to(&path), b"whole").unwrap();
    assert_eq!(names(dir.path()), [".other", "f"]);
}

#[test]
fn a_complete_file_is_put_into_place_though_nobody_waits() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    let rest = Rest::open(&device);
    rest.announce(&Form::to(dir.join("f"))).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"");
    rest.close();
    eventually(SOON, "the empty file", || (names(&dir) == ["f"]).then_some(()));
}

#[test]
fn errors_name_the_file_and_the_reason() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    let missing = "failed to retrieve file info: error received from device: failed to get file info from path \
                   '/does/not/exist': stat /does/not/exist: no such file or directory";
    assert_eq!(get(&device, "/does/not/exist"), Err(refused(400, missing)));
    assert_eq!(get(&device, &dir), Err(refused(400, "path is not a regular file")));

    let nowhere = dir.join("no/f");
    let text = format!(
        "failed to create target file: failed to create file: open {}: no such file or directory",
        nowhere.display()
    );
    assert_eq!(put(&device, &Form::to(&nowhere), b"x"), Err(refused(400, &text)));
    assert_eq!(
        put(&device, &Form::to(&dir), b"x"),
        Err(refused(400, "conflicting file path: cannot overwrite directory"))
    );
    symlink("/etc/hostname", dir.join("link")).unwrap();
    nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for irregular in ["link", "fifo"] {
        assert_eq!(
            put(&device, &Form::to(dir.join(irregular)), b"x"),
            Err(refused(400, "conflicting file path: cannot overwrite irregular file"))
        );
    }
    fs::write(dir.join("plain"), "x").unwrap();
    let below = dir.join("plain/f");
    let refusal = put(&device, &Form::to(&below), b"x").unwrap_err().text;
    assert!(refusal.ends_with(&format!("{}: not a directory", below.display())), "{refusal}");
    assert_eq!(get(&device, dir.join("fifo")), Err(refused(400, "path is not a regular file")));
}

#[test]
fn a_directory_takes_the_sources_name() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    let form = Form { src_path: Some("/home/someone/source.bin".into()), ..Form::to(&dir) };
    put(&device, &form, b"content").unwrap();
    assert_eq!(fs::read(dir.join("source.bin")).unwrap(), b"content");
    let slash = Form { src_path: Some("other.bin".into()), ..Form::to(format!("{}/", dir.display())) };
    put(&device, &slash, b"content").unwrap();
    assert_eq!(names(&dir), ["other.bin", "source.bin"]);
    fs::create_dir(dir.join("inner")).unwrap();
    let inner = Form { src_path: Some("inner".into()), ..Form::to(&dir) };
    let conflict = refused(400, "conflicting file path: cannot overwrite directory");
    assert_eq!(put(&device, &inner, b"x"), Err(conflict.clone()));
    let dots = Form { src_path: Some("..".into()), ..Form::to(&dir) };
    assert_eq!(put(&device, &dots, b"x"), Err(conflict));
}

#[test]
fn direct_requests_for_what_has_no_end_are_refused() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    nix::unistd::mkfifo(&dir.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let rest = Rest::open(&device);
    let ask = |path: &Path| {
        rest.ask("get_file", &path_body(path.to_str().unwrap()));
        let msg = rest.next();
        assert_eq!(
            msg.prop("user_id").and_then(|v| v.as_str()),
            Some("aaaaaaaa-bbbb-4ccc-8ddd-eeeeeeeeeeee")
        );
        assert_eq!(msg.field("msgtype").and_then(|v| v.as_str().map(str::to_owned)).unwrap(), "get_file");
        error_text(&msg)
    };
    for (path, why) in [
        (dir.join("fifo"), "not a regular file"),
        (dir.clone(), "is a directory"),
        ("/dev/zero".into(), "not a regular file"),
        (dir.join("none"), "no such file or directory"),
    ] {
        let text = format!("failed to open file for reading: open {}: {why}", path.display());
        assert_eq!(ask(&path), text);
    }
}

#[test]
fn files_that_do_not_know_their_size_come_down() {
    let (_rig, device, _dir) = rig_and_dir(Generation::New);
    let got = get(&device, "/proc/version").unwrap();
    assert_eq!(got.bytes, fs::read("/proc/version").unwrap());
}

#[test]
fn a_file_that_shrinks_is_an_error_and_one_that_grows_is_as_it_was() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    let path = dir.join("f");
    let bytes = pattern(3_000_000);
    let begin = || {
        fs::write(&path, &bytes).unwrap();
        let rest = Rest::open(&device);
        rest.stat(path.to_str().unwrap()).unwrap();
        rest
    };
    let rest = begin();
    rest.ask("get_file", &path_body(path.to_str().unwrap()));
    let first = rest.next();
    assert_eq!(first.typ, "file_chunk");
    fs::File::options().write(true).open(&path).unwrap().set_len(100_000).unwrap();
    let mut count = 1;
    let error = loop {
        rest.send(FILES, "ack", Some(0), b"");
        let msg = rest.next();
        if msg.typ == "error" {
            break error_text(&msg);
        }
        count += 1;
        let end = offset_of(&msg) + msg.body.as_ref().map_or(0, Vec::len) as u64;
        rest.send(FILES, "ack", Some(end), b"");
        assert!(count < 1000);
    };
    assert!(error.contains("has shrunk from 3000000 to 100000 bytes"), "{error}");
    assert!(error.contains(path.to_str().unwrap()), "{error}");

    let rest = begin();
    let mut file = fs::File::options().append(true).open(&path).unwrap();
    std::io::Write::write_all(&mut file, &pattern(500_000)).unwrap();
    rest.ask("get_file", &path_body(path.to_str().unwrap()));
    let mut got = Vec::new();
    rest.receive(|chunk| got.extend_from_slice(chunk)).unwrap();
    assert!(got == bytes, "as many bytes as stat has told: {}", got.len());
}

#[test]
fn one_transfer_at_a_time_and_stray_messages() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    let path = dir.join("f");
    let rest = Rest::open(&device);
    let complaint = |typ: &str, offset: Option<u64>, body: &[u8]| {
        rest.send(FILES, typ, offset, body);
        error_text(&rest.next())
    };
    assert_eq!(complaint("file_chunk", Some(0), b"x"), "no file transfer in progress");
    assert_eq!(complaint("ack", Some(0), b""), "no file transfer in progress");
    assert_eq!(complaint("bogus", None, b""), "session: filetransfer message type 'bogus' not supported");
    assert!(complaint("stat", None, b"\xc1").starts_with("malformed request parameters: "));
    assert_eq!(complaint("get_file", None, b"\x80"), "invalid request parameters: path: cannot be blank.");
    // An error without a text, while nothing goes on, is nothing.
    rest.ask("error", b"");
    rest.ask("error", b"\x80");
    rest.announce(&Form::to(&path)).unwrap();
    let body = path_body("/etc/hostname");
    assert_eq!(complaint("get_file", None, &body), "another file transfer is in progress");
    assert_eq!(complaint("put_file", None, &body), "another file transfer is in progress");
    // The one in progress goes on.
    rest.send(FILES, "file_chunk", Some(0), b"data");
    rest.send(FILES, "file_chunk", Some(4), b"");
    eventually(SOON, "the file", || path.exists().then_some(()));
    rest.close();
}

#[test]
fn a_download_wants_good_acks() {
    let (_rig, device, dir) = rig_and_dir(Generation::New);
    let path = dir.join("f");
    fs::write(&path, pattern(1_000_000)).unwrap();
    let begin = || {
        let rest = Rest::open(&device);
        rest.ask("get_file", &path_body(path.to_str().unwrap()));
        assert_eq!(rest.next().typ, "file_chunk");
        rest
    };
    let error_of = |rest: &Rest| {
        let msg = device.take(SOON, "an error", |m| m.sid.as_deref() == Some(&rest.sid) && m.typ == "error");
        error_text(&msg)
    };
    let rest = begin();
    rest.ask("ack", b"");
    assert_eq!(error_of(&rest), "ack message: offset property cannot be blank");
    let rest = begin();
    rest.ask("file_chunk", b"x");
    assert_eq!(error_of(&rest), "received unexpected message type 'file_chunk'; expected 'ack'");
    // Acks of any width, backwards, or of more than was sent do no harm.
    let rest = begin();
    rest.send(FILES, "ack", Some(u64::MAX / 4), b"");
    rest.send(FILES, "ack", Some(0), b"");
    rest.close();
}

#[test]
fn both_ends_of_a_disabled_feature() {
    let (_rig, device) = Setup::new().set("FileTransfer", serde_json::json!({ "Disable": true })).connected();
    device.send(FILES, "stat", "some-session", &[], &path_body("/etc/hostname"));
    let msg = device.next_of("some-session", SOON);
    assert_eq!((msg.proto, msg.typ.as_str()), (CONTROL, "error"));
    let text = msg.field("err").unwrap();
    assert_eq!(text.as_str(), Some("no handler registered for protocol: 0x0002"));
}

#[test]
fn each_transfer_is_counted() {
    let (rig, device, dir) = rig_and_dir(Generation::New);
    let path = dir.join("f");
    put(&device, &Form::to(&path), b"abc").unwrap();
    get(&device, &path).unwrap();
    rig.daemon.signal(nix::sys::signal::Signal::SIGUSR1);
    rig.daemon.wait_for_log("total: tx/rx 3/3", SOON);
}

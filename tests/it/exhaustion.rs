//! What a system runs out of: PTYs, descriptors, processes and threads, memory. Requests are answered with the reason, and
//! when there is enough again everything works. (Full disks are in `disk`.)

use crate::control::complaint;
use crate::files::names;
use crate::harness::aftermath::{assert_healthy, assert_no_temporary_files, supervise};
use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::device::Device;
use crate::harness::msg::{self, COMMANDS, CONTROL, FILES, Ints, SHELL};
use crate::harness::proc;
use crate::harness::rest::{Form, Rest, path_body};
use crate::harness::rig::{Rig, Setup, is_root};
use crate::harness::wait::{SOON, eventually, secs, skip};
use crate::harness::wire;

/// Connected, with all that takes.
fn connected(setup: Setup) -> (Rig, Device) {
    let (rig, device) = setup.connected();
    rig.daemon.wait_for_log("Connection established", SOON);
    (rig, device)
}

/// Asks for a shell in this session and gets a no.
fn no_shell(device: &Device, sid: &str, why: &str) {
    let terminal = Terminal { sid: sid.to_owned(), ..Terminal::new(device, Style::Cli) };
    terminal.ask_new();
    terminal.expect("new", 2, Some(&format!("failed to start shell: {why}")));
}

/// Asks for a new session and gets a no.
fn no_session(device: &Device, why: &str) {
    let sid = new_sid();
    device.send(CONTROL, "ping", &sid, &[("user_id", "u".into())], b"");
    let (text, close, ..) = complaint(&device.next_of(&sid, SOON));
    assert_eq!((text.as_str(), close), (why, true));
}

/// The text of the answer that a request for a file gets.
fn file_error(rest: &Rest, typ: &str, body: &[u8]) -> String {
    rest.ask(typ, body);
    Rest::refused(&rest.next(), 0).text
}

#[test]
fn ptys() {
    if !is_root() {
        return skip("a devpts of its own needs root");
    }
    let script = "exec unshare --mount --propagation private sh -c '
        mount -t devpts -o newinstance,ptmxmode=666,max=2 devpts /dev/pts
        mount --bind /dev/pts/ptmx /dev/ptmx
        exec \"$@\"' sh \"$@\"";
    let (mut rig, device) = connected(Setup::new().wrapper(script));
    let shells = [(); 2].map(|()| {
        let mut terminal = Terminal::new(&device, Style::Cli);
        terminal.open_with_prompt();
        terminal
    });
    no_shell(&device, &new_sid(), "no space left on device");
    shells.iter().for_each(Terminal::stop);
    assert_healthy(&mut rig, &device);
}

#[test]
fn descriptors() {
    let (mut rig, device) = connected(Setup::new().set("ReconnectIntervalSeconds", 1));
    let none_left = |rig: &Rig| {
        let is_free =
            |fd: &u32| !std::path::Path::new(&format!("/proc/{}/fd/{fd}", rig.daemon.pid())).exists();
        let free = (0..).find(is_free).expect("a number");
        rig.daemon.limit("nofile", free.into());
    };
    let why = "too many open files";
    let path = rig.dir.path().join("file");
    std::fs::write(&path, "content").unwrap();
    let rest = Rest::open(&device);
    none_left(&rig);
    no_shell(&device, &new_sid(), why);
    no_shell(&device, &rest.sid, why);
    no_session(&device, why);
    let name = path.to_str().unwrap();
    for (typ, form) in
        [("stat", path_body(name)), ("get_file", path_body(name)), ("put_file", Form::to(&path).body())]
    {
        let text = file_error(&rest, typ, &form);
        assert!(text.ends_with(&format!("{name}: {why}")), "{typ}: {text}");
    }
    // An upload that has begun needs no more of them.
    rig.daemon.lift("nofile");
    rest.announce(&Form::to(&path)).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"half of it");
    rest.next();
    none_left(&rig);
    rest.send(FILES, "file_chunk", Some(10), b"");
    rest.next();
    assert_eq!(std::fs::read(&path).unwrap(), b"half of it");
    rest.close();
    // Without any for a link it tries again and again.
    rig.server.always(crate::harness::server::Reply::Close);
    device.hang_up();
    rig.daemon.wait_for_log("connection manager failed to connect", SOON);
    none_left(&rig);
    rig.server.always(crate::harness::server::Reply::Upgrade);
    rig.daemon.wait_for_log(why, secs(20));
    rig.daemon.lift("nofile");
    let device = rig.server.next_device(secs(40));
    assert_healthy(&mut rig, &device);
}

/// Another user's processes and threads are counted together, which root's aren't.
#[test]
fn processes_and_threads() {
    if !is_root() {
        return skip("an agent of another user needs root");
    }
    let script = "chmod 755 . && install -d -o 65534 run && exec setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"";
    let setup = Setup::new().wrapper(script).set("User", "nobody").set("ReconnectIntervalSeconds", 1);
    let (mut rig, device) = connected(setup);
    let why = "resource temporarily unavailable";
    let files = rig.dir.path().join("files");
    std::fs::create_dir(&files).unwrap();
    std::os::unix::fs::chown(&files, Some(65534), None).unwrap();
    let path = files.join("file");
    let rest = Rest::open(&device);
    rest.announce(&Form::to(&path)).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"content");
    rest.next();
    rig.daemon.limit("nproc", 1);
    // A thread, then a process.
    no_shell(&device, &new_sid(), why);
    no_shell(&device, &rest.sid, &format!("fork/exec /bin/bash: {why}"));
    no_session(&device, why);
    rest.send(FILES, "file_chunk", Some(7), b"");
    let text = Rest::refused(&rest.next(), 0).text;
    assert_eq!(text, format!("failed to commit uploaded file: {}: {why}", path.display()));
    assert!(names(&files).is_empty());
    device.send(COMMANDS, "check-update", "", &[], b"");
    let answer = device.take(SOON, "an answer", |m| m.typ == "check-update");
    assert_eq!((answer.status(), answer.text().as_str()), (Some(2), why));
    let client = crate::harness::forward::Client::within(&device, &rest.sid);
    client.connect("tcp", "some.example", 80);
    assert_eq!(client.next_error().text, format!("dial tcp: lookup some.example: {why}"));
    drop(client);
    rest.close();
    // No thread for a bus, then none for a link.
    rig.bus.kill();
    rig.daemon.wait_for_log(&format!("no system bus: {why}"), SOON);
    device.hang_up();
    rig.daemon.wait_for_log(&format!("out of resources: {why}"), SOON);
    assert!(rig.daemon.is_running());
    rig.bus.restart();
    rig.manager.appear();
    rig.daemon.lift("nproc");
    let device = rig.server.next_device(secs(40));
    assert_healthy(&mut rig, &device);
}

/// glibc's allocator sets addresses aside for each thread otherwise.
fn tight() -> Setup {
    Setup::new().env("MALLOC_ARENA_MAX", "1")
}

fn address_space(rig: &Rig) -> u64 {
    proc::virtual_kib(rig.daemon.pid()) << 10
}

/// No memory for the stacks of threads, and hardly any for data: whoever asks is told, or the agent is started anew.
#[test]
fn memory_for_threads() {
    let (mut rig, mut device) = connected(tight());
    rig.daemon.limit("as", address_space(&rig) + (64 << 10));
    let mut told = 0;
    for _ in 0..8 {
        let terminal = Terminal::new(&device, Style::Cli);
        if !ask(&terminal) {
            break;
        }
        let Some(Ok(answer)) = device.try_take(SOON, |m| m.sid.as_ref() == Some(&terminal.sid)) else {
            break;
        };
        let why = "failed to start shell: resource temporarily unavailable";
        assert_eq!((answer.status(), answer.text().as_str()), (Some(2), why));
        told += 1;
    }
    println!("{told} of 8 were told");
    if told == 8 {
        rig.daemon.lift("as");
    } else {
        rig.daemon.wait_exit(SOON);
        assert!(supervise(&mut rig, &tight()));
        device = rig.device();
    }
    assert_healthy(&mut rig, &device);
}

/// Asks for a shell, if there is somebody to ask.
fn ask(terminal: &Terminal) -> bool {
    let props = [("user_id", terminal.user.as_str().into())];
    let message = msg::encode(&msg::message(SHELL, "new", &terminal.sid, &props, b""), Ints::Compact);
    terminal.device.try_frame(true, wire::BINARY, &message).is_ok()
}

/// A program without memory for its data ends, and is started anew.
#[test]
fn memory_for_data() {
    let (mut rig, device) = connected(tight());
    let files = rig.dir.path().join("files");
    std::fs::create_dir(&files).unwrap();
    let rest = Rest::open(&device);
    rest.announce(&Form::to(files.join("file"))).unwrap();
    rest.send(FILES, "file_chunk", Some(0), b"half of it");
    rest.next();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open_with_prompt();
    let shell = proc::children(rig.daemon.pid());
    rig.daemon.limit("as", address_space(&rig));
    let large =
        msg::encode(&msg::message(SHELL, "shell", &terminal.sid, &[], &[b'x'; 1 << 20]), Ints::Compact);
    for _ in 0..8 {
        let _ = device.try_frame(true, wire::BINARY, &large);
    }
    eventually(SOON, "the agent's end", || (!rig.daemon.is_running()).then_some(()));
    let status = rig.daemon.wait_exit(SOON);
    println!("ended with {status}; {:?}", rig.daemon.log().last());
    assert!(names(&files).is_empty());
    for pid in shell {
        eventually(SOON, "the shell to end", || proc::has_ended(pid).then_some(()));
    }
    assert!(supervise(&mut rig, &tight()));
    let device = rig.device();
    assert_healthy(&mut rig, &device);
    assert_no_temporary_files(&files);
}

//! kill -9 of the agent, whatever it is doing. What its supervisor starts then connects and is as good as new, and of
//! what was under way nothing is left. (A kill while a command runs is in `commands`.)

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill as send_signal};
use nix::unistd::Pid;

use crate::disk::slow_disk;
use crate::files::{names, pattern};
use crate::harness::aftermath::{assert_comes_back, assert_no_temporary_files, kill};
use crate::harness::client::{Style, Terminal};
use crate::harness::device::Reading;
use crate::harness::forward::Client;
use crate::harness::front::Acceptor;
use crate::harness::manager::Answer;
use crate::harness::msg::FILES;
use crate::harness::proc;
use crate::harness::rest::{Form, Rest, path_body};
use crate::harness::rig::{Rig, Setup, TOKEN, script_config};
use crate::harness::server::Reply;
use crate::harness::targets::{Role, Silent, Target};
use crate::harness::wait::{SOON, Watched, eventually};

fn killed(mut rig: Rig, setup: &Setup) {
    kill(&mut rig);
    comes_back(rig, setup);
}

/// From now on nothing is in the way any more.
fn comes_back(mut rig: Rig, setup: &Setup) {
    rig.manager.answer_get(Answer::Normal);
    rig.manager.set(TOKEN, &rig.server.url());
    rig.server.always(Reply::Upgrade);
    assert_comes_back(&mut rig, setup);
}

#[test]
fn without_a_token() {
    let rig = Setup::new().token("").url("").start();
    rig.manager.wait_calls("FetchJwtToken", 1, SOON);
    killed(rig, &Setup::new());
}

#[test]
fn asking_for_a_token() {
    let rig = Setup::new().asking(Answer::Silent);
    killed(rig, &Setup::new());
}

#[test]
fn connecting() {
    let silent = Silent::start();
    let rig = Setup::new().url(&format!("http://{}", silent.address)).flag("--debug").start();
    rig.daemon.wait_for_log("-> Dialling", SOON);
    eventually(SOON, "the link's thread", || {
        proc::thread_names(rig.daemon.pid()).contains(&"link".to_owned()).then_some(())
    });
    killed(rig, &Setup::new());
}

/// A server that accepts connections, reads the first bytes of each and says nothing.
fn deaf() -> (Acceptor, &'static Watched<usize>) {
    // Needed as long as the acceptor's threads.
    let read: &'static Watched<usize> = Box::leak(Box::default());
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
    let acceptor = Acceptor::start("deaf", listener, |mut stream| {
        use std::io::Read;
        while let Ok(count @ 1..) = stream.read(&mut [0; 1024]) {
            read.update(|all| *all += count);
        }
    });
    (acceptor, read)
}

fn wait_read(read: &Watched<usize>) {
    assert!(read.wait(SOON, |count| (*count > 0).then_some(())).is_some(), "nothing came");
}

#[test]
fn asking_a_proxy() {
    let (proxy, read) = deaf();
    let setup = || Setup::new().env("HTTP_PROXY", &format!("http://{}", proxy.address()));
    let rig = setup().url("http://device.example").start();
    wait_read(read);
    killed(rig, &setup());
}

#[cfg(feature = "tls")]
#[test]
fn shaking_hands() {
    let (server, read) = deaf();
    let rig = Setup::new().url(&format!("https://{}", server.address())).start();
    wait_read(read);
    killed(rig, &Setup::new());
}

#[test]
fn upgrading() {
    let rig = Setup::new().start_with(|s| s.always(Reply::Silence));
    rig.server.wait_requests(1, SOON);
    killed(rig, &Setup::new());
}

#[test]
fn idle() {
    let (rig, device) = Rig::connected();
    killed(rig, &Setup::new());
    device.wait_end(SOON);
}

#[test]
fn backing_off() {
    let setup = || Setup::new().set("ReconnectIntervalSeconds", 300);
    let rig = setup().start_with(|s| s.always(Reply::status(500)));
    rig.daemon.wait_for_log("connectionmanager backoff", SOON);
    killed(rig, &setup());
}

/// The process id that a shell has printed behind this word.
fn pid_after(terminal: &mut Terminal, word: &str) -> u32 {
    terminal.read_until(word, SOON);
    let text = terminal.read_until("\r\n", SOON);
    text.trim().parse().expect("a process id")
}

/// In the foreground and in the background: an interactive shell passes its hang-up on to its jobs.
#[test]
fn with_a_shell_and_what_runs_in_it() {
    for end in ["", " &"] {
        let (rig, _device, mut terminal) = Setup::new().terminal();
        terminal.input(format!("sh -c 'echo job''=$$; exec sleep 1000'{end}\n"));
        let process = pid_after(&mut terminal, "job=");
        killed(rig, &Setup::new());
        eventually(SOON, &format!("process {process} to end"), || proc::has_ended(process).then_some(()));
    }
}

/// They don't mind that their terminals are gone.
#[test]
fn with_shells_that_ignore_a_hang_up() {
    let stubborn = "trap '' HUP INT QUIT PIPE; echo ready; while :; do read x || sleep 0.1; done";
    let setup = || Setup::new().config(script_config(stubborn));
    let (rig, device) = setup().connected();
    for _ in 0..3 {
        let mut terminal = Terminal::new(&device, Style::Cli);
        terminal.open();
        terminal.read_until("ready", SOON);
    }
    assert_eq!(proc::children(rig.daemon.pid()).len(), 3);
    killed(rig, &setup());
}

#[test]
fn with_a_job_that_was_detached() {
    let (rig, _device, mut terminal) = Setup::new().terminal();
    terminal.input("setsid sh -c 'echo detached''=$$; exec sleep 1000 >/dev/null 2>&1 </dev/null' &\n");
    let job = pid_after(&mut terminal, "detached=");
    killed(rig, &Setup::new());
    let ended = proc::has_ended(job);
    let _ = send_signal(Pid::from_raw(job as i32), Signal::SIGKILL);
    assert!(!ended, "what was detached on purpose stays");
}

#[test]
fn in_an_upload() {
    let (mut rig, device) = Rig::connected();
    let dir = rig.dir.path().join("files");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("old"), "old").unwrap();
    for name in ["old", "new"] {
        let rest = Rest::open(&device);
        rest.announce(&Form::to(dir.join(name))).unwrap();
        rest.send(FILES, "file_chunk", Some(0), b"half of it");
        rest.next();
    }
    kill(&mut rig);
    // Before anybody could have tidied up.
    assert_eq!(names(&dir), ["old"]);
    assert_eq!(fs::read(dir.join("old")).unwrap(), b"old");
    comes_back(rig, &Setup::new());
}

/// Each of many uploads is at another point, some of them at their ends.
#[test]
fn in_many_uploads() {
    let (mut rig, device) = Rig::connected();
    let dir = rig.dir.path().join("files");
    fs::create_dir(&dir).unwrap();
    let content = pattern(20_000);
    let uploads: Vec<Rest> = (0..24).map(|_| Rest::open(&device)).collect();
    for (n, rest) in uploads.iter().enumerate() {
        rest.announce(&Form::to(dir.join(n.to_string()))).unwrap();
    }
    for rest in &uploads {
        for (n, chunk) in content.chunks(4096).enumerate() {
            rest.send(FILES, "file_chunk", Some(n as u64 * 4096), chunk);
        }
    }
    for rest in uploads.iter().step_by(2) {
        rest.send(FILES, "file_chunk", Some(content.len() as u64), b"");
    }
    device.take(SOON, "the first complete file", |m| {
        m.typ == "ack" && m.prop("offset").and_then(rmpv::Value::as_u64) == Some(content.len() as u64)
    });
    kill(&mut rig);
    let left = names(&dir);
    println!("{} of 24 files were in place", left.len());
    assert!((1..=12).contains(&left.len()));
    for name in left {
        assert!(name.parse::<usize>().is_ok(), "{name}");
        assert!(fs::read(dir.join(&name)).unwrap() == content, "{name} is half-written");
    }
    comes_back(rig, &Setup::new());
}

/// The disk takes its time with the commit, in the middle of which the kill comes.
#[test]
fn in_a_commit() {
    let Some(disk) = slow_disk() else { return };
    let (mut rig, device) = Setup::new().wrapper(disk).connected();
    // The agent's mount ends with it, unless somebody looks at it.
    let mnt = File::open(format!("/proc/{}/root/mnt", rig.daemon.pid())).unwrap();
    let seen = PathBuf::from(format!("/proc/self/fd/{}", mnt.as_raw_fd()));
    fs::write(seen.join("old"), "old").unwrap();
    let uploads = ["old", "new"].map(|name| {
        let rest = Rest::open(&device);
        rest.announce(&Form::to(format!("/mnt/{name}"))).unwrap();
        rest.send(FILES, "file_chunk", Some(0), b"data");
        rest.next();
        rest
    });
    let frozen = crate::disk::Frozen::new(rig.daemon.pid());
    uploads.iter().for_each(|rest| rest.send(FILES, "file_chunk", Some(4), b""));
    eventually(SOON, "both commits to wait for the disk", || {
        let threads = proc::thread_names(rig.daemon.pid());
        (threads.iter().filter(|name| *name == "commit").count() == 2).then_some(())
    });
    rig.daemon.signal(Signal::SIGKILL);
    drop(frozen);
    rig.daemon.wait_exit(SOON);
    for name in names(&seen).iter().filter(|name| *name != "lost+found") {
        let content = fs::read(seen.join(name)).unwrap();
        assert!((name == "old" && content == b"old") || content == b"data", "{name}: {content:?}");
    }
    assert_no_temporary_files(&seen);
    comes_back(rig, &Setup::new());
}

#[test]
fn in_a_download() {
    let (rig, device) = Rig::connected();
    let path = rig.dir.path().join("large");
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    let rest = Rest::open(&device);
    rest.ask("get_file", &path_body(path.to_str().unwrap()));
    rest.next();
    device.set_reading(Reading::Paused);
    killed(rig, &Setup::new());
}

#[test]
fn with_a_forward() {
    let (rig, device) = Rig::connected();
    let target = Target::start(Role::Echo);
    let client = Client::open(&device);
    let connection = client.connect("tcp", "127.0.0.1", target.port()).opened();
    connection.write(b"there");
    assert_eq!(connection.read(5), b"there");
    killed(rig, &Setup::new());
    target.wait_ends(1);
}

#[test]
fn ending() {
    let stubborn =
        "trap '' HUP; trap 'sleep 1; exit' TERM; echo ready; while :; do read x || sleep 0.1; done";
    let setup = || Setup::new().config(script_config(stubborn));
    let (rig, device) = setup().connected();
    let mut terminal = Terminal::new(&device, Style::Cli);
    terminal.open();
    terminal.read_until("ready", SOON);
    rig.daemon.signal(Signal::SIGTERM);
    rig.daemon.wait_for_log("SIGTERM received", SOON);
    // It waits for the shell, for a second.
    device.wait_end(SOON);
    killed(rig, &setup());
}

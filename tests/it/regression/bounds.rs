//! Bounds of the whole device: memory, threads, descriptors, sessions. One client asks for all it can get while another
//! user types at a shell.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use nix::sys::socket::{Backlog, listen};
use serde_json::json;

use crate::commands::Fakes;
use crate::control::complaint;
use crate::files::names;
use crate::forwards::assert_echo;
use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Terminal, new_sid};
use crate::harness::connection::Connection;
use crate::harness::daemon::emulated;
use crate::harness::device::{Device, Reading};
use crate::harness::forward::{Client, target_body};
use crate::harness::msg::{self, COMMANDS, CONTROL, FILES, Ints, Msg, PORTS, SHELL};
use crate::harness::proc;
use crate::harness::rest::{Form, Rest, path_body};
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::server::Server;
use crate::harness::targets::{Role, Silent, Target};
use crate::harness::wait::{SOON, eventually, millis, secs};
use crate::harness::wire;
use crate::resources::{ROLES, echo_times, echoing};

/// Bound for the agent's resident memory at its peak.
const MAX_RSS_KIB: u64 = 40 << 10;
/// Bound for the median echo.
const MAX_ECHO: Duration = millis(100);
/// Other tests may take the processor from a whole round.
const ROUNDS: usize = 3;

/// Its shells are for [`echoing`].
fn setup() -> Setup {
    Setup::new().config(script_config(ROLES))
}

/// Another user, at a shell.
struct Bystander {
    agent: u32,
    terminal: Terminal,
}

impl Bystander {
    fn start(rig: &Rig, device: &Device) -> Bystander {
        Bystander { agent: rig.daemon.pid(), terminal: echoing(device) }
    }

    /// Types a key behind each step of `load`. The median echo and the agent's memory must stay within their bounds.
    fn types_behind(&mut self, steps: usize, mut load: impl FnMut(usize)) {
        let mut round = || {
            let mut times: Vec<Duration> = (0..steps)
                .map(|step| {
                    load(step);
                    echo_times(&mut self.terminal, 1)[0]
                })
                .collect();
            times.sort_unstable();
            println!("echo median {:?}, worst {:?}", times[steps / 2], times[steps - 1]);
            times[steps / 2]
        };
        let quick = (0..ROUNDS).any(|_| round() < MAX_ECHO);
        assert!(
            quick || emulated("its speed is the emulator's"),
            "the median echo took more than {MAX_ECHO:?}"
        );
        self.assert_memory();
    }

    fn assert_memory(&self) {
        let peak = proc::peak_rss_kib(self.agent);
        println!("peak {peak} KiB");
        assert!(peak < MAX_RSS_KIB || emulated("its memory is the emulator's, too"), "{peak} KiB");
    }

    /// Asserts that the shell works, and stops it.
    fn leave(mut self) {
        echo_times(&mut self.terminal, 1);
        self.assert_memory();
        self.terminal.ask_stop();
        assert_eq!(self.terminal.expect_after_output("stop", SOON).status(), Some(1));
    }
}

/// A target whose connections only the kernel accepts.
fn unread_target() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
    listen(&listener, Backlog::new(1024).expect("a backlog")).expect("a longer backlog");
    listener
}

fn port(listener: &TcpListener) -> u16 {
    listener.local_addr().expect("an address").port()
}

fn close(device: &Device, sid: &str) {
    device.send(CONTROL, "close", sid, &[("user_id", "u".into())], b"");
}

/// The bound was 1 MiB a forward, with 512 forwards a session and any number that outlived their clients: one session
/// made the agent hold 749 MiB. The target does not even accept: for one that only doesn't read, the kernel's loopback
/// buffers take the whole mebibyte.
#[test]
fn forwards_to_a_target_that_takes_nothing() {
    let (mut rig, device) = setup().connected();
    let mut other = Bystander::start(&rig, &device);
    let (target, client) = (Silent::start(), Client::open(&device));
    let forwards: Vec<Connection> =
        (0..512).map(|_| client.connect("tcp", "127.0.0.1", target.address.port())).collect();
    let piece = vec![7; 64 << 10];
    other.types_behind(64, |step| {
        for forward in &forwards[step * 8..][..8] {
            for _ in 0..4 {
                (0..4).for_each(|_| forward.send_anyway(&piece));
                // Otherwise the inbox, which has its own bound, could overflow first.
                client.settle();
            }
        }
    });
    let error = client.next_error();
    assert!(error.text.starts_with("the target does not read and "), "{error:?}");
    assert!(client.errors() > 500, "{} more errors", client.errors());
    drop(target);
    close(&device, client.sid());
    other.leave();
    assert_healthy(&mut rig, &device);
}

/// The kernel took 4 MiB for each forward whose target doesn't read, and the agent acknowledged it all.
#[test]
fn a_target_that_does_not_read_takes_little_of_the_kernels_memory() {
    let (_rig, device) = setup().connected();
    let (target, client) = (unread_target(), Client::open(&device));
    let forward = client.connect("tcp", "127.0.0.1", port(&target)).opened();
    let piece = vec![7; 64 << 10];
    let mut acknowledged = 0;
    while acknowledged < 64 {
        forward.send(&piece);
        if !forward.acked_within(millis(500)) {
            break;
        }
        acknowledged += 1;
    }
    println!("{acknowledged} pieces of 64 KiB acknowledged");
    assert!(acknowledged < 16, "{acknowledged} pieces");
    client.close();
}

/// Neither inboxes nor answers had a bound in bytes: one session whose answers nobody read held 687 MiB.
#[test]
fn answers_that_nobody_reads() {
    let (mut rig, device) = setup().connected();
    let mut other = Bystander::start(&rig, &device);
    let body = path_body(rig.deep_directory().to_str().expect("UTF-8"));
    device.set_reading(Reading::Paused);
    let sids: Vec<String> = (0..12).map(|_| new_sid()).collect();
    let user = [("user_id", "u".into())];
    for sid in sids.iter().flat_map(|sid| std::iter::repeat_n(sid, 1000)) {
        device.send(FILES, "stat", sid, &user, &body);
    }
    rig.daemon.wait_for_log("inbox full", SOON);
    println!("{} threads", proc::threads(rig.daemon.pid()));
    device.set_reading(Reading::Full);
    assert!(device.answers(b"all of it", secs(60)), "the link ended");
    other.types_behind(20, |_| ());
    // A session goes on, or it was closed and its id is free.
    for sid in &sids {
        eventually(SOON, "a pong", || {
            device.drain(sid);
            device.send(CONTROL, "ping", sid, &user, b"");
            let pong =
                |m: &Msg| m.sid.as_ref() == Some(sid) && (m.proto, m.typ.as_str()) == (CONTROL, "pong");
            device.try_take(millis(500), pong).map(|pong| pong.expect("a link"))
        });
        close(&device, sid);
    }
    other.leave();
    assert_healthy(&mut rig, &device);
}

/// A forward needed memory for what its target took at once: when another user held all 16 MiB it was told that its
/// target doesn't read.
#[test]
fn a_forward_needs_no_memory_while_its_target_reads() {
    let (mut rig, device) = setup().connected();
    let (unread, echo) = (Silent::start(), Target::start(Role::Echo));
    let client = Client::open(&device);
    let forward = client.connect("tcp", "127.0.0.1", echo.port());
    assert_echo(&forward, b"before");
    // In as few pieces as possible, since acks that are owed count, too; what is left in ever smaller ones, of which so few
    // in a session that its answers need no memory.
    let send = |size: usize, forwards: usize, pieces: usize| {
        let client = Client::open(&device);
        let piece = vec![7; size];
        for _ in 0..forwards {
            let forward = client.connect("tcp", "127.0.0.1", unread.address.port());
            for _ in 0..pieces {
                if client.errors() == 0 {
                    forward.send_anyway(&piece);
                    client.settle();
                }
            }
        }
        client
    };
    let mut greedy: Vec<Client> = (0..3).map(|_| send(64_000, 4, 16)).collect();
    // Until there is none left: the kernel may take some more of what waits.
    let full = |client: &Client| client.errors() > 0;
    while !greedy.last().is_some_and(full) {
        assert!(greedy.len() < 100, "there is memory left");
        greedy.push(send(15_000, 1, 12));
        if greedy.last().is_some_and(full) {
            greedy.extend([3000, 500, 20].map(|size| send(size, 1, 12)));
        }
    }
    assert_echo(&forward, &vec![1; 100_000]);
    greedy.iter().for_each(|client| close(&device, client.sid()));
    client.close();
    assert_healthy(&mut rig, &device);
}

/// At 1 Mbit/s a key's echo waited for 256 answers of 4 KiB to another user, 10 s.
#[test]
fn a_flood_of_requests_leaves_echoes_quick_on_a_slow_link() {
    let rig = setup().start_with(|s: &Server| s.small_receive_buffer(32 << 10));
    let device = rig.device();
    let mut other = Bystander::start(&rig, &device);
    let body = path_body(rig.deep_directory().to_str().expect("UTF-8"));
    let sid = new_sid();
    device.discard(&sid);
    device.set_reading(Reading::Rate(125_000));
    let mut worst = Duration::ZERO;
    for _ in 0..5 {
        (0..400).for_each(|_| device.send(FILES, "stat", &sid, &[("user_id", "u".into())], &body));
        worst = worst.max(echo_times(&mut other.terminal, 1)[0]);
    }
    println!("worst echo {worst:?}");
    assert!(worst < secs(4) || emulated("its speed is the emulator's"), "{worst:?}");
    device.set_reading(Reading::Full);
    other.leave();
}

/// One session may have no more than two, but each of hundreds waited with one, in a queue before the first: 9 s.
#[test]
fn a_flood_in_many_sessions_leaves_echoes_quick_on_a_slow_link() {
    let rig = setup().start_with(|s: &Server| s.small_receive_buffer(32 << 10));
    let device = rig.device();
    let mut other = Bystander::start(&rig, &device);
    let sids: Vec<String> = (0..250).map(|_| new_sid()).collect();
    sids.iter().for_each(|sid| device.discard(sid));
    let (typ, props) = ("x".repeat(250), [("user_id", "u".into()), ("msgid", "m".repeat(250).into())]);
    device.set_reading(Reading::Rate(125_000));
    let mut worst = Duration::ZERO;
    for _ in 0..5 {
        sids.iter().for_each(|sid| (0..8).for_each(|_| device.send(CONTROL, &typ, sid, &props, b"")));
        worst = worst.max(echo_times(&mut other.terminal, 1)[0]);
    }
    println!("worst echo {worst:?}");
    assert!(worst < secs(4) || emulated("its speed is the emulator's"), "{worst:?}");
    device.set_reading(Reading::Full);
    sids.iter().for_each(|sid| close(&device, sid));
    other.leave();
}

/// Waiting requests kept their bodies: 133 MiB for up to ten minutes.
#[test]
fn commands_that_wait_keep_no_bodies() {
    let Some(mut fakes) = Fakes::start(setup()) else { return };
    let release = fakes.install_waiting("mender-update", "exit 0");
    let mut other = Bystander::start(&fakes.rig, &fakes.device);
    fakes.order("check-update");
    fakes.wait_calls(1);
    let body = vec![7; 1 << 20];
    let sids: Vec<String> = (0..80).map(|_| new_sid()).collect();
    let device = fakes.device.clone();
    other.types_behind(sids.len(), |step| {
        device.send(COMMANDS, "check-update", &sids[step], &[], &body);
    });
    release();
    // The run's own request is one of the 64 that wait; further ones get no answer.
    for sid in &sids[..63] {
        assert_eq!(device.next_of(sid, SOON).status(), Some(1));
    }
    other.leave();
    device.nothing(millis(150), "no answer", |m| sids[63..].iter().any(|sid| m.sid.as_ref() == Some(sid)));
    assert_healthy(&mut fakes.rig, &device);
}

/// Each `new` with a fresh id started a thread, and only that found no permit for a shell: 1,200 threads.
#[test]
fn a_burst_of_new_shells() {
    if emulated("it takes too long to end so many shells") {
        return;
    }
    let setup = setup().set("Sessions", json!({ "MaxPerUser": 60_000 }));
    let (mut rig, device) = setup.connected();
    let mut other = Bystander::start(&rig, &device);
    let user = [("user_id", "many".into())];
    let (pid, mut most) = (rig.daemon.pid(), 0);
    let all: Vec<String> = (0..60_000).map(|_| new_sid()).collect();
    all.iter().for_each(|sid| device.discard(sid));
    other.types_behind(600, |step| {
        for sid in &all[step * 100..][..100] {
            device.send(SHELL, "new", sid, &user, b"");
        }
        most = most.max(proc::threads(pid));
    });
    println!("{most} threads");
    assert!(most < 300, "{most} threads");
    let sessions = rig.status()["sessions"].as_array().expect("sessions").len();
    assert_eq!(sessions, 16, "one for each shell");
    // Without a session id: all shells of this user.
    device.send(SHELL, "stop", "", &user, b"");
    other.leave();
    assert_healthy(&mut rig, &device);
}

/// A `pong` behind a `close` kept the session for another minute: the agent had asked before it read the `close`.
#[test]
fn a_pong_behind_a_close_keeps_no_session() {
    let (mut rig, device) = setup().connected();
    let other = Bystander::start(&rig, &device);
    let user = [("user_id", "u".into())];
    let message = |sid: &str, typ| {
        let value = msg::message(CONTROL, typ, sid, &user, b"");
        wire::encode(true, wire::BINARY, &msg::encode(&value, Ints::Compact))
    };
    for _ in 0..20 {
        let sid = new_sid();
        device.send(CONTROL, "ping", &sid, &user, b"");
        device.next_of(&sid, SOON);
        // In one write, so that the session finds them together.
        let both = [message(&sid, "close"), message(&sid, "pong")].concat();
        device.write(&both).expect("write to the device");
    }
    other.leave();
    assert_healthy(&mut rig, &device);
}

/// Under systemd's soft limit of 1,024 descriptors, 512 forwards in each of two sessions left nobody else a shell, a file
/// or `status`.
#[test]
fn forwards_leave_descriptors_to_others() {
    let (mut rig, device) = setup().wrapper("exec prlimit --nofile=1024:1024 \"$@\"").connected();
    let mut other = Bystander::start(&rig, &device);
    let target = unread_target();
    let mut opened = 0;
    let sessions: Vec<Client> = (0..2).map(|_| Client::open(&device)).collect();
    for client in &sessions {
        let mut forwards = Vec::new();
        other.types_behind(16, |_| {
            forwards.extend((0..36).map(|_| client.connect("tcp", "127.0.0.1", port(&target))));
        });
        eventually(SOON, "all answers", || {
            let open = forwards.iter().filter(|forward| forward.is_open()).count();
            (open + client.errors() == forwards.len()).then(|| opened += open)
        });
        let error = client.next_error();
        assert_eq!(error.text, "too many connections");
    }
    println!("{opened} forwards, {} descriptors", proc::descriptors(rig.daemon.pid()));
    assert!((513..1024 - 64).contains(&opened), "{opened} forwards");
    let another = Bystander::start(&rig, &device);
    let path = rig.dir.path().join("file");
    Rest::upload(&device, &Form::to(&path), b"content").expect("an upload");
    let name = path.to_str().expect("UTF-8");
    assert_eq!(Rest::download(&device, name).expect("a download").bytes, b"content");
    assert_eq!(rig.status()["pid"], rig.daemon.pid());
    another.leave();
    drop(target);
    sessions.iter().for_each(|client| close(&device, client.sid()));
    other.leave();
    assert_healthy(&mut rig, &device);
}

/// As many forwards as a session may have.
fn open_most(device: &Device, sid: &str) {
    device.discard(sid);
    for n in 0..512 {
        let props = [("user_id", "u".into()), ("connection_id", n.to_string().into())];
        device.send(PORTS, "new", sid, &props, &target_body("127.0.0.1", 9, "udp"));
    }
    assert!(device.answers(sid.as_bytes(), secs(60)));
}

/// One descriptor was left for each session, but one that uploads has four: 80 uploads beside 3,760 forwards left nobody
/// a shell or `status` under the kernel's own limit of 4,096, which init scripts keep.
#[test]
fn forwards_leave_descriptors_to_uploads() {
    let (mut rig, device) = setup().wrapper("exec prlimit --nofile=1024:4096 \"$@\"").connected();
    let mut sids: Vec<String> = (0..8).map(|_| new_sid()).collect();
    sids.iter().for_each(|sid| open_most(&device, sid));
    let files = rig.dir.path().join("files");
    std::fs::create_dir(&files).expect("a directory");
    for n in 0..240 {
        let sid = new_sid();
        device.discard(&sid);
        let user = [("user_id", "u".into())];
        device.send(FILES, "stat", &sid, &user, &path_body("/proc/self/mountinfo"));
        device.send(FILES, "put_file", &sid, &user, &Form::to(files.join(n.to_string())).body());
        sids.push(sid);
    }
    assert!(device.answers(b"all of it", SOON));
    eventually(SOON, "the uploads", || (rig.daemon.count_log("event=stat") == 240).then_some(()));
    println!("{} descriptors", proc::descriptors(rig.daemon.pid()));
    Bystander::start(&rig, &device).leave();
    assert_eq!(rig.status()["pid"], rig.daemon.pid());
    sids.iter().for_each(|sid| close(&device, sid));
    eventually(SOON, "the uploads' ends", || names(&files).is_empty().then_some(()));
    assert_healthy(&mut rig, &device);
}

/// A client that never closed its sessions soon had all 256, and nobody got another until one had been idle for a minute.
#[test]
fn sessions_that_are_left_open_make_room() {
    let (mut rig, device) = setup().connected();
    let mut other = Bystander::start(&rig, &device);
    let path = rig.dir.path().join("file");
    std::fs::write(&path, "content").expect("write");
    let body = path_body(path.to_str().expect("UTF-8"));
    let (started, mut left) = (Instant::now(), Vec::new());
    let ended = || rig.daemon.count_log("reason=\"too many sessions\"");
    other.types_behind(300, |step| {
        // On a busy machine their threads take longer to end than others to come.
        eventually(SOON, "room for another session", || {
            (ended() + 260 > step || started.elapsed() > secs(48)).then_some(())
        });
        let rest = Rest::open(&device);
        rest.ask("get_file", &body);
        let mut bytes = Vec::new();
        rest.receive(|chunk| bytes.extend_from_slice(chunk)).expect("a download");
        assert_eq!(bytes, b"content");
        left.push(rest);
    });
    // Had it taken longer, some would have ended by themselves.
    if started.elapsed() < secs(48) {
        eventually(SOON, "sessions to be ended for others", || (ended() >= left.len() - 256).then_some(()));
    }
    left.iter().for_each(Rest::close);
    other.leave();
    assert_healthy(&mut rig, &device);
}

/// Busy sessions are not ended for others, but they leave threads for shells.
#[test]
fn busy_sessions_leave_shells_to_others() {
    let (mut rig, device) = setup().connected();
    // Its session is one of the 256.
    let mut other = Bystander::start(&rig, &device);
    let files = rig.dir.path().join("files");
    std::fs::create_dir(&files).expect("a directory");
    let mut uploads = Vec::new();
    other.types_behind(255, |step| {
        if uploads.len() == step {
            let rest = Rest::open(&device);
            rest.announce(&Form::to(files.join(step.to_string()))).expect("an upload");
            uploads.push(rest);
        }
    });
    // Nor do they keep other users from their first ones.
    let sids = [new_sid(), new_sid(), new_sid()];
    for (sid, answer) in sids.iter().zip(["new", "new", "error"]) {
        let props = [("user_id", "u".into()), ("connection_id", "c".into())];
        device.send(PORTS, "new", sid, &props, &target_body("127.0.0.1", 9, "udp"));
        let msg = device.next_of(sid, SOON);
        assert_eq!(msg.typ, answer);
        if answer == "error" {
            let (text, close, ..) = complaint(&msg);
            assert_eq!((text.as_str(), close), ("too many sessions", true));
        }
    }
    Bystander::start(&rig, &device).leave();
    sids[..2].iter().for_each(|sid| close(&device, sid));
    // All of them go on.
    for rest in &uploads {
        rest.send(FILES, "file_chunk", Some(0), b"content");
        assert_eq!(rest.next().typ, "ack");
        rest.close();
    }
    other.leave();
    eventually(SOON, "the uploads' ends", || names(&files).is_empty().then_some(()));
    assert_healthy(&mut rig, &device);
}

/// Sixteen threads are for shells, but a session that began with a shell and went on without it kept its own: one user
/// had them all, and nobody else got a shell.
#[test]
fn sessions_that_outlive_their_shells_leave_shells_to_others() {
    let (mut rig, device) = setup().connected();
    let forward = |sid: &str| {
        let props = [("user_id", "u".into()), ("connection_id", "c".into())];
        device.send(PORTS, "new", sid, &props, &target_body("127.0.0.1", 9, "udp"));
        device.next_of(sid, SOON)
    };
    let sids: Vec<String> = (0..256).map(|_| new_sid()).collect();
    sids.iter().for_each(|sid| assert_eq!(forward(sid).typ, "new"));
    let mut went_on = Vec::new();
    for _ in 0..16 {
        let terminal = echoing(&device);
        if forward(&terminal.sid).typ == "new" {
            went_on.push(terminal.sid.clone());
        }
        terminal.ask_stop();
        assert_eq!(terminal.expect_after_output("stop", SOON).status(), Some(1));
    }
    println!("{} sessions went on", went_on.len());
    Bystander::start(&rig, &device).leave();
    sids.iter().chain(&went_on).for_each(|sid| close(&device, sid));
    assert_healthy(&mut rig, &device);
}

/// One user could hold all of the 16 MiB, and others' uploads ended with "inbox full".
#[test]
fn a_user_leaves_memory_to_others() {
    let (mut rig, device) = setup().connected();
    let unread = Silent::start();
    let mut sids = Vec::new();
    // A session that asks for more than there is ends, so each has little, and the last ones fill what is left.
    let sizes =
        [(64_000, 17), (3000, 30)].into_iter().flat_map(|(size, count)| std::iter::repeat_n(size, count));
    for size in sizes {
        let (sid, props) = (new_sid(), [("user_id", "u".into()), ("connection_id", "c".into())]);
        device.send(PORTS, "new", &sid, &props, &target_body("127.0.0.1", unread.address.port(), "tcp"));
        (0..15).for_each(|_| device.send(PORTS, "forward", &sid, &props, &vec![7; size]));
        device.send(CONTROL, "ping", &sid, &props[..1], b"");
        device.take(SOON, "a pong or an end", |m| m.sid.as_deref() == Some(&sid) && m.proto == CONTROL);
        sids.push(sid);
    }
    let files = rig.dir.path().join("file");
    let rest = Rest::open(&device);
    rest.announce(&Form::to(&files)).expect("an upload");
    rest.send(FILES, "file_chunk", Some(0), &vec![7; 100_000]);
    assert_eq!(rest.next().typ, "ack");
    rest.close();
    sids.iter().for_each(|sid| close(&device, sid));
    assert_healthy(&mut rig, &device);
}

/// One user could have all of the device's 4,096 forwards.
#[test]
fn a_user_leaves_forwards_to_others() {
    let (mut rig, device) = setup().connected();
    let echo = Target::start(Role::Echo);
    let sids: Vec<String> = (0..9).map(|_| new_sid()).collect();
    sids.iter().for_each(|sid| open_most(&device, sid));
    rig.daemon.wait_for_log("too many forwarded connections", SOON);
    let client = Client::open(&device);
    assert_echo(&client.connect("tcp", "127.0.0.1", echo.port()), b"works");
    client.close();
    sids.iter().for_each(|sid| close(&device, sid));
    assert_healthy(&mut rig, &device);
}

//! The harness tried on itself, with a tungstenite client in the agent's place: a harness that
//! misses things would make every other test worthless.

use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use dbus::Message as BusMessage;
use dbus::channel::Channel;
use rmpv::Value;
use tungstenite::client::IntoClientRequest;
use tungstenite::stream::MaybeTlsStream;
use tungstenite::{Message, WebSocket};

use crate::harness::bus::Bus;
use crate::harness::client::{Style, Terminal};
use crate::harness::device::{Device, Generation, Reading};
use crate::harness::front::Proxy;
use crate::harness::manager::{self, Answer, Manager};
use crate::harness::msg::{self, Ints, SHELL};
use crate::harness::program;
use crate::harness::server::{CONNECT_PATH, Reply, Server};
use crate::harness::tls::{Authority, TlsFront};
use crate::harness::trace::changed;
use crate::harness::wait::{SOON, eventually, millis, secs, spawn};
use crate::harness::wire;

pub type Client = WebSocket<MaybeTlsStream<TcpStream>>;

/// Dials as a device does.
fn dial(server: &Server) -> Result<Client, String> {
    let mut request = format!("ws://{}{CONNECT_PATH}", server.address())
        .into_client_request()
        .map_err(|e| e.to_string())?;
    request.headers_mut().insert("Authorization", "Bearer token".parse().expect("a header value"));
    tungstenite::connect(request).map(|(socket, _)| socket).map_err(|e| e.to_string())
}

pub fn pair(generation: Generation) -> (Server, Client, Device) {
    let server = Server::start(generation);
    let client = dial(&server).expect("the handshake succeeds");
    let device = server.device();
    (server, client, device)
}

fn reply(terminal: &Terminal, typ: &str, status: i64, body: &[u8]) -> Message {
    let props = [("status", Value::from(status))];
    Message::binary(msg::encode(&msg::message(SHELL, typ, &terminal.sid, &props, body), Ints::Compact))
}

#[test]
fn messages_travel_both_ways() {
    let (_server, mut client, device) = pair(Generation::New);
    let mut terminal = Terminal::new(&device, Style::Gui);
    terminal.input("ls");
    let got = client.read().expect("a message").into_data();
    let value = rmpv::decode::read_value(&mut &got[..]).expect("msgpack");
    assert_eq!(value["body"], Value::from("ls"), "the web interface sends keystrokes as str");
    assert_eq!(value["hdr"]["props"]["user_id"].as_str(), Some(terminal.user.as_str()));
    client.send(reply(&terminal, "new", 1, b"Shell started")).expect("send");
    terminal.expect("new", 1, Some("Shell started"));
    client.send(reply(&terminal, "shell", 1, b"one ")).expect("send");
    client.send(reply(&terminal, "shell", 1, b"two# ")).expect("send");
    assert_eq!(terminal.prompt(), "one two# ");
}

#[test]
fn clients_write_as_their_originals() {
    let (_server, mut client, device) = pair(Generation::New);
    let mut read = || client.read().expect("a message").into_data();
    Terminal::new(&device, Style::Cli).ask_new();
    let wide = read();
    let needle = [b"terminal_width".as_slice(), &[0xd3, 0, 0, 0, 0, 0, 0, 0, 80]].concat();
    assert!(wide.windows(needle.len()).any(|w| w == needle), "mender-cli's integers are eight bytes wide");
    Terminal::new(&device, Style::Python).ask_stop();
    assert!(read().ends_with(b"\xa4body\xc4\x00"), "the Python client sends an empty bin");
    Terminal::new(&device, Style::Gui).ask_new();
    assert!(!read().windows(5).any(|w| w == b"width"), "the web interface names no size in new");
    assert!(read().windows(15).any(|w| w == b"terminal_width\x50"), "but resizes at once, compactly");
}

#[test]
fn what_no_server_could_read_is_noticed() {
    for (bytes, complaint) in [
        (&b"\xc1"[..], "expected a map"),
        (b"\x82\xa3hdr", "not msgpack"),
        (b"\x80", "no proto"),
        (b"\x81\xa3hdr\x82\xa5proto\x01\xa3typ\xa3new", "without sid"),
        (b"\x82\xa3hdr\x82\xa5proto\x02\xa3typ\xa3ack\xa4body\xc4\x00", "empty body"),
        (b"\x82\xa3hdr\x82\xa5proto\x02\xa3typ\xa3ack\xa4body\x91\x01", "unexpected field body"),
        (b"\x81\xa3hdr\x82\xa5proto\x02\xa3typ\xa3ack\x00", "after the document"),
    ] {
        let (_server, mut client, device) = pair(Generation::New);
        client.send(Message::binary(bytes)).expect("send");
        client.close(None).expect("close");
        device.wait_close(SOON);
        let broken = device.broken().join(" ");
        assert!(broken.contains(complaint), "{bytes:02x?}: {broken:?} should name {complaint:?}");
    }
}

#[test]
fn handshakes_follow_the_script() {
    let server = Server::start(Generation::New);
    server.script([Reply::status(401), Reply::WrongAccept, Reply::Close]);
    assert!(dial(&server).unwrap_err().contains("401"));
    assert!(dial(&server).unwrap_err().to_lowercase().contains("accept"));
    dial(&server).unwrap_err();
    dial(&server).expect("after the script it upgrades");
    assert_eq!(server.requests()[0].path, CONNECT_PATH);
    server.require_token("other");
    assert!(dial(&server).unwrap_err().contains("401"));
}

#[test]
fn a_stopped_server_refuses_and_comes_back() {
    let mut server = Server::start(Generation::New);
    let url = server.url();
    server.stop();
    dial(&server).unwrap_err();
    server.resume();
    assert_eq!(server.url(), url);
    dial(&server).expect("listening again");
}

#[test]
fn control_frames_and_endings_are_seen() {
    let (_server, mut client, device) = pair(Generation::Released);
    device.ping(b"42");
    assert_eq!(client.read().expect("a ping"), Message::Ping(b"42".as_slice().into()));
    client.flush().expect("the pong leaves");
    device.wait_pong(b"42", SOON);
    client.send(Message::Ping(b"43".as_slice().into())).expect("ping");
    assert_eq!(device.wait_pings(1, SOON)[0].1, b"43");
    assert_eq!(client.read().expect("the pong"), Message::Pong(b"43".as_slice().into()));
    device.close_frame(1011, "internal error");
    let Message::Close(Some(frame)) = client.read().expect("close") else { panic!("no close frame") };
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (1011, "internal error"));

    let (_server, mut client, device) = pair(Generation::New);
    device.reset();
    let error = client.read().unwrap_err().to_string();
    assert!(error.contains("reset"), "a reset looks like one: {error}");
    let (_server, mut client, device) = pair(Generation::New);
    device.hang_up();
    let error = client.read().unwrap_err().to_string();
    assert!(error.contains("without"), "closed without a close frame: {error}");
    drop(client);
    let (_server, client, device) = pair(Generation::New);
    drop(client);
    assert_eq!(device.wait_end(SOON), "the device closed the connection");
}

#[test]
fn fragments_and_raw_frames_can_be_sent() {
    let (_server, mut client, device) = pair(Generation::New);
    device.send_fragmented(&[7; 1000], 300);
    assert_eq!(client.read().expect("one message").into_data(), vec![7; 1000]);
    device.send_frame(true, wire::TEXT, b"text");
    assert_eq!(client.read().expect("a text"), Message::text("text"));
}

#[test]
fn reading_can_be_paused_and_throttled() {
    let server = Server::start(Generation::New);
    server.small_receive_buffer(256 << 10);
    let mut client = dial(&server).expect("the handshake succeeds");
    let device = server.device();
    device.set_reading(Reading::Paused);
    let writer = spawn("writer", move || {
        let message = msg::encode(&msg::message(2, "x", "s", &[], &vec![0; 1 << 20]), Ints::Compact);
        for _ in 0..16 {
            client.send(Message::binary(message.clone())).expect("send");
        }
        client
    });
    device.nothing(millis(200), "nothing arrives while paused", |_| true);
    assert!(!writer.is_finished(), "16 MiB don't fit into socket buffers");
    device.set_reading(Reading::Rate(1 << 20));
    let (before, start) = (device.bytes(), Instant::now());
    device.take(SOON, "the first message", |_| true);
    let rate = (device.bytes() - before) as f64 / start.elapsed().as_secs_f64();
    assert!(rate < 2.5 * f64::from(1 << 20), "throttled to 1 MiB/s, got {rate} B/s");
    device.set_reading(Reading::Full);
    for _ in 1..16 {
        device.next(SOON);
    }
    writer.join().expect("the writer is done");
}

fn call(bus: &Channel, member: &str, limit: Duration) -> Result<BusMessage, dbus::Error> {
    let call =
        BusMessage::new_method_call(manager::NAME, manager::PATH, manager::INTERFACE, member).expect("valid");
    bus.send_with_reply_and_block(call, limit)
}

#[test]
fn the_manager_answers_signals_and_comes_back() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut bus = Bus::start(dir.path());
    let mut manager = Manager::start(&bus.address(), "tok", "http://x");
    let mut client = Channel::open_private(&bus.address()).expect("connect");
    client.register().expect("register");
    let rule = format!("type='signal',interface='{}'", manager::INTERFACE);
    let add = BusMessage::new_method_call("org.freedesktop.DBus", "/", "org.freedesktop.DBus", "AddMatch")
        .expect("valid");
    client.send_with_reply_and_block(add.append1(rule), SOON).expect("match");

    let reply = call(&client, "GetJwtToken", SOON).expect("an answer");
    assert_eq!(reply.get2::<String, String>(), (Some("tok".to_owned()), Some("http://x".to_owned())));
    assert!(
        call(&client, "Introspect", SOON).unwrap_err().name().unwrap_or_default().ends_with("UnknownMethod")
    );
    manager.answer_get(Answer::Late(millis(150)));
    let start = Instant::now();
    call(&client, "GetJwtToken", SOON).expect("a late answer");
    assert!(start.elapsed() >= millis(150));
    manager.answer_get(Answer::Silent);
    call(&client, "GetJwtToken", millis(100)).unwrap_err();
    manager.answer_get(Answer::WrongTypes);
    assert_eq!(call(&client, "GetJwtToken", SOON).expect("an answer").get1::<i32>(), Some(7));
    manager.answer_get(Answer::Normal);

    manager.on_fetch("tok2", "http://y");
    assert_eq!(call(&client, "FetchJwtToken", SOON).expect("an answer").get1::<bool>(), Some(true));
    let signal = next_signal(&client);
    assert_eq!(signal.get2::<String, String>(), (Some("tok2".to_owned()), Some("http://y".to_owned())));
    manager.signal("a", "b");
    assert_eq!(next_signal(&client).get1::<String>(), Some("a".to_owned()));
    assert_eq!(manager.calls("FetchJwtToken").len(), 1);
    manager.wait_calls("GetJwtToken", 4, SOON);

    manager.release_name();
    eventually(SOON, "the name to be free", || call(&client, "GetJwtToken", SOON).err());
    manager.own_name();
    eventually(SOON, "the name to be back", || call(&client, "GetJwtToken", SOON).ok());
    manager.vanish();
    call(&client, "GetJwtToken", SOON).unwrap_err();
    bus.restart();
    manager.appear();
    let mut client = Channel::open_private(&bus.address()).expect("connect again");
    client.register().expect("register again");
    call(&client, "GetJwtToken", SOON).expect("an answer on the new bus");
}

fn next_signal(client: &Channel) -> BusMessage {
    let deadline = Instant::now() + SOON;
    loop {
        while let Some(message) = client.pop_message() {
            if message.interface().is_some_and(|i| &*i == manager::INTERFACE) {
                return message;
            }
        }
        let left = deadline.checked_duration_since(Instant::now()).expect("a signal in time");
        client.read_write(Some(left)).expect("the bus lives");
    }
}

#[test]
fn the_tls_front_and_the_proxy_relay() {
    let server = Server::start(Generation::New);
    let authority = Authority::new();
    let front = TlsFront::start(&authority.identity(&["127.0.0.1"]), server.address());
    let proxy = Proxy::start(server.address());
    let mut stream = TcpStream::connect(proxy.authority()).expect("connect");
    {
        use std::io::{Read, Write};
        stream.set_read_timeout(Some(secs(5))).expect("a time-out");
        stream
            .write_all(b"CONNECT device.example:80 HTTP/1.1\r\nHost: device.example:80\r\n\r\n")
            .expect("write");
        let mut head = [0; 12];
        stream.read_exact(&mut head).expect("an answer");
        assert_eq!(&head, b"HTTP/1.1 200");
    }
    assert_eq!(proxy.requests()[0].path, "device.example:80");
    // Plain text at the TLS front is a failed handshake, and it is noticed.
    let mut plain = TcpStream::connect(("127.0.0.1", front.port())).expect("connect");
    std::io::Write::write_all(&mut plain, b"GET / HTTP/1.1\r\n\r\n").expect("write");
    assert!(!front.wait_failure(SOON).is_empty());
}

#[test]
fn changes_are_told_from_looks() {
    let change = |line: &str, path: &str| {
        assert_eq!(changed(line), Some(vec![path.into()]), "{line}");
    };
    change(
        r#"openat(AT_FDCWD</tmp>, "x", O_WRONLY|O_CREAT, 0666) = -1 EROFS (Read-only file system)"#,
        "/tmp/x",
    );
    change(r#"openat(AT_FDCWD</tmp>, "/dev/link", O_RDWR) = 5</dev/pts/3>"#, "/dev/pts/3");
    change(
        r#"openat2(7</d>, "x", {flags=O_RDWR|O_CLOEXEC, resolve=RESOLVE_BENEATH}, 24) = -1 EACCES (x)"#,
        "/d/x",
    );
    change("fchmod(5</d/x>, 0644) = 0", "/d/x");
    change(r#"mkdir("/run/x", 0700) = 0"#, "/run/x");
    change(r#"bind(5<socket:[1]>, {sa_family=AF_UNIX, sun_path="/run/s"}, 110) = 0"#, "/run/s");
    change(r#"something_new("/x") = 0"#, "/x");
    change(
        r#"openat(7</d>, ".", O_WRONLY|O_CLOEXEC|O_TMPFILE, 0200) = 8</d/#12 (deleted)>"#,
        "/d/#12 (deleted)",
    );
    change(r#"openat(7</d>, ".", O_WRONLY|O_CLOEXEC|O_TMPFILE, 0200) = -1 EROFS (x)"#, "/d/#");
    change(r#"linkat(AT_FDCWD</>, "/proc/self/fd/8", 7</d>, "x", AT_SYMLINK_FOLLOW) = 0"#, "/d/x");
    let rename = r#"renameat(6</d>, "a", 7</e>, "/b") = 0"#;
    assert_eq!(changed(rename), Some(vec!["/d/a".into(), "/b".into()]));
    for look in [
        r#"openat(AT_FDCWD</tmp>, "/etc/passwd", O_RDONLY|O_CLOEXEC) = 3</etc/passwd>"#,
        r#"newfstatat(3</etc/passwd>, "", {st_mode=S_IFREG|0644, ...}, AT_EMPTY_PATH) = 0"#,
        "bind(5<socket:[1]>, {sa_family=AF_NETLINK, nl_pid=0}, 12) = 0",
        r#"linkat(8</d/#12>, "", 7</d>, ".", AT_EMPTY_PATH) = -1 EEXIST (x)"#,
        "--- SIGTERM {si_signo=SIGTERM, si_code=SI_USER, si_pid=1, si_uid=0} ---",
        "+++ exited with 0 +++",
    ] {
        assert_eq!(changed(look), None, "{look}");
    }
}

/// Other tests fork all the time, and what they fork has this process's open files until its exec.
#[test]
fn a_program_that_a_test_makes_runs_at_once() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    assert!(Command::new("true").status().expect("run true").success());
                }
            });
        }
        for n in 0..60 {
            let path = dir.path().join(n.to_string());
            match n % 2 {
                0 => program::write(&path, b"#!/bin/sh\n"),
                _ => program::copy(Path::new("/bin/true"), &path),
            }
            if let Err(error) = Command::new(&path).status() {
                over.store(true, Ordering::Relaxed);
                panic!("program {n}: {error}");
            }
        }
        over.store(true, Ordering::Relaxed);
    });
}

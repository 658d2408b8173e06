//! The websocket: its handshake, its endings, its limits. Proxies are in `remote`, TLS is in `tls`, what
//! takes a minute in `at_length`.

use std::time::{Duration, Instant, SystemTime};

use data_encoding::BASE64;
use nix::sys::signal::Signal;

use crate::harness::aftermath::assert_healthy;
use crate::harness::client::{Style, Terminal, new_sid};
use crate::harness::device::{Device, Generation};
use crate::harness::msg::{self, CONTROL, Ints};
use crate::harness::rig::{Rig, Setup, TOKEN};
use crate::harness::server::{CONNECT_PATH, Reply, Server};
use crate::harness::trace;
use crate::harness::wait::{SOON, millis, secs, skip};
use crate::harness::wire;

/// What the agent takes in one message.
const LIMIT: usize = (1 << 20) + 1024;

fn quick() -> Setup {
    Setup::new().set("ReconnectIntervalSeconds", 1)
}

fn shell_works(device: &Device) {
    let mut terminal = Terminal::new(device, Style::Cli);
    terminal.open_with_prompt();
    assert_eq!(terminal.run("echo works"), "works");
    terminal.stop();
}

#[test]
fn the_handshake_is_plain() {
    let (rig, device) = Rig::connected();
    let request = device.request();
    assert_eq!((request.method.as_str(), request.path.as_str()), ("GET", CONNECT_PATH));
    assert_eq!(request.header("Authorization"), Some(format!("Bearer {TOKEN}").as_str()));
    assert_eq!(request.header("Host"), Some(rig.server.address().to_string().as_str()));
    assert_eq!(request.header("Sec-WebSocket-Version"), Some("13"));
    let key = request.header("Sec-WebSocket-Key").expect("a key");
    assert_eq!(BASE64.decode(key.as_bytes()).expect("base64").len(), 16);
    assert_eq!(request.header("Sec-WebSocket-Protocol"), None, "nobody offers a subprotocol");
    assert_eq!(request.header("Sec-WebSocket-Extensions"), None, "nobody compresses");
    let mut names: Vec<String> = request.headers.iter().map(|(name, _)| name.to_lowercase()).collect();
    names.sort_unstable();
    let all = names.len();
    names.dedup();
    assert_eq!(names.len(), all, "mender-auth's proxy keeps one value per name");
}

#[test]
fn only_scheme_and_authority_of_the_url_count() {
    let server = Server::start(Generation::New);
    let address = server.address();
    for url in [
        format!("http://{address}/"),
        format!("http://{address}/base/path?query=1#fragment"),
        format!("ws://{address}"),
        format!("HTTP://{address}"),
        format!("http://localhost:{}", address.port()),
    ] {
        let rig = Setup::new().url(&url).start();
        let device = server.device();
        assert_eq!(device.request().path, CONNECT_PATH, "{url}");
        assert_eq!(
            device.request().header("Authorization"),
            Some(format!("Bearer {TOKEN}").as_str()),
            "{url}"
        );
        rig.daemon.wait_for_log(&format!("Connection established with {url}"), SOON);
    }
}

#[test]
fn a_password_in_the_url_goes_nowhere() {
    let server = Server::start(Generation::New);
    let rig = Setup::new().url(&format!("http://user:password@{}/", server.address())).start();
    let device = server.device();
    assert_eq!(device.request().header("Authorization"), Some(format!("Bearer {TOKEN}").as_str()));
    let line = rig.daemon.wait_for_log("Connection established with http://", SOON);
    assert!(!line.contains("password"), "{line}");
}

#[test]
fn odd_urls_are_reported_and_survived() {
    for url in
        ["nonsense", "http://", "ftp://127.0.0.1", "http://127.0.0.1:99999", "http://[::1", "http://a b/"]
    {
        let mut rig = Setup::new().url(url).start();
        rig.daemon.wait_for_log("connection manager failed to connect", SOON);
        rig.manager.change("good", &rig.server.url());
        rig.device();
        assert!(rig.daemon.is_running());
    }
}

#[test]
fn ipv6_works() {
    if std::net::TcpListener::bind("[::1]:0").is_err() {
        return skip("this machine has no IPv6");
    }
    let server = Server::bind("[::1]:0".parse().expect("an address"), Generation::New);
    let rig = Setup::new().url(&server.url()).start();
    let device = server.device();
    assert_eq!(device.request().header("Host"), Some(format!("[::1]:{}", server.address().port()).as_str()));
    rig.daemon
        .wait_for_log(&format!("Connection established with http://[::1]:{}", server.address().port()), SOON);
    shell_works(&device);
}

#[test]
fn every_refusal_is_retried() {
    let mut replies: Vec<Reply> =
        [400, 401, 403, 404, 409, 413, 429, 500, 502, 503].into_iter().map(Reply::status).collect();
    replies.extend([Reply::WrongAccept, Reply::Close, Reply::Garbage]);
    for reply in replies {
        let name = format!("{reply:?}");
        let mut rig = quick().start_with(|s| s.script([reply]));
        rig.daemon.wait_for_log("connection manager failed to connect", SOON);
        let device = rig.device();
        assert_eq!(rig.server.requests().len(), 2, "{name}");
        assert_healthy(&mut rig, &device);
    }
}

#[test]
fn a_redirect_is_not_followed() {
    let elsewhere = Server::start(Generation::New);
    let location = format!("{}{CONNECT_PATH}", elsewhere.url());
    let mut rig = quick().start_with(|s| s.script([Reply::with(302, "Location", &location)]));
    let device = rig.device();
    assert_healthy(&mut rig, &device);
    assert!(elsewhere.requests().is_empty(), "the token would have gone to a stranger");
}

fn gap(rig: &Rig) -> Duration {
    let requests = rig.server.wait_requests(2, secs(30));
    requests[1].at - requests[0].at
}

#[test]
#[allow(clippy::disallowed_methods, reason = "the harness runs on the machine that builds")]
fn retry_after_is_obeyed() {
    for status in [429, 503] {
        let rig = quick().start_with(|s| s.script([Reply::with(status, "Retry-After", "3")]));
        assert!((millis(2900)..secs(10)).contains(&gap(&rig)), "{status}: {:?}", gap(&rig));
    }
    // A date has whole seconds, and the agent's start takes some of them.
    let (now, begun) = (SystemTime::now(), Instant::now());
    let date = httpdate::fmt_http_date(now + secs(5));
    let rig = quick().start_with(|s| s.script([Reply::with(503, "Retry-After", &date)]));
    let again = rig.server.wait_requests(2, secs(30))[1].at - begun;
    assert!((millis(3900)..secs(12)).contains(&again), "a date: {again:?}");
    let rig = quick().start_with(|s| s.script([Reply::with(503, "Retry-After", "nonsense")]));
    assert!(gap(&rig) < secs(10), "nonsense is ignored: {:?}", gap(&rig));
}

#[test]
fn retry_after_yields_to_a_new_token() {
    let rig = quick().start_with(|s| s.script([Reply::with(503, "Retry-After", "3600")]));
    rig.server.wait_requests(1, SOON);
    rig.daemon.wait_for_log("connection manager failed to connect", SOON);
    rig.manager.change("new", &rig.server.url());
    rig.device();
}

#[test]
fn back_off_grows_no_faster_than_it_may() {
    let rig = quick().start_with(|s| s.always(Reply::status(500)));
    let requests = rig.server.wait_requests(4, secs(40));
    let gaps: Vec<Duration> = requests.windows(2).map(|pair| pair[1].at - pair[0].at).collect();
    for (n, gap) in gaps.iter().enumerate() {
        // base * 2^n with the first failed attempt as n = 0 or 1; a slow machine adds a little.
        let most = secs(2) * 2u32.pow(n as u32) + secs(2);
        assert!(*gap <= most, "gap {n} is {gap:?}, more than {most:?}");
    }
}

#[test]
fn hangup_signal_cuts_the_back_off_short() {
    let rig = Setup::new()
        .set("ReconnectIntervalSeconds", 300)
        .start_with(|s| s.script([Reply::status(500), Reply::status(500)]));
    for n in 1..=2 {
        rig.server.wait_requests(n, SOON);
        eventually_failed(&rig, n);
        rig.daemon.signal(Signal::SIGHUP);
    }
    let device = rig.server.next_device(secs(5));
    // Connected, there is no reason to hurry.
    let mark = rig.daemon.mark();
    rig.daemon.signal(Signal::SIGHUP);
    rig.daemon.wait_for_log_after(mark, "the configuration has not changed", SOON);
    shell_works(&device);
    assert!(rig.server.try_device(millis(0)).is_none());
}

fn eventually_failed(rig: &Rig, times: usize) {
    crate::harness::wait::eventually(SOON, "the failure to be logged", || {
        (rig.daemon.count_log("connection manager failed to connect") >= times).then_some(())
    });
}

#[test]
fn every_ending_is_followed_by_a_new_link() {
    let (mut rig, mut device) = quick().connected();
    for code in [1000, 1001, 1008, 1011, 3000] {
        device.close_frame(code, "over");
        // The server may leave its side open: closing TCP is the device's job.
        device.wait_end(SOON);
        device = rig.next_link();
    }
    device.hang_up();
    device = rig.next_link();
    device.reset();
    device = rig.next_link();
    assert_healthy(&mut rig, &device);
}

#[test]
fn a_dropped_link_is_not_dialled_again_and_again() {
    // Two agents with one identity kick each other; a handshake that succeeds mustn't reset the wait.
    let (rig, mut device) = quick().connected();
    let start = Instant::now();
    let mut gaps = Vec::new();
    for _ in 0..4 {
        device.reset();
        let dropped = Instant::now();
        device = rig.server.next_device(secs(40));
        gaps.push(dropped.elapsed());
    }
    println!("gaps after drops: {gaps:?}");
    // Uniform over 1, 2, 4 and 8 s at most: less than 150 ms in all is as good as impossible.
    assert!(start.elapsed() > millis(150), "{gaps:?}");
    for (n, gap) in gaps.iter().enumerate() {
        assert!(*gap <= secs(1 << n) + secs(2), "{gaps:?}");
    }
}

/// A message of exactly this size that gets an answer.
fn sized(sid: &str, size: usize) -> Vec<u8> {
    let of = |body: usize| msg::encode(&msg::message(12_345, "x", sid, &[], &vec![0; body]), Ints::Compact);
    let bytes = of(size - (of(size).len() - size));
    assert_eq!(bytes.len(), size);
    bytes
}

#[test]
fn messages_up_to_the_limit_are_taken() {
    let (_rig, device) = Rig::connected();
    let sid = new_sid();
    for size in [100, 9000, 70_000, 1 << 20, LIMIT] {
        device.send_binary(&sized(&sid, size));
        assert_eq!(device.next_of(&sid, SOON).proto, CONTROL, "{size}");
        device.send_fragmented(&sized(&sid, size), size / 7 + 1);
        assert_eq!(device.next_of(&sid, SOON).proto, CONTROL, "{size} in fragments");
    }
}

#[test]
fn a_larger_message_closes_the_link_with_1009() {
    let (rig, device) = quick().connected();
    let sid = new_sid();
    let expect = |device: &Device| {
        let close = device.wait_close(SOON);
        assert_eq!(close.map(|(code, _)| code), Some(1009));
        device.wait_end(SOON);
    };
    let _ = device.try_frame(true, wire::BINARY, &sized(&sid, LIMIT + 1));
    expect(&device);
    let device = rig.server.next_device(secs(20));
    let bytes = sized(&sid, LIMIT + 1);
    let mut opcode = wire::BINARY;
    for chunk in bytes.chunks(100_000) {
        let _ = device.try_frame(chunk.len() < 100_000, opcode, chunk);
        opcode = wire::CONTINUATION;
    }
    expect(&device);
    // An announcement is enough: nothing waits for, or allocates, what a header only promises.
    let device = rig.server.next_device(secs(20));
    let _ = device.write(&[0x82, 127, 0, 0, 0x40, 0, 0, 0, 0, 0]);
    expect(&device);
    shell_works(&rig.server.next_device(secs(20)));
}

#[test]
fn fragments_may_have_pings_between_them() {
    let (_rig, device) = Rig::connected();
    let sid = new_sid();
    let bytes = sized(&sid, 5000);
    device.send_frame(false, wire::BINARY, &bytes[..1000]);
    device.ping(b"between");
    device.send_frame(false, wire::CONTINUATION, b"");
    device.send_frame(false, wire::CONTINUATION, &bytes[1000..4999]);
    device.wait_pong(b"between", SOON);
    device.send_frame(true, wire::CONTINUATION, &bytes[4999..]);
    assert_eq!(device.next_of(&sid, SOON).proto, CONTROL);
}

#[test]
fn pings_are_answered_with_their_payload() {
    let (_rig, device) = Rig::connected();
    for payload in [&b"60"[..], b"", &[0xff; 125]] {
        device.ping(payload);
        device.wait_pong(payload, SOON);
    }
}

#[test]
fn frames_may_arrive_a_byte_at_a_time() {
    let (mut rig, device) = Rig::connected();
    let sid = new_sid();
    let frame = wire::encode(true, wire::BINARY, &sized(&sid, 200));
    for byte in frame {
        device.write(&[byte]).expect("write");
    }
    assert_eq!(device.next_of(&sid, SOON).proto, CONTROL);
    device.send(CONTROL, "close", &sid, &[], b"");
    assert_healthy(&mut rig, &device);
}

#[test]
fn many_small_messages_in_one_segment() {
    let (_rig, device) = Rig::connected();
    let sid = new_sid();
    let one = wire::encode(
        true,
        wire::BINARY,
        &msg::encode(&msg::message(CONTROL, "ping", &sid, &[], b""), Ints::Compact),
    );
    device.write(&one.repeat(50)).expect("write");
    for _ in 0..50 {
        assert_eq!(device.next_of(&sid, SOON).typ, "pong");
    }
}

#[test]
fn props_of_either_server_are_understood() {
    let (_rig, device) = Rig::connected();
    let terminal = Terminal::new(&device, Style::Cli);
    // The new server re-encodes: a positive fixint becomes d0.
    let wide = msg::message(1, "new", &terminal.sid, &[("user_id", terminal.user.as_str().into())], b"");
    let mut bytes = msg::encode(&wide, Ints::Compact);
    let at = bytes.windows(5).position(|w| w == b"props").expect("props") + 5;
    assert_eq!(bytes[at], 0x81, "one property");
    bytes[at] = 0x83;
    bytes.splice(at + 1..at + 1, *b"\xaeterminal_width\xd0\x50\xafterminal_height\xd1\x00\x18");
    device.send_binary(&bytes);
    terminal.expect("new", 1, Some("Shell started"));
    let mut terminal = terminal;
    terminal.prompt();
    assert_eq!(terminal.run("stty size"), "24 80");
}

/// Kernels before 3.12 and gVisor don't know the option. The agent never connected: "out of resources: protocol not
/// available".
#[test]
fn a_kernel_without_a_limit_on_what_is_unsent() {
    let Some((_rig, device)) = trace::refusing("setsockopt", "TCP_NOTSENT_LOWAT", "ENOPROTOOPT") else {
        return;
    };
    shell_works(&device);
}

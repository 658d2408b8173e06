//! The way to the server and to forward targets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use nix::sys::socket::{Backlog, listen};

use crate::forwards::assert_echo;
use crate::harness::device::Generation;
use crate::harness::dns::{
    Answer, NOTIMP, NXDOMAIN, NameServer, PINNED, REFUSED, SERVFAIL, Single, obstacle,
};
use crate::harness::doctor::Office;
#[cfg(feature = "tls")]
use crate::harness::doctor::text;
use crate::harness::forward::Client;
use crate::harness::front::{Acceptor, Proxy, relay};
use crate::harness::rig::Setup;
use crate::harness::server::{Reply, Server};
use crate::harness::targets::{Role, Target};
#[cfg(feature = "tls")]
use crate::harness::tls::{Authority, TlsFront};
use crate::harness::wait::{SOON, Watched, millis, secs, skip, throughout};
use crate::remote::FAILED;

/// Names, and what the query for one kind of addresses gets.
const FAULTS: [(&str, Single); 5] = [
    ("nxdomain.test", Single::Code(NXDOMAIN)),
    ("servfail.test", Single::Code(SERVFAIL)),
    ("refused.test", Single::Code(REFUSED)),
    ("notimp.test", Single::Code(NOTIMP)),
    ("silent.test", Single::Silence),
];

pub(super) fn without_ipv6() -> bool {
    let without = TcpListener::bind("[::1]:0").is_err();
    if without {
        skip("this machine has no IPv6");
    }
    without
}

/// The agent connects to a server at `good`, by names that have this address and no good answer to the other query. So
/// do its forwards.
fn assert_reached(good: IpAddr) {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let answer = |fault: Single| match good {
        IpAddr::V4(_) => Answer::Each(Single::Address(good), fault),
        IpAddr::V6(_) => Answer::Each(fault, Single::Address(good)),
    };
    let names = NameServer::start(&FAULTS.map(|(name, fault)| (name, answer(fault))));
    let server = Server::bind((good, 0).into(), Generation::New);
    let target = Target::bind(&at(good, 0), Role::Echo);
    for (name, _) in FAULTS {
        let url = format!("http://{name}:{}", server.address().port());
        let _rig = names.setup().url(&url).start();
        names.wait_asked(name, 1);
        let device = server.next_device(secs(8));
        let client = Client::open(&device);
        assert_echo(&client.connect("tcp", name, target.port()).opened(), name.as_bytes());
        client.close();
    }
}

pub(super) fn at(address: IpAddr, port: u16) -> String {
    SocketAddr::new(address, port).to_string()
}

/// Home routers, ad blockers and middleboxes answer AAAA queries with an error, or drop them, where the A query gets
/// an address. musl's getaddrinfo makes an error of it ("Name does not resolve"), and glibc's takes the resolver's
/// whole time-out for a query that was dropped, so the agent never connected.
#[test]
fn a_bad_answer_for_ipv6_does_not_spoil_ipv4() {
    assert_reached(Ipv4Addr::LOCALHOST.into());
}

/// The same the other way round, in networks that have IPv6 alone.
#[test]
fn a_bad_answer_for_ipv4_does_not_spoil_ipv6() {
    if !without_ipv6() {
        assert_reached(Ipv6Addr::LOCALHOST.into());
    }
}

/// Whoever names a server's IPv4 address in /etc/hosts doesn't want what DNS says, though /etc/hosts says nothing on
/// IPv6. With separate queries for both the agent would take the IPv6 address from DNS, and prefer it.
#[test]
fn an_entry_in_the_hosts_file_is_all_that_counts() {
    if without_ipv6() {
        return;
    }
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let stranger = Single::Address(Ipv6Addr::LOCALHOST.into());
    let names = NameServer::start(&[(PINNED, Answer::Each(Single::Code(NXDOMAIN), stranger))]);
    let (server, elsewhere) = (0..10)
        .find_map(|_| {
            let server = Server::start(Generation::New);
            let there = at(Ipv6Addr::LOCALHOST.into(), server.address().port());
            Some((server, Target::try_bind(&there, Role::Discard).ok()?))
        })
        .expect("a port that both addresses have");
    let port = server.address().port();
    let _rig = names.setup().url(&format!("http://{PINNED}:{port}")).start();
    server.device();
    assert_eq!(elsewhere.accepted(), 0, "the token was sent to what DNS says");
}

/// musl compares names with those of /etc/hosts in the case given, and no library passes over the dot at the end of a
/// name, so that such a server was asked of DNS, which doesn't know it. Go finds it.
#[test]
fn a_name_of_the_hosts_file_may_be_spelled_otherwise() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let names = NameServer::start(&[]);
    let server = Server::start(Generation::New);
    for name in [PINNED.to_uppercase(), format!("{PINNED}.")] {
        let _rig = names.setup().url(&format!("http://{name}:{}", server.address().port())).start();
        server.device();
    }
}

/// Name servers were asked for it where /etc/hosts lacks it. What they name may be another host, which gets the token.
#[test]
fn localhost_is_this_machine_whatever_name_servers_say() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let names = NameServer::start(&[]);
    let server = Server::start(Generation::New);
    let url = format!("http://localhost:{}", server.address().port());
    let _rig = names.setup().env("UNNAMED", "localhost").url(&url).start();
    server.device();
}

/// musl takes no address behind a space, and reads no more than 511 bytes of a line.
#[test]
fn a_line_of_the_hosts_file_may_be_indented_and_long() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let names = NameServer::start(&[]);
    let server = Server::start(Generation::New);
    for others in [String::new(), "another.test ".repeat(100)] {
        let url = format!("http://indented.test:{}", server.address().port());
        let _rig = names.setup().env("HOSTS_NAMES", &others).url(&url).start();
        server.device();
    }
}

/// A server with an IPv6 address, too, on a network without IPv6: that its IPv4 address had refused was not to be read
/// anywhere, only that the other one has no route.
#[test]
fn the_error_is_that_of_the_address_with_a_route() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    // Without a zone no route leads there, whatever this machine's network.
    let nowhere = Single::Address(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).into());
    let here = Ipv4Addr::LOCALHOST.into();
    // Also where the address without a route is known, and tried, first.
    for late in [false, true] {
        let here = if late { Single::Held(here) } else { Single::Address(here) };
        let names = NameServer::start(&[("both.test", Answer::Each(here, nowhere))]);
        let rig = names.setup().url("http://both.test:1").start();
        if late {
            names.wait_asked("both.test", 1);
            throughout(millis(300), "the wait for the answer", || rig.daemon.count_log(FAILED) == 0);
            names.release();
        }
        let line = rig.daemon.wait_for_log(FAILED, SOON);
        assert!(line.contains("dial tcp 127.0.0.1:1: connect: connection refused"), "{line}");
    }
}

/// Connections that wait for a word from the test.
type Gate = Arc<Watched<bool>>;

/// Accepts at once, and passes on what comes when the gate is open.
fn held(target: SocketAddr, gate: &Gate) -> Acceptor {
    let gate = Arc::clone(gate);
    let listener = TcpListener::bind("127.0.0.1:0").expect("listen on loopback");
    Acceptor::start("held", listener, move |stream| {
        let open = gate.wait(secs(60), |open| open.then_some(()));
        if let (Some(()), Ok(server)) = (open, TcpStream::connect(target)) {
            relay(stream, server);
        }
    })
}

/// A listener whose queue is full, so that the kernel drops each SYN, and who fills it.
pub(super) fn full() -> (TcpListener, Vec<TcpStream>) {
    full_at((Ipv4Addr::LOCALHOST, 0).into())
}

pub(super) fn full_at(address: SocketAddr) -> (TcpListener, Vec<TcpStream>) {
    let listener = TcpListener::bind(address).expect("listen on loopback");
    listen(&listener, Backlog::new(0).expect("a backlog")).expect("a shorter backlog");
    let address = listener.local_addr().expect("an address");
    let mut queue = Vec::new();
    while let Ok(stream) = TcpStream::connect_timeout(&address, millis(300)) {
        queue.push(stream);
        assert!(queue.len() < 8, "the queue never is full");
    }
    (listener, queue)
}

/// On NB-IoT, 2G and satellite links a round trip takes seconds, and TLS up to 25 s. Each step of an attempt had 10 s, so
/// that it was given up at the same step each time and the agent never connected.
#[test]
fn an_attempt_waits_for_twelve_seconds_at_any_step() {
    let gate = Gate::default();
    let server = Server::start(Generation::New);
    let upgrade = held(server.address(), &gate);
    let proxy = Proxy::start(server.address());
    let tunnel = held(proxy.authority().parse().expect("an address"), &gate);
    let (listener, queue) = full();
    let crowded = listener.local_addr().expect("an address");
    let mut rigs = vec![
        ("upgrade", Setup::new().url(&format!("http://{}", upgrade.address())).start()),
        ("connect", Setup::new().url(&format!("http://{crowded}")).start()),
        ("proxy", {
            let variable = format!("http://{}", tunnel.address());
            Setup::new().url("http://device.example").env("HTTP_PROXY", &variable).start()
        }),
    ];
    #[cfg(feature = "tls")]
    let (_front, _held, _dir) = {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let authority = Authority::new();
        let ca = authority.write(dir.path());
        let front = TlsFront::start(&authority.identity(&["127.0.0.1"]), server.address());
        let held = held(SocketAddr::from((Ipv4Addr::LOCALHOST, front.port())), &gate);
        let url = format!("https://{}", held.address());
        rigs.push(("tls", Setup::new().url(&url).env("SSL_CERT_FILE", text(&ca)).start()));
        (front, held, dir)
    };
    let names = if let Some(why) = obstacle() {
        skip(why);
        None
    } else {
        let address = Single::Address(Ipv4Addr::LOCALHOST.into());
        let names = NameServer::start(&[("late.test", Answer::Each(address, Single::Code(NXDOMAIN)))]);
        names.hold();
        let url = format!("http://late.test:{}", server.address().port());
        rigs.push(("look-up", names.setup().url(&url).start()));
        names.wait_asked("late.test", 1);
        Some(names)
    };
    for (_, rig) in &rigs {
        rig.manager.wait_calls("GetJwtToken", 1, SOON);
    }
    let none_failed = || {
        rigs.iter().for_each(|(step, rig)| assert_eq!(rig.daemon.count_log(FAILED), 0, "{step}"));
        true
    };
    throughout(secs(12), "the attempts", none_failed);
    gate.update(|open| *open = true);
    drop(queue);
    let target = server.address();
    let _relay = Acceptor::start("crowded", listener, move |stream| {
        if let Ok(server) = TcpStream::connect(target) {
            relay(stream, server);
        }
    });
    names.iter().for_each(NameServer::release);
    for _ in &rigs {
        server.next_device(SOON * 2);
    }
    none_failed();
}

/// glibc's resolver takes 16 s for an answer whose first name servers are dead; a forward waited for 10 s.
#[test]
fn a_forward_waits_for_twelve_seconds_for_a_name() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let names = NameServer::start(&[("late.test", Answer::Addresses(vec![Ipv4Addr::LOCALHOST]))]);
    let (_rig, device) = names.setup().connected();
    let client = Client::open(&device);
    let target = Target::start(Role::Echo);
    names.hold();
    let forward = client.connect("tcp", "late.test", target.port());
    names.wait_asked("late.test", 1);
    throughout(secs(12), "the look-up", || client.errors() == 0);
    names.release();
    assert_echo(&forward.opened(), b"late");
    client.close();
}

/// Cloudflare, AWS WAF and Squid with usual rules answer 403 to requests without a User-Agent: the agent never got to
/// its server.
#[test]
fn every_request_has_a_user_agent() {
    let agent = Some(concat!("mender-connect/", env!("CARGO_PKG_VERSION")));
    let server = Server::start(Generation::New);
    let proxy = Proxy::start(server.address());
    let variable = format!("http://{}", proxy.authority());
    let _rig = Setup::new().url("http://device.example").env("HTTP_PROXY", &variable).start();
    assert_eq!(server.device().request().header("User-Agent"), agent);
    assert_eq!(proxy.requests()[0].header("User-Agent"), agent);
    // doctor's own websocket, and its plain request beside a connected agent.
    let office = Office::open();
    office.ask().assert_good();
    office.server.always(Reply::status(400));
    office.ask_beside("connected").assert_good();
    let requests = office.server.requests();
    assert_eq!(requests.iter().map(|r| r.header("User-Agent")).collect::<Vec<_>>(), [agent; 2]);
}

/// The reader got the reset, and the writer, about to say goodbye, a broken pipe, which was what the log told.
#[test]
fn a_reset_is_told_as_one() {
    let (rig, device) = Setup::new().connected();
    rig.daemon.wait_for_log("Connection established", SOON);
    device.reset();
    let line = rig.daemon.wait_for_log(" lost: ", SOON);
    assert!(line.contains("connection reset by peer"), "{line}");
}

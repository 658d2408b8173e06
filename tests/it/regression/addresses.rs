//! Names with several addresses, some of which lead nowhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;

use super::network::{at, full_at, without_ipv6};
use crate::forwards::assert_echo;
use crate::harness::connection::Connection;
use crate::harness::device::Generation;
use crate::harness::dns::{Answer, NXDOMAIN, NameServer, Single, obstacle};
use crate::harness::doctor::Office;
use crate::harness::forward::Client;
use crate::harness::rig::{Setup, network_of_our_own};
use crate::harness::server::Server;
use crate::harness::targets::{Role, Target};
use crate::harness::wait::{SOON, millis, skip, throughout};

const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Longer than the 250 ms between two attempts, shorter than anything that waits for a dead address.
const NO_TIME_OUT: Duration = Duration::from_secs(5);

/// Why these tests can't run here.
fn hindered() -> bool {
    if let Some(why) = obstacle() {
        skip(why);
        return true;
    }
    without_ipv6()
}

/// A listener on `dead` that never answers, at a port where `made` has something on the other address.
fn beside<T>(dead: IpAddr, made: impl Fn() -> (T, u16)) -> (T, u16, (TcpListener, Vec<TcpStream>)) {
    for _ in 0..10 {
        let (other, port) = made();
        if TcpListener::bind((dead, port)).is_ok() {
            return (other, port, full_at(SocketAddr::new(dead, port)));
        }
    }
    panic!("no port that both addresses have");
}

/// A forward that opens soon after what the test does meanwhile.
fn opened(client: &Client, name: &str, port: u16, meanwhile: impl Fn()) -> Connection {
    let begun = Instant::now();
    let forward = client.connect("tcp", name, port);
    meanwhile();
    let forward = forward.opened();
    assert!(begun.elapsed() < NO_TIME_OUT, "{:?}", begun.elapsed());
    forward
}

/// In half-configured dual-stack networks IPv6 packets vanish. The agent waited for ten seconds for each dead address
/// whenever it connected.
#[test]
fn a_dead_ipv6_address_costs_no_time() {
    if hindered() {
        return;
    }
    let names = NameServer::start(&[("dual.test", Answer::Each(Single::Address(V4), Single::Address(V6)))]);
    let (server, port, _dead) = beside(V6, || {
        let server = Server::start(Generation::New);
        let port = server.address().port();
        (server, port)
    });
    let _rig = names.setup().url(&format!("http://dual.test:{port}")).start();
    names.wait_asked("dual.test", 1);
    let device = server.next_device(NO_TIME_OUT);
    // The same for forwards.
    let (target, port, _dead) = beside(V6, || {
        let target = Target::start(Role::Echo);
        let port = target.port();
        (target, port)
    });
    let client = Client::open(&device);
    assert_echo(&opened(&client, "dual.test", port, || ()), b"by IPv4");
    assert_eq!(target.accepted(), 1);
    client.close();
}

/// An IPv6 address that comes late still counts where IPv4 leads nowhere, and nobody waits for it where IPv4 works.
#[test]
fn an_answer_that_comes_late_joins() {
    if hindered() {
        return;
    }
    let late = Answer::Each(Single::Address(V4), Single::Held(V6));
    let names = NameServer::start(&[("late.test", late)]);
    let (_rig, device) = names.setup().connected();
    let client = Client::open(&device);
    let good = Target::start(Role::Echo);
    assert_echo(&opened(&client, "late.test", good.port(), || ()), b"at once");
    for dead in [true, false] {
        let (target, port, silent) = beside(V4, || {
            let target = Target::bind(&at(V6, 0), Role::Echo);
            let port = target.port();
            (target, port)
        });
        // Refused instead of silent.
        let _silent = dead.then_some(silent);
        let asked = names.asked("late.test");
        let forward = opened(&client, "late.test", port, || {
            names.wait_asked("late.test", asked + 1);
            throughout(millis(400), "the attempt", || client.errors() == 0);
            names.release();
        });
        assert_echo(&forward, b"late");
        assert_eq!(target.accepted(), 1);
    }
    client.close();
}

/// Only permitted addresses take part, whichever query they come from.
#[test]
fn an_answer_that_comes_late_is_judged() {
    if hindered() {
        return;
    }
    let names = NameServer::start(&[("both.test", Answer::Each(Single::Address(V4), Single::Address(V6)))]);
    let allow = json!({ "Allow": ["tcp/[::1]:*"] });
    let (_rig, device) = names.setup().set("PortForward", allow).connected();
    let client = Client::open(&device);
    let allowed = Target::bind(&at(V6, 0), Role::Echo);
    let forward = client.connect("tcp", "both.test", allowed.port());
    assert_echo(&forward.opened(), b"permitted");
    let forbidden = Target::start(Role::Echo);
    client.connect("tcp", "both.test", forbidden.port());
    let error = client.next_error();
    assert!(error.text.contains("[::1]") && error.text.contains("refused"), "{error:?}");
    assert_eq!(forbidden.accepted(), 0);
    client.close();
}

/// Long chains of aliases, as content delivery networks have them, and answers that need TCP.
#[test]
fn unusual_answers_are_understood() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let nothing = Single::Code(NXDOMAIN);
    let names = NameServer::start(&[
        ("alias.test", Answer::Each(Single::Alias(V4), nothing)),
        ("long.test", Answer::Each(Single::Truncated(V4), nothing)),
    ]);
    let (_rig, device) = names.setup().connected();
    let client = Client::open(&device);
    let target = Target::start(Role::Echo);
    for name in ["alias.test", "long.test"] {
        assert_echo(&client.connect("tcp", name, target.port()).opened(), name.as_bytes());
    }
    client.close();
}

/// glibc takes a query for one family to the search domains where the name has no such address. A site's own domain
/// often has a wildcard for its web server, whose IPv6 address won over the right server's only one.
#[test]
fn a_wildcard_in_a_search_domain_is_another_host() {
    if hindered() {
        return;
    }
    let (alone, wildcard) = (Single::Code(0), Answer::Each(Single::Address(V4), Single::Address(V6)));
    let names = NameServer::start(&[
        ("server.test", Answer::Each(Single::Address(V4), alone)),
        ("server.test.site.test", wildcard.clone()),
        ("denied.test", Answer::Each(Single::Address(V4), Single::Code(NXDOMAIN))),
        ("denied.test.site.test", wildcard.clone()),
        ("single.own.test", Answer::Each(Single::Address(V4), alone)),
        ("single.site.test", wildcard.clone()),
        ("inner.name", Answer::Each(alone, Single::Address(V6))),
        ("inner.name.own.test", Answer::Each(Single::Address(V4), alone)),
        ("two.labels.own.test", Answer::Each(Single::Address(V4), alone)),
        ("two.labels.site.test", wildcard.clone()),
        ("short.name.site.test", wildcard.clone()),
        ("site.name", Answer::Each(Single::Code(2), Single::Code(2))),
        ("site.name.site.test", wildcard),
    ]);
    let (server, stranger) = (0..10)
        .find_map(|_| {
            let server = Server::start(Generation::New);
            let there = at(V6, server.address().port());
            Some((server, Target::try_bind(&there, Role::Discard).ok()?))
        })
        .expect("a port that both addresses have");
    let port = server.address().port();
    let setup = |options| {
        names.setup().env("RESOLVER", &format!("timeout:30 attempts:1{options}\nsearch own.test site.test"))
    };
    // A container's `ndots` has the search domains come first.
    let usual = ["server.test", "denied.test", "single", "two.labels"].map(|name| (name, ""));
    for (name, options) in usual.into_iter().chain([("inner.name", " ndots:2")]) {
        let _rig = setup(options).url(&format!("http://{name}:{port}")).start();
        server.next_device(NO_TIME_OUT);
    }
    assert_eq!(stranger.accepted(), 0, "the token was sent to another host");
    // The agent finds there what only a search domain has, also where a name server fails for the name itself. Without
    // `ndots`, musl doesn't look there for a name with a dot.
    drop(stranger);
    for (name, options) in [("short.name", ""), ("short.name", " ndots:2"), ("site.name", " ndots:2")] {
        let _rig = setup(options).url(&format!("http://{name}:{port}")).start();
        server.next_device(NO_TIME_OUT);
    }
}

/// It takes a second to come to the second name server, which passed for silence: the search domains weren't asked.
#[test]
fn search_domains_count_behind_a_dead_name_server() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let (name, full) = ("short.name", "short.name.site.test");
    let here = Answer::Each(Single::Address(V4), Single::Code(0));
    let dead = NameServer::start(&[(name, Answer::Silence), (full, Answer::Silence)]);
    let names = NameServer::start(&[(full, here)]);
    let server = Server::start(Generation::New);
    let options = format!("timeout:1 attempts:1\nnameserver {}\nsearch site.test", names.address);
    let url = format!("http://{name}:{}", server.address().port());
    let _rig = dead.setup().env("RESOLVER", &options).url(&url).start();
    server.next_device(SOON);
}

/// A domain that a DHCP server or a VPN announces, and whose name servers fail, ended musl's search for a name without a
/// dot.
#[test]
fn a_search_domain_that_fails_is_not_the_last() {
    if let Some(why) = obstacle() {
        return skip(why);
    }
    let fails = Answer::Each(Single::Code(2), Single::Code(2));
    let here = Answer::Each(Single::Address(V4), Single::Code(0));
    let names = NameServer::start(&[
        ("short.bad.test", fails.clone()),
        ("short.good.test", here.clone()),
        ("alone.bad.test", fails),
        ("alone", here),
    ]);
    let server = Server::start(Generation::New);
    let options = "timeout:2 attempts:1\nsearch bad.test good.test";
    for name in ["short", "alone"] {
        let url = format!("http://{name}:{}", server.address().port());
        let _rig = names.setup().env("RESOLVER", options).url(&url).start();
        server.next_device(SOON * 2);
    }
}

/// `doctor` shows each answer and each attempt, with its time.
#[test]
fn doctor_tells_answers_and_attempts_apart() {
    if hindered() {
        return;
    }
    let names = NameServer::start(&[
        ("dual.test", Answer::Each(Single::Address(V4), Single::Address(V6))),
        ("half.test", Answer::Each(Single::Address(V4), Single::Silence)),
    ]);
    let office = Office::open();
    let ask = |host: &str| {
        let findings = office.ask_by_name(host, &names);
        findings.assert_good();
        findings
    };
    let dual = ask("dual.test");
    for found in ["dual.test is 127.0.0.1 (A, IPv4)", "dual.test is ::1 (AAAA, IPv6)"] {
        assert!(dual.0.to_string().contains(found), "{dual:?}");
    }
    assert!(dual.found("routes").starts_with("IPv4's default is by "), "{dual:?}");
    assert!(dual.warnings("tcp").contains("[::1]"), "{dual:?}");
    assert!(dual.warnings("tcp").contains("connection refused (after "), "{dual:?}");
    assert!(ask("half.test").warnings("tcp").contains("no answer yet (AAAA, IPv6)"));
}

/// VPNs set a default route that refuses, against leaks. `doctor` told of one by `*`, as of an interface.
#[test]
fn a_default_route_that_refuses_is_none() {
    if let Some(why) = network_of_our_own() {
        return skip(why);
    }
    let added = Command::new("ip").args(["route", "add", "unreachable", "default"]).status();
    assert!(added.is_ok_and(|status| status.success()));
    let findings = Office::at("http://192.0.2.1").ask();
    findings.assert_break("tcp");
    assert_eq!(findings.found("routes"), "IPv4's default is by none, IPv6's by none");
}

/// Link-local addresses need the interface. Only bare ones worked, and a zone was sent to the server, which knows no
/// interface of the device's.
#[test]
fn link_local_addresses_have_a_zone() {
    if let Some(why) = network_of_our_own() {
        return skip(why);
    }
    let there: SocketAddr = "[fe80::1%1]:0".parse().expect("an address");
    let server = Server::bind(there, Generation::New);
    let port = server.address().port();
    for host in ["[fe80::1%25lo]", "[fe80::1%lo]", "[fe80::1%1]"] {
        let _rig = Setup::new().url(&format!("http://{host}:{port}")).start();
        let device = server.next_device(SOON);
        assert_eq!(device.request().header("Host"), Some(&*format!("[fe80::1]:{port}")), "{host}");
    }
    let target = Target::bind(&there.to_string(), Role::Echo);
    let allow = json!({ "Allow": [format!("tcp/[fe80::1%lo]:{}", target.port()), "tcp/[fe80::1%other]:1"] });
    let (_rig, device) = Setup::new().set("PortForward", allow).connected();
    let client = Client::open(&device);
    for host in ["fe80::1%lo", "[fe80::1%lo]", "fe80::1%1"] {
        assert_echo(&client.connect("tcp", host, target.port()).opened(), host.as_bytes());
    }
    client.connect("tcp", "fe80::1%lo", 1);
    let error = client.next_error();
    assert!(error.text.starts_with("access denied"), "{error:?}");
    client.close();
}

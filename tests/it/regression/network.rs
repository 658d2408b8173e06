//! The way to the server and to forward targets.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};

use crate::forwards::assert_echo;
use crate::harness::device::Generation;
use crate::harness::dns::{
    Answer, NOTIMP, NXDOMAIN, NameServer, PINNED, REFUSED, SERVFAIL, Single, obstacle,
};
use crate::harness::forward::Client;
use crate::harness::server::Server;
use crate::harness::targets::{Role, Target};
use crate::harness::wait::{secs, skip};

/// Names, and what the query for one kind of addresses gets.
const FAULTS: [(&str, Single); 5] = [
    ("nxdomain.test", Single::Code(NXDOMAIN)),
    ("servfail.test", Single::Code(SERVFAIL)),
    ("refused.test", Single::Code(REFUSED)),
    ("notimp.test", Single::Code(NOTIMP)),
    ("silent.test", Single::Silence),
];

fn without_ipv6() -> bool {
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

fn at(address: IpAddr, port: u16) -> String {
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
    let server = Server::start(Generation::New);
    let port = server.address().port();
    let elsewhere = Target::bind(&at(Ipv6Addr::LOCALHOST.into(), port), Role::Discard);
    let _rig = names.setup().url(&format!("http://{PINNED}:{port}")).start();
    server.device();
    assert_eq!(elsewhere.accepted(), 0, "the token was sent to what DNS says");
}

//! Forwards to names, with a name server of the test's.

use std::net::Ipv4Addr;
use std::time::Instant;

use serde_json::json;

use crate::forwards::{assert_echo, tcp};
use crate::harness::dns::{Answer, NameServer, obstacle};
use crate::harness::forward::Client;
use crate::harness::proc;
use crate::harness::targets::{Role, Target};
use crate::harness::wait::{SOON, eventually, millis, secs, skip};

const HERE: Ipv4Addr = Ipv4Addr::LOCALHOST;
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// The name server, unless no agent can be made to ask it.
fn names(names: &[(&str, Answer)]) -> Option<NameServer> {
    match obstacle() {
        Some(why) => {
            skip(why);
            None
        }
        None => Some(NameServer::start(names)),
    }
}

#[test]
fn several_addresses_are_tried_in_turn() {
    let known = [
        ("here.test", Answer::Addresses(vec![HERE])),
        ("both.test", Answer::Addresses(vec![ELSEWHERE, HERE])),
    ];
    let Some(names) = names(&known) else { return };
    let (_rig, device) = names.setup().connected();
    let client = Client::open(&device);
    // On one of the addresses only; at the other one the connection is refused.
    let target = Target::start(Role::Echo);
    for name in ["here.test", "both.test", "HERE.test"] {
        assert_echo(&client.connect("tcp", name, target.port()), b"by name");
    }
    assert_eq!(names.asked("both.test"), 1);
    client.connect("tcp", "none.test", target.port());
    let error = client.next_error();
    assert!(error.text.starts_with("dial tcp: lookup none.test: "), "{error:?}");
    client.close();
}

/// Nothing is looked up a second time between judging and dialling, and nothing is remembered.
#[test]
fn the_address_that_was_judged_is_dialled() {
    let known = [
        ("changing.test", Answer::Changing(HERE, ELSEWHERE)),
        ("both.test", Answer::Addresses(vec![ELSEWHERE, HERE])),
    ];
    let Some(names) = names(&known) else { return };
    let target = Target::start(Role::Echo);
    let forbidden = Target::bind(&format!("{ELSEWHERE}:{}", target.port()), Role::Echo);
    let allow = json!({ "Allow": [format!("tcp/{HERE}:*")] });
    let (rig, device) = names.setup().set("PortForward", allow).connected();
    let client = Client::open(&device);
    let connection = client.connect("tcp", "changing.test", target.port());
    assert_echo(&connection, b"the first answer");
    assert_eq!((names.asked("changing.test"), target.accepted()), (1, 1));
    client.connect("tcp", "changing.test", target.port());
    let error = client.next_error();
    assert!(error.text.starts_with("access denied"), "{error:?}");
    let line = rig.daemon.wait_for_log("changing.test", SOON);
    assert!(line.contains("level=warning"), "{line}");
    // Of several addresses only the permitted ones are tried.
    assert_echo(&client.connect("tcp", "both.test", target.port()), b"the permitted one");
    client.close();
    assert_eq!(forbidden.accepted(), 0);
}

#[test]
fn a_name_in_the_list_is_that_name() {
    let known = [("here.test", Answer::Addresses(vec![HERE])), ("alias.test", Answer::Addresses(vec![HERE]))];
    let Some(names) = names(&known) else { return };
    let target = Target::start(Role::Echo);
    let entry = format!("tcp/here.test:{}", target.port());
    let (_rig, device) = names.setup().set("PortForward", json!({ "Allow": [entry] })).connected();
    let client = Client::open(&device);
    assert_echo(&client.connect("tcp", "here.test", target.port()), b"reached");
    assert_echo(&client.connect("tcp", "HERE.Test", target.port()), b"reached");
    client.connect("tcp", "alias.test", target.port());
    assert!(client.next_error().text.starts_with("access denied"));
    client.close();
}

#[test]
fn nobody_waits_for_an_answer_that_does_not_come() {
    let known = [("here.test", Answer::Addresses(vec![HERE])), ("silent.test", Answer::Silence)];
    let Some(names) = names(&known) else { return };
    let (rig, device) = names.setup().connected();
    let pid = rig.daemon.pid();
    let client = Client::open(&device);
    let target = Target::start(Role::Echo);
    let other = tcp(&client, &target);
    assert_echo(&other, b"warm");
    let threads = proc::threads(pid);
    let start = Instant::now();
    let waiting = client.connect("tcp", "silent.test", 80);
    waiting.send_anyway(b"anybody there?");
    names.wait_asked("silent.test", 1);
    // By name, too: one that isn't answered is not in the way of another.
    for _ in 0..20 {
        let begun = Instant::now();
        assert_echo(&other, b"?");
        assert_echo(&client.connect("tcp", "here.test", target.port()), b"?");
        assert!(begun.elapsed() < secs(5), "{:?}", begun.elapsed());
    }
    // Whoever gives up and tries again, again and again, doesn't fill the memory with threads.
    for _ in 0..100 {
        client.connect("tcp", "silent.test", 80).stop();
    }
    let many = proc::threads(pid);
    println!("{} threads more while a name server is silent", many.saturating_sub(threads));
    // 10 look-ups of two threads.
    assert!(many <= threads + 20, "{many} threads, {threads} before");
    assert_echo(&other, b"still quick");
    // The resolver gives up after 30 s.
    let error = client.next_error_within(secs(60));
    println!("given up after {:?}", start.elapsed());
    assert!(error.text.starts_with("dial tcp: lookup silent.test: "), "{error:?}");
    assert!(start.elapsed() < secs(50), "given up after {:?}", start.elapsed());
    client.close();
    eventually(secs(40), "the resolvers to end", || (proc::threads(pid) <= threads).then_some(()));
    device.nothing(millis(1), "nothing is said afterwards", |m| m.sid.as_deref() == Some(client.sid()));
}

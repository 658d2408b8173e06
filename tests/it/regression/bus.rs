//! Other programs on the system bus who mean harm.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dbus::Message;
use dbus::channel::Channel;
use nix::sys::signal::Signal;

use crate::harness::daemon::emulated;
use crate::harness::device::Generation;
use crate::harness::proc;
use crate::harness::rig::{Rig, Setup};
use crate::harness::server::Server;
use crate::harness::wait::{SOON, eventually, secs, spawn};

const BUS: &str = "org.freedesktop.DBus";

/// A stranger's connection, and the agent's name.
fn stranger(rig: &Rig) -> (Channel, String) {
    let mut channel = Channel::open_private(&rig.bus.address()).unwrap();
    channel.register().unwrap();
    let call = |member: &str| Message::new_method_call(BUS, "/org/freedesktop/DBus", BUS, member).unwrap();
    let ask = |question| channel.send_with_reply_and_block(question, SOON).unwrap();
    let names: Vec<String> = ask(call("ListNames")).get1().unwrap();
    let is_agents = |name: &&String| {
        let question = call("GetConnectionUnixProcessID").append1(name.as_str());
        let answer = channel.send_with_reply_and_block(question, SOON);
        answer.is_ok_and(|answer| answer.get1() == Some(rig.daemon.pid()))
    };
    let name = names.iter().find(is_agents).expect("the agent is on the bus").clone();
    (channel, name)
}

fn signal(to: &str, bytes: usize) -> Message {
    let mut signal = Message::new_signal("/x", "x.y", "Z").unwrap();
    signal.set_destination(Some(to.into()));
    signal.append1("x".repeat(bytes))
}

/// Signals of 30 MB, which any local user may send, had the agent hold up to 89 MiB.
#[test]
fn a_message_that_is_too_large_is_not_read_to_its_end() {
    let (rig, device) = Rig::connected();
    let before = proc::peak_rss_kib(rig.daemon.pid());
    for _ in 0..3 {
        let (channel, agent) = stranger(&rig);
        let mark = rig.daemon.mark();
        channel.send(signal(&agent, 30_000_000)).unwrap();
        channel.flush();
        rig.daemon.wait_for_log_after(mark, "no system bus: a message is too large", secs(60));
        rig.manager.wait_calls("GetJwtToken", 1 + rig.daemon.count_log("no system bus"), SOON);
    }
    let grown = proc::peak_rss_kib(rig.daemon.pid()) - before;
    assert!(grown < 8 << 10 || emulated("its memory is the emulator's, too"), "{grown} KiB");
    // What fits is no reason to leave the bus, and one link has seen all of it.
    let (channel, agent) = stranger(&rig);
    channel.send(signal(&agent, 900_000)).unwrap();
    channel.flush();
    assert!(device.answers(b"the same link", SOON));
    rig.manager.change("other", &rig.server.url());
    rig.device();
    assert_eq!(rig.daemon.count_log("no system bus"), 3);
}

/// While others flooded the bus, dbus-daemon dropped the signal that withdraws the token, and the agent, which reads the
/// flood, had time for nothing else. A minute later the token counts as withdrawn, see `at_length`.
#[test]
fn a_flood_on_the_bus_hides_no_withdrawal() {
    if emulated("it is too slow for a flood") {
        return;
    }
    let (mut rig, device) = Rig::connected();
    let over = Arc::new(AtomicBool::new(false));
    let flood = |n| {
        let ((channel, agent), over) = (stranger(&rig), Arc::clone(&over));
        spawn(&format!("flood-{n}"), move || {
            while !over.load(Ordering::Relaxed) {
                channel.send(signal(&agent, 100)).unwrap();
                channel.flush();
            }
        })
    };
    let floods: Vec<_> = (0..3).map(flood).collect();
    // As if its announcement were lost.
    rig.manager.set("", "");
    rig.daemon.signal(Signal::SIGHUP);
    rig.manager.wait_calls("FetchJwtToken", 1, secs(30));
    assert!(device.answers(b"a manager may have to fetch first", SOON));
    assert_eq!(rig.status()["connection"]["state"], "connected");
    let asked = rig.manager.all_calls().len();
    for more in 1..=5 {
        rig.daemon.signal(Signal::SIGHUP);
        eventually(secs(30), "the next question", || {
            (rig.manager.all_calls().len() >= asked + more).then_some(())
        });
    }
    rig.daemon.signal(Signal::SIGTERM);
    assert_eq!(rig.daemon.wait_exit(SOON).code(), Some(0));
    over.store(true, Ordering::Relaxed);
    floods.into_iter().for_each(|flood| flood.join().unwrap());
}

/// A token with a line feed, as from a script in mender-auth's place, was refused for ever. Mender's agent drops such.
#[test]
fn a_token_may_have_a_line_feed() {
    let server = Server::start(Generation::New);
    let rig = Setup::new().token("a.b.c\n").url(&format!(" {}\n", server.url())).start();
    assert_eq!(server.device().request().header("Authorization"), Some("Bearer a.b.c"));
    rig.manager.change("\n", &server.url());
    rig.daemon.wait_for_log("dbusEventLoop terminated", SOON);
}

/// A manager that has restarted knows no token until somebody has it fetch one. Where its restart fell together with the
/// question before an attempt, the agent asked for none, and waited until another program did.
#[test]
fn a_token_that_is_gone_when_the_link_is_lost_is_fetched() {
    let (rig, device) = Setup::new().set("ReconnectIntervalSeconds", 1).connected();
    rig.manager.set("", "");
    rig.manager.on_fetch("renewed", &rig.server.url());
    device.reset();
    assert_eq!(rig.device().request().header("Authorization"), Some("Bearer renewed"));
    rig.daemon.wait_for_log("error reconnecting: there is no token", SOON);
}

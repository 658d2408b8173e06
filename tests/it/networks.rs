//! Networks that come, go and fall silent, in network namespaces.

use std::fs::File;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use nix::libc::linger;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;

use crate::harness::client::{Style, Terminal};
use crate::harness::daemon::emulated;
use crate::harness::device::{Device, Generation};
use crate::harness::forward::Client;
use crate::harness::network::{Network, SERVER, with_network};
use crate::harness::rig::{Rig, Setup, script_config};
use crate::harness::server::{Reply, Server};
use crate::harness::trace;
use crate::harness::wait::{SOON, eventually, millis, secs, spawn, throughout};

/// In seconds, of an outage of the network. A longer run sets it: `MENDER_CONNECT_OUTAGE=1800`.
fn outage() -> Duration {
    secs(std::env::var("MENDER_CONNECT_OUTAGE").map_or(12, |seconds| seconds.parse().expect("a number")))
}

fn connected(network: &Network, setup: Setup) -> (Rig, Server, Device) {
    let server = network.server();
    let rig = network.agent(setup, &server).start();
    let device = server.next_device(SOON);
    // The server knows of it first.
    rig.daemon.wait_for_log("Connection established", SOON);
    (rig, server, device)
}

/// Well before anything else would end the wait.
const AT_ONCE: Duration = secs(5);

fn assert_within(limit: Duration, since: Instant) {
    let took = since.elapsed();
    println!("took {took:?}");
    assert!(took < limit || emulated("time is the emulator's"), "{took:?}");
}

/// Waits for the end of the link, as the agent sees it, and returns the reason.
fn lost(rig: &Rig, mark: usize, limit: Duration) -> String {
    let line = rig.daemon.wait_for_log_after(mark, " lost: ", limit);
    line.split_once(" lost: ").expect("a reason").1.trim_end_matches('"').to_owned()
}

/// The way falls silent: the link is lost in time, the reason is returned, and the next link comes when the way is back.
fn silenced(network: &Network, rig: &Rig, server: &Server, limit: Duration) -> String {
    let (mark, dark) = (rig.daemon.mark(), Instant::now());
    network.go_dark();
    let reason = lost(rig, mark, limit + secs(7));
    assert_within(limit, dark);
    network.answer();
    server.next_device(SOON * 2);
    reason
}

/// A device whose network was away for an hour waited for up to 5 minutes more.
#[test]
fn a_default_route_is_used_at_once() {
    with_network(|network| {
        let (rig, server, device) = connected(network, Setup::new().set("ReconnectIntervalSeconds", 300));
        network.near("ip route del default");
        device.reset();
        rig.daemon.wait_for_log("connectionmanager backoff", SOON);
        throughout(outage(), "no way to the server", || server.try_device(millis(0)).is_none());
        let back = Instant::now();
        network.near("ip route add default via 192.0.2.1");
        server.next_device(SOON);
        assert_within(AT_ONCE, back);
        rig.daemon.wait_for_log("the network or the clock has changed", SOON);
    });
}

/// A static address and its routes stay while the cable is unplugged: the carrier alone tells that it is back.
#[test]
fn a_cable_that_is_plugged_in_again_is_used_at_once() {
    with_network(|network| {
        let (rig, server, device) = connected(network, Setup::new().set("ReconnectIntervalSeconds", 300));
        device.reset();
        rig.daemon.wait_for_log("connectionmanager backoff", SOON);
        network.far("ip link set far down");
        throughout(outage(), "no way to the server", || server.try_device(millis(0)).is_none());
        assert_eq!(rig.daemon.count_log("the network or the clock has changed"), 0);
        let back = Instant::now();
        network.far("ip link set far up");
        server.next_device(SOON);
        assert_within(AT_ONCE, back);
        rig.daemon.wait_for_log("the network or the clock has changed", SOON);
    });
}

/// A forwarder on the agent's own loopback interface, where it has to be told to stop, too.
fn with_forwarder(test: impl FnOnce(&Network, &Server) + Send + 'static) {
    with_network(move |network| {
        let enter = || {
            let place = File::open(network.namespace()).expect("the agent's namespace");
            move || setns(place, CloneFlags::CLONE_NEWNET).expect("enter the agent's namespace")
        };
        let (there, there_again) = (enter(), enter());
        let forwarder = spawn("forwarder", move || {
            there();
            Server::start(Generation::New)
        });
        let server = forwarder.join().expect("a forwarder");
        test(network, &server);
        let stop = move || {
            there_again();
            drop(server);
        };
        spawn("forwarder", stop).join().expect("the forwarder's end");
    });
}

/// The forwarder of Mender's client 3 answers with 503 when it can't reach its server. The agent took that for a server
/// with too much to do, which a network that comes back doesn't make any better.
#[test]
fn a_forwarder_that_reaches_no_server_is_tried_again_at_once() {
    with_forwarder(|network, server| {
        server.script([Reply::status(503)]);
        network.near("ip route del default");
        let rig = network.agent(Setup::new().set("ReconnectIntervalSeconds", 300), server).start();
        rig.daemon.wait_for_log("connectionmanager backoff", SOON);
        let back = Instant::now();
        network.near("ip route add default via 192.0.2.1");
        server.next_device(SOON);
        assert_within(AT_ONCE, back);
    });
}

/// A login page that answers in the server's place was taken for a server with too much to do, too.
#[test]
fn behind_a_login_page_a_new_route_is_used_at_once() {
    with_network(|network| {
        for page in [Reply::with(302, "Location", "http://login.test/"), Reply::status(511)] {
            let server = network.server();
            server.script([page]);
            let rig = network.agent(Setup::new().set("ReconnectIntervalSeconds", 300), &server).start();
            rig.daemon.wait_for_log("connectionmanager backoff", SOON);
            let back = Instant::now();
            network.near("ip route del default && ip route add default via 192.0.2.1");
            server.next_device(SOON);
            assert_within(AT_ONCE, back);
        }
    });
}

#[test]
fn a_link_whose_address_is_gone_is_lost_at_once() {
    with_network(|network| {
        let (rig, server, device) = connected(network, Setup::new().set("ReconnectIntervalSeconds", 300));
        assert!(device.answers(b"there", SOON));
        let mark = rig.daemon.mark();
        let gone = Instant::now();
        // The new one first, as DHCP clients do, and the route with it.
        network.near(
            "ip addr add 192.0.2.3/24 dev near && ip addr del 192.0.2.2/24 dev near && \
             ip addr add 192.0.2.3/24 dev near; ip route replace default via 192.0.2.1",
        );
        server.next_device(SOON);
        assert_within(AT_ONCE, gone);
        assert_eq!(lost(&rig, mark, SOON), "its address 192.0.2.2 is gone");
    });
}

/// An agent that has lost its link and tries to connect to a server that nobody can reach.
fn dialling_in_the_dark(network: &Network) -> (Rig, Server) {
    let (rig, server, device) = connected(network, Setup::new().set("ReconnectIntervalSeconds", 300));
    device.reset();
    rig.daemon.wait_for_log("connectionmanager backoff", SOON);
    network.go_dark();
    rig.daemon.signal(Signal::SIGHUP);
    eventually(SOON, "an attempt", || (rig.status()["connection"]["state"] == "connecting").then_some(()));
    (rig, server)
}

/// A modem that dials again has another address. An attempt to connect that was under way by the old one took its 45 s.
#[test]
fn an_attempt_whose_address_is_gone_is_given_up_at_once() {
    with_network(|network| {
        let (rig, server) = dialling_in_the_dark(network);
        server.no_device(millis(200), "its packet is lost");
        let back = Instant::now();
        network.near(
            "ip addr del 192.0.2.2/24 dev near && ip addr add 192.0.2.3/24 dev near && \
             ip route replace default via 192.0.2.1",
        );
        network.answer();
        server.next_device(SOON);
        assert_within(AT_ONCE, back);
        rig.daemon.wait_for_log("its address 192.0.2.2 is gone", SOON);
    });
}

/// An attempt that was under way by the old route, whose address stayed, took its 45 s.
#[test]
fn a_new_route_is_tried_beside_an_attempt_under_way() {
    with_network(|network| {
        let (_rig, server) = dialling_in_the_dark(network);
        // The kernel repeats its packet after 1, 3, 7 and 15 s.
        throughout(secs(8), "no way to the server", || server.try_device(millis(0)).is_none());
        network.answer();
        let back = Instant::now();
        network.near("ip route del default && ip route add default via 192.0.2.1");
        server.next_device(SOON);
        assert_within(AT_ONCE, back);
    });
}

/// A bridge that takes over an interface's address keeps its connections. The agent ended its own, with all transfers and
/// forwards, and said that the address was gone.
#[test]
fn a_link_whose_address_another_interface_takes_over_goes_on() {
    with_network(|network| {
        let (rig, _server, device) = connected(network, Setup::new());
        network.near(
            "ip addr add 192.0.2.2/32 dev lo && ip addr del 192.0.2.2/24 dev near && \
             ip route add 192.0.2.1 dev near src 192.0.2.2 && ip route replace default via 192.0.2.1",
        );
        throughout(secs(2), "the link", || !device.is_over());
        assert!(device.answers(b"still there", SOON));
        assert_eq!(rig.daemon.count_log(" is gone"), 0);
    });
}

/// A link that the network's change has cut without a word is asked, and one that goes on stays.
#[test]
fn a_change_of_the_network_has_the_link_asked() {
    with_network(|network| {
        let (rig, server, device) = connected(network, Setup::new().set("ReconnectIntervalSeconds", 1));
        let pings = device.pings();
        network.near("ip addr add 203.0.113.5/24 dev near");
        device.wait_pings(pings + 1, SOON);
        throughout(secs(6), "the link", || !device.is_over());
        // One that has been idle for longer than it has to answer was lost at once.
        network.near("ip addr add 203.0.113.7/24 dev near");
        device.wait_pings(pings + 2, SOON);
        throughout(secs(6), "the link", || !device.is_over());
        assert_eq!(rig.daemon.count_log(" lost: "), 0);
        network.go_dark();
        let (mark, changed) = (rig.daemon.mark(), Instant::now());
        network.near("ip addr add 203.0.113.6/24 dev near");
        assert_eq!(lost(&rig, mark, SOON), "no answer to a ping in 5 s");
        assert_within(secs(7), changed);
        network.answer();
        server.next_device(SOON);
    });
}

/// Containers that come and go change routes and addresses nearby all the time.
#[test]
fn changes_nearby_are_nothing_to_the_link() {
    with_network(|network| {
        let (rig, _server, device) = connected(network, Setup::new());
        let pings = device.pings();
        for _ in 0..20 {
            network.near(
                "ip link add one type veth peer name other && ip link set one up && ip link set other up && \
                 ip addr add 169.254.7.7/16 scope link dev one && ip route add 10.9.0.0/16 dev one && \
                 ip route del 10.9.0.0/16 && ip link del one",
            );
        }
        // Nor is a carrier new that was there at the start.
        network.near("ip link set near promisc on");
        // Nor an address that is only refreshed.
        for lifetime in 1000..1020 {
            network.near(&format!(
                "ip addr change 192.0.2.2/24 dev near valid_lft {lifetime} preferred_lft {lifetime}"
            ));
        }
        assert!(device.answers(b"still there", SOON));
        assert_eq!(rig.daemon.count_log("the network or the clock has changed"), 0);
        assert_eq!(device.pings(), pings);
        // New addresses and default routes all the time have it asked three times, and then once in ten seconds.
        for n in 1..=30 {
            network.near(&format!("ip addr add 203.0.113.{n}/24 dev near"));
        }
        assert!(device.answers(b"still there", SOON));
        let asked = rig.daemon.count_log("the network or the clock has changed");
        assert!((1..=5).contains(&asked), "{asked} times");
        assert!(!device.is_over());
    });
}

#[test]
fn a_way_that_falls_silent_is_noticed_with_output_in_ten_seconds() {
    with_network(|network| {
        let shell = script_config("while sleep 0.1; do echo tick; done");
        let setup = Setup::new().config(shell).set("ReconnectIntervalSeconds", 1);
        let (rig, server, device) = connected(network, setup);
        let mut terminal = Terminal::new(&device, Style::Cli);
        terminal.open();
        terminal.read_until("tick", SOON);
        assert_eq!(silenced(network, &rig, &server, secs(13)), "unacknowledged for 10 s");
    });
}

#[test]
fn a_way_that_falls_silent_is_noticed_by_the_heartbeat() {
    with_network(|network| {
        let setup = Setup::new().set("ReconnectIntervalSeconds", 1).set("HeartbeatSeconds", 10);
        let (rig, server, device) = connected(network, setup);
        device.wait_pings(1, SOON);
        // Either the kernel misses the ping's acknowledgement or the agent the answer.
        let reason = silenced(network, &rig, &server, secs(23));
        assert!(["unacknowledged for 10 s", "no answer to a ping in 10 s"].contains(&&*reason), "{reason}");
    });
}

/// A user's shell that counts, on a link that has carried some of it, and what it has carried.
fn counting(network: &Network) -> (Rig, Server, Device, Terminal, Vec<u8>) {
    let shell = "stty -echo; n=0; while n=$((n + 1)); do echo $n; sleep 0.1; done";
    let setup = Setup::new().config(script_config(shell)).set("ReconnectIntervalSeconds", 1);
    let (rig, server, device) = connected(network, setup.set("Sessions", json!({})));
    let terminal = Terminal::of_user(&device, "alice");
    terminal.open();
    let mut all = Vec::new();
    terminal.collect(&mut all, 40, SOON);
    (rig, server, device, terminal, all)
}

/// Returns the output that the server has got, with some more by the next link.
fn with_more(terminal: Terminal, mut all: Vec<u8>, next: &Device) -> String {
    terminal.collect(&mut all, usize::MAX, millis(300));
    let terminal = terminal.on(next);
    terminal.pong();
    let wanted = all.len() + 300;
    terminal.collect(&mut all, wanted, SOON);
    String::from_utf8(all).expect("text")
}

/// Nothing is missing, and nothing came twice.
fn assert_counted(text: &str) {
    let (whole, _) = text.rsplit_once("\r\n").expect("lines");
    for (n, line) in whole.split("\r\n").enumerate() {
        assert_eq!(line, (n + 1).to_string(), "line {}", n + 1);
    }
}

/// The next link sends the output that the dead one hasn't delivered.
#[test]
fn output_that_was_under_way_comes_by_the_next_link() {
    with_network(|network| {
        let (rig, server, _device, terminal, all) = counting(network);
        let mark = rig.daemon.mark();
        network.go_dark();
        lost(&rig, mark, secs(20));
        network.answer();
        let next = server.next_device(SOON * 2);
        assert_counted(&with_more(terminal, all, &next));
    });
}

/// A new token that came before the dead link was noticed had all that the kernel still held taken for delivered.
#[test]
fn output_of_a_dead_link_comes_by_that_of_a_new_token() {
    with_network(|network| {
        network.far("ip addr add 198.51.100.2/32 dev lo");
        let other = Server::bind(([198, 51, 100, 2], 0).into(), Generation::New);
        let (rig, _server, _device, terminal, all) = counting(network);
        network.go_dark();
        throughout(secs(4), "the link", || rig.daemon.count_log(" lost: ") == 0);
        rig.manager.change("another.token.signature", &other.url());
        let next = other.next_device(SOON);
        let text = with_more(terminal, all, &next);
        // The server there has to be told to stop.
        network.answer();
        assert_counted(&text);
    });
}

/// So had a message that was too large.
#[test]
fn output_of_a_dead_link_that_a_message_ends_comes_by_the_next() {
    with_network(|network| {
        let (rig, server, device, terminal, all) = counting(network);
        let mark = rig.daemon.mark();
        // The agent still hears the server.
        network.near("ip neigh replace 192.0.2.1 lladdr 02:00:00:00:00:99 dev near nud permanent");
        throughout(secs(2), "the link", || rig.daemon.count_log(" lost: ") == 0);
        device.write(&[0x82, 127, 0, 0, 0x40, 0, 0, 0, 0, 0]).expect("announce a message of 1 GiB");
        assert!(lost(&rig, mark, SOON).ends_with("too large"));
        network.near("ip neigh del 192.0.2.1 dev near");
        let next = server.next_device(SOON * 2);
        assert_counted(&with_more(terminal, all, &next));
    });
}

/// mender-auth's forwarder goes on waiting for its server by the old way. So did the agent, for 45 s.
#[test]
fn a_new_route_is_used_where_a_forwarder_waits_by_the_old_one() {
    with_forwarder(|network, server| {
        server.script([Reply::Silence]);
        let _rig = network.agent(Setup::new(), server).start();
        server.wait_requests(1, SOON);
        let back = Instant::now();
        network.near("ip route del default && ip route add default via 192.0.2.1");
        server.next_device(secs(60));
        assert_within(secs(12), back);
    });
}

/// systemd-networkd sets IPv6's default route anew with each router advertisement.
#[test]
fn a_default_route_that_is_refreshed_is_no_change() {
    with_network(|network| {
        let (rig, _server, device) = connected(network, Setup::new());
        let refresh = |router: &str, lifetime: u32| {
            network.near(&format!(
                "ip -6 route replace default via {router} dev near metric 1024 proto ra expires {lifetime}"
            ));
        };
        refresh("fe80::1", 600);
        rig.daemon.wait_for_log("the network or the clock has changed", SOON);
        let pings = device.pings();
        for lifetime in 601..=610 {
            refresh("fe80::1", lifetime);
            throughout(millis(200), "the network", || {
                rig.daemon.count_log("the network or the clock has changed") == 1
            });
        }
        assert!(device.pings() <= pings + 1);
        let mark = rig.daemon.mark();
        refresh("fe80::2", 600);
        rig.daemon.wait_for_log_after(mark, "the network or the clock has changed", SOON);
    });
}

/// The forward of a target that lost its power said nothing until it was idle for ten minutes, or never, as configured.
/// Mender's agent asks such a target each 15 s.
#[test]
fn a_target_that_was_switched_off_ends_its_forward() {
    with_network(|network| {
        let (rig, _server, device) = connected(network, Setup::new());
        let client = Client::open(&device);
        let target = TcpListener::bind((SERVER, 0)).expect("listen");
        let port = target.local_addr().expect("an address").port();
        let connection = client.connect("tcp", &SERVER.to_string(), port).opened();
        let (stream, _) = target.accept().expect("the forward");
        // It forgets the connection, and its last packet, a reset, doesn't leave it.
        setsockopt(&stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 }).expect("set SO_LINGER");
        network.far("ip route add blackhole 192.0.2.2/32");
        drop(stream);
        network.far("ip route del blackhole 192.0.2.2/32");
        let off = Instant::now();
        let line = rig.daemon.wait_for_log("event=forward", secs(25));
        assert!(line.contains("result=failed") && line.contains("connection reset"), "{line}");
        assert!(off.elapsed() > secs(5), "the reset was not lost: {:?}", off.elapsed());
        connection.stopped();
        client.close();
    });
}

/// A container's runtime may forbid netlink: said once, and nothing else.
#[test]
fn without_netlink_the_agent_says_so_and_goes_on() {
    if !trace::sees_the_agent() {
        return;
    }
    // The second socket that is bound, after the one for the status.
    let forbidden = r#"exec strace -D -qq -o /dev/null -e trace=bind -e inject=bind:error=EPERM:when=2 "$@""#;
    let (rig, device) = Setup::new().wrapper(forbidden).connected();
    assert!(device.answers(b"there", SOON));
    // Behind it in the log, which is written later than it is queued.
    rig.daemon.wait_for_log("Connection established", SOON);
    assert_eq!(rig.daemon.count_log("the kernel doesn't tell when the network changes"), 1);
}

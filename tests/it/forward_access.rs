//! Where forwards may lead: PortForward.Allow, and PortForward.Disable.

use rmpv::Value as Wire;
use serde_json::{Value, json};

use crate::control::complaint;
use crate::forwards::{NAME, assert_echo, udp};
use crate::harness::client::new_sid;
use crate::harness::connection::Connection;
use crate::harness::daemon;
use crate::harness::device::Device;
use crate::harness::forward::{Client, new_id, target_body};
use crate::harness::msg::PORTS;
use crate::harness::rig::{Rig, Setup, bash_config};
use crate::harness::targets::{Role, Target, UdpEcho};
use crate::harness::wait::SOON;

fn allowing(entries: Value) -> (Rig, Device, Client) {
    let (rig, device) = Setup::new().set("PortForward", json!({ "Allow": entries })).connected();
    let client = Client::open(&device);
    (rig, device, client)
}

fn assert_reached(client: &Client, host: &str, target: &Target) {
    let connection = client.connect("tcp", host, target.port());
    assert_echo(&connection, b"reached");
    connection.stop();
}

/// Asks for a connection, which must be refused to the client and in the log.
fn assert_refused(rig: &Rig, client: &Client, protocol: &str, host: &str, port: u16) -> Connection {
    let mark = rig.daemon.mark();
    let connection = client.connect(protocol, host, port);
    let error = client.next_error();
    assert!(error.about == "new" && error.text.starts_with("access denied"), "{error:?}");
    assert!(error.connection.is_none_or(|id| id == connection.id));
    // A connection that was stopped before may have its own line only now, when its target has ended.
    let line = rig.daemon.wait_for_log_after(mark, "level=warning", SOON);
    // The address counts, so a name may be missing.
    let named = [host.trim_matches(['[', ']']), "127.0.0.1", "::1"].iter().any(|name| line.contains(name));
    assert!(line.contains(&format!(":{port}")) && line.contains(protocol) && named, "{line}");
    connection
}

#[test]
fn absent_allows_everything_and_empty_nothing() {
    let (target, datagrams) = (Target::start(Role::Echo), UdpEcho::start());
    let (_rig, device) = Setup::new().set("PortForward", json!({})).connected();
    assert_reached(&Client::open(&device), "127.0.0.1", &target);
    let (_rig, device) = Setup::new().set("PortForward", json!({ "Allow": null })).connected();
    assert_reached(&Client::open(&device), "127.0.0.1", &target);
    let before = target.accepted();
    let (rig, _device, client) = allowing(json!([]));
    for host in ["127.0.0.1", "localhost", NAME, "::1"] {
        assert_refused(&rig, &client, "tcp", host, target.port());
        assert_refused(&rig, &client, "udp", host, datagrams.port());
    }
    client.close();
    assert_eq!(target.accepted(), before, "nothing was dialled");
}

#[test]
fn addresses_networks_ports_and_protocols() {
    let target = Target::start(Role::Echo);
    let six = Target::bind("[::1]:0", Role::Echo);
    let (port, port6) = (target.port(), six.port());
    for entry in [
        format!("tcp/127.0.0.1:{port}"),
        format!("tcp/127.0.0.0/8:{port}"),
        format!("tcp/127.0.0.1/32:{port}-{port}"),
        format!("tcp/127.0.0.0/30:{}-{}", port - 1, port.saturating_add(1)),
        "tcp/127.0.0.1:*".to_owned(),
        "tcp/0.0.0.0/0:*".to_owned(),
        "tcp/127.0.0.0/8:1-65535".to_owned(),
    ] {
        let (rig, _device, client) = allowing(json!([entry]));
        assert_reached(&client, "127.0.0.1", &target);
        // The address counts, however it was found.
        assert_reached(&client, "localhost", &target);
        assert_reached(&client, NAME, &target);
        assert_refused(&rig, &client, "tcp", "::1", port6);
        assert_refused(&rig, &client, "udp", "127.0.0.1", port);
        client.close();
    }
    for entry in [format!("tcp/[::1]:{port6}"), "tcp/[::]/0:*".to_owned(), format!("tcp/[::1]/128:{port6}")] {
        let (rig, _device, client) = allowing(json!([entry]));
        assert_reached(&client, "::1", &six);
        assert_reached(&client, "[::1]", &six);
        assert_refused(&rig, &client, "tcp", "127.0.0.1", port);
        client.close();
    }
    for entry in [
        format!("tcp/127.0.0.1:{}", port - 1),
        format!("tcp/127.0.0.2:{port}"),
        format!("tcp/127.0.0.2/31:{port}"),
        format!("tcp/10.0.0.0/8:{port}"),
        format!("udp/127.0.0.1:{port}"),
        format!("tcp/127.0.0.1:1-{}", port - 1),
        format!("tcp/127.0.0.1:{}-65535", port + 1),
    ] {
        let (rig, _device, client) = allowing(json!([entry]));
        let refused = assert_refused(&rig, &client, "tcp", "127.0.0.1", port);
        client.settle();
        client.send("forward", Some(&refused.id), b"x");
        assert_eq!(client.next_error().text, "unknown connection", "{entry}");
        client.close();
    }
}

#[test]
fn names_and_several_entries() {
    let (target, other) = (Target::start(Role::Echo), Target::start(Role::Echo));
    let datagrams = UdpEcho::start();
    let entries = json!([
        "udp/[::1]:53",
        "tcp/localhost:*",
        format!("udp/127.0.0.1:{}", datagrams.port()),
        "tcp/192.168.1.0/24:80-443",
    ]);
    let (rig, _device, client) = allowing(entries);
    // A name in the list stands for its addresses.
    for host in ["localhost", "127.0.0.1"] {
        assert_reached(&client, host, &target);
        assert_reached(&client, host, &other);
    }
    assert_echo(&udp(&client, &datagrams), b"datagram");
    assert_refused(&rig, &client, "tcp", "192.168.1.7", 444);
    assert_refused(&rig, &client, "udp", "127.0.0.1", target.port());
    client.close();
}

/// An address written otherwise is the same address, and no way around the list.
#[test]
fn other_spellings_are_no_way_around() {
    let target = Target::start(Role::Echo);
    let (_rig, _device, client) = allowing(json!(["tcp/127.0.0.2:*", "tcp/[::1]:*"]));
    let before = target.accepted();
    for host in ["127.1", "2130706433", "0x7f000001", "0177.0.0.1", "::ffff:127.0.0.1", "0.0.0.0", "::", "0"]
    {
        client.connect("tcp", host, target.port());
        let error = client.next_error();
        // Not every resolver takes every spelling.
        let denied = error.text.starts_with("access denied") || error.text.starts_with("dial tcp");
        assert!(denied, "{host}: {error:?}");
    }
    client.close();
    assert_eq!(target.accepted(), before, "nothing may get through");
}

#[test]
fn a_malformed_entry_is_named_and_fatal() {
    for entry in [
        "",
        "127.0.0.1:22",
        "tcp",
        "tcp/",
        "tcp/127.0.0.1",
        "tcp/127.0.0.1:",
        "tcp/:22",
        "tcp/127.0.0.1:0",
        "tcp/127.0.0.1:65536",
        "tcp/127.0.0.1:http",
        "tcp/127.0.0.1:443-80",
        "tcp/127.0.0.1:-80",
        "tcp/127.0.0.1:80-",
        "tcp/192.168.1.0/33:80",
        "tcp/192.168.1.0/:80",
        "tcp/[::1]/129:80",
        "tcp/[::1:80",
        "tcp/::1:80",
        "sctp/127.0.0.1:22",
        "TCP//127.0.0.1:22",
        "tcp/127.0.0.1:22 ",
    ] {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("mender-connect.conf");
        let mut config = bash_config();
        config["PortForward"] = json!({ "Allow": ["tcp/127.0.0.1:22", entry] });
        std::fs::write(&path, config.to_string()).expect("write");
        let output = daemon::command()
            .args(["--config", path.to_str().expect("UTF-8"), "--fallback-config", "/nonexistent", "daemon"])
            .env("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
            .output()
            .expect("run");
        let log = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{entry:?}: {log}");
        assert!(log.contains("PortForward.Allow") && log.contains(entry), "{entry:?} is named: {log}");
    }
}

#[test]
fn what_is_disabled_is_not_there() {
    let (_rig, device) = Setup::new().set("PortForward", json!({ "Disable": true })).connected();
    let client = Client::start(&device);
    let accept = client.next_control(SOON);
    let protocols = accept.field("protocols").expect("protocols");
    let protocols = protocols.as_array().expect("an array");
    assert!(!protocols.contains(&Wire::from(PORTS)) && protocols.contains(&Wire::from(1)), "{protocols:?}");
    client.send("new", Some(&new_id()), &target_body("127.0.0.1", 1, "tcp"));
    let (text, close, proto, typ) = complaint(&client.next_control(SOON));
    assert_eq!(text, "no handler registered for protocol: 0x0003");
    assert_eq!((close, proto, typ.as_deref()), (false, Some(3), Some("new")));
    // Also without open.
    let sid = new_sid();
    device.send(PORTS, "forward", &sid, &[("connection_id", "x".into())], b"data");
    let (text, ..) = complaint(&device.next_of(&sid, SOON));
    assert_eq!(text, "no handler registered for protocol: 0x0003");
    client.close();
}

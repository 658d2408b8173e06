//! SIGHUP: the configuration is read again, and what doesn't have to end goes on.

use serde_json::{Value, json};

use crate::files::{get, put};
use crate::forwards::assert_echo;
use crate::harness::client::{Style, Terminal};
use crate::harness::forward::Client;
use crate::harness::proc;
use crate::harness::rest::{Form, Rest};
use crate::harness::rig::{Rig, Setup, bash_config, is_root, script_config};
use crate::harness::targets::{Role, Target};
use crate::harness::wait::{SOON, eventually, millis, skip};

const IN_USE: &str = "the new configuration is in use";
const OLD_STAYS: &str = "the old configuration stays";

/// The usual configuration with this besides.
fn with(members: &[(&str, Value)]) -> Value {
    let mut config = bash_config();
    for (key, value) in members {
        config[key] = value.clone();
    }
    config
}

fn reload(rig: &Rig, config: &Value) {
    let mark = rig.reload(config);
    rig.daemon.wait_for_log_after(mark, IN_USE, SOON);
}

#[test]
fn sessions_go_on_and_what_begins_later_follows_the_new_configuration() {
    let (rig, device, mut terminal) = Setup::new().terminal();
    let (target, other) = (Target::start(Role::Echo), Target::start(Role::Echo));
    let client = Client::open(&device);
    let connection = client.connect("tcp", "127.0.0.1", target.port()).opened();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    put(&device, &Form::to(&file), b"before").unwrap();

    let mut config = script_config("echo the new shell; cat");
    config["Limits"] = json!({ "Enabled": true, "FileTransfer": { "MaxFileSize": 3 } });
    config["PortForward"] = json!({ "Allow": [format!("tcp/127.0.0.1:{}", other.port())] });
    config["Sessions"] = json!({ "MaxPerUser": 2 });
    reload(&rig, &config);

    assert_eq!(terminal.run("echo $((6 * 7))"), "42");
    assert_echo(&connection, b"still");
    let refused = client.connect("tcp", "127.0.0.1", target.port());
    assert!(client.next_error().text.starts_with("access denied"));
    drop(refused);
    assert_echo(&client.connect("tcp", "127.0.0.1", other.port()).opened(), b"allowed");
    assert_eq!(get(&device, &file).unwrap_err().status, 403);
    let shells = [(); 2].map(|()| Terminal::of_user(&device, "somebody"));
    for mut shell in shells {
        shell.open();
        shell.read_until("the new shell", SOON);
    }
    assert!(rig.server.try_device(millis(0)).is_none(), "the link is the same");
    client.close();
}

#[test]
fn a_broken_file_is_reported_and_the_old_one_stays() {
    let (rig, device, mut terminal) = Setup::new().set("Sessions", json!({ "MaxPerUser": 1 })).terminal();
    for (text, complaint) in [
        ("{", "Error parsing mender configuration file"),
        ("", "Error parsing mender configuration file"),
        (r#"{ "Sessions": { "MaxPerUser": "2" } }"#, "Sessions.MaxPerUser: expected"),
        (r#"{ "ShellCommand": "/bin/sh", "User": "nobody-like-this" }"#, "unknown user nobody-like-this"),
        (r#"{ "ShellCommand": "sh", "User": "root" }"#, "is not an absolute path"),
        (r#"{ "User": "root", "Auth": { "Source": "file" } }"#, "Auth.TokenFile is needed"),
        (
            r#"{ "User": "root", "Auth": { "Source": "file", "TokenFile": "/t", "ServerURL": "127.0.0.1" } }"#,
            "Auth.ServerURL has no scheme",
        ),
        // A link that works isn't given up for one that never will.
        (
            r#"{ "User": "root", "Auth": { "Source": "file", "TokenFile": "/t", "ServerURL": "htps://host" } }"#,
            "or an unknown one",
        ),
        (
            r#"{ "User": "root", "Auth": { "Source": "file", "TokenFile": "/t", "ServerURL": "http://h:70000" } }"#,
            "malformed server URL: a port that is no number up to 65535",
        ),
        (r#"{ "User": "root", "PortForward": { "Allow": ["x"] } }"#, "x"),
    ] {
        let mark = rig.daemon.mark();
        std::fs::write(rig.dir.path().join("mender-connect.conf"), text).unwrap();
        rig.daemon.signal(nix::sys::signal::Signal::SIGHUP);
        let line = rig.daemon.wait_for_log_after(mark, OLD_STAYS, SOON);
        assert!(line.contains("level=error") && line.contains(complaint), "{text}: {line}");
    }
    assert_eq!(terminal.run("echo on"), "on");
    let mut another = Terminal::new(&device, Style::Cli);
    another.open_with_prompt();
    // And it can be mended.
    reload(&rig, &with(&[("Sessions", json!({ "MaxPerUser": 3 }))]));
}

#[test]
fn what_is_disabled_ends_and_what_is_enabled_is_there() {
    let (rig, device, terminal) = Setup::new().terminal();
    let target = Target::start(Role::Echo);
    let client = Client::open(&device);
    let connection = client.connect("tcp", "127.0.0.1", target.port()).opened();
    assert_echo(&connection, b"there");
    let off = json!({ "Disable": true });
    reload(&rig, &with(&[("Terminal", off.clone()), ("PortForward", off.clone())]));
    let stop = terminal.expect_after_output("stop", SOON);
    assert_eq!((stop.status(), stop.text()), (Some(2), "the terminal was disabled".into()));
    let control = client.next_control(SOON);
    assert_eq!(control.typ, "error", "{}", control.summary());
    target.wait_all_closed(1);
    eventually(SOON, "the shell to be reaped", || proc::children(rig.daemon.pid()).is_empty().then_some(()));

    // An upload under way ends with its protocol.
    let rest = Rest::open(&device);
    let dir = tempfile::tempdir().unwrap();
    rest.announce(&Form::to(dir.path().join("file"))).unwrap();
    reload(&rig, &with(&[("FileTransfer", off)]));
    let over = rest.next();
    assert_eq!((over.proto, over.typ.as_str()), (0xffff, "error"), "{}", over.summary());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);

    if is_root() {
        // The terminal needs nothing of what was given up here: it was on at the start.
        reload(&rig, &with(&[]));
    }
    let mut again = Terminal::new(&device, Style::Cli);
    again.open_with_prompt();
    assert_eq!(again.run("echo back"), "back");
}

#[test]
fn a_shell_that_runs_expires_as_the_new_configuration_says() {
    let (rig, _device, terminal) = Setup::new().terminal();
    reload(&rig, &with(&[("Sessions", json!({ "ExpireAfterIdle": 1 }))]));
    let stop = terminal.expect_after_output("stop", SOON);
    assert!(stop.text().starts_with("session expired: no input for 1 s"), "{}", stop.text());
}

#[test]
fn privileges_that_were_given_up_take_a_restart() {
    if !is_root() {
        return skip("only root has privileges to give up");
    }
    let off = json!({ "Disable": true });
    let confined = [("Terminal", off.clone()), ("FileTransfer", off.clone()), ("MenderClient", off.clone())];
    for part in ["Terminal", "FileTransfer", "MenderClient"] {
        let (rig, _device) = Setup::new().config(with(&confined)).connected();
        let more: Vec<_> = confined.iter().filter(|(key, _)| *key != part).cloned().collect();
        let mark = rig.reload(&with(&more));
        let line = rig.daemon.wait_for_log_after(mark, OLD_STAYS, SOON);
        assert!(line.contains("restart"), "{part}: {line}");
        let mut less = confined.to_vec();
        less.push(("PortForward", off.clone()));
        reload(&rig, &with(&less));
    }
}

#[test]
fn the_back_off_follows() {
    use crate::harness::server::Reply;
    let setup = Setup::new().set("ReconnectIntervalSeconds", 3600);
    let rig = setup.start_with(|server| server.always(Reply::status(500)));
    rig.daemon.wait_for_log("retrying in", SOON);
    rig.server.always(Reply::Upgrade);
    // It is used for the next wait; the signal cuts this one short.
    reload(&rig, &with(&[("ReconnectIntervalSeconds", 1.into())]));
    let device = rig.device();
    device.reset();
    rig.device();
}

#[test]
fn signals_in_any_number_are_obeyed() {
    let (rig, _device, mut terminal) = Setup::new().terminal();
    for round in 0..200 {
        rig.reload(&with(&[("Sessions", json!({ "MaxPerUser": round % 7 + 1 }))]));
    }
    reload(&rig, &with(&[("Sessions", json!({ "MaxPerUser": 100 }))]));
    assert_eq!(terminal.run("echo on"), "on");
}

/// From the bus to a file and back, where the bus isn't there at first.
#[test]
fn the_token_comes_from_where_the_new_configuration_says() {
    use std::os::unix::fs::PermissionsExt;
    let bearer = |device: &crate::harness::device::Device| {
        device.request().header("Authorization").unwrap_or_default().to_owned()
    };
    let (mut rig, _device) = Setup::new().token("of-the-bus").connected();
    let file = rig.dir.path().join("token");
    std::fs::write(&file, "of-the-file\n").unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
    let auth = json!({ "Source": "file", "TokenFile": file, "ServerURL": rig.server.url() });
    reload(&rig, &with(&[("Auth", auth)]));
    let device = rig.device();
    assert_eq!(bearer(&device), "Bearer of-the-file");

    rig.bus.kill();
    let mark = rig.reload(&with(&[]));
    rig.daemon.wait_for_log_after(mark, "no system bus", SOON);
    // What it has goes on until somebody says otherwise.
    assert!(device.answers(b"still", SOON));
    rig.bus.restart();
    rig.manager.appear();
    assert_eq!(bearer(&rig.device()), "Bearer of-the-bus");
}

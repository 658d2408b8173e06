//! The control protocol: handshake, ping, errors. Its timers are in `at_length`.

use rmpv::Value;

use crate::harness::client::new_sid;
use crate::harness::device::Device;
use crate::harness::msg::{self, CONTROL, Ints, Msg, map};
use crate::harness::rig::Rig;
use crate::harness::wait::{SOON, millis};

fn versions(list: &[i64], ints: Ints) -> Vec<u8> {
    let list = list.iter().map(|&v| Value::from(v)).collect();
    msg::encode(&map(&[("versions", Value::Array(list))]), ints)
}

fn accept_body(version: i64) -> Vec<u8> {
    let protocols = Value::Array(vec![1.into(), 2.into()]);
    msg::encode(&map(&[("version", version.into()), ("protocols", protocols)]), Ints::Compact)
}

/// What a control error says: text, close, offending protocol and type.
type Complaint = (String, bool, Option<u64>, Option<String>);

/// Checks the form of a control error and takes it apart.
pub fn complaint(msg: &Msg) -> Complaint {
    assert_eq!((msg.proto, msg.typ.as_str()), (CONTROL, "error"), "{}", msg.summary());
    assert!(msg.props.is_empty(), "control errors have no props: {}", msg.summary());
    for (key, _) in msg.map() {
        assert!(
            ["err", "close", "msgproto", "msgtype", "msgid", "code"].contains(&key.as_str()),
            "key {key}"
        );
    }
    let text = msg.field("err").and_then(|v| v.as_str().map(str::to_owned)).expect("err is always there");
    let close = msg.field("close").and_then(|v| v.as_bool()).expect("close is always there");
    let proto = msg.field("msgproto").map(|v| v.as_u64().expect("a number"));
    let typ = msg.field("msgtype").map(|v| v.as_str().expect("a string").to_owned());
    (text, close, proto, typ)
}

fn ask(device: &Device, sid: &str, typ: &str, body: &[u8]) -> Msg {
    device.send(CONTROL, typ, sid, &[("user_id", "u".into())], body);
    device.next_of(sid, SOON)
}

fn about(text: &str, close: bool, proto: u16, typ: &str) -> Complaint {
    (text.to_owned(), close, Some(u64::from(proto)), Some(typ.to_owned()))
}

#[test]
fn open_is_accepted_with_the_enabled_protocols() {
    let (_rig, device) = Rig::connected();
    for ints in [Ints::Compact, Ints::Wide] {
        let sid = new_sid();
        let accept = ask(&device, &sid, "open", &versions(&[1], ints));
        assert_eq!((accept.proto, accept.typ.as_str()), (CONTROL, "accept"));
        assert!(accept.props.is_empty(), "accept has no props");
        assert_eq!(accept.field("version").and_then(|v| v.as_i64()), Some(1));
        let protocols = accept.field("protocols").expect("protocols");
        let mut ids: Vec<u64> =
            protocols.as_array().expect("an array").iter().map(|v| v.as_u64().expect("an id")).collect();
        ids.sort_unstable();
        assert!(ids.contains(&1), "the terminal is enabled: {ids:?}");
        assert!(ids.iter().all(|id| (1..=4).contains(id)), "{ids:?}");
        ids.dedup();
        assert_eq!(ids.len(), protocols.as_array().expect("an array").len(), "named once each");
    }
    let several = ask(&device, &new_sid(), "open", &versions(&[3, 2, 1], Ints::Compact));
    assert_eq!(several.typ, "accept", "1 is among them");
}

#[test]
fn another_version_is_rejected() {
    let (_rig, device) = Rig::connected();
    for list in [&[2][..], &[]] {
        let error = ask(&device, &new_sid(), "open", &versions(list, Ints::Compact));
        assert_eq!(complaint(&error), about("handshake rejected: require version 1", true, CONTROL, "open"));
    }
}

#[test]
fn a_malformed_open_is_rejected() {
    let (_rig, device) = Rig::connected();
    for body in [&b"\xc1"[..], b"hello", b"\x81\xa8versions\xa1x", b""] {
        let error = ask(&device, &new_sid(), "open", body);
        let (text, close, proto, typ) = complaint(&error);
        assert!(close && proto == Some(u64::from(CONTROL)) && typ.as_deref() == Some("open"), "{text}");
        let prefix = "failed to decode handshake request: ";
        // An absent body may as well count as one without versions.
        let rejected = body.is_empty() && text == "handshake rejected: require version 1";
        assert!(text.starts_with(prefix) && text.len() > prefix.len() || rejected, "{body:?}: {text}");
    }
}

#[test]
fn a_peers_accept_is_checked() {
    let (_rig, device) = Rig::connected();
    let sid = new_sid();
    device.send(CONTROL, "accept", &sid, &[], &accept_body(1));
    device.nothing(millis(150), "a good accept is ignored", |_| true);
    let error = ask(&device, &sid, "accept", &accept_body(2));
    let expected = "unsupported protocol version 2: require version 1";
    assert_eq!(complaint(&error), about(expected, true, CONTROL, "accept"));
    let error = ask(&device, &new_sid(), "accept", b"\xc1");
    let (text, close, ..) = complaint(&error);
    assert!(text.starts_with("malformed handshake response: ") && close, "{text}");
}

#[test]
fn ping_is_answered_with_pong() {
    let (_rig, device) = Rig::connected();
    let sid = new_sid();
    for _ in 0..3 {
        let pong = ask(&device, &sid, "ping", b"");
        assert_eq!((pong.proto, pong.typ.as_str(), pong.body), (CONTROL, "pong", None));
        assert!(pong.props.is_empty(), "{:?}", pong.props);
    }
    device.send(CONTROL, "pong", &sid, &[], b"");
    device.nothing(millis(150), "a pong is not answered", |_| true);
}

#[test]
fn an_unknown_control_message_is_named() {
    let (_rig, device) = Rig::connected();
    let sid = new_sid();
    let error = ask(&device, &sid, "bogus", b"");
    let text = "session: control type message not understood: 'bogus'";
    assert_eq!(complaint(&error), about(text, false, CONTROL, "bogus"));
    assert_eq!(ask(&device, &sid, "ping", b"").typ, "pong", "the session goes on");
}

#[test]
fn an_unknown_protocol_is_named() {
    let (_rig, device) = Rig::connected();
    let sid = new_sid();
    for (proto, hex) in [(12_345u16, "0x3039"), (5, "0x0005"), (0, "0x0000"), (0xabcd, "0xABCD")] {
        device.send(proto, "new", &sid, &[], b"");
        let error = device.next_of(&sid, SOON);
        let (text, close, named, typ) = complaint(&error);
        assert_eq!(text, format!("no handler registered for protocol: {hex}"));
        assert!(!close);
        assert_eq!(typ.as_deref(), Some("new"));
        // Zero may be left out, as Go's encoder does.
        assert!(named == Some(u64::from(proto)) || proto == 0 && named.is_none(), "msgproto {named:?}");
    }
}

#[test]
fn a_message_id_is_echoed_in_errors() {
    let (_rig, device) = Rig::connected();
    let sid = new_sid();
    device.send(CONTROL, "bogus", &sid, &[("msgid", "id-17".into())], b"");
    let error = device.next_of(&sid, SOON);
    complaint(&error);
    assert_eq!(error.field("msgid").and_then(|v| v.as_str().map(str::to_owned)).as_deref(), Some("id-17"));
}

#[test]
fn close_and_closing_errors_end_a_session_silently() {
    let (_rig, device) = Rig::connected();
    let sid = new_sid();
    let error = |close: bool| {
        msg::encode(&map(&[("err", "of the peer".into()), ("close", close.into())]), Ints::Compact)
    };
    assert_eq!(ask(&device, &sid, "open", &versions(&[1], Ints::Compact)).typ, "accept");
    device.send(CONTROL, "error", &sid, &[], &error(false));
    assert_eq!(ask(&device, &sid, "ping", b"").typ, "pong", "an error without close ends nothing");
    device.send(CONTROL, "close", &sid, &[], b"");
    device.nothing(millis(150), "close is not answered", |_| true);
    // The id may be used again, as a new session.
    assert_eq!(ask(&device, &sid, "open", &versions(&[1], Ints::Compact)).typ, "accept");
    device.send(CONTROL, "error", &sid, &[], &error(true));
    device.send(CONTROL, "error", &new_sid(), &[], b"");
    device.send(CONTROL, "error", &new_sid(), &[], b"\xc1");
    device.nothing(millis(150), "errors are not answered", |_| true);
    assert_eq!(ask(&device, &sid, "open", &versions(&[1], Ints::Compact)).typ, "accept");
}

#[test]
fn sessions_keep_their_own_order() {
    let (_rig, device) = Rig::connected();
    let sids: Vec<String> = (0..10).map(|_| new_sid()).collect();
    for n in 0..20 {
        for sid in &sids {
            device.send(CONTROL, &format!("bogus-{n}"), sid, &[], b"");
        }
    }
    for sid in &sids {
        for n in 0..20 {
            let (text, ..) = complaint(&device.next_of(sid, SOON));
            assert_eq!(text, format!("session: control type message not understood: 'bogus-{n}'"));
        }
    }
}
